//! The parts, put together: one IOMMU, a server for each endpoint, the trace.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::qmp::{self, MachineEvent};
use super::stop::Stop;
use super::table::Table;
use crate::devices::ioat::Ioat;
use crate::devices::nvme::{Disk, Nvme, NvmeConfig};
use crate::dma::DmaCounters;
use crate::iommu::{Counters, Iommu};
use crate::pci::{self, Function, Slot};
use crate::topology::qemu::Paths;
use crate::topology::{Endpoint, Model, Size, Topology};
use crate::vhost::{self, Injection};
use viommu_trace::{self as trace, Tracer};

/// How long clients that are still connected may take to leave when the daemon ends.
const SESSION_END: Duration = Duration::from_millis(300);

/// How long the virtqueues' thread may take. It ends after its turn, and takes longer only if an access of an endpoint that
/// it waits for does not end: one to memory whose page does not come.
const QUEUES_END: Duration = Duration::from_secs(2);

/// How often that is looked at.
const TICK: Duration = Duration::from_millis(5);

/// What the command line says of a daemon.
pub struct Options {
    /// Where its sockets are.
    pub paths: Paths,
    /// The trace socket, if there is to be one.
    pub trace_socket: Option<PathBuf>,
    /// QEMU's QMP socket, if it may be used.
    pub qmp: Option<PathBuf>,
    /// The size of images that do not exist and are to be made.
    pub create_images: Option<Size>,
    /// Requests that are to be answered wrongly, for tests of drivers.
    pub inject: Vec<Injection>,
}

/// What the daemon did so far.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// The IOMMU's own counts.
    pub iommu: Counters,
    /// Requests of a type that the device does not know.
    pub unknown_requests: u64,
    /// Descriptor chains that were no requests.
    pub malformed_requests: u64,
    /// Kicks of the driver, on both queues.
    pub kicks: u64,
    /// Bytes that endpoints read from memory through mappings.
    pub dma_read_bytes: u64,
    /// Bytes that endpoints wrote to memory through mappings.
    pub dma_write_bytes: u64,
    /// Bytes that endpoints read and wrote untranslated.
    pub dma_bypass_bytes: u64,
    /// I/O commands that NVMe controllers completed.
    pub io_count: u64,
    /// Bytes that these commands moved.
    pub io_bytes: u64,
    /// Events traced.
    pub events: u64,
    /// Events lost because a ring was full.
    pub events_lost: u64,
}

/// The open images of a topology's endpoints, in their order; `None` for one that has none.
pub type Images = Vec<Option<Arc<Disk>>>;

/// A daemon that has all its files and sockets, and no thread yet: who connects waits. What it made goes with it.
pub struct Bound<'t> {
    topology: &'t Topology,
    iommu: Arc<Iommu>,
    tracer: Tracer,
    trace: Option<trace::Bound>,
    server: vhost::Server,
    sockets: Vec<pci::Server>,
    images: Images,
    qmp: Option<PathBuf>,
    table: Table,
}

/// A running daemon.
pub struct Daemon {
    iommu: Arc<Iommu>,
    control: vhost::Control,
    vhost_end: vhost::Shutdown,
    vhost_thread: JoinHandle<()>,
    endpoints: Vec<Served>,
    trace: Option<trace::TraceHandle>,
    _table: Table,
}

/// An endpoint that is served.
struct Served {
    server: Arc<pci::Server>,
    end: EventFd,
    thread: JoinHandle<()>,
    dma: Arc<DmaCounters>,
    disk: Option<Arc<Disk>>,
}

impl Bound<'_> {
    /// Makes the sockets and the table; waits for nobody.
    pub fn new<'t>(topology: &'t Topology, options: &Options, images: Images) -> Result<Bound<'t>> {
        let (tracer, trace) = match &options.trace_socket {
            // Without a way to see them, events are not even made.
            None => (Tracer::default(), None),
            Some(socket) => {
                let options = trace::Options { socket: Some(socket.clone()), ..trace::Options::default() };
                let (tracer, bound) = trace::bind(options).context("Cannot start the trace")?;
                (tracer, Some(bound))
            }
        };
        let iommu = Iommu::new(topology.settings(), tracer.clone());
        let server = vhost::Server::bind(&options.paths.iommu, iommu.clone(), tracer.clone());
        let server = server.context("Cannot serve the IOMMU")?;
        let bind = |endpoint| {
            let socket = pci::Server::bind(&options.paths.endpoint(endpoint));
            socket.with_context(|| format!("Cannot serve the endpoint {}", endpoint.name))
        };
        let sockets = topology.endpoints.iter().map(bind).collect::<Result<_>>()?;
        let table = Table::publish(&options.paths.viot(), topology)?;
        if !options.inject.is_empty() {
            log::warn!("Some requests are answered wrongly on purpose (--inject)");
            server.control().inject(&options.inject);
        }
        Ok(Bound { topology, iommu, tracer, trace, server, sockets, images, qmp: options.qmp.clone(), table })
    }

    /// A connection to the trace; there must be one.
    pub fn connect_to_trace(&mut self) -> Result<UnixStream> {
        let trace = self.trace.as_mut().context("There is no trace")?;
        trace.connect().context("Cannot connect to the trace")
    }

    /// Starts the threads.
    pub fn start(self, stop: &Stop) -> Result<Daemon> {
        let Bound { topology, iommu, tracer, trace, mut server, sockets, images, qmp, table } = self;
        let trace = trace.map(trace::Bound::start).transpose().context("Cannot start the trace")?;
        let control = server.control();
        let vhost_end = server.shutdown();
        let mut endpoints = Vec::new();
        for ((endpoint, disk), socket) in topology.endpoints.iter().zip(images).zip(sockets) {
            let mut slot = Slot::new(&iommu, endpoint.bdf.id(), tracer.clone());
            if topology.iommu.polling {
                slot = slot.with_poller(Arc::new(control.clone()));
            }
            if !endpoint.msix {
                slot = slot.without_msix();
            }
            let served = serve(endpoint, socket, disk, slot, &control);
            endpoints.push(served.with_context(|| format!("Cannot serve the endpoint {}", endpoint.name))?);
        }
        let vhost_thread = std::thread::Builder::new()
            .name("iommu".into())
            .spawn(move || {
                if let Err(error) = server.run() {
                    log::error!("{:#}", anyhow::Error::new(error));
                }
            })
            .context("Cannot start a thread")?;
        if let Some(path) = qmp {
            let control = control.clone();
            let tell = move |event| match event {
                MachineEvent::Stop => control.machine_paused(),
                MachineEvent::Resume => control.machine_resumed(),
                MachineEvent::Reset => control.machine_reset(),
            };
            qmp::watch(path, stop.clone(), tell).context("Cannot start a thread")?;
        }
        Ok(Daemon { iommu, control, vhost_end, vhost_thread, endpoints, trace, _table: table })
    }
}

impl Daemon {
    /// Records events from now on, or none.
    pub fn record(&self, on: bool) {
        if let Some(trace) = &self.trace {
            trace.record(on);
        }
    }

    /// I/O commands that NVMe controllers completed so far.
    pub fn io_count(&self) -> u64 {
        let disks = self.endpoints.iter().filter_map(|endpoint| endpoint.disk.as_ref());
        disks.map(|disk| disk.counters.io_count.load(Ordering::Relaxed)).sum()
    }

    /// Ends everything and says what was done.
    pub fn end(self) -> Counts {
        self.vhost_end.trigger();
        for endpoint in &self.endpoints {
            // A counter that is full is triggered.
            let _ = endpoint.end.write(1);
        }
        let deadline = Instant::now() + SESSION_END;
        if !finishes(&self.vhost_thread, Instant::now() + QUEUES_END) {
            log::warn!(
                "The IOMMU still waits for an access to guest memory that does not end; it is left to the end of the process"
            );
            self.vhost_end.stop_listening();
        } else if self.vhost_thread.join().is_err() {
            log::error!("The thread that served the IOMMU panicked");
        }
        let mut counts = Counts { iommu: self.iommu.counters(), ..Counts::default() };
        for endpoint in &self.endpoints {
            if !finishes(&endpoint.thread, deadline) {
                // A client that stays is left to the end of the process; nobody else is to connect.
                endpoint.server.stop_listening();
            }
            endpoint.add_to(&mut counts);
        }
        let queues = self.control.counters();
        counts.kicks = queues.kicks;
        counts.unknown_requests = queues.unknown;
        counts.malformed_requests = queues.malformed - queues.unknown;
        if let Some(trace) = self.trace {
            let events = trace.stop();
            counts.events = events.emitted();
            counts.events_lost = events.lost;
        }
        counts
    }
}

/// Waits until a thread has ended, but not beyond `deadline`; whether it has.
fn finishes(thread: &JoinHandle<()>, deadline: Instant) -> bool {
    while !thread.is_finished() && Instant::now() < deadline {
        std::thread::sleep(TICK);
    }
    thread.is_finished()
}

impl Served {
    fn add_to(&self, counts: &mut Counts) {
        counts.dma_read_bytes += self.dma.read.load(Ordering::Relaxed);
        counts.dma_write_bytes += self.dma.written.load(Ordering::Relaxed);
        counts.dma_bypass_bytes += self.dma.bypassed.load(Ordering::Relaxed);
        if let Some(disk) = &self.disk {
            let done = &disk.counters;
            counts.io_count += done.io_count.load(Ordering::Relaxed);
            counts.io_bytes += done.bytes_read.load(Ordering::Relaxed) + done.bytes_written.load(Ordering::Relaxed);
        }
    }
}

/// Opens the images of a topology; those that do not exist are made if a size is given for them.
pub fn open_images(topology: &Topology, create: Option<Size>) -> Result<Images> {
    topology.endpoints.iter().map(|endpoint| open_disk(endpoint, create)).collect()
}

/// Opens what an endpoint needs; `None` for one that needs nothing.
pub fn open_disk(endpoint: &Endpoint, create: Option<Size>) -> Result<Option<Arc<Disk>>> {
    let Model::Nvme { image, block_size, serial } = &endpoint.model else { return Ok(None) };
    if let Some(size) = create {
        create_image(image, size).with_context(|| format!("Cannot make the image {}", image.display()))?;
    }
    let config = NvmeConfig { block_size: *block_size, ..NvmeConfig::new(image, serial) };
    let disk = Disk::open(config).with_context(|| format!("Cannot serve the endpoint {}", endpoint.name))?;
    Ok(Some(disk))
}

/// Makes an image of zeroes, unless there is one.
fn create_image(path: &Path, size: Size) -> std::io::Result<()> {
    match std::fs::File::create_new(path) {
        Ok(file) => file.set_len(size.0),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

fn serve(
    endpoint: &Endpoint,
    server: pci::Server,
    disk: Option<Arc<Disk>>,
    slot: Slot,
    control: &vhost::Control,
) -> Result<Served> {
    let server = Arc::new(server);
    let end = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).context("Cannot make an event")?;
    let dma = slot.context().dma.counters().clone();
    let shutdown = end.try_clone().context("Cannot copy an event")?;
    let control = control.clone();
    let (model, listening) = (disk.clone(), server.clone());
    let run = move || {
        let make = |context| -> Box<dyn Function> {
            match &model {
                Some(disk) => Box::new(Nvme::new(context, disk.clone())),
                None => Box::new(Ioat::new(context)),
            }
        };
        if let Err(error) = listening.serve(&slot, &shutdown, make, || control.function_reset()) {
            log::error!("{} is served no more: {error}", listening.path().display());
        }
    };
    let thread = std::thread::Builder::new().name(endpoint.name.clone()).spawn(run).context("Cannot start a thread")?;
    Ok(Served { server, end, thread, dma, disk })
}

//! The composition root: from a topology one IOMMU, a server for each endpoint, the trace.

mod table;

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::devices::Device;
use crate::dma::DmaCounters;
use crate::iommu::{self, Iommu, Live};
use crate::pci::{self, Function, Slot};
use crate::topology::qemu::Paths;
use crate::topology::{Endpoint, Size, Topology};
use crate::vhost::{self, Injection};
use table::Table;
use viommu_trace::{self as trace, Tracer};

/// How long clients that are still connected may take to leave when the daemon ends.
const SESSION_END: Duration = Duration::from_millis(300);

/// How long the virtqueues' thread may take. It ends after its time slice, and takes longer only if an access of an endpoint
/// that it waits for does not end: one to memory whose page does not come.
const QUEUES_END: Duration = Duration::from_secs(2);

/// How often that is looked at.
const TICK: Duration = Duration::from_millis(5);

/// How a daemon is to be, beside its topology.
pub struct Options {
    /// Where its sockets are.
    pub paths: Paths,
    /// The trace socket, if there is to be one.
    pub trace_socket: Option<PathBuf>,
    /// Requests that are to be answered wrongly, for tests of drivers.
    pub inject: Vec<Injection>,
}

/// What the daemon has done so far.
#[derive(Clone, Debug, Default)]
pub struct DaemonStats {
    /// Of the IOMMU itself.
    pub iommu: iommu::Stats,
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
    /// I/O commands that endpoints completed.
    pub io_count: u64,
    /// Bytes that these commands moved.
    pub io_bytes: u64,
    /// Events traced.
    pub events: u64,
    /// Events lost because a ring was full.
    pub events_lost: u64,
}

/// What the endpoints of a topology have open, in their order.
pub type Devices = Vec<Arc<dyn Device>>;

/// A daemon that has all its files and sockets, and no thread yet: who connects waits. What it made goes with it.
pub struct Bound<'t> {
    topology: &'t Topology,
    iommu: Arc<Iommu>,
    tracer: Tracer,
    trace: Option<trace::Bound>,
    server: vhost::Server,
    sockets: Vec<pci::FunctionServer>,
    devices: Devices,
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
    server: Arc<pci::FunctionServer>,
    end: EventFd,
    thread: JoinHandle<()>,
    dma: Arc<DmaCounters>,
    device: Arc<dyn Device>,
}

impl Bound<'_> {
    /// Makes the sockets and the table; waits for nobody.
    pub fn new<'t>(topology: &'t Topology, options: &Options, devices: Devices) -> Result<Bound<'t>> {
        let (tracer, mut trace) = match &options.trace_socket {
            // Without a way to see them, events are not even made.
            None => (Tracer::default(), None),
            Some(socket) => {
                let options = trace::Options { socket: Some(socket.clone()), ..trace::Options::default() };
                let (tracer, bound) = trace::bind(options).context("Cannot start the trace")?;
                (tracer, Some(bound))
            }
        };
        let iommu = Iommu::new(topology.settings(), tracer.clone());
        if let Some(trace) = &mut trace {
            let iommu = iommu.clone();
            trace.set_state(move || Box::new(Live::new(iommu.clone())));
        }
        let server = vhost::Server::bind(&options.paths.iommu, iommu.clone(), tracer.clone());
        let server = server.context("Cannot serve the IOMMU")?;
        let bind = |endpoint| {
            let socket = pci::FunctionServer::bind(&options.paths.endpoint(endpoint));
            socket.with_context(|| format!("Cannot serve the endpoint {}", endpoint.name))
        };
        let sockets = topology.endpoints.iter().map(bind).collect::<Result<_>>()?;
        let table = Table::publish(&options.paths.viot(), topology)?;
        if !options.inject.is_empty() {
            log::warn!("Some requests are answered wrongly on purpose (--inject)");
            server.control().inject(&options.inject);
        }
        Ok(Bound { topology, iommu, tracer, trace, server, sockets, devices, table })
    }

    /// A connection to the trace; there must be one.
    pub fn connect_to_trace(&mut self) -> Result<UnixStream> {
        let trace = self.trace.as_mut().context("There is no trace")?;
        trace.connect().context("Cannot connect to the trace")
    }

    /// Starts the threads.
    ///
    /// # Errors
    /// The system has none to give.
    pub fn start(self) -> Result<Daemon> {
        let Bound { topology, iommu, tracer, trace, mut server, sockets, devices, table } = self;
        let trace = trace.map(trace::Bound::start).transpose().context("Cannot start the trace")?;
        let control = server.control();
        let vhost_end = server.shutdown();
        let mut endpoints = Vec::new();
        for ((endpoint, device), socket) in topology.endpoints.iter().zip(devices).zip(sockets) {
            let mut slot = Slot::new(&iommu, endpoint.bdf.id(), tracer.clone());
            if topology.iommu.polling {
                slot = slot.with_poller(Arc::new(control.clone()));
            }
            if !endpoint.msix {
                slot = slot.without_msix();
            }
            if endpoint.ats {
                slot = slot.with_ats();
            }
            if endpoint.behind.is_some() {
                slot = slot.behind_root_port();
            }
            let served = serve(endpoint, socket, device, slot, &control);
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

    /// The IOMMU's queues, to tell of what happens to the machine.
    pub fn control(&self) -> &vhost::Control {
        &self.control
    }

    /// I/O commands that endpoints completed so far.
    pub fn io_count(&self) -> u64 {
        self.endpoints.iter().map(|endpoint| endpoint.device.stats().io_count).sum()
    }

    /// Ends everything and says what was done.
    pub fn end(self) -> DaemonStats {
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
        let mut stats = DaemonStats { iommu: self.iommu.stats(), ..DaemonStats::default() };
        for endpoint in &self.endpoints {
            if !finishes(&endpoint.thread, deadline) {
                // A client that stays is left to the end of the process; nobody else is to connect.
                endpoint.server.stop_listening();
            }
            endpoint.add_to(&mut stats);
        }
        let queues = self.control.stats();
        stats.kicks = queues.kicks;
        stats.unknown_requests = queues.unknown;
        stats.malformed_requests = queues.malformed - queues.unknown;
        if let Some(trace) = self.trace {
            let events = trace.stop();
            stats.events = events.emitted();
            stats.events_lost = events.lost;
        }
        stats
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
    fn add_to(&self, stats: &mut DaemonStats) {
        stats.dma_read_bytes += self.dma.read.load(Ordering::Relaxed);
        stats.dma_write_bytes += self.dma.written.load(Ordering::Relaxed);
        stats.dma_bypass_bytes += self.dma.bypassed.load(Ordering::Relaxed);
        let done = self.device.stats();
        stats.io_count += done.io_count;
        stats.io_bytes += done.io_bytes;
    }
}

/// Opens what the endpoints of a topology need; images that do not exist are made if a size is given for them.
///
/// # Errors
/// What cannot be opened, and what to do.
pub fn open_devices(topology: &Topology, create_images: Option<Size>) -> Result<Devices> {
    topology.endpoints.iter().map(|endpoint| open_device(endpoint, create_images)).collect()
}

/// Opens what an endpoint needs.
///
/// # Errors
/// As for [`open_devices`].
pub fn open_device(endpoint: &Endpoint, create_images: Option<Size>) -> Result<Arc<dyn Device>> {
    let device = endpoint.configuration.open(create_images.map(|size| size.0));
    device.map_err(anyhow::Error::from_boxed).with_context(|| format!("Cannot serve the endpoint {}", endpoint.name))
}

fn serve(
    endpoint: &Endpoint,
    server: pci::FunctionServer,
    device: Arc<dyn Device>,
    slot: Slot,
    control: &vhost::Control,
) -> Result<Served> {
    let server = Arc::new(server);
    let end = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).context("Cannot make an event")?;
    let dma = slot.context().dma.counters().clone();
    let shutdown = end.try_clone().context("Cannot copy an event")?;
    let control = control.clone();
    let (model, listening) = (device.clone(), server.clone());
    let run = move || {
        if let Err(error) = listening.serve(
            &slot,
            &shutdown,
            |context| -> Box<dyn Function> { model.make(context) },
            || control.function_reset(),
        ) {
            log::error!("{} is served no more: {error}", listening.path().display());
        }
    };
    let thread = std::thread::Builder::new().name(endpoint.name.clone()).spawn(run).context("Cannot start a thread")?;
    Ok(Served { server, end, thread, dma, device })
}

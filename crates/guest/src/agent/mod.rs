//! The trace agent: sends the guest's own trace events to the host while other workloads run.
//!
//! It has an ftrace instance of its own, so that the guest's other traces stay as they are. It reads the ring buffer of
//! each processor in its binary form, and writes a JSON line for each event to a virtio-serial port. `docs/trace.md`
//! describes the lines.

mod format;
mod line;
mod page;

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use viommu_wire::size;

use crate::results::Results;
use crate::sysfs;
use crate::workload::{Needs, Workload};
use format::Format;
use page::Page;

/// The version of the lines' format.
const VERSION: u32 = 1;
/// The name of the virtio-serial port that takes the lines.
const PORT: &str = "viommu.guest-trace";
/// How long the port may take to appear: the device announces it to its driver.
const PORT_LIMIT: Duration = Duration::from_secs(300);
/// Where tracefs is.
const TRACEFS: &str = "/sys/kernel/tracing";
/// The agent's instance of ftrace.
const INSTANCE: &str = "/sys/kernel/tracing/instances/viommu-agent";
/// How often the ring buffers are read.
const TICK: Duration = Duration::from_millis(20);
/// More bytes than a page of the ring buffer has.
const PAGE_MAX: usize = 64 << 10;

/// The events that are traced if none are named, as far as the kernel has them. The series for Linux 6.12 has a group of
/// its own for the two-step API; in Linux 7.3 its events are in the group of the DMA API.
const DEFAULT: [&str; 8] = [
    "dma_iova",
    "dma:dma_iova_*",
    "iommu:map",
    "iommu:unmap",
    "nvme:nvme_setup_cmd",
    "nvme:nvme_complete_rq",
    "block:block_rq_issue",
    "block:block_rq_complete",
];

/// Send the guest's trace events to the host, while the workloads after this one run.
#[derive(clap::Args)]
pub struct Args {
    /// An event, SYSTEM:NAME, or all events of a SYSTEM, or those whose names begin with NAME, SYSTEM:NAME*; may be given
    /// several times. The default is dma_iova, dma:dma_iova_*, and the events of iommu, nvme and block that belong to
    /// mapping and I/O.
    #[arg(long = "event", value_name = "SYSTEM[:NAME[*]]")]
    events: Vec<String>,
    /// The ring buffer of each processor.
    #[arg(long, default_value = "8M", value_parser = size::parse)]
    buffer: u64,
}

/// The running agent, if there is one.
static AGENT: Mutex<Option<Agent>> = Mutex::new(None);

struct Agent {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Totals>>,
}

/// How much was sent.
#[derive(Clone, Copy, Default)]
struct Totals {
    events: u64,
    lost: u64,
}

impl Workload for Args {
    const NEEDS: Needs = Needs { modules: &["virtio_console"], ..Needs::NOTHING };

    /// The workload: events are sent from now on, until [`stop`].
    ///
    /// # Errors
    /// If QEMU has no port for the events, or if the kernel cannot trace an event that was named.
    fn run(&self, _results: &mut Results) -> Result<()> {
        let mut agent = AGENT.lock().unwrap_or_else(PoisonError::into_inner);
        ensure!(agent.is_none(), "The guest's events are traced already: give the workload trace once");
        let port = open_port()?;
        let mut tracer = Tracer::new(self, port).context("Cannot trace the guest's events")?;
        let stop = Arc::new(AtomicBool::new(false));
        let seen = stop.clone();
        let thread = std::thread::Builder::new().name("trace-agent".into()).spawn(move || tracer.run(&seen));
        *agent = Some(Agent { stop, thread: thread.context("Cannot start a thread")? });
        Ok(())
    }
}

/// Sends the remaining events and ends the agent, if one runs. Emits one `result`.
///
/// # Errors
/// Why events could not be sent.
pub fn stop(results: &mut Results) -> Result<()> {
    let Some(agent) = AGENT.lock().unwrap_or_else(PoisonError::into_inner).take() else { return Ok(()) };
    agent.stop.store(true, Ordering::Release);
    let totals = match agent.thread.join() {
        Ok(totals) => totals.context("Tracing the guest's events failed")?,
        Err(_) => bail!("The trace agent panicked; the console has the message"),
    };
    results.emit("result", json!({ "workload": "trace", "events": totals.events, "lost": totals.lost }));
    Ok(())
}

fn open_port() -> Result<File> {
    let ports = Path::new("/sys/class/virtio-ports");
    let deadline = Instant::now() + PORT_LIMIT;
    loop {
        let named = |name: &String| sysfs::text(ports.join(name).join("name")).as_deref() == Some(PORT);
        if let Some(name) = sysfs::names(ports).into_iter().find(named) {
            let node = Path::new("/dev").join(name);
            return OpenOptions::new()
                .write(true)
                .open(&node)
                .with_context(|| format!("Cannot open {}", node.display()));
        }
        ensure!(
            Instant::now() < deadline,
            "QEMU has no virtio-serial port named {PORT} for the guest's trace: run `viommu run` with --guest-trace FILE"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Reads ring buffers and writes lines.
struct Tracer {
    out: BufWriter<File>,
    formats: HashMap<u16, Format>,
    processors: Vec<Processor>,
    line: line::Writer,
    totals: Totals,
}

/// One processor's ring buffer.
struct Processor {
    number: usize,
    pipe: File,
    statistics: PathBuf,
    /// Events that were reported as lost.
    lost: u64,
    /// The time of the last event.
    last: u64,
}

impl Tracer {
    fn new(args: &Args, port: File) -> Result<Self> {
        let instance = Path::new(INSTANCE);
        fs::create_dir(instance).with_context(|| format!("Cannot make {INSTANCE}"))?;
        set(instance, "trace_clock", "mono")?;
        set(instance, "buffer_size_kb", &(args.buffer >> 10).max(4).to_string())?;
        let names: Vec<&str> =
            if args.events.is_empty() { DEFAULT.to_vec() } else { args.events.iter().map(String::as_str).collect() };
        let mut formats = HashMap::new();
        for name in names {
            let found = enable(instance, name)?;
            ensure!(!found.is_empty() || args.events.is_empty(), "The kernel has no trace event {name}");
            formats.extend(found.into_iter().map(|format| (format.id, format)));
        }
        ensure!(!formats.is_empty(), "The kernel has none of the trace events {DEFAULT:?}");
        let mut processors = Vec::new();
        for name in sysfs::names(instance.join("per_cpu")) {
            let folder = instance.join("per_cpu").join(&name);
            let Some(number) = name.strip_prefix("cpu").and_then(|number| number.parse().ok()) else { continue };
            let mut options = OpenOptions::new();
            let pipe = options.read(true).custom_flags(libc::O_NONBLOCK).open(folder.join("trace_pipe_raw"));
            let pipe = pipe.with_context(|| format!("Cannot read the ring buffer of {name}"))?;
            processors.push(Processor { number, pipe, statistics: folder.join("stats"), lost: 0, last: now()? });
        }
        let out = BufWriter::with_capacity(32 << 10, port);
        let mut tracer = Self { out, formats, processors, line: line::Writer::default(), totals: Totals::default() };
        tracer.hello()?;
        Ok(tracer)
    }

    fn hello(&mut self) -> Result<()> {
        let mut names: Vec<_> = self.formats.values().map(|format| format.name.as_str()).collect();
        names.sort_unstable();
        let rest = json!({
            "kind": "hello", "version": VERSION, "source": "guest", "clock": "CLOCK_MONOTONIC",
            "kernel": sysfs::text("/proc/sys/kernel/osrelease"), "cpus": self.processors.len(), "events": names,
        });
        self.send(now()?, &rest)
    }

    /// Sends a line of the agent's own. The time comes first, as in the lines of events.
    fn send(&mut self, time: u64, members: &Value) -> Result<()> {
        let rest = members.to_string();
        let line = format!("{{\"t\":{time},{}\n", rest.trim_start_matches('{'));
        self.out.write_all(line.as_bytes()).context("Cannot write to the port of the trace")
    }

    fn run(&mut self, stop: &AtomicBool) -> Result<Totals> {
        while !stop.load(Ordering::Acquire) {
            self.drain()?;
            self.out.flush().context("Cannot write to the port of the trace")?;
            std::thread::sleep(TICK);
        }
        set(Path::new(INSTANCE), "tracing_on", "0")?;
        self.drain()?;
        for at in 0..self.processors.len() {
            self.report_loss(at, now()?)?;
        }
        let Totals { events, lost } = self.totals;
        self.send(now()?, &json!({ "kind": "end", "events": events, "lost": lost }))?;
        self.out.flush().context("Cannot write to the port of the trace")?;
        self.processors.clear();
        // If this fails, the instance ends with the guest.
        let _ = fs::remove_dir(INSTANCE);
        Ok(self.totals)
    }

    /// Sends all events that are in the ring buffers now.
    fn drain(&mut self) -> Result<()> {
        self.line.refresh();
        let mut bytes = vec![0; PAGE_MAX];
        for at in 0..self.processors.len() {
            loop {
                match self.processors[at].pipe.read(&mut bytes) {
                    Ok(0) => break,
                    Ok(length) => self.page(at, &bytes[..length])?,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) => return Err(error).context("Cannot read a ring buffer"),
                }
            }
        }
        Ok(())
    }

    fn page(&mut self, at: usize, bytes: &[u8]) -> Result<()> {
        let page = Page::new(bytes).with_context(|| format!("A page of {} bytes is none", bytes.len()))?;
        if page.missed {
            self.report_loss(at, page.time)?;
        }
        let processor = &mut self.processors[at];
        for entry in page {
            processor.last = entry.time;
            let Some((id, task)) = format::head(entry.record) else { continue };
            // The instance has no other events, except for markers that somebody writes into it.
            let Some(format) = self.formats.get(&id) else { continue };
            let line = self.line.event(&entry, format, processor.number, task);
            self.out.write_all(line.as_bytes()).context("Cannot write to the port of the trace")?;
            self.totals.events += 1;
        }
        Ok(())
    }

    /// Reports lost events of a processor that were not reported yet: those overwritten or never recorded.
    fn report_loss(&mut self, at: usize, time: u64) -> Result<()> {
        let processor = &mut self.processors[at];
        let text = sysfs::text(&processor.statistics).unwrap_or_default();
        let count = |name: &str| -> u64 {
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            value.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
        };
        let lost = count("overrun") + count("commit overrun") + count("dropped events");
        let new = lost.saturating_sub(processor.lost);
        if new == 0 {
            return Ok(());
        }
        processor.lost = lost;
        let loss = json!({
            "kind": "lost", "place": "guest", "cpu": processor.number, "count": new, "since": processor.last,
        });
        self.totals.lost += new;
        self.send(time, &loss)
    }
}

/// The time of the clock that events are stamped with, ns.
fn now() -> Result<u64> {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).context("Cannot read the clock")?;
    Ok(Duration::from(time).as_nanos() as u64)
}

fn set(instance: &Path, name: &str, value: &str) -> Result<()> {
    fs::write(instance.join(name), value).with_context(|| format!("Cannot set {name} to {value} in {INSTANCE}"))
}

/// Enables an event, all events of a system, or those whose names begin so. Returns their formats; none if the kernel
/// does not have it.
fn enable(instance: &Path, name: &str) -> Result<Vec<Format>> {
    let (system, event) = name.split_once(':').unwrap_or((name, "*"));
    let folder = Path::new("events").join(system);
    let events = match event.strip_suffix('*') {
        Some(begin) => {
            let names = sysfs::names(instance.join(&folder));
            names.into_iter().filter(|name| name.starts_with(begin)).collect()
        }
        None => vec![event.to_owned()],
    };
    let mut formats = Vec::new();
    for event in events {
        let folder = folder.join(event);
        let Some(text) = sysfs::text(Path::new(TRACEFS).join(&folder).join("format")) else { continue };
        let format = Format::parse(system, &text);
        formats.push(format.with_context(|| format!("Cannot understand the format of {}", folder.display()))?);
        set(instance, &folder.join("enable").to_string_lossy(), "1")?;
    }
    Ok(formats)
}

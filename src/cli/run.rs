//! `viommu run`: the daemon and a QEMU, from one topology.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::sandbox::Sandbox;
use super::source::Source;
use super::stop::{Caught, Stop};
use super::summary::{Files, Summary};
use super::{
    accel::{self, Accel},
    files, machine, qemu, say,
};
use crate::daemon::{Bound, Options, open_devices};
use crate::topology::qemu::{self as arguments, Paths};
use crate::topology::{Size, Topology};
use crate::vhost::Injection;
use viommu_trace::{Backlog, Format, Subscription, TraceFile};

/// How long QEMU may take to end once it is asked to.
const QEMU_END: Duration = Duration::from_secs(5);

/// How often a running QEMU is looked at.
const TICK: Duration = Duration::from_millis(20);

/// Run a QEMU with the endpoints of a topology behind the IOMMU
///
/// Ends when QEMU ends, and ends QEMU when it is asked to end itself (SIGINT, SIGTERM). Prints a summary of what the
/// IOMMU and the devices did.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: Source,

    /// The folder for sockets, VIOT, guest console and results [default: a temporary one]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,

    /// The QEMU to run, 10.2 or later
    #[arg(long, value_name = "PATH", default_value = "qemu-system-x86_64")]
    qemu: PathBuf,

    /// What makes the guest's processors
    #[arg(long, value_enum, default_value_t = Accel::Auto)]
    accel: Accel,

    /// The guest's kernel (bzImage)
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,

    /// The guest's initial RAM file system
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,

    /// The kernel's command line
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0", requires = "kernel")]
    append: String,

    /// Where the guest's first serial port goes: a file, or - for this terminal [default: DIR/guest.log]
    #[arg(long, value_name = "FILE")]
    console: Option<PathBuf>,

    /// Serve the trace on this socket [default: DIR/trace.sock]
    #[arg(long, value_name = "PATH")]
    trace_socket: Option<PathBuf>,

    /// Write the whole trace to this file, as JSON lines
    #[arg(long, value_name = "FILE")]
    trace_file: Option<PathBuf>,

    /// Have a virtio-serial port whose output goes to this file, for the trace of the guest's own events
    ///
    /// The workload trace of viommu-guest writes JSON lines there; `viommu merge` makes one trace of both.
    #[arg(long, value_name = "FILE")]
    guest_trace: Option<PathBuf>,

    /// Write the summary to this file, as JSON
    #[arg(long, value_name = "FILE")]
    summary: Option<PathBuf>,

    /// Make images that do not exist, of this size
    #[arg(long, value_name = "SIZE")]
    create_images: Option<Size>,

    #[command(flatten)]
    sandbox: Sandbox,

    /// For tests of drivers: answer requests wrongly (see CONTRIBUTING.md)
    #[arg(long, value_name = "REQUEST=ANSWER[:KEY=NUMBER]...", hide = true)]
    inject: Vec<Injection>,

    /// Leave the machine, its memory and its processors to the arguments after --
    ///
    /// For memory that a topology does not describe: huge pages, NUMA nodes, DIMMs, virtio-mem. Each memory backend needs
    /// share=on.
    #[arg(long)]
    no_machine: bool,

    /// End QEMU after this many seconds, and fail
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,

    /// More arguments for QEMU
    #[arg(last = true)]
    extra: Vec<String>,
}

/// Runs until QEMU or this process is to end.
pub fn main(args: &Args) -> Result<()> {
    let topology = args.source.load()?;
    qemu::version(&args.qemu)?;
    let folder = folder(args.dir.as_deref())?;
    let files = Files {
        console: args.console.clone().unwrap_or_else(|| folder.join("guest.log")),
        results: folder.join("results.jsonl"),
        trace: args
            .trace_file
            .as_deref()
            .map(std::path::absolute)
            .transpose()
            .context("Cannot resolve the trace file")?,
    };
    let trace_socket = args.trace_socket.clone().unwrap_or_else(|| folder.join("trace.sock"));
    let sockets = Sockets { paths: Paths { iommu: folder.join("viommu.sock") }, qmp: folder.join("qmp.sock") };
    let options =
        Options { paths: sockets.paths.clone(), trace_socket: Some(trace_socket.clone()), inject: args.inject.clone() };
    // Until the images are open a signal ends the process as it ends any other: QEMU and a file system may take their time.
    let accel = accel::choose(args.accel, &args.qemu, args.kernel.as_deref())?;
    let devices = open_devices(&topology, args.create_images)?;
    let signals = Caught::new().context("Cannot wait for signals")?;
    let mut bound = Bound::new(&topology, &options, devices)?;
    let outputs = Outputs::open(args, &files)?;
    let recording = match outputs.trace {
        Some(file) => Some((bound.connect_to_trace()?, file)),
        None => None,
    };
    let started = Instant::now();
    // Outside of the sandbox, and before there are threads: what it connects to waits for them.
    let mut qemu = start_qemu(args, &topology, &sockets, &files, accel)?;
    args.sandbox.enter(&options, Some(&sockets.qmp), Some(qemu.id()));
    let start = || {
        let stop = signals.watch().context("Cannot wait for signals")?;
        let recorder = recording.map(|(stream, file)| record(stream, file)).transpose()?;
        let daemon = bound.start()?;
        machine::follow(&sockets.qmp, &stop, &daemon)?;
        Ok::<_, Error>((daemon, stop, recorder))
    };
    let (daemon, stop, recorder) = start().inspect_err(|_| drop(end(&mut qemu)))?;
    let ended = wait(&mut qemu, &stop, args.timeout.map(Duration::from_secs)).context("Cannot wait for QEMU");
    stop.set();
    let elapsed = started.elapsed();
    let mut stats = daemon.end();
    let recorded = recorder.map_or(Ok(0), |recorder| {
        let lost = recorder.join().ok().context("The thread that writes the trace file panicked")?;
        lost.context("Cannot write the trace")
    });
    stats.events_lost += recorded.as_ref().copied().unwrap_or(0);
    let summary = Summary::new(&stats, &files, outputs.results, elapsed);
    say(&summary)?;
    if let Some((mut file, path)) = outputs.summary.zip(args.summary.as_ref()) {
        let written = files::truncate(&file).and_then(|()| file.write_all(summary.to_json().as_bytes()));
        written.with_context(|| format!("Cannot write the summary to {}", path.display()))?;
    }
    recorded?;
    match ended? {
        Ended::Itself(status) if status.success() => match summary.failure() {
            None => Ok(()),
            Some(failure) => bail!("The guest failed: {failure}; its console is in {}", files.console.display()),
        },
        Ended::Itself(status) => bail!("QEMU failed ({status}); its messages are above"),
        Ended::Asked => Ok(()),
        Ended::Timeout(limit) => {
            bail!("The guest did not end within {} s; its console is in {}", limit.as_secs(), files.console.display())
        }
    }
}

/// The files of a run that are open from its beginning: afterwards none is opened.
struct Outputs {
    trace: Option<File>,
    summary: Option<File>,
    results: File,
}

impl Outputs {
    /// Opens them, and empties those that are written from the beginning.
    fn open(args: &Args, files: &Files) -> Result<Outputs> {
        let open = |path: Option<&PathBuf>, what: &str| {
            let open = |path: &PathBuf| {
                files::open(path).with_context(|| format!("Cannot write the {what} to {}", path.display()))
            };
            path.map(open).transpose()
        };
        let trace = open(args.trace_file.as_ref(), "trace")?;
        let summary = open(args.summary.as_ref(), "summary")?;
        if let Some(trace) = &trace {
            files::truncate(trace).context("Cannot empty the trace file")?;
        }
        if args.console.is_none() {
            files::replace(&files.console)?;
        }
        Ok(Outputs { trace, summary, results: files::replace(&files.results)? })
    }
}

/// The sockets between the daemon and QEMU.
struct Sockets {
    paths: Paths,
    qmp: PathBuf,
}

/// Why QEMU is not running any more.
enum Ended {
    Itself(ExitStatus),
    Asked,
    Timeout(Duration),
}

fn start_qemu(
    args: &Args,
    topology: &Topology,
    sockets: &Sockets,
    files: &Files,
    accel: accel::Chosen,
) -> Result<Child> {
    let mut command = Command::new(&args.qemu);
    if !args.no_machine {
        command.args(arguments::machine(topology));
    }
    command.args(accel.arguments());
    command.args(["-no-user-config", "-nodefaults", "-display", "none"]);
    if files.console.as_os_str() == "-" {
        command.args(["-serial", "mon:stdio"]);
    } else {
        command.arg("-serial").arg(format!("file:{}", files.console.display())).stdin(Stdio::null());
    }
    command.arg("-serial").arg(format!("file:{}", files.results.display()));
    command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", arguments::comma_safe(&sockets.qmp)));
    command.args(arguments::devices(topology, &sockets.paths));
    if let Some(file) = &args.guest_trace {
        command.args(arguments::guest_trace(file));
    }
    if let Some(kernel) = &args.kernel {
        command.arg("-kernel").arg(kernel).arg("-append").arg(&args.append);
    }
    if let Some(initrd) = &args.initrd {
        command.arg("-initrd").arg(initrd);
    }
    command.args(&args.extra);
    log::info!("Starting {command:?}");
    // A guest whose IOMMU is gone polls for ever.
    qemu::end_with_us(&mut command);
    command.spawn().with_context(|| format!("Cannot start {}", args.qemu.display()))
}

fn wait(child: &mut Child, stop: &Stop, limit: Option<Duration>) -> std::io::Result<Ended> {
    let deadline = limit.map(|limit| (Instant::now() + limit, limit));
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Ended::Itself(status));
        }
        if let Some((deadline, limit)) = deadline
            && Instant::now() >= deadline
        {
            end(child)?;
            return Ok(Ended::Timeout(limit));
        }
        if stop.wait(TICK) {
            end(child)?;
            return Ok(Ended::Asked);
        }
    }
}

/// Asks QEMU to end, and makes it end if it does not.
fn end(child: &mut Child) -> std::io::Result<()> {
    if let Ok(pid) = i32::try_from(child.id()) {
        // It may have ended by itself in this moment.
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
    let deadline = Instant::now() + QEMU_END;
    while Instant::now() < deadline {
        if child.try_wait()?.is_some() {
            return Ok(());
        }
        std::thread::sleep(TICK);
    }
    child.kill()?;
    child.wait().map(drop)
}

/// Copies the trace to a file, from now until its connection closes; returns how many events the file lacks because
/// writing it was too slow.
fn record(mut stream: UnixStream, out: File) -> Result<JoinHandle<Result<u64>>> {
    let subscription = Subscription { format: Format::Binary, backlog: Backlog::All, ..Subscription::default() };
    stream.write_all(subscription.line().as_bytes()).context("Cannot ask for the trace")?;
    let copy = move || {
        let mut trace = TraceFile::new(stream)?;
        let mut out = BufWriter::with_capacity(1 << 20, out);
        let mut lost = 0;
        let mut line = Vec::new();
        while let Some(entry) = trace.next_entry()? {
            line.clear();
            trace.append_json(&entry, &mut line);
            out.write_all(&line)?;
            lost += entry.item.lost_on_the_way();
        }
        out.flush()?;
        Ok(lost)
    };
    std::thread::Builder::new().name("trace-file".into()).spawn(copy).context("Cannot start a thread")
}

/// The folder of a run. A temporary one stays, with what the guest said in it.
fn folder(path: Option<&Path>) -> Result<PathBuf> {
    let Some(path) = path else {
        let temporary =
            tempfile::Builder::new().prefix("viommu-").tempdir().context("Cannot make a temporary folder")?;
        return Ok(temporary.keep());
    };
    std::fs::create_dir_all(path).with_context(|| format!("Cannot make the folder {}", path.display()))?;
    path.canonicalize().with_context(|| format!("Cannot resolve {}", path.display()))
}

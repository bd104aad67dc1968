//! Boots a real guest with `viommu run` and collects what can be seen of it.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How long one guest may take, from start to power-off; under emulation on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(600);

/// A guest to be booted.
pub struct Guest {
    topology: String,
    kernel: &'static str,
    append: String,
    workload: String,
    disk: Option<Vec<u8>>,
    boots_from_disk: bool,
    guest_trace: bool,
    inject: Vec<String>,
    machine: Vec<String>,
    qemu: Vec<String>,
}

impl Guest {
    /// A guest with this topology (TOML) that runs these workloads of `viommu-guest` and powers off.
    pub fn new(topology: &str, workload: &str) -> Guest {
        Guest {
            topology: topology.into(),
            kernel: "stock",
            append: String::new(),
            workload: workload.into(),
            disk: None,
            boots_from_disk: false,
            guest_trace: false,
            inject: Vec::new(),
            machine: Vec::new(),
            qemu: Vec::new(),
        }
    }

    /// A port for the guest's own trace, which the workload `trace` uses.
    pub fn guest_trace(mut self) -> Guest {
        self.guest_trace = true;
        self
    }

    /// What the first disk begins with.
    pub fn disk(mut self, contents: Vec<u8>) -> Guest {
        self.disk = Some(contents);
        self
    }

    /// No kernel: firmware boots this sector of the first disk.
    pub fn boot_from_disk(mut self, sector: &[u8]) -> Guest {
        self.boots_from_disk = true;
        self.disk(sector.to_vec())
    }

    /// This kernel of those that `scripts/prepare-guest` knows, in place of `stock`.
    pub fn kernel(mut self, name: &'static str) -> Guest {
        self.kernel = name;
        self
    }

    /// More words for the kernel's command line.
    pub fn append(mut self, words: &str) -> Guest {
        self.append = words.into();
        self
    }

    /// Requests that the device answers wrongly, as `--inject` takes them; may be called several times.
    pub fn inject(mut self, injection: &str) -> Guest {
        self.inject.push(injection.into());
        self
    }

    /// These arguments for QEMU make the machine and its memory, in the place of the topology's.
    pub fn machine<'a>(mut self, arguments: impl IntoIterator<Item = &'a str>) -> Guest {
        self.machine.extend(arguments.into_iter().map(String::from));
        self
    }

    /// More arguments for QEMU.
    pub fn qemu(mut self, words: &[&str]) -> Guest {
        self.qemu.extend(words.iter().map(ToString::to_string));
        self
    }

    /// Boots it and waits for its end, which must be a good one.
    pub fn run(self) -> Outcome {
        self.start().wait()
    }

    /// Boots it.
    pub fn start(self) -> Running {
        let folder = tempfile::tempdir().unwrap();
        let files = guest_files(self.kernel);
        let path = |name: &str| folder.path().join(name);
        fs::write(path("topology.toml"), &self.topology).unwrap();
        let log = fs::File::create(path("viommu.log")).unwrap();
        // One word for the kernel, which takes 32 at most.
        let append = format!("console=ttyS0 panic=-1 {} -- {}", self.append, self.workload.replace(' ', ","));
        let mut command = Command::new(env!("CARGO_BIN_EXE_viommu"));
        command
            .current_dir(folder.path())
            .args(["run", "--topology", "topology.toml", "--dir", ".", "--create-images", "256M", "--accel", "tcg"])
            .args(["--trace-file", "trace.jsonl", "--summary", "summary.json"])
            .arg("--qemu")
            .arg(files.join("qemu"))
            .args(["--timeout", &LIMIT.as_secs().to_string()]);
        if self.guest_trace {
            command.args(["--guest-trace", "guest.jsonl"]);
        }
        for injection in &self.inject {
            command.args(["--inject", injection]);
        }
        if let Some(contents) = &self.disk {
            let mut disk = fs::File::create(path("nvme0.img")).unwrap();
            disk.write_all(contents).unwrap();
            disk.set_len(256 << 20).unwrap();
        }
        if !self.boots_from_disk {
            command.arg("--kernel").arg(files.join("vmlinuz")).arg("--initrd").arg(files.join("initramfs"));
            command.args(["--append", &append]);
        }
        if !self.machine.is_empty() {
            command.arg("--no-machine");
        }
        command
            .args(["--", "-qmp", "unix:test-qmp.sock,server=on,wait=off"])
            .args(&self.machine)
            .args(&self.qemu)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        Running { child: Some(command.spawn().unwrap()), folder, started: Instant::now() }
    }
}

/// The folder with QEMU, kernel and initial RAM file system, which `scripts/prepare-guest` makes.
pub fn guest_files(kernel: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guest").join(kernel);
    for name in ["qemu", "vmlinuz", "initramfs"] {
        assert!(folder.join(name).exists(), "{name} is not in {folder:?}; run scripts/prepare-guest {kernel}");
    }
    folder
}

/// A guest that runs.
pub struct Running {
    child: Option<Child>,
    folder: tempfile::TempDir,
    started: Instant,
}

impl Running {
    /// The process id of `viommu run`.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// A path in its folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Waits until the guest has written a result that `wanted` accepts.
    pub fn wait_for_result(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        loop {
            if let Some(found) = lines(&self.path("results.jsonl")).into_iter().find(&wanted) {
                return found;
            }
            assert!(self.started.elapsed() < LIMIT, "no result came: {what}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until the trace has more events than now, which are written as they come.
    pub fn wait_for_events(&self) {
        let size = || fs::metadata(self.path("trace.jsonl")).map_or(0, |file| file.len());
        let before = size();
        while size() <= before {
            assert!(self.started.elapsed() < LIMIT, "no event came");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Writes the mark for which `nvme-io --until-marked` looks into the first disk.
    pub fn mark_disk(&self) {
        let disk = fs::OpenOptions::new().write(true).open(self.path("nvme0.img")).unwrap();
        let end = disk.metadata().unwrap().len();
        disk.write_all_at(b"mark", end - 4096).unwrap();
    }

    /// A connection to QEMU's monitor.
    pub fn qmp(&self) -> Qmp {
        Qmp::connect(&self.path("test-qmp.sock"))
    }

    /// Waits for the end, which must be a good one: no error, and a guest that reached its last line.
    pub fn wait(self) -> Outcome {
        let outcome = self.end();
        assert!(outcome.status.success(), "viommu run: {}", outcome.status);
        assert!(outcome.results.iter().any(|r| r["event"] == "end" && r["ok"] == true), "the guest's workload failed");
        outcome
    }

    /// The trace and the guest's own in one, as `viommu merge` makes it; empty if there is none of the guest's.
    fn merged(&self) -> Vec<Value> {
        if !self.path("guest.jsonl").exists() {
            return Vec::new();
        }
        let mut merge = Command::new(env!("CARGO_BIN_EXE_viommu"));
        let output =
            merge.current_dir(self.folder.path()).args(["merge", "trace.jsonl", "guest.jsonl"]).output().unwrap();
        println!("{}", String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "viommu merge: {}", output.status);
        String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Waits for the end, however it is.
    pub fn end(mut self) -> Outcome {
        let status = self.child.take().unwrap().wait().unwrap();
        Outcome {
            status,
            summary: fs::read(self.path("summary.json")).map_or(Value::Null, |s| serde_json::from_slice(&s).unwrap()),
            results: lines(&self.path("results.jsonl")),
            trace: lines(&self.path("trace.jsonl")),
            guest_trace: lines(&self.path("guest.jsonl")),
            merged: self.merged(),
            console: read(&self.path("guest.log")),
            log: read(&self.path("viommu.log")),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // QEMU ends with it.
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            show(&read(&self.path("guest.log")), &read(&self.path("viommu.log")), &lines(&self.path("results.jsonl")));
        }
    }
}

/// All that was seen of a guest; shown when the test fails.
pub struct Outcome {
    pub status: ExitStatus,
    pub summary: Value,
    pub results: Vec<Value>,
    pub trace: Vec<Value>,
    /// The guest's own trace.
    pub guest_trace: Vec<Value>,
    /// Both in one.
    pub merged: Vec<Value>,
    pub console: String,
    pub log: String,
}

impl Outcome {
    /// The events of a kind in the trace.
    pub fn events<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Value> {
        self.trace.iter().filter(move |event| event["kind"] == kind)
    }

    /// The results of a workload.
    pub fn results_of<'a>(&'a self, workload: &'a str) -> impl Iterator<Item = &'a Value> {
        self.results.iter().filter(move |result| result["event"] == "result" && result["workload"] == workload)
    }

    /// A number of the summary.
    pub fn count(&self, name: &str) -> u64 {
        self.summary[name].as_u64().unwrap_or_else(|| panic!("{name} is not in {}", self.summary))
    }

    /// The number of requests of a type.
    pub fn requests(&self, name: &str) -> u64 {
        self.summary["requests"][name].as_u64().unwrap_or_else(|| panic!("{name} is not in {}", self.summary))
    }

    /// What the daemon warned of.
    pub fn warnings(&self) -> Vec<&str> {
        self.log.lines().filter(|line| line.starts_with("[WARN") || line.starts_with("[ERROR")).collect()
    }

    /// What every healthy run with I/O through translation shows.
    pub fn assert_translated(&self) {
        assert_eq!(self.summary["verified"], true, "{}", self.summary);
        assert!(self.requests("attach") > 0 && self.requests("map") > 0, "{}", self.summary);
        assert!(self.events("dma").any(|dma| dma["route"] == "mapped"), "no access went through a mapping");
        assert_eq!(self.count("faults"), 0);
        assert_eq!(self.count("events_lost"), 0);
        assert_eq!(self.count("requests_failed"), 0);
    }
}

impl Drop for Outcome {
    fn drop(&mut self) {
        if std::thread::panicking() {
            show(&self.console, &self.log, &self.results);
        }
    }
}

fn show(console: &str, log: &str, results: &[Value]) {
    println!("==== the guest's console ====\n{console}\n==== viommu ====\n{log}\n==== the guest's results ====");
    for result in results {
        println!("{result}");
    }
}

pub fn read(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

pub fn lines(path: &Path) -> Vec<Value> {
    read(path).lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// A process that does not outlive its test, and that the test does not wait for for ever.
pub struct Process(pub Child);

impl Process {
    pub fn kill(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }

    /// Waits for its end, which must be a good one.
    pub fn end(&mut self) {
        let begin = Instant::now();
        while begin.elapsed() < LIMIT {
            if let Some(status) = self.0.try_wait().unwrap() {
                assert!(status.success(), "{status}");
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("the process did not end within {LIMIT:?}");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// QEMU's machine protocol.
pub struct Qmp {
    reader: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects to a QMP socket that will soon be there.
    pub fn connect(path: &Path) -> Qmp {
        let deadline = Instant::now() + LIMIT;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < deadline, "{path:?}: {error}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut qmp = Qmp { reader: BufReader::new(stream) };
        qmp.message();
        qmp.execute("qmp_capabilities", json!({}));
        qmp
    }

    /// Executes a command and returns what it returns.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Value {
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        self.reader.get_mut().write_all(line.as_bytes()).unwrap();
        loop {
            let message = self.message();
            assert!(message.get("error").is_none(), "{command}: {message}");
            if let Some(value) = message.get("return") {
                return value.clone();
            }
        }
    }

    fn message(&mut self) -> Value {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"))
    }
}

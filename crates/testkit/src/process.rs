//! Processes that tests start, none of which outlives its test.

use std::cell::RefCell;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdout, Command, ExitStatus};
use std::time::Duration;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{binaries, wait_until};

/// The `viommu` that was built together with the running test. It ends with the thread that starts it.
pub fn viommu() -> Command {
    let path = binaries().join("viommu");
    assert!(path.exists(), "there is no {path:?}; build the whole package");
    let mut command = Command::new(path);
    end_with_us(&mut command);
    command
}

/// Makes the kernel kill a process when the thread that starts it ends for any reason: a test that is killed could not
/// end it.
pub fn end_with_us(command: &mut Command) -> &mut Command {
    // SAFETY: between fork and exec the closure makes one system call and touches no memory that another thread may
    // hold locked.
    unsafe { command.pre_exec(|| set_pdeathsig(Signal::SIGKILL).map_err(std::io::Error::from)) }
}

/// Runs `body` in a process of its own: limits and descriptors belong to a process, which the other tests of a binary
/// use too. `test` is the name of the calling test, with its modules.
pub fn alone(test: &str, body: impl FnOnce()) {
    const ALONE: &str = "VIOMMU_TEST_ALONE";
    if std::env::var_os(ALONE).is_some_and(|name| name == test) {
        return body();
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    let output = end_with_us(&mut command).args(["--exact", test]).env(ALONE, test).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}{}", String::from_utf8_lossy(&output.stderr));
}

/// How many descriptors this process has.
pub fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Memory of this process that is resident, in bytes.
pub fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

/// A process that is killed when this is dropped.
pub struct Process(RefCell<Child>);

impl Process {
    /// Starts it.
    pub fn start(command: &mut Command) -> Process {
        let child = end_with_us(command).spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        Process(RefCell::new(child))
    }

    pub fn id(&self) -> u32 {
        self.0.borrow().id()
    }

    /// Whether it has ended.
    pub fn ended(&self) -> bool {
        self.0.borrow_mut().try_wait().unwrap().is_some()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.borrow().id() as i32), signal).unwrap();
    }

    /// Kills it, if it has not ended.
    pub fn kill(&self) {
        // It may have ended.
        let _ = self.0.borrow_mut().kill();
        let _ = self.0.borrow_mut().wait();
    }

    /// Waits for its end.
    pub fn wait(&self, limit: Duration) -> ExitStatus {
        wait_until(limit, "the end of the process", || self.ended());
        self.0.borrow_mut().wait().unwrap()
    }

    /// Its standard output, if that is a pipe and this is the first call.
    pub fn stdout(&self) -> Option<ChildStdout> {
        self.0.borrow_mut().stdout.take()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

//! The sandbox cannot be left, so each test runs in a process of its own: this program again, with one test.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{ForkResult, Pid, fork};

use super::*;

/// Tells the process that is to be in the sandbox the test's folder.
const INSIDE: &str = "VIOMMU_TEST_INSIDE";

/// Runs the test `name` in a process of its own. That process calls `inside`, which is to enter the sandbox. This one
/// checks that `inside` has returned.
fn alone(name: &str, inside: impl FnOnce(&Path)) {
    if let Some(folder) = std::env::var_os(INSIDE) {
        inside(Path::new(&folder));
        println!("{name} was here");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("own")).unwrap();
    for name in ["own/file", "file"] {
        fs::write(folder.path().join(name), "").unwrap();
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("sandbox::tests::{name}"), "--nocapture", "--test-threads=1"])
        .env(INSIDE, folder.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains(&format!("{name} was here")), "{said}");
}

/// The policy of a process whose files are in `folder`/own.
fn policy(folder: &Path) -> Policy {
    Policy { folders: vec![folder.join("own")], ..Policy::default() }
}

/// Whether permission was denied, as a file system does without a right and as the filter of system calls does.
fn refused<T>(result: std::io::Result<T>) -> bool {
    result.is_err_and(|error| error.kind() == ErrorKind::PermissionDenied)
}

fn open_and_remove(folder: &Path) {
    assert!(refused(File::open(folder.join("file"))));
    assert!(refused(File::open(folder.join("own/file"))));
    assert!(refused(File::create(folder.join("own/new"))));
    assert!(refused(File::open("/proc/self/maps")));
    assert!(refused(fs::read_dir(folder)));
    assert!(refused(fs::remove_file(folder.join("file"))));
    assert!(refused(fs::create_dir(folder.join("own/folder"))));
    assert!(refused(UnixListener::bind(folder.join("own/socket"))));
    assert!(refused(TcpListener::bind("127.0.0.1:0")));
}

#[test]
fn landlock_alone_closes_the_file_system() {
    alone("landlock_alone_closes_the_file_system", |folder| {
        let mut open = File::options().append(true).open(folder.join("file")).unwrap();
        files::restrict(&policy(folder)).unwrap();
        open_and_remove(folder);
        // The same holds in a thread that starts later.
        let copy = folder.to_owned();
        std::thread::spawn(move || open_and_remove(&copy)).join().unwrap();
        assert!(refused(Command::new("/bin/true").status()));
        // An open file stays usable, and an own file can be removed.
        open.write_all(b"more").unwrap();
        fs::remove_file(folder.join("own/file")).unwrap();
    });
}

#[test]
fn a_folder_that_is_not_there_costs_its_own_right_alone() {
    alone("a_folder_that_is_not_there_costs_its_own_right_alone", |folder| {
        files::restrict(&Policy { connects_in: Some(folder.join("none")), ..policy(folder) }).unwrap();
        open_and_remove(folder);
    });
}

#[test]
fn the_filter_alone_refuses_calls_and_ends_nothing() {
    alone("the_filter_alone_refuses_calls_and_ends_nothing", |folder| {
        let (go, wait) = mpsc::channel::<PathBuf>();
        let before = std::thread::spawn(move || assert!(refused(File::open(wait.recv().unwrap()))));
        syscalls::restrict(&policy(folder)).unwrap();
        // In a thread that started before, and in one that starts later.
        go.send(folder.join("file")).unwrap();
        before.join().unwrap();
        let file = folder.join("file");
        std::thread::spawn(move || assert!(refused(File::open(file)))).join().unwrap();
        no_program();
        assert!(refused(UnixStream::connect(folder.join("socket"))));
        assert!(refused(TcpListener::bind("127.0.0.1:0")));
        assert_eq!(kill(Pid::this(), Signal::SIGTERM), Err(Errno::EPERM));
        assert_eq!(kill(Pid::parent(), None), Err(Errno::EPERM));
        fs::remove_file(folder.join("own/file")).unwrap();
    });
}

/// Checks that no process, no program and no executable memory can be made.
fn no_program() {
    assert!(refused(Command::new("/bin/true").status()));
    assert!(refused(Err::<(), _>(std::os::unix::process::CommandExt::exec(&mut Command::new("/bin/true")))));
    // SAFETY: if there is a child against expectation, it only ends.
    match unsafe { fork() } {
        Err(error) => assert_eq!(error, Errno::EPERM),
        // SAFETY: the call ends the process and touches none of its memory.
        Ok(ForkResult::Child) => unsafe { libc::_exit(0) },
        Ok(ForkResult::Parent { .. }) => panic!("there is a child"),
    }
    for protection in [libc::PROT_READ | libc::PROT_WRITE, libc::PROT_READ | libc::PROT_EXEC] {
        // SAFETY: an anonymous mapping at an address that the kernel chooses takes nobody's memory.
        let mapped = unsafe {
            libc::mmap(std::ptr::null_mut(), 4096, protection, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
        };
        assert_eq!(mapped == libc::MAP_FAILED, protection & libc::PROT_EXEC != 0);
    }
}

#[test]
fn both_together_leave_what_the_policy_says() {
    alone("both_together_leave_what_the_policy_says", |folder| {
        let mut child = Command::new("/bin/sleep").arg("600").spawn().unwrap();
        let other = UnixListener::bind(folder.join("socket")).unwrap();
        let connects_in = Some(folder.to_owned());
        enter(&Policy { child: Some(child.id()), connects_in, ..policy(folder) });
        open_and_remove(folder);
        no_program();
        UnixStream::connect(other.local_addr().unwrap().as_pathname().unwrap()).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let status = std::panic::catch_unwind(|| panic!("as a model may"));
        assert!(status.is_err());
    });
}

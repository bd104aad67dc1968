//! A start in a folder that others can write to: it follows no link, waits for nobody, and destroys no file of others.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{Backlog, listen};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use viommu_testkit::process::viommu;

use super::{ENGINE, end, folder, names, pretended_qemu, says, serve, serve_on, serve_with};

const SERVE: [&str; 5] = ["serve", "--socket-path", "viommu.sock", ENGINE[0], ENGINE[1]];

/// The table of [`ENGINE`].
fn table(folder: &Path) -> Vec<u8> {
    let output = viommu().arg("viot").args(ENGINE).current_dir(folder).output();
    output.unwrap().stdout
}

fn fifo(path: &Path) {
    mkfifo(path, Mode::S_IRWXU).unwrap();
}

#[test]
fn the_table_replaces_a_link_and_a_fifo() {
    let folder = folder();
    let (victim, viot) = (folder.path().join("victim"), folder.path().join("viot.bin"));
    fs::write(&victim, "precious").unwrap();
    symlink("victim", &viot).unwrap();
    let daemon = serve(folder.path());
    assert_eq!(fs::read(&viot).unwrap(), table(folder.path()));
    assert!(fs::symlink_metadata(&viot).unwrap().is_file());
    // Another user's QEMU can read it, if the umask allows that.
    assert_eq!(fs::metadata(&viot).unwrap().permissions().mode(), fs::metadata(&victim).unwrap().permissions().mode());
    assert_eq!(end(daemon), "");
    assert_eq!(names(folder.path()), ["victim"]);
    assert_eq!(fs::read(&victim).unwrap(), b"precious");
    fifo(&viot);
    assert_eq!(end(serve(folder.path())), "");
    assert_eq!(names(folder.path()), ["victim"]);
}

#[test]
fn a_lock_that_is_a_fifo_and_a_socket_whose_backlog_is_full() {
    let folder = folder();
    let lock = folder.path().join("viommu.sock.viommu-lock");
    fifo(&lock);
    says(folder.path(), &SERVE, &["viommu.sock.viommu-lock is not a regular file", "remove it"]);
    assert!(fs::symlink_metadata(&lock).unwrap().file_type().is_fifo());
    fs::remove_file(&lock).unwrap();
    let busy = UnixListener::bind(folder.path().join("viommu.sock")).unwrap();
    listen(&busy, Backlog::new(0).unwrap()).unwrap();
    let _waits = UnixStream::connect(folder.path().join("viommu.sock")).unwrap();
    says(folder.path(), &SERVE, &["Another process listens on viommu.sock"]);
}

#[test]
fn an_image_may_be_a_link_and_not_a_fifo() {
    let folder = folder();
    let nvme = ["--endpoint", "nvme,address=04.0,image=link"];
    symlink("image", folder.path().join("link")).unwrap();
    fifo(&folder.path().join("image"));
    let begin = [&SERVE[..3], &nvme].concat();
    says(folder.path(), &begin, &["The image link is not a regular file or a block device"]);
    says(folder.path(), &["check", nvme[0], nvme[1]], &["The image link is not a regular file or a block device"]);
    fs::remove_file(folder.path().join("image")).unwrap();
    fs::write(folder.path().join("image"), [0; 1 << 20]).unwrap();
    let (daemon, _) = serve_on("viommu.sock", folder.path(), &nvme);
    assert_eq!(end(daemon), "");
}

#[test]
fn a_run_that_writes_to_a_fifo_waits_for_no_reader() {
    let folder = folder();
    pretended_qemu(folder.path(), "touch started");
    fifo(&folder.path().join("fifo"));
    let run = [&["run", "--qemu", "./qemu", "--dir", "dir"][..], &ENGINE].concat();
    for (option, what) in [("--trace-file", "trace"), ("--summary", "summary")] {
        let wanted = format!("Cannot write the {what} to fifo: nobody reads it; start its reader before");
        says(folder.path(), &[&run[..], &[option, "fifo"]].concat(), &[&wanted]);
    }
    assert!(!folder.path().join("started").exists());
    // With a reader it does.
    let mut reader =
        fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(folder.path().join("fifo")).unwrap();
    let output = viommu().args(&run).args(["--summary", "fifo"]).current_dir(&folder).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut summary = String::new();
    reader.read_to_string(&mut summary).unwrap();
    assert!(summary.contains("\"requests\""), "{summary}");
}

#[test]
fn the_files_of_a_run_replace_links_and_fifos() {
    let folder = folder();
    pretended_qemu(folder.path(), "echo result >> dir/results.jsonl");
    let dir = folder.path().join("dir");
    fs::create_dir(&dir).unwrap();
    fs::write(folder.path().join("victim"), "precious").unwrap();
    symlink("../victim", dir.join("guest.log")).unwrap();
    fifo(&dir.join("results.jsonl"));
    let status = viommu()
        .args(["run", "--qemu", "./qemu", "--dir", "dir"])
        .args(ENGINE)
        .current_dir(&folder)
        .stdout(Stdio::null())
        .status();
    assert!(status.unwrap().success());
    assert_eq!(fs::read(folder.path().join("victim")).unwrap(), b"precious");
    assert!(["guest.log", "results.jsonl"].iter().all(|name| fs::symlink_metadata(dir.join(name)).unwrap().is_file()));
}

#[test]
fn two_daemons_in_one_folder() {
    let folder = folder();
    let viot = folder.path().join("viot.bin");
    let begin = || {
        let other = ["--endpoint", "dma-engine,address=07.0,name=other"];
        let (daemon, _) = serve_on("second.sock", folder.path(), &other);
        daemon
    };
    let (first, _) = serve_with(folder.path(), &[]);
    let second = begin();
    let table = fs::read(&viot).unwrap();
    // The second daemon's files stay when the first ends.
    assert_eq!(end(first), "");
    assert_eq!(fs::read(&viot).unwrap(), table);
    assert_eq!(names(folder.path()), ["other.sock", "second.sock", "viot.bin"]);
    let said = end(second);
    assert!(said.contains("viot.bin was the table of another viommu") && said.contains("its own folder"), "{said}");
    assert_eq!(names(folder.path()), [""; 0]);
    // After a daemon that was killed there is nothing to warn of.
    let mut killed = serve(folder.path());
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert_eq!(end(begin()), "");
}

/// A signal during the start ends a daemon in the same way as a later one.
#[test]
fn a_signal_during_the_start() {
    for _ in 0..20 {
        let folder = folder();
        let mut daemon = viommu().args(SERVE).current_dir(&folder).stdout(Stdio::null()).spawn().unwrap();
        // From its first file on.
        while fs::read_dir(&folder).unwrap().count() == 0 {
            std::thread::yield_now();
        }
        kill(Pid::from_raw(daemon.id() as i32), Signal::SIGTERM).unwrap();
        assert!(daemon.wait().unwrap().success());
        assert_eq!(names(folder.path()), [""; 0]);
    }
}

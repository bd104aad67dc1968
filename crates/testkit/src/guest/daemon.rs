//! Daemons that serve the devices of guests but do not start them.

use std::io::{BufRead, BufReader, Read};
use std::process::{ChildStdout, ExitStatus, Stdio};

use nix::sys::signal::Signal;
use viommu::daemon::{Bound, Daemon, DaemonStats, Options, open_devices};
use viommu::topology::Topology;
use viommu::topology::qemu::{self, Paths};

use super::{Devices, Folder, Guest, SOCKET, TOPOLOGY, TRACE_SOCKET};
use crate::PATIENCE;
use crate::process::{Process, viommu};

/// `viommu serve`.
pub struct Serve {
    process: Process,
    printed: Option<BufReader<ChildStdout>>,
    folder: Folder,
}

impl Serve {
    /// Starts it with these arguments besides the topology. It serves when this returns.
    pub fn start(folder: &Folder, topology: &str, arguments: &[&str]) -> Serve {
        folder.write(TOPOLOGY, topology);
        let mut command = viommu();
        command
            .current_dir(folder.path())
            .args(["serve", "--topology", TOPOLOGY, "--socket-path", SOCKET])
            .args(arguments)
            .stdout(Stdio::piped());
        let process = Process::start(&mut command);
        let mut printed = BufReader::new(process.stdout().unwrap());
        let mut line = String::new();
        printed.read_line(&mut line).unwrap();
        assert_eq!(line, format!("viommu: serving on {SOCKET}\n"));
        Serve { process, printed: Some(printed), folder: folder.clone() }
    }

    /// A guest with its devices, started like a user does with the arguments that `viommu args` prints.
    pub fn guest(&self, workload: &str) -> Guest {
        let mut args = viommu();
        args.current_dir(self.folder.path());
        let output =
            args.args(["args", "--machine", "--topology", TOPOLOGY, "--socket-path", SOCKET]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let words = String::from_utf8(output.stdout).unwrap().trim().to_owned();
        Guest::with(Devices::Shell(words), workload).folder(&self.folder)
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Asks it to end. Returns its status, and its output while it served.
    pub fn end(mut self) -> (ExitStatus, String) {
        self.process.signal(Signal::SIGTERM);
        let mut text = String::new();
        self.printed.take().unwrap().read_to_string(&mut text).unwrap();
        (self.process.wait(PATIENCE), text)
    }
}

/// A daemon in this process.
pub struct InProcess {
    daemon: Daemon,
    arguments: Vec<String>,
    folder: Folder,
}

impl InProcess {
    /// Serves a topology and its trace. Images are made, in the folder too.
    pub fn start(folder: &Folder, topology: &str) -> InProcess {
        // A relative path is below the working directory, which all tests share.
        let topology = topology.replace("image = \"", &format!("image = \"{}/", folder.path().display()));
        let topology = Topology::parse(&topology, TOPOLOGY).unwrap();
        let paths = Paths { iommu: folder.join(SOCKET) };
        let options =
            Options { paths: paths.clone(), trace_socket: Some(folder.join(TRACE_SOCKET)), inject: Vec::new() };
        let devices = open_devices(&topology, Some(super::IMAGE_SIZE.parse().unwrap())).unwrap();
        let daemon = Bound::new(&topology, &options, devices).unwrap().start().unwrap();
        let mut arguments = qemu::machine(&topology);
        arguments.extend(qemu::devices(&topology, &paths));
        InProcess { daemon, arguments, folder: folder.clone() }
    }

    /// A guest with its devices.
    pub fn guest(&self, workload: &str) -> Guest {
        Guest::with(Devices::Arguments(self.arguments.clone()), workload).folder(&self.folder)
    }

    /// Ends it. Returns what it did.
    pub fn end(self) -> DaemonStats {
        self.daemon.end()
    }
}

//! A PCI function that is served over vfio-user.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use tempfile::TempDir;
use vfio_user::Client;
use viommu::iommu::{EndpointSettings, Iommu, Settings};
use viommu::pci::{Function, FunctionContext, FunctionServer, Slot};
use viommu_trace::Tracer;
use vmm_sys_util::eventfd::EventFd;

/// A function behind an IOMMU that begins in bypass, on a socket in a temporary folder.
pub struct Served {
    pub iommu: Arc<Iommu>,
    dir: TempDir,
    shutdown: EventFd,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Served {
    /// Serves the function that `make` returns as this endpoint; `on_reset` is called at the client's own resets.
    pub fn new(
        endpoint: u32,
        tracer: Tracer,
        make: impl Fn(FunctionContext) -> Box<dyn Function> + Send + 'static,
        on_reset: impl Fn() + Send + 'static,
    ) -> Self {
        Served::in_slot(endpoint, tracer, |slot| slot, make, on_reset)
    }

    /// The same in a slot that `slot` changes.
    pub fn in_slot(
        endpoint: u32,
        tracer: Tracer,
        slot: impl FnOnce(Slot) -> Slot,
        make: impl Fn(FunctionContext) -> Box<dyn Function> + Send + 'static,
        on_reset: impl Fn() + Send + 'static,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let endpoints = vec![EndpointSettings { id: endpoint, reserved: Vec::new() }];
        let iommu = Iommu::new(Settings { endpoints, ..Settings::default() }, tracer.clone());
        let shutdown = EventFd::new(0).unwrap();
        let server = FunctionServer::bind(&dir.path().join("function.sock")).unwrap();
        let slot = slot(Slot::new(&iommu, endpoint, tracer));
        let stop = shutdown.try_clone().unwrap();
        let thread = thread::spawn(move || server.serve(&slot, &stop, make, on_reset));
        Served { iommu, dir, shutdown, thread: Some(thread) }
    }

    /// The socket.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("function.sock")
    }

    /// A new client, which has not sent anything yet.
    pub fn client(&self) -> Client {
        Client::new(&self.path()).unwrap()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.shutdown.write(1).unwrap();
        let result = self.thread.take().unwrap().join();
        if !thread::panicking() {
            result.unwrap().unwrap();
        }
    }
}

//! The socket on which clients find a function.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::backend::{Backend, Make, catch_panic};
use super::function::{Function, FunctionContext};
use super::interrupts::Interrupts;
use crate::dma::DmaContext;
use crate::iommu::Iommu;
use crate::memory::Memory;
use crate::poller::QueuePoller;
use crate::vfio_user;
use viommu_socket::{self as socket, RETRY, Socket, SocketError};
use viommu_trace::event::Channel;
use viommu_trace::{Event, Tracer};

/// A place for a function: an endpoint's access to memory and its interrupts, which outlive clients.
pub struct Slot {
    pub(super) context: FunctionContext,
    pub(super) memory: Memory,
    pub(super) msix: bool,
    pub(super) ats: bool,
    pub(super) behind_root_port: bool,
}

impl Slot {
    /// A slot for the endpoint with the id `endpoint`.
    pub fn new(iommu: &Arc<Iommu>, endpoint: u32, tracer: Tracer) -> Self {
        let memory = Memory::default();
        let dma = DmaContext::new(iommu, endpoint, memory.clone(), tracer.clone());
        let interrupts = Interrupts::new(endpoint, tracer.clone());
        Slot {
            context: FunctionContext { dma, interrupts, tracer, poller: None },
            memory,
            msix: true,
            ats: false,
            behind_root_port: false,
        }
    }

    /// The same slot, whose function's threads use `poller` while they are awake and have nothing else to do.
    pub fn with_poller(mut self, poller: Arc<dyn QueuePoller>) -> Self {
        self.context.poller = Some(poller);
        self
    }

    /// The same slot, but its functions have no MSI-X, only MSI and an interrupt pin.
    pub fn without_msix(mut self) -> Self {
        self.msix = false;
        self
    }

    /// The same slot, but its functions have the capability for ATS (PCI Express Base Specification, section 10.5.1).
    /// Whether software enables it makes no difference: all of their requests are untranslated, and they keep no
    /// translations that could be invalidated.
    pub fn with_ats(mut self) -> Self {
        self.ats = true;
        self
    }

    /// The same slot, but behind a root port, where no function is a root complex integrated endpoint.
    pub fn behind_root_port(mut self) -> Self {
        self.behind_root_port = true;
        self
    }

    /// The context for functions in this slot.
    pub fn context(&self) -> &FunctionContext {
        &self.context
    }
}

/// A listening socket. Dropping it removes its file.
pub struct FunctionServer {
    socket: Socket,
}

impl FunctionServer {
    /// Listens on `path`. A socket without a listener there is replaced.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn bind(path: &Path) -> Result<FunctionServer, SocketError> {
        Ok(FunctionServer { socket: Socket::bind(path)? })
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        self.socket.path()
    }

    /// Removes the socket's file, if it is still there, so that no more clients connect.
    pub fn stop_listening(&self) {
        self.socket.remove();
    }

    /// Serves one client after the other until `shutdown` is readable. A client that is connected then is served until
    /// it leaves. Each client finds a function made by `make`. `on_device_reset` is called when the client itself
    /// resets the device, as QEMU does at a reset of the machine, but not when the guest does.
    ///
    /// Nothing that a client does makes this return.
    ///
    /// # Errors
    /// Waiting for connections fails.
    pub fn serve(
        &self,
        slot: &Slot,
        shutdown: &EventFd,
        make: impl Fn(FunctionContext) -> Box<dyn Function>,
        on_device_reset: impl Fn(),
    ) -> io::Result<()> {
        while socket::wait_readable(self.socket.listener().as_raw_fd(), shutdown.as_raw_fd())? {
            let connection = self.socket.listener().accept();
            let is_accepted = connection.is_ok();
            let served = connection.and_then(|(mut stream, _)| serve_one(&mut stream, slot, &make, &on_device_reset));
            if let Err(error) = served {
                log::warn!("The connection on {} ended: {error}", self.path().display());
                if !is_accepted {
                    // The process is out of descriptors. Some may be free soon.
                    std::thread::sleep(RETRY);
                }
            }
        }
        Ok(())
    }
}

/// Serves a client that was accepted. If no function can be made, it is disconnected.
fn serve_one(stream: &mut UnixStream, slot: &Slot, make: Make<'_>, on_device_reset: &dyn Fn()) -> io::Result<()> {
    let Some(mut backend) = Backend::new(slot, make, on_device_reset) else { return Ok(()) };
    let session = |connected| {
        let endpoint = Some(slot.context.dma.endpoint());
        slot.context.tracer.emit(Event::Session { channel: Channel::VfioUser, endpoint, connected });
    };
    session(true);
    let served = catch_panic(&slot.context, || vfio_user::serve(stream, &mut backend));
    drop(backend);
    session(false);
    served.unwrap_or(Ok(()))
}

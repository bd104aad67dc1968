//! The socket: serves one frontend after the other until the process is to end.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, Weak};
use std::thread;

use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::{Error as BackendError, VhostUserDaemon};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::backend::Backend;
use super::{Control, Counters, QueueMemory, SharedDevice};
use crate::iommu::Iommu;
use viommu_socket::{self as socket, RETRY, Socket, SocketError};
use viommu_trace::event::Channel;
use viommu_trace::{Event, Tracer};

/// Why the device cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The socket cannot be made.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The operating system refuses another operation.
    #[error("Cannot {what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// Ends [`Server::run`]. Clones end the same server.
#[derive(Clone)]
pub struct Shutdown {
    event: Arc<EventFd>,
    socket: Weak<Socket>,
}

impl Shutdown {
    /// Asks the server to end. Safe to call from a signal handler's thread, and more than once.
    pub fn trigger(&self) {
        // The only error is a full counter, which means that it is triggered already.
        let _ = self.event.write(1);
    }

    /// Removes the socket's file, if it is still there. The server goes on.
    pub fn stop_listening(&self) {
        if let Some(socket) = self.socket.upgrade() {
            socket.remove();
        }
    }
}

/// The device's socket.
pub struct Server {
    listener: Listener,
    /// Dropping it removes its file.
    _socket: Arc<Socket>,
    shared: Arc<SharedDevice>,
    shutdown: Shutdown,
}

impl Server {
    /// Listens on `path`. A stale socket there is replaced, and a live one is an error. The socket's file is removed when
    /// the server is dropped.
    pub fn bind(path: &Path, iommu: Arc<Iommu>, tracer: Tracer) -> Result<Server, ServerError> {
        let socket = Arc::new(Socket::bind(path)?);
        let listener = socket.listener().try_clone();
        let listener = listener.map_err(|source| ServerError::System { what: "copy the listening socket", source })?;
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
            .map_err(|source| ServerError::System { what: "create an event", source })?;
        let shared = Arc::new(SharedDevice {
            iommu,
            tracer,
            lifecycle: Default::default(),
            counters: Counters::default(),
            poller: Default::default(),
            injector: Default::default(),
        });
        Ok(Server {
            listener: Listener::from(listener),
            shutdown: Shutdown { event: Arc::new(event), socket: Arc::downgrade(&socket) },
            _socket: socket,
            shared,
        })
    }

    /// A handle that ends [`Server::run`].
    pub fn shutdown(&self) -> Shutdown {
        self.shutdown.clone()
    }

    /// A handle that tells the device what happens to the machine, and reads its counters.
    pub fn control(&self) -> Control {
        Control { shared: self.shared.clone() }
    }

    /// Serves one frontend after the other until [`Shutdown::trigger`].
    pub fn run(&mut self) -> Result<(), ServerError> {
        while socket::wait_readable(self.listener.as_raw_fd(), self.shutdown.event.as_raw_fd())
            .map_err(|source| ServerError::System { what: "wait for a frontend", source })?
        {
            // No reason to end: the next frontend may do better, and resources that the process lacks may be free soon.
            if let Err(error) = self.serve_one() {
                log::warn!("The vhost-user connection ended: {error}");
                if !matches!(error, BackendError::HandleRequest(_)) {
                    // The connection may not even have been accepted, and would be tried again at once.
                    thread::sleep(RETRY);
                }
            }
        }
        Ok(())
    }

    /// Serves the frontend that waits to be accepted.
    fn serve_one(&mut self) -> Result<(), BackendError> {
        let memory = QueueMemory::new(GuestMemoryMmap::new());
        let backend = Backend::new(self.shared.clone()).map_err(BackendError::StartDaemon)?;
        self.shared.tracer.emit(Event::Session { channel: Channel::VhostUser, endpoint: None, connected: true });
        let served = self.serve_backend(&backend, memory);
        // Also after a failure; otherwise each failed connection would leak a descriptor.
        backend.end();
        self.shared.disconnected();
        match served {
            Err(BackendError::HandleRequest(VhostUserError::Disconnected)) => Ok(()),
            served => served,
        }
    }

    /// Serves one connection with a daemon of the crate. All of the daemon's threads have ended when this returns.
    fn serve_backend(&mut self, backend: &Arc<Backend>, memory: QueueMemory) -> Result<(), BackendError> {
        let mut daemon = VhostUserDaemon::new("vhost-user".into(), backend.clone(), memory)?;
        let (wake, token) = backend.wake_source();
        for handler in daemon.get_epoll_handlers() {
            handler.register_listener(wake, EventSet::IN, token).map_err(BackendError::StartDaemon)?;
            // SAFETY: `handler` keeps its epoll open, and outlives the call.
            let epoll = unsafe { BorrowedFd::borrow_raw(handler.as_raw_fd()) };
            // One handler serves all queues.
            backend.introduce(epoll).map_err(BackendError::StartDaemon)?;
        }
        self.shared.poller.connect(Some(backend.clone()));
        let waker = backend.waker().map_err(BackendError::StartDaemon)?;
        self.shared.iommu.on_fault(Some(Box::new(move || {
            // A full counter wakes as well.
            let _ = waker.notify();
        })));
        let served = self.serve_until_shutdown(&mut daemon);
        self.shared.iommu.on_fault(None);
        self.shared.poller.connect(None);
        served
    }

    /// Serves until the frontend leaves or the process is to end.
    fn serve_until_shutdown(&mut self, daemon: &mut VhostUserDaemon<Arc<Backend>>) -> Result<(), BackendError> {
        // Do first what may fail: once the daemon is started, only waiting for it ends its threads.
        let left = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(BackendError::StartDaemon)?;
        daemon.start(&mut self.listener)?;
        let Some(connection) = daemon.shutdown_handle() else { return daemon.wait() };
        thread::scope(|scope| {
            scope.spawn(|| {
                // If waiting fails, the frontend is served until it leaves.
                if let Ok(false) = socket::wait_readable(left.as_raw_fd(), self.shutdown.event.as_raw_fd()) {
                    connection.shutdown();
                }
            });
            let served = daemon.wait();
            let _ = left.write(1);
            served
        })
    }
}

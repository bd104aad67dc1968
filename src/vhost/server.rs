//! The socket: one frontend after the other, until the process is to end.

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
    /// The operating system refuses something else.
    #[error("Cannot {what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// Ends [`Server::run`]. Clones end the same one.
#[derive(Clone)]
pub struct Shutdown {
    event: Arc<EventFd>,
    socket: Weak<Socket>,
}

impl Shutdown {
    /// Asks for the end; safe in a signal handler's thread, and more than once.
    pub fn trigger(&self) {
        // The only error is a counter that is full, that is, triggered.
        let _ = self.event.write(1);
    }

    /// Removes the socket's file, if it is still there, though the server does not end.
    pub fn stop_listening(&self) {
        if let Some(socket) = self.socket.upgrade() {
            socket.remove();
        }
    }
}

/// The device's socket.
pub struct Server {
    listener: Listener,
    /// Its file is removed when this is dropped.
    _socket: Arc<Socket>,
    shared: Arc<SharedDevice>,
    shutdown: Shutdown,
}

impl Server {
    /// Listens on `path`. A stale socket there is replaced, a live one is an error. The socket is removed when the
    /// server is dropped.
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

    /// What ends [`Server::run`].
    pub fn shutdown(&self) -> Shutdown {
        self.shutdown.clone()
    }

    /// The way to tell the device what happens to the machine, and to read its counters.
    pub fn control(&self) -> Control {
        Control { shared: self.shared.clone() }
    }

    /// Serves one frontend after the other until [`Shutdown::trigger`].
    pub fn run(&mut self) -> Result<(), ServerError> {
        while socket::wait_readable(self.listener.as_raw_fd(), self.shutdown.event.as_raw_fd())
            .map_err(|source| ServerError::System { what: "wait for a frontend", source })?
        {
            // Not ours to end for: the next frontend may do better, and what the process lacks may be free soon.
            if let Err(error) = self.serve_one() {
                log::warn!("The vhost-user connection ended: {error}");
                if !matches!(error, BackendError::HandleRequest(_)) {
                    // It may not even have been accepted.
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
        // Also after a failure, or each would leave a descriptor behind.
        backend.end();
        self.shared.disconnected();
        match served {
            Err(BackendError::HandleRequest(VhostUserError::Disconnected)) => Ok(()),
            served => served,
        }
    }

    /// Has a daemon of the crate serve one connection. All of its threads are gone afterwards.
    fn serve_backend(&mut self, backend: &Arc<Backend>, memory: QueueMemory) -> Result<(), BackendError> {
        let mut daemon = VhostUserDaemon::new("vhost-user".into(), backend.clone(), memory)?;
        let (wake, token) = backend.wake_source();
        for handler in daemon.get_epoll_handlers() {
            handler.register_listener(wake, EventSet::IN, token).map_err(BackendError::StartDaemon)?;
            // SAFETY: `handler` keeps its epoll open, and outlives the call.
            let epoll = unsafe { BorrowedFd::borrow_raw(handler.as_raw_fd()) };
            // There is one for all queues.
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
        // First what may fail: once started, only waiting ends the daemon's threads.
        let left = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(BackendError::StartDaemon)?;
        daemon.start(&mut self.listener)?;
        let Some(connection) = daemon.shutdown_handle() else { return daemon.wait() };
        thread::scope(|scope| {
            scope.spawn(|| {
                // Without a way to wait, the frontend is served until it leaves.
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

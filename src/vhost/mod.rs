//! The virtio-iommu device over vhost-user. The only place that knows vhost-user and virtqueues.
//!
//! [`Server::run`] serves one frontend after the other. When QEMU ends, the device is as at power-on and waits for the
//! next frontend. Nothing that a frontend or a guest does ends the server: a frontend that breaks the protocol loses
//! its connection, and a guest that breaks a queue is not served until it resets the device.

mod backend;
mod config;
mod faults;
mod inject;
mod kicks;
mod poller;
mod queue;
mod requests;
mod reset;
mod ring;
mod server;
mod table;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

pub use inject::Injection;
use inject::Injector;
use poller::Poller;
use reset::{Action, Lifecycle};
pub use server::{Server, ServerError, Shutdown};

use crate::iommu::Iommu;
use crate::sync::lock;
use viommu_trace::event::{Channel, ResetKind};
use viommu_trace::{Event, Tracer};

/// The guest's memory as the frontend's messages describe it. The virtqueues are in it.
type QueueMemory = vm_memory::GuestMemoryAtomic<vm_memory::GuestMemoryMmap>;

/// The request queue and the event queue (virtio specification, section 5.13.2).
pub const QUEUES: usize = 2;
/// Entries of each queue, which QEMU's arguments set.
pub const QUEUE_SIZE: u16 = 256;
/// The request queue.
const REQUESTS: usize = 0;
/// The event queue.
const EVENTS: usize = 1;

/// Statistics of the virtqueues since the process began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Kicks of the driver, on both queues.
    pub kicks: u64,
    /// Used buffer notifications to the driver, on both queues.
    pub notifications: u64,
    /// Requests of a type that does not exist. They count as malformed too.
    pub unknown: u64,
    /// Chains that are no valid request or no valid buffer for a fault, and invalid queues.
    pub malformed: u64,
}

/// The live form of [`Stats`].
#[derive(Default)]
struct Counters {
    kicks: AtomicU64,
    /// Batches of requests that were answered.
    batches: AtomicU64,
    notifications: AtomicU64,
    unknown: AtomicU64,
    malformed: AtomicU64,
}

/// The state that outlives a connection.
struct SharedDevice {
    iommu: Arc<Iommu>,
    tracer: Tracer,
    lifecycle: Mutex<Lifecycle>,
    counters: Counters,
    /// The state of polling the request queue.
    poller: Poller,
    /// For tests of drivers only.
    injector: OnceLock<Injector>,
}

impl SharedDevice {
    fn queue_started(&self, queue: usize, base: u16) {
        let mut lifecycle = self.lifecycle();
        let action = lifecycle.started(queue, base);
        self.apply(action);
    }

    /// Returns whether it was running.
    fn queue_stopped(&self, queue: usize, index: u16) -> bool {
        self.lifecycle().stopped(queue, index)
    }

    /// The frontend is gone: the next one finds the device as at power-on.
    fn disconnected(&self) {
        let mut lifecycle = self.lifecycle();
        *lifecycle = Lifecycle::default();
        let _journal = self.iommu.journal();
        self.iommu.set_features(0);
        self.iommu.system_reset();
        self.tracer.emit(Event::Session { channel: Channel::VhostUser, endpoint: None, connected: false });
    }

    /// The caller keeps the lifecycle locked, so that a queue starts only after the action is done.
    fn apply(&self, action: Option<Action>) {
        // Most often there is nothing to do. Nobody should wait then for the requests that are being executed.
        let Some(action) = action else { return };
        let _journal = self.iommu.journal();
        let reset = match action {
            Action::Resume => ResetKind::Resume,
            Action::DeviceReset => {
                self.iommu.device_reset();
                if let Some(injector) = self.injector.get() {
                    injector.device_reset();
                }
                ResetKind::Device
            }
            Action::SystemReset => {
                self.iommu.system_reset();
                ResetKind::System
            }
        };
        self.tracer.emit(Event::Reset { reset, endpoint: None });
    }

    fn lifecycle(&self) -> MutexGuard<'_, Lifecycle> {
        lock(&self.lifecycle)
    }
}

/// Tells the device what vhost-user does not: see [`Server::control`]. Without these calls the device still
/// distinguishes a driver's reset from a pause. With them it restores the boot-time `bypass` when the machine is reset.
#[derive(Clone)]
pub struct Control {
    shared: Arc<SharedDevice>,
}

impl Control {
    /// A PCI function of the machine was reset over vfio-user (DEVICE_RESET). If the virtqueues ran before and are
    /// stopped now, the machine is being reset, unless QMP said that it is paused. To be called after the function has
    /// stopped its accesses.
    pub fn function_reset(&self) {
        let mut lifecycle = self.shared.lifecycle();
        let action = lifecycle.function_reset();
        self.shared.apply(action);
    }

    /// QMP's RESET event: the machine was reset.
    pub fn machine_reset(&self) {
        let mut lifecycle = self.shared.lifecycle();
        let action = lifecycle.machine_reset();
        self.shared.apply(action);
    }

    /// QMP's STOP event: the machine was paused. All state is kept.
    pub fn machine_paused(&self) {
        if self.shared.lifecycle().machine_paused() {
            self.shared.tracer.emit(Event::Reset { reset: ResetKind::Pause, endpoint: None });
        }
    }

    /// QMP's RESUME event: the machine goes on.
    pub fn machine_resumed(&self) {
        self.shared.lifecycle().machine_resumed();
    }

    /// Answers requests wrongly from now on, for tests of drivers. Only the first call counts.
    pub fn inject(&self, injections: &[Injection]) {
        self.shared.injector.get_or_init(|| Injector::new(injections));
    }

    /// The statistics of the virtqueues so far.
    pub fn stats(&self) -> Stats {
        let counters = &self.shared.counters;
        Stats {
            kicks: counters.kicks.load(Ordering::Relaxed),
            notifications: counters.notifications.load(Ordering::Relaxed),
            unknown: counters.unknown.load(Ordering::Relaxed),
            malformed: counters.malformed.load(Ordering::Relaxed),
        }
    }
}

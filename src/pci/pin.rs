//! The interrupt pin (INTx), which is level-triggered, over an eventfd, which is not.
//!
//! As VFIO defines it, the pin masks itself when it sends an event, and the client unmasks it when the guest may have
//! served the interrupt. The model is then asked again whether there is still a reason. No earlier state counts, so no
//! interrupt is lost and none is spurious.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, Weak};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Interrupts;
use crate::sync::lock;
use viommu_socket::set_nonblocking;

/// A model's reasons to assert the pin.
pub trait PinSource: Send + Sync {
    /// The vectors, of the first 32, with something that the driver has not acknowledged, a bit each. Any thread that
    /// triggers an interrupt or unmasks the pin may call it.
    fn reasons(&self) -> u32;
}

/// A pin.
#[derive(Default)]
pub(super) struct Pin {
    /// Whether the client has given an eventfd.
    assigned: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    sink: Option<File>,
    /// Masked by the client, or since the last event.
    masked: bool,
    /// Disabled by Interrupt Disable in the command register.
    disabled: bool,
    /// Vectors that the model masks, a bit each.
    masked_vectors: u32,
    source: Option<Weak<dyn PinSource>>,
    unmasker: Option<Unmasker>,
}

impl State {
    /// Whether the model asserts the pin.
    fn level(&self) -> bool {
        let source = self.source.as_ref().and_then(Weak::upgrade);
        source.is_some_and(|source| source.reasons() & !self.masked_vectors != 0)
    }

    /// Sends an event if the pin is asserted and neither masked nor disabled. Returns whether one was sent.
    fn update(&mut self) -> bool {
        if self.sink.is_none() || self.masked || self.disabled || !self.level() {
            return false;
        }
        self.masked = true;
        self.send()
    }

    fn send(&mut self) -> bool {
        let Some(sink) = &mut self.sink else { return false };
        match sink.write(&1u64.to_ne_bytes()) {
            Ok(_) => true,
            // A full counter: the client has not seen an earlier event yet.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
            Err(error) => {
                log::warn!("The interrupt pin's event was not sent: {error}");
                self.sink = None;
                false
            }
        }
    }
}

impl Pin {
    /// Whether it has an eventfd.
    pub fn is_assigned(&self) -> bool {
        self.assigned.load(Ordering::Acquire)
    }

    /// Whether the driver can get interrupts from it.
    pub fn is_used(&self) -> bool {
        self.is_assigned() && !self.lock().disabled
    }

    /// Whether it is asserted, even if it is masked.
    pub fn is_asserted(&self) -> bool {
        self.is_assigned() && self.lock().level()
    }

    /// Sets the model that is asked for the level. For this call and all that follow, the caller must hold no lock that
    /// the model takes to answer. Those that follow return whether an event was sent.
    pub fn set_source(&self, source: Weak<dyn PinSource>) {
        self.lock().source = Some(source);
    }

    /// Notes that the model's reasons may have changed.
    pub fn update(&self) -> bool {
        self.is_assigned() && self.lock().update()
    }

    /// Sets the vectors that the model masks, a bit each.
    pub fn mask_vectors(&self, vectors: u32) -> bool {
        let mut state = self.lock();
        state.masked_vectors = vectors;
        state.update()
    }

    /// Follows Interrupt Disable in the command register.
    pub fn disable(&self, disabled: bool) -> bool {
        let mut state = self.lock();
        state.disabled = disabled;
        state.update()
    }

    /// Masks or unmasks the pin for the client.
    pub fn mask(&self, masked: bool) -> bool {
        let mut state = self.lock();
        state.masked = masked;
        state.update()
    }

    /// Sends an event, as the client asked.
    pub fn trigger(&self) -> bool {
        self.lock().send()
    }

    /// Sets the eventfd that it sends to; `None` removes it, and everything else that the client has set.
    pub fn assign(&self, sink: Option<File>) -> bool {
        let sink = sink.filter(|sink| {
            set_nonblocking(sink).inspect_err(|e| log::warn!("The interrupt pin is not usable: {e}")).is_ok()
        });
        let mut state = self.lock();
        self.assigned.store(sink.is_some(), Ordering::Release);
        let gone = sink.is_none().then(|| state.unmasker.take());
        state.masked &= sink.is_some() && state.sink.is_some();
        state.sink = sink;
        let sent = state.update();
        drop(state);
        // Dropping it joins its thread, which may need the lock.
        drop(gone);
        sent
    }

    /// Sets what unmasks it in addition to the client's messages.
    pub fn set_unmasker(&self, unmasker: Option<Unmasker>) {
        let before = std::mem::replace(&mut self.lock().unmasker, unmasker);
        // Dropping it joins its thread, which may need the lock.
        drop(before);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

/// A thread that unmasks the pin whenever an eventfd is signalled. KVM signals it when the guest has served an
/// interrupt.
pub(super) struct Unmasker {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Unmasker {
    /// Starts the thread.
    ///
    /// # Errors
    /// EINVAL if `event` cannot be waited for, as a regular file. Other errors are not the client's fault.
    ///
    /// The wait is edge-triggered. A client may give a descriptor that is always readable, and the thread must wake
    /// only for writes to it.
    pub fn start(interrupts: Interrupts, mut event: File) -> io::Result<Unmasker> {
        set_nonblocking(&event)?;
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let epoll = Epoll::new()?;
        let edge = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, UNMASK);
        epoll.ctl(ControlOperation::Add, event.as_raw_fd(), edge).map_err(|error| match error.raw_os_error() {
            Some(libc::EPERM) => io::Error::from_raw_os_error(libc::EINVAL),
            _ => error,
        })?;
        epoll.ctl(ControlOperation::Add, stop.as_raw_fd(), EpollEvent::new(EventSet::IN, STOP))?;
        let wait = move || {
            while wait_for_unmask(&epoll) {
                match event.read(&mut [0; 8]) {
                    Ok(1..) => interrupts.mask_pin(false),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    // It is not an eventfd, or cannot be signalled any more.
                    Ok(0) | Err(_) => break,
                }
            }
        };
        let thread = std::thread::Builder::new().name("intx-unmask".into()).spawn(wait)?;
        Ok(Unmasker { stop, thread: Some(thread) })
    }
}

/// The epoll data of the client's descriptor.
const UNMASK: u64 = 0;
/// The epoll data of `stop`.
const STOP: u64 = 1;

/// Waits until the client's descriptor is signalled. Returns false if the thread is to end.
fn wait_for_unmask(epoll: &Epoll) -> bool {
    let mut events = [EpollEvent::default(); 2];
    loop {
        match epoll.wait(-1, &mut events) {
            Ok(count) => return events[..count].iter().all(|event| event.data() == UNMASK),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return false,
        }
    }
}

impl Drop for Unmasker {
    fn drop(&mut self) {
        // The only error is a full counter, which is signalled too.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

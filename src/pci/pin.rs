//! The interrupt pin (INTx), which is level-triggered, over an event file descriptor, which is not.
//!
//! As VFIO defines it, the pin masks itself when it has sent an event, and the client unmasks it when the guest has
//! served the interrupt, or may have. Whether there is still a reason then is asked of the model anew: no state of before
//! counts, so that no interrupt is lost and none is sent in vain.

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
    /// The vectors, of the first 32, for which there is something that the driver has not acknowledged, a bit each. It is
    /// asked by any thread that triggers an interrupt or unmasks the pin.
    fn reasons(&self) -> u32;
}

/// A pin.
#[derive(Default)]
pub(super) struct Pin {
    /// Whether the client gave a descriptor.
    assigned: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    sink: Option<File>,
    /// By the client, or since the last event.
    masked: bool,
    /// By Interrupt Disable in the command register.
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

    /// Sends an event if the pin is asserted and may be. Returns whether it was sent.
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
            // A full counter: the client has not seen an event of before.
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
    /// Whether it has a descriptor.
    pub fn is_assigned(&self) -> bool {
        self.assigned.load(Ordering::Acquire)
    }

    /// Whether the driver can get interrupts of it.
    pub fn is_used(&self) -> bool {
        self.is_assigned() && !self.lock().disabled
    }

    /// Whether it is asserted, be it masked or not.
    pub fn is_asserted(&self) -> bool {
        self.is_assigned() && self.lock().level()
    }

    /// Sets the model that is asked. The caller must hold no lock that the model takes to answer; the same holds for all
    /// that follows, which return whether an event was sent.
    pub fn set_source(&self, source: Weak<dyn PinSource>) {
        self.lock().source = Some(source);
    }

    /// The model's reasons may be others than before.
    pub fn update(&self) -> bool {
        self.is_assigned() && self.lock().update()
    }

    /// The model masks these vectors, and no others.
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

    /// The client masks or unmasks it.
    pub fn mask(&self, masked: bool) -> bool {
        let mut state = self.lock();
        state.masked = masked;
        state.update()
    }

    /// The client has it send an event.
    pub fn trigger(&self) -> bool {
        self.lock().send()
    }

    /// Sets the descriptor that it sends to; `None` takes it away, and all that the client set.
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
        // Its thread may want the lock.
        drop(gone);
        sent
    }

    /// Sets what unmasks it besides the client's messages.
    pub fn set_unmasker(&self, unmasker: Option<Unmasker>) {
        let before = std::mem::replace(&mut self.lock().unmasker, unmasker);
        // Its thread may want the lock.
        drop(before);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

/// A thread that unmasks the pin whenever an event file descriptor is signalled. KVM does that when the guest has served
/// an interrupt.
pub(super) struct Unmasker {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Unmasker {
    /// Begins to wait. Refuses what cannot be waited for, like a file, with EINVAL; another error is not the client's.
    ///
    /// The wait is edge-triggered: a client may give a descriptor that is always readable, and the thread must wake only
    /// when somebody writes to it.
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
                    // It is none, or cannot be signalled any more.
                    Ok(0) | Err(_) => break,
                }
            }
        };
        let thread = std::thread::Builder::new().name("intx-unmask".into()).spawn(wait)?;
        Ok(Unmasker { stop, thread: Some(thread) })
    }
}

/// What epoll says when the client's descriptor was signalled.
const UNMASK: u64 = 0;
/// What epoll says when the thread is to end.
const STOP: u64 = 1;

/// Waits until the client's descriptor is signalled; false if the thread is to end instead.
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
        // A counter that is full is signalled.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

//! Whether the driver is to kick the request queue.
//!
//! A kick costs the driver an exit to its hypervisor and the device a wake-up. Neither is useful while a thread polls
//! the queue, so the device asks the driver not to kick (sections 2.7.7 and 2.7.10 of the virtio specification). When
//! polling ends, the device asks the driver to kick again and then checks the queue once more: a request that the
//! driver added before it saw the change has no kick.

/// A virtqueue, seen as a source of kicks.
pub(super) trait Available {
    /// Whether the driver has added a chain that is not taken yet.
    fn has_more(&self) -> bool;

    /// Asks the driver to kick, and then checks as [`Available::has_more`] does; `None` if the queue is not in memory.
    fn ask(&mut self) -> Option<bool>;

    /// Asks the driver not to kick. The driver may kick anyway.
    fn decline(&mut self);
}

/// Whether a thread polls a queue. If none does, nobody checks the queue until the driver kicks. All calls are made
/// with the queue locked.
#[derive(Debug, Default)]
pub(super) struct Kicks {
    polled: bool,
}

impl Kicks {
    /// Notes that a thread polls the queue from now on.
    pub fn begin_polling(&mut self, queue: &mut impl Available) {
        self.polled = true;
        queue.decline();
    }

    /// Notes that nobody polls the queue any more. `queue` is `None` if it was stopped meanwhile: its memory may have
    /// another use by then. Returns whether somebody has to check the queue now, without waiting for a kick.
    pub fn end_polling(&mut self, queue: Option<&mut impl Available>) -> bool {
        self.polled = false;
        queue.is_some_and(|queue| queue.ask().unwrap_or(true))
    }

    /// To be called when everything found in the queue was taken. Returns whether there is more now; if not, somebody
    /// will check the queue once there is. `None` if the queue is not in memory.
    pub fn rest(&self, queue: &mut impl Available) -> Option<bool> {
        if self.polled { Some(queue.has_more()) } else { queue.ask() }
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    //! The protocol between driver, worker and poller, in all orders that the memory model allows.

    use std::sync::Arc;

    use loom::sync::Mutex;
    use loom::sync::atomic::{AtomicU16, Ordering, fence};
    use loom::thread;

    use super::*;

    /// The state that driver and device share: the ring's index, its avail_event, and the kick's descriptor.
    #[derive(Default)]
    struct Shared {
        index: AtomicU16,
        event: AtomicU16,
        kick: Mutex<bool>,
    }

    /// The device's side.
    struct Queue {
        shared: Arc<Shared>,
        next: u16,
        kicks: Kicks,
    }

    impl Available for Taken<'_> {
        fn has_more(&self) -> bool {
            self.0.index.load(Ordering::Acquire) != *self.1
        }

        fn ask(&mut self) -> Option<bool> {
            self.0.event.store(*self.1, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            Some(self.0.index.load(Ordering::Relaxed) != *self.1)
        }

        fn decline(&mut self) {
            self.0.event.store(self.1.wrapping_sub(1), Ordering::Relaxed);
        }
    }

    /// The ring, and the index up to which it is taken.
    struct Taken<'a>(&'a Shared, &'a mut u16);

    impl Queue {
        fn split(&mut self) -> (&mut Kicks, Taken<'_>) {
            (&mut self.kicks, Taken(&self.shared, &mut self.next))
        }

        /// Takes everything, and rests.
        fn serve(&mut self) {
            loop {
                let (kicks, mut taken) = self.split();
                while taken.has_more() {
                    *taken.1 = taken.1.wrapping_add(1);
                }
                if kicks.rest(&mut taken) != Some(true) {
                    return;
                }
            }
        }
    }

    /// The driver adds a request, and kicks if it is asked to.
    fn add(shared: &Shared) {
        let old = shared.index.load(Ordering::Relaxed);
        let new = old.wrapping_add(1);
        shared.index.store(new, Ordering::Release);
        fence(Ordering::SeqCst);
        let event = shared.event.load(Ordering::Relaxed);
        if new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old) {
            *shared.kick.lock().unwrap() = true;
        }
    }

    #[test]
    fn loom_no_request_is_left_behind_when_polling_ends() {
        loom::model(|| {
            let shared = Arc::new(Shared::default());
            let queue = Arc::new(Mutex::new(Queue { shared: shared.clone(), next: 0, kicks: Kicks::default() }));
            let driver = {
                let shared = shared.clone();
                thread::spawn(move || {
                    add(&shared);
                    add(&shared);
                })
            };
            let poller = {
                let queue = queue.clone();
                thread::spawn(move || {
                    {
                        let mut queue = queue.lock().unwrap();
                        let (kicks, mut taken) = queue.split();
                        kicks.begin_polling(&mut taken);
                    }
                    queue.lock().unwrap().serve();
                    let mut queue = queue.lock().unwrap();
                    let (kicks, mut taken) = queue.split();
                    kicks.end_polling(Some(&mut taken))
                })
            };
            // The worker runs once. The kick that it takes may have come before the second request.
            let kicked = std::mem::take(&mut *shared.kick.lock().unwrap());
            if kicked {
                queue.lock().unwrap().serve();
            }
            driver.join().unwrap();
            let woken = poller.join().unwrap();
            let queue = queue.lock().unwrap();
            let all = queue.next == shared.index.load(Ordering::Relaxed);
            assert!(
                all || woken || *shared.kick.lock().unwrap(),
                "taken up to {}, and nobody will look; avail_event is {}",
                queue.next,
                shared.event.load(Ordering::Relaxed)
            );
        });
    }
}

//! The emitting side: what a thread does to trace an event.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::trace::Event;
use crate::trace::event::LossPlace;
use crate::trace::ring::{Consumer, Producer, Sequence, ring};
use crate::wire::trace::Kind;

/// 64-bit words of a record.
pub const WORDS: usize = 8;

/// One more than the highest number of a kind.
const KINDS: usize = Kind::ALL.len() + 1;

/// Takes events from anywhere in the process. Clones share one trace; the default one records nothing.
#[derive(Clone, Default)]
pub struct Tracer {
    shared: Option<Arc<Shared>>,
}

/// How many events were emitted, and how many of them are in no client's stream because a thread's ring was full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    kinds: [u64; KINDS],
    /// Events that were emitted and lost before the collector had them.
    pub lost: u64,
}

impl Counters {
    /// Events that were emitted, the lost ones too.
    pub fn emitted(&self) -> u64 {
        self.kinds.iter().sum()
    }

    /// Events of this kind that were emitted, the lost ones too.
    pub fn of(&self, kind: Kind) -> u64 {
        self.kinds[kind as usize]
    }
}

/// One thread's counters. Only that thread writes, so adding is a load and a store.
#[derive(Default)]
struct Counts {
    kinds: [AtomicU64; KINDS],
    lost: AtomicU64,
}

fn increment(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}

impl Counts {
    fn add_to(&self, sum: &mut Counters) {
        for (sum, count) in sum.kinds.iter_mut().zip(&self.kinds) {
            *sum += count.load(Ordering::Relaxed);
        }
        sum.lost += self.lost.load(Ordering::Relaxed);
    }
}

/// What all threads that trace share with the collector.
pub struct Shared {
    /// Tells traces apart: a thread may emit to several.
    id: u64,
    /// The next event's number.
    pub sequence: Sequence,
    /// Wakes the collector.
    pub wake: EventFd,
    stopping: AtomicBool,
    /// Whether events are recorded; without, they are not even numbered.
    recording: AtomicBool,
    slots: usize,
    /// When the trace was started.
    pub start_ns: u64,
    /// Events that were lost because their threads were at their ends, and that are not reported yet.
    late: AtomicU64,
    threads: Mutex<Threads>,
}

#[derive(Default)]
struct Threads {
    /// Rings that the collector does not know yet.
    new: Vec<Consumer<WORDS>>,
    counts: Vec<Arc<Counts>>,
    /// Counts of threads that ended.
    ended: Counters,
}

/// A thread's part in one trace.
struct Local {
    trace: u64,
    producer: Producer<WORDS>,
    counts: Arc<Counts>,
}

thread_local! {
    /// The traces that this thread emits to; nearly always one.
    static LOCALS: RefCell<Vec<Local>> = const { RefCell::new(Vec::new()) };
}

/// `CLOCK_MONOTONIC` in nanoseconds.
pub fn now_ns() -> u64 {
    clock(libc::CLOCK_MONOTONIC)
}

/// `CLOCK_REALTIME` in nanoseconds since 1970.
pub fn realtime_ns() -> u64 {
    clock(libc::CLOCK_REALTIME)
}

fn clock(id: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one timespec to the address given, which is that of a live local one. It cannot fail: the
    // callers name clocks that every Linux has.
    unsafe { libc::clock_gettime(id, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

impl Tracer {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Tracer { shared: Some(shared) }
    }

    /// Records that `event` happened now. Never waits: an event that finds its thread's ring full is counted as lost.
    /// Allocates only at a thread's first event.
    #[inline]
    pub fn emit(&self, event: Event) {
        if let Some(shared) = &self.shared
            && shared.recording.load(Ordering::Relaxed)
        {
            shared.emit(&event);
        }
    }

    /// Runs something that must not take its thread down; `None` if it panics, which is traced as a panic of
    /// `endpoint`. What the call changes must be whole, or not used any more, wherever it may panic.
    pub fn contain<R>(&self, endpoint: u32, call: impl FnOnce() -> R) -> Option<R> {
        let result = catch_unwind(AssertUnwindSafe(call));
        if result.is_err() {
            self.emit(Event::Panic { endpoint });
        }
        result.ok()
    }

    /// What was emitted so far. Takes a lock; for summaries.
    pub fn counters(&self) -> Counters {
        self.shared.as_ref().map_or_else(Counters::default, |shared| shared.counters())
    }
}

impl Shared {
    /// With rings of `slots` events, a power of two.
    pub fn new(slots: usize) -> std::io::Result<Arc<Self>> {
        static TRACES: AtomicU64 = AtomicU64::new(0);
        Ok(Arc::new(Shared {
            id: TRACES.fetch_add(1, Ordering::Relaxed),
            sequence: Sequence::new(),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            stopping: AtomicBool::new(false),
            recording: AtomicBool::new(true),
            slots,
            start_ns: now_ns(),
            late: AtomicU64::new(0),
            threads: Mutex::default(),
        }))
    }

    /// Emits to the calling thread's ring.
    pub fn emit(&self, event: &Event) {
        let emitted = LOCALS.try_with(|locals| {
            let mut locals = locals.try_borrow_mut().ok()?;
            if let Some(local) = locals.iter_mut().find(|local| local.trace == self.id) {
                local.emit(self, event);
                return Some(());
            }
            locals.retain(|local| !local.producer.is_orphan());
            let mut local = self.register();
            local.emit(self, event);
            locals.push(local);
            Some(())
        });
        if !matches!(emitted, Ok(Some(()))) {
            self.lose_late(event.kind());
        }
    }

    #[cold]
    fn register(&self) -> Local {
        let (producer, consumer) = ring(self.slots);
        let counts = Arc::new(Counts::default());
        let mut threads = self.threads();
        threads.new.push(consumer);
        threads.counts.push(counts.clone());
        Local { trace: self.id, producer, counts }
    }

    fn threads(&self) -> MutexGuard<'_, Threads> {
        // Nothing that holds the lock leaves a half-done change behind.
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The rings of threads that emitted their first event since the last call.
    pub fn new_rings(&self) -> Vec<Consumer<WORDS>> {
        std::mem::take(&mut self.threads().new)
    }

    /// What was emitted so far.
    pub fn counters(&self) -> Counters {
        let mut threads = self.threads();
        let Threads { counts, ended, .. } = &mut *threads;
        counts.retain_mut(|counts| match Arc::get_mut(counts) {
            // The thread is gone.
            Some(counts) => {
                counts.add_to(ended);
                false
            }
            None => true,
        });
        let mut sum = *ended;
        for counts in counts {
            counts.add_to(&mut sum);
        }
        sum
    }

    /// Counts an event of a thread that is at its end and has no locals any more.
    #[cold]
    fn lose_late(&self, kind: Kind) {
        let mut threads = self.threads();
        threads.ended.kinds[kind as usize] += 1;
        threads.ended.lost += 1;
        self.late.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes the number of events that were lost because their threads were at their ends.
    pub fn take_late(&self) -> u64 {
        match self.late.load(Ordering::Relaxed) {
            0 => 0,
            _ => self.late.swap(0, Ordering::Relaxed),
        }
    }

    /// Wakes the collector from whatever it waits for.
    #[cold]
    pub fn wake(&self) {
        // The only error is a full counter, and then it is awake.
        let _ = self.wake.write(1);
    }

    /// Tells the collector to end.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.wake();
    }

    /// Records events from now on, or none.
    pub fn record(&self, on: bool) {
        self.recording.store(on, Ordering::Relaxed);
    }

    /// Whether the collector was told to end.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }
}

impl Local {
    fn emit(&mut self, shared: &Shared, event: &Event) {
        let kind = event.kind();
        if kind != Kind::Lost {
            increment(&self.counts.kinds[kind as usize]);
        }
        let now = now_ns();
        if !self.producer.room(1 + usize::from(self.producer.has_loss())) {
            increment(&self.counts.lost);
            self.producer.lose(now);
            return;
        }
        if let Some(loss) = self.producer.take_loss() {
            self.push(shared, &Event::Lost { place: LossPlace::Ring, count: loss.count, since: loss.since }, now);
        }
        self.push(shared, event, now);
    }

    #[inline]
    fn push(&mut self, shared: &Shared, event: &Event, now: u64) {
        let (seq, asleep) = shared.sequence.take();
        self.producer.push(zerocopy::transmute!(event.encode(now, seq)));
        if (asleep && shared.sequence.end_sleep()) || self.producer.is_filling() {
            shared.wake();
        }
    }
}

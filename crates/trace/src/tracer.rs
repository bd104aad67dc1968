//! The emitting side: how a thread traces an event.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use nix::time::{ClockId, clock_gettime};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::Event;
use crate::event::Kind;
use crate::event::LossPlace;
use crate::record::WORDS;
use crate::ring::{Consumer, Producer, Sequence, ring};

/// The most events that the rings of a trace may have room for together, which is 288 MiB. A ring that no thread has
/// written to takes address space but no memory.
const RINGS_MAX: usize = 1 << 22;

/// The most rings that are kept for threads to come.
const IDLE_MAX: usize = 2;

/// One more than the highest number of a kind.
const KINDS: usize = Kind::ALL.len() + 1;

/// Takes events from anywhere in the process. Clones share one trace. The default tracer records nothing.
#[derive(Clone, Default)]
pub struct Tracer {
    shared: Option<Arc<TraceShared>>,
}

/// How many events were emitted, and how many of those were lost because a thread had no room or no ring for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TraceStats {
    kinds: [u64; KINDS],
    /// Events that were emitted, but lost before the collector had them.
    pub lost: u64,
}

impl TraceStats {
    /// Events that were emitted, including lost ones.
    pub fn emitted(&self) -> u64 {
        self.kinds.iter().sum()
    }

    /// Events of this kind that were emitted, including lost ones.
    pub fn of(&self, kind: Kind) -> u64 {
        self.kinds[kind as usize]
    }
}

/// The live form of [`TraceStats`], for the threads that wrote to one ring. Only the thread that has the ring writes
/// them, so adding is a load and a store.
#[derive(Default)]
struct Counters {
    kinds: [AtomicU64; KINDS],
    lost: AtomicU64,
}

fn increment(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}

impl Counters {
    fn add_to(&self, sum: &mut TraceStats) {
        for (sum, count) in sum.kinds.iter_mut().zip(&self.kinds) {
            *sum += count.load(Ordering::Relaxed);
        }
        sum.lost += self.lost.load(Ordering::Relaxed);
    }
}

/// The state that all tracing threads share with the collector.
pub struct TraceShared {
    /// Distinguishes traces, since a thread may emit to several.
    id: u64,
    /// The next event's number.
    pub sequence: Sequence,
    /// Wakes the collector.
    pub wake: EventFd,
    stopping: AtomicBool,
    /// Whether events are recorded. Otherwise they are not even numbered.
    recording: AtomicBool,
    /// Kinds that clients get only if they name them: those that some client named.
    wanted: AtomicU64,
    slots: usize,
    /// `CLOCK_MONOTONIC` in nanoseconds when the trace was started.
    pub start_ns: u64,
    /// Events that were lost because their thread had no ring, and that no `lost` event reports yet.
    unreported: AtomicU64,
    threads: Mutex<Threads>,
}

#[derive(Default)]
struct Threads {
    /// Rings that the collector has not fetched yet.
    new: Vec<Consumer<WORDS>>,
    /// The counters of each ring.
    counters: Vec<Arc<Counters>>,
    /// Lanes without a thread, for the next thread that needs one. Events of the last thread may still be in the ring.
    idle: Vec<Lane>,
    /// What was counted for rings that are gone, and for threads that had none.
    ringless: TraceStats,
}

impl Threads {
    fn add_lane(&mut self, slots: usize) -> Lane {
        let (producer, consumer) = ring(slots);
        let counters = Arc::new(Counters::default());
        self.new.push(consumer);
        self.counters.push(counters.clone());
        Lane { producer, counters }
    }
}

/// The writing end of a ring, and its counters. One thread has it at a time and hands it on at its end. The collector sees
/// no difference, since the numbers of the next thread's events are higher.
pub struct Lane {
    producer: Producer<WORDS>,
    counters: Arc<Counters>,
}

/// A thread's lane in one trace.
struct Local {
    trace: u64,
    shared: Weak<TraceShared>,
    lane: Lane,
}

/// The traces that a thread emits to: nearly always one.
struct Locals(Vec<Local>);

impl Drop for Locals {
    fn drop(&mut self) {
        for Local { shared, lane, .. } in self.0.drain(..) {
            if let Some(shared) = shared.upgrade() {
                shared.take_back(lane);
            }
        }
    }
}

thread_local! {
    static LOCALS: RefCell<Locals> = const { RefCell::new(Locals(Vec::new())) };
}

/// `CLOCK_MONOTONIC` in nanoseconds.
pub fn now_ns() -> u64 {
    clock(ClockId::CLOCK_MONOTONIC)
}

/// `CLOCK_REALTIME` in nanoseconds since 1970.
pub fn realtime_ns() -> u64 {
    clock(ClockId::CLOCK_REALTIME)
}

/// It cannot fail: the callers name clocks that every Linux has.
fn clock(id: ClockId) -> u64 {
    clock_gettime(id).map_or(0, |time| time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}

impl Tracer {
    pub(super) fn new(shared: Arc<TraceShared>) -> Self {
        Tracer { shared: Some(shared) }
    }

    /// Records that `event` happened now. Never waits: if the thread's ring is full, the event is counted as lost.
    /// Allocates only at a thread's first event.
    #[inline]
    pub fn emit(&self, event: Event) {
        if let Some(shared) = &self.shared
            && shared.recording.load(Ordering::Relaxed)
        {
            shared.emit(&event);
        }
    }

    /// Whether some client wants events of a kind that clients get only if they name it. If not, there is no need to
    /// make them.
    #[inline]
    pub fn wants(&self, kind: Kind) -> bool {
        self.shared.as_ref().is_some_and(|shared| shared.wanted.load(Ordering::Relaxed) & kind.bit() != 0)
    }

    /// Runs `call` and catches a panic, which is traced as a panic of `endpoint`; then the result is `None`. Wherever
    /// the call may panic, what it changes must be consistent, or must not be used any more.
    pub fn catch_panic<R>(&self, endpoint: u32, call: impl FnOnce() -> R) -> Option<R> {
        let result = catch_unwind(AssertUnwindSafe(call));
        if result.is_err() {
            self.emit(Event::Panic { endpoint });
        }
        result.ok()
    }

    /// The statistics so far. Takes a lock; for summaries.
    pub fn stats(&self) -> TraceStats {
        self.shared.as_ref().map_or_else(TraceStats::default, |shared| shared.stats())
    }
}

impl TraceShared {
    /// A trace without events, whose rings have `slots` slots, a power of two.
    pub fn new(slots: usize) -> std::io::Result<Arc<Self>> {
        static TRACES: AtomicU64 = AtomicU64::new(0);
        Ok(Arc::new(TraceShared {
            id: TRACES.fetch_add(1, Ordering::Relaxed),
            sequence: Sequence::new(),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            stopping: AtomicBool::new(false),
            recording: AtomicBool::new(true),
            wanted: AtomicU64::new(0),
            slots,
            start_ns: now_ns(),
            unreported: AtomicU64::new(0),
            threads: Mutex::default(),
        }))
    }

    /// Emits to the calling thread's ring.
    pub fn emit(self: &Arc<Self>, event: &Event) {
        let emitted = LOCALS.try_with(|locals| {
            let locals = &mut locals.try_borrow_mut().ok()?.0;
            if let Some(local) = locals.iter_mut().find(|local| local.trace == self.id) {
                local.lane.emit(self, event);
                return Some(());
            }
            locals.retain(|local| local.shared.strong_count() > 0);
            let mut lane = self.lane()?;
            lane.emit(self, event);
            locals.push(Local { trace: self.id, shared: Arc::downgrade(self), lane });
            Some(())
        });
        if !matches!(emitted, Ok(Some(()))) {
            self.lose(event.kind());
        }
    }

    /// A lane for the calling thread; `None` if all that there may be are taken. It is an idle lane if half of its ring
    /// is free, since events of the last thread that are still in it take room. Otherwise it is a new one, up to the
    /// limit, and then any idle one.
    #[cold]
    fn lane(&self) -> Option<Lane> {
        let mut threads = self.threads();
        let events = (threads.counters.len() + 1) * self.slots;
        let wanted = if events <= RINGS_MAX { self.slots / 2 } else { 0 };
        let idle = threads.idle.iter_mut().map(|lane| lane.producer.free()).enumerate();
        match idle.max_by_key(|(_, free)| *free) {
            Some((at, free)) if free >= wanted => Some(threads.idle.swap_remove(at)),
            _ if events <= RINGS_MAX => Some(threads.add_lane(self.slots)),
            _ => None,
        }
    }

    /// Takes back the lane of a thread that ends.
    fn take_back(&self, mut lane: Lane) {
        // A thread looks only once in a quarter of a ring whether it fills, and the next one wants half of it.
        let is_filling = lane.producer.free() < self.slots / 2;
        self.threads().idle.push(lane);
        if is_filling {
            self.wake();
        }
    }

    /// A lane for the collector, regardless of the limit.
    pub fn own_lane(&self) -> Lane {
        self.threads().add_lane(self.slots)
    }

    fn threads(&self) -> MutexGuard<'_, Threads> {
        // No holder of the lock leaves a half-done change behind.
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the rings that were made since the last call.
    pub fn new_rings(&self) -> Vec<Consumer<WORDS>> {
        std::mem::take(&mut self.threads().new)
    }

    /// Ends rings that no thread has and whose events were all taken, except a few. When many threads end, or the collector
    /// is late, there are more than will be needed again.
    pub fn end_idle_rings(&self) {
        let threads = &mut *self.threads();
        let surplus = threads.idle.len().saturating_sub(IDLE_MAX);
        for lane in threads.idle.extract_if(.., |lane| lane.producer.is_idle()).take(surplus) {
            lane.counters.add_to(&mut threads.ringless);
            threads.counters.retain(|counters| !Arc::ptr_eq(counters, &lane.counters));
        }
    }

    /// The statistics so far.
    pub fn stats(&self) -> TraceStats {
        let threads = self.threads();
        let mut sum = threads.ringless;
        threads.counters.iter().for_each(|counters| counters.add_to(&mut sum));
        sum
    }

    /// Counts an event of a thread without a ring: the thread is ending, or there are too many threads.
    #[cold]
    fn lose(&self, kind: Kind) {
        {
            let mut threads = self.threads();
            threads.ringless.kinds[kind as usize] += 1;
            threads.ringless.lost += 1;
        }
        self.unreported.fetch_add(1, Ordering::Relaxed);
        // The event takes no number, which would have shown that the collector sleeps.
        if self.sequence.end_sleep() {
            self.wake();
        }
    }

    /// Takes the number of events that were lost because their thread had no ring.
    pub fn take_unreported(&self) -> u64 {
        match self.unreported.load(Ordering::Relaxed) {
            0 => 0,
            _ => self.unreported.swap(0, Ordering::Relaxed),
        }
    }

    /// Wakes the collector, which may be waiting for anything.
    #[cold]
    pub fn wake(&self) {
        // The only error is a full counter, and that wakes the collector too.
        let _ = self.wake.write(1);
    }

    /// Tells the collector to end.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.wake();
    }

    /// Sets the kinds that clients named. Only kinds that must be named matter.
    pub fn want(&self, kinds: u64) {
        self.wanted.store(kinds & Kind::ON_REQUEST, Ordering::Relaxed);
    }

    /// Turns the recording of events on or off.
    pub fn record(&self, on: bool) {
        self.recording.store(on, Ordering::Relaxed);
    }

    /// Whether the collector was told to end.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }
}

impl Lane {
    /// Whether there is room for an event now.
    pub fn has_room(&mut self) -> bool {
        self.producer.room(1)
    }

    /// Writes an event, or counts it as lost if there is no room for it.
    pub fn emit(&mut self, shared: &TraceShared, event: &Event) {
        let kind = event.kind();
        if kind != Kind::Lost {
            increment(&self.counters.kinds[kind as usize]);
        }
        let now = now_ns();
        if !self.producer.room(1 + usize::from(self.producer.has_loss())) {
            increment(&self.counters.lost);
            self.producer.lose(now);
            return;
        }
        if let Some(loss) = self.producer.take_loss() {
            self.push(shared, &Event::Lost { place: LossPlace::Ring, count: loss.count, since: loss.since }, now);
        }
        self.push(shared, event, now);
    }

    #[inline]
    fn push(&mut self, shared: &TraceShared, event: &Event, now: u64) {
        let (seq, asleep) = shared.sequence.take();
        self.producer.push(event.encode(now, seq).words());
        if (asleep && shared.sequence.end_sleep()) || self.producer.is_filling() {
            shared.wake();
        }
    }
}

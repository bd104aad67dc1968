//! The collector's thread: it empties the rings, serves the clients, and sleeps as long as it can.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use epoll::{ControlOptions, Events};
use nix::sys::resource::{Resource, getrlimit};

use crate::client::{Client, Progress};
use crate::collector::{Collector, Drained};
use crate::history::History;
use crate::lines::Lines;
use crate::record::{Header, MAGIC, Record, VERSION};
use crate::state::{MakeState, Nothing};
use crate::subscription::Filter;
use crate::tracer::{TraceShared, now_ns, realtime_ns};
use viommu_socket::Socket;

/// How long events may wait in the rings while clients watch and there is traffic.
const TICK: Duration = Duration::from_millis(2);

/// After this long without an event the collector sleeps until the next event wakes it, which costs that event's thread
/// a system call.
const QUIET: Duration = Duration::from_millis(50);

/// How long to wait for a thread that was preempted between taking a number and writing its event.
const STRAGGLER: Duration = Duration::from_millis(1);

/// How long to accept no connections after the process had no descriptor left for one.
const NO_DESCRIPTOR: Duration = Duration::from_millis(100);

/// The most connections that are accepted in one round, so that a peer that keeps connecting delays neither the rings,
/// nor other clients, nor the end.
const ACCEPTS: usize = 16;

/// The most clients that are served at once. There are fewer if the process may have less than four times as many
/// descriptors.
const CLIENTS_MAX: u64 = 256;

/// The nice value of the thread: vCPUs and device models come first when CPUs are scarce.
const NICE: i32 = 5;

/// The number of clients for which some of the live state is read in one round. More clients are served in turn, so
/// that events do not wait long.
const STATE_STEPS: usize = 4;

/// While events come, reading the live state takes at most one part in this many of the time, since the threads that
/// make the events wait for it, or for the CPU.
const STATE_SHARE: u32 = 8;

const WAKE: u64 = 0;
const LISTENER: u64 = 1;
const FIRST_CLIENT: u64 = 2;

/// The state of the collector's thread.
pub struct TraceServer {
    shared: Arc<TraceShared>,
    collector: Collector,
    history: History,
    epoll: Epoll,
    socket: Option<Socket>,
    /// The time until which no connections are accepted.
    no_accept: Option<Instant>,
    clients: BTreeMap<u64, Client>,
    clients_max: usize,
    /// Lines that clients with JSON share.
    lines: Lines,
    next_client: u64,
    last_event: Instant,
    /// Makes readers of the live state.
    state: MakeState,
    /// When the live state may be read again.
    next_state: Instant,
    /// The client for which it was read last.
    state_client: u64,
    /// How long clients have to take the last events.
    farewell: Duration,
}

impl TraceServer {
    /// A server on `socket`, if there is one, with a history of `history` events.
    pub fn new(
        shared: Arc<TraceShared>,
        socket: Option<Socket>,
        history: usize,
        farewell: Duration,
    ) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        epoll.add(shared.wake.as_raw_fd(), Events::EPOLLIN, WAKE)?;
        if let Some(socket) = &socket {
            socket.listener().set_nonblocking(true)?;
            epoll.add(socket.listener().as_raw_fd(), Events::EPOLLIN, LISTENER)?;
        }
        Ok(TraceServer {
            collector: Collector::new(shared.clone()),
            shared,
            history: History::new(history),
            epoll,
            socket,
            no_accept: None,
            clients: BTreeMap::new(),
            clients_max: clients_max(),
            lines: Lines::default(),
            next_client: FIRST_CLIENT,
            last_event: Instant::now(),
            state: Box::new(|| Box::new(Nothing)),
            next_state: Instant::now(),
            state_client: 0,
            farewell,
        })
    }

    /// Sets how readers of the live state are made.
    pub fn set_state(&mut self, state: MakeState) {
        self.state = state;
    }

    /// Runs until the trace is stopped.
    pub fn run(mut self) {
        be_nice();
        let mut timeout = None;
        while !self.shared.is_stopping() {
            let ready = self.epoll.wait(timeout);
            self.shared.sequence.end_sleep();
            // Before the rings are emptied, so that a later wake-up is about later events.
            let _ = self.shared.wake.read();
            let drained = self.drain();
            if drained == Drained::All {
                let made = self.collector.next();
                self.clients.values_mut().for_each(|client| client.end_state(made));
            }
            for event in ready {
                self.handle(event);
            }
            self.expire();
            self.begin();
            // Before a client gets its header: from then on it gets every event that it asked for.
            self.shared.want(self.clients.values().fold(0, |kinds, client| kinds | client.kinds()));
            let (begun, read) = (Instant::now(), self.read_state());
            let more = self.pump();
            match read {
                Some(true) if self.last_event.elapsed() < QUIET => {
                    self.next_state = Instant::now() + begun.elapsed() * (STATE_SHARE - 1);
                }
                // Requests are being executed. Try again between two batches.
                Some(false) => self.next_state = Instant::now() + TICK,
                _ => {}
            }
            timeout = self.timeout(drained, more);
        }
        self.finish();
    }

    /// Moves events from the rings into the history.
    fn drain(&mut self) -> Drained {
        let TraceServer { collector, history, clients, .. } = self;
        let before = history.end();
        let mut slowest = clients.values().map(Client::position).min().unwrap_or(u64::MAX);
        let drained = collector.drain(|record| {
            if let Some(victim) = history.victim()
                && history.first() >= slowest
            {
                slowest = miss(clients, history.first(), victim);
            }
            history.push(record);
        });
        if history.end() != before {
            self.last_event = Instant::now();
        }
        drained
    }

    fn handle(&mut self, event: epoll::Event) {
        match event.data {
            WAKE => {}
            LISTENER => self.accept(),
            id => {
                let events = Events::from_bits_truncate(event.events);
                let Some(client) = self.clients.get_mut(&id) else { return };
                if events.intersects(Events::EPOLLIN | Events::EPOLLRDHUP) {
                    client.receive();
                }
                if events.intersects(Events::EPOLLHUP | Events::EPOLLERR) {
                    self.clients.remove(&id);
                }
            }
        }
    }

    /// Accepts some of the waiting connections. The rest keep the listening socket readable.
    fn accept(&mut self) {
        for _ in 0..ACCEPTS {
            let Some(socket) = &self.socket else { return };
            match socket.listener().accept() {
                Ok((stream, _)) => {
                    if let Err(error) = self.add(stream) {
                        log::warn!("Cannot serve a trace client: {error}");
                    }
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR | libc::ECONNABORTED) => {}
                    Some(libc::EAGAIN) => return,
                    _ => {
                        log::warn!("Cannot accept a trace client now: {error}");
                        let _ = self.epoll.change(socket.listener().as_raw_fd(), Events::empty(), LISTENER);
                        self.no_accept = Some(Instant::now() + NO_DESCRIPTOR);
                        return;
                    }
                },
            }
        }
    }

    /// Adds a client.
    ///
    /// # Errors
    /// Its socket cannot be watched.
    pub fn add(&mut self, stream: UnixStream) -> io::Result<()> {
        // Events that have a number now happened before, though the history may not have them yet.
        let mut client = Client::new(stream, self.shared.sequence.count())?;
        if self.clients.len() >= self.clients_max {
            client.refuse(&format!("{} clients are served already, which is the limit", self.clients_max));
            // Whatever the socket does not take at once is lost with the connection.
            client.pump(&self.history, None);
            return Ok(());
        }
        self.epoll.add(client.fd(), client.new_interest().unwrap_or(Events::empty()), self.next_client)?;
        self.clients.insert(self.next_client, client);
        self.next_client += 1;
        Ok(())
    }

    /// Begins the streams of clients that have subscribed, once the history has everything that happened before they
    /// connected.
    fn begin(&mut self) {
        let TraceServer { shared, history, clients, state, .. } = self;
        for client in clients.values_mut() {
            if let Some(subscription) = client.subscription(history.end()).cloned() {
                let header = header(shared, &subscription.filter(), client.position());
                client.begin(&subscription, &header, history, || state());
            }
        }
    }

    /// Reads some of the live state for some of the clients that want it. `None` if there are none, or if it is too
    /// early; otherwise whether anything could be read.
    fn read_state(&mut self) -> Option<bool> {
        if self.next_state > Instant::now() {
            return None;
        }
        let TraceServer { shared, clients, state_client, .. } = self;
        let next = clients.range(*state_client + 1..).chain(clients.range(..=*state_client));
        let next: Vec<u64> =
            next.filter(|(_, client)| client.wants_state()).map(|(id, _)| *id).take(STATE_STEPS).collect();
        let mut any = false;
        for id in &next {
            if let Some(client) = clients.get_mut(id) {
                any |= client.read_state(|| shared.sequence.count());
            }
            *state_client = *id;
        }
        (!next.is_empty()).then_some(any)
    }

    /// Acts on deadlines that have passed.
    fn expire(&mut self) {
        let now = Instant::now();
        if self.no_accept.is_some_and(|until| until <= now)
            && let Some(socket) = &self.socket
        {
            self.no_accept = None;
            let _ = self.epoll.change(socket.listener().as_raw_fd(), Events::EPOLLIN, LISTENER);
        }
        let is_due = |client: &Client| client.deadline().is_some_and(|deadline| deadline <= now);
        self.clients.retain(|_, client| !(is_due(client) && client.expire()));
    }

    /// Sends to all clients what they can take, within limits. Returns whether some of them could take more.
    fn pump(&mut self) -> bool {
        let TraceServer { clients, history, epoll, lines, .. } = self;
        let mut more = false;
        // For a single client, lines are made directly in its output.
        let share = clients.values().filter(|client| client.gets_json()).count() > 1;
        clients.retain(|id, client| {
            let progress = client.pump(history, share.then_some(&mut *lines));
            more |= progress == Progress::More;
            let change = client.new_interest();
            progress != Progress::Gone && change.is_none_or(|events| epoll.change(client.fd(), events, *id).is_ok())
        });
        more
    }

    /// The longest time to sleep; `None` for until something happens.
    fn timeout(&mut self, drained: Drained, more: bool) -> Option<Duration> {
        // An end mark can be made only after another look at the rings.
        let ends = drained == Drained::All && self.clients.values().any(Client::awaits_end_of_state);
        if more || ends || drained == Drained::More {
            return Some(Duration::ZERO);
        }
        let due = self.clients.values().filter_map(Client::deadline).chain(self.no_accept).min();
        let state = self.clients.values().any(Client::wants_state).then_some(self.next_state);
        let due = due.into_iter().chain(state).min();
        let due = due.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let tick = if drained == Drained::Waiting {
            Some(STRAGGLER)
        } else if !self.clients.values().any(Client::is_streaming) {
            // No client watches: a thread whose ring becomes half full wakes the collector.
            None
        } else if self.last_event.elapsed() < QUIET || !self.shared.sequence.try_sleep(self.collector.next()) {
            Some(TICK)
        } else {
            None
        };
        tick.into_iter().chain(due).min()
    }

    /// Sends the rest to all clients, within a limited time.
    fn finish(mut self) {
        let end = Instant::now() + self.farewell;
        self.socket = None;
        while self.drain() != Drained::All && Instant::now() < end {}
        for client in self.clients.values_mut() {
            client.receive();
            client.expire();
        }
        self.begin();
        loop {
            let more = self.pump();
            let left = end.saturating_duration_since(Instant::now());
            if (!more && !self.clients.values().any(Client::is_blocked)) || left.is_zero() {
                return;
            }
            if !more {
                for event in self.epoll.wait(Some(left)) {
                    self.handle(event);
                }
            }
        }
    }
}

/// The header of a client's stream.
fn header(shared: &TraceShared, filter: &Filter, seq: u64) -> Header {
    Header {
        magic: MAGIC,
        version: VERSION.into(),
        record_size: (size_of::<Record>() as u32).into(),
        clock: (libc::CLOCK_MONOTONIC as u32).into(),
        pid: std::process::id().into(),
        start_ns: shared.start_ns.into(),
        realtime_offset_ns: realtime_ns().saturating_sub(now_ns()).into(),
        kinds: filter.kinds.into(),
        lost: shared.stats().lost.into(),
        seq: seq.into(),
    }
}

/// Notes that the event `victim` at `position` leaves the history. Returns the position of the slowest client after
/// that.
fn miss(clients: &mut BTreeMap<u64, Client>, position: u64, victim: &Record) -> u64 {
    let mut slowest = u64::MAX;
    for client in clients.values_mut() {
        if client.position() == position {
            client.miss(victim);
        }
        slowest = slowest.min(client.position());
    }
    slowest
}

/// An epoll descriptor, closed when dropped.
struct Epoll(OwnedFd);

impl Epoll {
    fn new() -> io::Result<Self> {
        let fd = epoll::create(true)?;
        // SAFETY: `create` just made the descriptor, and nothing else knows it.
        Ok(Epoll(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    fn add(&self, fd: RawFd, events: Events, data: u64) -> io::Result<()> {
        epoll::ctl(self.0.as_raw_fd(), ControlOptions::EPOLL_CTL_ADD, fd, epoll::Event::new(events, data))
    }

    fn change(&self, fd: RawFd, events: Events, data: u64) -> io::Result<()> {
        epoll::ctl(self.0.as_raw_fd(), ControlOptions::EPOLL_CTL_MOD, fd, epoll::Event::new(events, data))
    }

    /// Waits for events. A timeout is rounded up to milliseconds, so that a deadline has passed when it ends.
    fn wait(&self, timeout: Option<Duration>) -> Vec<epoll::Event> {
        let timeout = timeout.map_or(-1, |time| i32::try_from(time.as_micros().div_ceil(1000)).unwrap_or(i32::MAX));
        let mut events = [epoll::Event::new(Events::empty(), 0); 64];
        // The only possible error is an interrupt by a signal, and then nothing is ready.
        let count = epoll::wait(self.0.as_raw_fd(), timeout, &mut events).unwrap_or(0);
        events[..count].to_vec()
    }
}

fn clients_max() -> usize {
    let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft);
    (descriptors / 4).clamp(1, CLIENTS_MAX) as usize
}

fn be_nice() {
    // SAFETY: the call takes numbers only. For Linux, 0 is the calling thread. A failure does no harm.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
}

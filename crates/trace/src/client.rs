//! One client of the trace socket.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use epoll::Events;
use zerocopy::IntoBytes;

use crate::event::Kind;
use crate::event::{Event, LossPlace};
use crate::history::History;
use crate::line;
use crate::lines::Lines;
use crate::record::{Header, Record};
use crate::state::{Snapshot, StateSource};
use crate::subscription::{Backlog, Filter, Format, Subscription, hello, refusal};

/// A client that has sent nothing for this long gets the default subscription.
const GRACE: Duration = Duration::from_millis(100);

/// How long a client that has begun its line has to end it.
const LINE_TIME: Duration = Duration::from_secs(2);

/// The most bytes of the first line.
const LINE_MAX: usize = 4096;

/// How long a client that is refused has to read why.
const FAREWELL: Duration = Duration::from_secs(1);

/// Bytes that are prepared for a client at a time.
const OUT_MAX: usize = 64 << 10;

/// How often bytes are prepared for a client before the next client is served.
const ROUNDS: usize = 4;

enum State {
    /// It may send a line, until the deadline.
    Greeting { line: Vec<u8>, deadline: Instant },
    /// It has subscribed. Its stream begins once the history has everything that happened before it connected.
    Subscribed(Subscription),
    /// It gets events.
    Streaming { format: Format, filter: Filter },
    /// It gets the bytes that are prepared, and then its connection is closed.
    Closing { deadline: Instant },
}

/// Events that a client missed in a row.
struct Missed {
    count: u64,
    /// The time of the first of them.
    since: u64,
    /// The time of the last of them.
    until: u64,
    /// The sequence number of the last of them.
    seq: u64,
}

/// The state of a client after it was served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It has everything that there is for it.
    Done,
    /// There is more for it, and it can take it.
    More,
    /// There is more for it, and its socket is full.
    Blocked,
    /// It has disconnected, or is to be disconnected.
    Gone,
}

/// A client's connection, and what is to be sent on it.
pub struct Client {
    stream: UnixStream,
    state: State,
    /// The position of the next event for it. The history may end before that position as long as the client gets
    /// nothing.
    position: u64,
    missed: Option<Missed>,
    /// The live state, if the client asked for it and does not have all of it yet.
    snapshot: Option<Snapshot>,
    out: Vec<u8>,
    /// Bytes of `out` that the socket took.
    sent: usize,
    blocked: bool,
    /// The events that the collector waits for on its socket.
    awaited: Events,
}

impl Client {
    /// A client that connected just before the event at `position`.
    pub fn new(stream: UnixStream, position: u64) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let state = State::Greeting { line: Vec::new(), deadline: Instant::now() + GRACE };
        let (out, awaited) = (Vec::new(), Events::empty());
        Ok(Client { stream, state, position, missed: None, snapshot: None, out, sent: 0, blocked: false, awaited })
    }

    /// Refuses the client, with a message that says why.
    pub fn refuse(&mut self, message: &str) {
        self.out.extend(refusal(message).as_bytes());
        self.state = State::Closing { deadline: Instant::now() + FAREWELL };
    }

    /// The socket.
    pub fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// The events to wait for on the socket from now on; `None` if they are those of the last call. A hang-up is always
    /// reported. What a client sends after its subscription is left unread, and must not wake the collector.
    pub fn new_interest(&mut self) -> Option<Events> {
        let interest = match self.state {
            State::Greeting { .. } => Events::EPOLLIN | Events::EPOLLRDHUP,
            _ if self.blocked => Events::EPOLLOUT,
            _ => Events::empty(),
        };
        (interest != std::mem::replace(&mut self.awaited, interest)).then_some(interest)
    }

    /// When [`Client::expire`] is to be called.
    pub fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Greeting { deadline, .. } | State::Closing { deadline } => Some(deadline),
            State::Subscribed(_) | State::Streaming { .. } => None,
        }
    }

    /// Whether it gets events.
    pub fn is_streaming(&self) -> bool {
        matches!(self.state, State::Streaming { .. })
    }

    /// Whether it gets events as lines of JSON.
    pub fn gets_json(&self) -> bool {
        matches!(self.state, State::Streaming { format: Format::Json, .. })
    }

    /// Whether its socket was full.
    pub fn is_blocked(&self) -> bool {
        self.blocked
    }

    /// The kinds that it gets.
    pub fn kinds(&self) -> u64 {
        if let State::Streaming { filter, .. } = &self.state { filter.kinds } else { 0 }
    }

    /// The position of the next event for it.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Its subscription, if its stream can begin: the history, which ends at `end`, has everything that happened before
    /// it connected.
    pub fn subscription(&self, end: u64) -> Option<&Subscription> {
        match &self.state {
            State::Subscribed(subscription) if self.position <= end => Some(subscription),
            _ => None,
        }
    }

    /// Reads the client's first line, as far as it is there.
    pub fn receive(&mut self) {
        let State::Greeting { line, deadline } = &mut self.state else { return };
        let mut buffer = [0; 1024];
        loop {
            match self.stream.read(&mut buffer) {
                // The client sends nothing more, but may still read.
                Ok(0) => break,
                Ok(len) => {
                    if line.is_empty() {
                        *deadline = Instant::now() + LINE_TIME;
                    }
                    line.extend(&buffer[..len]);
                    if line.contains(&b'\n') {
                        break;
                    }
                    if line.len() > LINE_MAX {
                        self.refuse(&format!("The first line has more than {LINE_MAX} bytes"));
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.state = State::Closing { deadline: Instant::now() };
                    return;
                }
            }
        }
        let line = line.split(|byte| *byte == b'\n').next().unwrap_or_default();
        match Subscription::parse(line) {
            Ok(subscription) => self.state = State::Subscribed(subscription),
            Err(message) => self.refuse(&message),
        }
    }

    /// Acts on the deadline of [`Client::deadline`]: a silent client gets the default, and an unfinished line is
    /// refused. Returns whether the connection is to end now.
    pub fn expire(&mut self) -> bool {
        match &self.state {
            State::Greeting { line, .. } if line.is_empty() => self.state = State::Subscribed(Subscription::default()),
            State::Greeting { .. } => self.refuse("The first line did not end with a newline in time"),
            State::Subscribed(_) | State::Streaming { .. } => {}
            State::Closing { .. } => return true,
        }
        false
    }

    /// Begins the stream. `state` makes the reader of the live state, if the client asked for it.
    pub fn begin(
        &mut self,
        subscription: &Subscription,
        header: &Header,
        history: &History,
        state: impl FnOnce() -> Box<dyn StateSource>,
    ) {
        let filter = subscription.filter();
        self.snapshot = (filter.kinds & Kind::State.bit() != 0).then(|| Snapshot::new(state()));
        match subscription.format {
            Format::Json => self.out.extend(hello(header).as_bytes()),
            Format::Binary => self.out.extend(header.as_bytes()),
        }
        let wanted = match subscription.backlog {
            Backlog::None => 0,
            Backlog::Count(count) => count,
            Backlog::All => u64::MAX,
        };
        // The client gets events of the time since it connected in any case.
        let old =
            history.newest_first().filter(|(position, record)| *position < self.position && filter.passes(record));
        let mut start = self.position;
        for ((position, _), _) in old.zip(0..wanted) {
            start = position;
        }
        self.position = start;
        self.state = State::Streaming { format: subscription.format, filter };
    }

    /// Whether more of the live state is to be read for it now.
    pub fn wants_state(&self) -> bool {
        !self.blocked && self.snapshot.as_ref().is_some_and(Snapshot::is_to_read)
    }

    /// Reads some of the live state. Returns false if that was not possible now. `made` gives the number of events made
    /// so far.
    pub fn read_state(&mut self, made: impl Fn() -> u64) -> bool {
        match (&self.state, &mut self.snapshot) {
            (State::Streaming { filter, .. }, Some(snapshot)) => snapshot.read(made, |record| filter.passes(record)),
            _ => false,
        }
    }

    /// Whether all of the live state was read, and [`Client::end_state`] is to be called.
    pub fn awaits_end_of_state(&self) -> bool {
        self.snapshot.as_ref().is_some_and(Snapshot::is_ending)
    }

    /// Ends the live state, if all of it was read. The history must have the first `made` events, and a `lost` event
    /// for each loss before that.
    pub fn end_state(&mut self, made: u64) {
        if let Some(snapshot) = &mut self.snapshot {
            snapshot.end(made);
        }
    }

    /// Notes that the event at this client's position leaves the history.
    pub fn miss(&mut self, record: &Record) {
        self.position += 1;
        let wanted = match &self.state {
            State::Greeting { .. } => true,
            State::Subscribed(subscription) => subscription.filter().passes(record),
            State::Streaming { filter, .. } => filter.passes(record),
            State::Closing { .. } => false,
        };
        if !wanted {
            return;
        }
        // A missed `lost` event stands for all events that it reports.
        let is_loss = record.kind.get() == Kind::Lost as u16;
        let count = if is_loss { record.args[0].get() } else { 1 };
        if let Some(snapshot) = &mut self.snapshot {
            snapshot.lose(record.seq.get(), count);
        }
        let time = record.time_ns.get();
        let missed = self.missed.get_or_insert(Missed { count: 0, since: time, until: 0, seq: 0 });
        missed.count += count;
        missed.until = time;
        missed.seq = record.seq.get();
    }

    /// Sends what there is for the client, up to a limit. `lines` are the lines of JSON that it shares with other
    /// clients, if there are any.
    pub fn pump(&mut self, history: &History, mut lines: Option<&mut Lines>) -> Progress {
        for _ in 0..ROUNDS {
            if self.out.is_empty() {
                self.fill(history, lines.as_deref_mut());
            }
            if self.out.is_empty() {
                return if matches!(self.state, State::Closing { .. }) { Progress::Gone } else { Progress::Done };
            }
            match self.stream.write(&self.out[self.sent..]) {
                Ok(len) => {
                    self.blocked = false;
                    self.sent += len;
                    if self.sent == self.out.len() {
                        self.out.clear();
                        self.sent = 0;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.blocked = true;
                    return Progress::Blocked;
                }
                Err(_) => return Progress::Gone,
            }
        }
        Progress::More
    }

    /// Prepares the next bytes.
    fn fill(&mut self, history: &History, mut lines: Option<&mut Lines>) {
        let State::Streaming { format, filter } = &self.state else { return };
        if let Some(missed) = self.missed.take() {
            let lost = Event::Lost { place: LossPlace::Client, count: missed.count, since: missed.since };
            append(*format, &lost.encode(missed.until, missed.seq), &mut self.out);
        }
        loop {
            while let Some(record) = self.snapshot.as_mut().and_then(|snapshot| snapshot.next(self.position)) {
                append(*format, &record, &mut self.out);
                if self.out.len() >= OUT_MAX {
                    return;
                }
            }
            let until = self.snapshot.as_ref().and_then(Snapshot::until);
            self.snapshot.take_if(|snapshot| snapshot.is_over());
            let run = history.run(self.position);
            if run.is_empty() {
                return;
            }
            // The live state comes at the position at which it was read.
            let len = until.map_or(run.len(), |until| run.len().min(until.saturating_sub(self.position) as usize));
            let run = &run[..len];
            let first = self.position.max(history.first());
            for (position, record) in (first..).zip(run) {
                self.position += 1;
                if filter.passes(record) {
                    if let Some(snapshot) = &mut self.snapshot
                        && record.kind.get() == Kind::Lost as u16
                    {
                        snapshot.lose(record.seq.get(), record.args[0].get());
                    }
                    match (format, lines.as_deref_mut()) {
                        (Format::Json, Some(lines)) => lines.append(position, record, &mut self.out),
                        _ => append(*format, record, &mut self.out),
                    }
                    if self.out.len() >= OUT_MAX {
                        return;
                    }
                }
            }
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // Closing a Unix socket with unread data resets the connection, and the client might lose the end of what it
        // was sent. The number of reads is bounded, since the client may send without end.
        let mut buffer = [0; 4096];
        for _ in 0..16 {
            if !matches!(self.stream.read(&mut buffer), Ok(1..)) {
                break;
            }
        }
    }
}

fn append(format: Format, record: &Record, out: &mut Vec<u8>) {
    match format {
        Format::Binary => out.extend(record.as_bytes()),
        // Cannot fail: this process made the record, so it is of this version.
        Format::Json => drop(line::json(record, out)),
    }
}

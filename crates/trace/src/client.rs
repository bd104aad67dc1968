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

/// A client that has sent nothing for so long gets the default.
const GRACE: Duration = Duration::from_millis(100);

/// A client that has begun its line has so long to end it.
const LINE_TIME: Duration = Duration::from_secs(2);

/// Bytes that the first line may have.
const LINE_MAX: usize = 4096;

/// A client that is turned away has so long to read why.
const FAREWELL: Duration = Duration::from_secs(1);

/// Bytes that are made ready for a client at a time.
const OUT_MAX: usize = 64 << 10;

/// Times that a client's bytes are made ready before others get their turn.
const ROUNDS: usize = 4;

enum State {
    /// It may send a line.
    Greeting { line: Vec<u8>, deadline: Instant },
    /// It has subscribed. Its stream begins once the history has everything that happened before it connected.
    Subscribed(Subscription),
    /// It gets events.
    Streaming { format: Format, filter: Filter },
    /// It gets what is ready, and then its connection is closed.
    Closing { deadline: Instant },
}

/// What a client missed.
struct Missed {
    count: u64,
    /// When the first event happened.
    since: u64,
    /// When the last one happened.
    until: u64,
    /// The number of the last one.
    seq: u64,
}

/// How far a client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It has all that there is for it.
    Done,
    /// There is more for it, and it can take it.
    More,
    /// There is more for it, and its socket is full.
    Blocked,
    /// It is gone, or is to go.
    Gone,
}

/// A connection and what it is owed.
pub struct Client {
    stream: UnixStream,
    state: State,
    /// Where in the history it is. The history may end before, as long as the client gets nothing.
    position: u64,
    missed: Option<Missed>,
    /// What is live, if it asked for that and does not have it all.
    snapshot: Option<Snapshot>,
    out: Vec<u8>,
    /// Bytes of `out` that the socket took.
    sent: usize,
    blocked: bool,
    /// What its socket is waited for.
    awaited: Events,
}

impl Client {
    /// A client that connected when the next event was to have the position `position`.
    pub fn new(stream: UnixStream, position: u64) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let state = State::Greeting { line: Vec::new(), deadline: Instant::now() + GRACE };
        let (out, awaited) = (Vec::new(), Events::empty());
        Ok(Client { stream, state, position, missed: None, snapshot: None, out, sent: 0, blocked: false, awaited })
    }

    /// Turns the client away.
    pub fn refuse(&mut self, message: &str) {
        self.out.extend(refusal(message).as_bytes());
        self.state = State::Closing { deadline: Instant::now() + FAREWELL };
    }

    /// The socket.
    pub fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// What to wait for on the socket from now on, if that is something else than the last call said. That the client
    /// hangs up is always reported; what it sends when it has chosen is left unread, and must wake nobody.
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

    /// Where in the history it is.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Its subscription, if it made one and the history, which ends at `end`, has all that happened before it connected.
    pub fn subscription(&self, end: u64) -> Option<&Subscription> {
        match &self.state {
            State::Subscribed(subscription) if self.position <= end => Some(subscription),
            _ => None,
        }
    }

    /// Reads what the client sent before it gets events.
    pub fn receive(&mut self) {
        let State::Greeting { line, deadline } = &mut self.state else { return };
        let mut buffer = [0; 1024];
        loop {
            match self.stream.read(&mut buffer) {
                // It sends no more, and may still want to read.
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

    /// The time that [`Client::deadline`] gave has come: a silent client gets the default, an unfinished line is refused.
    /// Whether the connection is to end now.
    pub fn expire(&mut self) -> bool {
        match &self.state {
            State::Greeting { line, .. } if line.is_empty() => self.state = State::Subscribed(Subscription::default()),
            State::Greeting { .. } => self.refuse("The first line did not end with a newline in time"),
            State::Subscribed(_) | State::Streaming { .. } => {}
            State::Closing { .. } => return true,
        }
        false
    }

    /// Begins the stream; `state` makes what reads what is live.
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
        // What came during the greeting comes in any case.
        let old =
            history.newest_first().filter(|(position, record)| *position < self.position && filter.passes(record));
        let mut start = self.position;
        for ((position, _), _) in old.zip(0..wanted) {
            start = position;
        }
        self.position = start;
        self.state = State::Streaming { format: subscription.format, filter };
    }

    /// Whether it can take more of what is live, which was not read yet.
    pub fn wants_state(&self) -> bool {
        !self.blocked && self.snapshot.as_ref().is_some_and(Snapshot::is_to_read)
    }

    /// Reads some of what is live, and returns whether that could be; `made` is how many events were made.
    pub fn read_state(&mut self, made: impl Fn() -> u64) -> bool {
        match (&self.state, &mut self.snapshot) {
            (State::Streaming { filter, .. }, Some(snapshot)) => snapshot.read(made, |record| filter.passes(record)),
            _ => false,
        }
    }

    /// Whether all that is live was read, and the client waits for [`Client::end_state`].
    pub fn awaits_end_of_state(&self) -> bool {
        self.snapshot.as_ref().is_some_and(Snapshot::is_ending)
    }

    /// The history has the first `made` events, and the news of all that were lost before.
    pub fn end_state(&mut self, made: u64) {
        if let Some(snapshot) = &mut self.snapshot {
            snapshot.end(made);
        }
    }

    /// The event at this client's position goes out of the history.
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
        // Whoever misses the news of a loss missed what was lost.
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

    /// Sends what there is for the client, up to a limit. `lines` are those that it shares with others.
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

    /// Makes the next bytes ready.
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
            // What is live comes where it was read.
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
        // A Unix socket that is closed with unread data resets the connection, and the client might not see the end of
        // what it was sent. A bounded number of reads: the client may send for ever.
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
        // Records are made in this process, so they are of this version.
        Format::Json => drop(line::json(record, out)),
    }
}

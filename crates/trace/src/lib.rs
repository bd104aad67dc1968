//! Every step, made visible.
//!
//! A [`Tracer`] puts [`Event`]s into a ring of the calling thread and never waits. One collector thread merges the rings
//! in the order of the sequence numbers into a history, and serves the clients of the trace socket from it: each has a
//! position in the history, and one that falls behind the oldest event there loses events, and nobody else does.
//! `docs/trace.md` is the description for users.

mod client;
mod codec;
mod collector;
mod declare;
pub mod event;
mod file;
mod guest;
mod history;
mod line;
mod lines;
mod members;
mod names;
mod part;
mod place;
mod put;
mod reader;
pub mod record;
mod ring;
mod schema;
mod server;
mod state;
mod subscription;
mod tracer;
mod unit;

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

pub use codec::{CodecError, MemberError};
pub use event::{Event, Kind};
pub use file::{Entry, Item, Tally, TraceFile, Unreadable};
pub use guest::{ClockLine, GUEST_VERSION, GuestEvent, GuestFields, GuestTime, guest_key, split_time};
pub use line::{LineError, Stamped, json, text};
pub use members::{Members, Value};
pub use reader::{ReadError, Reader};
pub use record::{Header, Record};
pub use schema::schema;
pub use state::StateSource;
pub use subscription::{Backlog, Format, Subscription, hello, parse_endpoint};
pub use tracer::{TraceStats, Tracer, now_ns};

use viommu_socket::{Socket, SocketError};

/// How to trace.
#[derive(Clone, Debug)]
pub struct Options {
    /// Serve clients on a Unix socket with this path. A stale socket there is replaced.
    pub socket: Option<PathBuf>,
    /// Events that are kept for clients, those that come late and those that read slowly; rounded up to a power of two.
    /// 72 bytes each.
    pub history: usize,
    /// Events that a thread can make before the collector must have taken the first; rounded up to a power of two.
    /// 72 bytes each, for each thread that makes events.
    pub ring: usize,
    /// How long clients have to take the last events when the trace is stopped.
    pub farewell: Duration,
}

impl Default for Options {
    /// No socket, a history of 9 MiB, rings of 1.1 MiB, half a second at the end.
    fn default() -> Self {
        Options { socket: None, history: 1 << 17, ring: 1 << 14, farewell: Duration::from_millis(500) }
    }
}

/// Why tracing could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The socket could not be made.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The collector could not start.
    #[error("Cannot start the trace's collector")]
    Collector(#[source] std::io::Error),
}

/// A trace that takes events and connections, and that nobody serves yet.
pub struct Bound {
    shared: Arc<tracer::Shared>,
    server: server::Server,
}

/// Keeps the collector running until it is stopped or dropped.
pub struct TraceHandle {
    shared: Arc<tracer::Shared>,
    thread: Option<JoinHandle<()>>,
}

/// Starts tracing.
pub fn start(options: Options) -> Result<(Tracer, TraceHandle), StartError> {
    let (tracer, bound) = bind(options)?;
    Ok((tracer, bound.start()?))
}

/// Prepares to trace: from now on there are events, and who connects waits. Starts no thread.
pub fn bind(options: Options) -> Result<(Tracer, Bound), StartError> {
    let socket = options.socket.as_deref().map(Socket::bind).transpose()?;
    let ring = options.ring.max(2).next_power_of_two();
    let shared = tracer::Shared::new(ring).map_err(StartError::Collector)?;
    let server = server::Server::new(shared.clone(), socket, options.history, options.farewell)
        .map_err(StartError::Collector)?;
    Ok((Tracer::new(shared.clone()), Bound { shared, server }))
}

impl Bound {
    /// A connection to the trace, as its socket gives them; it is the first, however many wait for another.
    pub fn connect(&mut self) -> std::io::Result<UnixStream> {
        let (client, server) = UnixStream::pair()?;
        self.server.add(server)?;
        Ok(client)
    }

    /// What is live is asked of what `make` makes, for each client that wants to know it.
    pub fn set_state(&mut self, make: impl Fn() -> Box<dyn StateSource> + Send + 'static) {
        self.server.set_state(Box::new(make));
    }

    /// Starts the collector.
    pub fn start(self) -> Result<TraceHandle, StartError> {
        let Bound { shared, server } = self;
        let collector = std::thread::Builder::new().name("trace".into()).spawn(move || server.run());
        Ok(TraceHandle { shared, thread: Some(collector.map_err(StartError::Collector)?) })
    }
}

impl TraceHandle {
    /// Records events from now on, or none: they leave no gap in the numbers then. A thread that is in the middle of one
    /// may still record it.
    pub fn record(&self, on: bool) {
        self.shared.record(on);
    }

    /// Collects what was emitted until now, gives the clients [`Options::farewell`] to take it, closes their connections
    /// and removes the socket. What is emitted later goes nowhere. Returns the final counts.
    pub fn stop(mut self) -> TraceStats {
        self.end();
        self.shared.stats()
    }

    fn end(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.shared.stop();
            if thread.join().is_err() {
                log::error!("The trace's collector panicked");
            }
        }
    }
}

impl Drop for TraceHandle {
    fn drop(&mut self) {
        self.end();
    }
}

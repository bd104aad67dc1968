//! The trace: every step of the device as an event, on a socket.
//!
//! A [`Tracer`] puts each [`Event`] into a ring of the calling thread, and never waits. One collector thread merges the
//! rings into a history, in the order of the sequence numbers, and serves the clients of the trace socket from it. Each
//! client has a position in the history. A client that falls behind the oldest event there loses events, and no other
//! client does. `docs/trace.md` describes the format for users.

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
pub use line::{LineError, Stamped, endpoint_text, json, text};
pub use members::{Members, Value};
pub use reader::{ReadError, Reader};
pub use record::{Header, Record};
pub use schema::schema;
pub use state::StateSource;
pub use subscription::{Backlog, Format, Subscription, hello, parse_endpoint};
pub use tracer::{TraceStats, Tracer, now_ns};

use viommu_socket::{Socket, SocketError};

/// Settings of a trace.
#[derive(Clone, Debug)]
pub struct Options {
    /// The path of the Unix socket on which clients are served; without one, only [`Bound::connect`] makes clients. A
    /// stale socket there is replaced.
    pub socket: Option<PathBuf>,
    /// The number of events that are kept for clients that come late or read slowly, rounded up to a power of two. Each
    /// takes 72 bytes.
    pub history: usize,
    /// The number of events that a thread can make before the collector must have taken the first, rounded up to a
    /// power of two. Each takes 72 bytes, in each thread that makes events.
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

/// A trace that takes events and connections, but whose collector does not run yet.
pub struct Bound {
    shared: Arc<tracer::TraceShared>,
    server: server::TraceServer,
}

/// Keeps the collector running until it is stopped or dropped.
pub struct TraceHandle {
    shared: Arc<tracer::TraceShared>,
    thread: Option<JoinHandle<()>>,
}

/// Starts tracing.
///
/// # Errors
/// The socket cannot be made, or the collector cannot start.
pub fn start(options: Options) -> Result<(Tracer, TraceHandle), StartError> {
    let (tracer, bound) = bind(options)?;
    Ok((tracer, bound.start()?))
}

/// Prepares to trace: from now on events are recorded and clients can connect, but wait until [`Bound::start`]. Starts
/// no thread.
///
/// # Errors
/// The socket or the collector's descriptors cannot be made.
pub fn bind(options: Options) -> Result<(Tracer, Bound), StartError> {
    let socket = options.socket.as_deref().map(Socket::bind).transpose()?;
    let ring = options.ring.max(2).next_power_of_two();
    let shared = tracer::TraceShared::new(ring).map_err(StartError::Collector)?;
    let server = server::TraceServer::new(shared.clone(), socket, options.history, options.farewell)
        .map_err(StartError::Collector)?;
    Ok((Tracer::new(shared.clone()), Bound { shared, server }))
}

impl Bound {
    /// A client's end of a new connection to the trace, as if it had connected to the socket. It is served before all
    /// clients that wait at the socket.
    ///
    /// # Errors
    /// The connection cannot be made.
    pub fn connect(&mut self) -> std::io::Result<UnixStream> {
        let (client, server) = UnixStream::pair()?;
        self.server.add(server)?;
        Ok(client)
    }

    /// Sets the source of the live state: `make` makes a reader for each client that asks for it.
    pub fn set_state(&mut self, make: impl Fn() -> Box<dyn StateSource> + Send + 'static) {
        self.server.set_state(Box::new(make));
    }

    /// Starts the collector.
    ///
    /// # Errors
    /// The system has no thread to give.
    pub fn start(self) -> Result<TraceHandle, StartError> {
        let Bound { shared, server } = self;
        let collector = std::thread::Builder::new().name("trace".into()).spawn(move || server.run());
        Ok(TraceHandle { shared, thread: Some(collector.map_err(StartError::Collector)?) })
    }
}

impl TraceHandle {
    /// Turns the recording of events on or off. Events that are not recorded leave no gap in the sequence numbers. A
    /// thread that is just making one may still record it.
    pub fn record(&self, on: bool) {
        self.shared.record(on);
    }

    /// Collects the events that were emitted so far, gives the clients [`Options::farewell`] to take them, closes their
    /// connections and removes the socket. Events that are emitted later go nowhere. Returns the final statistics.
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

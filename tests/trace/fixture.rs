//! A trace with its socket, and clients of it.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tempfile::TempDir;
pub use viommu_testkit::PATIENCE;
use viommu_trace::event::LossPlace;
use viommu_trace::{self as trace, Event, Options, Reader, Subscription, TraceHandle, TraceStats, Tracer};
use viommu_trace::{Record, StateSource};

/// Runs one test at a time: some tests measure time, and the machine may have only two processors.
pub fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A trace that waits at its end for its readers, even on a slow machine. Not for tests with a client that does not
/// read.
pub fn patient() -> Options {
    Options { farewell: PATIENCE, ..Options::default() }
}

pub struct Fixture {
    pub tracer: Tracer,
    pub handle: TraceHandle,
    pub socket: PathBuf,
    _dir: TempDir,
    _alone: MutexGuard<'static, ()>,
}

impl Fixture {
    pub fn new() -> Self {
        Self::with(patient())
    }

    pub fn with(options: Options) -> Self {
        let alone = alone();
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("trace.sock");
        let (tracer, handle) = trace::start(Options { socket: Some(socket.clone()), ..options }).unwrap();
        Fixture { tracer, handle, socket, _dir: dir, _alone: alone }
    }

    /// A trace that can send what is live.
    pub fn with_state(make: impl Fn() -> Box<dyn StateSource> + Send + 'static) -> Self {
        let alone = alone();
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("trace.sock");
        let (tracer, mut bound) = trace::bind(Options { socket: Some(socket.clone()), ..patient() }).unwrap();
        bound.set_state(make);
        Fixture { tracer, handle: bound.start().unwrap(), socket, _dir: dir, _alone: alone }
    }

    /// A client that sends this. Its reads do not wait for ever.
    pub fn raw(&self, line: &[u8]) -> UnixStream {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(line).unwrap();
        stream
    }

    /// A JSON client that has read its hello.
    pub fn json(&self, line: &str) -> JsonClient {
        let mut client = JsonClient(BufReader::new(self.raw(line.as_bytes())));
        assert_eq!(client.next().unwrap()["kind"], "hello");
        client
    }

    /// A binary client that has read its header.
    pub fn binary(&self, subscription: &Subscription) -> Reader<UnixStream> {
        Reader::connect(&self.socket, subscription).unwrap()
    }

    pub fn interrupts(&self, endpoint: u32, vectors: std::ops::Range<u16>) {
        vectors.for_each(|vector| self.tracer.emit(Event::Interrupt { endpoint: Some(endpoint), vector }));
    }

    pub fn stop(self) -> TraceStats {
        self.handle.stop()
    }
}

pub struct JsonClient(pub BufReader<UnixStream>);

impl JsonClient {
    /// The next line; `None` at the end.
    pub fn next(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.0.read_line(&mut line) {
            Ok(0) => None,
            Ok(_) => Some(serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => None,
            Err(error) => panic!("{error}"),
        }
    }

    pub fn rest(mut self) -> Vec<Value> {
        std::iter::from_fn(|| self.next()).collect()
    }
}

pub fn rest(mut reader: Reader<UnixStream>) -> Vec<Record> {
    std::iter::from_fn(|| reader.next_record().unwrap()).collect()
}

/// Events received, lost in rings, lost by this client.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Sum {
    pub received: u64,
    pub ring: u64,
    pub client: u64,
}

/// Adds up a stream, whose numbers must ascend.
pub fn add_up<'a>(records: impl IntoIterator<Item = &'a Record>) -> Sum {
    let mut sum = Sum::default();
    let mut last = None;
    for record in records {
        assert!(last < Some(record.seq.get()), "{last:?} before {}", record.seq);
        last = Some(record.seq.get());
        match Event::decode(record).unwrap() {
            Event::Lost { place: LossPlace::Ring, count, .. } => sum.ring += count,
            Event::Lost { place: LossPlace::Client, count, .. } => sum.client += count,
            _ => sum.received += 1,
        }
    }
    sum
}

pub fn vectors(lines: &[Value]) -> Vec<u64> {
    lines.iter().map(|line| line["vector"].as_u64().unwrap()).collect()
}

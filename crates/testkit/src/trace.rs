//! A trace, recorded completely.

use std::thread::{self, JoinHandle};
use std::time::Duration;

use tempfile::TempDir;
use viommu_trace::Kind;
use viommu_trace::{self as trace, Event, Options, Reader, Subscription, TraceHandle, Tracer};

/// A client that reads a trace from beginning to end.
pub struct Recorder {
    handle: TraceHandle,
    client: JoinHandle<Vec<Event>>,
    _dir: TempDir,
}

impl Recorder {
    /// Begins to record events of these kinds, or of all if there are none.
    pub fn start(kinds: &[Kind]) -> (Recorder, Tracer) {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("trace.sock");
        // The client always reads, so the end may wait for it, even on the slowest machine.
        let options = Options { socket: Some(socket.clone()), farewell: Duration::from_secs(60), ..Options::default() };
        let (tracer, handle) = trace::start(options).unwrap();
        let subscription = Subscription { kinds: kinds.to_vec(), ..Subscription::default() };
        let mut reader = Reader::connect(&socket, &subscription).unwrap();
        let client = thread::spawn(move || {
            let records = std::iter::from_fn(|| reader.next_record().unwrap());
            records.map(|record| Event::decode(&record).unwrap()).collect()
        });
        (Recorder { handle, client, _dir: dir }, tracer)
    }

    /// Ends the trace and returns its events. None may be lost.
    pub fn end(self) -> Vec<Event> {
        assert_eq!(self.handle.stop().lost, 0);
        self.client.join().unwrap()
    }
}

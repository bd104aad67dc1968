//! All that is traced.

use std::thread::{self, JoinHandle};

use tempfile::TempDir;
use viommu::trace::{self, Choice, Event, Options, Reader, TraceHandle, Tracer};
use viommu::wire::trace::Kind;

/// A client of a trace from its begin to its end.
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
        let (tracer, handle) = trace::start(Options { socket: Some(socket.clone()), ..Options::default() }).unwrap();
        let choice = Choice { kinds: kinds.to_vec(), ..Choice::default() };
        let mut reader = Reader::connect(&socket, &choice).unwrap();
        let client = thread::spawn(move || {
            let records = std::iter::from_fn(|| reader.next_record().unwrap());
            records.map(|record| Event::decode(&record).unwrap()).collect()
        });
        (Recorder { handle, client, _dir: dir }, tracer)
    }

    /// Ends the trace, of which nothing may be lost: the events.
    pub fn end(self) -> Vec<Event> {
        assert_eq!(self.handle.stop().lost, 0);
        self.client.join().unwrap()
    }
}

//! Reads a trace wherever it is: at a socket, in a binary file, or in JSON lines, a guest's and merged ones included.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use crate::codec::CodecError;
use crate::event::{Event, Kind, key};
use crate::guest::{GUEST_VERSION, GuestEvent, guest_key};
use crate::line::{LineError, Stamped};
use crate::members::Members;
use crate::reader::{ReadError, Reader};
use crate::record::{Header, MAGIC, Record, VERSION};
use crate::subscription::{Filter, Subscription, hello};

/// The most bytes of a line. A line of the device has a few hundred.
const LINE_MAX: u64 = 1 << 20;

/// An entry of a trace.
#[derive(Debug)]
pub struct Entry {
    /// The offset of its first byte in the trace.
    pub at: u64,
    /// Its content.
    pub item: Item,
}

/// The content of an entry.
#[derive(Debug)]
pub enum Item {
    /// The beginning of a stream of the device's events.
    Hello,
    /// The beginning of a stream of the guest's events.
    GuestHello {
        /// The guest's time, ns.
        time_ns: u64,
    },
    /// An event of the device.
    Event(Stamped),
    /// An event of the guest.
    Guest(GuestEvent),
    /// The guest lost events of its own.
    GuestLost {
        /// The guest's time, ns.
        time_ns: u64,
    },
    /// A line of another kind that has a time.
    Other {
        /// Its time, ns.
        time_ns: u64,
        /// Why it is not an event.
        why: LineError,
    },
    /// An entry that cannot be read. Those behind it can.
    Unreadable(Unreadable),
}

/// Why an entry cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    /// A record of another version, or a damaged one.
    #[error(transparent)]
    Record(#[from] CodecError),
    /// A line of something else, or a damaged one.
    #[error("The line is not an event: {0}")]
    Line(#[from] LineError),
    /// A line that is longer than any event's.
    #[error("The line has more than {LINE_MAX} bytes")]
    TooLong,
    /// The trace ends within a record or a line.
    #[error("The trace is cut off: only {0} bytes of this entry are there")]
    Cut(usize),
}

/// How much of a trace was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Events, including the guest's.
    pub events: u64,
    /// Entries that could not be read.
    pub unreadable: u64,
    /// The offset of the first of these entries, and why it could not be read.
    pub first: Option<(u64, String)>,
}

/// A trace that is read from its beginning to its end.
pub struct TraceFile<R> {
    source: Source<R>,
    /// The events of a file that are wanted; `None` for a socket, whose server filters.
    filter: Option<Filter>,
    /// The offset of the next entry.
    at: u64,
    /// Whether the header was returned as an entry.
    begun: bool,
    tally: Tally,
}

enum Source<R> {
    /// With the last record that was read.
    Records(Reader<R>, Option<Record>),
    Lines(Lines<R>),
}

struct Lines<R> {
    input: BufReader<R>,
    /// The last line that was read.
    line: Vec<u8>,
    /// The version that the last hello of the device gave.
    version: u32,
}

impl TraceFile<Box<dyn Read + Send>> {
    /// Opens a trace socket or a file, with the events that `subscription` names. Of a file all of these come, whatever
    /// the backlog is. Entries that are not events of the device always come.
    ///
    /// # Errors
    /// The path cannot be opened, or there is something else than a trace.
    pub fn open(path: &Path, subscription: &Subscription) -> Result<Self, ReadError> {
        let is_file = fs::metadata(path).is_ok_and(|found| !found.file_type().is_socket());
        if is_file {
            let file: Box<dyn Read + Send> = Box::new(File::open(path)?);
            // A file has only kinds that somebody wanted, so all of them come if none is named.
            let mut filter = subscription.filter();
            if subscription.kinds.is_empty() {
                filter.kinds = u64::MAX;
            }
            return Ok(TraceFile { filter: Some(filter), ..TraceFile::new(file)? });
        }
        let (input, header) = Reader::connect(path, subscription)?.into_parts();
        let reader = Reader::from_parts(boxed(input), header);
        Ok(TraceFile::of(Source::Records(reader, None)))
    }
}

/// The same input as a trait object. Bytes that are already in the buffer are kept.
fn boxed<R: Read + Send + 'static>(input: BufReader<R>) -> BufReader<Box<dyn Read + Send>> {
    let ahead = io::Cursor::new(input.buffer().to_vec());
    BufReader::with_capacity(64 << 10, Box::new(ahead.chain(input.into_inner())))
}

impl<R: Read> TraceFile<R> {
    /// Reads the beginning of a trace.
    ///
    /// # Errors
    /// It is not a trace, or of a version that cannot be read.
    pub fn new(input: R) -> Result<Self, ReadError> {
        let mut input = BufReader::with_capacity(64 << 10, input);
        let begin = input.fill_buf()?;
        let source = match begin.first() {
            Some(first) if *first == MAGIC[0] => Source::Records(Reader::of_file(input)?, None),
            // Text that is not a trace shows later, line by line.
            Some(first) if !first.is_ascii() => {
                let mut found = [0; 8];
                let len = begin.len().min(8);
                found[..len].copy_from_slice(&begin[..len]);
                return Err(ReadError::NoTrace(found));
            }
            _ => Source::Lines(Lines { input, line: Vec::new(), version: VERSION }),
        };
        Ok(TraceFile::of(source))
    }

    fn of(source: Source<R>) -> Self {
        TraceFile { source, filter: None, at: 0, begun: false, tally: Tally::default() }
    }

    /// The next entry; `None` at the end. Waits until there is one.
    ///
    /// # Errors
    /// Reading fails, or a stream of a version that cannot be read begins here.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, ReadError> {
        loop {
            let entry = self.next_of_all()?;
            let Some(Entry { item: Item::Event(event), .. }) = &entry else { return Ok(entry) };
            if self.filter.as_ref().is_none_or(|filter| filter.passes(&event.encode())) {
                return Ok(entry);
            }
        }
    }

    fn next_of_all(&mut self) -> Result<Option<Entry>, ReadError> {
        let at = self.at;
        let item = match &mut self.source {
            Source::Records(reader, record) => {
                if !self.begun {
                    self.begun = true;
                    self.at = size_of::<Header>() as u64;
                    return Ok(Some(Entry { at, item: Item::Hello }));
                }
                match reader.next_or_cut()? {
                    Ok(Some(next)) => {
                        self.at += reader.record_size() as u64;
                        *record = Some(next);
                        Stamped::decode(&next).map_or_else(|error| Item::Unreadable(error.into()), Item::Event)
                    }
                    Ok(None) => return Ok(None),
                    Err(bytes) => {
                        self.at += bytes as u64;
                        *record = None;
                        Item::Unreadable(Unreadable::Cut(bytes))
                    }
                }
            }
            Source::Lines(lines) => {
                let Some(len) = lines.read()? else { return Ok(None) };
                self.at += len;
                lines.item(len)?
            }
        };
        match &item {
            Item::Event(_) | Item::Guest(_) => self.tally.events += 1,
            Item::Unreadable(why) => self.tally.note(at, why),
            Item::Other { why, .. } if !matches!(why, LineError::Kind(_)) => self.tally.note(at, why),
            _ => {}
        }
        Ok(Some(Entry { at, item }))
    }

    /// Appends `entry`, the last one that was read, as a line of JSON: a line unchanged, a record as this version
    /// writes it. Nothing is appended for an entry that cannot be read.
    pub fn append_json(&self, entry: &Entry, out: &mut Vec<u8>) {
        match (&self.source, &entry.item) {
            (_, Item::Unreadable(_)) => {}
            (Source::Lines(lines), _) => lines.append(out),
            (Source::Records(reader, _), Item::Hello) => out.extend_from_slice(hello(reader.header()).as_bytes()),
            (_, Item::Event(event)) => event.put_json(out),
            _ => {}
        }
    }

    /// Whether the next entry can be read without waiting.
    pub fn is_ready(&self) -> bool {
        match &self.source {
            Source::Records(reader, _) => !self.begun || reader.is_ready(),
            Source::Lines(lines) => lines.input.buffer().contains(&b'\n'),
        }
    }

    /// The numbers of entries so far.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// The header of a binary trace; `None` for lines.
    pub fn header(&self) -> Option<&Header> {
        if let Source::Records(reader, _) = &self.source { Some(reader.header()) } else { None }
    }

    /// The record of the last entry, as this version writes it; `None` for lines, and if it was cut off.
    pub fn record(&self) -> Option<&Record> {
        if let Source::Records(_, record) = &self.source { record.as_ref() } else { None }
    }

    /// The last line that was read, without its newline; empty for records.
    pub fn line(&self) -> &[u8] {
        if let Source::Lines(lines) = &self.source { without_end(&lines.line) } else { &[] }
    }
}

impl<R: Read + Seek> TraceFile<R> {
    /// Moves to the entry that begins at `at`.
    fn seek(&mut self, at: u64) -> io::Result<()> {
        let input = match &mut self.source {
            Source::Records(reader, _) => reader.input(),
            Source::Lines(lines) => &mut lines.input,
        };
        // Entries are nearly in the order of time, so most of them are in the buffer.
        match i64::try_from(i128::from(at) - i128::from(self.at)) {
            Ok(distance) => input.seek_relative(distance)?,
            Err(_) => drop(input.seek(SeekFrom::Start(at))?),
        }
        self.at = at;
        Ok(())
    }

    /// Appends the entry that begins at `at` as a line of JSON: a line unchanged, a record as this version writes it.
    ///
    /// # Errors
    /// Reading fails, or the trace has become shorter.
    pub fn append_line(&mut self, at: u64, out: &mut Vec<u8>) -> io::Result<()> {
        let shorter = || io::Error::new(io::ErrorKind::UnexpectedEof, "a trace became shorter while it was read");
        if at == 0
            && let Some(header) = self.header()
        {
            out.extend_from_slice(hello(header).as_bytes());
            return Ok(());
        }
        self.seek(at)?;
        match &mut self.source {
            Source::Records(reader, _) => {
                let record = reader.next_record().map_err(io::Error::other)?.ok_or_else(shorter)?;
                self.at += reader.record_size() as u64;
                Stamped::decode(&record).map_err(io::Error::other)?.put_json(out);
            }
            Source::Lines(lines) => {
                self.at += lines.read()?.ok_or_else(shorter)?;
                lines.append(out);
            }
        }
        Ok(())
    }
}

impl<R: Read> Lines<R> {
    /// Reads a line, and keeps at most [`LINE_MAX`] bytes of it. Returns its length in bytes; `None` at the end.
    fn read(&mut self) -> io::Result<Option<u64>> {
        self.line.clear();
        let mut len = (&mut self.input).take(LINE_MAX).read_until(b'\n', &mut self.line)? as u64;
        while len >= LINE_MAX && self.line.last() != Some(&b'\n') {
            let buffer = self.input.fill_buf()?;
            let end = buffer.iter().position(|byte| *byte == b'\n');
            let count = end.map_or(buffer.len(), |end| end + 1);
            self.input.consume(count);
            len += count as u64;
            if end.is_some() || count == 0 {
                break;
            }
        }
        Ok((len > 0).then_some(len))
    }

    /// Appends the line that was read, made UTF-8, which a guest's need not be.
    fn append(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(String::from_utf8_lossy(without_end(&self.line)).as_bytes());
        out.push(b'\n');
    }

    /// The content of the line that was read, which has `len` bytes.
    fn item(&mut self, len: u64) -> Result<Item, ReadError> {
        if len > self.line.len() as u64 {
            return Ok(Item::Unreadable(Unreadable::TooLong));
        }
        let text = String::from_utf8_lossy(without_end(&self.line));
        let mut members = match Members::parse(&text) {
            Ok(members) => members,
            Err(_) if self.line.last() != Some(&b'\n') => {
                return Ok(Item::Unreadable(Unreadable::Cut(self.line.len())));
            }
            Err(error) => return Ok(Item::Unreadable(LineError::from(error).into())),
        };
        match members.text(key::KIND) {
            Some(guest_key::HELLO) => {
                let found = members.number(guest_key::VERSION).unwrap_or(0);
                if members.text(guest_key::SOURCE) == Some(guest_key::GUEST) {
                    if found != u64::from(GUEST_VERSION) {
                        return Err(ReadError::GuestVersion(found));
                    }
                    return Ok(match members.number(key::TIME) {
                        Some(time_ns) => Item::GuestHello { time_ns },
                        None => Item::Unreadable(LineError::NoMember(key::TIME).into()),
                    });
                }
                match u32::try_from(found) {
                    Ok(version @ 1..=VERSION) => self.version = version,
                    _ => return Err(ReadError::LineVersion(found)),
                }
                return Ok(Item::Hello);
            }
            Some(kind) if kind == Kind::Lost.name() && members.text(guest_key::PLACE) == Some(guest_key::GUEST) => {
                if let Some(time_ns) = members.number(key::TIME) {
                    return Ok(Item::GuestLost { time_ns });
                }
            }
            Some(guest_key::GUEST) => {
                if let Some(event) = GuestEvent::read(&members) {
                    return Ok(Item::Guest(event));
                }
            }
            Some(kind) if self.version == 1 && kind == Kind::Command.name() => members.rename("cid", "id"),
            _ => {}
        }
        Ok(match Stamped::read(&members) {
            Ok(event) => Item::Event(event),
            Err(why) => match members.number(key::TIME).filter(|_| members.text(key::KIND).is_some()) {
                Some(time_ns) => Item::Other { time_ns, why },
                None => Item::Unreadable(why.into()),
            },
        })
    }
}

impl Tally {
    fn note(&mut self, at: u64, why: &dyn std::fmt::Display) {
        self.unreadable += 1;
        self.first.get_or_insert_with(|| (at, why.to_string()));
    }
}

impl Item {
    /// The number of events that this entry says are missing, since the client read too slowly.
    pub fn lost_on_the_way(&self) -> u64 {
        match self {
            Item::Event(Stamped {
                event: Event::Lost { place: crate::event::LossPlace::Client, count, .. }, ..
            }) => *count,
            _ => 0,
        }
    }
}

fn without_end(line: &[u8]) -> &[u8] {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    line.strip_suffix(b"\r").unwrap_or(line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::tests::any_event;
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    const RECORDS_1: &[u8] = include_bytes!("../tests/version1.bin");
    const LINES_1: &str = include_str!("../tests/version1.jsonl");

    fn header() -> Header {
        let Ok(header) = zerocopy::FromBytes::read_from_bytes(&RECORDS_1[..size_of::<Header>()]) else { panic!() };
        Header { version: VERSION.into(), record_size: (size_of::<Record>() as u32).into(), ..header }
    }

    fn items(bytes: &[u8]) -> (Vec<Item>, Tally) {
        let mut file = TraceFile::new(bytes).unwrap();
        let mut items = Vec::new();
        while let Some(entry) = file.next_entry().unwrap() {
            items.push(entry.item);
        }
        (items, file.tally().clone())
    }

    fn events(bytes: &[u8]) -> Vec<Stamped> {
        let (items, tally) = items(bytes);
        assert_eq!(tally.unreadable, 0, "{tally:?}");
        let events =
            items.into_iter().filter_map(|item| if let Item::Event(event) = item { Some(event) } else { None });
        events.collect()
    }

    /// The same events as records and as lines.
    fn both(events: &[Event]) -> [Vec<u8>; 2] {
        let (mut records, mut lines) = (header().as_bytes().to_vec(), hello(&header()).into_bytes());
        for (n, event) in (0..).zip(events) {
            records.extend(event.encode(n * 10, n).as_bytes());
            Stamped { time_ns: n * 10, seq: n, event: *event }.put_json(&mut lines);
        }
        [records, lines]
    }

    #[test]
    fn version_1_is_read_from_records_and_from_lines() {
        let (of_records, of_lines) = (events(RECORDS_1), events(LINES_1.as_bytes()));
        assert_eq!(of_records.len(), 182);
        // Compared as lines, since lines leave out fields that mean nothing in their event.
        let shown = |events: &[Stamped]| {
            let mut lines = Vec::new();
            events.iter().for_each(|event| event.put_json(&mut lines));
            String::from_utf8(lines).unwrap()
        };
        assert_eq!(shown(&of_records), shown(&of_lines));
    }

    #[test]
    fn another_version_and_something_else_are_refused() {
        let error = |bytes: &[u8]| match TraceFile::new(bytes) {
            Err(error) => error.to_string(),
            Ok(mut file) => file.next_entry().unwrap_err().to_string(),
        };
        let version_3 = Header { version: 3.into(), ..header() };
        for (bytes, expected) in [
            (version_3.as_bytes(), "format version 3 with records of 72 bytes; this viommu reads versions 1 and 2"),
            (b"{\"kind\":\"hello\",\"version\":3}\n", "format version 3; this viommu reads versions 1 and 2"),
            (
                b"{\"t\":1,\"kind\":\"hello\",\"source\":\"guest\",\"version\":2}\n",
                "guest's trace has format version 2",
            ),
            (&header().as_bytes()[..40], "cut off in its header: it has 40 of 64 bytes"),
            (b"VIOMMUTX and more than that, as much as a header has, which is sixty-four", "starts with [56"),
            (b"\xff\xfe", "starts with [ff"),
        ] {
            let found = error(bytes);
            assert!(found.contains(expected), "{found}");
        }
    }

    #[test]
    fn the_guest_s_lines_and_merged_ones_are_read() {
        let text = concat!(
            "{\"t\":5,\"kind\":\"hello\",\"source\":\"guest\",\"version\":1}\n",
            "{\"t\":6,\"kind\":\"guest\",\"event\":\"dma_iova:dma_iova_link\",\"endpoint\":32,\"cpu\":1,\"tag\":\"0x7\",\"size\":4096,\"ret\":-5}\n",
            "{\"t\":7,\"kind\":\"lost\",\"place\":\"guest\",\"cpu\":0,\"count\":3,\"since\":5}\n",
            "{\"t\":8,\"kind\":\"news\"}\nnoise\n{\"t\":9}\n{\"t\":10,\"kin",
        );
        let (items, tally) = items(text.as_bytes());
        let [Item::GuestHello { time_ns: 5 }, Item::Guest(event), rest @ ..] = &items[..] else { panic!("{items:?}") };
        let fields = event.fields;
        assert_eq!((event.time_ns, event.cpu, event.endpoint), (6, Some(1), Some(32)));
        assert_eq!(
            (event.name.as_str(), fields.tag, fields.size, fields.ret),
            ("dma_iova:dma_iova_link", Some(7), Some(4096), Some(-5))
        );
        assert!(
            matches!(
                rest,
                [
                    Item::GuestLost { time_ns: 7 },
                    Item::Other { time_ns: 8, why: LineError::Kind(_) },
                    Item::Unreadable(Unreadable::Line(LineError::Json(_))),
                    Item::Unreadable(Unreadable::Line(LineError::NoMember(key::KIND))),
                    Item::Unreadable(Unreadable::Cut(12)),
                ]
            ),
            "{rest:?}"
        );
        assert_eq!(tally.events, 1);
    }

    #[test]
    fn a_line_without_end_takes_no_memory() {
        let mut text = vec![b'x'; 3 << 20];
        text.extend(b"\n{\"t\":1,\"seq\":2,\"kind\":\"bypass\",\"value\":0}\n");
        let (items, tally) = items(&text);
        assert!(matches!(items[..], [Item::Unreadable(Unreadable::TooLong), Item::Event(_)]));
        assert_eq!((tally.events, tally.unreadable, tally.first.unwrap().0), (1, 1, 0));
    }

    proptest! {
        #[test]
        fn records_and_lines_say_the_same(some in prop::collection::vec(any_event(), 0..20)) {
            for bytes in both(&some) {
                let found: Vec<_> = events(&bytes).into_iter().map(|stamped| stamped.event).collect();
                prop_assert_eq!(&found, &some);
            }
        }

        /// Whole entries are read, and one that is cut off is reported.
        #[test]
        fn a_trace_that_is_cut_is_read_up_to_there(some in prop::collection::vec(any_event(), 1..10), at: usize) {
            for bytes in both(&some) {
                let begin = if bytes[0] == MAGIC[0] { size_of::<Header>() } else { 0 };
                let at = begin + at % (bytes.len() - begin);
                let (found, tally) = items(&bytes[..at]);
                let whole = found.iter().filter(|item| !matches!(item, Item::Unreadable(_))).count();
                let cut = found.len() - whole;
                prop_assert!(cut <= 1 && tally.unreadable == cut as u64);
                prop_assert!(tally.events <= some.len() as u64);
                if let Some((first, why)) = tally.first {
                    prop_assert!(first < at as u64 && why.contains("cut off"), "{}", why);
                }
            }
        }

        /// A trace with wrong bytes is read or refused, and its entries stay in order.
        #[test]
        fn a_trace_with_wrong_bytes_does_no_harm(
            some in prop::collection::vec(any_event(), 1..10),
            wrong in prop::collection::vec((any::<usize>(), any::<u8>()), 1..6),
        ) {
            for mut bytes in both(&some) {
                for (at, byte) in &wrong {
                    let at = at % bytes.len();
                    bytes[at] ^= byte;
                }
                let Ok(mut file) = TraceFile::new(&bytes[..]) else { continue };
                let mut last = None;
                while let Ok(Some(entry)) = file.next_entry() {
                    prop_assert!(last < Some(entry.at) || last.is_none());
                    last = Some(entry.at);
                }
            }
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
            if let Ok(mut file) = TraceFile::new(&bytes[..]) {
                while let Ok(Some(_)) = file.next_entry() {}
            }
        }

        /// Entries can be read again as lines, in any order.
        #[test]
        fn entries_come_again_in_any_order(some in prop::collection::vec(any_event(), 1..30), step in 1usize..100) {
            let [_, lines] = both(&some);
            let lines: Vec<_> = lines.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
            for bytes in both(&some) {
                let mut file = TraceFile::new(io::Cursor::new(bytes)).unwrap();
                let mut found = Vec::new();
                while let Some(entry) = file.next_entry().unwrap() {
                    found.push(entry.at);
                }
                prop_assert_eq!(found.len(), some.len() + 1);
                for n in 0..found.len() {
                    let n = n * step % found.len();
                    let mut out = Vec::new();
                    file.append_line(found[n], &mut out).unwrap();
                    prop_assert_eq!(&out, &lines[n]);
                }
            }
        }
    }
}

//! Errors of reading records and lines, and the tests that records, lines and text agree.

/// A record that this version cannot read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The number of the kind is unknown.
    #[error("Event kind {0} is unknown: it was written by another version")]
    Kind(u16),
    /// A field has an unknown value.
    #[error("An event of kind {kind} has the unknown value {value} in a field: it was written by another version")]
    Value {
        /// The event's kind.
        kind: &'static str,
        /// The value.
        value: u64,
    },
}

/// A line of JSON that is not an event of this version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemberError {
    /// A member is missing.
    #[error("An event of kind {kind} has no member {key:?}")]
    Missing {
        /// The event's kind.
        kind: &'static str,
        /// The member's name.
        key: &'static str,
    },
    /// A member has an unknown value.
    #[error("The member {key:?} of an event of kind {kind} has an unknown value: it was written by another version")]
    Nonsense {
        /// The event's kind.
        kind: &'static str,
        /// The member's name.
        key: &'static str,
    },
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::event::{Event, Kind};
    use crate::line::Stamped;
    use crate::members::Members;
    use crate::record::{Header, Record, Record1};
    use proptest::prelude::*;
    use serde_json::Value;
    use zerocopy::FromBytes;

    /// Any event that the code can make.
    pub fn any_event() -> impl Strategy<Value = Event> {
        (0..Event::VARIANTS, any::<[u64; 10]>()).prop_map(|(variant, numbers)| {
            let mut numbers = numbers.into_iter();
            Event::draw(variant, &mut || numbers.next().unwrap_or(0))
        })
    }

    fn json_of(event: &Event) -> String {
        let mut line = Vec::new();
        Stamped { time_ns: 5, seq: 7, event: *event }.put_json(&mut line);
        assert_eq!(line.pop(), Some(b'\n'));
        String::from_utf8(line).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(10_000))]

        #[test]
        fn an_event_survives_its_record(event in any_event(), time: u64, seq: u64) {
            let record = event.encode(time, seq);
            prop_assert_eq!((record.time_ns.get(), record.seq.get()), (time, seq));
            prop_assert_eq!(Event::decode(&record), Ok(event));
        }

        #[test]
        fn an_event_survives_its_line(event in any_event()) {
            let line = json_of(&event);
            let value: Value = serde_json::from_str(&line).unwrap();
            prop_assert_eq!(&value["t"], 5);
            prop_assert_eq!(&value["seq"], 7);
            prop_assert_eq!(&value["kind"], event.kind().name());
            let read = Stamped::read(&Members::parse(&line).unwrap());
            prop_assert_eq!(read.unwrap(), Stamped { time_ns: 5, seq: 7, event }, "{}", line);
        }

        #[test]
        fn an_event_is_one_line_of_text(event in any_event()) {
            let mut line = Vec::new();
            Stamped { time_ns: 5, seq: 7, event }.put_text(&mut line);
            let line = String::from_utf8(line).unwrap();
            prop_assert_eq!(line.lines().count(), 1);
            prop_assert!(line.ends_with('\n'));
        }

        #[test]
        fn any_bytes_decode_or_are_refused(bytes: [u8; 32], more: [u8; 40], kind in 0u16..24) {
            let mut record: Record = zerocopy::transmute!([&bytes[..], &more].concat().try_into().unwrap_or([0u8; 72]));
            record.kind = kind.into();
            if let Ok(event) = Event::decode(&record) {
                prop_assert_eq!(event.kind() as u16, kind);
            }
        }

        /// A line with a wrong byte is some event or refused, without a panic.
        #[test]
        fn a_line_with_a_wrong_byte_is_read_or_refused(event in any_event(), at: usize, byte in 0x20u8..0x7f) {
            let mut line = json_of(&event).into_bytes();
            let at = at % line.len();
            line[at] = byte;
            if let Ok(members) = Members::parse(std::str::from_utf8(&line).unwrap()) {
                let _ = Stamped::read(&members);
            }
        }
    }

    #[test]
    fn a_count_and_a_duration_that_do_not_fit_are_cut() {
        let event = Event::Split {
            request: 0x83,
            status: 0,
            domain: 1,
            flags: 0,
            virt_start: 0,
            virt_end: 0,
            tag: 0,
            count: u32::MAX,
            duration: u64::MAX,
        };
        let Ok(Event::Split { count, duration, .. }) = Event::decode(&event.encode(0, 0)) else { panic!("{event:?}") };
        assert_eq!((count, duration), ((1 << 24) - 1, (1 << 40) - 1));
    }

    #[test]
    fn the_strategy_makes_every_kind() {
        use proptest::strategy::ValueTree;
        use proptest::test_runner::TestRunner;
        let mut runner = TestRunner::deterministic();
        let mut seen = std::collections::HashSet::new();
        for _ in 0..2_000 {
            seen.insert(any_event().new_tree(&mut runner).unwrap().current().kind());
        }
        assert_eq!(seen.len(), Kind::ALL.len());
    }

    #[test]
    fn kinds_have_distinct_names_and_numbers() {
        for kind in Kind::ALL {
            assert_eq!(Kind::from_number(kind as u16), Some(kind));
            assert_eq!(Kind::from_name(kind.name()), Some(kind));
            assert_eq!(Kind::ALL[kind as usize - 1], kind);
        }
        // A set of kinds has 64 bits.
        assert!(Kind::ALL.len() < 64);
    }

    /// No two fields of a layout share bits.
    #[test]
    fn fields_do_not_overlap() {
        let number = |value: &Value| value.as_u64().unwrap();
        for kind in crate::event::kinds() {
            for layout in kind["layouts"].as_array().unwrap() {
                let mut taken = [false; size_of::<Record>() * 8];
                // Time, sequence number, kind and endpoint.
                taken[..144].fill(true);
                taken[160..192].fill(true);
                for field in layout["fields"].as_array().unwrap() {
                    let place = &field["place"];
                    let first = (number(&place["offset"]) * 8 + number(&place["bit"])) as usize;
                    let bits = &mut taken[first..first + number(&place["bits"]) as usize];
                    assert!(bits.iter().all(|taken| !taken), "{}: {field}", kind["name"]);
                    bits.fill(true);
                }
            }
        }
    }

    #[test]
    fn endpoints_that_are_no_pci_function_have_no_bdf() {
        let bdf = |endpoint| {
            let line = json_of(&Event::Panic { endpoint });
            serde_json::from_str::<Value>(&line).unwrap()["bdf"].clone()
        };
        assert_eq!(bdf(0x20), "00:04.0");
        assert_eq!(bdf(0x01ff), "01:1f.7");
        assert_eq!(bdf(0x1_0000), Value::Null);
    }

    #[test]
    fn a_record_of_another_version_is_refused() {
        let mut record = Event::Panic { endpoint: 1 }.encode(0, 0);
        record.kind = 999.into();
        let mut out = Vec::new();
        assert_eq!(crate::json(&record, &mut out), Err(CodecError::Kind(999)));
        assert_eq!(crate::text(&record, &mut out), Err(CodecError::Kind(999)));
        record.kind = (Kind::Session as u16).into();
        record.small = [9, 0];
        assert_eq!(crate::json(&record, &mut out), Err(CodecError::Value { kind: "session", value: 9 }));
        assert!(out.is_empty());
    }

    #[test]
    fn a_line_that_is_no_event_says_why() {
        for (line, expected) in [
            ("{\"seq\":1,\"kind\":\"panic\",\"endpoint\":1}", "no member \"t\""),
            ("{\"t\":1,\"kind\":\"panic\",\"endpoint\":1}", "no member \"seq\""),
            ("{\"t\":1,\"seq\":1,\"kind\":\"panik\",\"endpoint\":1}", "\"panik\" is unknown"),
            ("{\"t\":1,\"seq\":1,\"kind\":\"panic\"}", "no member \"endpoint\""),
            ("{\"t\":1,\"seq\":1,\"kind\":\"bypass\"}", "no member \"value\""),
            (
                "{\"t\":1,\"seq\":1,\"kind\":\"bypass\",\"value\":256}",
                "\"value\" of an event of kind bypass has an unknown value",
            ),
            ("{\"t\":1,\"seq\":1,\"kind\":\"reset\",\"reset\":\"all\"}", "\"reset\" of an event of kind reset"),
        ] {
            let error = Stamped::read(&Members::parse(line).unwrap()).unwrap_err().to_string();
            assert!(error.contains(expected), "{line}: {error}");
        }
    }

    /// A trace that version 1 wrote, as records, JSON and text, with events of each kind.
    const RECORDS: &[u8] = include_bytes!("../tests/version1.bin");
    const LINES: &str = include_str!("../tests/version1.jsonl");
    const TEXT: &str = include_str!("../tests/version1.txt");

    /// Events of version 1 are written as then, except for commands, whose members all models now share.
    #[test]
    fn events_of_version_1_are_written_as_they_were() {
        let (_, records) = Header::read_from_prefix(RECORDS).unwrap();
        let (lines, text): (Vec<_>, Vec<_>) = (LINES.lines().skip(1).collect(), TEXT.lines().collect());
        assert_eq!((records.len() / 64, lines.len(), text.len()), (182, 182, 182));
        for (n, record) in records.chunks_exact(64).enumerate() {
            let record = Record1::read_from_bytes(record).unwrap().upgrade();
            let stamped = Stamped::decode(&record).unwrap();
            let (mut line, mut said) = (Vec::new(), Vec::new());
            stamped.put_json(&mut line);
            stamped.put_text(&mut said);
            let (line, said) = (String::from_utf8(line).unwrap(), String::from_utf8(said).unwrap());
            if stamped.event.kind() == Kind::Command {
                assert_same_command(&line, lines[n]);
            } else {
                assert_eq!((line.trim_end(), said.trim_end_matches('\n')), (lines[n], text[n]));
            }
        }
    }

    /// The members are the same, except that `cid` is now `id`.
    fn assert_same_command(line: &str, of_version_1: &str) {
        let object = |line| match serde_json::from_str(line).unwrap() {
            Value::Object(members) => members,
            other => panic!("{other}"),
        };
        let (now, mut then) = (object(line), object(of_version_1));
        if let Some(id) = then.remove("cid") {
            then.insert("id".into(), id);
        }
        assert_eq!(now, then);
    }
}

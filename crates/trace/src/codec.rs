//! Events to records and back. `docs/trace.md` describes the same layout for readers.

use crate::event::{Access, Answer, Channel, DataPointer, Event, LossPlace, Model, ResetKind, Route};
use viommu_wire::request::RequestType;
use viommu_wire::trace::{Kind, NO_ENDPOINT, Record};
use viommu_wire::virtio_iommu::request_type;

/// In [`Record::small`] beside another value: see the kinds that use it.
const FLAG_FAILED: u8 = 1 << 7;
const FLAG_DOMAIN: u8 = 1 << 7;
const FLAG_WRITABLE: u8 = 1 << 7;

/// In the split protocol's requests a duration and a count share a word: 40 and 24 bits. Larger ones are cut to the
/// largest.
const SPLIT_DURATION_BITS: u32 = 40;
const SPLIT_DURATION_MAX: u64 = (1 << SPLIT_DURATION_BITS) - 1;
const SPLIT_COUNT_MAX: u32 = (1 << (64 - SPLIT_DURATION_BITS)) - 1;

/// A record that this version cannot read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The kind's number is not known.
    #[error("Event kind {0} is unknown: it was written by another version")]
    Kind(u16),
    /// A field of the kind has a value that is not known.
    #[error("An event of kind {kind} has the unknown value {value} in a field: it was written by another version")]
    Value {
        /// The event's kind.
        kind: &'static str,
        /// The value.
        value: u8,
    },
}

const fn pair(low: u32, high: u32) -> u64 {
    low as u64 | (high as u64) << 32
}

const fn low(word: u64) -> u32 {
    word as u32
}

const fn high(word: u64) -> u32 {
    (word >> 32) as u32
}

impl Event {
    /// The event's kind.
    pub const fn kind(&self) -> Kind {
        match self {
            Event::Session { .. } => Kind::Session,
            Event::Features { .. } => Kind::Features,
            Event::Memory { .. } => Kind::Memory,
            Event::Queue { .. } => Kind::Queue,
            Event::Kick { .. } => Kind::Kick,
            Event::Request { .. } | Event::Split { .. } => Kind::Request,
            Event::Reset { .. } => Kind::Reset,
            Event::Fault { .. } => Kind::Fault,
            Event::Dma { .. } => Kind::Dma,
            Event::Interrupt { .. } => Kind::Interrupt,
            Event::Command { .. } => Kind::Command,
            Event::Bypass { .. } => Kind::Bypass,
            Event::Malformed { .. } => Kind::Malformed,
            Event::Device { .. } => Kind::Device,
            Event::Lost { .. } => Kind::Lost,
            Event::Panic { .. } => Kind::Panic,
            Event::Injected { .. } => Kind::Injected,
            Event::Undelivered { .. } => Kind::Undelivered,
        }
    }

    /// The record of the event.
    #[inline]
    pub fn encode(&self, time_ns: u64, seq: u64) -> Record {
        let mut small = [0; 2];
        let mut endpoint = None;
        let mut args = [0; 5];
        match *self {
            Event::Session { channel, endpoint: id, connected } => {
                small = [channel as u8, u8::from(connected)];
                endpoint = id;
            }
            Event::Features { offered, accepted } => args = [offered, accepted, 0, 0, 0],
            Event::Memory { channel, endpoint: id, added, gpa, len, writable } => {
                small = [channel as u8, u8::from(added) | if writable { FLAG_WRITABLE } else { 0 }];
                endpoint = id;
                args = [gpa, len, 0, 0, 0];
            }
            Event::Queue { queue, started, index, size } => {
                small = [queue, u8::from(started)];
                args = [index.into(), size.into(), 0, 0, 0];
            }
            Event::Kick { queue, requests } => {
                small = [queue, 0];
                args = [requests.into(), 0, 0, 0, 0];
            }
            Event::Request {
                request,
                status,
                endpoint: id,
                domain,
                flags,
                virt_start,
                virt_end,
                phys_start,
                duration,
            } => {
                small = [request, status];
                endpoint = id;
                args = [virt_start, virt_end, phys_start, pair(domain, flags), duration];
            }
            Event::Split { request, status, domain, flags, virt_start, virt_end, tag, count, duration } => {
                small = [request, status];
                let count = u64::from(count.min(SPLIT_COUNT_MAX)) << SPLIT_DURATION_BITS;
                args = [virt_start, virt_end, tag, pair(domain, flags), duration.min(SPLIT_DURATION_MAX) | count];
            }
            Event::Reset { reset, endpoint: id } => {
                small = [reset as u8, 0];
                endpoint = id;
            }
            Event::Fault { endpoint: id, reason, access, address, domain, dropped } => {
                small = [reason, access as u8 | if domain.is_some() { FLAG_DOMAIN } else { 0 }];
                endpoint = Some(id);
                args = [address, domain.unwrap_or(0).into(), dropped.into(), 0, 0];
            }
            Event::Dma { endpoint: id, access, route, failed, iova, gpa, len, domain, tag } => {
                small = [access as u8, route as u8 | if failed { FLAG_FAILED } else { 0 }];
                endpoint = Some(id);
                args = [iova, gpa, pair(len, domain), tag, 0];
            }
            Event::Interrupt { endpoint: id, vector } => {
                endpoint = id;
                args = [vector.into(), 0, 0, 0, 0];
            }
            Event::Command {
                endpoint: id,
                model,
                opcode,
                queue,
                id: command,
                status,
                pointer,
                address,
                data,
                len,
                duration,
            } => {
                small = [model as u8, opcode];
                endpoint = Some(id);
                let numbers =
                    u64::from(queue) | u64::from(command) << 16 | u64::from(status) << 32 | (pointer as u64) << 48;
                args = [numbers, address, data, len.into(), duration];
            }
            Event::Bypass { value } => small = [value, 0],
            Event::Malformed { queue, head, readable, writable, used } => {
                small = [queue, 0];
                args = [head.into(), pair(readable, writable), used.into(), 0, 0];
            }
            Event::Device { endpoint: id, model, state } => {
                small = [model as u8, 0];
                endpoint = Some(id);
                args = [state, 0, 0, 0, 0];
            }
            Event::Lost { place, count, since } => {
                small = [place as u8, 0];
                args = [count, since, 0, 0, 0];
            }
            Event::Panic { endpoint: id } => endpoint = Some(id),
            Event::Injected { request, answer, number } => {
                small = [request, answer as u8];
                args = [number, 0, 0, 0, 0];
            }
            Event::Undelivered { count } => args = [count, 0, 0, 0, 0],
        }
        Record {
            time_ns: time_ns.into(),
            seq: seq.into(),
            kind: (self.kind() as u16).into(),
            small,
            endpoint: endpoint.unwrap_or(NO_ENDPOINT).into(),
            args: args.map(Into::into),
        }
    }

    /// The event of a record.
    pub fn decode(record: &Record) -> Result<Event, CodecError> {
        let kind = Kind::from_number(record.kind.get()).ok_or(CodecError::Kind(record.kind.get()))?;
        let [first, second] = record.small;
        let bad = |value| CodecError::Value { kind: kind.name(), value };
        let id = record.endpoint.get();
        let endpoint = (id != NO_ENDPOINT).then_some(id);
        let args = record.args.map(zerocopy::U64::get);
        let channel = || Channel::from_number(first).ok_or(bad(first));
        let model = || Model::from_number(first).ok_or(bad(first));
        let access = |number| Access::from_number(number).ok_or(bad(number));
        Ok(match kind {
            Kind::Session => Event::Session { channel: channel()?, endpoint, connected: second != 0 },
            Kind::Features => Event::Features { offered: args[0], accepted: args[1] },
            Kind::Memory => Event::Memory {
                channel: channel()?,
                endpoint,
                added: second & !FLAG_WRITABLE != 0,
                gpa: args[0],
                len: args[1],
                writable: second & FLAG_WRITABLE != 0,
            },
            Kind::Queue => {
                Event::Queue { queue: first, started: second != 0, index: args[0] as u16, size: args[1] as u16 }
            }
            Kind::Kick => Event::Kick { queue: first, requests: low(args[0]) },
            Kind::Request if is_split(first) => Event::Split {
                request: first,
                status: second,
                domain: low(args[3]),
                flags: high(args[3]),
                virt_start: args[0],
                virt_end: args[1],
                tag: args[2],
                count: (args[4] >> SPLIT_DURATION_BITS) as u32,
                duration: args[4] & SPLIT_DURATION_MAX,
            },
            Kind::Request => Event::Request {
                request: first,
                status: second,
                endpoint: requested_endpoint(first, id),
                domain: low(args[3]),
                flags: high(args[3]),
                virt_start: args[0],
                virt_end: args[1],
                phys_start: args[2],
                duration: args[4],
            },
            Kind::Reset => Event::Reset { reset: ResetKind::from_number(first).ok_or(bad(first))?, endpoint },
            Kind::Fault => Event::Fault {
                endpoint: id,
                reason: first,
                access: access(second & !FLAG_DOMAIN)?,
                address: args[0],
                domain: (second & FLAG_DOMAIN != 0).then_some(low(args[1])),
                dropped: args[2] & 1 != 0,
            },
            Kind::Dma => Event::Dma {
                endpoint: id,
                access: access(first)?,
                route: Route::from_number(second & !FLAG_FAILED).ok_or(bad(second))?,
                failed: second & FLAG_FAILED != 0,
                iova: args[0],
                gpa: args[1],
                len: low(args[2]),
                domain: high(args[2]),
                tag: args[3],
            },
            Kind::Interrupt => Event::Interrupt { endpoint, vector: args[0] as u16 },
            Kind::Command => {
                let pointer = (args[0] >> 48) as u8;
                Event::Command {
                    endpoint: id,
                    model: model()?,
                    opcode: second,
                    queue: args[0] as u16,
                    id: (args[0] >> 16) as u16,
                    status: (args[0] >> 32) as u16,
                    pointer: DataPointer::from_number(pointer).ok_or(bad(pointer))?,
                    address: args[1],
                    data: args[2],
                    len: low(args[3]),
                    duration: args[4],
                }
            }
            Kind::Bypass => Event::Bypass { value: first },
            Kind::Malformed => Event::Malformed {
                queue: first,
                head: args[0] as u16,
                readable: low(args[1]),
                writable: high(args[1]),
                used: low(args[2]),
            },
            Kind::Device => Event::Device { endpoint: id, model: model()?, state: args[0] },
            Kind::Lost => {
                Event::Lost { place: LossPlace::from_number(first).ok_or(bad(first))?, count: args[0], since: args[1] }
            }
            Kind::Panic => Event::Panic { endpoint: id },
            Kind::Injected => Event::Injected {
                request: first,
                answer: Answer::from_number(second).ok_or(bad(second))?,
                number: args[0],
            },
            Kind::Undelivered => Event::Undelivered { count: args[0] },
        })
    }
}

/// A guest may name any endpoint in a request, [`NO_ENDPOINT`]'s number too: the type says whether there is one.
fn requested_endpoint(request: u8, id: u32) -> Option<u32> {
    let has_endpoint = matches!(request, request_type::ATTACH | request_type::DETACH | request_type::PROBE);
    (has_endpoint || id != NO_ENDPOINT).then_some(id)
}

/// Whether a request's number is one of the split protocol.
fn is_split(request: u8) -> bool {
    RequestType::from_number(request).is_some_and(RequestType::is_split)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::sample::select;

    /// Every event that the code can make: an absent endpoint where the kind allows it, [`NO_ENDPOINT`] only in requests.
    pub fn any_event() -> impl Strategy<Value = Event> {
        let id = 0..NO_ENDPOINT;
        let maybe = proptest::option::of(0..NO_ENDPOINT);
        let channel = || select(Channel::ALL);
        let access = || select(Access::ALL);
        let model = || select(Model::ALL);
        let words = || any::<[u64; 5]>();
        prop_oneof![
            (channel(), maybe.clone(), any::<bool>()).prop_map(|(channel, endpoint, connected)| Event::Session {
                channel,
                endpoint,
                connected
            }),
            any::<[u64; 2]>().prop_map(|[offered, accepted]| Event::Features { offered, accepted }),
            (channel(), maybe.clone(), any::<[bool; 2]>(), any::<[u64; 2]>()).prop_map(
                |(channel, endpoint, [added, writable], [gpa, len])| {
                    Event::Memory { channel, endpoint, added, gpa, len, writable }
                }
            ),
            (any::<u8>(), any::<bool>(), any::<[u16; 2]>()).prop_map(|(queue, started, [index, size])| Event::Queue {
                queue,
                started,
                index,
                size
            }),
            (any::<u8>(), any::<u32>()).prop_map(|(queue, requests)| Event::Kick { queue, requests }),
            any_request(),
            (select(ResetKind::ALL), maybe.clone()).prop_map(|(reset, endpoint)| Event::Reset { reset, endpoint }),
            (id.clone(), any::<u8>(), access(), any::<u64>(), any::<Option<u32>>(), any::<bool>()).prop_map(
                |(endpoint, reason, access, address, domain, dropped)| Event::Fault {
                    endpoint,
                    reason,
                    access,
                    address,
                    domain,
                    dropped
                }
            ),
            ((id.clone(), access(), select(Route::ALL), any::<bool>()), words()).prop_map(
                |((endpoint, access, route, failed), [iova, gpa, len, domain, tag])| Event::Dma {
                    endpoint,
                    access,
                    route,
                    failed,
                    iova,
                    gpa,
                    len: len as u32,
                    domain: domain as u32,
                    tag,
                }
            ),
            (maybe, any::<u16>()).prop_map(|(endpoint, vector)| Event::Interrupt { endpoint, vector }),
            ((id.clone(), model(), any::<u8>(), any::<[u16; 3]>(), select(DataPointer::ALL)), words()).prop_map(
                |((endpoint, model, opcode, [queue, id, status], pointer), [address, data, len, duration, _])| {
                    Event::Command {
                        endpoint,
                        model,
                        opcode,
                        queue,
                        id,
                        status,
                        pointer,
                        address,
                        data,
                        len: len as u32,
                        duration,
                    }
                }
            ),
            any::<u8>().prop_map(|value| Event::Bypass { value }),
            (any::<u8>(), any::<u16>(), any::<[u32; 3]>()).prop_map(|(queue, head, [readable, writable, used])| {
                Event::Malformed { queue, head, readable, writable, used }
            }),
            (id.clone(), model(), any::<u64>()).prop_map(|(endpoint, model, state)| Event::Device {
                endpoint,
                model,
                state
            }),
            (select(LossPlace::ALL), any::<[u64; 2]>()).prop_map(|(place, [count, since])| Event::Lost {
                place,
                count,
                since
            }),
            id.prop_map(|endpoint| Event::Panic { endpoint }),
            (any::<u8>(), select(Answer::ALL), any::<u64>()).prop_map(|(request, answer, number)| Event::Injected {
                request,
                answer,
                number
            }),
            any::<u64>().prop_map(|count| Event::Undelivered { count }),
        ]
    }

    fn any_request() -> impl Strategy<Value = Event> {
        prop_oneof![any_base_request(), any_split_request()]
    }

    fn any_split_request() -> impl Strategy<Value = Event> {
        let numbers = (0..=SPLIT_COUNT_MAX, 0..=SPLIT_DURATION_MAX);
        ((0x80u8..0x84, any::<u8>()), any::<[u32; 2]>(), any::<[u64; 3]>(), numbers).prop_map(
            |((request, status), [domain, flags], [virt_start, virt_end, tag], (count, duration))| Event::Split {
                request,
                status,
                domain,
                flags,
                virt_start,
                virt_end,
                tag,
                count,
                duration,
            },
        )
    }

    fn any_base_request() -> impl Strategy<Value = Event> {
        let words = (any::<[u8; 2]>(), any::<[u32; 3]>(), any::<[u64; 4]>());
        words.prop_filter("a type of the split protocol", |words| !is_split(words.0[0])).prop_map(
            |([request, status], [id, domain, flags], [virt_start, virt_end, phys_start, duration])| Event::Request {
                request,
                status,
                endpoint: requested_endpoint(request, if id % 4 == 0 { NO_ENDPOINT } else { id }),
                domain,
                flags,
                virt_start,
                virt_end,
                phys_start,
                duration,
            },
        )
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
        fn any_bytes_decode_or_are_refused(bytes: [u8; 32], more: [u8; 32], kind in 0u16..20) {
            let mut record: Record = zerocopy::transmute!([bytes, more]);
            record.kind = kind.into();
            if let Ok(event) = Event::decode(&record) {
                prop_assert_eq!(event.kind() as u16, kind);
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
}

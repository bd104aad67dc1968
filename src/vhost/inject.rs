//! Answers that are wrong on purpose, to test how a driver reacts. CONTRIBUTING.md describes the option.

use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use viommu_trace::event::Answer;
use viommu_trace::{Event, Tracer};
use viommu_wire::request::RequestType;
use viommu_wire::virtio_iommu::Status;

/// Which requests of a type are answered wrongly, and how. As text: `REQUEST=ANSWER[:KEY=NUMBER]...`, for example
/// `link=nomem:after=100:every=3`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Injection {
    request: RequestType,
    fault: InjectedFault,
    /// How many requests of the type are answered correctly at first.
    after: u64,
    /// Of the later ones every N-th is hit, where N is this number, not 0.
    every: u64,
    /// The number of the last request of the type that can be hit.
    until: u64,
    /// Requests are hit, and counted, only after the driver has reset the device this many times.
    resets: u64,
}

/// The fault that a request meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum InjectedFault {
    /// It gets this status and is not done.
    Refused(Status),
    /// It is done after the wait. Only then are it and the requests behind it in the queue answered.
    Late(Wait),
    /// Neither it nor the requests behind it in the queue are answered before the driver resets the device.
    Silent,
}

/// How long an answer is delayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wait {
    /// The longest delay.
    time: Duration,
    /// The delay ends earlier once this many requests are behind it in the queue. A driver that waits for each answer
    /// adds none before it has given up.
    behind: Option<u16>,
}

impl Wait {
    /// The time between two checks of the queue.
    const LOOK: Duration = Duration::from_millis(1);

    /// Waits. `queued` returns how many requests the queue has, or `None` if that cannot be read any more.
    pub(super) fn wait(self, queued: impl Fn() -> Option<u16>) {
        let Some(behind) = self.behind else { return thread::sleep(self.time) };
        let begin = Instant::now();
        while begin.elapsed() < self.time && queued().is_some_and(|queued| queued < behind) {
            thread::sleep(Self::LOOK);
        }
    }
}

impl Injection {
    /// Whether the request with this number, counted from 1 within its type, is hit.
    fn meets(&self, number: u64) -> bool {
        self.after < number && number <= self.until && (number - self.after).is_multiple_of(self.every)
    }
}

impl FromStr for Injection {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(':');
        let (request, fault) = parts
            .next()
            .and_then(|first| first.split_once('='))
            .ok_or("Expected REQUEST=ANSWER[:KEY=NUMBER]..., for example link=nomem:every=3")?;
        let mut injection = Injection {
            request: lower_case(request)
                .and_then(RequestType::from_name)
                .ok_or_else(|| format!("There is no request {request:?}"))?,
            fault: parse_fault(fault)
                .ok_or_else(|| format!("Expected a status such as nomem, late or silent, found {fault:?}"))?,
            after: 0,
            every: 1,
            until: u64::MAX,
            resets: 0,
        };
        for part in parts {
            let number = part.split_once('=').and_then(|(key, number)| Some((key, number.parse::<u64>().ok()?)));
            match (number, &mut injection.fault) {
                (Some(("after", number)), _) => injection.after = number,
                (Some(("every", number)), _) if number > 0 => injection.every = number,
                (Some(("until", number)), _) => injection.until = number,
                (Some(("resets", number)), _) => injection.resets = number,
                (Some(("ms", number)), InjectedFault::Late(wait)) => wait.time = Duration::from_millis(number),
                (Some(("behind", number)), InjectedFault::Late(wait)) if u16::try_from(number).is_ok() => {
                    wait.behind = Some(number as u16);
                }
                _ => {
                    return Err(format!(
                        "Expected after=N, every=N, until=N, resets=N or, for late, ms=N or behind=N, found {part:?}"
                    ));
                }
            }
        }
        Ok(injection)
    }
}

/// A name as the option has it: the specification's in lower case.
fn lower_case(name: &str) -> Option<&str> {
    (!name.bytes().any(|byte| byte.is_ascii_uppercase())).then_some(name)
}

fn parse_fault(name: &str) -> Option<InjectedFault> {
    match name {
        "silent" => Some(InjectedFault::Silent),
        "late" => Some(InjectedFault::Late(Wait { time: Duration::from_secs(1), behind: None })),
        // A refusal with status OK would be no refusal.
        name => lower_case(name)
            .and_then(Status::from_name)
            .filter(|status| *status != Status::Ok)
            .map(InjectedFault::Refused),
    }
}

/// Injections. Each counts the requests of its type, since the process began or since the reset that it waits for.
pub(super) struct Injector {
    injections: Vec<(Injection, AtomicU64)>,
    resets: AtomicU64,
}

impl Injector {
    pub(super) fn new(injections: &[Injection]) -> Injector {
        let injections = injections.iter().map(|&injection| (injection, AtomicU64::new(0))).collect();
        Injector { injections, resets: AtomicU64::new(0) }
    }

    /// The driver has reset the device.
    pub(super) fn device_reset(&self) {
        self.resets.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a request of this type, and decides and traces what happens to it. The first injection that hits it
    /// decides; `None` if it is to be answered correctly.
    pub(super) fn decide(&self, request: RequestType, tracer: &Tracer) -> Option<InjectedFault> {
        let mut met = None;
        let resets = self.resets.load(Ordering::Relaxed);
        let concerned = |(injection, _): &&(Injection, _)| injection.request == request && injection.resets <= resets;
        for (injection, count) in self.injections.iter().filter(concerned) {
            let number = count.fetch_add(1, Ordering::Relaxed) + 1;
            if met.is_none() && injection.meets(number) {
                met = Some((injection.fault, number));
            }
        }
        let (fault, number) = met?;
        let answer = match fault {
            InjectedFault::Refused(_) => Answer::Refused,
            InjectedFault::Late(_) => Answer::Late,
            InjectedFault::Silent => Answer::Never,
        };
        tracer.emit(Event::Injected { request: request as u8, answer, number });
        Some(fault)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn met(text: &str) -> Vec<u64> {
        let injection: Injection = text.parse().unwrap();
        (1..=12).filter(|&number| injection.meets(number)).collect()
    }

    #[test]
    fn an_injection_meets_what_it_says() {
        assert_eq!(met("link=nomem"), (1..=12).collect::<Vec<_>>());
        assert_eq!(met("link=nomem:every=3"), [3, 6, 9, 12]);
        assert_eq!(met("link=nomem:after=7"), [8, 9, 10, 11, 12]);
        assert_eq!(met("link=nomem:after=2:every=4:until=10"), [6, 10]);
    }

    #[test]
    fn what_is_no_injection_is_refused() {
        let late: Injection = "unmap=late:ms=20:after=1".parse().unwrap();
        assert_eq!(late.fault, InjectedFault::Late(Wait { time: Duration::from_millis(20), behind: None }));
        let held: Injection = "link=late:ms=20:behind=7".parse().unwrap();
        assert_eq!(held.fault, InjectedFault::Late(Wait { time: Duration::from_millis(20), behind: Some(7) }));
        let resumed: Injection = "map=nomem:resets=1:until=1".parse().unwrap();
        assert_eq!((resumed.resets, resumed.until), (1, 1));
        for text in [
            "",
            "link",
            "lnk=nomem",
            "LINK=nomem",
            "link=NOMEM",
            "link=ok",
            "link=nomem:every=0",
            "link=nomem:ms=5",
            "link=nomem:after",
        ] {
            assert!(text.parse::<Injection>().is_err(), "{text}");
        }
        assert!("link=late:behind=65536".parse::<Injection>().is_err());
    }

    #[test]
    fn what_waits_for_resets_counts_from_then_on() {
        let tracer = Tracer::default();
        let injector = Injector::new(&["map=nomem:resets=2:after=1:until=2".parse().unwrap()]);
        let met = || injector.decide(RequestType::Map, &tracer).is_some();
        assert_eq!([met(), met(), met()], [false; 3]);
        injector.device_reset();
        assert_eq!([met(), met()], [false; 2]);
        injector.device_reset();
        assert_eq!([met(), met(), met()], [false, true, false]);
    }

    #[test]
    fn a_wait_ends_with_what_is_behind_or_cannot_be_known() {
        let forever = Wait { time: Duration::MAX, behind: Some(3) };
        let queued = std::cell::Cell::new(0);
        forever.wait(|| {
            queued.set(queued.get() + 1);
            Some(queued.get())
        });
        assert_eq!(queued.get(), 3);
        forever.wait(|| None);
        Wait { time: Duration::ZERO, behind: Some(3) }.wait(|| Some(0));
    }
}

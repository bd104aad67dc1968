//! What is said on the standard error output, and how often.
//!
//! Guests and clients can make the same thing go wrong as often as they like. Each place in the code says its first few
//! warnings and then counts them, and the count is said when some seconds are over; the trace has every one. What is said
//! is cut to about a kilobyte, as it may repeat what a peer has sent.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::collections::HashMap;
use std::panic::PanicHookInfo;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use log::{Level, LevelFilter, Log, Metadata, Record};

use super::short::short;
use crate::sync::lock;

/// Warnings and errors that one place in the code may say in a [`WINDOW`].
const BURST: u32 = 5;

/// How long a place is watched, from the first thing that it says.
const WINDOW: Duration = Duration::from_secs(10);

/// Bytes of a message by which the ones that were left out are told.
const EXCERPT: usize = 120;

/// Logs to the standard error output from now on, panics too. RUST_LOG overrides `level`.
pub fn start(level: LevelFilter) {
    let inner = env_logger::Builder::new().filter_level(level).parse_default_env().build();
    let level = inner.filter();
    // It fails if there is a logger; who made it is content with it.
    if log::set_boxed_logger(Box::new(Logger(Arc::new(Limited { inner, places: Mutex::default() })))).is_ok() {
        log::set_max_level(level);
        std::panic::set_hook(Box::new(log_panic));
    }
}

/// A panic that is contained is one more thing that a peer may be able to repeat.
fn log_panic(info: &PanicHookInfo<'_>) {
    let thread = thread::current();
    let name = thread.name().unwrap_or("without a name");
    let backtrace = Backtrace::capture();
    let mut text = short(&format_args!("Thread {name} {info}"));
    if backtrace.status() == BacktraceStatus::Captured {
        text += &format!("\n{backtrace}");
    }
    let (file, line) = info.location().map(|location| (location.file(), location.line())).unzip();
    log::logger().log(
        &Record::builder()
            .level(Level::Error)
            .target(module_path!())
            .file(file)
            .line(line)
            .args(format_args!("{text}"))
            .build(),
    );
}

/// What the log's macros call.
struct Logger(Arc<Limited>);

/// env_logger's logger behind the limit.
struct Limited {
    inner: env_logger::Logger,
    places: Mutex<Places>,
}

impl Limited {
    fn places(&self) -> MutexGuard<'_, Places> {
        lock(&self.places)
    }

    fn say_left_out(&self, left_out: &[LeftOut]) {
        for LeftOut { count, like } in left_out {
            self.inner.log(
                &Record::builder()
                    .level(Level::Warn)
                    .target(module_path!())
                    .args(format_args!("{count} more messages were left out like: {like}"))
                    .build(),
            );
        }
    }

    /// Has a thread say what was left out when it is time, though nobody may say anything more.
    fn attend(self: &Arc<Self>) {
        let limited = self.clone();
        let attend = move || {
            // The lock is free while this sleeps.
            let until_next = || limited.places().until_next(Instant::now());
            while let Some(time) = until_next() {
                thread::sleep(time);
                let left_out = limited.places().end_windows(Instant::now());
                limited.say_left_out(&left_out);
            }
        };
        if thread::Builder::new().name("log".into()).spawn(attend).is_err() {
            // Then it is said with the next message, or at the end.
            self.places().attended = false;
        }
    }

    /// Says `message` in place of what the record says.
    fn say(&self, record: &Record<'_>, message: &str) {
        self.inner.log(
            &Record::builder()
                .metadata(record.metadata().clone())
                .module_path(record.module_path())
                .file(record.file())
                .line(record.line())
                .args(format_args!("{message}"))
                .build(),
        );
    }

    fn log(self: &Arc<Self>, record: &Record<'_>) {
        if !self.inner.matches(record) {
            return;
        }
        // Not under the lock: what formats the message is others' code, and if it panics, that is logged too.
        // What this module says itself is short where it has to be, and a backtrace is not.
        let own = record.target() == module_path!();
        let message = if own { record.args().to_string() } else { short(record.args()) };
        let say = || self.say(record, &message);
        // Who asks for more than warnings wants all of them.
        if record.level() > Level::Warn {
            return say();
        }
        let place = (record.file().unwrap_or_default().to_string(), record.line().unwrap_or(0));
        let like = excerpt(&message);
        let now = Instant::now();
        let (left_out, admitted, attended) = {
            let mut places = self.places();
            let (left_out, admitted) = (places.end_windows(now), places.admit(place, now, like));
            (left_out, admitted, admitted || std::mem::replace(&mut places.attended, true))
        };
        self.say_left_out(&left_out);
        if admitted {
            say();
        }
        if !attended {
            self.attend();
        }
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.0.inner.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        self.0.log(record);
    }

    /// Says what was left out and not said yet.
    fn flush(&self) {
        let left_out = self.0.places().end_all();
        self.0.say_left_out(&left_out);
        self.0.inner.flush();
    }
}

/// File and line.
type Place = (String, u32);

/// The places that said something of late.
#[derive(Default)]
struct Places {
    windows: HashMap<Place, Window>,
    /// A thread waits for the ends of those windows that left something out.
    attended: bool,
}

struct Window {
    begun: Instant,
    said: u32,
    left_out: u64,
    /// The beginning of the first message.
    like: String,
}

/// Messages of one place that were not said.
#[derive(Debug, PartialEq, Eq)]
struct LeftOut {
    count: u64,
    /// What they are like.
    like: String,
}

impl Places {
    /// Whether a place may say something now, a message that begins `like` this; if not, it is counted.
    fn admit(&mut self, place: Place, now: Instant, like: String) -> bool {
        let begin = || Window { begun: now, said: 0, left_out: 0, like };
        let window = self.windows.entry(place).or_insert_with(begin);
        if window.said >= BURST {
            window.left_out += 1;
            return false;
        }
        window.said += 1;
        true
    }

    /// Forgets the places whose windows are over, and tells what they had to leave out.
    fn end_windows(&mut self, now: Instant) -> Vec<LeftOut> {
        let over = self.windows.extract_if(|_, window| now.duration_since(window.begun) >= WINDOW);
        over.filter_map(|(_, window)| window.left_out()).collect()
    }

    /// How long it is until something that was left out is to be said. If nothing was, nobody needs to wait any more.
    fn until_next(&mut self, now: Instant) -> Option<Duration> {
        let ends = self.windows.values().filter(|window| window.left_out > 0).map(|window| window.begun + WINDOW);
        let next = ends.min().map(|end| end.saturating_duration_since(now));
        self.attended = next.is_some();
        next
    }

    /// As [`Places::end_windows`], for all places.
    fn end_all(&mut self) -> Vec<LeftOut> {
        self.windows.drain().filter_map(|(_, window)| window.left_out()).collect()
    }
}

impl Window {
    fn left_out(self) -> Option<LeftOut> {
        (self.left_out > 0).then_some(LeftOut { count: self.left_out, like: self.like })
    }
}

/// The first line of a message, and no more than a little of it.
fn excerpt(message: &str) -> String {
    let line = message.lines().next().unwrap_or_default();
    line.chars().take(EXCERPT).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(line: u32) -> Place {
        ("file.rs".into(), line)
    }

    #[test]
    fn a_flood_of_one_place_is_counted_and_told_when_its_window_is_over() {
        let mut places = Places::default();
        let begin = Instant::now();
        let said =
            (0..100).filter(|n| places.admit(place(1), begin, excerpt(&format!("bad thing {n}\nand more")))).count();
        assert_eq!(said, BURST as usize);
        assert!(places.admit(place(2), begin, "another".into()), "one place does not silence another");
        assert_eq!(places.end_windows(begin + WINDOW / 2), []);
        assert_eq!(places.until_next(begin + WINDOW / 4), Some(WINDOW * 3 / 4));
        let left_out = LeftOut { count: 95, like: "bad thing 0".into() };
        assert_eq!(places.end_windows(begin + WINDOW), [left_out]);
        assert_eq!(places.until_next(begin + WINDOW), None, "there is nothing to tell");
        assert!(places.admit(place(1), begin + WINDOW, "again".into()));
        assert!(places.windows.len() == 1, "places that are silent are forgotten");
    }

    #[test]
    fn at_the_end_everything_is_told() {
        let mut places = Places::default();
        let now = Instant::now();
        for _ in 0..BURST + 2 {
            places.admit(place(1), now, "bad".into());
        }
        assert_eq!(places.end_all(), [LeftOut { count: 2, like: "bad".into() }]);
        assert_eq!(places.end_all(), []);
    }
}

//! The kernel's tracing, in an instance of its own: kprobes and events, with times from the processor's time stamp
//! counter.
//!
//! Documentation/trace/ftrace.rst, events.rst and kprobetrace.rst of the kernel.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

const TRACING: &str = "/sys/kernel/tracing";
/// The group of the kprobes.
const GROUP: &str = "viommu";
/// The size of a processor's trace buffer.
const BUFFER_KB: &str = "16384";
/// Some time after a probe was set, the kernel replaces its breakpoint by a jump.
const SETTLE: Duration = Duration::from_millis(300);

/// One thing that was traced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// In ticks of the time stamp counter.
    pub time: u64,
    /// The event's name; of a kprobe `FUNCTION_in` or `FUNCTION_out`.
    pub name: String,
    /// The text after it: `member=value`, separated by blanks.
    pub text: String,
}

impl Event {
    /// A member's value.
    pub fn member(&self, name: &str) -> Option<&str> {
        self.text.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    }
}

/// What was traced, and what was missed.
pub struct Traced {
    /// In the order of their times.
    pub events: Vec<Event>,
    /// How often each kprobe was hit and made no event, by its event's name. The kernel skips a probe that an interrupt
    /// hits inside another probe's handler.
    missed: HashMap<String, u64>,
}

impl Traced {
    /// How many calls of a function lack the event of their return, or both events.
    pub fn missed_calls(&self, function: &str) -> u64 {
        self.missed.get(&format!("{function}_out")).copied().unwrap_or(0)
    }
}

/// A tracing instance, which is removed when this is dropped.
pub struct Tracing {
    folder: PathBuf,
    probes: Vec<String>,
}

impl Tracing {
    /// Makes the instance; nothing is traced yet.
    ///
    /// # Errors
    /// If the kernel has no tracefs, or no kprobe events in it.
    pub fn new() -> Result<Self> {
        ensure!(
            Path::new(TRACING).join("kprobe_events").exists(),
            "{TRACING}/kprobe_events is not there: wanted a kernel with CONFIG_KPROBE_EVENTS"
        );
        let folder = Path::new(TRACING).join("instances").join(GROUP);
        fs::create_dir(&folder).with_context(|| format!("Cannot make {}", folder.display()))?;
        let tracing = Self { folder, probes: Vec::new() };
        tracing.write("tracing_on", "0")?;
        tracing.write("trace_clock", "x86-tsc")?;
        tracing.write("buffer_size_kb", BUFFER_KB)?;
        // Pointers are not hashed, so that no two are alike.
        tracing.write("options/hash-ptr", "0")?;
        Ok(tracing)
    }

    /// Makes events `FUNCTION_in` and `FUNCTION_out` of a function's calls and returns; false if the kernel has no such
    /// function.
    ///
    /// # Errors
    /// If only one of them can be set.
    pub fn probe(&mut self, function: &str) -> Result<bool> {
        if append("kprobe_events", &format!("p:{GROUP}/{function}_in {function}")).is_err() {
            return Ok(false);
        }
        self.probes.push(format!("{function}_in"));
        append("kprobe_events", &format!("r:{GROUP}/{function}_out {function}"))
            .with_context(|| format!("Cannot trace the return of {function}"))?;
        self.probes.push(format!("{function}_out"));
        Ok(true)
    }

    /// Traces `work`: the probes, and these events (`kmem/kfree`).
    ///
    /// # Errors
    /// The error of `work`, an event that does not exist, or events that were lost.
    pub fn run<T>(&self, events: &[&str], work: impl FnOnce() -> Result<T>) -> Result<(Traced, T)> {
        let probes = self.probes.iter().map(|name| format!("{GROUP}/{name}"));
        let enabled: Vec<String> =
            probes.chain(events.iter().map(ToString::to_string)).map(|name| format!("events/{name}/enable")).collect();
        self.write("trace", "")?;
        enabled.iter().try_for_each(|file| self.write(file, "1"))?;
        std::thread::sleep(SETTLE);
        let before = misses()?;
        self.write("tracing_on", "1")?;
        let outcome = work();
        self.write("tracing_on", "0")?;
        let mut missed = misses()?;
        missed.iter_mut().for_each(|(name, count)| *count -= before.get(name).copied().unwrap_or(0).min(*count));
        enabled.iter().try_for_each(|file| self.write(file, "0"))?;
        let outcome = outcome?;
        self.check_for_lost_events()?;
        let text = fs::read_to_string(self.folder.join("trace")).context("Cannot read the trace")?;
        Ok((Traced { events: text.lines().filter_map(parse).collect(), missed }, outcome))
    }

    fn check_for_lost_events(&self) -> Result<()> {
        for cpu in fs::read_dir(self.folder.join("per_cpu"))?.flatten() {
            let stats = fs::read_to_string(cpu.path().join("stats"))?;
            for line in stats.lines() {
                let lost = ["overrun: ", "commit overrun: ", "dropped events: "];
                let count = lost.iter().find_map(|name| line.strip_prefix(name));
                ensure!(count.is_none_or(|count| count == "0"), "Events were lost in tracing: {line}");
            }
        }
        Ok(())
    }

    fn write(&self, file: &str, text: &str) -> Result<()> {
        let path = self.folder.join(file);
        fs::write(&path, text).with_context(|| format!("Cannot write \"{text}\" to {}", path.display()))
    }
}

impl Drop for Tracing {
    fn drop(&mut self) {
        // In this order: a probe that an instance uses cannot be removed. If anything stays, it only costs time.
        let _ = fs::remove_dir(&self.folder);
        for name in &self.probes {
            let _ = append("kprobe_events", &format!("-:{GROUP}/{name}"));
        }
    }
}

fn append(file: &str, line: &str) -> std::io::Result<()> {
    use std::io::Write;
    let mut file = fs::OpenOptions::new().append(true).open(Path::new(TRACING).join(file))?;
    file.write_all(format!("{line}\n").as_bytes())
}

/// How often each kprobe was hit without an event, from the file `kprobe_profile`: each line has a name, the number of
/// events, and the number of misses.
fn misses() -> Result<HashMap<String, u64>> {
    let file = Path::new(TRACING).join("kprobe_profile");
    let text = fs::read_to_string(&file).with_context(|| format!("Cannot read {}", file.display()))?;
    Ok(text.lines().filter_map(parse_misses).collect())
}

fn parse_misses(line: &str) -> Option<(String, u64)> {
    let mut words = line.split_whitespace();
    let (name, misses) = (words.next()?, words.nth(1)?);
    Some((name.to_owned(), misses.parse().ok()?))
}

/// A line of the file `trace`: `COMMAND-PID [CPU] FLAGS TIME: NAME: TEXT`, where COMMAND may have blanks.
fn parse(line: &str) -> Option<Event> {
    if line.starts_with('#') {
        return None;
    }
    let after_cpu = line.split_once("] ")?.1;
    let (head, rest) = after_cpu.split_once(": ")?;
    let time = head.split_whitespace().next_back()?.parse().ok()?;
    let (name, text) = rest.split_once(':')?;
    Some(Event { time, name: name.trim().to_owned(), text: text.trim().to_owned() })
}

#[cfg(test)]
mod tests {
    use super::{parse, parse_misses};

    #[test]
    fn a_line_of_the_trace() {
        let line = "    init-1       [000] d..1. 17309485: kmalloc: call_site=f+0x1b/0x90 ptr=000000008 bytes_alloc=96 gfp_flags=GFP_ATOMIC|__GFP_ZERO";
        let event = parse(line).unwrap();
        assert_eq!((event.time, event.name.as_str()), (17_309_485, "kmalloc"));
        assert_eq!(event.member("bytes_alloc"), Some("96"));
        assert_eq!(event.member("bytes"), None);
        assert_eq!(parse("# tracer: nop"), None);
        let probe = parse(" kworker/0:1H-57 [000] d..2. 42: nvme_prep_rq_in: (nvme_prep_rq+0x4/0x3d0)").unwrap();
        assert_eq!((probe.time, probe.name.as_str()), (42, "nvme_prep_rq_in"));
    }

    #[test]
    fn a_line_of_the_profile() {
        let line = "  nvme_unmap_data_out                                      511               1";
        assert_eq!(parse_misses(line), Some(("nvme_unmap_data_out".to_owned(), 1)));
        assert_eq!(parse_misses(""), None);
    }
}

//! An event as a JSON line, with the names that the host's trace uses.

use std::fmt::Write;

use serde_json::Value;

use super::format::Format;
use super::page::Entry;
use crate::sysfs;

/// NVM commands that name logical blocks (NVM Command Set 1.0, figure 13): write, read, compare, write zeroes.
const BLOCK_COMMANDS: [u64; 4] = [0x01, 0x02, 0x05, 0x08];

/// Makes lines.
#[derive(Default)]
pub struct Writer {
    line: String,
    /// The PCI function of each NVMe controller, by the number in its name.
    controllers: Vec<(u64, Function)>,
}

/// A PCI function: its endpoint id, and its address as `lspci` prints it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Function {
    endpoint: u32,
    bdf: String,
}

impl Function {
    /// Parses a device's name, `0000:00:04.0`. `None` if the name is no function's, or not in segment 0.
    fn named(name: &str) -> Option<Self> {
        let bdf = name.strip_prefix("0000:")?;
        let (bus, rest) = bdf.split_once(':')?;
        let (device, function) = rest.split_once('.')?;
        let number = |text| u32::from_str_radix(text, 16).ok();
        Some(Self { endpoint: number(bus)? << 8 | number(device)? << 3 | number(function)?, bdf: bdf.into() })
    }
}

impl Writer {
    /// Looks up which NVMe controllers there are now.
    pub fn refresh(&mut self) {
        self.controllers.clear();
        for name in sysfs::names("/sys/class/nvme") {
            let number = name.strip_prefix("nvme").and_then(|number| number.parse().ok());
            let device = sysfs::link_name(format!("/sys/class/nvme/{name}/device"));
            let function = device.and_then(|device| Function::named(&device));
            self.controllers.extend(number.zip(function));
        }
    }

    /// The line of an event on a processor, in a thread.
    pub fn event(&mut self, entry: &Entry, format: &Format, processor: usize, task: i32) -> &str {
        let members: Vec<_> = format.members(entry.record).collect();
        let member = |wanted: &str| members.iter().find(|(name, _)| *name == wanted).map(|(_, value)| value);
        let number = |wanted: &str| member(wanted).and_then(Value::as_u64);
        let controller = || number("ctrl_id").and_then(|id| self.controllers.iter().find(|(number, _)| *number == id));
        let function = match member("device").and_then(Value::as_str) {
            Some(device) => Function::named(device),
            None => controller().map(|(_, function)| function.clone()),
        };
        self.line.clear();
        let mut put = |text: std::fmt::Arguments| {
            // A String takes it all.
            let _ = self.line.write_fmt(text);
        };
        put(format_args!("{{\"t\":{},\"kind\":\"guest\",\"event\":\"{}\"", entry.time, format.name));
        if let Some(Function { endpoint, bdf }) = function {
            put(format_args!(",\"endpoint\":{endpoint},\"bdf\":\"{bdf}\""));
        }
        put(format_args!(",\"cpu\":{processor},\"task\":{task}"));
        for (name, value) in &members {
            put(format_args!(",\"{name}\":{value}"));
        }
        if format.name == "nvme:nvme_setup_cmd"
            && number("qid").is_some_and(|queue| queue != 0)
            && number("opcode").is_some_and(|opcode| BLOCK_COMMANDS.contains(&opcode))
            && let Some((slba, blocks)) = member("cdw10").and_then(Value::as_str).and_then(block_range)
        {
            put(format_args!(",\"slba\":{slba},\"blocks\":{blocks}"));
        }
        put(format_args!("}}\n"));
        &self.line
    }
}

/// The starting LBA and the number of blocks, from command dwords 10 to 12 as hexadecimal bytes.
fn block_range(dwords: &str) -> Option<(u64, u64)> {
    let digits = dwords.strip_prefix("0x")?;
    let byte = |at: usize| u64::from_str_radix(digits.get(2 * at..2 * at + 2)?, 16).ok();
    let number = |range: std::ops::Range<usize>| range.rev().try_fold(0, |value, at| Some(value << 8 | byte(at)?));
    Some((number(0..8)?, number(8..10)? + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_have_the_host_s_names() {
        let function = Function::named("0000:01:1f.7").unwrap();
        assert_eq!((function.endpoint, function.bdf.as_str()), (0x1ff, "01:1f.7"));
        assert_eq!(Function::named("0001:00:04.0"), None);
        assert_eq!(Function::named("platform"), None);
    }

    #[test]
    fn a_command_names_its_blocks() {
        assert_eq!(block_range("0x00080000010000001f00ffff"), Some((0x1_0000_0800, 32)));
        assert_eq!(block_range("0x0008"), None);
    }
}

//! The `nvme` program of nvme-cli, as people use it: what it says about a controller, and its I/O commands.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::blockdev::{self, Namespace};
use crate::results::Results;
use crate::workload::{Needs, Workload};
use crate::{pattern, sysfs};

/// Files with the data that commands send and expect.
const DATA: &str = "/tmp/data";
const OTHER_DATA: &str = "/tmp/other-data";
const READ_BACK: &str = "/tmp/read-back";
/// How long a controller may take to come back from a reset.
const RESET_LIMIT: Duration = Duration::from_secs(300);

/// How a command must end.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Expect {
    Success,
    Failure,
    /// Either way: the command is optional in the specification, so it is reported and not judged.
    Either,
}

/// Commands of the nvme program, each with its exit status and what it printed.
#[derive(clap::Args)]
pub struct Args {}

impl Workload for Args {
    const NEEDS: Needs = Needs { programs: &["nvme"], ..Needs::NOTHING };

    /// The workload. Emits one `result` with every command, its exit status and what it printed (parsed if it is JSON).
    ///
    /// # Errors
    /// Names the commands that ended in the wrong way.
    fn run(&self, results: &mut Results) -> Result<()> {
        let namespace = blockdev::namespaces().into_iter().next().context("The guest has no NVMe namespace")?;
        let controller = sysfs::link_name(format!("/sys/block/{}/device", namespace.name))
            .context("Cannot find the namespace's controller in sysfs")?;
        let node = namespace.node().display().to_string();
        let controller = format!("/dev/{controller}");
        let block_size = logical_block_size(&namespace)?;
        write_files(block_size)?;

        let mut commands = Vec::new();
        let mut wrong = Vec::new();
        for (expect, line) in commands_for(&controller, &node, block_size) {
            let (result, good) = execute(&line, expect)?;
            if !good {
                wrong.push(line.clone());
            }
            commands.push(result);
            if line.starts_with("reset ") {
                blockdev::wait_for_namespace(&namespace.bdf, RESET_LIMIT)?;
            }
            if line.starts_with("read ") && fs::read(READ_BACK)? != fs::read(DATA)? {
                wrong.push(format!("{line} (the data is not what was written)"));
            }
        }
        results.emit("result", json!({ "workload": "nvme-cli", "commands": commands, "wrong": wrong }));
        ensure!(wrong.is_empty(), "nvme commands ended in the wrong way: {wrong:?}");
        Ok(())
    }
}

fn logical_block_size(namespace: &Namespace) -> Result<u64> {
    let file = format!("/sys/block/{}/queue/logical_block_size", namespace.name);
    sysfs::text(&file).and_then(|text| text.parse().ok()).with_context(|| format!("Cannot read {file}"))
}

/// Eight logical blocks of data, and eight others.
fn write_files(block_size: u64) -> Result<()> {
    let mut data = vec![0; 8 * block_size as usize];
    for (file, seed) in [(DATA, 1), (OTHER_DATA, 2)] {
        pattern::fill(&mut data, 0, seed);
        fs::write(file, &data).with_context(|| format!("Cannot write {file}"))?;
    }
    Ok(())
}

fn commands_for(controller: &str, node: &str, block_size: u64) -> Vec<(Expect, String)> {
    use Expect::{Either, Failure, Success};
    let bytes = 8 * block_size;
    let mut commands = vec![
        (Success, "list -o json".into()),
        (Success, "list-subsys -o json".into()),
        (Success, format!("id-ctrl {controller} -o json")),
        (Success, format!("list-ns {controller} -o json")),
        (Success, format!("id-ns {node} -o json")),
        (Success, format!("ns-descs {node} -o json")),
        (Success, format!("smart-log {controller} -o json")),
        (Success, format!("error-log {controller} -o json")),
        (Success, format!("fw-log {controller} -o json")),
        (Either, format!("effects-log {controller} -o json")),
        (Either, format!("self-test-log {controller} -o json")),
        (Either, format!("get-feature {controller} -f 0x06")),
        // Debian's kernels let nobody map registers that a driver uses, unless a parameter allows it.
        (if registers_visible() { Success } else { Either }, format!("show-regs {controller} -o json")),
        // Error recovery belongs to a namespace.
        (Success, format!("get-feature {controller} -n 1 -f 0x05")),
    ];
    // The other mandatory features: arbitration, power management, temperature threshold, number of queues, interrupt
    // coalescing and vector configuration, write atomicity, asynchronous events (NVMe Base 2.0, figure 317).
    for feature in ["0x01", "0x02", "0x04", "0x07", "0x08", "0x09", "0x0a", "0x0b"] {
        commands.push((Success, format!("get-feature {controller} -f {feature}")));
    }
    commands.extend([
        (Success, format!("write {node} -s 0 -c 7 -z {bytes} -d {DATA}")),
        (Success, format!("flush {node}")),
        (Success, format!("read {node} -s 0 -c 7 -z {bytes} -d {READ_BACK}")),
        (Success, format!("compare {node} -s 0 -c 7 -z {bytes} -d {DATA}")),
        (Failure, format!("compare {node} -s 0 -c 7 -z {bytes} -d {OTHER_DATA}")),
        (Success, format!("write-zeroes {node} -s 16 -c 7")),
        (Success, format!("dsm {node} -d 1 -s 32 -b 8")),
        (Failure, format!("read {node} -s 0xfffffffffff0 -c 7 -z {bytes} -d /dev/null")),
        (Failure, format!("get-log {controller} -i 0xbf -l 512")),
        (Success, format!("error-log {controller} -e 4 -o json")),
        (Success, format!("reset {controller}")),
        (Success, format!("read {node} -s 0 -c 7 -z {bytes} -d {READ_BACK}")),
        (Either, format!("subsystem-reset {controller}")),
    ]);
    commands
}

fn registers_visible() -> bool {
    sysfs::text("/proc/cmdline").is_some_and(|line| line.contains("iomem=relaxed"))
}

/// Runs one command. Returns its result, and whether it ended as it must.
fn execute(line: &str, expect: Expect) -> Result<(Value, bool)> {
    let output = Command::new("nvme")
        .args(line.split_whitespace())
        .env("PATH", "/usr/sbin:/bin:/usr/bin")
        .output()
        .context("Cannot start nvme, of the package nvme-cli")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let good = match expect {
        Expect::Success => output.status.success(),
        Expect::Failure => !output.status.success(),
        Expect::Either => true,
    };
    let result = json!({
        "command": format!("nvme {line}"),
        "exit": output.status.code(),
        "good": good,
        "output": serde_json::from_str(&text).unwrap_or(Value::String(text)),
        "message": String::from_utf8_lossy(&output.stderr).trim(),
    });
    Ok((result, good))
}

//! The kernel series' own tests of the DMA API in two steps: the modules `iova_test`, KUnit cases in which the DMA
//! engine uses the linked memory, and `iova_reset`, in which the null device does, and leaves its domain for a while.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::results::Results;
use crate::workload::{Needs, Workload};
use crate::{init, kmsg};

/// The modules, and the suite in each.
const ENGINE: (&str, &str) = ("iova_test", "dma_iova");
const RESET: (&str, &str) = ("iova_reset", "iova_reset");

/// Let the kernel series' own tests of the two-step DMA API use the DMA engine.
#[derive(clap::Args)]
pub struct Args {
    /// Let them use the null device instead, and take it out of its domain, and reset it.
    #[arg(long)]
    reset: bool,
}

impl Workload for Args {
    const NEEDS: Needs = Needs { modules: &["ioatdma"], on_demand: &[ENGINE.0, RESET.0], ..Needs::NOTHING };

    /// The workload: loads the module, which runs the cases, and finds their results in the kernel log. Emits one `result`.
    ///
    /// # Errors
    /// If the kernel has no such module, if a case failed, or if none ran.
    fn run(&self, results: &mut Results) -> Result<()> {
        let (module, suite) = if self.reset { RESET } else { ENGINE };
        init::load_modules(&[module])?;
        let loaded = std::path::Path::new("/sys/module").join(module).exists();
        ensure!(loaded, "The kernel has no module {module}: it comes with the project's series (KERNEL=patched)");
        let suite = parse(suite, &kmsg::read_log())?;
        let names =
            |outcome: Outcome| suite.cases.iter().filter(move |case| case.outcome == outcome).map(|case| &case.name);
        let passed = names(Outcome::Passed).count();
        results.emit(
            "result",
            json!({
                "workload": "iova-test", "cases": suite.cases.iter().map(Case::report).collect::<Value>(),
                "passed": passed, "failed": names(Outcome::Failed).count(), "skipped": names(Outcome::Skipped).count(),
                "messages": suite.messages,
            }),
        );
        let failed: Vec<_> = names(Outcome::Failed).collect();
        ensure!(failed.is_empty(), "KUnit cases failed: {failed:?}");
        ensure!(passed > 0, "No KUnit case ran: {:?}", suite.messages);
        Ok(())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Passed,
    Failed,
    Skipped,
}

#[derive(Debug, PartialEq, Eq)]
struct Case {
    name: String,
    outcome: Outcome,
    /// Why it was skipped.
    reason: Option<String>,
}

impl Case {
    fn report(&self) -> Value {
        let outcome = match self.outcome {
            Outcome::Passed => "passed",
            Outcome::Failed => "failed",
            Outcome::Skipped => "skipped",
        };
        json!({ "name": self.name, "outcome": outcome, "reason": self.reason })
    }
}

#[derive(Debug)]
struct Suite {
    cases: Vec<Case>,
    /// The messages of the cases.
    messages: Vec<String>,
}

/// Finds the suite `name` in the kernel log's lines, `seconds text`; texts are in the Kernel Test Anything Protocol
/// (Documentation/dev-tools/ktap.rst), the suite's cases one level deeper than the suite itself.
fn parse(name: &str, log: &[String]) -> Result<Suite> {
    let texts = log.iter().filter_map(|line| line.split_once(' ')).map(|(_, text)| text.trim());
    let start = format!("# Subtest: {name}");
    let mut texts = texts.skip_while(|text| *text != start).skip(1);
    let plan = texts.by_ref().find_map(|text| text.strip_prefix("1..")?.parse::<usize>().ok());
    let planned = plan.with_context(|| format!("The kernel log has no results of the KUnit suite {name}"))?;
    let mut suite = Suite { cases: Vec::new(), messages: Vec::new() };
    for text in texts {
        match case(text) {
            // The suite's own line comes last.
            Some(case) if case.name == name => {
                let found = suite.cases.len();
                ensure!(found == planned, "The KUnit suite {name} has {planned} cases; the log has {found}");
                return Ok(suite);
            }
            Some(case) => suite.cases.push(case),
            None if text.starts_with('#') => suite.messages.push(text.into()),
            None => {}
        }
    }
    bail!("The KUnit suite {name} did not end; its last message: {:?}", suite.messages.last())
}

/// One result: `ok 3 name`, `not ok 3 name` or `ok 3 name # SKIP reason`.
fn case(text: &str) -> Option<Case> {
    let (good, rest) = match text.strip_prefix("not ok ") {
        Some(rest) => (false, rest),
        None => (true, text.strip_prefix("ok ")?),
    };
    let (number, rest) = rest.split_once(' ')?;
    number.parse::<u32>().ok()?;
    let (name, directive) = rest.split_once(" # ").map_or((rest, None), |(name, rest)| (name, Some(rest)));
    let reason = directive.and_then(|text| text.strip_prefix("SKIP")).map(|text| text.trim().to_owned());
    let outcome = match (good, &reason) {
        (false, _) => Outcome::Failed,
        (true, Some(_)) => Outcome::Skipped,
        (true, None) => Outcome::Passed,
    };
    Some(Case { name: name.trim().into(), outcome, reason })
}

#[cfg(test)]
mod tests {
    use super::{Outcome, Suite};

    fn parse(text: &str) -> anyhow::Result<Suite> {
        let log: Vec<_> = text.lines().map(|line| format!("1.000001 {line}")).collect();
        super::parse("dma_iova", &log)
    }

    #[test]
    fn each_case_is_told() {
        let suite = parse("nvme nvme0: 1/0/0 default/read/poll queues\nKTAP version 1\n1..1\n    KTAP version 1\n\
             \x20   # Subtest: dma_iova\n    # module: iova_test\n    1..3\n    ok 1 iova_test_alloc\n\
             \x20   # iova_test_link: EXPECTATION FAILED at kernel/dma/iova_test.c:1\n    not ok 2 iova_test_link\n\
             \x20   ok 3 iova_test_split # SKIP not sparse\n# dma_iova: pass:1 fail:1 skip:1 total:3\nnot ok 1 dma_iova\n")
        .unwrap();
        let outcomes: Vec<_> = suite.cases.iter().map(|case| (case.name.as_str(), case.outcome)).collect();
        assert_eq!(
            outcomes,
            [
                ("iova_test_alloc", Outcome::Passed),
                ("iova_test_link", Outcome::Failed),
                ("iova_test_split", Outcome::Skipped)
            ]
        );
        assert_eq!(suite.cases[2].reason.as_deref(), Some("not sparse"));
        assert!(suite.messages[0].contains("EXPECTATION FAILED"));
    }

    #[test]
    fn results_that_are_not_all_there_are_an_error() {
        assert!(parse("").is_err());
        let begun = "    # Subtest: dma_iova\n    1..2\n    ok 1 iova_test_alloc\n";
        assert!(parse(begun).unwrap_err().to_string().contains("did not end"));
        assert!(parse(&format!("{begun}ok 1 dma_iova\n")).unwrap_err().to_string().contains("has 2 cases"));
    }
}

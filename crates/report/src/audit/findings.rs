//! What a driver or a device did wrong, or could do better.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt;

use serde_json::{Value, json};

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Worth to know. Some drivers do it on purpose.
    Info,
    /// Memory or time is wasted.
    Warning,
    /// Data are lost or can be, or addresses are.
    Error,
}

impl Severity {
    /// All, with the least first.
    pub const ALL: [Severity; 3] = [Severity::Info, Severity::Warning, Severity::Error];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Severity::Info => "info",
            Severity::Warning => "warning",
            Severity::Error => "error",
        }
    }
}

/// Declares the rules: constants, their ids, severities, and what to do.
macro_rules! rules {
    ($($(#[$about:meta])* $rule:ident $id:literal $severity:ident $todo:literal;)*) => {
        /// A rule that a finding is about.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Rule {
            $($(#[$about])* $rule,)*
        }

        impl Rule {
            /// All rules.
            pub const ALL: &'static [Rule] = &[$(Rule::$rule),*];

            /// Its id, which never changes.
            pub fn id(self) -> &'static str {
                match self {
                    $(Rule::$rule => $id,)*
                }
            }

            /// How bad it is to break it.
            pub fn severity(self) -> Severity {
                match self {
                    $(Rule::$rule => Severity::$severity,)*
                }
            }

            /// What to do about it.
            pub fn todo(self) -> &'static str {
                match self {
                    $(Rule::$rule => $todo,)*
                }
            }
        }
    };
}

rules! {
    /// An access to addresses after they were unmapped, unlinked or released.
    UseAfterUnmap "use-after-unmap" Error "Unmap when the device has completed the operation, and not before.";
    /// An access to addresses of a live reservation in which nothing is linked, and never was.
    AccessInHole "access-in-hole" Error "Link the pages before the device is told of them, and wait for the LINK (dma_iova_sync()).";
    /// An access that the mapping at its address does not allow.
    AccessDenied "access-denied" Error "Map for the direction that the device needs (DMA_TO_DEVICE, DMA_FROM_DEVICE, DMA_BIDIRECTIONAL).";
    /// An access to addresses that were never mapped while the trace was read.
    AccessUnmapped "access-unmapped" Error "Compare the address with what the driver wrote into the command, and with the mappings next to it.";
    /// An access of an endpoint that is attached to no domain.
    NoDomain "no-domain" Error "Let no device work while it has no domain: stop it before it is detached.";
    /// A mapping to where the guest has no memory.
    NoMemory "no-memory" Error "Map memory that a device can reach: pages that are there, and not a device's own.";
    /// Addresses of a MAP, LINK or RESERVE that was refused are used all the same.
    RefusalUnnoticed "refusal-unnoticed" Error "Check what dma_map_*() and dma_iova_*() return, and dma_mapping_error().";
    /// Mapped or linked for a command that ended long ago, and still there.
    Leaked "leaked" Error "Unmap or unlink what a command needed when it has ended, after an error too.";
    /// Reserved for a command that ended long ago, and still there.
    ReservationLeaked "reservation-leaked" Error "Free IOVA space when its operation has ended (dma_iova_destroy(), dma_iova_free()).";
    /// Mapped or linked for a command, and never accessed though the command succeeded.
    NeverAccessed "never-accessed" Warning "Map what the device needs; or the device moved fewer bytes than it was told.";
    /// Reserved and released, and nothing was linked in between.
    NeverLinked "never-linked" Info "Nothing, if the driver reserves for later on purpose.";
    /// Unmapped, unlinked or released late after the command that it was for.
    UnlinkedLate "unlinked-late" Info "Until then the device can reach the memory: unmap in the completion path, in strict mode.";
    /// Adjacent addresses mapped one by one.
    PageAtATime "page-at-a-time" Info "Map in two steps: one LINK carries up to 512 runs of pages.";
    /// The driver kicks once for each mapping.
    KickPerMapping "kick-per-mapping" Info "Let requests wait on the queue for the next one that must be waited for (iotlb_sync_map).";
}

/// A breach of a rule.
#[derive(Clone, Debug)]
pub struct Breach {
    /// What happened.
    pub text: String,
    /// The numbers of the events that show it.
    pub evidence: Vec<u64>,
    /// The tag of the operation; 0 if there is none.
    pub tag: u64,
}

/// The breaches of a rule by an endpoint.
#[derive(Clone, Debug)]
pub struct Finding {
    /// The rule.
    pub rule: Rule,
    /// The endpoint, if the trace says whose it is.
    pub endpoint: Option<u32>,
    /// How many there are.
    pub count: u64,
    /// The first of them, at least one.
    pub examples: Vec<Breach>,
}

/// Breaches that are kept of each finding.
const EXAMPLES: usize = 5;

impl Finding {
    /// It under stable names; `evidence`, `text` and `tag` are those of the first example.
    pub fn to_json(&self) -> Value {
        let examples: Vec<_> = self.examples.iter().map(Breach::to_json).collect();
        let mut value = examples.first().cloned().unwrap_or_default();
        value["id"] = self.rule.id().into();
        value["severity"] = self.rule.severity().name().into();
        value["endpoint"] = self.endpoint.into();
        value["count"] = self.count.into();
        value["todo"] = self.rule.todo().into();
        value["examples"] = examples.into();
        value
    }
}

impl Breach {
    fn to_json(&self) -> Value {
        json!({ "text": self.text, "evidence": self.evidence, "tag": format!("{:#x}", self.tag) })
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} {}: {}", self.rule.severity().name(), self.rule.id(), times(self.count))?;
        for Breach { text, evidence, .. } in self.examples.iter().take(2) {
            let events: Vec<_> = evidence.iter().map(u64::to_string).collect();
            writeln!(f, "    {text} (events {})", events.join(", "))?;
        }
        writeln!(f, "    To do: {}", self.rule.todo())
    }
}

fn times(count: u64) -> String {
    if count == 1 { "once".into() } else { format!("{count} times") }
}

/// The findings of a trace, one for each rule and endpoint.
#[derive(Debug, Default)]
pub struct Findings(BTreeMap<(Reverse<Severity>, Rule, Option<u32>), Finding>);

impl Findings {
    /// Notes a breach. Only of the first few of a finding `breach` is called.
    pub fn add(&mut self, rule: Rule, endpoint: Option<u32>, breach: impl FnOnce() -> Breach) {
        let new = || Finding { rule, endpoint, count: 0, examples: Vec::new() };
        let finding = self.0.entry((Reverse(rule.severity()), rule, endpoint)).or_insert_with(new);
        finding.count += 1;
        if finding.examples.len() < EXAMPLES {
            finding.examples.push(breach());
        }
    }

    /// Forgets the breaches of a rule.
    pub fn remove(&mut self, rule: Rule) {
        self.0.retain(|(_, other, _), _| *other != rule);
    }

    /// All, the worst first.
    pub fn into_vec(self) -> Vec<Finding> {
        self.0.into_values().collect()
    }
}

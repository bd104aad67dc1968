//! The interface of a workload.

use anyhow::Result;

use crate::results::Results;

/// Modules that every guest loads. The IOMMU's driver is the first: an endpoint that binds before it would do its DMA
/// untranslated.
const EVERY: [&str; 2] = ["virtio_iommu", "nvme"];

/// A workload with its arguments.
pub trait Workload: clap::Args {
    /// What it needs besides what every guest has.
    const NEEDS: Needs = Needs::NOTHING;

    /// Runs the workload.
    ///
    /// # Errors
    /// Why it failed; the whole run fails then.
    fn run(&self, results: &mut Results) -> Result<()>;
}

/// What a workload needs in the guest's initramfs.
#[derive(Clone, Copy)]
pub struct Needs {
    /// Kernel modules that are loaded before the first workload runs. Some kernels have them built in.
    pub modules: &'static [&'static str],
    /// The same for modules that some kernels do not have; they are loaded before the others.
    pub optional: &'static [&'static str],
    /// Kernel modules that the workload loads by itself, where the kernel has them.
    pub on_demand: &'static [&'static str],
    /// Programs, of those that `scripts/get-guest-tools` gets.
    pub programs: &'static [&'static str],
}

impl Needs {
    pub const NOTHING: Needs = Needs { modules: &[], optional: &[], on_demand: &[], programs: &[] };
}

/// The modules to load for some workloads, in their order.
pub fn modules(needs: &[Needs]) -> Vec<&'static str> {
    let of_workloads = needs.iter().flat_map(|needs| needs.optional.iter().chain(needs.modules));
    EVERY.iter().chain(of_workloads).copied().collect()
}

/// Prints what an initramfs for all these must have, one item on each line: the kind (`module`; `optional-module`,
/// which only some kernels have; `program`) and the name. Some items come more than once.
pub fn print(needs: &[Needs]) {
    let say = |what: &str, names: &[&str]| names.iter().for_each(|name| println!("{what} {name}"));
    say("module", &EVERY);
    for needs in needs {
        say("module", needs.modules);
        say("optional-module", needs.optional);
        say("optional-module", needs.on_demand);
        say("program", needs.programs);
    }
}

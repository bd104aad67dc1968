//! Each class of DMA that an IOMMU must refuse, made by a real device: the DMA engine, programmed through VFIO.
//!
//! Four pages are mapped, each at an IOVA of its own and with only the rights that its use needs. Each case is one
//! descriptor; afterwards the channel's status and error registers and the memory show what happened.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::buffers::{Buffers, PAGE};
use crate::ioat::{self, DESCRIPTOR, Outcome};
use crate::pattern;
use crate::pci;
use crate::results::Results;
use crate::vfio::{Access, Bar, Function};
use crate::workload::{Needs, Workload};

/// The pages' addresses for the device. Nothing else is mapped.
const CONTROL: u64 = 0x1000_0000;
const SOURCE: u64 = 0x2000_0000;
const DESTINATION: u64 = 0x3000_0000;
/// An address that is not mapped.
const NOWHERE: u64 = 0x6000_0000;
/// Where the completion is written in the control page; the descriptor is at its start.
const COMPLETION: u64 = CONTROL + 0x100;

/// The pages' places in the buffers.
const CONTROL_PAGE: usize = 0;
const SOURCE_PAGE: usize = 1;
const DESTINATION_PAGE: usize = 2;

/// Bytes of a copy.
const SIZE: u32 = 2048;

/// One descriptor, and its expected result.
struct Case {
    name: &'static str,
    source: u64,
    destination: u64,
    descriptor: u64,
    /// A second descriptor, which the first one names as next.
    next: Option<u64>,
    completion: u64,
    /// The channel's error bits; 0: all went well.
    error: u32,
    /// Whether the destination holds the data afterwards.
    copied: bool,
    /// The access that the IOMMU must refuse: its kind, and the first IOVA that cannot be accessed.
    fault: Option<(&'static str, u64)>,
}

const GOOD: Case = Case {
    name: "copy",
    source: SOURCE,
    destination: DESTINATION,
    descriptor: CONTROL,
    next: None,
    completion: COMPLETION,
    error: 0,
    copied: true,
    fault: None,
};

/// A case whose copy is not made; the refused access is at `fault`.
const REFUSED: Case = Case { copied: false, ..GOOD };

/// Refused cases between good ones: a refused access must not harm what comes after it.
const CASES: [Case; 10] = [
    GOOD,
    Case {
        name: "unmapped source",
        source: NOWHERE,
        error: ioat::ERROR_SOURCE,
        fault: Some(("read", NOWHERE)),
        ..REFUSED
    },
    Case {
        name: "unmapped destination",
        destination: NOWHERE,
        error: ioat::ERROR_DESTINATION,
        fault: Some(("write", NOWHERE)),
        ..REFUSED
    },
    Case {
        name: "write to a read-only mapping",
        source: CONTROL,
        destination: SOURCE,
        error: ioat::ERROR_DESTINATION,
        fault: Some(("write", SOURCE)),
        ..REFUSED
    },
    Case {
        name: "read of a write-only mapping",
        source: DESTINATION,
        destination: DESTINATION + SIZE as u64,
        error: ioat::ERROR_SOURCE,
        fault: Some(("read", DESTINATION)),
        ..REFUSED
    },
    Case {
        name: "source past its mapping's end",
        source: SOURCE + PAGE as u64 - 1024,
        error: ioat::ERROR_SOURCE,
        fault: Some(("read", SOURCE + PAGE as u64)),
        ..REFUSED
    },
    Case {
        name: "unmapped first descriptor",
        descriptor: NOWHERE,
        error: ioat::ERROR_CHAIN,
        fault: Some(("read", NOWHERE)),
        ..REFUSED
    },
    Case {
        name: "unmapped next descriptor",
        next: Some(NOWHERE),
        error: ioat::ERROR_NEXT,
        fault: Some(("read", NOWHERE)),
        ..GOOD
    },
    Case {
        name: "unmapped completion",
        completion: NOWHERE,
        error: ioat::ERROR_COMPLETION,
        fault: Some(("write", NOWHERE)),
        ..GOOD
    },
    Case { name: "copy after all these", ..GOOD },
];

/// Drive the DMA engine from a program, through VFIO: good copies, and DMA that must be refused.
#[derive(clap::Args)]
pub struct Args {}

impl Workload for Args {
    const NEEDS: Needs = Needs { modules: &["vfio_pci", "vfio_iommu_type1"], ..Needs::NOTHING };

    /// The workload. Emits one `result` with every case.
    ///
    /// # Errors
    /// Names the cases with a wrong result.
    fn run(&self, results: &mut Results) -> Result<()> {
        let bdf = pci::with_id(ioat::VENDOR, ioat::DEVICE).into_iter().next();
        let bdf =
            bdf.with_context(|| format!("The guest has no DMA engine {:04x}:{:04x}", ioat::VENDOR, ioat::DEVICE))?;
        let mut pages = Buffers::new(3, PAGE, true)?;
        let function = Function::open(&bdf)?;
        for (page, iova, access) in [
            (CONTROL_PAGE, CONTROL, Access::ReadWrite),
            (SOURCE_PAGE, SOURCE, Access::Read),
            (DESTINATION_PAGE, DESTINATION, Access::Write),
        ] {
            // SAFETY: `run_case` takes references to the pages only while the channel is stopped.
            unsafe { function.map(pages.pointer(page), iova, PAGE as u64, access)? };
        }
        let bar = function.bar0()?;
        let mut cases = Vec::new();
        let mut wrong = Vec::new();
        for case in CASES {
            let (report, good) =
                run_case(&case, &bar, &mut pages).with_context(|| format!("Case \"{}\"", case.name))?;
            if !good {
                wrong.push(case.name);
            }
            cases.push(report);
        }
        results.emit("result", json!({ "workload": "vfio-dma", "bdf": bdf, "cases": cases, "wrong": wrong }));
        ensure!(wrong.is_empty(), "DMA with a wrong result: {wrong:?}");
        Ok(())
    }
}

/// Runs one case. Returns what happened, and whether that was right.
fn run_case(case: &Case, bar: &Bar, pages: &mut Buffers) -> Result<(Value, bool)> {
    let first = ioat::copy(SIZE, case.source, case.destination, case.next.unwrap_or(0));
    let count = if case.next.is_some() { 2 } else { 1 };
    // SAFETY: the channel is stopped: it was never started, or the last case ended with it done or halted.
    unsafe {
        pages.contents(CONTROL_PAGE)[..DESCRIPTOR].copy_from_slice(&first);
        pattern::fill(pages.contents(SOURCE_PAGE), SOURCE, 1);
        pattern::poison(pages.contents(DESTINATION_PAGE));
    }
    let outcome = ioat::run_chain(bar, case.descriptor, count, case.completion)?;
    // SAFETY: the channel is done or halted, as `run_chain` waited for.
    let (source_intact, copied) = unsafe {
        let source_intact = pattern::check(pages.contents(SOURCE_PAGE), SOURCE, 1).is_ok();
        (source_intact, pattern::check(&pages.contents(DESTINATION_PAGE)[..SIZE as usize], SOURCE, 1).is_ok())
    };
    let good = source_intact && as_expected(case, outcome, copied);
    let report = json!({
        "case": case.name, "good": good, "state": outcome.status & 7, "chansts": outcome.status,
        "chanerr": outcome.error, "expected_chanerr": case.error, "fault_access": case.fault.map(|(access, _)| access),
        "fault_iova": case.fault.map(|(_, iova)| iova),
        "copied": copied, "expected_copied": case.copied, "source_intact": source_intact,
    });
    Ok((report, good))
}

fn as_expected(case: &Case, outcome: Outcome, copied: bool) -> bool {
    let ended = if case.error == 0 { outcome.is_done() } else { outcome.is_halted() };
    ended && outcome.error == case.error && copied == case.copied
}

//! `viommu report`: a driver that does something wrong on purpose, and what the report of the trace says about it.

use std::fs;
use std::process::{Child, Output};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;
use vfio_user::Client;
use viommu_report::audit::Rule;
use viommu_testkit::engine::Engine;
use viommu_testkit::frontend::split::{Split, link_bytes, range};
use viommu_testkit::frontend::{self, OK, Part, READ, WRITE};
use viommu_testkit::process::viommu;
use viommu_testkit::{memfd, nvme};
use viommu_trace::event::Kind;
use viommu_trace::{Event, Reader, Record, Subscription};
use viommu_wire::split::request_type::{LINK, RELEASE, RESERVE, UNLINK};
use viommu_wire::virtio_iommu::request_type;
use zerocopy::IntoBytes;

const TOPOLOGY: &str = "[[nvme]]\naddress = \"04.0\"\nimage = \"nvme0.img\"\n[[dma-engine]]\naddress = \"05.0\"\n";
const CONTROLLER: u32 = 0x20;
const ENGINE: u32 = 0x28;
const RAM: u64 = 16 << 20;
const PAGE: u64 = 0x1000;

/// Where the engine's descriptor is, mapped to the same address.
const DESCRIPTOR: u64 = 0x10_0000;
const SOURCE: u64 = 0x20_0000;
const TARGET: u64 = 0x30_0000;

/// A daemon, a driver of its IOMMU, and a client that takes the whole trace.
struct Case {
    daemon: Child,
    folder: TempDir,
    driver: frontend::Driver,
    trace: JoinHandle<(Vec<u8>, Vec<Record>)>,
}

impl Case {
    fn new() -> Case {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("topology.toml"), TOPOLOGY).unwrap();
        let arguments = ["--topology", "topology.toml", "--trace-socket", "trace.sock", "--create-images", "16M"];
        let (daemon, _) = crate::serve_on("viommu.sock", folder.path(), &arguments);
        let mut trace = Reader::connect(&folder.path().join("trace.sock"), &Subscription::default()).unwrap();
        let trace = std::thread::spawn(move || {
            let header = trace.header().upgrade().as_bytes().to_vec();
            (header, std::iter::from_fn(|| trace.next_record().unwrap()).collect())
        });
        let mut driver = frontend::Driver::started(&folder.path().join("viommu.sock"), u64::MAX);
        driver.write_bypass(0);
        Case { daemon, folder, driver, trace }
    }

    /// The same with an engine in domain 1, whose descriptor is mapped.
    fn with_engine() -> (Case, Engine) {
        let mut case = Case::new();
        assert_eq!(case.driver.attach(1, ENGINE), OK);
        case.map(DESCRIPTOR, 1, READ);
        let engine = Engine::new(case.client("dma0.sock"), &memfd(RAM), (DESCRIPTOR, DESCRIPTOR));
        (case, engine)
    }

    fn client(&self, socket: &str) -> Client {
        Client::new(&self.folder.path().join(socket)).unwrap()
    }

    /// Maps pages to where they are.
    fn map(&mut self, start: u64, pages: u64, flags: u32) {
        assert_eq!(self.driver.map(1, start, start + (pages * PAGE - 1), start, flags), OK);
    }

    fn unmap(&mut self, start: u64, pages: u64) {
        assert_eq!(self.driver.unmap(1, start, start + (pages * PAGE - 1)), OK);
    }

    /// Ends everything. Returns the report of the trace, with the trace's events.
    fn report(self, engine: Option<Engine>, arguments: &[&str]) -> (Output, Vec<Record>) {
        drop((self.driver, engine));
        crate::end(self.daemon);
        let (mut bytes, records) = self.trace.join().unwrap();
        records.iter().for_each(|record| bytes.extend(record.as_bytes()));
        let file = self.folder.path().join("trace.bin");
        fs::write(&file, bytes).unwrap();
        (viommu().arg("report").arg(file).args(arguments).output().unwrap(), records)
    }

    /// The same as JSON: the finding of this id, and the kinds of the events that show it.
    fn finding(self, engine: Option<Engine>, id: &str) -> (Value, Vec<Shown>) {
        let (output, records) = self.report(engine, &["--json", "--fail-on", id]);
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(3), "{report:#}");
        assert_eq!(report["events"], records.len());
        let finding = report["findings"].as_array().unwrap().iter().find(|finding| finding["id"] == id);
        let finding = finding.unwrap_or_else(|| panic!("{:#}", report["findings"])).clone();
        let shown = |seq: &Value| {
            let record = records.iter().find(|record| record.seq.get() == seq.as_u64().unwrap()).unwrap();
            Shown::of(&Event::decode(record).unwrap())
        };
        let shown = finding["evidence"].as_array().unwrap().iter().map(shown).collect();
        (finding, shown)
    }
}

/// What an event is, as evidence.
#[derive(Debug, PartialEq, Eq)]
enum Shown {
    Request(u8),
    Other(Kind),
}

impl Shown {
    fn of(event: &Event) -> Shown {
        match event {
            Event::Request { request, .. } | Event::Split { request, .. } => Shown::Request(*request),
            event => Shown::Other(event.kind()),
        }
    }
}

const MAP: Shown = Shown::Request(request_type::MAP);
const UNMAP: Shown = Shown::Request(request_type::UNMAP);
const RESERVED: Shown = Shown::Request(RESERVE);
const LINKED: Shown = Shown::Request(LINK);
const UNLINKED: Shown = Shown::Request(UNLINK);
const RELEASED: Shown = Shown::Request(RELEASE);
const FAULT: Shown = Shown::Other(Kind::Fault);
const COMMAND: Shown = Shown::Other(Kind::Command);
const DMA: Shown = Shown::Other(Kind::Dma);

fn assert_said(finding: &Value, words: &[&str]) {
    let text = finding["text"].as_str().unwrap();
    assert!(words.iter().all(|word| text.contains(word)), "{words:?} are not in {text:?}");
}

#[test]
fn a_driver_that_does_everything_right_has_no_findings() {
    let (mut case, mut engine) = Case::with_engine();
    for _ in 0..3 {
        case.map(SOURCE, 1, READ);
        case.map(TARGET, 1, WRITE);
        assert_eq!(engine.copy(SOURCE, TARGET, 4096), Ok(()));
        case.unmap(SOURCE, 1);
        case.unmap(TARGET, 1);
    }
    let (output, records) = case.report(Some(engine), &["--json", "--late", "100000"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(output.status.success());
    assert_eq!(report["findings"], serde_json::json!([]), "{report:#}");
    assert_eq!(
        (&report["requests"]["map"], &report["requests"]["unmap"], &report["faults"]),
        (&7.into(), &6.into(), &0.into())
    );
    let group = &report["flows"]["unspecified"];
    assert_eq!((&group["commands"]["count"], &group["mappings"]["made"]), (&3.into(), &7.into()), "{group:#}");
    assert_eq!(group["accesses"]["read"]["bytes"], 3 * (4096 + 64));
    assert_eq!(group["granules"], serde_json::json!({ "ended": 7, "accessed": 7 }));
    assert_eq!(report["operations"]["ended"], 6);
    let kicks = records.iter().filter(|record| matches!(Event::decode(record), Ok(Event::Kick { .. }))).count();
    assert_eq!(report["kicks"], kicks);
}

#[test]
fn used_after_it_was_unmapped() {
    let (mut case, mut engine) = Case::with_engine();
    case.map(SOURCE, 2, READ);
    case.map(TARGET, 1, WRITE);
    assert_eq!(engine.copy(SOURCE, TARGET, 4096), Ok(()));
    case.unmap(SOURCE, 2);
    assert!(engine.copy(SOURCE + PAGE, TARGET, 64).is_err());
    let (finding, shown) = case.finding(Some(engine), "use-after-unmap");
    assert_eq!(shown, [MAP, UNMAP, FAULT]);
    assert_eq!((&finding["severity"], &finding["endpoint"]), (&"error".into(), &ENGINE.into()));
    assert_said(&finding, &["a read of 0x201000 in domain 1", "0x200000 to 0x201fff was mapped until"]);
}

#[test]
fn used_where_nothing_is_linked() {
    let (mut case, mut engine) = Case::with_engine();
    assert_eq!(case.driver.reserve(SOURCE, SOURCE + 4 * PAGE - 1), OK);
    assert_eq!(case.driver.link(SOURCE, &[(SOURCE, 1)], READ), OK);
    case.map(TARGET, 1, WRITE);
    assert!(engine.copy(SOURCE + PAGE, TARGET, 64).is_err());
    let (finding, shown) = case.finding(Some(engine), "access-in-hole");
    assert_eq!(shown, [RESERVED, FAULT]);
    assert_said(&finding, &["0x201000", "in the reservation of 0x200000 to 0x203fff"]);
}

#[test]
fn used_after_it_was_unlinked_in_a_reservation() {
    let (mut case, mut engine) = Case::with_engine();
    assert_eq!(case.driver.reserve(SOURCE, SOURCE + 4 * PAGE - 1), OK);
    assert_eq!(case.driver.link(SOURCE, &[(SOURCE, 4)], READ), OK);
    assert_eq!(case.driver.unlink(SOURCE + PAGE, SOURCE + 2 * PAGE - 1), OK);
    case.map(TARGET, 1, WRITE);
    assert_eq!(engine.copy(SOURCE + 2 * PAGE, TARGET, 64), Ok(()));
    assert!(engine.copy(SOURCE + PAGE, TARGET, 64).is_err());
    let (finding, shown) = case.finding(Some(engine), "use-after-unmap");
    assert_eq!(shown, [LINKED, UNLINKED, FAULT]);
    assert_said(&finding, &["0x201000 to 0x201fff was linked until"]);
}

#[test]
fn written_through_a_mapping_for_reading() {
    let (mut case, mut engine) = Case::with_engine();
    case.map(SOURCE, 1, READ);
    case.map(TARGET, 1, READ);
    assert!(engine.copy(SOURCE, TARGET, 64).is_err());
    let (finding, shown) = case.finding(Some(engine), "access-denied");
    assert_eq!(shown, [MAP, FAULT]);
    assert_said(&finding, &["a write of 0x300000", "is for reading only"]);
}

#[test]
fn used_a_page_behind_what_is_mapped() {
    let (mut case, mut engine) = Case::with_engine();
    case.map(SOURCE, 1, READ);
    case.map(TARGET, 1, WRITE);
    assert!(engine.copy(SOURCE + PAGE + 8, TARGET, 64).is_err());
    let (finding, shown) = case.finding(Some(engine), "access-unmapped");
    assert_eq!(shown, [FAULT]);
    assert_said(
        &finding,
        &["0x200000 to 0x200fff ends 0x9 bytes before it", "0x300000 to 0x300fff begins 0xfeff8 bytes behind"],
    );
}

#[test]
fn used_without_a_domain() {
    let (mut case, mut engine) = Case::with_engine();
    assert_eq!(case.driver.detach(1, ENGINE), OK);
    assert!(engine.copy(SOURCE, TARGET, 64).is_err());
    let (_, shown) = case.finding(Some(engine), "no-domain");
    assert_eq!(shown, [FAULT]);
}

#[test]
fn mapped_to_where_no_memory_is() {
    let (mut case, mut engine) = Case::with_engine();
    assert_eq!(case.driver.map(1, SOURCE, SOURCE + 0xfff, 1 << 40, READ), OK);
    case.map(TARGET, 1, WRITE);
    assert!(engine.copy(SOURCE, TARGET, 64).is_err());
    let (finding, shown) = case.finding(Some(engine), "no-memory");
    assert_eq!(shown, [MAP, DMA]);
    assert_said(&finding, &["0x200000 leads to where the guest has no memory"]);
}

#[test]
fn a_refusal_that_the_driver_does_not_notice() {
    let (mut case, mut engine) = Case::with_engine();
    case.map(TARGET, 1, WRITE);
    assert_ne!(case.driver.link(SOURCE, &[(SOURCE, 1)], READ), OK, "nothing is reserved there");
    assert!(engine.copy(SOURCE, TARGET, 64).is_err());
    let (finding, shown) = case.finding(Some(engine), "refusal-unnoticed");
    assert_eq!(shown, [LINKED, FAULT]);
    assert_said(&finding, &["the request for 0x200000 to 0x200fff was refused"]);
}

#[test]
fn what_a_command_needed_stays_for_a_second() {
    let (mut case, mut engine) = Case::with_engine();
    assert_eq!(case.driver.reserve(SOURCE, SOURCE + PAGE - 1), OK);
    assert_eq!(case.driver.link(SOURCE, &[(SOURCE, 1)], READ), OK);
    case.map(TARGET, 1, WRITE);
    assert_eq!(engine.copy(SOURCE, TARGET, 4096), Ok(()));
    std::thread::sleep(Duration::from_millis(1100));
    let (output, _) = case.report(Some(engine), &["--json", "--fail-on", "error"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let found: Vec<_> = report["findings"].as_array().unwrap().iter().map(|finding| &finding["id"]).collect();
    assert_eq!(found, ["leaked", "reservation-leaked"], "{report:#}");
    assert_eq!((&report["findings"][0]["count"], output.status.code()), (&2.into(), Some(3)));
}

/// The second page of the data is not where the controller was told.
#[test]
fn mapped_and_never_accessed() {
    let mut case = Case::new();
    assert_eq!(case.driver.attach(1, CONTROLLER), OK);
    case.map(nvme::PAGE, nvme::RAM / PAGE - 1, READ | WRITE);
    let mut driver = nvme::Driver::new(case.client("nvme0.sock"), memfd(nvme::RAM), nvme::PAGE);
    driver.enable();
    driver.create_pair(1, 64, 64);
    let (data, other) = (1 << 32, driver.pages(1));
    let pages = driver.pages(2);
    for page in 0..2 {
        let (start, phys) = (data + page * PAGE, pages + page * PAGE);
        assert_eq!(case.driver.map(1, start, start + (PAGE - 1), phys, READ | WRITE), OK);
    }
    let blocks = (2 * PAGE / 512) as u32;
    assert_eq!(driver.command(1, nvme::io(2, 0, blocks, [data, other])).status, 0);
    case.unmap(data, 2);
    drop(driver);
    let (finding, shown) = case.finding(None, "never-accessed");
    assert_eq!(shown, [MAP, COMMAND, UNMAP]);
    assert_eq!(finding["count"], 1);
    assert_said(&finding, &["0x100001000 to 0x100001fff in domain 1 was mapped and not accessed"]);
}

#[test]
fn reserved_for_nothing() {
    let (mut case, engine) = Case::with_engine();
    assert_eq!(case.driver.reserve(SOURCE, SOURCE + PAGE - 1), OK);
    assert_eq!(case.driver.release(SOURCE, SOURCE + PAGE - 1), OK);
    let (_, shown) = case.finding(Some(engine), "never-linked");
    assert_eq!(shown, [RESERVED, RELEASED]);
}

#[test]
fn unmapped_late() {
    let (mut case, mut engine) = Case::with_engine();
    case.map(SOURCE, 1, READ);
    case.map(TARGET, 1, WRITE);
    assert_eq!(engine.copy(SOURCE, TARGET, 4096), Ok(()));
    std::thread::sleep(Duration::from_millis(2));
    case.unmap(SOURCE, 1);
    let (_, shown) = case.finding(Some(engine), "unlinked-late");
    assert_eq!(shown, [COMMAND, UNMAP]);
}

#[test]
fn pages_are_mapped_one_by_one_each_with_a_kick() {
    let (mut case, engine) = Case::with_engine();
    (0..80).for_each(|page| case.map(SOURCE + page * PAGE, 1, READ));
    let (output, _) = case.report(Some(engine), &["--fail-on", "warning"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}");
    assert!(text.contains("80 MAPs of adjacent addresses; LINKs that could have carried them: 1"), "{text}");
    assert!(text.contains("79 of 80 MAPs of adjacent addresses had a kick of their own"), "{text}");
}

/// NVMe's tags are made of queue and command, so that the steps of an operation are found by them.
#[test]
fn an_operation_is_one_chain() {
    let mut case = Case::new();
    assert_eq!(case.driver.attach(1, CONTROLLER), OK);
    case.map(nvme::PAGE, nvme::RAM / PAGE - 1, READ | WRITE);
    let mut driver = nvme::Driver::new(case.client("nvme0.sock"), memfd(nvme::RAM), nvme::PAGE);
    driver.enable();
    driver.create_pair(1, 64, 64);
    let page = driver.pages(1);
    let data = 1_u64 << 32;
    let id = driver.put(1, nvme::io(2, 0, 8, [data, 0]));
    let tag = 1 << 56 | 1 << 16 | u64::from(id);
    assert_eq!(case.driver.request(&range(RESERVE, 1, data, data + 0xfff, tag)), OK);
    let link = link_bytes(1, data, &[(page, 1)], WRITE, tag);
    assert_eq!(case.driver.transact(&[Part::R(link), Part::W(4)]).status(), OK);
    driver.ring(1);
    assert_eq!(driver.wait(1).status, 0);
    assert_eq!(case.driver.request(&range(RELEASE, 1, data, data + 0xfff, tag)), OK);
    drop(driver);
    let (output, _) = case.report(None, &["--json", "--by", "tag"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let operation = &report["operations"]["slowest"][0];
    let steps: Vec<_> = operation["events"].as_array().unwrap().iter().map(|event| &event["step"]).collect();
    assert_eq!(steps, ["reserve", "link", "first access", "last access", "completion", "release"], "{report:#}");
    assert_eq!(operation["tag"], format!("{tag:#x}"));
    let groups = report["groups"].as_array().unwrap();
    let group = groups.iter().find(|group| group["of"]["tag"] == format!("{tag:#x}")).unwrap();
    assert_eq!((&group["commands"]["count"], &group["requests"]["link"]["count"]), (&1.into(), &1.into()), "{group:#}");
}

#[test]
fn what_is_no_trace_and_what_is_unknown_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "no trace\n").unwrap();
    for (arguments, words) in [
        (&["report", "file"] as &[&str], "Nothing of file can be read"),
        (&["report", "missing"], "missing"),
        (&["report", "file", "--by", "colour"], "possible values: endpoint, flow, tag, size"),
        (&["report", "file", "--fail-on", "leak"], "leaked"),
        (&["report", "file", "--late", "soon"], "a number of milliseconds"),
    ] {
        let output = viommu().args(arguments).current_dir(folder.path()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(words), "{arguments:?}: {said}");
    }
}

/// docs/findings.md has a section for each finding, which begins with its severity.
#[test]
fn the_document_has_every_finding() {
    let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/findings.md")).unwrap();
    let sections: Vec<&str> = text.split("\n### ").skip(1).collect();
    let found: Vec<_> = sections.iter().map(|section| section.lines().next().unwrap()).collect();
    assert_eq!(found, Rule::ALL.iter().map(|rule| rule.id()).collect::<Vec<_>>());
    for (section, rule) in sections.iter().zip(Rule::ALL) {
        let severity = section.lines().nth(2).unwrap().split('.').next().unwrap();
        assert_eq!(severity.to_lowercase(), rule.severity().name(), "{}", rule.id());
    }
}

#[test]
fn findings_are_test_results_too() {
    let (mut case, engine) = Case::with_engine();
    assert_eq!(case.driver.reserve(SOURCE, SOURCE + PAGE - 1), OK);
    assert_eq!(case.driver.release(SOURCE, SOURCE + PAGE - 1), OK);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("junit.xml");
    let (output, _) = case.report(Some(engine), &["--junit", file.to_str().unwrap(), "--fail-on", "info"]);
    assert_eq!(output.status.code(), Some(3));
    let xml = fs::read_to_string(file).unwrap();
    assert!(
        xml.contains("failures=\"1\"")
            && xml.contains("<testcase name=\"never-linked\"><failure>info never-linked: once"),
        "{xml}"
    );
    assert!(xml.contains("<testcase name=\"leaked\"/>"), "{xml}");
}

//! The controller's events in the trace.

use crate::nvme::{READ, WRITE};
use viommu::iommu::Request;
use viommu_testkit::folders;
use viommu_testkit::nvme::{CC_ENABLED, ENDPOINT, PAGE, RAM, Setup, Sqe, io};
use viommu_testkit::trace::Recorder;
use viommu_trace::Event;
use viommu_trace::Kind;
use viommu_trace::event::{Access, Channel, ResetKind, Route};
use viommu_wire::model::Model;
use viommu_wire::nvme::{Command, DataPointer};
use viommu_wire::virtio_iommu::{Attach, Head, Map, MapFlags, Status, request_type};
use zerocopy::IntoBytes;

/// Checks the events of a bad read and a good write in a session, and those around them.
#[test]
fn every_step_is_traced() {
    let (recorder, tracer) = Recorder::start(&[]);
    let setup = Setup::traced(1 << 20, tracer, |_| {});
    let mut driver = setup.ready();
    let buffer = driver.pages(2);
    let pair = &driver.queues[&1];
    let (sq, cq) = (pair.sq, pair.cq);
    assert_eq!(driver.command(1, io(WRITE, 5, 16, [buffer, buffer + PAGE])).status, 0);
    assert_eq!(driver.command(1, Sqe { flags: 1 << 6, ..io(READ, 7, 1, [RAM, 512]) }).status, 0x04);
    driver.client.reset().unwrap();
    drop(driver);
    drop(setup);
    let events = recorder.end();
    let (channel, endpoint) = (Channel::VfioUser, Some(ENDPOINT));
    assert_eq!(events.first(), Some(&Event::Session { channel, endpoint, connected: true }));
    assert_eq!(events.last(), Some(&Event::Session { channel, endpoint, connected: false }));
    for added in [true, false] {
        let memory = Event::Memory { channel, endpoint, added, gpa: 0, len: RAM, writable: true };
        assert!(events.contains(&memory), "{memory:?}");
    }
    assert!(events.contains(&Event::Reset { reset: ResetKind::Function, endpoint }));
    let states = events.iter().filter_map(|event| match event {
        Event::Device { endpoint: ENDPOINT, model: Model::Nvme, state } => Some(*state),
        _ => None,
    });
    assert_eq!(states.collect::<Vec<u64>>(), [1 << 32 | u64::from(CC_ENABLED), 0]);
    // From the fetch of the write to the interrupt of the read.
    let dma = |access, iova, len| Event::Dma {
        endpoint: ENDPOINT,
        access,
        route: Route::Bypass,
        failed: iova == RAM,
        iova,
        gpa: iova,
        len,
        domain: 0,
        tag: 0,
    };
    let from = events.iter().position(|event| *event == dma(Access::Read, sq, 64)).unwrap();
    let commands = events[from..].iter().map(|event| match *event {
        Event::Command { endpoint, model, queue, opcode, id: _, status, len, duration, part } => {
            assert!(duration > 0);
            Event::Command { endpoint, model, queue, opcode, id: 0, status, len, duration: 0, part }
        }
        other => other,
    });
    let command = |opcode, status, pointer, slba, data, len| Event::Command {
        endpoint: ENDPOINT,
        model: Model::Nvme,
        queue: 1,
        opcode,
        id: 0,
        status,
        len,
        duration: 0,
        part: Command { slba, pointer, data }.into(),
    };
    let expected = [
        dma(Access::Read, sq, 64),
        dma(Access::Read, buffer, 8192),
        command(WRITE, 0, DataPointer::Prp, 5, buffer, 8192),
        dma(Access::Write, cq, 16),
        Event::Interrupt { endpoint, vector: 1 },
        dma(Access::Read, sq + 64, 64),
        dma(Access::Write, RAM, 512),
        command(READ, 0x4004, DataPointer::Sgl, 7, RAM, 512),
        dma(Access::Write, cq + 16, 16),
        Event::Interrupt { endpoint, vector: 1 },
    ];
    assert_eq!(commands.take(expected.len()).collect::<Vec<Event>>(), expected);
}

/// Makes the IOMMU execute a request.
fn request(setup: &Setup, bytes: &[u8]) {
    let iommu = setup.iommu();
    assert_eq!(iommu.execute(&Request::parse(bytes, iommu.features()).unwrap(), &mut []).status, Status::Ok);
}

/// The trace has an event for each contiguous run of pages that a transfer accesses, no matter how the controller
/// accesses its image, and one for a refused access.
#[test]
fn the_pages_of_a_transfer_are_traced_wherever_the_image_is() {
    const DOMAIN: u32 = 3;
    for folder in folders() {
        let folder = tempfile::tempdir_in(folder).unwrap();
        let (recorder, tracer) = Recorder::start(&[Kind::Dma, Kind::Fault, Kind::Command]);
        let setup = Setup::traced(1 << 20, tracer, |config| config.image = folder.path().join("disk.img"));
        let mut driver = setup.ready();
        let (list, base) = (driver.pages(1), driver.pages(8));
        // Queues and lists stay where they are. The data's addresses are above all memory, and two of its pages are
        // adjacent.
        let data = [base, base + PAGE, base + 5 * PAGE, base + 3 * PAGE];
        let at = |page: u64| RAM + page * PAGE;
        let attach = Attach {
            head: head(request_type::ATTACH),
            domain: DOMAIN.into(),
            endpoint: ENDPOINT.into(),
            ..Attach::default()
        };
        request(&setup, attach.as_bytes());
        let maps =
            [(0, base - 1, 0)].into_iter().chain((0..).zip(data).map(|(page, gpa)| (at(page), at(page + 1) - 1, gpa)));
        for (start, end, phys) in maps {
            let map = Map {
                head: head(request_type::MAP),
                domain: DOMAIN.into(),
                virt_start: start.into(),
                virt_end: end.into(),
                phys_start: phys.into(),
                flags: (MapFlags::READ | MapFlags::WRITE).bits().into(),
            };
            request(&setup, map.as_bytes());
        }
        driver.write_words(list, &[at(1), at(2), at(3), at(4)]);
        for (opcode, blocks, status) in [(WRITE, 32, 0), (READ, 32, 0), (WRITE, 40, 4), (READ, 40, 4)] {
            assert_eq!(driver.command(1, io(opcode, 0, blocks, [at(0), list])).status, status);
        }
        drop(driver);
        drop(setup);
        let events = recorder.end().into_iter().filter_map(|event| match event {
            Event::Dma {
                access, route: Route::Mapped, failed: false, iova, gpa, len, domain: DOMAIN, tag: 0, ..
            } => (iova >= RAM).then_some((Some(access), iova, gpa, len)),
            Event::Fault { address, domain: Some(DOMAIN), .. } => Some((None, address, 0, 0)),
            _ => None,
        });
        let pages = |access, count| {
            let all = [(0, base, 2 * PAGE), (2, data[2], PAGE), (3, data[3], PAGE)];
            all.map(|(page, gpa, len)| (Some(access), at(page), gpa, len as u32)).into_iter().take(count)
        };
        let refused = (None, at(4), 0, 0);
        let whole = [Access::Read, Access::Write].map(|access| pages(access, 3)).into_iter().flatten();
        let partly =
            [Access::Read, Access::Write].map(|access| pages(access, 3).chain([refused])).into_iter().flatten();
        assert_eq!(events.collect::<Vec<_>>(), whole.chain(partly).collect::<Vec<_>>(), "{folder:?}");
    }
}

fn head(kind: u8) -> Head {
    Head { kind, ..Head::default() }
}

/// An asynchronous event request is traced like any other command, no matter how long it waits, and so is an aborted
/// one.
#[test]
fn event_requests_are_traced_when_they_are_completed() {
    const AER: Sqe = Sqe { opcode: 0x0c, flags: 0, nsid: 0, data: [0; 2], cdw10: 0, cdw11: 0, cdw12: 0, cdw13: 0 };
    let (recorder, tracer) = Recorder::start(&[Kind::Command]);
    let setup = Setup::traced(1 << 20, tracer, |_| {});
    let mut driver = setup.ready();
    let (first, second) = (driver.put(0, AER), driver.put(0, AER));
    driver.ring(0);
    driver.identify(1, 0, 0).unwrap();
    // A doorbell of a queue that does not exist.
    driver.write32(0x1000 + 8 * 5, 1);
    assert_eq!(driver.wait(0).cid, first);
    let abort = driver.put(0, Sqe { opcode: 8, cdw10: u32::from(second) << 16, ..Sqe::default() });
    driver.ring(0);
    assert_eq!((driver.wait(0).cid, driver.wait(0).cid), (second, abort));
    drop(driver);
    drop(setup);
    let commands = recorder.end().into_iter().filter_map(|event| match event {
        Event::Command { queue: 0, opcode, id, status, len, duration, part, .. } => {
            assert!(duration > 0);
            Some((opcode, id as u16, status, Command::from(part).pointer, len))
        }
        _ => None,
    });
    let nothing = DataPointer::None;
    let mut commands: Vec<_> = commands.collect();
    // The commands that made the controller ready are not checked.
    assert_eq!(
        commands.split_off(commands.len() - 4),
        [
            (6, abort - 1, 0, DataPointer::Prp, 4096),
            (0x0c, first, 0, nothing, 0),
            (0x0c, second, 0x07, nothing, 0),
            (8, abort, 0, nothing, 0),
        ]
    );
}

#[test]
fn register_accesses_are_traced_for_clients_that_ask() {
    let (recorder, tracer) = Recorder::start(&[Kind::Mmio]);
    let (other, all) = Recorder::start(&[]);
    for tracer in [tracer, all] {
        let setup = Setup::traced(1 << 20, tracer, |_| {});
        drop(setup.ready());
    }
    let accesses = recorder.end();
    let enable = |event: &&Event| match **event {
        Event::Mmio {
            endpoint: ENDPOINT,
            model: Model::Nvme,
            access: Access::Write,
            bar: 0,
            offset,
            register,
            len: 4,
            value,
        } => (offset, register, value) == (0x14, 0x14, CC_ENABLED.into()),
        _ => false,
    };
    assert_eq!(accesses.iter().filter(enable).count(), 1, "{accesses:?}");
    let doorbell =
        |event: &&Event| matches!(event, Event::Mmio { access: Access::Write, register: 0x1000, value: 1, .. });
    assert!(accesses.iter().any(|event| doorbell(&event)), "{accesses:?}");
    let is_mmio = |event: &Event| matches!(event, Event::Mmio { .. });
    assert!(accesses.iter().all(is_mmio) && !other.end().iter().any(is_mmio));
}

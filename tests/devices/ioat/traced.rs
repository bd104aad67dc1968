//! The engine's events in the trace.

use crate::ioat::setup::*;
use viommu_testkit::engine::*;
use viommu_testkit::trace::Recorder;
use viommu_trace::Event;
use viommu_trace::Kind;
use viommu_trace::event::{Access, Route};
use viommu_wire::ioat::Command;
use viommu_wire::model::Model;
use viommu_wire::virtio_iommu::*;

#[test]
fn descriptors_accesses_and_states_are_traced() {
    let (recorder, tracer) = Recorder::start(&[Kind::Command, Kind::Device, Kind::Dma, Kind::Fault]);
    let setup = Setup::traced(tracer);
    let mut engine = setup.engine();
    setup.attach_with_low_pages();
    assert_eq!(engine.copy(0x8000, 0x9000, 0x1000), Ok(()));
    assert_eq!(engine.copy(0x8000, 0x8000_0000, 8), Err(chanerr::DESTINATION));
    drop(engine);
    drop(setup);
    let events = recorder.end();

    let access = |access, iova, len| {
        let route = Route::Mapped;
        Event::Dma { endpoint: ENDPOINT, access, route, failed: false, iova, gpa: iova, len, domain: 1, tag: 0 }
    };
    let command = |status, data, len| Event::Command {
        endpoint: ENDPOINT,
        model: Model::Ioat,
        queue: 0,
        opcode: 0,
        id: 0,
        status,
        len,
        duration: 0,
        part: Command { source: 0x8000, destination: data }.into(),
    };
    let state = |state| Event::Device { endpoint: ENDPOINT, model: Model::Ioat, state };
    let fault = Event::Fault {
        endpoint: ENDPOINT,
        reason: FaultReason::Mapping as u8,
        access: Access::Write,
        address: 0x8000_0000,
        domain: Some(1),
        dropped: false,
    };
    let expected = [
        state(ACTIVE),
        access(Access::Read, RING, 64),
        access(Access::Read, 0x8000, 0x1000),
        access(Access::Write, 0x9000, 0x1000),
        command(0, 0x9000, 0x1000),
        access(Access::Read, RING, 64),
        access(Access::Read, 0x8000, 8),
        fault,
        command(chanerr::DESTINATION, 0x8000_0000, 8),
        state(u64::from(chanerr::DESTINATION) << 32 | HALTED),
        state(HALTED),
    ];
    let events: Vec<Event> = events
        .into_iter()
        .map(|event| match event {
            // The duration may be anything.
            Event::Command { endpoint, model, queue, opcode, id, status, len, duration, part } => {
                assert!(duration > 0);
                Event::Command { endpoint, model, queue, opcode, id, status, len, duration: 0, part }
            }
            event => event,
        })
        .collect();
    assert_eq!(events, expected);
}

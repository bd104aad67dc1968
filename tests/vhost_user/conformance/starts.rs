//! Queues that start and stop all the time, while kicks are on their way to the thread that has to notice the starts.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use viommu_testkit::frontend::*;
use viommu_testkit::trace::Recorder;
use viommu_testkit::{Numbers, StopOnDrop};
use viommu_trace::Event;
use viommu_trace::Kind;
use viommu_trace::event::ResetKind;
use vmm_sys_util::eventfd::EventFd;

const ROUNDS: u64 = 400;

/// Kicks without a pause until `done`.
fn kick(kicks: &[EventFd], done: &AtomicBool) {
    while !done.load(Ordering::Relaxed) {
        kicks.iter().for_each(|kick| kick.write(1).unwrap());
        thread::yield_now();
    }
}

/// Checks the events of each queue: its starts and stops alternate, and it starts where it stopped or at 0.
fn check_queues(events: &[Event]) -> HashMap<(u8, bool), u64> {
    let mut counts = HashMap::new();
    let mut last = [None; 2];
    for event in events {
        let Event::Queue { queue, started, index, .. } = *event else { continue };
        let before = last[usize::from(queue)].replace((started, index));
        match before {
            None => assert!(started, "queue {queue} stops before it starts"),
            Some((was_started, at)) => {
                assert_ne!(was_started, started, "queue {queue} has the same event twice, at {at} and at {index}");
                assert!(!started || [0, at].contains(&index), "queue {queue} stopped at {at} and starts at {index}");
            }
        }
        *counts.entry((queue, started)).or_insert(0) += 1;
    }
    counts
}

#[test]
fn a_queue_that_is_stopped_while_its_start_is_seen_is_known_to_be_stopped() {
    let (recorder, tracer) = Recorder::start(&[Kind::Queue, Kind::Reset, Kind::Request]);
    let device = Device::traced(|_| {}, tracer);
    let mut driver = Driver::new(&device);
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    let (mut resets, mut answered) = (0, 0);
    for round in 0..ROUNDS {
        // A state that is to be kept, or to be dropped.
        assert_eq!(driver.attach(1, EP), OK, "round {round}");
        answered += 1;
        let reset = numbers.below(3) == 0;
        let mut stopped = driver.stop_queues();
        if reset {
            driver.clear_queues();
            stopped = [0; 2];
            resets += 1;
        }
        // This request is done once, no matter in which start it is seen.
        let (head, writable) = driver.add(REQUESTS, &[Part::R(detach(1, EP).bytes()), Part::W(4)]);
        let kicks: Vec<_> = driver.queues.iter().map(|queue| queue.kick.try_clone().unwrap()).collect();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let _end = StopOnDrop(&done);
            scope.spawn(|| kick(&kicks, &done));
            for _ in 0..numbers.below(4) {
                driver.resume_queues(stopped);
                // At once, or after some steps of the other thread.
                (0..numbers.below(20)).for_each(|_| thread::yield_now());
                stopped = driver.stop_queues();
            }
            driver.resume_queues(stopped);
            let (used, len) = driver.wait_used(REQUESTS);
            assert_eq!(used, head);
            let expected = if reset { INVAL } else { OK };
            assert_eq!(driver.collect(len, &writable).status(), expected, "round {round}, reset: {reset}");
        });
        answered += 1;
    }
    driver.stop_queues();
    // A reset of the machine now is recognized, since the queues are known to be stopped.
    device.control.function_reset();
    drop(driver);
    drop(device);
    let events = recorder.end();
    let counts = check_queues(&events);
    assert_eq!(counts.len(), 4, "{counts:?}");
    for queue in 0..2 {
        assert_eq!(counts[&(queue, true)], counts[&(queue, false)], "queue {queue}");
    }
    let kinds = |wanted| events.iter().filter(|e| matches!(e, Event::Reset { reset, .. } if *reset == wanted)).count();
    println!("{counts:?}; {} resets, {} pauses", kinds(ResetKind::Device), kinds(ResetKind::Resume));
    // Some resets are reported twice: a queue that stopped at 0 and starts there may have been reset.
    assert!(kinds(ResetKind::Device) >= resets && kinds(ResetKind::Resume) > 0);
    assert_eq!(kinds(ResetKind::System), 1);
    assert_eq!(events.iter().filter(|event| matches!(event, Event::Request { .. })).count(), answered);
}

//! Tests that every model in MODELS must pass. Nothing here names a model: `drivers` has a driver for each.

mod drivers;
mod held;
mod runs;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use drivers::{Load, set_bus_master};
use held::Held;
use serde_json::json;
use tempfile::TempDir;
use viommu::devices::{Device, MODELS, Model};
use viommu::topology::Topology;
use viommu_testkit::function::Served;
use viommu_testkit::trace::Recorder;
use viommu_testkit::{Numbers, PATIENCE, StopOnDrop};
use viommu_trace::Kind;

const ENDPOINT: u32 = 0x20;

/// Opens an endpoint of a model in a folder of its own, configured as the example in MODELS.
fn open(model: &Model) -> (Arc<dyn Device>, TempDir) {
    static FOLDER: Mutex<()> = Mutex::new(());
    let dir = tempfile::tempdir().unwrap();
    let topology = Topology::of_endpoint(&format!("{},address=04.0,{}", model.name, model.example)).unwrap();
    // File names are relative to the working directory, which all tests share.
    let folder = FOLDER.lock().unwrap();
    std::env::set_current_dir(dir.path()).unwrap();
    let device = topology.endpoints[0].configuration.open(Some(16 << 20)).unwrap();
    drop(folder);
    (device, dir)
}

/// A model on a socket, its driver, and the test's access to it.
struct Machine {
    load: Box<dyn Load>,
    held: Held,
    _served: Served,
    _dir: TempDir,
}

impl Machine {
    /// Lets the model work from beginning to end, to show that it is in order.
    fn work(&mut self) {
        self.load.begin();
        self.load.submit();
        self.load.finish();
    }
}

/// Runs a test with each model; none of its threads may panic.
fn on_each(test: impl Fn(Machine)) {
    for model in MODELS {
        eprintln!("{}", model.name);
        let (recorder, tracer) = Recorder::start(&[Kind::Panic]);
        let (device, dir) = open(model);
        let (held, served) = Held::serve(device, ENDPOINT, tracer);
        let load = (drivers::of(model.name).load)(served.client());
        test(Machine { load, held, _served: served, _dir: dir });
        assert_eq!(recorder.end(), [], "{} panicked", model.name);
    }
}

/// Keeps a model busy, and does something repeatedly meanwhile. All of the driver's work must end correctly.
fn under_load(machine: Machine, times: u32, mut act: impl FnMut(&Held)) {
    let Machine { mut load, held, _served, _dir } = machine;
    let (done, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let driver = scope.spawn(|| {
            load.begin();
            while !done.load(Ordering::Acquire) {
                load.submit();
                load.finish();
                rounds.fetch_add(1, Ordering::AcqRel);
            }
            // Repeated until the client has left.
            drop(load);
        });
        let end = StopOnDrop(&done);
        for _ in 0..times {
            let (before, begun) = (rounds.load(Ordering::Acquire), Instant::now());
            while rounds.load(Ordering::Acquire) == before {
                assert!(!driver.is_finished() && begun.elapsed() < PATIENCE, "the driver makes no progress");
                thread::yield_now();
            }
            act(&held);
        }
        drop(end);
        driver.join().unwrap();
    });
}

/// Checks that nothing is moved for a while: as long as a running device takes for many accesses.
fn assert_no_traffic(held: &Held) {
    let before = held.traffic();
    for _ in 0..200 {
        thread::yield_now();
        assert_eq!(held.traffic(), before);
    }
}

#[test]
fn a_model_quiesced_under_load_moves_nothing_until_it_resumes() {
    on_each(|machine| {
        under_load(machine, 30, |held| {
            held.quiesce();
            held.quiesce();
            assert_no_traffic(held);
            held.resume();
            held.resume();
        });
    });
}

#[test]
fn another_model_continues_from_a_saved_state_at_any_point_of_a_run() {
    on_each(|machine| {
        let mut numbers = Numbers(1);
        under_load(machine, 50, |held| {
            (0..numbers.below(50)).for_each(|_| thread::yield_now());
            held.migrate();
        });
    });
}

#[test]
fn a_reset_at_any_moment_ends_all_work() {
    on_each(|mut machine| {
        let mut numbers = Numbers(2);
        for round in 0..30 {
            machine.load.begin();
            machine.load.submit();
            (0..numbers.below(50)).for_each(|_| thread::yield_now());
            if round % 3 == 0 {
                machine.held.quiesce();
            }
            machine.held.reset();
            assert_no_traffic(&machine.held);
            machine.held.resume();
            assert_no_traffic(&machine.held);
        }
        machine.work();
    });
}

#[test]
fn without_bus_mastering_nothing_is_moved_and_a_reset_restores_the_model() {
    on_each(|mut machine| {
        for before_the_work in [true, false] {
            machine.load.begin();
            if before_the_work {
                set_bus_master(machine.load.client(), false);
                let traffic = machine.held.traffic();
                machine.load.submit();
                assert_no_traffic(&machine.held);
                assert_eq!(machine.held.traffic(), traffic);
            } else {
                machine.load.submit();
                set_bus_master(machine.load.client(), false);
                // Accesses that were in progress are over when the model is at rest.
                machine.held.quiesce();
                machine.held.resume();
                assert_no_traffic(&machine.held);
            }
            machine.load.client().reset().unwrap();
            machine.work();
            machine.load.client().reset().unwrap();
        }
    });
}

#[test]
fn a_model_survives_junk_in_every_register_and_can_be_saved() {
    on_each(|mut machine| {
        let size = machine.load.client().region(0).unwrap().size;
        for seed in 1..=20 {
            let mut numbers = Numbers(seed);
            machine.load.begin();
            machine.load.submit();
            for _ in 0..150 {
                let len = 1 << numbers.below(4);
                // Mostly where registers are.
                let end = if numbers.below(4) == 0 { size } else { size.min(0x100) };
                let offset = numbers.below(end - len);
                let offset = if numbers.below(3) == 0 { offset } else { offset & !(len - 1) };
                let junk = numbers.below(u64::MAX) >> (numbers.below(8) * 8);
                let client = machine.load.client();
                client.region_write(0, offset, &junk.to_le_bytes()[..len as usize]).unwrap();
                client.region_read(0, offset, &mut [0; 8][..len as usize]).unwrap();
            }
            machine.held.migrate();
            machine.load.client().reset().unwrap();
            machine.work();
            machine.load.client().reset().unwrap();
        }
    });
}

#[test]
fn a_state_of_another_version_is_refused_and_leaves_a_device_that_works() {
    on_each(|mut machine| {
        machine.load.begin();
        machine.load.submit();
        machine.held.quiesce();
        for (key, value) in [("version", json!(u32::MAX)), ("model", json!("other")), ("value", json!({}))] {
            let mut state = machine.held.save();
            let before = state[key].take();
            state[key] = value.clone();
            let refused = machine.held.load(state).unwrap_err();
            // The message has what was found and what was expected.
            let told = if key == "value" { [json!("cannot"), json!("be read")] } else { [value, before] };
            for told in told.map(|told| told.to_string()) {
                assert!(refused.contains(told.trim_matches('"')), "{told} is not in the message: {refused}");
            }
        }
        machine.held.resume();
        machine.load.client().reset().unwrap();
        machine.work();
    });
}

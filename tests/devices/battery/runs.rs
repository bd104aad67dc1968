//! Random runs of each model: a run in which the state is moved into another model at some points has the same results
//! as a run without that.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use viommu::devices::{MODELS, Model};
use viommu_trace::Tracer;

use super::drivers::{self, Moves, Seen, Step};
use super::held::Held;
use super::{ENDPOINT, open};

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = (any::<u8>(), any::<u16>(), 0u8..8).prop_map(|(what, value, moved)| Step { what, value, moved });
    prop::collection::vec(step, 1..25)
}

/// Does these steps, and moves the state as they say or not at all. Returns what the driver sees.
fn run(model: &Model, steps: &[Step], is_moved: bool) -> Vec<Seen> {
    let (device, _dir) = open(model);
    let (held, served) = Held::serve(device, ENDPOINT, Tracer::default());
    let mut run = (drivers::of(model.name).run)(served.client());
    let moves = Moves(is_moved.then_some(&held));
    let step = |step: &Step| {
        moves.at(step, 0);
        let seen = run.step(step, &moves);
        moves.at(step, 2);
        seen
    };
    steps.iter().map(step).collect()
}

#[test]
fn each_model_continues_from_a_saved_state_as_if_nothing_had_happened() {
    for model in MODELS {
        let mut runner = TestRunner::new(Config { cases: 24, failure_persistence: None, ..Config::default() });
        let same = runner.run(&steps(), |steps| {
            let (still, moved) = (run(model, &steps, false), run(model, &steps, true));
            for (at, (still, moved)) in still.iter().zip(&moved).enumerate() {
                let (step, name) = (steps[at], model.name);
                prop_assert_eq!(&still.0, &moved.0, "{}, step {}, {:?}", name, at, step);
                let differs = still.1.iter().zip(&moved.1).position(|(still, moved)| still != moved);
                prop_assert_eq!(differs, None, "{}, step {}, {:?}: the first byte that differs", name, at, step);
            }
            Ok(())
        });
        same.unwrap();
    }
}

//! Waiting for something that happens by itself.

use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long anything may take that no guest does: only a hang takes longer.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `condition` holds, and fails if that takes longer than `limit`.
///
/// It is looked at more and more seldom: what takes long must not be slowed down by looking.
pub fn wait_until(limit: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        let waited = begun.elapsed();
        assert!(waited < limit, "{what} does not happen within {limit:?}");
        sleep((waited / 32).clamp(Duration::from_millis(1), Duration::from_millis(50)));
    }
}

//! Waiting for something that another thread or process does.

use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long anything outside of a guest may take: only a hang takes longer.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `condition` holds, and fails if that takes longer than `limit`.
///
/// The checks become less and less frequent, so that they do not slow down something that takes long.
pub fn wait_until(limit: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        let waited = begun.elapsed();
        assert!(waited < limit, "{what} does not happen within {limit:?}");
        sleep((waited / 32).clamp(Duration::from_millis(1), Duration::from_millis(50)));
    }
}

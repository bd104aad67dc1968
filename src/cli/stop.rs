//! The end of the process, asked for by a signal or by the end of QEMU.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Says whether the process is to end. Clones say the same.
#[derive(Clone, Default)]
pub struct Stop(Arc<(Mutex<bool>, Condvar)>);

impl Stop {
    /// One that SIGINT and SIGTERM set.
    pub fn on_signals() -> std::io::Result<Stop> {
        let stop = Stop::default();
        let mut signals = Signals::new([SIGINT, SIGTERM])?;
        let set = stop.clone();
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            for _ in signals.forever() {
                set.set();
            }
        })?;
        Ok(stop)
    }

    /// Asks everybody to end.
    pub fn set(&self) {
        let (flag, changed) = &*self.0;
        *flag.lock().unwrap_or_else(PoisonError::into_inner) = true;
        changed.notify_all();
    }

    /// Waits until the end is asked for, or for `limit`; says whether it is.
    pub fn wait(&self, limit: Duration) -> bool {
        let (flag, changed) = &*self.0;
        let flag = flag.lock().unwrap_or_else(PoisonError::into_inner);
        let (flag, _) = changed.wait_timeout_while(flag, limit, |stop| !*stop).unwrap_or_else(PoisonError::into_inner);
        *flag
    }
}

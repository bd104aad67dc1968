//! The end of the process, asked for by a signal or by the end of QEMU.

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use crate::sync::{lock, unpoisoned};
use signal_hook::consts::{SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::iterator::Signals;

/// Says whether the process is to end. Clones say the same.
#[derive(Clone, Default)]
pub struct Stop(Arc<(Mutex<bool>, Condvar)>);

/// SIGINT and SIGTERM, which end the process no more by themselves; nor does SIGXFSZ, which is left to the write that
/// would have made a file longer than files may be.
pub struct Caught(Signals);

impl Caught {
    /// From now on.
    pub fn new() -> std::io::Result<Caught> {
        // Not ignored: a QEMU that is started later would inherit that.
        signal_hook::flag::register(SIGXFSZ, Arc::default())?;
        Signals::new([SIGINT, SIGTERM]).map(Caught)
    }

    /// Has a thread wait for them, those that came meanwhile too; they set what is returned.
    pub fn watch(mut self) -> std::io::Result<Stop> {
        let stop = Stop::default();
        let set = stop.clone();
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            for _ in self.0.forever() {
                set.set();
            }
        })?;
        Ok(stop)
    }
}

impl Stop {
    /// Asks everybody to end.
    pub fn set(&self) {
        let (flag, changed) = &*self.0;
        *lock(flag) = true;
        changed.notify_all();
    }

    /// Waits until the end is asked for, or for `limit`; says whether it is.
    pub fn wait(&self, limit: Duration) -> bool {
        let (flag, changed) = &*self.0;
        let flag = lock(flag);
        let (flag, _) = unpoisoned(changed.wait_timeout_while(flag, limit, |stop| !*stop));
        *flag
    }
}

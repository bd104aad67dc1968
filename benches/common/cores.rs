//! Which core runs what.

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// Which threads run on which of the machine's cores. If that is left to chance, what is measured shares a core with other
/// threads in some runs and not in others, which alone changes a guest's throughput by a factor of three.
pub struct Cores {
    /// The core for what is measured, such as the guest's processor.
    processor: CpuSet,
}

impl Cores {
    /// Moves this thread, and so every thread and process that it starts from now on, to the other cores.
    pub fn divide() -> Cores {
        let this = Pid::from_raw(0);
        let all = sched_getaffinity(this).unwrap();
        let mut cores = (0..CpuSet::count()).filter(|core| all.is_set(*core).unwrap());
        let (mut processor, mut others) = (CpuSet::new(), CpuSet::new());
        processor.set(cores.next().unwrap()).unwrap();
        cores.for_each(|core| others.set(core).unwrap());
        sched_setaffinity(this, &others).expect("at least two cores are wanted");
        Cores { processor }
    }

    /// Moves a thread, or the calling one if that is 0, to the core that it has for itself.
    pub fn give_processor(&self, thread: Pid) {
        sched_setaffinity(thread, &self.processor).unwrap();
    }
}

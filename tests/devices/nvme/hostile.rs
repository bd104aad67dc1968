//! Hostile drivers: no matter what they write, the controller survives, and works after a reset.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use viommu::devices::nvme::DiskCounters;
use viommu_trace as trace;
use viommu_trace::Kind;

use crate::nvme::READ;
use viommu_testkit::nvme::{CC_ENABLED, Driver, PAGE, RAM, Setup, io, pattern};

/// The same numbers in each run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    fn of<T: Copy>(&mut self, some: &[T]) -> T {
        some[self.next() as usize % some.len()]
    }

    /// An address: of a page, inside a page, near the end of memory, or anything.
    fn address(&mut self) -> u64 {
        let anything = self.next() << 17 ^ self.next();
        match self.next() % 8 {
            0..4 => (anything % RAM) & !(PAGE - 1),
            4 => anything % RAM,
            5 => RAM - 16 + anything % 32,
            6 => u64::MAX - anything % 0x2000,
            _ => anything,
        }
    }

    /// A number for a command: mostly small, so that it passes the first checks.
    fn number(&mut self) -> u32 {
        let anything = self.next() as u32;
        match self.next() % 8 {
            0..4 => 0,
            4 => anything % 8,
            5 => anything % 0x101,
            6 => anything & 0x00ff_00ff,
            _ => anything,
        }
    }

    /// A submission queue entry of one of these commands, or of any.
    fn entry(&mut self, opcodes: &[u8]) -> [u8; 64] {
        let mut entry = [0; 64];
        entry[0] = if self.next().is_multiple_of(16) { self.next() as u8 } else { self.of(opcodes) };
        entry[1] = self.of(&[0, 0, 0, 0, 0, 0, 0, 0, 1 << 6, 1 << 6, 1 << 6, 2 << 6, 2 << 6, 3 << 6, 1]);
        entry[2..4].copy_from_slice(&(self.next() as u16).to_le_bytes());
        entry[4..8].copy_from_slice(&self.of(&[1, 1, 1, 1, 1, 1, 1, 1, 0, 2, u32::MAX]).to_le_bytes());
        entry[24..32].copy_from_slice(&self.address().to_le_bytes());
        let second = if self.next().is_multiple_of(2) { self.address() } else { self.next() << 17 ^ self.next() };
        entry[32..40].copy_from_slice(&second.to_le_bytes());
        for at in (40..64).step_by(4) {
            entry[at..at + 4].copy_from_slice(&self.number().to_le_bytes());
        }
        entry
    }
}

const ADMIN: [u8; 11] = [0, 1, 2, 4, 5, 6, 8, 9, 10, 0x0c, 0x7c];
const IO: [u8; 6] = [0, 1, 2, 5, 8, 9];

/// Everything that a guest's processors can do to a controller, in some order.
fn torment(driver: &mut Driver, random: &mut Random) {
    let [admin, queue] = [0, 1].map(|id| (driver.queues[&id].sq, u64::from(driver.queues[&id].sq_size)));
    for (opcodes, (at, size)) in [(&ADMIN[..], admin), (&IO, queue)] {
        (0..size).for_each(|slot| driver.write_ram(at + 64 * slot, &random.entry(opcodes)));
    }
    let mut tails = [2, 0];
    for _ in 0..400 {
        match random.next() % 256 {
            0..160 => {
                let (index, opcodes, (at, size)) = random.of(&[(0, &ADMIN[..], admin), (1, &IO[..], queue)]);
                driver.write_ram(at + random.next() % size * 64, &random.entry(opcodes));
                tails[index] = (tails[index] + random.next() % 4) % size;
                driver.write32(0x1000 + 8 * index as u64, tails[index] as u32);
            }
            // The host consumes completions, or claims to.
            160..200 => driver.write32(0x1004 + 8 * (random.next() % 2), random.next() as u32 % 32),
            200..210 => driver.write32(0x1000 + 4 * (random.next() % 0x400), random.number()),
            210..220 => driver.write32(random.of(&[0x0c, 0x10, 0x24, 0x28, 0x2c, 0x30, 0x34, 0x100]), random.number()),
            220..222 => {
                let cc = random.of(&[CC_ENABLED, CC_ENABLED | 1 << 14, CC_ENABLED | 2 << 14, CC_ENABLED | 1 << 7, 0]);
                driver.write32(0x14, cc);
            }
            _ => {
                let mut data = vec![0; 1 + random.next() as usize % 16];
                let _ = driver.client.region_read(0, random.next() % 0x1ff0, &mut data);
                let _ = driver.client.region_write(0, random.next() % 0xff8, &data);
            }
        }
    }
}

#[test]
fn random_commands_and_registers_do_no_harm() {
    let (tracer, _trace) = trace::start(trace::Options::default()).unwrap();
    let setup = Setup::traced(64 << 20, tracer.clone(), |_| {});
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let count = |of: fn(&DiskCounters) -> &AtomicU64| of(&setup.disk.counters).load(Ordering::Relaxed);
    // Until it has done enough: the scheduler decides how much of a round is executed before its end.
    let is_enough = || {
        let (all, bad) = (count(|c| &c.io_count) + count(|c| &c.admin_count), count(|c| &c.errors));
        bad > 1000 && all - bad > 500
    };
    let mut round = 0;
    while round < 40 || !is_enough() {
        round += 1;
        let mut driver = setup.ready();
        // Lists and segments can be anywhere.
        let words: Vec<u64> = (0..RAM / 64).map(|_| random.address()).collect();
        driver.write_words(RAM / 2, &words);
        torment(&mut driver, &mut random);
        std::thread::sleep(Duration::from_millis(1));
        driver.client.reset().unwrap();
        driver.client.region_write(7, 4, &[6, 0]).unwrap();
        driver.enable();
        driver.create_pair(1, 64, 64);
        let page = driver.pages(1);
        driver.write_ram(page, &pattern(4096, round));
        assert_eq!(driver.command(1, io(READ, 0, 8, [page, 0])).status, 0, "round {round}");
    }
    drop(setup);
    assert_eq!(tracer.stats().of(Kind::Panic), 0);
}

//! The NVMe controller: any commands with any data pointers, doorbells and registers in any order.
#![no_main]

use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use viommu::devices::nvme::{Disk, Nvme, NvmeConfig};
use viommu::pci::Function;
use viommu_fuzz::{Input, Machine, PAGE};

const REGISTERS: [u64; 12] = [0x00, 0x08, 0x0c, 0x10, 0x14, 0x1c, 0x20, 0x24, 0x28, 0x2c, 0x30, 0x34];
const CC: u64 = 0x14;
const AQA: u64 = 0x24;
const ASQ: u64 = 0x28;
const ACQ: u64 = 0x30;
/// Enabled, with entries of 64 and 16 bytes.
const CC_ENABLED: u32 = 4 << 20 | 6 << 16 | 1;
/// How many queues this driver uses: the admin queue, and queue pairs.
const QUEUES: usize = 4;
/// Entries of each queue.
const ENTRIES: u32 = 16;
const IMAGE: u64 = 1 << 20;
/// How long to wait for commands before the next step. The controller may ignore commands that a wrong doorbell
/// announced.
const A_WHILE: Duration = Duration::from_millis(2);

fuzz_target!(|data: &[u8]| {
    let machine = Machine::new();
    let mut driver = Driver::new(&machine);
    let mut input = Input::new(data);
    if driver.begin(&mut input).is_some() {
        while driver.step(&mut input).is_some() {}
    }
    driver.wait();
    machine.check_guards();
    machine.unmap_all();
    driver.controller.reset();
    machine.check_unmapped();
    drop(driver);
    machine.check_unmapped();
});

/// The namespace, the same for all inputs.
fn disk() -> Arc<Disk> {
    static DISK: OnceLock<Arc<Disk>> = OnceLock::new();
    DISK.get_or_init(|| {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(IMAGE).unwrap();
        let mut config = NvmeConfig::new(image.path(), "fuzz");
        config.queues = 8;
        Disk::open(config).unwrap()
    })
    .clone()
}

/// The page of the submission queue of queue `id`; the next page has its completion queue.
fn queue_page(id: usize) -> u64 {
    2 * id as u64 * PAGE
}

struct Driver<'a> {
    machine: &'a Machine,
    controller: Nvme,
    disk: Arc<Disk>,
    tails: [u32; QUEUES],
    /// How many commands will have been done when all submitted ones are done.
    expected: u64,
}

impl<'a> Driver<'a> {
    fn new(machine: &'a Machine) -> Self {
        let disk = disk();
        let controller = Nvme::new(machine.context.clone(), disk.clone());
        Driver { machine, controller, disk, tails: [0; QUEUES], expected: 0 }
    }

    /// Most inputs begin with an enabled controller with an I/O queue pair.
    fn begin(&mut self, input: &mut Input) -> Option<()> {
        let how = input.u8()?;
        if how & 1 == 0 {
            self.enable(CC_ENABLED | u32::from(how >> 4) << 7);
        }
        if how & 2 == 0 {
            self.create_pair(1);
        }
        Some(())
    }

    fn step(&mut self, input: &mut Input) -> Option<()> {
        match input.u8()? % 16 {
            0..=4 => {
                let queue = 1 + usize::from(input.u8()?) % (QUEUES - 1);
                self.command(queue, input)?;
            }
            5..=7 => self.command(0, input)?,
            8 => {
                let queue = 1 + usize::from(input.u8()?) % (QUEUES - 1);
                self.create_pair(queue);
            }
            9 | 10 => self.pointers(input)?,
            11 => {
                let register = REGISTERS[usize::from(input.u8()?) % REGISTERS.len()];
                self.controller.bar_write(0, register, &input.u32()?.to_le_bytes());
            }
            12 => {
                let doorbell = 0x1000 + u64::from(input.u8()?) * 4;
                self.controller.bar_write(0, doorbell, &input.u32()?.to_le_bytes());
            }
            13 => {
                let at = u64::from(input.u16()?) % 0x2000;
                let size = usize::from(input.u8()?) % 16;
                self.controller.bar_write(0, at, input.bytes(size));
                self.controller.bar_read(0, at, &mut vec![0; size]);
            }
            14 => {
                self.wait();
                self.machine.check_guards();
            }
            _ => {
                let value = if input.u8()? & 3 == 0 { input.u32()? } else { 0 };
                self.controller.bar_write(0, CC, &value.to_le_bytes());
                self.enable(CC_ENABLED);
            }
        }
        Some(())
    }

    fn enable(&mut self, cc: u32) {
        self.tails = [0; QUEUES];
        let aqa = (ENTRIES - 1) << 16 | (ENTRIES - 1);
        self.controller.bar_write(0, AQA, &aqa.to_le_bytes());
        self.controller.bar_write(0, ASQ, &queue_page(0).to_le_bytes());
        self.controller.bar_write(0, ACQ, &(queue_page(0) + PAGE).to_le_bytes());
        self.controller.bar_write(0, CC, &cc.to_le_bytes());
        self.expected = self.done();
    }

    fn create_pair(&mut self, queue: usize) {
        let (id, sq) = (queue as u32, queue_page(queue));
        let size = (ENTRIES - 1) << 16 | id;
        self.tails[queue] = 0;
        self.submit(0, &sqe(5, 0, 0, [sq + PAGE, 0], [size, id << 16 | 3, 0, 0, 0, 0]));
        self.submit(0, &sqe(1, 0, 0, [sq, 0], [size, id << 16 | 1, 0, 0, 0, 0]));
        self.wait();
    }

    fn submit(&mut self, queue: usize, sqe: &[u8; 64]) {
        let tail = &mut self.tails[queue];
        self.machine.write(queue_page(queue) + u64::from(*tail) * 64, sqe);
        *tail = (*tail + 1) % ENTRIES;
        let doorbell = 0x1000 + 8 * queue as u64;
        let tail = tail.to_le_bytes();
        // As far as the controller knows, all completions are consumed.
        self.controller.bar_write(0, doorbell + 4, &tail);
        self.controller.bar_write(0, doorbell, &tail);
        self.expected += 1;
    }

    fn command(&mut self, queue: usize, input: &mut Input) -> Option<()> {
        let how = input.u8()?;
        let opcode = input.u8()?;
        let flags = if how & 1 == 0 { 0 } else { input.u8()? };
        let nsid = if how & 2 == 0 { 1 } else { input.u32()? };
        let data = [Machine::address(input)?, Machine::address(input)?];
        let mut dwords = [0; 6];
        // Most fields have small numbers; others have any.
        for (at, dword) in dwords.iter_mut().enumerate() {
            *dword = if how >> (2 + at) & 1 == 0 { input.u8()?.into() } else { input.u32()? };
        }
        self.submit(queue, &sqe(opcode, flags, nsid, data, dwords));
        Some(())
    }

    /// A PRP list, an SGL segment, a page of ranges: anything that a data pointer may point to.
    fn pointers(&mut self, input: &mut Input) -> Option<()> {
        let at = Machine::address(input)?;
        let how = input.u8()?;
        for entry in 0..u64::from(how % 32) {
            let address = Machine::address(input)?;
            if how & 0x80 == 0 {
                self.machine.write(at.wrapping_add(8 * entry), &address.to_le_bytes());
                continue;
            }
            let at = at.wrapping_add(16 * entry);
            self.machine.write(at, &address.to_le_bytes());
            let kind = input.u8()?;
            let length = if kind & 8 == 0 { u64::from(input.u8()?) << 9 } else { input.u64()? & u64::MAX >> 8 };
            self.machine.write(at.wrapping_add(8), &(length | u64::from(kind & 0xf7) << 56).to_le_bytes());
        }
        Some(())
    }

    fn done(&self) -> u64 {
        let counters = &self.disk.counters;
        counters.io_count.load(Ordering::SeqCst) + counters.admin_count.load(Ordering::SeqCst)
    }

    fn wait(&mut self) {
        let begun = Instant::now();
        while self.done() < self.expected && begun.elapsed() < A_WHILE {
            std::thread::yield_now();
        }
        self.expected = self.done();
    }
}

/// A submission queue entry.
fn sqe(opcode: u8, flags: u8, nsid: u32, data: [u64; 2], dwords: [u32; 6]) -> [u8; 64] {
    let mut entry = [0; 64];
    entry[0] = opcode;
    entry[1] = flags;
    entry[4..8].copy_from_slice(&nsid.to_le_bytes());
    entry[24..32].copy_from_slice(&data[0].to_le_bytes());
    entry[32..40].copy_from_slice(&data[1].to_le_bytes());
    for (at, dword) in dwords.iter().enumerate() {
        entry[40 + 4 * at..44 + 4 * at].copy_from_slice(&dword.to_le_bytes());
    }
    entry
}

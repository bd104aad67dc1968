//! The driver of the DMA engine.

use std::os::unix::fs::FileExt;
use std::time::Instant;

use vfio_user::Client;

use super::{Load, Moves, Run, Seen, Step};
use viommu_testkit::engine::{self, COMPLETION, Descriptor, Engine, INTERRUPT, NULL, register};
use viommu_testkit::nvme::pattern;
use viommu_testkit::{PATIENCE, memfd};

pub const DRIVER: super::Driver = super::Driver {
    model: "dma-engine",
    load: |client| Box::new(Copies { engine: engine(client), round: 0 }),
    run: |client| Box::new(AnyDescriptors::new(client)),
};

fn engine(client: Client) -> Engine {
    Engine::new(client, &memfd(1 << 20), (0, 0))
}

/// Copies memory.
struct Copies {
    engine: Engine,
    round: u64,
}

const DESCRIPTORS: u64 = 16;
const LENGTH: u64 = 4096;
const SOURCE: u64 = 0x1_0000;
const DESTINATION: u64 = 0x4_0000;

impl Load for Copies {
    fn begin(&mut self) {
        self.engine.enable();
        self.engine.reset_channel();
    }

    fn submit(&mut self) {
        self.round += 1;
        let data = pattern((DESCRIPTORS * LENGTH) as usize, self.round);
        self.engine.ram.write_all_at(&data, SOURCE).unwrap();
        for n in 0..DESCRIPTORS {
            let descriptor = Descriptor {
                size: LENGTH as u32,
                source: SOURCE + n * LENGTH,
                destination: DESTINATION + n * LENGTH,
                next: (n + 1) * 64,
                ..Descriptor::default()
            };
            self.engine.put(n * 64, &descriptor);
        }
        self.engine.start(0, DESCRIPTORS as u16);
    }

    fn finish(&mut self) {
        self.engine.wait().unwrap();
        let mut data = vec![0; (DESCRIPTORS * LENGTH) as usize];
        self.engine.ram.read_exact_at(&mut data, DESTINATION).unwrap();
        assert_eq!(data, pattern(data.len(), self.round), "round {}", self.round);
    }

    fn client(&mut self) -> &mut Client {
        &mut self.engine.client
    }
}

/// A ring of this many descriptors, from address 0 on.
const RING: u64 = 64;
const STATUS: u64 = 0x2000;

/// Good and bad descriptors, and writes of registers.
struct AnyDescriptors {
    engine: Engine,
    count: u16,
}

impl AnyDescriptors {
    fn new(client: Client) -> Self {
        let mut run = AnyDescriptors { engine: engine(client), count: 0 };
        run.engine.ram.write_all_at(&pattern(0x1_0000, 1), SOURCE).unwrap();
        run.begin();
        run
    }

    fn begin(&mut self) {
        self.count = 0;
        self.engine.write(register::CHAINADDR, &0u64.to_le_bytes());
        self.engine.write(register::CHANCMP, &STATUS.to_le_bytes());
    }

    /// Puts up to a quarter of the ring. Some descriptors are wrong if the step asks for that: in size or in
    /// destination.
    fn put(&mut self, value: u16, some_wrong: bool) {
        for n in 0..value % 16 {
            let at = u64::from(self.count.wrapping_add(n)) % RING;
            let (size, destination) = match n {
                7 if some_wrong => (0, DESTINATION),
                9 if some_wrong => (64, 1 << 30),
                _ => (u32::from(value % 4000 + 1), DESTINATION + at * 4096),
            };
            let control = [0, INTERRUPT, COMPLETION, NULL][usize::from(value >> 8) % 4];
            let next = (at + 1) % RING * 64;
            let source = SOURCE + u64::from(value % 0x8000);
            self.engine.put(at * 64, &Descriptor { size, control, source, destination, next });
        }
        self.count = self.count.wrapping_add(value % 16);
        self.engine.ready(self.count);
    }
}

impl Run for AnyDescriptors {
    /// Returns all registers of a channel that is not active, and the memory that it wrote.
    fn step(&mut self, step: &Step, moves: &Moves<'_>) -> Seen {
        let (value, count) = (step.value, self.count);
        let engine = &mut self.engine;
        match step.what % 11 {
            what @ 0..=2 => self.put(value, what == 2),
            3 => {
                engine.command(engine::SUSPEND);
                engine.ready(count);
            }
            4 => engine.command(engine::RESUME),
            5 => engine.write(register::INTRCTRL, &[value as u8]),
            6 => engine.write(register::CHANCTRL, &value.to_le_bytes()),
            7 => engine.write(register::CHANERR_MASK, &u32::from(value).to_le_bytes()),
            8 => {
                engine.write(register::CHANERR, &u32::MAX.to_le_bytes());
                engine.ready(count);
            }
            9 => engine.command(value as u8),
            _ => {
                engine.reset_channel();
                self.begin();
            }
        }
        moves.at(step, 1);
        let started = Instant::now();
        while self.engine.status() & 7 == engine::ACTIVE {
            assert!(started.elapsed() < PATIENCE, "the channel is active still");
        }
        moves.at(step, 2);
        // Including those that change when they are read.
        let registers = self.engine.read::<0xb0>(0);
        let mut memory = vec![0; 0x8_0000];
        self.engine.ram.read_exact_at(&mut memory, 0).unwrap();
        Seen(registers.map(u64::from).to_vec(), memory)
    }
}

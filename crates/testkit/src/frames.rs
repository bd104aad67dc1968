//! A function with memory behind a BAR that a client maps, and with capabilities of its own.

use std::ops::Range;

use viommu::pci::{Bar, BarMemory, Capability, CapabilityId, Function, FunctionContext, Identity};

/// Bytes of BAR 2.
pub const SIZE: u64 = 0x8000;
/// The parts of it that the client maps; the last page has registers.
pub const MAPPED: [Range<u64>; 2] = [0x0000..0x2000, 0x3000..0x7000];

/// A frame buffer: a read of BAR 0 returns the sum of its mapped bytes, and a write fills them.
pub struct Frames {
    memory: BarMemory,
}

impl Frames {
    pub fn make(_context: FunctionContext) -> Box<dyn Function> {
        Box::new(Frames { memory: BarMemory::new(SIZE, &MAPPED).unwrap() })
    }
}

impl Function for Frames {
    fn identity(&self) -> Identity {
        Identity {
            vendor: 0x1234,
            device: 0x0002,
            subsystem_vendor: 0,
            subsystem: 0,
            // Display controller.
            class: 0x03_80_00,
            revision: 0,
            bars: const { &[Bar::registers(0, 4096), Bar::memory(2, SIZE)] },
            capabilities: &[
                Capability { id: CapabilityId::Standard(0x09), body: &[8, 1, 2, 3, 4, 5], writable: &[0, 0xff] },
                // Device Serial Number.
                Capability {
                    id: CapabilityId::Extended { id: 0x03, version: 1 },
                    body: &[1, 2, 3, 4, 5, 6, 7, 8],
                    writable: &[],
                },
            ],
            vectors: 1,
            integrated: false,
        }
    }

    fn bar_memory(&self, bar: u8) -> Option<BarMemory> {
        (bar == 2).then(|| self.memory.clone())
    }

    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        if bar == 2 {
            return self.memory.read(offset, data).unwrap();
        }
        let mut sum = 0u64;
        for area in MAPPED {
            let mut bytes = vec![0; (area.end - area.start) as usize];
            self.memory.read(area.start, &mut bytes).unwrap();
            sum += bytes.iter().map(|byte| u64::from(*byte)).sum::<u64>();
        }
        data.fill(0);
        let len = data.len().min(8);
        data[..len].copy_from_slice(&sum.to_le_bytes()[..len]);
    }

    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]) {
        if bar == 2 {
            return self.memory.write(offset, data).unwrap();
        }
        for area in MAPPED {
            self.memory.write(area.start, &vec![data[0]; (area.end - area.start) as usize]).unwrap();
        }
    }

    fn reset(&mut self) {}
}

//! A minimal PCI function.

use viommu::dma::Dma;
use viommu::pci::{Bar, Function, FunctionContext, Identity};

use super::vfio::RawClient;

/// A device each of whose registers does one thing.
pub struct Toy {
    dma: Dma,
    context: FunctionContext,
    address: u64,
    result: u64,
}

pub const ADDRESS: u64 = 0x00;
pub const RESULT: u64 = 0x08;
/// Reads 8 bytes at ADDRESS into RESULT. The next register is 1 if that worked.
pub const DO_READ: u64 = 0x10;
/// Writes RESULT to ADDRESS.
pub const DO_WRITE: u64 = 0x18;
pub const DO_INTERRUPT: u64 = 0x20;
pub const DO_PANIC: u64 = 0x28;

impl Toy {
    /// In its power-on state.
    pub fn make(context: FunctionContext) -> Box<dyn Function> {
        Box::new(Toy { dma: context.dma.open(), context, address: 0, result: 0 })
    }
}

impl Function for Toy {
    fn identity(&self) -> Identity {
        Identity {
            vendor: 0x1b36,
            device: 0x1234,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
            class: 0x088000,
            revision: 1,
            bars: const { &[Bar::registers(0, 0x2000)] },
            capabilities: &[],
            vectors: 3,
            integrated: false,
        }
    }

    fn bar_read(&mut self, _bar: u8, offset: u64, data: &mut [u8]) {
        let value = match offset {
            ADDRESS => self.address,
            RESULT => self.result,
            _ => 0,
        };
        let len = data.len().min(8);
        data.fill(0);
        data[..len].copy_from_slice(&value.to_le_bytes()[..len]);
    }

    fn bar_write(&mut self, _bar: u8, offset: u64, data: &[u8]) {
        let mut value = [0; 8];
        value[..data.len()].copy_from_slice(data);
        let value = u64::from_le_bytes(value);
        match offset {
            ADDRESS => self.address = value,
            RESULT => self.result = value,
            DO_READ => {
                let mut bytes = [0; 8];
                let done = self.dma.read(self.address, &mut bytes).is_ok();
                self.result = if done { u64::from_le_bytes(bytes) } else { u64::MAX };
            }
            DO_WRITE => {
                let done = self.dma.write(self.address, &self.result.to_le_bytes()).is_ok();
                self.result = if done { 0 } else { u64::MAX };
            }
            DO_INTERRUPT => self.context.interrupts.trigger(value as u16),
            DO_PANIC => panic!("the driver asked for it"),
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.address = 0;
        self.result = 0;
    }
}

pub fn write_register(client: &mut RawClient, register: u64, value: u64) {
    client.region_write(0, register, &value.to_le_bytes()).unwrap();
}

fn result(client: &mut RawClient) -> u64 {
    u64::from_le_bytes(client.region_read(0, RESULT, 8).unwrap().try_into().unwrap())
}

/// The number that the function reads at an address, or all ones if it cannot.
pub fn reads(client: &mut RawClient, address: u64) -> u64 {
    write_register(client, ADDRESS, address);
    write_register(client, DO_READ, 0);
    result(client)
}

/// Whether the function can write at an address.
pub fn writes(client: &mut RawClient, address: u64, value: u64) -> bool {
    write_register(client, ADDRESS, address);
    write_register(client, RESULT, value);
    write_register(client, DO_WRITE, 0);
    result(client) == 0
}

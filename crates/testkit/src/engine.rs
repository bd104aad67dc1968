//! A small driver of the DMA engine, over a vfio-user socket: a test's way to make an endpoint read or write any
//! address.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use vfio_bindings::bindings::vfio::*;
use vfio_user::Client;

use crate::PATIENCE;

/// The registers, as Linux's `drivers/dma/ioat/registers.h` has them; the channel's are in a block at 0x80.
pub mod register {
    pub const XFERCAP: u64 = 0x01;
    pub const INTRCTRL: u64 = 0x03;
    pub const ATTNSTATUS: u64 = 0x04;
    pub const VERSION: u64 = 0x08;
    pub const DMA_CAP: u64 = 0x10;
    pub const CHANCTRL: u64 = 0x80;
    pub const CHANCMD: u64 = 0x84;
    pub const DMACOUNT: u64 = 0x86;
    pub const CHANSTS: u64 = 0x88;
    pub const CHAINADDR: u64 = 0x90;
    pub const CHANCMP: u64 = 0x98;
    pub const CHANERR: u64 = 0xa8;
    pub const CHANERR_MASK: u64 = 0xac;
}

pub const RESET: u8 = 0x20;
pub const RESUME: u8 = 0x10;
pub const SUSPEND: u8 = 0x04;

/// What the channel is doing: the low bits of CHANSTS.
pub const ACTIVE: u64 = 0;
pub const DONE: u64 = 1;
pub const SUSPENDED: u64 = 2;
pub const HALTED: u64 = 3;

/// CHANERR.
pub mod chanerr {
    pub const SOURCE: u32 = 1 << 0;
    pub const DESTINATION: u32 = 1 << 1;
    pub const NEXT: u32 = 1 << 2;
    pub const NEXT_ALIGNMENT: u32 = 1 << 3;
    pub const CHAIN: u32 = 1 << 4;
    pub const COMMAND: u32 = 1 << 5;
    pub const CONTROL: u32 = 1 << 10;
    pub const LENGTH: u32 = 1 << 11;
    pub const COMPLETION: u32 = 1 << 12;
}

/// A descriptor's control bits.
pub const INTERRUPT: u32 = 1 << 0;
pub const COMPLETION: u32 = 1 << 3;
pub const NULL: u32 = 1 << 5;

/// A descriptor.
#[derive(Clone, Copy, Debug, Default)]
pub struct Descriptor {
    pub size: u32,
    pub control: u32,
    pub source: u64,
    pub destination: u64,
    pub next: u64,
}

impl Descriptor {
    pub fn bytes(&self) -> [u8; 64] {
        let mut bytes = [0; 64];
        bytes[0..4].copy_from_slice(&self.size.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.control.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.source.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.destination.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// A DMA engine whose client has a whole file as guest memory, from guest-physical address 0 on.
pub struct Engine {
    pub client: Client,
    pub ram: File,
    /// The descriptor of [`Engine::copy`]: its place in guest memory, 64 bytes, and its address for the endpoint.
    pub descriptor: (u64, u64),
}

impl Engine {
    /// Gives the engine `ram`, lets it access memory, and resets its channel.
    pub fn new(mut client: Client, ram: &File, descriptor: (u64, u64)) -> Self {
        let len = ram.metadata().unwrap().len();
        client.dma_map(0, 0, len, ram.as_raw_fd()).unwrap();
        let mut engine = Engine { client, ram: ram.try_clone().unwrap(), descriptor };
        engine.enable();
        engine.reset_channel();
        engine
    }

    /// Sets Memory Space and Bus Master Enable.
    pub fn enable(&mut self) {
        self.client.region_write(VFIO_PCI_CONFIG_REGION_INDEX, 4, &[6, 0]).unwrap();
    }

    /// Makes the endpoint read `len` bytes at `source` and write them to `destination`, both I/O virtual addresses.
    /// Before that it reads the descriptor; it accesses nothing else. An error is CHANERR, and the engine can be used
    /// again.
    pub fn copy(&mut self, source: u64, destination: u64, len: u32) -> Result<(), u32> {
        let (gpa, iova) = self.descriptor;
        self.put(gpa, &Descriptor { size: len, source, destination, next: iova, ..Descriptor::default() });
        self.start(iova, 1);
        self.wait()
    }

    /// Writes a descriptor to guest memory.
    pub fn put(&self, gpa: u64, descriptor: &Descriptor) {
        self.ram.write_all_at(&descriptor.bytes(), gpa).unwrap();
    }

    /// Starts `count` descriptors of the chain at `address`.
    pub fn start(&mut self, address: u64, count: u16) {
        self.write(register::CHAINADDR, &address.to_le_bytes());
        self.ready(count);
    }

    /// Writes DMACOUNT.
    pub fn ready(&mut self, count: u16) {
        self.write(register::DMACOUNT, &count.to_le_bytes());
    }

    /// Writes CHANCMD.
    pub fn command(&mut self, command: u8) {
        self.write(register::CHANCMD, &[command]);
    }

    /// Waits until the channel is done. If it halts, this resets it, and the error is CHANERR.
    pub fn wait(&mut self) -> Result<(), u32> {
        match self.wait_while(ACTIVE) {
            DONE => Ok(()),
            HALTED => {
                let errors = self.read32(register::CHANERR);
                self.reset_channel();
                Err(errors)
            }
            other => panic!("The channel is in state {other}"),
        }
    }

    /// Waits until the channel is not in `state` any more. Returns its new state.
    pub fn wait_while(&mut self, state: u64) -> u64 {
        let begun = Instant::now();
        loop {
            match self.status() & 7 {
                now if now == state => {}
                other => return other,
            }
            assert!(begun.elapsed() < PATIENCE, "The channel is still in state {state}");
        }
    }

    /// CHANSTS.
    pub fn status(&mut self) -> u64 {
        self.read64(register::CHANSTS)
    }

    /// Resets the channel, and waits until that is done.
    pub fn reset_channel(&mut self) {
        self.command(RESET);
        let begun = Instant::now();
        while self.read8(register::CHANCMD) & RESET != 0 {
            assert!(begun.elapsed() < PATIENCE, "The reset does not end");
        }
    }

    pub fn read8(&mut self, offset: u64) -> u8 {
        self.read::<1>(offset)[0]
    }

    pub fn read32(&mut self, offset: u64) -> u32 {
        u32::from_le_bytes(self.read(offset))
    }

    pub fn read64(&mut self, offset: u64) -> u64 {
        u64::from_le_bytes(self.read(offset))
    }

    pub fn read<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.client.region_read(VFIO_PCI_BAR0_REGION_INDEX, offset, &mut data).unwrap();
        data
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.client.region_write(VFIO_PCI_BAR0_REGION_INDEX, offset, data).unwrap();
    }
}

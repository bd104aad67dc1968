//! The driver of the null device.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use vfio_user::Client;

use super::{Load, Moves, Run, Seen, Step, set_bus_master};
use viommu_testkit::{PATIENCE, memfd};

pub const DRIVER: super::Driver = super::Driver {
    model: "null",
    load: |client| Box::new(Numbers::new(client)),
    run: |client| {
        let mut run = Numbers::new(client);
        run.begin();
        Box::new(run)
    },
};

const RAM: u64 = 0x1_0000;
const BUSY: u8 = 1;
const DONE: u8 = 2;

/// Makes the device write numbers.
struct Numbers {
    client: Client,
    ram: File,
    round: u64,
}

impl Numbers {
    fn new(mut client: Client) -> Self {
        let ram = memfd(RAM);
        client.dma_map(0, 0, RAM, ram.as_raw_fd()).unwrap();
        Numbers { client, ram, round: 0 }
    }

    fn address(&self) -> u64 {
        self.round % 1000 * 64
    }

    /// Waits until the device is not busy, and returns STATUS.
    fn wait(&mut self) -> u8 {
        let (mut status, begun) = ([BUSY], Instant::now());
        while status == [BUSY] {
            self.client.region_read(0, 8, &mut status).unwrap();
            assert!(begun.elapsed() < PATIENCE, "the write does not end");
        }
        status[0]
    }
}

impl Load for Numbers {
    fn begin(&mut self) {
        set_bus_master(&mut self.client, true);
    }

    fn submit(&mut self) {
        self.round += 1;
        self.ram.write_all_at(&[0; 4], self.address()).unwrap();
        self.client.region_write(0, 0, &self.address().to_le_bytes()).unwrap();
        self.client.region_write(0, 0xc, &(self.round as u32).to_le_bytes()).unwrap();
    }

    fn finish(&mut self) {
        let status = self.wait();
        let mut number = [0; 4];
        self.ram.read_exact_at(&mut number, self.address()).unwrap();
        assert_eq!((status, u32::from_le_bytes(number)), (DONE, self.round as u32));
    }

    fn client(&mut self) -> &mut Client {
        &mut self.client
    }
}

impl Run for Numbers {
    fn step(&mut self, step: &Step, moves: &Moves<'_>) -> Seen {
        match step.what % 3 {
            // Half of the addresses have no memory.
            0 => self.client.region_write(0, 0, &(u64::from(step.value) * 2).to_le_bytes()).unwrap(),
            1 => self.client.region_write(0, 0xc, &u32::from(step.value).to_le_bytes()).unwrap(),
            _ => self.client.region_write(0, 8, &step.value.to_le_bytes()).unwrap(),
        }
        moves.at(step, 1);
        self.wait();
        let (mut registers, mut memory) = ([0; 16], vec![0; RAM as usize]);
        self.client.region_read(0, 0, &mut registers).unwrap();
        self.ram.read_exact_at(&mut memory, 0).unwrap();
        Seen(registers.map(u64::from).to_vec(), memory)
    }
}

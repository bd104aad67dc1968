//! The DMA engine: any descriptors, any registers in any order.
#![no_main]

use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use viommu::devices::ioat;
use viommu::pci::Function;
use viommu_fuzz::{Input, Machine};

/// The registers and their sizes, as Linux's `drivers/dma/ioat/registers.h` has them.
const REGISTERS: [(u64, usize); 13] = [
    (0x03, 1),
    (0x04, 4),
    (0x80, 2),
    (0x84, 1),
    (0x86, 2),
    (0x88, 8),
    (0x90, 8),
    (0x90, 4),
    (0x94, 4),
    (0x98, 8),
    (0xa8, 4),
    (0xac, 4),
    (0x00, 16),
];
const CHANCMD: u64 = 0x84;
const DMACOUNT: u64 = 0x86;
const CHANSTS: u64 = 0x88;
const CHAINADDR: u64 = 0x90;
const RESET: u8 = 0x20;
/// The low bits of CHANSTS while a channel has work.
const ACTIVE: u8 = 0;
/// How long to let a channel work before the next step. It may have any amount of work.
const A_WHILE: Duration = Duration::from_millis(2);

fuzz_target!(|data: &[u8]| {
    let machine = Machine::new();
    let mut engine = ioat::make(machine.context.clone());
    engine.bar_write(0, CHANCMD, &[RESET]);
    let mut input = Input::new(data);
    while step(&machine, engine.as_mut(), &mut input).is_some() {}
    wait(engine.as_mut());
    machine.unmap_all();
    engine.reset();
    machine.check_unmapped();
    drop(engine);
    machine.check_unmapped();
});

fn step(machine: &Machine, engine: &mut dyn Function, input: &mut Input) -> Option<()> {
    match input.u8()? % 8 {
        0..=2 => put_descriptor(machine, input)?,
        3 => {
            // Work in the form that a driver gives it.
            engine.bar_write(0, CHAINADDR, &Machine::address(input)?.to_le_bytes());
            engine.bar_write(0, DMACOUNT, &u16::from(input.u8()?).to_le_bytes());
        }
        4 => {
            let (register, size) = REGISTERS[usize::from(input.u8()?) % REGISTERS.len()];
            engine.bar_write(0, register, input.bytes(size));
        }
        5 => {
            let at = u64::from(input.u16()?) % 0x4000;
            let size = usize::from(input.u8()?) % 64;
            if at < 0x100 {
                engine.bar_write(0, at, input.bytes(size));
            }
            engine.bar_read(0, at, &mut vec![0; size]);
        }
        6 => {
            wait(engine);
            machine.check_guards();
        }
        _ => {
            engine.reset();
            engine.bar_write(0, CHANCMD, &[RESET]);
        }
    }
    Some(())
}

fn put_descriptor(machine: &Machine, input: &mut Input) -> Option<()> {
    let at = Machine::address(input)?;
    let mut descriptor = [0; 64];
    let size = if input.u8()? & 1 == 0 { u32::from(input.u16()?) } else { input.u32()? };
    // Mostly a copy.
    let operation = input.u8()?;
    let control = u32::from(operation & 0x3f) | if operation & 0xc0 == 0xc0 { input.u32()? } else { 0 };
    descriptor[0..4].copy_from_slice(&size.to_le_bytes());
    descriptor[4..8].copy_from_slice(&control.to_le_bytes());
    for field in [8, 16, 24] {
        descriptor[field..field + 8].copy_from_slice(&Machine::address(input)?.to_le_bytes());
    }
    machine.write(at, &descriptor);
    Some(())
}

/// Waits until the channel has done its work, but only as long as it takes to see it at work.
fn wait(engine: &mut dyn Function) {
    let begun = Instant::now();
    let mut status = [0; 8];
    engine.bar_read(0, CHANSTS, &mut status);
    while status[0] & 7 == ACTIVE && begun.elapsed() < A_WHILE {
        std::thread::yield_now();
        engine.bar_read(0, CHANSTS, &mut status);
    }
}

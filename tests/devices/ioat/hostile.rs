//! Hostile software: no matter what it writes, the engine survives, and works after a reset.

use crate::ioat::setup::*;
use viommu_testkit::engine::*;
use viommu_trace as trace;
use viommu_trace::Kind;

#[test]
fn random_registers_and_descriptors_do_no_harm() {
    let (tracer, _trace) = trace::start(trace::Options::default()).unwrap();
    let setup = Setup::traced(tracer.clone());
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 20) % below
    };
    let mut round = 0;
    // Until it has done enough: the scheduler decides how much of a round is executed before its end.
    while round < 100 || tracer.stats().of(Kind::Command) < 1000 {
        round += 1;
        let mut engine = setup.engine();
        // Descriptors that name each other as next, and some that name anything.
        for slot in 0..64 {
            let mut address = |aligned: u64| match random(16) {
                0 => u64::MAX - random(0x2000),
                1 => RAM - 64 + random(128),
                _ => random(RAM) & !(aligned - 1),
            };
            let (source, destination) = (address(1), RING.max(address(1)) | 0x10_0000);
            let next = if random(16) == 0 { random(RAM) } else { RING + random(64) * 64 };
            let size = match random(32) {
                0 => u32::MAX,
                1..16 => random(64) as u32 + 1,
                _ => random(0x1_0000) as u32 + 1,
            };
            let control = match random(32) {
                0 => 0x87 << 24,
                1 => 1 << 6,
                2..12 => COMPLETION,
                12..16 => INTERRUPT | COMPLETION,
                16 => NULL,
                _ => 0,
            };
            engine.put(RING + slot * 64, &Descriptor { size, control, source, destination, next });
        }
        for _ in 0..200 {
            match random(16) {
                0..4 => engine.start(RING + random(64) * 64, random(200) as u16),
                4 | 5 => engine.ready(random(0x1_0000) as u16),
                6 => engine.command([RESET, SUSPEND, RESUME, 0, random(256) as u8][random(5) as usize]),
                7 => engine.write(register::CHANCMP, &(random(RAM + 0x1000) & !7).to_le_bytes()),
                8 | 13 => engine.write(register::CHANERR, &u32::MAX.to_le_bytes()),
                9 => engine.write(register::CHANCTRL, &(random(0x200) as u16).to_le_bytes()),
                10 => engine.write(register::INTRCTRL, &[random(16) as u8]),
                11 => {
                    let data: Vec<u8> = (0..1 + random(16)).map(|_| random(256) as u8).collect();
                    engine.write(random(0x3ff0), &data);
                }
                _ => drop(engine.read::<8>(random(0xb0))),
            }
        }
        engine.client.reset().unwrap();
        engine.enable();
        let data = setup.fill(0x8000, 64, round as u8);
        assert_eq!(engine.copy(0x8000, 0x9000, 64), Ok(()), "round {round}");
        assert_eq!(setup.bytes(0x9000, 64), data);
        setup.faults();
    }
    drop(setup);
    assert_eq!(tracer.stats().of(Kind::Panic), 0);
}

//! Data that says where it belongs: a wrong, missing, stale or misplaced sector can be told from a correct one.

/// The unit of the pattern, in bytes. It does not depend on the device's block size.
pub const SECTOR: usize = 512;
const WORDS: usize = SECTOR / 8;

/// A small pseudo-random sequence (splitmix64), the same in every run.
pub struct Random(u64);

impl Random {
    /// A sequence that depends on `seed` alone.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }
}

/// The words of a sector: its number, the seed, pseudo-random ones that depend on both, and a checksum.
fn words(sector: u64, seed: u64) -> impl Iterator<Item = u64> {
    let mut random = Random::new(sector.rotate_left(32) ^ seed);
    let mut sum = 0_u64;
    (0..WORDS).map(move |at| {
        let word = match at {
            0 => sector,
            1 => seed,
            at if at == WORDS - 1 => return sum,
            _ => random.next(),
        };
        sum = sum.rotate_left(1).wrapping_add(word);
        word
    })
}

/// Fills a buffer (whole sectors) that will be written at byte `offset` of the device.
pub fn fill(buffer: &mut [u8], offset: u64, seed: u64) {
    for (sector, bytes) in (offset / SECTOR as u64..).zip(buffer.chunks_exact_mut(SECTOR)) {
        for (word, place) in words(sector, seed).zip(bytes.chunks_exact_mut(8)) {
            place.copy_from_slice(&word.to_le_bytes());
        }
    }
}

/// Fills a buffer with bytes that no sector has, so that a read that wrote nothing is noticed.
pub fn poison(buffer: &mut [u8]) {
    buffer.fill(0xdb);
}

/// Compares a buffer that was read at byte `offset` with what [`fill`] put there.
///
/// # Errors
/// What is wrong with the first wrong sector, in words.
pub fn check(buffer: &[u8], offset: u64, seed: u64) -> Result<(), String> {
    for (sector, bytes) in (offset / SECTOR as u64..).zip(buffer.chunks_exact(SECTOR)) {
        let wrong =
            words(sector, seed).zip(bytes.chunks_exact(8)).position(|(word, found)| word.to_le_bytes() != *found);
        if let Some(word) = wrong {
            return Err(format!("Sector {sector} is wrong from byte {}: {}", word * 8, describe(bytes, seed)));
        }
    }
    Ok(())
}

/// Guesses what a wrong sector holds instead.
fn describe(bytes: &[u8], seed: u64) -> String {
    let found: Vec<u64> =
        bytes.chunks_exact(8).map(|word| word.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))).collect();
    match found[..] {
        _ if bytes.iter().all(|byte| *byte == 0xdb) => "the device wrote nothing there".into(),
        _ if bytes.iter().all(|byte| *byte == 0) => "all zeroes".into(),
        [sector, its_seed, ..] if words(sector, its_seed).eq(found.iter().copied()) => {
            let other = if its_seed == seed { "" } else { " of another write" };
            format!("it holds sector {sector}{other}, whole")
        }
        _ => format!("its first words are {:#018x} {:#018x}", found[0], found[1]),
    }
}

#[cfg(test)]
mod tests {
    use super::{SECTOR, check, fill, poison};

    #[test]
    fn what_was_filled_is_found_right() {
        let mut buffer = vec![0; 8 * SECTOR];
        fill(&mut buffer, 4096, 7);
        assert_eq!(check(&buffer, 4096, 7), Ok(()));
    }

    #[test]
    fn each_kind_of_wrong_sector_is_named() {
        let mut buffer = vec![0; 2 * SECTOR];
        let message = |buffer: &[u8]| check(buffer, 0, 7).unwrap_err();
        assert!(message(&buffer).contains("all zeroes"));
        poison(&mut buffer);
        assert!(message(&buffer).contains("wrote nothing"));
        fill(&mut buffer, 5 * SECTOR as u64, 7);
        assert!(message(&buffer).contains("it holds sector 5, whole"));
        fill(&mut buffer, 0, 6);
        assert!(message(&buffer).contains("sector 0 of another write"));
        fill(&mut buffer, 0, 7);
        buffer[SECTOR + 100] ^= 1;
        assert!(message(&buffer).starts_with("Sector 1 is wrong from byte 96"));
    }
}

//! Numbers as text, without `core::fmt`, which is slower: a trace has millions of them.

const PAIRS: [u8; 200] = {
    let mut pairs = [0; 200];
    let mut n = 0;
    while n < 100 {
        pairs[2 * n] = b'0' + (n / 10) as u8;
        pairs[2 * n + 1] = b'0' + (n % 10) as u8;
        n += 1;
    }
    pairs
};

const DIGITS: &[u8; 16] = b"0123456789abcdef";

/// Appends a number in decimal.
#[inline]
pub fn number(mut value: u64, out: &mut Vec<u8>) {
    // u64::MAX has 20 digits.
    let mut digits = [0; 20];
    let mut at = digits.len();
    while value >= 100 {
        let pair = 2 * (value % 100) as usize;
        value /= 100;
        at -= 2;
        digits[at] = PAIRS[pair];
        digits[at + 1] = PAIRS[pair + 1];
    }
    if value >= 10 {
        let pair = 2 * value as usize;
        at -= 2;
        digits[at] = PAIRS[pair];
        digits[at + 1] = PAIRS[pair + 1];
    } else {
        at -= 1;
        digits[at] = b'0' + value as u8;
    }
    out.extend_from_slice(&digits[at..]);
}

/// Appends a signed number in decimal.
pub fn signed(value: i64, out: &mut Vec<u8>) {
    if value < 0 {
        out.push(b'-');
    }
    number(value.unsigned_abs(), out);
}

/// Appends a number in hexadecimal, with the prefix `0x`.
#[inline]
pub fn hex(mut value: u64, out: &mut Vec<u8>) {
    let mut digits = [0; 18];
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = DIGITS[(value & 0xf) as usize];
        value >>= 4;
        if value == 0 {
            break;
        }
    }
    at -= 2;
    digits[at] = b'0';
    digits[at + 1] = b'x';
    out.extend_from_slice(&digits[at..]);
}

/// Appends bus, device and function as `lspci` writes them.
pub fn bdf(id: u16, out: &mut Vec<u8>) {
    let digit = |value: u16| DIGITS[usize::from(value & 0xf)];
    let device = id >> 3 & 0x1f;
    out.extend_from_slice(&[
        digit(id >> 12),
        digit(id >> 8),
        b':',
        digit(device >> 4),
        digit(device),
        b'.',
        digit(id & 7),
    ]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(put: impl Fn(&mut Vec<u8>)) -> String {
        let mut out = Vec::new();
        put(&mut out);
        String::from_utf8(out).unwrap()
    }

    proptest! {
        #[test]
        fn numbers_are_as_the_standard_library_writes_them(value: u64, shift in 0..64, id: u16) {
            let value = value >> shift;
            prop_assert_eq!(text(|out| number(value, out)), value.to_string());
            prop_assert_eq!(text(|out| hex(value, out)), format!("{value:#x}"));
            prop_assert_eq!(text(|out| signed(value as i64, out)), (value as i64).to_string());
            let bdf_of = format!("{:02x}:{:02x}.{}", id >> 8, id >> 3 & 0x1f, id & 7);
            prop_assert_eq!(text(|out| bdf(id, out)), bdf_of);
        }
    }

    #[test]
    fn the_ends_of_the_range_are_right() {
        for value in [0, 9, 10, 99, 100, u64::MAX] {
            assert_eq!(text(|out| number(value, out)), value.to_string());
            assert_eq!(text(|out| hex(value, out)), format!("{value:#x}"));
        }
    }
}

//! Registers, each declared once with its offset, width, access and name.

use viommu_wire::model as wire;

/// What a driver may do with a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegisterAccess {
    /// Reads only. A write changes nothing.
    ReadOnly,
    /// Reads and writes.
    ReadWrite,
    /// Writes only; it reads as zero. Bytes that a write leaves out are written as zero.
    WriteOnly,
    /// Reads, and writes of ones. Bytes that a write leaves out are written as zero.
    WriteOne,
}

/// A register. Its value is little-endian.
#[derive(Clone, Copy, Debug)]
pub struct Register<Id> {
    /// Identifies it for the model.
    pub id: Id,
    /// Its name and place.
    pub wire: wire::Register,
    /// What a driver may do with it.
    pub access: RegisterAccess,
    doorbell: bool,
}

impl<Id> Register<Id> {
    /// A declaration.
    pub const fn new(id: Id, wire: wire::Register, access: RegisterAccess) -> Self {
        Register { id, wire, access, doorbell: false }
    }

    /// Its first byte in the BAR.
    const fn begin(&self) -> u64 {
        self.wire.offset as u64
    }

    /// The byte behind it.
    const fn end(&self) -> u64 {
        self.begin() + self.wire.width as u64
    }
}

impl<Id: Copy> Register<Id> {
    /// The same register as a doorbell, which starts the work that other registers describe. If one write reaches
    /// several registers, the doorbells come last.
    pub const fn doorbell(self) -> Self {
        Register { doorbell: true, ..self }
    }
}

/// The registers of a BAR, in the order of their offsets and without overlaps. Bytes between them read as zero and
/// ignore writes.
#[derive(Clone, Copy, Debug)]
pub struct RegisterMap<Id: 'static>(&'static [Register<Id>]);

impl<Id: Copy> RegisterMap<Id> {
    /// A map of these registers. In a constant, a mistake is an error at compile time.
    ///
    /// # Panics
    /// If they are not in order or overlap, or if a width is 0 or more than 8 bytes.
    pub const fn new(registers: &'static [Register<Id>]) -> Self {
        let mut at = 0;
        let mut index = 0;
        while index < registers.len() {
            let register = &registers[index];
            assert!(register.wire.width >= 1 && register.wire.width <= 8, "a register has 1 to 8 bytes");
            assert!(register.begin() >= at, "registers are in order and do not overlap");
            at = register.end();
            index += 1;
        }
        RegisterMap(registers)
    }

    /// All registers.
    pub fn all(&self) -> &'static [Register<Id>] {
        self.0
    }

    /// The registers that an access of `len` bytes at `offset` touches.
    fn touched(&self, offset: u64, len: usize) -> &'static [Register<Id>] {
        let end = offset.saturating_add(len as u64);
        let first = self.0.partition_point(|register| register.end() <= offset);
        let rest = &self.0[first..];
        &rest[..rest.partition_point(|register| register.begin() < end)]
    }

    /// Serves a read of any size at any offset. `read` is called once for each register that is touched, for its value.
    pub fn read(&self, offset: u64, data: &mut [u8], mut read: impl FnMut(Id) -> u64) {
        data.fill(0);
        for register in self.touched(offset, data.len()) {
            if register.access == RegisterAccess::WriteOnly {
                continue;
            }
            let value = read(register.id).to_le_bytes();
            for (at, byte) in (register.begin()..register.end()).zip(value) {
                if let Some(to) = at.checked_sub(offset).and_then(|at| data.get_mut(usize::try_from(at).ok()?)) {
                    *to = byte;
                }
            }
        }
    }

    /// Splits a write of any size at any offset into writes to registers, in the order of their offsets, doorbells
    /// last.
    pub fn writes<'d>(&self, offset: u64, data: &'d [u8]) -> impl Iterator<Item = RegisterWrite<'d, Id>> + use<'d, Id> {
        let touched = self.touched(offset, data.len());
        let of = move |doorbell: bool| {
            let written = move |register: &&Register<Id>| {
                register.access != RegisterAccess::ReadOnly && register.doorbell == doorbell
            };
            touched.iter().filter(written).map(move |register| RegisterWrite { register, offset, data })
        };
        of(false).chain(of(true))
    }
}

/// A write to a register, of all or some of its bytes.
pub struct RegisterWrite<'d, Id: 'static> {
    register: &'static Register<Id>,
    offset: u64,
    data: &'d [u8],
}

impl<Id: Copy> RegisterWrite<'_, Id> {
    /// The register.
    pub fn id(&self) -> Id {
        self.register.id
    }

    /// The whole new value of the register, whose value is `before`.
    pub fn over(&self, before: u64) -> u64 {
        let keeps = self.register.access == RegisterAccess::ReadWrite;
        let mut value = if keeps { before } else { 0 }.to_le_bytes();
        for (at, byte) in (self.register.begin()..self.register.end()).zip(&mut value) {
            if let Some(from) = at.checked_sub(self.offset).and_then(|at| self.data.get(usize::try_from(at).ok()?)) {
                *byte = *from;
            }
        }
        u64::from_le_bytes(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static REGISTERS: RegisterMap<usize> = RegisterMap::new(&[
        Register::new(0, wire::Register::new("BYTE", 0x01, 1), RegisterAccess::ReadOnly),
        Register::new(1, wire::Register::new("WORD", 0x04, 4), RegisterAccess::ReadWrite),
        Register::new(2, wire::Register::new("LONG", 0x08, 8), RegisterAccess::ReadWrite),
        Register::new(3, wire::Register::new("CLEAR", 0x10, 4), RegisterAccess::WriteOne),
        Register::new(4, wire::Register::new("COMMAND", 0x14, 1), RegisterAccess::WriteOnly),
    ]);
    const VALUES: [u64; 5] = [0x5a, 0x0302_0100, 0x1716_1514_1312_1110, 0xffff_ffff, 0x77];

    fn read(offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0xee; len];
        REGISTERS.read(offset, &mut data, |id| VALUES[id]);
        data
    }

    #[test]
    fn a_read_gives_the_bytes_that_it_touches() {
        assert_eq!(read(0, 8), [0, 0x5a, 0, 0, 0, 1, 2, 3]);
        assert_eq!(read(6, 4), [2, 3, 0x10, 0x11]);
        assert_eq!(read(0x13, 3), [0xff, 0, 0]);
        assert_eq!(read(u64::MAX, 4), [0; 4]);
        assert!(read(4, 0).is_empty());
    }

    #[test]
    fn a_write_gives_whole_values() {
        let write = |offset, data: &[u8]| -> Vec<(usize, u64)> {
            REGISTERS.writes(offset, data).map(|write| (write.id(), write.over(VALUES[write.id()]))).collect()
        };
        assert_eq!(write(0, &[9; 4]), []);
        assert_eq!(write(5, &[0xaa]), [(1, 0x0302_aa00)]);
        assert_eq!(write(6, &[0xaa; 3]), [(1, 0xaaaa_0100), (2, 0x1716_1514_1312_11aa)]);
        assert_eq!(write(0x11, &[1]), [(3, 0x100)], "no one is written that was only read");
        assert_eq!(write(0x14, &[1, 2]), [(4, 1)]);
        assert_eq!(write(u64::MAX - 1, &[1; 4]), []);
    }

    #[test]
    fn doorbells_are_written_last() {
        static REGISTERS: RegisterMap<usize> = RegisterMap::new(&[
            Register::new(0, wire::Register::new("COUNT", 0x00, 2), RegisterAccess::ReadWrite).doorbell(),
            Register::new(1, wire::Register::new("ADDRESS", 0x08, 8), RegisterAccess::ReadWrite),
            Register::new(2, wire::Register::new("MODE", 0x10, 1), RegisterAccess::ReadWrite),
        ]);
        let order: Vec<usize> = REGISTERS.writes(0, &[0; 0x20]).map(|write| write.id()).collect();
        assert_eq!(order, [1, 2, 0]);
    }

    proptest::proptest! {
        /// One access of many bytes reads the same as accesses of one byte each.
        #[test]
        fn reads_are_the_same_in_pieces(offset in 0u64..0x20, len in 0usize..16) {
            let pieces: Vec<u8> = (offset..offset + len as u64).flat_map(|at| read(at, 1)).collect();
            proptest::prop_assert_eq!(read(offset, len), pieces);
        }
    }
}

//! Configuration space: header, BARs and capabilities (PCI Express Base Specification, chapter 7).
//!
//! QEMU forwards all writes of the guest. It answers reads of BARs and of the MSI and MSI-X capabilities itself.

use super::function::{Bar, Capability, CapabilityId, Identity};

/// The size of a PCI Express function's configuration space in bytes.
pub(super) const SIZE: usize = 4096;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;

const PM: usize = 0x40;
const MSI: usize = 0x50;
const MSIX: usize = 0x60;
const EXPRESS: usize = 0x70;
/// The offset of the first capability of a model's own.
const OWN: usize = 0xb0;
/// The offset of the first extended capability.
const EXTENDED: usize = 0x100;

const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;
/// Parity error response and SERR#, which drivers may set and which have no effect here.
const COMMAND_OTHER: u16 = 1 << 6 | 1 << 8;
const COMMAND_INTERRUPT_DISABLE: u16 = 1 << 10;
const STATUS_INTERRUPT: u16 = 1 << 3;
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// INTA.
const PIN: u16 = 1;

/// No_Soft_Reset: a return from D3hot to D0 keeps all state.
const PM_NO_SOFT_RESET: u16 = 1 << 3;
const PM_STATE: u16 = 3;

const DEVCAP_EXTENDED_TAG: u32 = 1 << 5;
const DEVCAP_ROLE_BASED_ERRORS: u32 = 1 << 15;
const DEVCAP_FLR: u32 = 1 << 28;
const DEVCTL_FLR: u16 = 1 << 15;
/// Relaxed ordering and no snoop, which are on after a reset, as on hardware.
const DEVCTL_RESET: u16 = 1 << 4 | 1 << 11;
/// One lane at 2.5 GT/s, the lowest: a faster link would make nothing faster here.
const LINK: u32 = 1 << 4 | 1;

/// ATS: Page Aligned Request; then the Smallest Translation Unit and Enable, which have no effect here.
const ATS: Capability = Capability {
    id: CapabilityId::Extended { id: 0x0f, version: 1 },
    body: &[1 << 5, 0, 0, 0],
    writable: &[0, 0, 0x1f, 0x80],
};

/// The most vectors of MSI.
const MSI_VECTORS_MAX: u16 = 32;

/// The BAR of the MSI-X table and the pending bits, which comes after the model's BARs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MsixBar {
    /// The index of the BAR, which has 32 bits.
    pub index: u8,
    /// Its size in bytes. The pending bits begin in the middle.
    pub size: u64,
}

/// The effect of a write on the function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Effect {
    /// The driver set Initiate Function Level Reset.
    pub reset: bool,
    /// Whether the function may access memory now, as bus mastering is on and the power state is D0. `None` if neither
    /// register was written.
    pub master: Option<bool>,
    /// Whether Interrupt Disable is set.
    pub pin_disabled: bool,
}

/// A function's configuration space.
pub(super) struct Config {
    identity: Identity,
    msix: Option<MsixBar>,
    ats: bool,
    bytes: Box<[u8; SIZE]>,
    writable: Box<[u8; SIZE]>,
}

impl Config {
    /// The configuration space at power-on, with MSI-X or without it, and so with ATS.
    pub fn new(identity: Identity, msix: bool, ats: bool) -> Self {
        let mut config = Config {
            msix: msix.then(|| msix_bar(identity.bars, identity.vectors)),
            ats,
            identity,
            bytes: Box::new([0; SIZE]),
            writable: Box::new([0; SIZE]),
        };
        config.reset();
        config
    }

    /// The function's identity.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The BAR of the MSI-X table, if there is one.
    pub fn msix_bar(&self) -> Option<MsixBar> {
        self.msix
    }

    /// Returns to the power-on state.
    pub fn reset(&mut self) {
        self.bytes.fill(0);
        self.writable.fill(0);
        self.header();
        self.power_management(MSI as u8);
        match self.msix {
            Some(bar) => {
                self.msi(MSIX as u8);
                self.msix(bar, EXPRESS as u8);
            }
            None => self.msi(EXPRESS as u8),
        }
        let own = self.own_capabilities();
        self.express(own);
    }

    /// Reads. Bytes past the end are ones.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let Some(bytes) = usize::try_from(offset).ok().and_then(|at| self.bytes.get(at..)) else { return };
        let len = data.len().min(bytes.len());
        data[..len].copy_from_slice(&bytes[..len]);
    }

    /// Writes the bits that are writable.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let mut reset = false;
        for (at, &new) in (usize::try_from(offset).unwrap_or(SIZE)..SIZE).zip(data) {
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | new & mask;
            // The bit always reads as zero, so it is not writable.
            reset |= at == EXPRESS + 9 && new & (DEVCTL_FLR >> 8) as u8 != 0;
        }
        let end = offset.saturating_add(data.len() as u64);
        let is_written = |register: usize| offset < register as u64 + 2 && end > register as u64;
        let master = (is_written(COMMAND) || is_written(PM + 4)).then(|| self.master());
        let pin_disabled = self.get16(COMMAND) & COMMAND_INTERRUPT_DISABLE != 0;
        Effect { reset, master, pin_disabled }
    }

    /// Sets Interrupt Status: whether the pin is asserted, even while the driver has disabled it.
    pub fn set_interrupt_status(&mut self, asserted: bool) {
        self.set16(STATUS, STATUS_CAPABILITIES | if asserted { STATUS_INTERRUPT } else { 0 }, 0);
    }

    fn master(&self) -> bool {
        self.get16(COMMAND) & COMMAND_MASTER != 0 && self.get16(PM + 4) & PM_STATE == 0
    }

    fn header(&mut self) {
        let identity = self.identity;
        self.set16(0x00, identity.vendor, 0);
        self.set16(0x02, identity.device, 0);
        self.set16(COMMAND, 0, COMMAND_MEMORY | COMMAND_MASTER | COMMAND_OTHER | COMMAND_INTERRUPT_DISABLE);
        self.set16(STATUS, STATUS_CAPABILITIES, 0);
        self.set32(0x08, identity.class << 8 | u32::from(identity.revision), 0);
        self.set16(0x0c, 0, 0xff);
        for bar in identity.bars {
            self.bar(*bar);
        }
        if let Some(MsixBar { index, size }) = self.msix {
            self.bar(Bar { index, size, wide: false, prefetchable: false });
        }
        self.set16(0x2c, identity.subsystem_vendor, 0);
        self.set16(0x2e, identity.subsystem, 0);
        self.set16(CAPABILITIES, PM as u16, 0);
        // Interrupt Line is the firmware's scratch byte.
        self.set16(0x3c, PIN << 8, 0x00ff);
    }

    /// Adds a memory BAR. The address bits above its size are writable.
    fn bar(&mut self, bar: Bar) {
        let at = BAR0 + 4 * usize::from(bar.index);
        let mask = !(bar.size - 1);
        let kind = if bar.wide { 0b100 } else { 0 } | if bar.prefetchable { 0b1000 } else { 0 };
        self.set32(at, kind, mask as u32 & !0xf);
        if bar.wide {
            self.set32(at + 4, 0, (mask >> 32) as u32);
        }
    }

    fn power_management(&mut self, next: u8) {
        self.capability(PM, 0x01, next);
        self.set16(PM + 2, 3, 0);
        self.set16(PM + 4, PM_NO_SOFT_RESET, PM_STATE);
    }

    fn msi(&mut self, next: u8) {
        self.capability(MSI, 0x05, next);
        let vectors = self.identity.vectors.clamp(1, MSI_VECTORS_MAX);
        let capable = vectors.next_power_of_two().ilog2() as u16;
        self.set16(MSI + 2, 1 << 7 | capable << 1, 0x71);
        self.set32(MSI + 4, 0, !3);
        self.set32(MSI + 8, 0, !0);
        self.set16(MSI + 12, 0, 0xffff);
    }

    fn msix(&mut self, MsixBar { index, size }: MsixBar, next: u8) {
        self.capability(MSIX, 0x11, next);
        self.set16(MSIX + 2, self.identity.vectors.clamp(1, 2048) - 1, 0xc000);
        self.set32(MSIX + 4, u32::from(index), 0);
        self.set32(MSIX + 8, (size / 2) as u32 | u32::from(index), 0);
    }

    fn express(&mut self, next: u8) {
        self.capability(EXPRESS, 0x10, next);
        let port = if self.identity.integrated { 9 } else { 0 };
        self.set16(EXPRESS + 2, port << 4 | 2, 0);
        self.set32(EXPRESS + 4, DEVCAP_FLR | DEVCAP_ROLE_BASED_ERRORS | DEVCAP_EXTENDED_TAG, 0);
        self.set16(EXPRESS + 8, DEVCTL_RESET, !DEVCTL_FLR);
        if !self.identity.integrated {
            self.set32(EXPRESS + 12, LINK, 0);
            self.set16(EXPRESS + 16, 0, 0x01c3);
            self.set16(EXPRESS + 18, LINK as u16, 0);
            // The supported link speeds, and the target link speed.
            self.set32(EXPRESS + 44, 1 << 1, 0);
            self.set16(EXPRESS + 48, 1, 0);
        }
    }

    /// Adds the model's own capabilities, in the order in which it names them, and then ATS. Returns the offset of the
    /// first standard one, or 0.
    fn own_capabilities(&mut self) -> u8 {
        let (mut at, mut extended_at) = (OWN, EXTENDED);
        let (mut first, mut last, mut last_extended) = (0, None::<usize>, None::<usize>);
        let own = self.identity.capabilities;
        for capability in own.iter().chain(self.ats.then_some(&ATS)) {
            let Capability { id, body, writable } = *capability;
            let (start, header, end) = match id {
                CapabilityId::Standard(_) => (&mut at, 2, EXTENDED),
                CapabilityId::Extended { .. } => (&mut extended_at, 4, SIZE),
            };
            let here = *start;
            *start = (here + header + body.len()).next_multiple_of(4);
            assert!(*start <= end, "there is no room for the capability {id:?}");
            match id {
                CapabilityId::Standard(id) => {
                    self.capability(here, id, 0);
                    match last.replace(here) {
                        Some(last) => self.bytes[last + 1] = here as u8,
                        None => first = here as u8,
                    }
                }
                CapabilityId::Extended { id, version } => {
                    self.set32(here, u32::from(id) | u32::from(version) << 16, 0);
                    if let Some(last) = last_extended.replace(here) {
                        let head = u32::from(self.get16(last)) | u32::from(self.get16(last + 2) & 0xf) << 16;
                        self.set32(last, head | (here as u32) << 20, 0);
                    }
                }
            }
            self.bytes[here + header..here + header + body.len()].copy_from_slice(body);
            let len = writable.len().min(body.len());
            self.writable[here + header..here + header + len].copy_from_slice(&writable[..len]);
        }
        first
    }

    fn capability(&mut self, at: usize, id: u8, next: u8) {
        self.set16(at, u16::from(next) << 8 | u16::from(id), 0);
    }

    fn get16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    fn set16(&mut self, at: usize, value: u16, writable: u16) {
        self.bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
        self.writable[at..at + 2].copy_from_slice(&writable.to_le_bytes());
    }

    fn set32(&mut self, at: usize, value: u32, writable: u32) {
        self.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        self.writable[at..at + 4].copy_from_slice(&writable.to_le_bytes());
    }
}

/// The first BAR that the model does not use. Each half has room for 16 bytes for each vector.
fn msix_bar(bars: &[Bar], vectors: u16) -> MsixBar {
    let index = bars.iter().map(|bar| bar.index + 1 + u8::from(bar.wide)).max().unwrap_or(0);
    let size = (32 * u64::from(vectors.clamp(1, 2048))).next_power_of_two().max(4096);
    MsixBar { index, size }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(integrated: bool) -> Config {
        Config::new(identity(integrated), true, false)
    }

    fn identity(integrated: bool) -> Identity {
        Identity {
            vendor: 0x1b36,
            device: 0x0010,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
            class: 0x010802,
            revision: 2,
            bars: const { &[Bar::registers(0, 0x4000)] },
            capabilities: &[],
            vectors: 65,
            integrated,
        }
    }

    fn read32(config: &Config, at: u64) -> u32 {
        let mut data = [0; 4];
        config.read(at, &mut data);
        u32::from_le_bytes(data)
    }

    fn capabilities(config: &Config) -> Vec<u8> {
        let mut at = u64::from(config.bytes[CAPABILITIES]);
        let mut ids = Vec::new();
        while at != 0 {
            let header = read32(config, at);
            ids.push(header as u8);
            at = u64::from(header >> 8 & 0xff);
        }
        ids
    }

    #[test]
    fn the_capability_list_ends_and_names_each_once() {
        assert_eq!(capabilities(&config(false)), [0x01, 0x05, 0x11, 0x10]);
    }

    #[test]
    fn without_msix_there_is_neither_its_capability_nor_its_bar() {
        let mut config = Config::new(identity(false), false, false);
        assert_eq!(capabilities(&config), [0x01, 0x05, 0x10]);
        config.write(0x18, &[0xff; 4]);
        assert_eq!(read32(&config, 0x18), 0);
        // MSI has its most vectors, 32.
        assert_eq!(read32(&config, MSI as u64) >> 17 & 7, 5);
    }

    #[test]
    fn a_models_own_capabilities_are_in_the_lists() {
        const OWN: &[Capability] = &[
            Capability { id: CapabilityId::Extended { id: 0x0b, version: 1 }, body: &[1, 2, 3, 4, 5], writable: &[] },
            Capability { id: CapabilityId::Standard(0x09), body: &[5, 6, 7], writable: &[0, 0x0f] },
            Capability { id: CapabilityId::Standard(0x09), body: &[], writable: &[] },
            Capability { id: CapabilityId::Extended { id: 0x03, version: 2 }, body: &[0; 8], writable: &[0xff; 8] },
        ];
        let identity = Identity { capabilities: OWN, ..identity(false) };
        let mut config = Config::new(identity, true, false);
        assert_eq!(capabilities(&config), [0x01, 0x05, 0x11, 0x10, 0x09, 0x09]);
        let at = super::OWN as u64;
        config.write(at + 2, &[0xff; 3]);
        assert_eq!((read32(&config, at), read32(&config, at + 4)), (0x0f05_b809, 7));
        assert_eq!((read32(&config, 0x100), read32(&config, 0x104)), (0x10c1_000b, 0x0403_0201));
        config.write(0x10c, &[0xff; 8]);
        assert_eq!((read32(&config, 0x10c), read32(&config, 0x110)), (0x0002_0003, u32::MAX));
        config.reset();
        assert_eq!((read32(&config, at), read32(&config, 0x110)), (0x0605_b809, 0));
    }

    #[test]
    fn ats_is_the_last_extended_capability_and_can_be_enabled() {
        const NONE: &[Capability] = &[];
        const OWN: &[Capability] =
            &[Capability { id: CapabilityId::Extended { id: 0x03, version: 1 }, body: &[0; 8], writable: &[] }];
        for (capabilities, at) in [(NONE, EXTENDED as u64), (OWN, EXTENDED as u64 + 12)] {
            let mut config = Config::new(Identity { capabilities, ..identity(false) }, true, true);
            assert_eq!(read32(&config, at), 0x0001_000f);
            config.write(at + 4, &[0xff; 4]);
            assert_eq!(read32(&config, at + 4), 0x801f_0020);
            config.reset();
            assert_eq!(read32(&config, at + 4), 0x20);
        }
        assert_eq!(read32(&config(false), EXTENDED as u64), 0);
    }

    #[test]
    fn memory_is_prefetchable() {
        let identity =
            Identity { bars: const { &[Bar::registers(0, 0x1000), Bar::memory(2, 1 << 33)] }, ..identity(false) };
        let mut config = Config::new(identity, true, false);
        config.write(0x10, &[0xff; 16]);
        assert_eq!((read32(&config, 0x10), read32(&config, 0x18)), (0xffff_f004, 0x0000_000c));
        assert_eq!(read32(&config, 0x1c), 0xffff_fffe);
    }

    #[test]
    fn the_pin_is_inta_and_can_be_disabled() {
        let mut config = config(false);
        assert_eq!(read32(&config, 0x3c) >> 8, 1);
        assert!(config.write(COMMAND as u64, &[0, 4]).pin_disabled);
        assert!(!config.write(COMMAND as u64, &[0, 0]).pin_disabled);
        config.set_interrupt_status(true);
        assert_eq!(read32(&config, COMMAND as u64), 0x0018_0000);
        config.set_interrupt_status(false);
        assert_eq!(read32(&config, COMMAND as u64), 0x0010_0000);
    }

    #[test]
    fn bars_are_sized_by_writing_ones() {
        let mut config = config(false);
        for at in [0x10, 0x14, 0x18, 0x1c] {
            config.write(at, &[0xff; 4]);
        }
        assert_eq!(read32(&config, 0x10), 0xffff_c004);
        assert_eq!(read32(&config, 0x14), 0xffff_ffff);
        assert_eq!(read32(&config, 0x18), 0xffff_f000);
        assert_eq!(read32(&config, 0x1c), 0);
        assert_eq!(read32(&config, MSIX as u64 + 4), 2);
        assert_eq!(read32(&config, MSIX as u64 + 8), 0x800 | 2);
    }

    #[test]
    fn memory_is_accessible_with_bus_mastering_in_d0() {
        let mut config = config(false);
        assert_eq!(config.write(COMMAND as u64, &[2, 0]).master, Some(false));
        assert_eq!(config.write(COMMAND as u64, &[6, 4]).master, Some(true));
        // A reset of the machine may have cleared bus mastering. This write must not set it again.
        assert_eq!(config.write(MSI as u64 + 2, &[1, 0]).master, None);
        assert_eq!(read32(&config, COMMAND as u64), 0x0010_0406);
        assert_eq!(config.write(PM as u64 + 4, &[3]).master, Some(false));
        assert_eq!(config.write(PM as u64 + 4, &[0]).master, Some(true));
        config.reset();
        assert_eq!(read32(&config, COMMAND as u64), 0x0010_0000);
    }

    #[test]
    fn flr_is_seen_and_reads_as_zero() {
        let mut config = config(false);
        assert!(!config.write(EXPRESS as u64 + 8, &[0x10, 0x08]).reset);
        assert!(config.write(EXPRESS as u64 + 8, &[0x10, 0x88]).reset);
        assert_eq!(read32(&config, EXPRESS as u64 + 8) & 0x8000, 0);
    }

    #[test]
    fn an_integrated_endpoint_has_no_link() {
        let config = config(true);
        assert_eq!(read32(&config, EXPRESS as u64) >> 20 & 0xf, 9);
        assert_eq!(read32(&config, EXPRESS as u64 + 12), 0);
    }

    #[test]
    fn accesses_outside_of_configuration_space_do_no_harm() {
        let mut config = config(false);
        let mut data = [0; 8];
        config.read(SIZE as u64 - 4, &mut data);
        assert_eq!(data, [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        config.read(u64::MAX, &mut data);
        assert_eq!(data, [0xff; 8]);
        config.write(u64::MAX, &[1; 8]);
        config.write(SIZE as u64 - 1, &[1; 8]);
        config.write(0, &[0; SIZE + 1]);
        assert_eq!(read32(&config, 0), 0x0010_1b36);
    }
}

//! Identify (section 5.15).

use super::disk::Disk;
use super::features::{CRITICAL_TEMPERATURE, WARNING_TEMPERATURE};
use super::log::{ERROR_ENTRIES, FIRMWARE, put};
use super::spec::{MDTS, NSID, NSID_ALL, Sqe, Status, VERSION};
use super::{SUBSYSTEM_VENDOR, VENDOR};

/// Controller or namespace structure.
mod cns {
    pub const NAMESPACE: u8 = 0x00;
    pub const CONTROLLER: u8 = 0x01;
    pub const ACTIVE_NAMESPACES: u8 = 0x02;
    pub const NAMESPACE_DESCRIPTORS: u8 = 0x03;
    pub const COMMAND_SET_NAMESPACE: u8 = 0x05;
    pub const COMMAND_SET_CONTROLLER: u8 = 0x06;
    pub const COMMAND_SET_ACTIVE_NAMESPACES: u8 = 0x07;
}

/// The size of every data structure in bytes.
const SIZE: usize = 4096;

/// The most Asynchronous Event Requests that may wait at once.
pub(super) const AER_LIMIT: usize = 4;

/// The data structure that a command asks for. `shadow_doorbells` says whether the controller offers them.
pub(super) fn identify(disk: &Disk, sqe: &Sqe, shadow_doorbells: bool) -> Result<Vec<u8>, Status> {
    let nsid = sqe.nsid.get();
    // The only command set is NVM, number 0.
    let command_set = sqe.cdw11.get() >> 24;
    match sqe.cdw10.get() as u8 {
        cns::NAMESPACE => namespace_id(nsid).map(|()| namespace(disk)),
        cns::CONTROLLER => Ok(controller(disk, shadow_doorbells)),
        cns::ACTIVE_NAMESPACES => active_namespaces(nsid),
        cns::NAMESPACE_DESCRIPTORS => namespace_id(nsid).map(|()| descriptors(disk)),
        // The NVM command set's own structures, which have nothing but zeros.
        cns::COMMAND_SET_NAMESPACE if command_set == 0 => namespace_id(nsid).map(|()| vec![0; SIZE]),
        cns::COMMAND_SET_CONTROLLER if command_set == 0 => Ok(vec![0; SIZE]),
        cns::COMMAND_SET_ACTIVE_NAMESPACES if command_set == 0 => active_namespaces(nsid),
        _ => Err(Status::INVALID_FIELD),
    }
}

fn namespace_id(nsid: u32) -> Result<(), Status> {
    if nsid == NSID { Ok(()) } else { Err(Status::INVALID_NAMESPACE) }
}

/// The active namespaces above `nsid`.
fn active_namespaces(nsid: u32) -> Result<Vec<u8>, Status> {
    if nsid >= NSID_ALL - 1 {
        return Err(Status::INVALID_NAMESPACE);
    }
    let mut page = vec![0; SIZE];
    if nsid < NSID {
        put(&mut page, 0, &NSID.to_le_bytes());
    }
    Ok(page)
}

/// Namespace identification descriptors (figure 250).
fn descriptors(disk: &Disk) -> Vec<u8> {
    const NGUID: u8 = 2;
    let mut page = vec![0; SIZE];
    put(&mut page, 0, &[NGUID, 16]);
    put(&mut page, 4, &disk.nguid());
    page
}

/// Identify controller (figure 247).
fn controller(disk: &Disk, shadow_doorbells: bool) -> Vec<u8> {
    let mut page = vec![0; SIZE];
    let mut set = |at: usize, bytes: &[u8]| put(&mut page, at, bytes);
    set(0, &VENDOR.to_le_bytes());
    set(2, &SUBSYSTEM_VENDOR.to_le_bytes());
    set(4, format!("{:<20}", disk.config().serial).as_bytes());
    set(24, format!("{:<40}", "viommu NVMe controller").as_bytes());
    set(64, format!("{FIRMWARE:<8.8}").as_bytes());
    set(72, &[6]); // RAB: recommended arbitration burst, 2^6 commands
    set(77, &[MDTS]);
    set(80, &VERSION.to_le_bytes());
    set(111, &[1]); // CNTRLTYPE: I/O controller
    set(256, &(u16::from(shadow_doorbells) << 8).to_le_bytes()); // OACS: doorbell buffer config
    set(258, &[3, AER_LIMIT as u8 - 1]); // ACL, AERL
    set(260, &[0b11]); // FRMW: one slot, read only
    set(261, &[0b110]); // LPA: commands supported and effects, extended data
    set(262, &[ERROR_ENTRIES as u8 - 1]); // ELPE
    set(266, &WARNING_TEMPERATURE.to_le_bytes());
    set(268, &CRITICAL_TEMPERATURE.to_le_bytes());
    set(512, &[0x66, 0x44]); // SQES, CQES: 64 and 16 bytes
    set(516, &NSID.to_le_bytes()); // NN
    // ONCS: compare, dataset management, write zeroes, select in get features, timestamp
    set(520, &(1u16 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 6).to_le_bytes());
    set(525, &[0b111]); // VWC: present, and a flush may be for all namespaces
    // SGLS: supported at any alignment, bit buckets, longer than the data
    set(536, &(1u32 | 1 << 16 | 1 << 18).to_le_bytes());
    let name = format!("nqn.2014-08.org.nvmexpress:uuid:{}", uuid(disk.nguid()));
    set(768, name.as_bytes());
    // Power state 0: at most 25 W.
    set(2048, &2500u16.to_le_bytes());
    page
}

/// Identify namespace (figure 245).
fn namespace(disk: &Disk) -> Vec<u8> {
    let mut page = vec![0; SIZE];
    let config = disk.config();
    let mut set = |at: usize, bytes: &[u8]| put(&mut page, at, bytes);
    for at in [0, 8, 16] {
        set(at, &disk.blocks().to_le_bytes()); // NSZE, NCAP, NUSE
    }
    let punches = u8::from(disk.punches());
    set(24, &[punches << 2]); // NSFEAT: deallocated blocks can be read
    set(33, &[punches | punches << 3]); // DLFEAT: they read as zeros, also after Write Zeroes
    set(99, &[u8::from(config.read_only)]); // NSATTR: write protected
    set(104, &disk.nguid());
    set(130, &[config.block_size.ilog2() as u8]); // LBAF0: LBADS
    page
}

/// A UUID made of these bytes. Its version is 8, which is for custom formats.
fn uuid(mut bytes: [u8; 16]) -> String {
    bytes[6] = bytes[6] & 0x0f | 0x80;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex = |range: std::ops::Range<usize>| -> String { bytes[range].iter().map(|b| format!("{b:02x}")).collect() };
    [hex(0..4), hex(4..6), hex(6..8), hex(8..10), hex(10..16)].join("-")
}

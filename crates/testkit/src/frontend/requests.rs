//! Requests as drivers make them, and their answers.

use viommu_wire::virtio_iommu::*;
use zerocopy::IntoBytes;

pub const READ: u32 = MapFlags::READ.bits();
pub const WRITE: u32 = MapFlags::WRITE.bits();

pub const OK: u8 = Status::Ok as u8;
pub const INVAL: u8 = Status::Inval as u8;
pub const RANGE: u8 = Status::Range as u8;
pub const NOENT: u8 = Status::NoEnt as u8;
pub const NOMEM: u8 = Status::NoMem as u8;

/// A request's device-readable part.
pub trait IntoBytesRequest {
    fn bytes(&self) -> Vec<u8>;
}

impl<T: IntoBytes + zerocopy::Immutable> IntoBytesRequest for T {
    fn bytes(&self) -> Vec<u8> {
        self.as_bytes().to_vec()
    }
}

fn head(kind: u8) -> Head {
    Head { kind, reserved: [0; 3] }
}

pub fn attach(domain: u32, endpoint: u32, flags: u32) -> Attach {
    let head = head(request_type::ATTACH);
    Attach { head, domain: domain.into(), endpoint: endpoint.into(), flags: flags.into(), reserved: [0; 4] }
}

pub fn detach(domain: u32, endpoint: u32) -> Detach {
    let head = head(request_type::DETACH);
    Detach { head, domain: domain.into(), endpoint: endpoint.into(), reserved: [0; 8] }
}

pub fn map(domain: u32, start: u64, end: u64, phys: u64, flags: u32) -> Map {
    Map {
        head: head(request_type::MAP),
        domain: domain.into(),
        virt_start: start.into(),
        virt_end: end.into(),
        phys_start: phys.into(),
        flags: flags.into(),
    }
}

pub fn unmap(domain: u32, start: u64, end: u64) -> Unmap {
    Unmap {
        head: head(request_type::UNMAP),
        domain: domain.into(),
        virt_start: start.into(),
        virt_end: end.into(),
        reserved: [0; 4],
    }
}

pub fn probe(endpoint: u32) -> Probe {
    Probe { head: head(request_type::PROBE), endpoint: endpoint.into(), reserved: [0; 64] }
}

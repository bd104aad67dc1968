//! How the numbers of the specifications are spelled in JSON and text.

use std::borrow::Cow;

use crate::event::Model;
use viommu_wire::request::RequestType;
use viommu_wire::split::F_SPLIT_MAP;
use viommu_wire::virtio_iommu::{ATTACH_F_BYPASS, FaultReason, MapFlags, Status, feature};

/// A spelled number, or the number in hexadecimal where the specification has no name for it.
type Name = Cow<'static, str>;

fn or_number(name: Option<&'static str>, number: impl std::fmt::LowerHex) -> Name {
    name.map_or_else(|| format!("{number:#x}").into(), Cow::Borrowed)
}

/// `VIRTIO_IOMMU_T_*` without the prefix, those of the split protocol too.
pub fn request(kind: u8) -> Name {
    or_number(RequestType::from_number(kind).map(RequestType::name), kind)
}

/// `VIRTIO_IOMMU_S_*` without the prefix.
pub fn status(status: u8) -> Name {
    or_number(Status::from_number(status).map(Status::name), status)
}

/// `VIRTIO_IOMMU_FAULT_R_*` without the prefix.
pub fn fault_reason(reason: u8) -> Name {
    or_number(FaultReason::from_number(reason).map(FaultReason::name), reason)
}

/// The flags of a MAP: `rw`, `r`, `w` or `-`, then `,mmio`, then the bits that have no name.
pub fn map_flags(bits: u32) -> Name {
    let flags = MapFlags::from_bits_retain(bits);
    let access = match (flags.contains(MapFlags::READ), flags.contains(MapFlags::WRITE)) {
        (true, true) => "rw",
        (true, false) => "r",
        (false, true) => "w",
        (false, false) => "-",
    };
    let unknown = flags.difference(MapFlags::all()).bits();
    match (flags.contains(MapFlags::MMIO), unknown) {
        (false, 0) => access.into(),
        (true, 0) => format!("{access},mmio").into(),
        (false, _) => format!("{access},{unknown:#x}").into(),
        (true, _) => format!("{access},mmio,{unknown:#x}").into(),
    }
}

/// The flags of an ATTACH: `bypass` or `-`.
pub fn attach_flags(bits: u32) -> Name {
    match bits {
        0 => "-".into(),
        ATTACH_F_BYPASS => "bypass".into(),
        _ => format!("{bits:#x}").into(),
    }
}

/// The virtio-iommu's virtqueues.
pub fn queue(queue: u8) -> Name {
    match queue {
        0 => "request".into(),
        1 => "event".into(),
        _ => or_number(None, queue),
    }
}

/// The feature bits that are set: `VIRTIO_IOMMU_F_*`, `VIRTIO_F_*` and `VIRTIO_RING_F_*` without the prefixes.
pub fn features(bits: u64) -> impl Iterator<Item = Name> {
    (0..64).filter(move |bit| bits >> bit & 1 != 0).map(|bit| {
        let name = match 1u64 << bit {
            feature::INPUT_RANGE => "INPUT_RANGE",
            feature::DOMAIN_RANGE => "DOMAIN_RANGE",
            feature::MAP_UNMAP => "MAP_UNMAP",
            feature::BYPASS => "BYPASS",
            feature::PROBE => "PROBE",
            feature::MMIO => "MMIO",
            feature::BYPASS_CONFIG => "BYPASS_CONFIG",
            F_SPLIT_MAP => "SPLIT_MAP",
            _ => match bit {
                24 => "NOTIFY_ON_EMPTY",
                27 => "ANY_LAYOUT",
                28 => "INDIRECT_DESC",
                29 => "EVENT_IDX",
                // A bit that never reaches the driver: vhost-user uses it between frontend and backend.
                30 => "VHOST_USER_PROTOCOL_FEATURES",
                32 => "VERSION_1",
                33 => "ACCESS_PLATFORM",
                34 => "RING_PACKED",
                35 => "IN_ORDER",
                36 => "ORDER_PLATFORM",
                37 => "SR_IOV",
                38 => "NOTIFICATION_DATA",
                39 => "NOTIF_CONFIG_DATA",
                40 => "RING_RESET",
                _ => return format!("BIT_{bit}").into(),
            },
        };
        name.into()
    })
}

/// A command's operation, as Linux names it (`enum nvme_opcode`, `enum nvme_admin_opcode` without their prefixes); on
/// an NVMe controller queue 0 takes the admin commands.
pub fn opcode(model: Model, queue: u16, opcode: u8) -> Name {
    let name = match (model, queue) {
        (Model::Nvme, 0) => nvme_admin(opcode),
        (Model::Nvme, _) => nvme_io(opcode),
        (Model::Ioat, _) => ioat(opcode),
    };
    or_number(name, opcode)
}

/// The name that an NVMe command on this queue has in the trace.
pub fn nvme_opcode(queue: u16, number: u8) -> String {
    opcode(Model::Nvme, queue, number).into_owned()
}

fn nvme_admin(opcode: u8) -> Option<&'static str> {
    Some(match opcode {
        0x00 => "delete_sq",
        0x01 => "create_sq",
        0x02 => "get_log_page",
        0x04 => "delete_cq",
        0x05 => "create_cq",
        0x06 => "identify",
        0x08 => "abort_cmd",
        0x09 => "set_features",
        0x0a => "get_features",
        0x0c => "async_event",
        0x0d => "ns_mgmt",
        0x10 => "activate_fw",
        0x11 => "download_fw",
        0x14 => "dev_self_test",
        0x15 => "ns_attach",
        0x18 => "keep_alive",
        0x19 => "directive_send",
        0x1a => "directive_recv",
        0x1c => "virtual_mgmt",
        0x1d => "nvme_mi_send",
        0x1e => "nvme_mi_recv",
        0x7c => "dbbuf",
        0x80 => "format_nvm",
        0x81 => "security_send",
        0x82 => "security_recv",
        0x84 => "sanitize_nvm",
        0x86 => "get_lba_status",
        _ => return None,
    })
}

fn nvme_io(opcode: u8) -> Option<&'static str> {
    Some(match opcode {
        0x00 => "flush",
        0x01 => "write",
        0x02 => "read",
        0x04 => "write_uncor",
        0x05 => "compare",
        0x08 => "write_zeroes",
        0x09 => "dsm",
        0x0c => "verify",
        0x0d => "resv_register",
        0x0e => "resv_report",
        0x11 => "resv_acquire",
        0x15 => "resv_release",
        _ => return None,
    })
}

/// The operation types that stand in bits 31..24 of a descriptor's control word.
fn ioat(opcode: u8) -> Option<&'static str> {
    Some(match opcode {
        0x00 => "copy",
        0x01 => "fill",
        0x87 => "xor",
        0x88 => "xor_val",
        0x89 => "pq",
        0x8a => "pq_val",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_spelled_with_the_bits_that_have_no_name() {
        assert_eq!(map_flags(0), "-");
        assert_eq!(map_flags(1), "r");
        assert_eq!(map_flags(2), "w");
        assert_eq!(map_flags(7), "rw,mmio");
        assert_eq!(map_flags(0x13), "rw,0x10");
        assert_eq!(map_flags(0x8000_0004), "-,mmio,0x80000000");
        assert_eq!(attach_flags(1), "bypass");
        assert_eq!(attach_flags(3), "0x3");
    }

    #[test]
    fn an_unknown_number_stays_a_number() {
        assert_eq!(request(0x83), "RELEASE");
        assert_eq!(request(0x84), "0x84");
        assert_eq!(status(99), "0x63");
        assert_eq!(fault_reason(7), "0x7");
        assert_eq!(opcode(Model::Nvme, 0, 0x02), "get_log_page");
        assert_eq!(opcode(Model::Nvme, 1, 0x02), "read");
        assert_eq!(opcode(Model::Nvme, 1, 0xc1), "0xc1");
        let accepted = 1 << 2 | 1 << 32 | 1 << 63;
        assert_eq!(features(accepted).collect::<Vec<_>>(), ["MAP_UNMAP", "VERSION_1", "BIT_63"]);
    }
}

//! Names of the specifications' numbers in JSON and text.

use std::borrow::Cow;

use viommu_wire::request::RequestType;
use viommu_wire::split::{F_SPLIT_MAP, request_type as split_type};
use viommu_wire::virtio_iommu::{ATTACH_F_BYPASS, FaultReason, MapFlags, Status, feature, request_type};

/// A name, or a number as text.
type Name = Cow<'static, str>;

/// Whether a type of request belongs to the split protocol.
pub fn is_split(request: u8) -> bool {
    RequestType::from_number(request).is_some_and(RequestType::is_split)
}

/// `VIRTIO_IOMMU_T_*` without the prefix, including the split protocol's types.
pub fn request(kind: u8) -> Option<&'static str> {
    RequestType::from_number(kind).map(RequestType::name)
}

/// `VIRTIO_IOMMU_S_*` without the prefix.
pub fn status(status: u8) -> Option<&'static str> {
    Status::from_number(status).map(Status::name)
}

/// `VIRTIO_IOMMU_FAULT_R_*` without the prefix.
pub fn fault_reason(reason: u8) -> Option<&'static str> {
    FaultReason::from_number(reason).map(FaultReason::name)
}

/// The names of the virtio-iommu's virtqueues (section 5.13.2).
pub fn virtqueue(queue: u8) -> Option<&'static str> {
    match queue {
        0 => Some("request"),
        1 => Some("event"),
        _ => None,
    }
}

/// The flags of a request of this type: of a MAP or LINK as [`map_flags`] writes them, and of an ATTACH `bypass` or
/// `-`. Other flags are written as a number.
pub fn flags(request: u8, bits: u32) -> Name {
    match request {
        request_type::MAP | split_type::LINK => map_flags(bits),
        request_type::ATTACH => match bits {
            0 => "-".into(),
            ATTACH_F_BYPASS => "bypass".into(),
            _ => format!("{bits:#x}").into(),
        },
        _ => format!("{bits:#x}").into(),
    }
}

/// The flags that `text` stands for: the inverse of [`flags`].
pub fn flags_named(request: u8, text: &str) -> Option<u32> {
    let number = |text: &str| u32::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    match request {
        request_type::MAP | split_type::LINK => {
            let mut parts = text.split(',');
            let access = match parts.next()? {
                "rw" => MapFlags::READ | MapFlags::WRITE,
                "r" => MapFlags::READ,
                "w" => MapFlags::WRITE,
                "-" => MapFlags::empty(),
                _ => return None,
            };
            parts.try_fold(access.bits(), |bits, part| {
                Some(bits | if part == "mmio" { MapFlags::MMIO.bits() } else { number(part)? })
            })
        }
        request_type::ATTACH if text == "-" => Some(0),
        request_type::ATTACH if text == "bypass" => Some(ATTACH_F_BYPASS),
        _ => number(text),
    }
}

/// `rw`, `r`, `w` or `-`, then `,mmio`, then the bits that have no name.
fn map_flags(bits: u32) -> Name {
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
                // Never reaches the driver: vhost-user uses this bit between frontend and backend.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_spelled_with_the_bits_that_have_no_name() {
        let (map, attach, unmap) = (request_type::MAP, request_type::ATTACH, request_type::UNMAP);
        for (request, bits, text) in [
            (map, 0, "-"),
            (map, 1, "r"),
            (map, 2, "w"),
            (map, 7, "rw,mmio"),
            (map, 0x13, "rw,0x10"),
            (split_type::LINK, 0x8000_0004, "-,mmio,0x80000000"),
            (attach, 0, "-"),
            (attach, 1, "bypass"),
            (attach, 3, "0x3"),
            (unmap, 3, "0x3"),
        ] {
            assert_eq!(flags(request, bits), text);
            assert_eq!(flags_named(request, text), Some(bits));
        }
        for (request, text) in [(map, "x"), (map, ""), (map, "rw,"), (map, "rw,10"), (attach, "r"), (unmap, "-")] {
            assert_eq!(flags_named(request, text), None, "{text}");
        }
    }

    #[test]
    fn an_unknown_number_has_no_name() {
        assert_eq!((request(0x83), request(0x84)), (Some("RELEASE"), None));
        assert_eq!((status(0), status(99)), (Some("OK"), None));
        assert_eq!((fault_reason(2), fault_reason(7)), (Some("MAPPING"), None));
        let accepted = 1 << 2 | 1 << 32 | 1 << 63;
        assert_eq!(features(accepted).collect::<Vec<_>>(), ["MAP_UNMAP", "VERSION_1", "BIT_63"]);
    }
}

//! The device configuration, as vhost-user reads and writes it.

use std::ops::Range;

use zerocopy::IntoBytes;

use crate::iommu::Iommu;
use viommu_trace::{Event, Tracer};
use viommu_wire::virtio_iommu::CONFIG_BYPASS_OFFSET;

/// Reads `size` bytes at `offset`. If they are not all in the configuration, the result is empty, which the frontend takes
/// for an error.
pub(super) fn read(iommu: &Iommu, offset: u32, size: u32) -> Vec<u8> {
    let config = iommu.config();
    range(offset, size as usize).and_then(|range| config.as_bytes().get(range)).unwrap_or_default().to_vec()
}

/// Takes a write. Only `bypass` can be written. The frontend turns a write of one byte into a write of the whole structure
/// from its copy. So the other bytes are ignored, and an unchanged `bypass` does not count as a write of it.
pub(super) fn write(iommu: &Iommu, tracer: &Tracer, offset: u32, data: &[u8]) {
    let bypass = range(offset, data.len())
        .filter(|range| range.contains(&CONFIG_BYPASS_OFFSET))
        .and_then(|range| data.get(CONFIG_BYPASS_OFFSET - range.start));
    match bypass {
        Some(&value) if value != iommu.config().bypass => {
            tracer.emit(Event::Bypass { value });
            if !iommu.write_bypass(value) {
                log::warn!(
                    "The driver's write of {value} to bypass is refused: it may write 0 or 1, if it accepted BYPASS_CONFIG"
                );
            }
        }
        _ => {}
    }
}

fn range(offset: u32, len: usize) -> Option<Range<usize>> {
    let start = offset as usize;
    Some(start..start.checked_add(len)?)
}

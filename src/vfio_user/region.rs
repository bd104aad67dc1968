//! The commands about regions.

use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};

use zerocopy::{FromBytes, IntoBytes};

use super::device::{Device, Refused};
use super::message::{
    MAX_DATA, MmapArea, RegionAccess, RegionFlags, RegionInfo, RegionIoFds, RegionWrite, RegionWriteMulti, SPARSE_MMAP,
    SparseMmap,
};

/// DEVICE_GET_REGION_INFO; adds the reply's payload to `reply`. The descriptor that goes with it, if the region can be mapped
/// and the client has room for all that there is to say.
pub fn info(device: &dyn Device, request: &RegionInfo, reply: &mut Vec<u8>) -> Result<Option<OwnedFd>, Refused> {
    let index = request.index.get();
    if index >= device.regions() {
        return Err(Refused::invalid(format!("there is no region {index}")));
    }
    let size = device.region_size(index);
    let memory = device.region_memory(index);
    let mut flags = if size == 0 { RegionFlags::empty() } else { RegionFlags::READ | RegionFlags::WRITE };
    let capability = memory.map_or(Vec::new(), |memory| sparse_mmap(memory.areas, size));
    flags.set(RegionFlags::MMAP, memory.is_some());
    let argsz = size_of::<RegionInfo>() + capability.len();
    let has_room = request.argsz.get() as usize >= argsz;
    // QEMU refuses a reply with this flag whose capability it had no room for; argsz has it ask again.
    flags.set(RegionFlags::CAPS, has_room && !capability.is_empty());
    let cap_offset = if flags.contains(RegionFlags::CAPS) { size_of::<RegionInfo>() as u32 } else { 0 };
    let info = RegionInfo {
        argsz: (argsz as u32).into(),
        flags: flags.bits().into(),
        index: request.index,
        cap_offset: cap_offset.into(),
        size: size.into(),
        offset: 0.into(),
    };
    reply.extend_from_slice(info.as_bytes());
    let Some(memory) = memory.filter(|_| has_room) else { return Ok(None) };
    reply.extend_from_slice(&capability);
    memory.file.as_fd().try_clone_to_owned().map(Some).map_err(Refused::system)
}

/// The capability that says which parts of a region of `size` bytes can be mapped; nothing if all can.
fn sparse_mmap(areas: &[Range<u64>], size: u64) -> Vec<u8> {
    if matches!(areas, [all] if *all == (0..size)) {
        return Vec::new();
    }
    let count = areas.len() as u32;
    let head = SparseMmap { id: SPARSE_MMAP.into(), version: 1.into(), count: count.into(), ..SparseMmap::default() };
    let mut capability = head.as_bytes().to_vec();
    for area in areas {
        let area = MmapArea { offset: area.start.into(), size: (area.end - area.start).into() };
        capability.extend_from_slice(area.as_bytes());
    }
    capability
}

/// The reply to DEVICE_GET_REGION_IO_FDS: no region has any.
pub fn io_fds(device: &dyn Device, request: &RegionIoFds) -> Result<RegionIoFds, Refused> {
    let index = request.index.get();
    if request.flags.get() != 0 || request.count.get() != 0 {
        return Err(Refused::invalid("flags and count must be zero"));
    }
    if index >= device.regions() || device.region_size(index) == 0 {
        return Err(Refused::invalid(format!("there is no region {index}")));
    }
    let argsz = size_of::<RegionIoFds>() as u32;
    Ok(RegionIoFds { argsz: argsz.into(), index: request.index, ..RegionIoFds::default() })
}

/// The region, offset and length of an access. An error if it does not lie inside a region.
fn check(device: &dyn Device, access: &RegionAccess) -> Result<(u32, u64, usize), Refused> {
    let (region, offset, count) = (access.region.get(), access.offset.get(), access.count.get());
    if region >= device.regions() {
        return Err(Refused::invalid(format!("there is no region {region}")));
    }
    if count as usize > MAX_DATA {
        return Err(Refused::invalid(format!("access of {count} bytes, more than {MAX_DATA}")));
    }
    if offset.checked_add(u64::from(count)).is_none_or(|end| end > device.region_size(region)) {
        return Err(Refused::invalid("access past the end of a region"));
    }
    Ok((region, offset, count as usize))
}

/// REGION_READ. Appends the reply's payload to `reply`.
pub fn read(device: &mut dyn Device, access: &RegionAccess, reply: &mut Vec<u8>) -> Result<(), Refused> {
    let (region, offset, count) = check(device, access)?;
    reply.extend_from_slice(access.as_bytes());
    let at = reply.len();
    reply.resize(at + count, 0);
    if count > 0 {
        device.region_read(region, offset, &mut reply[at..]);
    }
    Ok(())
}

/// REGION_WRITE, or a part of REGION_WRITE_MULTI.
pub fn write(device: &mut dyn Device, access: &RegionAccess, data: &[u8]) -> Result<(), Refused> {
    let (region, offset, count) = check(device, access)?;
    if data.len() != count {
        return Err(Refused::invalid(format!("access of {count} bytes with {} bytes of data", data.len())));
    }
    if count > 0 {
        device.region_write(region, offset, data);
    }
    Ok(())
}

/// REGION_WRITE_MULTI. The reply has the number of writes that were done, which is lower if one was refused.
pub fn write_multi(device: &mut dyn Device, payload: &[u8]) -> Result<RegionWriteMulti, Refused> {
    let short = || Refused::invalid("it is too short");
    let (head, rest) = RegionWriteMulti::ref_from_prefix(payload).map_err(|_| short())?;
    let count = usize::try_from(head.count.get()).map_err(|_| short())?;
    let (writes, _) = <[RegionWrite]>::ref_from_prefix_with_elems(rest, count).map_err(|_| short())?;
    for (done, one) in writes.iter().enumerate() {
        let data = one.data.get(..one.access.count.get() as usize);
        let result = data.ok_or_else(|| Refused::invalid("a write has more than eight bytes"));
        match result.and_then(|data| write(device, &one.access, data)) {
            Ok(()) => {}
            Err(refused) if done == 0 => return Err(refused),
            Err(refused) => {
                log::warn!("Refused write {done} of {count} in a message: {}", refused.reason);
                return Ok(RegionWriteMulti { count: (done as u64).into() });
            }
        }
    }
    Ok(*head)
}

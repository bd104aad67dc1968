//! The commands about interrupts.

use std::fs::File;
use std::os::fd::OwnedFd;

use super::device::{Device, IrqAction, IrqData, IrqInfo, IrqSet, Refused};
use super::message::{IrqInfoReply, IrqSetFlags, IrqSetRequest};

/// Bits of DEVICE_GET_IRQ_INFO's flags.
const EVENTFD: u32 = 1 << 0;
const MASKABLE: u32 = 1 << 1;
const AUTOMASKED: u32 = 1 << 2;

/// The reply to DEVICE_GET_IRQ_INFO.
pub fn info(device: &dyn Device, request: &IrqInfoReply) -> Result<IrqInfoReply, Refused> {
    let index = request.index.get();
    if index >= device.irqs() {
        return Err(Refused::invalid(format!("there is no interrupt type {index}")));
    }
    let IrqInfo { count, eventfd, maskable, automasked } = device.irq_info(index);
    let flags = [(eventfd, EVENTFD), (maskable, MASKABLE), (automasked, AUTOMASKED)];
    let flags = flags.iter().filter(|(is, _)| *is).fold(0, |flags, (_, bit)| flags | bit);
    let argsz = size_of::<IrqInfoReply>() as u32;
    Ok(IrqInfoReply { argsz: argsz.into(), flags: flags.into(), index: request.index, count: count.into() })
}

/// Parses DEVICE_SET_IRQS. `bytes` follow its structure.
pub fn set(device: &dyn Device, request: &IrqSetRequest, bytes: &[u8], fds: Vec<OwnedFd>) -> Result<IrqSet, Refused> {
    let (index, start, count) = (request.index.get(), request.start.get(), request.count.get());
    if index >= device.irqs() {
        return Err(Refused::invalid(format!("there is no interrupt type {index}")));
    }
    let flags = IrqSetFlags::from_bits(request.flags.get()).ok_or_else(|| Refused::invalid("unknown flags"))?;
    let actions = IrqSetFlags::ACTION_MASK | IrqSetFlags::ACTION_UNMASK | IrqSetFlags::ACTION_TRIGGER;
    let action = match flags & actions {
        IrqSetFlags::ACTION_MASK => IrqAction::Mask,
        IrqSetFlags::ACTION_UNMASK => IrqAction::Unmask,
        IrqSetFlags::ACTION_TRIGGER => IrqAction::Trigger,
        _ => return Err(Refused::invalid("it must be one of masking, unmasking and triggering")),
    };
    let info = device.irq_info(index);
    if count == 0 {
        let is_all = start == 0 && flags == IrqSetFlags::DATA_NONE | IrqSetFlags::ACTION_TRIGGER && fds.is_empty();
        let all = IrqSet { index, start, count, action, data: IrqData::None };
        return if is_all { Ok(all) } else { Err(Refused::invalid("no interrupt was named")) };
    }
    if start.checked_add(count).is_none_or(|end| end > info.count) {
        return Err(Refused::invalid(format!(
            "interrupts {start} + {count} are more than the {} there are",
            info.count
        )));
    }
    if action != IrqAction::Trigger && !info.maskable {
        return Err(Refused::invalid("these interrupts cannot be masked"));
    }
    let data = match flags - actions {
        IrqSetFlags::DATA_NONE if fds.is_empty() => IrqData::None,
        IrqSetFlags::DATA_BOOL if fds.is_empty() && bytes.len() == count as usize => {
            IrqData::Bool(bytes.iter().map(|byte| *byte != 0).collect())
        }
        IrqSetFlags::DATA_EVENTFD if fds.is_empty() || fds.len() == count as usize => {
            IrqData::EventFd(fds.into_iter().map(File::from).collect())
        }
        _ => return Err(Refused::invalid("its data do not match its flags and its count")),
    };
    Ok(IrqSet { index, start, count, action, data })
}

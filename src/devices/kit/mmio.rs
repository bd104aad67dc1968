//! Traces accesses to registers.

use crate::pci::FunctionContext;
use viommu_trace::event::Access;
use viommu_trace::{Event, Kind};
use viommu_wire::model::Model;

/// Traces the driver's access to a model's BAR, if a client asked for such events. `data` was read, or is about to be
/// written. Of more than 8 bytes the event has the first 8.
pub fn trace_mmio(context: &FunctionContext, model: Model, access: Access, bar: u8, offset: u64, data: &[u8]) {
    if !context.tracer.wants(Kind::Mmio) {
        return;
    }
    let first = data.iter().take(8).rev();
    let offset = u32::try_from(offset).unwrap_or(u32::MAX);
    context.tracer.emit(Event::Mmio {
        endpoint: context.dma.endpoint(),
        model,
        access,
        bar,
        offset,
        register: model.register(bar, offset),
        len: u32::try_from(data.len()).unwrap_or(u32::MAX),
        value: first.fold(0, |value, byte| value << 8 | u64::from(*byte)),
    });
}

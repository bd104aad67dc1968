//! The channel's executor, which does all of its DMA.

use std::time::Instant;

use super::channel::{Channel, Job};
use super::descriptor::{Buffer, Descriptor};
use super::registers::Errors;
use crate::devices::kit::{Executor, SharedMachine, ThreadContext};
use crate::pci::FunctionContext;
use viommu_trace::Event;
use viommu_trace::event::{DataPointer, Model};

/// Executes descriptors.
pub struct Descriptors {
    buffer: Buffer,
}

impl Default for Descriptors {
    fn default() -> Self {
        Descriptors { buffer: Buffer::new() }
    }
}

impl Executor<Channel> for Descriptors {
    fn execute(&mut self, job: Job, channel: &SharedMachine<Channel>, thread: &mut ThreadContext) {
        let begun = Instant::now();
        let fetched = Descriptor::fetch(&mut thread.dma, job.address, job.first);
        let mut outcome =
            fetched.and_then(|descriptor| descriptor.execute(&mut thread.dma, &mut self.buffer).map(|()| descriptor));
        let completion = channel.change(|channel| channel.completion(&job, &outcome));
        if let Some(completion) = completion
            && thread.dma.write(completion.address, &completion.value.to_le_bytes()).is_err()
        {
            outcome = Err(outcome.err().unwrap_or_default() | Errors::COMPLETION_ADDRESS);
        }
        if let Ok(descriptor) = fetched {
            trace_command(channel.context(), &job, &descriptor, outcome.err().unwrap_or_default(), begun);
        }
        channel.change(|channel| channel.finish(&job, &outcome));
    }
}

fn trace_command(context: &FunctionContext, job: &Job, descriptor: &Descriptor, errors: Errors, begun: Instant) {
    let pointer = if descriptor.moves_data() { DataPointer::Address } else { DataPointer::None };
    context.tracer.emit(Event::Command {
        endpoint: context.dma.endpoint(),
        model: Model::Ioat,
        opcode: descriptor.operation(),
        queue: 0,
        id: job.index,
        status: errors.bits() as u16,
        pointer,
        address: descriptor.source(),
        data: descriptor.destination(),
        len: descriptor.size(),
        duration: u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX),
    });
}

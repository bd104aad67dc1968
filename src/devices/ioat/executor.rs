//! The channel's executor, which does all of the channel's DMA.

use std::time::Instant;

use super::channel::{Channel, Job};
use super::descriptor::{Buffer, Descriptor};
use super::registers::Errors;
use crate::devices::kit::{Executor, SharedMachine, ThreadContext};
use crate::pci::FunctionContext;
use viommu_trace::Event;
use viommu_wire::ioat::Command;
use viommu_wire::model::Model;

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
    context.tracer.emit(Event::Command {
        endpoint: context.dma.endpoint(),
        model: Model::Ioat,
        queue: 0,
        opcode: descriptor.operation(),
        id: job.index.into(),
        status: errors.bits() & 0xffff,
        len: descriptor.size(),
        duration: u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX),
        part: Command { source: descriptor.source(), destination: descriptor.destination() }.into(),
    });
}

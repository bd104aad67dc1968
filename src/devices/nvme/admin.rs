//! The admin queue's thread. It executes what [`Commands`] decides, and creates and deletes the I/O queues.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use zerocopy::little_endian::U64;

use super::commands::{AdminAction, Commands, Waiting};
use super::pointer::Runs;
use super::queue::{Completion, CompletionQueue, Ended, SubmissionQueue};
use super::queue_table::NewQueue;
use super::registers::AdminQueues;
use super::shared::{Doorbell, Shadow, SharedController};
use super::spec::{CSTS_SHUTDOWN, CSTS_SHUTDOWN_COMPLETE, Sqe, Status};
use super::worker::IoQueue;
use crate::devices::kit::ring::{CommandRing, CompletionRing};
use crate::devices::kit::{self, Interruption, Task, ThreadContext};
use crate::sync::lock;
use viommu_trace::Event;
use viommu_wire::model::Model;
use viommu_wire::nvme::{Command, DataPointer};

/// The admin queue, and the I/O queues.
pub(super) struct Admin {
    pub(super) shared: Arc<SharedController>,
    pub(super) sq: SubmissionQueue,
    pub(super) cq: Arc<CompletionQueue>,
    pub(super) cqs: BTreeMap<u16, Arc<CompletionQueue>>,
    pub(super) queues: BTreeMap<u16, IoQueueTask>,
    pub(super) commands: Commands,
    runs: Runs,
    /// The bytes that the current command has transferred, for the trace.
    moved: u32,
    /// Completions that are not posted yet.
    pub(super) done: Vec<Completion>,
    /// Whether it has processed its last command, since the controller is shut down or fatal.
    pub(super) ended: bool,
}

/// An I/O submission queue, with or without its thread.
pub(super) enum IoQueueTask {
    Running(Task<IoQueue>),
    /// Without its thread, while the admin queue is quiesced; `None` if its thread could not be started, or panicked.
    Resting(Option<Box<IoQueue>>),
}

impl IoQueueTask {
    /// Ends its thread, and waits for that. After that it does no DMA and sends no interrupt.
    fn end(self) {
        if let IoQueueTask::Running(task) = self {
            task.end(Interruption::Stop);
        }
    }
}

impl Admin {
    /// A controller's queues when it is enabled with these admin queues. `page_size` is the memory page size in bytes.
    pub fn new(shared: &Arc<SharedController>, page_size: u64, queues: AdminQueues) -> Self {
        let AdminQueues { sq, cq } = queues;
        if let Some(doorbells) = shared.doorbells.first() {
            doorbells.tail.open(sq.size());
            doorbells.head.open(cq.size());
        }
        Admin::with_queues(shared, page_size, SubmissionQueue::new(0, sq), CompletionQueue::new(0, cq, Some(0)))
    }

    pub(super) fn with_queues(
        shared: &Arc<SharedController>,
        page_size: u64,
        sq: SubmissionQueue,
        cq: CompletionQueue,
    ) -> Self {
        let cq = Arc::new(cq);
        *lock(&shared.cqs) = vec![cq.clone()];
        Admin {
            shared: shared.clone(),
            sq,
            cq,
            cqs: BTreeMap::new(),
            queues: BTreeMap::new(),
            commands: Commands::new(shared.disk.clone(), shared.reports.clone(), page_size),
            runs: Runs::default(),
            moved: 0,
            done: Vec::new(),
            ended: false,
        }
    }

    /// The name of its thread.
    pub fn name(&self) -> String {
        format!("nvme {:x} admin", self.shared.context.dma.endpoint())
    }

    /// Whether it has processed its last command.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Processes commands until an interruption, a shutdown or the fatal status.
    fn serve(&mut self, thread: &mut ThreadContext) -> Result<std::convert::Infallible, Ended> {
        let mut entries = Vec::new();
        loop {
            self.post(thread)?;
            if thread.interruption().is_some()
                || self.shared.shutdown.load(Ordering::Acquire) != 0
                || self.shared.is_fatal()
            {
                return Err(Ended);
            }
            self.send_events(thread)?;
            let found = self.sq.poll(&mut thread.dma, &self.shared);
            if !self.usable(found)? {
                std::thread::park();
                continue;
            }
            let fetched = self.sq.fetch(&mut thread.dma, 1, &mut entries);
            self.usable(fetched)?;
            for sqe in &entries {
                self.command(thread, sqe)?;
            }
        }
    }

    /// Ends all queues of the controller for good.
    pub fn end(&mut self) {
        self.ended = true;
        self.interrupt_queues(Interruption::Stop);
        std::mem::take(&mut self.queues).into_values().for_each(IoQueueTask::end);
        self.close();
    }

    /// Removes all queues from what the threads share.
    pub(super) fn close(&self) {
        lock(&self.shared.cqs).clear();
        for doorbells in &self.shared.doorbells {
            doorbells.tail.close();
            doorbells.head.close();
        }
    }

    /// Interrupts all I/O queues at once, since each may be busy with a command.
    fn interrupt_queues(&self, interruption: Interruption) {
        for queue in self.queues.values() {
            if let IoQueueTask::Running(task) = queue {
                task.interrupt(interruption);
            }
        }
    }

    fn quiesce_queues(&mut self) {
        self.interrupt_queues(Interruption::Quiesce);
        for queue in self.queues.values_mut() {
            *queue = match std::mem::replace(queue, IoQueueTask::Resting(None)) {
                IoQueueTask::Running(task) => IoQueueTask::Resting(task.end(Interruption::Quiesce).map(Box::new)),
                resting => resting,
            };
        }
    }

    fn resume_queues(&mut self) {
        for (id, queue) in &mut self.queues {
            let IoQueueTask::Resting(resting) = queue else { continue };
            let Some(resting) = resting.take() else { continue };
            match Task::start(&self.shared.context, resting.name(), *resting) {
                Ok(task) => *queue = IoQueueTask::Running(task),
                Err(error) => {
                    ::log::error!("No thread for submission queue {id}: {error}");
                    self.shared.fatal();
                }
            }
        }
    }

    /// Completes a shutdown: makes the image durable, unless the shutdown is abrupt.
    fn shut_down(&self) {
        const ABRUPT: u8 = 2;
        if self.shared.shutdown.load(Ordering::Acquire) != ABRUPT
            && let Err(error) = self.shared.disk.flush()
        {
            ::log::error!("Cannot make the image durable: {error}");
        }
        let complete = |csts: u32| Some(csts & !CSTS_SHUTDOWN | CSTS_SHUTDOWN_COMPLETE);
        let _ = self.shared.csts.fetch_update(Ordering::SeqCst, Ordering::SeqCst, complete);
        self.shared.trace_state();
    }

    /// Completes waiting Asynchronous Event Requests, as far as there are events.
    fn send_events(&mut self, thread: &mut ThreadContext) -> Result<(), Ended> {
        while let Some((request, result)) = self.commands.take_event() {
            self.complete_waiting(thread, &request, Status::SUCCESS, result)?;
        }
        Ok(())
    }

    /// Completes a command that has waited.
    fn complete_waiting(
        &mut self,
        thread: &mut ThreadContext,
        Waiting { sqe, fetched }: &Waiting,
        status: Status,
        result: u32,
    ) -> Result<(), Ended> {
        self.moved = 0;
        self.complete(thread, sqe, *fetched, status, result)
    }

    fn command(&mut self, thread: &mut ThreadContext, sqe: &Sqe) -> Result<(), Ended> {
        let fetched = Instant::now();
        self.moved = 0;
        match self.execute(thread, sqe, fetched) {
            Ok(Some(result)) => self.complete(thread, sqe, fetched, Status::SUCCESS, result),
            Ok(None) => Ok(()),
            Err(status) => self.complete(thread, sqe, fetched, status, 0),
        }
    }

    /// Counts, traces and posts the completion of a command that was fetched at `fetched`.
    fn complete(
        &mut self,
        thread: &mut ThreadContext,
        sqe: &Sqe,
        fetched: Instant,
        status: Status,
        result: u32,
    ) -> Result<(), Ended> {
        self.shared.disk.count(|c| &c.admin_count, 1);
        if status != Status::SUCCESS {
            self.shared.log_error(0, sqe.cid.get(), status, sqe.nsid.get(), 0);
        }
        let pointer = if self.moved == 0 { DataPointer::None } else { DataPointer::Prp };
        self.shared.context.tracer.emit(Event::Command {
            endpoint: self.shared.context.dma.endpoint(),
            model: Model::Nvme,
            queue: 0,
            opcode: sqe.opcode,
            id: sqe.cid.get().into(),
            status: status.0.into(),
            len: self.moved,
            duration: fetched.elapsed().as_nanos() as u64,
            part: Command { slba: 0, pointer, data: sqe.data[0].get() }.into(),
        });
        self.done.push(Completion { cid: sqe.cid.get(), status, result });
        self.post(thread)
    }

    fn post(&mut self, thread: &mut ThreadContext) -> Result<(), Ended> {
        self.cq.post(thread, &self.shared, (0, self.sq.head()), &mut self.done)
    }

    /// Executes a command. Returns its result; `None` if it completes later.
    fn execute(&mut self, thread: &mut ThreadContext, sqe: &Sqe, fetched: Instant) -> Result<Option<u32>, Status> {
        let len = self.commands.data_len(sqe)?;
        let data = self.receive(thread, sqe, len)?;
        match self.commands.command(sqe, &data, fetched, self.offers_shadow_doorbells())? {
            AdminAction::Complete(result) => {
                self.shared.write_cache.store(self.commands.write_cache(), Ordering::Relaxed);
                return Ok(Some(result));
            }
            AdminAction::Wait => return Ok(None),
            AdminAction::Send(data) => self.send(thread, sqe, &data)?,
            AdminAction::SendLog(data, log) => {
                self.send(thread, sqe, &data)?;
                log.into_iter().for_each(|log| self.commands.log_was_read(log));
            }
            AdminAction::CreateCq(queue, vector) => self.create_cq(thread, queue, vector)?,
            AdminAction::CreateSq(queue, cq) => self.create_sq(thread, queue, cq)?,
            AdminAction::DeleteCq(id) => self.delete_cq(id),
            AdminAction::DeleteSq(id) => self.delete_sq(id),
            AdminAction::Abort(request) => {
                // If the completion cannot be posted, the controller is fatal and the thread ends soon.
                let _ = self.complete_waiting(thread, &request, Status::ABORT_REQUESTED, 0);
            }
            AdminAction::ShadowDoorbells { doorbells, event_indexes } => {
                self.set_shadow_doorbells(thread, doorbells, event_indexes)?;
            }
        }
        Ok(Some(0))
    }

    /// Whether to offer shadow doorbells: not while interrupts go through the pin. The controller must lower the pin as
    /// soon as completions are acknowledged, and would not see in time what the host writes to memory. A driver that
    /// polls disables the pin, and is offered them. If it enables the pin later, the pin stays asserted for longer than
    /// there is a reason.
    fn offers_shadow_doorbells(&self) -> bool {
        !self.shared.context.interrupts.use_pin()
    }

    /// Writes a command's data to the host's memory.
    fn send(&mut self, thread: &mut ThreadContext, sqe: &Sqe, data: &[u8]) -> Result<(), Status> {
        self.point(thread, sqe, data.len())?;
        self.runs.write(&mut thread.dma, data)
    }

    /// Reads a command's data from the host's memory.
    fn receive(&mut self, thread: &mut ThreadContext, sqe: &Sqe, len: usize) -> Result<Vec<u8>, Status> {
        let mut data = vec![0; len];
        if len > 0 {
            self.point(thread, sqe, len)?;
            self.runs.read(&mut thread.dma, &mut data)?;
        }
        Ok(data)
    }

    fn point(&mut self, thread: &mut ThreadContext, sqe: &Sqe, len: usize) -> Result<(), Status> {
        self.moved = len as u32;
        self.runs.set_prp(&mut thread.dma, self.commands.page_size(), sqe.data.map(U64::get), len as u64)
    }

    fn create_cq(&mut self, thread: &mut ThreadContext, queue: NewQueue, vector: Option<u16>) -> Result<(), Status> {
        let NewQueue { id, size, base } = queue;
        let ring = CompletionRing::new(base, size).ok_or(Status::INVALID_QUEUE_SIZE)?;
        if let Some(doorbells) = self.shared.doorbells.get(usize::from(id)) {
            doorbells.head.open(size);
        }
        self.start_shadow(thread, self.shared.shadow.head(id).map(|shadow| shadow.doorbell), 0)?;
        self.add_cq(CompletionQueue::new(id, ring, vector));
        Ok(())
    }

    /// Adds a completion queue. Returns false if its identifier was in use.
    pub(super) fn add_cq(&mut self, cq: CompletionQueue) -> bool {
        let (id, cq) = (cq.id(), Arc::new(cq));
        lock(&self.shared.cqs).push(cq.clone());
        self.cqs.insert(id, cq);
        self.commands.queues.add_cq(id)
    }

    fn create_sq(&mut self, thread: &mut ThreadContext, queue: NewQueue, cq_id: u16) -> Result<(), Status> {
        let NewQueue { id, size, base } = queue;
        let ring = CommandRing::new(base, size).ok_or(Status::INVALID_QUEUE_SIZE)?;
        let cq = self.cqs.get(&cq_id).ok_or(Status::COMPLETION_QUEUE_INVALID)?.clone();
        self.start_shadow(thread, self.shared.shadow.tail(id).map(|shadow| shadow.doorbell), 0)?;
        let doorbell = self.shared.doorbells.get(usize::from(id)).map(|doorbells| &doorbells.tail);
        if let Some(doorbell) = doorbell {
            doorbell.open(size);
        }
        let queue = IoQueue::new(&self.shared, SubmissionQueue::new(id, ring), &cq);
        match Task::start(&self.shared.context, queue.name(), queue) {
            Ok(task) => {
                self.queues.insert(id, IoQueueTask::Running(task));
                self.commands.queues.add_sq(id, cq_id);
                Ok(())
            }
            Err(error) => {
                ::log::error!("No thread for submission queue {id}: {error}");
                if let Some(doorbell) = doorbell {
                    doorbell.close();
                }
                Err(Status::INTERNAL_ERROR)
            }
        }
    }

    fn delete_sq(&mut self, id: u16) {
        if let Some(queue) = self.queues.remove(&id) {
            queue.end();
        }
        if let Some(doorbells) = self.shared.doorbells.get(usize::from(id)) {
            doorbells.tail.close();
        }
    }

    fn delete_cq(&mut self, id: u16) {
        self.cqs.remove(&id);
        lock(&self.shared.cqs).retain(|cq| cq.id() != id);
        if let Some(doorbells) = self.shared.doorbells.get(usize::from(id)) {
            doorbells.head.close();
        }
    }

    /// Sets the buffers for shadow doorbells and event indexes (section 5.7). From then on the host writes the
    /// doorbells of I/O queues to memory, and the registers only when it is asked to. It begins when this command
    /// completes. So the shadows must start with the current values, which are in the registers, or in earlier shadows
    /// if there are some.
    fn set_shadow_doorbells(
        &mut self,
        thread: &mut ThreadContext,
        doorbells: u64,
        event_indexes: u64,
    ) -> Result<(), Status> {
        let shared = self.shared.clone();
        let mut carry_over = |before: Option<Shadow>, register: &Doorbell, at: u64| -> Result<(), Status> {
            let mut value = register.value().to_le_bytes();
            if let Some(before) = before {
                thread.dma.read(before.doorbell, &mut value)?;
            }
            Ok(thread.dma.write(doorbells.wrapping_add(at), &value)?)
        };
        for id in self.cqs.keys() {
            let Some(registers) = shared.doorbells.get(usize::from(*id)) else { continue };
            carry_over(shared.shadow.head(*id), &registers.head, 8 * u64::from(*id) + 4)?;
        }
        for id in self.queues.keys() {
            let Some(registers) = shared.doorbells.get(usize::from(*id)) else { continue };
            carry_over(shared.shadow.tail(*id), &registers.tail, 8 * u64::from(*id))?;
        }
        shared.shadow.set(doorbells, event_indexes);
        // Each thread that waits must now write its event index.
        for registers in &shared.doorbells {
            registers.tail.wake();
            registers.head.wake();
        }
        Ok(())
    }

    /// Initializes a new queue's shadow doorbell, if there are any.
    fn start_shadow(&self, thread: &mut ThreadContext, shadow: Option<u64>, value: u32) -> Result<(), Status> {
        match shadow {
            Some(address) => Ok(thread.dma.write(address, &value.to_le_bytes())?),
            None => Ok(()),
        }
    }

    /// Makes the controller fatal if a queue cannot be accessed.
    fn usable<T, E>(&self, result: Result<T, E>) -> Result<T, Ended> {
        result.map_err(|_| {
            self.shared.fatal();
            Ended
        })
    }
}

impl kit::Work for Admin {
    /// Processes commands until it is interrupted, or the controller is shut down or fatal. When it returns, no thread
    /// of an I/O queue runs.
    fn run(&mut self, thread: &mut ThreadContext) {
        let shared = self.shared.clone();
        let Some(doorbells) = shared.doorbells.first() else { return };
        self.resume_queues();
        doorbells.tail.subscribe();
        let Err(Ended) = self.serve(thread);
        doorbells.tail.unsubscribe();
        let goes_on = shared.shutdown.load(Ordering::Acquire) == 0 && !shared.is_fatal();
        match thread.interruption() {
            Some(Interruption::Quiesce) if goes_on => self.quiesce_queues(),
            interruption => {
                self.end();
                if shared.shutdown.load(Ordering::Acquire) != 0 && interruption != Some(Interruption::Stop) {
                    self.shut_down();
                }
            }
        }
    }

    fn panicked(&mut self) -> bool {
        self.shared.fatal();
        self.end();
        if self.shared.shutdown.load(Ordering::Acquire) != 0 {
            self.shut_down();
        }
        false
    }
}

//! The admin queue's thread: it also creates and deletes the I/O queues.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::Instant;

use zerocopy::little_endian::U64;

use super::features::{self, Value};
use super::identify::{AER_LIMIT, identify};
use super::log;
use super::pointer::Runs;
use super::queue::{Completion, CompletionQueue, Ended, SubmissionQueue};
use super::shared::{Shared, lock};
use super::spec::{
    CSTS_SHUTDOWN, CSTS_SHUTDOWN_COMPLETE, QUEUE_ENTRIES_MAX, Sqe, Status, TRANSFER_MAX, admin, page_size,
};
use super::worker::Worker;
use crate::dma::Dma;
use crate::poller::PollGuard;
use viommu_trace::Event;
use viommu_trace::event::{DataPointer, Model};

/// The admin commands that are implemented.
pub(super) const OPCODES: [u8; 11] = [
    admin::DELETE_SQ,
    admin::CREATE_SQ,
    admin::GET_LOG_PAGE,
    admin::DELETE_CQ,
    admin::CREATE_CQ,
    admin::IDENTIFY,
    admin::ABORT,
    admin::SET_FEATURES,
    admin::GET_FEATURES,
    admin::ASYNC_EVENT_REQUEST,
    admin::DOORBELL_BUFFER_CONFIG,
];

/// How the vfio-user thread speaks to the admin thread.
#[derive(Default)]
pub(super) struct Orders {
    /// The controller is reset: end at once.
    pub stop: AtomicBool,
    /// The controller is shut down: 0, or CC.SHN.
    pub shutdown: AtomicU8,
}

/// The admin queue, and all that hangs on it.
pub(super) struct Admin {
    shared: Arc<Shared>,
    orders: Arc<Orders>,
    dma: Dma,
    sq: SubmissionQueue,
    cq: Arc<CompletionQueue>,
    cqs: BTreeMap<u16, Arc<CompletionQueue>>,
    workers: BTreeMap<u16, Worker>,
    /// Asynchronous Event Requests that wait, and since when.
    waiting: Vec<(Sqe, Instant)>,
    runs: Runs,
    /// I/O queues that the host may create, as Set Features granted them: submission and completion queues.
    granted: (u16, u16),
    /// Bytes that the command in execution has transferred, for the trace.
    moved: u32,
}

impl Admin {
    /// With an admin queue of `sq` entries at the first address, and one of `cq` at the second.
    pub fn new(shared: &Arc<Shared>, orders: &Arc<Orders>, sq: (u64, u32), cq: (u64, u32)) -> Self {
        let queues = shared.disk.config().queues;
        if let Some(doorbells) = shared.doorbells.first() {
            doorbells.tail.open(sq.1);
            doorbells.head.open(cq.1);
        }
        let cq = Arc::new(CompletionQueue::new(0, cq.0, cq.1, Some(0)));
        *lock(&shared.cqs) = vec![cq.clone()];
        Admin {
            shared: shared.clone(),
            orders: orders.clone(),
            dma: shared.context.dma.open(),
            sq: SubmissionQueue::new(0, sq.0, sq.1),
            cq,
            cqs: BTreeMap::new(),
            workers: BTreeMap::new(),
            waiting: Vec::new(),
            runs: Runs::default(),
            granted: (queues, queues),
            moved: 0,
        }
    }

    /// Processes commands until the controller is reset or shut down; then no thread of its I/O queues' runs.
    pub fn run(mut self) {
        if let Some(doorbells) = self.shared.doorbells.first() {
            doorbells.tail.subscribe();
        }
        let shared = self.shared.clone();
        shared.catch_panic(|| {
            let Err(Ended) = self.serve();
        });
        self.end_workers();
        if self.orders.shutdown.load(Ordering::Acquire) != 0 && !self.orders.stop.load(Ordering::Acquire) {
            self.shut_down();
        }
        lock(&shared.cqs).clear();
        for doorbells in &shared.doorbells {
            doorbells.tail.close();
            doorbells.head.close();
        }
    }

    fn serve(&mut self) -> Result<std::convert::Infallible, Ended> {
        let mut entries = Vec::new();
        loop {
            if self.orders.stop.load(Ordering::Acquire)
                || self.orders.shutdown.load(Ordering::Acquire) != 0
                || self.shared.is_fatal()
            {
                return Err(Ended);
            }
            self.send_events()?;
            let found = self.sq.poll(&mut self.dma, &self.shared);
            if !self.usable(found)? {
                std::thread::park();
                continue;
            }
            let fetched = self.sq.fetch(&mut self.dma, 1, &mut entries);
            self.usable(fetched)?;
            for sqe in &entries {
                self.command(sqe)?;
            }
        }
    }

    /// Ends the I/O queues: all at once first, since each may be in a command.
    fn end_workers(&mut self) {
        self.workers.values().for_each(Worker::stop);
        std::mem::take(&mut self.workers).into_values().for_each(Worker::join);
    }

    /// The second half of a shutdown: what was written is made durable.
    fn shut_down(&self) {
        const ABRUPT: u8 = 2;
        if self.orders.shutdown.load(Ordering::Acquire) != ABRUPT
            && let Err(error) = self.shared.disk.flush()
        {
            ::log::error!("The image is not durable: {error}");
        }
        let complete = |csts: u32| Some(csts & !CSTS_SHUTDOWN | CSTS_SHUTDOWN_COMPLETE);
        let _ = self.shared.csts.fetch_update(Ordering::SeqCst, Ordering::SeqCst, complete);
        self.shared.trace_state();
    }

    /// Completes Asynchronous Event Requests for which there are events.
    fn send_events(&mut self) -> Result<(), Ended> {
        while !self.waiting.is_empty() {
            let Some(result) = lock(&self.shared.events).take() else { break };
            let (request, fetched) = self.waiting.remove(0);
            self.complete(&request, fetched, 0, Status::SUCCESS, result)?;
        }
        Ok(())
    }

    fn command(&mut self, sqe: &Sqe) -> Result<(), Ended> {
        let fetched = Instant::now();
        self.moved = 0;
        let (status, result) = match self.dispatch(sqe) {
            Ok(Some(result)) => (Status::SUCCESS, result),
            Err(status) => (status, 0),
            Ok(None) => {
                self.waiting.push((*sqe, fetched));
                return Ok(());
            }
        };
        self.complete(sqe, fetched, self.moved, status, result)
    }

    /// Counts, traces and posts the completion of a command that was fetched at `fetched` and moved `moved` bytes.
    fn complete(&mut self, sqe: &Sqe, fetched: Instant, moved: u32, status: Status, result: u32) -> Result<(), Ended> {
        self.shared.disk.count(|c| &c.admin_count, 1);
        if status != Status::SUCCESS {
            self.shared.log_error(0, sqe.cid.get(), status, sqe.nsid.get(), 0);
        }
        self.shared.context.tracer.emit(Event::Command {
            endpoint: self.shared.context.dma.endpoint(),
            model: Model::Nvme,
            opcode: sqe.opcode,
            queue: 0,
            id: sqe.cid.get(),
            status: status.0,
            pointer: if moved == 0 { DataPointer::None } else { DataPointer::Prp },
            address: 0,
            data: sqe.data[0].get(),
            len: moved,
            duration: fetched.elapsed().as_nanos() as u64,
        });
        let done = [Completion { cid: sqe.cid.get(), status, result }];
        let mut guard = PollGuard::default();
        self.cq.post(&mut self.dma, &self.shared, (0, self.sq.head()), &done, &self.orders.stop, &mut guard)
    }

    /// Executes a command: its result, or `None` if it completes later.
    fn dispatch(&mut self, sqe: &Sqe) -> Result<Option<u32>, Status> {
        // Over PCI Express, admin commands use PRPs.
        if OPCODES.contains(&sqe.opcode) && (sqe.fuse() != 0 || sqe.psdt() != 0) {
            return Err(Status::INVALID_FIELD);
        }
        let done = match sqe.opcode {
            admin::DELETE_SQ => self.delete_sq(sqe),
            admin::CREATE_SQ => self.create_sq(sqe),
            admin::GET_LOG_PAGE => self.get_log_page(sqe),
            admin::DELETE_CQ => self.delete_cq(sqe),
            admin::CREATE_CQ => self.create_cq(sqe),
            admin::IDENTIFY => {
                let page = identify(&self.shared.disk, sqe, self.offers_shadow_doorbells());
                page.and_then(|page| self.send(sqe, &page))
            }
            admin::ABORT => return self.abort(sqe).map(Some),
            admin::SET_FEATURES => return self.set_features(sqe).map(Some),
            admin::GET_FEATURES => return self.get_features(sqe).map(Some),
            // It completes when there is an event.
            admin::ASYNC_EVENT_REQUEST if self.waiting.len() < AER_LIMIT => return Ok(None),
            admin::ASYNC_EVENT_REQUEST => Err(Status::AER_LIMIT_EXCEEDED),
            admin::DOORBELL_BUFFER_CONFIG if self.offers_shadow_doorbells() => self.doorbell_buffer_config(sqe),
            _ => Err(Status::INVALID_OPCODE),
        };
        done.map(|()| Some(0))
    }

    /// With the interrupt pin, the controller must know at once up to where completions are acknowledged: it lowers the pin
    /// then. What the host writes to memory it would not see in time. A driver that polls disables the pin, and is offered
    /// them; one that enables the pin after that sees it asserted for longer than there is a reason.
    fn offers_shadow_doorbells(&self) -> bool {
        !self.shared.context.interrupts.use_pin()
    }

    /// Gives data to the host.
    fn send(&mut self, sqe: &Sqe, data: &[u8]) -> Result<(), Status> {
        self.point(sqe, data.len())?;
        self.runs.write(&mut self.dma, data)
    }

    /// Takes data from the host.
    fn receive(&mut self, sqe: &Sqe, len: usize) -> Result<Vec<u8>, Status> {
        let mut data = vec![0; len];
        if len > 0 {
            self.point(sqe, len)?;
            self.runs.read(&mut self.dma, &mut data)?;
        }
        Ok(data)
    }

    fn point(&mut self, sqe: &Sqe, len: usize) -> Result<(), Status> {
        self.moved = len as u32;
        let page = self.page_size();
        self.runs.set_prp(&mut self.dma, page, sqe.data.map(U64::get), len as u64)
    }

    fn page_size(&self) -> u64 {
        page_size(self.shared.cc.load(Ordering::Relaxed))
    }

    fn vectors(&self) -> u16 {
        self.shared.disk.config().queues + 1
    }

    /// What both kinds of queue creation share: the identifier, the size and the address.
    fn new_queue(&self, sqe: &Sqe, granted: u16, exists: bool) -> Result<(u16, u32, u64), Status> {
        const PHYSICALLY_CONTIGUOUS: u32 = 1;
        let id = sqe.cdw10.get() as u16;
        let size = (sqe.cdw10.get() >> 16) + 1;
        if id == 0 || id > granted || exists {
            return Err(Status::INVALID_QUEUE_ID);
        }
        if !(2..=QUEUE_ENTRIES_MAX).contains(&size) {
            return Err(Status::INVALID_QUEUE_SIZE);
        }
        if sqe.cdw11.get() & PHYSICALLY_CONTIGUOUS == 0 {
            return Err(Status::INVALID_FIELD);
        }
        let base = sqe.data[0].get();
        if !base.is_multiple_of(self.page_size()) {
            return Err(Status::PRP_OFFSET_INVALID);
        }
        Ok((id, size, base))
    }

    fn create_cq(&mut self, sqe: &Sqe) -> Result<(), Status> {
        const INTERRUPTS_ENABLED: u32 = 1 << 1;
        let exists = self.cqs.contains_key(&(sqe.cdw10.get() as u16));
        let (id, size, base) = self.new_queue(sqe, self.granted.1, exists)?;
        let vector = (sqe.cdw11.get() >> 16) as u16;
        if vector >= self.vectors() {
            return Err(Status::INVALID_INTERRUPT_VECTOR);
        }
        let vector = (sqe.cdw11.get() & INTERRUPTS_ENABLED != 0).then_some(vector);
        if let Some(doorbells) = self.shared.doorbells.get(usize::from(id)) {
            doorbells.head.open(size);
        }
        self.start_shadow(self.shared.shadow.head(id).map(|shadow| shadow.doorbell), 0)?;
        let cq = Arc::new(CompletionQueue::new(id, base, size, vector));
        lock(&self.shared.cqs).push(cq.clone());
        self.cqs.insert(id, cq);
        Ok(())
    }

    fn create_sq(&mut self, sqe: &Sqe) -> Result<(), Status> {
        let cq = (sqe.cdw11.get() >> 16) as u16;
        if cq == 0 {
            return Err(Status::INVALID_QUEUE_ID);
        }
        let cq = self.cqs.get(&cq).ok_or(Status::COMPLETION_QUEUE_INVALID)?.clone();
        let exists = self.workers.contains_key(&(sqe.cdw10.get() as u16));
        let (id, size, base) = self.new_queue(sqe, self.granted.0, exists)?;
        self.start_shadow(self.shared.shadow.tail(id).map(|shadow| shadow.doorbell), 0)?;
        let worker = Worker::start(&self.shared, id, base, size, &cq).map_err(|error| {
            ::log::error!("No thread for submission queue {id}: {error}");
            Status::INTERNAL_ERROR
        })?;
        self.workers.insert(id, worker);
        Ok(())
    }

    fn delete_sq(&mut self, sqe: &Sqe) -> Result<(), Status> {
        let worker = self.workers.remove(&(sqe.cdw10.get() as u16)).ok_or(Status::INVALID_QUEUE_ID)?;
        worker.join();
        Ok(())
    }

    fn delete_cq(&mut self, sqe: &Sqe) -> Result<(), Status> {
        let id = sqe.cdw10.get() as u16;
        if !self.cqs.contains_key(&id) {
            return Err(Status::INVALID_QUEUE_ID);
        }
        if self.workers.values().any(|worker| worker.cq == id) {
            return Err(Status::INVALID_QUEUE_DELETION);
        }
        self.cqs.remove(&id);
        lock(&self.shared.cqs).retain(|cq| cq.id() != id);
        if let Some(doorbells) = self.shared.doorbells.get(usize::from(id)) {
            doorbells.head.close();
        }
        Ok(())
    }

    fn get_log_page(&mut self, sqe: &Sqe) -> Result<(), Status> {
        const RETAIN_EVENT: u32 = 1 << 15;
        let log = sqe.cdw10.get() as u8;
        let dwords = u64::from(sqe.cdw10.get() >> 16) | u64::from(sqe.cdw11.get() & 0xffff) << 16;
        let len = (dwords + 1) * 4;
        let offset = u64::from(sqe.cdw12.get()) | u64::from(sqe.cdw13.get()) << 32;
        let page = log::page(&self.shared, log)?;
        let Some(rest) = usize::try_from(offset).ok().and_then(|at| page.get(at..)) else {
            return Err(Status::INVALID_FIELD);
        };
        if offset % 4 != 0 || len > TRANSFER_MAX {
            return Err(Status::INVALID_FIELD);
        }
        let mut data = rest.to_vec();
        data.resize(len as usize, 0);
        self.send(sqe, &data)?;
        if sqe.cdw10.get() & RETAIN_EVENT == 0 {
            lock(&self.shared.events).read(log);
        }
        Ok(())
    }

    /// Only Asynchronous Event Requests can be aborted: everything else is done, or as good as done, when it is found.
    fn abort(&mut self, sqe: &Sqe) -> Result<u32, Status> {
        const NOT_ABORTED: u32 = 1;
        let queue = sqe.cdw10.get() as u16;
        let cid = (sqe.cdw10.get() >> 16) as u16;
        if queue != 0 {
            return Ok(NOT_ABORTED);
        }
        let Some(at) = self.waiting.iter().position(|(waiting, _)| waiting.cid.get() == cid) else {
            return Ok(NOT_ABORTED);
        };
        let (request, fetched) = self.waiting.remove(at);
        // If it cannot be posted, the controller is fatal and the thread ends at once.
        let _ = self.complete(&request, fetched, 0, Status::ABORT_REQUESTED, 0);
        Ok(0)
    }

    fn set_features(&mut self, sqe: &Sqe) -> Result<u32, Status> {
        let feature = sqe.cdw10.get() as u8;
        if feature == features::id::NUMBER_OF_QUEUES {
            return self.set_number_of_queues(sqe.cdw11.get());
        }
        let data = self.receive(sqe, features::data_len(sqe))?;
        let mut features = lock(&self.shared.features);
        features.set(sqe, &data, self.vectors())?;
        if feature == features::id::VOLATILE_WRITE_CACHE {
            self.shared.write_cache.store(sqe.cdw11.get() & 1 != 0, Ordering::Relaxed);
        }
        if features.temperature_event() {
            lock(&self.shared.events).temperature();
        }
        Ok(0)
    }

    fn set_number_of_queues(&mut self, wanted: u32) -> Result<u32, Status> {
        let (sqs, cqs) = (wanted as u16, (wanted >> 16) as u16);
        if sqs == u16::MAX || cqs == u16::MAX {
            return Err(Status::INVALID_FIELD);
        }
        if !self.cqs.is_empty() {
            return Err(Status::COMMAND_SEQUENCE_ERROR);
        }
        let most = self.shared.disk.config().queues;
        self.granted = ((sqs + 1).min(most), (cqs + 1).min(most));
        Ok(self.number_of_queues())
    }

    fn number_of_queues(&self) -> u32 {
        u32::from(self.granted.0 - 1) | u32::from(self.granted.1 - 1) << 16
    }

    fn get_features(&mut self, sqe: &Sqe) -> Result<u32, Status> {
        if sqe.cdw10.get() as u8 == features::id::NUMBER_OF_QUEUES {
            return Ok(self.number_of_queues());
        }
        let value = lock(&self.shared.features).get(sqe, self.vectors())?;
        match value {
            Value::Dword(value) => Ok(value),
            Value::Data(data) => self.send(sqe, &data).map(|()| 0),
        }
    }

    /// From now on the host writes doorbells of I/O queues to memory, and registers only when asked (section 5.7).
    fn doorbell_buffer_config(&mut self, sqe: &Sqe) -> Result<(), Status> {
        let [doorbells, event_indexes] = sqe.data.map(U64::get);
        let page = self.page_size();
        if doorbells == 0 || event_indexes == 0 {
            return Err(Status::INVALID_FIELD);
        }
        if doorbells % page != 0 || event_indexes % page != 0 {
            return Err(Status::PRP_OFFSET_INVALID);
        }
        let shared = self.shared.clone();
        // The host uses them when this command is complete: until then the registers hold what they must begin with.
        for id in self.cqs.keys() {
            let head = shared.doorbells.get(usize::from(*id)).map_or(0, |d| d.head.value());
            self.dma.write(doorbells.wrapping_add(8 * u64::from(*id) + 4), &head.to_le_bytes())?;
        }
        for id in self.workers.keys() {
            let tail = shared.doorbells.get(usize::from(*id)).map_or(0, |d| d.tail.value());
            self.dma.write(doorbells.wrapping_add(8 * u64::from(*id)), &tail.to_le_bytes())?;
        }
        shared.shadow.set(doorbells, event_indexes);
        // Each worker has to say when it wants to be woken.
        shared.doorbells.iter().for_each(|doorbells| doorbells.tail.wake());
        Ok(())
    }

    /// A new queue's shadow doorbell.
    fn start_shadow(&mut self, shadow: Option<u64>, value: u32) -> Result<(), Status> {
        match shadow {
            Some(address) => Ok(self.dma.write(address, &value.to_le_bytes())?),
            None => Ok(()),
        }
    }

    /// A queue that cannot be accessed is fatal.
    fn usable<T, E>(&self, result: Result<T, E>) -> Result<T, Ended> {
        result.map_err(|_| {
            self.shared.fatal();
            Ended
        })
    }
}

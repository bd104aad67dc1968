//! The admin commands (section 5): what each asks for. This module does no DMA and knows no thread.

use std::sync::Arc;
use std::time::{Duration, Instant};

use zerocopy::little_endian::U64;

use super::disk::Disk;
use super::event::Reports;
use super::features::{self, FeatureValue, Features};
use super::identify::{AER_LIMIT, identify};
use super::log;
use super::queue_table::{NewQueue, QueueTable};
use super::saved::SavedCommands;
use super::spec::{Sqe, Status, TRANSFER_MAX, admin};

/// What the executor of a command must do before it completes the command.
#[derive(Debug)]
pub(super) enum AdminAction {
    /// Nothing. The command completes with this result.
    Complete(u32),
    /// The command completes later, if ever.
    Wait,
    /// Send these data to the host.
    Send(Vec<u8>),
    /// Send a log page to the host, and then call [`Commands::log_was_read`] with the identifier, if there is one.
    SendLog(Vec<u8>, Option<u8>),
    /// Create a completion queue with this vector, and then add it to [`Commands::queues`].
    CreateCq(NewQueue, Option<u16>),
    /// Create a submission queue for this completion queue, and then add it to [`Commands::queues`].
    CreateSq(NewQueue, u16),
    DeleteCq(u16),
    DeleteSq(u16),
    /// Complete this waiting command as aborted first.
    Abort(Waiting),
    /// Use shadow doorbells and event indexes at these addresses from now on.
    ShadowDoorbells {
        doorbells: u64,
        event_indexes: u64,
    },
}

/// A command that waits, and the time at which it was fetched.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waiting {
    pub sqe: Sqe,
    pub fetched: Instant,
}

/// The state that admin commands have set since the controller was enabled.
pub(super) struct Commands {
    disk: Arc<Disk>,
    reports: Arc<Reports>,
    /// The memory page size in bytes, which does not change while the controller is enabled.
    page_size: u64,
    features: Features,
    /// The I/O queues.
    pub queues: QueueTable,
    /// Asynchronous Event Requests that wait for an event.
    waiting: Vec<Waiting>,
}

impl Commands {
    /// The state of a controller that was just enabled.
    pub fn new(disk: Arc<Disk>, reports: Arc<Reports>, page_size: u64) -> Self {
        let queues = QueueTable::new(disk.config().queues);
        Commands { disk, reports, page_size, features: Features::default(), queues, waiting: Vec::new() }
    }

    /// The memory page size in bytes.
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// The number of bytes that a command needs from the host.
    ///
    /// # Errors
    /// The command cannot be executed.
    pub fn data_len(&self, sqe: &Sqe) -> Result<usize, Status> {
        // Over PCI Express, admin commands use PRPs.
        if admin::IMPLEMENTED.contains(&sqe.opcode) && (sqe.fuse() != 0 || sqe.psdt() != 0) {
            return Err(Status::INVALID_FIELD);
        }
        Ok(if sqe.opcode == admin::SET_FEATURES { features::data_len(sqe) } else { 0 })
    }

    /// Decides what a command that was fetched at `fetched` asks for. `data` came with it. `shadow_doorbells` says
    /// whether they are offered.
    pub fn command(
        &mut self,
        sqe: &Sqe,
        data: &[u8],
        fetched: Instant,
        shadow_doorbells: bool,
    ) -> Result<AdminAction, Status> {
        match sqe.opcode {
            admin::DELETE_SQ => self.queues.delete_sq(sqe).map(AdminAction::DeleteSq),
            admin::CREATE_SQ => {
                self.queues.new_sq(sqe, self.page_size).map(|(queue, cq)| AdminAction::CreateSq(queue, cq))
            }
            admin::GET_LOG_PAGE => self.get_log_page(sqe),
            admin::DELETE_CQ => self.queues.delete_cq(sqe).map(AdminAction::DeleteCq),
            admin::CREATE_CQ => {
                self.queues.new_cq(sqe, self.page_size).map(|(queue, vector)| AdminAction::CreateCq(queue, vector))
            }
            admin::IDENTIFY => identify(&self.disk, sqe, shadow_doorbells).map(AdminAction::Send),
            admin::ABORT => Ok(self.abort(sqe)),
            admin::SET_FEATURES => self.set_features(sqe, data).map(AdminAction::Complete),
            admin::GET_FEATURES => self.get_features(sqe),
            // Completes when there is an event.
            admin::ASYNC_EVENT_REQUEST if self.waiting.len() < AER_LIMIT => {
                self.waiting.push(Waiting { sqe: *sqe, fetched });
                Ok(AdminAction::Wait)
            }
            admin::ASYNC_EVENT_REQUEST => Err(Status::AER_LIMIT_EXCEEDED),
            admin::DOORBELL_BUFFER_CONFIG if shadow_doorbells => self.doorbell_buffer_config(sqe),
            _ => Err(Status::INVALID_OPCODE),
        }
    }

    /// Notes that the host has read a log page, so that events about it may be sent again.
    pub fn log_was_read(&self, log: u8) {
        self.reports.events().read(log);
    }

    /// Takes an Asynchronous Event Request that completes now, and its result.
    pub fn take_event(&mut self) -> Option<(Waiting, u32)> {
        if self.waiting.is_empty() {
            return None;
        }
        let result = self.reports.events().take()?;
        Some((self.waiting.remove(0), result))
    }

    /// Whether writes need not be durable at once.
    pub fn write_cache(&self) -> bool {
        self.features.write_cache()
    }

    fn get_log_page(&self, sqe: &Sqe) -> Result<AdminAction, Status> {
        const RETAIN_EVENT: u32 = 1 << 15;
        let log = sqe.cdw10.get() as u8;
        let dwords = u64::from(sqe.cdw10.get() >> 16) | u64::from(sqe.cdw11.get() & 0xffff) << 16;
        let len = (dwords + 1) * 4;
        let offset = u64::from(sqe.cdw12.get()) | u64::from(sqe.cdw13.get()) << 32;
        let page = log::page(&self.disk, &self.reports, self.features.temperature_warning(), log)?;
        let Some(rest) = usize::try_from(offset).ok().and_then(|at| page.get(at..)) else {
            return Err(Status::INVALID_FIELD);
        };
        if offset % 4 != 0 || len > TRANSFER_MAX {
            return Err(Status::INVALID_FIELD);
        }
        let mut data = rest.to_vec();
        data.resize(len as usize, 0);
        Ok(AdminAction::SendLog(data, (sqe.cdw10.get() & RETAIN_EVENT == 0).then_some(log)))
    }

    /// Only Asynchronous Event Requests can be aborted. Any other command is complete, or about to be, when it is
    /// found.
    fn abort(&mut self, sqe: &Sqe) -> AdminAction {
        const NOT_ABORTED: u32 = 1;
        let queue = sqe.cdw10.get() as u16;
        let cid = (sqe.cdw10.get() >> 16) as u16;
        match self.waiting.iter().position(|waiting| queue == 0 && waiting.sqe.cid.get() == cid) {
            Some(at) => AdminAction::Abort(self.waiting.remove(at)),
            None => AdminAction::Complete(NOT_ABORTED),
        }
    }

    fn vectors(&self) -> u16 {
        self.disk.config().queues + 1
    }

    fn set_features(&mut self, sqe: &Sqe, data: &[u8]) -> Result<u32, Status> {
        if sqe.cdw10.get() as u8 == features::id::NUMBER_OF_QUEUES {
            return self.queues.set_number(sqe.cdw11.get());
        }
        self.features.set(sqe, data, self.vectors())?;
        if self.features.temperature_event() {
            self.reports.events().temperature();
        }
        Ok(0)
    }

    fn get_features(&self, sqe: &Sqe) -> Result<AdminAction, Status> {
        if sqe.cdw10.get() as u8 == features::id::NUMBER_OF_QUEUES {
            return Ok(AdminAction::Complete(self.queues.number()));
        }
        Ok(match self.features.get(sqe, self.vectors())? {
            FeatureValue::Dword(value) => AdminAction::Complete(value),
            FeatureValue::Data(data) => AdminAction::Send(data),
        })
    }

    fn doorbell_buffer_config(&self, sqe: &Sqe) -> Result<AdminAction, Status> {
        let [doorbells, event_indexes] = sqe.data.map(U64::get);
        if doorbells == 0 || event_indexes == 0 {
            return Err(Status::INVALID_FIELD);
        }
        if doorbells % self.page_size != 0 || event_indexes % self.page_size != 0 {
            return Err(Status::PRP_OFFSET_INVALID);
        }
        Ok(AdminAction::ShadowDoorbells { doorbells, event_indexes })
    }

    /// The state to save.
    pub fn save(&self) -> SavedCommands {
        let waiting = |waiting: &Waiting| (waiting.sqe.words(), waiting.fetched.elapsed().as_nanos() as u64);
        SavedCommands {
            features: self.features.save(),
            granted: self.queues.granted(),
            waiting: self.waiting.iter().map(waiting).collect(),
        }
    }

    /// Loads a saved state, without its queues.
    ///
    /// # Errors
    /// The state is not possible. The error says why.
    pub fn load(&mut self, saved: &SavedCommands) -> Result<(), &'static str> {
        if saved.waiting.len() > AER_LIMIT {
            return Err("too many requests for events wait");
        }
        self.features = Features::load(&saved.features).ok_or("a feature has an impossible value")?;
        self.queues.grant(saved.granted).ok_or("an impossible number of queues is granted")?;
        let now = Instant::now();
        let since = |waited: u64| now.checked_sub(Duration::from_nanos(waited)).unwrap_or(now);
        let waiting = |&(sqe, waited): &([u64; 8], u64)| Waiting { sqe: Sqe::from_words(sqe), fetched: since(waited) };
        self.waiting = saved.waiting.iter().map(waiting).collect();
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::super::disk::NvmeConfig;
    use super::*;

    fn commands() -> Commands {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let disk = Disk::open(NvmeConfig::new(image.path(), "serial")).unwrap();
        Commands::new(disk, Arc::default(), 4096)
    }

    fn sqe(opcode: u8, cdw10: u32, cdw11: u32) -> Sqe {
        Sqe { opcode, cdw10: cdw10.into(), cdw11: cdw11.into(), ..Sqe::default() }
    }

    fn give(commands: &mut Commands, sqe: &Sqe) -> Result<AdminAction, Status> {
        commands.command(sqe, &[0; 8], Instant::now(), true)
    }

    #[test]
    fn requests_for_events_wait_for_one_and_can_be_aborted() {
        let mut commands = commands();
        let request = |cid: u16| Sqe { cid: cid.into(), ..sqe(admin::ASYNC_EVENT_REQUEST, 0, 0) };
        for cid in 1..=4 {
            assert!(matches!(give(&mut commands, &request(cid)), Ok(AdminAction::Wait)));
        }
        assert_eq!(give(&mut commands, &request(5)).unwrap_err(), Status::AER_LIMIT_EXCEEDED);
        assert!(commands.take_event().is_none());
        commands.reports.events().error(1);
        let (first, result) = commands.take_event().unwrap();
        assert_eq!((first.sqe.cid.get(), result), (1, 1 << 8 | 1 << 16));
        // Until its log page is read, there is one event of a type.
        commands.reports.events().error(1);
        assert!(commands.take_event().is_none());
        let Ok(AdminAction::SendLog(data, Some(log))) = give(&mut commands, &sqe(admin::GET_LOG_PAGE, 15 << 16 | 1, 0))
        else {
            panic!("the error log is not given");
        };
        assert_eq!(data, [0; 64]);
        commands.log_was_read(log);
        assert_eq!(commands.take_event().unwrap().0.sqe.cid.get(), 2);
        let Ok(AdminAction::Abort(aborted)) = give(&mut commands, &sqe(admin::ABORT, 4 << 16, 0)) else {
            panic!("the request is not aborted");
        };
        assert_eq!(aborted.sqe.cid.get(), 4);
        assert!(matches!(give(&mut commands, &sqe(admin::ABORT, 4 << 16, 0)), Ok(AdminAction::Complete(1))));
    }

    #[test]
    fn a_saved_state_goes_on_in_another_controller() {
        let (mut commands, mut other) = (commands(), commands());
        give(&mut commands, &sqe(admin::SET_FEATURES, 7, 1)).unwrap();
        give(&mut commands, &sqe(admin::SET_FEATURES, 6, 0)).unwrap();
        give(&mut commands, &sqe(admin::ASYNC_EVENT_REQUEST, 0, 0)).unwrap();
        other.load(&commands.save()).unwrap();
        assert!(!other.write_cache());
        assert!(matches!(give(&mut other, &sqe(admin::GET_FEATURES, 7, 0)), Ok(AdminAction::Complete(1))));
        other.reports.events().error(0);
        assert!(other.take_event().is_some());
    }
}

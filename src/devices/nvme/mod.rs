//! An NVMe controller (NVM Express Base Specification 1.4) with one namespace in a raw file.
//!
//! The state machines do no DMA and know no thread. `registers` decides what a write of a register asks for, `commands`
//! what an admin command does, with the existing queues in `queue_table`, and `operation` what an I/O command does.
//!
//! Each executor has its own access to guest memory. The vfio-user thread serves registers and doorbells ([`Nvme`]),
//! and waits for I/O only at a reset. The admin queue has a thread (`admin`), which also creates and deletes the I/O
//! queues. Each I/O submission queue has a thread (`worker`, `io`).

mod adaptive_poll;
mod admin;
mod commands;
mod config;
mod disk;
mod event;
mod features;
mod identify;
mod io;
mod log;
mod operation;
mod pointer;
mod queue;
mod queue_table;
mod registers;
mod saved;
mod shared;
mod spec;
mod worker;

use std::sync::Arc;
use std::sync::atomic::Ordering;

pub use config::MODEL;
pub use disk::{Disk, DiskCounters, NvmeConfig, OpenError};

use crate::devices::kit::{Interruption, Lifecycle, LoadError, SavedState, Task, trace_mmio};
use crate::dma::Dma;
use crate::pci::{Bar, Function, FunctionContext, Identity, PinSource};
use crate::sync::lock;
use admin::Admin;
use registers::{DOORBELLS, REGISTERS, RegisterRequest, Registers};
use saved::SavedController;
use shared::SharedController;
use spec::{CSTS_FATAL, CSTS_READY, CSTS_SHUTDOWN, CSTS_SHUTDOWN_COMPLETE, CSTS_SHUTDOWN_OCCURRING};
use viommu_trace::event::Access;
use viommu_wire::model;

/// The ids of SPDK's NVMe controller over vfio-user. With the ids of QEMU's controller, drivers would apply workarounds
/// for its older versions: Linux would not use Write Zeroes and the namespace's identifiers.
const VENDOR: u16 = 0x4e58;
const DEVICE: u16 = 0x0001;
const SUBSYSTEM_VENDOR: u16 = VENDOR;
const SUBSYSTEM: u16 = DEVICE;
/// Mass storage, non-volatile memory, NVM Express.
const CLASS: u32 = 0x01_08_02;

/// Room for the registers, and for the doorbells of 64 queue pairs and the admin queue.
const BAR_SIZE: u64 = 0x2000;

/// An NVMe controller.
pub struct Nvme {
    shared: Arc<SharedController>,
    registers: Registers,
    /// The vfio-user thread's access to the shadow doorbells.
    dma: Dma,
    enabled: Option<Enabled>,
    /// Whether it is quiesced.
    at_rest: bool,
}

/// The queues of an enabled controller.
enum Enabled {
    Running(Task<Admin>),
    Resting(Box<Admin>),
}

impl Nvme {
    /// A controller in its power-on state.
    pub fn new(context: FunctionContext, disk: Arc<Disk>) -> Self {
        disk.count(|c| &c.power_cycles, 1);
        // The previous controller may have gone with masked vectors.
        context.interrupts.mask_msi(0);
        let dma = context.dma.open();
        let shared = Arc::new(SharedController::new(context, disk));
        let source: Arc<dyn PinSource> = shared.clone();
        shared.context.interrupts.set_pin_source(Arc::downgrade(&source));
        Nvme { shared, registers: Registers::default(), dma, enabled: None, at_rest: false }
    }

    /// Masks the vectors that the registers name, and no others. A vector that is unmasked is sent if its queues have
    /// unacknowledged entries, even if it was sent for them before.
    fn mask_interrupts(&mut self) {
        let unmasked = self.shared.context.interrupts.mask_msi(self.registers.interrupt_mask);
        // Unlocked before a queue interrupts, since the pin then asks all of them.
        let cqs = lock(&self.shared.cqs).clone();
        for cq in &cqs {
            if cq.unmasked(&mut self.dma, &self.shared, unmasked).is_err() {
                self.shared.fatal();
            }
        }
    }

    /// Does what a write to a register asks for.
    fn act(&mut self, request: RegisterRequest) {
        if request.mask {
            self.mask_interrupts();
        }
        if request.disable {
            self.disable();
        }
        // The threads read the page size from CC, so it changes only while there are none.
        self.shared.cc.store(self.registers.cc.0, Ordering::SeqCst);
        if request.enable {
            self.enable();
        }
        if let Some(notification) = request.shutdown {
            self.shut_down(notification);
        }
    }

    fn enable(&mut self) {
        let started = match self.registers.admin_queues() {
            Some(queues) => self.start(Admin::new(&self.shared, self.registers.page_size(), queues)),
            None => false,
        };
        self.shared.csts.store(if started { CSTS_READY } else { CSTS_FATAL }, Ordering::SeqCst);
        self.shared.trace_state();
    }

    /// Starts the admin queue's thread, unless the controller is at rest. Returns false if the system has no thread to
    /// give.
    fn start(&mut self, admin: Admin) -> bool {
        if self.at_rest {
            self.enabled = Some(Enabled::Resting(Box::new(admin)));
            return true;
        }
        match Task::start(&self.shared.context, admin.name(), admin) {
            Ok(task) => {
                self.enabled = Some(Enabled::Running(task));
                true
            }
            Err(error) => {
                ::log::error!("No thread for an admin queue: {error}");
                false
            }
        }
    }

    /// Resets the controller. When this returns, all queues are gone.
    fn disable(&mut self) {
        self.stop();
        self.shared.cc.store(0, Ordering::SeqCst);
        self.shared.csts.store(0, Ordering::SeqCst);
        self.shared.shutdown.store(0, Ordering::SeqCst);
        self.shared.shadow.set(0, 0);
        self.shared.write_cache.store(true, Ordering::Relaxed);
        *self.shared.reports.events() = Default::default();
        self.registers.interrupt_mask = 0;
        self.mask_interrupts();
        self.shared.trace_state();
    }

    /// Ends all threads. After that they do no DMA and send no interrupt.
    fn stop(&mut self) {
        match self.enabled.take() {
            Some(Enabled::Running(task)) => drop(task.end(Interruption::Stop)),
            Some(Enabled::Resting(mut admin)) => admin.end(),
            // A saved state that was refused may have left some queues.
            None => lock(&self.shared.cqs).clear(),
        }
    }

    /// Begins a shutdown. The admin thread completes it.
    fn shut_down(&mut self, notification: u8) {
        let status = if self.enabled.is_some() { CSTS_SHUTDOWN_OCCURRING } else { CSTS_SHUTDOWN_COMPLETE };
        let set = |csts: u32| Some(csts & !CSTS_SHUTDOWN | status);
        let _ = self.shared.csts.fetch_update(Ordering::SeqCst, Ordering::SeqCst, set);
        self.shared.trace_state();
        if self.enabled.is_some() {
            self.shared.shutdown.store(notification, Ordering::Release);
        }
        if let Some(Enabled::Running(task)) = &self.enabled {
            task.wake();
        }
    }
}

impl Lifecycle for Nvme {
    fn quiesce(&mut self) {
        self.at_rest = true;
        self.enabled = match self.enabled.take() {
            Some(Enabled::Running(task)) => task.end(Interruption::Quiesce).map(Box::new).map(Enabled::Resting),
            other => other,
        };
    }

    fn resume(&mut self) {
        self.at_rest = false;
        match self.enabled.take() {
            Some(Enabled::Resting(admin)) if !admin.has_ended() => {
                if !self.start(*admin) {
                    self.shared.fatal();
                }
            }
            other => self.enabled = other,
        }
    }

    fn save(&self) -> SavedState {
        let shared = &self.shared;
        let admin = match &self.enabled {
            Some(Enabled::Resting(admin)) => Some(admin.save()),
            _ => None,
        };
        let state = SavedController {
            registers: self.registers.clone(),
            csts: shared.csts.load(Ordering::SeqCst),
            shutdown: shared.shutdown.load(Ordering::SeqCst),
            shadow: shared.shadow.get(),
            events: shared.reports.events().clone(),
            error_log: shared.reports.errors().clone(),
            admin,
        };
        SavedState::new(MODEL.name, saved::VERSION, &state)
    }

    fn load(&mut self, state: &SavedState) -> Result<(), LoadError> {
        self.reset();
        let saved: SavedController = state.read(MODEL.name, saved::VERSION)?;
        let loaded = self.take_over(&saved);
        if loaded.is_err() {
            self.reset();
        }
        loaded.map_err(|what| LoadError::Impossible { model: MODEL.name, what })
    }
}

impl Nvme {
    /// Loads a saved state.
    ///
    /// # Errors
    /// The state is not possible. The error says why.
    fn take_over(&mut self, saved: &SavedController) -> Result<(), &'static str> {
        saved.check()?;
        let (shared, registers) = (self.shared.clone(), saved.registers.clone());
        if let Some(saved) = &saved.admin {
            let admin = Admin::load(&shared, saved, registers.cc)?;
            shared.write_cache.store(admin.commands.write_cache(), Ordering::Relaxed);
            self.enabled = Some(Enabled::Resting(Box::new(admin)));
        }
        self.registers = registers;
        shared.cc.store(self.registers.cc.0, Ordering::SeqCst);
        shared.csts.store(saved.csts, Ordering::SeqCst);
        shared.shutdown.store(saved.shutdown, Ordering::SeqCst);
        shared.shadow.set(saved.shadow.0, saved.shadow.1);
        *shared.reports.events() = saved.events.clone();
        *shared.reports.errors() = saved.error_log.clone();
        shared.context.interrupts.mask_msi(self.registers.interrupt_mask);
        shared.trace_state();
        Ok(())
    }
}

impl Function for Nvme {
    fn identity(&self) -> Identity {
        Identity {
            vendor: VENDOR,
            device: DEVICE,
            subsystem_vendor: SUBSYSTEM_VENDOR,
            subsystem: SUBSYSTEM,
            class: CLASS,
            revision: 2,
            bars: const { &[Bar::registers(0, BAR_SIZE)] },
            capabilities: &[],
            vectors: self.shared.disk.config().queues + 1,
            integrated: false,
        }
    }

    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        let csts = self.shared.csts.load(Ordering::SeqCst);
        REGISTERS.read(offset, data, |id| self.registers.read(id, csts));
        trace_mmio(&self.shared.context, model::Model::Nvme, Access::Read, bar, offset, data);
    }

    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]) {
        trace_mmio(&self.shared.context, model::Model::Nvme, Access::Write, bar, offset, data);
        // Registers are accessed as dwords or aligned pairs of them (section 3.1).
        if !offset.is_multiple_of(4) || !data.len().is_multiple_of(4) {
            return;
        }
        for write in REGISTERS.writes(offset, data) {
            let value = write.over(self.registers.read(write.id(), 0));
            let request = self.registers.write(write.id(), value);
            self.act(request);
        }
        for (at, dword) in (offset..).step_by(4).zip(data.chunks_exact(4)) {
            let Some(at) = at.checked_sub(DOORBELLS) else { continue };
            let value = dword.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte));
            let index = (at / 4) as usize;
            self.shared.ring(index / 2, index % 2 == 1, value);
        }
    }

    fn reset(&mut self) {
        self.disable();
        self.registers.reset();
    }
}

impl Drop for Nvme {
    fn drop(&mut self) {
        let complete = self.shared.csts.load(Ordering::SeqCst) & CSTS_SHUTDOWN == CSTS_SHUTDOWN_COMPLETE;
        if self.enabled.is_some() && !complete {
            self.shared.disk.count(|c| &c.unsafe_shutdowns, 1);
        }
        self.stop();
    }
}

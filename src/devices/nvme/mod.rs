//! An NVMe controller (NVM Express base specification 1.4) with one namespace in a raw file.
//!
//! Who does what: registers and doorbells are the vfio-user thread's ([`Nvme`]), which never waits for I/O but at a
//! reset; the admin queue has a thread, which also creates and deletes the I/O queues; each I/O submission queue has
//! one, with its own way to memory.

mod adaptive_poll;
mod admin;
mod config;
mod disk;
mod event;
mod features;
mod identify;
mod io;
mod log;
mod pointer;
mod queue;
mod shared;
mod spec;
mod worker;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

pub use config::MODEL;
pub use disk::{Counters, Disk, NvmeConfig, OpenError};

use crate::dma::Dma;
use crate::pci::{Bar, Function, FunctionContext, Identity, PinSource};
use admin::{Admin, Orders};
use shared::{Shared, lock};
use spec::{
    CC_ENABLE, CC_FIXED, CSTS_FATAL, CSTS_READY, CSTS_SHUTDOWN, CSTS_SHUTDOWN_COMPLETE, CSTS_SHUTDOWN_OCCURRING,
    MPS_MAX, QUEUE_ENTRIES_MAX, VERSION, register,
};

/// The numbers of SPDK's NVMe controller over vfio-user. QEMU's own would bring drivers' workarounds for older versions
/// of that one with them: Linux would leave Write Zeroes and the namespace's identifiers out.
const VENDOR: u16 = 0x4e58;
const DEVICE: u16 = 0x0001;
const SUBSYSTEM_VENDOR: u16 = VENDOR;
const SUBSYSTEM: u16 = DEVICE;
/// Mass storage, non-volatile memory, NVM Express.
const CLASS: u32 = 0x01_08_02;

/// Registers and the doorbells of 64 queue pairs and the admin queue.
const BAR_SIZE: u64 = 0x2000;

/// How long the host should wait for CSTS.RDY to change, in units of 500 ms.
const READY_TIMEOUT: u64 = 60;

/// CC.SHN.
fn shutdown_notification(cc: u32) -> u8 {
    (cc >> 14 & 3) as u8
}

/// An NVMe controller.
pub struct Nvme {
    shared: Arc<Shared>,
    /// Admin queue attributes and addresses, which a reset by CC.EN keeps.
    aqa: u32,
    asq: u64,
    acq: u64,
    /// Vectors that are masked, a bit each (sections 3.1.3 and 3.1.4).
    interrupt_mask: u32,
    /// The vfio-user thread's way to the shadow doorbells.
    dma: Dma,
    enabled: Option<Enabled>,
}

/// An enabled controller.
struct Enabled {
    orders: Arc<Orders>,
    thread: JoinHandle<()>,
}

impl Nvme {
    /// A controller as it is at power-on.
    pub fn new(context: FunctionContext, disk: Arc<Disk>) -> Self {
        disk.count(|c| &c.power_cycles, 1);
        // The one of before may have gone with some masked.
        context.interrupts.mask_msi(0);
        let dma = context.dma.open();
        let shared = Arc::new(Shared::new(context, disk));
        let source: Arc<dyn PinSource> = shared.clone();
        shared.context.interrupts.set_pin_source(Arc::downgrade(&source));
        Nvme { shared, aqa: 0, asq: 0, acq: 0, interrupt_mask: 0, dma, enabled: None }
    }

    fn capabilities() -> u64 {
        const CONTIGUOUS_QUEUES: u64 = 1 << 16;
        const NVM_COMMAND_SET: u64 = 1 << 37;
        u64::from(QUEUE_ENTRIES_MAX - 1)
            | CONTIGUOUS_QUEUES
            | READY_TIMEOUT << 24
            | NVM_COMMAND_SET
            | u64::from(MPS_MAX) << 52
    }

    /// The register's dword at `offset`, a multiple of 4.
    fn register(&self, offset: u64) -> u32 {
        match offset {
            register::CAP => Self::capabilities() as u32,
            0x04 => (Self::capabilities() >> 32) as u32,
            register::VS => VERSION,
            register::INTMS | register::INTMC => self.interrupt_mask,
            register::CC => self.shared.cc.load(Ordering::SeqCst),
            register::CSTS => self.shared.csts.load(Ordering::SeqCst),
            register::AQA => self.aqa,
            register::ASQ => self.asq as u32,
            0x2c => (self.asq >> 32) as u32,
            register::ACQ => self.acq as u32,
            0x34 => (self.acq >> 32) as u32,
            _ => 0,
        }
    }

    fn set_register(&mut self, offset: u64, value: u32) {
        let low = |old: u64| old >> 32 << 32 | u64::from(value & !0xfff);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        match offset {
            register::INTMS => self.mask_interrupts(self.interrupt_mask | value),
            register::INTMC => self.mask_interrupts(self.interrupt_mask & !value),
            register::CC => self.set_cc(value),
            register::AQA => self.aqa = value & 0x0fff_0fff,
            register::ASQ => self.asq = low(self.asq),
            0x2c => self.asq = high(self.asq),
            register::ACQ => self.acq = low(self.acq),
            0x34 => self.acq = high(self.acq),
            _ => {}
        }
    }

    /// Masks the vectors of these bits, and no others. Those that are not masked any more are sent if their queues still
    /// have something to tell, whether it was told before or not.
    fn mask_interrupts(&mut self, mask: u32) {
        self.interrupt_mask = mask;
        let unmasked = self.shared.context.interrupts.mask_msi(mask);
        // Not locked any more when one interrupts, since the pin asks for all of them then.
        let cqs = lock(&self.shared.cqs).clone();
        for cq in &cqs {
            if cq.unmasked(&mut self.dma, &self.shared, unmasked).is_err() {
                self.shared.fatal();
            }
        }
    }

    /// The threads read CC for the page size, so it changes only while there are none; while the controller is enabled,
    /// the fields that the host must not change then (section 3.1.5) stay as they are.
    fn set_cc(&mut self, mut cc: u32) {
        let before = self.shared.cc.load(Ordering::SeqCst);
        let (was, is) = (before & CC_ENABLE != 0, cc & CC_ENABLE != 0);
        if was && is {
            cc = cc & !CC_FIXED | before & CC_FIXED;
        } else if was {
            self.disable();
        }
        self.shared.cc.store(cc, Ordering::SeqCst);
        if is && !was {
            self.enable(cc);
        }
        if shutdown_notification(cc) != 0 && shutdown_notification(before) == 0 {
            self.shut_down(shutdown_notification(cc));
        }
    }

    fn enable(&mut self, cc: u32) {
        // Command set, page size, arbitration, and what the admin queue must be.
        let supported = cc >> 4 & 7 == 0 && cc >> 7 & 0xf <= MPS_MAX && cc >> 11 & 7 == 0;
        let sq_size = (self.aqa & 0xfff) + 1;
        let cq_size = (self.aqa >> 16) + 1;
        let page = spec::page_size(cc);
        let aligned = self.asq.is_multiple_of(page) && self.acq.is_multiple_of(page);
        if !supported || !aligned || sq_size < 2 || cq_size < 2 {
            self.shared.csts.store(CSTS_FATAL, Ordering::SeqCst);
            self.shared.trace_state();
            return;
        }
        let orders = Arc::new(Orders::default());
        let admin = Admin::new(&self.shared, &orders, (self.asq, sq_size), (self.acq, cq_size));
        let name = format!("nvme {:x} admin", self.shared.context.dma.endpoint());
        match std::thread::Builder::new().name(name).spawn(move || admin.run()) {
            Ok(thread) => {
                self.enabled = Some(Enabled { orders, thread });
                self.shared.csts.store(CSTS_READY, Ordering::SeqCst);
            }
            Err(error) => {
                ::log::error!("No thread for an admin queue: {error}");
                self.shared.csts.store(CSTS_FATAL, Ordering::SeqCst);
            }
        }
        self.shared.trace_state();
    }

    /// A controller reset: all queues are gone when it returns.
    fn disable(&mut self) {
        self.stop();
        self.shared.cc.store(0, Ordering::SeqCst);
        self.shared.csts.store(0, Ordering::SeqCst);
        self.shared.shadow.set(0, 0);
        self.shared.write_cache.store(true, Ordering::Relaxed);
        *lock(&self.shared.features) = Default::default();
        *lock(&self.shared.events) = Default::default();
        self.mask_interrupts(0);
        self.shared.trace_state();
    }

    /// Ends all threads. There is no DMA and no interrupt of theirs after that.
    fn stop(&mut self) {
        let Some(Enabled { orders, thread }) = self.enabled.take() else { return };
        orders.stop.store(true, Ordering::Release);
        thread.thread().unpark();
        if thread.join().is_err() {
            ::log::error!("The thread of an admin queue panicked");
        }
    }

    /// Begins a shutdown; the admin thread completes it.
    fn shut_down(&mut self, notification: u8) {
        let status = if self.enabled.is_some() { CSTS_SHUTDOWN_OCCURRING } else { CSTS_SHUTDOWN_COMPLETE };
        let set = |csts: u32| Some(csts & !CSTS_SHUTDOWN | status);
        let _ = self.shared.csts.fetch_update(Ordering::SeqCst, Ordering::SeqCst, set);
        self.shared.trace_state();
        if let Some(Enabled { orders, thread }) = &self.enabled {
            orders.shutdown.store(notification, Ordering::Release);
            thread.thread().unpark();
        }
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
            bars: &[Bar { index: 0, size: BAR_SIZE, wide: true }],
            vectors: self.shared.disk.config().queues + 1,
            integrated: false,
        }
    }

    fn bar_read(&mut self, _bar: u8, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.register(at & !3).to_le_bytes()[(at & 3) as usize];
        }
    }

    fn bar_write(&mut self, _bar: u8, offset: u64, data: &[u8]) {
        // Registers are written as dwords or pairs of them (section 3.1).
        if !offset.is_multiple_of(4) || !data.len().is_multiple_of(4) {
            return;
        }
        for (at, dword) in (offset..).step_by(4).zip(data.chunks_exact(4)) {
            let value = dword.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte));
            if at < register::DOORBELLS {
                self.set_register(at, value);
            } else {
                let index = ((at - register::DOORBELLS) / 4) as usize;
                self.shared.ring(index / 2, index % 2 == 1, value);
            }
        }
    }

    fn reset(&mut self) {
        self.disable();
        self.aqa = 0;
        self.asq = 0;
        self.acq = 0;
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

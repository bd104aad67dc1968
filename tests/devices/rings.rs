//! Command rings of the kit, in a model of this test that a driver uses over a vfio-user socket. It copies 8 bytes for
//! each command, and completes it with a phase bit and MSI-X.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};
use vfio_bindings::bindings::vfio::*;
use vfio_user::Client;
use viommu::devices::kit::registers::{Register, RegisterAccess, RegisterMap, RegisterWrite};
use viommu::devices::kit::ring::{COMMAND, COMPLETION, CommandRing, CompletionRing, RingSpan};
use viommu::devices::kit::{Engine, Executor, SharedMachine, StateMachine, ThreadContext};
use viommu::pci::{Bar, Function, FunctionContext, Identity};
use viommu_testkit::function::Served;
use viommu_testkit::trace::Recorder;
use viommu_testkit::{Numbers, PATIENCE, memfd, wait_until};
use viommu_trace::Kind;
use viommu_wire::model;
use vmm_sys_util::eventfd::EventFd;

const ENDPOINT: u32 = 0x20;
const RAM: u64 = 1 << 20;
/// How many commands are fetched at once.
const BATCH: usize = 8;

const COMMANDS: u64 = 0x00;
const COMPLETIONS: u64 = 0x08;
const SIZES: u64 = 0x10;
const TAIL: u64 = 0x18;
const HEAD: u64 = 0x1c;
const STATUS: u64 = 0x20;
const OFF: u32 = 0;
const ON: u32 = 1;
const BROKEN: u32 = 2;

#[derive(Clone, Copy)]
enum Id {
    Commands,
    Completions,
    Sizes,
    Tail,
    Head,
    Status,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
struct Completion {
    id: u16,
    failed: bool,
}

#[derive(Default, Serialize, Deserialize)]
struct Copier {
    commands: u64,
    completions: u64,
    rings: Option<(CommandRing, CompletionRing)>,
    broken: bool,
    /// Completions that are to be posted.
    done: VecDeque<Completion>,
    interrupt: bool,
}

enum Job {
    Fetch(RingSpan),
    Post(RingSpan, Vec<Completion>),
}

impl StateMachine for Copier {
    type Register = Id;
    type Job = Job;
    type Executor = Copies;

    const NAME: &'static str = "copier";
    const VERSION: u32 = 1;
    const IDENTITY: Identity = Identity {
        vendor: 0x1234,
        device: 0x0001,
        subsystem_vendor: 0,
        subsystem: 0,
        class: 0x08_80_00,
        revision: 0,
        bars: &[Bar::registers(0, 4096)],
        capabilities: &[],
        vectors: 1,
        integrated: false,
    };
    const REGISTERS: RegisterMap<Id> = RegisterMap::new(&[
        Register::new(Id::Commands, model::Register::new("COMMANDS", COMMANDS as u32, 8), RegisterAccess::ReadWrite),
        Register::new(
            Id::Completions,
            model::Register::new("COMPLETIONS", COMPLETIONS as u32, 8),
            RegisterAccess::ReadWrite,
        ),
        Register::new(Id::Sizes, model::Register::new("SIZES", SIZES as u32, 8), RegisterAccess::WriteOnly).doorbell(),
        Register::new(Id::Tail, model::Register::new("TAIL", TAIL as u32, 4), RegisterAccess::WriteOnly).doorbell(),
        Register::new(Id::Head, model::Register::new("HEAD", HEAD as u32, 4), RegisterAccess::WriteOnly).doorbell(),
        Register::new(Id::Status, model::Register::new("STATUS", STATUS as u32, 4), RegisterAccess::ReadOnly),
    ]);

    fn read(&mut self, register: Id) -> u64 {
        match register {
            Id::Commands => self.commands,
            Id::Completions => self.completions,
            Id::Status if self.broken => BROKEN.into(),
            Id::Status => u32::from(self.rings.is_some()).into(),
            Id::Sizes | Id::Tail | Id::Head => 0,
        }
    }

    fn write(&mut self, write: &RegisterWrite<'_, Id>) {
        match write.id() {
            Id::Commands => self.commands = write.over(self.commands),
            Id::Completions => self.completions = write.over(self.completions),
            // Rings can be set once, until a reset.
            Id::Sizes if self.rings.is_none() => {
                let sizes = write.over(0);
                let commands = CommandRing::new(self.commands, sizes as u32);
                self.rings = commands.zip(CompletionRing::new(self.completions, (sizes >> 32) as u32));
                self.broken |= self.rings.is_none();
            }
            Id::Tail => {
                let possible = self.rings.as_mut().is_some_and(|(ring, _)| ring.set_tail(write.over(0) as u32));
                self.broken |= !possible;
            }
            Id::Head => {
                let possible = self.rings.as_mut().is_some_and(|(_, ring)| ring.set_head(write.over(0) as u32));
                self.broken |= !possible;
            }
            Id::Sizes | Id::Status => {}
        }
    }

    /// All completions are posted before more commands are fetched, so that there is never more than one batch of them.
    fn take_job(&mut self) -> Option<Job> {
        let (commands, completions) = self.rings.as_ref().filter(|_| !self.broken)?;
        if self.done.is_empty() {
            return commands.next(BATCH).map(Job::Fetch);
        }
        let span = completions.next(self.done.len())?;
        Some(Job::Post(span, self.done.iter().take(span.entries).copied().collect()))
    }

    fn fail(&mut self) {
        self.broken = true;
    }

    fn take_interrupts(&mut self) -> u32 {
        std::mem::take(&mut self.interrupt).into()
    }

    fn reasons(&self) -> u32 {
        0
    }

    fn check(&self) -> Result<(), &'static str> {
        let possible = |(commands, completions): &(CommandRing, CompletionRing)| {
            commands.is_possible() && completions.is_possible()
        };
        self.rings.as_ref().is_none_or(possible).then_some(()).ok_or("its rings")
    }
}

#[derive(Default)]
struct Copies {
    entries: Vec<[u8; COMMAND as usize]>,
}

impl Copies {
    fn copy(entry: &[u8; COMMAND as usize], thread: &mut ThreadContext) -> Completion {
        let word = |at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().unwrap());
        assert_ne!(word(16), PANICS, "the test asked for it");
        let mut data = [0; 8];
        let copied = thread.dma.read(word(8), &mut data).and_then(|()| thread.dma.write(word(16), &data));
        Completion { id: word(0) as u16, failed: copied.is_err() }
    }
}

impl Executor<Copier> for Copies {
    fn execute(&mut self, job: Job, copier: &SharedMachine<Copier>, thread: &mut ThreadContext) {
        match job {
            Job::Fetch(span) => {
                self.entries.resize(span.entries, [0; COMMAND as usize]);
                if thread.dma.read(span.address, self.entries.as_flattened_mut()).is_err() {
                    return copier.change(Copier::fail);
                }
                let done: Vec<Completion> = self.entries.iter().map(|entry| Self::copy(entry, thread)).collect();
                copier.change(|copier| {
                    if let Some((commands, _)) = &mut copier.rings {
                        commands.consume(span.entries);
                    }
                    copier.done.extend(done);
                });
            }
            Job::Post(span, done) => {
                let entry = |done: &Completion| {
                    let words = [u32::from(done.id), u32::from(done.failed), 0, u32::from(span.phase)];
                    words.map(u32::to_le_bytes)
                };
                let entries: Vec<[[u8; 4]; 4]> = done.iter().map(entry).collect();
                if thread.dma.write(span.address, entries.as_flattened().as_flattened()).is_err() {
                    return copier.change(Copier::fail);
                }
                copier.change(|copier| {
                    if let Some((_, completions)) = &mut copier.rings {
                        completions.post(span.entries);
                    }
                    copier.done.drain(..span.entries);
                    copier.interrupt = true;
                });
            }
        }
    }
}

fn make(context: FunctionContext) -> Box<dyn Function> {
    Box::new(Engine::<Copier>::new(context))
}

/// A driver of the model.
struct Driver {
    client: Client,
    ram: File,
    interrupt: EventFd,
    sizes: (u32, u32),
    tail: u32,
    head: u32,
    phase: u32,
}

/// Where the driver's rings and data are.
const COMMANDS_AT: u64 = 0x1000;
const COMPLETIONS_AT: u64 = 0x8000;
const SOURCE: u64 = 0x1_0000;
const DESTINATION: u64 = 0x2_0000;
/// A destination that makes the model panic.
const PANICS: u64 = 0xdead_0000;

impl Driver {
    fn new(mut client: Client) -> Self {
        let (ram, interrupt) = (memfd(RAM), EventFd::new(libc::EFD_NONBLOCK).unwrap());
        client.dma_map(0, 0, RAM, ram.as_raw_fd()).unwrap();
        let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
        client.set_irqs(VFIO_PCI_MSIX_IRQ_INDEX, flags, 0, 1, &[interrupt.as_raw_fd()]).unwrap();
        Driver { client, ram, interrupt, sizes: (0, 0), tail: 0, head: 0, phase: 1 }
    }

    fn write(&mut self, register: u64, data: &[u8]) {
        self.client.region_write(0, register, data).unwrap();
    }

    fn status(&mut self) -> u32 {
        let mut data = [0; 4];
        self.client.region_read(0, STATUS, &mut data).unwrap();
        u32::from_le_bytes(data)
    }

    fn wait_status(&mut self, wanted: u32) {
        wait_until(PATIENCE, &format!("the status {wanted}"), || self.status() == wanted);
    }

    /// Resets the device and gives it rings of these sizes.
    fn begin(&mut self, commands: u32, completions: u32) {
        self.client.reset().unwrap();
        self.client.region_write(VFIO_PCI_CONFIG_REGION_INDEX, 4, &[6, 0]).unwrap();
        self.ram.write_all_at(&vec![0; (u64::from(completions) * COMPLETION) as usize], COMPLETIONS_AT).unwrap();
        (self.sizes, self.tail, self.head, self.phase) = ((commands, completions), 0, 0, 1);
        self.give(COMMANDS_AT, COMPLETIONS_AT, commands, completions);
    }

    fn give(&mut self, at: u64, completions_at: u64, commands: u32, completions: u32) {
        self.write(COMMANDS, &at.to_le_bytes());
        self.write(COMPLETIONS, &completions_at.to_le_bytes());
        self.write(SIZES, &(u64::from(commands) | u64::from(completions) << 32).to_le_bytes());
    }

    fn put(&mut self, id: u16, source: u64, destination: u64) {
        let entry = [u64::from(id), source, destination].map(u64::to_le_bytes);
        self.ram.write_all_at(entry.as_flattened(), COMMANDS_AT + u64::from(self.tail) * COMMAND).unwrap();
        self.tail = (self.tail + 1) % self.sizes.0;
    }

    fn ring(&mut self) {
        let tail = self.tail.to_le_bytes();
        self.write(TAIL, &tail);
    }

    /// The next completion, if there is one, without an acknowledgement: its id, and whether it failed.
    fn reap(&mut self) -> Option<(u16, bool)> {
        let mut entry = [0; COMPLETION as usize];
        self.ram.read_exact_at(&mut entry, COMPLETIONS_AT + u64::from(self.head) * COMPLETION).unwrap();
        if u32::from(entry[12]) != self.phase {
            return None;
        }
        self.head = (self.head + 1) % self.sizes.1;
        self.phase ^= u32::from(self.head == 0);
        Some((u16::from_le_bytes([entry[0], entry[1]]), entry[4] == 1))
    }

    fn wait(&mut self) -> (u16, bool) {
        let mut done = None;
        wait_until(PATIENCE, "a completion", || {
            done = self.reap();
            done.is_some()
        });
        done.unwrap()
    }

    /// Tells the device up to where completions were consumed.
    fn acknowledge(&mut self) {
        let head = self.head.to_le_bytes();
        self.write(HEAD, &head);
    }

    fn wait_for_interrupt(&self) {
        wait_until(PATIENCE, "the interrupt", || self.interrupt.read().is_ok());
    }

    /// Commands go around the rings several times, all in order.
    fn works(&mut self) {
        self.begin(5, 4);
        for id in 0..100u64 {
            self.ram.write_all_at(&(id + 1).to_le_bytes(), SOURCE).unwrap();
            self.put(id as u16, SOURCE, DESTINATION);
            self.ring();
            assert_eq!(self.wait(), (id as u16, false));
            self.acknowledge();
            let mut copied = [0; 8];
            self.ram.read_exact_at(&mut copied, DESTINATION).unwrap();
            assert_eq!(u64::from_le_bytes(copied), id + 1);
        }
    }
}

#[test]
fn commands_are_done_in_order_and_completed_with_an_interrupt() {
    let served = Served::new(ENDPOINT, Default::default(), make, || ());
    let mut driver = Driver::new(served.client());
    driver.works();
    driver.wait_for_interrupt();
    driver.begin(64, 64);
    for id in 0..40 {
        // Some addresses have no memory.
        driver.put(id, SOURCE, if id % 3 == 0 { RAM } else { DESTINATION });
    }
    driver.ring();
    for id in 0..40 {
        assert_eq!(driver.wait(), (id, id % 3 == 0));
    }
    driver.wait_for_interrupt();
    assert_eq!(driver.status(), ON);
}

#[test]
fn completions_that_find_no_room_wait_for_some() {
    let served = Served::new(ENDPOINT, Default::default(), make, || ());
    let mut driver = Driver::new(served.client());
    driver.begin(64, 4);
    (0..30).for_each(|id| driver.put(id, SOURCE, DESTINATION));
    driver.ring();
    for id in (0..30).step_by(3) {
        assert_eq!([driver.wait().0, driver.wait().0, driver.wait().0], [id, id + 1, id + 2]);
        assert_eq!(driver.reap(), None, "there is room for three");
        driver.acknowledge();
    }
    // A driver that never acknowledges any can still reset the device.
    driver.begin(64, 4);
    (0..30).for_each(|id| driver.put(id, SOURCE, DESTINATION));
    driver.ring();
    for id in 0..3 {
        assert_eq!(driver.wait(), (id, false));
    }
    driver.works();
}

#[test]
fn hostile_rings_break_the_device_until_a_reset_and_no_more() {
    let (recorder, tracer) = Recorder::start(&[Kind::Panic]);
    let served = Served::new(ENDPOINT, tracer, make, || ());
    let mut driver = Driver::new(served.client());
    for (commands, completions) in [(0, 4), (4, 0), (1, 4), (u32::MAX, 4), (4, u32::MAX), (1 << 17, 1 << 17)] {
        driver.client.reset().unwrap();
        driver.give(COMMANDS_AT, COMPLETIONS_AT, commands, completions);
        assert_eq!(driver.status(), BROKEN, "{commands}, {completions}");
    }
    for (register, value) in [(TAIL, 4u32), (TAIL, u32::MAX), (HEAD, 4), (HEAD, u32::MAX)] {
        driver.begin(4, 4);
        driver.write(register, &value.to_le_bytes());
        assert_eq!(driver.status(), BROKEN, "{register:#x}, {value:#x}");
    }
    // Doorbells of rings that do not exist.
    driver.client.reset().unwrap();
    assert_eq!(driver.status(), OFF);
    driver.write(TAIL, &[0; 4]);
    assert_eq!(driver.status(), BROKEN);
    // Rings without memory, rings that wrap around the end of the address space, and rings without bus mastering.
    for (at, completions_at) in [(RAM, COMPLETIONS_AT), (u64::MAX - 63, COMPLETIONS_AT), (COMMANDS_AT, u64::MAX - 15)] {
        driver.begin(4, 4);
        driver.client.reset().unwrap();
        driver.client.region_write(VFIO_PCI_CONFIG_REGION_INDEX, 4, &[6, 0]).unwrap();
        driver.give(at, completions_at, 1 << 16, 1 << 16);
        driver.write(TAIL, &0xffffu32.to_le_bytes());
        driver.wait_status(BROKEN);
    }
    driver.begin(4, 4);
    driver.client.region_write(VFIO_PCI_CONFIG_REGION_INDEX, 4, &[2, 0]).unwrap();
    driver.put(1, SOURCE, DESTINATION);
    driver.ring();
    driver.wait_status(BROKEN);
    driver.works();
    drop(driver);
    assert_eq!(recorder.end(), []);
}

#[test]
fn a_model_survives_any_rings_and_doorbells() {
    let (recorder, tracer) = Recorder::start(&[Kind::Panic]);
    let served = Served::new(ENDPOINT, tracer, make, || ());
    let mut driver = Driver::new(served.client());
    for seed in 1..=30 {
        let mut numbers = Numbers(seed);
        driver.client.reset().unwrap();
        driver.client.region_write(VFIO_PCI_CONFIG_REGION_INDEX, 4, &[6, 0]).unwrap();
        for _ in 0..100 {
            let register = [COMMANDS, COMPLETIONS, SIZES, TAIL, HEAD][numbers.below(5) as usize];
            let bits = [4, 12, 20, 64][numbers.below(4) as usize];
            let value = numbers.below(u64::MAX) & u64::MAX >> (64 - bits);
            let len = if register == TAIL || register == HEAD { 4 } else { 8 };
            driver.write(register, &value.to_le_bytes()[..len]);
            // The contents of the rings are random too; commands overwrite them.
            let junk = numbers.below(u64::MAX) % RAM;
            driver.ram.write_all_at(&junk.to_le_bytes(), numbers.below(RAM - 8)).unwrap();
        }
    }
    driver.works();
    drop(driver);
    assert_eq!(recorder.end(), []);
}

#[test]
fn a_panic_breaks_the_device_until_a_reset_and_no_more() {
    let (recorder, tracer) = Recorder::start(&[Kind::Panic]);
    let served = Served::new(ENDPOINT, tracer, make, || ());
    let mut driver = Driver::new(served.client());
    for _ in 0..3 {
        driver.begin(4, 4);
        driver.put(1, SOURCE, PANICS);
        driver.ring();
        driver.wait_status(BROKEN);
        driver.works();
    }
    drop(driver);
    assert_eq!(recorder.end().len(), 3);
}

//! The events, each declared once: its number, its name, and its fields with their types, their places in the record
//! and their units. From the declaration come the [`Event`], its record, its lines of JSON and text, the readers of
//! records and JSON, the schema that `viommu trace --schema` prints, and the events that tests make. `declare` explains
//! the syntax.
//!
//! A new event takes a declaration here and a paragraph in `docs/trace.md`.

use std::time::Duration;

use viommu_wire::model::{Model, Part};
use viommu_wire::named_numbers;
use viommu_wire::split::request_type::{LINK, RELEASE, UNLINK};
use viommu_wire::virtio_iommu::request_type::{ATTACH, DETACH, MAP, PROBE, UNMAP};

use crate::codec::{CodecError, MemberError};
use crate::declare::{self, events};
use crate::members::Members;
use crate::part::{CommandPart, ModelState};
use crate::place::{About, Stored, word};
use crate::record::{NO_ENDPOINT, Record, WORDS};
use crate::schema;
use crate::unit::*;

/// The members that lines of all kinds have in common.
pub mod key {
    /// The time, ns of `CLOCK_MONOTONIC`.
    pub const TIME: &str = "t";
    /// Its number.
    pub const SEQ: &str = "seq";
    /// The name of its [`Kind`](super::Kind).
    pub const KIND: &str = "kind";
    /// The endpoint that the event is about, if there is one.
    pub const ENDPOINT: &str = "endpoint";
    /// The endpoint as bus, device and function, if it is a PCI function.
    pub const BDF: &str = "bdf";
}

// The numbers and names are part of the format. None is ever used again for something else.
named_numbers! {
    /// The connection that a session or a memory region belongs to.
    pub enum Channel {
        /// The vhost-user connection of the virtio-iommu device.
        VhostUser = 0 "vhost-user",
        /// The vfio-user connection of an endpoint.
        VfioUser = 1 "vfio-user",
    }

    /// The direction of an access, seen from its initiator.
    pub enum Access {
        /// The initiator reads.
        Read = 0 "read",
        /// The initiator writes.
        Write = 1 "write",
    }

    /// What an injected fault did to a request.
    pub enum Answer {
        /// It was answered with a status, and not executed.
        Refused = 0 "refused",
        /// It was executed, and answered too late.
        Late = 1 "late",
        /// It is never answered, nor are the requests behind it.
        Never = 2 "never",
    }

    /// What was reset.
    pub enum ResetKind {
        /// The driver reset the virtio device: all endpoints are detached, all domains are gone, and `bypass` is kept.
        Device = 0 "device",
        /// The machine was reset: as `Device`, but `bypass` has its boot value again.
        System = 1 "system",
        /// A PCI function was reset.
        Function = 2 "function",
        /// The machine was paused: the queues are stopped, and all state is kept.
        Pause = 3 "pause",
        /// The machine was resumed after a pause.
        Resume = 4 "resume",
    }

    /// How the address of an access was translated.
    pub enum Route {
        /// Through a mapping of the endpoint's domain.
        Mapped = 0 "mapped",
        /// The endpoint or its domain is in bypass: the guest-physical address is the I/O virtual address.
        Bypass = 1 "bypass",
        /// The address is in the endpoint's MSI region.
        Msi = 2 "msi",
    }

    /// An item of the live state.
    pub enum StateItem {
        /// A mark: the live state follows.
        Begin = 0 "begin",
        /// A domain.
        Domain = 1 "domain",
        /// An endpoint that is attached to a domain.
        Endpoint = 2 "endpoint",
        /// A reservation of the split protocol.
        Reservation = 3 "reservation",
        /// A mapping of a MAP.
        Mapping = 4 "mapping",
        /// Adjacent pages, linked with one tag to memory that is adjacent too.
        Linked = 5 "linked",
        /// A mark: all of the live state was sent.
        End = 6 "end",
    }

    /// Where events were lost.
    pub enum LossPlace {
        /// Between the thread that made them and the collector: no client gets them.
        Ring = 0 "ring",
        /// Between the collector and this client, which read too slowly: other clients may get them.
        Client = 1 "client",
    }
}

events! {
    Session = 1 "session":
        /// A peer connected (`connected`) or left.
        Session (endpoint: Option<u32>) {
            channel: Channel as Named at s0, "channel";
            connected: bool as Flag at s1, "connected";
        };

    Features = 2 "features":
        /// The driver accepted features.
        Features () {
            offered: u64 as Hex at a0, "offered";
            accepted: u64 as Hex at a1, "accepted" => "accepted_names" Features(accepted);
        };

    Memory = 3 "memory":
        /// A region of guest memory was added (`added`) or removed.
        Memory (endpoint: Option<u32>) {
            channel: Channel as Named at s0, "channel";
            added: bool as Flag at s1[0..7], "added";
            gpa: u64 as Hex at a0, "gpa";
            len: u64 as Bytes at a1, "len";
            writable: bool as Flag at s1[7..8], "writable";
        };

    Queue = 4 "queue":
        /// A virtqueue started (`started`) at the available index `index`, or stopped there.
        Queue () {
            queue: u8 as VIRTQUEUE at s0, "virtqueue";
            started: bool as Flag at s1, "started";
            index: u16 as Number at a0, "index";
            size: u16 as Number at a1, "size";
        };

    Kick = 5 "kick":
        /// The driver kicked a virtqueue, and this many requests were found.
        Kick () {
            queue: u8 as VIRTQUEUE at s0, "virtqueue";
            requests: u32 as Number at a0, "requests";
        };

    Request = 6 "request":
        /// A request of the split protocol was answered. `flags`, `tag` and the range are the request's; the range of a
        /// LINK is that of its extents. `count` is the number of extents of a LINK, or of granules that an UNLINK or
        /// RELEASE unlinked. `duration` is the time in the device. Both are saturated to what fits.
        Split () {
            request: u8 as SPLIT_TYPE at s0, "type";
            status: u8 as STATUS at s1, "status";
            domain: u32 as Number at a3[0..32], "domain";
            virt_start: u64 as Hex at a0, "virt_start";
            virt_end: u64 as Hex at a1, "virt_end" => "size" Size(virt_start, virt_end);
            tag: u64 as Hex at a2, "tag";
            count: u32 as Number at a4[40..64],
                "extents" if request == LINK, "granules" if matches!(request, UNLINK | RELEASE);
            flags: u32 as Flags(request) at a3[32..64], "flags" if request == LINK || flags != 0;
            duration: u64 as Nanoseconds at a4[0..40], "duration_ns";
        }
        or
        /// A request was answered. `domain`, the addresses and `flags` are the request's; unused ones are 0. `endpoint`
        /// is that of an ATTACH, DETACH or PROBE. `duration` is the time in the device.
        Request (endpoint: Option<u32> where matches!(request, ATTACH | DETACH | PROBE)) {
            request: u8 as BASE_TYPE at s0, "type";
            status: u8 as STATUS at s1, "status";
            domain: u32 as Number at a3[0..32], "domain" if request != PROBE;
            virt_start: u64 as Hex at a0, "virt_start" if !matches!(request, ATTACH | DETACH | PROBE);
            virt_end: u64 as Hex at a1,
                "virt_end" if !matches!(request, ATTACH | DETACH | PROBE) => "size" Size(virt_start, virt_end);
            phys_start: u64 as Hex at a2, "phys_start" if !matches!(request, ATTACH | DETACH | UNMAP | PROBE);
            flags: u32 as Flags(request) at a3[32..64], "flags" if !matches!(request, DETACH | UNMAP | PROBE);
            duration: u64 as Nanoseconds at a4, "duration_ns";
        };

    Reset = 7 "reset":
        /// The endpoint's function or the IOMMU was reset, paused or resumed.
        Reset (endpoint: Option<u32>) {
            reset: ResetKind as Named at s0, "reset";
        };

    Fault = 8 "fault":
        /// An access faulted; `reason` is the specification's `VIRTIO_IOMMU_FAULT_R_*`. `dropped`: the driver does not
        /// get the fault, since the device already keeps as many as it can for want of buffers in the event queue.
        Fault (endpoint: u32) {
            reason: u8 as FAULT_REASON at s0, "reason";
            access: Access as Named at s1, "access";
            address: u64 as Hex at a0, "address";
            domain: Option<u32> as Number at a1[0..33], "domain";
            dropped: bool as Flag at a2, "dropped";
        };

    Dma = 9 "dma":
        /// An endpoint accessed one contiguous run of guest memory. `tag` is that of the split protocol's LINK, or 0.
        /// `failed`: the address was translated, but there is no guest memory.
        Dma (endpoint: u32) {
            access: Access as Named at s0, "access";
            route: Route as Named at s1[0..7], "route";
            failed: bool as Flag at s1[7..8], "failed";
            iova: u64 as Hex at a0, "iova";
            gpa: u64 as Hex at a1, "gpa";
            len: u32 as Bytes at a2[0..32], "len";
            domain: u32 as Number at a2[32..64], "domain";
            tag: u64 as Hex at a3, "tag";
        };

    Interrupt = 10 "interrupt":
        /// An interrupt was sent: an MSI-X vector of an endpoint, or the used buffer notification of a virtqueue.
        Interrupt (endpoint: Option<u32>) {
            vector: u16 as Number at a0, "vector";
        };

    Command = 11 "command":
        /// A device model completed a command. `queue`, `id`, `opcode`, `status` and `part` are the model's;
        /// `viommu_wire` declares the part. `len` is the number of bytes that the command moved. `duration` is the time
        /// from fetching the command to completing it.
        Command (endpoint: u32) {
            model: Model as Named at s0, "model";
            queue: u32 as Number at a1[0..32], "queue";
            opcode: u8 as Tabled((model.declaration().opcodes)(queue)) at s1, "opcode";
            id: u64 as Number at a0, "id";
            status: u32 as Hex at a1[32..64], "status";
            len: u32 as Bytes at a3[0..32], "len";
            duration: u64 as Nanoseconds at a2, "duration_ns";
            part: Part as CommandPart(model, queue) at a3[32..192];
        };

    Bypass = 12 "bypass":
        /// The driver wrote `bypass`.
        Bypass () {
            value: u8 as Number at s0, "value";
        };

    Malformed = 13 "malformed":
        /// A descriptor chain on this queue was not a request, and was returned with length `used`.
        Malformed () {
            queue: u8 as VIRTQUEUE at s0, "virtqueue";
            head: u16 as Number at a0, "head";
            readable: u32 as Bytes at a1[0..32], "readable";
            writable: u32 as Bytes at a1[32..64], "writable";
            used: u32 as Bytes at a2, "used";
        };

    Device = 14 "device":
        /// A device model changed its state. `state` is the model's, as `viommu_wire` declares it.
        Device (endpoint: u32) {
            model: Model as Named at s0, "model";
            state: u64 as ModelState(model) at a0;
        };

    Lost = 15 "lost":
        /// `count` events were lost at `place`, the first of them at `since` (`CLOCK_MONOTONIC`, ns). Only the trace
        /// itself makes this event.
        Lost () {
            place: LossPlace as Named at s0, "place";
            count: u64 as Number at a0, "count";
            since: u64 as Moment at a1, "since";
        };

    Panic = 16 "panic":
        /// A device model panicked, and the panic was caught.
        Panic (endpoint: u32) {};

    Injected = 17 "injected":
        /// The `number`-th request of a type was answered wrongly, as `--inject` asked.
        Injected () {
            request: u8 as REQUEST_TYPE at s0, "type";
            answer: Answer as Named at s1, "answer";
            number: u64 as Number at a0, "number";
        };

    Undelivered = 18 "undelivered":
        /// `count` faults that waited for buffers of the driver were dropped, since it reset the device or is gone.
        Undelivered () {
            count: u64 as Number at a0, "count";
        };

    State = 19 "state" on request:
        /// An item of the live state, or one of the marks `begin` and `end` around all of them. The event's number is
        /// that of the next event when the item was read. `lost`: events that the client has missed since `begin`.
        State (endpoint: Option<u32>) {
            item: StateItem as Named at s0, "item";
            domain: u32 as Number at a0[0..32], "domain" if !item.is_mark();
            bypass: bool as Flag at s1, "bypass" if item == StateItem::Domain;
            virt_start: u64 as Hex at a1, "virt_start" if item.is_range();
            virt_end: u64 as Hex at a2, "virt_end" if item.is_range() => "size" Size(virt_start, virt_end);
            phys_start: u64 as Hex at a3, "phys_start" if item.is_mapped();
            flags: u32 as Flags(MAP) at a0[32..64], "flags" if item.is_mapped();
            tag: u64 as Hex at a4, "tag" if item == StateItem::Linked;
            lost: u64 as Number at a5, "lost" if item == StateItem::End;
        };

    Mmio = 20 "mmio" on request:
        /// The driver read or wrote (`access`, seen from the driver) `len` bytes at `offset` of a BAR. `register` is
        /// the offset of the register that has the first of them. Of more than 8 bytes `value` has the first 8.
        Mmio (endpoint: u32) {
            model: Model as Named at s0, "model";
            access: Access as Named at s1, "access";
            bar: u8 as Number at a2[0..8], "bar";
            offset: u32 as Hex at a0[0..32], "offset";
            register: u32 as Tabled(model.declaration().register_names) at a0[32..64], "register";
            len: u32 as Bytes at a2[32..64], "len";
            value: u64 as Hex at a1, "value";
        };
}

impl StateItem {
    fn is_mark(self) -> bool {
        matches!(self, StateItem::Begin | StateItem::End)
    }

    fn is_mapped(self) -> bool {
        matches!(self, StateItem::Mapping | StateItem::Linked)
    }

    fn is_range(self) -> bool {
        self.is_mapped() || self == StateItem::Reservation
    }
}

impl Event {
    /// The event of a request that was answered after `time`. Events of other kinds are unchanged.
    pub fn after(mut self, time: Duration) -> Event {
        if let Event::Request { duration, .. } | Event::Split { duration, .. } = &mut self {
            *duration = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        }
        self
    }
}

impl Kind {
    /// The kinds that a client gets if it names none: bit n is the kind with number n.
    pub const DEFAULT: u64 = {
        let mut kinds = 0;
        let mut n = 0;
        while n < Kind::ALL.len() {
            kinds |= Kind::ALL[n].bit();
            n += 1;
        }
        kinds & !Kind::ON_REQUEST
    };

    /// The kind's bit in a set of kinds.
    #[inline]
    pub const fn bit(self) -> u64 {
        1 << self as u16
    }

    /// The kind with this name.
    pub fn from_name(name: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

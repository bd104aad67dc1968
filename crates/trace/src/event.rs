//! What can happen, typed. Each variant packs into one [`viommu_wire::trace::Record`]; `codec` says how.

use std::time::Duration;

// The numbers and names are part of the format: neither is ever used again for something else.
viommu_wire::named_numbers! {
    /// Who is at the other end of a session, or whose memory a region is.
    pub enum Channel {
        /// The vhost-user connection of the virtio-iommu device.
        VhostUser = 0 "vhost-user",
        /// The vfio-user connection of an endpoint.
        VfioUser = 1 "vfio-user",
    }

    /// Which way data moved, seen from the endpoint: a read takes data from memory.
    pub enum Access {
        /// The endpoint reads memory.
        Read = 0 "read",
        /// The endpoint writes memory.
        Write = 1 "write",
    }

    /// What a test had done to a request.
    pub enum Answer {
        /// It got a status without being done.
        Refused = 0 "refused",
        /// It was done and answered too late.
        Late = 1 "late",
        /// It is never answered, and what is behind it neither.
        Never = 2 "never",
    }

    /// What was reset.
    pub enum ResetKind {
        /// The driver reset the virtio device: endpoints detached, domains gone, `bypass` kept.
        Device = 0 "device",
        /// The machine was reset: as `Device`, and `bypass` has its boot value again.
        System = 1 "system",
        /// A PCI function was reset.
        Function = 2 "function",
        /// The machine was paused: the queues stopped, all state kept.
        Pause = 3 "pause",
        /// The machine goes on after a pause.
        Resume = 4 "resume",
    }

    /// The way in which an access reached memory.
    pub enum Route {
        /// Through a mapping of the endpoint's domain.
        Mapped = 0 "mapped",
        /// The endpoint or its domain is in bypass: the guest-physical address is the I/O virtual address.
        Bypass = 1 "bypass",
        /// The address is in the endpoint's MSI region.
        Msi = 2 "msi",
    }

    /// Which model completed a command.
    pub enum Model {
        /// An NVMe controller.
        Nvme = 0 "nvme",
        /// An I/OAT DMA engine.
        Ioat = 1 "ioat",
    }

    /// How a command described its data.
    pub enum DataPointer {
        /// The command moves no data.
        None = 0 "none",
        /// NVMe physical region pages.
        Prp = 1 "prp",
        /// NVMe scatter-gather list.
        Sgl = 2 "sgl",
        /// Plain source and destination addresses.
        Address = 3 "address",
    }

    /// Where events were lost.
    pub enum LossPlace {
        /// Between the thread that made them and the collector: no client has them.
        Ring = 0 "ring",
        /// Between the collector and this client, which read too slowly: other clients have them.
        Client = 1 "client",
    }
}

/// One event, without its time and sequence number. Addresses and lengths are in bytes, durations in nanoseconds.
#[allow(missing_docs, reason = "each variant's comment describes its fields")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A peer connected (`connected`) or left.
    Session { channel: Channel, endpoint: Option<u32>, connected: bool },
    /// The driver accepted features.
    Features { offered: u64, accepted: u64 },
    /// A region of guest memory was added (`added`) or removed.
    Memory { channel: Channel, endpoint: Option<u32>, added: bool, gpa: u64, len: u64, writable: bool },
    /// A virtqueue started (`started`) at this available index, or stopped.
    Queue { queue: u8, started: bool, index: u16, size: u16 },
    /// The driver kicked a virtqueue, and this many requests were found.
    Kick { queue: u8, requests: u32 },
    /// A request was answered. `domain`, the addresses and `flags` are the request's; unused ones are 0.
    /// `endpoint` is that of ATTACH, DETACH and PROBE. `duration` is the time in the device.
    Request {
        request: u8,
        status: u8,
        endpoint: Option<u32>,
        domain: u32,
        flags: u32,
        virt_start: u64,
        virt_end: u64,
        phys_start: u64,
        duration: u64,
    },
    /// A request of the split protocol was answered. `flags` and `tag` are the request's, and so is the range; a LINK's
    /// is that of its extents. `count`: LINK: its extents; UNLINK, RELEASE: the granules that it unlinked. `duration` is
    /// the time in the device.
    Split {
        request: u8,
        status: u8,
        domain: u32,
        flags: u32,
        virt_start: u64,
        virt_end: u64,
        tag: u64,
        count: u32,
        duration: u64,
    },
    /// A reset, of the endpoint's function or of the IOMMU.
    Reset { reset: ResetKind, endpoint: Option<u32> },
    /// An access faulted; `reason` is the specification's `VIRTIO_IOMMU_FAULT_R_*`. `dropped`: the driver is not told,
    /// since as many faults as the device keeps wait for buffers in its event queue.
    Fault { endpoint: u32, reason: u8, access: Access, address: u64, domain: Option<u32>, dropped: bool },
    /// An endpoint accessed one contiguous run of guest memory. `tag` is that of the split protocol's LINK, else 0.
    /// `failed`: the address was translated, but no memory of the guest is there.
    Dma {
        endpoint: u32,
        access: Access,
        route: Route,
        failed: bool,
        iova: u64,
        gpa: u64,
        len: u32,
        domain: u32,
        tag: u64,
    },
    /// An interrupt was sent: an MSI-X vector of an endpoint, or the used buffer notification of a virtqueue.
    Interrupt { endpoint: Option<u32>, vector: u16 },
    /// A device model completed a command.
    ///
    /// NVMe: `status` is the completion's status field without the phase tag, `address` the starting LBA (0 for a command
    /// that has none), `data` the first address of the data pointer (PRP1, or the first SGL descriptor's). I/OAT: `queue`
    /// is the channel, `id` counts descriptors, `opcode` is the descriptor's operation type, `status` the low half of
    /// CHANERR, `address` the source, `data` the destination. `duration` is the time from fetching the command to
    /// completing it.
    Command {
        endpoint: u32,
        model: Model,
        opcode: u8,
        queue: u16,
        id: u16,
        status: u16,
        pointer: DataPointer,
        address: u64,
        data: u64,
        len: u32,
        duration: u64,
    },
    /// The driver wrote `bypass`.
    Bypass { value: u8 },
    /// A descriptor chain on this queue was not a request: it was returned with length `used`.
    Malformed { queue: u8, head: u16, readable: u32, writable: u32, used: u32 },
    /// A device model changed its state: `state` is the model's own.
    ///
    /// NVMe: CC in the low half, CSTS in the high half. I/OAT: in the low half the state of CHANSTS (0 active, 2
    /// suspended, 3 halted; a channel that is done stays active here), in the high half CHANERR.
    Device { endpoint: u32, model: Model, state: u64 },
    /// `count` events were lost at `place`, the first of them at `since` (`CLOCK_MONOTONIC`, ns). The trace itself makes
    /// this event; nobody else does.
    Lost { place: LossPlace, count: u64, since: u64 },
    /// A device model panicked and was contained.
    Panic { endpoint: u32 },
    /// A test had the `number`-th request of a type answered wrongly.
    Injected { request: u8, answer: Answer, number: u64 },
    /// `count` faults waited for buffers of the driver, and are forgotten: it reset the device, or is gone.
    Undelivered { count: u64 },
}

impl Event {
    /// A request's event, answered after `time`; another one as it is.
    pub fn after(mut self, time: Duration) -> Event {
        if let Event::Request { duration, .. } | Event::Split { duration, .. } = &mut self {
            *duration = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        }
        self
    }
}

//! A session: takes a client's commands one after the other and answers each ("Client/server interactions").

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, OwnedFd};

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::client_memory::ClientMemory;
use super::device::{Backing, Device, DmaMap, Refused};
use super::message::{
    Command, DeviceFeature, DeviceFlags, DeviceInfo, DmaMapFlags, DmaMapRequest, DmaUnmap, DmaUnmapFlags, Header,
    HeaderFlags, IrqInfoReply, IrqSetRequest, MAX_DATA, MAX_MESSAGE, RegionAccess, RegionInfo, RegionIoFds,
};
use super::transport::{Descriptors, Lost, Transport};
use super::version::ClientVersion;
use super::{irq, region};

/// Serves a client until it leaves. An error if the stream fails or ends in the middle of a message, or if the two
/// sides cannot agree on a version.
pub fn serve(transport: &mut dyn Transport, device: &mut dyn Device) -> io::Result<()> {
    let mut session = Session {
        transport,
        device,
        is_negotiated: false,
        client_memory: None,
        payload: Vec::new(),
        reply: Vec::new(),
        reply_fd: None,
    };
    while session.next()? {}
    Ok(())
}

struct Session<'a> {
    transport: &'a mut dyn Transport,
    device: &'a mut dyn Device,
    /// Whether VERSION was answered.
    is_negotiated: bool,
    client_memory: Option<ClientMemory>,
    /// The payload of the present command.
    payload: Vec<u8>,
    /// The payload of its reply.
    reply: Vec<u8>,
    reply_fd: Option<OwnedFd>,
}

impl Session<'_> {
    /// Takes the next command. False if the client has left.
    fn next(&mut self) -> io::Result<bool> {
        let mut header = Header::new_zeroed();
        let mut fds = Descriptors::default();
        if !receive(self.transport, header.as_mut_bytes(), &mut fds, true)? {
            return Ok(false);
        }
        let size = header.size.get() as usize;
        let payload = size.saturating_sub(size_of::<Header>());
        self.reply.clear();
        self.reply_fd = None;
        if size > MAX_MESSAGE {
            self.answer(
                &header,
                Err(Refused::invalid(format!("it has {size} bytes, and at most {MAX_MESSAGE} are allowed"))),
            )?;
            skip(self.transport, payload as u64)?;
            return Ok(true);
        }
        self.payload.resize(payload, 0);
        receive(self.transport, &mut self.payload, &mut fds, false)?;
        let command = Command::of(header.command.get());
        let result = self.check(&header, &fds).and_then(|()| {
            let command = command.ok_or_else(|| Refused::invalid("there is no such command"))?;
            self.execute(command, header.flags(), fds.take())
        });
        let is_over = command == Some(Command::Version) && result.is_err() && !self.is_negotiated;
        self.answer(&header, result)?;
        if is_over {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the version was not agreed on"));
        }
        Ok(true)
    }

    /// Checks whether the message can be a command at all.
    fn check(&self, header: &Header, fds: &Descriptors) -> Result<(), Refused> {
        if (header.size.get() as usize) < size_of::<Header>() {
            return Err(Refused::invalid("it is shorter than its own header"));
        }
        if header.flags().intersects(HeaderFlags::REPLY | HeaderFlags::OTHER_TYPES) {
            return Err(Refused::invalid("it is no command"));
        }
        match fds.lost() {
            None => Ok(()),
            Some(Lost::TooMany) => Err(Refused::invalid("it has more descriptors than max_msg_fds")),
            Some(Lost::NotReceived) => Err(Refused::new(
                libc::EMFILE,
                "its descriptors could not be received: this process may have too many open (ulimit -n)",
            )),
        }
    }

    /// Executes a command, and leaves the payload of its reply in `reply`.
    fn execute(&mut self, command: Command, flags: HeaderFlags, fds: Vec<OwnedFd>) -> Result<(), Refused> {
        match command {
            Command::Version => self.version(flags, &fds),
            Command::DmaMap => self.dma_map(fds),
            Command::DmaUnmap => self.dma_unmap(),
            Command::DeviceGetInfo => {
                self.with_argsz::<DeviceInfo>()?;
                let info = DeviceInfo {
                    argsz: (size_of::<DeviceInfo>() as u32).into(),
                    flags: (DeviceFlags::RESET | DeviceFlags::PCI).bits().into(),
                    num_regions: self.device.regions().into(),
                    num_irqs: self.device.irqs().into(),
                };
                self.reply_with(&info)
            }
            Command::DeviceGetRegionInfo => {
                let request: RegionInfo = self.with_argsz()?;
                self.reply_fd = region::info(self.device, &request, &mut self.reply)?;
                Ok(())
            }
            Command::DeviceGetRegionIoFds => {
                let request: RegionIoFds = self.with_argsz()?;
                let none = region::io_fds(self.device, &request)?;
                self.reply_with(&none)
            }
            Command::DeviceGetIrqInfo => {
                let request: IrqInfoReply = self.with_argsz()?;
                let info = irq::info(self.device, &request)?;
                self.reply_with(&info)
            }
            Command::DeviceSetIrqs => {
                let request: IrqSetRequest = self.with_argsz()?;
                let set = irq::set(self.device, &request, &self.payload[size_of::<IrqSetRequest>()..], fds)?;
                self.device.set_irqs(set)
            }
            Command::RegionRead => {
                let access: RegionAccess = self.fixed()?;
                region::read(self.device, &access, &mut self.reply)
            }
            Command::RegionWrite => {
                let access: RegionAccess = self.fixed()?;
                region::write(self.device, &access, &self.payload[size_of::<RegionAccess>()..])?;
                self.reply_with(&access)
            }
            Command::RegionWriteMulti => {
                let done = region::write_multi(self.device, &self.payload)?;
                self.reply_with(&done)
            }
            Command::DeviceReset => {
                self.device.reset();
                Ok(())
            }
            Command::DeviceFeature => {
                let request: DeviceFeature = self.fixed()?;
                let feature = request.flags.get() & 0xffff;
                // As VFIO_DEVICE_FEATURE answers it. All features are about migration, and the device has none.
                Err(Refused::new(libc::ENOTTY, format!("the device does not have feature {feature}")))
            }
            Command::MigDataRead | Command::MigDataWrite | Command::DirtyPages => {
                Err(Refused::new(libc::EOPNOTSUPP, "the device cannot be migrated"))
            }
            Command::DmaRead | Command::DmaWrite => Err(Refused::invalid("only the server may send it")),
        }
    }

    /// "VFIO_USER_VERSION". A client that begins with another command has the minimum of all capabilities. A client
    /// that wants no answer would never get its end of a twin socket, so it has none.
    fn version(&mut self, flags: HeaderFlags, fds: &[OwnedFd]) -> Result<(), Refused> {
        if self.is_negotiated {
            return Err(Refused::invalid("the version is agreed on already"));
        }
        if !fds.is_empty() {
            return Err(Refused::invalid("it has descriptors"));
        }
        let client = ClientVersion::parse(&self.payload)?;
        let with_twin = client.twin_socket && !flags.contains(HeaderFlags::NO_REPLY);
        let socket = self.transport.socket().filter(|_| with_twin);
        let twin = socket.map(|session| ClientMemory::new(session, client.max_data)).transpose();
        let twin = twin.map_err(Refused::system)?;
        self.reply = client.reply(self.device.max_dma_maps(), twin.is_some())?;
        if let Some((memory, end)) = twin {
            self.client_memory = Some(memory);
            self.reply_fd = Some(end.into());
        }
        self.is_negotiated = true;
        Ok(())
    }

    /// "VFIO_USER_DMA_MAP". Descriptors beyond the first are closed.
    fn dma_map(&mut self, fds: Vec<OwnedFd>) -> Result<(), Refused> {
        let request: DmaMapRequest = self.with_argsz()?;
        let flags = DmaMapFlags::from_bits(request.flags.get()).ok_or_else(|| Refused::invalid("unknown flags"))?;
        let how = flags & (DmaMapFlags::MMAP | DmaMapFlags::FILE_IO);
        let (fd, offset) = (fds.into_iter().next().map(File::from), request.offset.get());
        let backing = match fd {
            Some(file) if how.is_empty() || how == DmaMapFlags::MMAP => Backing::Mmap(file, offset),
            Some(file) if how == DmaMapFlags::FILE_IO => Backing::FileIo(file, offset),
            Some(_) => return Err(Refused::invalid("the file cannot be both mapped and read")),
            None if !how.is_empty() => return Err(Refused::invalid("the descriptor is missing")),
            None => self.client_memory.clone().map_or(Backing::Unreachable, Backing::Messages),
        };
        self.device.dma_map(DmaMap {
            address: request.address.get(),
            size: request.size.get(),
            readable: flags.contains(DmaMapFlags::READ),
            writable: flags.contains(DmaMapFlags::WRITE),
            backing,
        })
    }

    /// "VFIO_USER_DMA_UNMAP".
    fn dma_unmap(&mut self) -> Result<(), Refused> {
        let request: DmaUnmap = self.with_argsz()?;
        if request.argsz.get() as usize > MAX_DATA {
            return Err(Refused::invalid("argsz is larger than any reply"));
        }
        let (address, size) = (request.address.get(), request.size.get());
        match DmaUnmapFlags::from_bits(request.flags.get()) {
            Some(flags) if flags.is_empty() => self.device.dma_unmap(address, size)?,
            Some(DmaUnmapFlags::ALL) if address == 0 && size == 0 => self.device.dma_unmap_all(),
            Some(DmaUnmapFlags::ALL) => return Err(Refused::invalid("address and size must be zero for all regions")),
            Some(DmaUnmapFlags::GET_DIRTY_BITMAP) => {
                return Err(Refused::invalid("the device does not record which pages it writes"));
            }
            _ => return Err(Refused::invalid("unknown flags")),
        }
        self.reply_with(&request)
    }

    /// The structure at the beginning of the payload.
    fn fixed<S: FromBytes + KnownLayout + Immutable>(&self) -> Result<S, Refused> {
        let found = S::read_from_prefix(&self.payload);
        found.map(|(structure, _)| structure).map_err(|_| {
            Refused::invalid(format!("{} bytes of payload are less than {}", self.payload.len(), size_of::<S>()))
        })
    }

    /// The same for a structure that begins with argsz. An error also if argsz is too small, because the client has no
    /// room for a reply or has not set its own structure's size.
    fn with_argsz<S: FromBytes + KnownLayout + Immutable>(&self) -> Result<S, Refused> {
        let structure = self.fixed()?;
        let argsz: U32 = self.fixed()?;
        if (argsz.get() as usize) < size_of::<S>() {
            return Err(Refused::invalid(format!("argsz is {argsz} and not {}", size_of::<S>())));
        }
        Ok(structure)
    }

    fn reply_with(&mut self, structure: &(impl IntoBytes + Immutable + Unaligned)) -> Result<(), Refused> {
        self.reply.extend_from_slice(structure.as_bytes());
        Ok(())
    }

    /// Sends the reply to a command, if the client wants one.
    fn answer(&mut self, header: &Header, result: Result<(), Refused>) -> io::Result<()> {
        if let Err(Refused { reason, .. }) = &result {
            match Command::of(header.command.get()) {
                // A guest can cause this, and not only its client. The reason alone is enough.
                Some(Command::RegionRead | Command::RegionWrite) => log::warn!("Refused a vfio-user message: {reason}"),
                Some(command) => log::warn!("Refused a vfio-user message: {command:?}: {reason}"),
                None => log::warn!("Refused a vfio-user message: command {}: {reason}", header.command),
            }
        }
        if header.flags().contains(HeaderFlags::NO_REPLY) {
            return Ok(());
        }
        let (reply, payload, fd) = match result {
            Ok(()) => (header.reply(self.reply.len()), self.reply.as_slice(), self.reply_fd.take()),
            Err(Refused { errno, .. }) => (header.error_reply(errno), [].as_slice(), None),
        };
        let fds = fd.as_ref().map(AsFd::as_fd);
        self.transport.send(&mut [IoSlice::new(reply.as_bytes()), IoSlice::new(payload)], fds.as_slice())
    }
}

/// Receives all of `data`. False at the end of the stream, if the stream may end here.
fn receive(transport: &mut dyn Transport, data: &mut [u8], fds: &mut Descriptors, may_end: bool) -> io::Result<bool> {
    let mut done = 0;
    while done < data.len() {
        match transport.receive(&mut data[done..], fds)? {
            0 if done == 0 && may_end => return Ok(false),
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            received => done += received,
        }
    }
    Ok(true)
}

/// Receives `count` bytes and drops them, and all descriptors that come with them.
fn skip(transport: &mut dyn Transport, mut count: u64) -> io::Result<()> {
    let mut data = [0; 4096];
    while count > 0 {
        let now = count.min(data.len() as u64) as usize;
        receive(transport, &mut data[..now], &mut Descriptors::default(), false)?;
        count -= now as u64;
    }
    Ok(())
}

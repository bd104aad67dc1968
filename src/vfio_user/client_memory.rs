//! Memory that a client gave without a descriptor: it is asked for it ("VFIO_USER_DMA_READ", "VFIO_USER_DMA_WRITE").
//!
//! The questions go over a socket of their own (`twin_socket` in VERSION), and only to clients that take them there. On the
//! session's socket both sides could wait for each other: QEMU (11.1), which offers no other, answers a question there only
//! while none of its processors waits for an answer of this side's. So its memory is to be shared.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::message::{Command, DmaAccess, Header, HeaderFlags};

/// How long an access may take, the wait for others' included. A client that does not answer is not asked again.
const PATIENCE: Duration = Duration::from_secs(5);

/// A client's way to its memory. Clones are the same.
#[derive(Clone, Debug)]
pub struct ClientMemory(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// The most bytes that the client takes or gives at once.
    max_data: usize,
    /// One asks at a time.
    socket: Mutex<Socket>,
}

#[derive(Debug)]
struct Socket {
    stream: UnixStream,
    next_id: u16,
    /// Nothing that comes from it means anything any more.
    failed: bool,
}

impl ClientMemory {
    /// Over this socket, with `max_data` bytes at once, at least one.
    pub(super) fn new(stream: UnixStream, max_data: usize) -> ClientMemory {
        let socket = Mutex::new(Socket { stream, next_id: 0, failed: false });
        ClientMemory(Arc::new(Shared { max_data, socket }))
    }

    /// Reads from `address` on. If that fails, some may have been read.
    pub fn read(&self, address: u64, data: &mut [u8]) -> io::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        for (number, part) in data.chunks_mut(self.0.max_data).enumerate() {
            let address = address.wrapping_add((number * self.0.max_data) as u64);
            let access = DmaAccess { address: address.into(), count: (part.len() as u64).into() };
            self.ask(Command::DmaRead, &access, &[], part, deadline)?;
        }
        Ok(())
    }

    /// Writes from `address` on. If that fails, some may have been written.
    pub fn write(&self, address: u64, data: &[u8]) -> io::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        for (number, part) in data.chunks(self.0.max_data).enumerate() {
            let address = address.wrapping_add((number * self.0.max_data) as u64);
            let access = DmaAccess { address: address.into(), count: (part.len() as u64).into() };
            self.ask(Command::DmaWrite, &access, part, &mut [], deadline)?;
        }
        Ok(())
    }

    /// Sends a command with the data `out`, and takes its answer with as many as `back` has.
    fn ask(
        &self,
        command: Command,
        access: &DmaAccess,
        out: &[u8],
        back: &mut [u8],
        deadline: Instant,
    ) -> io::Result<()> {
        let mut socket = self.0.socket.lock().unwrap_or_else(PoisonError::into_inner);
        if socket.failed {
            return Err(io::ErrorKind::NotConnected.into());
        }
        // That others took so long is not this client's fault, or theirs to tell.
        left(deadline)?;
        match socket.exchange(command, access, out, back, deadline) {
            Ok(0) => Ok(()),
            Ok(errno) => Err(io::Error::from_raw_os_error(errno)),
            Err(error) => {
                // What comes later would be taken for the answer to something else.
                socket.failed = true;
                log::error!(
                    "The client does not answer {command:?}, or not as it should ({error}). Its memory without a descriptor \
                     is not accessed any more"
                );
                Err(error)
            }
        }
    }
}

impl Socket {
    /// The error number that the client answers with, 0 if it does as it is asked.
    fn exchange(
        &mut self,
        command: Command,
        access: &DmaAccess,
        out: &[u8],
        back: &mut [u8],
        deadline: Instant,
    ) -> io::Result<i32> {
        let header = Header {
            id: self.next_id.into(),
            command: command.number().into(),
            size: ((size_of::<Header>() + size_of::<DmaAccess>() + out.len()) as u32).into(),
            ..Header::default()
        };
        self.next_id = self.next_id.wrapping_add(1);
        self.send(&[header.as_bytes(), access.as_bytes()].concat(), deadline)?;
        self.send(out, deadline)?;
        let mut reply = Header::new_zeroed();
        self.receive(reply.as_mut_bytes(), deadline)?;
        let flags = reply.flags();
        let is_reply = flags & (HeaderFlags::REPLY | HeaderFlags::OTHER_TYPES) == HeaderFlags::REPLY;
        if !is_reply || reply.id != header.id || reply.command != header.command {
            return Err(wrong(format!("it is no reply to this command: {reply:?}")));
        }
        let payload = (reply.size.get() as usize).checked_sub(size_of::<Header>());
        if flags.contains(HeaderFlags::ERROR) {
            return match (payload, reply.error.get() as i32) {
                (Some(0), errno @ 1..4096) => Ok(errno),
                (Some(0), _) => Ok(libc::EIO),
                _ => Err(wrong("it has an error and a payload")),
            };
        }
        // What answers a write has a count of four bytes in the specification, and of eight in libvfio-user.
        let fixed = match payload {
            Some(12) if back.is_empty() => 12,
            Some(payload) if payload == size_of::<DmaAccess>() + back.len() => size_of::<DmaAccess>(),
            _ => return Err(wrong(format!("it has {} bytes", reply.size))),
        };
        let mut echo = [0; size_of::<DmaAccess>()];
        self.receive(&mut echo[..fixed], deadline)?;
        let echo = DmaAccess::read_from_bytes(&echo).map_err(|_| io::ErrorKind::InvalidData)?;
        if (echo.address, echo.count) != (access.address, access.count) {
            return Err(wrong(format!("it answers {echo:?}")));
        }
        self.receive(back, deadline)?;
        Ok(0)
    }

    fn send(&mut self, mut data: &[u8], deadline: Instant) -> io::Result<()> {
        while !data.is_empty() {
            self.stream.set_write_timeout(Some(left(deadline)?))?;
            match self.stream.write(data) {
                Ok(sent) => data = &data[sent..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(late(error)),
            }
        }
        Ok(())
    }

    fn receive(&mut self, mut data: &mut [u8], deadline: Instant) -> io::Result<()> {
        while !data.is_empty() {
            self.stream.set_read_timeout(Some(left(deadline)?))?;
            match self.stream.read(data) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(received) => data = &mut data[received..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(late(error)),
            }
        }
        Ok(())
    }
}

/// The time until then; an error if there is none.
fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// A socket's time that is over is EAGAIN.
fn late(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { error }
}

fn wrong(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

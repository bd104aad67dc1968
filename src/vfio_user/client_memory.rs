//! Memory that a client gave without a descriptor: it is asked for it ("VFIO_USER_DMA_READ", "VFIO_USER_DMA_WRITE").
//!
//! The questions go over a socket of their own (`twin_socket` in VERSION), and only to clients that take them there. On the
//! session's socket both sides could wait for each other: QEMU (11.1), which offers no other, answers a question there only
//! while none of its processors waits for an answer of this side's. So its memory is to be shared.
//!
//! # How an access ends
//!
//! An access that is over must not reach memory later: whoever waits for its end takes the memory away then. A DMA_READ may
//! be given up at any time, since nobody takes its answer any more. A DMA_WRITE that was sent ends only with its answer, or
//! with the session. And what is in a socket can still be read when the other end is closed; so whatever the client has not
//! read of such a write by the end of the session is taken back out of its end of the socket, which this side keeps for that.
//! A client that has read all of it, and does not say so, may still do it.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::socket::{MsgFlags, recv};
use nix::sys::time::TimeSpec;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::message::{Command, DmaAccess, Header, HeaderFlags};
use crate::sync::{lock, unpoisoned};

/// How long an access may wait for others' to end, and then how long the client may take to answer it. A client that does not
/// is not asked again.
const PATIENCE: Duration = Duration::from_secs(5);

/// A client's way to its memory. Clones are the same.
#[derive(Clone, Debug)]
pub struct ClientMemory(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// The most bytes that the client takes or gives at once.
    max_data: usize,
    /// Taken by the thread that asks, for as long as it does; the others wait.
    socket: Mutex<Option<Socket>>,
    /// It is there again.
    free: Condvar,
}

#[derive(Debug)]
struct Socket {
    /// Does not block.
    stream: UnixStream,
    /// The client's end.
    theirs: UnixStream,
    /// The session's socket.
    session: UnixStream,
    next_id: u16,
    /// Nothing that comes from it means anything any more.
    failed: bool,
}

impl ClientMemory {
    /// For the client of this session, with `max_data` bytes at once, at least one; and the client's end of the socket for it.
    pub(super) fn new(session: &UnixStream, max_data: usize) -> io::Result<(ClientMemory, UnixStream)> {
        let (stream, client) = UnixStream::pair()?;
        stream.set_nonblocking(true)?;
        let (theirs, session) = (client.try_clone()?, session.try_clone()?);
        let socket = Mutex::new(Some(Socket { stream, theirs, session, next_id: 0, failed: false }));
        Ok((ClientMemory(Arc::new(Shared { max_data, socket, free: Condvar::new() })), client))
    }

    /// Reads from `address` on. If that fails, some may have been read.
    pub fn read(&self, address: u64, data: &mut [u8]) -> io::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        for (number, part) in data.chunks_mut(self.0.max_data).enumerate() {
            let address = address.wrapping_add((number * self.0.max_data) as u64);
            let access = DmaAccess { address: address.into(), count: (part.len() as u64).into() };
            self.with_socket(deadline, |socket| socket.ask(Command::DmaRead, &access, &[], part))?;
        }
        Ok(())
    }

    /// Writes from `address` on. If that fails, some may have been written; and if the client did not answer as it should, its
    /// session is over.
    pub fn write(&self, address: u64, data: &[u8]) -> io::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        for (number, part) in data.chunks(self.0.max_data).enumerate() {
            let address = address.wrapping_add((number * self.0.max_data) as u64);
            let access = DmaAccess { address: address.into(), count: (part.len() as u64).into() };
            self.with_socket(deadline, |socket| socket.ask(Command::DmaWrite, &access, part, &mut []))?;
        }
        Ok(())
    }

    /// Calls `ask` with the socket when no other thread uses it. An error after the deadline. That other threads took so long
    /// is not the client's fault: its own time begins when it is asked.
    fn with_socket(&self, deadline: Instant, ask: impl FnOnce(&mut Socket) -> io::Result<()>) -> io::Result<()> {
        let left = left(deadline)?;
        let waited = self.0.free.wait_timeout_while(self.place(), left, |place| place.is_none());
        let (mut place, _) = unpoisoned(waited);
        let mut socket = place.take().ok_or(io::ErrorKind::TimedOut)?;
        drop(place);
        let result = ask(&mut socket);
        *self.place() = Some(socket);
        self.0.free.notify_one();
        result
    }

    fn place(&self) -> MutexGuard<'_, Option<Socket>> {
        lock(&self.0.socket)
    }
}

impl Socket {
    /// Sends a command with the data `out`, and takes its answer with as many as `back` has.
    fn ask(&mut self, command: Command, access: &DmaAccess, out: &[u8], back: &mut [u8]) -> io::Result<()> {
        if self.failed {
            return Err(io::ErrorKind::NotConnected.into());
        }
        match self.exchange(command, access, out, back, Instant::now() + PATIENCE) {
            Ok(0) => Ok(()),
            Ok(errno) => Err(io::Error::from_raw_os_error(errno)),
            Err(error) => {
                // What comes later would be taken for the answer to something else.
                self.failed = true;
                let end = if command == Command::DmaWrite {
                    self.take_back();
                    "Its session ends, since it could do what it was asked at any time"
                } else {
                    "Its memory without a descriptor is not accessed any more"
                };
                log::error!("The client does not answer {command:?}, or not as it should ({error}). {end}");
                Err(error)
            }
        }
    }

    /// Takes back what the client has not read, and ends the session.
    fn take_back(&self) {
        // Either end fails only if the client has done the same.
        let _ = self.stream.shutdown(Shutdown::Both);
        let mut data = [0; 4096];
        // Only this call is not to block: the client may wait at the same end.
        while matches!(recv(self.theirs.as_raw_fd(), &mut data, MsgFlags::MSG_DONTWAIT), Ok(1..) | Err(Errno::EINTR)) {}
        let _ = self.session.shutdown(Shutdown::Both);
    }

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
            match self.stream.write(data) {
                Ok(sent) => data = &data[sent..],
                Err(error) => self.wait(error, PollFlags::POLLOUT, deadline)?,
            }
        }
        Ok(())
    }

    fn receive(&mut self, mut data: &mut [u8], deadline: Instant) -> io::Result<()> {
        while !data.is_empty() {
            match self.stream.read(data) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(received) => data = &mut data[received..],
                Err(error) => self.wait(error, PollFlags::POLLIN, deadline)?,
            }
        }
        Ok(())
    }

    /// What is done about an error: if it is that the socket is not ready, waits until it may be.
    fn wait(&self, error: io::Error, ready: PollFlags, deadline: Instant) -> io::Result<()> {
        match error.kind() {
            io::ErrorKind::Interrupted => return Ok(()),
            io::ErrorKind::WouldBlock => {}
            _ => return Err(error),
        }
        // That the client has left the session is always told. That it has left this socket is not, as it is open here too.
        let [socket, session] = [(&self.stream, ready), (&self.session, PollFlags::empty())];
        let mut both = [socket, session].map(|(socket, ready)| PollFd::new(socket.as_fd(), ready));
        match ppoll(&mut both, Some(TimeSpec::from_duration(left(deadline)?)), None) {
            Ok(0) => Err(io::ErrorKind::TimedOut.into()),
            // An answer that was given before the end counts.
            Ok(_) if both[0].any() == Some(false) => Err(io::ErrorKind::ConnectionReset.into()),
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// The time until then; an error if there is none.
fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

fn wrong(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

//! Memory that a client gave without a descriptor. Each access is a command to the client ("VFIO_USER_DMA_READ",
//! "VFIO_USER_DMA_WRITE").
//!
//! The commands go over a socket of their own (`twin_socket` in VERSION), and only to clients that accept it. On the
//! session's socket both sides could wait for each other: QEMU (11.1), which offers no other socket, answers a command
//! there only while none of its processors waits for an answer from this side. So QEMU's memory has to be shared.
//!
//! # How an access ends
//!
//! An access that has ended must not reach memory later, since the thread that waits for its end then takes the memory
//! away. A DMA_READ may be given up at any time, because nobody uses its answer any more. A DMA_WRITE that was sent
//! ends only with its answer or with the session. Bytes in a socket can still be read after the other end was closed.
//! So at the end of the session the bytes of such a write that the client has not read are taken back out of the
//! client's end of the socket, which this side keeps open for that purpose. A client that has read all of it and has
//! not answered may still execute it.

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

/// Access to a client's memory. Clones are the same.
#[derive(Clone, Debug)]
pub struct ClientMemory(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// The most bytes that the client accepts or returns at once.
    max_data: usize,
    /// Taken by the thread that asks, for as long as it does; the others wait.
    socket: Mutex<Option<Socket>>,
    /// Signalled when the socket is free again.
    free: Condvar,
}

#[derive(Debug)]
struct Socket {
    /// This side's end, which does not block.
    stream: UnixStream,
    /// The client's end.
    theirs: UnixStream,
    /// The session's socket.
    session: UnixStream,
    next_id: u16,
    /// Set when bytes from it mean nothing any more.
    failed: bool,
}

impl ClientMemory {
    /// Makes the socket for the client of this session, with at most `max_data` bytes at once, which is at least one.
    /// Returns the client's end too.
    pub(super) fn new(session: &UnixStream, max_data: usize) -> io::Result<(ClientMemory, UnixStream)> {
        let (stream, client) = UnixStream::pair()?;
        stream.set_nonblocking(true)?;
        let (theirs, session) = (client.try_clone()?, session.try_clone()?);
        let socket = Mutex::new(Some(Socket { stream, theirs, session, next_id: 0, failed: false }));
        Ok((ClientMemory(Arc::new(Shared { max_data, socket, free: Condvar::new() })), client))
    }

    /// Reads from `address` on. If this fails, a part may have been read.
    ///
    /// `limit` is how long it may wait for the accesses of others to end, and then how long the client may take for each
    /// answer. A client that does not answer is not asked again.
    pub fn read(&self, address: u64, data: &mut [u8], limit: Duration) -> io::Result<()> {
        let deadline = Instant::now() + limit;
        for (number, part) in data.chunks_mut(self.0.max_data).enumerate() {
            let address = address.wrapping_add((number * self.0.max_data) as u64);
            let access = DmaAccess { address: address.into(), count: (part.len() as u64).into() };
            self.with_socket(deadline, |socket| socket.ask(Command::DmaRead, &access, &[], part, limit))?;
        }
        Ok(())
    }

    /// Writes from `address` on. If this fails, a part may have been written; and if the client did not answer properly, its
    /// session is over. `limit` is as for [`ClientMemory::read`].
    pub fn write(&self, address: u64, data: &[u8], limit: Duration) -> io::Result<()> {
        let deadline = Instant::now() + limit;
        for (number, part) in data.chunks(self.0.max_data).enumerate() {
            let address = address.wrapping_add((number * self.0.max_data) as u64);
            let access = DmaAccess { address: address.into(), count: (part.len() as u64).into() };
            self.with_socket(deadline, |socket| socket.ask(Command::DmaWrite, &access, part, &mut [], limit))?;
        }
        Ok(())
    }

    /// Calls `ask` with the socket when no other thread uses it. An error after the deadline. That other threads took
    /// so long is not the client's fault: its own time begins when it is asked.
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
    /// Sends a command with the data `out`, and receives its answer with the data `back`.
    fn ask(
        &mut self,
        command: Command,
        access: &DmaAccess,
        out: &[u8],
        back: &mut [u8],
        limit: Duration,
    ) -> io::Result<()> {
        if self.failed {
            return Err(io::ErrorKind::NotConnected.into());
        }
        match self.exchange(command, access, out, back, Instant::now() + limit) {
            Ok(0) => Ok(()),
            Ok(errno) => Err(io::Error::from_raw_os_error(errno)),
            Err(error) => {
                // A late answer would be taken for the answer to a later command.
                self.failed = true;
                let end = if command == Command::DmaWrite {
                    self.take_back();
                    "Its session ends, since it could still execute the write at any time"
                } else {
                    "Its memory without a descriptor is not accessed any more"
                };
                log::error!("The client does not answer {command:?}, or answers it wrongly ({error}). {end}");
                Err(error)
            }
        }
    }

    /// Takes back the bytes that the client has not read, and ends the session.
    fn take_back(&self) {
        // A shutdown fails only if the client has done the same already.
        let _ = self.stream.shutdown(Shutdown::Both);
        let mut data = [0; 4096];
        // Only this call must not block, not the descriptor: the client may wait at the same end.
        while matches!(recv(self.theirs.as_raw_fd(), &mut data, MsgFlags::MSG_DONTWAIT), Ok(1..) | Err(Errno::EINTR)) {}
        let _ = self.session.shutdown(Shutdown::Both);
    }

    /// Returns the error number of the client's answer, or 0 if it has executed the command.
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
        // The answer to a write has a count of four bytes in the specification, and of eight in libvfio-user.
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

    /// Handles an error of the socket. If the socket is just not ready, waits until it may be.
    fn wait(&self, error: io::Error, ready: PollFlags, deadline: Instant) -> io::Result<()> {
        match error.kind() {
            io::ErrorKind::Interrupted => return Ok(()),
            io::ErrorKind::WouldBlock => {}
            _ => return Err(error),
        }
        // poll(2) always reports that the client has left the session. It does not report that the client has left this
        // socket, since its end is open here too.
        let [socket, session] = [(&self.stream, ready), (&self.session, PollFlags::empty())];
        let mut both = [socket, session].map(|(socket, ready)| PollFd::new(socket.as_fd(), ready));
        match ppoll(&mut both, Some(TimeSpec::from_duration(left(deadline)?)), None) {
            Ok(0) => Err(io::ErrorKind::TimedOut.into()),
            // An answer that came before the end counts.
            Ok(_) if both[0].any() == Some(false) => Err(io::ErrorKind::ConnectionReset.into()),
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// The time that is left until the deadline. An error if there is none.
fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

fn wrong(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

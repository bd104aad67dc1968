//! The transport of messages: a stream of bytes, with descriptors beside it.

use std::io::{self, IoSlice};
use std::mem::{MaybeUninit, size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::ptr;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::message::MAX_FDS;

/// Descriptors that came with a message, at most [`MAX_FDS`]. Those that are not taken are closed.
#[derive(Debug, Default)]
pub struct Descriptors {
    held: Vec<OwnedFd>,
    lost: Option<Lost>,
}

/// Why descriptors of a message are missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// There were more than [`MAX_FDS`].
    TooMany,
    /// The operating system could not give them to this process, for example because it has too many open.
    NotReceived,
}

impl Descriptors {
    /// Adds a descriptor. If it is one too many, it is closed and noted as lost.
    pub fn push(&mut self, fd: OwnedFd) {
        if self.held.len() < MAX_FDS { self.held.push(fd) } else { self.set_lost(Lost::TooMany) }
    }

    /// Notes that some did not arrive.
    pub fn set_lost(&mut self, why: Lost) {
        self.lost.get_or_insert(why);
    }

    /// Why some are missing, or `None` if none is.
    pub fn lost(&self) -> Option<Lost> {
        self.lost
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Takes all of them.
    pub fn take(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.held)
    }
}

/// A connection to a client. Receiving and sending wait.
pub trait Transport {
    /// Receives some of the next bytes, at most as many as fit into `data`, and the descriptors that came with them.
    /// Returns 0 only at the end of the stream.
    fn receive(&mut self, data: &mut [u8], fds: &mut Descriptors) -> io::Result<usize>;

    /// Sends all bytes, with at most [`MAX_FDS`] descriptors.
    fn send(&mut self, data: &mut [IoSlice<'_>], fds: &[BorrowedFd<'_>]) -> io::Result<()>;

    /// The socket, or `None` if this is something else, over which descriptors cannot be sent.
    fn socket(&self) -> Option<&UnixStream>;
}

/// Space for descriptors beside the bytes.
#[repr(C)]
union Control {
    _align: libc::cmsghdr,
    bytes: [MaybeUninit<u8>; CONTROL],
}

/// The size of that space. The constant's argument is small.
// SAFETY: it computes with a number.
const CONTROL: usize = unsafe { libc::CMSG_SPACE((MAX_FDS * size_of::<RawFd>()) as u32) } as usize;

impl Transport for UnixStream {
    // nix::sys::socket::recvmsg() returns none of the descriptors if there were more than fit, and those that came
    // would stay open for ever.
    fn receive(&mut self, data: &mut [u8], fds: &mut Descriptors) -> io::Result<usize> {
        let mut control = Control { bytes: [MaybeUninit::zeroed(); CONTROL] };
        let mut part = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
        // SAFETY: all zeros are a message header: no pointers, no lengths.
        let mut header: libc::msghdr = unsafe { zeroed() };
        header.msg_iov = &raw mut part;
        header.msg_iovlen = 1;
        header.msg_control = (&raw mut control).cast();
        header.msg_controllen = CONTROL as _;
        let received = loop {
            // SAFETY: the header leads to `data` and to `control`, with their lengths, and both live through the call.
            let received = unsafe { libc::recvmsg(self.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC) };
            match usize::try_from(received) {
                Ok(received) => break received,
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        };
        let mut came = 0;
        // SAFETY: `header` is as the kernel left it, and `control`, to which it leads, still exists. So the pointers
        // that these macros compute lead into bytes that the kernel has written, or are null.
        unsafe {
            let mut message = libc::CMSG_FIRSTHDR(&raw const header);
            while let Some(found) = message.as_ref() {
                if found.cmsg_level == libc::SOL_SOCKET && found.cmsg_type == libc::SCM_RIGHTS {
                    let bytes = found.cmsg_len - libc::CMSG_LEN(0) as usize;
                    let first: *const RawFd = libc::CMSG_DATA(message).cast();
                    let count = bytes / size_of::<RawFd>();
                    came += count;
                    for number in 0..count {
                        // The kernel has just made these descriptors, and nobody else owns them.
                        fds.push(OwnedFd::from_raw_fd(ptr::read_unaligned(first.add(number))));
                    }
                }
                message = libc::CMSG_NXTHDR(&raw const header, message);
            }
        }
        if header.msg_flags & libc::MSG_CTRUNC != 0 {
            // The kernel passes no descriptor that does not fit, and none after one that it cannot pass.
            fds.set_lost(if came < MAX_FDS { Lost::NotReceived } else { Lost::TooMany });
        }
        Ok(received)
    }

    fn send(&mut self, mut data: &mut [IoSlice<'_>], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let fds: Vec<RawFd> = fds.iter().take(MAX_FDS).map(AsRawFd::as_raw_fd).collect();
        let beside = [ControlMessage::ScmRights(&fds)];
        let mut beside = if fds.is_empty() { &[][..] } else { &beside };
        IoSlice::advance_slices(&mut data, 0);
        while !data.is_empty() {
            match sendmsg::<()>(self.as_raw_fd(), data, beside, MsgFlags::MSG_NOSIGNAL, None) {
                Ok(sent) => {
                    // The descriptors went with the first byte.
                    beside = &[];
                    IoSlice::advance_slices(&mut data, sent);
                }
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn socket(&self) -> Option<&UnixStream> {
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    #[test]
    fn descriptors_come_with_their_bytes_and_those_too_many_are_closed() {
        let (mut a, mut b) = UnixStream::pair().unwrap();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        a.send(&mut [IoSlice::new(b"one "), IoSlice::new(b"two")], &[theirs.as_fd(); MAX_FDS]).unwrap();
        a.send(&mut [IoSlice::new(b"!")], &[theirs.as_fd()]).unwrap();
        drop(theirs);
        let (mut fds, mut data) = (Descriptors::default(), [0; 16]);
        assert_eq!(b.receive(&mut data, &mut fds).unwrap(), 7);
        assert_eq!(&data[..7], b"one two");
        assert_eq!(fds.lost(), None);
        assert_eq!(b.receive(&mut data, &mut fds).unwrap(), 1);
        assert_eq!(fds.lost(), Some(Lost::TooMany));
        let held = fds.take();
        assert_eq!(held.len(), MAX_FDS);
        // All of them are the socket that was sent, which is closed with the last of them.
        File::from(held.into_iter().next().unwrap()).write_all(b"x").unwrap();
        assert_eq!(ours.read(&mut data).unwrap(), 1);
        assert_eq!(ours.read(&mut data).unwrap(), 0, "one is still open");
        drop(a);
        assert_eq!(b.receive(&mut data, &mut fds).unwrap(), 0);
    }
}

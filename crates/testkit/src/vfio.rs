//! A vfio-user client that can send anything.

use std::io::Read;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::PATIENCE;

/// Commands, as the specification numbers them.
pub mod command {
    pub const VERSION: u16 = 1;
    pub const DMA_MAP: u16 = 2;
    pub const DMA_UNMAP: u16 = 3;
    pub const GET_INFO: u16 = 4;
    pub const GET_REGION_INFO: u16 = 5;
    pub const GET_REGION_IO_FDS: u16 = 6;
    pub const GET_IRQ_INFO: u16 = 7;
    pub const SET_IRQS: u16 = 8;
    pub const REGION_READ: u16 = 9;
    pub const REGION_WRITE: u16 = 10;
    pub const DMA_READ: u16 = 11;
    pub const DMA_WRITE: u16 = 12;
    pub const RESET: u16 = 13;
    pub const DIRTY_PAGES: u16 = 14;
    pub const REGION_WRITE_MULTI: u16 = 15;
    pub const DEVICE_FEATURE: u16 = 16;
    pub const MIG_DATA_READ: u16 = 17;
    pub const MIG_DATA_WRITE: u16 = 18;
}

/// A header's flags.
pub const REPLY: u32 = 1 << 0;
pub const NO_REPLY: u32 = 1 << 4;
pub const ERROR: u32 = 1 << 5;

/// The flags of DMA_MAP.
pub const READ: u32 = 1 << 0;
pub const WRITE: u32 = 1 << 1;
pub const MMAP: u32 = 1 << 2;
pub const FILE_IO: u32 = 1 << 3;

/// The VERSION of a client that takes the server's commands on a socket of their own.
pub const TWIN: &str = "{\"capabilities\":{\"twin_socket\":{\"supported\":true}}}";

pub struct RawClient {
    pub stream: UnixStream,
    next_id: u16,
}

/// An answer.
#[derive(Debug)]
pub struct Reply {
    pub id: u16,
    pub command: u16,
    pub flags: u32,
    pub errno: u32,
    pub payload: Vec<u8>,
    pub fd: Option<OwnedFd>,
}

impl RawClient {
    pub fn connect(path: &Path) -> Self {
        RawClient::over(UnixStream::connect(path).unwrap())
    }

    pub fn over(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        RawClient { stream, next_id: 0x1f0 }
    }

    /// Sends a message and returns its id.
    pub fn send(&mut self, command: u16, flags: u32, payload: &[u8], fds: &[RawFd]) -> u16 {
        self.send_sized(command, flags, 16 + payload.len() as u32, payload, fds)
    }

    /// The same with any size in its header.
    pub fn send_sized(&mut self, command: u16, flags: u32, size: u32, payload: &[u8], fds: &[RawFd]) -> u16 {
        self.next_id = self.next_id.wrapping_add(1);
        let header = [&self.next_id.to_le_bytes()[..], &command.to_le_bytes()].concat();
        let rest = [size, flags, 0].map(u32::to_le_bytes).concat();
        let message = [&header[..], &rest, payload].concat();
        let sent = self.stream.send_with_fds(&[&message[..]], fds).unwrap();
        std::io::Write::write_all(&mut self.stream, &message[sent..]).unwrap();
        self.next_id
    }

    /// The next answer.
    pub fn reply(&mut self) -> Reply {
        let mut header = [0; 16];
        // A receive that has a limit is interrupted when the process is stopped and goes on (signal(7)).
        let (received, fd) = loop {
            match self.stream.recv_with_fd(&mut header) {
                Err(error) if error.errno() == libc::EINTR => {}
                received => break received.unwrap(),
            }
        };
        assert_ne!(received, 0, "the server has closed the connection");
        self.stream.read_exact(&mut header[received..]).unwrap();
        let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        let mut payload = vec![0; word(4) as usize - 16];
        self.stream.read_exact(&mut payload).unwrap();
        Reply { id: half(0), command: half(2), flags: word(8), errno: word(12), payload, fd: fd.map(Into::into) }
    }

    /// Sends a command, and takes its answer: the payload, or the error number.
    pub fn call(&mut self, command: u16, payload: &[u8], fds: &[RawFd]) -> Result<Vec<u8>, i32> {
        let id = self.send(command, 0, payload, fds);
        self.take(command, id)
    }

    /// Takes the answer to a command that was sent: the payload, or the error number.
    pub fn take(&mut self, command: u16, id: u16) -> Result<Vec<u8>, i32> {
        let reply = self.reply();
        assert_eq!((reply.id, reply.command), (id, command), "{reply:?}");
        if reply.flags == REPLY {
            assert_eq!(reply.errno, 0);
            return Ok(reply.payload);
        }
        assert_eq!(reply.flags, REPLY | ERROR);
        assert!(reply.errno > 0 && reply.payload.is_empty(), "{reply:?}");
        Err(reply.errno as i32)
    }

    /// VERSION with these capabilities, as JSON; returns the server's.
    pub fn version(&mut self, minor: u16, json: &str) -> (serde_json::Value, Option<OwnedFd>) {
        let payload = [&[0, 0][..], &minor.to_le_bytes(), json.as_bytes(), &[0]].concat();
        let id = self.send(command::VERSION, 0, &payload, &[]);
        let reply = self.reply();
        assert_eq!((reply.id, reply.command, reply.flags), (id, command::VERSION, REPLY), "{reply:?}");
        assert_eq!(reply.payload[..2], [0, 0]);
        assert!(u16::from_le_bytes([reply.payload[2], reply.payload[3]]) <= minor);
        let (end, json) = reply.payload[4..].split_last().unwrap();
        assert_eq!(*end, 0);
        (serde_json::from_slice(json).unwrap(), reply.fd)
    }

    pub fn dma_map(&mut self, flags: u32, offset: u64, address: u64, size: u64, fds: &[RawFd]) -> Result<(), i32> {
        let payload = self.call(command::DMA_MAP, &dma_map(flags, offset, address, size), fds)?;
        assert!(payload.is_empty());
        Ok(())
    }

    pub fn dma_unmap(&mut self, flags: u32, address: u64, size: u64) -> Result<(), i32> {
        let request = dma_unmap(flags, address, size);
        let payload = self.call(command::DMA_UNMAP, &request, &[])?;
        assert_eq!(payload, request);
        Ok(())
    }

    pub fn region_read(&mut self, region: u32, offset: u64, count: u32) -> Result<Vec<u8>, i32> {
        let request = access(region, offset, count);
        let payload = self.call(command::REGION_READ, &request, &[])?;
        let (echo, data) = payload.split_at(16);
        assert_eq!((echo, data.len()), (&request[..], count as usize));
        Ok(data.to_vec())
    }

    pub fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), i32> {
        let request = access(region, offset, data.len() as u32);
        let payload = self.call(command::REGION_WRITE, &[&request[..], data].concat(), &[])?;
        assert_eq!(payload, request);
        Ok(())
    }

    pub fn set_irqs(&mut self, [index, flags, start, count]: [u32; 4], data: &[u8], fds: &[RawFd]) -> Result<(), i32> {
        let request = [&set_irqs(index, flags, start, count), data].concat();
        let payload = self.call(command::SET_IRQS, &request, fds)?;
        assert!(payload.is_empty());
        Ok(())
    }
}

/// Words of 32 bits.
pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

pub fn dma_map(flags: u32, offset: u64, address: u64, size: u64) -> Vec<u8> {
    [words(&[32, flags]), [offset, address, size].map(u64::to_le_bytes).concat()].concat()
}

pub fn dma_unmap(flags: u32, address: u64, size: u64) -> Vec<u8> {
    [words(&[24, flags]), [address, size].map(u64::to_le_bytes).concat()].concat()
}

/// The beginning of REGION_READ and REGION_WRITE.
pub fn access(region: u32, offset: u64, count: u32) -> Vec<u8> {
    [&offset.to_le_bytes()[..], &region.to_le_bytes(), &count.to_le_bytes()].concat()
}

pub fn set_irqs(index: u32, flags: u32, start: u32, count: u32) -> Vec<u8> {
    words(&[20, flags, index, start, count])
}

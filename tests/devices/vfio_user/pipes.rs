//! A session over pipes, a transport that carries no descriptors.

use std::io::{self, IoSlice, PipeReader, PipeWriter, Read, Write, pipe};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

use crate::vfio_user::memo::Session;
use viommu::vfio_user::{Descriptors, Transport};
use viommu_testkit::vfio::{access, command, words};

struct Pipes {
    from: PipeReader,
    to: PipeWriter,
}

impl Pipes {
    /// Two ends.
    fn pair() -> (Pipes, Pipes) {
        let ((from, to_us), (from_us, to)) = (pipe().unwrap(), pipe().unwrap());
        (Pipes { from, to }, Pipes { from: from_us, to: to_us })
    }

    fn call(&mut self, command: u16, payload: &[u8]) -> (u32, Vec<u8>) {
        let size = 16 + payload.len() as u32;
        let header = [&[5, 0][..], &command.to_le_bytes(), &words(&[size, 0, 0])].concat();
        self.to.write_all(&[&header, payload].concat()).unwrap();
        let mut header = [0; 16];
        self.from.read_exact(&mut header).unwrap();
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        let mut payload = vec![0; word(4) as usize - 16];
        self.from.read_exact(&mut payload).unwrap();
        (word(12), payload)
    }
}

impl Transport for Pipes {
    fn receive(&mut self, data: &mut [u8], _fds: &mut Descriptors) -> io::Result<usize> {
        self.from.read(data)
    }

    fn send(&mut self, data: &mut [IoSlice<'_>], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        assert!(fds.is_empty());
        data.iter().try_for_each(|part| self.to.write_all(part))
    }

    fn socket(&self) -> Option<&UnixStream> {
        None
    }
}

#[test]
fn a_session_without_descriptors() {
    let (theirs, mut ours) = Pipes::pair();
    let session = Session::over(theirs);
    let json = "{\"capabilities\":{\"twin_socket\":{\"supported\":true}}}";
    let (errno, version) = ours.call(command::VERSION, &[&[0, 0, 1, 0], json.as_bytes(), &[0]].concat());
    assert_eq!(errno, 0);
    let said = String::from_utf8(version[4..].to_vec()).unwrap();
    assert!(said.contains("max_dma_maps") && !said.contains("twin_socket"), "{said}");
    assert_eq!(ours.call(command::GET_INFO, &words(&[16, 0, 0, 0])), (0, words(&[16, 3, 2, 2])));
    assert_eq!(ours.call(command::GET_INFO, &[]).0, libc::EINVAL as u32);
    ours.call(command::REGION_WRITE, &[access(0, 0, 2), vec![8, 9]].concat());
    assert_eq!(ours.call(command::REGION_READ, &access(0, 0, 3)).1[16..], [8, 9, 0]);
    drop(ours);
    let (memo, result) = session.join();
    result.unwrap();
    assert_eq!(memo.calls, ["write 0 0x0 + 2", "read 0 0x0 + 3"]);
}

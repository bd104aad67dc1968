//! The client's end of a twin socket, where the server asks for memory.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::vfio::{REPLY, command, words};

/// A command from the server.
#[derive(Debug)]
pub struct Asked {
    pub id: [u8; 2],
    pub command: u16,
    pub address: u64,
    pub count: u64,
    /// The data of a write.
    pub data: Vec<u8>,
}

/// Reads the beginning of a command. `None` if the server has closed the socket.
pub fn take_head(socket: &mut UnixStream) -> Option<Asked> {
    let mut head = [0; 32];
    socket.read_exact(&mut head).ok()?;
    let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap());
    let long = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().unwrap());
    assert_eq!((word(8), word(12)), (0, 0));
    let command = u16::from_le_bytes([head[2], head[3]]);
    let asked = Asked { id: [head[0], head[1]], command, address: long(16), count: long(24), data: Vec::new() };
    let data = if command == command::DMA_WRITE { asked.count } else { 0 };
    assert_eq!(u64::from(word(4)), 32 + data);
    Some(asked)
}

/// Reads a command. `None` if the server has closed the socket.
pub fn take(socket: &mut UnixStream) -> Option<Asked> {
    let mut asked = take_head(socket)?;
    if asked.command == command::DMA_WRITE {
        asked.data = vec![0; asked.count as usize];
        socket.read_exact(&mut asked.data).unwrap();
    }
    Some(asked)
}

pub fn answer(socket: &mut UnixStream, asked: &Asked, flags: u32, errno: u32, payload: &[u8]) {
    let header =
        [&asked.id[..], &asked.command.to_le_bytes(), &words(&[16 + payload.len() as u32, flags, errno])].concat();
    socket.write_all(&[&header, payload].concat()).unwrap();
}

/// The beginning of an answer.
pub fn echo(asked: &Asked) -> Vec<u8> {
    [asked.address, asked.count].map(u64::to_le_bytes).concat()
}

/// Answers a read from `ram`, which begins at `base`.
pub fn answer_read(socket: &mut UnixStream, asked: &Asked, base: u64, ram: &[u8]) {
    assert_eq!(asked.command, command::DMA_READ);
    let data = &ram[(asked.address - base) as usize..][..asked.count as usize];
    answer(socket, asked, REPLY, 0, &[&echo(asked), data].concat());
}

/// Answers all commands from `ram`, which begins at `base`, until the server closes the socket. Returns `ram` and the
/// number of commands.
pub fn serve(mut socket: UnixStream, base: u64, mut ram: Vec<u8>, max_data: usize) -> (Vec<u8>, usize) {
    let mut count = 0;
    while let Some(asked) = take(&mut socket) {
        assert!(asked.count as usize <= max_data, "{asked:?}");
        count += 1;
        if asked.command == command::DMA_WRITE {
            ram[(asked.address - base) as usize..][..asked.data.len()].copy_from_slice(&asked.data);
            // The count has four bytes in the specification, and eight in libvfio-user.
            let len = if count % 2 == 0 { 12 } else { 16 };
            answer(&mut socket, &asked, REPLY, 0, &echo(&asked)[..len]);
        } else {
            answer_read(&mut socket, &asked, base, &ram);
        }
    }
    (ram, count)
}

//! DMA_READ and DMA_WRITE: the server sends them, and the client answers, on a socket of their own.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::vfio_user::memo::Session;
use viommu::vfio_user::{Backing, ClientMemory};
use viommu_testkit::PATIENCE;
use viommu_testkit::twin::*;
use viommu_testkit::vfio::*;

const BASE: u64 = 0x10_0000;

/// A client's memory, the client's end of its socket, which takes `max_data` bytes at once, and the client.
fn memory(max_data: usize) -> (ClientMemory, UnixStream, RawClient) {
    let (session, mut client) = Session::start();
    let json =
        format!("{{\"capabilities\":{{\"max_data_xfer_size\":{max_data},\"twin_socket\":{{\"supported\":true}}}}}}");
    let (_, fd) = client.version(1, &json);
    client.dma_map(READ | WRITE, 0, BASE, 0x10_0000, &[]).unwrap();
    let map = session.maps.lock().unwrap().pop().unwrap();
    let Backing::Messages(memory) = map.backing else { panic!("{:?}", map.backing) };
    (memory, UnixStream::from(fd.unwrap()), client)
}

#[test]
fn memory_is_read_and_written_in_pieces_that_the_client_takes() {
    let (memory, socket, session) = memory(4096);
    let client = thread::spawn(|| serve(socket, BASE, vec![0; 0x1_0000], 4096));
    let data: Vec<u8> = (0..2 * 4096 + 42).map(|at| (at * 7 % 251) as u8).collect();
    memory.write(BASE + 0x1001, &data, PATIENCE).unwrap();
    let mut back = vec![0; data.len()];
    memory.read(BASE + 0x1001, &mut back, PATIENCE).unwrap();
    assert_eq!(back, data);
    memory.read(BASE, &mut [], PATIENCE).unwrap();
    drop((memory, session));
    let (ram, count) = client.join().unwrap();
    assert_eq!(count, 6);
    assert_eq!(ram[0x1001..][..data.len()], data);
    assert!(ram[..0x1001].iter().chain(&ram[0x1001 + data.len()..]).all(|byte| *byte == 0));
}

#[test]
fn several_threads_take_turns() {
    let (memory, socket, session) = memory(64);
    let client = thread::spawn(|| serve(socket, BASE, vec![0; 0x1_0000], 64));
    thread::scope(|scope| {
        for number in 0..4_u8 {
            let memory = &memory;
            scope.spawn(move || {
                let address = BASE + 0x1000 * u64::from(number);
                for round in 0..50 {
                    let data = [number ^ round; 200];
                    memory.write(address, &data, PATIENCE).unwrap();
                    let mut back = [0; 200];
                    memory.read(address, &mut back, PATIENCE).unwrap();
                    assert_eq!(back, data);
                }
            });
        }
    });
    drop((memory, session));
    assert_eq!(client.join().unwrap().1, 4 * 50 * 2 * 4);
}

#[test]
fn an_error_of_the_clients_fails_the_access_and_no_other() {
    let (memory, mut socket, session) = memory(4096);
    let client = thread::spawn(move || {
        for errno in [libc::EIO, libc::EPERM, 0, -1, 1 << 20] {
            let asked = take(&mut socket).unwrap();
            answer(&mut socket, &asked, REPLY | ERROR, errno as u32, &[]);
        }
        serve(socket, BASE, vec![3; 0x1000], 4096)
    });
    let mut errnos = (0..5).map(|_| memory.read(BASE, &mut [0; 8], PATIENCE).unwrap_err().raw_os_error());
    assert_eq!(errnos.next().unwrap(), Some(libc::EIO));
    assert_eq!(errnos.next().unwrap(), Some(libc::EPERM));
    assert!(errnos.all(|errno| errno == Some(libc::EIO)), "those that are none");
    let mut data = [0; 8];
    memory.read(BASE, &mut data, PATIENCE).unwrap();
    assert_eq!(data, [3; 8]);
    drop((memory, session));
    client.join().unwrap();
}

#[test]
fn a_wrong_answer_is_not_taken_for_one() {
    type Wrong = fn(&mut UnixStream, &Asked);
    let wrong: [Wrong; 11] = [
        |socket, asked| answer(socket, &Asked { id: [0x99, 0x99], data: Vec::new(), ..*asked }, REPLY, 0, &[0; 24]),
        |socket, asked| {
            answer(socket, &Asked { command: command::DMA_WRITE, data: Vec::new(), ..*asked }, REPLY, 0, &[0; 24]);
        },
        |socket, asked| answer(socket, asked, 0, 0, &[echo(asked), vec![0; 8]].concat()),
        |socket, asked| answer(socket, asked, 0xf, 0, &[echo(asked), vec![0; 8]].concat()),
        |socket, asked| answer(socket, asked, REPLY, 0, &[]),
        |socket, asked| answer(socket, asked, REPLY, 0, &[echo(asked), vec![0; 7]].concat()),
        |socket, asked| answer(socket, asked, REPLY, 0, &[echo(asked), vec![0; 9]].concat()),
        |socket, asked| answer(socket, asked, REPLY | ERROR, 5, &[0; 8]),
        // As if the count had four bytes: the data begins in the place of its upper half.
        |socket, asked| answer(socket, asked, REPLY, 0, &[&echo(asked)[..12], &[0x55; 12]].concat()),
        |socket, _| socket.write_all(&[0, 0, 11, 0, 3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]).unwrap(),
        |socket, _| socket.write_all(&[0, 0, 11, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0, 0, 0, 0]).unwrap(),
    ];
    for (number, wrong) in wrong.into_iter().enumerate() {
        let (memory, mut socket, session) = memory(4096);
        let client = thread::spawn(move || {
            let asked = take(&mut socket).unwrap();
            wrong(&mut socket, &asked);
            // It is not asked again.
            assert!(take(&mut socket).is_none());
        });
        assert_eq!(memory.read(BASE, &mut [0; 8], PATIENCE).unwrap_err().kind(), ErrorKind::InvalidData, "{number}");
        assert_eq!(memory.write(BASE, &[0; 8], PATIENCE).unwrap_err().kind(), ErrorKind::NotConnected);
        drop((memory, session));
        client.join().unwrap();
    }
}

#[test]
fn a_client_that_does_not_answer_is_waited_for_once() {
    let (memory, mut socket, mut session) = memory(4096);
    const LIMIT: Duration = Duration::from_millis(200);
    let begun = Instant::now();
    assert_eq!(memory.read(BASE, &mut [0; 8], LIMIT).unwrap_err().kind(), ErrorKind::TimedOut);
    assert!(begun.elapsed() >= LIMIT);
    let asked = take(&mut socket).unwrap();
    answer(&mut socket, &asked, REPLY, 0, &[echo(&asked), vec![7; 8]].concat());
    assert_eq!(memory.read(BASE, &mut [0; 8], PATIENCE).unwrap_err().kind(), ErrorKind::NotConnected, "it is too late");
    assert_eq!(memory.write(BASE, &[0; 8], PATIENCE).unwrap_err().kind(), ErrorKind::NotConnected);
    assert!(session.region_read(0, 0, 4).is_ok(), "an answer that nobody wants does no harm");
}

/// The bytes that are left in a socket that the server has closed.
fn rest(mut socket: &UnixStream) -> Vec<u8> {
    let mut rest = Vec::new();
    socket.read_to_end(&mut rest).unwrap();
    rest
}

#[test]
fn a_write_that_is_not_answered_is_taken_back_and_ends_the_session() {
    // The client has read all of it, some of it, or nothing; or so little that not all could be sent.
    let cases = [(8, 40), (8, 39), (8, 16), (8, 0), (1 << 20, 0), (1 << 20, 5000)];
    thread::scope(|scope| {
        for (len, read) in cases {
            scope.spawn(move || {
                let (memory, mut socket, session) = memory(1 << 20);
                let writer = memory.clone();
                let write = thread::spawn(move || writer.write(BASE, &vec![7; len], Duration::from_secs(5)));
                socket.read_exact(&mut vec![0; read]).unwrap();
                assert_eq!(write.join().unwrap().unwrap_err().kind(), ErrorKind::TimedOut, "{len} {read}");
                // A request that waited for the write's end may remove the memory now.
                assert!(rest(&socket).is_empty(), "{len} {read}");
                assert!(rest(&session.stream).is_empty(), "{len} {read}");
                assert_eq!(memory.write(BASE, &[0; 8], PATIENCE).unwrap_err().kind(), ErrorKind::NotConnected);
            });
        }
    });
}

#[test]
fn a_write_that_is_answered_with_something_else_ends_the_session() {
    let (memory, mut socket, session) = memory(4096);
    let client = thread::spawn(move || {
        let asked = take(&mut socket).unwrap();
        answer(&mut socket, &asked, REPLY, 0, &[0; 16]);
        assert!(rest(&socket).is_empty());
    });
    assert_eq!(memory.write(BASE, &[0; 8], PATIENCE).unwrap_err().kind(), ErrorKind::InvalidData);
    assert!(rest(&session.stream).is_empty());
    client.join().unwrap();
}

#[test]
fn an_access_ends_when_the_client_leaves_the_session() {
    for is_write in [false, true] {
        let (memory, mut socket, session) = memory(4096);
        let client = thread::spawn(move || {
            socket.read_exact(&mut [0; 16]).unwrap();
            drop(session);
            socket
        });
        let result =
            if is_write { memory.write(BASE, &[7; 64], PATIENCE) } else { memory.read(BASE, &mut [0; 64], PATIENCE) };
        // It does not wait for nothing; the client has not left this socket.
        assert_eq!(result.unwrap_err().kind(), ErrorKind::ConnectionReset);
        if is_write {
            assert!(rest(&client.join().unwrap()).is_empty());
        }
        assert_eq!(memory.write(BASE, &[0; 8], PATIENCE).unwrap_err().kind(), ErrorKind::NotConnected);
    }
}

/// Three threads read. The first is answered half the limit after the others have come. One of these is sent next, and
/// answered only after the other has given up. Returns whether it was answered: after one slow answer the server must
/// wait for the next for the whole limit again.
fn one_is_answered_and_one_is_late(limit: Duration) -> bool {
    let (memory, mut socket, session) = memory(4096);
    let (asked, is_asked) = mpsc::channel();
    let (late, is_late) = mpsc::channel();
    let client = thread::spawn(move || {
        let first = take(&mut socket).unwrap();
        asked.send(()).unwrap();
        thread::sleep(limit / 2);
        answer(&mut socket, &first, REPLY, 0, &[echo(&first), vec![7; 8]].concat());
        // On a machine that is too busy for the limit, both are too late already.
        let Some(second) = take(&mut socket) else { return };
        is_late.recv().unwrap();
        answer(&mut socket, &second, REPLY, 0, &[echo(&second), vec![7; 8]].concat());
    });
    let read = |memory: ClientMemory, late: mpsc::Sender<()>, limit| {
        thread::spawn(move || {
            let error = memory.read(BASE, &mut [0; 8], limit).err().map(|error| error.kind());
            if error.is_some() {
                // The client may be gone.
                let _ = late.send(());
            }
            error
        })
    };
    let first = read(memory.clone(), late.clone(), PATIENCE);
    is_asked.recv().unwrap();
    let others = [read(memory.clone(), late.clone(), limit), read(memory.clone(), late, limit)];
    assert_eq!(first.join().unwrap(), None);
    let ends = others.map(|thread| thread.join().unwrap());
    drop(memory);
    // Nobody holds the client's end of the socket any more.
    drop(session);
    client.join().unwrap();
    ends.contains(&None) && ends.contains(&Some(ErrorKind::TimedOut))
}

#[test]
fn an_access_waits_for_others_no_longer_than_for_the_client() {
    // A busy machine needs longer limits.
    let mut limits = (0..8).map(|power| Duration::from_millis(250) * 2_u32.pow(power));
    assert!(limits.any(one_is_answered_and_one_is_late));
}

//! Headers, sizes, descriptors, and the commands that have no file of their own.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::process::Command;

use nix::sys::resource::{Resource, setrlimit};

use crate::vfio_user::memo::{SIZE, Session};
use viommu::vfio_user::{MAX_DATA, MAX_MESSAGE};
use viommu_testkit::vfio::*;

/// Commands whose payload is a structure, and its size in bytes.
const FIXED: [(u16, usize); 10] = [
    (command::DMA_MAP, 32),
    (command::DMA_UNMAP, 24),
    (command::GET_INFO, 16),
    (command::GET_REGION_INFO, 32),
    (command::GET_REGION_IO_FDS, 16),
    (command::GET_IRQ_INFO, 16),
    (command::SET_IRQS, 20),
    (command::REGION_READ, 16),
    (command::REGION_WRITE, 16),
    (command::DEVICE_FEATURE, 8),
];

/// Checks that the next message is understood.
fn assert_in_step(client: &mut RawClient) {
    assert_eq!(client.region_read(0, 0, 4).unwrap().len(), 4);
}

#[test]
fn a_payload_that_is_too_short_is_refused_and_the_next_message_is_understood() {
    let (session, mut client) = Session::start();
    for (command, len) in FIXED {
        for short in [0, len / 2, len - 1] {
            assert_eq!(client.call(command, &vec![0; short], &[]), Err(libc::EINVAL), "{command} with {short}");
            assert_in_step(&mut client);
        }
    }
    let memo = session.end(client);
    assert!(memo.calls.iter().all(|call| call == "read 0 0x0 + 4"), "{:?}", memo.calls);
}

#[test]
fn a_payload_that_is_longer_is_read_to_its_end() {
    let (session, mut client) = Session::start();
    // As SPDK sends it: with room for capabilities.
    let mut request = words(&[4064, 0, 0, 0]);
    request.resize(4064, 0xff);
    let info = client.call(command::GET_REGION_INFO, &request, &[]).unwrap();
    assert_eq!(info, [words(&[32, 3, 0, 0]), SIZE.to_le_bytes().to_vec(), vec![0; 8]].concat());
    assert_in_step(&mut client);
    for (command, request) in [
        (command::GET_INFO, words(&[16, 0, 0, 0])),
        (command::GET_IRQ_INFO, words(&[16, 0, 1, 0])),
        (command::DMA_UNMAP, dma_unmap(0, 0, 0x1000)),
        (command::REGION_READ, access(0, 0, 4)),
        (command::RESET, Vec::new()),
    ] {
        let exact = client.call(command, &request, &[]).unwrap();
        assert_eq!(client.call(command, &[request, vec![0xff; 999]].concat(), &[]).unwrap(), exact, "{command}");
        assert_in_step(&mut client);
    }
    session.end(client);
}

#[test]
fn malformed_commands_are_refused() {
    let (session, mut client) = Session::start();
    for size in [0, 1, 15] {
        let id = client.send_sized(command::SET_IRQS, 0, size, &[], &[]);
        assert_eq!(client.take(command::SET_IRQS, id), Err(libc::EINVAL), "a size of {size}");
    }
    for flags in [REPLY, 2, 0xf, REPLY | ERROR] {
        let id = client.send(command::REGION_READ, flags, &access(0, 0, 4), &[]);
        assert_eq!(client.take(command::REGION_READ, id), Err(libc::EINVAL), "flags of {flags:#x}");
    }
    for (command, errno) in [
        (0, libc::EINVAL),
        (19, libc::EINVAL),
        (999, libc::EINVAL),
        (0xffff, libc::EINVAL),
        (command::DMA_READ, libc::EINVAL),
        (command::DMA_WRITE, libc::EINVAL),
        (command::DIRTY_PAGES, libc::EOPNOTSUPP),
        (command::MIG_DATA_READ, libc::EOPNOTSUPP),
        (command::MIG_DATA_WRITE, libc::EOPNOTSUPP),
    ] {
        assert_eq!(client.call(command, &[0; 16], &[]), Err(errno), "{command}");
        assert_in_step(&mut client);
    }
    // VFIO_DEVICE_FEATURE of a device without a feature: migration, its state, logging; probed, read and set.
    for feature in [1, 2, 6, 7, 8, 0xffff] {
        for operation in [1 << 16, 1 << 17, 1 << 18, 5 << 16] {
            let request = words(&[64, operation | feature, 0, 0]);
            assert_eq!(client.call(command::DEVICE_FEATURE, &request, &[]), Err(libc::ENOTTY), "{feature}");
        }
    }
    assert_in_step(&mut client);
    session.end(client);
}

#[test]
fn a_message_that_is_too_long_is_refused_before_it_comes_and_skipped() {
    let (session, mut client) = Session::start();
    let data = vec![0; MAX_MESSAGE - 16 + 1];
    let size = 16 + data.len() as u32;
    let id = client.send_sized(command::REGION_WRITE, 0, size, &[], &[]);
    assert_eq!(client.take(command::REGION_WRITE, id), Err(libc::EINVAL));
    client.stream.write_all(&data).unwrap();
    assert_in_step(&mut client);
    // The longest possible message.
    client.region_write(0, 0, &data[..MAX_DATA]).unwrap();
    let memo = session.end(client);
    assert_eq!(memo.calls, ["read 0 0x0 + 4".to_owned(), format!("write 0 0x0 + {MAX_DATA}")]);
}

#[test]
fn nothing_is_allocated_because_a_message_says_so() {
    let exe = std::env::current_exe().unwrap();
    let test = "vfio_user::messages::announces_gigabytes_where_they_cannot_be_had";
    let output = Command::new(exe).args(["--exact", test, "--ignored"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{output:?}");
}

#[test]
#[ignore = "limits its process: for nothing_is_allocated_because_a_message_says_so"]
fn announces_gigabytes_where_they_cannot_be_had() {
    setrlimit(Resource::RLIMIT_AS, 1 << 30, 1 << 30).unwrap();
    for command in [command::REGION_READ, command::REGION_WRITE] {
        let (session, mut client) = Session::start();
        assert_eq!(client.call(command, &access(0, 0, u32::MAX), &[]), Err(libc::EINVAL));
        assert_in_step(&mut client);
        session.end(client);
    }
    for command in 0..20 {
        let (session, mut client) = Session::start();
        let id = client.send_sized(command, 0, u32::MAX, &[0; 64], &[]);
        assert_eq!(client.take(command, id), Err(libc::EINVAL));
        drop(client);
        assert_eq!(session.join().1.unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }
}

#[test]
fn no_answer_comes_to_a_command_that_wants_none() {
    let (session, mut client) = Session::start();
    client.send(command::REGION_WRITE, NO_REPLY, &[access(0, 0, 4), vec![1, 2, 3, 4]].concat(), &[]);
    client.send(command::REGION_WRITE, NO_REPLY, &[access(9, 0, 4), vec![0; 4]].concat(), &[]);
    client.send(command::GET_INFO, NO_REPLY, &words(&[16, 0, 0, 0]), &[]);
    client.send(command::SET_IRQS, NO_REPLY, &[], &[]);
    client.send(999, NO_REPLY, &[0; 99], &[]);
    client.send(command::RESET, NO_REPLY, &[], &[]);
    // Earlier commands are done.
    assert_eq!(client.region_read(0, 0, 4).unwrap(), [1, 2, 3, 4]);
    let memo = session.end(client);
    assert_eq!(memo.calls, ["write 0 0x0 + 4", "reset", "read 0 0x0 + 4"]);
}

#[test]
fn messages_may_come_in_one_piece_or_byte_by_byte() {
    let (session, mut client) = Session::start();
    let ids: Vec<u16> = (0..100).map(|_| client.send(command::GET_INFO, 0, &words(&[16, 0, 0, 0]), &[])).collect();
    let answers: Vec<u16> = ids.iter().map(|_| client.reply().id).collect();
    assert_eq!(answers, ids, "in their order");
    let message = [&[7, 0, 4, 0][..], &words(&[32, 0, 0]), &words(&[16, 0, 0, 0])].concat();
    for byte in &message {
        client.stream.write_all(&[*byte]).unwrap();
    }
    assert_eq!(client.take(command::GET_INFO, 7).unwrap(), words(&[16, 3, 2, 2]));
    session.end(client);
}

#[test]
fn a_stream_that_ends_inside_of_a_message_is_an_error() {
    for cut in [1, 15, 16, 17, 31] {
        let (session, mut client) = Session::start();
        let message = [&[7, 0, 4, 0][..], &words(&[32, 0, 0]), &words(&[16, 0, 0, 0])].concat();
        client.stream.write_all(&message[..cut]).unwrap();
        drop(client);
        assert_eq!(session.join().1.unwrap_err().kind(), ErrorKind::UnexpectedEof, "after {cut} bytes");
    }
}

/// Two connected sockets: when the first reads the end, all copies of the second are closed.
fn watched() -> (UnixStream, UnixStream) {
    UnixStream::pair().unwrap()
}

#[test]
fn descriptors_that_no_command_wants_are_closed() {
    let (session, mut client) = Session::start();
    let (mut watch, sent) = watched();
    let fd = sent.as_raw_fd();
    let calls: [(u16, Vec<u8>, bool); 6] = [
        // As SPDK does.
        (command::DMA_UNMAP, dma_unmap(0, 0x1000, 0x1000), true),
        (command::REGION_READ, access(0, 0, 4), true),
        (command::GET_INFO, words(&[16, 0, 0, 0]), true),
        (command::VERSION, vec![0; 3], false),
        (999, Vec::new(), false),
        (command::SET_IRQS, set_irqs(0, 1 << 1 | 1 << 5, 0, 2), false),
    ];
    client.version(0, "{}");
    for (command, payload, is_good) in calls {
        assert_eq!(client.call(command, &payload, &[fd, fd]).is_ok(), is_good, "{command}");
    }
    // The first of these is kept as long as the device wants it.
    client.dma_map(READ | WRITE, 0, 0x1000, 0x1000, &[fd; 16]).unwrap();
    drop(sent);
    let memo = session.end(client);
    assert_eq!(memo.maps.lock().unwrap().len(), 1);
    watch.set_nonblocking(true).unwrap();
    assert_eq!(watch.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    drop(memo);
    assert_eq!(watch.read(&mut [0]).unwrap(), 0);
}

#[test]
fn too_many_descriptors_are_refused_and_closed() {
    let (session, mut client) = Session::start();
    let (mut watch, sent) = watched();
    let fds: Vec<RawFd> = vec![sent.as_raw_fd(); 17];
    assert_eq!(client.dma_map(READ | WRITE, 0, 0x1000, 0x1000, &fds), Err(libc::EINVAL));
    assert_in_step(&mut client);
    drop(sent);
    assert_eq!(watch.read(&mut [0]).unwrap(), 0);
    assert!(session.end(client).maps.lock().unwrap().is_empty());
}

#[test]
fn a_region_is_accessed_inside_of_its_bounds() {
    let (session, mut client) = Session::start();
    client.region_write(0, 2, &[5, 6, 7]).unwrap();
    assert_eq!(client.region_read(0, 0, 8).unwrap(), [0, 0, 5, 6, 7, 0, 0, 0]);
    assert!(client.region_read(0, SIZE, 0).unwrap().is_empty());
    client.region_write(0, SIZE, &[]).unwrap();
    for (region, offset, count) in [
        (0, SIZE - 3, 4),
        (0, SIZE, 1),
        (0, u64::MAX - 3, 8),
        (0, u64::MAX, 1),
        (1, 0, 1),
        (2, 0, 4),
        (u32::MAX, 0, 4),
        (0, 0, MAX_DATA as u32 + 1),
    ] {
        assert_eq!(client.region_read(region, offset, count), Err(libc::EINVAL), "{region} {offset:#x} {count}");
        if count < 99 {
            assert_eq!(client.region_write(region, offset, &vec![1; count as usize]), Err(libc::EINVAL));
        }
    }
    for data in [0, 3, 5, 400] {
        let request = [access(0, 0, 4), vec![9; data]].concat();
        assert_eq!(client.call(command::REGION_WRITE, &request, &[]), Err(libc::EINVAL), "{data} bytes for 4");
    }
    let memo = session.end(client);
    assert_eq!(memo.calls, ["write 0 0x2 + 3", "read 0 0x0 + 8"]);
}

#[test]
fn several_writes_in_a_message_are_done_in_their_order() {
    let one = |region, offset, data: &[u8]| {
        let mut bytes = [access(region, offset, data.len() as u32), data.to_vec()].concat();
        bytes.resize(24, 0);
        bytes
    };
    let many = |count: u64, writes: &[Vec<u8>]| [count.to_le_bytes().to_vec(), writes.concat()].concat();
    let (session, mut client) = Session::start();
    let mut call = |payload: Vec<u8>| client.call(command::REGION_WRITE_MULTI, &payload, &[]);
    let writes = [one(0, 0, &[1; 8]), one(0, 2, &[2; 4]), one(0, 3, &[3])];
    assert_eq!(call(many(3, &writes)).unwrap(), 3_u64.to_le_bytes());
    assert_eq!(call(many(2, &writes)).unwrap(), 2_u64.to_le_bytes(), "what is behind them does not count");
    assert_eq!(call(many(0, &[])).unwrap(), 0_u64.to_le_bytes());
    // A refused write ends the message.
    assert_eq!(call(many(3, &[one(0, 0, &[4]), one(7, 0, &[5]), one(0, 1, &[6])])).unwrap(), 1_u64.to_le_bytes());
    assert_eq!(call(many(1, &[one(7, 0, &[5])])), Err(libc::EINVAL));
    let mut nine = one(0, 0, &[1; 8]);
    nine[12] = 9;
    assert_eq!(call(many(1, &[nine])), Err(libc::EINVAL));
    for count in [4, u64::MAX, u64::MAX / 24 + 1] {
        assert_eq!(call(many(count, &writes)), Err(libc::EINVAL), "{count}");
    }
    assert_eq!(call(vec![0; 7]), Err(libc::EINVAL));
    assert_eq!(client.region_read(0, 0, 8).unwrap(), [4, 1, 2, 2, 2, 2, 1, 1]);
    session.end(client);
}

#[test]
fn regions_and_interrupts_are_described() {
    let (session, mut client) = Session::start();
    assert_eq!(client.call(command::GET_INFO, &words(&[32, 0, 0, 0]), &[]).unwrap(), words(&[16, 3, 2, 2]));
    assert_eq!(client.call(command::GET_INFO, &words(&[8, 0, 0, 0]), &[]), Err(libc::EINVAL));
    let mut region = |argsz, index| {
        client.call(command::GET_REGION_INFO, &[words(&[argsz, 0, index, 0]), vec![0; 16]].concat(), &[])
    };
    assert_eq!(region(32, 1).unwrap(), [words(&[32, 0, 1, 0]), vec![0; 16]].concat());
    assert_eq!(region(31, 0), Err(libc::EINVAL));
    assert_eq!(region(32, 2), Err(libc::EINVAL));
    let mut irq = |argsz, index| client.call(command::GET_IRQ_INFO, &words(&[argsz, 0, index, 0]), &[]);
    assert_eq!(irq(16, 0).unwrap(), words(&[16, 0b11, 0, 4]));
    assert_eq!(irq(99, 1).unwrap(), words(&[16, 0b1, 1, 1]));
    assert_eq!(irq(15, 0), Err(libc::EINVAL));
    assert_eq!(irq(16, 2), Err(libc::EINVAL));
    let mut fds = |request: [u32; 4]| client.call(command::GET_REGION_IO_FDS, &words(&request), &[]);
    assert_eq!(fds([4096, 0, 0, 0]).unwrap(), words(&[16, 0, 0, 0]), "none has any");
    for wrong in [[15, 0, 0, 0], [16, 1, 0, 0], [16, 0, 1, 0], [16, 0, 2, 0], [16, 0, 0, 1]] {
        assert_eq!(fds(wrong), Err(libc::EINVAL), "{wrong:?}");
    }
    session.end(client);
}

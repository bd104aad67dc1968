//! DMA_MAP and DMA_UNMAP, with a PCI function that accesses the mapped memory.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::thread;

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::vfio_user::memo::Session;
use viommu::iommu::Request;
use viommu::memory::REGIONS_MAX;
use viommu_testkit::function::Served;
use viommu_testkit::huge::HugePages;
use viommu_testkit::memfd;
use viommu_testkit::toy::*;
use viommu_testkit::vfio::*;
use viommu_trace::Tracer;
use viommu_wire::virtio_iommu::*;
use zerocopy::IntoBytes;

const PAGE: u64 = 4096;
const CONFIG: u32 = 7;

pub fn served() -> Served {
    Served::new(0x20, Tracer::default(), Toy::make, || {})
}

/// A client whose function is a bus master. It has not sent VERSION.
fn client(served: &Served) -> RawClient {
    let mut client = RawClient::connect(&served.path());
    client.region_write(CONFIG, 4, &[6, 0]).unwrap();
    client
}

fn word(file: &File, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, offset).unwrap();
    u64::from_le_bytes(bytes)
}

#[test]
fn a_region_allows_what_its_flags_say() {
    let served = served();
    let mut client = client(&served);
    let ram = memfd(4 * PAGE);
    ram.write_all_at(&42_u64.to_le_bytes(), 0).unwrap();
    for how in [0, MMAP, FILE_IO] {
        for (flags, can_read, can_write) in
            [(READ | WRITE, true, true), (READ, true, false), (WRITE, false, true), (0, false, false)]
        {
            client.dma_map(how | flags, 0, 0x8000, PAGE, &[ram.as_raw_fd()]).unwrap();
            assert_eq!(reads(&mut client, 0x8000), if can_read { 42 } else { u64::MAX }, "{how:#x} {flags}");
            assert_eq!(writes(&mut client, 0x8008, 43), can_write, "{how:#x} {flags}");
            assert_eq!(word(&ram, 8), if can_write { 43 } else { 0 });
            ram.write_all_at(&[0; 8], 8).unwrap();
            client.dma_unmap(0, 0x8000, PAGE).unwrap();
        }
    }
}

#[test]
fn a_file_for_reads_and_writes_need_not_support_mmap() {
    let served = served();
    let mut client = client(&served);
    // The memory of this process: a file without a length, which mmap(2) refuses.
    let mut ram = vec![0_u8; PAGE as usize];
    ram[..8].copy_from_slice(&42_u64.to_le_bytes());
    let this = File::options().read(true).write(true).open("/proc/self/mem").unwrap();
    let at = ram.as_mut_ptr().expose_provenance() as u64;
    assert!(client.dma_map(READ | WRITE | MMAP, at, 0x8000, PAGE, &[this.as_raw_fd()]).is_err());
    client.dma_map(READ | WRITE | FILE_IO, at, 0x8000, PAGE, &[this.as_raw_fd()]).unwrap();
    assert_eq!(reads(&mut client, 0x8000), 42);
    // An access where the file has nothing fails, as in memory that cannot be had.
    let file = memfd(PAGE);
    client.dma_map(READ | WRITE | FILE_IO, 0, 0x10000, 2 * PAGE, &[file.as_raw_fd()]).unwrap();
    assert!(writes(&mut client, 0x10000 + PAGE - 8, 5));
    assert_eq!(reads(&mut client, 0x10000 + PAGE), u64::MAX);
    // An access across the border between both kinds.
    client.dma_map(READ | WRITE, 0, 0x8000 - PAGE, PAGE, &[file.as_raw_fd()]).unwrap();
    assert_eq!(reads(&mut client, 0x8000 - 4), 42 << 32);
    drop(ram);
}

#[test]
fn odd_regions_are_refused_with_an_error_number_that_says_why() {
    let served = served();
    let mut client = client(&served);
    let ram = memfd(4 * PAGE);
    let fd = [ram.as_raw_fd()];
    let both = READ | WRITE;
    client.dma_map(both, 0, 0x8000, 2 * PAGE, &fd).unwrap();
    let (pipe, _end) = std::io::pipe().unwrap();
    let other = memfd(PAGE);
    let read_only = File::open(format!("/proc/self/fd/{}", other.as_raw_fd())).unwrap();
    let wrong: [(u32, [u64; 3], &[i32], i32); 14] = [
        (both, [0, 0x8000, 2 * PAGE], &fd, libc::EEXIST),
        (both, [0, 0x9000, PAGE], &[], libc::EEXIST),
        (both, [0, 0, u64::MAX], &[], libc::EEXIST),
        (both, [0, 0x2_0000, 0], &fd, libc::EINVAL),
        (both, [0, u64::MAX - PAGE + 2, PAGE], &[], libc::EINVAL),
        (both, [0, 0x2_0000, 5 * PAGE], &fd, libc::EINVAL),
        (both, [4 * PAGE, 0x2_0000, PAGE], &fd, libc::EINVAL),
        (both, [u64::MAX, 0x2_0000, PAGE], &fd, libc::EINVAL),
        (both | 1 << 4, [0, 0x2_0000, PAGE], &fd, libc::EINVAL),
        (both | MMAP | FILE_IO, [0, 0x2_0000, PAGE], &fd, libc::EINVAL),
        (both | MMAP, [0, 0x2_0000, PAGE], &[], libc::EINVAL),
        (both | FILE_IO, [0, 0x2_0000, PAGE], &[], libc::EINVAL),
        (both | FILE_IO, [0, 0x2_0000, PAGE], &[pipe.as_raw_fd()], libc::EINVAL),
        (both, [0, 0x2_0000, PAGE], &[read_only.as_raw_fd()], libc::EACCES),
    ];
    for (flags, [offset, address, size], fds, errno) in wrong {
        let result = client.dma_map(flags, offset, address, size, fds);
        assert_eq!(result, Err(errno), "{flags:#x} {offset:#x} {address:#x} {size:#x} {fds:?}");
    }
    let mut argsz = dma_map(both, 0, 0x2_0000, PAGE);
    argsz[0] = 31;
    assert_eq!(client.call(command::DMA_MAP, &argsz, &fd), Err(libc::EINVAL));
    client.dma_unmap(0, 0x8000, 2 * PAGE).unwrap();
    client.dma_map(both, 0, 0x2_0000, PAGE, &fd).unwrap();
}

#[test]
fn only_mapped_regions_can_be_unmapped() {
    let served = served();
    let mut client = client(&served);
    let ram = memfd(4 * PAGE);
    let map = |client: &mut RawClient| {
        for number in 0..4 {
            client.dma_map(READ | WRITE, number * PAGE, 0x8000 + number * PAGE, PAGE, &[ram.as_raw_fd()]).unwrap();
        }
    };
    map(&mut client);
    const DIRTY: u32 = 1 << 0;
    const ALL: u32 = 1 << 1;
    for (flags, address, size, errno) in [
        (0, 0x4000, PAGE, libc::ENOENT),
        (0, 0x8000, PAGE / 2, libc::EINVAL),
        (0, 0x8000 - PAGE, PAGE + 1, libc::EINVAL),
        (0, 0x8000, 0, libc::EINVAL),
        (0, u64::MAX, 2, libc::EINVAL),
        (DIRTY, 0x8000, PAGE, libc::EINVAL),
        (ALL, 0x8000, PAGE, libc::EINVAL),
        (ALL | DIRTY, 0, 0, libc::EINVAL),
        (1 << 2, 0x8000, PAGE, libc::EINVAL),
    ] {
        assert_eq!(client.dma_unmap(flags, address, size), Err(errno), "{flags:#x} {address:#x} {size:#x}");
    }
    for argsz in [23, (1 << 20) + 1] {
        let mut request = dma_unmap(0, 0x8000, PAGE);
        request[..4].copy_from_slice(&u32::to_le_bytes(argsz));
        assert_eq!(client.call(command::DMA_UNMAP, &request, &[]), Err(libc::EINVAL), "argsz {argsz}");
    }
    assert_eq!(reads(&mut client, 0x8000 + 4 * PAGE - 8), 0, "all is as it was");
    // Several at once, as QEMU does when virtio-mem's memory is unplugged.
    client.dma_unmap(0, 0, 0x8000 + 2 * PAGE).unwrap();
    assert_eq!(client.dma_unmap(0, 0x8000, PAGE), Err(libc::ENOENT));
    assert_eq!(reads(&mut client, 0x8000), u64::MAX);
    assert_eq!(reads(&mut client, 0x8000 + 2 * PAGE), 0);
    client.dma_unmap(ALL, 0, 0).unwrap();
    assert_eq!(reads(&mut client, 0x8000 + 2 * PAGE), u64::MAX);
    map(&mut client);
    assert_eq!(reads(&mut client, 0x8000), 0);
}

#[test]
fn there_are_as_many_regions_as_the_version_says() {
    let served = served();
    let mut client = RawClient::connect(&served.path());
    let (said, _) = client.version(0, "{}");
    assert_eq!(said["capabilities"]["max_dma_maps"], REGIONS_MAX);
    for number in 0..REGIONS_MAX as u64 {
        client.dma_map(READ, 0, number * 2 * PAGE, PAGE, &[]).unwrap();
    }
    assert_eq!(client.dma_map(READ, 0, 1 << 60, PAGE, &[]), Err(libc::ENOSPC));
    client.dma_unmap(0, 0, PAGE).unwrap();
    client.dma_map(READ, 0, 1 << 60, PAGE, &[]).unwrap();
}

#[test]
fn a_region_of_huge_pages_may_begin_anywhere_in_its_file() {
    let Some(_pages) = HugePages::reserve(2 << 10, 2) else { return };
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    let ram = File::from(memfd_create("huge", flags).unwrap());
    ram.set_len(4 << 20).unwrap();
    let served = served();
    let mut client = client(&served);
    // In the pieces that firmware's shadowing makes of it.
    for (offset, size) in [(0, 0xa_0000), (0xc_0000, 0x4000), (0xc_4000, (4 << 20) - 0xc_4000)] {
        client.dma_map(READ | WRITE, offset, offset, size, &[ram.as_raw_fd()]).unwrap();
    }
    // At the borders of both pages, and on both sides of a region's end inside a page.
    for address in [0, 0x9_fff8, 0xc_0000, 0xc_3ff8, 0xc_4000, (2 << 20) - 8, 2 << 20, (4 << 20) - 8] {
        assert!(writes(&mut client, address, address + 42), "{address:#x}");
        assert_eq!(reads(&mut client, address), address + 42);
    }
    let mut across = [0; 16];
    ram.read_exact_at(&mut across, (2 << 20) - 8).unwrap();
    assert_eq!(across[..8], ((2 << 20) - 8 + 42_u64).to_le_bytes());
    assert_eq!(across[8..], ((2 << 20) + 42_u64).to_le_bytes());
    // If a page is gone, its access fails and nothing else.
    ram.set_len(2 << 20).unwrap();
    assert_eq!(reads(&mut client, 2 << 20), u64::MAX);
    assert!(!writes(&mut client, 3 << 20, 5) && writes(&mut client, 0xc_4000, 5));
    for (offset, size) in [(0, 0xa_0000), (0xc_0000, 0x4000), (0xc_4000, (4 << 20) - 0xc_4000)] {
        client.dma_unmap(0, offset, size).unwrap();
    }
}

/// Answers DMA_READ and DMA_WRITE of eight bytes and fewer from zeros, and returns the commands and addresses.
fn answer_all(mut socket: UnixStream) -> Vec<(u16, u64)> {
    let mut asked = Vec::new();
    let mut head = [0; 32];
    while socket.read_exact(&mut head).is_ok() {
        let command = u16::from_le_bytes([head[2], head[3]]);
        let count = head[24];
        asked.push((command, u64::from_le_bytes(head[16..24].try_into().unwrap())));
        let data = vec![0x11; count.into()];
        if command == command::DMA_WRITE {
            socket.read_exact(&mut data.clone()).unwrap();
        }
        let data = if command == command::DMA_READ { data } else { Vec::new() };
        let header = [&head[..4], &words(&[32 + data.len() as u32, REPLY, 0])].concat();
        socket.write_all(&[&header, &head[16..], &data].concat()).unwrap();
    }
    asked
}

#[test]
fn memory_without_a_descriptor_is_reached_by_messages() {
    let served = served();
    let mut client = RawClient::connect(&served.path());
    let (_, fd) = client.version(1, TWIN);
    let answers = thread::spawn(|| answer_all(UnixStream::from(fd.unwrap())));
    client.region_write(CONFIG, 4, &[6, 0]).unwrap();
    let ram = memfd(PAGE);
    client.dma_map(READ | WRITE, 0, 0x8000, PAGE, &[]).unwrap();
    client.dma_map(READ, 0, 0x9000, PAGE, &[]).unwrap();
    client.dma_map(READ | WRITE, 0, 0xa000, PAGE, &[ram.as_raw_fd()]).unwrap();
    // The session's thread itself waits for these answers, and the client waits for that thread.
    assert_eq!(reads(&mut client, 0x8010), 0x1111_1111_1111_1111);
    assert!(writes(&mut client, 0x8018, 5));
    assert_eq!(reads(&mut client, 0x9000), 0x1111_1111_1111_1111);
    assert!(!writes(&mut client, 0x9000, 5), "it is read-only");
    assert_eq!(reads(&mut client, 0x9ffc), 0x1111_1111, "half of it is elsewhere");
    client.dma_unmap(0, 0x8000, 2 * PAGE).unwrap();
    assert_eq!(reads(&mut client, 0x8000), u64::MAX);
    drop(client);
    drop(served);
    let asked = answers.join().unwrap();
    let (read, write) = (command::DMA_READ, command::DMA_WRITE);
    assert_eq!(asked, [(read, 0x8010), (write, 0x8018), (read, 0x9000), (read, 0x9ffc)]);
}

#[test]
fn a_write_by_message_that_an_unmap_waited_for_does_not_come_later() {
    let served = served();
    served.iommu.set_features(u64::MAX);
    let request = |request: &[u8]| {
        let bytes = [request, &[0; 4]].concat();
        let request = Request::parse(&bytes, served.iommu.features()).unwrap();
        assert_eq!(served.iommu.execute(&request, &mut []).status, Status::Ok);
        served.iommu.synchronize();
    };
    let head = |kind| Head { kind, ..Head::default() };
    let (domain, last) = (1.into(), (PAGE - 1).into());
    let attach = Attach { head: head(request_type::ATTACH), domain, endpoint: 0x20.into(), ..Attach::default() };
    request(attach.as_bytes());
    let flags = (MapFlags::READ | MapFlags::WRITE).bits().into();
    let (virt_start, virt_end, phys_start) = (0.into(), last, 0x8000.into());
    request(Map { head: head(request_type::MAP), domain, virt_start, virt_end, phys_start, flags }.as_bytes());

    let mut client = RawClient::connect(&served.path());
    let (_, fd) = client.version(1, TWIN);
    let mut socket = UnixStream::from(fd.unwrap());
    client.region_write(CONFIG, 4, &[6, 0]).unwrap();
    client.dma_map(READ | WRITE, 0, 0x8000, PAGE, &[]).unwrap();
    write_register(&mut client, ADDRESS, 0x10);
    client.send(command::REGION_WRITE, 0, &[access(0, DO_WRITE, 8), vec![0; 8]].concat(), &[]);
    // The write waits for the client, which has not read it yet.
    let mut header = [0; 16];
    socket.read_exact(&mut header).unwrap();
    assert_eq!(u16::from_le_bytes([header[2], header[3]]), command::DMA_WRITE);
    let (head, reserved) = (head(request_type::UNMAP), [0; 4]);
    request(Unmap { head, domain, virt_start, virt_end, reserved }.as_bytes());
    let mut rest = Vec::new();
    socket.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty(), "the client can still do it: {rest:x?}");
}

#[test]
fn memory_without_a_descriptor_is_not_reached_without_a_socket_for_it() {
    let served = served();
    let mut client = client(&served);
    client.version(1, "{\"capabilities\":{\"max_data_xfer_size\":4096}}");
    client.dma_map(READ | WRITE, 0, 0x8000, PAGE, &[]).unwrap();
    // There is no message in between: this client would take it for an answer.
    assert_eq!(reads(&mut client, 0x8000), u64::MAX);
    assert!(!writes(&mut client, 0x8000, 5));
    client.dma_unmap(0, 0x8000, PAGE).unwrap();
}

#[test]
fn the_errors_of_a_device_reach_the_client() {
    let (session, mut client) = Session::start();
    assert_eq!(client.dma_map(READ, 0, 0x1000, 0, &[]), Err(libc::ERANGE));
    session.end(client);
}

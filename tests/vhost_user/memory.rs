//! Guest memory that changes, is cut short, does not arrive or comes in many pieces, over both kinds of socket.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use viommu::dma::{Dma, DmaContext, DmaError};
use viommu::iommu::{EndpointSettings, Iommu, Settings};
use viommu::memory::{Memory, MemoryMap, REGIONS_MAX, RegionError, sigbus};
use viommu_testkit::frontend::*;
use viommu_testkit::process::descriptors;
use viommu_testkit::{PATIENCE, wait_until};
use viommu_testkit::{StopOnDrop, memfd};
use viommu_trace::Tracer;

const PAGE: u64 = 4096;

/// An endpoint's access, in bypass, to memory that is described by a [`MemoryMap`].
fn dma_context(memory: &Memory) -> DmaContext {
    let endpoints = vec![EndpointSettings { id: EP, reserved: Vec::new() }];
    let iommu = Iommu::new(Settings { endpoints, ..Settings::default() }, Tracer::default());
    let dma = DmaContext::new(&iommu, EP, memory.clone(), Tracer::default());
    dma.set_bus_master(true);
    dma
}

fn map_file(map: &mut MemoryMap, gpa: u64, len: u64, file: &File) {
    map.map(gpa, len, true, Some((file.try_clone().unwrap(), 0))).unwrap();
}

fn reads(dma: &mut Dma, gpa: u64) -> bool {
    dma.read(gpa, &mut [0; 8]).is_ok()
}

#[test]
fn an_access_past_the_end_of_a_file_that_was_cut_short_fails() {
    let mut map = MemoryMap::new(Memory::default());
    let (cut, whole) = (memfd(64 * PAGE), memfd(PAGE));
    map_file(&mut map, 0, 64 * PAGE, &cut);
    map_file(&mut map, 1 << 20, PAGE, &whole);
    let mut dma = dma_context(map.memory()).open();
    assert!(dma.write(8 * PAGE - 4, &[7; 8]).is_ok());
    cut.set_len(4 * PAGE).unwrap();
    assert_eq!(dma.read(8 * PAGE, &mut [0; 8]), Err(DmaError::NoMemory { iova: 8 * PAGE, gpa: 8 * PAGE }));
    // The page that is there now is not the guest's: it can neither be read nor written. Other pages are as before.
    assert!(!reads(&mut dma, 8 * PAGE) && reads(&mut dma, 0));
    assert!(dma.write(8 * PAGE, &[1; 8]).is_err());
    assert!(dma.read(3 * PAGE, &mut [0; 6 * 4096]).is_err());
    let backing = memfd(8 * PAGE);
    let mut exchange = |gpa| dma.transfer_direct(&[(gpa, 4096)], viommu_trace::event::Access::Read, &backing, 0, 0);
    assert!(exchange(0) && !exchange(8 * PAGE) && !exchange(9 * PAGE));
    assert!(dma.write(1 << 20, &[1; 8]).is_ok());
    // With very many such pages, the whole file is given up.
    (4..64).for_each(|page| assert!(!reads(&mut dma, page * PAGE)));
    assert!(!reads(&mut dma, 0));
    // A client that maps the file again can use what is left of it.
    map.unmap(0, 64 * PAGE).unwrap();
    map_file(&mut map, 0, 4 * PAGE, &cut);
    assert!(dma.write(PAGE, &[1; 8]).is_ok());
}

#[test]
fn accesses_go_on_while_files_are_cut_short_and_regions_come_and_go() {
    let mut map = MemoryMap::new(Memory::default());
    let stop = AtomicBool::new(false);
    // Accesses that succeeded, and that failed.
    let counts = [AtomicU64::new(0), AtomicU64::new(0)];
    let whole = memfd(PAGE);
    map_file(&mut map, 1 << 30, PAGE, &whole);
    let dma = dma_context(map.memory());
    thread::scope(|scope| {
        for number in 0..3 {
            let (mut dma, stop, counts) = (dma.open(), &stop, &counts);
            scope.spawn(move || {
                let mut data = vec![number; 64 << 10];
                while !stop.load(Ordering::Relaxed) {
                    let done = if number == 0 { dma.read(0, &mut data) } else { dma.write(0, &data) };
                    counts[usize::from(done.is_err())].fetch_add(1, Ordering::Relaxed);
                    assert!(dma.write(1 << 30, &[1; 64]).is_ok(), "other memory is as it was");
                }
            });
        }
        let _end = StopOnDrop(&stop);
        let wait_for_another = |what: &str, count: &AtomicU64| {
            let before = count.load(Ordering::Relaxed);
            wait_until(PATIENCE, what, || count.load(Ordering::Relaxed) > before);
        };
        for _ in 0..300 {
            let file = memfd(16 * PAGE);
            map_file(&mut map, 0, 16 * PAGE, &file);
            wait_for_another("an access that succeeds", &counts[0]);
            file.set_len(PAGE).unwrap();
            wait_for_another("an access that fails", &counts[1]);
            map.unmap(0, 16 * PAGE).unwrap();
        }
    });
}

/// Runs one of the tests below, which end their process.
fn ending(test: &str) -> ExitStatus {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &format!("memory::{test}"), "--ignored"]).output().unwrap().status
}

#[test]
fn a_bus_error_outside_of_guest_memory_still_ends_the_process() {
    assert_eq!(ending("touches_what_is_no_guest_memory").signal(), Some(libc::SIGBUS));
    assert_eq!(ending("is_sent_a_bus_error").signal(), Some(libc::SIGBUS));
}

#[test]
#[ignore = "ends its process: for a_bus_error_outside_of_guest_memory_still_ends_the_process"]
fn touches_what_is_no_guest_memory() {
    let mut map = MemoryMap::new(Memory::default());
    map_file(&mut map, 0, PAGE, &memfd(PAGE));
    let file = memfd(PAGE);
    // SAFETY: a mapping of our own, at an address that the kernel chooses; the test is about touching it.
    unsafe {
        let len = NonZeroUsize::new(4096).unwrap();
        let at = mmap(None, len, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, &file, 0).unwrap();
        file.set_len(0).unwrap();
        at.cast::<u8>().read_volatile();
    }
}

#[test]
#[ignore = "ends its process: for a_bus_error_outside_of_guest_memory_still_ends_the_process"]
fn is_sent_a_bus_error() {
    let mut map = MemoryMap::new(Memory::default());
    map_file(&mut map, 0, PAGE, &memfd(PAGE));
    nix::sys::signal::raise(nix::sys::signal::Signal::SIGBUS).unwrap();
}

#[test]
fn a_table_longer_than_its_file_is_refused() {
    let device = Device::new();
    let small = memfd(PAGE);
    let mut driver = Driver::connect(&device.path);
    driver.negotiate(u64::MAX);
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: RAM,
        userspace_addr: USER_BASE,
        mmap_offset: 0,
        mmap_handle: small.as_raw_fd(),
    };
    assert!(driver.frontend.set_mem_table(&[region]).is_err());
    drop(driver);
    assert_eq!(Driver::new(&device).attach(1, EP), OK);
}

#[test]
fn queues_in_memory_that_is_gone_are_left_alone_until_there_is_new_memory() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    assert_eq!(driver.attach(1, EP), OK);
    driver.add(REQUESTS, &[Part::R(attach(2, EP, 0).bytes()), Part::W(4)]);
    driver.file.set_len(0).unwrap();
    // From here on the test itself must not touch the memory.
    driver.kick(REQUESTS);
    wait_until(PATIENCE, "the end of the queues", || device.control.stats().malformed >= 2);
    assert!(sigbus::any());
    drop(driver);
    let mut next = Driver::new(&device);
    assert_eq!(next.attach(1, EP), OK);
}

#[test]
fn memory_is_added_and_removed_region_by_region() {
    let device = Device::new();
    let mut driver = Driver::connect(&device.path);
    let slots = VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
    assert!(driver.frontend.get_protocol_features().unwrap().contains(slots));
    let wanted =
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK;
    driver.frontend.set_protocol_features(wanted | slots).unwrap();
    driver.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    driver.negotiate(u64::MAX);
    assert_eq!(driver.frontend.get_max_mem_slots().unwrap(), 509);
    let file = driver.file.try_clone().unwrap();
    let region = |at: u64, gpa: u64, len: u64| VhostUserMemoryRegionInfo {
        guest_phys_addr: gpa,
        memory_size: len,
        userspace_addr: USER_BASE + gpa,
        mmap_offset: at,
        mmap_handle: file.as_raw_fd(),
    };
    driver.frontend.add_mem_region(&region(0, 0, RAM)).unwrap();
    driver.start_queue(REQUESTS, 0);
    driver.start_queue(EVENTS, 0);
    assert_eq!(driver.attach(1, EP), OK);
    let more = |number: u64| region(number * PAGE, (1 << 40) + number * 2 * PAGE, PAGE);
    for number in 1..509 {
        driver.frontend.add_mem_region(&more(number)).unwrap();
    }
    assert_eq!(driver.detach(1, EP), OK);
    driver.frontend.remove_mem_region(&more(7)).unwrap();
    driver.frontend.add_mem_region(&more(7)).unwrap();
    assert_eq!(driver.attach(1, EP), OK);
    // One region too many ends this connection, and nothing else.
    assert!(driver.frontend.add_mem_region(&more(509)).is_err());
    drop(driver);
    assert_eq!(Driver::new(&device).attach(1, EP), OK);
}

#[test]
fn a_client_may_have_65_535_regions() {
    let mut map = MemoryMap::new(Memory::default());
    let file = memfd(PAGE * REGIONS_MAX as u64);
    let mut dma = dma_context(map.memory()).open();
    let before = descriptors();
    let begun = Instant::now();
    for number in 0..REGIONS_MAX as u64 {
        let place = Some((file.try_clone().unwrap(), number * PAGE));
        map.map(number * 2 * PAGE, PAGE, true, place).unwrap();
    }
    let added = begun.elapsed();
    assert!(descriptors() < before + 100, "a region keeps no descriptor");
    let one_more = map.map(1 << 60, PAGE, true, Some((file.try_clone().unwrap(), 0)));
    assert!(matches!(one_more, Err(RegionError::TooMany)));
    file.write_all_at(&7u64.to_le_bytes(), 40_000 * PAGE).unwrap();
    let mut data = [0; 8];
    dma.read(40_000 * 2 * PAGE, &mut data).unwrap();
    assert_eq!(u64::from_le_bytes(data), 7);
    assert!(!reads(&mut dma, 40_000 * 2 * PAGE + PAGE), "between two regions");
    let begun = Instant::now();
    let looks = 1_000_000_u64;
    let regions = map.memory().load();
    let found = (0..looks).filter(|look| regions.is_intact(look * 7919 % 65_535 * 2 * PAGE, 8)).count();
    let regions_read = (0..looks).filter(|look| regions.read(look * 7919 % 65_535 * 2 * PAGE, &mut [0; 8]).is_ok());
    let (read, looked) = (regions_read.count(), begun.elapsed());
    assert_eq!((found as u64, read as u64), (looks, looks));
    drop(regions);
    let begun = Instant::now();
    for number in 0..REGIONS_MAX as u64 {
        assert_eq!(map.unmap(number * 2 * PAGE, PAGE).unwrap().len(), 1);
    }
    println!("added in {added:?}, {looks} reads in {looked:?}, removed in {:?}", begun.elapsed());
}

/// A file whose pages arrive only when the test allows it, in a mapping of this process.
struct Held {
    fault: File,
    start: u64,
    len: u64,
}

#[repr(C)]
struct UffdApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdRange {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_ZEROPAGE: u64 = 0xc020_aa04;
const UFFD_USER_MODE_ONLY: i32 = 1;

impl Held {
    /// Holds back the pages of the mapping of `len` bytes of `file` from `offset` on.
    fn new(file: &File, offset: u64, len: u64) -> Held {
        use std::os::unix::fs::MetadataExt;
        let inode = file.metadata().unwrap().ino().to_string();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let range = |line: &str| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (start, end) = fields[0].split_once('-')?;
            let hex = |text: &str| u64::from_str_radix(text, 16).unwrap();
            let (start, end) = (hex(start), hex(end));
            (fields[4] == inode && hex(fields[2]) == offset && end - start == len).then_some(start)
        };
        let start = maps.lines().find_map(range).unwrap_or_else(|| panic!("no such mapping in {maps}"));
        // SAFETY: plain system calls; the structures are those of linux/userfaultfd.h and live during the calls.
        unsafe {
            let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | UFFD_USER_MODE_ONLY) as i32;
            assert!(fd >= 0, "userfaultfd: {}", io::Error::last_os_error());
            let fault = File::from_raw_fd(fd);
            let mut api = UffdApi { api: 0xaa, features: 0, ioctls: 0 };
            assert_eq!(libc::ioctl(fd, UFFDIO_API, &mut api), 0, "{}", io::Error::last_os_error());
            let mut register = UffdRange { start, len, mode: 1, ioctls: 0 };
            assert_eq!(libc::ioctl(fd, UFFDIO_REGISTER, &mut register), 0, "{}", io::Error::last_os_error());
            Held { fault, start, len }
        }
    }

    /// Waits until a thread waits for a page, and returns the page's place in the mapping.
    fn wait(&self) -> u64 {
        let mut message = [0; 32];
        assert_eq!(io::Read::read(&mut &self.fault, &mut message).unwrap(), 32);
        u64::from_le_bytes(message[16..24].try_into().unwrap()) - self.start
    }

    /// Lets the page at `offset` arrive, full of zeroes.
    fn release(&self, offset: u64) {
        assert!(offset < self.len);
        let mut page = UffdRange { start: self.start + offset / PAGE * PAGE, len: PAGE, mode: 0, ioctls: 0 };
        // SAFETY: as above.
        let code = unsafe { libc::ioctl(self.fault.as_raw_fd(), UFFDIO_ZEROPAGE, &mut page) };
        assert_eq!(code, 0, "{}", io::Error::last_os_error());
    }
}

#[test]
fn an_unmap_waits_for_as_long_as_a_page_takes_to_come() {
    let mut map = MemoryMap::new(Memory::default());
    let file = memfd(4 * PAGE);
    map_file(&mut map, 0, 4 * PAGE, &file);
    let mut dma = dma_context(map.memory()).open();
    let held = Held::new(&file, 0, 4 * PAGE);
    let removed = Arc::new(AtomicBool::new(false));
    thread::scope(|scope| {
        let read = scope.spawn(move || reads(&mut dma, PAGE));
        assert_eq!(held.wait(), PAGE);
        let done = removed.clone();
        let unmap = scope.spawn(move || {
            map.unmap(0, 4 * PAGE).unwrap();
            done.store(true, Ordering::SeqCst);
        });
        // It used to give up after five seconds.
        thread::sleep(Duration::from_millis(5500));
        assert!(!removed.load(Ordering::SeqCst), "answered while an access is under way");
        held.release(PAGE);
        assert!(read.join().unwrap());
        unmap.join().unwrap();
    });
}

#[test]
fn a_memory_table_waits_until_the_one_before_is_no_longer_used() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    let half = RAM / 2;
    let held = Held::new(&driver.file, half, half);
    // A request in a page that does not arrive.
    let page = half + 16 * PAGE;
    driver.set_descriptor(REQUESTS, 0, Descriptor { address: page, len: 20, flags: NEXT, next: 1 });
    let tail = driver.allocate(4);
    driver.set_descriptor(REQUESTS, 1, Descriptor { address: tail, len: 4, flags: DEVICE_WRITES, next: 0 });
    driver.make_available(REQUESTS, 0);
    driver.kick(REQUESTS);
    assert_eq!(held.wait(), page - half);
    let answered = Arc::new(AtomicBool::new(false));
    let done = answered.clone();
    let table = thread::spawn(move || {
        driver.set_memory();
        done.store(true, Ordering::SeqCst);
        driver
    });
    thread::sleep(Duration::from_millis(300));
    assert!(!answered.load(Ordering::SeqCst), "the worker may still write through the table before");
    held.release(page - half);
    let mut driver = table.join().unwrap();
    assert_eq!(driver.wait_used(REQUESTS).0, 0);
}

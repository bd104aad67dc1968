//! Images for which the file system has no more room.

use std::path::{Path, PathBuf};

use super::{end, serve_on};
use viommu_testkit::nvme::{Driver, PAGE, RAM, io, pattern};
use viommu_testkit::{folders, memfd};

const WRITE: u8 = 1;
const READ: u8 = 2;
const WRITE_ZEROES: u8 = 8;

/// Write Fault: the namespace is not thinly provisioned, so that its capacity cannot be exceeded.
const WRITE_FAULT: u16 = 0x280;

/// The length of each command's data: two pages.
const LEN: usize = 2 * PAGE as usize;

/// The offset from which on the image cannot be written.
const ROOM: u64 = 1 << 20;

/// Limits the length of the files that the process may write. A write beyond fails with EFBIG, as one on a full file
/// system fails with ENOSPC, and raises a signal.
fn limit_files(process: u32, bytes: u64) {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the limit is a local that lives through the call, and the old one is not asked for.
    let result =
        unsafe { libc::prlimit(process as libc::pid_t, libc::RLIMIT_FSIZE, &raw const limit, std::ptr::null_mut()) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn a_write_for_which_the_file_system_has_no_room_fails_alone() {
    folders().iter().map(PathBuf::as_path).for_each(without_room);
}

fn without_room(parent: &Path) {
    let folder = tempfile::tempdir_in(parent).unwrap();
    let nvme = ["--endpoint", "nvme,address=04.0,image=disk.img", "--create-images", "16M"];
    let (daemon, _) = serve_on("viommu.sock", folder.path(), &nvme);
    let client = vfio_user::Client::new(&folder.path().join("nvme0.sock")).unwrap();
    let mut driver = Driver::new(client, memfd(RAM), PAGE);
    driver.enable();
    driver.create_pair(1, 64, 64);
    limit_files(daemon.id(), ROOM);

    let data = pattern(LEN, 1);
    let (source, target) = (driver.pages(2), driver.pages(2));
    driver.write_ram(source, &data);
    let at = |bytes: u64| bytes / 512;
    let mut command = |opcode, bytes: u64, data: u64| {
        let status = driver.command(1, io(opcode, at(bytes), 16, [data, data + PAGE])).status;
        (status, driver.read_ram(target, LEN))
    };
    let mut refused = 0;
    assert_eq!(command(WRITE, 0, source).0, 0);
    for round in 0..20 {
        // The first begins where there is room.
        for (opcode, bytes) in [(WRITE, ROOM - PAGE), (WRITE, ROOM), (WRITE, 8 << 20), (WRITE_ZEROES, 8 << 20)] {
            assert_eq!(command(opcode, bytes, source).0, WRITE_FAULT, "command {opcode} at {bytes}, round {round}");
            refused += 1;
        }
        assert_eq!(command(READ, 0, target), (0, data.clone()));
        assert_eq!(command(READ, 8 << 20, target), (0, vec![0; LEN]));
        assert_eq!(command(WRITE, ROOM / 2, source).0, 0);
    }
    // There is room again, and no reset is needed.
    limit_files(daemon.id(), libc::RLIM_INFINITY);
    assert_eq!(command(WRITE, 8 << 20, source).0, 0);
    assert_eq!(command(READ, 8 << 20, target), (0, data));

    drop(driver);
    let said = end(daemon);
    let (counts, messages): (Vec<&str>, Vec<&str>) = said.lines().partition(|line| line.contains("left out"));
    assert!(messages.iter().all(|line| line.contains("The image cannot be written: File too large")), "{said}");
    let counted = |line: &&str| line.split(' ').find_map(|word| word.parse::<usize>().ok()).unwrap();
    assert_eq!(messages.len() + counts.iter().map(counted).sum::<usize>(), refused, "{said}");
    assert!(!counts.is_empty(), "each was said: {said}");
}

//! Memory behind a BAR that a client maps, and a model's own capabilities, over a vfio-user socket.

use std::os::unix::fs::FileExt;

use vfio_bindings::bindings::vfio::*;
use viommu_testkit::frames::{Frames, MAPPED, SIZE};
use viommu_testkit::function::Served;
use viommu_testkit::vfio::{RawClient, command, words};

const ENDPOINT: u32 = 0x20;

fn serve() -> Served {
    Served::new(ENDPOINT, Default::default(), Frames::make, || ())
}

#[test]
fn a_client_maps_the_memory_and_shares_it_with_the_device() {
    let served = serve();
    let mut client = served.client();
    let region = client.region(2).unwrap();
    let flags = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE | VFIO_REGION_INFO_FLAG_MMAP;
    assert_eq!((region.flags & flags, region.size), (flags, SIZE));
    let areas: Vec<_> = region.sparse_areas.iter().map(|area| area.offset..area.offset + area.size).collect();
    assert_eq!(areas, MAPPED);
    let file = region.file_offset.as_ref().expect("a descriptor");
    assert_eq!(file.start(), 0);
    let file = file.file().try_clone().unwrap();
    let sum = |client: &mut vfio_user::Client| {
        let mut data = [0; 8];
        client.region_read(0, 0, &mut data).unwrap();
        u64::from_le_bytes(data)
    };
    assert_eq!(sum(&mut client), 0);
    file.write_all_at(&[3; 100], 0x3000).unwrap();
    assert_eq!(sum(&mut client), 300);
    client.region_write(0, 0, &[7]).unwrap();
    let mut seen = [0; 2];
    file.read_exact_at(&mut seen, 0x6ffe).unwrap();
    assert_eq!((seen, sum(&mut client)), ([7; 2], 7 * 0x6000));
    // By messages too, in the mapped part and outside of it.
    client.region_write(2, 0x7ff0, &[9; 16]).unwrap();
    let mut data = [0; 16];
    client.region_read(2, 0x7ff0, &mut data).unwrap();
    assert_eq!(data, [9; 16]);
    client.region_read(2, 0x3000, &mut data).unwrap();
    assert_eq!(data, [7; 16]);
    // Nobody can take it away.
    assert!(file.set_len(0).is_err() && file.set_len(2 * SIZE).is_err());
    assert!(client.region(0).unwrap().file_offset.is_none());
}

#[test]
fn a_client_learns_how_much_room_it_needs() {
    let served = serve();
    let mut client = RawClient::connect(&served.path());
    client.version(0, "");
    let mut info = |argsz: u32, region: u32| {
        let request = [words(&[argsz, 0, region, 0]), vec![0; 16]].concat();
        let id = client.send(command::GET_REGION_INFO, 0, &request, &[]);
        let reply = client.reply();
        assert_eq!((reply.id, reply.errno), (id, 0));
        (reply.payload, reply.fd.is_some())
    };
    const MMAP: u32 = 0b0111;
    const MMAP_AND_CAPS: u32 = 0b1111;
    let needed = 32 + 16 + 2 * 16;
    for argsz in [32, needed - 1] {
        let (payload, has_fd) = info(argsz, 2);
        assert_eq!((&payload[..16], has_fd), (&words(&[needed, MMAP, 2, 0])[..], false));
        assert_eq!(payload.len(), 32);
    }
    let (payload, has_fd) = info(needed, 2);
    assert_eq!((&payload[..16], has_fd), (&words(&[needed, MMAP_AND_CAPS, 2, 32])[..], true));
    let areas = MAPPED.iter().flat_map(|area| [area.start, area.end - area.start]).flat_map(u64::to_le_bytes);
    assert_eq!(payload[32..], [words(&[1 << 16 | 1, 0, 2, 0]), areas.collect()].concat());
    // A BAR without memory.
    let (payload, has_fd) = info(needed, 0);
    assert_eq!((&payload[..16], has_fd), (&words(&[32, 0b11, 0, 0])[..], false));
}

#[test]
fn configuration_space_has_the_models_own_capabilities() {
    let served = serve();
    let mut client = served.client();
    let read = |client: &mut vfio_user::Client, at: u64| {
        let mut data = [0; 4];
        client.region_read(VFIO_PCI_CONFIG_REGION_INDEX, at, &mut data).unwrap();
        u32::from_le_bytes(data)
    };
    assert_eq!(read(&mut client, 0x18) & 0xf, 0b1100, "64-bit and prefetchable");
    let mut at = u64::from(read(&mut client, 0x34) & 0xff);
    let mut ids = Vec::new();
    while at != 0 {
        let header = read(&mut client, at);
        ids.push((header & 0xff, at));
        at = u64::from(header >> 8 & 0xff);
    }
    assert_eq!(ids.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [0x01, 0x05, 0x11, 0x10, 0x09]);
    let own = ids[4].1;
    client.region_write(VFIO_PCI_CONFIG_REGION_INDEX, own + 2, &[0xee; 4]).unwrap();
    assert_eq!((read(&mut client, own) >> 16, read(&mut client, own + 4)), (0xee08, 0x0504_0302));
    assert_eq!(read(&mut client, 0x100), 1 << 16 | 3);
    assert_eq!((read(&mut client, 0x104), read(&mut client, 0x108)), (0x0403_0201, 0x0807_0605));
}

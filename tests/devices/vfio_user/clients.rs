//! The messages of real clients, in their order, to a PCI function.

use std::os::fd::{AsRawFd, RawFd};

use crate::vfio_user::dma::served;
use serde_json::json;
use vfio_bindings::bindings::vfio::*;
use vfio_user::Client;
use viommu_testkit::memfd;
use viommu_testkit::toy::*;
use viommu_testkit::vfio::*;
use vmm_sys_util::eventfd::EventFd;

const CONFIG: u32 = VFIO_PCI_CONFIG_REGION_INDEX;
const RAM: u64 = 4 << 20;

fn events(count: usize) -> (Vec<EventFd>, Vec<RawFd>) {
    let events: Vec<EventFd> = (0..count).map(|_| EventFd::new(libc::EFD_NONBLOCK).unwrap()).collect();
    let fds = events.iter().map(AsRawFd::as_raw_fd).collect();
    (events, fds)
}

/// QEMU, as 11.1.3 sends them: minor version 0, DMA_MAPs without waiting for replies, the configuration space in one
/// piece, interrupts one by one, a reset, the firmware's shadowing, and the end.
#[test]
fn qemu() {
    let served = served();
    let mut client = RawClient::connect(&served.path());
    let capabilities = json!({
        "pgsizes": 4096, "max_msg_fds": 16, "max_dma_maps": 65535, "max_data_xfer_size": 1 << 20,
        "migration": {"max_bitmap_size": 256 << 20, "pgsize": 4096}, "write_multiple": true,
    });
    let (said, _) = client.version(0, &json!({ "capabilities": capabilities }).to_string());
    // It rejects a server with larger limits than these.
    let said = said["capabilities"].as_object().unwrap();
    assert!(said["max_msg_fds"].as_u64().unwrap() <= 16);
    assert!(said["max_data_xfer_size"].as_u64().unwrap() <= 64 << 20);
    assert!(said["max_dma_maps"].as_u64().unwrap() <= 65535);
    assert_eq!(said["pgsizes"].as_u64().unwrap() % 4096, 0);
    assert!(said.keys().all(|name| capabilities.get(name).is_some()), "it warns of what it does not know");

    let ram = memfd(RAM);
    let pieces = [(0, 0xa_0000, true), (0xc_0000, 0x4_0000, false), (0x10_0000, RAM - 0x10_0000, true)];
    let sent: Vec<u16> = pieces
        .iter()
        .map(|&(at, size, has_fd)| {
            let flags = if has_fd { READ | WRITE } else { READ };
            let fds: &[RawFd] = if has_fd { &[ram.as_raw_fd()] } else { &[] };
            client.send(command::DMA_MAP, 0, &dma_map(flags, at, at, size), fds)
        })
        .collect();
    sent.into_iter().for_each(|id| assert!(client.take(command::DMA_MAP, id).unwrap().is_empty()));

    assert_eq!(client.call(command::GET_INFO, &words(&[16, 0, 0, 0]), &[]).unwrap(), words(&[16, 3, 9, 5]));
    for index in 0..8 {
        let request = [words(&[32, 0, index, 0]), vec![0; 16]].concat();
        assert_eq!(client.call(command::GET_REGION_INFO, &request, &[]).unwrap().len(), 32);
    }
    let irq = |client: &mut RawClient, index| {
        client.call(command::GET_IRQ_INFO, &words(&[16, 0, index, 0]), &[]).unwrap()[12]
    };
    assert_eq!(irq(&mut client, VFIO_PCI_ERR_IRQ_INDEX), 1);
    assert_eq!(client.region_read(CONFIG, 0, 4096).unwrap()[..4], 0x1234_1b36_u32.to_le_bytes());
    // How large is the ROM?
    for size in [0xffff_f800_u32, 0] {
        client.region_write(CONFIG, 0x30, &size.to_le_bytes()).unwrap();
        assert_eq!(client.region_read(CONFIG, 0x30, 4).unwrap(), [0; 4]);
    }
    assert_eq!(irq(&mut client, VFIO_PCI_MSIX_IRQ_INDEX), 3);

    const SET: u32 = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
    const UNMASK_BY: u32 = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_UNMASK;
    const OFF: u32 = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER;
    let (event, fds) = events(3);
    client.set_irqs([VFIO_PCI_INTX_IRQ_INDEX, SET, 0, 1], &[], &fds[..1]).unwrap();
    client.set_irqs([VFIO_PCI_ERR_IRQ_INDEX, SET, 0, 1], &[], &fds[2..]).unwrap();
    client.set_irqs([VFIO_PCI_INTX_IRQ_INDEX, OFF, 0, 0], &[], &[]).unwrap();
    client.region_write(CONFIG, 4, &[0, 0]).unwrap();
    client.call(command::RESET, &[], &[]).unwrap();
    // With KVM, which unmasks the pin itself.
    client.set_irqs([VFIO_PCI_INTX_IRQ_INDEX, SET, 0, 1], &[], &fds[..1]).unwrap();
    client.set_irqs([VFIO_PCI_INTX_IRQ_INDEX, UNMASK_BY, 0, 1], &[], &fds[1..2]).unwrap();
    for bar in 0..6 {
        client.region_write(CONFIG, 0x10 + 4 * bar, &[0; 4]).unwrap();
    }

    // Firmware shadows the memory below 1 MiB: all of it is unmapped and mapped again.
    for round in 0..3 {
        for (at, size, _) in pieces {
            client.dma_unmap(0, at, size).unwrap();
        }
        for (at, size, _) in pieces {
            let writable = if round % 2 == 0 { WRITE } else { 0 };
            client.dma_map(READ | writable, at, at, size, &[ram.as_raw_fd()]).unwrap();
        }
    }

    // The driver: command register, vectors, I/O. QEMU sends the first vector, then the others again in one message for
    // those with descriptors and one for those without.
    client.region_write(CONFIG, 4, &[6, 4]).unwrap();
    client.set_irqs([VFIO_PCI_INTX_IRQ_INDEX, OFF, 0, 0], &[], &[]).unwrap();
    client.set_irqs([VFIO_PCI_MSIX_IRQ_INDEX, SET, 0, 1], &[], &fds[..1]).unwrap();
    client.set_irqs([VFIO_PCI_MSIX_IRQ_INDEX, OFF, 0, 0], &[], &[]).unwrap();
    client.set_irqs([VFIO_PCI_MSIX_IRQ_INDEX, SET, 0, 2], &[], &fds[..2]).unwrap();
    client.set_irqs([VFIO_PCI_MSIX_IRQ_INDEX, SET, 2, 1], &[], &[]).unwrap();
    write_register(&mut client, DO_INTERRUPT, 1);
    assert_eq!(event[1].read().unwrap(), 1);
    assert!(writes(&mut client, 0x20_0000, 42));
    assert_eq!(reads(&mut client, 0x20_0000), 42);
    let one = [access(0, ADDRESS, 8), 0x1234_u64.to_le_bytes().to_vec()].concat();
    client.call(command::REGION_WRITE_MULTI, &[1_u64.to_le_bytes().to_vec(), one].concat(), &[]).unwrap();
    assert_eq!(client.region_read(0, ADDRESS, 4).unwrap(), [0x34, 0x12, 0, 0]);

    client.call(command::RESET, &[], &[]).unwrap();
    for (at, size, _) in pieces {
        client.dma_unmap(0, at, size).unwrap();
    }
}

/// SPDK's initiator (`lib/vfio_user/host`): no JSON, room for capabilities in the request, and a descriptor with
/// DMA_UNMAP.
#[test]
fn spdk() {
    let served = served();
    let mut client = RawClient::connect(&served.path());
    let mut call = |command: u16, payload: &[u8], fds: &[RawFd]| client.call(command, payload, fds).unwrap();
    let version = call(command::VERSION, &[0; 4], &[]);
    assert!(version.len() <= 4096, "it has no more room");
    assert_eq!(call(command::GET_INFO, &words(&[16, 0, 0, 0]), &[]), words(&[16, 3, 9, 5]));
    let mut sizes = Vec::new();
    for index in 0..9 {
        let mut request = words(&[4064, 0, index, 0]);
        request.resize(4064, 0);
        let info = call(command::GET_REGION_INFO, &request, &[]);
        sizes.push(u64::from_le_bytes(info[16..24].try_into().unwrap()));
    }
    assert_eq!(sizes, [0x2000, 0, 0x1000, 0, 0, 0, 0, 4096, 0]);
    // Its memory is in huge pages, at the addresses of its own process.
    let ram = memfd(RAM);
    let at = 0x2000_0020_0000;
    assert!(call(command::DMA_MAP, &dma_map(READ | WRITE, 0, at, RAM), &[ram.as_raw_fd()]).is_empty());
    call(command::REGION_WRITE, &[access(CONFIG, 4, 2), vec![6, 4]].concat(), &[]);
    assert!(writes(&mut client, at + RAM - 8, 7));
    assert_eq!(reads(&mut client, at + RAM - 8), 7);
    assert_eq!(
        client.call(command::DMA_UNMAP, &dma_unmap(0, at, RAM), &[ram.as_raw_fd()]).unwrap(),
        dma_unmap(0, at, RAM)
    );
    assert_eq!(reads(&mut client, at), u64::MAX);
}

/// Cloud Hypervisor (`pci/src/vfio_user.rs`), whose client is the crate `vfio_user`. It sends all vectors in one
/// message.
#[test]
fn cloud_hypervisor() {
    let served = served();
    let mut client = Client::new(&served.path()).unwrap();
    assert_eq!(client.region(CONFIG).unwrap().size, 4096);
    let mut command = [0; 2];
    client.region_read(CONFIG, 4, &mut command).unwrap();
    for index in [VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX] {
        assert!(client.get_irq_info(index).unwrap().count > 0);
    }
    let ram = memfd(RAM);
    client.dma_map(0x1000, 0x10_0000, RAM - 0x1000, ram.as_raw_fd()).unwrap();
    let (event, fds) = events(3);
    let set = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
    client.set_irqs(VFIO_PCI_MSIX_IRQ_INDEX, set, 0, 3, &fds).unwrap();
    client.region_write(CONFIG, 4, &[6, 4]).unwrap();
    client.region_write(0, DO_INTERRUPT, &2_u64.to_le_bytes()).unwrap();
    assert_eq!(event[2].read().unwrap(), 1);
    client.region_write(0, ADDRESS, &0x10_0000_u64.to_le_bytes()).unwrap();
    client.region_write(0, DO_WRITE, &[0; 8]).unwrap();
    let none = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER;
    client.set_irqs(VFIO_PCI_MSIX_IRQ_INDEX, none, 0, 0, &[]).unwrap();
    client.region_write(0, DO_INTERRUPT, &2_u64.to_le_bytes()).unwrap();
    assert!(event[2].read().is_err());
    client.dma_unmap(0x10_0000, RAM - 0x1000).unwrap();
    client.reset().unwrap();
    client.shutdown().unwrap();
}

/// The client of libvfio-user's Python tests (`test/py/`): their requests, and the error numbers that they expect.
#[test]
fn libvfio_user_tests() {
    let served = served();
    let mut client = RawClient::connect(&served.path());
    client.version(2, "{\"capabilities\": {\"max_data_xfer_size\": 1048576, \"max_msg_fds\": 8}}");
    let wrong: [(u16, Vec<u8>); 13] = [
        // test_request_errors.py
        (19, vec![0]),
        (command::SET_IRQS, Vec::new()),
        // test_device_get_info.py, test_device_get_region_info.py, test_device_get_irq_info.py
        (command::GET_INFO, words(&[0, 0])),
        (command::GET_INFO, words(&[8, 0, 0, 0])),
        (command::GET_REGION_INFO, words(&[0, 0])),
        (command::GET_REGION_INFO, [words(&[8, 0, 1, 0]), vec![0; 16]].concat()),
        (command::GET_REGION_INFO, [words(&[32, 0, 9, 0]), vec![0; 16]].concat()),
        (command::GET_IRQ_INFO, words(&[3, 0, 0, 0])),
        (command::GET_IRQ_INFO, words(&[16, 0, 5, 0])),
        // test_dma_unmap.py
        (command::DMA_UNMAP, words(&[0, 0])),
        (command::DMA_UNMAP, [words(&[8, 0]), [4096_u64; 2].map(u64::to_le_bytes).concat()].concat()),
        (command::DMA_UNMAP, dma_unmap(4, 4096, 4096)),
        (command::DMA_UNMAP, dma_unmap(2, 0x1_0000, 4096)),
    ];
    for (command, payload) in wrong {
        assert_eq!(client.call(command, &payload, &[]), Err(libc::EINVAL), "{command}: {payload:x?}");
    }
    for page in 0..64 {
        client.dma_map(READ | WRITE, 0, page * 4096, 4096, &[]).unwrap();
    }
    assert_eq!(client.dma_unmap(0, 0x10_0000, 4096), Err(libc::ENOENT));
    client.dma_unmap(0, 0, 4096).unwrap();
    client.dma_unmap(2, 0, 0).unwrap();

    // test_device_set_irqs.py, test_irq_trigger.py
    let (bool, eventfd) = (VFIO_IRQ_SET_DATA_BOOL, VFIO_IRQ_SET_DATA_EVENTFD);
    let trigger = VFIO_IRQ_SET_ACTION_TRIGGER;
    let (event, fds) = events(2);
    event.iter().zip([4, 8]).for_each(|(event, value)| event.write(value).unwrap());
    let msix = VFIO_PCI_MSIX_IRQ_INDEX;
    client.set_irqs([msix, eventfd | trigger, 0, 2], &[], &fds).unwrap();
    client.set_irqs([msix, VFIO_IRQ_SET_DATA_NONE | trigger, 1, 1], &[], &[]).unwrap();
    assert_eq!((event[0].read().unwrap(), event[1].read().unwrap()), (4, 9));
    client.set_irqs([msix, bool | trigger, 0, 2], &[0, 1], &[]).unwrap();
    assert!(event[0].read().is_err());
    assert_eq!(event[1].read().unwrap(), 1);
    let mask = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_MASK;
    assert_eq!(client.set_irqs([VFIO_PCI_ERR_IRQ_INDEX, mask, 0, 1], &[], &[]), Err(libc::EINVAL));
    assert_eq!(client.set_irqs([msix, VFIO_IRQ_SET_ACTION_MASK | eventfd, 0, 2], &[], &fds), Err(libc::EINVAL));

    // test_device_get_region_io_fds.py, test_migration.py, test_dirty_pages.py
    let none = client.call(command::GET_REGION_IO_FDS, &words(&[4096, 0, 0, 0]), &[]).unwrap();
    assert_eq!(none, words(&[16, 0, 0, 0]));
    let feature = words(&[16, 1 << 16 | 1, 0, 0]);
    assert_eq!(client.call(command::DEVICE_FEATURE, &feature, &[]), Err(libc::ENOTTY));
}

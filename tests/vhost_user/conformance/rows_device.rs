//! Rows 1 to 12: features, configuration, reset, and how a request is framed.

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use viommu::iommu::Limits;
use viommu_testkit::{PATIENCE, wait_until};
use viommu_wire::virtio_iommu::*;

use viommu_testkit::frontend::*;
use zerocopy::little_endian::{U32, U64};

#[test]
fn row_01_features() {
    let device = Device::new();
    let driver = Driver::new(&device);
    let wanted = feature::INPUT_RANGE
        | feature::DOMAIN_RANGE
        | feature::MAP_UNMAP
        | feature::PROBE
        | feature::MMIO
        | feature::BYPASS_CONFIG
        | viommu_wire::split::F_SPLIT_MAP
        | VERSION_1
        | EVENT_IDX
        | INDIRECT
        | IN_ORDER
        | PROTOCOL_FEATURES;
    assert_eq!(driver.offered, wanted);
    assert_eq!(driver.offered & feature::BYPASS, 0, "the legacy feature must not be offered beside its successor");
}

#[test]
fn row_02_configuration() {
    let device = Device::new();
    let config = Driver::new(&device).config();
    assert_eq!(config.page_size_mask.get(), 1 << 12 | 1 << 21 | 1 << 30);
    assert_eq!(config.input_range.map(U64::get), [0, u64::MAX]);
    assert_eq!(config.domain_range.map(U32::get), [0, u32::MAX]);
    assert_eq!(config.probe_size.get(), 512);
    assert_eq!(config.bypass, 1);
    assert_eq!(config.reserved, [0; 3]);
}

#[test]
fn row_03_a_write_of_the_whole_configuration_counts_for_bypass_alone() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    let before = driver.config();
    let garbage = Config {
        page_size_mask: 1.into(),
        input_range: [7.into(), 8.into()],
        domain_range: [9.into(), 10.into()],
        probe_size: 1.into(),
        bypass: 0,
        reserved: [1; 3],
    };
    driver.write_config(&garbage);
    let after = driver.config();
    assert_eq!(after.bypass, 0);
    assert_eq!(after.page_size_mask, before.page_size_mask);
    assert_eq!(after.input_range, before.input_range);
    assert_eq!(after.domain_range, before.domain_range);
    assert_eq!(after.probe_size, before.probe_size);
    assert_eq!(after.reserved, [0; 3]);
    // A write of only that byte works too.
    driver.frontend.set_config(36, VhostUserConfigFlags::WRITABLE, &[1]).unwrap();
    assert_eq!(driver.config().bypass, 1);
}

#[test]
fn row_03_bypass_is_0_or_1() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    for value in [2, 3, 0x80, 0xff] {
        driver.write_bypass(value);
        assert_eq!(driver.config().bypass, 1, "a write of {value} must have no effect");
    }
    assert_eq!(driver.attach(1, EP), OK, "and the device goes on");
}

#[test]
fn row_04_bypass_needs_bypass_config() {
    let device = Device::new();
    let mut driver = Driver::accepting(&device, !feature::BYPASS_CONFIG);
    driver.write_bypass(0);
    assert_eq!(driver.config().bypass, 1);
    driver.negotiate(u64::MAX);
    driver.write_bypass(0);
    assert_eq!(driver.config().bypass, 0);
}

#[test]
fn row_05_bypass_reads_what_is_in_effect() {
    for boot in [false, true] {
        let device = Device::with(|settings| settings.boot_bypass = boot);
        let mut driver = Driver::new(&device);
        let mut dma = driver.dma(&device, EP);
        for bypass in [boot, !boot, boot] {
            driver.write_bypass(u8::from(bypass));
            assert_eq!(driver.config().bypass, u8::from(bypass));
            assert_eq!(dma.write(0x5000, b"data").is_ok(), bypass);
        }
    }
}

#[test]
fn row_06_bypass_outlives_a_device_reset_and_not_a_system_reset() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    driver.attach(1, EP);
    driver.write_bypass(0);
    driver.reset();
    assert_eq!(driver.config().bypass, 0);
    driver.attach(1, EP);
    // In a reset of the machine the queues stop, and the functions are reset.
    driver.stop_queues();
    assert_eq!(driver.config().bypass, 0);
    device.control.function_reset();
    assert_eq!(driver.config().bypass, 1);
    driver.start_over();
    assert_eq!(driver.config().bypass, 1);
}

#[test]
fn row_07_a_device_reset_leaves_no_endpoint_attached_and_no_domain() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    driver.write_bypass(0);
    driver.attach(1, EP);
    driver.attach(1, EP2);
    driver.attach_bypass(2, BARE);
    driver.map(1, 0, 0xfff, 0x5000, READ | WRITE);
    driver.reset();
    assert_eq!(driver.detach(1, EP), INVAL, "it is attached to nothing");
    assert_eq!(device.iommu.stats().mappings_live, 0);
    assert_eq!(driver.map(1, 0, 0xfff, 0x5000, READ), NOENT);
    for endpoint in [EP, EP2, BARE] {
        driver.dma(&device, endpoint).read(0, &mut [0]).unwrap_err();
    }
    // The ids can be used for any kind of domain, and new domains are empty.
    assert_eq!(driver.attach(2, EP), OK);
    assert_eq!(driver.attach_bypass(1, EP2), OK);
    driver.dma(&device, EP).read(0, &mut [0]).unwrap_err();
}

#[test]
fn row_08_any_split_into_descriptors() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    driver.attach(1, EP);
    let bytes = map(1, 0x1000, 0x1fff, 0x5000, READ).bytes();
    let undo = unmap(1, 0x1000, 0x1fff);
    let splits: [(&[usize], &[usize]); 5] = [
        (&[36], &[4]),
        (&[4, 32], &[1, 3]),
        (&[1, 2, 3, 30], &[1, 1, 1, 1]),
        (&[0, 36, 0], &[0, 4, 0]),
        (&[1; 36], &[4]),
    ];
    for (readable, writable) in splits {
        for indirect in [false, true] {
            let mut parts = Vec::new();
            let mut rest = &bytes[..];
            for &len in readable {
                let (part, after) = rest.split_at(len);
                parts.push(Part::R(part.to_vec()));
                rest = after;
            }
            parts.extend(writable.iter().map(|&len| Part::W(len)));
            let (head, written) = match indirect {
                false => driver.add(REQUESTS, &parts),
                true => driver.add_indirect(REQUESTS, &parts),
            };
            driver.kick(REQUESTS);
            let (used, len) = driver.wait_used(REQUESTS);
            assert_eq!(used, head);
            assert_eq!(driver.collect(len, &written).status(), OK, "{readable:?} {writable:?} indirect {indirect}");
            driver.dma(&device, EP).read(0x1000, &mut [0]).unwrap();
            assert_eq!(driver.request(&undo), OK);
        }
    }
}

#[test]
fn row_09_errors_carry_their_tail() {
    // `Used::status` checks that the used length covers the tail; here is one request for each error there is.
    let device = Device::with(|settings| settings.limits = Limits { domains: 1, ..Limits::default() });
    let mut driver = Driver::new(&device);
    driver.attach(1, EP);
    let tail = |driver: &mut Driver, request: Vec<u8>| driver.transact(&[Part::R(request), Part::W(4)]);
    let expected = |status| Used { len: 4, written: vec![status, 0, 0, 0] };
    assert_eq!(tail(&mut driver, map(1, 0, 0xfff, 0, 0x80).bytes()), expected(INVAL));
    assert_eq!(tail(&mut driver, map(1, 1, 0xfff, 0, READ).bytes()), expected(RANGE));
    assert_eq!(tail(&mut driver, map(9, 0, 0xfff, 0, READ).bytes()), expected(NOENT));
    assert_eq!(tail(&mut driver, attach(2, EP2, 0).bytes()), expected(NOMEM));
    assert_eq!(tail(&mut driver, attach(1, NOBODY, 0).bytes()), expected(NOENT));
    assert_eq!(tail(&mut driver, detach(2, EP).bytes()), expected(INVAL));
    assert_eq!(tail(&mut driver, unmap(9, 0, 1).bytes()), expected(NOENT));
    let (properties, status) = driver.probe(NOBODY);
    assert_eq!((properties, status), (vec![0; 512], NOENT));
}

#[test]
fn row_10_an_unknown_type_is_not_written_to() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    for kind in [0, 6, 0x7f, 0xff] {
        let used = driver.transact(&[Part::R(vec![kind; 36]), Part::W(4)]);
        assert_eq!(used, Used { len: 0, written: vec![0xa5; 4] });
    }
    assert_eq!(device.control.stats().unknown, 4);
    assert_eq!(driver.attach(1, EP), OK);
}

#[test]
fn row_11_too_short_to_be_a_request() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    driver.attach(1, EP);
    let request = map(1, 0x1000, 0x1fff, 0x5000, READ).bytes();
    // Cut-off heads and bodies, and a missing or incomplete tail.
    for len in [0, 1, 3, 4, 20, 35] {
        let used = driver.transact(&[Part::R(request[..len].to_vec()), Part::W(4)]);
        assert_eq!(used, Used { len: 0, written: vec![0xa5; 4] }, "{len} bytes");
    }
    for parts in [vec![Part::R(request.clone())], vec![Part::R(request.clone()), Part::W(3)], vec![Part::W(4)]] {
        let used = driver.transact(&parts);
        assert_eq!(used.len, 0);
        assert!(used.written.iter().all(|&byte| byte == 0xa5));
    }
    assert_eq!(device.iommu.stats().mappings_live, 0, "none of them was done");
    assert_eq!(device.control.stats().malformed, 9);
    assert_eq!(driver.request(&map(1, 0x1000, 0x1fff, 0x5000, READ)), OK);
}

#[test]
fn row_12_the_tail_is_the_end_of_the_writable_part() {
    let device = Device::new();
    let mut driver = Driver::new(&device);
    // Longer than needed: the tail is at the end, and the bytes before it are cleared, so that nothing leaks.
    let used = driver.transact(&[Part::R(attach(1, EP, 0).bytes()), Part::W(6), Part::W(14)]);
    assert_eq!(used, Used { len: 20, written: vec![0; 20] });
    let used = driver.transact(&[Part::R(attach(1, NOBODY, 0).bytes()), Part::W(30), Part::W(2)]);
    let mut expected = vec![0; 32];
    expected[28] = NOENT;
    assert_eq!(used, Used { len: 32, written: expected });
    // More device-readable bytes than the request has are no error either.
    let mut long = attach(1, EP2, 0).bytes();
    long.extend([0xff; 40]);
    assert_eq!(driver.transact(&[Part::R(long), Part::W(4)]).status(), OK);
    // PROBE: probe_size bytes, then the tail; in one piece or in many.
    for parts in [vec![516], vec![512, 4], vec![1, 511, 4], vec![24, 492]] {
        let mut chain = vec![Part::R(probe(EP).bytes())];
        chain.extend(parts.into_iter().map(Part::W));
        let used = driver.transact(&chain);
        assert_eq!(used.status(), OK);
        assert_eq!(used.len, 516);
        assert_eq!(used.written[..2], [1, 0]);
        assert!(used.written[24..].iter().all(|&byte| byte == 0));
    }
}

#[test]
fn a_session_begins_as_at_power_on() {
    let device = Device::new();
    for _ in 0..3 {
        let mut driver = Driver::new(&device);
        assert_eq!(driver.config().bypass, 1);
        assert_eq!(driver.detach(1, EP), INVAL);
        assert_eq!(driver.attach(1, EP), OK);
        assert_eq!(driver.map(1, 0, 0xfff, 0x5000, READ), OK);
        driver.write_bypass(0);
        drop(driver);
        wait_until(PATIENCE, "the reset after a disconnect", || device.iommu.stats().mappings_live == 0);
    }
}

//! Accesses of an endpoint that are in progress while a driver changes the mappings that they use.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use viommu_trace::event::Access;

use crate::frontend::*;
use crate::{PATIENCE, wait_until};

/// The 8 bytes that the endpoint reads at an address, as a number.
pub fn read_at(driver: &Driver, device: &Device, iova: u64) -> Option<u64> {
    let mut data = [0; 8];
    driver.dma(device, EP).read(iova, &mut data).ok().map(|()| u64::from_le_bytes(data))
}

/// Much more time than the answer to a request takes that waits for nobody.
const QUIET: Duration = Duration::from_millis(50);

/// Makes the driver do `request`, which removes the mapping that the endpoint's access at `iova` uses, and checks that
/// there is no answer before the access is over.
pub fn waits_for_access(driver: &mut Driver, device: &Device, iova: u64, request: Vec<u8>) {
    let mut reader = device.iommu.reader();
    let guard = reader.enter();
    let _ = device.iommu.endpoint(EP).translate(&guard, iova, Access::Read);
    let before = device.iommu.stats();
    let (_, writable) = driver.add(REQUESTS, &[Part::R(request), Part::W(4)]);
    driver.kick(REQUESTS);
    wait_until(PATIENCE, "the request", || device.iommu.stats() != before);
    thread::sleep(QUIET);
    assert!(driver.used_is_empty(REQUESTS), "answered while an access is under way");
    drop(guard);
    let (_, len) = driver.wait_used(REQUESTS);
    assert_eq!(driver.collect(len, &writable).status(), OK);
}

/// Threads in which the endpoint writes to an address repeatedly.
pub struct Writers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<u32>>,
}

impl Writers {
    pub fn start(driver: &Driver, device: &Device, iova: u64) -> Writers {
        let stop = Arc::new(AtomicBool::new(false));
        let write = |_| {
            let (mut dma, stop) = (driver.dma(device, EP), stop.clone());
            thread::spawn(move || {
                let mut written = 0;
                while !stop.load(Ordering::Relaxed) {
                    written += u32::from(dma.write(iova, &[0xff; 512]).is_ok());
                }
                written
            })
        };
        Writers { threads: (0..2).map(write).collect(), stop }
    }

    /// Checks that nothing is written to the memory at `phys`, which the driver has unmapped.
    pub fn assert_gone(&self, driver: &Driver, phys: u64) {
        driver.write(phys, &[0; 512]);
        thread::yield_now();
        assert!(driver.read(phys, 512).iter().all(|&byte| byte == 0), "written after the removal was answered");
    }

    /// Ends them. At least one write must have succeeded.
    pub fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        let written: u32 = self.threads.into_iter().map(|thread| thread.join().unwrap()).sum();
        assert!(written > 0, "the writers never had a mapping: the test shows nothing");
    }
}

//! A device that records its calls, and a session with it.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use viommu::vfio_user::{Device, DmaMap, IrqInfo, IrqSet, Refused, Transport, serve};
use viommu_testkit::vfio::RawClient;

/// Bytes of region 0. The other of the two regions is empty.
pub const SIZE: u64 = 2 << 20;

/// Types of interrupts: 4 that can be masked, and 1 that cannot.
pub const MASKABLE: u32 = 0;
pub const PLAIN: u32 = 1;

/// The mapped memory, during a session and after it.
pub type Maps = Arc<Mutex<Vec<DmaMap>>>;

#[derive(Default)]
pub struct Memo {
    pub calls: Vec<String>,
    pub maps: Maps,
    /// The bytes at the start of region 0.
    bytes: [u8; 16],
}

impl Device for Memo {
    fn regions(&self) -> u32 {
        2
    }

    fn region_size(&self, region: u32) -> u64 {
        if region == 0 { SIZE } else { 0 }
    }

    fn irqs(&self) -> u32 {
        2
    }

    fn irq_info(&self, index: u32) -> IrqInfo {
        let plain = IrqInfo { count: 1, eventfd: true, ..IrqInfo::default() };
        if index == PLAIN { plain } else { IrqInfo { count: 4, maskable: true, ..plain } }
    }

    fn max_dma_maps(&self) -> u32 {
        77
    }

    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) {
        self.calls.push(format!("read {region} {offset:#x} + {}", data.len()));
        for (at, byte) in (offset as usize..).zip(data) {
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) {
        self.calls.push(format!("write {region} {offset:#x} + {}", data.len()));
        for (at, byte) in (offset as usize..).zip(data) {
            if let Some(to) = self.bytes.get_mut(at) {
                *to = *byte;
            }
        }
    }

    fn dma_map(&mut self, map: DmaMap) -> Result<(), Refused> {
        let DmaMap { address, size, .. } = map;
        self.calls.push(format!("map {address:#x} + {size:#x}"));
        if size == 0 {
            return Err(Refused::new(libc::ERANGE, "the device says so"));
        }
        self.maps.lock().unwrap().push(map);
        Ok(())
    }

    fn dma_unmap(&mut self, address: u64, size: u64) -> Result<(), Refused> {
        self.calls.push(format!("unmap {address:#x} + {size:#x}"));
        Ok(())
    }

    fn dma_unmap_all(&mut self) {
        self.calls.push("unmap all".into());
    }

    fn set_irqs(&mut self, set: IrqSet) -> Result<(), Refused> {
        let IrqSet { index, start, count, action, data } = set;
        let data = format!("{data:?}");
        let kind = data.split('(').next().unwrap();
        self.calls.push(format!("irqs {index} {start} + {count} {action:?} {kind}"));
        Ok(())
    }

    fn reset(&mut self) {
        self.calls.push("reset".into());
    }
}

/// A session over some transport.
pub struct Session {
    pub maps: Maps,
    thread: JoinHandle<(Memo, io::Result<()>)>,
}

impl Session {
    pub fn over(mut transport: impl Transport + Send + 'static) -> Session {
        let mut memo = Memo::default();
        let maps = memo.maps.clone();
        let serve = move || {
            let result = serve(&mut transport, &mut memo);
            (memo, result)
        };
        Session { maps, thread: thread::spawn(serve) }
    }

    pub fn start() -> (Session, RawClient) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Session::over(theirs), RawClient::over(ours))
    }

    /// The device and the session's result, when the client has left.
    pub fn join(self) -> (Memo, io::Result<()>) {
        self.thread.join().unwrap()
    }

    /// Makes the client leave, and does the same.
    pub fn end(self, client: RawClient) -> Memo {
        drop(client);
        let (memo, result) = self.join();
        result.unwrap();
        memo
    }
}

//! vhost-user messages of any kind and size, with descriptors of any kind, and rings of any content, at the real socket.
#![no_main]

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use viommu::iommu::{EndpointSettings, Iommu, Settings};
use viommu::vhost::Server;
use viommu_fuzz::{HANG, Input, leave, memfd};
use viommu_trace::Tracer;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Requests of a frontend, as the vhost-user specification numbers them.
mod request {
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_CONFIG: u32 = 25;
    pub const ADD_MEM_REG: u32 = 37;
    /// The highest of all.
    pub const LAST: u32 = 44;
}

/// Bytes of guest memory, which begins at 0, and its address in the frontend.
const RAM: u64 = 64 << 10;
const USER: u64 = 0x7f00_0000_0000;
/// Entries of each queue.
const ENTRIES: u64 = 16;
/// VERSION_1, protocol features, indirect descriptors, EVENT_IDX, and those of the device type.
const FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28 | 1 << 23 | 0x7f;
/// CONFIG, REPLY_ACK and the like.
const PROTOCOL_FEATURES: u64 = 1 << 9 | 1 << 3 | 1;

fuzz_target!(|data: &[u8]| {
    let mut frontend = Frontend::connect();
    let mut input = Input::new(data);
    if input.u8().is_some_and(|how| how & 1 == 0) {
        frontend.set_up();
    }
    while frontend.step(&mut input).is_some() {}
    leave(frontend.stream);
});

/// The socket of the device, which is served for all inputs: each frontend must find it there.
fn socket() -> &'static PathBuf {
    static SOCKET: OnceLock<PathBuf> = OnceLock::new();
    SOCKET.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let endpoints = vec![EndpointSettings { id: 0x20, reserved: Vec::new() }];
        let iommu = Iommu::new(Settings { endpoints, ..Settings::default() }, Tracer::default());
        let mut server = Server::bind(&path, iommu, Tracer::default()).unwrap();
        std::thread::spawn(move || {
            let _folder = folder;
            server.run().unwrap();
        });
        path
    })
}

struct Frontend {
    stream: UnixStream,
    ram: File,
    short: File,
    kicks: [EventFd; 2],
    call: EventFd,
    /// Entries made available so far.
    available: [u16; 2],
}

impl Frontend {
    fn connect() -> Self {
        let stream = UnixStream::connect(socket()).unwrap();
        stream.set_read_timeout(Some(HANG)).unwrap();
        stream.set_write_timeout(Some(HANG)).unwrap();
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let (ram, short) = (memfd(RAM), memfd(100));
        Frontend { stream, ram, short, kicks: [event(), event()], call: event(), available: [0; 2] }
    }

    /// Sends a message, unless the device has ended the connection.
    fn send(&self, request: u32, flags: u32, size: u32, payload: &[u8], fds: &[RawFd]) {
        let mut message = [request, flags, size].map(u32::to_le_bytes).concat();
        message.extend(payload);
        let _ = self.stream.send_with_fds(&[message.as_slice()], fds);
    }

    fn good(&self, request: u32, payload: &[u8], fds: &[RawFd]) {
        self.send(request, 1, payload.len() as u32, payload, fds);
    }

    fn set_up(&mut self) {
        self.good(request::SET_OWNER, &[], &[]);
        self.good(request::SET_FEATURES, &FEATURES.to_le_bytes(), &[]);
        self.good(request::SET_PROTOCOL_FEATURES, &PROTOCOL_FEATURES.to_le_bytes(), &[]);
        self.good(request::SET_MEM_TABLE, &words(&[1, 0, RAM, USER, 0]), &[self.ram.as_raw_fd()]);
        for queue in 0..2 {
            self.start(queue);
        }
    }

    fn start(&self, queue: usize) {
        let index = queue as u32;
        let state = |number: u32| [index.to_le_bytes(), number.to_le_bytes()].concat();
        self.good(request::SET_VRING_NUM, &state(ENTRIES as u32), &[]);
        self.good(request::SET_VRING_BASE, &state(0), &[]);
        let [descriptors, available, used] = rings(queue).map(|at| USER + at);
        let addresses = [u64::from(index), descriptors, used, available, 0];
        self.good(request::SET_VRING_ADDR, &words(&addresses), &[]);
        self.good(request::SET_VRING_CALL, &words(&[queue as u64]), &[self.call.as_raw_fd()]);
        self.good(request::SET_VRING_KICK, &words(&[queue as u64]), &[self.kicks[queue].as_raw_fd()]);
        self.good(request::SET_VRING_ENABLE, &state(1), &[]);
    }

    fn step(&mut self, input: &mut Input) -> Option<()> {
        match input.u8()? % 8 {
            0 | 1 => self.chain(input)?,
            2 => self.write_ram(u64::from(input.u16()?) % RAM, input),
            3 => {
                let queue = usize::from(input.u8()? & 1);
                self.kicks[queue].write(1).ok();
            }
            4 => {
                let queue = usize::from(input.u8()? & 1);
                self.good(request::GET_VRING_BASE, &[queue as u32, 0].map(u32::to_le_bytes).concat(), &[]);
                self.available[queue] = 0;
                let (_, available, used) = (0, rings(queue)[1], rings(queue)[2]);
                self.ram.write_all_at(&[0; 4], available).unwrap();
                self.ram.write_all_at(&[0; 4], used).unwrap();
                self.start(queue);
            }
            5 => self.near_miss(input)?,
            _ => self.any_message(input)?,
        }
        Some(())
    }

    fn write_ram(&self, at: u64, input: &mut Input) {
        let len = usize::from(input.u8().unwrap_or(0)).min((RAM - at) as usize);
        self.ram.write_all_at(input.bytes(len), at).unwrap();
    }

    /// A chain of descriptors, the first with bytes that may be a request, then a kick.
    fn chain(&mut self, input: &mut Input) -> Option<()> {
        let how = input.u8()?;
        let queue = usize::from(how & 1);
        let [descriptors, available, _] = rings(queue);
        let count = u16::from(how >> 1 & 3) + 1;
        for number in 0..count {
            let shape = input.u8()?;
            let buffer = 0x8000 + 0x800 * u64::from(number);
            let bytes = input.bytes(usize::from(shape & 0x7f));
            self.ram.write_all_at(bytes, buffer).unwrap();
            // The last is device-writable, as for an answer.
            let last = number + 1 == count;
            let flags = u16::from(!last) | u16::from(last) << 1 ^ if shape & 0x80 == 0 { 0 } else { input.u16()? };
            let length = if last { 4 + u32::from(shape) } else { bytes.len() as u32 };
            let mut descriptor = [buffer.to_le_bytes(), [0; 8]].concat();
            descriptor[8..12].copy_from_slice(&length.to_le_bytes());
            descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
            descriptor[14..16].copy_from_slice(&(number + 1).to_le_bytes());
            self.ram.write_all_at(&descriptor, descriptors + 16 * u64::from(number)).unwrap();
        }
        let slot = u64::from(self.available[queue]) % ENTRIES;
        self.available[queue] = self.available[queue].wrapping_add(1);
        self.ram.write_all_at(&[0; 2], available + 4 + 2 * slot).unwrap();
        self.ram.write_all_at(&self.available[queue].to_le_bytes(), available + 2).unwrap();
        self.kicks[queue].write(1).ok();
        Some(())
    }

    /// A message that is correct except for one number.
    fn near_miss(&mut self, input: &mut Input) -> Option<()> {
        const MESSAGES: [(u32, usize); 10] = [
            (request::SET_FEATURES, 1),
            (request::SET_MEM_TABLE, 5),
            (request::SET_VRING_NUM, 1),
            (request::SET_VRING_ADDR, 5),
            (request::SET_VRING_BASE, 1),
            (request::SET_VRING_KICK, 1),
            (request::SET_VRING_CALL, 1),
            (request::SET_VRING_ENABLE, 1),
            (request::SET_CONFIG, 8),
            (request::ADD_MEM_REG, 5),
        ];
        let (request, length) = MESSAGES[usize::from(input.u8()?) % MESSAGES.len()];
        let mut payload: Vec<u64> = match request {
            request::SET_FEATURES => vec![FEATURES],
            request::SET_MEM_TABLE => vec![1, 0, RAM, USER, 0],
            request::ADD_MEM_REG => vec![0, RAM, RAM, USER + RAM, 0],
            request::SET_VRING_ADDR => vec![0, USER, USER + 0x400, USER + 0x200, 0],
            request::SET_VRING_NUM => vec![ENTRIES << 32],
            request::SET_VRING_ENABLE => vec![1 << 32],
            _ => vec![0; length],
        };
        let wrong = usize::from(input.u8()?) % length;
        payload[wrong] ^= if input.u8()? & 1 == 0 { u64::from(input.u16()?) } else { input.u64()? };
        let fds = self.descriptors(input.u8()?);
        self.good(request, &words(&payload), &fds);
        Some(())
    }

    fn any_message(&mut self, input: &mut Input) -> Option<()> {
        let request = u32::from(input.u8()?) % (request::LAST + 2);
        let how = input.u8()?;
        let flags = if how & 1 == 0 { 1 | u32::from(how & 8) } else { input.u32()? };
        let length = usize::from(input.u8()? & 0x7f);
        let payload = input.bytes(length);
        let size = if how & 2 == 0 { payload.len() as u32 } else { input.u16()?.into() };
        let fds = if how & 0x80 == 0 { Vec::new() } else { self.descriptors(input.u8()?) };
        self.send(request, flags, size, payload, &fds);
        Some(())
    }

    /// None, one, or two descriptors.
    fn descriptors(&self, how: u8) -> Vec<RawFd> {
        let all = [
            self.ram.as_raw_fd(),
            self.kicks[0].as_raw_fd(),
            self.call.as_raw_fd(),
            self.short.as_raw_fd(),
            self.stream.as_raw_fd(),
        ];
        let which = [usize::from(how >> 2 & 7), usize::from(how >> 5 & 7)];
        which[..usize::from(how & 3).min(2)].iter().map(|at| all[at % all.len()]).collect()
    }
}

/// The addresses of a queue's descriptors, available ring and used ring.
fn rings(queue: usize) -> [u64; 3] {
    let base = 0x1000 * queue as u64;
    [base, base + 0x200, base + 0x400]
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

//! vfio-user messages of any kind and size, with descriptors of any kind, at the real socket of a function that
//! accesses any memory that it gets. Some of these accesses are messages, whose answers are of any kind too.
#![no_main]

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use viommu::dma::Dma;
use viommu::iommu::{EndpointSettings, Iommu, Settings};
use viommu::pci::{Bar, Function, FunctionContext, FunctionServer, Identity, Slot};
use viommu_fuzz::{HANG, Input, leave, memfd};
use viommu_trace::Tracer;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Commands, as the specification numbers them.
mod command {
    pub const VERSION: u16 = 1;
    pub const DMA_MAP: u16 = 2;
    pub const DMA_UNMAP: u16 = 3;
    pub const SET_IRQS: u16 = 8;
    pub const REGION_READ: u16 = 9;
    pub const REGION_WRITE: u16 = 10;
    /// The highest of all.
    pub const LAST: u16 = 18;
}

/// Bytes of guest memory, and the address at which most of it is mapped.
const RAM: u64 = 64 << 10;
const BASE: u64 = 0x1_0000;
const CONFIG: u32 = 7;

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let mut client = Client::connect();
    if let Some(how) = input.u8()
        && how & 1 == 0
    {
        client.set_up(how, &mut input);
    }
    while client.step(&mut input).is_some() {}
    drop(client.twin);
    leave(client.stream);
});

/// A function with a register for an address. Each write to another register makes an access there.
struct Accesses {
    dma: Dma,
    context: FunctionContext,
    address: u64,
}

impl Function for Accesses {
    fn identity(&self) -> Identity {
        Identity {
            vendor: 0x1b36,
            device: 0x1234,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
            class: 0x08_8000,
            revision: 1,
            bars: const { &[Bar::registers(0, 0x1000)] },
            capabilities: &[],
            vectors: 3,
            integrated: false,
        }
    }

    fn bar_read(&mut self, _bar: u8, offset: u64, data: &mut [u8]) {
        assert!(offset + data.len() as u64 <= 0x1000);
        data.fill(0x5a);
    }

    fn bar_write(&mut self, _bar: u8, offset: u64, data: &[u8]) {
        assert!(offset + data.len() as u64 <= 0x1000);
        let mut value = [0; 8];
        let len = data.len().min(8);
        value[..len].copy_from_slice(&data[..len]);
        let value = u64::from_le_bytes(value);
        let mut bytes = vec![0xa5; value as usize & 0x1fff];
        match offset {
            0 => self.address = value,
            8 => drop(self.dma.read(self.address, &mut bytes)),
            16 => drop(self.dma.write(self.address, &bytes)),
            _ => self.context.interrupts.trigger(value as u16),
        }
    }

    fn reset(&mut self) {
        self.address = 0;
    }
}

/// The socket of the function, which is served for all inputs: each client must find a function there.
fn socket() -> &'static PathBuf {
    static SOCKET: OnceLock<PathBuf> = OnceLock::new();
    SOCKET.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let endpoints = vec![EndpointSettings { id: 0x20, reserved: Vec::new() }];
        let iommu = Iommu::new(Settings { endpoints, ..Settings::default() }, Tracer::default());
        let server = FunctionServer::bind(&path).unwrap();
        std::thread::spawn(move || {
            let _folder = folder;
            let slot = Slot::new(&iommu, 0x20, Tracer::default());
            let make = |context: FunctionContext| -> Box<dyn Function> {
                Box::new(Accesses { dma: context.dma.open(), context, address: 0 })
            };
            server.serve(&slot, &EventFd::new(0).unwrap(), make, || {}).unwrap();
        });
        path
    })
}

struct Client {
    stream: UnixStream,
    /// The socket on which it gets requests for its memory.
    twin: Option<UnixStream>,
    ram: File,
    short: File,
    event: EventFd,
}

impl Client {
    fn connect() -> Self {
        let stream = UnixStream::connect(socket()).unwrap();
        stream.set_read_timeout(Some(HANG)).unwrap();
        stream.set_write_timeout(Some(HANG)).unwrap();
        let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        Client { stream, twin: None, ram: memfd(RAM), short: memfd(100), event }
    }

    /// Sends a message, unless the server has ended the connection.
    fn send(&self, command: u16, flags: u32, size: u32, payload: &[u8], fds: &[RawFd]) {
        let mut message = vec![1, 0];
        message.extend(command.to_le_bytes());
        message.extend([size, flags, 0].map(u32::to_le_bytes).concat());
        message.extend(payload);
        let _ = self.stream.send_with_fds(&[message.as_slice()], fds);
    }

    fn good(&self, command: u16, payload: &[u8], fds: &[RawFd]) {
        self.send(command, 0, 16 + payload.len() as u32, payload, fds);
    }

    fn set_up(&mut self, how: u8, input: &mut Input) {
        let twin = if how & 2 == 0 { "" } else { "\"twin_socket\":{\"supported\":true}," };
        let json = format!("{{\"capabilities\":{{{twin}\"max_data_xfer_size\":{}}}}}\0", 1 << (how >> 4));
        self.good(command::VERSION, &[&[0, 0, 1, 0], json.as_bytes()].concat(), &[]);
        let mut reply = [0; 16];
        // The fuzzer checks the time in a signal handler.
        let (_, fd) = loop {
            match self.stream.recv_with_fd(&mut reply) {
                Err(error) if error.errno() == libc::EINTR => {}
                received => break received.unwrap(),
            }
        };
        let size = u32::from_le_bytes(reply[4..8].try_into().unwrap());
        self.stream.read_exact(&mut vec![0; size as usize - 16]).unwrap();
        self.twin = fd.map(|fd| UnixStream::from(std::os::fd::OwnedFd::from(fd)));
        if let Some(twin) = &mut self.twin {
            // All of its answers. Then it closes its side, so that the server does not wait.
            let count = usize::from(input.u8().unwrap_or(0));
            let _ = twin.write_all(&answers(count, input));
            let _ = twin.shutdown(Shutdown::Write);
        }
        self.good(command::REGION_WRITE, &[access(CONFIG, 4, 2), vec![6, 0]].concat(), &[]);
        self.good(command::DMA_MAP, &dma_map(3, 0, BASE, RAM / 2), &[self.ram.as_raw_fd()]);
        self.good(command::DMA_MAP, &dma_map(3, 0, BASE + RAM / 2, RAM / 2), &[]);
        self.good(command::DMA_MAP, &dma_map(3 | 1 << 3, 0, BASE + RAM, RAM), &[self.ram.as_raw_fd()]);
    }

    fn step(&mut self, input: &mut Input) -> Option<()> {
        match input.u8()? % 8 {
            0 | 1 => self.any_message(input),
            2 => {
                // An access by the function.
                let at = BASE + u64::from(input.u16()?) * 4;
                self.write_register(0, at);
                self.write_register(8 + 8 * u64::from(input.u8()? & 1), input.u16()?.into());
                Some(())
            }
            _ => self.near_miss(input),
        }
    }

    fn write_register(&self, register: u64, value: u64) {
        self.good(command::REGION_WRITE, &[access(0, register, 8), value.to_le_bytes().to_vec()].concat(), &[]);
    }

    /// A message that is correct except for one word.
    fn near_miss(&mut self, input: &mut Input) -> Option<()> {
        let at = BASE + u64::from(input.u8()?) * 0x1000;
        let (command, mut payload) = match input.u8()? % 9 {
            0 => (command::DMA_MAP, dma_map(u32::from(input.u8()?), 0x1000, at, 0x1000)),
            1 => (command::DMA_UNMAP, dma_unmap(0, at, 0x1000)),
            2 => (command::DMA_UNMAP, dma_unmap(2, 0, 0)),
            3 => {
                let [kind, flags, start, count] = input.array()?;
                (command::SET_IRQS, words(&[20, flags.into(), u32::from(kind) % 6, start.into(), count.into()]))
            }
            4 => (command::REGION_READ, access(u32::from(input.u8()?) % 10, 0, input.u16()?.into())),
            5 => {
                let data = input.u8()?;
                let head = access(u32::from(data & 1) * CONFIG, u64::from(input.u8()?), u32::from(data & 0x1f));
                (command::REGION_WRITE, [&head, input.bytes(usize::from(data & 0x1f))].concat())
            }
            6 => (command::VERSION, [&[0, 0, 1, 0], input.bytes(40), &[0]].concat()),
            7 => {
                let one = [access(0, u64::from(input.u8()?), 8), vec![1; 8]].concat();
                (15, [&1_u64.to_le_bytes()[..], &one].concat())
            }
            _ => (u16::from(input.u8()?) % (command::LAST + 2), words(&[64, 0, 0, 0, 0, 0, 0, 0])),
        };
        let how = input.u8()?;
        if how & 1 != 0
            && let Some(word) = payload.chunks_exact_mut(4).nth(usize::from(how >> 4))
        {
            let wrong = if how & 2 == 0 { u32::from(input.u8()?) } else { input.u32()? };
            word.copy_from_slice(&wrong.to_le_bytes());
        }
        let fds = if how & 4 == 0 { Vec::new() } else { self.descriptors(input.u8()?) };
        self.good(command, &payload, &fds);
        Some(())
    }

    fn any_message(&mut self, input: &mut Input) -> Option<()> {
        let command = u16::from(input.u8()?) % (command::LAST + 2);
        let how = input.u8()?;
        let flags = if how & 1 == 0 { u32::from(how & 0x10) } else { input.u32()? };
        let length = usize::from(input.u8()? & 0x7f);
        let payload = input.bytes(length);
        let size = if how & 2 == 0 { 16 + payload.len() as u32 } else { input.u16()?.into() };
        let fds = if how & 0x80 == 0 { Vec::new() } else { self.descriptors(input.u8()?) };
        self.send(command, flags, size, payload, &fds);
        Some(())
    }

    /// None, one, a few, or more than there may be.
    fn descriptors(&self, how: u8) -> Vec<RawFd> {
        let all = [self.ram.as_raw_fd(), self.event.as_raw_fd(), self.short.as_raw_fd(), self.stream.as_raw_fd()];
        let fd = all[usize::from(how & 3)];
        vec![fd; [0, 1, 1, 1, 2, 3, 16, 17][usize::from(how >> 2 & 7)]]
    }
}

/// A client's answers to accesses: mostly correct except for a byte.
fn answers(count: usize, input: &mut Input) -> Vec<u8> {
    let mut bytes = Vec::new();
    for id in 0..count as u16 % 8 {
        let Some([how, command, len, wrong]) = input.array() else { break };
        let len = usize::from(len);
        let mut answer = id.to_le_bytes().to_vec();
        answer.extend(u16::from(11 + (command & 1)).to_le_bytes());
        let data = if command & 1 == 0 { len } else { 0 };
        answer.extend(words(&[32 + data as u32, 1, 0]));
        answer.extend((BASE + RAM / 2 + u64::from(how & 0xf8)).to_le_bytes());
        answer.extend((len as u64).to_le_bytes());
        answer.resize(32 + data, wrong);
        if how & 1 != 0 {
            let at = usize::from(wrong) % answer.len();
            answer[at] ^= how;
        }
        bytes.extend(answer);
    }
    bytes
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn dma_map(flags: u32, offset: u64, address: u64, size: u64) -> Vec<u8> {
    [words(&[32, flags]), [offset, address, size].map(u64::to_le_bytes).concat()].concat()
}

fn dma_unmap(flags: u32, address: u64, size: u64) -> Vec<u8> {
    [words(&[24, flags]), [address, size].map(u64::to_le_bytes).concat()].concat()
}

fn access(region: u32, offset: u64, count: u32) -> Vec<u8> {
    [&offset.to_le_bytes()[..], &region.to_le_bytes(), &count.to_le_bytes()].concat()
}

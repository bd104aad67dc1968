//! The driver of the NVMe controller.

use vfio_user::Client;

use super::{Load, Moves, Run, Seen, Step, set_bus_master};
use viommu_testkit::memfd;
use viommu_testkit::nvme::{self, Done, Driver, PAGE, Sqe, io, pattern};

pub const DRIVER: super::Driver = super::Driver {
    model: "nvme",
    load: |client| Box::new(Blocks { driver: driver(client), data: 0, round: 0 }),
    run: |client| {
        let mut run = AnyCommands { driver: driver(client), data: 0 };
        run.enable();
        Box::new(run)
    },
};

fn driver(client: Client) -> Driver {
    Driver::new(client, memfd(nvme::RAM), PAGE)
}

/// Writes blocks and reads them back.
struct Blocks {
    driver: Driver,
    /// The data's address in guest memory.
    data: u64,
    round: u64,
}

const COMMANDS: u64 = 8;
const WRITE: u8 = 1;
const READ: u8 = 2;

impl Blocks {
    fn submit_all(&mut self, opcode: u8) {
        for n in 0..COMMANDS {
            self.driver.put(1, io(opcode, n * 8, 8, [self.data + n * PAGE, 0]));
        }
        self.driver.ring(1);
    }

    fn wait_for_all(&mut self) {
        for _ in 0..COMMANDS {
            assert_eq!(self.driver.wait(1).status, 0);
        }
    }
}

impl Load for Blocks {
    fn begin(&mut self) {
        set_bus_master(&mut self.driver.client, true);
        self.driver.free = PAGE;
        self.driver.enable();
        // Fewer completions than commands, so that the queue gets full.
        self.driver.create_pair(1, 32, 4);
        self.data = self.driver.pages(COMMANDS);
    }

    fn submit(&mut self) {
        self.round += 1;
        self.driver.write_ram(self.data, &pattern((COMMANDS * PAGE) as usize, self.round));
        self.submit_all(WRITE);
    }

    fn finish(&mut self) {
        self.wait_for_all();
        self.driver.write_ram(self.data, &vec![0; (COMMANDS * PAGE) as usize]);
        self.submit_all(READ);
        self.wait_for_all();
        let data = self.driver.read_ram(self.data, (COMMANDS * PAGE) as usize);
        assert_eq!(data, pattern(data.len(), self.round), "round {}", self.round);
    }

    fn client(&mut self) -> &mut Client {
        &mut self.driver.client
    }
}

/// Commands on two queue pairs. The second has room for only three completions.
struct AnyCommands {
    driver: Driver,
    data: u64,
}

impl AnyCommands {
    fn enable(&mut self) {
        self.driver.free = PAGE;
        self.driver.enable();
        self.driver.create_pair(1, 64, 64);
        self.driver.create_pair(2, 64, 4);
        self.data = self.driver.pages(16);
    }

    /// Gives a queue these commands at once, and waits for all of them.
    fn commands(&mut self, step: &Step, moves: &Moves<'_>, queue: u16, commands: &[Sqe]) -> Vec<Done> {
        for sqe in commands {
            self.driver.put(queue, *sqe);
        }
        self.driver.ring(queue);
        moves.at(step, 1);
        commands.iter().map(|_| self.driver.wait(queue)).collect()
    }
}

impl Run for AnyCommands {
    fn step(&mut self, step: &Step, moves: &Moves<'_>) -> Seen {
        let value = u32::from(step.value);
        let (lba, blocks) = (u64::from(value % 100), value % 16 + 1);
        let data = self.data;
        let page = |n: u64| [data + n * PAGE, 0];
        let error_log = Sqe { opcode: 2, data: page(3), cdw10: 255 << 16 | 1, ..Sqe::default() };
        let (queue, commands) = match step.what % 13 {
            0 => {
                self.driver.write_ram(self.data, &pattern(PAGE as usize, value.into()));
                (1, vec![io(WRITE, lba, blocks.min(8), page(0))])
            }
            1 => (2, vec![io(READ, lba, blocks.min(8), page(1))]),
            // Some are past the end of the disk, some have an unknown opcode.
            2 => (2, (0..12).map(|n| io(if n == 5 { 0x33 } else { READ }, lba << (n % 3 * 12), 8, page(n))).collect()),
            3 => (1, (0..40).map(|n| io(if n % 2 == 0 { READ } else { 0 }, lba + n, 1, page(n % 16))).collect()),
            4 => {
                let cdw10 = [1, 4, 5, 6, 8, 9, 10][value as usize % 7];
                (0, vec![Sqe { opcode: 9, cdw10, cdw11: value, ..Sqe::default() }])
            }
            5 => (0, vec![Sqe { opcode: 10, cdw10: value % 12, ..Sqe::default() }]),
            6 => (0, vec![Sqe { opcode: 6, nsid: 1, data: page(2), cdw10: value % 4, ..Sqe::default() }]),
            7 => (0, vec![error_log]),
            // An asynchronous event request, which a wrong doorbell completes. Its log page must be read afterwards.
            8 => {
                self.driver.put(0, Sqe { opcode: 12, ..Sqe::default() });
                self.driver.ring(0);
                moves.at(step, 1);
                self.driver.write32(0x1000 + 8 * 9, value);
                let event = self.driver.wait(0);
                let read = self.commands(step, moves, 0, &[error_log]);
                return seen([event].into_iter().chain(read), Vec::new());
            }
            9 => {
                let (doorbells, events) = (self.driver.pages(1), self.driver.pages(1));
                let config = Sqe { opcode: 0x7c, data: [doorbells, events], ..Sqe::default() };
                let done = self.commands(step, moves, 0, &[config]);
                self.driver.shadow = Some((doorbells, events));
                return seen(done, Vec::new());
            }
            10 => {
                let deleted = [self.driver.delete_sq(2), self.driver.delete_cq(2)];
                moves.at(step, 1);
                self.driver.create_pair(2, 64, 4);
                return Seen(deleted.map(u64::from).to_vec(), Vec::new());
            }
            11 => {
                self.driver.write32(if value % 2 == 0 { 0x0c } else { 0x10 }, value);
                moves.at(step, 1);
                let registers = [0x00, 0x08, 0x0c, 0x14, 0x1c, 0x24].map(|at| self.driver.read32(at).into());
                return Seen(registers.to_vec(), Vec::new());
            }
            _ => {
                self.driver.disable();
                moves.at(step, 1);
                self.enable();
                return Seen(Vec::new(), Vec::new());
            }
        };
        let done = self.commands(step, moves, queue, &commands);
        seen(done, self.driver.read_ram(self.data, 16 * PAGE as usize))
    }
}

/// The completions, without anything that depends on how the controller was scheduled, and the data.
fn seen(done: impl IntoIterator<Item = Done>, data: Vec<u8>) -> Seen {
    let numbers = |done: Done| [done.cid.into(), done.status.into(), done.result.into(), done.sq_id.into()];
    Seen(done.into_iter().flat_map(numbers).collect(), data)
}

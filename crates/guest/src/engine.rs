//! Keeps a number of I/Os in flight with io_uring, and measures their times.

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use io_uring::{IoUring, opcode, types};

use crate::blockdev::Device;
use crate::buffers::Buffers;

/// Which way the data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the device to memory.
    Read,
    /// From memory to the device.
    Write,
}

/// What a stream of I/Os does besides moving data.
pub trait Stream {
    /// Prepares the next I/O in a free buffer. Returns its byte offset on the device, or `None` if there is no more.
    fn next(&mut self, buffer: &mut [u8]) -> Option<u64>;

    /// Handles an I/O that has succeeded.
    ///
    /// # Errors
    /// If its data is wrong; no new I/O starts then.
    fn done(&mut self, offset: u64, buffer: &[u8]) -> Result<()>;
}

/// The result of a stream.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Bytes that were moved.
    pub bytes: u64,
    /// From the first submission to the last completion.
    pub elapsed: Duration,
    /// The time of each I/O from submission to completion, in nanoseconds, in order of completion.
    pub latencies: Vec<u64>,
}

impl Outcome {
    /// The latency in nanoseconds that `fraction` of the I/Os did not exceed; 0 if there were none.
    pub fn percentile(&mut self, fraction: f64) -> u64 {
        self.latencies.sort_unstable();
        let at = (self.latencies.len() as f64 * fraction).ceil() as usize;
        self.latencies.get(at.saturating_sub(1)).copied().unwrap_or(0)
    }
}

#[derive(Clone, Copy)]
struct Flight {
    offset: u64,
    start: Instant,
}

/// Runs a stream with as many I/Os in flight as there are buffers, each of the buffers' size.
///
/// # Errors
/// The first I/O that failed or was cut short, or the stream's own error. All I/O has ended when this returns.
pub fn run(device: &Device, direction: Direction, buffers: &mut Buffers, stream: &mut impl Stream) -> Result<Outcome> {
    let mut ring = IoUring::new(buffers.count().next_power_of_two() as u32)
        .context("The guest's kernel has no io_uring (kernel.io_uring_disabled?)")?;
    let mut flights: Vec<Option<Flight>> = vec![None; buffers.count()];
    let mut outcome = Outcome::default();
    let mut failure = None;
    let mut free: Vec<usize> = (0..buffers.count()).rev().collect();
    let begin = Instant::now();
    loop {
        while failure.is_none() {
            let Some(slot) = free.pop() else { break };
            // SAFETY: a slot in `free` has no I/O in flight.
            let contents = unsafe { buffers.contents(slot) };
            let Some(offset) = stream.next(contents) else {
                free.push(slot);
                break;
            };
            flights[slot] = Some(Flight { offset, start: Instant::now() });
            submit(&mut ring, device, direction, slot, offset, contents)?;
        }
        if flights.iter().all(Option::is_none) {
            break;
        }
        ring.submit_and_wait(1).context("io_uring_enter failed")?;
        for completion in ring.completion() {
            let slot = completion.user_data() as usize;
            let Some(flight) = flights[slot].take() else { bail!("io_uring completed an I/O that was not submitted") };
            free.push(slot);
            outcome.latencies.push(flight.start.elapsed().as_nanos() as u64);
            // SAFETY: the slot's I/O has just ended.
            let contents = unsafe { buffers.contents(slot) };
            outcome.bytes += contents.len() as u64;
            if let Err(error) = judge(completion.result(), direction, flight.offset, contents, stream) {
                failure.get_or_insert(error);
            }
        }
    }
    outcome.elapsed = begin.elapsed();
    failure.map_or(Ok(outcome), Err)
}

/// Reads these blocks (units of the buffers' size) at once, each into a buffer of its own, and returns the result of
/// each. All I/O has ended when this returns.
///
/// # Errors
/// io_uring's.
pub fn read_at_once(
    ring: &mut IoUring,
    device: &Device,
    buffers: &mut Buffers,
    blocks: impl Iterator<Item = u64>,
) -> Result<Vec<std::io::Result<()>>> {
    let mut lengths = Vec::new();
    for (slot, block) in blocks.take(buffers.count()).enumerate() {
        // SAFETY: no I/O is in flight on any buffer, and each is taken once.
        let contents = unsafe { buffers.contents(slot) };
        lengths.push(contents.len());
        submit(ring, device, Direction::Read, slot, block * contents.len() as u64, contents)?;
    }
    ring.submit_and_wait(lengths.len()).context("io_uring_enter failed")?;
    let mut results: Vec<_> = lengths.iter().map(|_| Ok(())).collect();
    for completion in ring.completion() {
        let slot = completion.user_data() as usize;
        results[slot] = match completion.result() {
            error if error < 0 => Err(std::io::Error::from_raw_os_error(-error)),
            moved if moved as usize == lengths[slot] => Ok(()),
            moved => Err(std::io::Error::other(format!("{moved} bytes of {}", lengths[slot]))),
        };
    }
    Ok(results)
}

fn submit(
    ring: &mut IoUring,
    device: &Device,
    direction: Direction,
    slot: usize,
    offset: u64,
    contents: &mut [u8],
) -> Result<()> {
    let file = types::Fd(device.file.as_raw_fd());
    let length = contents.len() as u32;
    let entry = match direction {
        Direction::Read => opcode::Read::new(file, contents.as_mut_ptr(), length).offset(offset).build(),
        Direction::Write => opcode::Write::new(file, contents.as_ptr(), length).offset(offset).build(),
    };
    // SAFETY: the buffer stays mapped until `run` returns, which waits for every I/O, and is not touched while its
    // slot is in flight; the file is open as long as `device` lives.
    unsafe { ring.submission().push(&entry.user_data(slot as u64)) }.context("io_uring's queue is full")
}

fn judge(result: i32, direction: Direction, offset: u64, contents: &[u8], stream: &mut impl Stream) -> Result<()> {
    if result < 0 {
        let error = std::io::Error::from_raw_os_error(-result);
        return Err(error).with_context(|| format!("{direction:?} of {} bytes at {offset} failed", contents.len()));
    }
    if result as usize != contents.len() {
        bail!("{direction:?} of {} bytes at {offset} moved {result}", contents.len());
    }
    stream.done(offset, contents)
}

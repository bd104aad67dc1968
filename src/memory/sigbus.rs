//! What happens when a page of guest memory cannot be had: its file was cut short, its file system is full, no huge page
//! is left. The kernel says so with SIGBUS in the midst of an access, which would end the process.
//!
//! The handler here maps fresh memory over the page, so that the access can go on, and notes the page as bad. Who made the
//! access looks at that afterwards, and fails; so does every later access to the page, since the fresh memory is not the
//! guest's. A SIGBUS anywhere else ends the process as before.
//!
//! # What the handler may do
//!
//! It may interrupt any thread at any instruction that touches guest memory, so it takes no lock and allocates nothing.
//! It walks a list whose entries are never freed, loads and stores atomics, and makes system calls: mmap(2), which in the
//! C library is nothing but the call, and sigaction(2) and raise(3), which POSIX allows. It leaves `errno` as it was.
//!
//! # Why an entry is the right one
//!
//! An entry is set up before anybody can access the mapping, and taken back after the last access, before the mapping
//! goes. So while a thread is in an access the entry for it stays as it is. Other entries may change at the same time: an
//! entry's end is stored last when it is set up and cleared first when it is taken back, and the handler takes an entry
//! only if its end is the same before and after it loaded the rest.

use crate::sync::lock;
use std::cell::UnsafeCell;
use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering, fence};
use std::sync::{Mutex, Once};

/// How many blocks of a mapping are told apart; with more, none of it is trusted.
const BLOCKS: usize = 24;

/// A mapping of guest memory, to the handler.
#[derive(Default)]
struct Entry {
    start: AtomicUsize,
    /// 0: the entry stands for nothing.
    end: AtomicUsize,
    /// Bytes that are mapped over together: the file's block, which for huge pages is the page.
    block: AtomicUsize,
    /// Blocks that could not be had.
    lost: AtomicUsize,
    /// Where the first of them begin; 0 for one that is being noted.
    blocks: [AtomicUsize; BLOCKS],
    told: AtomicBool,
    next: AtomicPtr<Entry>,
}

/// The list that the handler walks. Entries are added at its head and never removed.
static HEAD: AtomicPtr<Entry> = AtomicPtr::new(ptr::null_mut());
/// Entries of the list that stand for nothing now.
static FREE: Mutex<Vec<&'static Entry>> = Mutex::new(Vec::new());
/// Whether any page could not be had since the process began: while there was none, nobody needs to look further.
static ANY: AtomicBool = AtomicBool::new(false);
/// What was done on SIGBUS before.
static PREVIOUS: Previous = Previous(UnsafeCell::new(MaybeUninit::zeroed()));
static INSTALLED: Once = Once::new();

struct Previous(UnsafeCell<MaybeUninit<libc::sigaction>>);

// SAFETY: it is written once, before the handler that reads it is installed.
unsafe impl Sync for Previous {}

/// Whether any page could not be had since the process began; counts for all accesses that this thread made before.
#[inline]
pub fn any() -> bool {
    // The accesses come before the mark is looked at: the handler sets it before it maps anything over.
    fence(Ordering::SeqCst);
    ANY.load(Ordering::Acquire)
}

/// A mapping that the handler watches over, for as long as this lives; it must go before the mapping does.
pub struct Watch(&'static Entry);

impl Watch {
    /// Watches over `len` bytes at `start`, a mapping of a file of which `block` bytes at a time are mapped over.
    pub fn new(start: usize, len: usize, block: usize) -> Watch {
        INSTALLED.call_once(|| {
            if let Err(error) = install() {
                log::warn!("Guest memory that cannot be had will end this process: no handler for SIGBUS: {error}");
            }
        });
        let free = lock(&FREE).pop();
        let entry = free.unwrap_or_else(|| {
            let entry: &'static Entry = Box::leak(Box::default());
            let push = |head| {
                entry.next.store(head, Ordering::Release);
                Some(ptr::from_ref(entry).cast_mut())
            };
            // Never an error, since `push` always has a new head.
            let _ = HEAD.fetch_update(Ordering::AcqRel, Ordering::Acquire, push);
            entry
        });
        entry.lost.store(0, Ordering::SeqCst);
        entry.blocks.iter().for_each(|block| block.store(0, Ordering::SeqCst));
        entry.told.store(false, Ordering::SeqCst);
        entry.start.store(start, Ordering::SeqCst);
        entry.block.store(block.max(PAGE), Ordering::SeqCst);
        entry.end.store(start + len.next_multiple_of(PAGE), Ordering::SeqCst);
        Watch(entry)
    }

    /// Whether a page of it could not be had. Counts for all accesses that this thread made before.
    #[inline]
    pub fn is_bad(&self) -> bool {
        any() && self.0.lost.load(Ordering::Acquire) > 0
    }

    /// The same for the pages of `len` bytes from an address on.
    #[inline]
    pub fn is_bad_at(&self, at: usize, len: usize) -> bool {
        self.is_bad() && self.0.has_lost(at, len)
    }

    /// Whether this is the first call of somebody who is to say that it is bad.
    pub fn is_to_be_told(&self) -> bool {
        !self.0.told.swap(true, Ordering::AcqRel)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.end.store(0, Ordering::SeqCst);
        lock(&FREE).push(self.0);
    }
}

/// The unit in which anything is mapped.
pub const PAGE: usize = 4096;

impl Entry {
    /// Start, end and block, if the entry stands for a mapping that has `address`.
    fn holds(&self, address: usize) -> Option<(usize, usize, usize)> {
        let end = self.end.load(Ordering::SeqCst);
        let (start, block) = (self.start.load(Ordering::SeqCst), self.block.load(Ordering::SeqCst));
        let same = self.end.load(Ordering::SeqCst) == end;
        (same && (start..end).contains(&address)).then_some((start, end, block))
    }

    /// Whether one of these bytes is in a block that could not be had.
    fn has_lost(&self, at: usize, len: usize) -> bool {
        let (lost, block) = (self.lost.load(Ordering::SeqCst), self.block.load(Ordering::SeqCst));
        let touches = |begin: usize| begin == 0 || begin < at.saturating_add(len) && at < begin.saturating_add(block);
        lost > BLOCKS || self.blocks.iter().take(lost).any(|begin| touches(begin.load(Ordering::SeqCst)))
    }

    /// Marks the block with `address`, and puts fresh memory in its place. Whether that could be done.
    fn replace(&self, address: usize) -> bool {
        let Some((start, end, block)) = self.holds(address) else { return false };
        let at = start + (address - start) / block * block;
        // All before the fresh memory is there to be seen.
        if let Some(noted) = self.blocks.get(self.lost.fetch_add(1, Ordering::SeqCst)) {
            noted.store(at, Ordering::SeqCst);
        }
        ANY.store(true, Ordering::SeqCst);
        let len = block.min(end - at);
        let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: the range lies inside of a mapping of guest memory, which nothing but volatile accesses and system calls
        // touch, and which stays until the access that led here is over.
        let mapped = unsafe {
            libc::mmap(ptr::with_exposed_provenance_mut(at), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        mapped != libc::MAP_FAILED
    }
}

fn install() -> io::Result<()> {
    let refused = |code| if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    // SAFETY: first the old action is stored, which nobody reads yet, then the new one is installed, whose handler is one
    // for SA_SIGINFO.
    unsafe {
        refused(libc::sigaction(libc::SIGBUS, ptr::null(), PREVIOUS.0.get().cast()))?;
        let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = on_sigbus as *const () as usize;
        // On the stack that the runtime gives each thread for a stack overflow, as its own handler runs.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        refused(libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()))
    }
}

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a handler for SA_SIGINFO what it says, and each thread has its `errno`.
    let (code, address, errno) =
        unsafe { ((*info).si_code, (*info).si_addr().expose_provenance(), *libc::__errno_location()) };
    // Not positive: sent by a process, and the address says nothing.
    if code <= 0 || !replace(address) {
        // SAFETY: what the kernel gave us goes to who was there before.
        unsafe { pass_on(code, signal, info, context) };
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Whether `address` was in guest memory and could be replaced.
fn replace(address: usize) -> bool {
    let mut at = HEAD.load(Ordering::Acquire);
    // SAFETY: entries are never freed.
    while let Some(entry) = unsafe { at.as_ref() } {
        if entry.replace(address) {
            return true;
        }
        at = entry.next.load(Ordering::Acquire);
    }
    false
}

/// Does what would have been done without this handler.
///
/// # Safety
/// The arguments are those of a handler for SA_SIGINFO.
unsafe fn pass_on(code: libc::c_int, signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    type Full = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
    // SAFETY: written before the handler was installed, and never again.
    let previous = unsafe { (*PREVIOUS.0.get()).assume_init() };
    let handler = previous.sa_sigaction;
    if code > 0 && handler != libc::SIG_DFL && handler != libc::SIG_IGN && previous.sa_flags & libc::SA_SIGINFO != 0 {
        // The runtime's, which tells a stack overflow from others.
        // SAFETY: an action with this flag has such a handler.
        let handler: Full = unsafe { std::mem::transmute::<usize, Full>(handler) };
        return handler(signal, info, context);
    }
    // SAFETY: plain system calls. What the instruction did is done again when the handler returns, and ends the process
    // this time; a signal that was sent is sent again, and comes when the handler has returned.
    unsafe {
        let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = libc::SIG_DFL;
        libc::sigaction(signal, &action, ptr::null_mut());
        if code <= 0 {
            libc::raise(signal);
        }
    }
}

//! Handles pages of guest memory that are not available: the file was truncated, the file system is full, or no huge
//! page is left. The kernel reports this with SIGBUS in the middle of an access, which would end the process.
//!
//! The handler here maps fresh memory over the page, so that the access can go on, and marks the page as bad. The code
//! that made the access checks the mark afterwards and fails. Every later access to the page fails too, since the fresh
//! memory is not the guest's. A SIGBUS anywhere else ends the process as before.
//!
//! # What the handler may do
//!
//! It may interrupt any thread at any instruction that accesses guest memory, so it takes no lock and allocates
//! nothing. It walks a list whose entries are never freed, loads and stores atomics, and makes system calls: mmap(2),
//! which the C library passes straight to the kernel, and sigaction(2) and raise(3), which POSIX allows. It preserves
//! `errno`.
//!
//! # Why an entry is the right one
//!
//! An entry is set up before anybody can access the mapping. It is taken back after the last access and before the
//! mapping is removed. So it does not change while a thread is in an access to its mapping. Other entries may change at
//! the same time. An entry's end is stored last when it is set up and cleared first when it is taken back, and the
//! handler uses an entry only if its end was the same before and after the handler loaded the rest.

use crate::sync::lock;
use std::cell::UnsafeCell;
use std::io;
use std::mem::MaybeUninit;
use std::num::NonZeroUsize;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering, fence};
use std::sync::{Mutex, Once};

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};

/// The most lost blocks of a mapping that are recorded one by one. With more of them, nothing in the mapping is
/// trusted.
const BLOCKS: usize = 24;

/// A mapping of guest memory, as the handler sees it.
#[derive(Default)]
struct Entry {
    start: AtomicUsize,
    /// 0 if the entry is unused.
    end: AtomicUsize,
    /// Bytes that are replaced together: the file's block, which for huge pages is the page.
    block: AtomicUsize,
    /// The number of lost blocks.
    lost: AtomicUsize,
    /// Where the first of them begin; 0 for one that is being recorded.
    blocks: [AtomicUsize; BLOCKS],
    reported: AtomicBool,
    next: AtomicPtr<Entry>,
}

/// The list that the handler walks. Entries are added at its head and never removed.
static HEAD: AtomicPtr<Entry> = AtomicPtr::new(ptr::null_mut());
/// Unused entries of the list.
static FREE: Mutex<Vec<&'static Entry>> = Mutex::new(Vec::new());
/// Whether any page was lost since the process began. While there was none, nobody needs to check further.
static ANY: AtomicBool = AtomicBool::new(false);
/// The previous action for SIGBUS.
static PREVIOUS: Previous = Previous(UnsafeCell::new(MaybeUninit::zeroed()));
static INSTALLED: Once = Once::new();

struct Previous(UnsafeCell<MaybeUninit<libc::sigaction>>);

// SAFETY: it is written once, before the handler that reads it is installed.
unsafe impl Sync for Previous {}

/// Whether any page was lost since the process began. The answer covers all accesses that this thread made before.
#[inline]
pub fn any() -> bool {
    // The accesses come before the mark is loaded. The handler sets the mark before it maps anything over a page.
    fence(Ordering::SeqCst);
    ANY.load(Ordering::Acquire)
}

/// Makes the handler watch over a mapping for as long as this lives. It must be dropped before the mapping is removed.
pub struct Watch(&'static Entry);

impl Watch {
    /// Watches over `len` bytes at `start`, which are a mapping of a file. `block` bytes at a time are replaced.
    pub fn new(start: usize, len: usize, block: usize) -> Watch {
        INSTALLED.call_once(|| {
            if let Err(error) = install() {
                log::warn!("Guest memory that is not available will end this process: no handler for SIGBUS: {error}");
            }
        });
        let free = lock(&FREE).pop();
        let entry = free.unwrap_or_else(|| {
            let entry: &'static Entry = Box::leak(Box::default());
            let push = |head| {
                entry.next.store(head, Ordering::Release);
                Some(ptr::from_ref(entry).cast_mut())
            };
            // Never an error, since `push` always returns a new head.
            let _ = HEAD.fetch_update(Ordering::AcqRel, Ordering::Acquire, push);
            entry
        });
        entry.lost.store(0, Ordering::SeqCst);
        entry.blocks.iter().for_each(|block| block.store(0, Ordering::SeqCst));
        entry.reported.store(false, Ordering::SeqCst);
        entry.start.store(start, Ordering::SeqCst);
        entry.block.store(block.max(PAGE), Ordering::SeqCst);
        entry.end.store(start + len.next_multiple_of(PAGE), Ordering::SeqCst);
        Watch(entry)
    }

    /// Whether a page of the mapping was lost. The answer covers all accesses that this thread made before.
    #[inline]
    pub fn is_bad(&self) -> bool {
        any() && self.0.lost.load(Ordering::Acquire) > 0
    }

    /// The same for the pages of `len` bytes from an address on.
    #[inline]
    pub fn is_bad_at(&self, at: usize, len: usize) -> bool {
        self.is_bad() && self.0.has_lost(at, len)
    }

    /// Whether this is the first call. The caller then reports that the mapping is bad.
    pub fn is_first_report(&self) -> bool {
        !self.0.reported.swap(true, Ordering::AcqRel)
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
    /// Start, end and block, if the entry is for a mapping that has `address`.
    fn holds(&self, address: usize) -> Option<(usize, usize, usize)> {
        let end = self.end.load(Ordering::SeqCst);
        let (start, block) = (self.start.load(Ordering::SeqCst), self.block.load(Ordering::SeqCst));
        let same = self.end.load(Ordering::SeqCst) == end;
        (same && (start..end).contains(&address)).then_some((start, end, block))
    }

    /// Whether one of these bytes is in a lost block.
    fn has_lost(&self, at: usize, len: usize) -> bool {
        let (lost, block) = (self.lost.load(Ordering::SeqCst), self.block.load(Ordering::SeqCst));
        let touches = |begin: usize| begin == 0 || begin < at.saturating_add(len) && at < begin.saturating_add(block);
        lost > BLOCKS || self.blocks.iter().take(lost).any(|begin| touches(begin.load(Ordering::SeqCst)))
    }

    /// Marks the block that has `address` and puts fresh memory in its place. Returns whether that worked.
    fn replace(&self, address: usize) -> bool {
        let Some((start, end, block)) = self.holds(address) else { return false };
        let at = start + (address - start) / block * block;
        // All marks are set before anybody can see the fresh memory.
        if let Some(noted) = self.blocks.get(self.lost.fetch_add(1, Ordering::SeqCst)) {
            noted.store(at, Ordering::SeqCst);
        }
        ANY.store(true, Ordering::SeqCst);
        let len = block.min(end - at);
        let (Some(at), Some(len)) = (NonZeroUsize::new(at), NonZeroUsize::new(len)) else { return false };
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_FIXED | MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: the range lies inside a mapping of guest memory, which only volatile accesses and system calls touch,
        // and which stays until the access that led here has ended.
        unsafe { mmap_anonymous(Some(at), len, prot, flags) }.is_ok()
    }
}

fn install() -> io::Result<()> {
    let refused = |code| if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    // SAFETY: first the old action is stored, which nobody reads yet. Then the new one is installed, whose handler has
    // the form for SA_SIGINFO.
    unsafe {
        refused(libc::sigaction(libc::SIGBUS, ptr::null(), PREVIOUS.0.get().cast()))?;
        let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = on_sigbus as *const () as usize;
        // The handler runs on the stack that the runtime gives each thread for stack overflows, as the runtime's own
        // does.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        refused(libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()))
    }
}

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes these arguments to a handler for SA_SIGINFO, and each thread has its own `errno`.
    let (code, address, errno) =
        unsafe { ((*info).si_code, (*info).si_addr().expose_provenance(), *libc::__errno_location()) };
    // If the code is not positive, a process sent the signal, and the address is meaningless.
    if code <= 0 || !replace(address) {
        // SAFETY: the arguments are those that the kernel passed to this handler.
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

/// Does what would have happened without this handler.
///
/// # Safety
/// The arguments are those of a handler for SA_SIGINFO.
unsafe fn pass_on(code: libc::c_int, signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    type Full = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
    // SAFETY: written before the handler was installed, and never again.
    let previous = unsafe { (*PREVIOUS.0.get()).assume_init() };
    let handler = previous.sa_sigaction;
    if code > 0 && handler != libc::SIG_DFL && handler != libc::SIG_IGN && previous.sa_flags & libc::SA_SIGINFO != 0 {
        // This is the runtime's handler, which recognises stack overflows.
        // SAFETY: an action with this flag has such a handler.
        let handler: Full = unsafe { std::mem::transmute::<usize, Full>(handler) };
        return handler(signal, info, context);
    }
    // SAFETY: plain system calls. When the handler returns, the instruction is executed again and ends the process this
    // time. A signal that a process sent is sent again and arrives when the handler has returned.
    unsafe {
        let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = libc::SIG_DFL;
        libc::sigaction(signal, &action, ptr::null_mut());
        if code <= 0 {
            libc::raise(signal);
        }
    }
}

//! Filtering system calls, with seccomp: two lists say which calls are made, and all others are refused.
//!
//! A refused call fails with EPERM, as any call may. Ending the process would be stricter. But then a future C library
//! that makes another call would take a guest down with it.

use std::collections::BTreeMap;

use libc::{c_int, c_long};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter_all_threads,
};

use super::Policy;

/// Why the filter is not in effect.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot make the filter: {0}")]
    Filter(#[from] seccompiler::BackendError),
    #[error("cannot install the filter: {0} (CONFIG_SECCOMP_FILTER)")]
    Install(#[from] seccompiler::Error),
}

/// Calls that are allowed with any arguments. None of them opens a file, so they can reach only files that are open.
const ANY: &[c_long] = &[
    // For open images, sockets and events.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    // An image is unlocked when it is closed, and a refusal would panic.
    libc::SYS_flock,
    libc::SYS_dup,
    libc::SYS_close,
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_socketpair,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_eventfd2,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_ppoll,
    // For removing the files of sockets at the end.
    libc::SYS_unlinkat,
    // For memory, the guest's and the process's own.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    // For threads and time.
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getcpu,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_setpriority,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    libc::SYS_restart_syscall,
    // For signals, and for children that have ended.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_wait4,
    libc::SYS_waitid,
    // For what a library asks about the machine.
    libc::SYS_getrandom,
    libc::SYS_getcwd,
    libc::SYS_getrusage,
    libc::SYS_sysinfo,
    libc::SYS_uname,
];

/// The older forms of calls, which the C library still uses where they exist.
#[cfg(target_arch = "x86_64")]
const OLDER: &[c_long] = &[
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_poll,
    libc::SYS_epoll_wait,
    libc::SYS_unlink,
    libc::SYS_time,
    libc::SYS_getrlimit,
];
#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[c_long] = &[];

/// Requests of fcntl(2): copies of descriptors, and flags. None of them causes a signal.
const FCNTL: [c_int; 6] =
    [libc::F_DUPFD_CLOEXEC, libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_SETFL, libc::F_GET_SEALS];

/// Refuses all system calls of this process but those above.
pub fn restrict(policy: &Policy) -> Result<(), Error> {
    let no_clone3 = filter(
        [(libc::SYS_clone3, Vec::new())].into(),
        SeccompAction::Allow,
        // As on a kernel without clone3: the C library then uses clone(2), whose flags a filter can see.
        SeccompAction::Errno(libc::ENOSYS as u32),
    )?;
    let only_these = filter(calls(policy)?, SeccompAction::Errno(libc::EPERM as u32), SeccompAction::Allow)?;
    apply_filter_all_threads(&no_clone3)?;
    apply_filter_all_threads(&only_these)?;
    Ok(())
}

/// Calls, each with rules for its arguments. One of the rules must hold, and without rules any arguments are allowed.
type Calls = BTreeMap<c_long, Vec<SeccompRule>>;

fn filter(calls: Calls, otherwise: SeccompAction, then: SeccompAction) -> Result<BpfProgram, Error> {
    let filter = SeccompFilter::new(calls, otherwise, then, std::env::consts::ARCH.try_into()?)?;
    Ok(filter.try_into()?)
}

fn calls(policy: &Policy) -> Result<Calls, Error> {
    let mut calls: Calls = ANY.iter().chain(OLDER).map(|call| (*call, Vec::new())).collect();
    // The other filter decides about this one.
    calls.insert(libc::SYS_clone3, Vec::new());
    // Threads, but no processes.
    calls.insert(libc::SYS_clone, vec![rule(&[has(0, libc::CLONE_THREAD)?])?]);
    // No memory may be made executable.
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        calls.insert(call, vec![rule(&[has_not(2, libc::PROT_EXEC)?])?]);
    }
    calls.insert(libc::SYS_fcntl, FCNTL.iter().map(|request| rule(&[is(1, *request)?])).collect::<Result<_, _>>()?);
    calls.insert(libc::SYS_ioctl, vec![rule(&[is(1, libc::FIONBIO as c_int)?])?]);
    // For the names of threads.
    calls.insert(libc::SYS_prctl, vec![rule(&[is(0, libc::PR_SET_NAME)?])?]);
    // The process reads its own limits, and sets none.
    calls.insert(libc::SYS_prlimit64, vec![rule(&[is(0, 0)?, is_null(2)?])?]);
    // An abort is a signal to the process itself.
    let this = std::process::id() as c_int;
    calls.insert(libc::SYS_tgkill, vec![rule(&[is(0, this)?])?]);
    if let Some(child) = policy.child {
        calls.insert(libc::SYS_kill, vec![rule(&[is(0, child as c_int)?])?]);
    }
    if policy.connects_in.is_some() {
        calls.insert(libc::SYS_socket, vec![rule(&[is(0, libc::AF_UNIX)?])?]);
        calls.insert(libc::SYS_connect, Vec::new());
    }
    Ok(calls)
}

/// The rule that all these conditions hold.
fn rule(conditions: &[SeccompCondition]) -> Result<SeccompRule, Error> {
    Ok(SeccompRule::new(conditions.to_vec())?)
}

/// The condition that an argument of 32 bits is this number.
fn is(argument: u8, number: c_int) -> Result<SeccompCondition, Error> {
    let number = u64::from(number as u32);
    Ok(SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, number)?)
}

fn is_null(argument: u8) -> Result<SeccompCondition, Error> {
    Ok(SeccompCondition::new(argument, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?)
}

/// The condition that an argument has this bit.
fn has(argument: u8, bit: c_int) -> Result<SeccompCondition, Error> {
    masked(argument, bit, bit)
}

/// The condition that an argument does not have this bit.
fn has_not(argument: u8, bit: c_int) -> Result<SeccompCondition, Error> {
    masked(argument, bit, 0)
}

fn masked(argument: u8, bit: c_int, value: c_int) -> Result<SeccompCondition, Error> {
    let (mask, value) = (u64::from(bit as u32), u64::from(value as u32));
    Ok(SeccompCondition::new(argument, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(mask), value)?)
}

//! The system calls that the daemon makes once it serves, and no others.
//!
//! The list is that of x86-64, and of what the Rust and C libraries use beneath us. What is not on
//! it ends the process: nobody who got into it goes on, nothing is lost (all state is learnt anew
//! by the next daemon), and a call that was forgotten here is found, where an error that some
//! library handles in silence would not be.

use super::{Files, Mode};
use crate::backing::{PAGEMAP_SCAN, SYS_CACHESTAT};
use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::collections::BTreeMap;

type Result<T> = std::result::Result<T, seccompiler::BackendError>;

/// Calls that may be made with any arguments.
const FREE: &[c_long] = &[
    // Memory of our own, and windows into the guest's.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_get_mempolicy,
    libc::SYS_set_mempolicy,
    // What the guest's memory file holds.
    libc::SYS_lseek,
    SYS_CACHESTAT,
    // Files that are open.
    libc::SYS_close,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_getdents64,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    // Files that are not.
    libc::SYS_newfstatat,
    libc::SYS_readlink,
    libc::SYS_statx,
    // Connections to the sockets that we listen on.
    libc::SYS_accept4,
    libc::SYS_getsockopt,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    // Waiting.
    libc::SYS_clock_nanosleep,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_restart_syscall,
    libc::SYS_sched_yield,
    // The process itself, its threads and signals.
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_pidfd_open,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    // Time and chance.
    libc::SYS_clock_gettime,
    libc::SYS_getrandom,
    libc::SYS_gettimeofday,
];

/// Flags of `openat` that do more than read what is there.
const CHANGING: u64 = flags(libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC);
/// Of these, the ones that come with a file that did not exist.
const CREATING: u64 = flags(libc::O_RDWR | libc::O_CREAT);

/// The processor of `perf_event_open` for a counter that belongs to a thread: -1.
const ANY_PROCESSOR: u64 = u32::MAX as u64;

/// Flags of `clone`: a thread, in all namespaces that we are in.
const THREAD: u64 = flags(libc::CLONE_THREAD);
const NEW_NAMESPACES: u64 = flags(
    libc::CLONE_NEWNS
        | libc::CLONE_NEWCGROUP
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET,
);

/// Flags as the kernel compares them: 32 bits wide.
#[allow(clippy::cast_sign_loss)] // bits
const fn flags(flags: libc::c_int) -> u64 {
    flags as u32 as u64
}

/// The argument of a number has exactly this value in the bits of `mask`.
fn masked(argument: u8, mask: u64, value: u64) -> Result<SeccompCondition> {
    let operator = SeccompCmpOp::MaskedEq(mask);
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)
}

/// One rule for each value that an argument may have.
fn any_of(argument: u8, values: &[u64]) -> Result<Vec<SeccompRule>> {
    let is =
        |value| SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value);
    values.iter().map(|value| SeccompRule::new(vec![is(*value)?])).collect()
}

fn rules(files: &Files) -> Result<BTreeMap<c_long, Vec<SeccompRule>>> {
    // No rule means any arguments.
    let mut rules: BTreeMap<_, _> = FREE.iter().map(|call| (*call, Vec::new())).collect();

    let mut open = vec![SeccompRule::new(vec![masked(2, CHANGING, flags(libc::O_RDONLY))?])?];
    if files.creates {
        let exclusive = flags(libc::O_EXCL);
        let created = masked(2, CHANGING | exclusive, CREATING | exclusive)?;
        open.push(SeccompRule::new(vec![created])?);
        rules.insert(libc::SYS_fchmod, Vec::new());
        rules.insert(libc::SYS_rename, Vec::new());
    }
    rules.insert(libc::SYS_openat, open);
    if !files.written.is_empty() {
        rules.insert(libc::SYS_unlink, Vec::new());
    }

    // Nothing becomes code.
    let no_code = masked(2, flags(libc::PROT_EXEC), 0)?;
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![SeccompRule::new(vec![no_code.clone()])?]);
    }

    let thread = masked(0, THREAD | NEW_NAMESPACES, THREAD)?;
    rules.insert(libc::SYS_clone, vec![SeccompRule::new(vec![thread])?]);
    // Takes its flags from memory, where no filter sees them; see `absent`.
    rules.insert(libc::SYS_clone3, Vec::new());

    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, any_of(0, &[own])?);
    if cfg!(feature = "fault-points") {
        rules.insert(libc::SYS_kill, any_of(0, &[own])?);
    }

    rules.insert(libc::SYS_prctl, any_of(0, &[flags(libc::PR_SET_NAME)])?);
    rules.insert(libc::SYS_ioctl, any_of(1, &[PAGEMAP_SCAN()])?);
    let advice = [flags(libc::MADV_COLLAPSE), flags(libc::MADV_COLD)];
    rules.insert(libc::SYS_process_madvise, any_of(3, &advice)?);
    // Counting, in a thread and on whatever processor it runs.
    let counter = vec![masked(2, ANY_PROCESSOR, ANY_PROCESSOR)?];
    rules.insert(libc::SYS_perf_event_open, vec![SeccompRule::new(counter)?]);
    let keep = flags(libc::FALLOC_FL_KEEP_SIZE);
    let modes = [keep, keep | flags(libc::FALLOC_FL_PUNCH_HOLE)];
    rules.insert(libc::SYS_fallocate, any_of(1, &modes)?);
    Ok(rules)
}

/// The programs of the kernel's filter, all of which are to be installed: the strictest counts.
pub fn programs(mode: Mode, files: &Files) -> Result<[BpfProgram; 2]> {
    let otherwise = match mode {
        Mode::On => SeccompAction::KillProcess,
        Mode::Log | Mode::Off => SeccompAction::Log,
    };
    Ok([absent()?, compile(rules(files)?, otherwise, SeccompAction::Allow)?])
}

/// The C library is to believe that there is no `clone3`, and to start threads by `clone`.
fn absent() -> Result<BpfProgram> {
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    compile(rules, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS.unsigned_abs()))
}

fn compile(
    rules: BTreeMap<c_long, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    action: SeccompAction,
) -> Result<BpfProgram> {
    SeccompFilter::new(rules, otherwise, action, TargetArch::x86_64)?.try_into()
}

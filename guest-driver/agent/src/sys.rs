//! System calls that no safe interface offers. All `unsafe` of the agent is
//! here; nothing here decides anything.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

// The kernel's Documentation/admin-guide/mm/pagemap.rst; libc has no names for
// these.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;

/// Category of a page that is in memory.
pub const PAGE_IS_PRESENT: u64 = 1 << 3;
/// Category of a page that is swapped out, or being migrated.
pub const PAGE_IS_SWAPPED: u64 = 1 << 4;
/// Category of a page that is the kernel's page of zeros.
pub const PAGE_IS_PFNZERO: u64 = 1 << 5;
/// Category of a page that a huge page maps.
pub const PAGE_IS_HUGE: u64 = 1 << 6;

/// `struct pm_scan_arg` of linux/fs.h.
#[repr(C)]
#[derive(Default)]
struct ScanArguments {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// Neighbouring pages of the same categories: `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// Address of the first page.
    pub start: u64,
    /// Address after the last one.
    pub end: u64,
    /// `PAGE_IS_*`.
    pub categories: u64,
}

/// Which pages a scan tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Base pages that are present or swapped out.
    Base,
    /// Huge pages.
    Huge,
}

/// Fills `regions` with what `pagemap` has in `range`; returns how many were
/// filled, and the address to go on from (`range.end` when all was seen).
///
/// # Errors
/// ENOTTY before Linux 6.7; ESRCH if the process is gone.
pub fn scan(
    pagemap: &File,
    range: &Range<u64>,
    wanted: Wanted,
    regions: &mut [Region],
) -> io::Result<(usize, u64)> {
    let mut arguments = ScanArguments {
        size: size_of::<ScanArguments>() as u64,
        start: range.start,
        end: range.end,
        vec: regions.as_mut_ptr() as u64,
        vec_len: regions.len() as u64,
        return_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED | PAGE_IS_PFNZERO,
        ..ScanArguments::default()
    };
    match wanted {
        Wanted::Base => {
            arguments.category_inverted = PAGE_IS_HUGE;
            arguments.category_mask = PAGE_IS_HUGE;
            arguments.category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED;
        }
        Wanted::Huge => arguments.category_mask = PAGE_IS_HUGE | PAGE_IS_PRESENT,
    }
    // SAFETY: the arguments are the kernel's struct of the size they tell, and
    // `vec` with `vec_len` is the memory of `regions`, plain numbers.
    let filled = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &mut arguments) };
    let filled = usize::try_from(filled).map_err(|_| io::Error::last_os_error())?;
    Ok((filled.min(regions.len()), arguments.walk_end))
}

/// A process, whatever becomes of its number.
#[derive(Debug)]
pub struct Pidfd(OwnedFd);

impl Pidfd {
    /// Takes hold of process `pid`.
    ///
    /// # Errors
    /// ESRCH if there is none.
    pub fn open(pid: i32) -> io::Result<Self> {
        // SAFETY: the call takes two numbers.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let fd = libc::c_int::try_from(fd).map_err(io::Error::other)?;
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel made this descriptor for us just now.
        Ok(Pidfd(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Asks the kernel to put huge pages under `range` of the process. Their
    /// contents stay as they are. Some of the range may be done even where the
    /// call fails.
    ///
    /// # Errors
    /// Whatever kept the kernel from doing all of it; EPERM without
    /// CAP_SYS_NICE.
    pub fn collapse(&self, range: &Range<u64>) -> io::Result<()> {
        let length = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
        let range = libc::iovec { iov_base: range.start as *mut libc::c_void, iov_len: length };
        // SAFETY: one iovec is passed, whose addresses are another process's:
        // nothing of ours is touched, and MADV_COLLAPSE keeps the contents.
        let done = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                self.0.as_raw_fd(),
                &range,
                1_usize,
                libc::MADV_COLLAPSE,
                0_u32,
            )
        };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

/// The size of a base page in bytes.
#[must_use]
pub fn page_size() -> u64 {
    // SAFETY: the call takes a number.
    u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

/// CPU time of this process so far, the kernel's work for it included.
///
/// # Errors
/// If the kernel has no such clock.
pub fn cpu_time() -> io::Result<Duration> {
    let mut time = MaybeUninit::<libc::timespec>::uninit();
    // SAFETY: `time` is a valid place for a timespec.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, time.as_mut_ptr()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so it filled `time`.
    let time = unsafe { time.assume_init() };
    let seconds = u64::try_from(time.tv_sec).map_err(io::Error::other)?;
    let nanoseconds = u32::try_from(time.tv_nsec).map_err(io::Error::other)?;
    Ok(Duration::new(seconds, nanoseconds))
}

/// SIGTERM and SIGINT, waited for instead of handled.
pub struct Signals(libc::sigset_t);

impl Signals {
    /// Blocks the signals for this thread, so that only [`Signals::wait`] sees
    /// them.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn block() -> io::Result<Self> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: `set` is a valid place for a signal set; sigemptyset fills
        // it, the calls after it only change it.
        let (result, set) = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            libc::sigaddset(set.as_mut_ptr(), libc::SIGTERM);
            libc::sigaddset(set.as_mut_ptr(), libc::SIGINT);
            let none = std::ptr::null_mut();
            (libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), none), set.assume_init())
        };
        if result != 0 {
            return Err(io::Error::from_raw_os_error(result));
        }
        Ok(Signals(set))
    }

    /// Sleeps for `time`, or less if a signal asks to end: then true.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn wait(&self, time: Duration) -> io::Result<bool> {
        let time = libc::timespec {
            tv_sec: libc::time_t::try_from(time.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: libc::c_long::from(i32::try_from(time.subsec_nanos()).unwrap_or(0)),
        };
        // SAFETY: set and time are valid; no information about the signal is
        // asked for.
        let signal = unsafe { libc::sigtimedwait(&self.0, std::ptr::null_mut(), &time) };
        if signal > 0 {
            return Ok(true);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EINTR) => Ok(false),
            _ => Err(error),
        }
    }
}

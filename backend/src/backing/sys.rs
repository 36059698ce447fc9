//! The system calls, each as a safe function. None of them reads or writes guest memory by
//! itself: mappings made here are never dereferenced, only advised.

use std::fs::File;
use std::io::{self, Error};
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;

/// Not in libc for every target yet; the number is the same on all architectures but Alpha.
pub const SYS_CACHESTAT: libc::c_long = 451;

/// The page is there.
const PAGE_IS_PRESENT: u64 = 1 << 3;
/// The page is part of a huge mapping.
pub const PAGE_IS_HUGE: u64 = 1 << 6;

/// `struct page_region` of linux/fs.h.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct PageRegion {
    /// First address.
    pub start: u64,
    /// One past the last address.
    pub end: u64,
    /// `PAGE_IS_*`.
    pub categories: u64,
}

/// `struct pm_scan_arg` of linux/fs.h.
#[repr(C)]
#[derive(Debug, Default)]
struct PmScanArg {
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

ioctl_iowr_nr!(PAGEMAP_SCAN, b'f' as libc::c_uint, 16, PmScanArg);

/// `struct cachestat_range` of linux/mman.h.
#[repr(C)]
struct CachestatRange {
    off: u64,
    len: u64,
}

/// `struct cachestat` of linux/mman.h.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Cachestat {
    nr_cache: u64,
    nr_dirty: u64,
    nr_writeback: u64,
    nr_evicted: u64,
    nr_recently_evicted: u64,
}

/// Pages of a range of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cached {
    /// In memory.
    pub resident: u64,
    /// In swap (for shmem, whose page cache keeps no other trace of evicted pages).
    pub swapped: u64,
}

/// The result of a system call, or why it failed.
pub fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn offset(value: u64) -> io::Result<libc::off64_t> {
    libc::off64_t::try_from(value).map_err(|_| Error::from_raw_os_error(libc::EOVERFLOW))
}

fn length(value: u64) -> io::Result<usize> {
    usize::try_from(value).map_err(|_| Error::from_raw_os_error(libc::EOVERFLOW))
}

/// Size of a base page in bytes.
pub fn page_size() -> u64 {
    // SAFETY: takes no pointers.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).ok().filter(|size| *size > 0).unwrap_or(4096)
}

/// Present pages of `range` in the address space that `pagemap` shows. Returns the filled part
/// of `regions` and the address up to which it is complete.
pub fn pagemap_scan<'a>(
    pagemap: &File,
    range: &Range<u64>,
    regions: &'a mut [PageRegion],
) -> io::Result<(&'a [PageRegion], u64)> {
    let mut arg = PmScanArg {
        size: size_of::<PmScanArg>() as u64,
        start: range.start,
        end: range.end,
        vec: regions.as_mut_ptr() as u64,
        vec_len: regions.len() as u64,
        category_mask: PAGE_IS_PRESENT,
        return_mask: PAGE_IS_PRESENT | PAGE_IS_HUGE,
        ..PmScanArg::default()
    };
    // SAFETY: `arg` has the layout that the ioctl expects; `vec` and `vec_len` describe `regions`,
    // which is borrowed mutably for the whole call.
    let filled = unsafe { ioctl_with_mut_ref(pagemap, PAGEMAP_SCAN(), &mut arg) };
    let filled = usize::try_from(filled).map_err(|_| Error::last_os_error())?;
    let filled = regions.get(..filled).unwrap_or_default();
    Ok((filled, arg.walk_end))
}

/// The first byte at or after `from` that has data (memory or swap); `None` if there is none.
pub fn seek_data(file: &File, from: u64) -> io::Result<Option<u64>> {
    seek(file, from, libc::SEEK_DATA)
}

/// The first byte at or after `from` that has none.
pub fn seek_hole(file: &File, from: u64) -> io::Result<Option<u64>> {
    seek(file, from, libc::SEEK_HOLE)
}

fn seek(file: &File, from: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    // SAFETY: takes no pointers, and the descriptor is open for the duration of the borrow.
    let found = unsafe { libc::lseek64(file.as_raw_fd(), offset(from)?, whence) };
    match u64::try_from(found) {
        Ok(found) => Ok(Some(found)),
        Err(_) => match Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}

/// Counts the pages of a range of a file.
pub fn cachestat(file: &File, from: u64, len: u64) -> io::Result<Cached> {
    let range = CachestatRange { off: from, len };
    let mut stat = Cachestat::default();
    // SAFETY: both structures have the layout that the call expects and outlive it.
    check(unsafe {
        libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut stat, 0)
    })?;
    Ok(Cached { resident: stat.nr_cache, swapped: stat.nr_evicted })
}

/// Drops a range of a file; it reads as zeros afterwards. The file keeps its size.
pub fn punch_hole(file: &File, from: u64, len: u64) -> io::Result<()> {
    fallocate(file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, from, len)
}

/// Gives a range of a file memory; what it held it keeps, the file its size.
pub fn allocate(file: &File, from: u64, len: u64) -> io::Result<()> {
    fallocate(file, libc::FALLOC_FL_KEEP_SIZE, from, len)
}

fn fallocate(file: &File, mode: libc::c_int, from: u64, len: u64) -> io::Result<()> {
    let (from, len) = (offset(from)?, offset(len)?);
    loop {
        // SAFETY: takes no pointers, and the descriptor is open for the duration of the borrow.
        if unsafe { libc::fallocate64(file.as_raw_fd(), mode, from, len) } == 0 {
            return Ok(());
        }
        let error = Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// The memory policy of the calling thread: its mode, and the nodes in `nodes`, a mask.
pub fn get_mempolicy(nodes: &mut [u64]) -> io::Result<i32> {
    let mut mode: libc::c_int = 0;
    let bits = nodes.len() * 64;
    // SAFETY: `mode` is a valid place for the mode and `nodes` one for a mask of `bits` bits; with
    // neither flag the address is not used.
    check(unsafe {
        libc::syscall(
            libc::SYS_get_mempolicy,
            &raw mut mode,
            nodes.as_mut_ptr(),
            bits,
            ptr::null_mut::<libc::c_void>(),
            0,
        )
    })?;
    Ok(mode)
}

/// Sets the memory policy of the calling thread.
pub fn set_mempolicy(mode: i32, nodes: &[u64]) -> io::Result<()> {
    // The kernel takes one bit off what it is told, and nothing else for no nodes at all.
    let (mask, bits) = match nodes.iter().any(|word| *word != 0) {
        true => (nodes.as_ptr(), nodes.len() * 64 + 1),
        false => (ptr::null(), 0),
    };
    // SAFETY: `mask` is null or has the bits that the kernel reads; how the thread's future pages
    // are placed changes nothing about memory that is there.
    check(unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, mask, bits) }).map(|_| ())
}

/// What kind of filesystem a file is on, and its room.
#[derive(Clone, Copy, Debug)]
pub struct FileSystem {
    /// `*_MAGIC` of linux/magic.h.
    pub magic: u64,
    /// Its block size; on hugetlbfs that of the huge pages.
    pub block_size: u64,
    /// Blocks in all; 0 on a tmpfs without a limit.
    pub blocks: u64,
    /// Blocks left for us.
    pub available: u64,
}

/// Looks at the filesystem of an open file.
pub fn file_system(file: &File) -> io::Result<FileSystem> {
    // SAFETY: all-zero bytes are a valid value of this plain C structure.
    let mut stat: libc::statfs64 = unsafe { std::mem::zeroed() };
    // SAFETY: `stat` is a valid place for the result.
    check(libc::c_long::from(unsafe { libc::fstatfs64(file.as_raw_fd(), &raw mut stat) }))?;
    Ok(FileSystem {
        // The type of the field differs between targets; magic numbers are 32 bits wide.
        #[allow(clippy::cast_sign_loss, clippy::unnecessary_cast)]
        magic: (stat.f_type as u64) & 0xffff_ffff,
        #[allow(clippy::cast_sign_loss, clippy::unnecessary_cast)]
        block_size: stat.f_bsize as u64,
        blocks: stat.f_blocks,
        available: stat.f_bavail,
    })
}

/// A handle on a process that no other process can take over.
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes no pointers.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    let fd = i32::try_from(fd).map_err(Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether a process has not exited yet.
pub fn pidfd_alive(pidfd: BorrowedFd<'_>) -> bool {
    let mut poll = libc::pollfd { fd: pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: `poll` is one valid structure, and the call does not wait.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 0 }
}

/// Collapses a range of another process's memory. An empty range collapses nothing and tells
/// whether the caller would be allowed to.
pub fn process_collapse(pidfd: BorrowedFd<'_>, range: &Range<u64>) -> io::Result<()> {
    process_advise(pidfd, range, libc::MADV_COLLAPSE)
}

/// Calls a range of another process's memory cold: a huge page of which that is only a part is
/// split.
pub fn process_cold(pidfd: BorrowedFd<'_>, range: &Range<u64>) -> io::Result<()> {
    process_advise(pidfd, range, libc::MADV_COLD)
}

fn process_advise(
    pidfd: BorrowedFd<'_>,
    range: &Range<u64>,
    advice: libc::c_int,
) -> io::Result<()> {
    let iovec = libc::iovec {
        // An address of the other process; no pointer for us.
        iov_base: ptr::without_provenance_mut(length(range.start)?),
        iov_len: length(range.end.saturating_sub(range.start))?,
    };
    // SAFETY: `iovec` is valid for the call; what it points to belongs to the other process, and
    // both pieces of advice change how that memory is backed, not what it holds.
    let advised = check(unsafe {
        libc::syscall(libc::SYS_process_madvise, pidfd.as_raw_fd(), &raw const iovec, 1, advice, 0)
    })?;
    if usize::try_from(advised).ok() == Some(iovec.iov_len) {
        Ok(())
    } else {
        Err(Error::from_raw_os_error(libc::EAGAIN))
    }
}

/// An address range of ours: reserved, or mapping a file. It is never dereferenced.
#[derive(Debug)]
pub struct Mapping {
    addr: *mut libc::c_void,
    len: usize,
}

impl Mapping {
    /// Reserves address space without memory.
    pub fn reserve(len: u64) -> io::Result<Self> {
        let len = length(len)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing of ours.
        let addr = unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0) };
        if addr == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        Ok(Self { addr, len })
    }

    /// First address.
    pub fn addr(&self) -> u64 {
        self.addr as u64
    }

    /// Puts a shared mapping of a piece of a file into the range, `at` bytes from its start.
    pub fn map_file(&mut self, at: u64, file: &File, from: u64, len: u64) -> io::Result<()> {
        let addr = self.inside(at, len)?;
        // SAFETY: the target lies inside our own range (checked), which nothing refers to.
        let mapped = unsafe {
            libc::mmap64(
                addr,
                length(len)?,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                offset(from)?,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        Ok(())
    }

    /// Advises a part of the range: one of MADV_COLLAPSE, MADV_POPULATE_READ, MADV_POPULATE_WRITE,
    /// MADV_HUGEPAGE, MADV_NOHUGEPAGE, none of which changes what the memory holds.
    pub fn advise(&self, at: u64, len: u64, advice: Advice) -> io::Result<()> {
        let addr = self.inside(at, len)?;
        // SAFETY: the range is ours (checked), and no advice of the enumeration drops contents.
        let result = unsafe { libc::madvise(addr, length(len)?, advice as libc::c_int) };
        check(libc::c_long::from(result)).map(|_| ())
    }

    fn inside(&self, at: u64, len: u64) -> io::Result<*mut libc::c_void> {
        let (at, len) = (length(at)?, length(len)?);
        match at.checked_add(len) {
            Some(end) if end <= self.len => Ok(self.addr.wrapping_byte_add(at)),
            _ => Err(Error::from_raw_os_error(libc::EINVAL)),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is ours alone and nothing refers to it.
        let result = unsafe { libc::munmap(self.addr, self.len) };
        if result != 0 {
            log::error!("cannot unmap {} bytes: {}", self.len, Error::last_os_error());
        }
    }
}

/// The pieces of advice that keep contents.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Make it huge now.
    Collapse = libc::MADV_COLLAPSE,
    /// Map what is there, reading.
    PopulateRead = libc::MADV_POPULATE_READ,
    /// Fault in, writable, without storing anything.
    PopulateWrite = libc::MADV_POPULATE_WRITE,
    /// Huge pages welcome.
    Hugepage = libc::MADV_HUGEPAGE,
    /// No huge pages at faults.
    NoHugepage = libc::MADV_NOHUGEPAGE,
}

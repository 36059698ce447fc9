//! What a process's page tables map: the `PAGEMAP_SCAN` call on `/proc/PID/pagemap`, which
//! Linux has from 6.7 on (Documentation/admin-guide/mm/pagemap.rst), as a safe function.
//!
//! For what looks from outside, and for nothing else: what the daemon and the guest's agent are
//! checked by is not to have a mistake in common with them.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// Category of a page that is in memory.
pub const PRESENT: u64 = 1 << 3;
/// Category of a page that a huge page maps.
pub const HUGE: u64 = 1 << 6;

/// `_IOWR('f', 16, struct pm_scan_arg)`
const REQUEST: libc::c_ulong = 0xc060_6610;

/// Regions that are asked for at once. The kernel gathers as many before it hands them out
/// (fs/proc/task_mmu.c), and where more are asked for it may say that it has come as far as the
/// first so many, though it has told of what is behind them: that would be told twice.
const AT_ONCE: usize = 512;

/// `struct page_region` of linux/fs.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg` of linux/fs.h.
#[repr(C)]
#[derive(Default)]
struct Arguments {
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

/// The parts of `range` whose pages have all of `categories`, ascending, neighbours in one;
/// `pagemap` is the `/proc/PID/pagemap` of their process.
///
/// # Errors
/// ENOTTY before Linux 6.7, ESRCH if the process is gone, EFAULT or EINVAL for a range that no
/// process has.
pub fn ranges(pagemap: &File, range: &Range<u64>, categories: u64) -> io::Result<Vec<Range<u64>>> {
    let mut regions = vec![Region::default(); AT_ONCE];
    let mut found: Vec<Range<u64>> = Vec::new();
    let mut start = range.start;
    while start < range.end {
        let mut arguments = Arguments {
            size: size_of::<Arguments>() as u64,
            start,
            end: range.end,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            category_mask: categories,
            return_mask: categories,
            ..Arguments::default()
        };
        // SAFETY: the arguments have the kernel's layout and the size that they tell; `vec` and
        // `vec_len` name regions, plain numbers, that live throughout the call.
        let filled = unsafe { libc::ioctl(pagemap.as_raw_fd(), REQUEST, &raw mut arguments) };
        let filled = usize::try_from(filled).map_err(|_| io::Error::last_os_error())?;
        for region in regions.iter().take(filled) {
            match found.last_mut() {
                Some(last) if last.end == region.start => last.end = region.end,
                _ => found.push(region.start..region.end),
            }
        }
        if arguments.walk_end <= start {
            return Err(io::Error::other("the kernel's scan of page tables stands still"));
        }
        start = arguments.walk_end;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;
    /// Nearly four times as many as are asked for at once are written to.
    const PAGES: u64 = 4000;

    #[test]
    fn pages_that_were_written_to_are_told_once_and_no_others() -> io::Result<()> {
        let length = usize::try_from(PAGES * PAGE).map_err(io::Error::other)?;
        // SAFETY: a new mapping, wherever the kernel likes.
        let address = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            libc::mmap(std::ptr::null_mut(), length, protection, flags, -1, 0)
        };
        assert_ne!(address, libc::MAP_FAILED);
        // SAFETY: the mapping made above. Without huge pages, whatever the machine's setting.
        assert_eq!(unsafe { libc::madvise(address, length, libc::MADV_NOHUGEPAGE) }, 0);
        let start = address as u64;
        let every_other: Vec<_> =
            (start..start + PAGES * PAGE).step_by(8192).map(|page| page..page + PAGE).collect();
        for page in &every_other {
            // SAFETY: a byte of the mapping made above.
            unsafe { (page.start as *mut u8).write_volatile(1) };
        }
        let pagemap = File::open("/proc/self/pagemap")?;
        let all = start..start + PAGES * PAGE;
        let (present, huge) =
            (ranges(&pagemap, &all, PRESENT), ranges(&pagemap, &all, PRESENT | HUGE));
        // SAFETY: unmaps what was mapped above; nothing refers to it.
        unsafe { libc::munmap(address, length) };
        assert_eq!(present?, every_other);
        assert!(huge?.is_empty());
        Ok(())
    }

    #[test]
    fn a_range_that_no_process_has_is_an_error() -> io::Result<()> {
        let pagemap = File::open("/proc/self/pagemap")?;
        assert!(ranges(&pagemap, &(u64::MAX - 8191..u64::MAX - 4095), PRESENT).is_err());
        Ok(())
    }
}

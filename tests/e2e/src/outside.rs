//! QEMU's page tables: where the host really has huge pages under a guest.
//!
//! Nothing here asks the daemon, and nothing uses its code: addresses come from
//! QEMU's own memory map and monitor, states from the kernel.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use anyhow::{bail, ensure, Context};

use crate::qmp::Qmp;
use crate::{BLOCK, BLOCK_SHIFT};

/// Guest memory as QEMU maps it.
#[derive(Debug)]
pub struct GuestMemory {
    pid: u32,
    /// QEMU's addresses of the mapping.
    mapping: Range<u64>,
    /// Bytes of it below the 4 GiB boundary.
    low: u64,
}

/// What the host has under a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostState {
    /// No memory.
    Absent,
    /// Some base pages.
    Base,
    /// One huge page, and QEMU's page table maps it as such.
    Huge,
}

/// Where the q35 machine continues guest memory that does not fit below.
const HIGH_START: u64 = 4 << 30;

// The kernel's Documentation/admin-guide/mm/pagemap.rst; libc has no names for
// these.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_HUGE: u64 = 1 << 6;

/// `struct pm_scan_arg`.
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

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

impl GuestMemory {
    /// Finds the memory of a q35 guest with `size` bytes in QEMU process `pid`,
    /// and checks with QEMU's monitor that it lies where it is expected.
    ///
    /// # Errors
    /// If there is no such mapping, or the monitor contradicts.
    pub fn find(pid: u32, size: u64, qmp: &mut Qmp) -> anyhow::Result<Self> {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps"))
            .with_context(|| format!("cannot read the memory map of process {pid}"))?;
        let mapping = maps
            .lines()
            .filter(|line| line.contains("/memfd:"))
            .filter_map(parse_range)
            .find(|range| range.end - range.start == size)
            .with_context(|| format!("process {pid} maps no memfd of {size} bytes"))?;
        // The layout of the machine: a gap for devices below 4 GiB.
        let low = if size >= 0xb000_0000 { size.min(0x8000_0000) } else { size };
        let memory = GuestMemory { pid, mapping, low };
        let mut probes = vec![BLOCK, low - BLOCK];
        if size > low {
            probes.push(HIGH_START);
        }
        for gpa in probes {
            let expected = memory.address(gpa).context("the probe lies in memory")?;
            let told = qmp.host_address(gpa)?;
            ensure!(told == expected, "QEMU has {gpa:#x} at {told:#x}, not at {expected:#x}");
        }
        Ok(memory)
    }

    /// QEMU's address of a guest physical address.
    fn address(&self, gpa: u64) -> Option<u64> {
        let offset = if gpa < self.low { gpa } else { self.low + gpa.checked_sub(HIGH_START)? };
        let address = self.mapping.start + offset;
        self.mapping.contains(&address).then_some(address)
    }

    /// Whether QEMU mapped the memory at an address that huge pages can have.
    #[must_use]
    pub fn is_aligned(&self) -> bool {
        self.mapping.start % BLOCK == 0
    }

    /// Number of blocks below and above the gap, as ranges of block numbers.
    fn block_ranges(&self) -> [Range<u64>; 2] {
        let size = self.mapping.end - self.mapping.start;
        let high = HIGH_START >> BLOCK_SHIFT;
        [0..self.low >> BLOCK_SHIFT, high..high + ((size - self.low) >> BLOCK_SHIFT)]
    }

    /// The state of every block, in ascending order of block numbers.
    ///
    /// # Errors
    /// If QEMU is gone or the kernel refuses; reading another process's page
    /// tables needs the rights to trace it.
    pub fn states(&self) -> anyhow::Result<Vec<(u64, HostState)>> {
        let huge = self.scan(PAGE_IS_PRESENT | PAGE_IS_HUGE)?;
        let resident = self.resident()?;
        let mut states = Vec::new();
        for range in self.block_ranges() {
            for block in range {
                let start =
                    self.address(block << BLOCK_SHIFT).context("a block outside of memory")?;
                let offset = start - self.mapping.start;
                let state = if covers(&huge, start..start + BLOCK) {
                    HostState::Huge
                } else if touches(&resident, offset..offset + BLOCK) {
                    HostState::Base
                } else {
                    HostState::Absent
                };
                states.push((block, state));
            }
        }
        Ok(states)
    }

    /// The blocks that are huge in the host.
    ///
    /// # Errors
    /// As [`GuestMemory::states`].
    pub fn huge_blocks(&self) -> anyhow::Result<BTreeSet<u64>> {
        let huge = |(block, state)| (state == HostState::Huge).then_some(block);
        Ok(self.states()?.into_iter().filter_map(huge).collect())
    }

    /// Address ranges whose pages have all of `categories`, ascending.
    fn scan(&self, categories: u64) -> anyhow::Result<Vec<Range<u64>>> {
        let path = format!("/proc/{}/pagemap", self.pid);
        let file = File::open(&path).with_context(|| format!("cannot open {path}"))?;
        let mut regions = vec![Region::default(); 4096];
        let mut found: Vec<Range<u64>> = Vec::new();
        let mut start = self.mapping.start;
        while start < self.mapping.end {
            let mut arguments = ScanArguments {
                size: size_of::<ScanArguments>() as u64,
                start,
                end: self.mapping.end,
                vec: regions.as_mut_ptr() as u64,
                vec_len: regions.len() as u64,
                category_mask: categories,
                return_mask: categories,
                ..Default::default()
            };
            // SAFETY: the arguments are of the kernel's layout, and `vec` names
            // `vec_len` regions that live throughout the call.
            let count = unsafe { libc::ioctl(file.as_raw_fd(), PAGEMAP_SCAN, &raw mut arguments) };
            let Ok(count) = usize::try_from(count) else {
                return Err(io::Error::last_os_error()).context("PAGEMAP_SCAN is refused");
            };
            for region in &regions[..count] {
                match found.last_mut() {
                    Some(last) if last.end == region.start => last.end = region.end,
                    _ => found.push(region.start..region.end),
                }
            }
            if arguments.walk_end <= start {
                bail!("PAGEMAP_SCAN does not get on at {start:#x}");
            }
            start = arguments.walk_end;
        }
        Ok(found)
    }

    /// Ranges of file offsets that hold memory, whoever has it mapped.
    fn resident(&self) -> anyhow::Result<Vec<Range<u64>>> {
        let file = self.file()?;
        let end = i64::try_from(self.mapping.end - self.mapping.start)?;
        let seek = |offset: i64, whence| -> anyhow::Result<Option<i64>> {
            // SAFETY: moves the position of a descriptor that is ours alone.
            let found = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
            if found >= 0 {
                return Ok(Some(found));
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                // No data from here on.
                Some(libc::ENXIO) => Ok(None),
                _ => Err(error).context("cannot look for holes in guest memory"),
            }
        };
        let mut found = Vec::new();
        let mut position = 0;
        while position < end {
            let Some(data) = seek(position, libc::SEEK_DATA)? else {
                break;
            };
            let hole = seek(data, libc::SEEK_HOLE)?.unwrap_or(end);
            found.push(u64::try_from(data)?..u64::try_from(hole)?);
            position = hole;
        }
        Ok(found)
    }

    /// Bytes of memory that the guest costs the host.
    ///
    /// # Errors
    /// If QEMU is gone.
    pub fn resident_bytes(&self) -> anyhow::Result<u64> {
        Ok(self.file()?.metadata()?.blocks() * 512)
    }

    /// The memory's file, opened anew through the mapping.
    fn file(&self) -> anyhow::Result<File> {
        let path =
            format!("/proc/{}/map_files/{:x}-{:x}", self.pid, self.mapping.start, self.mapping.end);
        File::open(&path).with_context(|| format!("cannot open {path}"))
    }
}

/// Huge pages that this machine's kernel has made so that base pages could be
/// collapsed into them because somebody asked for it: all but khugepaged's.
///
/// # Errors
/// If the kernel does not count them.
pub fn requested_collapses() -> anyhow::Result<u64> {
    const BY_ITSELF: &str = "/sys/kernel/mm/transparent_hugepage/khugepaged/pages_collapsed";
    let text = fs::read_to_string("/proc/vmstat").context("cannot read /proc/vmstat")?;
    let all: u64 = text
        .lines()
        .find_map(|line| line.strip_prefix("thp_collapse_alloc "))
        .and_then(|count| count.parse().ok())
        .context("/proc/vmstat has no thp_collapse_alloc")?;
    let by_itself = fs::read_to_string(BY_ITSELF)
        .with_context(|| format!("cannot read {BY_ITSELF}"))?
        .trim()
        .parse()
        .with_context(|| format!("{BY_ITSELF} holds no number"))?;
    Ok(all.saturating_sub(by_itself))
}

/// The address range of a line of `/proc/PID/maps`.
fn parse_range(line: &str) -> Option<Range<u64>> {
    let (start, end) = line.split_whitespace().next()?.split_once('-')?;
    Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
}

/// Whether one of the sorted `ranges` covers all of `wanted`.
fn covers(ranges: &[Range<u64>], wanted: Range<u64>) -> bool {
    let next = ranges.partition_point(|range| range.end < wanted.end);
    ranges.get(next).is_some_and(|range| range.start <= wanted.start && range.end >= wanted.end)
}

/// Whether one of the sorted `ranges` has a byte of `wanted`.
fn touches(ranges: &[Range<u64>], wanted: Range<u64>) -> bool {
    let next = ranges.partition_point(|range| range.end <= wanted.start);
    ranges.get(next).is_some_and(|range| range.start < wanted.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_cover_only_what_lies_in_one_of_them() {
        let ranges = [0..10, 20..40];
        assert!(covers(&ranges, 20..40));
        assert!(covers(&ranges, 30..40));
        assert!(!covers(&ranges, 30..41));
        assert!(!covers(&ranges, 5..25));
        assert!(touches(&ranges, 5..25));
        assert!(touches(&ranges, 39..50));
        assert!(!touches(&ranges, 10..20));
        assert!(!touches(&ranges, 40..50));
    }

    #[test]
    fn guest_addresses_follow_the_gap() {
        let start = 0x7f00_0000_0000;
        let memory = GuestMemory { pid: 0, mapping: start..start + (4 << 30), low: 2 << 30 };
        assert_eq!(memory.address(BLOCK), Some(start + BLOCK));
        assert_eq!(memory.address(3 << 30), None);
        assert_eq!(memory.address(4 << 30), Some(start + (2 << 30)));
        assert_eq!(memory.address(6 << 30), None);
        assert_eq!(memory.block_ranges(), [0..1024, 2048..3072]);
    }

    #[test]
    fn own_huge_pages_are_seen() {
        // Anonymous memory with huge pages, where this machine gives them.
        let size = 4 * BLOCK;
        let length = usize::try_from(size).expect("8 MiB");
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(address, libc::MAP_FAILED);
        let start = (address as u64).next_multiple_of(BLOCK);
        // SAFETY: the block lies inside the mapping made above.
        unsafe { (start as *mut u8).write(1) };
        let memory =
            GuestMemory { pid: std::process::id(), mapping: start..start + BLOCK, low: BLOCK };
        let present = memory.scan(PAGE_IS_PRESENT).expect("our own page tables");
        assert!(present.iter().any(|range| range.start == start));
        // SAFETY: unmaps what was mapped above; nothing refers to it.
        unsafe { libc::munmap(address, length) };
    }
}

//! QEMU's page tables: where the host really has huge pages under a guest.
//!
//! Nothing here asks the daemon, and nothing uses its code: addresses come from
//! QEMU's own memory map and monitor, states from the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use anyhow::{ensure, Context};
use gemini_guest::protocol::{PageRun, PageRuns};
use gemini_pagemap::{HUGE, PRESENT};

use crate::qmp::Qmp;
use crate::{BLOCK, BLOCK_SHIFT};

/// Guest memory as QEMU maps it.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    pid: u32,
    /// By guest address. The first belongs to the machine's own memory.
    parts: Vec<Part>,
}

/// Guest memory that lies together for the guest and for QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    /// Guest physical addresses.
    gpa: Range<u64>,
    /// QEMU's address of the first byte.
    address: u64,
    /// The mapping that it lies in: all of a memfd.
    mapping: Range<u64>,
    /// Whether the guest has only the pages of it that it plugged (virtio-mem).
    pluggable: bool,
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

const PAGE_SHIFT: u32 = 12;

/// Pages of a block without an owner that may never have left, see
/// [`GuestMemory::come_back`].
const STAYED_MAX: usize = 8;

/// Where the q35 machine continues guest memory that does not fit below.
const HIGH_START: u64 = 4 << 30;

impl Part {
    /// QEMU's addresses.
    fn addresses(&self) -> Range<u64> {
        self.address..self.address + (self.gpa.end - self.gpa.start)
    }
}

impl GuestMemory {
    /// Finds the memory of a q35 guest that booted with `size` bytes in QEMU
    /// process `pid`, and what was plugged since, and checks with QEMU's monitor
    /// that it lies where it is expected.
    ///
    /// # Errors
    /// If there is no such mapping, or the monitor contradicts.
    pub fn find(pid: u32, size: u64, qmp: &mut Qmp) -> anyhow::Result<Self> {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps"))
            .with_context(|| format!("cannot read the memory map of process {pid}"))?;
        let mappings: Vec<Range<u64>> =
            maps.lines().filter(|line| line.contains("/memfd:")).filter_map(parse_range).collect();
        let first = qmp.host_address(BLOCK)?;
        let mapping = mappings
            .iter()
            .find(|range| range.contains(&first) && range.end - range.start == size)
            .with_context(|| format!("process {pid} maps no memfd of {size} bytes"))?;
        let mut parts = base_parts(mapping);
        for device in qmp.memory_devices()? {
            let address = qmp.host_address(device.gpa.start)?;
            let mapping = mappings
                .iter()
                .find(|range| range.contains(&address))
                .with_context(|| format!("{address:#x} is in no memfd"))?;
            parts.push(Part {
                gpa: device.gpa,
                address,
                mapping: mapping.clone(),
                pluggable: device.pluggable,
            });
        }
        parts.sort_by_key(|part| part.gpa.start);
        let memory = GuestMemory { pid, parts };
        for part in &memory.parts {
            for gpa in [part.gpa.start + BLOCK, part.gpa.end - BLOCK] {
                let expected = memory.address(gpa).context("the probe lies in memory")?;
                let told = qmp.host_address(gpa)?;
                ensure!(told == expected, "QEMU has {gpa:#x} at {told:#x}, not at {expected:#x}");
            }
        }
        Ok(memory)
    }

    /// QEMU's address of a guest physical address.
    pub(crate) fn address(&self, gpa: u64) -> Option<u64> {
        let part = self.parts.iter().find(|part| part.gpa.contains(&gpa))?;
        Some(part.address + (gpa - part.gpa.start))
    }

    /// Whether QEMU mapped the memory at addresses that huge pages can have.
    #[must_use]
    pub fn is_aligned(&self) -> bool {
        self.parts.iter().all(|part| part.address % BLOCK == part.gpa.start % BLOCK)
    }

    /// The state of every block, in ascending order of block numbers.
    ///
    /// # Errors
    /// If QEMU is gone or the kernel refuses; reading another process's page
    /// tables needs the rights to trace it.
    pub fn states(&self) -> anyhow::Result<Vec<(u64, HostState)>> {
        let mut states = Vec::new();
        for part in &self.parts {
            let huge = self.scan(&part.addresses(), PRESENT | HUGE)?;
            let resident = self.resident(part)?;
            for block in part.gpa.start >> BLOCK_SHIFT..part.gpa.end >> BLOCK_SHIFT {
                let gpa = block << BLOCK_SHIFT;
                let address = part.address + (gpa - part.gpa.start);
                let state = if covers(&huge, address..address + BLOCK) {
                    HostState::Huge
                } else if touches(&resident, gpa..gpa + BLOCK) {
                    HostState::Base
                } else {
                    HostState::Absent
                };
                states.push((block, state));
            }
        }
        Ok(states)
    }

    /// Guest addresses of base pages that the host has and the guest does not: those
    /// that it has given away, and all of virtio-mem's that it never plugged. A few of
    /// them never left, see [`GuestMemory::come_back`].
    ///
    /// # Errors
    /// As [`GuestMemory::states`].
    pub fn without_owner(&self, pages: &PageRuns) -> anyhow::Result<BTreeSet<u64>> {
        let ranges = |runs: &[PageRun]| -> Vec<Range<u64>> {
            let end = |run: &PageRun| (run.first + run.count) << PAGE_SHIFT;
            runs.iter().map(|run| run.first << PAGE_SHIFT..end(run)).collect()
        };
        let (online, given_away) = (ranges(&pages.online), ranges(&pages.given_away));
        let mut without = BTreeSet::new();
        for part in &self.parts {
            for resident in self.resident(part)? {
                let pages = (resident.start..resident.end).step_by(1 << PAGE_SHIFT);
                without.extend(pages.filter(|page| {
                    let page = *page..page + (1 << PAGE_SHIFT);
                    touches(&given_away, page.clone()) || part.pluggable && !covers(&online, page)
                }));
            }
        }
        Ok(without)
    }

    /// Those of the pages `without` an owner that somebody brought back. Whoever does so
    /// does it to a block. A page by itself never left: Linux drops a part of a huge page
    /// by splitting it, and if anybody refers to the page at that moment (to fault in
    /// another part of it, to look at it) the part is zeroed and stays (mm/truncate.c,
    /// `truncate_inode_partial_folio`). The next such attempt can split it. virtio-mem's
    /// memory goes by whole blocks, which nobody has to split: there each page counts.
    #[must_use]
    pub fn come_back(&self, without: &BTreeSet<u64>) -> BTreeSet<u64> {
        let mut blocks: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        for page in without {
            blocks.entry(page >> BLOCK_SHIFT).or_default().push(*page);
        }
        let pluggable = |block: &u64| {
            let gpa = block << BLOCK_SHIFT;
            self.parts.iter().any(|part| part.pluggable && part.gpa.contains(&gpa))
        };
        blocks.retain(|block, pages| pages.len() > STAYED_MAX || pluggable(block));
        blocks.into_values().flatten().collect()
    }

    /// The blocks that are huge in the host.
    ///
    /// # Errors
    /// As [`GuestMemory::states`].
    pub fn huge_blocks(&self) -> anyhow::Result<BTreeSet<u64>> {
        let huge = |(block, state)| (state == HostState::Huge).then_some(block);
        Ok(self.states()?.into_iter().filter_map(huge).collect())
    }

    /// Those of the `wanted` addresses whose pages have all of `categories`,
    /// ascending.
    fn scan(&self, wanted: &Range<u64>, categories: u64) -> anyhow::Result<Vec<Range<u64>>> {
        let path = format!("/proc/{}/pagemap", self.pid);
        let file = File::open(&path).with_context(|| format!("cannot open {path}"))?;
        gemini_pagemap::ranges(&file, wanted, categories)
            .with_context(|| format!("cannot scan {path} (PAGEMAP_SCAN, Linux 6.7 or newer)"))
    }

    /// Guest addresses within `blocks` that hold memory, whoever has it mapped.
    ///
    /// # Errors
    /// If QEMU is gone.
    pub fn memory_in(&self, blocks: &BTreeSet<u64>) -> anyhow::Result<Vec<Range<u64>>> {
        let mut found = Vec::new();
        for part in &self.parts {
            let resident = self.resident(part)?;
            for gpa in blocks.iter().map(|block| block << BLOCK_SHIFT) {
                let within = |range: &Range<u64>| {
                    let part = range.start.max(gpa)..range.end.min(gpa + BLOCK);
                    (!part.is_empty()).then_some(part)
                };
                found.extend(resident.iter().filter_map(within));
            }
        }
        Ok(found)
    }

    /// Guest addresses of a part that hold memory, whoever has it mapped.
    fn resident(&self, part: &Part) -> anyhow::Result<Vec<Range<u64>>> {
        let file = self.file(part)?;
        let first = i64::try_from(part.address - part.mapping.start)?;
        let end = first + i64::try_from(part.gpa.end - part.gpa.start)?;
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
        let gpa = |offset: i64| -> anyhow::Result<u64> {
            Ok(part.gpa.start + u64::try_from(offset - first)?)
        };
        let mut found = Vec::new();
        let mut position = first;
        while position < end {
            let Some(data) = seek(position, libc::SEEK_DATA)?.filter(|data| *data < end) else {
                break;
            };
            let hole = seek(data, libc::SEEK_HOLE)?.unwrap_or(end).min(end);
            found.push(gpa(data)?..gpa(hole)?);
            position = hole;
        }
        Ok(found)
    }

    /// Bytes of memory that the guest costs the host.
    ///
    /// # Errors
    /// If QEMU is gone.
    pub fn resident_bytes(&self) -> anyhow::Result<u64> {
        let mut parts: Vec<&Part> = self.parts.iter().collect();
        // What lies below and above the gap is one file.
        parts.sort_by_key(|part| part.mapping.start);
        parts.dedup_by_key(|part| part.mapping.start);
        parts.iter().map(|part| Ok(self.file(part)?.metadata()?.blocks() * 512)).sum()
    }

    /// Inodes of the memory's files.
    ///
    /// # Errors
    /// If QEMU is gone.
    pub fn inodes(&self) -> anyhow::Result<BTreeSet<u64>> {
        self.parts.iter().map(|part| Ok(self.file(part)?.metadata()?.ino())).collect()
    }

    /// The memory's file, opened anew through the mapping.
    fn file(&self, part: &Part) -> anyhow::Result<File> {
        let Range { start, end } = part.mapping;
        let path = format!("/proc/{}/map_files/{start:x}-{end:x}", self.pid);
        File::open(&path).with_context(|| format!("cannot open {path}"))
    }
}

/// The machine's own memory: all of a mapping, with a gap for devices below
/// 4 GiB.
fn base_parts(mapping: &Range<u64>) -> Vec<Part> {
    let size = mapping.end - mapping.start;
    let low = if size >= 0xb000_0000 { size.min(0x8000_0000) } else { size };
    let part = |gpa: Range<u64>, offset: u64| Part {
        gpa,
        address: mapping.start + offset,
        mapping: mapping.clone(),
        pluggable: false,
    };
    let mut parts = vec![part(0..low, 0)];
    if size > low {
        parts.push(part(HIGH_START..HIGH_START + (size - low), low));
    }
    parts
}

/// Huge pages that this machine's kernel has made so that base pages could be
/// collapsed into them because somebody asked for it: all but khugepaged's.
///
/// # Errors
/// If the kernel does not count them.
pub fn requested_collapses() -> anyhow::Result<u64> {
    let text = fs::read_to_string("/proc/vmstat").context("cannot read /proc/vmstat")?;
    let all: u64 = text
        .lines()
        .find_map(|line| line.strip_prefix("thp_collapse_alloc "))
        .and_then(|count| count.parse().ok())
        .context("/proc/vmstat has no thp_collapse_alloc")?;
    Ok(all.saturating_sub(khugepageds_collapses()?))
}

/// Those of khugepaged, by itself.
///
/// # Errors
/// If the kernel does not count them.
pub fn khugepageds_collapses() -> anyhow::Result<u64> {
    const PATH: &str = "/sys/kernel/mm/transparent_hugepage/khugepaged/pages_collapsed";
    let text = fs::read_to_string(PATH).with_context(|| format!("cannot read {PATH}"))?;
    text.trim().parse().with_context(|| format!("{PATH} holds no number"))
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
    fn a_page_by_itself_has_come_back_only_to_virtio_mem() {
        let start = 0x7f00_0000_0000;
        let mut parts = base_parts(&(start..start + (1 << 30)));
        let gpa = 4 << 30..(4 << 30) + 4 * BLOCK;
        let pluggable =
            Part { gpa: gpa.clone(), address: 0, mapping: 0..4 * BLOCK, pluggable: true };
        parts.push(pluggable);
        let memory = GuestMemory { pid: 0, parts };
        let block = |number: u64, pages: u64| {
            (0..pages).map(move |page| (number << BLOCK_SHIFT) + (page << PAGE_SHIFT))
        };
        let back: BTreeSet<u64> =
            block(3, 9).chain(block(7, 512)).chain(block(gpa.start >> BLOCK_SHIFT, 1)).collect();
        let mut without = back.clone();
        without.extend(block(4, 1).chain(block(5, 8)));
        assert_eq!(memory.come_back(&without), back);
    }

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
        let parts = base_parts(&(start..start + (4 << 30)));
        let memory = GuestMemory { pid: 0, parts };
        assert_eq!(memory.address(BLOCK), Some(start + BLOCK));
        assert_eq!(memory.address(3 << 30), None);
        assert_eq!(memory.address(4 << 30), Some(start + (2 << 30)));
        assert_eq!(memory.address(6 << 30), None);
        assert!(memory.is_aligned());
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
        let memory = GuestMemory { pid: std::process::id(), parts: Vec::new() };
        let all = start..start + BLOCK;
        let present = memory.scan(&all, PRESENT).expect("our own page tables");
        assert!(present.iter().any(|range| range.start == start));
        // SAFETY: unmaps what was mapped above; nothing refers to it.
        unsafe { libc::munmap(address, length) };
    }
}

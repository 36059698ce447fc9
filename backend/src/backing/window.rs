//! A bounded window of our own into a memory file, huge-page-congruent and short-lived: for
//! looking at how the file is backed, for faulting pages in, and for collapsing where that is
//! not permitted at the VMM. What is not mapped costs no page tables.

use super::ranges::{note_mapped, Mapped};
use super::sys::{self, Advice, Mapping, PageRegion};
use std::fs::File;
use std::io;
use std::ops::Range;

/// Most blocks in one window: 128 MiB of address space with 2 MiB blocks, and as many page
/// tables as blocks in the worst case.
pub const WINDOW_BLOCKS: u64 = 64;

/// Regions that one page-table scan returns; the scan resumes where that was too few. Linux gathers
/// as many at once (fs/proc/task_mmu.c), and asked for more it may tell a wrong end.
const SCAN_REGIONS: usize = 512;

/// A piece of a memory file in our own address space.
pub struct Window {
    mapping: Mapping,
    /// From the start of the reservation to the piece.
    at: u64,
    block_shift: u32,
}

impl Window {
    /// Maps `blocks` blocks of `file` from `offset` on, which is a multiple of the block size.
    pub fn new(file: &File, offset: u64, blocks: u64, block_shift: u32) -> io::Result<Self> {
        let size = 1u64 << block_shift;
        let len = blocks.min(WINDOW_BLOCKS) << block_shift;
        // One block more than needed, so that a congruent address lies in it.
        let mut mapping = Mapping::reserve(len + size)?;
        let at = mapping.addr().next_multiple_of(size) - mapping.addr();
        mapping.map_file(at, file, offset, len)?;
        Ok(Self { mapping, at, block_shift })
    }

    fn at(&self, block: u64) -> u64 {
        self.at + (block << self.block_shift)
    }

    /// Advises all of `blocks` (numbered from the start of the window).
    pub fn advise(&self, blocks: &Range<u64>, advice: Advice) -> io::Result<()> {
        let len = (blocks.end - blocks.start) << self.block_shift;
        self.mapping.advise(self.at(blocks.start), len, advice)
    }

    /// Faults in the first page of a block; whatever the kernel puts there is what a process
    /// touching it would have got. Stores nothing.
    pub fn touch(&self, block: u64, advice: Advice) -> io::Result<()> {
        self.mapping.advise(self.at(block), sys::page_size(), advice)
    }

    /// How this window's blocks are mapped, as far as they were touched.
    pub fn mapped(&self, pagemap: &File, blocks: &mut [Mapped]) -> io::Result<()> {
        scan_mapped(pagemap, self.mapping.addr() + self.at, self.block_shift, blocks)
    }
}

/// How the blocks from address `base` on are mapped in the address space that `pagemap` shows.
pub fn scan_mapped(
    pagemap: &File,
    base: u64,
    block_shift: u32,
    blocks: &mut [Mapped],
) -> io::Result<()> {
    let mut regions = [PageRegion::default(); SCAN_REGIONS];
    let len = (blocks.len() as u64) << block_shift;
    let end = base.checked_add(len).ok_or_else(|| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
    let mut from = base;
    while from < end {
        let (found, walked) = sys::pagemap_scan(pagemap, &(from..end), &mut regions)?;
        for region in found {
            let huge = region.categories & sys::PAGE_IS_HUGE != 0;
            note_mapped(base, block_shift, &(region.start..region.end), huge, blocks);
        }
        if walked <= from {
            break; // the address space is gone, or the kernel has nothing more to say
        }
        from = walked;
    }
    Ok(())
}

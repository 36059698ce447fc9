//! Arithmetic of blocks, regions and page-table ranges; pure, so that it can be tested to death.
//!
//! Memory tables come from outside: nothing here assumes that their numbers make sense.

use super::HostRun;
use std::ops::Range;
use thiserror::Error;

/// Smallest and largest block size that make sense: 64 KiB and 16 GiB.
const BLOCK_SHIFTS: std::ops::RangeInclusive<u32> = 16..=34;

/// Most blocks of one guest: 32 TiB with 2 MiB blocks. Bounds what a memory table of sparse files
/// can make the daemon remember.
const MAX_BLOCKS: u64 = 1 << 24;

/// One region of a memory table, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First guest physical address.
    pub guest_addr: u64,
    /// Length.
    pub size: u64,
    /// Where in the file the region begins.
    pub file_offset: u64,
    /// Whether blocks of it can be managed at all.
    pub usable: bool,
}

/// Why a memory table cannot be used.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum LayoutError {
    /// The block size is absurd.
    #[error("a block size of 2^{0} bytes is not supported")]
    BlockShift(u32),
    /// A region of no bytes.
    #[error("the region at guest address {0:#x} is empty")]
    Empty(u64),
    /// An address or an offset does not fit.
    #[error("the region at guest address {0:#x} reaches beyond the end of the address space")]
    Overflow(u64),
    /// Two regions claim the same guest memory.
    #[error("the regions at guest addresses {0:#x} and {1:#x} overlap")]
    Overlap(u64, u64),
    /// More than the daemon is prepared to keep states of.
    #[error("the guest has {0} blocks, more than the supported {MAX_BLOCKS}")]
    TooLarge(u64),
}

impl Extent {
    /// One past the last guest physical address.
    fn guest_end(&self) -> Option<u64> {
        self.guest_addr.checked_add(self.size)
    }

    /// One past the last byte in the file; `None` if no file can be that long.
    pub fn file_end(&self) -> Option<u64> {
        self.file_offset.checked_add(self.size).filter(|end| i64::try_from(*end).is_ok())
    }

    /// Whether a block of guest memory is also one block of the file: without that no huge page
    /// of the file can lie behind a huge page of the guest.
    pub fn is_congruent(&self, block_shift: u32) -> bool {
        let mask = (1u64 << block_shift) - 1;
        self.guest_addr & mask == self.file_offset & mask
    }

    /// The blocks that lie wholly inside; empty if there are none.
    pub fn whole_blocks(&self, block_shift: u32) -> Range<u64> {
        let mask = (1u64 << block_shift) - 1;
        let end = self.guest_addr.saturating_add(self.size) >> block_shift;
        let start = (self.guest_addr >> block_shift) + u64::from(self.guest_addr & mask != 0);
        start..end.max(start)
    }
}

/// Where each managed block lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    spans: Vec<Range<u64>>,
    /// Blocks and the index of their region, ascending.
    homes: Vec<(Range<u64>, usize)>,
}

impl Layout {
    /// Lays out a memory table. Regions without a whole block, and those where no huge page
    /// could ever lie behind a block, contribute no blocks.
    ///
    /// # Errors
    /// For a table that contradicts itself.
    pub fn new(extents: &[Extent], block_shift: u32) -> Result<Self, LayoutError> {
        if !BLOCK_SHIFTS.contains(&block_shift) {
            return Err(LayoutError::BlockShift(block_shift));
        }
        let mut order: Vec<(usize, &Extent)> = extents.iter().enumerate().collect();
        order.sort_by_key(|(_, e)| e.guest_addr);
        let mut former: Option<(u64, u64)> = None;
        let mut homes = Vec::new();
        for (index, extent) in order {
            let at = extent.guest_addr;
            if extent.size == 0 {
                return Err(LayoutError::Empty(at));
            }
            let (Some(end), Some(_)) = (extent.guest_end(), extent.file_end()) else {
                return Err(LayoutError::Overflow(at));
            };
            if let Some((start, former_end)) = former {
                if at < former_end {
                    return Err(LayoutError::Overlap(start, at));
                }
            }
            former = Some((at, end));
            let blocks = extent.whole_blocks(block_shift);
            if extent.usable && !blocks.is_empty() && extent.is_congruent(block_shift) {
                homes.push((blocks, index));
            }
        }
        // No overflow: the regions are disjoint.
        let count = homes.iter().map(|(blocks, _)| blocks.end - blocks.start).sum();
        if count > MAX_BLOCKS {
            return Err(LayoutError::TooLarge(count));
        }
        let mut spans: Vec<Range<u64>> = Vec::new();
        for (blocks, _) in &homes {
            match spans.last_mut() {
                Some(last) if last.end == blocks.start => last.end = blocks.end,
                _ => spans.push(blocks.clone()),
            }
        }
        Ok(Self { spans, homes })
    }

    /// The managed blocks: ascending, disjoint, merged where adjacent.
    pub fn spans(&self) -> &[Range<u64>] {
        &self.spans
    }

    /// Whether all of `count` blocks from `first` on are managed; false for no blocks.
    pub fn contains(&self, first: u64, count: u64) -> bool {
        let Some(end) = first.checked_add(count).filter(|end| *end > first) else {
            return false;
        };
        let next = self.spans.partition_point(|span| span.end <= first);
        self.spans.get(next).is_some_and(|span| span.start <= first && end <= span.end)
    }

    /// The managed parts of `count` blocks from `first` on, ascending, each in one region.
    pub fn pieces(&self, first: u64, count: u64) -> impl Iterator<Item = (usize, Range<u64>)> + '_ {
        let end = first.saturating_add(count);
        let next = self.homes.partition_point(|(blocks, _)| blocks.end <= first);
        self.homes[next..]
            .iter()
            .take_while(move |(blocks, _)| blocks.start < end)
            .map(move |(blocks, region)| (*region, blocks.start.max(first)..blocks.end.min(end)))
            .filter(|(_, blocks)| !blocks.is_empty())
    }
}

/// Appends a run, as part of the last one where it continues that.
pub fn push_run(out: &mut Vec<HostRun>, run: HostRun) {
    if let Some(last) = out.last_mut() {
        let adjacent = last.first.checked_add(u64::from(last.count)) == Some(run.first);
        if adjacent && last.state == run.state && last.resident == run.resident {
            if let Some(count) = last.count.checked_add(run.count) {
                last.count = count;
                return;
            }
        }
    }
    if run.count > 0 {
        out.push(run);
    }
}

/// How a process maps a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mapped {
    /// Its page tables hold nothing of it.
    #[default]
    Nothing,
    /// Some pages of it.
    Small,
    /// All pages of it, as base pages.
    Full,
    /// As one huge page.
    Huge,
}

/// Notes what a page-table scan found at addresses `found` in the blocks that follow address
/// `base`. A scan tells adjacent pages of one kind in one go, mostly: a block whose pages it
/// tells in several goes counts as partly mapped.
pub fn note_mapped(
    base: u64,
    block_shift: u32,
    found: &Range<u64>,
    huge: bool,
    blocks: &mut [Mapped],
) {
    let size = 1u64 << block_shift;
    let start = found.start.max(base);
    if found.end <= start {
        return;
    }
    let first = (start - base) >> block_shift;
    let last = (found.end - 1 - base) >> block_shift;
    for index in first..=last {
        let Some(block) = usize::try_from(index).ok().and_then(|i| blocks.get_mut(i)) else {
            return;
        };
        let from = base.saturating_add(index * size);
        let whole = start <= from && from.saturating_add(size) <= found.end;
        *block = match (*block, whole) {
            (Mapped::Nothing, true) if huge => Mapped::Huge,
            (Mapped::Nothing, true) => Mapped::Full,
            (Mapped::Nothing, false) => Mapped::Small,
            (noted, _) => noted,
        };
    }
}

/// Splits ascending items into ranges of adjacent numbers, none longer than `most`.
pub fn runs_of(items: impl IntoIterator<Item = u64>, most: u64) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for item in items {
        match runs.last_mut() {
            Some(run) if run.end == item && run.end - run.start < most => run.end += 1,
            _ => runs.push(item..item + 1),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::super::HostState;
    use super::*;
    use proptest::prelude::*;

    const SHIFT: u32 = 21;
    const MIB: u64 = 1 << 20;

    fn extent(guest_addr: u64, size: u64, file_offset: u64) -> Extent {
        Extent { guest_addr, size, file_offset, usable: true }
    }

    #[test]
    fn layout_of_a_q35_table_manages_whole_blocks_only() {
        let table = [
            extent(1 << 32, 2048 * MIB, 2048 * MIB),
            extent(0, 0xa0000, 0),
            extent(0xc0000, 2048 * MIB - 0xc0000, 0xc0000),
        ];
        let layout = Layout::new(&table, SHIFT).unwrap();
        assert_eq!(layout.spans(), [1..1024, 2048..3072]);
        assert!(layout.contains(1, 1023));
        assert!(!layout.contains(0, 1));
        assert!(!layout.contains(1023, 2));
        assert!(!layout.contains(5, 0));
        assert!(!layout.contains(u64::MAX, 2));
        let pieces: Vec<_> = layout.pieces(0, 2050).collect();
        assert_eq!(pieces, [(2, 1..1024), (0, 2048..2050)]);
    }

    #[test]
    fn layout_merges_adjacent_regions_and_keeps_their_homes() {
        let table = [extent(0, 4 * MIB, 0), extent(4 * MIB, 4 * MIB, 16 * MIB)];
        let layout = Layout::new(&table, SHIFT).unwrap();
        assert_eq!(layout.spans().to_vec(), vec![0..4]);
        assert_eq!(layout.pieces(1, 2).collect::<Vec<_>>(), [(0, 1..2), (1, 2..3)]);
    }

    #[test]
    fn layout_refuses_tables_that_contradict_themselves() {
        let at = |table: &[Extent]| Layout::new(table, SHIFT);
        assert_eq!(at(&[extent(4096, 0, 0)]), Err(LayoutError::Empty(4096)));
        assert_eq!(at(&[extent(u64::MAX, 2, 0)]), Err(LayoutError::Overflow(u64::MAX)));
        assert_eq!(at(&[extent(0, 4096, u64::MAX)]), Err(LayoutError::Overflow(0)));
        assert_eq!(at(&[extent(0, 4096, i64::MAX as u64)]), Err(LayoutError::Overflow(0)));
        let overlapping = [extent(8192, 4096, 0), extent(0, 8193, 0)];
        assert_eq!(at(&overlapping), Err(LayoutError::Overlap(0, 8192)));
        let most = MAX_BLOCKS << SHIFT;
        assert!(at(&[extent(0, most, 0)]).is_ok());
        assert_eq!(at(&[extent(0, 2 * most, 0)]), Err(LayoutError::TooLarge(2 * MAX_BLOCKS)));
        assert_eq!(Layout::new(&[], 3), Err(LayoutError::BlockShift(3)));
        assert_eq!(Layout::new(&[], 64), Err(LayoutError::BlockShift(64)));
    }

    #[test]
    fn layout_leaves_out_regions_whose_file_offset_is_not_congruent() {
        let layout = Layout::new(&[extent(0, 64 * MIB, 4096)], SHIFT).unwrap();
        assert!(layout.spans().is_empty());
        assert_eq!(layout.pieces(0, u64::MAX).count(), 0);
    }

    #[test]
    fn note_mapped_tells_huge_from_small_and_nothing() {
        let base = 0x7f00_0000_0000;
        let size = 1u64 << SHIFT;
        let mut blocks = [Mapped::Nothing; 4];
        note_mapped(base, SHIFT, &(base..base + size), true, &mut blocks);
        note_mapped(base, SHIFT, &(base + 2 * size..base + 2 * size + 4096), false, &mut blocks);
        assert_eq!(blocks, [Mapped::Huge, Mapped::Nothing, Mapped::Small, Mapped::Nothing]);
        // A huge page that covers half a block of ours is none for us.
        note_mapped(base, SHIFT, &(base + 3 * size..base + 3 * size + size / 2), true, &mut blocks);
        assert_eq!(blocks[3], Mapped::Small);
        note_mapped(base, SHIFT, &(base + 4 * size..base + 9 * size), true, &mut blocks);
        note_mapped(base, SHIFT, &(0..base), true, &mut blocks);
        assert_eq!(blocks[0], Mapped::Huge);
    }

    #[test]
    fn runs_of_splits_at_gaps_and_at_the_longest_length() {
        assert_eq!(runs_of([1, 2, 3, 5, 6, 9], 2), vec![1..3, 3..4, 5..7, 9..10]);
        assert!(runs_of([], 2).is_empty());
    }

    proptest! {
        /// Each managed block is in exactly one region, lies wholly in it, and every block that
        /// lies wholly in a congruent region is managed.
        #[test]
        fn layout_agrees_with_brute_force(
            table in prop::collection::vec((0u64..40, 1u64..30, 0u64..4), 1..6),
        ) {
            let unit = MIB; // half a block: both aligned and unaligned borders occur
            let extents: Vec<Extent> =
                table.iter().map(|&(a, s, o)| extent(a * unit, s * unit, o * unit)).collect();
            let overlaps = extents.iter().enumerate().any(|(i, a)| {
                extents.iter().skip(i + 1).any(|b| {
                    a.guest_addr < b.guest_addr + b.size && b.guest_addr < a.guest_addr + a.size
                })
            });
            let layout = Layout::new(&extents, SHIFT);
            prop_assert_eq!(layout.is_err(), overlaps);
            let Ok(layout) = layout else { return Ok(()) };
            for block in 0..48u64 {
                let start = block << SHIFT;
                let home = extents.iter().position(|e| {
                    e.guest_addr <= start
                        && start + (1 << SHIFT) <= e.guest_addr + e.size
                        && e.is_congruent(SHIFT)
                });
                prop_assert_eq!(layout.contains(block, 1), home.is_some());
                let pieces: Vec<_> = layout.pieces(block, 1).collect();
                prop_assert_eq!(pieces, home.map(|h| (h, block..block + 1)).into_iter().collect::<Vec<_>>());
            }
            for pair in layout.spans().windows(2) {
                prop_assert!(pair[0].end < pair[1].start);
            }
        }

        /// Whatever the numbers are, nothing overflows and what is accepted is in range.
        #[test]
        fn layout_survives_any_numbers(
            table in prop::collection::vec((any::<u64>(), any::<u64>(), any::<u64>()), 0..5),
            shift in 0u32..70,
            first in any::<u64>(),
            count in any::<u64>(),
        ) {
            let extents: Vec<Extent> = table.iter().map(|&(a, s, o)| extent(a, s, o)).collect();
            if let Ok(layout) = Layout::new(&extents, shift) {
                let covered: u64 = layout.pieces(first, count).map(|(_, r)| r.end - r.start).sum();
                prop_assert!(covered <= count);
                prop_assert_eq!(layout.contains(first, count), count > 0 && covered == count
                    && first.checked_add(count).is_some());
            }
        }

        /// Runs are the states of the single blocks, in order, and maximal.
        #[test]
        fn push_run_keeps_every_block(states in prop::collection::vec((0u8..4, 0u32..2), 0..60)) {
            let mut runs = Vec::new();
            for (first, &(state, resident)) in (100u64..).zip(&states) {
                let state = HostState::from_wire(state).unwrap();
                push_run(&mut runs, HostRun { first, count: 1, state, resident });
            }
            let blocks: Vec<(u64, u8, u32)> = runs
                .iter()
                .flat_map(|r| (r.first..r.first + u64::from(r.count)).map(|b| (b, r.state as u8, r.resident)))
                .collect();
            let expected: Vec<(u64, u8, u32)> =
                (100u64..).zip(&states).map(|(b, &(s, r))| (b, s, r)).collect();
            prop_assert_eq!(blocks, expected);
            for pair in runs.windows(2) {
                prop_assert!((pair[0].state, pair[0].resident) != (pair[1].state, pair[1].resident));
            }
        }

        /// A block is huge or full only if one range covers it, and mapped if any touches it.
        #[test]
        fn note_mapped_agrees_with_pages(
            found in prop::collection::vec((0u64..2048, 1u64..700, any::<bool>()), 0..12),
        ) {
            let base = 1u64 << 40;
            let mut blocks = [Mapped::Nothing; 4];
            let mut at = 0;
            let mut pages = vec![None; 2048];
            let mut covered = [None; 4];
            for (gap, length, huge) in found {
                let (start, end) = (at + gap % 300, (at + gap % 300 + length).min(2048));
                if start >= end { break; }
                at = end;
                note_mapped(base, SHIFT, &(base + start * 4096..base + end * 4096), huge, &mut blocks);
                pages[usize::try_from(start).unwrap()..usize::try_from(end).unwrap()].fill(Some(huge));
                for (block, whole) in (0u64..).zip(&mut covered) {
                    if start <= block * 512 && (block + 1) * 512 <= end {
                        *whole = Some(huge);
                    }
                }
            }
            for (index, block) in blocks.iter().enumerate() {
                let any = pages[index * 512..(index + 1) * 512].iter().any(Option::is_some);
                let expected = match covered[index] {
                    Some(true) => Mapped::Huge,
                    Some(false) => Mapped::Full,
                    None if any => Mapped::Small,
                    None => Mapped::Nothing,
                };
                prop_assert_eq!(*block, expected);
            }
        }
    }
}

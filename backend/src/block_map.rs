//! What is known of every block, at both layers, with running counters.
//!
//! Blocks are kept densely: the managed spans of block numbers, one after the other, make the
//! *index* space `0..len`. A guest with holes in its address space (every PC has one below
//! 4 GiB) costs nothing for them.

use crate::backing::HostState;
use crate::protocol::GuestState;
use std::ops::Range;

/// State of one block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Block {
    /// State in the guest.
    pub guest: GuestState,
    /// State in the host.
    pub host: HostState,
    /// Base pages in use in the guest, where counted.
    pub used: u16,
    /// Base pages that are resident in the host where it has no huge page, when last looked at.
    pub resident: u16,
    /// Failed attempts of the host since the last success.
    pub failures: u8,
}

/// How the huge pages of one block meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alignment {
    /// Huge at both layers.
    Aligned,
    /// Huge in the guest alone.
    GuestOnly,
    /// Huge in the host alone, and in use by the guest.
    HostOnly,
    /// Huge at neither layer, or not in use.
    Neither,
}

/// Blocks with at most so many base pages in use are worth emptying, as the driver sees it: half
/// of a block of 2 MiB.
const FEW: u16 = 256;

impl Block {
    /// Whether the host's huge page is one that a guest huge page could have.
    pub fn is_unused(&self) -> bool {
        self.host == HostState::Huge
            && match self.guest {
                GuestState::Free | GuestState::Booked => true,
                GuestState::Base => (1..=FEW).contains(&self.used),
                GuestState::Unknown | GuestState::Huge | GuestState::Pinned => false,
            }
    }

    /// Whether the guest has one translation for all of it, and uses it much: a program's huge
    /// page, or what the guest's kernel works with all the time, by the word of its driver. The
    /// kernel maps all memory by pages of 1 GiB or 2 MiB. A guest that names more gains nothing
    /// that it would not have by telling of huge pages.
    pub fn guest_is_huge(&self) -> bool {
        match self.guest {
            GuestState::Huge => true,
            GuestState::Pinned => self.used > 0,
            _ => false,
        }
    }

    /// Classifies the block. A free block is not in use: it counts nowhere.
    pub fn alignment(&self) -> Alignment {
        match (self.guest, self.host.is_huge()) {
            (GuestState::Huge, true) => Alignment::Aligned,
            (GuestState::Huge, false) => Alignment::GuestOnly,
            (GuestState::Base | GuestState::Booked | GuestState::Pinned, true) => {
                Alignment::HostOnly
            }
            _ => Alignment::Neither,
        }
    }
}

/// Numbers of blocks by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// By [`GuestState`] wire value.
    pub guest: [u64; 6],
    /// By [`HostState`] wire value.
    pub host: [u64; 4],
    /// Huge at both layers.
    pub aligned: u64,
    /// Huge in the guest alone.
    pub guest_only: u64,
    /// Huge in the host alone, and in use.
    pub host_only: u64,
    /// Huge in the host, and of no use to the guest: free, held, or with few base pages in use.
    pub unused: u64,
}

impl Counters {
    /// How many of the blocks that are huge somewhere are so at both layers, from 0 to 1; of
    /// none, `None`.
    #[allow(clippy::cast_precision_loss)] // far fewer than 2^53 blocks
    pub fn aligned_rate(&self) -> Option<f64> {
        let huge = self.aligned + self.guest_only + self.host_only;
        (huge > 0).then(|| self.aligned as f64 / huge as f64)
    }

    fn alignment_mut(&mut self, alignment: Alignment) -> Option<&mut u64> {
        match alignment {
            Alignment::Aligned => Some(&mut self.aligned),
            Alignment::GuestOnly => Some(&mut self.guest_only),
            Alignment::HostOnly => Some(&mut self.host_only),
            Alignment::Neither => None,
        }
    }

    fn add(&mut self, block: &Block) {
        self.guest[block.guest as usize] += 1;
        self.host[block.host as usize] += 1;
        if let Some(n) = self.alignment_mut(block.alignment()) {
            *n += 1;
        }
        self.unused += u64::from(block.is_unused());
    }

    fn remove(&mut self, block: &Block) {
        self.guest[block.guest as usize] -= 1;
        self.host[block.host as usize] -= 1;
        if let Some(n) = self.alignment_mut(block.alignment()) {
            *n -= 1;
        }
        self.unused -= u64::from(block.is_unused());
    }
}

/// The states of all managed blocks.
#[derive(Debug, Default)]
pub struct BlockMap {
    /// Managed spans of block numbers, ascending and disjoint, each with its first index.
    spans: Vec<(Range<u64>, usize)>,
    blocks: Vec<Block>,
    counters: Counters,
}

impl BlockMap {
    /// A map of `spans`, which are ascending, disjoint and not empty. Every block starts as
    /// unknown in the guest and absent in the host.
    pub fn new(spans: &[Range<u64>]) -> Self {
        let mut indexed = Vec::with_capacity(spans.len());
        let mut len = 0;
        for span in spans {
            indexed.push((span.clone(), len));
            len += usize::try_from(span.end - span.start).unwrap_or(usize::MAX);
        }
        let mut counters = Counters::default();
        counters.guest[GuestState::Unknown as usize] = len as u64;
        counters.host[HostState::Absent as usize] = len as u64;
        Self { spans: indexed, blocks: vec![Block::default(); len], counters }
    }

    /// Number of managed blocks.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether nothing is managed.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Numbers of blocks by state.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// The state at an index; `None` beyond the end.
    pub fn get(&self, index: usize) -> Option<&Block> {
        self.blocks.get(index)
    }

    /// The index of a managed block.
    pub fn index_of(&self, block: u64) -> Option<usize> {
        let at = self.spans.partition_point(|(span, _)| span.end <= block);
        let (span, base) = self.spans.get(at)?;
        let offset = block.checked_sub(span.start)?;
        Some(base + usize::try_from(offset).ok()?)
    }

    /// The block number at an index, and how many blocks follow it without a hole (itself
    /// included).
    pub fn block_at(&self, index: usize) -> Option<(u64, usize)> {
        if index >= self.blocks.len() {
            return None;
        }
        let at = self.spans.partition_point(|(_, base)| *base <= index) - 1;
        let (span, base) = &self.spans[at];
        let block = span.start + (index - base) as u64;
        Some((block, usize::try_from(span.end - block).unwrap_or(usize::MAX)))
    }

    /// The index ranges that `count` blocks from `first` on cover; blocks that are not managed
    /// are left out, so hostile ranges cost no more than there are spans.
    pub fn index_ranges(&self, first: u64, count: u32) -> impl Iterator<Item = Range<usize>> + '_ {
        let end = first.saturating_add(u64::from(count));
        let from = self.spans.partition_point(|(span, _)| span.end <= first);
        self.spans[from..].iter().take_while(move |(span, _)| span.start < end).map(
            move |(span, base)| {
                let skip = first.saturating_sub(span.start);
                let last = end.min(span.end) - span.start;
                // Both are within the span, whose length fits the blocks vector.
                #[allow(clippy::cast_possible_truncation)]
                (base + skip as usize..base + last as usize)
            },
        )
    }

    /// Whether every one of `count` blocks from `first` on is managed; false for `count` 0.
    pub fn is_managed(&self, first: u64, count: u32) -> bool {
        let covered: usize = self.index_ranges(first, count).map(|r| r.len()).sum();
        count > 0 && covered as u64 == u64::from(count)
    }

    /// Changes a block; returns its new state if that made a difference.
    fn change(&mut self, index: usize, edit: impl FnOnce(&mut Block)) -> Option<Block> {
        let block = self.blocks.get_mut(index)?;
        let mut new = *block;
        edit(&mut new);
        if new == *block {
            return None;
        }
        self.counters.remove(block);
        self.counters.add(&new);
        *block = new;
        Some(new)
    }

    /// Sets the guest's state; returns the block if it changed.
    pub fn set_guest(&mut self, index: usize, state: GuestState, used: u16) -> Option<Block> {
        self.change(index, |b| (b.guest, b.used) = (state, used))
    }

    /// Sets the host's state; returns the block if it changed.
    pub fn set_host(&mut self, index: usize, state: HostState) -> Option<Block> {
        self.change(index, |b| b.host = state)
    }

    /// Sets the number of base pages that are resident in the host; whether it was another.
    pub fn set_resident(&mut self, index: usize, pages: u16) -> bool {
        let resident = self.blocks.get_mut(index).map(|block| &mut block.resident);
        resident.is_some_and(|resident| std::mem::replace(resident, pages) != pages)
    }

    /// Sets the number of failed attempts.
    pub fn set_failures(&mut self, index: usize, failures: u8) {
        if let Some(block) = self.blocks.get_mut(index) {
            block.failures = failures;
        }
    }

    /// Maximal runs of blocks that `key` maps to equal values, in ascending order of block
    /// numbers, from an index on: (first block, count, value, index after the run).
    pub fn runs<'a, K: PartialEq + 'a>(
        &'a self,
        from: usize,
        key: impl Fn(&Block) -> K + 'a,
    ) -> impl Iterator<Item = (u64, u32, K, usize)> + 'a {
        let mut at = from;
        std::iter::from_fn(move || {
            let (first, room) = self.block_at(at)?;
            let value = key(&self.blocks[at]);
            let room = room.min(u32::MAX as usize);
            let count = self.blocks[at..at + room].iter().take_while(|b| key(b) == value).count();
            at += count;
            Some((first, u32::try_from(count).unwrap_or(u32::MAX), value, at))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn recount(map: &BlockMap) -> Counters {
        let mut counters = Counters::default();
        for index in 0..map.len() {
            counters.add(map.get(index).unwrap());
        }
        counters
    }

    #[test]
    fn index_of_skips_holes() {
        let map = BlockMap::new(&[1..4, 10..12]);
        assert_eq!(map.len(), 5);
        assert_eq!(map.index_of(0), None);
        assert_eq!(map.index_of(3), Some(2));
        assert_eq!(map.index_of(4), None);
        assert_eq!(map.index_of(10), Some(3));
        assert_eq!(map.block_at(3), Some((10, 2)));
        assert_eq!(map.block_at(5), None);
    }

    #[test]
    fn is_managed_refuses_holes_and_overflow() {
        let map = BlockMap::new(&[1..4, 4..6, 10..12]);
        assert!(map.is_managed(1, 5));
        assert!(!map.is_managed(1, 6));
        assert!(!map.is_managed(1, 0));
        assert!(!map.is_managed(u64::MAX, u32::MAX));
    }

    #[test]
    fn alignment_counts_booked_blocks_that_hold_host_memory() {
        let block = Block { guest: GuestState::Booked, host: HostState::Huge, ..Block::default() };
        assert_eq!(block.alignment(), Alignment::HostOnly);
        let free = Block { guest: GuestState::Free, ..block };
        assert_eq!(free.alignment(), Alignment::Neither);
    }

    proptest! {
        #[test]
        fn counters_follow_every_change(
            ops in prop::collection::vec((0usize..12, 0u8..6, 0u16..513, 0u8..4), 0..200),
        ) {
            let mut map = BlockMap::new(&[2..7, 9..14]);
            for (index, guest, used, host) in ops {
                map.set_guest(index, GuestState::from_wire(guest).unwrap(), used);
                map.set_host(index, HostState::from_wire(host).unwrap());
                prop_assert_eq!(map.counters(), &recount(&map));
            }
        }

        #[test]
        fn runs_cover_every_block_once(states in prop::collection::vec(0u8..3, 10)) {
            let mut map = BlockMap::new(&[2..7, 9..14]);
            for (index, state) in states.iter().enumerate() {
                map.set_guest(index, GuestState::from_wire(*state).unwrap(), 0);
            }
            let mut seen = Vec::new();
            for (first, count, state, _) in map.runs(0, |b| b.guest) {
                for block in first..first + u64::from(count) {
                    seen.push((block, state));
                }
            }
            let expected: Vec<_> = (2..7).chain(9..14)
                .map(|b| (b, map.get(map.index_of(b).unwrap()).unwrap().guest)).collect();
            prop_assert_eq!(seen, expected);
        }

        #[test]
        fn index_ranges_agree_with_index_of(first in 0u64..16, count in 0u32..16) {
            let map = BlockMap::new(&[2..7, 9..14]);
            let ranges: Vec<usize> = map.index_ranges(first, count).flatten().collect();
            let expected: Vec<usize> =
                (first..first + u64::from(count)).filter_map(|b| map.index_of(b)).collect();
            prop_assert_eq!(ranges, expected);
        }
    }
}

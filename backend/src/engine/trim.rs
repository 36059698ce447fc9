//! TRIM names base pages. Everything else goes by blocks: which ones a request touches, and how
//! much there is to be had by trimming.

use crate::backing::HostState;
use crate::block_map::{Block, BlockMap};
use crate::protocol::{GuestState, PAGE_SHIFT};

/// What no memory has.
const NOWHERE: (u64, u32) = (u64::MAX, 0);

/// The blocks that ranges of base pages touch, ascending, each once. What no block can have (no
/// pages, or pages beyond the last address) comes out as a range that no memory has either; so do
/// ranges of more pages than their blocks have: the size of the guest bounds what a request costs.
pub fn blocks_of(pages: &[(u64, u32)], block_shift: u32) -> Vec<(u64, u32)> {
    let shift = block_shift - PAGE_SHIFT;
    let mut blocks: Vec<(u64, u64)> = pages
        .iter()
        .map(|&(first, count)| match (first.checked_add(u64::from(count)), count) {
            (Some(end), 1..) if end <= u64::MAX >> PAGE_SHIFT => {
                (first >> shift, ((end - 1) >> shift) + 1)
            }
            _ => (u64::MAX, u64::MAX),
        })
        .collect();
    blocks.sort_unstable();
    blocks.dedup_by(|next, last| {
        let touches = next.0 <= last.1 && last.0 != u64::MAX && next.0 != u64::MAX;
        last.1 = if touches { last.1.max(next.1) } else { last.1 };
        touches
    });
    let named: u64 = pages.iter().map(|(_, count)| u64::from(*count)).sum();
    let touched: u64 = blocks.iter().map(|(first, end)| end - first).sum();
    if named > touched.saturating_mul(1 << shift) {
        return vec![NOWHERE];
    }
    let count = |(first, end)| (first, u32::try_from(end - first).unwrap_or(u32::MAX));
    blocks.into_iter().map(count).collect()
}

/// Free base pages in a block that is sparsely used and huge in the host alone: those that a driver
/// may give back of it.
fn spare_pages(block: &Block, block_pages: u64) -> u64 {
    let used = u64::from(block.used);
    let sparse = block.host == HostState::Huge
        && block.guest == GuestState::Base
        && used > 0
        && used <= block_pages / 2;
    if sparse {
        block_pages - used
    } else {
        0
    }
}

/// How many blocks' worth of memory could be had by trimming, of blocks of so many base pages.
pub fn spare_blocks(map: &BlockMap, block_pages: u64) -> u64 {
    let blocks = (0..map.len()).filter_map(|index| map.get(index));
    blocks.map(|block| spare_pages(block, block_pages)).sum::<u64>() / block_pages
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const SHIFT: u32 = 21;

    #[test]
    fn blocks_are_named_once_and_in_order() {
        let pages = [(1024, 1), (0, 1), (511, 2), (3 * 512 + 7, 505), (5 * 512, 1024)];
        assert_eq!(blocks_of(&pages, SHIFT), [(0, 4), (5, 2)]);
    }

    #[test]
    fn what_no_memory_has_stays_refusable() {
        let map = BlockMap::new(&[0..8]);
        assert_eq!(blocks_of(&[(0, 4096), (0, 1)], SHIFT), [NOWHERE]);
        for bad in [(0, 0), (u64::MAX, 1), (u64::MAX - 3, 4), (u64::MAX >> PAGE_SHIFT, 1)] {
            let blocks = blocks_of(&[(0, 1), bad], SHIFT);
            assert!(!blocks.iter().all(|&(first, count)| map.is_managed(first, count)), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn every_page_lies_in_a_named_block(
            pages in prop::collection::vec((0u64..5000, 1u32..2000), 1..20),
        ) {
            let blocks = blocks_of(&pages, SHIFT);
            if blocks == [NOWHERE] {
                let named: u64 = pages.iter().map(|(_, count)| u64::from(*count)).sum();
                let touched: BTreeSet<u64> = pages
                    .iter()
                    .flat_map(|&(first, count)| first >> 9..=(first + u64::from(count) - 1) >> 9)
                    .collect();
                prop_assert!(named > touched.len() as u64 * 512);
                return Ok(());
            }
            let named = |block| blocks.iter().any(|&(first, count)| {
                (first..first + u64::from(count)).contains(&block)
            });
            for &(first, count) in &pages {
                prop_assert!((first..first + u64::from(count)).all(|page| named(page >> 9)));
            }
            for pair in blocks.windows(2) {
                prop_assert!(pair[0].0 + u64::from(pair[0].1) < pair[1].0);
            }
        }
    }

    #[test]
    fn sparse_host_only_blocks_alone_have_pages_to_spare() {
        let mut map = BlockMap::new(&[0..6]);
        for (index, guest, used, host) in [
            (0, GuestState::Base, 64, HostState::Huge),
            (1, GuestState::Base, 64, HostState::Huge),
            (2, GuestState::Base, 300, HostState::Huge), // well used
            (3, GuestState::Base, 0, HostState::Huge),   // not counted
            (4, GuestState::Base, 64, HostState::Base),  // trimmed already, perhaps
            (5, GuestState::Huge, 64, HostState::Huge),  // aligned
        ] {
            map.set_guest(index, guest, used);
            map.set_host(index, host);
        }
        assert_eq!(spare_blocks(&map, 512), 1);
        map.set_guest(2, GuestState::Base, 256);
        assert_eq!(spare_blocks(&map, 512), 2);
    }
}

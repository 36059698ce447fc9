//! Which blocks of guest memory the TLB costs most for.

use std::collections::HashMap;

use serde::Serialize;

use crate::counters::Counters;
use crate::host::{HostMap, BLOCK_SHIFT};
use crate::paging::{PageSize, Translation};
use crate::profile::Profile;

/// What was counted at one block of 2 MiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Block {
    /// Its number: guest physical address by 2 MiB.
    pub block: u64,
    /// Whether it was accessed at addresses of the guest's kernel.
    pub kernel: bool,
    /// The address of the last access that cost something.
    pub address: u64,
    /// Whether the guest mapped that by a huge page.
    pub guest_huge: bool,
    /// Whether the host had one there.
    pub host_huge: bool,
    /// Accesses that only the second level had an entry for.
    pub l2_hits: u64,
    /// Accesses that no level had one for.
    pub misses: u64,
    /// What both cost, in cycles: an estimate.
    pub tlb_cycles: u64,
}

/// Counts by block, the guest's kernel apart from its programs.
#[derive(Clone, Debug, Default)]
pub struct Blocks(HashMap<(u64, bool), Block>);

impl Blocks {
    /// Lays what an access has `spent` to the account of its block.
    pub fn add(
        &mut self,
        address: u64,
        translation: &Translation,
        host: &HostMap,
        (profile, spent): (&Profile, &Counters),
    ) {
        if spent.l2_hits + spent.tlb_misses == 0 {
            return;
        }
        let physical = translation.physical(address);
        let (block, kernel) = (physical >> BLOCK_SHIFT, address >> 63 == 1);
        let sum = self.0.entry((block, kernel)).or_default();
        *sum = Block {
            block,
            kernel,
            address,
            guest_huge: translation.size() > PageSize::Base,
            host_huge: host.page_size(physical) > PageSize::Base,
            l2_hits: sum.l2_hits + spent.l2_hits,
            misses: sum.misses + spent.tlb_misses,
            tlb_cycles: sum.tlb_cycles + profile.costs.cycles(spent),
        };
    }

    /// Both together: those of two processors.
    #[must_use]
    pub fn plus(mut self, other: &Self) -> Self {
        for (key, more) in &other.0 {
            let sum = self.0.entry(*key).or_default();
            *sum = Block {
                l2_hits: sum.l2_hits + more.l2_hits,
                misses: sum.misses + more.misses,
                tlb_cycles: sum.tlb_cycles + more.tlb_cycles,
                ..*more
            };
        }
        self
    }

    /// All of them, the most expensive first.
    #[must_use]
    pub fn ranked(&self) -> Vec<Block> {
        let mut blocks: Vec<Block> = self.0.values().copied().collect();
        blocks.sort_by_key(|block| (u64::MAX - block.tlb_cycles, block.block, block.kernel));
        blocks
    }
}

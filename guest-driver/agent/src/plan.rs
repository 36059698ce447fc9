//! Which ranges are promoted, and in which order. No system calls here.

use std::cmp::Reverse;
use std::ops::Range;

use crate::fmfi;
use crate::kernel::Geometry;
use crate::pagemap::{Occupancy, Placement};
use crate::process::Identity;

/// Why a range is left as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Skip {
    /// Fewer than half of its pages are present.
    Sparse,
    /// Pages are missing, and free memory is too fragmented to fill them in.
    Fragmented,
    /// Pages are swapped out.
    Swapped,
    /// Pages are shared with another process.
    Shared,
    /// It failed not long ago.
    Resting,
    /// Its owner does not want huge pages.
    OptedOut,
    /// A userfaultfd watches it.
    Userfaultfd,
    /// It is locked, or no ordinary memory.
    Special,
    /// Its control group, or the system, has no memory to spare.
    Headroom,
}

/// Whether what is in a range makes it worth promoting, and allows it, at a
/// fragmentation index of `fmfi`.
///
/// # Errors
/// Tells why not.
pub fn judge(occupancy: &Occupancy, fmfi: f64, geometry: Geometry) -> Result<(), Skip> {
    if occupancy.present * 2 < geometry.pages() {
        Err(Skip::Sparse)
    } else if occupancy.swapped > 0 {
        Err(Skip::Swapped)
    } else if occupancy.present < geometry.pages() && fmfi > fmfi::PREALLOCATION_LIMIT {
        Err(Skip::Fragmented)
    } else {
        Ok(())
    }
}

/// One block of a process's addresses that may be promoted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Whose it is.
    pub process: Identity,
    /// Where it starts.
    pub address: u64,
    /// Pages that are present, out of those of a block.
    pub present: u64,
    /// Pages that lie on host huge pages.
    pub on_host_huge: u64,
    rank: Rank,
}

/// Smaller ranks go first: host huge pages under base pages, then density in
/// eighths (a full range is alone in the highest).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    type2: Reverse<bool>,
    eighths: Reverse<u64>,
}

impl Candidate {
    /// A range with what was found in it.
    #[must_use]
    pub fn new(
        process: Identity,
        address: u64,
        occupancy: &Occupancy,
        placement: &Placement,
        geometry: Geometry,
    ) -> Self {
        let (present, on_host_huge) = (occupancy.present, placement.on_host_huge);
        let rank = Rank {
            // A range's pages may be spread over many blocks: most of them
            // decide.
            type2: Reverse(on_host_huge * 2 > present),
            eighths: Reverse(present * 8 / geometry.pages()),
        };
        Candidate { process, address, present, on_host_huge, rank }
    }

    /// Whether most of its pages lie on huge pages of the host: "type-2" in the
    /// paper.
    #[must_use]
    pub fn is_type2(&self) -> bool {
        self.rank.type2.0
    }

    fn key(&self) -> (Rank, Identity, u64) {
        (self.rank, self.process, self.address)
    }
}

/// The best candidates, a bounded number of them.
#[derive(Debug)]
pub struct Shortlist {
    limit: usize,
    items: Vec<Candidate>,
}

impl Shortlist {
    /// Keeps `limit` candidates, at least one.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Shortlist { limit: limit.max(1), items: Vec::new() }
    }

    /// Takes a candidate, which may push out a worse one.
    pub fn push(&mut self, candidate: Candidate) {
        self.items.push(candidate);
        // Selecting only now and then makes it linear over all.
        if self.items.len() >= 2 * self.limit {
            self.trim();
        }
    }

    fn trim(&mut self) {
        if self.items.len() > self.limit {
            self.items.select_nth_unstable_by_key(self.limit, Candidate::key);
            self.items.truncate(self.limit);
        }
    }

    /// The plan: best ranks first, neighbours of one rank joined to runs of at
    /// most `longest` blocks, because each call of the kernel makes every CPU
    /// drain its lists of pages.
    #[must_use]
    pub fn plan(mut self, longest: usize, geometry: Geometry) -> Vec<Run> {
        self.trim();
        self.items.sort_unstable_by_key(Candidate::key);
        let mut runs: Vec<Run> = Vec::new();
        for candidate in self.items {
            match runs.last_mut() {
                Some(run) if run.continues(&candidate, longest, geometry) => {
                    run.blocks.push(candidate);
                }
                _ => runs.push(Run { blocks: vec![candidate] }),
            }
        }
        runs
    }
}

/// Neighbouring candidates of one process, promoted by one call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    blocks: Vec<Candidate>,
}

impl Run {
    /// Its candidates, at least one, ascending.
    #[must_use]
    pub fn blocks(&self) -> &[Candidate] {
        &self.blocks
    }

    /// Whose it is.
    #[must_use]
    pub fn process(&self) -> Identity {
        self.blocks[0].process
    }

    fn continues(&self, next: &Candidate, longest: usize, geometry: Geometry) -> bool {
        let last = &self.blocks[self.blocks.len() - 1];
        self.blocks.len() < longest
            && last.process == next.process
            && last.rank == next.rank
            && last.address + geometry.block == next.address
    }

    /// The pieces that are left when only the blocks that `keep` wants stay.
    pub fn split(self, mut keep: impl FnMut(&Candidate) -> bool) -> Vec<Run> {
        let mut pieces: Vec<Run> = Vec::new();
        let mut open = false;
        for block in self.blocks {
            let kept = keep(&block);
            match pieces.last_mut() {
                Some(piece) if kept && open => piece.blocks.push(block),
                _ if kept => pieces.push(Run { blocks: vec![block] }),
                _ => {}
            }
            open = kept;
        }
        pieces
    }

    /// Its addresses.
    #[must_use]
    pub fn range(&self, geometry: Geometry) -> Range<u64> {
        let last = &self.blocks[self.blocks.len() - 1];
        self.blocks[0].address..last.address + geometry.block
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GEOMETRY: Geometry = Geometry { page: 4096, block: 2 << 20 };
    const BLOCK: u64 = 2 << 20;

    fn candidate(pid: i32, number: u64, present: u64, on_host_huge: u64) -> Candidate {
        let occupancy = Occupancy { present, ..Occupancy::default() };
        let placement = Placement { on_host_huge, shared: 0 };
        let process = Identity { pid, start: 1 };
        Candidate::new(process, number * BLOCK, &occupancy, &placement, GEOMETRY)
    }

    fn plan(candidates: &[Candidate], limit: usize, longest: usize) -> Vec<Run> {
        let mut shortlist = Shortlist::new(limit);
        candidates.iter().for_each(|candidate| shortlist.push(*candidate));
        shortlist.plan(longest, GEOMETRY)
    }

    #[test]
    fn half_present_is_enough_unless_memory_is_fragmented() {
        let judge = |present, swapped, fmfi| {
            judge(&Occupancy { present, zero: 0, swapped }, fmfi, GEOMETRY)
        };
        assert_eq!(judge(255, 0, 0.0), Err(Skip::Sparse));
        assert_eq!(judge(256, 0, 0.5), Ok(()));
        assert_eq!(judge(256, 0, 0.51), Err(Skip::Fragmented));
        assert_eq!(judge(512, 0, 1.0), Ok(()));
        assert_eq!(judge(511, 1, 0.0), Err(Skip::Swapped));
    }

    #[test]
    fn host_huge_goes_first_then_density() {
        let plan = plan(
            &[
                candidate(1, 0, 512, 0),
                candidate(1, 2, 300, 200),
                candidate(1, 4, 512, 256),
                candidate(1, 6, 512, 257),
                candidate(1, 8, 300, 0),
            ],
            100,
            16,
        );
        let order: Vec<u64> = plan.iter().map(|run| run.blocks[0].address / BLOCK).collect();
        assert_eq!(order, [6, 2, 0, 4, 8]);
    }

    #[test]
    fn runs_join_neighbours_up_to_their_limit() {
        let candidates: Vec<_> = (0..10).map(|number| candidate(1, number, 512, 0)).collect();
        let lengths: Vec<_> =
            plan(&candidates, 100, 4).iter().map(|run| run.blocks.len()).collect();
        assert_eq!(lengths, [4, 4, 2]);
    }

    #[test]
    fn split_keeps_what_is_wanted_and_joins_nothing_over_a_gap() {
        let candidates: Vec<_> = (0..6).map(|number| candidate(1, number, 512, 0)).collect();
        let run = plan(&candidates, 100, 16).remove(0);
        let pieces = run.split(|block| block.address != 2 * BLOCK && block.address != 5 * BLOCK);
        let ranges: Vec<_> = pieces.iter().map(|piece| piece.range(GEOMETRY)).collect();
        assert_eq!(ranges, [0..2 * BLOCK, 3 * BLOCK..5 * BLOCK]);
    }

    proptest! {
        #[test]
        fn plan_is_the_best_of_the_candidates_in_order(
            blocks in proptest::collection::btree_map(
                (1_i32..4, 0_u64..40), (256_u64..=512, 0_u64..=512), 0..60),
            limit in 1_usize..80,
            longest in 1_usize..20,
        ) {
            let candidates: Vec<Candidate> = blocks
                .iter()
                .map(|((pid, number), (present, on))| {
                    candidate(*pid, *number, *present, *on.min(present))
                })
                .collect();
            let mut expected = candidates.clone();
            expected.sort_by_key(Candidate::key);
            expected.truncate(limit);

            let runs = plan(&candidates, limit, longest);
            let planned: Vec<Candidate> =
                runs.iter().flat_map(|run| run.blocks.iter().copied()).collect();
            prop_assert_eq!(planned, expected);
            for run in &runs {
                let range = run.range(GEOMETRY);
                prop_assert_eq!((range.end - range.start) / BLOCK, run.blocks.len() as u64);
                prop_assert!(run.blocks.len() <= longest);
                prop_assert!(run.blocks.iter().all(|block| block.process == run.process()
                    && block.rank == run.blocks[0].rank));
            }
            // Type-2 before all others.
            let kinds: Vec<bool> = runs.iter().map(|run| run.blocks[0].is_type2()).collect();
            prop_assert!(kinds.windows(2).all(|pair| pair[0] || !pair[1]));
        }
    }
}

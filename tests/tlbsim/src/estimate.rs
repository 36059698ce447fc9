//! What the counters would come to in cycles: an estimate, and not a validated one.

use serde::Serialize;

use crate::counters::Counters;
use crate::profile::Profile;

/// What a processor is taken to lose by a TLB that has no entry, in cycles. Nothing
/// of it is taken to overlap with other work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Costs {
    /// Taking an entry over from the second level.
    pub l2_hit: u64,
    /// Reading one entry of a page table, the guest's or the host's, in a walk.
    pub table_read: u64,
}

impl Costs {
    /// Cycles lost by what was counted. The sum over parts is that of the whole, so
    /// that the difference of two answers is right, too.
    #[must_use]
    pub fn cycles(&self, counters: &Counters) -> u64 {
        self.l2_hit * counters.l2_hits + self.table_read * counters.page_walk_refs
    }
}

/// Counters, and what is estimated from them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Estimate {
    /// What was counted.
    #[serde(flatten)]
    pub counters: Counters,
    /// Instructions that were executed meanwhile; none if nobody counted them.
    pub instructions: Option<u64>,
    /// Cycles lost by the TLB.
    pub tlb_cycles: u64,
    /// All cycles: one an instruction, and those lost by the TLB. None without
    /// instructions.
    pub cycles: Option<u64>,
}

impl Estimate {
    /// The estimate for a processor.
    #[must_use]
    pub fn of(profile: &Profile, counters: Counters, instructions: Option<u64>) -> Self {
        let tlb_cycles = profile.costs.cycles(&counters);
        let cycles = instructions.map(|instructions| instructions + tlb_cycles);
        Estimate { counters, instructions, tlb_cycles, cycles }
    }

    /// Both together; instructions only if they are known of both.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        let sum = |one: Option<u64>, two: Option<u64>| Some(one? + two?);
        Estimate {
            counters: self.counters.plus(&other.counters),
            instructions: sum(self.instructions, other.instructions),
            tlb_cycles: self.tlb_cycles + other.tlb_cycles,
            cycles: sum(self.cycles, other.cycles),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::profile::{BROADWELL, ICE_LAKE};

    fn counted(l2_hits: u64, page_walk_refs: u64) -> Counters {
        // What is not in the sum.
        let others = Counters { accesses: 1 << 40, l1_hits: 1 << 39, ..Counters::default() };
        Counters { l2_hits, page_walk_refs, tlb_misses: page_walk_refs / 4, ..others }
    }

    #[test]
    fn cycles_are_instructions_and_what_the_tlb_costs() {
        let estimate = Estimate::of(&BROADWELL, counted(1000, 24), Some(5_000_000));
        assert_eq!(estimate.tlb_cycles, 1000 * 8 + 24 * 12);
        assert_eq!(estimate.cycles, Some(5_008_288));
        let other = Estimate::of(&ICE_LAKE, counted(1000, 24), Some(5_000_000));
        assert_eq!(other.cycles, Some(5_000_000 + 1000 * 7 + 24 * 14));
    }

    #[test]
    fn without_instructions_only_the_tlbs_part_is_told() {
        let part = Estimate::of(&BROADWELL, counted(1, 2), None);
        assert_eq!((part.instructions, part.tlb_cycles, part.cycles), (None, 32, None));
        let whole = Estimate::of(&BROADWELL, counted(1, 2), Some(10));
        assert_eq!(part.plus(&whole).cycles, None);
        assert_eq!(part.plus(&whole).tlb_cycles, 64);
        let told = json!(part);
        assert_eq!((&told["l2_hits"], &told["tlb_cycles"]), (&json!(1), &json!(32)));
        assert!(told["cycles"].is_null() && told["instructions"].is_null());
    }

    proptest! {
        #[test]
        fn parts_add_up(
            one in (0..1_u64 << 40, 0..1_u64 << 40, 0..1_u64 << 50),
            two in (0..1_u64 << 40, 0..1_u64 << 40, 0..1_u64 << 50),
        ) {
            let of = |(hits, reads, instructions)| {
                Estimate::of(&BROADWELL, counted(hits, reads), Some(instructions))
            };
            let (first, second) = (of(one), of(two));
            let instructions = first.instructions.zip(second.instructions).map(|(a, b)| a + b);
            let whole =
                Estimate::of(&BROADWELL, first.counters.plus(&second.counters), instructions);
            prop_assert_eq!(first.plus(&second), whole);
        }
    }
}

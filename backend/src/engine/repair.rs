//! What the host should do next, and when a block that failed may be tried again.

use crate::bitmap::Bitmap;
use crate::block_map::BlockMap;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

/// Most blocks in one action: the guest stalls on each of them in turn, so few at a time.
const BATCH: u64 = 4;
/// Rest of a block after its first failure; doubled by each further one.
const REST: Duration = Duration::from_millis(100);
/// Longest rest of a block: `REST << REST_SHIFT_MAX`, some 100 s.
const REST_SHIFT_MAX: u8 = 10;
/// Failures in a row, over all blocks, after which the whole engine rests as well: a host
/// without huge pages makes the daemon quieter, not busier.
const TIRED: u32 = 8;
/// Longest rest of the whole engine: `REST << TIRED_SHIFT_MAX`, some 13 s.
const TIRED_SHIFT_MAX: u32 = 7;

/// Something for the worker to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// Make resident blocks host-huge because the policy wants it.
    Collapse {
        /// First block number.
        first: u64,
        /// Number of blocks.
        count: u32,
    },
    /// Make blocks host-huge, resident or not, because the guest asked for it.
    Populate {
        /// First block number.
        first: u64,
        /// Number of blocks.
        count: u32,
    },
    /// All of a PREPARE was tried: look at the result and answer.
    Settle {
        /// Which PREPARE.
        id: u64,
        /// The ranges of the request: (first block, number of blocks).
        ranges: Vec<(u64, u32)>,
    },
}

/// How an attempt at one block ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Work was done; a look at the host will tell the result.
    Done,
    /// It is huge, though the VMM does not map it so yet.
    Idle,
    /// An ordinary failure: later perhaps.
    Failed,
}

/// A PREPARE request that is being worked on.
#[derive(Debug)]
struct Prepare {
    id: u64,
    ranges: Vec<(u64, u32)>,
    /// Range and offset of the next block.
    at: (usize, u32),
}

/// The work at hand for one guest.
#[derive(Debug)]
pub struct Repair {
    wanted: Bitmap,
    cursor: usize,
    /// Renewed blocks that are to be made huge.
    fill: Bitmap,
    resting: Bitmap,
    rests: BinaryHeap<Reverse<(Instant, usize)>>,
    failures_in_a_row: u32,
    tired_until: Option<Instant>,
    prepare: Option<Prepare>,
}

impl Repair {
    /// Nothing to do for `len` blocks.
    pub fn new(len: usize) -> Self {
        Self {
            wanted: Bitmap::new(len),
            cursor: 0,
            fill: Bitmap::new(len),
            resting: Bitmap::new(len),
            rests: BinaryHeap::new(),
            failures_in_a_row: 0,
            tired_until: None,
            prepare: None,
        }
    }

    /// Notes whether the policy wants a block collapsed.
    pub fn consider(&mut self, index: usize, wanted: bool) {
        self.wanted.assign(index, wanted && !self.resting.get(index));
    }

    /// Notes a renewed block.
    pub fn fill(&mut self, index: usize) {
        self.fill.assign(index, true);
    }

    /// A renewed block was renewed or released again, or is no longer held: forget the filling.
    pub fn forget_fill(&mut self, index: usize) {
        self.fill.assign(index, false);
    }

    /// Takes a PREPARE; the caller has checked that none is at work and that all is managed.
    pub fn prepare(&mut self, id: u64, ranges: Vec<(u64, u32)>) {
        self.prepare = Some(Prepare { id, ranges, at: (0, 0) });
    }

    /// Ends the PREPARE `id`, answered or cancelled; whether it was the one at work.
    pub fn end_prepare(&mut self, id: u64) -> bool {
        self.prepare.take_if(|p| p.id == id).is_some()
    }

    /// Whether there is work that could start, budgets allowing.
    pub fn pending(&self) -> bool {
        self.prepare.is_some() || self.fill.ones() > 0 || self.wanted.ones() > 0
    }

    /// When resting blocks, or the engine, wake up next.
    pub fn wakes_at(&self) -> Option<Instant> {
        let block = self.rests.peek().map(|Reverse((at, _))| *at);
        match (block, self.tired_until) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// Wakes what has rested; returns the indices to reconsider.
    pub fn wake(&mut self, now: Instant) -> Vec<usize> {
        if self.tired_until.is_some_and(|until| until <= now) {
            self.tired_until = None;
        }
        let mut awake = Vec::new();
        while let Some(Reverse((at, index))) = self.rests.peek().copied() {
            if at > now {
                break;
            }
            self.rests.pop();
            self.resting.assign(index, false);
            awake.push(index);
        }
        awake
    }

    /// Takes the next work of at most `allowance` blocks.
    pub fn next(&mut self, map: &BlockMap, allowance: u64) -> Option<Work> {
        let allowance = allowance.min(BATCH);
        if let Some(prepare) = &mut self.prepare {
            let (range, offset) = prepare.at;
            let Some(&(first, count)) = prepare.ranges.get(range) else {
                let ranges = std::mem::take(&mut prepare.ranges);
                return Some(Work::Settle { id: prepare.id, ranges });
            };
            if allowance == 0 {
                return None;
            }
            let take = u32::try_from(allowance).unwrap_or(u32::MAX).min(count - offset);
            prepare.at =
                if offset + take == count { (range + 1, 0) } else { (range, offset + take) };
            return Some(Work::Populate { first: first + u64::from(offset), count: take });
        }
        if allowance == 0 || self.tired_until.is_some() {
            return None;
        }
        if let Some((first, count)) = take_run(&mut self.fill, map, 0, allowance) {
            return Some(Work::Populate { first, count });
        }
        let start = self.wanted.next_wrapping(self.cursor)?;
        let (first, count) = take_run(&mut self.wanted, map, start, allowance)?;
        self.cursor = start + count as usize;
        Some(Work::Collapse { first, count })
    }

    /// Notes how an attempt at a block ended; returns the number of failures to remember.
    pub fn ended(&mut self, index: usize, outcome: Outcome, failures: u8, now: Instant) -> u8 {
        let failures = match outcome {
            Outcome::Done => 0,
            Outcome::Idle | Outcome::Failed => failures.saturating_add(1),
        };
        // After success too: until the next look tells the result there is nothing to do.
        self.wanted.assign(index, false);
        if !self.resting.get(index) {
            self.resting.assign(index, true);
            let rest = REST * (1 << failures.min(REST_SHIFT_MAX));
            self.rests.push(Reverse((now + rest, index)));
        }
        if outcome == Outcome::Failed {
            self.failures_in_a_row = self.failures_in_a_row.saturating_add(1);
            if self.failures_in_a_row >= TIRED {
                let shift = (self.failures_in_a_row - TIRED).min(TIRED_SHIFT_MAX);
                self.tired_until = Some(now + REST * (1 << shift));
            }
        } else {
            self.failures_in_a_row = 0;
            self.tired_until = None;
        }
        failures
    }
}

/// Takes up to `most` adjacent blocks out of `set`, from the first at or after `from` on.
fn take_run(set: &mut Bitmap, map: &BlockMap, from: usize, most: u64) -> Option<(u64, u32)> {
    let start = set.next(from)?;
    let (first, room) = map.block_at(start)?;
    let room = room.min(usize::try_from(most).unwrap_or(usize::MAX));
    let mut count = 0;
    while (count as usize) < room && set.get(start + count as usize) {
        set.assign(start + count as usize, false);
        count += 1;
    }
    Some((first, count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_block_rests_longer_each_time() {
        let map = BlockMap::new(&[0..8]);
        let mut now = Instant::now();
        let mut repair = Repair::new(8);
        let mut failures = 0;
        for attempt in 1..5u32 {
            repair.consider(3, true);
            assert_eq!(repair.next(&map, 9), Some(Work::Collapse { first: 3, count: 1 }));
            failures = repair.ended(3, Outcome::Failed, failures, now);
            repair.consider(3, true);
            assert_eq!(repair.next(&map, 9), None, "attempt {attempt} is retried at once");
            let rest = REST * (1 << attempt);
            assert!(repair.wake(now + rest - Duration::from_millis(1)).is_empty());
            now += rest;
            assert_eq!(repair.wake(now), vec![3]);
        }
    }

    #[test]
    fn many_failures_in_a_row_quiet_the_engine_and_one_success_ends_it() {
        let map = BlockMap::new(&[0..100]);
        let now = Instant::now();
        let mut repair = Repair::new(100);
        for index in 0..TIRED as usize {
            repair.ended(index, Outcome::Failed, 0, now);
        }
        repair.consider(50, true);
        assert_eq!(repair.next(&map, 9), None);
        repair.wake(now + REST);
        assert!(repair.next(&map, 9).is_some());
        repair.ended(50, Outcome::Done, 0, now + REST);
        repair.consider(60, true);
        assert!(repair.next(&map, 9).is_some());
    }

    #[test]
    fn prepare_comes_first_and_is_settled_after_its_last_block() {
        let map = BlockMap::new(&[0..100]);
        let mut repair = Repair::new(100);
        repair.consider(50, true);
        repair.prepare(9, vec![(7, 5), (20, 1)]);
        assert_eq!(repair.next(&map, 0), None);
        assert_eq!(repair.next(&map, 100), Some(Work::Populate { first: 7, count: 4 }));
        assert_eq!(repair.next(&map, 1), Some(Work::Populate { first: 11, count: 1 }));
        assert_eq!(repair.next(&map, 9), Some(Work::Populate { first: 20, count: 1 }));
        assert_eq!(
            repair.next(&map, 0),
            Some(Work::Settle { id: 9, ranges: vec![(7, 5), (20, 1)] })
        );
        assert!(!repair.end_prepare(8));
        assert!(repair.end_prepare(9));
        assert_eq!(repair.next(&map, 9), Some(Work::Collapse { first: 50, count: 1 }));
    }

    #[test]
    fn wanted_blocks_are_served_in_turn() {
        let map = BlockMap::new(&[0..100]);
        let mut repair = Repair::new(100);
        for index in [10, 11, 12, 13, 14, 90] {
            repair.consider(index, true);
        }
        assert_eq!(repair.next(&map, 9), Some(Work::Collapse { first: 10, count: 4 }));
        repair.consider(10, true);
        assert_eq!(repair.next(&map, 9), Some(Work::Collapse { first: 14, count: 1 }));
        assert_eq!(repair.next(&map, 9), Some(Work::Collapse { first: 90, count: 1 }));
        assert_eq!(repair.next(&map, 9), Some(Work::Collapse { first: 10, count: 1 }));
    }
}

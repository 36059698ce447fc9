//! Where the host is looked at next: everything once, then what the guest touched, and
//! round-robin, so slowly that an idle guest costs next to nothing, for what nobody told us.

use crate::bitmap::Bitmap;
use crate::block_map::BlockMap;
use std::time::{Duration, Instant};

/// Most blocks in one look; a look at this many takes some milliseconds.
const CHUNK: usize = 8192;
/// After a round-robin look that found something new the next one waits this many times the CPU
/// time that it took: 0.2 % of one CPU.
const REST_FACTOR_MIN: u32 = 500;
/// Each look that found nothing doubles the wait, up to this: 0.03 %, so that many guests in which
/// nothing happens cost little together.
const REST_FACTOR_MAX: u32 = 4000;
/// Shortest rest of the round-robin look.
const REST_MIN: Duration = Duration::from_millis(500);
/// Untouched blocks between two touched ones that are looked at along with them.
const GAP: usize = 16;

/// Why a look is made; it decides what it may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The first pass over everything: the driver waits for it.
    First,
    /// The guest reported something there, or we did something there.
    Touched,
    /// Nobody told us anything.
    RoundRobin,
}

/// Blocks to look at, by first block number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// First block number.
    pub first: u64,
    /// Number of blocks.
    pub count: u32,
    /// Why.
    pub reason: Reason,
}

/// The order of looks.
#[derive(Debug)]
pub struct ScanPlan {
    len: usize,
    /// Blocks below this index were looked at in the first pass.
    first_pass: usize,
    /// Looks of the first pass that have not come back.
    first_pass_out: bool,
    touched: Bitmap,
    /// A look of this plan that has not come back.
    out: bool,
    /// Blocks that somebody else has looked at since it was sent out.
    overtaken: Bitmap,
    round_robin: usize,
    round_robin_at: Instant,
    /// What the next round-robin look rests, in times of its CPU time.
    rest_factor: u32,
}

impl ScanPlan {
    /// A plan for `len` blocks that nobody looked at yet.
    pub fn new(len: usize, now: Instant) -> Self {
        Self {
            len,
            first_pass: 0,
            first_pass_out: false,
            touched: Bitmap::new(len),
            out: false,
            overtaken: Bitmap::new(len),
            round_robin: 0,
            round_robin_at: now,
            rest_factor: REST_FACTOR_MAX,
        }
    }

    /// Whether the whole host state was seen once.
    pub fn complete(&self) -> bool {
        self.first_pass >= self.len && !self.first_pass_out
    }

    /// Whether everything was seen that was to be looked at, but for what comes round and round.
    pub fn is_at_rest(&self) -> bool {
        self.complete() && self.touched.ones() == 0 && !self.out
    }

    /// Something happened to a block.
    pub fn look_at(&mut self, index: usize) {
        if index < self.first_pass {
            self.touched.assign(index, true);
        }
    }

    /// Whoever acted on a block has also looked at it.
    pub fn seen(&mut self, index: usize) {
        self.overtaken.assign(index, self.out);
    }

    /// Whether what the look under way tells of a block may be older than what is known. Then it
    /// is looked at again.
    pub fn is_overtaken(&mut self, index: usize) -> bool {
        let overtaken = self.overtaken.get(index);
        if overtaken {
            self.look_at(index);
        }
        overtaken
    }

    /// Why the next look would be made, if one is due.
    pub fn due(&self, now: Instant) -> Option<Reason> {
        if self.first_pass < self.len {
            Some(Reason::First)
        } else if self.touched.ones() > 0 {
            Some(Reason::Touched)
        } else if self.len > 0 && now >= self.round_robin_at {
            Some(Reason::RoundRobin)
        } else {
            None
        }
    }

    /// When the round-robin look is due.
    pub fn round_robin_at(&self) -> Instant {
        self.round_robin_at
    }

    /// Takes the next look out of the plan.
    pub fn next(&mut self, map: &BlockMap, now: Instant) -> Option<Look> {
        let reason = self.due(now)?;
        let (start, count) = match reason {
            Reason::First => {
                let start = self.first_pass;
                let count = map.block_at(start)?.1.min(CHUNK);
                self.first_pass += count;
                self.first_pass_out = true;
                (start, count)
            }
            Reason::Touched => {
                let start = self.touched.next(0)?;
                let room = map.block_at(start)?.1.min(CHUNK);
                let mut last = start;
                while let Some(index) = self.touched.next(last + 1) {
                    if index - start >= room || index - last > GAP {
                        break;
                    }
                    last = index;
                }
                for index in start..=last {
                    self.touched.assign(index, false);
                }
                (start, last - start + 1)
            }
            Reason::RoundRobin => {
                let start = if self.round_robin < self.len { self.round_robin } else { 0 };
                let count = map.block_at(start)?.1.min(CHUNK);
                self.round_robin = start + count;
                (start, count)
            }
        };
        let (first, _) = map.block_at(start)?;
        self.out = true;
        Some(Look { first, count: u32::try_from(count).ok()?, reason })
    }

    /// A look came back that took so much CPU time; whether it found `news`.
    pub fn done(&mut self, look: &Look, took: Duration, news: bool, now: Instant) {
        self.out = false;
        self.overtaken.clear();
        match look.reason {
            Reason::First => {
                self.first_pass_out = false;
                self.round_robin_at = now + REST_MIN;
            }
            Reason::Touched => {}
            Reason::RoundRobin => {
                let doubled = (self.rest_factor * 2).min(REST_FACTOR_MAX);
                self.rest_factor = if news { REST_FACTOR_MIN } else { doubled };
                self.round_robin_at = now + (took * self.rest_factor).max(REST_MIN);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_pass_covers_everything_before_it_is_complete() {
        let now = Instant::now();
        let map = BlockMap::new(&[0..10, 20..30_000]);
        let mut plan = ScanPlan::new(map.len(), now);
        let mut seen = 0;
        while !plan.complete() {
            let look = plan.next(&map, now).unwrap();
            assert_eq!(look.reason, Reason::First);
            assert!(map.is_managed(look.first, look.count));
            seen += look.count as usize;
            plan.done(&look, Duration::ZERO, false, now);
        }
        assert_eq!(seen, map.len());
        assert_eq!(plan.due(now), None);
    }

    #[test]
    fn touched_blocks_are_looked_at_together_and_once() {
        let now = Instant::now();
        let map = BlockMap::new(&[0..1000]);
        let mut plan = ScanPlan::new(map.len(), now);
        let look = plan.next(&map, now).unwrap();
        plan.done(&look, Duration::ZERO, false, now);
        plan.look_at(100);
        plan.look_at(110);
        plan.look_at(500);
        let look = plan.next(&map, now).unwrap();
        assert_eq!((look.first, look.count, look.reason), (100, 11, Reason::Touched));
        let look = plan.next(&map, now).unwrap();
        assert_eq!((look.first, look.count), (500, 1));
        assert_eq!(plan.next(&map, now), None);
    }

    #[test]
    fn a_look_that_was_overtaken_does_not_count_and_is_made_again() {
        let now = Instant::now();
        let map = BlockMap::new(&[0..100]);
        let mut plan = ScanPlan::new(map.len(), now);
        let look = plan.next(&map, now).unwrap();
        plan.seen(7);
        assert!(plan.is_overtaken(7) && !plan.is_overtaken(8));
        plan.done(&look, Duration::ZERO, false, now);
        let again = plan.next(&map, now).unwrap();
        assert_eq!((again.first, again.count, again.reason), (7, 1, Reason::Touched));
        plan.done(&again, Duration::ZERO, false, now);
        plan.seen(9);
        assert_eq!(plan.next(&map, now), None);
    }

    #[test]
    fn round_robin_rests_in_proportion_to_its_cost_and_longer_where_nothing_happens() {
        let mut now = Instant::now();
        let map = BlockMap::new(&[0..100]);
        let mut plan = ScanPlan::new(map.len(), now);
        let look = plan.next(&map, now).unwrap();
        plan.done(&look, Duration::ZERO, true, now);
        now += REST_MIN;
        let took = Duration::from_millis(10);
        for (news, seconds) in
            [(false, 40), (true, 5), (false, 10), (false, 20), (false, 40), (false, 40), (true, 5)]
        {
            let look = plan.next(&map, now).unwrap();
            assert_eq!(look.reason, Reason::RoundRobin);
            plan.done(&look, took, news, now);
            let due = now + Duration::from_secs(seconds);
            assert_eq!(plan.due(due - Duration::from_millis(1)), None, "{news} {seconds}");
            assert_eq!(plan.due(due), Some(Reason::RoundRobin));
            now = due;
        }
    }
}

//! What the host should do next, and when a block that failed may be tried again.

use crate::backing::HostState;
use crate::bitmap::Bitmap;
use crate::block_map::BlockMap;
use crate::policy::{Agenda, Policy};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;
use std::time::{Duration, Instant};

/// Most blocks in one action of the policy: the guest stalls on whichever it touches meanwhile.
const BATCH: u64 = 1;
/// After a collapse that the guest met the policy rests this many times as long as that took, so
/// that a program stalls for half of the time at most, however fast its blocks are collapsed.
const REST_AFTER_STALL: u32 = 1;
/// Longest such rest: where the daemon itself was put aside, a collapse only seems long.
const REST_AFTER_STALL_MAX: Duration = Duration::from_millis(100);
/// Most blocks in one action that the guest asked for: nobody waits for their contents, and each
/// action has the kernel empty its lists on every CPU.
const REQUESTED_BATCH: u64 = 8;
/// Rest of a block after its first failure; doubled by each further one.
const REST: Duration = Duration::from_millis(100);
/// Longest rest of a block: `REST << REST_SHIFT_MAX`, some 100 s.
const REST_SHIFT_MAX: u8 = 10;
/// Failures in a row, over all blocks, after which the whole engine rests as well: a host
/// without huge pages makes the daemon quieter, not busier.
const TIRED: u32 = 8;
/// Longest rest of the whole engine: `REST << TIRED_SHIFT_MAX`, some 13 s.
const TIRED_SHIFT_MAX: u32 = 7;

/// Requested actions in a row after which the policy gets one, whatever is requested.
const PATIENCE: u32 = 8;

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
    /// Make a host-huge block one of base pages, to have its huge page for another one.
    Demote {
        /// Block number.
        block: u64,
    },
    /// All of a PREPARE was tried: look at the result and answer.
    Settle {
        /// Which PREPARE.
        id: u64,
        /// The ranges of the request: (first block, number of blocks).
        ranges: Vec<(u64, u32)>,
    },
}

impl Work {
    /// The blocks that it may make huge.
    pub fn blocks(&self) -> Range<u64> {
        match *self {
            Self::Collapse { first, count } | Self::Populate { first, count } => {
                first..first + u64::from(count)
            }
            Self::Demote { .. } | Self::Settle { .. } => 0..0,
        }
    }
}

/// How an attempt at one block ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Work was done; a look at the host will tell the result.
    Done,
    /// It is huge, though the VMM does not map it so yet; or it is not wholly there.
    Idle,
    /// An ordinary failure: later perhaps.
    Failed,
    /// Another one: the host has no huge page for it.
    Lacking,
    /// It turned out to have contents, and there was no budget for copying them.
    Deferred,
}

/// A PREPARE request that is being worked on.
#[derive(Debug)]
struct Prepare {
    id: u64,
    ranges: Vec<(u64, u32)>,
    /// Range and offset of the next block.
    at: (usize, u32),
    /// The blocks that are left are not tried.
    skipped: bool,
}

/// What the next action may take; by default nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Allowance {
    /// Whether the CPU budget has something left for what the guest asked for.
    pub requested: bool,
    /// Whether it has something left for what the policy wants.
    pub background: bool,
    /// Blocks that may be copied.
    pub copies: u64,
    /// Blocks that may become huge because the policy wants it.
    pub pages: u64,
    /// Blocks that may become huge because of a PREPARE.
    pub prepared: u64,
    /// Blocks that may become huge because of a RENEW that was answered with OK.
    pub renewed: u64,
}

/// The work at hand for one guest.
#[derive(Debug)]
pub struct Repair {
    agenda: Agenda,
    /// Renewed blocks that are to be made huge.
    fill: Bitmap,
    resting: Bitmap,
    rests: BinaryHeap<Reverse<(Instant, usize)>>,
    failures_in_a_row: u32,
    tired_until: Option<Instant>,
    /// The guest has just been stalled.
    paused_until: Option<Instant>,
    prepare: Option<Prepare>,
    /// Requested actions since the last one that only the policy wanted.
    requested_in_a_row: u32,
}

impl Repair {
    /// Nothing to do for `len` blocks of a guest that boots.
    pub fn new(policy: Policy, len: usize) -> Self {
        Self {
            agenda: Agenda::new(policy, len),
            fill: Bitmap::new(len),
            resting: Bitmap::new(len),
            rests: BinaryHeap::new(),
            failures_in_a_row: 0,
            tired_until: None,
            paused_until: None,
            prepare: None,
            requested_in_a_row: 0,
        }
    }

    /// Notes whether the policy wants a block collapsed.
    pub fn consider(&mut self, index: usize, wanted: bool) {
        self.agenda.consider(index, wanted && !self.resting.get(index));
    }

    /// Another order of what the policy wants, of which every block is to be considered.
    pub fn set_agenda(&mut self, agenda: Agenda) {
        self.agenda = agenda;
    }

    /// What the policy wants.
    pub fn agenda(&mut self) -> &mut Agenda {
        &mut self.agenda
    }

    /// Notes a renewed block.
    pub fn fill(&mut self, index: usize) {
        self.fill.assign(index, true);
    }

    /// A renewed block was renewed or released again, or is huge: forget the filling.
    pub fn forget_fill(&mut self, index: usize) {
        self.fill.assign(index, false);
    }

    /// Takes a PREPARE; the caller has checked that none is at work and that all is managed.
    pub fn prepare(&mut self, id: u64, ranges: Vec<(u64, u32)>) {
        self.prepare = Some(Prepare { id, ranges, at: (0, 0), skipped: false });
    }

    /// Has the PREPARE at work come back to a block that was deferred.
    pub fn again(&mut self, block: u64) {
        let Some(prepare) = &mut self.prepare else { return };
        let at = prepare.ranges.iter().enumerate().find_map(|(range, &(first, count))| {
            let offset = u32::try_from(block.checked_sub(first)?).ok()?;
            (offset < count).then_some((range, offset))
        });
        prepare.at = at.map_or(prepare.at, |at| at.min(prepare.at));
    }

    /// Tries no more of the PREPARE at work: what is left of it is looking at the result.
    pub fn skip_prepare(&mut self) {
        if let Some(prepare) = &mut self.prepare {
            prepare.skipped = true;
        }
    }

    /// Ends the PREPARE `id`, answered or cancelled; whether it was the one at work.
    pub fn end_prepare(&mut self, id: u64) -> bool {
        self.prepare.take_if(|p| p.id == id).is_some()
    }

    /// Renewed blocks that are still to be made huge.
    pub fn fills(&self) -> u64 {
        self.fill.ones() as u64
    }

    /// Forgets all of them; which they were.
    pub fn forget_fills(&mut self) -> Vec<usize> {
        let mut fills = Vec::with_capacity(self.fill.ones());
        while let Some(index) = self.fill.next(fills.last().map_or(0, |last| last + 1)) {
            fills.push(index);
        }
        self.fill.clear();
        fills
    }

    /// Whether a renewed block is still to be made huge.
    pub fn fills_at(&self, index: usize) -> bool {
        self.fill.get(index)
    }

    /// Whether a block rests after an attempt.
    pub fn rests(&self, index: usize) -> bool {
        self.resting.get(index)
    }

    /// Whether something is to be done that the guest asked for.
    pub fn requested(&self) -> bool {
        self.prepare.is_some() || self.fill.ones() > 0
    }

    /// Whether something is to be done that the policy wants, and may be tried.
    pub fn wants(&self) -> bool {
        self.agenda.wanted() > 0 && self.tired_until.is_none() && self.paused_until.is_none()
    }

    /// When resting blocks, or the engine, wake up next.
    pub fn wakes_at(&self) -> Option<Instant> {
        let block = self.rests.peek().map(|Reverse((at, _))| *at);
        let agenda = self.agenda.wakes_at();
        [block, self.tired_until, self.paused_until, agenda].into_iter().flatten().min()
    }

    /// Wakes what has rested; returns the indices to reconsider.
    pub fn wake(&mut self, now: Instant) -> Vec<usize> {
        self.agenda.pass_time(now);
        if self.tired_until.is_some_and(|until| until <= now) {
            self.tired_until = None;
        }
        if self.paused_until.is_some_and(|until| until <= now) {
            self.paused_until = None;
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

    /// A collapse of the policy took so long, and the guest met it.
    pub fn pause(&mut self, took: Duration, now: Instant) {
        let rest = took.saturating_mul(REST_AFTER_STALL).min(REST_AFTER_STALL_MAX);
        self.paused_until = Some(now + rest);
    }

    /// Takes the next work. What the guest asked for comes first, so that its next huge pages need
    /// no repair, but every now and then comes what the policy wants.
    pub fn next(&mut self, map: &BlockMap, allowance: &Allowance) -> Option<Work> {
        if self.requested_in_a_row >= PATIENCE {
            if let Some(work) = self.next_wanted(map, allowance) {
                self.requested_in_a_row = 0;
                return Some(work);
            }
        }
        if let Some(work) = self.next_requested(map, allowance) {
            self.requested_in_a_row = self.requested_in_a_row.saturating_add(1);
            return Some(work);
        }
        let work = self.next_wanted(map, allowance)?;
        self.requested_in_a_row = 0;
        Some(work)
    }

    fn next_requested(&mut self, map: &BlockMap, allowance: &Allowance) -> Option<Work> {
        if self.prepare.is_some() {
            return self.next_of_prepare(map, allowance);
        }
        if !allowance.requested {
            return None;
        }
        let start = self.fill.next(0)?;
        let most = REQUESTED_BATCH.min(allowance.renewed);
        let (first, count) = take_run(&mut self.fill, map, start, most, allowance.copies)?;
        Some(Work::Populate { first, count })
    }

    fn next_of_prepare(&mut self, map: &BlockMap, allowance: &Allowance) -> Option<Work> {
        let prepare = self.prepare.as_mut()?;
        loop {
            let (range, offset) = prepare.at;
            let left = prepare.ranges.get(range).filter(|_| !prepare.skipped);
            let Some(&(first, count)) = left else {
                let ranges = std::mem::take(&mut prepare.ranges);
                return Some(Work::Settle { id: prepare.id, ranges });
            };
            if !allowance.requested {
                return None;
            }
            let first = first + u64::from(offset);
            let most = REQUESTED_BATCH.min(u64::from(count - offset));
            let (mut take, mut pages, mut copies) = (0, 0, 0);
            let mut hopeless = false;
            for block in first..first + most {
                let index = map.index_of(block);
                let known = index.and_then(|index| map.get(index)).copied().unwrap_or_default();
                pages += u64::from(!known.host.is_huge());
                copies += u64::from(known.host == HostState::Base);
                let rests = known.failures > 0 && index.is_some_and(|i| self.resting.get(i));
                hopeless = pages > allowance.prepared || (rests && !known.host.is_huge());
                if hopeless || copies > allowance.copies {
                    break;
                }
                take += 1;
            }
            // A block for which there is no page, or that rests after it failed, is passed over:
            // the records tell the driver.
            let skip = u32::from(take == 0 && hopeless);
            let next = offset + take + skip;
            prepare.at = if next == count { (range + 1, 0) } else { (range, next) };
            if skip == 0 {
                return (take > 0).then_some(Work::Populate { first, count: take });
            }
        }
    }

    fn next_wanted(&mut self, map: &BlockMap, allowance: &Allowance) -> Option<Work> {
        let turn = self.requested_in_a_row >= PATIENCE && allowance.requested;
        if !self.wants() || !(allowance.background || turn) {
            return None;
        }
        let start = self.agenda.peek()?;
        let most = BATCH.min(allowance.pages);
        let wanted = self.agenda.wanted_mut();
        let (first, count) = take_run(wanted, map, start, most, allowance.copies)?;
        self.agenda.taken(start, count);
        Some(Work::Collapse { first, count })
    }

    /// Notes how an attempt at a block ended; returns the number of failures to remember.
    pub fn ended(&mut self, index: usize, outcome: Outcome, failures: u8, now: Instant) -> u8 {
        let failures = match outcome {
            // Nothing was tried.
            Outcome::Deferred => return failures,
            Outcome::Done => 0,
            Outcome::Idle | Outcome::Failed | Outcome::Lacking => failures.saturating_add(1),
        };
        // After success too: until the next look tells the result there is nothing to do.
        self.agenda.consider(index, false);
        if !self.resting.get(index) {
            self.resting.assign(index, true);
            let rest = REST * (1 << failures.min(REST_SHIFT_MAX));
            self.rests.push(Reverse((now + rest, index)));
        }
        if matches!(outcome, Outcome::Failed | Outcome::Lacking) {
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

/// Takes up to `most` adjacent blocks out of `set`, from `start` on, which is in it; no more than
/// `copies` of them have contents.
fn take_run(
    set: &mut Bitmap,
    map: &BlockMap,
    start: usize,
    most: u64,
    mut copies: u64,
) -> Option<(u64, u32)> {
    let (first, room) = map.block_at(start)?;
    let room = room.min(usize::try_from(most).unwrap_or(usize::MAX));
    let mut count = 0;
    while (count as usize) < room && set.get(start + count as usize) {
        let index = start + count as usize;
        if map.get(index).is_some_and(|block| block.host == HostState::Base) {
            let Some(left) = copies.checked_sub(1) else { break };
            copies = left;
        }
        set.assign(index, false);
        count += 1;
    }
    (count > 0).then_some((first, count))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A map of resident blocks, which can only be copied.
    fn resident(blocks: u64) -> BlockMap {
        let mut map = BlockMap::new(&[0..blocks]);
        for index in 0..map.len() {
            map.set_host(index, HostState::Base);
        }
        map
    }

    /// Everything but copies is there in plenty.
    fn copies(copies: u64) -> Allowance {
        let plenty = u64::MAX;
        Allowance {
            requested: true,
            background: true,
            copies,
            pages: plenty,
            prepared: plenty,
            renewed: plenty,
        }
    }

    #[test]
    fn failed_block_rests_longer_each_time() {
        let map = resident(8);
        let mut now = Instant::now();
        let mut repair = Repair::new(Policy::Always, 8);
        let mut failures = 0;
        for attempt in 1..5u32 {
            repair.consider(3, true);
            assert_eq!(repair.next(&map, &copies(9)), Some(Work::Collapse { first: 3, count: 1 }));
            failures = repair.ended(3, Outcome::Failed, failures, now);
            repair.consider(3, true);
            assert_eq!(repair.next(&map, &copies(9)), None, "attempt {attempt} is retried at once");
            let rest = REST * (1 << attempt);
            assert!(repair.wake(now + rest - Duration::from_millis(1)).is_empty());
            now += rest;
            assert_eq!(repair.wake(now), vec![3]);
        }
    }

    #[test]
    fn a_skipped_prepare_is_settled_without_any_allowance() {
        let map = resident(8);
        let mut repair = Repair::new(Policy::Always, 8);
        repair.prepare(7, vec![(0, 3), (5, 1)]);
        assert_eq!(repair.next(&map, &Allowance::default()), None);
        repair.skip_prepare();
        repair.again(1); // an action that was under way ended
        let settle = Work::Settle { id: 7, ranges: vec![(0, 3), (5, 1)] };
        assert_eq!(repair.next(&map, &Allowance::default()), Some(settle));
    }

    #[test]
    fn many_failures_in_a_row_quiet_the_engine_and_one_success_ends_it() {
        let map = resident(100);
        let now = Instant::now();
        let mut repair = Repair::new(Policy::Always, 100);
        for index in 0..TIRED as usize {
            repair.ended(index, Outcome::Failed, 0, now);
        }
        repair.consider(50, true);
        assert_eq!(repair.next(&map, &copies(9)), None);
        repair.wake(now + REST);
        assert!(repair.next(&map, &copies(9)).is_some());
        repair.ended(50, Outcome::Done, 0, now + REST);
        repair.consider(60, true);
        assert!(repair.next(&map, &copies(9)).is_some());
    }

    #[test]
    fn prepare_comes_first_and_is_settled_after_its_last_block() {
        let map = resident(100);
        let mut repair = Repair::new(Policy::Always, 100);
        repair.consider(50, true);
        repair.prepare(9, vec![(7, 9), (20, 1)]);
        assert_eq!(repair.next(&map, &copies(0)), None);
        assert_eq!(repair.next(&map, &copies(100)), Some(Work::Populate { first: 7, count: 8 }));
        assert_eq!(repair.next(&map, &copies(1)), Some(Work::Populate { first: 15, count: 1 }));
        assert_eq!(repair.next(&map, &copies(9)), Some(Work::Populate { first: 20, count: 1 }));
        assert_eq!(
            repair.next(&map, &copies(0)),
            Some(Work::Settle { id: 9, ranges: vec![(7, 9), (20, 1)] })
        );
        assert!(!repair.end_prepare(8));
        assert!(repair.end_prepare(9));
        assert_eq!(repair.next(&map, &copies(9)), Some(Work::Collapse { first: 50, count: 1 }));
    }

    #[test]
    fn wanted_blocks_are_served_in_turn() {
        let map = resident(100);
        let mut repair = Repair::new(Policy::Always, 100);
        for index in [10, 11, 12, 13, 14, 90] {
            repair.consider(index, true);
        }
        for first in [10, 11, 12, 13] {
            assert_eq!(repair.next(&map, &copies(9)), Some(Work::Collapse { first, count: 1 }));
        }
        repair.consider(10, true);
        for first in [14, 90, 10] {
            assert_eq!(repair.next(&map, &copies(9)), Some(Work::Collapse { first, count: 1 }));
        }
    }

    #[test]
    fn a_guest_that_was_stalled_is_left_alone_for_a_while() {
        let map = resident(100);
        let now = Instant::now();
        let ms = Duration::from_millis;
        let mut repair = Repair::new(Policy::Always, 100);
        repair.consider(10, true);
        repair.pause(ms(5), now);
        assert_eq!(repair.wakes_at(), Some(now + ms(5)));
        repair.wake(now + ms(4));
        assert_eq!(repair.next(&map, &copies(9)), None);
        repair.fill(60);
        assert!(matches!(repair.next(&map, &copies(9)), Some(Work::Populate { .. })));
        repair.wake(now + ms(5));
        assert!(matches!(repair.next(&map, &copies(9)), Some(Work::Collapse { .. })));
        repair.pause(ms(10_000), now);
        assert_eq!(repair.wakes_at(), Some(now + REST_AFTER_STALL_MAX));
    }

    #[test]
    fn prepare_passes_over_what_rests_after_failures() {
        let mut map = resident(100);
        let now = Instant::now();
        let mut repair = Repair::new(Policy::Always, 100);
        let failures = repair.ended(11, Outcome::Failed, 0, now);
        map.set_failures(11, failures);
        repair.ended(12, Outcome::Done, 0, now);
        repair.prepare(9, vec![(10, 4)]);
        let plenty = copies(9);
        assert_eq!(repair.next(&map, &plenty), Some(Work::Populate { first: 10, count: 1 }));
        assert_eq!(repair.next(&map, &plenty), Some(Work::Populate { first: 12, count: 2 }));
        repair.next(&map, &plenty);
        assert!(repair.end_prepare(9));
        repair.wake(now + 2 * REST);
        repair.prepare(10, vec![(11, 1)]);
        assert_eq!(repair.next(&map, &plenty), Some(Work::Populate { first: 11, count: 1 }));
    }

    #[test]
    fn prepare_comes_back_to_what_was_deferred() {
        let map = resident(100);
        let mut repair = Repair::new(Policy::Always, 100);
        repair.prepare(9, vec![(20, 2), (10, 2)]);
        for first in [20, 10] {
            assert_eq!(repair.next(&map, &copies(2)), Some(Work::Populate { first, count: 2 }));
        }
        for block in [10, 21, 90] {
            repair.again(block);
        }
        assert_eq!(repair.next(&map, &copies(2)), Some(Work::Populate { first: 21, count: 1 }));
        assert_eq!(repair.next(&map, &copies(2)), Some(Work::Populate { first: 10, count: 2 }));
        assert!(matches!(repair.next(&map, &copies(2)), Some(Work::Settle { .. })));
    }

    #[test]
    fn prepare_passes_over_what_is_beyond_the_supply() {
        let mut map = resident(100);
        map.set_host(12, HostState::Huge);
        let mut repair = Repair::new(Policy::Always, 100);
        repair.prepare(9, vec![(10, 4)]);
        let two = Allowance { prepared: 2, ..copies(9) };
        assert_eq!(repair.next(&map, &two), Some(Work::Populate { first: 10, count: 3 }));
        let none = Allowance { prepared: 0, ..copies(9) };
        assert_eq!(repair.next(&map, &none), Some(Work::Settle { id: 9, ranges: vec![(10, 4)] }));
    }

    #[test]
    fn what_the_guest_asked_for_comes_first_and_starves_nothing() {
        let map = resident(100);
        let mut repair = Repair::new(Policy::Always, 100);
        repair.consider(99, true);
        (0..90).for_each(|index| repair.fill(index));
        let now = Allowance { background: false, ..copies(9) };
        for _ in 0..PATIENCE {
            assert!(matches!(repair.next(&map, &now), Some(Work::Populate { .. })));
        }
        assert_eq!(repair.next(&map, &now), Some(Work::Collapse { first: 99, count: 1 }));
        assert!(matches!(repair.next(&map, &now), Some(Work::Populate { .. })));
    }

    #[test]
    fn nothing_is_done_for_which_there_is_no_huge_page() {
        let map = resident(100);
        let mut repair = Repair::new(Policy::Always, 100);
        repair.consider(50, true);
        let none = Allowance { pages: 0, prepared: 0, ..copies(9) };
        assert_eq!(repair.next(&map, &none), None);
        repair.fill(60);
        assert_eq!(
            repair.next(&map, &none),
            Some(Work::Populate { first: 60, count: 1 }),
            "what was promised is given"
        );
        repair.fill(61);
        assert_eq!(repair.next(&map, &Allowance { renewed: 0, ..none }), None);
        assert_eq!(repair.forget_fills(), [61]);
        assert_eq!(repair.fills(), 0);
    }

    #[test]
    fn absent_blocks_need_no_leave_to_copy() {
        let mut map = resident(100);
        map.set_host(60, HostState::Absent);
        let mut repair = Repair::new(Policy::Always, 100);
        repair.fill(60);
        repair.fill(61);
        assert_eq!(repair.next(&map, &copies(0)), Some(Work::Populate { first: 60, count: 1 }));
        assert_eq!(repair.next(&map, &copies(0)), None);
    }
}

//! Which huge pages of the host a guest at its limit has no use for: those under blocks that are
//! free there, or hold base pages. Taken from these, they can go where the guest has huge pages.
//! After them those under huge pages of the guest that are cold, where there are hot ones without.
//!
//! A block that was just freed is likely to be used again as a huge page (the driver books it), so
//! only one that was of no use in two sweeps is taken; the time between them is the caller's.

use crate::backing::HostState;
use crate::bitmap::Bitmap;
use crate::block_map::{Block, BlockMap};
use crate::policy::{Ages, AGES, COLD};
use crate::protocol::GuestState;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Most blocks that are taken in consequence of one.
const MOST: usize = 256;
/// Of the ages of what is cold so many are too young: it was cold for three sweeps at least.
const YOUNG: usize = 3;
/// How long a block keeps the huge page that it got because it was hot. Once it has one the TLB may
/// hold it, and then it does not look hot any more.
const SPARED: Duration = Duration::from_secs(600);

/// The search for such blocks.
#[derive(Debug)]
pub struct Demotion {
    /// Of no use at the last sweep, by the number of sweeps.
    unused: Ages,
    /// Indices that are to be demoted, free ones first, and of these what was of no use for longest.
    victims: VecDeque<usize>,
    /// Aligned and cold at the last sweep, by the number of sweeps.
    cold: Ages,
    /// Indices of those that are to be demoted for hot ones, the coldest first.
    cold_victims: VecDeque<usize>,
    /// Blocks that are spared, and until when.
    spared: Bitmap,
    spared_until: VecDeque<(Instant, usize)>,
    /// The same where huge pages have to be given back, with how much they are missed.
    surplus: VecDeque<(u8, usize)>,
    next_sweep: Instant,
}

fn is_unused(block: &Block) -> bool {
    block.host == HostState::Huge && matches!(block.guest, GuestState::Free | GuestState::Base)
}

/// Whether both layers have a huge page that is cold, by the word of the driver. Of a driver that
/// does not tell all are: then there is no hot block either.
fn is_cold(block: &Block) -> bool {
    block.host == HostState::Huge && block.guest == GuestState::Huge && block.used < COLD
}

/// How much a huge page would be missed: 0 not at all.
fn missed(block: &Block) -> u8 {
    match block.guest {
        GuestState::Free => 0,
        GuestState::Unknown | GuestState::Booked => 1,
        GuestState::Base => 2,
        GuestState::Pinned => 3,
        GuestState::Huge => 4,
    }
}

impl Demotion {
    /// Nothing is known of `len` blocks.
    pub fn new(len: usize, now: Instant) -> Self {
        Self {
            unused: Ages::new(len),
            victims: VecDeque::new(),
            cold: Ages::new(len),
            cold_victims: VecDeque::new(),
            spared: Bitmap::new(len),
            spared_until: VecDeque::new(),
            surplus: VecDeque::new(),
            next_sweep: now,
        }
    }

    /// When the next sweep is due.
    pub fn next_sweep(&self) -> Instant {
        self.next_sweep
    }

    /// Looks for such blocks if it is time for that.
    pub fn look(
        &mut self,
        map: &BlockMap,
        rests: impl Fn(usize) -> bool,
        kept: Duration,
        now: Instant,
    ) {
        let empty = self.victims.is_empty() || self.cold_victims.is_empty();
        if empty && now >= self.next_sweep {
            self.next_sweep = now + kept;
            self.sweep(map, rests);
        }
    }

    /// The next block to demote, by its number: one that was of no use for the time `kept` at
    /// least, and none that `rests`.
    pub fn next(
        &mut self,
        map: &BlockMap,
        rests: impl Fn(usize) -> bool,
        kept: Duration,
        now: Instant,
    ) -> Option<u64> {
        self.look(map, rests, kept, now);
        while let Some(index) = self.victims.pop_front() {
            if map.get(index).is_some_and(is_unused) {
                return map.block_at(index).map(|(block, _)| block);
            }
        }
        None
    }

    /// The next block to demote for one that is hot, if none is of no use: one that is used less
    /// than `makes_way`, and had been cold for long when [`Demotion::look`] looked last.
    pub fn next_cold(&mut self, map: &BlockMap, makes_way: u16, now: Instant) -> Option<u64> {
        while let Some((_, index)) = self.spared_until.front().filter(|(until, _)| *until <= now) {
            self.spared.assign(*index, false);
            self.spared_until.pop_front();
        }
        while let Some(index) = self.cold_victims.front().copied() {
            let cold = map.get(index).filter(|block| is_cold(block) && !self.spared.get(index));
            if cold.is_some_and(|block| block.used >= makes_way) {
                return None; // so are those behind it, and hotter ones may be wanted next
            }
            self.cold_victims.pop_front();
            if cold.is_some() {
                return map.block_at(index).map(|(block, _)| block);
            }
        }
        None
    }

    /// A block got its huge page because it was hot: it keeps it for a while.
    pub fn spare(&mut self, index: usize, now: Instant) {
        if !self.spared.get(index) {
            self.spared.assign(index, true);
            self.spared_until.push_back((now + SPARED, index));
        }
    }

    /// The next block to demote where huge pages have to be given back whatever they are good for:
    /// those of no use first, then those that the driver holds, then those under base pages that
    /// the guest uses, and aligned ones last. None that `rests`.
    pub fn next_of_all(&mut self, map: &BlockMap, rests: impl Fn(usize) -> bool) -> Option<u64> {
        let missed = |index: usize| match map.get(index) {
            Some(block) if block.host == HostState::Huge && !rests(index) => Some(missed(block)),
            _ => None,
        };
        if self.surplus.is_empty() {
            let mut all: Vec<(u8, usize)> =
                (0..map.len()).filter_map(|index| Some((missed(index)?, index))).collect();
            all.sort_unstable();
            all.truncate(MOST);
            self.surplus = all.into();
        }
        while let Some((before, index)) = self.surplus.pop_front() {
            // What is of more use by now waits for another look at all of them.
            if missed(index).is_some_and(|now| now <= before) {
                return map.block_at(index).map(|(block, _)| block);
            }
        }
        None
    }

    fn sweep(&mut self, map: &BlockMap, rests: impl Fn(usize) -> bool) {
        self.unused.pass(1);
        self.cold.pass(1);
        for index in 0..map.len() {
            self.unused.assign(index, map.get(index).is_some_and(is_unused));
            self.cold.assign(index, map.get(index).is_some_and(is_cold));
        }
        let old = self.cold.oldest_first().take(AGES - YOUNG);
        let heat = |index: usize| map.get(index).map_or(0, |block| block.used);
        let mut cold: Vec<(u16, usize)> = old
            .flat_map(|age| age.iter())
            .filter(|index| !rests(*index))
            .map(|index| (heat(index), index))
            .collect();
        cold.sort_unstable();
        self.cold_victims = cold.into_iter().map(|(_, index)| index).take(MOST).collect();
        self.victims.clear();
        let mut base = Vec::new();
        // But for the youngest: those were of use at the last sweep.
        for age in self.unused.oldest_first().take(AGES - 1) {
            for index in age.iter().filter(|index| !rests(*index)) {
                if map.get(index).is_some_and(|block| block.guest == GuestState::Free) {
                    self.victims.push_back(index);
                } else if base.len() < MOST {
                    base.push(index);
                }
                if self.victims.len() == MOST {
                    return;
                }
            }
        }
        self.victims.extend(base);
        self.victims.truncate(MOST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SWEEP: Duration = Duration::from_secs(2);

    #[test]
    fn only_what_is_of_no_use_for_a_while_is_demoted_free_blocks_first() {
        let mut now = Instant::now();
        let mut map = BlockMap::new(&[10..20]);
        for (index, guest) in [
            (0, GuestState::Base),
            (1, GuestState::Free),
            (2, GuestState::Huge),
            (3, GuestState::Booked),
            (4, GuestState::Pinned),
            (5, GuestState::Free),
            (6, GuestState::Free),
        ] {
            map.set_guest(index, guest, 0);
            map.set_host(index, HostState::Huge);
        }
        map.set_host(6, HostState::Base);
        let mut demotion = Demotion::new(map.len(), now);
        assert_eq!(demotion.next(&map, |_| false, SWEEP, now), None, "seen for the first time");
        // One is used again, and unused again.
        map.set_guest(5, GuestState::Huge, 0);
        now += SWEEP;
        assert_eq!(demotion.next(&map, |_| false, SWEEP, now), Some(11));
        assert_eq!(demotion.next(&map, |_| false, SWEEP, now), Some(10));
        assert_eq!(demotion.next(&map, |_| false, SWEEP, now), None);
        map.set_guest(5, GuestState::Free, 0);
        now += SWEEP;
        let resting = |index| index < 2;
        assert_eq!(demotion.next(&map, resting, SWEEP, now), None);
        now += SWEEP;
        assert_eq!(demotion.next(&map, resting, SWEEP, now), Some(15));
    }

    #[test]
    fn what_was_of_no_use_for_longest_goes_first() {
        let mut now = Instant::now();
        let mut map = BlockMap::new(&[0..10]);
        for index in 0..10 {
            map.set_host(index, HostState::Huge);
        }
        let mut demotion = Demotion::new(map.len(), now);
        for index in [5, 8, 2] {
            map.set_guest(index, GuestState::Free, 0);
            // All that is of no use goes round the sweeps without being taken: it rests.
            for _ in 0..8 {
                demotion.next(&map, |_| true, SWEEP, now);
                now += SWEEP;
            }
        }
        let mut order = Vec::new();
        while let Some(block) = demotion.next(&map, |_| false, SWEEP, now) {
            order.push(block);
        }
        assert_eq!(order, [5, 8, 2]);
    }

    #[test]
    fn what_is_cold_for_long_makes_way_and_what_was_hot_is_spared() {
        let mut now = Instant::now();
        let mut map = BlockMap::new(&[0..10]);
        for (index, heat) in [(1, 64), (2, 0), (3, 512), (4, 0), (5, 0), (6, COLD)] {
            map.set_guest(index, GuestState::Huge, heat);
            map.set_host(index, HostState::Huge);
        }
        let mut demotion = Demotion::new(map.len(), now);
        demotion.spare(4, now);
        let mut sweep = |demotion: &mut Demotion, map: &BlockMap, sweeps: u32| {
            for _ in 0..sweeps {
                assert_eq!(demotion.next(map, |index| index == 2, SWEEP, now), None);
                now += SWEEP;
            }
            now
        };
        let soon = sweep(&mut demotion, &map, 3);
        assert_eq!(demotion.next_cold(&map, COLD, soon), None, "cold for too short a time");
        let later = sweep(&mut demotion, &map, 20);
        let mut next = |makes_way| demotion.next_cold(&map, makes_way, later);
        let order = [(0, None), (64, Some(5)), (64, None), (128, Some(1)), (COLD, None)];
        for (makes_way, victim) in order {
            assert_eq!(next(makes_way), victim, "{makes_way}; the others rest, are hot, or spared");
        }
        map.set_host(1, HostState::Base);
        map.set_host(5, HostState::Base);
        let end = sweep(&mut demotion, &map, 300);
        assert_eq!(demotion.next_cold(&map, COLD, end), Some(4));
    }

    #[test]
    fn what_is_given_back_is_what_is_of_least_use() {
        let mut map = BlockMap::new(&[10..20]);
        let states = [
            GuestState::Huge,
            GuestState::Base,
            GuestState::Booked,
            GuestState::Free,
            GuestState::Huge,
        ];
        for (index, guest) in states.into_iter().enumerate() {
            map.set_guest(index, guest, 0);
            map.set_host(index, HostState::Huge);
        }
        let mut demotion = Demotion::new(map.len(), Instant::now());
        let mut order = Vec::new();
        while let Some(block) = demotion.next_of_all(&map, |index| index == 4) {
            order.push(block);
            map.set_host(map.index_of(block).unwrap(), HostState::Base);
        }
        assert_eq!(order, [13, 12, 11, 10]);
    }

    #[test]
    fn what_has_become_useful_is_not_given_back_for_what_it_was() {
        let mut map = BlockMap::new(&[0..3]);
        for index in 0..3 {
            map.set_guest(index, GuestState::Free, 0);
            map.set_host(index, HostState::Huge);
        }
        let mut demotion = Demotion::new(map.len(), Instant::now());
        assert_eq!(demotion.next_of_all(&map, |_| false), Some(0));
        map.set_host(0, HostState::Base);
        map.set_guest(1, GuestState::Huge, 512);
        assert_eq!(demotion.next_of_all(&map, |_| false), Some(2));
    }

    #[test]
    fn victims_that_are_used_meanwhile_are_spared() {
        let now = Instant::now();
        let mut map = BlockMap::new(&[0..4]);
        map.set_host(0, HostState::Huge);
        map.set_guest(0, GuestState::Free, 0);
        map.set_host(1, HostState::Huge);
        map.set_guest(1, GuestState::Free, 0);
        let mut demotion = Demotion::new(map.len(), now);
        assert_eq!(demotion.next(&map, |_| false, SWEEP, now), None);
        assert_eq!(demotion.next(&map, |_| false, SWEEP, now + SWEEP), Some(0));
        map.set_guest(1, GuestState::Huge, 0);
        assert_eq!(demotion.next(&map, |_| false, SWEEP, now + SWEEP), None);
    }
}

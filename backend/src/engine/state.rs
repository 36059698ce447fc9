//! Everything the daemon knows of one guest, changed under one lock and without system calls.

use super::demotion::Demotion;
use super::hints::Hints;
use super::moving::{Moving, Situation};
use super::refill::Refill;
use super::repair::Repair;
use super::scan::ScanPlan;
use super::supply::Supply;
use super::timeout::Timeout;
use super::GiveBack;
use crate::backing::{HostRun, HostState, Memory};
use crate::bitmap::Bitmap;
use crate::block_map::{Block, BlockMap};
use crate::policy::{Agenda, Policy};
use crate::pressure::Wish;
use crate::protocol::{Batch, GuestState, Record, Stats, BATCH_STATE, SYNC_END, SYNC_START};
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// How much of the driver's state is known in this generation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GuestSync {
    /// Nothing yet: reports are dropped until one with SYNC_START.
    #[default]
    Waiting,
    /// SYNC_START was seen.
    Running,
    /// SYNC_END was seen.
    Done,
}

/// Totals since the daemon started.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct Totals {
    /// Bytes that collapses copied.
    pub collapse_bytes: u64,
    /// Bytes that the copy budget was charged for: a whole block for each attempt to collapse one
    /// with contents, whatever came of it.
    pub charged_bytes: u64,
    /// Blocks collapsed with a copy.
    pub collapses: u64,
    /// Collapses during which the VMM took page faults: the guest may have been stalled.
    pub collapses_met: u64,
    /// Attempts to collapse or populate that failed.
    pub collapse_failures: u64,
    /// Blocks made host-huge without a copy.
    pub populated: u64,
    /// Blocks made base pages again, because the guest was at its limit.
    pub demoted: u64,
    /// Blocks dropped by RELEASE.
    pub released: u64,
    /// Blocks dropped by RENEW.
    pub renewed: u64,
    /// Base pages dropped by TRIM.
    pub trimmed_pages: u64,
    /// Records, requests and chains refused.
    pub bad_records: u64,
    /// Batches sent on `hintq`.
    pub hint_batches: u64,
    /// Batches received on `reportq`.
    pub report_batches: u64,
}

/// Blocks that may become huge, by who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HugePagesLeft {
    /// The policy.
    pub wanted: u64,
    /// A PREPARE.
    pub prepared: u64,
    /// A RENEW that was answered with OK.
    pub renewed: u64,
}

/// Huge pages beyond those in use to which a guest lays claim, so that its driver may ask for some.
const HEADROOM: u64 = 8;

/// A nonzero number that no other run of the daemon is likely to have used.
pub fn random_generation() -> u64 {
    RandomState::new().build_hasher().finish().max(1)
}

/// The state of one guest.
pub struct State {
    /// In force now.
    pub policy: Policy,
    /// Whether huge pages are hard to find in the host.
    fragmented: bool,
    /// Whether the operator wants nothing made huge for now.
    pub paused: bool,
    /// Whether the guest is being migrated: the VMM logs what is written.
    pub logging: bool,
    /// Blocks that migrations have filled.
    refill: Refill,
    /// Names everything that was said since the last start or memory table.
    pub generation: u64,
    /// The memory table in force.
    pub memory: Option<Arc<Memory>>,
    /// What is known of every block.
    pub map: BlockMap,
    /// How much of the driver's state is known.
    pub guest_sync: GuestSync,
    /// The driver that told it does not run any more, or its guest was stopped.
    driver_away: bool,
    /// What the driver still has to be told.
    pub hints: Hints,
    /// Where the host is looked at next.
    pub scan: ScanPlan,
    /// What the host should do next.
    pub repair: Repair,
    /// What a guest at its limit could do without.
    pub demotion: Demotion,
    /// Most huge blocks by the operator's limit.
    huge_max: u64,
    /// Most huge blocks by our share of what several VMs have.
    share: u64,
    /// How long what is of no use is kept.
    pub timeout: Timeout,
    /// Huge pages that the host has to give.
    pub supply: Supply,
    /// When the guest is asked for memory.
    pub give_back: GiveBack,
    /// Blocks that the guest is asked to release.
    pub wish: Wish,
    /// Whether the guest is asked to move its huge pages.
    pub moving: Moving,
    /// Base pages in a block, where the driver gives back the free ones of blocks in use.
    pub block_pages: Option<u64>,
    /// Blocks of the RENEW that is being carried out: their huge pages are promised.
    pub renewing: u64,
    /// Blocks that an action under way may make huge.
    pub acting: Range<u64>,
    /// Blocks that actions ended on since the last request that drops began.
    acted_on: Bitmap,
    /// Totals since the daemon started.
    pub totals: Totals,
    /// Whether a VMM is connected.
    pub connected: bool,
}

impl State {
    /// No VMM, no memory.
    pub fn new(policy: Policy, huge_max: u64, now: Instant) -> Self {
        Self {
            policy,
            fragmented: false,
            paused: false,
            logging: false,
            refill: Refill::Nothing,
            generation: random_generation(),
            memory: None,
            map: BlockMap::default(),
            guest_sync: GuestSync::default(),
            driver_away: false,
            hints: Hints::default(),
            scan: ScanPlan::new(0, now),
            repair: Repair::new(policy, 0),
            demotion: Demotion::new(0, now),
            huge_max,
            share: u64::MAX,
            timeout: Timeout::new(None, now),
            supply: Supply::new(huge_max),
            give_back: GiveBack::Pressure,
            wish: Wish::new(now),
            moving: Moving::new(now),
            block_pages: None,
            renewing: 0,
            acting: 0..0,
            acted_on: Bitmap::new(0),
            totals: Totals::default(),
            connected: false,
        }
    }

    /// Takes a new memory table (or none): everything is learnt anew in a new generation.
    pub fn set_memory(&mut self, memory: Option<Arc<Memory>>, now: Instant) {
        let spans = memory.as_ref().map_or_else(Vec::new, |memory| memory.spans().to_vec());
        self.memory = memory;
        self.manage(&spans, now);
    }

    /// Learns everything of these spans of blocks, which are ascending, disjoint and not empty, in
    /// a new generation.
    pub fn manage(&mut self, spans: &[Range<u64>], now: Instant) {
        self.map = BlockMap::new(spans);
        self.scan = ScanPlan::new(self.map.len(), now);
        self.demotion = Demotion::new(self.map.len(), now);
        self.timeout.changed(now);
        self.new_generation();
    }

    /// Starts a new generation: the driver's state is forgotten, what is known of the host is
    /// kept and told again in full.
    pub fn new_generation(&mut self) {
        self.generation = random_generation();
        self.guest_sync = GuestSync::Waiting;
        self.driver_away = false;
        self.hints = Hints::new(self.map.len());
        self.repair = Repair::new(self.policy, self.map.len());
        self.acted_on = Bitmap::new(self.map.len());
        self.forget_guest();
    }

    fn forget_guest(&mut self) {
        for index in 0..self.map.len() {
            self.map.set_guest(index, GuestState::Unknown, 0);
            self.reconsider(index);
        }
    }

    /// The driver stopped: what it told is shown until somebody tells it anew, and not acted on.
    /// Its guest may be another one soon, or give memory back in another way (ballooning), and what
    /// was collapsed then would be filled again unasked.
    pub fn driver_left(&mut self) {
        self.driver_away = true;
        self.forget_fills();
        self.reconsider_all();
    }

    /// Asks the policy about a block again.
    pub fn reconsider(&mut self, index: usize) {
        let Some(block) = self.map.get(index) else { return };
        let unknown = Block { guest: GuestState::Unknown, used: 0, ..*block };
        let block = if self.driver_away { &unknown } else { block };
        let wanted = self.policy.wants_collapse(block, self.fragmented);
        let heat = if block.guest == GuestState::Huge { block.used } else { 0 };
        self.repair.agenda().note_aging(index, block.guest_is_huge());
        self.repair.agenda().note_heat(index, heat);
        self.repair.consider(index, wanted);
    }

    /// Sets a block's guest state and lets everything that follows from it follow.
    fn set_guest(&mut self, index: usize, state: GuestState, used: u16) {
        let before = self.map.get(index).map(|block| block.guest);
        if self.map.set_guest(index, state, used).is_none() {
            return;
        }
        self.reconsider(index);
        if state == GuestState::Huge && before == Some(state) {
            return; // it became hotter, or colder
        }
        // A promise to the driver ends with its hold: whoever has the block then, another device of
        // the VMM may drop what he has there (virtio-mem, a balloon), and it would come back.
        if state != GuestState::Booked && self.repair.fills_at(index) {
            self.repair.forget_fill(index);
            self.hints.changed(index);
        }
        // The guest did something there, or its kernel has its own there, such as our rings: what
        // the host has may have changed with it.
        if matches!(state, GuestState::Base | GuestState::Huge | GuestState::Pinned) {
            self.scan.look_at(index);
        }
    }

    /// Takes a report of the driver. Returns how many of its records were refused.
    pub fn apply_report(&mut self, batch: &Batch, records: &[Record]) -> u64 {
        if batch.generation != self.generation || batch.kind != BATCH_STATE {
            // A report of an older generation is ordinary; it is simply no news.
            return u64::from(batch.kind != BATCH_STATE);
        }
        if batch.flags & SYNC_START != 0 {
            self.forget_guest();
            self.guest_sync = GuestSync::Running;
        } else if self.guest_sync == GuestSync::Waiting {
            return 0;
        }
        let mut refused = 0;
        // A batch names each block at most once; this bounds what one batch can cost.
        let mut allowance = self.map.len();
        let mut ranges = Vec::new();
        for record in records {
            let Some(state) = GuestState::from_wire(record.state) else {
                refused += 1;
                continue;
            };
            ranges.clear();
            ranges.extend(self.map.index_ranges(record.first, record.count));
            let blocks: usize = ranges.iter().map(ExactSizeIterator::len).sum();
            if blocks == 0 && state == GuestState::Unknown {
                continue; // memory that was unplugged: the VMM was faster
            }
            if blocks == 0 || blocks > allowance {
                refused += 1;
                continue;
            }
            allowance -= blocks;
            let used = u16::try_from(record.used).unwrap_or(u16::MAX);
            for index in ranges.drain(..).flatten() {
                self.set_guest(index, state, used);
            }
        }
        if batch.flags & SYNC_END != 0 {
            self.guest_sync = GuestSync::Done;
            self.repair.agenda().booted();
        }
        self.totals.report_batches += 1;
        refused
    }

    /// Takes what a look at the host found; what is older than what is known already is passed
    /// over. Whether anything was news.
    pub fn apply_look(&mut self, runs: &[HostRun]) -> bool {
        self.apply(runs, |state, index| !state.scan.is_overtaken(index))
    }

    /// An action ended: takes what was seen of its blocks afterwards.
    pub fn apply_acted(&mut self, runs: &[HostRun]) {
        self.apply(runs, |state, index| {
            state.scan.seen(index);
            state.acted_on.assign(index, true);
            true
        });
    }

    /// A RELEASE, RENEW or TRIM begins to drop.
    pub fn begin_drop(&mut self) {
        self.acted_on.clear();
    }

    /// It has dropped them: takes what was seen of them afterwards. Where an action met it, nobody
    /// knows which came last: then it is looked at again, and a block that was huge counts as such.
    pub fn apply_dropped(&mut self, runs: &[HostRun]) {
        self.apply(runs, |state, index| {
            let block = state.map.block_at(index).map_or(0, |(block, _)| block);
            let met = state.acted_on.get(index) || state.acting.contains(&block);
            if met {
                state.scan.look_at(index);
            }
            state.scan.seen(index);
            !met
        });
    }

    /// Takes host states where `counts` says so; whether any of them was not known.
    fn apply(
        &mut self,
        runs: &[HostRun],
        mut counts: impl FnMut(&mut Self, usize) -> bool,
    ) -> bool {
        let mut news = false;
        let mut ranges = Vec::new();
        for run in runs {
            ranges.extend(self.map.index_ranges(run.first, run.count));
            for index in ranges.drain(..).flatten() {
                if !counts(self, index) {
                    continue;
                }
                let resident = u16::try_from(run.resident).unwrap_or(u16::MAX);
                if run.state == HostState::Base {
                    self.repair.agenda().note_resident(index, resident);
                }
                let more_or_less = self.map.set_resident(index, resident);
                if self.map.set_host(index, run.state).is_none() {
                    if more_or_less {
                        self.reconsider(index);
                    }
                    continue;
                }
                if run.state.is_huge() {
                    self.map.set_failures(index, 0);
                    self.repair.forget_fill(index);
                }
                news = true;
                self.hints.changed(index);
                self.reconsider(index);
            }
        }
        news
    }

    /// Whether nothing is made huge for now, whoever wants it.
    pub fn makes_nothing(&self) -> bool {
        self.paused || self.logging
    }

    /// Whether blocks are made huge because the guest asks for it.
    pub fn serves_requests(&self) -> bool {
        self.policy.prepares() && !self.makes_nothing()
    }

    /// Asks another policy about every block, or the same one again.
    pub fn set_policy(&mut self, policy: Policy) {
        self.policy = policy;
        self.repair.set_agenda(Agenda::on_demand(policy, self.map.len()));
        self.reconsider_all();
        self.drop_requests_unless_served();
    }

    /// Notes whether huge pages are hard to find in the host, as it is looked now and then.
    pub fn set_fragmented(&mut self, fragmented: bool) {
        let changed = std::mem::replace(&mut self.fragmented, fragmented) != fragmented;
        if changed && self.policy.minds_fragmentation() {
            self.reconsider_all();
        }
    }

    fn reconsider_all(&mut self) {
        (0..self.map.len()).for_each(|index| self.reconsider(index));
    }

    /// Lets time pass: what has rested is considered again, and a pass over all that is resident
    /// begins, with a look at it, or has seen everything. Whether there is something new to look at.
    pub fn wake(&mut self, now: Instant) -> bool {
        for index in self.repair.wake(now) {
            self.reconsider(index);
        }
        if !self.scan.is_at_rest() {
            return false;
        }
        self.repair.agenda().close();
        let opened = self.repair.agenda().open();
        if opened {
            (0..self.map.len()).for_each(|index| self.scan.look_at(index));
            self.reconsider_all();
        }
        opened
    }

    /// Stops making blocks huge, or goes on.
    pub fn set_paused(&mut self, paused: bool) {
        self.paused = paused;
        self.drop_requests_unless_served();
    }

    /// A migration begins, or is over.
    pub fn set_logging(&mut self, logging: bool, now: Instant) {
        self.logging = logging;
        if logging {
            self.refill = Refill::During { before: self.allocated() };
            self.drop_requests_unless_served();
        } else {
            self.refill.over();
            // Everything was touched.
            self.scan = ScanPlan::new(self.map.len(), now);
        }
    }

    /// Another VMM: no migration is known of it.
    pub fn forget_migration(&mut self) {
        self.logging = false;
        self.refill = Refill::Nothing;
    }

    /// Blocks of a size that the guest is to be asked for, because a migration has filled as many.
    pub fn owed(&mut self, block_size: u64, now: Instant) -> u64 {
        if self.scan.complete() && self.guest_sync == GuestSync::Done {
            self.refill.seen(self.allocated(), block_size, now);
        }
        self.refill.owed(self.allocated(), block_size, now)
    }

    /// Bytes of the host's memory that the guest has.
    fn allocated(&self) -> u64 {
        self.memory.as_ref().map_or(0, |memory| memory.allocated())
    }

    /// What was asked for and is not served any more: a PREPARE is answered with what was done
    /// of it, and of renewed blocks the driver is told that they are as they are.
    fn drop_requests_unless_served(&mut self) {
        if !self.serves_requests() {
            self.repair.skip_prepare();
            self.forget_fills();
        }
    }

    /// Makes no renewed block huge any more; the driver is told what they are.
    fn forget_fills(&mut self) {
        for index in self.repair.forget_fills() {
            self.hints.changed(index);
        }
    }

    /// Sets another limit, in blocks. Promises that it does not allow are not kept.
    pub fn set_huge_max(&mut self, blocks: u64) {
        self.huge_max = blocks;
        self.limit_supply();
    }

    /// Sets our share of the huge pages that several VMs have, in blocks. What is beyond it is
    /// given back.
    pub fn set_share(&mut self, blocks: u64) {
        self.share = blocks;
        self.limit_supply();
    }

    fn limit_supply(&mut self) {
        let blocks = self.huge_max.min(self.share);
        self.supply.set_limit(blocks);
        if self.huge() + self.repair.fills() > blocks {
            self.forget_fills();
        }
    }

    /// Whether there are huge pages to give back to other VMs.
    pub fn is_beyond_share(&self) -> bool {
        self.huge() > self.share
    }

    /// Blocks that are huge, or may become so by what was promised or begun; and those that could
    /// be of use: where the guest has huge pages, where its driver holds blocks, and some to begin
    /// with.
    pub fn demand(&self) -> (u64, u64) {
        let acting = self.acting.end - self.acting.start;
        let held = self.huge_or_promised() + acting;
        if !self.connected {
            return (held, 0);
        }
        let guest = self.map.counters().guest;
        let used = guest[GuestState::Huge as usize] + guest[GuestState::Booked as usize];
        (held, (used + HEADROOM).min(self.map.len() as u64).min(self.huge_max))
    }

    /// Whether anything waits that may have to be copied.
    pub fn has_to_copy(&self) -> bool {
        let room = self.supply.left(self.huge_or_promised()) > 0;
        self.repair.requested() || (self.repair.wants() && room)
    }

    /// Blocks that are host-huge.
    fn huge(&self) -> u64 {
        let host = &self.map.counters().host;
        host[HostState::Huge as usize] + host[HostState::Hugetlb as usize]
    }

    /// Blocks that are host-huge, and those of which the guest was told that they will be.
    pub fn huge_or_promised(&self) -> u64 {
        self.huge() + self.repair.fills() + self.renewing
    }

    /// Blocks that may become huge; only between two actions is the count of those that are exact.
    pub fn huge_pages_left(&self) -> HugePagesLeft {
        let promised = self.huge_or_promised();
        HugePagesLeft {
            wanted: self.supply.left(promised),
            prepared: self.supply.left_for_guest(promised),
            renewed: self.supply.left(self.huge()),
        }
    }

    /// Whether there is a huge page for every block of a RENEW. Those that are huge bring theirs,
    /// and some are promised one already.
    pub fn may_renew(&self, ranges: &[(u64, u32)]) -> bool {
        let acting = self.acting.end - self.acting.start;
        let left = self.supply.left_for_guest(self.huge_or_promised() + acting);
        let mut needed = 0;
        for &(first, count) in ranges {
            let blocks = first..first.saturating_add(u64::from(count));
            for (block, index) in blocks.filter_map(|b| Some((b, self.map.index_of(b)?))) {
                let huge = self.map.get(index).is_some_and(|block| block.host.is_huge());
                let promised = self.repair.fills_at(index) || self.acting.contains(&block);
                needed += u64::from(!huge && !promised);
            }
        }
        needed <= left
    }

    /// Blocks in use that are huge at one layer alone: what the driver holds is not in use.
    pub fn misaligned(&self) -> u64 {
        let held = |index: &usize| {
            let block = self.map.get(*index);
            block.is_some_and(|b| b.guest == GuestState::Booked && b.host.is_huge())
        };
        let held = (0..self.map.len()).filter(held).count() as u64;
        let counters = self.map.counters();
        (counters.guest_only + counters.host_only).saturating_sub(held)
    }

    /// Whether anything is kept for the timeout: by the driver, where it is told how long, or by
    /// a guest at its limit.
    pub fn keeps(&self) -> bool {
        let booked = self.map.counters().guest[GuestState::Booked as usize] > 0;
        let at_limit = self.repair.wants() && self.huge_pages_left().wanted == 0;
        at_limit || (booked && self.timeout.wish_ms() > 0)
    }

    /// What is to be moved, and why.
    pub fn situation(&self) -> Situation {
        let counters = self.map.counters();
        Situation {
            possible: self.serves_requests(),
            out_of_pages: self.supply.left_for_guest(self.huge_or_promised()) == 0,
            aligned: counters.aligned,
            guest_only: counters.guest_only,
            unused: counters.unused,
        }
    }

    /// The answer of a STATS request.
    pub fn stats(&self) -> Stats {
        let counters = self.map.counters();
        Stats {
            blocks: self.map.len() as u64,
            aligned: counters.aligned,
            guest_only: counters.guest_only,
            host_only: counters.host_only,
            collapse_bytes: self.totals.collapse_bytes,
            populated: self.totals.populated,
            released: self.totals.released + self.totals.renewed,
            bad_records: self.totals.bad_records,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::repair::{Allowance, Outcome, Work};
    use crate::protocol::BATCH_ADVICE;
    use proptest::prelude::*;
    use std::time::Duration;

    fn state_of(blocks: u64) -> State {
        let now = Instant::now();
        let mut state = State::new(Policy::Gemini, u64::MAX, now);
        state.map = BlockMap::new(&[0..blocks]);
        state.scan = ScanPlan::new(state.map.len(), now);
        state.new_generation();
        state
    }

    fn batch(state: &State, flags: u16) -> Batch {
        Batch { generation: state.generation, count: 0, kind: BATCH_STATE, flags }
    }

    fn record(first: u64, count: u32, guest: GuestState) -> Record {
        Record { first, count, state: guest as u8, ..Record::default() }
    }

    #[test]
    fn reports_count_only_after_sync_start_and_in_their_generation() {
        let mut state = state_of(8);
        let huge = [record(2, 3, GuestState::Huge)];
        let early = batch(&state, 0);
        state.apply_report(&early, &huge);
        assert_eq!(state.map.counters().guest_only, 0);
        let old = Batch { generation: state.generation ^ 1, ..batch(&state, SYNC_START) };
        state.apply_report(&old, &huge);
        assert_eq!(state.guest_sync, GuestSync::Waiting);
        let start = batch(&state, SYNC_START | SYNC_END);
        state.apply_report(&start, &huge);
        assert_eq!(state.map.counters().guest_only, 3);
        assert_eq!(state.guest_sync, GuestSync::Done);
    }

    #[test]
    fn sync_start_forgets_what_was_reported() {
        let mut state = state_of(8);
        let start = batch(&state, SYNC_START | SYNC_END);
        state.apply_report(&start, &[record(0, 8, GuestState::Huge)]);
        state.apply_report(&start, &[record(1, 1, GuestState::Base)]);
        assert_eq!(state.map.counters().guest[GuestState::Huge as usize], 0);
        assert_eq!(state.map.counters().guest[GuestState::Unknown as usize], 7);
    }

    #[test]
    fn what_the_guest_has_in_use_is_looked_at() {
        let now = Instant::now();
        let mut state = state_of(8);
        let first = state.scan.next(&state.map, now).unwrap();
        state.take_look(&first, &[], Duration::ZERO, now);
        let start = batch(&state, SYNC_START | SYNC_END);
        let report: Vec<_> = (0..).zip(GuestState::ALL).map(|(at, s)| record(at, 1, s)).collect();
        state.apply_report(&start, &report);
        // Base, huge, and pinned with what is between: one look.
        let look = state.scan.next(&state.map, now).unwrap();
        assert_eq!((look.first, look.count), (2, 4));
        assert!(state.scan.next(&state.map, now).is_none());
    }

    #[test]
    fn hostile_records_are_refused_and_cost_no_more_than_the_guest_is_large() {
        let mut state = state_of(8);
        let start = batch(&state, SYNC_START);
        let records = [
            record(u64::MAX, u32::MAX, GuestState::Huge), // nowhere
            record(0, 0, GuestState::Huge),               // nothing
            Record { state: 77, ..record(0, 1, GuestState::Huge) },
            record(0, u32::MAX, GuestState::Base), // all of it
            record(0, 1, GuestState::Huge),        // and once more: over the allowance
        ];
        assert_eq!(state.apply_report(&start, &records), 4);
        assert_eq!(state.map.counters().guest[GuestState::Base as usize], 8);
        let advice = Batch { kind: BATCH_ADVICE, ..start };
        assert_eq!(state.apply_report(&advice, &[]), 1);
    }

    #[test]
    fn unknown_blocks_outside_the_table_are_no_fault_of_the_driver() {
        let mut state = state_of(8);
        let start = batch(&state, SYNC_START | SYNC_END);
        assert_eq!(state.apply_report(&start, &[record(100, 4, GuestState::Unknown)]), 0);
    }

    #[test]
    fn guest_huge_on_host_base_is_wanted_until_the_host_is_huge() {
        let mut state = state_of(8);
        let run = |host| [HostRun { first: 0, count: 8, state: host, resident: 0 }];
        state.apply_look(&run(HostState::Base));
        assert!(!state.repair.wants());
        let start = batch(&state, SYNC_START | SYNC_END);
        state.apply_report(&start, &[record(5, 1, GuestState::Huge)]);
        assert!(state.repair.wants());
        state.apply_look(&run(HostState::Huge));
        assert!(!state.repair.wants());
        assert_eq!(state.map.counters().aligned, 1);
    }

    #[test]
    fn new_generation_forgets_the_guest_and_keeps_the_host() {
        let mut state = state_of(8);
        state.apply_look(&[HostRun { first: 0, count: 8, state: HostState::Base, resident: 0 }]);
        let start = batch(&state, SYNC_START | SYNC_END);
        state.apply_report(&start, &[record(0, 8, GuestState::Huge)]);
        let before = state.generation;
        state.new_generation();
        assert_ne!(state.generation, before);
        assert_eq!(state.map.counters().guest[GuestState::Unknown as usize], 8);
        assert_eq!(state.map.counters().host[HostState::Base as usize], 8);
        assert!(!state.repair.wants());
    }

    #[test]
    fn what_a_driver_told_that_left_is_shown_and_not_acted_on() {
        let mut state = state_of(8);
        state.apply_look(&[HostRun { first: 0, count: 8, state: HostState::Base, resident: 0 }]);
        let start = batch(&state, SYNC_START | SYNC_END);
        state.apply_report(&start, &[record(5, 1, GuestState::Huge)]);
        state.driver_left();
        assert!(!state.repair.wants());
        assert_eq!(state.map.counters().guest_only, 1);
        // What was on its way when it left.
        let late = batch(&state, 0);
        state.apply_report(&late, &[record(6, 1, GuestState::Huge)]);
        assert!(!state.repair.wants());
        state.new_generation();
        let start = batch(&state, SYNC_START | SYNC_END);
        state.apply_report(&start, &[record(5, 1, GuestState::Huge)]);
        assert!(state.repair.wants());
    }

    #[test]
    fn renew_needs_a_huge_page_only_for_blocks_that_bring_none() {
        let now = Instant::now();
        let mut state = state_of(8);
        state.supply.set_limit(3);
        state.apply_look(&[HostRun { first: 0, count: 2, state: HostState::Huge, resident: 0 }]);
        assert!(state.may_renew(&[(0, 2)]), "both bring their own");
        assert!(state.may_renew(&[(1, 2)]));
        assert!(!state.may_renew(&[(1, 3)]));
        state.repair.fill(5);
        assert!(state.may_renew(&[(5, 1)]), "it is promised one already");
        assert!(!state.may_renew(&[(6, 1)]), "the last one is promised");
        state.repair.forget_fill(5);
        state.acting = 7..8;
        assert!(!state.may_renew(&[(6, 1)]), "the last one is being given");
        state.acting = 0..0;
        (0..9).for_each(|_| state.supply.failed(now));
        assert!(!state.may_renew(&[(6, 1)]), "the kernel has none");
        assert!(state.may_renew(&[(0, 2)]));
    }

    #[test]
    fn a_promise_ends_with_the_drivers_hold() {
        let mut state = state_of(8);
        let start = batch(&state, SYNC_START | SYNC_END);
        state.apply_report(&start, &[record(0, 8, GuestState::Free)]);
        let report = batch(&state, 0);
        (1..5).for_each(|index| state.repair.fill(index));
        state.apply_report(&report, &[record(0, 6, GuestState::Booked)]);
        assert_eq!(state.repair.fills(), 4, "held, and waits");
        state.apply_report(&report, &[record(1, 1, GuestState::Free)]);
        state.apply_report(&report, &[record(2, 1, GuestState::Pinned)]);
        assert!(!state.repair.fills_at(1) && !state.repair.fills_at(2));
        assert_eq!(state.repair.fills(), 2);
        state.driver_left();
        assert_eq!(state.repair.fills(), 0, "its guest may be another one soon");
    }

    #[test]
    fn a_pause_ends_what_the_guest_asked_for_and_keeps_what_the_policy_wants() {
        let mut state = state_of(8);
        state.apply_look(&[HostRun { first: 0, count: 8, state: HostState::Base, resident: 0 }]);
        let start = batch(&state, SYNC_START | SYNC_END);
        state.apply_report(&start, &[record(5, 1, GuestState::Huge)]);
        state.repair.prepare(1, vec![(0, 2)]);
        state.repair.fill(7);
        state.set_paused(true);
        assert!(!state.serves_requests());
        assert_eq!(state.repair.fills(), 0);
        let settle = Work::Settle { id: 1, ranges: vec![(0, 2)] };
        assert_eq!(state.repair.next(&state.map, &Allowance::default()), Some(settle));
        assert!(state.repair.end_prepare(1));
        state.set_paused(false);
        assert!(state.serves_requests() && state.repair.wants());
        assert_eq!(state.repair.fills(), 0, "what was told to be off stays off");
    }

    #[test]
    fn what_the_driver_holds_is_kept_and_not_misaligned() {
        let now = Instant::now();
        let mut state = state_of(8);
        state.apply_look(&[HostRun { first: 0, count: 4, state: HostState::Huge, resident: 0 }]);
        let start = batch(&state, SYNC_START | SYNC_END);
        let report = [
            record(0, 1, GuestState::Huge),   // aligned
            record(1, 2, GuestState::Booked), // ready
            record(3, 2, GuestState::Base),   // one of them huge in the host
            record(6, 1, GuestState::Huge),   // in the guest
        ];
        state.apply_report(&start, &report);
        assert_eq!(state.misaligned(), 2);
        assert!(!state.keeps(), "the driver finds out how long by itself");
        state.timeout.set(Some(1000), now);
        assert!(state.keeps());
        state.timeout.set(None, now);
        state.apply_look(&[HostRun { first: 6, count: 1, state: HostState::Base, resident: 0 }]);
        assert!(!state.keeps(), "there is a huge page for what is wanted");
        state.set_huge_max(4);
        assert!(state.keeps(), "what is of no use is kept from it");
    }

    #[test]
    fn another_policy_is_asked_about_every_block() {
        let mut state = state_of(8);
        state.apply_look(&[HostRun { first: 0, count: 8, state: HostState::Base, resident: 0 }]);
        let start = batch(&state, SYNC_START | SYNC_END);
        state.apply_report(&start, &[record(0, 8, GuestState::Huge)]);
        assert!(state.repair.wants());
        state.repair.fill(7);
        state.set_policy(Policy::None);
        assert!(!state.repair.wants() && !state.serves_requests());
        assert_eq!(state.repair.fills(), 0);
        state.set_policy(Policy::Always);
        assert!(state.repair.wants() && !state.serves_requests());
        state.set_policy(Policy::Gemini);
        assert!(state.repair.wants() && state.serves_requests());
    }

    #[test]
    fn a_pass_looks_at_everything_and_ends() {
        let now = Instant::now();
        let mut state = state_of(8);
        let run = |host| [HostRun { first: 0, count: 8, state: host, resident: 1 }];
        let look = |state: &mut State, host| {
            let look = state.scan.next(&state.map, now).unwrap();
            state.take_look(&look, &run(host), Duration::ZERO, now);
        };
        look(&mut state, HostState::Absent);
        state.set_policy(Policy::KubevirtLike);
        assert!(state.wake(now), "there is something to look at");
        assert!(!state.wake(now) && !state.repair.wants());
        look(&mut state, HostState::Base);
        assert!(!state.wake(now) && state.repair.wants());
        state.apply_look(&run(HostState::Huge));
        state.apply_look(&run(HostState::Base));
        assert!(!state.repair.wants(), "what comes later does not join");
    }

    #[test]
    fn a_host_that_becomes_fragmented_changes_what_ingens_wants() {
        let mut state = state_of(8);
        state.set_policy(Policy::IngensLike);
        let runs = [
            HostRun { first: 0, count: 7, state: HostState::Base, resident: 400 },
            HostRun { first: 7, count: 1, state: HostState::Base, resident: 500 },
        ];
        state.apply_look(&runs);
        assert_eq!(state.repair.agenda().wanted(), 8);
        state.set_fragmented(true);
        assert_eq!(state.repair.agenda().wanted(), 1);
        state.apply_look(&[HostRun { resident: 460, ..runs[0] }]);
        assert_eq!(state.repair.agenda().wanted(), 8, "more pages, no other state");
    }

    #[test]
    fn the_guests_kernel_has_what_it_works_with_and_the_rest_of_its_own_in_a_whole_host() {
        let mut state = state_of(8);
        let runs = [HostRun { first: 0, count: 8, state: HostState::Base, resident: 512 }];
        state.apply_look(&runs);
        for (index, used) in [(1, 0), (2, 512), (3, 0), (4, 256)] {
            state.set_guest(index, GuestState::Pinned, used);
        }
        for (policy, fragmented, wanted) in [
            (Policy::Gemini, false, 1),
            (Policy::Gemini, true, 1),
            (Policy::GeminiKernel, true, 2),
            (Policy::GeminiKernel, false, 4),
        ] {
            state.set_policy(policy);
            state.set_fragmented(fragmented);
            assert_eq!(state.repair.agenda().wanted(), wanted, "{policy:?} {fragmented}");
        }
    }

    #[test]
    fn a_look_that_was_overtaken_by_an_action_changes_nothing() {
        let now = Instant::now();
        let mut state = state_of(8);
        let run = |host| [HostRun { first: 0, count: 8, state: host, resident: 0 }];
        let look = state.scan.next(&state.map, now).unwrap();
        state.apply_acted(&run(HostState::Huge));
        state.apply_look(&run(HostState::Base));
        state.scan.done(&look, Duration::ZERO, false, now);
        assert_eq!(state.map.counters().host[HostState::Huge as usize], 8);
        let again = state.scan.next(&state.map, now).unwrap();
        assert_eq!((again.first, again.count), (0, 8), "it is looked at once more");
        state.apply_look(&run(HostState::Absent));
        assert_eq!(state.map.counters().host[HostState::Absent as usize], 8);
    }

    #[test]
    fn where_a_drop_met_an_action_the_block_is_looked_at_again() {
        let now = Instant::now();
        let run = |host| [HostRun { first: 2, count: 1, state: host, resident: 0 }];
        for ended in [false, true] {
            let mut state = state_of(8);
            let look = state.scan.next(&state.map, now).unwrap();
            state.scan.done(&look, Duration::ZERO, false, now);
            state.acting = 2..3;
            state.begin_drop();
            // The drop looks, then the action makes it huge, then the drop tells what it saw.
            if ended {
                state.acting = 0..0;
                state.apply_acted(&run(HostState::Huge));
            }
            state.apply_dropped(&run(HostState::Absent));
            assert_eq!(state.huge(), u64::from(ended));
            let again = state.scan.next(&state.map, now).unwrap();
            assert_eq!((again.first, again.count), (2, 1));
        }
    }

    proptest! {
        /// Whatever guest and host do in whatever order, the blocks that are truly huge never
        /// become more than the limit, as far as it is the daemon that makes them so; and there is
        /// one for every block that is promised one.
        #[test]
        fn never_more_huge_blocks_than_allowed(
            limit in 0u64..12,
            steps in prop::collection::vec((0u8..8, 0u64..24, 1u32..6, any::<bool>()), 1..300),
        ) {
            let now = Instant::now();
            let mut state = state_of(24);
            state.supply.set_limit(limit);
            let mut truth = [HostState::Base; 24];
            let mut acting: Option<(Work, Option<Vec<HostRun>>)> = None;
            let mut looking = None;
            let mut renewing: Option<(u64, u32, Option<Vec<HostRun>>)> = None;
            let see = |truth: &[HostState], first: u64, count: u32| -> Vec<HostRun> {
                (first..first + u64::from(count))
                    .map(|block| HostRun {
                        first: block,
                        count: 1,
                        state: truth[usize::try_from(block).unwrap()],
                        resident: 0,
                    })
                    .collect()
            };
            for (step, first, count, yes) in steps {
                let count = count.min(u32::try_from(24 - first).unwrap());
                match step {
                    // A report.
                    0 => {
                        let guest = if yes { GuestState::Huge } else { GuestState::Booked };
                        let start = batch(&state, SYNC_START);
                        let flags =
                            if state.guest_sync == GuestSync::Waiting { SYNC_START } else { 0 };
                        let report = Batch { flags, ..start };
                        state.apply_report(&report, &[record(first, count, guest)]);
                    }
                    // A look is sent out, or comes back with what it saw when it was.
                    1 | 2 => match looking.take() {
                        None => {
                            looking = state.scan.next(&state.map, now).map(|look| {
                                (look, see(&truth, look.first, look.count))
                            });
                        }
                        Some((look, runs)) => {
                            state.apply_look(&runs);
                            state.scan.done(&look, Duration::ZERO, false, now);
                        }
                    },
                    // A RENEW is taken, has dropped its blocks, or has told so.
                    3 => match renewing.take() {
                        None if state.may_renew(&[(first, count)]) => {
                            state.renewing = u64::from(count);
                            state.begin_drop();
                            renewing = Some((first, count, None));
                        }
                        None => {}
                        Some((first, count, None)) => {
                            let blocks = usize::try_from(first).unwrap()..;
                            for index in blocks.take(count as usize) {
                                truth[index] = HostState::Absent;
                            }
                            let seen = see(&truth, first, count);
                            renewing = Some((first, count, Some(seen)));
                        }
                        Some((first, count, Some(seen))) => {
                            state.apply_dropped(&seen);
                            let ranges: Vec<_> = state.map.index_ranges(first, count).collect();
                            ranges.into_iter().flatten().for_each(|index| state.repair.fill(index));
                            state.renewing = 0;
                        }
                    },
                    // A PREPARE.
                    4 => state.repair.prepare(1, vec![(first, count)]),
                    // An action begins, or ends.
                    _ => match acting.take() {
                        None if state.scan.complete() => {
                            let left = state.huge_pages_left();
                            let allowance = Allowance {
                                requested: true,
                                background: true,
                                copies: 3,
                                pages: left.wanted,
                                prepared: left.prepared,
                                renewed: left.renewed,
                            };
                            let work = state.repair.next(&state.map, &allowance);
                            state.acting = work.as_ref().map_or(0..0, Work::blocks);
                            acting = work.map(|work| (work, None));
                        }
                        None => {}
                        Some((Work::Settle { id, .. }, _)) => {
                            state.repair.end_prepare(id);
                        }
                        Some((work, None)) => {
                            let blocks = work.blocks();
                            for index in blocks.clone().map(|b| usize::try_from(b).unwrap()) {
                                let present = truth[index] != HostState::Absent;
                                if yes && (present || matches!(work, Work::Populate { .. })) {
                                    truth[index] = HostState::Huge;
                                }
                            }
                            let count = u32::try_from(blocks.end - blocks.start).unwrap();
                            let seen = see(&truth, blocks.start, count);
                            acting = Some((work, Some(seen)));
                        }
                        Some((work, Some(seen))) => {
                            for block in work.blocks() {
                                let index = usize::try_from(block).unwrap();
                                state.repair.ended(index, Outcome::Done, 0, now);
                            }
                            state.acting = 0..0;
                            state.apply_acted(&seen);
                        }
                    },
                }
                let huge = truth.iter().filter(|host| host.is_huge()).count() as u64;
                prop_assert!(huge <= limit, "{} of {}", huge, limit);
                let promised = state.repair.fills();
                let others = truth.iter().enumerate().filter(|(index, host)| {
                    host.is_huge() && !state.repair.fills_at(*index)
                });
                prop_assert!(others.count() as u64 + promised <= limit, "{} promised", promised);
            }
        }
    }
}

//! What to do next, and what follows from what was done: every decision of the engine, without a
//! system call. Clock, budgets and what was seen of the host are passed in, so that a simulation
//! and the daemon decide by the same code.

use super::limits::THROTTLE;
use super::repair::{Allowance, Outcome, Work};
use super::scan::{Look, Reason, ScanPlan};
use super::state::State;
use super::thread::SLEEP_MAX;
use super::worker::Deed;
use crate::backing::{HostRun, HostState};
use crate::budget::{CopyBudget, CpuBudget};
use crate::policy::WARM;
use crate::protocol::{GuestState, Record, S_FAILED, S_OK};
use std::time::{Duration, Instant};

/// What a decision draws on.
pub struct Budgets<'a> {
    /// Bytes copied per second.
    pub copy: &'a mut CopyBudget,
    /// Share of one CPU.
    pub cpu: &'a mut CpuBudget,
    /// Bytes of a block.
    pub block_size: u64,
}

/// What has changed, or not, while an action was under way.
#[derive(Clone, Copy, Debug)]
pub struct Standing {
    /// Whether the generation that asked for it is in force.
    pub current: bool,
    /// Whether the memory that was acted on is.
    pub same: bool,
    /// Whether the pool of hugetlb pages is known to be short.
    pub pool_short: bool,
}

/// The answer of a PREPARE.
#[derive(Debug)]
pub struct PrepareAnswer {
    /// Which one.
    pub id: u64,
    /// `S_OK` or `S_FAILED`.
    pub status: u32,
    /// The host states of its blocks.
    pub records: Vec<Record>,
}

fn shorten(sleep: &mut Duration, wait: Duration) {
    *sleep = (*sleep).min(wait);
}

impl State {
    /// Takes the next look that is due and within the budget; else how long to sleep at most.
    pub fn next_look(
        &mut self,
        cpu: &mut CpuBudget,
        now: Instant,
        sleep: &mut Duration,
    ) -> Option<Look> {
        let Some(reason) = self.scan.due(now) else {
            shorten(sleep, self.scan.round_robin_at().saturating_duration_since(now));
            return None;
        };
        let wait = match reason {
            Reason::First => cpu.foreground_wait(now),
            Reason::Touched | Reason::RoundRobin => cpu.background_wait(now),
        };
        if !wait.is_zero() {
            shorten(sleep, wait.max(THROTTLE));
            return None;
        }
        self.scan.next(&self.map, now)
    }

    /// A look came back that took so much CPU time.
    pub fn take_look(&mut self, look: &Look, runs: &[HostRun], took: Duration, now: Instant) {
        let news = self.apply_look(runs);
        self.scan.done(look, took, news, now);
    }

    /// Takes the next action that the budgets allow, and the bytes that were taken from the copy
    /// budget for it, to be settled when it ends; else how long to sleep at most. Only for when no
    /// action is under way.
    pub fn next_work(
        &mut self,
        budgets: &mut Budgets<'_>,
        now: Instant,
        sleep: &mut Duration,
    ) -> Option<(Work, u64)> {
        // As long as the host was not looked at, nobody knows how many huge pages there are.
        if !self.scan.complete() && self.supply.limit() != u64::MAX {
            return None;
        }
        let Budgets { copy, cpu, block_size } = budgets;
        let block_size = *block_size;
        let left = self.huge_pages_left();
        let allowance = if self.makes_nothing() {
            Allowance::default()
        } else {
            Allowance {
                requested: cpu.requested_ok(now),
                background: cpu.background_ok(now),
                copies: copy.blocks(block_size, now),
                pages: left.wanted,
                prepared: left.prepared,
                renewed: left.renewed,
            }
        };
        let work = self.repair.next(&self.map, &allowance);
        if let Some(work) = work.or_else(|| self.next_demotion(&allowance, now)) {
            self.acting = work.blocks();
            // Taken in advance; settled when it is done.
            let advance = self.copies(&work) * block_size;
            copy.advance(advance, now);
            return Some((work, advance));
        }
        if self.makes_nothing() {
            return None;
        }
        // If it is no budget that is missing, what could help wakes us.
        let mut wait_for = |cpu_wait: Option<Duration>| {
            let wait = cpu_wait.or_else(|| copy.wait(block_size, now));
            shorten(sleep, wait.unwrap_or(SLEEP_MAX).max(THROTTLE));
        };
        if self.is_beyond_share() && !allowance.requested {
            wait_for(Some(cpu.requested_wait(now)));
        }
        if self.repair.requested() {
            wait_for((!allowance.requested).then(|| cpu.requested_wait(now)));
        }
        if self.repair.wants() && allowance.pages == 0 {
            // The end of moves wakes us by itself.
            if !self.moving.is_wanted() || self.repair.agenda().makes_way() > 0 {
                let until = self.demotion.next_sweep().saturating_duration_since(now);
                shorten(sleep, until.max(THROTTLE));
            }
        } else if self.repair.wants() {
            wait_for((!allowance.background).then(|| cpu.background_wait(now)));
        }
        None
    }

    /// Decides whether the guest is to move its huge pages.
    pub fn update_moving(&mut self, now: Instant, sleep: &mut Duration) {
        let situation = self.situation();
        let before = self.moving.is_wanted();
        if let Some(at) = self.moving.update(&situation, now) {
            shorten(sleep, at.saturating_duration_since(now));
        }
        match (before, self.moving.is_wanted()) {
            (false, true) => log::info!(
                "huge pages are hard to make: the guest is asked to move {} of its own to {}",
                situation.guest_only,
                situation.unused
            ),
            (true, false) => log::info!("the guest is not asked to move huge pages any more"),
            _ => {}
        }
    }

    /// What to demote, where the limit alone keeps the policy from what it wants.
    fn next_demotion(&mut self, allowance: &Allowance, now: Instant) -> Option<Work> {
        if self.is_beyond_share() && (allowance.requested || self.makes_nothing()) {
            let rests = |index| self.repair.rests(index);
            let block = self.demotion.next_of_all(&self.map, rests)?;
            return Some(Work::Demote { block });
        }
        let at_limit = allowance.pages == 0 && self.repair.wants();
        if !at_limit || !allowance.background || allowance.copies == 0 {
            return None;
        }
        let makes_way = self.repair.agenda().makes_way();
        let (rests, kept) = (|index| self.repair.rests(index), self.timeout.at_limit());
        // What the guest moves to is not to be taken away meanwhile, and no copy is needed then.
        let block = if self.moving.is_wanted() {
            self.demotion.look(&self.map, rests, kept, now);
            None
        } else {
            self.demotion.next(&self.map, rests, kept, now)
        };
        let block = match block {
            None => self.demotion.next_cold(&self.map, makes_way, now),
            block => block,
        };
        block.map(|block| Work::Demote { block })
    }

    /// How many blocks an action may copy.
    fn copies(&self, work: &Work) -> u64 {
        let blocks = work.blocks().filter_map(|block| self.map.index_of(block));
        let resident =
            |index: &usize| self.map.get(*index).is_some_and(|block| block.host == HostState::Base);
        blocks.filter(resident).count() as u64
    }

    /// An action ended: takes what came of it. The answer that the driver is to have, if it was
    /// waiting for one.
    pub fn take_deed(
        &mut self,
        deed: &Deed,
        block_size: u64,
        standing: &Standing,
        now: Instant,
    ) -> Option<PrepareAnswer> {
        self.acting = 0..0;
        self.count(deed, block_size);
        if let Some(took) = deed.met {
            self.repair.pause(took, now);
        }
        for (_, outcome) in &deed.outcomes {
            match outcome {
                Outcome::Done => {
                    self.supply.gave();
                    self.moving.attempted(true, now);
                }
                // Of a short pool all is known: there is nothing to be learnt by trying.
                Outcome::Lacking if standing.pool_short => {}
                Outcome::Lacking => {
                    self.supply.failed(now);
                    self.moving.attempted(false, now);
                }
                Outcome::Idle | Outcome::Failed | Outcome::Deferred => {}
            }
        }
        if standing.current {
            for &(block, outcome) in &deed.outcomes {
                let Some(index) = self.map.index_of(block) else { continue };
                let known = self.map.get(index).copied().unwrap_or_default();
                if outcome == Outcome::Done && known.guest == GuestState::Huge && known.used >= WARM
                {
                    self.demotion.spare(index, now);
                }
                let failures = known.failures;
                let failures = self.repair.ended(index, outcome, failures, now);
                self.map.set_failures(index, failures);
                if outcome == Outcome::Deferred && deed.seen {
                    self.repair.again(block);
                }
                // Who asked is told again, also of what is as it was.
                if deed.requested {
                    self.hints.changed(index);
                }
            }
        }
        if standing.same && deed.seen {
            self.apply_acted(&deed.runs);
        } else {
            // What was done may not be seen by looks that are under way: all is looked at anew.
            self.scan = ScanPlan::new(self.map.len(), now);
        }
        let id = deed.settled.filter(|_| standing.current)?;
        if !self.repair.end_prepare(id) {
            return None;
        }
        let records = self.host_records(&deed.ranges);
        let huge = |r: &Record| HostState::from_wire(r.state).is_some_and(HostState::is_huge);
        let status = if records.iter().all(huge) { S_OK } else { S_FAILED };
        if status == S_FAILED {
            self.timeout.request_failed();
        }
        Some(PrepareAnswer { id, status, records })
    }

    fn count(&mut self, deed: &Deed, block_size: u64) {
        let totals = &mut self.totals;
        totals.collapse_bytes += deed.copied_bytes;
        totals.collapses += deed.copied;
        totals.collapses_met += u64::from(deed.met.is_some());
        totals.collapse_failures += deed.failed;
        totals.charged_bytes += deed.attempts * block_size;
        totals.populated += deed.populated;
        totals.demoted += deed.demoted;
    }
}

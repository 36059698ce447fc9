//! The daemon's decisions, driven by a trace, a [`Host`] and a clock that jumps.

use crate::host::{index_of, Cause, Costs, Host};
use crate::trace::{Event, Trace, What, PAGES};
use gemini_harness::rng::Rng;
use std::time::{Duration, Instant};
use std::{collections::VecDeque, ops::Range};
use vhost_device_gemini::backing::{HostRun, HostState};
use vhost_device_gemini::budget::{CopyBudget, CpuBudget};
use vhost_device_gemini::engine::{Budgets, Deed, Look, Outcome, Standing, State, Work};
use vhost_device_gemini::policy::Policy;
use vhost_device_gemini::protocol::{Batch, GuestState, Record, BATCH_STATE, SYNC_END, SYNC_START};

/// Bytes of a block.
pub const BLOCK: u64 = 2 << 20;
/// Shortest step of the clock where nothing is known to happen.
const STEP: Duration = Duration::from_millis(1);
/// Longest step.
const STEP_MAX: Duration = Duration::from_secs(1);

/// What the daemon may spend, and what befalls it.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Its policy.
    pub policy: Policy,
    /// Bytes that collapses may copy per second.
    pub copy_rate: u64,
    /// Share of one CPU.
    pub cpu_share: f64,
    /// Most blocks that may be huge.
    pub huge_max: Option<u64>,
    /// Collapses that fail although there is a page, in a hundred.
    pub fail_percent: u64,
    /// Whether the host's free memory is fragmented.
    pub fragmented: bool,
    /// Seed of what fails.
    pub seed: u64,
    /// When the policy is set once more.
    pub again: Option<Duration>,
    /// How long the simulation goes on after the last event.
    pub rest: Duration,
}

impl Plan {
    /// A policy with a GiB a second and all of a CPU, on a host where everything works.
    #[must_use]
    pub fn new(policy: Policy) -> Self {
        Plan {
            policy,
            copy_rate: 1 << 30,
            cpu_share: 1.0,
            huge_max: None,
            fail_percent: 0,
            fragmented: true,
            seed: 1,
            again: None,
            rest: Duration::ZERO,
        }
    }
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Blocks that are huge at both layers, in the end.
    pub aligned: u64,
    /// Blocks that are huge in the guest alone.
    pub guest_only: u64,
    /// Blocks in use that are huge in the host alone.
    pub host_only: u64,
    /// Blocks that were collapsed with a copy.
    pub copied: u64,
    /// Blocks that were split.
    pub demoted: u64,
    /// Actions that failed for lack of a page.
    pub lacking: u64,
    /// When collapses were tried that failed for lack of a page.
    pub lacking_at: Vec<Duration>,
    /// Most bytes that collapses were charged in any second.
    pub most_in_a_second: u64,
    /// Most blocks that were huge at once.
    pub most_huge: u64,
    /// Most collapses of other blocks between the report of a guest huge page and the first try to
    /// collapse it.
    pub longest_wait: u64,
    /// CPU time of the daemon beyond its share of the time and what can be saved up.
    pub cpu_beyond: Duration,
    /// Simulated time.
    pub time: Duration,
    /// A number that stands for everything that was done, and when.
    pub digest: u64,
    /// What may not happen and did, in words.
    pub wrong: Vec<String>,
}

/// Something under way, until then.
type UnderWay<T> = Option<(Instant, T)>;

struct Simulation<'a> {
    plan: &'a Plan,
    start: Instant,
    now: Instant,
    state: State,
    host: Host,
    copy: CopyBudget,
    cpu: CpuBudget,
    cpu_time: Duration,
    look: UnderWay<(Look, Vec<HostRun>, Duration)>,
    act: UnderWay<(Work, u64, Deed)>,
    rng: Rng,
    prepares: u64,
    /// Collapses that were begun.
    collapses: u64,
    /// Of each block, how many had been begun when it became a guest huge page that was not tried.
    waits_since: Vec<Option<u64>>,
    /// Of each block, until when it rests.
    rests_until: Vec<Option<Instant>>,
    /// Charged in the last second.
    window: VecDeque<(Instant, u64)>,
    report: Report,
}

/// Runs a trace.
#[must_use]
pub fn run(trace: &Trace, plan: &Plan) -> Report {
    let start = Instant::now();
    let mut state = State::new(plan.policy, plan.huge_max.unwrap_or(u64::MAX), start);
    let spans: [Range<u64>; 1] = [0..trace.blocks];
    state.manage(&spans, start);
    state.connected = true;
    let blocks = index_of(trace.blocks);
    let mut simulation = Simulation {
        plan,
        start,
        now: start,
        state,
        host: Host::new(blocks),
        copy: CopyBudget::new(plan.copy_rate, BLOCK, start),
        cpu: CpuBudget::new(plan.cpu_share, Duration::ZERO, start),
        cpu_time: Duration::ZERO,
        look: None,
        act: None,
        rng: Rng::new(plan.seed),
        prepares: 0,
        collapses: 0,
        waits_since: vec![None; blocks],
        rests_until: vec![None; blocks],
        window: VecDeque::new(),
        report: Report { digest: 0xcbf2_9ce4_8422_2325, ..Report::default() },
    };
    simulation.state.set_fragmented(plan.fragmented);
    simulation.report(SYNC_START | SYNC_END, &[]);
    simulation.go(trace);
    simulation.finish()
}

impl Simulation<'_> {
    fn go(&mut self, trace: &Trace) {
        let end = trace.events.last().map_or(0, |event| event.at);
        let end = self.start + Duration::from_millis(end) + self.plan.rest;
        let mut events = trace.events.iter().peekable();
        let mut again = self.plan.again.map(|time| self.start + time);
        loop {
            let mut told = Vec::new();
            while let Some(event) = events.next_if(|event| self.time_of(event) <= self.now) {
                self.happen(event, &mut told);
            }
            self.report(0, &told);
            if again.take_if(|at| *at <= self.now).is_some() {
                self.state.set_policy(self.plan.policy);
            }
            self.end_actions();
            let mut sleep = STEP_MAX;
            self.begin_actions(&mut sleep);
            if self.now >= end && events.peek().is_none() {
                return;
            }
            let mut next = self.now + sleep.max(STEP);
            let due = [self.look.as_ref().map(|(at, _)| *at), self.act.as_ref().map(|(at, _)| *at)];
            for at in due.into_iter().flatten().chain(events.peek().map(|e| self.time_of(e))) {
                next = next.min(at);
            }
            self.now = next.max(self.now + Duration::from_nanos(1));
        }
    }

    fn time_of(&self, event: &Event) -> Instant {
        self.start + Duration::from_millis(event.at)
    }

    fn report(&mut self, flags: u16, records: &[Record]) {
        if flags == 0 && records.is_empty() {
            return;
        }
        let generation = self.state.generation;
        let batch = Batch { generation, count: 0, kind: BATCH_STATE, flags };
        let refused = self.state.apply_report(&batch, records);
        self.expect(refused == 0, || "a report was refused".into());
    }

    fn expect(&mut self, right: bool, what: impl FnOnce() -> String) {
        if !right && self.report.wrong.len() < 10 {
            let time = self.now - self.start;
            self.report.wrong.push(format!("at {time:?}: {}", what()));
        }
    }

    fn note(&mut self, numbers: &[u64]) {
        let time = u64::try_from((self.now - self.start).as_nanos()).unwrap_or(u64::MAX);
        for number in numbers.iter().chain([&time]) {
            self.report.digest = (self.report.digest ^ number).wrapping_mul(0x0100_0000_01b3);
        }
    }

    /// The guest does something; what its driver reports of it.
    fn happen(&mut self, event: &Event, told: &mut Vec<Record>) {
        let Event { what, first, count, .. } = *event;
        match what {
            What::Guest(state, used) => {
                for index in blocks(first, count) {
                    match state {
                        GuestState::Huge => self.host.touch(index, PAGES),
                        GuestState::Base => self.host.touch(index, used),
                        _ => {}
                    }
                    let waits = state == GuestState::Huge && !self.host.state(index).is_huge();
                    let since = self.waits_since[index].unwrap_or(self.collapses);
                    self.waits_since[index] = waits.then_some(since);
                }
                let used = u32::from(used);
                told.push(Record { first, count, state: state as u8, used, ..Record::default() });
            }
            What::Drop => {
                // Only what the driver holds.
                self.report(0, &std::mem::take(told));
                let held = blocks(first, count).all(|index| {
                    self.state.map.get(index).is_some_and(|b| b.guest == GuestState::Booked)
                });
                if held {
                    self.state.begin_drop();
                    for index in blocks(first, count) {
                        let huge = u64::from(self.host.state(index).is_huge());
                        self.host.pages = self.host.pages.saturating_add(huge);
                        self.host.change(index, Cause::Drop, HostState::Absent);
                    }
                    let seen = self.host.look(first, count);
                    self.state.apply_dropped(&seen);
                }
            }
            What::Prepare => {
                if self.state.serves_requests() {
                    self.prepares += 1;
                    self.state.repair.prepare(self.prepares, vec![(first, count)]);
                }
            }
            What::Pages => self.host.pages = u64::from(count),
        }
    }

    fn end_actions(&mut self) {
        if let Some((_, (look, runs, took))) = self.look.take_if(|(at, _)| *at <= self.now) {
            self.state.take_look(&look, &runs, took, self.now);
        }
        if let Some((_, (work, advance, deed))) = self.act.take_if(|(at, _)| *at <= self.now) {
            self.charge(deed.attempts * BLOCK);
            self.copy.settle(advance, deed.attempts * BLOCK, self.now);
            for &(block, outcome) in &deed.outcomes {
                self.note(&[block, outcome as u64]);
            }
            let standing = Standing { current: true, same: true, pool_short: false };
            self.state.take_deed(&deed, BLOCK, &standing, self.now);
            self.rest(&work, &deed);
        }
    }

    /// What was tried rests for as long as its failures say.
    fn rest(&mut self, work: &Work, deed: &Deed) {
        for &(block, outcome) in &deed.outcomes {
            let index = index_of(block);
            let failures = self.state.map.get(index).map_or(0, |known| known.failures);
            let rest = Duration::from_millis(100) * (1 << failures.min(10));
            let collapse = matches!(work, Work::Collapse { .. });
            if collapse && outcome != Outcome::Done && self.rests_until[index].is_none() {
                self.rests_until[index] = Some(self.now + rest);
            }
        }
    }

    fn charge(&mut self, bytes: u64) {
        self.window.push_back((self.now, bytes));
        while self.window.front().is_some_and(|(at, _)| *at + Duration::from_secs(1) < self.now) {
            self.window.pop_front();
        }
        let charged = self.window.iter().map(|(_, bytes)| bytes).sum();
        self.report.most_in_a_second = self.report.most_in_a_second.max(charged);
        let rate = self.plan.copy_rate;
        let most = rate + (rate / 10).max(2 * BLOCK);
        self.expect(charged <= most, || format!("{charged} bytes in a second, {most} allowed"));
    }

    fn begin_actions(&mut self, sleep: &mut Duration) {
        self.cpu.update(self.cpu_time, self.now);
        self.judge_cpu();
        if self.look.is_none() {
            if let Some(look) = self.state.next_look(&mut self.cpu, self.now, sleep) {
                let (once, each) = Costs::LOOK;
                let took = once + each * look.count;
                let runs = self.host.look(look.first, look.count);
                self.cpu_time += took;
                self.look = Some((self.now + took, (look, runs, took)));
            }
        }
        if self.state.wake(self.now) {
            *sleep = Duration::ZERO;
        }
        if self.act.is_none() {
            let mut budgets =
                Budgets { copy: &mut self.copy, cpu: &mut self.cpu, block_size: BLOCK };
            if let Some((work, advance)) = self.state.next_work(&mut budgets, self.now, sleep) {
                self.judge(&work);
                let (deed, took) = self.act(&work, advance / BLOCK);
                self.cpu_time += took;
                self.act = Some((self.now + took, (work, advance, deed)));
                self.report.most_huge = self.report.most_huge.max(self.host.huge);
                let limit = self.plan.huge_max.unwrap_or(u64::MAX);
                let huge = self.host.huge;
                self.expect(huge <= limit, || format!("{huge} blocks are huge, {limit} may be"));
            }
        }
        self.state.update_supply(self.now, sleep);
        if let Some(at) = self.state.repair.wakes_at() {
            *sleep = (*sleep).min(at.saturating_duration_since(self.now));
        }
    }

    /// Whether the daemon keeps to its share of the CPU, but for one action and one look.
    fn judge_cpu(&mut self) {
        let saved = CpuBudget::SAVED + (self.now - self.start).as_secs_f64();
        let allowed = Duration::from_secs_f64(saved * self.plan.cpu_share);
        let beyond = self.cpu_time.saturating_sub(allowed);
        self.report.cpu_beyond = self.report.cpu_beyond.max(beyond);
    }

    /// Whether an action is one that may be begun.
    fn judge(&mut self, work: &Work) {
        match *work {
            Work::Collapse { first, count } => {
                for index in blocks(first, count) {
                    let block = self.state.map.get(index).copied().unwrap_or_default();
                    // By what the plan says of the host, not by what the daemon makes of it.
                    let wanted = self.plan.policy.wants_collapse(&block, self.plan.fragmented);
                    self.expect(wanted, || {
                        format!("{first} is not wanted, and collapsed: {block:?}")
                    });
                    let rested = self.rests_until[index].take().is_none_or(|at| at <= self.now);
                    self.expect(rested, || format!("{first} is tried again while it rests"));
                    if let Some(since) = self.waits_since[index].take() {
                        let waited = self.collapses - since;
                        self.report.longest_wait = self.report.longest_wait.max(waited);
                    }
                    self.collapses += 1;
                }
            }
            Work::Demote { block } => {
                let known = self.state.map.get(index_of(block)).copied().unwrap_or_default();
                let useless = matches!(known.guest, GuestState::Free | GuestState::Base);
                let right = known.host == HostState::Huge && useless;
                self.expect(right, || format!("{block} is split: {known:?}"));
            }
            Work::Populate { .. } | Work::Settle { .. } => {}
        }
    }

    /// Does it, and copies no more than `leave` blocks that the driver asked for; what comes of it,
    /// and how long it takes.
    fn act(&mut self, work: &Work, leave: u64) -> (Deed, Duration) {
        let mut deed = Deed { seen: true, ..Deed::default() };
        let mut took = Costs::OTHER;
        match *work {
            Work::Collapse { first, count } => {
                for index in blocks(first, count) {
                    took += self.collapse(index, &mut deed);
                }
                deed.runs = self.host.look(first, count);
            }
            Work::Populate { first, count } => {
                deed.requested = true;
                for index in blocks(first, count) {
                    let outcome = match self.host.state(index) {
                        HostState::Huge | HostState::Hugetlb => Outcome::Idle,
                        HostState::Base if deed.attempts == leave => Outcome::Deferred,
                        before if self.host.take(index, Cause::Populate) => {
                            let copies = before == HostState::Base;
                            deed.attempts += u64::from(copies);
                            deed.copied += u64::from(copies);
                            deed.populated += u64::from(!copies);
                            took += if copies { Costs::COPY } else { Costs::OTHER };
                            Outcome::Done
                        }
                        before => {
                            deed.attempts += u64::from(before == HostState::Base);
                            deed.failed += 1;
                            Outcome::Lacking
                        }
                    };
                    deed.outcomes.push((index as u64, outcome));
                }
                deed.runs = self.host.look(first, count);
            }
            Work::Demote { block } => {
                self.host.change(index_of(block), Cause::Demote, HostState::Base);
                // The page goes back to where the next one comes from.
                self.host.pages = self.host.pages.saturating_add(1);
                deed.demoted = 1;
                deed.runs = self.host.look(block, 1);
            }
            Work::Settle { id, ref ranges } => {
                deed.requested = true;
                deed.settled = Some(id);
                for &(first, count) in ranges {
                    deed.runs.extend(self.host.look(first, count));
                }
                deed.ranges.clone_from(ranges);
            }
        }
        self.report.copied += deed.copied;
        self.report.demoted += deed.demoted;
        (deed, took)
    }

    fn collapse(&mut self, index: usize, deed: &mut Deed) -> Duration {
        let (outcome, took) = if self.host.state(index) != HostState::Base {
            // Dropped, or huge, since the daemon last looked: nothing is begun.
            (Outcome::Failed, Costs::OTHER)
        } else {
            deed.attempts += 1;
            if self.rng.chance(self.plan.fail_percent) {
                (Outcome::Failed, Costs::OTHER)
            } else if self.host.take(index, Cause::Collapse) {
                deed.copied += 1;
                (Outcome::Done, Costs::COPY)
            } else {
                self.report.lacking += 1;
                self.report.lacking_at.push(self.now - self.start);
                (Outcome::Lacking, Costs::OTHER)
            }
        };
        deed.failed += u64::from(outcome != Outcome::Done);
        deed.outcomes.push((index as u64, outcome));
        took
    }

    fn finish(mut self) -> Report {
        let counters = *self.state.map.counters();
        let (report, one) = (&mut self.report, Costs::COPY + Costs::OTHER);
        (report.aligned, report.guest_only, report.host_only) =
            (counters.aligned, counters.guest_only, counters.host_only);
        report.time = self.now - self.start;
        report.wrong.append(&mut self.host.illegal);
        let (once, each) = Costs::LOOK;
        if report.cpu_beyond > 8 * one + once + each * 8192 {
            report.wrong.push(format!("{:?} of CPU beyond the share", report.cpu_beyond));
        }
        self.report
    }
}

fn blocks(first: u64, count: u32) -> Range<usize> {
    index_of(first)..index_of(first + u64::from(count))
}

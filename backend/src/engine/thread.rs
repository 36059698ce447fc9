//! The deciding thread: a round looks around, sends the workers out, and tells the driver.

use super::worker::{self, Job};
use super::RELEASE_MAX;
use super::{lock, Budgets, Engine, GiveBack, Inner, Outcome, PrepareAnswer, Standing, State};
use crate::backing::process_cpu_time;
use crate::fault;
use crate::pressure::Sources;
use crate::protocol::{Advice, ADVICE_MOVE, ADVICE_RETURN, ADVICE_SCARCE};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// Longest sleep of the deciding thread; it is woken for everything that matters.
pub(super) const SLEEP_MAX: Duration = Duration::from_secs(60);

impl Engine {
    /// Waits while a new memory table settles.
    fn settle(&self) {
        let mut inner = self.lock();
        while !inner.stopping {
            let left = inner.settling_until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.wake.wait_timeout(inner, left);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The deciding thread.
    pub(super) fn run(&self, look: &SyncSender<Job>, act: &SyncSender<Job>) {
        let mut tlb = None;
        let mut sources = Sources::default();
        let mut fragmentation_due = Instant::now();
        loop {
            self.settle();
            let now = Instant::now();
            lock(&self.cpu).update(process_cpu_time(), now);
            let mut sleep = SLEEP_MAX;
            self.watch_pressure(&mut sources, now, &mut sleep);
            self.watch_pools(now, &mut sleep);
            self.watch_timeout(&mut tlb, now, &mut sleep);
            self.watch_fragmentation(now, &mut sleep);
            self.tell_fragmentation(&mut fragmentation_due, now, &mut sleep);
            {
                let mut inner = self.lock();
                if inner.stopping {
                    return;
                }
                self.dispatch_look(&mut inner, look, now, &mut sleep);
                self.dispatch_act(&mut inner, act, now, &mut sleep);
                inner.state.update_supply(now, &mut sleep);
            }
            self.publish_hints(&mut sleep);
            let inner = self.lock();
            if !inner.woken && !inner.stopping {
                let waited = self.wake.wait_timeout_while(inner, sleep, |i| !i.woken);
                waited.unwrap_or_else(PoisonError::into_inner).0.woken = false;
            } else {
                let mut inner = inner;
                inner.woken = false;
            }
        }
    }

    fn dispatch_look(
        &self,
        inner: &mut Inner,
        look: &SyncSender<Job>,
        now: Instant,
        sleep: &mut Duration,
    ) {
        let Inner { state, looking, .. } = inner;
        let Some(memory) = state.memory.clone() else { return };
        if *looking {
            return;
        }
        if let Some(next) = state.next_look(&mut lock(&self.cpu), now, sleep) {
            let job = Job::Look { memory, look: next };
            *looking = look.try_send(job).is_ok();
        }
    }

    fn dispatch_act(
        &self,
        inner: &mut Inner,
        act: &SyncSender<Job>,
        now: Instant,
        sleep: &mut Duration,
    ) {
        let Inner { state, acting, .. } = inner;
        if state.wake(now) {
            *sleep = Duration::ZERO;
        }
        if let Some(memory) = state.memory.clone().filter(|_| !*acting) {
            let mut budgets = Budgets {
                copy: &mut lock(&self.copy),
                cpu: &mut lock(&self.cpu),
                block_size: 1 << self.settings.block_shift,
            };
            if let Some((work, advance)) = state.next_work(&mut budgets, now, sleep) {
                let (generation, holes) = (state.generation, state.policy.holes());
                let job = Job::Act { memory, generation, work, holes, advance };
                *acting = act.try_send(job).is_ok();
            }
        }
        if let Some(at) = state.repair.wakes_at() {
            *sleep = (*sleep).min(at.saturating_duration_since(now));
        }
    }

    /// Tells the driver what it does not know, as far as it has posted buffers.
    fn publish_hints(&self, sleep: &mut Duration) {
        loop {
            let port = {
                let inner = self.lock();
                let state = &inner.state;
                let advice = Self::advice(state);
                if inner.stopping || !state.scan.complete() || !state.hints.pending(&advice) {
                    return;
                }
                inner.port.clone()
            };
            let Some(port) = port else { return };
            if let Some(pause) = self.overdrawn(Instant::now()) {
                *sleep = (*sleep).min(pause);
                return;
            }
            let sent = port.send_hint(&mut |room| {
                let mut inner = self.lock();
                let state = &mut inner.state;
                // A new generation may have begun since: then the host is looked at first.
                if !state.scan.complete() {
                    return None;
                }
                let advice = Self::advice(state);
                let batch = state.hints.next(&state.map, &advice, room)?;
                state.totals.hint_batches += 1;
                Some((state.generation, batch))
            });
            if !sent {
                return; // a kick of the hint queue wakes us
            }
        }
    }

    /// What the host would like of the driver.
    fn advice(state: &State) -> Advice {
        // Who prepares nothing has nothing to give, however much there is.
        let scarce = state.supply.is_scarce() || !state.serves_requests();
        let mut flags = if scarce { ADVICE_SCARCE } else { 0 };
        if state.give_back == GiveBack::Always && !state.logging {
            flags |= ADVICE_RETURN;
        }
        if state.moving.is_wanted() && !state.logging {
            flags |= ADVICE_MOVE;
        }
        let wanted = if state.logging { 0 } else { state.wish.blocks() };
        let booking_timeout_ms = state.timeout.wish_ms();
        Advice { booking_timeout_ms, release_max: RELEASE_MAX, flags, wanted, ..Advice::default() }
    }

    /// A look came back.
    pub(super) fn looked(&self, job: worker::Looked) {
        let now = Instant::now();
        let mut inner = self.lock();
        inner.looking = false;
        let state = &mut inner.state;
        // Should the driver have restarted meanwhile: what was seen of the host is still true.
        if state.memory.as_ref().is_some_and(|memory| Arc::ptr_eq(memory, &job.memory)) {
            state.take_look(&job.look, &job.runs, job.took, now);
        }
        drop(inner);
        self.wake();
    }

    /// An action ended.
    pub(super) fn acted(&self, done: worker::Acted) {
        let worker::Acted { memory, generation, advance, deed } = done;
        let now = Instant::now();
        let block_size = 1 << self.settings.block_shift;
        lock(&self.copy).settle(advance, deed.attempts * block_size, now);
        let lacking = deed.outcomes.iter().any(|(_, outcome)| *outcome == Outcome::Lacking);
        let pool_short = lacking && self.is_pool_short(&memory, now);
        let mut inner = self.lock();
        inner.acting = false;
        let port = inner.port.clone();
        let state = &mut inner.state;
        let current = state.generation == generation;
        let same = state.memory.as_ref().is_some_and(|current| Arc::ptr_eq(current, &memory));
        let answer =
            state.take_deed(&deed, block_size, &Standing { current, same, pool_short }, now);
        drop(inner);
        if let (Some(port), Some(PrepareAnswer { id, status, records })) = (port, answer) {
            fault::point("prepare.done");
            port.answer_prepare(id, status, &records);
        }
        self.wake();
    }
}

impl State {
    /// Notes whether huge pages are scarce, and shortens `sleep` to when that may change by itself.
    pub fn update_supply(&mut self, now: Instant, sleep: &mut Duration) {
        let before = self.supply.is_scarce();
        let (scarce, wakes_at) = self.supply.update(self.huge_or_promised(), now);
        if let Some(at) = wakes_at {
            *sleep = (*sleep).min(at.saturating_duration_since(now));
        }
        if scarce != before {
            log::info!("huge pages for the guest are {}", if scarce { "used up" } else { "back" });
        }
    }
}

//! What the deciding thread looks at beside the guest's memory: how short of memory the host is,
//! how fragmented, its pools of huge pages, and what the booking timeout has brought.

use super::pools::Word;
use super::timeout::End;
use super::{lock, trim, Engine, GiveBack, Pools, State};
use crate::backing::{page_size, HostState, Kind, Memory, PoolState, TlbCounters};
use crate::fmfi;
use crate::policy::FRAGMENTED;
use crate::pressure::Sources;
use crate::protocol::GuestState;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Time between two looks how fragmented the host is, for a policy that goes by it.
const FRAGMENTATION_PERIOD: Duration = Duration::from_secs(5);

impl Engine {
    /// Looks how short of memory the host is, and lets the wish follow.
    pub(super) fn watch_pressure(&self, sources: &mut Sources, now: Instant, sleep: &mut Duration) {
        let (vmm, never) = {
            let inner = self.lock();
            let Some(memory) = &inner.state.memory else {
                sources.close();
                return;
            };
            (memory.vmm(), inner.state.give_back == GiveBack::Never)
        };
        let mut watch = lock(&self.pressure);
        if watch.due() <= now {
            let missing = watch.look(&sources.view(vmm), now);
            let mut inner = self.lock();
            let before = inner.state.wish.blocks();
            let block_size = 1 << self.settings.block_shift;
            let owed = inner.state.owed(block_size, now);
            let wanted = missing.div_ceil(block_size).max(owed);
            inner.state.want(if never { 0 } else { wanted }, now);
            match (before, inner.state.wish.blocks()) {
                (0, 1..) if owed > 0 => {
                    log::info!("the guest is asked for what a migration filled")
                }
                (0, 1..) => log::info!("the host is short of memory: the guest is asked for some"),
                (1.., 0) => log::info!("the guest is not asked for memory any more"),
                _ => {}
            }
        }
        *sleep = (*sleep).min(watch.due().saturating_duration_since(now));
    }

    /// At the end of a period: what it brought decides on the timeout of the next one. `tlb` counts
    /// the guest's TLB misses in it, where that can be.
    pub(super) fn watch_timeout(
        &self,
        tlb: &mut Option<TlbCounters>,
        now: Instant,
        sleep: &mut Duration,
    ) {
        let vmm = {
            let inner = self.lock();
            let ends = inner.state.timeout.ends();
            let (Some(ends), Some(memory)) = (ends, &inner.state.memory) else {
                *tlb = None;
                return;
            };
            if ends > now {
                *sleep = (*sleep).min(ends - now);
                return;
            }
            memory.vmm()
        };
        let tlb_misses = tlb.take().and_then(|counters| counters.total().ok());
        // Anew for each period: processors of a guest come and go.
        *tlb = vmm.and_then(|vmm| {
            TlbCounters::open(vmm)
                .inspect_err(|error| log::debug!("TLB misses are not counted: {error}"))
                .ok()
        });
        let fmfi = self.fmfi();
        let mut inner = self.lock();
        let state = &mut inner.state;
        let keeps = state.keeps();
        let misaligned = state.misaligned();
        let end = End { tlb_misses, misaligned, fmfi, keeps, counting: tlb.is_some() };
        state.timeout.end_period(&end, now);
        if let Some(ends) = state.timeout.ends() {
            *sleep = (*sleep).min(ends.saturating_duration_since(now));
        }
    }

    /// How fragmented the host's free memory is for blocks.
    fn fmfi(&self) -> Option<u32> {
        let order = self.settings.block_shift.saturating_sub(page_size().trailing_zeros());
        fmfi::host(order)
    }

    /// Looks how fragmented the host is, where it matters, and decides whether the guest is to move
    /// its huge pages.
    pub(super) fn watch_fragmentation(&self, now: Instant, sleep: &mut Duration) {
        let look = self.inspect(|state| state.moving.wants_look(&state.situation(), now));
        let fmfi = look.then(|| self.fmfi());
        let mut inner = self.lock();
        if let Some(fmfi) = fmfi {
            inner.state.moving.looked(fmfi, now);
        }
        inner.state.update_moving(now, sleep);
    }

    /// Looks how fragmented the host is, where the policy goes by it.
    pub(super) fn tell_fragmentation(&self, due: &mut Instant, now: Instant, sleep: &mut Duration) {
        if !self.inspect(|state| state.policy.minds_fragmentation()) {
            return;
        }
        if *due <= now {
            *due = now + FRAGMENTATION_PERIOD;
            let fragmented = self.fmfi().is_some_and(|index| index >= FRAGMENTED);
            self.lock().state.set_fragmented(fragmented);
        }
        *sleep = (*sleep).min(due.saturating_duration_since(now));
    }

    /// Looks at the pools that the guest's hugetlb memory comes from, and lets the promises follow.
    pub(super) fn watch_pools(&self, now: Instant, sleep: &mut Duration) {
        let mut pools = lock(&self.pools);
        if pools.due() <= now {
            let memory = self.lock().state.memory.clone();
            self.look_at_pools(&mut pools, memory.as_deref(), now);
        }
        *sleep = (*sleep).min(pools.due().saturating_duration_since(now));
    }

    fn look_at_pools(&self, pools: &mut Pools, memory: Option<&Memory>, now: Instant) {
        match pools.look(memory.map_or_else(Vec::new, Memory::pools), now) {
            Some(Word::Short(message)) => log::warn!("{message}"),
            Some(Word::Over) => log::info!("the pool of huge pages suffices again"),
            None => {}
        }
        self.lock().state.supply.set_pool_short(pools.short());
    }

    /// There was no page for a block of `memory`: whether that is because its pool is short.
    pub(super) fn is_pool_short(&self, memory: &Arc<Memory>, now: Instant) -> bool {
        let mut pools = lock(&self.pools);
        let current = self.lock().state.memory.as_ref().is_some_and(|m| Arc::ptr_eq(m, memory));
        if current && memory.kinds().iter().any(|kind| matches!(kind, Kind::Hugetlb { .. })) {
            self.look_at_pools(&mut pools, Some(memory), now);
        }
        pools.short()
    }

    /// The pools of hugetlb pages as they were last seen, for status output.
    pub fn pools(&self) -> Vec<PoolState> {
        lock(&self.pools).seen().to_vec()
    }

    /// How short of memory the host is, for status output.
    pub fn pressure(&self) -> serde_json::Value {
        lock(&self.pressure).status()
    }
}

impl State {
    /// Asks the guest for as many blocks, or for what it has. What it reports as free is no leave
    /// to take it, but tells what there is to be asked for.
    fn want(&mut self, blocks: u64, now: Instant) {
        let most = if blocks == 0 { 0 } else { self.spare_blocks() };
        if self.wish.set(blocks, most, now) {
            self.hints.repeat_advice();
        }
    }

    /// Blocks' worth of memory that the guest could give back.
    fn spare_blocks(&self) -> u64 {
        let unused = |index: &usize| {
            self.map.get(*index).is_some_and(|block| {
                block.host != HostState::Absent
                    && matches!(block.guest, GuestState::Free | GuestState::Booked)
            })
        };
        let unused = (0..self.map.len()).filter(unused).count() as u64;
        unused + self.block_pages.map_or(0, |pages| trim::spare_blocks(&self.map, pages))
    }
}

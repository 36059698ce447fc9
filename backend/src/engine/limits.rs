//! What may be spent for the guest, as the operator sets it and other VMs leave it, and the pause
//! of whoever serves the guest once too much was.

use super::{lock, Engine};
use crate::backing::process_cpu_time;
use crate::shares::{Limits, Shares, Usage};
use std::time::{Duration, Instant};

/// Shortest pause for a budget.
pub(super) const THROTTLE: Duration = Duration::from_millis(10);
/// Longest pause of whoever serves the guest while the CPU budget is overdrawn: he has to see that
/// the budget was changed, or that all ends. To ask more often could cost more than a small share.
const THROTTLE_MAX: Duration = Duration::from_millis(200);

/// What may be spent per second, as it was set last.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rates {
    pub(super) copy_rate: u64,
    pub(super) cpu_share: f64,
    pub(super) limits: Limits,
    pub(super) shares: Option<Shares>,
}

impl Rates {
    /// The copy rate in force.
    fn copies(&self) -> u64 {
        let share = self.shares.and_then(|shares| shares.copy_rate);
        share.unwrap_or(u64::MAX).min(self.copy_rate)
    }
}

impl Engine {
    /// Sets another limit to the guest's huge pages, in bytes; `None` for none. What it has beyond
    /// a lower limit, it keeps.
    pub fn set_huge_max(&self, bytes: Option<u64>) {
        self.lock().state.set_huge_max(self.settings.blocks(bytes));
        self.wake();
    }

    /// The limit to the guest's huge pages, in bytes, if there is one.
    pub fn huge_max(&self) -> Option<u64> {
        let limit = self.lock().state.supply.limit();
        (limit != u64::MAX).then(|| limit << self.settings.block_shift)
    }

    /// Sets how many bytes collapses may copy per second, from now on.
    pub fn set_copy_rate(&self, bytes: u64) {
        self.set_rates(|rates| rates.copy_rate = bytes);
    }

    fn set_rates(&self, set: impl FnOnce(&mut Rates)) {
        let mut rates = lock(&self.rates);
        let before = rates.copies();
        set(&mut rates);
        let now = rates.copies();
        if now != before {
            lock(&self.copy).set_rate(now, 1 << self.settings.block_shift, Instant::now());
        }
        drop(rates);
        self.wake();
    }

    /// Sets what is shared with other VMs.
    pub fn set_limits(&self, limits: Limits) {
        lock(&self.rates).limits = limits;
    }

    /// What is shared with other VMs.
    pub fn limits(&self) -> Limits {
        lock(&self.rates).limits
    }

    /// Keeps the guest to its share; huge pages beyond it are given back.
    pub fn set_shares(&self, shares: Shares) {
        self.lock().state.set_share(self.settings.blocks(shares.huge));
        self.set_rates(|rates| rates.shares = Some(shares));
    }

    /// The share in force, where anything is shared.
    pub fn shares(&self) -> Option<Shares> {
        lock(&self.rates).shares
    }

    /// What the guest has, and could use.
    pub fn usage(&self) -> Usage {
        let copy_rate = self.copy_rate();
        let inner = self.lock();
        let (held, demand) = inner.state.demand();
        let bytes = |blocks: u64| blocks << self.settings.block_shift;
        Usage {
            huge: bytes(held),
            huge_demand: bytes(demand),
            copying: inner.state.has_to_copy(),
            copy_rate,
        }
    }

    /// Bytes that collapses may copy per second.
    pub fn copy_rate(&self) -> u64 {
        lock(&self.rates).copy_rate
    }

    /// Sets the share of one CPU that the daemon may use (1.0 is all of it), from now on.
    pub fn set_cpu_share(&self, share: f64) {
        lock(&self.rates).cpu_share = share;
        lock(&self.cpu).set_share(share, Instant::now());
        self.wake();
    }

    /// Share of one CPU that the daemon may use.
    pub fn cpu_share(&self) -> f64 {
        lock(&self.rates).cpu_share
    }

    /// Waits while the CPU budget is overdrawn, a fraction of a second at a time; whoever serves
    /// the guest calls it, so that no flood of requests exceeds the share. True if it waited.
    pub fn throttle(&self) -> bool {
        let pause = self.overdrawn(Instant::now());
        pause.map(std::thread::sleep).is_some()
    }

    /// How long to pause if the CPU budget is overdrawn.
    pub(super) fn overdrawn(&self, now: Instant) -> Option<Duration> {
        let mut cpu = lock(&self.cpu);
        cpu.update(process_cpu_time(), now);
        let wait = cpu.foreground_wait(now);
        (!wait.is_zero()).then(|| wait.clamp(THROTTLE, THROTTLE_MAX))
    }
}

//! What the daemon may spend: token buckets over a clock that the caller passes in.

use std::time::{Duration, Instant};

/// A token bucket: fills at `rate` a second up to `capacity`, and may be overdrawn by one
/// spending, which then delays the next.
#[derive(Debug)]
pub struct Bucket {
    rate: f64,
    capacity: f64,
    tokens: f64,
    at: Instant,
}

impl Bucket {
    /// A full bucket. `rate` and `capacity` are in the caller's unit.
    pub fn new(rate: f64, capacity: f64, now: Instant) -> Self {
        Self { rate, capacity, tokens: capacity, at: now }
    }

    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.at).as_secs_f64();
        self.tokens = (self.tokens + elapsed * self.rate).min(self.capacity);
        self.at = now;
    }

    /// Tokens at hand; negative while overdrawn.
    pub fn available(&mut self, now: Instant) -> f64 {
        self.refill(now);
        self.tokens
    }

    /// Takes `amount`, going below zero if need be; a negative amount gives back, up to full.
    pub fn spend(&mut self, amount: f64, now: Instant) {
        self.refill(now);
        self.tokens = (self.tokens - amount).min(self.capacity);
    }

    /// How long until `amount` tokens are at hand; `None` if never.
    pub fn wait_for(&mut self, amount: f64, now: Instant) -> Option<Duration> {
        self.refill(now);
        let missing = amount - self.tokens;
        if missing <= 0.0 {
            return Some(Duration::ZERO);
        }
        if amount > self.capacity || self.rate <= 0.0 {
            return None;
        }
        Duration::try_from_secs_f64(missing / self.rate).ok()
    }
}

/// Bytes copied per second. Nothing is copied unless the whole of it is at hand, so over any
/// window the rate is exceeded by no more than the burst.
#[derive(Debug)]
pub struct CopyBudget(Bucket);

impl CopyBudget {
    /// `rate` in bytes a second; the burst is a tenth of it, but at least one block.
    pub fn new(rate: u64, block_size: u64, now: Instant) -> Self {
        #[allow(clippy::cast_precision_loss)] // bytes a second stay far below 2^53
        let rate = rate as f64;
        #[allow(clippy::cast_precision_loss)]
        Self(Bucket::new(rate, (rate / 10.0).max(block_size as f64), now))
    }

    /// How many blocks may be copied now.
    pub fn blocks(&mut self, block_size: u64, now: Instant) -> u64 {
        #[allow(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss
        )]
        {
            (self.0.available(now) / block_size as f64).max(0.0) as u64
        }
    }

    /// Takes what an attempt may copy.
    pub fn spend(&mut self, bytes: u64, now: Instant) {
        #[allow(clippy::cast_precision_loss)]
        self.0.spend(bytes as f64, now);
    }

    /// Takes what was copied instead of the `advance` that was taken for it.
    pub fn settle(&mut self, advance: u64, copied: u64, now: Instant) {
        #[allow(clippy::cast_precision_loss)]
        self.0.spend(copied as f64 - advance as f64, now);
    }

    /// How long until one block may be copied.
    pub fn wait(&mut self, block_size: u64, now: Instant) -> Option<Duration> {
        #[allow(clippy::cast_precision_loss)]
        self.0.wait_for(block_size as f64, now)
    }
}

/// Share of one CPU. Answering the guest may use up to [`CpuBudget::BURST`] seconds saved up
/// in idle times (a full resync is such a burst); making huge pages that the guest asked for only
/// the upper four fifths of it, and background work the top tenth.
#[derive(Debug)]
pub struct CpuBudget {
    bucket: Bucket,
    spent: Duration,
}

impl CpuBudget {
    /// Seconds of CPU time that can be saved up.
    pub const BURST: f64 = 1.0;
    /// Background work starts only above this level.
    const BACKGROUND: f64 = 0.9 * Self::BURST;
    /// What the guest asked to be made huge is begun only above this one.
    const REQUESTED: f64 = 0.2 * Self::BURST;

    /// `share` of one CPU (1.0 is all of it); `cpu_time` is the process's so far.
    pub fn new(share: f64, cpu_time: Duration, now: Instant) -> Self {
        Self { bucket: Bucket::new(share, Self::BURST, now), spent: cpu_time }
    }

    /// Accounts the process's CPU time up to now.
    pub fn update(&mut self, cpu_time: Duration, now: Instant) {
        let used = cpu_time.saturating_sub(self.spent);
        self.spent = cpu_time;
        self.bucket.spend(used.as_secs_f64(), now);
    }

    /// Whether background work may start.
    pub fn background_ok(&mut self, now: Instant) -> bool {
        self.bucket.available(now) >= Self::BACKGROUND
    }

    /// Whether blocks may be made huge that the guest asked for.
    pub fn requested_ok(&mut self, now: Instant) -> bool {
        self.bucket.available(now) >= Self::REQUESTED
    }

    /// How long until they may be.
    pub fn requested_wait(&mut self, now: Instant) -> Duration {
        self.bucket.wait_for(Self::REQUESTED, now).unwrap_or(Duration::from_secs(1))
    }

    /// Whether requests of the guest may be served.
    pub fn foreground_ok(&mut self, now: Instant) -> bool {
        self.bucket.available(now) > 0.0
    }

    /// How long until background work may start.
    pub fn background_wait(&mut self, now: Instant) -> Duration {
        self.bucket.wait_for(Self::BACKGROUND, now).unwrap_or(Duration::from_secs(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn copy_budget_never_exceeds_its_rate_by_more_than_a_tenth_in_any_second() {
        let start = Instant::now();
        let mut budget = CopyBudget::new(100 * MIB, 2 * MIB, start);
        let mut copies: Vec<(u64, u64)> = Vec::new(); // (ms, bytes)
        for ms in 0..5_000 {
            let now = start + Duration::from_millis(ms);
            let blocks = budget.blocks(2 * MIB, now);
            budget.spend(blocks * 2 * MIB, now);
            copies.push((ms, blocks * 2 * MIB));
        }
        for window in copies.windows(1_000) {
            let bytes: u64 = window.iter().map(|(_, b)| b).sum();
            assert!(bytes <= 110 * MIB, "{bytes} bytes from {} ms on", window[0].0);
        }
        let total: u64 = copies.iter().map(|(_, b)| b).sum();
        assert!(total >= 495 * MIB, "the rate is not reached: {total}");
    }

    #[test]
    fn cpu_budget_holds_background_work_to_its_share() {
        let start = Instant::now();
        let mut budget = CpuBudget::new(0.1, Duration::ZERO, start);
        let mut cpu = Duration::ZERO;
        for ms in 0..20_000 {
            let now = start + Duration::from_millis(ms);
            budget.update(cpu, now);
            if budget.background_ok(now) {
                cpu += Duration::from_millis(1);
            }
        }
        assert!(cpu <= Duration::from_millis(2_150), "{cpu:?}");
        assert!(cpu >= Duration::from_millis(1_900), "{cpu:?}");
    }

    #[test]
    fn bucket_wait_for_more_than_capacity_is_never() {
        let now = Instant::now();
        let mut bucket = Bucket::new(1.0, 10.0, now);
        bucket.spend(10.0, now);
        assert_eq!(bucket.wait_for(11.0, now), None);
        assert_eq!(bucket.wait_for(5.0, now), Some(Duration::from_secs(5)));
    }
}

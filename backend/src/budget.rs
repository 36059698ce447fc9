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

    /// Sets another rate and capacity; what was overdrawn stays so.
    pub fn set(&mut self, rate: f64, capacity: f64, now: Instant) {
        self.refill(now);
        (self.rate, self.capacity) = (rate, capacity);
        self.tokens = self.tokens.min(capacity);
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

/// Bytes copied per second.
///
/// Nothing is copied unless the whole of it is at hand. What was taken for an action under way
/// counts as if it were still in the bucket until that has ended: however late the kernel copies
/// it, what is copied in any window exceeds the rate by no more than the burst.
#[derive(Debug)]
pub struct CopyBudget {
    bucket: Bucket,
    burst: f64,
    /// Bytes taken for what has not ended.
    under_way: f64,
}

#[allow(clippy::cast_precision_loss)] // bytes a second stay far below 2^53
impl CopyBudget {
    /// `rate` in bytes a second; the burst is a tenth of it, but at least two blocks: with one
    /// nothing would come in while it is under way.
    pub fn new(rate: u64, block_size: u64, now: Instant) -> Self {
        let burst = Self::burst(rate, block_size);
        Self { bucket: Bucket::new(rate as f64, burst, now), burst, under_way: 0.0 }
    }

    fn burst(rate: u64, block_size: u64) -> f64 {
        (rate as f64 / 10.0).max(2.0 * block_size as f64)
    }

    /// Sets another rate, from now on.
    pub fn set_rate(&mut self, rate: u64, block_size: u64, now: Instant) {
        self.burst = Self::burst(rate, block_size);
        self.bucket.set(rate as f64, self.room(), now);
    }

    /// What the bucket may hold beside that which is under way.
    fn room(&self) -> f64 {
        (self.burst - self.under_way).max(0.0)
    }

    fn set_under_way(&mut self, bytes: f64, now: Instant) {
        self.under_way = bytes;
        let (rate, room) = (self.bucket.rate, self.room());
        self.bucket.set(rate, room, now);
    }

    /// How many blocks may be copied now.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    pub fn blocks(&mut self, block_size: u64, now: Instant) -> u64 {
        (self.bucket.available(now) / block_size as f64).max(0.0) as u64
    }

    /// Takes what an action may copy, until [`CopyBudget::settle`].
    pub fn advance(&mut self, bytes: u64, now: Instant) {
        self.bucket.spend(bytes as f64, now);
        self.set_under_way(self.under_way + bytes as f64, now);
    }

    /// The action ended: takes what was copied instead of the `advance` that was taken for it.
    pub fn settle(&mut self, advance: u64, copied: u64, now: Instant) {
        self.set_under_way(self.under_way - advance as f64, now);
        self.bucket.spend(copied as f64 - advance as f64, now);
    }

    /// How long until one block may be copied; `None` while that hangs on what is under way.
    pub fn wait(&mut self, block_size: u64, now: Instant) -> Option<Duration> {
        self.bucket.wait_for(block_size as f64, now)
    }
}

/// Share of one CPU. Answering the guest may use up what was saved in [`CpuBudget::SAVED`] idle
/// seconds (a full resync is such a burst); making huge pages that the guest asked for only
/// the upper four fifths of it, and background work the top tenth. So in any window of time the
/// share is exceeded by no more than that burst, and one action.
#[derive(Debug)]
pub struct CpuBudget {
    bucket: Bucket,
    burst: f64,
    spent: Duration,
}

impl CpuBudget {
    /// Seconds whose share can be saved up.
    pub const SAVED: f64 = 4.0;
    /// Background work starts only above this part of what can be saved.
    const BACKGROUND: f64 = 0.9;
    /// What the guest asked to be made huge is begun only above this one.
    const REQUESTED: f64 = 0.2;
    /// Part of it that has to be there again before guests are served that overdrew it: the share of
    /// 50 ms.
    const RESUMED: f64 = 0.05 / Self::SAVED;

    /// `share` of one CPU (1.0 is all of it); `cpu_time` is the process's so far.
    pub fn new(share: f64, cpu_time: Duration, now: Instant) -> Self {
        let burst = share * Self::SAVED;
        Self { bucket: Bucket::new(share, burst, now), burst, spent: cpu_time }
    }

    /// Sets another share, from now on.
    pub fn set_share(&mut self, share: f64, now: Instant) {
        self.burst = share * Self::SAVED;
        self.bucket.set(share, self.burst, now);
    }

    /// Accounts the process's CPU time up to now.
    pub fn update(&mut self, cpu_time: Duration, now: Instant) {
        let used = cpu_time.saturating_sub(self.spent);
        self.spent = cpu_time;
        self.bucket.spend(used.as_secs_f64(), now);
    }

    /// Whether background work may start.
    pub fn background_ok(&mut self, now: Instant) -> bool {
        self.bucket.available(now) >= Self::BACKGROUND * self.burst
    }

    /// Whether blocks may be made huge that the guest asked for.
    pub fn requested_ok(&mut self, now: Instant) -> bool {
        self.bucket.available(now) >= Self::REQUESTED * self.burst
    }

    /// How long until they may be.
    pub fn requested_wait(&mut self, now: Instant) -> Duration {
        let level = Self::REQUESTED * self.burst;
        self.bucket.wait_for(level, now).unwrap_or(Duration::from_secs(1))
    }

    /// How long until requests of the guest may be served; zero if they may now. Once the budget is
    /// overdrawn, more has to be saved than it costs to ask again; and who waits should not ask much
    /// more often, or with a small share that takes all of it.
    pub fn foreground_wait(&mut self, now: Instant) -> Duration {
        if self.bucket.available(now) >= 0.0 {
            return Duration::ZERO;
        }
        let level = Self::RESUMED * self.burst;
        self.bucket.wait_for(level, now).unwrap_or(Duration::from_secs(1))
    }

    /// How long until background work may start.
    pub fn background_wait(&mut self, now: Instant) -> Duration {
        let level = Self::BACKGROUND * self.burst;
        self.bucket.wait_for(level, now).unwrap_or(Duration::from_secs(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    proptest! {
        /// Whatever is asked for and however long each action takes, every attempt counted at the
        /// latest moment that is possible.
        #[test]
        fn copy_budget_is_never_exceeded_by_more_than_a_tenth_in_any_second(
            rate in 100u64..2000,
            actions in prop::collection::vec((0u64..40, 1u64..9, 0u64..300, any::<bool>()), 1..200),
        ) {
            let rate = rate * MIB;
            let mut now = Instant::now();
            let start = now;
            let mut budget = CopyBudget::new(rate, 2 * MIB, now);
            let mut copies: Vec<(Duration, u64)> = Vec::new();
            for (pause, most, takes, all) in actions {
                now += Duration::from_millis(pause);
                let blocks = budget.blocks(2 * MIB, now).min(most);
                let advance = blocks * 2 * MIB;
                budget.advance(advance, now);
                now += Duration::from_millis(takes);
                let copied = if all { advance } else { advance / 2 };
                copies.push((now - start, copied));
                budget.settle(advance, copied, now);
            }
            for (at, &(from, _)) in copies.iter().enumerate() {
                let window = copies[at..].iter().take_while(|(to, _)| *to <= from + Duration::from_secs(1));
                let bytes: u64 = window.map(|(_, bytes)| bytes).sum();
                prop_assert!(bytes <= rate + rate / 10, "{bytes} bytes from {from:?} on");
            }
        }
    }

    #[test]
    fn copy_budget_reaches_its_rate_and_takes_another() {
        fn second(budget: &mut CopyBudget, now: &mut Instant) -> u64 {
            let mut copied = 0;
            for _ in 0..200 {
                let advance = budget.blocks(2 * MIB, *now).min(4) * 2 * MIB;
                budget.advance(advance, *now);
                *now += Duration::from_millis(5);
                budget.settle(advance, advance, *now);
                copied += advance;
            }
            copied
        }
        let mut now = Instant::now();
        let mut budget = CopyBudget::new(100 * MIB, 2 * MIB, now);
        second(&mut budget, &mut now);
        assert!(second(&mut budget, &mut now) >= 98 * MIB);
        budget.set_rate(200 * MIB, 2 * MIB, now);
        let faster = second(&mut budget, &mut now);
        assert!((196 * MIB..=220 * MIB).contains(&faster), "{faster}");
        budget.set_rate(10 * MIB, 2 * MIB, now);
        let slower = second(&mut budget, &mut now);
        assert!((8 * MIB..=14 * MIB).contains(&slower), "{slower}");
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
        assert!(cpu <= Duration::from_millis(2_050), "{cpu:?}");
        assert!(cpu >= Duration::from_millis(1_900), "{cpu:?}");
        budget.set_share(0.2, start + Duration::from_secs(20));
        let before = cpu;
        for ms in 20_000..30_000 {
            let now = start + Duration::from_millis(ms);
            budget.update(cpu, now);
            if budget.background_ok(now) {
                cpu += Duration::from_millis(1);
            }
        }
        // First it saves for bursts of the new size.
        assert!(cpu - before >= Duration::from_millis(1_500), "{:?}", cpu - before);
        assert!(cpu - before <= Duration::from_millis(2_050), "{:?}", cpu - before);
    }

    #[test]
    fn what_was_overdrawn_is_waited_for_with_few_questions() {
        let start = Instant::now();
        let mut budget = CpuBudget::new(0.01, Duration::ZERO, start);
        assert_eq!(budget.foreground_wait(start), Duration::ZERO);
        // Of three seconds 40 ms had been saved; each question costs 50 us.
        let (mut cpu, mut now, mut questions) = (Duration::from_secs(3), start, 0);
        loop {
            budget.update(cpu, now);
            let wait = budget.foreground_wait(now);
            if wait.is_zero() {
                break;
            }
            now += wait;
            cpu += Duration::from_micros(50);
            questions += 1;
            assert!(questions < 10, "{:?}", now - start);
        }
        let waited = (now - start).as_secs_f64();
        assert!((296.0..296.1).contains(&waited), "{waited} s, {questions} questions");
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

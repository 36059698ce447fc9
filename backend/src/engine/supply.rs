//! How many huge pages the host has to give to this guest, and when the driver is told that it
//! has none.
//!
//! Three things end a supply: the limit that the operator set, a pool of hugetlb pages that is short,
//! and a kernel that finds no huge page. Of the first two all is known. Of the third only what
//! attempts tell: after a few failures in a row nothing is tried for the guest for a while, and each
//! time that it was in vain the while doubles.

use std::time::{Duration, Instant};

/// Failures in a row, for lack of huge pages, after which the supply counts as run dry.
const RUN_DRY: u32 = 4;
/// How long it counts as dry the first time.
const REST: Duration = Duration::from_secs(5);
/// It is doubled up to `REST << REST_SHIFT_MAX`, some 5 minutes.
const REST_SHIFT_MAX: u32 = 6;
/// Pages given since the supply last ran dry, after which the rest is short again.
const RECOVERED: u32 = 16;
/// Shortest time for which scarcity is advised, however often pages come and go meanwhile.
const QUIET: Duration = Duration::from_secs(1);
/// A supply that had ended is advised again from as many pages on (or a sixteenth of the limit,
/// where that is less): for one page that came back it is not worth to start.
const WORTHWHILE: u64 = 16;

/// The supply of huge pages.
#[derive(Debug)]
pub struct Supply {
    /// Most blocks that may be host-huge.
    limit: u64,
    /// Failures in a row.
    failures: u32,
    /// Successes since it last ran dry.
    given: u32,
    rest_shift: u32,
    dry_until: Option<Instant>,
    /// The pool that pages come from has none for the guest.
    pool_short: bool,
    /// Since when the driver is advised that huge pages are scarce.
    scarce_since: Option<Instant>,
}

impl Supply {
    /// A supply of `limit` blocks.
    pub fn new(limit: u64) -> Self {
        Self {
            limit,
            failures: 0,
            given: RECOVERED,
            rest_shift: 0,
            dry_until: None,
            pool_short: false,
            scarce_since: None,
        }
    }

    /// Most blocks that may be host-huge; `u64::MAX` for any number.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Sets another limit. What the guest has beyond it, it keeps.
    pub fn set_limit(&mut self, limit: u64) {
        self.limit = limit;
    }

    /// Notes whether the pool that pages come from has none for the guest.
    pub fn set_pool_short(&mut self, short: bool) {
        self.pool_short = short;
    }

    /// Blocks that may still become huge where `huge` are, or are promised to be.
    pub fn left(&self, huge: u64) -> u64 {
        self.limit.saturating_sub(huge)
    }

    /// The same for requests of the guest: none while the kernel or the pool has none.
    pub fn left_for_guest(&self, huge: u64) -> u64 {
        if self.dry_until.is_some() || self.pool_short {
            0
        } else {
            self.left(huge)
        }
    }

    /// A block was made huge.
    pub fn gave(&mut self) {
        self.failures = 0;
        self.given = self.given.saturating_add(1);
    }

    /// There was no huge page for a block.
    pub fn failed(&mut self, now: Instant) {
        self.failures = self.failures.saturating_add(1);
        if self.failures < RUN_DRY || self.dry_until.is_some() {
            return;
        }
        self.rest_shift =
            if self.given < RECOVERED { (self.rest_shift + 1).min(REST_SHIFT_MAX) } else { 0 };
        self.given = 0;
        self.dry_until = Some(now + REST * (1 << self.rest_shift));
    }

    /// Lets time pass, where `huge` blocks are huge or promised to be; whether huge pages are
    /// scarce, and when that may change by itself.
    pub fn update(&mut self, huge: u64, now: Instant) -> (bool, Option<Instant>) {
        if self.dry_until.is_some_and(|until| until <= now) {
            self.dry_until = None;
            // On trial, unless repair has found some since: one failure and it is dry again.
            self.failures = if self.given == 0 { RUN_DRY - 1 } else { 0 };
        }
        let left = self.left_for_guest(huge);
        let worthwhile = (self.limit / 16).clamp(1, WORTHWHILE);
        match self.scarce_since {
            None if left == 0 => self.scarce_since = Some(now),
            Some(since) if left >= worthwhile && now >= since + QUIET => self.scarce_since = None,
            _ => {}
        }
        let quiet_until = self.scarce_since.map(|since| since + QUIET).filter(|until| *until > now);
        let wakes_at = match (self.dry_until, quiet_until) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        (self.scarce_since.is_some(), wakes_at)
    }

    /// Whether the driver is advised that huge pages are scarce.
    pub fn is_scarce(&self) -> bool {
        self.scarce_since.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn limit_is_scarcity_until_enough_came_back() {
        let now = Instant::now();
        let mut supply = Supply::new(64);
        assert!(!supply.update(63, now).0);
        assert!(supply.update(64, now).0);
        let later = now + QUIET;
        assert!(supply.update(61, later).0, "three pages are not worth a word");
        assert!(!supply.update(60, later).0);
        assert_eq!(Supply::new(u64::MAX).left(1 << 40), u64::MAX - (1 << 40));
    }

    #[test]
    fn a_short_pool_is_scarcity_until_it_is_filled() {
        let now = Instant::now();
        let mut supply = Supply::new(u64::MAX);
        supply.set_pool_short(true);
        assert!(supply.update(0, now).0);
        assert_eq!((supply.left_for_guest(0), supply.left(0)), (0, u64::MAX));
        supply.set_pool_short(false);
        assert!(!supply.update(0, now + QUIET).0);
    }

    #[test]
    fn a_limit_of_nothing_is_scarcity_for_ever() {
        let now = Instant::now();
        let mut supply = Supply::new(0);
        assert!(supply.update(0, now).0);
        assert!(supply.update(0, now + REST * 100).0);
        supply.set_limit(1);
        assert!(!supply.update(0, now + REST * 100).0);
    }

    #[test]
    fn a_kernel_without_huge_pages_is_left_alone_ever_longer() {
        let mut now = Instant::now();
        let mut supply = Supply::new(u64::MAX);
        for _ in 0..RUN_DRY {
            assert!(!supply.update(0, now).0);
            supply.failed(now);
        }
        let mut rest = REST;
        for round in 0..4 {
            assert!(supply.update(0, now).0, "round {round}");
            assert_eq!(supply.left_for_guest(0), 0);
            assert_eq!(supply.left(0), u64::MAX, "repair goes on, at its own pace");
            assert!(supply.update(0, now + rest - ms(1)).0);
            now += rest;
            assert!(!supply.update(0, now).0);
            supply.failed(now);
            rest *= 2;
        }
    }

    #[test]
    fn single_failures_among_successes_are_no_scarcity() {
        let now = Instant::now();
        let mut supply = Supply::new(u64::MAX);
        for _ in 0..100 {
            for _ in 1..RUN_DRY {
                supply.failed(now);
            }
            supply.gave();
            assert!(!supply.update(0, now).0);
        }
    }

    #[test]
    fn recovered_supply_starts_with_a_short_rest() {
        let mut now = Instant::now();
        let mut supply = Supply::new(u64::MAX);
        for _ in 0..5 {
            (0..RUN_DRY).for_each(|_| supply.failed(now));
            now += REST * (1 << REST_SHIFT_MAX);
            assert!(!supply.update(0, now).0);
        }
        (0..RECOVERED).for_each(|_| supply.gave());
        (0..RUN_DRY).for_each(|_| supply.failed(now));
        assert!(supply.update(0, now).0);
        assert!(!supply.update(0, now + REST).0);
    }

    proptest! {
        /// Whatever happens how often, the driver hears of it at most twice a second.
        #[test]
        fn advice_never_flaps(
            events in prop::collection::vec((0u64..50, 0u64..40, 0u8..3), 1..400),
        ) {
            let mut now = Instant::now();
            let mut supply = Supply::new(32);
            let mut changes: Vec<Instant> = Vec::new();
            let mut scarce = false;
            for (wait, huge, event) in events {
                now += ms(wait);
                match event {
                    0 => supply.gave(),
                    1 => supply.failed(now),
                    _ => {}
                }
                let (next, wakes_at) = supply.update(huge, now);
                prop_assert!(wakes_at.is_none_or(|at| at > now));
                if next != scarce {
                    scarce = next;
                    changes.push(now);
                }
            }
            for three in changes.windows(3) {
                prop_assert!(three[2] - three[0] >= QUIET);
            }
        }
    }
}

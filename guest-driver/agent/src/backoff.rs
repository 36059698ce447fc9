//! Ranges that could not be promoted rest, longer after each failure.

use std::collections::HashMap;
use std::time::Duration;

use crate::process::Identity;

/// Rest after the first failure; each further one doubles it.
const FIRST: Duration = Duration::from_secs(10);

/// Longest rest.
const LONGEST: Duration = Duration::from_secs(640);

/// Most ranges that are remembered, about 1 MiB. Beyond it failures are not
/// noted: the range is tried again, within the budget.
const LIMIT: usize = 16_384;

#[derive(Clone, Copy, Debug)]
struct Entry {
    failures: u32,
    until: Duration,
}

/// What failed, and when it may be tried again.
#[derive(Debug, Default)]
pub struct Backoff {
    entries: HashMap<(Identity, u64), Entry>,
}

impl Backoff {
    /// Whether the range at `address` has to wait at time `now`.
    #[must_use]
    pub fn rests(&self, process: Identity, address: u64, now: Duration) -> bool {
        self.entries.get(&(process, address)).is_some_and(|entry| now < entry.until)
    }

    /// Notes that the range could not be promoted.
    pub fn failed(&mut self, process: Identity, address: u64, now: Duration) {
        let key = (process, address);
        if self.entries.len() >= LIMIT && !self.entries.contains_key(&key) {
            return;
        }
        let entry = self.entries.entry(key).or_insert(Entry { failures: 0, until: now });
        let rest = FIRST.saturating_mul(1_u32.checked_shl(entry.failures).unwrap_or(u32::MAX));
        entry.until = now.saturating_add(rest.min(LONGEST));
        entry.failures = (entry.failures + 1).min(16);
    }

    /// Forgets ranges that were not tried again for long: promoted since, or
    /// their process is gone.
    pub fn tidy(&mut self, now: Duration) {
        self.entries.retain(|_, entry| now < entry.until.saturating_add(LONGEST));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROCESS: Identity = Identity { pid: 7, start: 1 };

    #[test]
    fn rest_doubles_up_to_a_limit() {
        let mut backoff = Backoff::default();
        let mut now = Duration::ZERO;
        let mut rests = Vec::new();
        for _ in 0..40 {
            backoff.failed(PROCESS, 0, now);
            let from = now;
            while backoff.rests(PROCESS, 0, now) {
                now += Duration::from_secs(5);
            }
            rests.push((now - from).as_secs());
        }
        assert_eq!(rests[..8], [10, 20, 40, 80, 160, 320, 640, 640]);
        assert!(rests[8..].iter().all(|rest| *rest == 640));
    }

    #[test]
    fn another_process_of_the_same_number_does_not_wait() {
        let mut backoff = Backoff::default();
        backoff.failed(PROCESS, 0, Duration::ZERO);
        let now = Duration::from_secs(1);
        assert!(backoff.rests(PROCESS, 0, now));
        assert!(!backoff.rests(Identity { pid: 7, start: 2 }, 0, now));
        assert!(!backoff.rests(PROCESS, 4096, now));
    }

    #[test]
    fn table_is_bounded_and_forgets() {
        let mut backoff = Backoff::default();
        for address in 0..2 * LIMIT as u64 {
            backoff.failed(PROCESS, address, Duration::ZERO);
        }
        assert_eq!(backoff.entries.len(), LIMIT);
        backoff.tidy(FIRST);
        assert_eq!(backoff.entries.len(), LIMIT);
        backoff.tidy(FIRST + LONGEST);
        assert_eq!(backoff.entries.len(), 0);
    }
}

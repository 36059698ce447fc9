//! Whether the pools of hugetlb pages have something for this guest, and what the operator is told
//! of it.

use crate::backing::PoolState;
use std::time::{Duration, Instant};

/// Between two looks: while a pool is short, while the guest's memory has holes, and else.
const SHORT: Duration = Duration::from_secs(2);
const CALM: Duration = Duration::from_secs(10);
const COMPLETE: Duration = Duration::from_secs(60);
/// The same is not said twice within this time.
const QUIET: Duration = Duration::from_secs(60);

/// What is to be said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Word {
    /// A pool ran short.
    Short(String),
    /// It is not any more.
    Over,
}

/// Follows the pools that one guest's memory comes from.
#[derive(Debug)]
pub struct Pools {
    seen: Vec<PoolState>,
    due: Instant,
    /// When it was last said that a pool is short, and whether it was said since that it is over.
    said: Option<(Instant, bool)>,
}

impl Pools {
    /// Nothing is known; a look is due.
    pub fn new(now: Instant) -> Self {
        Self { seen: Vec::new(), due: now, said: None }
    }

    /// When the next look is due.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// Other memory: a look is due.
    pub fn changed(&mut self, now: Instant) {
        self.seen.clear();
        self.due = now;
    }

    /// Takes what a look found; what is to be said of it.
    pub fn look(&mut self, seen: Vec<PoolState>, now: Instant) -> Option<Word> {
        self.seen = seen;
        let short = self.seen.iter().find(|pool| pool.short);
        self.due = now
            + match short {
                Some(_) => SHORT,
                None if self.seen.iter().any(|pool| pool.missing > 0) => CALM,
                None => COMPLETE,
            };
        match (short, self.said) {
            (Some(pool), said) if said.is_none_or(|(at, over)| over && now >= at + QUIET) => {
                self.said = Some((now, false));
                Some(Word::Short(pool.shortage()))
            }
            (None, Some((at, false))) => {
                self.said = Some((at, true));
                Some(Word::Over)
            }
            _ => None,
        }
    }

    /// Whether a pool has nothing to prepare for the guest.
    pub fn short(&self) -> bool {
        self.seen.iter().any(|pool| pool.short)
    }

    /// What the last look found.
    pub fn seen(&self) -> &[PoolState] {
        &self.seen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(short: bool, missing: u64) -> Vec<PoolState> {
        vec![PoolState { page_size: 2 << 20, short, missing, ..PoolState::default() }]
    }

    #[test]
    fn a_pool_that_comes_and_goes_is_told_once_a_minute() {
        let mut now = Instant::now();
        let mut pools = Pools::new(now);
        let mut said = 0;
        for round in 0..600 {
            let word = pools.look(pool(round % 2 == 0, 3), now);
            assert_eq!(pools.short(), round % 2 == 0);
            said += u32::from(matches!(word, Some(Word::Short(_))));
            now += Duration::from_millis(500);
        }
        assert_eq!(said, 5, "300 seconds");
        assert_eq!(pools.look(pool(false, 3), now), None, "it was said when it was over");
    }

    #[test]
    fn a_lasting_shortage_is_told_once_and_its_end_too() {
        let mut now = Instant::now();
        let mut pools = Pools::new(now);
        assert!(matches!(pools.look(pool(true, 3), now), Some(Word::Short(_))));
        for _ in 0..200 {
            now += SHORT;
            assert_eq!(pools.look(pool(true, 3), now), None);
        }
        assert_eq!(pools.look(pool(false, 3), now), Some(Word::Over));
        assert_eq!(pools.look(pool(false, 3), now), None);
    }

    #[test]
    fn looks_are_rare_where_there_is_nothing_to_see() {
        let now = Instant::now();
        let mut pools = Pools::new(now);
        pools.look(Vec::new(), now);
        assert_eq!(pools.due(), now + COMPLETE);
        pools.look(pool(false, 0), now);
        assert_eq!(pools.due(), now + COMPLETE);
        pools.look(pool(false, 1), now);
        assert_eq!(pools.due(), now + CALM);
        pools.changed(now);
        assert_eq!(pools.due(), now);
    }
}

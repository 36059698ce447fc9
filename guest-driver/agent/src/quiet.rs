//! Processes in which nothing could be promoted are not looked at again before
//! their memory, or what the system allows, has changed; and if there was nothing
//! in any, none is asked for its memory before that of all has changed.

use std::collections::HashMap;
use std::time::Duration;

use crate::kernel::{Geometry, Thp};
use crate::process::Identity;

/// A process is looked at this long after the last time, whatever it did: its
/// memory may have moved without growing.
const LONGEST: Duration = Duration::from_secs(60);

/// None is asked for its memory before this long after all were, if all processes
/// together have as much as then: one may have grown as much as another has shrunk.
const LONGEST_FOR_ALL: Duration = Duration::from_secs(10);

/// Growing or shrinking by this part of a huge page is a change.
const PART: u64 = 16;

/// Most processes that are remembered, about 1 MiB; others are looked at each
/// time, within the budget.
const LIMIT: usize = 16_384;

#[derive(Clone, Copy, Debug)]
struct Look {
    pages: u64,
    until: Duration,
}

impl Look {
    fn is_alike(&self, pages: u64, geometry: Geometry) -> bool {
        self.pages.abs_diff(pages) < geometry.pages() / PART
    }
}

/// What was found to have nothing to promote.
#[derive(Debug, Default)]
pub struct Quiet {
    looks: HashMap<Identity, Look>,
    /// The last look at all of them, if none had anything to promote.
    all: Option<Look>,
    /// What the system allowed then: to whom huge pages go, and whether missing
    /// pages are filled in.
    rules: Option<(Thp, bool)>,
}

impl Quiet {
    /// Begins a pass at time `now` under these rules. Other rules than before
    /// are a reason to look at all processes again.
    pub fn begin(&mut self, thp: Thp, fills_in: bool, now: Duration) {
        if self.rules.replace((thp, fills_in)) != Some((thp, fills_in)) {
            self.looks.clear();
            self.all = None;
        }
        self.looks.retain(|_, look| now < look.until);
        self.all = self.all.filter(|look| now < look.until);
    }

    /// Whether nothing can have changed in `process`, which has `pages` base
    /// pages of anonymous memory.
    #[must_use]
    pub fn contains(&self, process: Identity, pages: u64, geometry: Geometry) -> bool {
        self.looks.get(&process).is_some_and(|look| look.is_alike(pages, geometry))
    }

    /// Whether nothing is likely to have changed in any process, all of which have
    /// `pages` base pages of anonymous memory.
    #[must_use]
    pub fn contains_all(&self, pages: u64, geometry: Geometry) -> bool {
        self.all.is_some_and(|look| look.is_alike(pages, geometry))
    }

    /// Notes that a look at `process`, which had `pages` base pages before it,
    /// found nothing to promote.
    pub fn insert(&mut self, process: Identity, pages: u64, now: Duration) {
        if self.looks.len() < LIMIT || self.looks.contains_key(&process) {
            self.looks.insert(process, Look { pages, until: now.saturating_add(LONGEST) });
        }
    }

    /// Notes whether a look at all processes, which had `pages` base pages before it,
    /// found nothing to promote before their memory changes.
    pub fn insert_all(&mut self, quiet: bool, pages: u64, now: Duration) {
        self.all = quiet.then(|| Look { pages, until: now.saturating_add(LONGEST_FOR_ALL) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: Geometry = Geometry { page: 4096, block: 2 << 20 };
    const PROCESS: Identity = Identity { pid: 7, start: 1 };

    fn quiet() -> Quiet {
        let mut quiet = Quiet::default();
        quiet.begin(Thp::Always, false, Duration::ZERO);
        quiet.insert(PROCESS, 1000, Duration::ZERO);
        quiet
    }

    #[test]
    fn process_is_quiet_until_its_memory_changes() {
        let quiet = quiet();
        assert!(quiet.contains(PROCESS, 1000, GEOMETRY));
        assert!(quiet.contains(PROCESS, 1031, GEOMETRY));
        assert!(!quiet.contains(PROCESS, 1032, GEOMETRY));
        assert!(!quiet.contains(PROCESS, 900, GEOMETRY));
        assert!(!quiet.contains(Identity { pid: 7, start: 2 }, 1000, GEOMETRY));
    }

    #[test]
    fn nobody_is_asked_until_the_sum_changes_or_some_time_has_passed() {
        let mut quiet = quiet();
        assert!(!quiet.contains_all(5000, GEOMETRY));
        quiet.insert_all(true, 5000, Duration::ZERO);
        assert!(quiet.contains_all(5031, GEOMETRY));
        assert!(!quiet.contains_all(5032, GEOMETRY));
        quiet.begin(Thp::Always, false, LONGEST_FOR_ALL - Duration::from_secs(1));
        assert!(quiet.contains_all(5000, GEOMETRY));
        quiet.begin(Thp::Always, false, LONGEST_FOR_ALL);
        assert!(!quiet.contains_all(5000, GEOMETRY));
    }

    #[test]
    fn nobody_rests_while_there_is_something_to_promote() {
        let mut quiet = quiet();
        quiet.insert_all(true, 5000, Duration::ZERO);
        quiet.insert_all(false, 5000, Duration::ZERO);
        assert!(!quiet.contains_all(5000, GEOMETRY));
    }

    #[test]
    fn other_rules_wake_all() {
        let mut same = quiet();
        same.begin(Thp::Always, false, Duration::from_secs(1));
        assert!(same.contains(PROCESS, 1000, GEOMETRY));
        for (thp, fills_in) in [(Thp::Madvise, false), (Thp::Always, true)] {
            let mut other = quiet();
            other.insert_all(true, 5000, Duration::ZERO);
            other.begin(thp, fills_in, Duration::from_secs(1));
            assert!(!other.contains(PROCESS, 1000, GEOMETRY));
            assert!(!other.contains_all(5000, GEOMETRY));
        }
    }

    #[test]
    fn every_process_is_looked_at_now_and_then() {
        let mut quiet = quiet();
        quiet.begin(Thp::Always, false, LONGEST - Duration::from_secs(1));
        assert!(quiet.contains(PROCESS, 1000, GEOMETRY));
        quiet.begin(Thp::Always, false, LONGEST);
        assert!(!quiet.contains(PROCESS, 1000, GEOMETRY));
    }

    #[test]
    fn memory_is_bounded() {
        let mut quiet = Quiet::default();
        for pid in 0..i32::try_from(2 * LIMIT).expect("a small number") {
            quiet.insert(Identity { pid, start: 1 }, 1000, Duration::ZERO);
        }
        assert_eq!(quiet.looks.len(), LIMIT);
    }
}

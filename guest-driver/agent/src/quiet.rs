//! Processes in which nothing could be promoted are not looked at again before
//! their memory, or what the system allows, has changed.

use std::collections::HashMap;
use std::time::Duration;

use crate::kernel::{Geometry, Thp};
use crate::process::Identity;

/// A process is looked at this long after the last time, whatever it did: its
/// memory may have moved without growing.
const LONGEST: Duration = Duration::from_secs(60);

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

/// What was found to have nothing to promote.
#[derive(Debug, Default)]
pub struct Quiet {
    looks: HashMap<Identity, Look>,
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
        }
        self.looks.retain(|_, look| now < look.until);
    }

    /// Whether nothing can have changed in `process`, which has `pages` base
    /// pages of anonymous memory.
    #[must_use]
    pub fn contains(&self, process: Identity, pages: u64, geometry: Geometry) -> bool {
        self.looks
            .get(&process)
            .is_some_and(|look| look.pages.abs_diff(pages) < geometry.pages() / PART)
    }

    /// Notes that a look at `process`, which had `pages` base pages before it,
    /// found nothing to promote.
    pub fn insert(&mut self, process: Identity, pages: u64, now: Duration) {
        if self.looks.len() < LIMIT || self.looks.contains_key(&process) {
            self.looks.insert(process, Look { pages, until: now.saturating_add(LONGEST) });
        }
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
    fn other_rules_wake_all() {
        let mut same = quiet();
        same.begin(Thp::Always, false, Duration::from_secs(1));
        assert!(same.contains(PROCESS, 1000, GEOMETRY));
        for (thp, fills_in) in [(Thp::Madvise, false), (Thp::Always, true)] {
            let mut other = quiet();
            other.begin(thp, fills_in, Duration::from_secs(1));
            assert!(!other.contains(PROCESS, 1000, GEOMETRY));
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

//! When the guest is asked to move its huge pages: the host has huge pages where the guest has no
//! use for them, and the guest has huge pages where the host has none and can hardly make any.
//!
//! Two things tell how hard it is to make one. What is free in chunks that are too small (FMFI) has
//! to be compacted first; whether that works, the recent attempts tell. Whoever is out of pages, by
//! a limit or because the kernel failed again and again, need not ask.
//!
//! A wish that nothing follows from ends, and rests: the driver may not know of such wishes, or the
//! pages may be pinned.

use std::time::{Duration, Instant};

/// An attempt counts half after this time.
const HALF_LIFE: Duration = Duration::from_secs(30);
/// Of the recent attempts fewer than this part found a page: then the guest is asked, also where
/// free memory is not fragmented at all.
const FEW: f64 = 0.25;
/// The same where it is fragmented altogether; in between it grows with the index.
const FEW_FRAGMENTED: f64 = 0.75;
/// Between two looks at the host's fragmentation, where it matters.
const LOOK: Duration = Duration::from_secs(2);
/// Shortest time that a wish lasts, and that passes between two.
const QUIET: Duration = Duration::from_secs(1);
/// A wish ends if nothing was aligned for so long.
const PATIENCE: Duration = Duration::from_secs(5);
/// The first rest after that; it is doubled up to `REST << REST_SHIFT_MAX`, some 15 minutes.
const REST: Duration = Duration::from_secs(30);
const REST_SHIFT_MAX: u32 = 5;

/// What the decision depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Situation {
    /// Whether a policy that the guest is asked by is in force.
    pub possible: bool,
    /// Whether the host has no huge page to give, as far as is known.
    pub out_of_pages: bool,
    /// Blocks that are huge in both.
    pub aligned: u64,
    /// Blocks that are huge in the guest alone.
    pub guest_only: u64,
    /// Blocks that are huge in the host, and of no use to the guest.
    pub unused: u64,
}

impl Situation {
    /// Whether there is something to move, and a place for it.
    fn matters(&self) -> bool {
        self.possible && self.guest_only > 0 && self.unused > 0
    }
}

/// The recent attempts to make blocks huge.
#[derive(Debug)]
struct Attempts {
    done: f64,
    lacking: f64,
    at: Instant,
}

impl Attempts {
    /// What is left of each by now.
    fn left(&self, now: Instant) -> f64 {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        0.5f64.powf(passed / HALF_LIFE.as_secs_f64())
    }

    fn add(&mut self, found: bool, now: Instant) {
        let left = self.left(now);
        self.done = self.done * left + f64::from(u8::from(found));
        self.lacking = self.lacking * left + f64::from(u8::from(!found));
        self.at = now;
    }

    /// The part of them that found a page, from 0 to 1. The longer ago they are, the less they
    /// say: then one more is likely to find one.
    fn success_rate(&self, now: Instant) -> f64 {
        let left = self.left(now);
        (self.done * left + 1.0) / ((self.done + self.lacking) * left + 1.0)
    }
}

/// Whether huge pages are so hard to make that the guest is better asked to move.
fn is_hard(fmfi: f64, success_rate: f64) -> bool {
    success_rate < FEW + (FEW_FRAGMENTED - FEW) * fmfi
}

/// Follows all that, and says whether the guest is asked.
#[derive(Debug)]
pub struct Moving {
    attempts: Attempts,
    /// In thousandths.
    fmfi: Option<u32>,
    look_at: Instant,
    wanted: bool,
    /// Since when it is so.
    since: Instant,
    /// When something was aligned last, while the wish lasts.
    progress: Instant,
    aligned: u64,
    rests_until: Option<Instant>,
    rest_shift: u32,
}

impl Moving {
    /// Nothing is known, and nothing wanted.
    pub fn new(now: Instant) -> Self {
        Self {
            attempts: Attempts { done: 0.0, lacking: 0.0, at: now },
            fmfi: None,
            look_at: now,
            wanted: false,
            since: now,
            progress: now,
            aligned: 0,
            rests_until: None,
            rest_shift: 0,
        }
    }

    /// A block was made huge (`true`), or there was no huge page for it.
    pub fn attempted(&mut self, found: bool, now: Instant) {
        self.attempts.add(found, now);
    }

    /// Whether the host's fragmentation is to be looked at.
    pub fn wants_look(&self, situation: &Situation, now: Instant) -> bool {
        situation.matters() && self.look_at <= now
    }

    /// Takes what such a look found, in thousandths.
    pub fn looked(&mut self, fmfi: Option<u32>, now: Instant) {
        self.fmfi = fmfi;
        self.look_at = now + LOOK;
    }

    /// Decides. When that may change by itself, if it does.
    pub fn update(&mut self, situation: &Situation, now: Instant) -> Option<Instant> {
        let grown = situation.aligned > self.aligned;
        self.aligned = situation.aligned;
        if self.wanted && grown {
            self.progress = now;
            self.rest_shift = 0;
        }
        if self.rests_until.is_some_and(|until| until <= now) {
            self.rests_until = None;
        }
        let success_rate = self.attempts.success_rate(now);
        let hard = situation.out_of_pages || is_hard(self.fmfi().unwrap_or(0.0), success_rate);
        let wanted = situation.matters() && hard;
        let vain = self.wanted && wanted && now >= self.progress + PATIENCE;
        if vain {
            self.rests_until = Some(now + REST * (1 << self.rest_shift));
            self.rest_shift = (self.rest_shift + 1).min(REST_SHIFT_MAX);
        }
        if wanted != self.wanted || vain {
            let settled = now >= self.since + QUIET;
            if vain || (settled && self.rests_until.is_none()) {
                self.wanted = !self.wanted;
                self.since = now;
                self.progress = now;
            }
        }
        if self.wanted {
            return Some((self.progress + PATIENCE).min(self.look_at.max(now + QUIET)));
        }
        let begins = self.rests_until.unwrap_or(self.since + QUIET);
        situation.matters().then(|| begins.max(now + QUIET).min(self.look_at.max(now + QUIET)))
    }

    /// Whether the guest is asked.
    pub fn is_wanted(&self) -> bool {
        self.wanted
    }

    /// Part of the recent attempts to make a block huge that found a page, from 0 to 1.
    pub fn success_rate(&self, now: Instant) -> f64 {
        self.attempts.success_rate(now)
    }

    /// The host's fragmentation, from 0 to 1, when it was last looked at, because it mattered.
    pub fn fmfi(&self) -> Option<f64> {
        self.fmfi.map(|fmfi| f64::from(fmfi) / 1000.0)
    }

    /// For status output.
    pub fn status(&self, now: Instant) -> serde_json::Value {
        serde_json::json!({
            "wanted": self.wanted,
            "fmfi": self.fmfi(),
            "success_rate": self.success_rate(now),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn situation(aligned: u64) -> Situation {
        Situation { possible: true, out_of_pages: true, aligned, guest_only: 9, unused: 9 }
    }

    fn asked(moving: &mut Moving, situation: &Situation, now: Instant) -> bool {
        moving.update(situation, now);
        moving.is_wanted()
    }

    #[test]
    fn a_host_without_huge_pages_asks_where_there_is_something_to_move_and_a_place() {
        let start = Instant::now();
        let now = start + QUIET;
        let all = situation(0);
        for (situation, wanted) in [
            (all, true),
            (Situation { possible: false, ..all }, false),
            (Situation { out_of_pages: false, ..all }, false),
            (Situation { guest_only: 0, ..all }, false),
            (Situation { unused: 0, ..all }, false),
        ] {
            assert_eq!(asked(&mut Moving::new(start), &situation, now), wanted, "{situation:?}");
        }
    }

    #[test]
    fn the_more_fragmented_the_host_is_the_fewer_failures_it_takes() {
        let start = Instant::now();
        let now = start + QUIET;
        let hard = |fmfi, done, lacking| {
            let mut moving = Moving::new(start);
            (0..done).for_each(|_| moving.attempted(true, now));
            (0..lacking).for_each(|_| moving.attempted(false, now));
            moving.looked(Some(fmfi), now);
            asked(&mut moving, &Situation { out_of_pages: false, ..situation(0) }, now)
        };
        assert!(!hard(1000, 0, 0), "nothing was tried");
        assert!(!hard(1000, 9, 2));
        assert!(hard(1000, 5, 5));
        assert!(!hard(200, 5, 5));
        assert!(!hard(0, 1, 4));
        assert!(hard(0, 1, 9));
    }

    #[test]
    fn failures_are_forgotten() {
        let mut now = Instant::now();
        let mut moving = Moving::new(now);
        (0..100).for_each(|_| moving.attempted(false, now));
        assert!(moving.success_rate(now) < 0.01);
        now += HALF_LIFE * 12;
        assert!(moving.success_rate(now) > 0.97);
    }

    #[test]
    fn a_wish_lasts_while_something_comes_of_it_and_else_rests_ever_longer() {
        let mut now = Instant::now();
        let mut moving = Moving::new(now);
        now += QUIET;
        for aligned in 0..20 {
            assert!(asked(&mut moving, &situation(aligned), now));
            now += PATIENCE / 2;
        }
        now += PATIENCE;
        let mut rest = REST;
        for _ in 0..3 {
            assert!(!asked(&mut moving, &situation(19), now));
            assert!(!asked(&mut moving, &situation(19), now + rest - QUIET));
            now += rest;
            assert!(asked(&mut moving, &situation(19), now));
            now += PATIENCE;
            rest *= 2;
        }
        assert!(!asked(&mut moving, &situation(19), now));
        now += rest;
        assert!(asked(&mut moving, &situation(20), now));
        now += QUIET;
        assert!(asked(&mut moving, &situation(21), now), "it works again");
        now += PATIENCE;
        assert!(!asked(&mut moving, &situation(21), now));
        assert!(asked(&mut moving, &situation(21), now + REST), "the rest is short again");
    }

    #[test]
    fn a_wish_that_is_fulfilled_ends_without_a_rest() {
        let mut now = Instant::now();
        let mut moving = Moving::new(now);
        now += QUIET;
        assert!(asked(&mut moving, &situation(0), now));
        now += QUIET;
        assert!(!asked(&mut moving, &Situation { guest_only: 0, ..situation(9) }, now));
        now += QUIET;
        assert!(asked(&mut moving, &situation(9), now));
    }

    proptest! {
        /// Whatever happens, the driver hears of it at most once in `QUIET`, a wish that nothing
        /// comes of ends in time, and whoever waits for the next decision is told when it is due.
        #[test]
        fn wishes_do_not_flap(
            events in prop::collection::vec(
                (0u64..700, any::<bool>(), any::<bool>(), 0u64..3, 0u64..2, 0u64..4), 1..300),
        ) {
            let mut now = Instant::now();
            let mut moving = Moving::new(now);
            let (mut changed, mut was, mut grew) = (now, false, now);
            let mut before = 0;
            for (wait, possible, out_of_pages, guest_only, unused, aligned) in events {
                now += Duration::from_millis(wait);
                let situation = Situation { possible, out_of_pages, aligned, guest_only, unused };
                moving.attempted(!out_of_pages, now);
                let next = moving.update(&situation, now);
                prop_assert!(next.is_none_or(|at| at > now));
                if aligned > before || !was {
                    grew = now;
                }
                before = aligned;
                if moving.is_wanted() != was {
                    prop_assert!(now >= changed + QUIET);
                    (was, changed) = (!was, now);
                    grew = now;
                }
                prop_assert!(!was || now < grew + PATIENCE || !situation.matters());
            }
        }
    }
}

//! How long what is of no use at the moment is kept: found out by Algorithm 1 ([`crate::adapt`]),
//! or set by the operator.
//!
//! Two things are kept for it. The driver keeps blocks that it holds, for as long as it is told;
//! it is told what was set, and what was found out where TLB misses are counted: from the same
//! stand-in it would find out the same by itself. And a guest at its limit of huge pages keeps
//! those that it has no use for, for a part of it, since others wait for them.

use crate::adapt::{Adapt, Period, START_MS};
use std::time::{Duration, Instant};

/// P of the algorithm, as the driver has it: long enough for a change of the timeout to show.
const PERIOD: Duration = Duration::from_secs(10);
/// At the limit this part of the timeout has to do: 2 s of the one that it starts from.
const AT_LIMIT: u32 = 30;
/// What has to do there at least: each look passes over all blocks.
const AT_LIMIT_MIN: Duration = Duration::from_secs(1);

/// Where the timeout comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// It was set.
    Fixed,
    /// TLB misses of the guest are counted.
    Tlb,
    /// They cannot be; what causes them stands in: blocks in use that are huge at one layer alone,
    /// and requests of the guest that failed.
    Misaligned,
}

impl Source {
    /// The name used in status output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fixed => "fixed",
            Self::Tlb => "tlb",
            Self::Misaligned => "misaligned",
        }
    }
}

/// What is known at the end of a period.
#[derive(Clone, Copy, Debug, Default)]
pub struct End {
    /// TLB misses of the guest in it, where they were counted to its end.
    pub tlb_misses: Option<u64>,
    /// Blocks in use that are huge at one layer alone.
    pub misaligned: u64,
    /// Fragmentation of the host, 0 to 1000, where the kernel tells it.
    pub fmfi: Option<u32>,
    /// Whether anything is kept for the timeout.
    pub keeps: bool,
    /// Whether TLB misses are counted from now on.
    pub counting: bool,
}

/// The timeout of one guest.
#[derive(Debug)]
pub struct Timeout {
    fixed_ms: Option<u32>,
    adapt: Adapt,
    /// TLB misses are counted in this period.
    counting: bool,
    /// Requests of the guest that failed in it.
    failed: u64,
    /// Something was kept when it began.
    keeps: bool,
    ends: Instant,
}

impl Timeout {
    /// Fixed at some milliseconds, or found out.
    pub fn new(fixed_ms: Option<u32>, now: Instant) -> Self {
        let adapt = Adapt::new(START_MS);
        Self { fixed_ms, adapt, counting: false, failed: 0, keeps: false, ends: now }
    }

    /// Fixes it, or has it found out from the start on.
    pub fn set(&mut self, fixed_ms: Option<u32>, now: Instant) {
        *self = Self::new(fixed_ms, now);
    }

    /// Another VMM or other memory: what was measured so far says nothing of what comes.
    pub fn changed(&mut self, now: Instant) {
        self.adapt.start_over();
        *self = Self { adapt: self.adapt.clone(), ..Self::new(self.fixed_ms, now) };
    }

    /// The timeout in force, in milliseconds.
    pub fn ms(&self) -> u32 {
        self.fixed_ms.unwrap_or_else(|| self.adapt.effective_ms())
    }

    /// Where it comes from.
    pub fn source(&self) -> Source {
        match (self.fixed_ms, self.counting) {
            (Some(_), _) => Source::Fixed,
            (None, true) => Source::Tlb,
            (None, false) => Source::Misaligned,
        }
    }

    /// What the driver is told, in milliseconds; 0: it is to find out by itself.
    pub fn wish_ms(&self) -> u32 {
        if self.source() == Source::Misaligned {
            0
        } else {
            self.ms()
        }
    }

    /// How long a guest at its limit keeps huge pages that it has no use for.
    pub fn at_limit(&self) -> Duration {
        (Duration::from_millis(self.ms().into()) / AT_LIMIT).max(AT_LIMIT_MIN)
    }

    /// When the period ends; `None` where there are none.
    pub fn ends(&self) -> Option<Instant> {
        self.fixed_ms.is_none().then_some(self.ends)
    }

    /// A request of the guest failed.
    pub fn request_failed(&mut self) {
        self.failed = self.failed.saturating_add(1);
    }

    /// A period ended. One in which nothing was kept says nothing of the timeout.
    pub fn end_period(&mut self, end: &End, now: Instant) {
        let failed = std::mem::take(&mut self.failed);
        let kept = std::mem::replace(&mut self.keeps, end.keeps) || end.keeps;
        let misses = match self.counting {
            true => end.tlb_misses,
            false => Some(end.misaligned.saturating_add(failed)),
        };
        match (misses, end.fmfi) {
            (Some(misses), Some(fmfi)) if kept => self.adapt.next(Period { misses, fmfi }),
            _ => {}
        }
        // Counts of one kind are never compared with those of another.
        if self.counting != end.counting || misses.is_none() {
            self.adapt.start_over();
        }
        self.counting = end.counting;
        self.ends = now + PERIOD;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(misaligned: u64) -> End {
        End { misaligned, fmfi: Some(0), keeps: true, ..End::default() }
    }

    #[test]
    fn what_is_set_holds_and_is_told() {
        let now = Instant::now();
        let mut timeout = Timeout::new(Some(90_000), now);
        assert_eq!((timeout.ms(), timeout.wish_ms()), (90_000, 90_000));
        assert_eq!((timeout.ends(), timeout.at_limit()), (None, Duration::from_secs(3)));
        timeout.set(None, now);
        assert_eq!((timeout.ms(), timeout.wish_ms()), (START_MS, 0));
        assert_eq!((timeout.ends(), timeout.at_limit()), (Some(now), Duration::from_secs(2)));
        timeout.set(Some(1000), now);
        assert_eq!(timeout.at_limit(), AT_LIMIT_MIN);
    }

    #[test]
    fn fewer_misaligned_blocks_and_failed_requests_make_it_longer() {
        let now = Instant::now();
        let mut timeout = Timeout::new(None, now);
        timeout.request_failed();
        timeout.end_period(&end(5), now);
        assert_eq!(timeout.ms(), 66_000, "on trial");
        timeout.end_period(&end(5), now);
        assert_eq!(timeout.ends(), Some(now + PERIOD));
        timeout.end_period(&end(5), now);
        assert_eq!(timeout.ms(), 72_600, "66 s is desired, and a longer one on trial");
        timeout.request_failed();
        timeout.end_period(&end(4), now);
        assert_eq!(timeout.ms(), 66_000, "a failure makes up for what was aligned");
    }

    #[test]
    fn a_period_in_which_nothing_was_kept_does_not_count() {
        let now = Instant::now();
        let mut timeout = Timeout::new(None, now);
        timeout.end_period(&End { keeps: false, ..end(5) }, now);
        assert_eq!(timeout.ms(), START_MS);
        timeout.end_period(&End { fmfi: None, ..end(5) }, now);
        assert_eq!(timeout.ms(), START_MS, "nor one of which fragmentation is unknown");
        timeout.end_period(&End { keeps: false, ..end(5) }, now);
        assert_eq!(timeout.ms(), 66_000, "something was kept when it began");
    }

    #[test]
    fn counts_of_different_kinds_are_never_compared() {
        let now = Instant::now();
        let mut timeout = Timeout::new(None, now);
        timeout.end_period(&End { counting: true, ..end(900) }, now);
        assert_eq!((timeout.source(), timeout.wish_ms()), (Source::Tlb, START_MS));
        let tlb = |misses| End { tlb_misses: misses, counting: true, ..end(0) };
        timeout.end_period(&tlb(Some(800)), now);
        assert_eq!(timeout.wish_ms(), 66_000, "the driver takes part in the trial");
        // The threads that were counted ended: nothing is known of the trial.
        timeout.end_period(&tlb(None), now);
        assert_eq!(timeout.ms(), START_MS);
        timeout.end_period(&tlb(Some(700)), now);
        timeout.changed(now);
        assert_eq!((timeout.ms(), timeout.source()), (START_MS, Source::Misaligned));
    }
}

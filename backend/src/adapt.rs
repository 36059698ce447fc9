//! Algorithm 1 of the Gemini paper: how long something is kept that may become useful, adapted to
//! what it brings. The driver's `adapt.c` is the same, for what it holds.
//!
//! A period runs with the desired timeout, the next one with 1.1 times that. If there were fewer
//! TLB misses and no more fragmentation, the longer one is desired from then on, and all starts
//! over. Else a period with the desired timeout follows, and one with 0.9 times that, judged the
//! same way. A trial is always compared with the period right before it.

/// Shortest timeout, in milliseconds.
pub const MIN_MS: u32 = 1000;
/// Longest timeout, in milliseconds.
pub const MAX_MS: u32 = 600_000;
/// What it starts from, in milliseconds.
pub const START_MS: u32 = 60_000;

/// What a period brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Period {
    /// TLB misses in it, or what stands in for them.
    pub misses: u64,
    /// Fragmentation at its end, 0 to 1000.
    pub fmfi: u32,
}

impl Period {
    fn is_better_than(&self, other: &Self) -> bool {
        self.misses < other.misses && self.fmfi <= other.fmfi
    }
}

/// What the period that runs now is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// The desired timeout, before a longer one.
    Measure,
    /// A longer one on trial.
    Longer,
    /// The desired one again, before a shorter one.
    Restore,
    /// A shorter one on trial.
    Shorter,
}

/// How far the algorithm is.
#[derive(Clone, Debug)]
pub struct Adapt {
    step: Step,
    desired_ms: u32,
    /// The last period with the desired timeout.
    before: Period,
}

impl Adapt {
    /// Starts from a timeout, kept within the bounds.
    pub fn new(ms: u32) -> Self {
        let desired_ms = ms.clamp(MIN_MS, MAX_MS);
        Self { step: Step::Measure, desired_ms, before: Period::default() }
    }

    /// The timeout of the period that runs now, in milliseconds.
    pub fn effective_ms(&self) -> u32 {
        let ms = match self.step {
            Step::Measure | Step::Restore => self.desired_ms,
            Step::Longer => self.desired_ms * 11 / 10,
            Step::Shorter => self.desired_ms * 9 / 10,
        };
        ms.clamp(MIN_MS, MAX_MS)
    }

    /// A period has ended, another one begins.
    pub fn next(&mut self, period: Period) {
        self.step = match self.step {
            Step::Measure | Step::Restore => {
                self.before = period;
                if self.step == Step::Measure {
                    Step::Longer
                } else {
                    Step::Shorter
                }
            }
            Step::Longer | Step::Shorter if period.is_better_than(&self.before) => {
                self.desired_ms = self.effective_ms();
                Step::Measure
            }
            Step::Longer => Step::Restore,
            Step::Shorter => Step::Measure,
        };
    }

    /// Misses are counted in another way from now on: begins with the desired timeout.
    pub fn start_over(&mut self) {
        self.step = Step::Measure;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs periods of as many misses; the timeout of each.
    fn timeouts(adapt: &mut Adapt, misses: &[u64], fmfi: u32) -> Vec<u32> {
        let run = |misses: &u64| {
            let ms = adapt.effective_ms();
            adapt.next(Period { misses: *misses, fmfi });
            ms
        };
        misses.iter().map(run).collect()
    }

    #[test]
    fn what_brought_more_is_kept_and_else_the_other_way_is_tried() {
        let mut adapt = Adapt::new(10_000);
        assert_eq!(timeouts(&mut adapt, &[50, 40], 0), [10_000, 11_000]);
        assert_eq!(timeouts(&mut adapt, &[40, 40, 40, 39], 0), [11_000, 12_100, 11_000, 9_900]);
        assert_eq!(timeouts(&mut adapt, &[39, 39, 39, 39], 0), [9_900, 10_890, 9_900, 8_910]);
        assert_eq!(adapt.effective_ms(), 9_900, "neither was better");
    }

    #[test]
    fn fewer_misses_at_the_price_of_fragmentation_are_no_gain() {
        let mut adapt = Adapt::new(10_000);
        adapt.next(Period { misses: 9, fmfi: 100 });
        adapt.next(Period { misses: 1, fmfi: 101 });
        assert_eq!(timeouts(&mut adapt, &[9, 9], 100), [10_000, 9_000]);
    }

    #[test]
    fn timeouts_stay_within_their_bounds() {
        assert_eq!(Adapt::new(0).effective_ms(), MIN_MS);
        for (start, bound) in [(MAX_MS, MAX_MS), (u32::MAX, MAX_MS)] {
            let mut adapt = Adapt::new(start);
            let longest = timeouts(&mut adapt, &[9, 8, 7, 6, 5, 4, 3, 2], 0).into_iter().max();
            assert_eq!(longest, Some(bound));
        }
        let mut adapt = Adapt::new(1_050);
        assert_eq!(timeouts(&mut adapt, &[1, 1, 1, 0], 0)[3], MIN_MS);
    }
}

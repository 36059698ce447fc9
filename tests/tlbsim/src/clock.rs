//! A clock that can be made slower, for a guest whose processor is emulated.

/// Shows time in nanoseconds: as it passes, or a fraction of it. It never jumps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlowClock {
    /// True time of the last change, and what was shown then.
    since: u64,
    shown: u64,
    slowdown: u32,
}

impl SlowClock {
    /// A clock that shows true time.
    #[must_use]
    pub const fn new() -> Self {
        SlowClock { since: 0, shown: 0, slowdown: 1 }
    }

    /// What it shows at `now`, a true time that is not before the last change.
    #[must_use]
    pub fn show(&self, now: u64) -> u64 {
        self.shown + now.saturating_sub(self.since) / u64::from(self.slowdown)
    }

    /// From `now` on it takes `slowdown` as long for a second; 1 is true speed, and
    /// so is 0.
    pub fn slow(&mut self, now: u64, slowdown: u32) {
        *self = SlowClock { since: now, shown: self.show(now), slowdown: slowdown.max(1) };
    }
}

impl Default for SlowClock {
    fn default() -> Self {
        SlowClock::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_shows_true_time_until_it_is_told_otherwise() {
        assert_eq!(SlowClock::new().show(12_345), 12_345);
    }

    #[test]
    fn it_goes_on_from_what_it_shows() {
        let mut clock = SlowClock::new();
        clock.slow(1000, 64);
        assert_eq!((clock.show(1000), clock.show(1064), clock.show(1128)), (1000, 1001, 1002));
        clock.slow(1128, 1);
        assert_eq!((clock.show(1128), clock.show(1130)), (1002, 1004));
    }

    #[test]
    fn it_never_goes_back() {
        let mut clock = SlowClock::new();
        clock.slow(1000, 0);
        // Another thread has read the time just before.
        assert_eq!(clock.show(999), 1000);
    }
}

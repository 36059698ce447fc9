//! How fast the agent may go: what was spent is owed, and time pays for it.

use std::time::Duration;

/// A debt that shrinks at a constant rate. Seconds are given by the caller, so
/// that tests need no clock.
#[derive(Clone, Debug)]
pub struct Debt {
    /// Units that a second pays for; above 0.
    rate: f64,
    /// Units that may be owed without a rest.
    credit: f64,
    owed: f64,
    last: Duration,
}

impl Debt {
    /// A debt that a second lowers by `rate` units, with rests only above
    /// `credit` units.
    #[must_use]
    pub fn new(rate: f64, credit: f64) -> Self {
        Debt { rate, credit, owed: 0.0, last: Duration::ZERO }
    }

    /// Spends `units` at time `now`, which never goes back.
    pub fn charge(&mut self, units: f64, now: Duration) {
        let paid = now.saturating_sub(self.last).as_secs_f64() * self.rate;
        self.last = self.last.max(now);
        self.owed = (self.owed - paid).max(0.0) + units;
    }

    /// How long to rest before more may be spent, from the last charge on.
    #[must_use]
    pub fn rest(&self) -> Duration {
        let above = (self.owed - self.credit).max(0.0);
        Duration::try_from_secs_f64(above / self.rate).unwrap_or(Duration::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn credit_needs_no_rest_and_more_does() {
        let mut debt = Debt::new(10.0, 5.0);
        debt.charge(5.0, Duration::from_secs(1));
        assert_eq!(debt.rest(), Duration::ZERO);
        debt.charge(20.0, Duration::from_secs(1));
        assert_eq!(debt.rest(), Duration::from_secs(2));
        debt.charge(0.0, Duration::from_secs(3));
        assert_eq!(debt.rest(), Duration::ZERO);
    }

    proptest! {
        #[test]
        fn spending_with_rests_keeps_to_the_rate(
            units in proptest::collection::vec(0.0_f64..100.0, 1..50),
        ) {
            let mut debt = Debt::new(10.0, 5.0);
            let mut now = Duration::ZERO;
            for spent in &units {
                debt.charge(*spent, now);
                now += debt.rest();
            }
            let all: f64 = units.iter().sum();
            prop_assert!(all <= now.as_secs_f64() * 10.0 + 5.0 + 1e-3);
        }
    }
}

//! Medians, their spread, and means over workloads.

/// A figure over its repetitions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// The middle value, or the mean of the two in the middle.
    pub median: f64,
    /// The smallest.
    pub low: f64,
    /// The greatest.
    pub high: f64,
    /// How many there are, at least one.
    pub count: usize,
}

impl Summary {
    /// Of `values`; none if there are none.
    #[must_use]
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (&low, &high) = (values.first()?, values.last()?);
        let count = values.len();
        let median = if count % 2 == 1 {
            values[count / 2]
        } else {
            f64::midpoint(values[count / 2 - 1], values[count / 2])
        };
        Some(Summary { median, low, high, count })
    }

    /// Median and spread as ratios to `base`; none if that is no ground for a ratio.
    #[must_use]
    pub fn relative_to(self, base: f64) -> Option<Self> {
        let ratio = |value| value / base;
        (base > 0.0).then(|| Summary {
            median: ratio(self.median),
            low: ratio(self.low),
            high: ratio(self.high),
            count: self.count,
        })
    }
}

/// The arithmetic mean; none of nothing.
#[must_use]
pub fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// The geometric mean, which is the one for ratios; none of nothing, or if a value is not
/// greater than 0.
#[must_use]
pub fn geometric_mean(values: &[f64]) -> Option<f64> {
    let logarithms: Vec<_> = values.iter().map(|value| value.ln()).collect();
    mean(&logarithms).map(f64::exp).filter(|mean| mean.is_finite() && *mean > 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_odd_and_even_counts() {
        assert_eq!(Summary::of(vec![]), None);
        let of_three = Summary::of(vec![3.0, 1.0, 2.0]).expect("there are three");
        assert_eq!(of_three, Summary { median: 2.0, low: 1.0, high: 3.0, count: 3 });
        assert_eq!(Summary::of(vec![4.0, 1.0]).map(|two| two.median), Some(2.5));
    }

    #[test]
    fn ratios_need_a_base() {
        let one = Summary::of(vec![2.0]).expect("there is one");
        assert_eq!(one.relative_to(4.0).map(|ratio| ratio.median), Some(0.5));
        assert_eq!(one.relative_to(0.0), None);
    }

    #[test]
    fn geometric_mean_of_a_ratio_and_its_inverse_is_one() {
        let mean = geometric_mean(&[4.0, 0.25]).expect("two ratios");
        assert!((mean - 1.0).abs() < 1e-12);
        assert_eq!(geometric_mean(&[]), None);
        assert_eq!(geometric_mean(&[1.0, 0.0]), None);
    }
}

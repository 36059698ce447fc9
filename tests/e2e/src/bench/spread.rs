//! Medians and spreads of repeated runs.

/// The value below which `percent` (0 to 100) of `values` lie; 0 where there are
/// none.
#[must_use]
pub fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    // The index that is nearest.
    let index = (percent.min(100) * sorted.len().saturating_sub(1) + 50) / 100;
    sorted.get(index).copied().unwrap_or(0.0)
}

/// The value in the middle.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    percentile(values, 50)
}

/// How far apart the middle half of `values` lies.
#[must_use]
pub fn spread(values: &[f64]) -> f64 {
    percentile(values, 75) - percentile(values, 25)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_in_order() {
        let values = [5.0, 1.0, 3.0, 2.0, 4.0];
        assert_eq!(median(&values), 3.0);
        assert_eq!(percentile(&values, 0), 1.0);
        assert_eq!(percentile(&values, 30), 2.0);
        assert_eq!(percentile(&values, 40), 3.0);
        assert_eq!(percentile(&values, 100), 5.0);
        assert_eq!(spread(&values), 2.0);
        assert_eq!(median(&[]), 0.0);
    }
}

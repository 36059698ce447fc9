//! Weighted shares of something limited, by what each can use.

/// One who wants a share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claimant {
    /// Its weight; 0 counts as 1.
    pub weight: u64,
    /// The most that it can use.
    pub demand: u64,
}

/// Shares `total` among claimants in proportion to their weights, where nobody gets more than it
/// can use and what it cannot use goes to the others (weighted max-min fairness). What is lost by
/// rounding is less than one unit a claimant.
pub fn fair(total: u64, claimants: &[Claimant]) -> Vec<u64> {
    let weight = |claimant: &Claimant| u128::from(claimant.weight.max(1));
    let mut shares = vec![0; claimants.len()];
    // Who is content with less per weight comes first: whoever follows divides what is left.
    let mut order: Vec<usize> = (0..claimants.len()).collect();
    order.sort_by(|a, b| {
        let (a, b) = (&claimants[*a], &claimants[*b]);
        (u128::from(a.demand) * weight(b)).cmp(&(u128::from(b.demand) * weight(a)))
    });
    let mut left = total;
    let mut weights: u128 = claimants.iter().map(weight).sum();
    for index in order {
        let claimant = &claimants[index];
        let part = u128::from(left) * weight(claimant) / weights.max(1);
        let share = u64::try_from(part).unwrap_or(u64::MAX).min(claimant.demand);
        shares[index] = share;
        left -= share;
        weights -= weight(claimant);
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shares(total: u64, claimants: &[(u64, u64)]) -> Vec<u64> {
        let claimants: Vec<_> =
            claimants.iter().map(|&(weight, demand)| Claimant { weight, demand }).collect();
        fair(total, &claimants)
    }

    #[test]
    fn who_wants_all_gets_by_weight() {
        assert_eq!(shares(600, &[(100, 1000), (200, 1000), (300, 1000)]), [100, 200, 300]);
        assert_eq!(shares(600, &[(7, 1000)]), [600]);
        assert!(shares(600, &[]).is_empty());
    }

    #[test]
    fn what_one_cannot_use_goes_to_the_others_by_weight() {
        assert_eq!(shares(600, &[(100, 0), (100, 1000), (200, 1000)]), [0, 200, 400]);
        assert_eq!(shares(600, &[(300, 60), (100, 1000), (200, 120)]), [60, 420, 120]);
    }

    proptest! {
        #[test]
        fn shares_are_fair(
            total in 0u64..1 << 50,
            claimants in prop::collection::vec((0u64..1000, 0u64..1 << 50), 1..20),
        ) {
            let shares = shares(total, &claimants);
            let sum: u64 = shares.iter().sum();
            let demand: u64 = claimants.iter().map(|(_, demand)| demand).sum();
            prop_assert!(sum <= total);
            prop_assert!(sum >= total.min(demand).saturating_sub(claimants.len() as u64));
            for (&share, &(weight, demand)) in shares.iter().zip(&claimants) {
                prop_assert!(share <= demand);
                if share == demand { continue; }
                // Who is not content has no less per weight than anybody else, but for rounding.
                let (units, weight) = (claimants.len() as u128 + 1, u128::from(weight.max(1)));
                for (&other, &(others_weight, _)) in shares.iter().zip(&claimants) {
                    let others_weight = u128::from(others_weight.max(1));
                    let mine = (u128::from(share) + units) * others_weight + units * weight;
                    prop_assert!(mine >= u128::from(other) * weight, "{shares:?} of {claimants:?}");
                }
            }
        }

        #[test]
        fn no_numbers_overflow(total: u64, claimants in prop::collection::vec(any::<(u64, u64)>(), 0..9)) {
            let claimants: Vec<_> = claimants.iter().map(|&(weight, demand)| Claimant { weight, demand }).collect();
            let sum: u128 = fair(total, &claimants).iter().map(|share| u128::from(*share)).sum();
            prop_assert!(sum <= u128::from(total));
        }
    }
}

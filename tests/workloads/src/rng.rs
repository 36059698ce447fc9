//! Random numbers that depend on a seed alone.

use gemini_guest::workload::word;

/// A sequence of random numbers.
#[derive(Clone, Debug)]
pub struct Rng {
    seed: u64,
    next: u64,
}

impl Rng {
    /// The sequence of a seed.
    pub fn new(seed: u64) -> Self {
        Rng { seed, next: 0 }
    }

    /// Any number.
    pub fn any(&mut self) -> u64 {
        self.next += 1;
        word(self.seed, self.next)
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        // The remainder's bias is far below what a workload could show.
        self.any() % limit
    }

    /// A number below `limit`: half of them in the first tenth or so, as words
    /// of a text are.
    pub fn skewed(&mut self, limit: u64) -> u64 {
        let unit = (self.any() >> 11) as f64 / (1_u64 << 53) as f64;
        // As a float it is below `limit`, which is far below 2^53.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let number = (unit.powi(3) * limit as f64) as u64;
        number.min(limit - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_repeat_and_stay_in_range() {
        let numbers = |seed| {
            let mut rng = Rng::new(seed);
            (0..1000).map(|_| rng.below(7)).collect::<Vec<_>>()
        };
        assert_eq!(numbers(1), numbers(1));
        assert_ne!(numbers(1), numbers(2));
        assert!(numbers(3).iter().all(|&number| number < 7));
        let mut rng = Rng::new(1);
        let small = (0..1000).filter(|_| rng.skewed(1000) < 125).count();
        assert!((400..600).contains(&small), "{small}");
    }
}

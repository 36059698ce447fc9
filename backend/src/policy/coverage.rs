//! How much of each block is covered by pages in use, in the manner of `HawkEye`: an average over
//! samples in which new ones count for two fifths, in ten bins.

use crate::bitmap::Bitmap;

const BINS: usize = 10;
/// Pages to a bin.
const WIDTH: u16 = 50;
/// A block that was not sampled yet.
const UNKNOWN: u16 = u16::MAX;

/// Averages and bins of all blocks.
#[derive(Debug)]
pub struct Coverage {
    /// Pages, on the average.
    weights: Vec<u16>,
    /// Emptiest first.
    bins: [Bitmap; BINS],
}

impl Coverage {
    /// Of `len` blocks nothing is known.
    pub fn new(len: usize) -> Self {
        Self { weights: vec![UNKNOWN; len], bins: std::array::from_fn(|_| Bitmap::new(len)) }
    }

    fn bin(weight: u16) -> usize {
        usize::from(weight / WIDTH).min(BINS - 1)
    }

    /// Takes a sample of a block.
    pub fn sample(&mut self, index: usize, pages: u16) {
        let Some(weight) = self.weights.get_mut(index) else { return };
        let old = *weight;
        let new = if old == UNKNOWN {
            pages
        } else {
            self.bins[Self::bin(old)].assign(index, false);
            let average = (u32::from(old) * 6 + u32::from(pages) * 4 + 5) / 10;
            u16::try_from(average).unwrap_or(UNKNOWN - 1)
        };
        *weight = new;
        self.bins[Self::bin(new)].assign(index, true);
    }

    /// A block of `wanted` in the highest bin that has any.
    pub fn next(&self, wanted: &Bitmap) -> Option<usize> {
        self.bins.iter().rev().find_map(|bin| bin.next_common(wanted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_new_counts_by_and_by() {
        let mut coverage = Coverage::new(2);
        let mut both = Bitmap::new(2);
        (0..2).for_each(|index| both.assign(index, true));
        coverage.sample(0, 100);
        coverage.sample(1, 0);
        assert_eq!(coverage.next(&both), Some(0));
        coverage.sample(1, 200);
        assert_eq!(coverage.weights[1], 80);
        assert_eq!(coverage.next(&both), Some(0));
        coverage.sample(1, 200);
        assert_eq!(coverage.weights[1], 128);
        assert_eq!(coverage.next(&both), Some(0), "the same bin, and the lower address");
        coverage.sample(1, 200);
        assert_eq!(coverage.next(&both), Some(1));
    }
}

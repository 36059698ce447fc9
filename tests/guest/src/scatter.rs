//! Which page frames a fragmenter keeps: a function of seed and frame number
//! alone.

use crate::workload::word;

/// Base pages in a block of 2 MiB.
pub const BLOCK_PAGES: u64 = 512;

/// Which page frames stay in use.
#[derive(Clone, Copy, Debug)]
pub struct Scatter {
    seed: u64,
    /// Mean number of frames kept in a block.
    mean: f64,
    /// Share of blocks of which no frame is kept.
    whole: f64,
}

impl Scatter {
    /// Keeps `keep` of all frames (0 to 1), and none in `whole` of the blocks
    /// (0 to 1).
    ///
    /// Blocks differ: their numbers of kept frames are spread evenly, from 1 to
    /// twice the mean as far as a block has room for it.
    #[must_use]
    pub fn new(seed: u64, keep: f64, whole: f64) -> Self {
        let whole = whole.clamp(0.0, 1.0);
        let blocks = (1.0 - whole).max(f64::EPSILON);
        let mean = (keep / blocks * BLOCK_PAGES as f64).clamp(1.0, BLOCK_PAGES as f64 - 1.0);
        Scatter { seed, mean, whole }
    }

    /// Whether `frame` stays in use.
    #[must_use]
    pub fn keeps(&self, frame: u64) -> bool {
        let block = frame / BLOCK_PAGES;
        let kept = self.kept_in(block);
        if kept == 0 {
            return false;
        }
        let place = word(self.seed ^ 1, block) % BLOCK_PAGES;
        let share = kept as f64 / BLOCK_PAGES as f64;
        frame % BLOCK_PAGES == place || unit(self.seed ^ 2, frame) < share
    }

    /// Frames kept in a block, up to chance; 0 means none for certain, anything
    /// else at least one.
    fn kept_in(&self, block: u64) -> u64 {
        if unit(self.seed ^ 3, block) < self.whole {
            return 0;
        }
        // As far above the mean as below it.
        let reach = (self.mean - 1.0).min(BLOCK_PAGES as f64 - 1.0 - self.mean);
        let kept = self.mean + (unit(self.seed ^ 4, block) * 2.0 - 1.0) * reach;
        // Between 1 and 511 by construction.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let kept = kept.round() as u64;
        kept.max(1)
    }
}

/// A number from 0 up to 1 that seed and index decide.
#[must_use]
pub fn unit(seed: u64, index: u64) -> f64 {
    // The upper 53 bits fit a double exactly.
    (word(seed, index) >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCKS: u64 = 1000;

    fn kept(scatter: &Scatter, block: u64) -> u64 {
        let frames = block * BLOCK_PAGES..(block + 1) * BLOCK_PAGES;
        frames.filter(|&frame| scatter.keeps(frame)).count() as u64
    }

    #[test]
    fn every_block_keeps_a_frame() {
        for keep in [0.0, 0.1, 0.5, 0.9] {
            let scatter = Scatter::new(7, keep, 0.0);
            for block in 0..BLOCKS {
                let kept = kept(&scatter, block);
                assert!(kept >= 1, "{keep}: block {block} keeps none");
            }
        }
    }

    #[test]
    fn the_share_is_met() {
        for (keep, whole) in [(0.1, 0.0), (0.4, 0.0), (0.7, 0.0), (0.4, 0.2)] {
            let scatter = Scatter::new(3, keep, whole);
            let all: u64 = (0..BLOCKS).map(|block| kept(&scatter, block)).sum();
            let share = all as f64 / (BLOCKS * BLOCK_PAGES) as f64;
            assert!((share - keep).abs() < 0.03, "{keep}: {share}");
        }
    }

    #[test]
    fn the_share_of_whole_blocks_is_met() {
        let scatter = Scatter::new(3, 0.4, 0.2);
        let whole = (0..BLOCKS).filter(|&block| kept(&scatter, block) == 0).count();
        assert!((150..250).contains(&whole), "{whole}");
    }

    #[test]
    fn seed_and_frame_alone_decide() {
        let choice = |seed| {
            let scatter = Scatter::new(seed, 0.4, 0.1);
            (0..BLOCKS).map(|frame| scatter.keeps(frame)).collect::<Vec<_>>()
        };
        assert_eq!(choice(1), choice(1));
        assert_ne!(choice(1), choice(2));
    }

    #[test]
    fn blocks_differ_in_how_much_they_keep() {
        let scatter = Scatter::new(5, 0.3, 0.0);
        let few = (0..BLOCKS).filter(|&block| kept(&scatter, block) < 64).count();
        let many = (0..BLOCKS).filter(|&block| kept(&scatter, block) > 256).count();
        assert!(few > 100 && many > 50, "{few} {many}");
    }
}

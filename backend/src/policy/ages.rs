//! How long blocks have been something, coarsely: each age on its own bitmap.
//!
//! Each age is about twice as long as the one before, and blocks grow older by whole bitmaps: no
//! block has a time of its own. At [`AGES`] ages that is one and a half bytes a block.

use crate::bitmap::Bitmap;

/// Number of ages. Blocks reach the last one after 2^10 ticks.
pub const AGES: usize = 12;

/// A set of blocks, by age.
#[derive(Debug)]
pub struct Ages {
    members: Bitmap,
    /// Disjoint, youngest first, their union being `members`.
    ages: [Bitmap; AGES],
    ticks: u64,
}

impl Ages {
    /// An empty set over `0..len`.
    pub fn new(len: usize) -> Self {
        Self {
            members: Bitmap::new(len),
            ages: std::array::from_fn(|_| Bitmap::new(len)),
            ticks: 0,
        }
    }

    /// Adds a block, as a young one unless it is in the set already, or removes it.
    pub fn assign(&mut self, index: usize, member: bool) {
        if self.members.get(index) == member {
            return;
        }
        self.members.assign(index, member);
        if member {
            self.ages[0].assign(index, true);
        } else if let Some(age) = self.ages.iter_mut().find(|age| age.get(index)) {
            // It has one age, and most that leave are young.
            age.assign(index, false);
        }
    }

    /// Lets `ticks` ticks pass. Age n+1 takes over age n every 2^n ticks, so that a block has been
    /// a member for 2^(n-1) - 1 ticks at least when it reaches age n, and 2^n at most.
    pub fn pass(&mut self, ticks: u64) {
        // More than this makes nobody older.
        for _ in 0..ticks.min(1 << AGES) {
            self.ticks = self.ticks.wrapping_add(1);
            for age in (0..AGES - 1).rev() {
                if self.ticks % (1 << age) == 0 {
                    let (younger, older) = self.ages.split_at_mut(age + 1);
                    older[0].take_all(&mut younger[age]);
                }
            }
        }
    }

    /// The set by age, oldest first.
    pub fn oldest_first(&self) -> impl Iterator<Item = &Bitmap> {
        self.ages.iter().rev()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against a time for every block.
        #[test]
        fn ages_follow_the_times_of_the_blocks(
            steps in prop::collection::vec((0usize..40, any::<bool>(), 0u64..40), 1..200),
        ) {
            let mut ages = Ages::new(40);
            let mut born = [None; 40];
            let mut now = 0u64;
            for (index, member, ticks) in steps {
                ages.assign(index, member);
                born[index] = member.then(|| born[index].unwrap_or(now));
                ages.pass(ticks);
                now += ticks;
                for (index, born) in born.iter().enumerate() {
                    let at: Vec<usize> =
                        (0..AGES).filter(|age| ages.ages[*age].get(index)).collect();
                    let Some(born) = born else {
                        prop_assert!(at.is_empty());
                        continue;
                    };
                    let [age] = at[..] else { panic!("{index} has ages {at:?}") };
                    let ticks = now - born;
                    prop_assert!(ticks + 1 >= (1 << age) / 2, "{ticks} ticks, age {age}");
                    prop_assert!(age == AGES - 1 || ticks <= (1 << (age + 1)), "{ticks}, {age}");
                }
            }
        }
    }
}

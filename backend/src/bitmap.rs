//! A plain bitmap with a count, for sets of block indices.

/// A set of small integers, one bit each.
#[derive(Debug, Default)]
pub struct Bitmap {
    words: Vec<u64>,
    len: usize,
    ones: usize,
}

impl Bitmap {
    /// An empty set over `0..len`.
    pub fn new(len: usize) -> Self {
        Self { words: vec![0; len.div_ceil(64)], len, ones: 0 }
    }

    /// Number of elements in the set.
    pub fn ones(&self) -> usize {
        self.ones
    }

    /// Whether `index` is in the set; false beyond its end.
    pub fn get(&self, index: usize) -> bool {
        index < self.len && self.words[index / 64] & (1 << (index % 64)) != 0
    }

    /// Adds or removes `index`; out of range does nothing.
    pub fn assign(&mut self, index: usize, value: bool) {
        if index >= self.len || self.get(index) == value {
            return;
        }
        self.words[index / 64] ^= 1 << (index % 64);
        if value {
            self.ones += 1;
        } else {
            self.ones -= 1;
        }
    }

    /// Empties the set.
    pub fn clear(&mut self) {
        self.words.fill(0);
        self.ones = 0;
    }

    /// The smallest element at or after `from`.
    pub fn next(&self, from: usize) -> Option<usize> {
        if self.ones == 0 || from >= self.len {
            return None;
        }
        let mut at = from / 64;
        let mut word = self.words[at] & (u64::MAX << (from % 64));
        loop {
            if word != 0 {
                return Some(at * 64 + word.trailing_zeros() as usize);
            }
            at += 1;
            word = *self.words.get(at)?;
        }
    }

    /// All elements, ascending.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        std::iter::successors(self.next(0), |last| self.next(last + 1))
    }

    /// The smallest element that is in `other` as well.
    pub fn next_common(&self, other: &Self) -> Option<usize> {
        if self.ones == 0 || other.ones == 0 {
            return None;
        }
        let mut both = self.words.iter().zip(&other.words).map(|(a, b)| a & b);
        let (at, word) = both.by_ref().enumerate().find(|(_, word)| *word != 0)?;
        Some(at * 64 + word.trailing_zeros() as usize)
    }

    /// Adds all of `other`, a set of the same size, which is empty afterwards.
    pub fn take_all(&mut self, other: &mut Self) {
        if other.ones == 0 {
            return;
        }
        for (mine, theirs) in self.words.iter_mut().zip(&mut other.words) {
            self.ones += (*theirs & !*mine).count_ones() as usize;
            *mine |= std::mem::take(theirs);
        }
        other.ones = 0;
    }

    /// The smallest element at or after `from`, else the smallest of all: a fair cursor.
    pub fn next_wrapping(&self, from: usize) -> Option<usize> {
        self.next(from).or_else(|| self.next(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn two_bitmaps_agree_with_two_sets(
            a in prop::collection::btree_set(0usize..190, 0..30),
            b in prop::collection::btree_set(0usize..190, 0..30),
        ) {
            let of = |set: &BTreeSet<usize>| {
                let mut bitmap = Bitmap::new(190);
                set.iter().for_each(|index| bitmap.assign(*index, true));
                bitmap
            };
            let (mut one, mut other) = (of(&a), of(&b));
            prop_assert_eq!(one.next_common(&other), a.intersection(&b).next().copied());
            one.take_all(&mut other);
            prop_assert_eq!((one.ones(), other.ones()), (a.union(&b).count(), 0));
            prop_assert!((0..190).all(|i| one.get(i) == (a.contains(&i) || b.contains(&i))));
        }

        #[test]
        fn bitmap_agrees_with_a_set(
            ops in prop::collection::vec((0usize..200, any::<bool>()), 0..300),
            from in 0usize..220,
        ) {
            let mut bitmap = Bitmap::new(190);
            let mut set = BTreeSet::new();
            for (index, value) in ops {
                bitmap.assign(index, value);
                if index < 190 {
                    if value { set.insert(index); } else { set.remove(&index); }
                }
            }
            prop_assert_eq!(bitmap.ones(), set.len());
            prop_assert_eq!(bitmap.next(from), set.range(from..).next().copied());
            let wrapped = set.range(from..).next().or_else(|| set.first()).copied();
            prop_assert_eq!(bitmap.next_wrapping(from), wrapped);
        }
    }
}

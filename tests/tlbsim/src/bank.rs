//! A set-associative memory with the least recently used entry as its victim:
//! what TLBs and paging-structure caches are made of.

/// Size of a bank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Entries in all, a multiple of `ways`.
    pub entries: usize,
    /// Entries that an item may be in; all of them in a fully associative bank.
    pub ways: usize,
}

impl Geometry {
    /// A bank in which an item may be in any entry.
    #[must_use]
    pub const fn full(entries: usize) -> Self {
        Geometry { entries, ways: entries }
    }

    /// A bank of sets with `ways` entries each.
    #[must_use]
    pub const fn sets(entries: usize, ways: usize) -> Self {
        Geometry { entries, ways }
    }
}

/// What an entry is found by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// Number of a page or of a larger range; chooses the set.
    pub number: u64,
    /// Tells items of the same number apart, such as sizes of pages.
    pub kind: u8,
    /// Address space; see [`GLOBAL`].
    pub space: u8,
}

/// The space of an item that is in every address space.
pub const GLOBAL: u8 = u8::MAX;

#[derive(Clone, Debug)]
struct Entry<T> {
    key: Key,
    payload: T,
    /// When it was used last; 0 where the entry is empty.
    used: u64,
}

/// A bank of entries that carry a `T` each.
#[derive(Clone, Debug)]
pub struct Bank<T> {
    entries: Vec<Entry<T>>,
    ways: usize,
    sets: u64,
    clock: u64,
}

impl<T: Copy + Default> Bank<T> {
    /// An empty bank. One without entries is allowed: it never holds anything.
    #[must_use]
    pub fn new(geometry: Geometry) -> Self {
        let key = Key { number: 0, kind: 0, space: 0 };
        let empty = Entry { key, payload: T::default(), used: 0 };
        let sets = geometry.entries.checked_div(geometry.ways).unwrap_or(0);
        Bank {
            entries: vec![empty; sets * geometry.ways],
            ways: geometry.ways,
            sets: sets as u64,
            clock: 0,
        }
    }

    /// The set of an item; `None` in a bank without entries.
    fn set(&mut self, number: u64) -> Option<&mut [Entry<T>]> {
        let set = usize::try_from(number.checked_rem(self.sets)?).ok()?;
        self.entries.get_mut(set * self.ways..(set + 1) * self.ways)
    }

    /// Looks for an item, in its own address space or a global one, and marks it
    /// as used now.
    pub fn find(&mut self, key: Key) -> Option<T> {
        self.clock += 1;
        let now = self.clock;
        let same = |entry: &&mut Entry<T>| {
            entry.used != 0
                && entry.key.number == key.number
                && entry.key.kind == key.kind
                && (entry.key.space == key.space || entry.key.space == GLOBAL)
        };
        let entry = self.set(key.number)?.iter_mut().find(same)?;
        entry.used = now;
        Some(entry.payload)
    }

    /// When the entry was used last that [`Bank::insert`] would put an item with
    /// this number into; 0 where it is empty, `None` where there is none.
    pub fn victim_age(&mut self, number: u64) -> Option<u64> {
        self.set(number)?.iter().map(|entry| entry.used).min()
    }

    /// Puts an item in, in place of the least recently used one of its set.
    pub fn insert(&mut self, key: Key, payload: T) {
        self.clock += 1;
        let now = self.clock;
        let victim = self.set(key.number).and_then(|set| set.iter_mut().min_by_key(|e| e.used));
        if let Some(entry) = victim {
            *entry = Entry { key, payload, used: now };
        }
    }

    /// Empties every entry that `gone` says yes to.
    pub fn remove(&mut self, gone: impl Fn(Key, T) -> bool) {
        for entry in &mut self.entries {
            if entry.used != 0 && gone(entry.key, entry.payload) {
                entry.used = 0;
            }
        }
    }

    /// Number of entries in use.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.iter().filter(|entry| entry.used != 0).count()
    }

    /// Whether no entry is in use.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(number: u64) -> Key {
        Key { number, kind: 0, space: 0 }
    }

    /// Looks up each number, puts in what is missing, and counts that.
    fn misses(geometry: Geometry, numbers: &[u64]) -> usize {
        let mut bank = Bank::<()>::new(geometry);
        let mut missed = 0;
        for &number in numbers {
            if bank.find(key(number)).is_none() {
                bank.insert(key(number), ());
                missed += 1;
            }
        }
        assert!(bank.len() <= geometry.entries);
        missed
    }

    #[test]
    fn least_recently_used_entry_goes_first() {
        // 1 2 3 miss; 1 hits; 4 takes the place of 2; 2 takes that of 3; 1 hits.
        assert_eq!(misses(Geometry::full(3), &[1, 2, 3, 1, 4, 2, 1]), 5);
    }

    #[test]
    fn numbers_of_one_set_compete_and_others_do_not() {
        // Two sets of one entry: even numbers and odd ones.
        assert_eq!(misses(Geometry::sets(2, 1), &[0, 2, 0, 2, 1, 1]), 5);
        assert_eq!(misses(Geometry::sets(2, 1), &[0, 1, 0, 1]), 2);
    }

    #[test]
    fn spaces_are_apart_and_global_items_are_in_all() {
        let mut bank = Bank::new(Geometry::full(4));
        bank.insert(Key { space: 1, ..key(7) }, 'a');
        bank.insert(Key { space: GLOBAL, ..key(8) }, 'g');
        assert_eq!(bank.find(Key { space: 2, ..key(7) }), None);
        assert_eq!(bank.find(Key { space: 1, ..key(7) }), Some('a'));
        assert_eq!(bank.find(Key { space: 2, ..key(8) }), Some('g'));
        bank.remove(|key, _| key.space != GLOBAL);
        assert_eq!(bank.len(), 1);
    }

    #[test]
    fn a_bank_without_entries_holds_nothing() {
        assert_eq!(misses(Geometry::full(0), &[1, 1, 1]), 3);
    }

    proptest! {
        #[test]
        fn a_larger_fully_associative_bank_never_misses_more(
            numbers in prop::collection::vec(0_u64..40, 0..400),
            small in 0_usize..20,
            more in 0_usize..20,
        ) {
            let few = misses(Geometry::full(small), &numbers);
            let many = misses(Geometry::full(small + more), &numbers);
            prop_assert!(many <= few);
        }

        #[test]
        fn as_many_misses_as_numbers_once_all_have_room(
            numbers in prop::collection::vec(0_u64..64, 0..400),
        ) {
            let distinct: std::collections::BTreeSet<_> = numbers.iter().collect();
            prop_assert_eq!(misses(Geometry::sets(64, 4), &numbers), distinct.len());
        }
    }
}

//! The two-dimensional walk, and the caches that shorten it.
//!
//! Each address that the guest's page tables hold is a guest physical one: to
//! read the next table, it has to be translated by the host's, which have four
//! levels. Without caches that is 24 reads for base pages at both layers: four
//! in the guest with four in the host before each, and four for the page itself.

use crate::bank::{Bank, Key};
use crate::host::HostMap;
use crate::paging::{entry_shift, PageSize, Translation};
use crate::profile::{Profile, WalkCaches};

/// Number of levels of the host's page tables (EPT, NPT).
const HOST_LEVELS: usize = 4;

/// Lowest level whose entries are cached: 2.
const FIRST_CACHED: usize = 2;

/// Caches of one dimension, for levels 2 to 5.
#[derive(Clone, Debug)]
struct Dimension {
    levels: [Bank<()>; 4],
}

impl Dimension {
    fn new(sizes: &WalkCaches) -> Self {
        Dimension { levels: sizes.levels.map(Bank::new) }
    }

    fn key(address: u64, level: usize, space: u8) -> Key {
        Key { number: address >> entry_shift(level), kind: 0, space }
    }

    /// The lowest level of which the entry for `address` is cached, above
    /// `leaf`; the level above `top` where none is.
    fn lowest_cached(&mut self, address: u64, space: u8, leaf: usize, top: usize) -> usize {
        for level in leaf.max(FIRST_CACHED - 1) + 1..=top {
            if self.levels[level - FIRST_CACHED].find(Self::key(address, level, space)).is_some() {
                return level;
            }
        }
        top + 1
    }

    fn insert(&mut self, address: u64, space: u8, level: usize) {
        self.levels[level - FIRST_CACHED].insert(Self::key(address, level, space), ());
    }

    fn remove(&mut self, gone: impl Fn(Key) -> bool) {
        for bank in &mut self.levels {
            bank.remove(|key, ()| gone(key));
        }
    }
}

/// The caches of a processor's walker.
#[derive(Clone, Debug)]
pub struct Walker {
    guest: Dimension,
    nested: Dimension,
    nested_tlb: Bank<()>,
}

impl Walker {
    /// Empty caches.
    #[must_use]
    pub fn new(profile: &Profile) -> Self {
        Walker {
            guest: Dimension::new(&profile.guest_walk),
            nested: Dimension::new(&profile.nested_walk),
            nested_tlb: Bank::new(profile.nested_tlb),
        }
    }

    /// Walks to the page of `address`, and returns how many entries of page
    /// tables were read.
    pub fn walk(
        &mut self,
        address: u64,
        space: u8,
        translation: &Translation,
        host: &HostMap,
    ) -> u64 {
        let (leaf, top) = (usize::from(translation.level), usize::from(translation.top));
        let cached = self.guest.lowest_cached(address, space, leaf, top);
        let mut reads = 0;
        for level in (leaf..cached).rev() {
            // What is cached of the level above is a host address: the table of
            // the first level to be read needs no translation then.
            if level + 1 != cached || cached > top {
                reads += self.translate(translation.entries[level - 1], host);
            }
            reads += 1;
            if level > leaf {
                self.guest.insert(address, space, level);
            }
        }
        reads + self.translate(translation.physical(address), host)
    }

    /// Translates a guest physical address; returns how many entries of the
    /// host's page tables were read.
    fn translate(&mut self, gpa: u64, host: &HostMap) -> u64 {
        let size = host.page_size(gpa);
        let key = Key { number: gpa >> size.shift(), kind: kind(size), space: 0 };
        if self.nested_tlb.find(key).is_some() {
            return 0;
        }
        let leaf = usize::from(size.level());
        let cached = self.nested.lowest_cached(gpa, 0, leaf, HOST_LEVELS);
        for level in (leaf + 1..cached).rev() {
            self.nested.insert(gpa, 0, level);
        }
        self.nested_tlb.insert(key, ());
        (cached - leaf) as u64
    }

    /// Forgets what is known of the guest's tables, of one address space or all.
    pub fn forget_guest(&mut self, space: Option<u8>) {
        self.guest.remove(|key| space.is_none_or(|space| key.space == space));
    }

    /// Forgets everything: the host has changed its page tables.
    pub fn forget_all(&mut self) {
        self.forget_guest(None);
        self.nested.remove(|_| true);
        self.nested_tlb.remove(|_, ()| true);
    }
}

/// A page size as a kind of item in a bank.
#[must_use]
pub(crate) fn kind(size: PageSize) -> u8 {
    match size {
        PageSize::Base => 0,
        PageSize::Huge => 1,
        PageSize::Giant => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bank::Geometry;
    use crate::host::RamLayout;
    use crate::profile::BROADWELL;

    const GIB: u64 = 1 << 30;

    /// A translation whose tables and page lie in different blocks.
    fn translation(size: PageSize) -> Translation {
        let mut entries = [0; 5];
        for level in size.level()..=4 {
            entries[usize::from(level) - 1] = u64::from(level) << 22;
        }
        Translation { entries, top: 4, frame: GIB, level: size.level(), global: false, group: 0 }
    }

    fn host(huge: bool) -> HostMap {
        let mut map = HostMap::new(RamLayout::q35(2 * GIB), PageSize::Huge);
        if huge {
            map.set_huge(0, 2 * GIB);
        }
        map
    }

    fn bare() -> Walker {
        Walker::new(&Profile {
            guest_walk: WalkCaches::NONE,
            nested_walk: WalkCaches::NONE,
            nested_tlb: Geometry::full(0),
            ..BROADWELL
        })
    }

    #[test]
    fn four_corners_read_24_19_19_and_15_entries() {
        let reads = |guest, huge| bare().walk(5 * GIB, 0, &translation(guest), &host(huge));
        assert_eq!(reads(PageSize::Base, false), 24);
        assert_eq!(reads(PageSize::Base, true), 19);
        assert_eq!(reads(PageSize::Huge, false), 19);
        assert_eq!(reads(PageSize::Huge, true), 15);
        assert_eq!(reads(PageSize::Giant, true), 11);
    }

    #[test]
    fn five_levels_in_the_guest_cost_one_nested_walk_more() {
        let mut five = translation(PageSize::Base);
        five.top = 5;
        five.entries[4] = 9 << 22;
        assert_eq!(bare().walk(5 * GIB, 0, &five, &host(false)), 29);
    }

    #[test]
    fn a_second_walk_reads_what_is_not_cached() {
        let mut walker = Walker::new(&BROADWELL);
        let first = translation(PageSize::Base);
        // All tables and the page are in the same GiB or the next: the nested
        // walks share the levels 4 and 3, and each reads levels 2 and 1 itself.
        // Tables: 4 + 1, 2 + 1, 2 + 1, 2 + 1; the page, in another GiB: 3.
        assert_eq!(walker.walk(5 * GIB, 0, &first, &host(false)), 17);
        // The same page: its level 2 entry and its translation are cached.
        assert_eq!(walker.walk(5 * GIB, 0, &first, &host(false)), 1);
        // The page after it, in the next frame, under the same tables: one entry
        // in the guest and, below the cached level 2, one in the host.
        let mut next = first;
        next.entries[0] += 8;
        next.frame += 4096;
        assert_eq!(walker.walk(5 * GIB + 4096, 0, &next, &host(false)), 2);
    }

    #[test]
    fn other_spaces_do_not_use_what_is_cached_of_the_guest() {
        let mut walker = Walker::new(&BROADWELL);
        let page = translation(PageSize::Base);
        walker.walk(5 * GIB, 1, &page, &host(false));
        // Four entries in the guest; every nested translation is cached.
        assert_eq!(walker.walk(5 * GIB, 2, &page, &host(false)), 4);
        walker.forget_guest(Some(1));
        assert_eq!(walker.walk(5 * GIB, 2, &page, &host(false)), 1);
        assert_eq!(walker.walk(5 * GIB, 1, &page, &host(false)), 4);
        walker.forget_all();
        assert_eq!(walker.walk(5 * GIB, 1, &page, &host(false)), 17);
    }
}

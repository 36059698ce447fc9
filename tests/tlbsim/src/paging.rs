//! The guest's own page tables, as a processor in long mode reads them.
//!
//! Source: Intel SDM volume 3A, chapter 5 (4-level and 5-level paging).

use serde::{Deserialize, Serialize};

/// Size of a page.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum PageSize {
    /// 4 KiB.
    #[default]
    Base,
    /// 2 MiB.
    Huge,
    /// 1 GiB.
    Giant,
}

impl PageSize {
    /// From the smallest to the largest.
    pub const ALL: [PageSize; 3] = [PageSize::Base, PageSize::Huge, PageSize::Giant];

    /// log2 of the size in bytes.
    #[must_use]
    pub const fn shift(self) -> u32 {
        match self {
            PageSize::Base => 12,
            PageSize::Huge => 21,
            PageSize::Giant => 30,
        }
    }

    /// The level of page table that maps such a page: 1 is the lowest.
    #[must_use]
    pub const fn level(self) -> u8 {
        match self {
            PageSize::Base => 1,
            PageSize::Huge => 2,
            PageSize::Giant => 3,
        }
    }

    /// First address of the page that `address` lies in.
    #[must_use]
    pub const fn start(self, address: u64) -> u64 {
        address >> self.shift() << self.shift()
    }
}

/// Most levels that page tables have.
pub const LEVELS: usize = 5;

/// log2 of the range that an entry of a table of this level maps.
#[must_use]
pub const fn entry_shift(level: usize) -> usize {
    12 + 9 * (level - 1)
}

/// What a walk through the guest's page tables found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Translation {
    /// Guest physical addresses of the entries that were read, by level: that of
    /// level 1 is first. Those below the page's own level are 0.
    pub entries: [u64; LEVELS],
    /// Number of the highest level: 4 or 5.
    pub top: u8,
    /// First guest physical address of the page.
    pub frame: u64,
    /// Level of the entry that maps the page.
    pub level: u8,
    /// Whether the page is in every address space.
    pub global: bool,
    /// log2 of the number of base pages in the largest group around the page that the
    /// guest maps as it would map one page of that size: aligned in both address
    /// spaces, in order, and with the same attributes. 0 where the page has no such
    /// neighbours or is no base page; at most [`GROUP_LIMIT`]. All smaller aligned
    /// groups around the page are mapped like that, too.
    pub group: u8,
}

/// Largest group that is looked for: 16 base pages.
pub const GROUP_LIMIT: u8 = 4;

impl Translation {
    /// Size of the page in the guest.
    #[must_use]
    pub fn size(&self) -> PageSize {
        match self.level {
            3 => PageSize::Giant,
            2 => PageSize::Huge,
            _ => PageSize::Base,
        }
    }

    /// The guest physical address that a virtual one in this page stands for.
    #[must_use]
    pub fn physical(&self, address: u64) -> u64 {
        self.frame | (address - self.size().start(address))
    }
}

/// The control registers that decide how page tables are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ControlRegisters {
    /// Paging on, and more.
    pub cr0: u64,
    /// Where the top table is.
    pub cr3: u64,
    /// Kinds of paging.
    pub cr4: u64,
}

const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_PGE: u64 = 1 << 7;
const CR4_LA57: u64 = 1 << 12;
const PRESENT: u64 = 1 << 0;
const ACCESSED: u64 = 1 << 5;
const LARGE: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Bits of an entry that are the kernel's own: 9 to 11 and 52 to 58. All others are
/// address or attributes, bits 59 to 62 (the protection key) included.
const IGNORED: u64 = 7 << 9 | 0x7f << 52;

/// Memory of the guest, by guest physical address.
pub trait GuestMemory {
    /// An aligned word; `None` where there is no memory.
    fn word(&self, gpa: u64) -> Option<u64>;
}

impl ControlRegisters {
    /// Whether page tables in the form of long mode are in use. With paging on
    /// and PAE, 32-bit kernels that have PAE are taken for 64-bit ones.
    #[must_use]
    pub fn paging(&self) -> bool {
        self.cr0 & CR0_PG != 0 && self.cr4 & CR4_PAE != 0
    }

    /// Guest physical address of the top table.
    #[must_use]
    pub fn root(&self) -> u64 {
        self.cr3 & ADDRESS
    }

    /// Reads page tables down to the page of `address`; `None` where there is
    /// none.
    #[must_use]
    pub fn walk(&self, memory: &impl GuestMemory, address: u64) -> Option<Translation> {
        let top = if self.cr4 & CR4_LA57 != 0 { 5 } else { 4 };
        let mut found = Translation { top, ..Translation::default() };
        let mut table = self.root();
        for level in (1..=top).rev() {
            let shift = entry_shift(usize::from(level));
            let place = table + (address >> shift & 0x1ff) * 8;
            *found.entries.get_mut(usize::from(level) - 1)? = place;
            let entry = memory.word(place)?;
            if entry & PRESENT == 0 {
                return None;
            }
            if level == 1 || (level <= 3 && entry & LARGE != 0) {
                found.level = level;
                found.frame = found.size().start(entry & ADDRESS);
                found.global = entry & GLOBAL != 0 && self.cr4 & CR4_PGE != 0;
                if level == 1 {
                    found.group = group(memory, place, entry);
                }
                return Some(found);
            }
            table = entry & ADDRESS;
        }
        None
    }
}

/// The group ([`Translation::group`]) of the base page whose entry is at `place`.
///
/// A processor that merges pages has one set of attributes for all of them. So all
/// that it goes by has to be the same, accessed and dirty bits included, and as it
/// sets the accessed bit of an entry before it uses it, that of all others has to be
/// set.
fn group(memory: &impl GuestMemory, place: u64, entry: u64) -> u8 {
    let entry = entry | ACCESSED;
    let own = (place / 8) & ((1 << GROUP_LIMIT) - 1);
    // In a group that is aligned in both address spaces, entries differ in the same
    // bits as their numbers.
    let fits = |other: u64| {
        let word = memory.word(place ^ ((own ^ other) * 8));
        word.is_some_and(|word| (word ^ entry ^ (own ^ other) << 12) & !IGNORED == 0)
    };
    let mut group = 0;
    while group < GROUP_LIMIT {
        // The other half of the group that is twice as large.
        let half = 1 << group;
        let start = (own ^ half) & !(half - 1);
        let aligned = (own ^ entry >> 12) & half == 0;
        if !aligned || !(start..start + half).all(fits) {
            break;
        }
        group += 1;
    }
    group
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::HashMap;

    use super::*;

    /// Page tables in a map of words.
    #[derive(Default)]
    pub(crate) struct Tables(pub HashMap<u64, u64>);

    impl GuestMemory for Tables {
        fn word(&self, gpa: u64) -> Option<u64> {
            (gpa < 1 << 40).then(|| self.0.get(&gpa).copied().unwrap_or(0))
        }
    }

    /// Tables with one base page, one huge one, and one of 1 GiB.
    fn tables() -> Tables {
        let mut tables = Tables::default();
        for (place, entry) in [
            (0x1000, 0x2001),                   // level 4 -> 3
            (0x2000, 0x3001),                   // level 3 -> 2
            (0x3000, 0x4001),                   // level 2 -> 1
            (0x4000 + 8 * 5, 0x77_7001),        // a page at 0x5000
            (0x3000 + 8, 0x1234_5678_0181),     // a global huge page at 2 MiB
            (0x2000 + 8 * 2, 0x8_c000_0081),    // one of 1 GiB at 2 GiB
            (0x3000 + 8 * 7, 0x0fff_ffff_f000), // not present
        ] {
            tables.0.insert(place, entry);
        }
        tables
    }

    pub(crate) fn registers() -> ControlRegisters {
        // Bits of CR3 that are no address must not matter.
        ControlRegisters { cr0: CR0_PG, cr3: 0x1018, cr4: CR4_PAE | CR4_PGE }
    }

    #[test]
    fn a_base_page_is_four_entries_away() {
        let found = registers().walk(&tables(), 0x5123).expect("it is mapped");
        assert_eq!(found.entries, [0x4028, 0x3000, 0x2000, 0x1000, 0]);
        assert_eq!((found.size(), found.global), (PageSize::Base, false));
        assert_eq!(found.physical(0x5123), 0x77_7123);
    }

    #[test]
    fn large_pages_end_the_walk_early() {
        let found = registers().walk(&tables(), 0x20_1234).expect("it is mapped");
        assert_eq!(found.entries, [0, 0x3008, 0x2000, 0x1000, 0]);
        assert_eq!((found.size(), found.global), (PageSize::Huge, true));
        assert_eq!(found.physical(0x20_1234), 0x1234_5660_1234);
        let found = registers().walk(&tables(), 0x8000_0000).expect("it is mapped");
        assert_eq!((found.size(), found.frame), (PageSize::Giant, 0x8_c000_0000));
    }

    #[test]
    fn global_pages_need_their_bit_in_cr4() {
        let plain = ControlRegisters { cr4: CR4_PAE, ..registers() };
        assert!(!plain.walk(&tables(), 0x20_0000).expect("it is mapped").global);
    }

    #[test]
    fn what_is_not_present_has_no_translation() {
        assert_eq!(registers().walk(&tables(), 0xe0_0000), None);
        assert_eq!(registers().walk(&tables(), 0x6000), None);
    }

    #[test]
    fn five_levels_where_the_guest_has_them() {
        let mut tables = tables();
        tables.0.insert(0x9000, 0x1001);
        let five = ControlRegisters { cr3: 0x9000, cr4: registers().cr4 | CR4_LA57, ..registers() };
        let found = five.walk(&tables, 0x5000).expect("it is mapped");
        assert_eq!((found.top, found.entries[4]), (5, 0x9000));
    }

    /// The groups of 16 base pages with these entries, from 0x1_0000 on.
    fn groups(entries: [u64; 16]) -> [u8; 16] {
        let mut tables = tables();
        for (page, entry) in (0..).zip(entries) {
            tables.0.insert(0x4000 + 8 * (16 + page), entry);
        }
        let mut found = [0; 16];
        for (page, group) in (0..).zip(&mut found) {
            let address = 0x1_0000 + page * 4096;
            *group = registers().walk(&tables, address).map_or(u8::MAX, |found| found.group);
        }
        found
    }

    #[test]
    fn groups_are_as_large_as_what_lies_in_order() {
        let mut entries = [0; 16];
        for (page, entry) in (0..).zip(&mut entries) {
            *entry = 0x70_0021 + page * 4096;
        }
        assert_eq!(groups(entries), [4; 16]);
        // Frames are aligned to as much as groups of two.
        assert_eq!(groups(entries.map(|entry| entry + 0x2000)), [1; 16]);
        assert_eq!(groups(entries.map(|entry| entry + 0x1000)), [0; 16]);
        // The eighth page is elsewhere.
        let mut hole = entries;
        hole[7] += 0x100_0000;
        assert_eq!(groups(hole), [2, 2, 2, 2, 1, 1, 0, 0, 3, 3, 3, 3, 3, 3, 3, 3]);
        // The first is absent.
        hole = entries;
        hole[0] = 0;
        assert_eq!(groups(hole), [255, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3]);
        // A processor sets the accessed bit of the page that it walks to, not of others.
        hole = entries;
        hole[5] &= !ACCESSED;
        assert_eq!(groups(hole), [2, 2, 2, 2, 0, 4, 1, 1, 3, 3, 3, 3, 3, 3, 3, 3]);
        assert_eq!(groups(entries.map(|entry| entry & !ACCESSED)), [0; 16]);
    }

    #[test]
    fn larger_pages_are_in_no_group() {
        for address in [0x20_1234, 0x8000_0000] {
            assert_eq!(registers().walk(&tables(), address).expect("it is mapped").group, 0);
        }
    }

    #[test]
    fn paging_is_off_until_both_bits_are_set() {
        assert!(registers().paging());
        assert!(!ControlRegisters { cr0: 0, ..registers() }.paging());
        assert!(!ControlRegisters { cr4: 0, ..registers() }.paging());
    }
}

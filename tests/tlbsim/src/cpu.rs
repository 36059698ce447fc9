//! One processor's TLBs and walker, told of every access and every flush.

use std::sync::Arc;

use crate::bank::{Bank, Key, GLOBAL};
use crate::counters::LiveCounters;
use crate::host::HostMap;
use crate::paging::{PageSize, Translation};
use crate::profile::{FractureFlush, Profile, TlbBank};
use crate::walk::{kind, Walker};

/// Entries for groups of `1 << group` base pages have the kind `GROUPS + group`; those
/// below are for single pages of each size.
const GROUPS: u8 = 2;

/// No page has this number: addresses have at most 64 bits.
const NO_PAGE: u64 = u64::MAX;

/// What a TLB entry knows beside its key.
#[derive(Clone, Copy, Debug, Default)]
struct Mapping {
    /// Size of the guest's page that it is of, or of a part of.
    guest: PageSize,
    /// Whether it is in every address space.
    global: bool,
}

/// What an entry covers.
#[derive(Clone, Copy, Debug)]
enum Extent {
    /// A page.
    Page(PageSize),
    /// An aligned group of base pages, by log2 of their number, in the place of one.
    Group(u8),
}

impl Extent {
    fn of(kind: u8) -> Self {
        match PageSize::ALL.get(usize::from(kind)) {
            Some(&size) => Extent::Page(size),
            None => Extent::Group(kind - GROUPS),
        }
    }

    /// log2 of its size in bytes.
    fn shift(self) -> u32 {
        match self {
            Extent::Page(size) => size.shift(),
            Extent::Group(group) => PageSize::Base.shift() + u32::from(group),
        }
    }

    fn key(self, address: u64, space: u8) -> Key {
        let kind = match self {
            Extent::Page(size) => kind(size),
            Extent::Group(group) => GROUPS + group,
        };
        Key { number: address >> self.shift(), kind, space }
    }
}

/// One level of the TLB: banks that hold some sizes of pages each.
#[derive(Clone, Debug)]
struct Level {
    banks: Vec<(&'static [PageSize], Bank<Mapping>)>,
    /// The groups that entries for base pages may hold; 0 for none.
    group: u8,
}

impl Mapping {
    /// The space of its entry, in a processor that is in `space`.
    fn space(self, space: u8) -> u8 {
        if self.global {
            GLOBAL
        } else {
            space
        }
    }
}

/// Whether an entry covers an address.
fn covers(key: Key, address: u64) -> bool {
    key.number == address >> Extent::of(key.kind).shift()
}

/// First address of an entry.
fn start(key: Key) -> u64 {
    key.number << Extent::of(key.kind).shift()
}

impl Level {
    fn new(banks: &[TlbBank], group: u8) -> Self {
        let banks = banks.iter().map(|bank| (bank.sizes, Bank::new(bank.geometry))).collect();
        Level { banks, group }
    }

    /// The entry for an address: what it covers, and what it knows.
    fn find(&mut self, address: u64, space: u8) -> Option<(Extent, Mapping)> {
        for (sizes, bank) in &mut self.banks {
            for &size in *sizes {
                // A group comes before its pages: what was there of them when they were
                // merged is not used any more, and goes.
                if self.group > 0 && size == PageSize::Base {
                    let extent = Extent::Group(self.group);
                    if let Some(mapping) = bank.find(extent.key(address, space)) {
                        return Some((extent, mapping));
                    }
                }
                let extent = Extent::Page(size);
                if let Some(mapping) = bank.find(extent.key(address, space)) {
                    return Some((extent, mapping));
                }
            }
        }
        None
    }

    /// Puts an entry in: into the bank whose victim has waited longest, of those
    /// that hold its size or else the next smaller one. A group is held as a base page
    /// is.
    fn insert(&mut self, address: u64, mut extent: Extent, space: u8, mapping: Mapping) {
        let held = |size| self.banks.iter().any(|(sizes, _)| sizes.contains(&size));
        let size = match &mut extent {
            Extent::Group(_) => PageSize::Base,
            Extent::Page(size) => {
                while *size > PageSize::Base && !held(*size) {
                    *size = if *size == PageSize::Giant { PageSize::Huge } else { PageSize::Base };
                }
                *size
            }
        };
        let key = extent.key(address, space);
        let target = self
            .banks
            .iter_mut()
            .filter(|(sizes, _)| sizes.contains(&size))
            .filter_map(|(_, bank)| Some((bank.victim_age(key.number)?, bank)))
            .min_by_key(|(age, _)| *age);
        if let Some((_, bank)) = target {
            bank.insert(key, mapping);
        }
    }

    fn remove(&mut self, gone: impl Fn(Key, Mapping) -> bool) {
        for (_, bank) in &mut self.banks {
            bank.remove(&gone);
        }
    }
}

/// A processor.
#[derive(Debug)]
pub struct Cpu {
    profile: Profile,
    l1: Level,
    l2: Level,
    walker: Walker,
    space: u8,
    /// Base page of the last access: its entry is the newest of the first
    /// level, so that another access to it changes nothing.
    last: u64,
    /// Whether parts of guest huge pages may be in the TLB.
    fractured: bool,
    counters: Arc<LiveCounters>,
}

impl Cpu {
    /// A processor with empty TLBs.
    #[must_use]
    pub fn new(profile: Profile, counters: Arc<LiveCounters>) -> Self {
        Cpu {
            l1: Level::new(profile.l1, profile.group),
            l2: Level::new(profile.l2, profile.group),
            walker: Walker::new(&profile),
            profile,
            space: 0,
            last: NO_PAGE,
            fractured: false,
            counters,
        }
    }

    /// What it has counted.
    #[must_use]
    pub fn counters(&self) -> &Arc<LiveCounters> {
        &self.counters
    }

    /// An access to `address`. Where the TLB has no entry, `translate` walks the
    /// guest's page tables.
    pub fn access(
        &mut self,
        address: u64,
        host: &HostMap,
        translate: impl FnOnce(u64) -> Option<Translation>,
    ) {
        let page = address >> PageSize::Base.shift();
        let user = u64::from(address >> 63 == 0);
        if page == self.last || self.l1.find(address, self.space).is_some() {
            self.counters.l1_hits.add(1);
        } else if let Some((extent, mapping)) = self.l2.find(address, self.space) {
            self.counters.l2_hits.add(1);
            self.l1.insert(address, extent, mapping.space(self.space), mapping);
        } else {
            let Some(translation) = translate(address) else {
                self.skip();
                return;
            };
            self.counters.tlb_misses.add(1);
            self.counters.user_tlb_misses.add(user);
            self.fill(address, &translation, host);
        }
        self.last = page;
        self.counters.accesses.add(1);
        self.counters.user_accesses.add(user);
    }

    /// An access that is none to the guest's memory, or that its page tables have
    /// nothing for.
    pub fn skip(&mut self) {
        self.counters.skipped.add(1);
    }

    fn fill(&mut self, address: u64, translation: &Translation, host: &HostMap) {
        let reads = self.walker.walk(address, self.space, translation, host);
        self.counters.page_walk_refs.add(reads);
        let guest_size = translation.size();
        let host_size = host.page_size(translation.physical(address));
        let corner = match (guest_size > PageSize::Base, host_size > PageSize::Base) {
            (false, false) => &self.counters.misses_base,
            (true, false) => &self.counters.misses_guest_only,
            (false, true) => &self.counters.misses_host_only,
            (true, true) => &self.counters.misses_aligned,
        };
        corner.add(1);
        let size = guest_size.min(host_size);
        self.fractured |= size < guest_size;
        let mapping = Mapping { guest: guest_size, global: translation.global };
        let space = mapping.space(self.space);
        // A group needs both layers to have its pages one after another. Of the host that
        // is known where it has a huge page, which each group lies in as a whole; where
        // its base pages are is not known, so none counts as the neighbour of another.
        let group = self.profile.group;
        let merged = group > 0 && translation.group >= group && host_size > PageSize::Base;
        let extent = if merged { Extent::Group(group) } else { Extent::Page(size) };
        self.counters.misses_coalesced.add(u64::from(merged));
        self.l1.insert(address, extent, space, mapping);
        self.l2.insert(address, extent, space, mapping);
    }

    /// Flushes the page of `address` in the present address space, also where it
    /// is global (INVLPG).
    pub fn flush_page(&mut self, address: u64) {
        self.counters.page_flushes.add(1);
        self.last = NO_PAGE;
        if self.fractured && self.profile.fracture == FractureFlush::Everything {
            self.counters.fracture_flushes.add(1);
            self.empty();
            return;
        }
        let space = self.space;
        // Every part of the guest's page goes, and what the page was merged into.
        let gone = |key: Key, mapping: Mapping| {
            let part = mapping.guest.start(start(key)) == mapping.guest.start(address);
            (key.space == space || key.space == GLOBAL) && (part || covers(key, address))
        };
        self.l1.remove(gone);
        self.l2.remove(gone);
        // Intel SDM volume 3A, 5.10.4.1: all paging-structure caches of the
        // address space, whatever the address.
        self.walker.forget_guest(Some(space));
    }

    /// Flushes all pages of the present address space that are not global.
    pub fn flush_space(&mut self) {
        self.counters.space_flushes.add(1);
        self.last = NO_PAGE;
        let space = self.space;
        self.l1.remove(|key, _| key.space == space);
        self.l2.remove(|key, _| key.space == space);
        self.walker.forget_guest(Some(space));
    }

    /// Goes to another address space, whose entries may be there from before.
    pub fn switch_space(&mut self, space: u8) {
        self.space = space;
        self.last = NO_PAGE;
    }

    /// Flushes all pages of all address spaces.
    pub fn flush_all(&mut self) {
        self.counters.full_flushes.add(1);
        self.empty();
    }

    /// The host changed its page tables. KVM then has every virtual processor
    /// of the guest flush everything.
    pub fn host_changed(&mut self) {
        self.counters.host_flushes.add(1);
        self.empty();
        self.walker.forget_all();
    }

    fn empty(&mut self) {
        self.last = NO_PAGE;
        self.fractured = false;
        self.l1.remove(|_, _| true);
        self.l2.remove(|_, _| true);
        self.walker.forget_guest(None);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::bank::Geometry;
    use crate::host::RamLayout;
    use crate::paging::tests::{registers, Tables};
    use crate::paging::GROUP_LIMIT;
    use crate::profile::{ALL, BROADWELL, ZEN4};

    const MIB: u64 = 1 << 20;
    const RAM: u64 = 1 << 30;

    /// A guest that maps each virtual address to the same physical one.
    fn identity(size: PageSize, global: bool) -> impl Fn(u64) -> Option<Translation> + Copy {
        move |address| {
            let level = size.level();
            let mut entries = [0; 5];
            for (index, entry) in (0..).zip(&mut entries).take(4).skip(usize::from(level) - 1) {
                *entry = 4096 * (index + 1);
            }
            Some(Translation {
                entries,
                top: 4,
                frame: size.start(address),
                level,
                global,
                group: 0,
            })
        }
    }

    fn host(huge: bool) -> HostMap {
        let mut map = HostMap::new(RamLayout::q35(RAM), PageSize::Huge);
        if huge {
            map.set_huge(0, RAM);
        }
        map
    }

    fn cpu(profile: Profile) -> Cpu {
        Cpu::new(profile, Arc::default())
    }

    fn misses(cpu: &Cpu) -> u64 {
        cpu.counters.tlb_misses.get()
    }

    /// Base pages in the largest groups that there are.
    fn neighbours(address: u64) -> Option<Translation> {
        let translation = identity(PageSize::Base, false)(address);
        translation.map(|translation| Translation { group: GROUP_LIMIT, ..translation })
    }

    /// Touches every base page of `bytes` from 2 MiB on, twice.
    fn twice_on(
        profile: Profile,
        huge_host: bool,
        bytes: u64,
        guest: impl Fn(u64) -> Option<Translation> + Copy,
    ) -> (u64, u64) {
        let mut cpu = cpu(profile);
        let host = host(huge_host);
        let mut once = || {
            let before = misses(&cpu);
            for address in (2 * MIB..2 * MIB + bytes).step_by(4096) {
                cpu.access(address, &host, guest);
            }
            misses(&cpu) - before
        };
        (once(), once())
    }

    fn twice(guest: PageSize, huge_host: bool, bytes: u64) -> (u64, u64) {
        twice_on(BROADWELL, huge_host, bytes, identity(guest, false))
    }

    #[test]
    fn an_entry_is_as_large_as_the_smaller_of_both_pages() {
        // 16 MiB are 4096 base pages, more than the 1536 entries hold.
        assert_eq!(twice(PageSize::Base, false, 16 * MIB), (4096, 4096));
        assert_eq!(twice(PageSize::Base, true, 16 * MIB), (4096, 4096));
        assert_eq!(twice(PageSize::Huge, false, 16 * MIB), (4096, 4096));
        assert_eq!(twice(PageSize::Huge, true, 16 * MIB), (8, 0));
        // The guest's direct map: pages of 1 GiB, of which the host's blocks
        // are what counts.
        assert_eq!(twice(PageSize::Giant, true, 16 * MIB), (8, 0));
        assert_eq!(twice(PageSize::Giant, false, 16 * MIB), (4096, 4096));
        // 4 MiB of base pages fit.
        assert_eq!(twice(PageSize::Base, false, 4 * MIB), (1024, 0));
    }

    #[test]
    fn corners_are_told_apart() {
        let mut cpu = cpu(BROADWELL);
        for (guest, huge) in
            [(PageSize::Base, false), (PageSize::Huge, false), (PageSize::Huge, true)]
        {
            cpu.flush_all();
            cpu.access(4 * MIB, &host(huge), identity(guest, false));
        }
        let counted = cpu.counters.snapshot();
        assert_eq!(
            (counted.misses_base, counted.misses_guest_only, counted.misses_host_only),
            (1, 1, 0)
        );
        assert_eq!(counted.misses_aligned, 1);
    }

    #[test]
    fn the_first_level_is_refilled_from_the_second() {
        let mut cpu = cpu(BROADWELL);
        let host = host(false);
        // Five pages of one set of four in the first level; in the second, with
        // its 256 sets, each has a set of its own.
        for round in 0..2 {
            for page in 0..5 {
                cpu.access(2 * MIB + page * 16 * 4096, &host, identity(PageSize::Base, false));
            }
            let counted = cpu.counters.snapshot();
            assert_eq!((counted.tlb_misses, counted.l2_hits), (5, 5 * round));
        }
    }

    #[test]
    fn a_flush_of_a_space_spares_global_pages_and_a_full_one_does_not() {
        let mut cpu = cpu(BROADWELL);
        let host = host(false);
        cpu.access(2 * MIB, &host, identity(PageSize::Base, false));
        cpu.access(4 * MIB, &host, identity(PageSize::Base, true));
        cpu.flush_space();
        cpu.access(4 * MIB, &host, identity(PageSize::Base, true));
        assert_eq!(misses(&cpu), 2);
        cpu.access(2 * MIB, &host, identity(PageSize::Base, false));
        assert_eq!(misses(&cpu), 3);
        cpu.flush_all();
        cpu.access(4 * MIB, &host, identity(PageSize::Base, true));
        assert_eq!(misses(&cpu), 4);
    }

    #[test]
    fn spaces_keep_their_entries_apart() {
        let mut cpu = cpu(BROADWELL);
        let host = host(false);
        for space in [1, 2, 1, 2] {
            cpu.switch_space(space);
            cpu.access(2 * MIB, &host, identity(PageSize::Base, false));
        }
        assert_eq!(misses(&cpu), 2);
    }

    #[test]
    fn one_page_is_flushed_and_its_neighbour_stays() {
        let mut cpu = cpu(BROADWELL);
        let host = host(false);
        let page = identity(PageSize::Base, false);
        cpu.access(2 * MIB, &host, page);
        cpu.access(2 * MIB + 4096, &host, page);
        cpu.flush_page(2 * MIB + 8);
        cpu.access(2 * MIB + 4096, &host, page);
        assert_eq!(misses(&cpu), 2);
        cpu.access(2 * MIB, &host, page);
        assert_eq!(misses(&cpu), 3);
    }

    #[test]
    fn flush_of_a_fractured_page_takes_all_its_parts_or_everything() {
        for (profile, bystander_stays) in [(BROADWELL, false), (ZEN4, true)] {
            let mut cpu = cpu(profile);
            let host = host(false);
            let (huge, base) = (identity(PageSize::Huge, false), identity(PageSize::Base, false));
            cpu.access(4 * MIB, &host, huge);
            cpu.access(4 * MIB + 4096, &host, huge);
            cpu.access(8 * MIB, &host, base);
            cpu.flush_page(4 * MIB + 4096);
            assert_eq!(misses(&cpu), 3);
            cpu.access(4 * MIB, &host, huge);
            assert_eq!(misses(&cpu), 4, "{}", profile.name);
            cpu.access(8 * MIB, &host, base);
            assert_eq!(misses(&cpu), if bystander_stays { 4 } else { 5 }, "{}", profile.name);
        }
    }

    #[test]
    fn an_aligned_huge_page_is_flushed_by_any_of_its_addresses() {
        let mut cpu = cpu(BROADWELL);
        let host = host(true);
        let huge = identity(PageSize::Huge, false);
        cpu.access(4 * MIB, &host, huge);
        cpu.access(8 * MIB, &host, huge);
        cpu.flush_page(5 * MIB);
        assert_eq!(cpu.counters.fracture_flushes.get(), 0);
        cpu.access(8 * MIB, &host, huge);
        assert_eq!(misses(&cpu), 2);
        cpu.access(4 * MIB, &host, huge);
        assert_eq!(misses(&cpu), 3);
    }

    #[test]
    fn what_cannot_be_translated_is_counted_apart() {
        let mut cpu = cpu(BROADWELL);
        for _ in 0..2 {
            cpu.access(4 * MIB, &host(false), |_| None);
        }
        let counted = cpu.counters.snapshot();
        assert_eq!((counted.skipped, counted.accesses), (2, 0));
    }

    #[test]
    fn a_changed_host_costs_every_entry() {
        let mut cpu = cpu(BROADWELL);
        let page = identity(PageSize::Base, true);
        cpu.access(4 * MIB, &host(false), page);
        cpu.host_changed();
        cpu.access(4 * MIB, &host(true), page);
        assert_eq!((misses(&cpu), cpu.counters.misses_host_only.get()), (2, 1));
    }

    #[test]
    fn pages_of_1_gib_are_held_in_parts_where_the_second_level_has_none() {
        let mut cpu = cpu(ZEN4);
        let mut giant = HostMap::new(RamLayout::q35(RAM), PageSize::Giant);
        giant.set_huge(0, RAM);
        let guest = identity(PageSize::Giant, false);
        cpu.access(4 * MIB, &giant, guest);
        // The first level has all of it.
        cpu.access(512 * MIB, &giant, guest);
        assert_eq!((misses(&cpu), cpu.counters.l1_hits.get()), (1, 1));
        cpu.l1.remove(|_, _| true);
        cpu.last = NO_PAGE;
        cpu.access(4 * MIB, &giant, guest);
        cpu.access(512 * MIB, &giant, guest);
        assert_eq!((misses(&cpu), cpu.counters.l2_hits.get()), (2, 1));
    }

    #[test]
    fn merging_makes_entries_for_base_pages_larger_and_no_others() {
        let merging = |pages| BROADWELL.coalescing(pages).expect("a power of two");
        // 4096 base pages over huge pages of the host, and 1536 entries: two a page are
        // too many, four fit, in 256 sets of six.
        assert_eq!(twice_on(merging(1), true, 16 * MIB, neighbours), (4096, 4096));
        assert_eq!(twice_on(merging(2), true, 16 * MIB, neighbours), (2048, 2048));
        assert_eq!(twice_on(merging(4), true, 16 * MIB, neighbours), (1024, 0));
        assert_eq!(twice_on(merging(8), true, 16 * MIB, neighbours), (512, 0));
        assert_eq!(twice_on(merging(16), true, 16 * MIB, neighbours), (256, 0));
        // Not known of the host's base pages.
        assert_eq!(twice_on(merging(4), false, 16 * MIB, neighbours), (4096, 4096));
        for (guest, huge_host, expected) in [
            (PageSize::Base, true, (4096, 4096)),
            (PageSize::Huge, false, (4096, 4096)),
            (PageSize::Huge, true, (8, 0)),
            (PageSize::Giant, true, (8, 0)),
            (PageSize::Giant, false, (4096, 4096)),
        ] {
            let guest = identity(guest, false);
            assert_eq!(twice_on(merging(4), huge_host, 16 * MIB, guest), expected);
        }
    }

    /// First address of the pages of the tests below.
    const VIRTUAL: u64 = 4 * MIB;

    /// Present, writable, the user's, accessed, dirty.
    const PLAIN: u64 = 0x67;

    /// Entries of 16 base pages that lie one after another, from 8 MiB on.
    fn in_order() -> [u64; 16] {
        let mut entries = [0; 16];
        for (page, entry) in (0..).zip(&mut entries) {
            *entry = 8 * MIB + page * 4096 + PLAIN;
        }
        entries
    }

    fn tables(entries: &[u64]) -> Tables {
        let mut tables = Tables::default();
        tables.0.extend([(0x1000, 0x2067), (0x2000, 0x3067), (0x3010, 0x4067)]);
        tables.0.extend((0..).zip(entries).map(|(page, &entry)| (0x4000 + 8 * page, entry)));
        tables
    }

    /// A processor that merges `pages` pages, and touches some pages of such tables.
    fn touch(pages: u32, entries: &[u64], huge_host: bool, touched: &[u64]) -> Cpu {
        let mut cpu = cpu(ZEN4.coalescing(pages).expect("a power of two"));
        touch_again(&mut cpu, entries, huge_host, touched);
        cpu
    }

    fn touch_again(cpu: &mut Cpu, entries: &[u64], huge_host: bool, touched: &[u64]) {
        let (tables, host) = (tables(entries), host(huge_host));
        for page in touched {
            cpu.access(VIRTUAL + page * 4096, &host, |address| registers().walk(&tables, address));
        }
    }

    #[test]
    fn pages_in_order_share_an_entry() {
        let all: Vec<_> = (0..16).chain(0..16).collect();
        for (pages, expected) in [(1, 16), (2, 8), (4, 4), (8, 2), (16, 1)] {
            let counted = touch(pages, &in_order(), true, &all).counters.snapshot();
            assert_eq!((counted.accesses, counted.skipped), (32, 0));
            assert_eq!((counted.tlb_misses, counted.l1_hits), (expected, 32 - expected));
            assert_eq!(counted.misses_host_only, expected);
            assert_eq!(counted.misses_coalesced, if pages == 1 { 0 } else { expected });
        }
    }

    #[test]
    fn looking_at_neighbours_reads_no_tables() {
        let reads = |pages| touch(pages, &in_order(), true, &[5]).counters.page_walk_refs.get();
        assert_eq!((reads(4), reads(16)), (reads(1), reads(1)));
    }

    #[test]
    fn pages_are_not_merged_where_one_does_not_fit() {
        // Four pages, the third of which is as the entry says: each has its own entry.
        let third = 8 * MIB + 2 * 4096;
        for (entry, why) in [
            (third + (PLAIN & !2), "read-only"),
            (third + (PLAIN & !4), "the kernel's"),
            (third + (PLAIN & !0x40), "not dirty"),
            (third + (PLAIN | 0x10), "not cached"),
            (third + (PLAIN | 0x80), "of another memory type"),
            (third + (PLAIN | 0x100), "global"),
            (third + (PLAIN | 1 << 63), "not to be executed"),
            (third + (PLAIN | 1 << 59), "of another protection key"),
            (third + MIB + PLAIN, "elsewhere"),
            (third + 4096 + PLAIN, "where the fourth is"),
        ] {
            let mut entries = in_order();
            entries[2] = entry;
            let cpu = touch(4, &entries, true, &[0, 1, 2, 3, 0, 1, 2, 3]);
            assert_eq!((misses(&cpu), cpu.counters.misses_coalesced.get()), (4, 0), "{why}");
        }
        // Not accessed: it fits as soon as it is walked to itself.
        let mut entries = in_order();
        entries[2] &= !0x20;
        let mut cpu = touch(4, &entries, true, &[0, 1, 3]);
        assert_eq!((misses(&cpu), cpu.counters.misses_coalesced.get()), (3, 0));
        touch_again(&mut cpu, &entries, true, &[2, 0, 1, 3]);
        assert_eq!((misses(&cpu), cpu.counters.misses_coalesced.get()), (4, 1));
        // Absent: what is there of it besides does not matter.
        let mut entries = in_order();
        entries[2] -= 1;
        let counted = touch(4, &entries, true, &[0, 1, 2, 3]).counters.snapshot();
        assert_eq!((counted.tlb_misses, counted.skipped, counted.misses_coalesced), (3, 1, 0));
        // The kernel's own bits do not matter to a processor.
        let mut entries = in_order();
        entries[2] |= 1 << 9 | 1 << 58;
        assert_eq!(misses(&touch(4, &entries, true, &[0, 1, 2, 3])), 1);
    }

    #[test]
    fn pages_are_not_merged_out_of_order_or_across_groups() {
        let mut entries = in_order();
        entries.swap(0, 1);
        assert_eq!(misses(&touch(4, &entries, true, &[0, 1, 2, 3])), 4);
        // Backwards.
        let mut entries = in_order();
        entries[..4].reverse();
        assert_eq!(misses(&touch(4, &entries, true, &[0, 1, 2, 3])), 4);
        // In order, but each a page further than an entry of four could tell.
        let entries = in_order().map(|entry| entry + 4096);
        assert_eq!(misses(&touch(4, &entries, true, &[0, 1, 2, 3])), 4);
        // Groups of other four pages fit; of these, none is aligned.
        let mut entries = in_order();
        (entries[0], entries[7]) = (0, 0);
        assert_eq!(misses(&touch(4, &entries, true, &[1, 2, 3, 4, 5, 6])), 6);
        // Half a group is none, but a group of its own where they are smaller.
        assert_eq!(misses(&touch(2, &entries, true, &[1, 2, 3, 4, 5, 6])), 4);
    }

    #[test]
    fn pages_are_not_merged_where_the_host_has_base_pages() {
        let cpu = touch(4, &in_order(), false, &[0, 1, 2, 3]);
        assert_eq!((misses(&cpu), cpu.counters.misses_base.get()), (4, 4));
        assert_eq!(cpu.counters.misses_coalesced.get(), 0);
    }

    #[test]
    fn a_flush_of_one_page_drops_what_it_was_merged_into() {
        for flushed in 0..4 {
            let mut cpu = touch(4, &in_order(), true, &[0, 4, 1, 2, 3]);
            assert_eq!(misses(&cpu), 2);
            cpu.flush_page(VIRTUAL + flushed * 4096 + 123);
            touch_again(&mut cpu, &in_order(), true, &[4, 5, 6, 7]);
            assert_eq!(misses(&cpu), 2, "the other group stays");
            touch_again(&mut cpu, &in_order(), true, &[3, 2, 1, 0]);
            assert_eq!(misses(&cpu), 3);
        }
    }

    #[test]
    fn what_was_merged_is_flushed_with_its_space_and_kept_apart() {
        let mut cpu = cpu(ZEN4.coalescing(4).expect("a power of two"));
        for (space, expected) in [(1, 1), (2, 2), (1, 2), (2, 2)] {
            cpu.switch_space(space);
            touch_again(&mut cpu, &in_order(), true, &[0, 1]);
            assert_eq!(misses(&cpu), expected);
        }
        cpu.flush_space();
        touch_again(&mut cpu, &in_order(), true, &[2]);
        assert_eq!(misses(&cpu), 3);
        cpu.switch_space(1);
        touch_again(&mut cpu, &in_order(), true, &[3]);
        assert_eq!(misses(&cpu), 3);
        cpu.host_changed();
        touch_again(&mut cpu, &in_order(), true, &[0]);
        assert_eq!(misses(&cpu), 4);
    }

    #[test]
    fn the_first_level_is_refilled_with_groups() {
        let mut cpu = cpu(BROADWELL.coalescing(4).expect("a power of two"));
        let host = host(true);
        // Five groups of one set of four in the first level.
        let group = |number: u64| 2 * MIB + number * 16 * 4 * 4096;
        for round in 0..2 {
            for number in 0..5 {
                cpu.access(group(number), &host, neighbours);
            }
            let counted = cpu.counters.snapshot();
            assert_eq!((counted.tlb_misses, counted.l2_hits), (5, 5 * round));
        }
        cpu.access(group(4) + 4096, &host, neighbours);
        assert_eq!((misses(&cpu), cpu.counters.l1_hits.get()), (5, 1));
    }

    #[test]
    fn an_entry_from_before_pages_were_merged_goes() {
        let mut cpu = simple(2, 0);
        let four = BROADWELL.coalescing(4).expect("a power of two");
        (cpu.profile, cpu.l1.group) = (four, four.group);
        let host = host(true);
        let mut access = |address, merged| {
            let alone = identity(PageSize::Base, false);
            cpu.access(address, &host, |a| if merged { neighbours(a) } else { alone(a) });
            misses(&cpu)
        };
        assert_eq!(access(4 * MIB, false), 1);
        assert_eq!(access(4 * MIB + 4096, true), 2);
        // Both have this page: the group is what is used...
        assert_eq!(access(4 * MIB, true), 2);
        // ...so that the page's own entry is the victim of another.
        assert_eq!(access(8 * MIB, false), 3);
        assert_eq!(access(4 * MIB + 2 * 4096, true), 3);
    }

    /// A processor with fully associative TLBs.
    fn simple(l1: usize, l2: usize) -> Cpu {
        let bank = |entries| (&PageSize::ALL[..], Bank::<Mapping>::new(Geometry::full(entries)));
        let mut cpu = cpu(BROADWELL);
        cpu.l1.banks = vec![bank(l1)];
        cpu.l2.banks = vec![bank(l2)];
        cpu
    }

    proptest! {
        #[test]
        fn hits_and_misses_are_all_accesses(
            steps in prop::collection::vec((0_u64..3000, 0_u8..20), 0..400),
        ) {
            let mut cpu = cpu(BROADWELL);
            let host = host(false);
            for (page, action) in steps {
                match action {
                    0 => cpu.flush_page(page * 4096),
                    1 => cpu.flush_space(),
                    2 => cpu.switch_space(2),
                    _ => cpu.access(page * 4096, &host, identity(PageSize::Base, page % 7 == 0)),
                }
            }
            let counted = cpu.counters.snapshot();
            prop_assert_eq!(
                counted.l1_hits + counted.l2_hits + counted.tlb_misses,
                counted.accesses
            );
            let corners = counted.misses_base + counted.misses_aligned
                + counted.misses_guest_only + counted.misses_host_only;
            prop_assert_eq!(corners, counted.tlb_misses);
            prop_assert!(counted.page_walk_refs >= counted.tlb_misses);
            prop_assert!(counted.page_walk_refs <= 24 * counted.tlb_misses);
        }

        #[test]
        fn without_merging_neighbours_do_not_matter(
            steps in prop::collection::vec((0_u64..3000, 0_u8..20), 0..150),
        ) {
            let run = |profile: Profile, group| {
                let mut cpu = cpu(profile);
                let host = host(true);
                for &(page, action) in &steps {
                    match action {
                        0 => cpu.flush_page(page * 4096),
                        1 => cpu.flush_space(),
                        2 => cpu.switch_space(2),
                        _ => cpu.access(page * 4096, &host, |address| {
                            let found = identity(PageSize::Base, page % 7 == 0)(address);
                            found.map(|found| Translation { group, ..found })
                        }),
                    }
                }
                cpu.counters.snapshot()
            };
            for profile in ALL {
                let plain = run(profile, 0);
                prop_assert_eq!(run(profile, GROUP_LIMIT), plain);
                // Nor does it matter whether a processor merges where nothing can be.
                let merging = profile.coalescing(4).expect("a power of two");
                prop_assert_eq!(run(merging, 1), plain);
            }
        }

        #[test]
        fn a_larger_second_level_never_misses_more(
            pages in prop::collection::vec(0_u64..60, 0..400),
            small in 1_usize..40,
            more in 0_usize..40,
        ) {
            // Without a first level, whose hits would hide uses from the second.
            let run = |entries| {
                let mut cpu = simple(0, entries);
                for &page in &pages {
                    // The shortcut for the last page is as good as an entry.
                    cpu.access(page * 4096, &host(false), identity(PageSize::Base, false));
                }
                misses(&cpu)
            };
            prop_assert!(run(small + more) <= run(small));
        }
    }
}

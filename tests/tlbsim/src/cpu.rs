//! One processor's TLBs and walker, told of every access and every flush.

use std::sync::Arc;

use crate::bank::{Bank, Key, GLOBAL};
use crate::counters::LiveCounters;
use crate::host::HostMap;
use crate::paging::{PageSize, Translation};
use crate::profile::{FractureFlush, Profile, TlbBank};
use crate::walk::{kind, Walker};

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

/// One level of the TLB: banks that hold some sizes of pages each.
#[derive(Clone, Debug)]
struct Level {
    banks: Vec<(&'static [PageSize], Bank<Mapping>)>,
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

fn key(address: u64, size: PageSize, space: u8) -> Key {
    Key { number: address >> size.shift(), kind: kind(size), space }
}

/// First address of an entry.
fn start(key: Key) -> u64 {
    let size = PageSize::ALL[usize::from(key.kind)];
    key.number << size.shift()
}

impl Level {
    fn new(banks: &[TlbBank]) -> Self {
        Level { banks: banks.iter().map(|bank| (bank.sizes, Bank::new(bank.geometry))).collect() }
    }

    /// The entry for an address: its size, and what it knows.
    fn find(&mut self, address: u64, space: u8) -> Option<(PageSize, Mapping)> {
        for (sizes, bank) in &mut self.banks {
            for &size in *sizes {
                if let Some(mapping) = bank.find(key(address, size, space)) {
                    return Some((size, mapping));
                }
            }
        }
        None
    }

    /// Puts an entry in: into the bank whose victim has waited longest, of those
    /// that hold its size or else the next smaller one.
    fn insert(&mut self, address: u64, mut size: PageSize, space: u8, mapping: Mapping) {
        let held = |size| self.banks.iter().any(|(sizes, _)| sizes.contains(&size));
        while size > PageSize::Base && !held(size) {
            size = if size == PageSize::Giant { PageSize::Huge } else { PageSize::Base };
        }
        let key = key(address, size, space);
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
            l1: Level::new(profile.l1),
            l2: Level::new(profile.l2),
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
        } else if let Some((size, mapping)) = self.l2.find(address, self.space) {
            self.counters.l2_hits.add(1);
            self.l1.insert(address, size, mapping.space(self.space), mapping);
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
        self.l1.insert(address, size, space, mapping);
        self.l2.insert(address, size, space, mapping);
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
        // Every part of the guest's page goes.
        let gone = |key: Key, mapping: Mapping| {
            (key.space == space || key.space == GLOBAL)
                && mapping.guest.start(start(key)) == mapping.guest.start(address)
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
    use crate::profile::{BROADWELL, ZEN4};

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
            Some(Translation { entries, top: 4, frame: size.start(address), level, global })
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

    /// Touches every base page of `bytes` from 2 MiB on, twice.
    fn twice(guest: PageSize, huge_host: bool, bytes: u64) -> (u64, u64) {
        let mut cpu = cpu(BROADWELL);
        let host = host(huge_host);
        let mut once = || {
            let before = misses(&cpu);
            for address in (2 * MIB..2 * MIB + bytes).step_by(4096) {
                cpu.access(address, &host, identity(guest, false));
            }
            misses(&cpu) - before
        };
        (once(), once())
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

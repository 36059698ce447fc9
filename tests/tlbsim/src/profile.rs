//! Named geometries of real processors.
//!
//! Numbers of TLB entries are published; those of paging-structure caches are
//! not, for any of these processors. The ones here are the sizes that research
//! simulators assume (Bhattacharjee, "Large-reach memory management unit
//! caches", MICRO 2013, and, for nested paging, Bhargava et al., "Accelerating
//! two-dimensional page walks for virtualized systems", ASPLOS 2008), the same
//! in all profiles, so that they tell no processor from another.
//!
//! Costs in cycles are for estimates. What a hit of the second level costs is, for
//! Intel's processors, the weight that Intel's own top-down metrics have for it
//! (`tma_dtlb_load`, in the Linux kernel under `tools/perf/pmu-events/arch/x86`);
//! for Zen 4 it is assumed to be that of Ice Lake. For a walk it is assumed that
//! each read of a page table is a hit of the second level of the data cache, and
//! that this takes 12 cycles on Broadwell and 14 on the others: assumptions, too.
//! Page tables that do not fit there cost more; walks that overlap with other work,
//! or with each other, cost less.

use std::fmt;

use crate::bank::Geometry;
use crate::estimate::Costs;
use crate::paging::{PageSize, GROUP_LIMIT};

/// One array of a TLB.
#[derive(Clone, Copy, Debug)]
pub struct TlbBank {
    /// Its size.
    pub geometry: Geometry,
    /// Sizes of pages that it can hold.
    pub sizes: &'static [PageSize],
}

/// Sizes of the caches that shorten one dimension of a walk. An entry of the
/// cache of a level spares reading the tables of that level and of those above.
#[derive(Clone, Copy, Debug)]
pub struct WalkCaches {
    /// For entries of level 2 (2 MiB), 3 (1 GiB), 4 (512 GiB) and 5, in this order.
    pub levels: [Geometry; 4],
}

impl WalkCaches {
    /// No caches at all.
    pub const NONE: WalkCaches = WalkCaches { levels: [Geometry::full(0); 4] };

    const COMMON: WalkCaches = WalkCaches {
        levels: [Geometry::sets(32, 4), Geometry::full(4), Geometry::full(2), Geometry::full(2)],
    };
}

/// What a flush of a single page does where the guest's huge page is in the TLB
/// in fragments, because the host has base pages there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FractureFlush {
    /// Empties the TLB if it may hold fragments of any huge page: what Intel's
    /// processors were found to do (Amit, "Page fracturing", 2018).
    Everything,
    /// Removes the fragments of that huge page.
    Fragments,
}

/// A processor.
#[derive(Clone, Copy, Debug)]
pub struct Profile {
    /// What it is called on command lines.
    pub name: &'static str,
    /// First level, for data.
    pub l1: &'static [TlbBank],
    /// Second level, shared by page sizes. A page of a size that no bank holds
    /// is held as the largest smaller one.
    pub l2: &'static [TlbBank],
    /// Caches of the guest's page tables.
    pub guest_walk: WalkCaches,
    /// Caches of the host's.
    pub nested_walk: WalkCaches,
    /// Translations of guest physical pages as a whole.
    pub nested_tlb: Geometry,
    /// How pages are flushed.
    pub fracture: FractureFlush,
    /// What its TLBs cost.
    pub costs: Costs,
    /// log2 of how many neighbouring base pages one entry may hold; 0 where each has
    /// its own. See [`Profile::coalescing`].
    pub group: u8,
}

/// What follows the name of a profile that merges base pages, before their number.
const COALESCE: &str = "+coalesce";

impl Profile {
    /// The same processor, but with entries that hold `pages` base pages, where these
    /// can be merged: a power of two up to 16. 0 and 1 are for none. `None` if it is
    /// another number.
    #[must_use]
    pub fn coalescing(self, pages: u32) -> Option<Profile> {
        let pages = pages.max(1);
        let group = (0..=GROUP_LIMIT).find(|group| 1 << group == pages)?;
        Some(Profile { group, ..self })
    }
}

/// The name that [`find`] finds the profile by.
impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)?;
        if self.group > 0 {
            write!(f, "{COALESCE}{}", 1 << self.group)?;
        }
        Ok(())
    }
}

use PageSize::{Base, Giant, Huge};

/// L1 data TLBs of Intel's server cores from Haswell to Skylake: CPUID leaf 2
/// descriptors 03H (4 KiB, 4-way, 64) and 63H (2 MiB, 4-way, 32; 1 GiB, 4-way, 4),
/// Intel SDM volume 2A.
const INTEL_L1: &[TlbBank] = &[
    TlbBank { geometry: Geometry::sets(64, 4), sizes: &[Base] },
    TlbBank { geometry: Geometry::sets(32, 4), sizes: &[Huge] },
    TlbBank { geometry: Geometry::full(4), sizes: &[Giant] },
];

/// The processor of the Gemini paper, a Xeon E5-2620 v4 (Broadwell). Second
/// level: descriptor C3H (4 KiB and 2 MiB, 6-way, 1536; 1 GiB, 4-way, 16).
pub const BROADWELL: Profile = Profile {
    name: "broadwell",
    l1: INTEL_L1,
    l2: &[
        TlbBank { geometry: Geometry::sets(1536, 6), sizes: &[Base, Huge] },
        TlbBank { geometry: Geometry::sets(16, 4), sizes: &[Giant] },
    ],
    guest_walk: WalkCaches::COMMON,
    nested_walk: WalkCaches::COMMON,
    nested_tlb: Geometry::full(16),
    fracture: FractureFlush::Everything,
    costs: Costs { l2_hit: 8, table_read: 12 },
    group: 0,
};

/// Intel's Ice Lake (Sunny Cove). Source: Intel 64 and IA-32 Optimization
/// Reference Manual, TLB parameters of Ice Lake; the second level as its CPUID
/// leaf 18H tells it: 1024 entries for 4 KiB and 2 MiB, 1024 for 4 KiB and 1 GiB,
/// 8-way each. The small TLB of its own that stores have is left out.
pub const ICE_LAKE: Profile = Profile {
    name: "icelake",
    l1: &[
        TlbBank { geometry: Geometry::sets(64, 4), sizes: &[Base] },
        TlbBank { geometry: Geometry::sets(32, 4), sizes: &[Huge] },
        TlbBank { geometry: Geometry::full(8), sizes: &[Giant] },
    ],
    l2: &[
        TlbBank { geometry: Geometry::sets(1024, 8), sizes: &[Base, Huge] },
        TlbBank { geometry: Geometry::sets(1024, 8), sizes: &[Base, Giant] },
    ],
    costs: Costs { l2_hit: 7, table_read: 14 },
    ..BROADWELL
};

/// AMD's Zen 4. Source: Software Optimization Guide for the AMD Zen4
/// Microarchitecture (publication 57647), L1 and L2 data TLB: 72 entries, fully
/// associative, all sizes; 3072 entries for 4 KiB and 2 MiB, taken as 24-way. It
/// merges neighbouring base pages, four into one entry (`amdzen4/memory.json` in the
/// Linux kernel under `tools/perf/pmu-events/arch/x86`), which is left to an option:
/// what it takes for that is not published.
pub const ZEN4: Profile = Profile {
    name: "zen4",
    l1: &[TlbBank { geometry: Geometry::full(72), sizes: &[Base, Huge, Giant] }],
    l2: &[TlbBank { geometry: Geometry::sets(3072, 24), sizes: &[Base, Huge] }],
    fracture: FractureFlush::Fragments,
    costs: Costs { l2_hit: 7, table_read: 14 },
    ..BROADWELL
};

/// All profiles; the first is the default.
pub const ALL: [Profile; 3] = [BROADWELL, ICE_LAKE, ZEN4];

/// The profile of this name, which may end with `+coalesceN`: see
/// [`Profile::coalescing`].
#[must_use]
pub fn find(name: &str) -> Option<Profile> {
    let (name, pages) = match name.split_once(COALESCE) {
        Some((name, pages)) => (name, pages.parse().ok()?),
        None => (name, 0),
    };
    ALL.into_iter().find(|profile| profile.name == name)?.coalescing(pages)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_and_banks_consist_of_whole_sets() {
        for profile in ALL {
            assert_eq!(find(profile.name).expect("it is in the list").name, profile.name);
            for bank in profile.l1.iter().chain(profile.l2) {
                assert_eq!(bank.geometry.entries % bank.geometry.ways, 0);
            }
        }
        assert!(find("pentium").is_none());
    }

    #[test]
    fn merging_is_part_of_the_name_and_off_without_it() {
        for profile in ALL {
            assert_eq!((profile.group, profile.to_string().as_str()), (0, profile.name));
            for (pages, group) in [(2, 1), (4, 2), (8, 3), (16, 4)] {
                let merging = profile.coalescing(pages).expect("a power of two");
                assert_eq!(merging.group, group);
                let name = format!("{}+coalesce{pages}", profile.name);
                assert_eq!(merging.to_string(), name);
                assert_eq!(find(&name).expect("it has a name").group, group);
            }
            for off in [0, 1] {
                assert_eq!(profile.coalescing(off).expect("off").to_string(), profile.name);
            }
        }
        for wrong in ["3", "32", "-4", "", "4+coalesce4"] {
            assert!(find(&format!("zen4+coalesce{wrong}")).is_none(), "{wrong}");
        }
        assert!(find("+coalesce4").is_none());
    }

    #[test]
    fn every_size_has_a_place_in_the_first_level() {
        for profile in ALL {
            for size in PageSize::ALL {
                assert!(profile.l1.iter().any(|bank| bank.sizes.contains(&size)));
            }
        }
    }
}

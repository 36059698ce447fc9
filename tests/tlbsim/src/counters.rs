//! What is counted, live and as a snapshot.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// A number that one thread counts up and any may read.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// Adds to the number. For the one thread that counts: another's addition at
    /// the same time would be lost.
    pub fn add(&self, amount: u64) {
        // No read-modify-write: there is one writer, and this is on the way of
        // every access.
        self.0.store(self.0.load(Ordering::Relaxed) + amount, Ordering::Relaxed);
    }

    /// The number now.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($($(#[doc = $text:literal])+ $name:ident,)+) => {
        /// Counters of one processor, counted by its thread and read by any.
        #[derive(Debug, Default)]
        pub struct LiveCounters {
            $($(#[doc = $text])+ pub $name: Count,)+
        }

        /// Counters at a moment, or between two.
        // Old traces end without what was not counted yet.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct Counters {
            $($(#[doc = $text])+ pub $name: u64,)+
        }

        impl LiveCounters {
            /// All counters now.
            #[must_use]
            pub fn snapshot(&self) -> Counters {
                Counters { $($name: self.$name.get(),)+ }
            }
        }

        impl Counters {
            /// What was counted since `start`.
            #[must_use]
            pub fn since(&self, start: &Self) -> Self {
                Counters { $($name: self.$name - start.$name,)+ }
            }

            /// Both together.
            #[must_use]
            pub fn plus(&self, other: &Self) -> Self {
                Counters { $($name: self.$name + other.$name,)+ }
            }
        }
    };
}

counters! {
    /// Accesses to memory; one that crosses into another page counts twice.
    accesses,
    /// Those that the first level had an entry for.
    l1_hits,
    /// Those that only the second level had one for.
    l2_hits,
    /// Those that no level had one for: each is a walk.
    tlb_misses,
    /// Entries of page tables, the guest's and the host's, that walks read.
    page_walk_refs,
    /// Accesses to the lower half of the address space.
    user_accesses,
    /// Misses of such accesses.
    user_tlb_misses,
    /// Misses where guest and host both have base pages.
    misses_base,
    /// Misses where only the guest has a huge page.
    misses_guest_only,
    /// Misses where only the host has one.
    misses_host_only,
    /// Misses where both have one.
    misses_aligned,
    /// Misses after which one entry holds a group of base pages. Each is one where only
    /// the host has a huge page, too.
    misses_coalesced,
    /// Flushes of one page.
    page_flushes,
    /// Those that emptied the whole TLB, because it held fragments of a huge page.
    fracture_flushes,
    /// Flushes of one address space, and switches to one.
    space_flushes,
    /// Flushes of everything by the guest.
    full_flushes,
    /// Flushes because the host changed its page tables.
    host_flushes,
    /// Accesses that are none to memory, or that the guest's page tables have no
    /// entry for: counted nowhere else.
    skipped,
}

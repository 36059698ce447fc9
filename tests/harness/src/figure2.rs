//! When a TLB entry covers 2 MiB: on this machine's own processor, after figure 2
//! of the Gemini paper.
//!
//! No guest: a process whose mappings stand for a guest's page tables. Memory is
//! mapped in pieces of a base page, or of 2 MiB, whose neighbours are swapped so
//! that the kernel cannot join them, from a memory file of base pages, or of huge
//! ones, which stands for the host's. The processor has an entry of 2 MiB only
//! where both are huge, which is the rule of two layers; the walk behind a miss is
//! that of one, so that the times are not those of nested paging.

use std::fs::File;

use anyhow::{bail, ensure};
use gemini_pagemap::HUGE;

use crate::figures::{Bar, Scenario};
use crate::memory::BLOCK_SIZE;
use crate::rng::Rng;
use crate::settings::Held;
use crate::sys::{self, Event, EventCounter, Mapping, Pages, Whose, PAGE_SIZE};

const MAX_MAP_COUNT: &str = "/proc/sys/vm/max_map_count";
/// Mappings that this program has besides.
const OTHER_MAPPINGS: u64 = 4096;
const MIB: u64 = 1 << 20;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Bytes that are read at random, ascending powers of two.
    pub sizes: Vec<u64>,
    /// Rounds, each of them with every size in every combination.
    pub rounds: u32,
    /// Reads of one size in one combination in a round.
    pub reads: u64,
    /// Seed of everything random.
    pub seed: u64,
}

impl Plan {
    /// From what the caches hold to gigabytes, or a quick look.
    #[must_use]
    pub fn new(quick: bool, seed: u64) -> Self {
        let (largest, rounds, reads) =
            if quick { (256, 5, 500_000) } else { (2048, 15, 2_000_000) };
        let sizes = [1, 4, 16, 64, 256, 1024, 2048].into_iter().filter(|&size| size <= largest);
        Plan { sizes: sizes.map(|size| size * MIB).collect(), rounds, reads, seed }
    }
}

/// How memory is mapped from how it is backed.
struct Combination {
    name: &'static str,
    mapping: Mapping,
    huge: bool,
}

/// Measures.
///
/// # Errors
/// If the host has not the huge pages, or its settings cannot be made.
pub fn measure(plan: &Plan) -> anyhow::Result<Scenario> {
    let mut scenario = Scenario::new("figure2");
    scenario.arg("rounds", plan.rounds);
    scenario.arg("reads", plan.reads);
    scenario.arg("seed", plan.seed);
    scenario.arg("walk", "one-dimensional, of this machine: no nested paging");
    let (Some(&smallest), Some(&largest)) = (plan.sizes.first(), plan.sizes.last()) else {
        bail!("no size to measure");
    };
    let held = Held::shmem_enabled("never")?
        .and(MAX_MAP_COUNT, 2 * (largest / PAGE_SIZE) + OTHER_MAPPINGS)?;
    scenario.arg("shmem_enabled", held.describe());
    let combinations = combine(largest)?;
    for combination in &combinations {
        let mapped = mapped_huge(&combination.mapping)? as f64 / MIB as f64;
        let wanted = if combination.huge { largest as f64 / MIB as f64 } else { 0.0 };
        let name = format!("{}_mapped_huge_mib", combination.name);
        let bar = if combination.huge { Bar::AtLeast(wanted) } else { Bar::AtMost(wanted) };
        scenario.figure(&name, mapped, bar);
    }
    let counter = EventCounter::new(0, Event::DTLB_LOAD_MISSES, Whose::Program);
    if let Err(error) = &counter {
        scenario.arg("tlb_counter", format!("this machine has none: {error}"));
    }
    let counter = counter.ok();
    let mut random = Rng::new(plan.seed);
    let mut taken = vec![vec![(Vec::new(), Vec::new()); combinations.len()]; plan.sizes.len()];
    for round in 0..plan.rounds {
        for (taken, &size) in taken.iter_mut().zip(&plan.sizes) {
            // What comes first in a round changes from one to the next.
            for turn in 0..combinations.len() {
                let at = (turn + round as usize) % combinations.len();
                let seed = random.bits();
                let mapping = &combinations[at].mapping;
                // Not what another one left in the caches.
                mapping.read_at_random(size, plan.reads / 4, !seed);
                let before = counter.as_ref().map(EventCounter::read).transpose()?;
                let time = mapping.read_at_random(size, plan.reads, seed);
                taken[at].0.push(time.as_nanos() as f64 / plan.reads as f64);
                if let (Some(counter), Some(before)) = (&counter, before) {
                    let misses = counter.read()?.saturating_sub(before);
                    taken[at].1.push(misses as f64 / plan.reads as f64);
                }
            }
        }
    }
    let mut medians = Vec::new();
    for (taken, &size) in taken.iter_mut().zip(&plan.sizes) {
        let size = size / MIB;
        let mut of_size = Vec::new();
        for ((times, misses), combination) in taken.iter_mut().zip(&combinations) {
            let name = format!("{size}_mib_{}", combination.name);
            let [low, median, high] = quartiles(times);
            scenario.figure(&format!("{name}_ns"), median, Bar::None);
            scenario.figure(&format!("{name}_ns_spread"), high - low, Bar::None);
            if !misses.is_empty() {
                let [_, misses, _] = quartiles(misses);
                scenario.figure(&format!("{name}_misses_per_read"), misses, Bar::None);
            }
            of_size.push(median);
        }
        medians.push(of_size);
    }
    for (medians, &size) in medians.iter().zip(&plan.sizes) {
        let [.., both] = medians[..] else { bail!("nothing was measured") };
        for (median, combination) in medians.iter().zip(&combinations).take(3) {
            // Within the caches all are alike; beyond what entries of base pages
            // cover, no layer gains alone what both gain together.
            let bar = match size {
                _ if size == largest => Bar::Below(1.0),
                _ if size == smallest => Bar::AtMost(1.15),
                _ => Bar::None,
            };
            let name = format!("{}_mib_both_to_{}", size / MIB, combination.name);
            scenario.figure(&name, both / median, bar);
        }
    }
    Ok(scenario)
}

/// The four combinations of mapped and backed, both huge being the last one.
fn combine(size: u64) -> anyhow::Result<Vec<Combination>> {
    let base = sys::memfd(size, Pages::Any)?;
    let huge = sys::memfd(size, Pages::Any)?;
    for file in [&base, &huge] {
        let mapping = Mapping::new(file, size, BLOCK_SIZE, 0, true)?;
        mapping.fault_in(0, size)?;
        if std::ptr::eq(file, &huge) {
            mapping.advise(0, size, libc::MADV_COLLAPSE)?;
            ensure!(mapped_huge(&mapping)? == size, "the host has not enough huge pages");
        }
    }
    let map = |name, file: &File, piece, huge| -> anyhow::Result<Combination> {
        let mapping = Mapping::new(file, size, BLOCK_SIZE, 0, true)?;
        for pair in 0..size / (2 * piece) {
            let at = 2 * piece * pair;
            mapping.replace(at, file, at + piece, piece)?;
            mapping.replace(at + piece, file, at, piece)?;
        }
        mapping.fault_in(0, size)?;
        Ok(Combination { name, mapping, huge })
    };
    Ok(vec![
        map("none", &base, PAGE_SIZE, false)?,
        map("host_only", &huge, PAGE_SIZE, false)?,
        map("guest_only", &base, BLOCK_SIZE, false)?,
        map("both", &huge, BLOCK_SIZE, true)?,
    ])
}

/// Bytes that the processor's page tables map with huge pages.
fn mapped_huge(mapping: &Mapping) -> anyhow::Result<u64> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let start = mapping.address();
    let ranges = gemini_pagemap::ranges(&pagemap, &(start..start + mapping.len()), HUGE)?;
    Ok(ranges.iter().map(|range| range.end - range.start).sum())
}

/// Lower quartile, median, upper quartile.
fn quartiles(values: &mut [f64]) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    [1, 2, 3].map(|quarter| values[(values.len() - 1) * quarter / 4])
}

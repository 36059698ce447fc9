//! An aligned program ends, small allocations follow at once, and then a second
//! program: how many of the aligned blocks serve it again.

use anyhow::ensure;
use gemini_guest::protocol::{BlockState, Program, Storm, Stormed};
use gemini_harness::figures::{Bar, Scenario};

use super::fragmented::{Ground, Plan};
use crate::lab::Bench;
use crate::{BLOCK, MIB};

/// Share of the first program's aligned blocks that are to be aligned again.
const REUSED_BAR: f64 = 0.95;

/// Share of the first program's blocks that must be aligned for the rest to mean
/// anything.
const ALIGNED_BAR: f64 = 0.95;

/// Percent of the free memory that the small allocations take.
const STORM_PERCENT: u64 = 50;

/// What one guest has shown.
struct Run {
    fmfi: f64,
    aligned_share: f64,
    reused_share: f64,
    second_aligned_share: f64,
    stormed: Stormed,
    /// Formerly aligned blocks that small allocations have a page in.
    broken: u64,
    /// Counters of the driver, and by how much they grew after the first program
    /// had ended.
    counters: Vec<(&'static str, u64)>,
    complaints: usize,
}

/// What explains the figures.
const COUNTERS: [&str; 7] = [
    "rebooked",
    "expired",
    "returned_pressure",
    "returned_isolation",
    "placed",
    "placement_misses",
    "placement_declined",
];

/// Measures with the huge bucket and without it, in a guest whose free memory is
/// fragmented, and in one whose is not: there, what was freed last is what small
/// allocations break first.
///
/// # Errors
/// If guest, QEMU or daemon fail in a way that is no figure.
pub fn measure(bench: &Bench, seed: u64, quick: bool) -> anyhow::Result<Scenario> {
    let (memory, program) = if quick { (1024 * MIB, 128 * MIB) } else { (3072 * MIB, 512 * MIB) };
    let mut scenario = Scenario::new("reuse");
    scenario.arg("guest_memory", memory);
    scenario.arg("program_bytes", program);
    scenario.arg("storm_percent", STORM_PERCENT);
    scenario.arg("init_on_alloc", true);
    scenario.arg("shmem_enabled", "never");
    scenario.arg("policy", "gemini");
    for (prefix, fragmented, bucket) in [
        ("", true, true),
        ("no_bucket_", true, false),
        ("whole_", false, true),
        ("whole_no_bucket_", false, false),
    ] {
        eprintln!(
            "{} memory, {} bucket",
            if fragmented { "fragmented" } else { "whole" },
            if bucket { "with" } else { "without" }
        );
        let plan = Plan { name: "bench-reuse", memory, seed, fragmented, placement: true };
        let run = run(bench, &plan, program, bucket)?;
        let mut figure = |name: &str, value: f64, bar| {
            scenario.figure(&format!("{prefix}{name}"), value, bar);
        };
        let judged = |bar| if bucket { bar } else { Bar::None };
        if fragmented {
            figure("fmfi", run.fmfi, Bar::AtLeast(0.8));
        }
        figure("aligned_share", run.aligned_share, Bar::AtLeast(ALIGNED_BAR));
        figure("reused_share", run.reused_share, judged(Bar::AtLeast(REUSED_BAR)));
        figure("second_aligned_share", run.second_aligned_share, Bar::None);
        figure("storm_bytes", run.stormed.bytes() as f64, Bar::None);
        figure("storm_seconds", run.stormed.seconds, Bar::None);
        figure("broken_blocks", run.broken as f64, Bar::None);
        for (name, value) in run.counters {
            figure(name, value as f64, Bar::None);
        }
        figure("guest_complaints", run.complaints as f64, Bar::AtMost(0.0));
    }
    Ok(scenario)
}

fn run(bench: &Bench, plan: &Plan, bytes: u64, bucket: bool) -> anyhow::Result<Run> {
    let mut ground = Ground::prepare(bench, plan)?;
    let fmfi = ground.fmfi()?;
    ground.lab.vm.guest.set_driver("bucket", u64::from(bucket))?;
    ground.fill_stock(bytes / BLOCK)?;
    let program = Program { bytes, seed: plan.seed, blocks_per_second: 0.0 };
    let first = ground.touch("first", program.clone())?;
    // No stock from here on: another ready block would hide a lost one.
    let guest = &ground.lab.vm.guest;
    guest.set_driver("stock_floor", 0)?;
    guest.set_driver("stock_cap", 0)?;
    guest.set_driver("evacuation_rate", 0)?;
    guest.driver_command("free all")?;
    guest.verify_process("first")?;
    let aligned_share = first.aligned_share();
    ensure!(!first.aligned.is_empty(), "the first program has no aligned block");

    let free = guest.memory()?["MemFree"] + bytes;
    let storm = Storm { bytes: free * STORM_PERCENT / 100, seed: plan.seed };
    let before = counters(&ground)?;
    guest.end("first")?;
    let stormed = guest.storm("storm", storm)?;
    let second = ground.touch("second", program)?;
    let again = first.aligned.intersection(&second.aligned).count();
    let lost: Vec<_> = first.aligned.difference(&second.aligned).collect();
    if !lost.is_empty() {
        eprintln!("aligned before and not now: blocks {lost:?}");
    }
    let counters = std::iter::zip(counters(&ground)?, before)
        .map(|((name, now), (_, before))| (name, now - before))
        .collect();
    let broken = ground
        .lab
        .vm
        .guest
        .blocks()?
        .runs
        .iter()
        .filter(|run| run.state == BlockState::Base)
        .map(|run| first.aligned.range(run.first..run.first + run.count).count() as u64)
        .sum();
    let complaints = ground.check(&["second"])?;
    Ok(Run {
        fmfi,
        aligned_share,
        reused_share: again as f64 / first.aligned.len() as f64,
        second_aligned_share: second.aligned_share(),
        stormed,
        broken,
        counters,
        complaints,
    })
}

fn counters(ground: &Ground) -> anyhow::Result<Vec<(&'static str, u64)>> {
    let read = |name| Ok((name, ground.lab.vm.guest.driver_number(name)?));
    COUNTERS.into_iter().map(read).collect()
}

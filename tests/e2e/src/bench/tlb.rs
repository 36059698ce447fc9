//! What alignment is worth to a program that reads its memory at random: TLB
//! misses, simulated while a real guest runs.

use std::time::Duration;

use anyhow::Context;
use gemini_guest::protocol::{Fragment, PageSize};
use gemini_harness::figures::{Bar, Scenario};

use crate::compare::Counts;
use crate::lab::{Bench, Lab};
use crate::tlb::{TlbSimulator, TlbView};
use crate::{BLOCK, MIB};

/// The processor of the paper's test-bed.
const PROFILE: &str = "broadwell";

/// How long the driver may take to have its stock, and the daemon to come to rest.
const TIMEOUT: Duration = Duration::from_secs(240);

/// Percent of a guest's memory that fragmenting leaves free.
const FREE_PERCENT: u64 = 70;

/// Most misses against `none`, once the host is at rest: the paper's best case
/// has 83 % fewer.
const MISSES_BAR: f64 = 0.17;

/// Share of the walks that may end elsewhere than QEMU's own: page tables change
/// under them.
const DISAGREEMENT_BAR: f64 = 1e-4;

/// Sizes.
#[derive(Clone, Copy)]
struct Sizes {
    /// Bytes of guest memory.
    memory: u64,
    /// Bytes of the program.
    program: u64,
    /// Words that it reads.
    reads: u64,
}

/// What one guest has shown.
struct Run {
    /// While the program reads right after it filled its memory.
    first: TlbView,
    /// While it reads once the daemon has nothing left to do.
    rest: TlbView,
    counts: Counts,
    copied: u64,
    fmfi: f64,
    complaints: usize,
}

/// Runs the program under each policy, in a guest whose memory is whole and in one
/// whose memory is fragmented.
///
/// # Errors
/// If guest, QEMU or daemon fail in a way that is no figure.
pub fn measure(bench: &Bench, seed: u64, quick: bool) -> anyhow::Result<Scenario> {
    let sizes = if quick {
        Sizes { memory: 768 * MIB, program: 128 * MIB, reads: 500_000 }
    } else {
        Sizes { memory: 2048 * MIB, program: 512 * MIB, reads: 4_000_000 }
    };
    let mut scenario = Scenario::new("tlb");
    scenario.arg("profile", PROFILE);
    scenario.arg("guest_memory", sizes.memory);
    scenario.arg("program_bytes", sizes.program);
    scenario.arg("reads", sizes.reads);
    scenario.arg("shmem_enabled", "never");
    for fragmented in [false, true] {
        let ground = if fragmented { "fragmented" } else { "whole" };
        let mut base = None;
        for policy in ["none", "always", "gemini"] {
            eprintln!("{ground} memory, policy {policy}");
            let run = run(bench, policy, fragmented, sizes, seed)?;
            let base = base.get_or_insert((run.first, run.rest));
            tell(&mut scenario, &format!("{ground}_{policy}"), policy, &run, base);
        }
    }
    Ok(scenario)
}

/// Figures of one run, misses and reads of page tables against those under `none`.
fn tell(scenario: &mut Scenario, prefix: &str, policy: &str, run: &Run, base: &(TlbView, TlbView)) {
    let mut figure = |name: &str, value: f64, bar| {
        scenario.figure(&format!("{prefix}_{name}"), value, bar);
    };
    let ratio = |part: u64, whole: u64| part as f64 / whole.max(1) as f64;
    for (when, view, base) in [("first", &run.first, &base.0), ("rest", &run.rest, &base.1)] {
        let (now, none) = (&view.total, &base.total);
        let bar =
            if policy == "gemini" && when == "rest" { Bar::AtMost(MISSES_BAR) } else { Bar::None };
        figure(&format!("{when}_tlb_misses"), now.tlb_misses as f64, Bar::None);
        figure(&format!("{when}_page_walk_refs"), now.page_walk_refs as f64, Bar::None);
        figure(&format!("{when}_misses_of_none"), ratio(now.tlb_misses, none.tlb_misses), bar);
        let refs = ratio(now.page_walk_refs, none.page_walk_refs);
        figure(&format!("{when}_refs_of_none"), refs, Bar::None);
        let astray = ratio(view.disagreements, now.tlb_misses);
        figure(&format!("{when}_disagreements"), astray, Bar::AtMost(DISAGREEMENT_BAR));
    }
    figure("fmfi", run.fmfi, Bar::None);
    figure("aligned_rate", run.counts.aligned_rate(), Bar::None);
    figure("aligned_coverage", run.counts.aligned_coverage(), Bar::None);
    figure("collapse_bytes", run.copied as f64, Bar::None);
    figure("guest_complaints", run.complaints as f64, Bar::AtMost(0.0));
}

fn run(
    bench: &Bench,
    policy: &str,
    fragmented: bool,
    sizes: Sizes,
    seed: u64,
) -> anyhow::Result<Run> {
    let mut simulator = None;
    let mut lab = Lab::start(bench, "bench-tlb", policy, |config| {
        config.memory = sizes.memory;
        config.boot_timeout = TIMEOUT;
        // Huge pages for the program alone.
        config.guest_thp = "madvise".into();
        simulator = Some(TlbSimulator::attach(config, PROFILE, false));
    })?;
    let simulator = simulator.context("no guest was configured")??;
    let guest = &lab.vm.guest;
    let log = guest.log_position()?;
    // Nothing is booked while memory is fragmented, and nothing at all without
    // this project.
    guest.hints_only()?;
    if fragmented {
        let free = guest.memory()?["MemTotal"] * FREE_PERCENT / 100;
        guest.fragment("fragments", Fragment::new(seed, free))?;
    }
    let fmfi = guest.fragmentation()?.fmfi;
    if policy == "gemini" {
        for setting in ["placement", "bucket", "booking"] {
            guest.set_driver(setting, 1)?;
        }
        lab.wait_stocked(TIMEOUT)?;
    }
    let copied = lab.daemon.status()?.collapse_bytes;

    let guest = &lab.vm.guest;
    guest.fill("program", sizes.program / BLOCK * BLOCK, seed, PageSize::Huge)?;
    let first = read(&lab, &simulator, sizes.reads, seed)?;
    lab.wait_settled(TIMEOUT)?;
    let rest = read(&lab, &simulator, sizes.reads, seed + 1)?;

    let counts = lab.view()?.counts();
    let copied = lab.daemon.status()?.collapse_bytes - copied;
    lab.vm.guest.verify("program")?;
    let complaints = lab.vm.guest.tell_complaints(log)?;
    lab.vm.expect_alive()?;
    Ok(Run { first, rest, counts, copied, fmfi, complaints })
}

/// Has the program read, and tells what was counted meanwhile.
fn read(lab: &Lab, simulator: &TlbSimulator, reads: u64, seed: u64) -> anyhow::Result<TlbView> {
    simulator.begin()?;
    let start = simulator.look()?;
    lab.vm.guest.read("program", reads, seed)?;
    let end = simulator.look()?;
    simulator.end()?;
    Ok(end.since(&start))
}

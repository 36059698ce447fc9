//! The host has huge pages for a quarter of the guest, and the guest wants as
//! many, or four times as many.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context;
use gemini_guest::protocol::{BlockState, Fragment, Program};
use gemini_harness::figures::{Bar, Scenario};

use crate::compare::Counts;
use crate::daemon::DaemonConfig;
use crate::guest::DriverRun;
use crate::lab::{Bench, Lab};
use crate::process;
use crate::BLOCK;

/// The driver's stock is made when it is as large as the driver wants it, or the
/// host has no huge page left for it, and is the same for so long.
const STOCK_REST: Duration = Duration::from_secs(1);

/// How long it may take to be made.
const STOCK_TIMEOUT: Duration = Duration::from_secs(60);

/// Both layers are at rest when nothing changed for so long: longer than the
/// driver keeps a block that nobody comes for, and the host a huge page that is
/// of no use.
const REST: Duration = Duration::from_secs(10);

/// How long they may take to come to rest after a program has touched its memory.
const SETTLE: Duration = Duration::from_secs(180);

/// What is seen when a program has all that it gets.
#[derive(Default)]
struct Seen {
    counts: Counts,
    /// Blocks that may be huge in the host.
    supply: u64,
    /// Blocks that are.
    host_huge: u64,
    /// Those of them that are pinned in the guest.
    pinned: u64,
    /// Blocks of the program that are aligned.
    of_program: u64,
    /// Blocks that the program touched.
    touched: u64,
    /// Huge pages of the guest that came from ready blocks.
    placed: u64,
    /// Huge pages of the guest that were moved onto ready blocks.
    moved: u64,
    /// Bytes that the host copied.
    copied: u64,
    /// Huge pages that it took from blocks that were of no use.
    demoted: u64,
}

/// Has programs run in two fragmented guests. A guest of which a quarter may be
/// huge can never want four times as much, since its kernel needs memory too: in
/// the first guest the second program takes what it can get, in the other one
/// the supply is a quarter of that.
///
/// # Errors
/// If guest, QEMU or daemon fail in a way that is no figure.
pub fn measure(bench: &Bench, seed: u64, quick: bool) -> anyhow::Result<Scenario> {
    let memory: u64 = if quick { 1 << 30 } else { 2 << 30 };
    let mut scenario = Scenario::new("scarce-host");
    scenario.arg("guest_memory", memory);
    scenario.arg("huge_max", memory / 4);

    let (mut lab, fmfi) = start(bench, memory, seed)?;
    let log = lab.vm.guest.log_position()?;
    scenario.figure("fmfi", fmfi, Bar::AtLeast(0.8));
    // The guest's kernel has its own by then.
    let kernels = lab.vm.guest.kernel_blocks()?.len() as u64 * BLOCK;
    let seen = run(&mut lab, "equal", memory / 4 - kernels, memory / 4, seed)?;
    tell(&mut scenario, "equal", &seen);
    let rate = seen.counts.aligned_rate();
    scenario.figure("equal_aligned_rate", rate, Bar::AtLeast(0.95));
    let most = obtainable(&lab)?;
    let seen = run(&mut lab, "most", most, memory / 4, seed + 1)?;
    tell(&mut scenario, "most", &seen);
    tell_use(&mut scenario, "most", &seen);
    let mut complaints = end(&lab, log)?;
    drop(lab);

    let (mut lab, _) = start(bench, memory, seed)?;
    let log = lab.vm.guest.log_position()?;
    let most = obtainable(&lab)?;
    let supply = most / 4 / BLOCK * BLOCK;
    lab.daemon.control().set_huge_max(supply)?;
    let seen = run(&mut lab, "quadruple", 4 * supply, supply, seed + 2)?;
    tell(&mut scenario, "quadruple", &seen);
    tell_use(&mut scenario, "quadruple", &seen);
    complaints += end(&lab, log)?;
    scenario.figure("guest_complaints", complaints as f64, Bar::AtMost(0.0));
    Ok(scenario)
}

/// A guest of `memory` bytes, of which a quarter may be huge in the host, and how
/// fragmented its memory is. Every block was in use.
fn start(bench: &Bench, memory: u64, seed: u64) -> anyhow::Result<(Lab, f64)> {
    let mut daemon = DaemonConfig::new(&bench.assets.daemon, "gemini");
    daemon.arguments.extend(["--huge-max".to_owned(), (memory / 4).to_string()]);
    let lab = Lab::start_with(bench, "bench-scarce-host", daemon, |config| {
        config.memory = memory;
    })?;
    let free = available(&lab)?.saturating_sub(memory / 32);
    let fragmented = lab.vm.guest.fragment("fragmenter", Fragment::new(seed, free))?;
    Ok((lab, fragmented.after.fmfi))
}

/// Looks whether the guest is well; returns how often its kernel has complained
/// since `log`.
fn end(lab: &Lab, log: u64) -> anyhow::Result<usize> {
    lab.vm.guest.verify_process("fragmenter")?;
    lab.vm.guest.tell_complaints(log)
}

fn tell(scenario: &mut Scenario, name: &str, seen: &Seen) {
    let figures = [
        ("demand_over_supply", seen.touched as f64 / seen.supply as f64),
        ("aligned", seen.counts.aligned as f64),
        ("aligned_of_program", seen.of_program as f64),
        ("guest_only", seen.counts.guest_only as f64),
        ("host_only", seen.counts.host_only as f64),
        ("aligned_coverage", seen.counts.aligned_coverage()),
        ("placed", seen.placed as f64),
        ("moved", seen.moved as f64),
        ("collapse_bytes", seen.copied as f64),
        ("demoted", seen.demoted as f64),
    ];
    for (figure, value) in figures {
        scenario.figure(&format!("{name}_{figure}"), value, Bar::None);
    }
    // Nothing is won by a limit that is not kept.
    let limit = Bar::AtMost(seen.supply as f64);
    scenario.figure(&format!("{name}_host_huge"), seen.host_huge as f64, limit);
}

/// How much of what the host gave is of use to the guest.
fn tell_use(scenario: &mut Scenario, name: &str, seen: &Seen) {
    let aligned = seen.counts.aligned as f64;
    let usable = seen.host_huge.saturating_sub(seen.pinned).max(1) as f64;
    scenario.figure(&format!("{name}_aligned_rate"), seen.counts.aligned_rate(), Bar::None);
    scenario.figure(&format!("{name}_pinned"), seen.pinned as f64, Bar::None);
    scenario.figure(&format!("{name}_host_huge_in_use"), aligned / usable, Bar::AtLeast(0.95));
    scenario.figure(&format!("{name}_supply_in_use"), aligned / seen.supply as f64, Bar::None);
}

/// Bytes that a program can have without driving the guest out of memory.
fn obtainable(lab: &Lab) -> anyhow::Result<u64> {
    let reserve = lab.vm.config.memory / 16;
    Ok(available(lab)?.saturating_sub(reserve) / BLOCK * BLOCK)
}

/// Bytes of memory that the guest could give to a program.
fn available(lab: &Lab) -> anyhow::Result<u64> {
    let memory = lab.vm.guest.memory()?;
    memory.get("MemAvailable").copied().context("the guest does not tell its available memory")
}

/// Has a program touch `bytes` when the driver has its stock, waits until both
/// layers are at rest, looks, and ends it.
fn run(lab: &mut Lab, name: &str, bytes: u64, supply: u64, seed: u64) -> anyhow::Result<Seen> {
    wait_stock(lab)?;
    let before = lab.daemon.status()?;
    let placed = lab.vm.guest.driver_number("placed")?;
    let moved = lab.vm.guest.driver_number("moved")?;
    let program = Program { bytes, seed, blocks_per_second: 0.0 };
    let touched = lab.vm.guest.start_program(name, program)?;
    lab.wait_at_rest(REST, SETTLE)?;
    let mut seen = look(lab, name)?;
    seen.supply = supply / BLOCK;
    seen.touched = touched.blocks;
    let after = lab.daemon.status()?;
    seen.copied = after.collapse_bytes - before.collapse_bytes;
    seen.demoted = after.demoted - before.demoted;
    seen.placed = lab.vm.guest.driver_number("placed")? - placed;
    seen.moved = lab.vm.guest.driver_number("moved")? - moved;
    lab.vm.guest.verify_process(name)?;
    lab.vm.guest.end(name)?;
    Ok(seen)
}

/// Waits until the driver has made its stock, as far as the host lets it.
fn wait_stock(lab: &Lab) -> anyhow::Result<()> {
    let guest = &lab.vm.guest;
    let ready = || guest.driver_number("ready");
    process::wait_for("the stock is full, or the host has nothing for it", STOCK_TIMEOUT, || {
        let target = guest.driver_number("stock_target")?;
        let full = target > 0 && ready()? >= target;
        Ok((full || guest.driver_number("scarce")? == 1).then_some(()))
    })?;
    // What the last program has freed may be on its way.
    process::wait_until_still("the stock", STOCK_REST, STOCK_TIMEOUT, ready).map(drop)
}

fn look(lab: &Lab, name: &str) -> anyhow::Result<Seen> {
    let view = lab.view()?;
    let driver = lab.vm.guest.driver_blocks()?;
    let is_pinned = |block: u64| {
        let of_run = |run: &&DriverRun| (run.first..run.first + run.count).contains(&block);
        driver.iter().find(of_run).is_some_and(|run| run.guest == "pinned")
    };
    let host_huge: BTreeMap<u64, BlockState> = view.host_huge().collect();
    let pinned =
        |(block, guest): &(&u64, &BlockState)| **guest == BlockState::Base && is_pinned(**block);
    let program = lab.vm.guest.program_blocks(name)?;
    Ok(Seen {
        counts: view.counts(),
        host_huge: host_huge.len() as u64,
        pinned: host_huge.iter().filter(pinned).count() as u64,
        of_program: program.iter().flatten().filter(|b| host_huge.contains_key(b)).count() as u64,
        ..Seen::default()
    })
}

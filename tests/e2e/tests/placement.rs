//! Huge pages of the guest come from blocks that are ready.
//!
//! What the driver says is checked against the guest's page map and page flags,
//! and against QEMU's page tables.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{ensure, Context};
use gemini_e2e::lab::{Bench, Lab};
use gemini_e2e::outside::HostState;
use gemini_e2e::process;
use gemini_guest::protocol::{BlockState, PageSize};

const MIB: u64 = 1 << 20;

/// Blocks that each of these tests makes ready.
const BLOCKS: u32 = 8;
const BYTES: u64 = BLOCKS as u64 * 2 * MIB;

const SETTINGS: &str = "/sys/bus/virtio/drivers/virtio_gemini/virtio*/gemini";
const THP: &str = "/sys/kernel/mm/transparent_hugepage";

/// How long the driver may take to put its hooks in, or to see that they do
/// not fire.
const HOOKS: Duration = Duration::from_secs(60);

fn start(bench: &Bench, name: &str) -> anyhow::Result<Lab> {
    let lab = Lab::start(bench, name, "gemini", |_| {})?;
    // These tests choose what is ready.
    set(&lab, &format!("{SETTINGS}/booking"), "0")?;
    lab.vm.guest.driver_command("free all")?;
    wait_state(&lab, "on")?;
    Ok(lab)
}

fn state(lab: &Lab) -> anyhow::Result<String> {
    Ok(lab.vm.guest.shell(&format!("cat {SETTINGS}/placement_state"))?.trim().to_owned())
}

fn wait_state(lab: &Lab, wanted: &str) -> anyhow::Result<()> {
    let mut last = String::new();
    process::wait_for(&format!("placement is {wanted}"), HOOKS, || {
        last = state(lab)?;
        Ok(last.starts_with(wanted).then_some(()))
    })
    .with_context(|| last)
}

fn set(lab: &Lab, setting: &str, value: &str) -> anyhow::Result<()> {
    // A shell writes to no pattern.
    lab.vm.guest.shell(&format!("echo {value} > \"$(echo {setting})\"")).map(drop)
}

/// Placed, missed and declined so far.
fn counters(lab: &Lab) -> anyhow::Result<(u64, u64, u64)> {
    Ok((
        lab.vm.guest.driver_number("placed")?,
        lab.vm.guest.driver_number("placement_misses")?,
        lab.vm.guest.driver_number("placement_declined")?,
    ))
}

/// Makes blocks ready that had other contents before.
fn ready(lab: &Lab) -> anyhow::Result<BTreeSet<u64>> {
    let told = lab.vm.guest.driver_command(&format!("book any {BLOCKS}"))?;
    let blocks: BTreeSet<u64> = told.lines().filter_map(|line| line.parse().ok()).collect();
    ensure!(blocks.len() == BLOCKS as usize, "the driver booked {told}");
    for block in &blocks {
        lab.vm.guest.driver_command(&format!("fill {block} 4711"))?;
        lab.vm.guest.driver_command(&format!("prepare {block}"))?;
    }
    Ok(blocks)
}

/// `name` lies in `blocks`, and they are huge for the guest's kernel and for
/// QEMU.
fn expect_in(lab: &Lab, name: &str, blocks: &BTreeSet<u64>) -> anyhow::Result<()> {
    let found = lab.vm.guest.blocks_of(name)?;
    let used: BTreeSet<u64> = found.iter().copied().flatten().collect();
    ensure!(used == *blocks, "{name} is in {found:?}, ready were {blocks:?}");
    for run in lab.vm.guest.blocks()?.runs {
        for block in (run.first..run.first + run.count).filter(|block| blocks.contains(block)) {
            ensure!(run.state == BlockState::Huge && run.user == 512, "{block}: {run:?}");
        }
    }
    let outside = lab.memory.states()?;
    for (block, state) in outside.iter().filter(|(block, _)| blocks.contains(block)) {
        ensure!(*state == HostState::Huge, "QEMU maps {block} as {state:?}");
    }
    lab.vm.guest.verify(name).map(drop)
}

#[test]
fn faults_and_collapses_take_ready_blocks() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let lab = start(&bench, "placement")?;
    let log = lab.vm.guest.log_position()?;
    let before = counters(&lab)?;

    let blocks = ready(&lab)?;
    lab.vm.guest.fill("anonymous", BYTES, 1, PageSize::Huge)?;
    expect_in(&lab, "anonymous", &blocks)?;

    set(&lab, &format!("{THP}/shmem_enabled"), "advise")?;
    let blocks = ready(&lab)?;
    lab.vm.guest.fill_shared("shared", BYTES, 2, PageSize::Huge)?;
    expect_in(&lab, "shared", &blocks)?;

    set(&lab, &format!("{THP}/enabled"), "never")?;
    lab.vm.guest.fill("collapsed", BYTES, 3, PageSize::System)?;
    lab.vm.guest.fill("scanned", BYTES, 4, PageSize::Huge)?;
    let blocks = ready(&lab)?;
    lab.vm.guest.collapse("collapsed")?;
    expect_in(&lab, "collapsed", &blocks)?;

    // khugepaged does the rest.
    let blocks = ready(&lab)?;
    set(&lab, &format!("{THP}/khugepaged/scan_sleep_millisecs"), "10")?;
    set(&lab, &format!("{THP}/khugepaged/pages_to_scan"), "65536")?;
    set(&lab, &format!("{THP}/enabled"), "madvise")?;
    process::wait_for("khugepaged took the blocks", Duration::from_secs(60), || {
        Ok((lab.vm.guest.driver_number("held")? == 0).then_some(()))
    })?;
    expect_in(&lab, "scanned", &blocks)?;

    for name in ["anonymous", "shared", "collapsed", "scanned"] {
        lab.vm.guest.verify(name)?;
    }
    let after = counters(&lab)?;
    ensure!(after.0 - before.0 == 4 * u64::from(BLOCKS), "{before:?} {after:?}");

    // Nothing ready: the kernel goes its own way, and each is counted once.
    let before = counters(&lab)?;
    lab.vm.guest.fill("missed", BYTES, 5, PageSize::Huge)?;
    let after = counters(&lab)?;
    ensure!(after == (before.0, before.1 + u64::from(BLOCKS), before.2), "{before:?} {after:?}");

    // What came from the driver is freed as everything else is.
    for name in ["anonymous", "shared", "collapsed", "scanned", "missed"] {
        lab.vm.guest.free(name)?;
    }
    let complaints = lab.vm.guest.complaints(log)?;
    ensure!(complaints.is_empty(), "{complaints:?}");
    lab.daemon.stop()
}

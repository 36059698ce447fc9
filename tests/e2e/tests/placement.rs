//! Huge pages of the guest come from blocks that are ready.
//!
//! What the driver says is checked against the guest's page map and page flags,
//! and against QEMU's page tables.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{ensure, Context};
use gemini_e2e::lab::{Bench, Lab, SYNC_TIMEOUT};
use gemini_e2e::outside::HostState;
use gemini_e2e::process;
use gemini_e2e::MIB;
use gemini_guest::protocol::{BlockState, Break, PageSize};

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
    set(&lab, &format!("{SETTINGS}/bucket"), "0")?;
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

#[test]
fn new_memory_is_zero_and_others_get_no_ready_block() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let lab = start(&bench, "placement-others")?;
    let log = lab.vm.guest.log_position()?;

    // The blocks had other contents before.
    let before = counters(&lab)?;
    ready(&lab)?;
    lab.vm.guest.expect_zeros(BYTES, PageSize::Huge)?;
    let after = counters(&lab)?;
    ensure!(after.0 - before.0 == u64::from(BLOCKS), "{before:?} {after:?}");

    // hugetlb allocates pages of the same order, in 6.x by the same function.
    ready(&lab)?;
    let before = counters(&lab)?;
    set(&lab, "/proc/sys/vm/nr_hugepages", "4")?;
    let after = counters(&lab)?;
    ensure!((after.0, after.1) == (before.0, before.1), "{before:?} {after:?}");
    ensure!(!is_6(&bench) || after.2 >= before.2 + 4, "{before:?} {after:?}");
    ensure!(lab.vm.guest.driver_number("held")? == u64::from(BLOCKS));
    set(&lab, "/proc/sys/vm/nr_hugepages", "0")?;

    let complaints = lab.vm.guest.complaints(log)?;
    ensure!(complaints.is_empty(), "{complaints:?}");
    lab.daemon.stop()
}

/// Whether the guest's kernel is a 6.x.
fn is_6(bench: &Bench) -> bool {
    bench.assets.guest.release.starts_with("6.")
}

/// What of the kernel's hooked functions calls the driver, as ftrace tells.
fn hooked(lab: &Lab) -> anyhow::Result<usize> {
    let text = lab.vm.guest.read_file("/sys/kernel/tracing/enabled_functions")?;
    Ok(text.matches("gemini_trampoline").count())
}

#[test]
fn placement_comes_and_goes() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let mut lab = start(&bench, "placement-switch")?;
    let log = lab.vm.guest.log_position()?;

    // Off means that nothing is hooked, and that nobody is counted.
    ensure!(hooked(&lab)? >= 2);
    set(&lab, &format!("{SETTINGS}/placement"), "0")?;
    ensure!(state(&lab)? == "off", "{}", state(&lab)?);
    ensure!(hooked(&lab)? == 0);
    let before = counters(&lab)?;
    let blocks = ready(&lab)?;
    lab.vm.guest.fill("off", BYTES, 1, PageSize::Huge)?;
    ensure!(counters(&lab)? == before);
    ensure!(lab.vm.guest.driver_number("held")? == u64::from(BLOCKS));
    set(&lab, &format!("{SETTINGS}/placement"), "1")?;
    ensure!(state(&lab)? == "on", "{}", state(&lab)?);
    lab.vm.guest.fill("on", BYTES, 2, PageSize::Huge)?;
    expect_in(&lab, "on", &blocks)?;

    // A tracer may look at the same functions.
    lab.vm.guest.shell(
        "cd /sys/kernel/tracing && \
         echo vma_alloc_folio_noprof __folio_alloc_noprof folio_alloc_mpol_noprof \
         > set_ftrace_filter && echo function > current_tracer",
    )?;
    let blocks = ready(&lab)?;
    lab.vm.guest.fill("traced", BYTES, 3, PageSize::Huge)?;
    expect_in(&lab, "traced", &blocks)?;
    let trace = lab.vm.guest.shell(
        "cd /sys/kernel/tracing && grep -c vma_alloc_folio_noprof trace; \
         echo nop > current_tracer; echo > set_ftrace_filter",
    )?;
    let seen: u32 = trace.trim().parse().with_context(|| trace.clone())?;
    ensure!(seen >= BLOCKS, "the tracer saw {seen} calls");

    if is_6(&bench) {
        ftrace_goes_and_comes(&mut lab)?;
    }
    for name in ["off", "on", "traced"] {
        lab.vm.guest.verify(name)?;
    }
    // That it holds nothing without its callback on page isolation the driver
    // tells once.
    let mut complaints = lab.vm.guest.complaints(log)?;
    complaints.retain(|message| !message.text.contains("nothing will be held"));
    ensure!(complaints.is_empty(), "{complaints:?}");
    lab.daemon.stop()
}

/// In 6.x `kernel.ftrace_enabled` switches ftrace off; later kernels refuse.
fn ftrace_goes_and_comes(lab: &mut Lab) -> anyhow::Result<()> {
    const FTRACE: &str = "/proc/sys/kernel/ftrace_enabled";

    // ftrace as a whole may be off when the driver comes. The driver's callback
    // on page isolation, which keeps it on otherwise, is then not there either.
    lab.vm.guest.unload_driver()?;
    set(lab, FTRACE, "0")?;
    lab.vm.guest.load_driver()?;
    wait_state(lab, "not on: ftrace calls no hooks")?;
    set(lab, FTRACE, "1")?;
    wait_state(lab, "on")?;

    // It may go and come back meanwhile.
    lab.daemon.wait_synced(SYNC_TIMEOUT)?;
    set(lab, &format!("{SETTINGS}/bucket"), "0")?;
    set(lab, FTRACE, "0")?;
    wait_state(lab, "not on: ftrace calls no hooks")?;
    let before = counters(lab)?;
    let blocks = ready(lab)?;
    lab.vm.guest.fill("silent", BYTES, 4, PageSize::Huge)?;
    ensure!(counters(lab)? == before);
    set(lab, FTRACE, "1")?;
    wait_state(lab, "on")?;
    lab.vm.guest.fill("back", BYTES, 5, PageSize::Huge)?;
    expect_in(lab, "back", &blocks)?;

    for name in ["silent", "back"] {
        lab.vm.guest.verify(name)?;
    }
    Ok(())
}

/// The module goes while tasks wait for memory inside of what it hooks.
#[test]
fn driver_unloads_while_tasks_compact_memory() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let lab = start(&bench, "placement-unload")?;
    let log = lab.vm.guest.log_position()?;
    let stalls = || -> anyhow::Result<u64> {
        let text = lab.vm.guest.shell("sed -n 's/^compact_stall //p' /proc/vmstat")?;
        text.trim().parse().with_context(|| text.clone())
    };

    // Half of nearly all blocks in use: a huge page has to be made by compaction.
    set(&lab, &format!("{THP}/defrag"), "always")?;
    let free = lab.vm.guest.memory()?.get("MemAvailable").copied().context("no MemAvailable")?;
    lab.vm.guest.fill("scattered", free / 10 * 9, 1, PageSize::Base)?;
    lab.vm.guest.break_pages("scattered", Break::DropHalf, 1)?;
    let before = stalls()?;
    for (seed, name) in ["one", "two", "three"].into_iter().enumerate() {
        lab.vm.guest.start_churn(name, free / 10, seed as u64)?;
    }
    for _ in 0..5 {
        wait_state(&lab, "on")?;
        std::thread::sleep(Duration::from_secs(1));
        lab.vm.guest.unload_driver()?;
        lab.vm.guest.load_driver()?;
    }
    for name in ["one", "two", "three"] {
        let done = lab.vm.guest.stop_churn(name)?;
        ensure!(done.bad_words == 0, "{done:?}");
    }
    let during = stalls()? - before;
    ensure!(during > 0, "nobody had to wait for a huge page");
    lab.vm.guest.verify("scattered")?;
    let complaints = lab.vm.guest.complaints(log)?;
    ensure!(complaints.is_empty(), "{complaints:?}");
    lab.daemon.stop()
}

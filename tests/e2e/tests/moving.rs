//! Huge pages of the guest move to where the host has huge pages.
//!
//! What the driver says is checked against the guest's page map and page flags,
//! and against QEMU's page tables.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{ensure, Context};
use gemini_e2e::lab::{Bench, Lab};
use gemini_e2e::process;
use gemini_e2e::BLOCK;
use gemini_guest::protocol::{BlockRun, BlockState, Break, PageSize};

/// Blocks that are made ready, and blocks that lie elsewhere.
const BLOCKS: u32 = 8;

/// How long the driver may take to put its hooks in, or both sides to agree on
/// moves and to make them.
const MOVES: Duration = Duration::from_secs(60);

/// A guest that has huge pages on the host's base pages, and a driver that holds
/// as many ready blocks. The host makes no more huge pages. The driver does what
/// it is told alone, or follows what the host asks for from the end on. With it
/// comes where the guest's log ended before, and what the host had copied.
fn start(bench: &Bench, name: &str, follows: bool) -> anyhow::Result<(Lab, u64, u64)> {
    let lab = Lab::start(bench, name, "gemini", |_| {})?;
    lab.vm.guest.hints_only()?;
    let told = lab.vm.guest.driver_command(&format!("book any {BLOCKS}"))?;
    let ready: Vec<u64> = told.lines().filter_map(|line| line.parse().ok()).collect();
    ensure!(ready.len() == BLOCKS as usize, "the driver booked {told}");
    for block in ready {
        lab.vm.guest.driver_command(&format!("prepare {block}"))?;
    }
    lab.daemon.control().set_huge_max(BLOCK)?;
    let log = lab.vm.guest.log_position()?;
    let copied = lab.daemon.status()?.collapse_bytes;
    lab.vm.guest.fill("program", u64::from(BLOCKS) * BLOCK, 1, PageSize::Huge)?;
    ensure!(huge_blocks(&lab, "program")?.is_empty(), "the program is aligned as it is");
    lab.vm.guest.driver_command("census")?;
    // Without placement it does nothing by itself.
    lab.vm.guest.set_driver("booking", u64::from(follows))?;
    lab.vm.guest.set_driver("placement", 1)?;
    wait_moving(&lab, "")?;
    Ok((lab, log, copied))
}

/// Waits until moves are possible, and `wanted` or not.
fn wait_moving(lab: &Lab, wanted: &str) -> anyhow::Result<()> {
    let mut last = String::new();
    process::wait_for(&format!("moves are possible and {wanted}"), MOVES, || {
        last = lab.vm.guest.driver_text("moving")?;
        let possible = !last.starts_with("not possible");
        Ok((possible && (wanted.is_empty() || last.trim() == wanted)).then_some(()))
    })
    .with_context(|| last)
}

/// Where the memory `name` is, which has to be huge pages.
fn blocks_of(lab: &Lab, name: &str) -> anyhow::Result<BTreeSet<u64>> {
    let blocks: BTreeSet<u64> = lab.vm.guest.blocks_of(name)?.into_iter().flatten().collect();
    let states = lab.vm.guest.blocks()?;
    let is_huge = |block: &u64| {
        let of_run = |run: &&BlockRun| (run.first..run.first + run.count).contains(block);
        states.runs.iter().find(of_run).is_some_and(|run| run.state == BlockState::Huge)
    };
    ensure!(blocks.iter().all(is_huge), "{name} is in {blocks:?}, not all of them huge");
    Ok(blocks)
}

/// Those of its blocks that are huge in QEMU's page tables as well.
fn huge_blocks(lab: &Lab, name: &str) -> anyhow::Result<BTreeSet<u64>> {
    let huge = lab.memory.huge_blocks()?;
    Ok(blocks_of(lab, name)?.intersection(&huge).copied().collect())
}

/// Moved and failed so far.
fn moves(lab: &Lab) -> anyhow::Result<(u64, u64)> {
    Ok((lab.vm.guest.driver_number("moved")?, lab.vm.guest.driver_number("move_failures")?))
}

/// How often this guest's kernel split a huge page.
fn splits(lab: &Lab) -> anyhow::Result<u64> {
    let text = lab.vm.guest.shell("sed -n 's/^thp_split_page //p' /proc/vmstat")?;
    text.trim().parse().with_context(|| text.clone())
}

#[test]
fn a_huge_page_moves_as_it_is_or_stays() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let (lab, log, copied) = start(&bench, "moving", false)?;
    let split = splits(&lab)?;

    let before = blocks_of(&lab, "program")?;
    let first = *before.first().context("the program has no memory")?;
    lab.vm.guest.driver_command(&format!("move {first}"))?;
    let after = blocks_of(&lab, "program")?;
    let aligned = huge_blocks(&lab, "program")?;
    ensure!(aligned.len() == 1 && after.difference(&before).eq(&aligned), "{before:?} {after:?}");
    ensure!(moves(&lab)? == (1, 0), "{:?}", moves(&lab)?);
    ensure!(lab.vm.guest.driver_number("held")? == u64::from(BLOCKS), "the old block is not held");
    lab.vm.guest.verify("program")?;

    // Nothing there to be moved: the driver's own block, and a free one.
    ensure!(lab.vm.guest.driver_command(&format!("move {first}")).is_err());
    lab.vm.guest.driver_command(&format!("free {first}"))?;
    lab.vm.guest.driver_command("census")?;
    ensure!(lab.vm.guest.driver_command(&format!("move {first}")).is_err());

    // In part mapped only: the kernel would split it on the way.
    lab.vm.guest.fill("half", BLOCK, 2, PageSize::Huge)?;
    let half = *blocks_of(&lab, "half")?.first().context("no memory")?;
    lab.vm.guest.break_pages("half", Break::DropHalf, 1)?;
    lab.vm.guest.driver_command("census")?;
    ensure!(lab.vm.guest.driver_command(&format!("move {half}")).is_err());

    // Without the hook, nowhere to go to.
    lab.vm.guest.set_driver("placement", 0)?;
    let next = *before.last().context("the program has no memory")?;
    ensure!(lab.vm.guest.driver_text("moving")?.starts_with("not possible: placement"));
    ensure!(lab.vm.guest.driver_command(&format!("move {next}")).is_err());
    lab.vm.guest.set_driver("placement", 1)?;
    wait_moving(&lab, "")?;

    // With nothing ready, too.
    lab.vm.guest.driver_command("free all")?;
    ensure!(lab.vm.guest.driver_command(&format!("move {next}")).is_err());
    ensure!(blocks_of(&lab, "program")? == after && moves(&lab)? == (1, 0), "{:?}", moves(&lab)?);

    ensure!(splits(&lab)? == split, "a huge page was split");
    ensure!(lab.daemon.status()?.collapse_bytes == copied, "the host copied");
    lab.vm.guest.verify("program")?;
    for name in ["program", "half"] {
        lab.vm.guest.free(name)?;
    }
    let complaints = lab.vm.guest.complaints(log)?;
    ensure!(complaints.is_empty(), "{complaints:?}");
    lab.daemon.stop()
}

#[test]
fn a_host_without_huge_pages_has_the_guest_move_and_copies_nothing() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let (lab, log, copied) = start(&bench, "moving-advised", true)?;

    // The host has none to give, and as many of no use as the program needs.
    process::wait_for("the program's huge pages were moved", MOVES, || {
        Ok((moves(&lab)?.0 >= u64::from(BLOCKS)).then_some(()))
    })?;
    let aligned = huge_blocks(&lab, "program")?;
    ensure!(aligned.len() == BLOCKS as usize, "aligned are only {aligned:?}");
    ensure!(splits(&lab)? == 0, "a huge page was split");
    let status = lab.daemon.status()?;
    ensure!(status.collapse_bytes == copied, "the host copied: {status:?}");
    lab.vm.guest.verify("program")?;
    // Nothing is left to be moved.
    wait_moving(&lab, "not wanted")?;
    let complaints = lab.vm.guest.complaints(log)?;
    ensure!(complaints.is_empty(), "{complaints:?}");
    lab.daemon.stop()
}

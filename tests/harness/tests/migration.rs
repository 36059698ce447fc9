//! What a daemon does while its guest is being migrated.

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::ensure;
use common::{lab, Result};
use gemini_harness::driver::AREA_BLOCKS;
use gemini_harness::log::DirtyLog;
use gemini_harness::machine::{singles, Machine, PATIENCE};
use gemini_harness::memory::{GuestMemory, BLOCK_SIZE};
use gemini_harness::sys::PAGE_SIZE;
use gemini_harness::wire::{self, host_state};

/// A page of guest memory.
type Page = [u8; 4096];

/// All of guest memory, as a monitor copies it.
fn copy(memory: &GuestMemory) -> Result<Vec<Page>> {
    let pages = memory.mapping().len() / PAGE_SIZE;
    (0..pages)
        .map(|page| {
            let mut bytes: Page = [0; 4096];
            memory.peek(page * PAGE_SIZE, &mut bytes)?;
            Ok(bytes)
        })
        .collect()
}

/// Pages that are not what they were.
fn changed(before: &[Page], after: &[Page]) -> BTreeSet<u64> {
    (0_u64..).zip(before.iter().zip(after)).filter(|(_, (a, b))| a != b).map(|(n, _)| n).collect()
}

fn used_rings(machine: &Machine) -> BTreeSet<u64> {
    machine.driver.queues().iter().map(|queue| queue.ring.layout().used / PAGE_SIZE).collect()
}

/// Has the daemon write everything that it writes: to all four used rings, a
/// hint, and the answer of every kind of request.
fn use_every_queue(machine: &mut Machine) -> Result {
    let block = machine.guest.free_block(8).expect("one of many");
    machine.guest.book(block)?;
    machine.talk()?;
    machine.run_for(Duration::from_millis(50))?;
    let one = singles(&[block]);
    for kind in [wire::REQ_PREPARE, wire::REQ_QUERY, wire::REQ_STATS] {
        let ranges = if kind == wire::REQ_STATS { &[][..] } else { &one };
        machine.driver.request(kind, ranges, PATIENCE)?;
    }
    machine.guest.write_block(block);
    for kind in [wire::REQ_RELEASE, wire::REQ_RENEW] {
        let ticket = machine.driver.submit(kind, &one)?;
        let status = machine.driver.answer(ticket, PATIENCE)?.response.status;
        ensure!(status == wire::S_BUSY, "request {kind} is answered {status}");
    }
    machine.guest.unbook(block)
}

/// Which pages the daemon wrote to, by its log, since `before` was copied; every
/// page that changed otherwise was written by the guest.
fn ensure_logged(machine: &mut Machine, log: &DirtyLog, before: &[Page]) -> Result {
    machine.session.stop_queues()?;
    let marked = log.pages()?;
    let by_guest = machine.memory.take_written();
    let lost: Vec<_> = changed(before, &copy(&machine.memory)?)
        .into_iter()
        .filter(|page| !marked.contains(page) && !by_guest.contains(page))
        .collect();
    ensure!(lost.is_empty(), "pages {lost:?} changed and were not logged");
    let rings = used_rings(machine);
    ensure!(marked.is_superset(&rings), "of {rings:?} only {marked:?} are marked");
    machine.driver.poll().map(drop)
}

#[test]
fn every_byte_that_the_daemon_writes_is_logged() -> Result {
    let lab = lab("gemini")?;
    let mut machine = lab.boot(32)?;
    let _ = machine.memory.take_written();
    let log = DirtyLog::new(&machine.memory)?;
    machine.start_log(&log)?;
    let before = copy(&machine.memory)?;
    use_every_queue(&mut machine)?;
    ensure_logged(&mut machine, &log, &before)?;

    // Another log, and after it a memory table whose regions it was not handed for.
    let next = DirtyLog::new(&machine.memory)?;
    machine.session.set_log(&next)?;
    let before = copy(&machine.memory)?;
    machine.session.set_memory(&machine.memory)?;
    machine.driver.reset()?;
    machine.driver.start(&mut machine.session)?;
    machine.sync()?;
    use_every_queue(&mut machine)?;
    let ended = log.pages()?;
    ensure_logged(&mut machine, &next, &before)?;
    ensure!(log.pages()? == ended, "the log before is still written to");

    machine.driver.reset()?;
    machine.driver.start(&mut machine.session)?;
    machine.end_log()?;
    let ended = next.pages()?;
    machine.sync()?;
    ensure!(next.pages()? == ended, "something was logged after the end");
    machine.guest.ensure_intact()
}

#[test]
fn nothing_is_made_huge_nor_dropped_during_a_migration() -> Result {
    let mut lab = lab("gemini")?;
    let mut machine = lab.boot(32)?;
    let log = DirtyLog::new(&machine.memory)?;
    machine.start_log(&log)?;
    let huge: Vec<_> = (10..20).collect();
    for &block in &huge {
        machine.guest.alloc_huge(block)?;
    }
    use_every_queue(&mut machine)?;
    machine.run_for(Duration::from_millis(500))?;
    let status = lab.daemon.status()?;
    ensure!((status.aligned, status.guest_only) == (0, 10), "{status:?}");
    ensure!(machine.driver.advice().is_some_and(|advice| advice.flags & wire::ADVICE_SCARCE != 0));
    // Cancelled.
    machine.end_log()?;
    machine.wait_host(&huge, |state| state == host_state::HUGE, PATIENCE)?;
    lab.daemon.wait_status("aligned", PATIENCE, |status| status.aligned == 10)?;
    machine.guest.ensure_intact()
}

#[test]
fn no_answer_is_lost_when_a_log_begins_and_ends_under_load() -> Result {
    let lab = lab("gemini")?;
    let mut machine = lab.boot(32)?;
    let log = DirtyLog::new(&machine.memory)?;
    let one = singles(&[20]);
    for round in 0..300 {
        let tickets: Vec<_> = (0..8)
            .map(|_| machine.driver.submit(wire::REQ_QUERY, &one))
            .collect::<std::result::Result<_, _>>()?;
        if round % 2 == 0 {
            machine.start_log(&log)?;
        } else {
            machine.end_log()?;
        }
        for ticket in tickets {
            machine.driver.answer(ticket, PATIENCE)?;
        }
    }
    machine.guest.ensure_intact()
}

#[test]
fn what_a_cancelled_migration_filled_is_asked_for_again() -> Result {
    let lab = lab("gemini")?;
    let mut machine = lab.boot(64)?;
    let log = DirtyLog::new(&machine.memory)?;
    machine.start_log(&log)?;
    // As the monitor's look for zeros does.
    machine.memory.mapping().fault_in(0, machine.memory.mapping().len())?;
    machine.end_log()?;
    machine.driver.wait_until("a wish", PATIENCE, |driver| {
        driver.advice().is_some_and(|advice| advice.wanted > 0)
    })?;
    let wanted = machine.driver.advice().map_or(0, |advice| advice.wanted);
    ensure!((50..=60).contains(&wanted), "{wanted} blocks are wanted");
    // The guest gives them, and is not asked for more.
    let blocks: Vec<_> = (AREA_BLOCKS..64).collect();
    for &block in &blocks {
        machine.guest.book(block)?;
    }
    machine.talk()?;
    for blocks in blocks.chunks(16) {
        ensure!(machine.drop_blocks(wire::REQ_RELEASE, &singles(blocks))? == wire::S_OK);
    }
    machine.driver.wait_until("no wish", PATIENCE, |driver| {
        driver.advice().is_some_and(|advice| advice.wanted == 0)
    })?;
    let left = machine.memory.resident_bytes()?;
    ensure!(left <= AREA_BLOCKS * BLOCK_SIZE, "{left} bytes are left");
    Ok(())
}

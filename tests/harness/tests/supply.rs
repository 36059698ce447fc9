//! How many huge pages a guest gets, and what its driver hears of their end.

mod common;

use std::time::{Duration, Instant};

use anyhow::{ensure, Context};
use common::{Lab, Result};
use gemini_harness::driver::AREA_BLOCKS;
use gemini_harness::machine::{each, singles, Machine, PATIENCE};
use gemini_harness::memory::BLOCK_SIZE;
use gemini_harness::outside;
use gemini_harness::rng::Rng;
use gemini_harness::wire::{self, guest_state, host_state, Range};

const HUGE: u8 = host_state::HUGE;

/// A daemon that lets its guest have so many huge pages.
fn lab_with(blocks: u64) -> Result<Lab> {
    let options = common::options("gemini")?.arg("--cpu-share", "100");
    common::start(options.arg("--huge-max", &(blocks * BLOCK_SIZE).to_string()))
}

/// Blocks that the host truly has huge.
fn huge(machine: &Machine) -> Result<u64> {
    let states = outside::host_states(&machine.memory)?;
    Ok(states.iter().filter(|&&state| state == HUGE).count() as u64)
}

/// Waits until the last advice says whether huge pages are scarce.
fn wait_scarce(machine: &mut Machine, scarce: bool) -> Result {
    machine.driver.wait_until("the advice", PATIENCE, |driver| {
        driver.advice().is_some_and(|advice| (advice.flags & wire::ADVICE_SCARCE != 0) == scarce)
    })
}

/// Gives `block` contents, frees it and books it.
fn book_used(machine: &mut Machine, block: u64) -> Result {
    machine.guest.alloc_huge(block)?;
    machine.guest.free_huge(block)?;
    machine.guest.book(block)
}

#[test]
fn repair_ends_at_the_limit_and_goes_on_when_it_is_raised() -> Result {
    let mut lab = lab_with(5)?;
    let mut machine = lab.boot(40)?;
    for block in 10..22 {
        machine.guest.alloc_huge(block)?;
    }
    machine.talk()?;
    wait_scarce(&mut machine, true)?;
    machine.run_for(Duration::from_secs(1))?;
    ensure!(huge(&machine)? == 5, "{} blocks", huge(&machine)?);
    let status = lab.daemon.status()?;
    ensure!((status.aligned, status.guest_only) == (5, 7), "{status:?}");
    ensure!(status.huge_max == Some(5 * BLOCK_SIZE) && status.scarce, "{status:?}");

    lab.daemon.set_huge_max(Some(8 * BLOCK_SIZE))?;
    lab.daemon.wait_status("at the new limit", PATIENCE, |status| status.aligned == 8)?;
    // What the guest has, it keeps.
    lab.daemon.set_huge_max(Some(BLOCK_SIZE))?;
    machine.run_for(Duration::from_millis(300))?;
    ensure!(huge(&machine)? == 8, "{} blocks", huge(&machine)?);
    lab.daemon.set_huge_max(None)?;
    lab.daemon.wait_status("without a limit", PATIENCE, |status| status.aligned == 12)?;
    wait_scarce(&mut machine, false)?;
    machine.guest.ensure_intact()
}

#[test]
fn policies_that_prepare_nothing_say_so() -> Result {
    for policy in ["none", "always"] {
        let lab = common::start(common::options(policy)?)?;
        let mut machine = lab.boot(8)?;
        machine.talk()?;
        wait_scarce(&mut machine, true).context(policy)?;
    }
    Ok(())
}

#[test]
fn settings_that_mean_nothing_are_refused() -> Result {
    let lab = lab_with(5)?;
    for request in [
        serde_json::json!({"cmd": "set"}),
        serde_json::json!({"cmd": "set", "huge_max": -1}),
        serde_json::json!({"cmd": "set", "huge_max": "5X"}),
        serde_json::json!({"cmd": "set", "huge_max": 1, "other": 1}),
    ] {
        let answer = lab.daemon.control(&request)?;
        ensure!(answer["error"].is_string(), "{request}: {answer}");
    }
    ensure!(lab.daemon.status()?.huge_max == Some(5 * BLOCK_SIZE));
    Ok(())
}

#[test]
fn prepare_beyond_the_limit_fails_with_what_it_did() -> Result {
    let lab = lab_with(3)?;
    let mut machine = lab.boot(40)?;
    for block in 10..15 {
        machine.guest.book(block)?;
    }
    machine.talk()?;
    let range = Range { first: 10, count: 5 };
    let answer = machine.driver.request(wire::REQ_PREPARE, &[range], PATIENCE)?;
    ensure!(answer.response.status == wire::S_FAILED, "{answer:?}");
    let told: u32 =
        answer.records.iter().filter(|record| record.state == HUGE).map(|r| r.count).sum();
    ensure!(told == 3 && huge(&machine)? == 3, "{answer:?}");
    // What is huge is no matter of the limit.
    let done = Range { first: 10, count: 3 };
    let answer = machine.driver.request(wire::REQ_PREPARE, &[done], PATIENCE)?;
    ensure!(answer.response.status == wire::S_OK, "{answer:?}");
    wait_scarce(&mut machine, true)
}

#[test]
fn renew_beyond_the_limit_drops_nothing_and_what_was_huge_is_huge_again() -> Result {
    let lab = lab_with(2)?;
    let mut machine = lab.boot(40)?;
    for block in 10..16 {
        book_used(&mut machine, block)?;
    }
    machine.talk()?;
    let status = machine.drop_blocks(wire::REQ_RENEW, &singles(&[10, 11]))?;
    ensure!(status == wire::S_OK, "status {status}");
    machine.wait_host(&[10, 11], |state| state == HUGE, PATIENCE)?;
    wait_scarce(&mut machine, true)?;

    let status = machine.drop_blocks(wire::REQ_RENEW, &singles(&[11, 12]))?;
    ensure!(status == wire::S_BUSY, "status {status}");
    let seen = outside::host_states(&machine.memory)?;
    ensure!(seen[11] == HUGE && seen[12] == host_state::BASE, "{seen:?}");

    for _ in 0..5 {
        let status = machine.drop_blocks(wire::REQ_RENEW, &singles(&[10, 11]))?;
        ensure!(status == wire::S_OK, "status {status}");
        ensure!(huge(&machine)? <= 2);
    }
    let start = Instant::now();
    while huge(&machine)? < 2 {
        ensure!(start.elapsed() < PATIENCE, "they are not huge again");
        machine.run_for(Duration::from_millis(50))?;
    }
    machine.run_for(Duration::from_millis(300))?;
    ensure!(huge(&machine)? == 2);
    // What is given back can be had again.
    let status = machine.drop_blocks(wire::REQ_RELEASE, &singles(&[10]))?;
    ensure!(status == wire::S_OK, "status {status}");
    wait_scarce(&mut machine, false)?;
    let status = machine.drop_blocks(wire::REQ_RENEW, &singles(&[12]))?;
    ensure!(status == wire::S_OK, "status {status}");
    machine.wait_host(&[12], |state| state == HUGE, PATIENCE)?;
    machine.guest.ensure_intact()
}

#[test]
fn a_renewed_block_is_told_of_again_even_if_it_is_huge_as_before() -> Result {
    let lab = lab_with(8)?;
    let mut machine = lab.boot(40)?;
    machine.guest.book(10)?;
    machine.talk()?;
    for _ in 0..20 {
        let told = machine.driver.counters().hint_records;
        let status = machine.drop_blocks(wire::REQ_RENEW, &singles(&[10]))?;
        ensure!(status == wire::S_OK, "status {status}");
        machine.driver.wait_until("told", PATIENCE, |driver| {
            driver.counters().hint_records > told && driver.host()[10] == HUGE
        })?;
    }
    Ok(())
}

#[test]
fn huge_pages_of_no_use_go_where_the_guest_has_huge_pages() -> Result {
    let mut lab = lab_with(6)?;
    let mut machine = lab.boot(40)?;
    for block in 10..16 {
        machine.guest.alloc_huge(block)?;
    }
    machine.talk()?;
    machine.wait_host(&[10, 11, 12, 13, 14, 15], |state| state == HUGE, PATIENCE)?;
    // Two are free now, one is broken, one is held; others want to be aligned.
    machine.guest.free_huge(10)?;
    machine.guest.free_huge(11)?;
    machine.guest.split(12)?;
    machine.guest.free_huge(13)?;
    machine.guest.book(13)?;
    for block in 20..26 {
        machine.guest.alloc_huge(block)?;
    }
    machine.talk()?;
    let status = lab.daemon.wait_status("aligned again", PATIENCE, |status| status.aligned == 5)?;
    ensure!(status.demoted == 3 && status.host_only == 1, "{status:?}");
    ensure!(huge(&machine)? == 6);
    machine.run_for(Duration::from_secs(5))?;
    let status = lab.daemon.status()?;
    ensure!((status.aligned, status.guest_only, status.demoted) == (5, 3, 3), "{status:?}");
    machine.guest.ensure_intact()
}

/// A guest that asks for whatever comes to its mind, as fast as it can.
#[test]
fn no_guest_gets_more_than_its_limit() -> Result {
    const BLOCKS: u64 = 64;
    for (seed, limit) in [(1, 0), (2, 1), (3, 7), (4, 20)] {
        let mut lab = lab_with(limit)?;
        let mut machine = lab.boot(BLOCKS)?;
        let mut rng = Rng::new(seed);
        let mut most = 0;
        let mut asked = 0;
        for round in 0..400 {
            let block = AREA_BLOCKS + rng.below(BLOCKS - AREA_BLOCKS);
            let (state, _) = machine.guest.state(block);
            match state {
                guest_state::FREE if rng.chance(60) => machine.guest.book(block)?,
                guest_state::FREE => machine.guest.alloc_huge(block)?,
                guest_state::HUGE => machine.guest.free_huge(block)?,
                _ => {
                    let held = machine.guest.in_state(guest_state::BOOKED);
                    let some: Vec<u64> =
                        held.into_iter().filter(|_| rng.chance(40)).take(8).collect();
                    let kind = rng.pick(&[wire::REQ_PREPARE, wire::REQ_RENEW, wire::REQ_RELEASE]);
                    if some.is_empty() {
                        machine.guest.unbook(block)?;
                    } else if kind == wire::REQ_PREPARE {
                        machine.driver.request(kind, &singles(&some), PATIENCE)?;
                        asked += 1;
                    } else {
                        machine.drop_blocks(kind, &singles(&some))?;
                        asked += 1;
                    }
                }
            }
            machine.talk()?;
            if round % 4 == 0 {
                most = most.max(huge(&machine)?);
            }
            ensure!(most <= limit, "seed {seed}, round {round}: {most} of {limit} huge pages");
        }
        machine.run_for(Duration::from_millis(500))?;
        most = most.max(huge(&machine)?);
        lab.daemon.ensure_alive()?;
        ensure!(most <= limit && asked > 20, "seed {seed}: {most} of {limit}, {asked} requests");
        // It is a limit, not a wall: the guest gets what it may.
        ensure!(limit == 0 || most > limit / 2, "seed {seed}: only {most} of {limit}");
        machine.guest.ensure_intact()?;
    }
    Ok(())
}

/// Every block of a big request counts, also where ranges overlap what is promised.
#[test]
fn renews_in_a_row_do_not_add_up_to_more_than_the_limit() -> Result {
    let lab = lab_with(6)?;
    let mut machine = lab.boot(48)?;
    for block in 10..34 {
        machine.guest.book(block)?;
    }
    machine.talk()?;
    let mut tickets = Vec::new();
    for first in (10..34).step_by(4) {
        let ranges = [Range { first, count: 4 }];
        tickets.push((ranges, machine.submit_drop(wire::REQ_RENEW, &ranges)?));
    }
    let mut renewed = Vec::new();
    for (ranges, ticket) in tickets {
        let answer = machine.driver.answer(ticket, PATIENCE)?;
        if answer.response.status == wire::S_OK {
            renewed.extend(each(&ranges));
        } else {
            ensure!(answer.response.status == wire::S_BUSY, "{answer:?}");
        }
    }
    ensure!(renewed == [10, 11, 12, 13], "{renewed:?}");
    machine.wait_host(&renewed, |state| state == HUGE, PATIENCE)?;
    ensure!(huge(&machine)? == 4);
    let status = machine.drop_blocks(wire::REQ_RENEW, &singles(&[20, 21]))?;
    ensure!(status == wire::S_OK, "status {status}");
    machine.wait_host(&[20, 21], |state| state == HUGE, PATIENCE).context("the last two")
}

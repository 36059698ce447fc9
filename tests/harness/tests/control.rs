//! What an operator changes while a guest runs has its effect at once.

mod common;

use std::time::{Duration, Instant};

use anyhow::{ensure, Context};
use common::{Lab, Result};
use gemini_harness::machine::{singles, Machine, PATIENCE};
use gemini_harness::memory::BLOCK_SIZE;
use gemini_harness::outside;
use gemini_harness::wire::{self, host_state, Range};
use serde_json::{json, Value};

const HUGE: u8 = host_state::HUGE;
const MIB: u64 = 1 << 20;

fn ask(lab: &Lab, request: &Value) -> Result<Value> {
    let answer = lab.daemon.control(request)?;
    ensure!(answer.get("error").is_none(), "{request}: {answer}");
    Ok(answer)
}

/// Blocks that the host truly has huge.
fn huge(machine: &Machine) -> Result<u64> {
    let states = outside::host_states(&machine.memory)?;
    Ok(states.iter().filter(|&&state| state == HUGE).count() as u64)
}

/// Waits for the end of an action that is under way.
fn wait_at_rest(lab: &Lab) -> Result {
    let start = Instant::now();
    while ask(lab, &json!({"cmd": "status"}))?["acting"] != json!(false) {
        ensure!(start.elapsed() < PATIENCE, "an action without end");
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

fn wait_scarce(machine: &mut Machine, scarce: bool) -> Result {
    machine.driver.wait_until("the advice", PATIENCE, |driver| {
        driver.advice().is_some_and(|advice| (advice.flags & wire::ADVICE_SCARCE != 0) == scarce)
    })
}

#[test]
fn the_driver_is_told_a_timeout_that_is_set_and_none_that_it_can_find_out() -> Result {
    let lab = common::lab("gemini")?;
    let mut machine = lab.boot(8)?;
    for (timeout, ms) in [(json!(90), 90_000), (json!("auto"), 0)] {
        ask(&lab, &json!({"cmd": "set", "booking_timeout": timeout}))?;
        machine.driver.wait_until("the advice", PATIENCE, |driver| {
            driver.advice().is_some_and(|advice| advice.booking_timeout_ms == ms)
        })?;
    }
    let status = ask(&lab, &json!({"cmd": "status"}))?;
    // No thread of the model guest is named as a processor.
    ensure!(status["timeout_source"] == "misaligned", "{status}");
    ensure!(status["timeout_ms"] == 60_000, "{status}");
    Ok(())
}

#[test]
fn a_paused_daemon_makes_nothing_huge_and_answers_as_the_specification_says() -> Result {
    let mut lab = common::lab("gemini")?;
    let mut machine = lab.boot(40)?;
    machine.guest.book(30)?;
    let answer = prepare(&mut machine, 30)?;
    ensure!(answer.0 == wire::S_OK && answer.1 == [HUGE], "{answer:?}");

    ask(&lab, &json!({"cmd": "pause"}))?;
    wait_scarce(&mut machine, true)?;
    for block in 10..16 {
        machine.guest.alloc_huge(block)?;
    }
    for block in [31, 32, 33] {
        machine.guest.alloc_huge(block)?;
        machine.guest.free_huge(block)?;
        machine.guest.book(block)?;
    }
    machine.talk()?;
    machine.run_for(Duration::from_millis(500))?;
    ensure!(huge(&machine)? == 1, "{} blocks", huge(&machine)?);
    let status = lab.daemon.status()?;
    ensure!((status.aligned, status.guest_only) == (0, 6), "the guest is not known: {status:?}");

    let answer = prepare(&mut machine, 31)?;
    ensure!(answer.0 == wire::S_FAILED && answer.1 == [host_state::BASE], "{answer:?}");
    let answer = prepare(&mut machine, 30)?;
    ensure!(answer.0 == wire::S_OK && answer.1 == [HUGE], "{answer:?}");
    for block in [30, 31] {
        let status = machine.drop_blocks(wire::REQ_RENEW, &singles(&[block]))?;
        ensure!(status == wire::S_BUSY, "RENEW of {block}: status {status}");
    }
    let status = machine.drop_blocks(wire::REQ_RELEASE, &singles(&[32]))?;
    ensure!(status == wire::S_OK, "RELEASE: status {status}");
    let states = outside::host_states(&machine.memory)?;
    ensure!(
        (states[30], states[31], states[32]) == (HUGE, host_state::BASE, host_state::ABSENT),
        "{states:?}"
    );
    // Nothing to do is nothing that it does.
    let before = lab.daemon.status()?.cpu_seconds;
    machine.run_for(Duration::from_secs(2))?;
    let spent = lab.daemon.status()?.cpu_seconds - before;
    ensure!(spent < 0.1, "it spent {spent} s of CPU in 2 s");

    ask(&lab, &json!({"cmd": "resume"}))?;
    wait_scarce(&mut machine, false)?;
    lab.daemon.wait_status("at work again", PATIENCE, |status| status.aligned == 6)?;
    let answer = prepare(&mut machine, 31)?;
    ensure!(answer.0 == wire::S_OK && answer.1 == [HUGE], "{answer:?}");
    machine.guest.ensure_intact()
}

/// Status and host states of a PREPARE of one block.
fn prepare(machine: &mut Machine, block: u64) -> Result<(u32, Vec<u8>)> {
    let range = Range { first: block, count: 1 };
    let answer = machine.driver.request(wire::REQ_PREPARE, &[range], PATIENCE)?;
    Ok((answer.response.status, answer.records.iter().map(|record| record.state).collect()))
}

#[test]
fn a_prepare_that_waits_is_answered_when_the_daemon_is_paused() -> Result {
    // A block a second: the second of these waits.
    let options = common::options("gemini")?.arg("--copy-rate", "2M");
    let lab = common::start(options)?;
    let mut machine = lab.boot(40)?;
    for block in 10..20 {
        machine.guest.alloc_huge(block)?;
        machine.guest.free_huge(block)?;
        machine.guest.book(block)?;
    }
    machine.talk()?;
    let range = Range { first: 10, count: 10 };
    let start = Instant::now();
    let answer = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(1_500));
            ask(&lab, &json!({"cmd": "pause"}))
        });
        machine.driver.request(wire::REQ_PREPARE, &[range], PATIENCE)
    })?;
    ensure!(answer.response.status == wire::S_FAILED, "{answer:?}");
    ensure!(start.elapsed() < Duration::from_secs(5), "after {:?}", start.elapsed());
    let done = huge(&machine)?;
    ensure!((1..10).contains(&done), "{done} blocks");
    machine.guest.ensure_intact()
}

#[test]
fn another_policy_counts_at_once() -> Result {
    let mut lab = common::lab("none")?;
    let mut machine = lab.boot(40)?;
    for block in 10..16 {
        machine.guest.alloc_huge(block)?;
    }
    machine.guest.alloc_base(20, 0)?;
    machine.talk()?;
    wait_scarce(&mut machine, true)?;
    machine.run_for(Duration::from_millis(300))?;
    ensure!(huge(&machine)? == 0);
    ask(&lab, &json!({"cmd": "set", "policy": "gemini"}))?;
    lab.daemon.wait_status("aligned", PATIENCE, |status| {
        (status.policy.as_str(), status.aligned, status.host_only) == ("gemini", 6, 0)
    })?;
    wait_scarce(&mut machine, false)?;
    ask(&lab, &json!({"cmd": "set", "policy": "always"}))?;
    lab.daemon.wait_status("collapsing all", PATIENCE, |status| status.host_only > 0)?;
    wait_scarce(&mut machine, true)?;
    ask(&lab, &json!({"cmd": "set", "policy": "none"}))?;
    wait_at_rest(&lab)?;
    let before = huge(&machine)?;
    for block in 25..30 {
        machine.guest.alloc_huge(block)?;
    }
    machine.talk()?;
    machine.run_for(Duration::from_millis(500))?;
    ensure!(huge(&machine)? == before, "what was huge stays so, and nothing else becomes it");
    machine.guest.ensure_intact()
}

#[test]
fn a_lower_copy_rate_counts_at_once_and_spends_no_burst_of_the_former() -> Result {
    let options = common::options("gemini")?.arg("--copy-rate", "4G").arg("--cpu-share", "100");
    let mut lab = common::start(options)?;
    let mut machine = lab.boot(120)?;
    // 400 MiB are saved up by now, more than this guest has.
    let rate = 10 * MIB;
    ask(&lab, &json!({"cmd": "set", "copy_rate": rate}))?;
    for block in 10..100 {
        machine.guest.alloc_huge(block)?;
    }
    machine.talk()?;
    let charged = watch(&lab, Duration::from_secs(4))?;
    let (most, all) = (most_in_a_second(&charged), charged.last().context("no look")?.1);
    ensure!(most <= rate + rate / 10 + BLOCK_SIZE, "{} MiB in a second", most / MIB);
    // It was at work. The rate itself is not to be expected: at so low a one the bucket holds one
    // block, and the time that the kernel takes for it comes on top.
    ensure!(all >= 4 * BLOCK_SIZE, "{} MiB in 4 s: {:?}", all / MIB, lab.daemon.status()?);

    // And a higher one: the rest of the 90 blocks is done in no time.
    ask(&lab, &json!({"cmd": "set", "copy_rate": "1G"}))?;
    let start = Instant::now();
    lab.daemon.wait_status("aligned", PATIENCE, |status| status.aligned == 90)?;
    ensure!(start.elapsed() < Duration::from_secs(5), "it took {:?}", start.elapsed());
    machine.guest.ensure_intact()
}

/// Bytes that the copy budget was charged for, every few milliseconds.
fn watch(lab: &Lab, time: Duration) -> Result<Vec<(Duration, u64)>> {
    let start = Instant::now();
    let mut seen = Vec::new();
    while start.elapsed() < time {
        let status = ask(lab, &json!({"cmd": "status"}))?;
        let charged = status["charged_bytes"].as_u64().context("no charged_bytes")?;
        seen.push((start.elapsed(), charged));
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(seen)
}

fn most_in_a_second(seen: &[(Duration, u64)]) -> u64 {
    let from = |(at, &(since, before)): (usize, &(Duration, u64))| {
        let window =
            seen[at..].iter().take_while(|(then, _)| *then - since <= Duration::from_secs(1));
        window.last().map_or(0, |(_, after)| after - before)
    };
    seen.iter().enumerate().map(from).max().unwrap_or(0)
}

#[test]
fn a_lower_cpu_share_counts_at_once() -> Result {
    let options = common::options("always")?.arg("--copy-rate", "4G").arg("--cpu-share", "100");
    let lab = common::start(options)?;
    let mut machine = lab.boot(40)?;
    ask(&lab, &json!({"cmd": "set", "cpu_share": 2, "policy": "gemini"}))?;
    machine.talk()?;
    // Requests without end, each of which costs CPU: at the former share they would take all.
    let before = lab.daemon.status()?.cpu_seconds;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(4) {
        machine.driver.request(wire::REQ_STATS, &[], PATIENCE)?;
    }
    let spent = lab.daemon.status()?.cpu_seconds - before;
    // 2 % of 4 s, what may be saved up (2 % of 4 s again), and what was under way.
    ensure!(spent < 0.08 + 0.08 + 0.10, "{spent} s of CPU");
    Ok(())
}

//! Requests that are unanswered while the device is reset, while the memory
//! table is replaced, and while the monitor vanishes.
//!
//! Each of these is a barrier: when it returns, no drop is in flight. So the
//! blocks are written again at once, and what is written then must stay.

use anyhow::ensure;

use super::Arena;
use crate::machine::{each, singles, Machine, PATIENCE};
use crate::rng::Rng;
use crate::wire::{self, guest_state, Range};

/// Sends `wanted` requests and resets in the middle of them.
pub fn attack(arena: &mut Arena, wanted: u64) -> anyhow::Result<()> {
    let mut done = 0;
    while arena.go_on(done, wanted) {
        done += once(arena)?;
    }
    arena.machine()?.sync()?;
    Ok(())
}

fn once(arena: &mut Arena) -> anyhow::Result<u64> {
    arena.machine()?.sync()?;
    let mut rng = arena.rng.clone();
    let machine = arena.machine()?;
    let free = machine.guest.in_state(guest_state::FREE);
    let start = rng.index(free.len().saturating_sub(24));
    let held: Vec<u64> = free.into_iter().skip(start).take(24).collect();
    ensure!(held.len() >= 8, "only {} free blocks", held.len());
    for &block in &held {
        machine.guest.book(block)?;
    }
    machine.talk()?;
    let mut sent = submit_all(machine, &mut rng, &held)?;

    let kind = match rng.below(4) {
        0 => {
            machine.reset_device()?;
            "request: unanswered across a stop of the queues"
        }
        1 => {
            machine.reset_device_by_message()?;
            "request: unanswered across a reset"
        }
        2 => {
            machine.session.set_memory(&machine.memory)?;
            "request: unanswered across a new memory table"
        }
        _ => {
            let detached = arena.detach()?;
            arena.attach(detached)?;
            "request: unanswered as the monitor vanishes"
        }
    };
    let swapped = kind == "request: unanswered across a new memory table";
    let machine = arena.machine()?;
    if swapped {
        // The queues ran on: everything must be answered, by the table's barrier
        // or as of an older generation.
        machine
            .driver
            .wait_until("answers", PATIENCE, |driver| driver.unanswered().next().is_none())?;
        while let Some(answer) = machine.driver.take_any_answer() {
            let drops = answer.request.kind != wire::REQ_PREPARE;
            if drops && answer.response.status == wire::S_OK {
                note_dropped(machine, &answer.request.ranges);
            }
        }
    }
    // The barrier is passed: what is written now must stay.
    for &block in &held {
        if !swapped || rng.chance(50) {
            machine.guest.write_block(block);
        }
    }
    let resync = machine.sync()?;
    ensure!(resync < PATIENCE, "resync took {resync:?}");
    for &block in &held {
        machine.guest.unbook(block)?;
    }
    let damages = machine.guest.verify_blocks(&held)?;
    for &block in &held {
        machine.guest.write_block(block);
    }
    if let Some(damage) = damages.first() {
        println!("DAMAGED: {kind}: {damage}");
    }
    arena.damaged += damages.len() as u64;
    arena.rng = rng;
    // The reset itself is an input too.
    sent += 1;
    arena.tally.count(kind, sent);
    Ok(sent)
}

/// Asks for drops and prepares of all of `blocks`, some of them again and again.
/// Returns the number of requests.
fn submit_all(machine: &mut Machine, rng: &mut Rng, blocks: &[u64]) -> anyhow::Result<u64> {
    let mut sent = 0;
    for chunk in blocks.chunks(1 + rng.index(3)) {
        let kind = rng.pick(&[
            wire::REQ_RELEASE,
            wire::REQ_RENEW,
            wire::REQ_RELEASE,
            wire::REQ_RENEW,
            wire::REQ_PREPARE,
        ]);
        let ranges = singles(chunk);
        let times = if rng.chance(20) { 2 } else { 1 };
        for _ in 0..times {
            if kind == wire::REQ_PREPARE {
                if machine.driver.unanswered().filter(|r| r.kind == kind).count() < 12 {
                    machine.driver.submit(kind, &ranges)?;
                    sent += 1;
                }
            } else if machine.driver.unanswered().filter(|r| r.kind != wire::REQ_PREPARE).count()
                < 30
            {
                machine.submit_drop(kind, &ranges)?;
                sent += 1;
            }
        }
    }
    Ok(sent)
}

fn note_dropped(machine: &mut Machine, ranges: &[Range]) {
    for block in each(ranges) {
        machine.guest.contents_dropped(block);
    }
}

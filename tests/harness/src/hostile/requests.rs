//! Unsound and adversarial requests on ctrlq and releaseq.
//!
//! The rings are sound here, so every request must be answered (or, where it
//! has no room for an answer, at least be given back), in ring order, and what
//! is not a sound request of the current generation must drop nothing.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context};

use super::{Arena, BLOCKS, SCRATCH, SCRATCH_BLOCKS};
use crate::driver::AREA_BLOCKS;
use crate::guest::Stake;
use crate::machine::{each, Machine, PATIENCE};
use crate::ring::Buffer;
use crate::rng::Rng;
use crate::wire::{self, Range, Response, CTRLQ, RELEASEQ};

const SLOTS: u64 = 16;
const SLOT_LEN: u64 = 256 << 10;
const RESPONSE_AT: u64 = 64 << 10;
const RESPONSE_ROOM: u32 = 128 << 10;
const OWN: u64 = AREA_BLOCKS + SCRATCH_BLOCKS;

/// A request that was sent, and what may come of it.
struct Sent {
    kind: &'static str,
    /// Where the answer is written, if there is room for one.
    response: Option<u64>,
    /// Whether it may be answered with OK.
    may_succeed: bool,
    /// Blocks of which something is dropped if it is.
    stakes: Vec<Stake>,
    /// The pages that a TRIM drops of them.
    pages: Vec<Range>,
}

/// Sends `wanted` requests, then starts the driver anew.
pub fn attack(arena: &mut Arena, wanted: u64) -> anyhow::Result<()> {
    let mut done = 0;
    while arena.go_on(done, wanted) {
        let queue = arena.rng.pick(&[CTRLQ, RELEASEQ]);
        let count = 1 + arena.rng.below(SLOTS);
        let mut sent = Vec::new();
        for slot in 0..count {
            sent.push(send(arena, queue, slot)?);
        }
        arena.machine()?.driver.queue_mut(queue).kick.write(1)?;
        settle(arena, queue, sent)?;
        done += count;
    }
    done_while_changed(arena)?;
    let machine = arena.machine()?;
    machine.reset_broken_device()?;
    machine.sync()?;
    Ok(())
}

fn ranges_in_memory(rng: &mut Rng, most: usize) -> Vec<Range> {
    (0..1 + rng.index(most))
        .map(|_| {
            let first = OWN + rng.below(BLOCKS - OWN);
            let count = 1 + u32::try_from(rng.below((BLOCKS - first).min(4))).unwrap_or(0);
            Range { first, count }
        })
        .collect()
}

/// Some pages of each of these runs of blocks.
fn pages_of(rng: &mut Rng, blocks: &[Range]) -> Vec<Range> {
    blocks
        .iter()
        .map(|run| {
            let pages = run.count * 512;
            let skipped = u32::try_from(rng.below(u64::from(pages))).unwrap_or(0);
            let count = 1 + u32::try_from(rng.below(u64::from(pages - skipped))).unwrap_or(0);
            let count = count.min(pages - skipped);
            Range { first: run.first * 512 + u64::from(skipped), count }
        })
        .collect()
}

/// A range that is not all in memory, which ends at `end`.
fn range_out_of_memory(rng: &mut Rng, end: u64) -> Range {
    match rng.below(5) {
        0 => Range { first: end + rng.below(1000), count: 1 },
        1 => Range { first: end - 1, count: 2 + rng.bits32() / 2 },
        2 => Range { first: u64::MAX - rng.below(3), count: 1 + rng.bits32() / 2 },
        3 => Range { first: rng.below(end), count: 0 },
        _ => Range { first: rng.bits() | (1 << 40), count: rng.bits32() },
    }
}

/// Puts one request into the ring. `queue` decides which are right there.
fn send(arena: &mut Arena, queue: usize, slot: u64) -> anyhow::Result<Sent> {
    let Arena { rng, machine: Some(machine), tally, .. } = arena else {
        anyhow::bail!("no connection");
    };
    let generation = machine.driver.generation().context("no generation")?;
    let at = SCRATCH + slot * SLOT_LEN;
    let drops = queue == RELEASEQ;
    let right = if drops {
        rng.pick(&[wire::REQ_RELEASE, wire::REQ_RENEW, wire::REQ_TRIM])
    } else {
        rng.pick(&[wire::REQ_PREPARE, wire::REQ_QUERY])
    };
    let blocks = ranges_in_memory(rng, 3);
    // A TRIM names base pages, and any part of these blocks will do.
    let inside = if right == wire::REQ_TRIM { pages_of(rng, &blocks) } else { blocks.clone() };
    let mut with_bad = inside.clone();
    let end = if right == wire::REQ_TRIM { BLOCKS * 512 } else { BLOCKS };
    let bad = range_out_of_memory(rng, end);
    with_bad.insert(rng.index(with_bad.len() + 1), bad);

    let sound = wire::request(right, generation, &inside);
    let mut room = RESPONSE_ROOM;
    // Sound requests for blocks in use are what a hostile guest does to itself;
    // few of them suffice, as their blocks have to be filled again.
    let choice = if rng.chance(6) { 0 } else { 1 + rng.below(14) };
    let (kind, bytes, may_succeed) = match choice {
        0 => ("request: of blocks in use", sound, true),
        1 => {
            let bytes = wire::request(right, generation, &with_bad);
            ("request: partly out of range", bytes, false)
        }
        2 => {
            let bytes = wire::request(right, generation, &[bad]);
            ("request: out of range", bytes, false)
        }
        3 => {
            let older = generation.wrapping_sub(1 + rng.below(3));
            let bytes = wire::request(right, older, &inside);
            ("request: older generation", bytes, false)
        }
        4 => {
            let other = rng.bits() | (1 << 63);
            let bytes = wire::request(right, other.wrapping_add(generation), &inside);
            ("request: any generation", bytes, false)
        }
        5 => {
            let wrong = match right {
                wire::REQ_PREPARE | wire::REQ_QUERY => {
                    rng.pick(&[wire::REQ_RELEASE, wire::REQ_RENEW, wire::REQ_TRIM])
                }
                _ => rng.pick(&[wire::REQ_PREPARE, wire::REQ_QUERY, wire::REQ_STATS]),
            };
            let bytes = wire::request(wrong, generation, &inside);
            ("request: on the wrong queue", bytes, false)
        }
        6 => {
            let unknown = rng.pick(&[0, 4, 9, 15, 19, 255, 256 + 16, 0xffff]);
            let bytes = wire::request(unknown, generation, &inside);
            ("request: unknown type", bytes, false)
        }
        7 => {
            let count = u32::try_from(inside.len()).unwrap_or(0) + 1 + rng.bits32() / 2;
            let bytes = wire::request_with_count(right, generation, count, &inside);
            ("request: more ranges than bytes", bytes, false)
        }
        8 => {
            let many = vec![bad; wire::MAX_RANGES + 1 + rng.index(1000)];
            let bytes = wire::request(right, generation, &many);
            ("request: more ranges than allowed", bytes, false)
        }
        9 => {
            let mut bytes = sound;
            bytes.truncate(rng.index(bytes.len()).max(1));
            ("request: truncated", bytes, false)
        }
        10 => {
            room = 0;
            // Nothing may be dropped that cannot be answered for.
            ("request: no room for an answer", sound, false)
        }
        11 => {
            room = 1 + rng.bits32() % 15;
            ("request: an answer does not fit", sound, false)
        }
        12 => {
            let bytes = wire::request(right, generation, &[]);
            ("request: no ranges", bytes, true)
        }
        13 => {
            let mut bytes = vec![0; 1 + rng.index(5000)];
            rng.fill(&mut bytes);
            ("request: random bytes", bytes, false)
        }
        _ => {
            // Ranges that lie on each other, all out of range but the last.
            let twice = [bad, inside[0], inside[0], bad];
            let bytes = wire::request(right, generation, &twice);
            ("request: repeats itself", bytes, false)
        }
    };
    let stakes = if drops && may_succeed && choice == 0 {
        let mut blocks: Vec<u64> = each(&blocks).collect();
        blocks.sort_unstable();
        blocks.dedup();
        blocks.into_iter().map(|block| machine.guest.put_at_stake(block)).collect()
    } else {
        Vec::new()
    };

    let pages = if right == wire::REQ_TRIM && !stakes.is_empty() { inside } else { Vec::new() };
    machine.memory.write(at, &bytes);
    machine.memory.write(at + RESPONSE_AT, &[0xff; 16]);
    let mut buffers = split(rng, at, u32::try_from(bytes.len())?);
    if room > 0 {
        buffers.push(Buffer { addr: at + RESPONSE_AT, len: room, writable: true });
    }
    machine.driver.queue_mut(queue).ring.add(&buffers)?;
    tally.count(kind, 1);
    let response = (room >= 16).then_some(at + RESPONSE_AT);
    Ok(Sent { kind, response, may_succeed, stakes, pages })
}

/// One buffer, or now and then two or three that hold the same bytes in pieces.
fn split(rng: &mut Rng, at: u64, len: u32) -> Vec<Buffer> {
    let mut cuts = vec![0, len];
    if rng.chance(20) {
        for _ in 0..1 + rng.index(2) {
            cuts.push(u32::try_from(rng.below(u64::from(len))).unwrap_or(0));
        }
        cuts.sort_unstable();
        cuts.dedup();
    }
    cuts.windows(2)
        .map(|cut| Buffer { addr: at + u64::from(cut[0]), len: cut[1] - cut[0], writable: false })
        .collect()
}

/// Waits until all of `sent` came back, and judges what did.
fn settle(arena: &mut Arena, queue: usize, sent: Vec<Sent>) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let mut staked = Vec::new();
    for Sent { kind, response, may_succeed, stakes, pages } in sent {
        let machine = arena.machine()?;
        while machine.driver.queue_mut(queue).ring.take_used().context(kind)?.is_none() {
            ensure!(Instant::now() < deadline, "{kind}: not given back");
            machine.driver.poll_hints()?;
            std::thread::sleep(Duration::from_micros(20));
        }
        let status = response.map(|at| {
            let mut bytes = [0; wire::RESPONSE_LEN];
            machine.memory.read(at, &mut bytes);
            Response::parse(&bytes).status
        });
        let succeeded = status == Some(wire::S_OK);
        for stake in &stakes {
            match status {
                Some(wire::S_OK) if pages.is_empty() => machine.guest.contents_dropped(stake.block),
                Some(wire::S_OK) => machine.guest.put_back(stake),
                Some(wire::S_FAILED) => {}
                // Any other status says that nothing was dropped.
                _ => machine.guest.put_back(stake),
            }
        }
        if status == Some(wire::S_OK) {
            for run in &pages {
                machine.guest.pages_dropped(run.first..run.first + u64::from(run.count));
            }
        }
        staked.extend(stakes.iter().map(|stake| stake.block));
        if succeeded && !may_succeed {
            println!("WRONG ANSWER: {kind}: answered with success");
            arena.wrong_answers += 1;
        }
    }
    // Only now: as long as one is unanswered, it may be about the same block.
    staked.sort_unstable();
    staked.dedup();
    check_and_refill(arena, &staked)
}

fn check_and_refill(arena: &mut Arena, blocks: &[u64]) -> anyhow::Result<()> {
    let machine = arena.machine()?;
    let damages = machine.guest.verify_blocks(blocks)?;
    for &block in blocks {
        machine.guest.write_block(block);
    }
    arena.damaged += damages.len() as u64;
    if let Some(damage) = damages.first() {
        println!("DAMAGED by a sound request: {damage}");
    }
    Ok(())
}

/// Requests whose bytes change while the device reads them: between a block that
/// may be dropped and what is out of range. Whatever the device makes of them,
/// nothing else may be lost.
fn done_while_changed(arena: &mut Arena) -> anyhow::Result<()> {
    const REQUESTS: u64 = 50;
    let machine = arena.machine()?;
    let generation = machine.driver.generation().context("no generation")?;
    // The last block of the scratch area holds nothing that must stay.
    let victim = OWN - 1;
    let at = SCRATCH;
    let bytes = wire::request(wire::REQ_RELEASE, generation, &[Range { first: victim, count: 1 }]);
    machine.memory.write(at, &bytes);
    let stop = Arc::new(AtomicBool::new(false));
    let flipper = {
        let (stop, memory) = (Arc::clone(&stop), Arc::clone(&machine.memory));
        std::thread::spawn(move || {
            let values = [victim, u64::MAX, victim, BLOCKS, victim, 1 << 43];
            while !stop.load(Ordering::Relaxed) {
                for value in values {
                    memory.write(at + 16, &value.to_le_bytes());
                }
            }
        })
    };
    let result = send_changing(machine, at, u32::try_from(bytes.len())?, REQUESTS);
    stop.store(true, Ordering::Relaxed);
    let joined = flipper.join();
    ensure!(joined.is_ok(), "the flipping thread failed");
    result?;
    arena.tally.count("request: changed while it is read", REQUESTS);
    Ok(())
}

fn send_changing(machine: &mut Machine, at: u64, len: u32, count: u64) -> anyhow::Result<()> {
    let buffers = [
        Buffer { addr: at, len, writable: false },
        Buffer { addr: at + RESPONSE_AT, len: 16, writable: true },
    ];
    for _ in 0..count {
        let queue = machine.driver.queue_mut(RELEASEQ);
        queue.ring.add(&buffers)?;
        queue.kick.write(1)?;
        let deadline = Instant::now() + PATIENCE;
        while machine.driver.queue_mut(RELEASEQ).ring.take_used()?.is_none() {
            ensure!(Instant::now() < deadline, "changing request: not given back");
            machine.driver.poll_hints()?;
            std::thread::sleep(Duration::from_micros(20));
        }
    }
    Ok(())
}

//! Broken rings: chains without end, buffers out of memory, indices that jump.
//!
//! A device may stop to serve a ring that is broken, so each one is stopped and
//! started anew after an attack.

use std::time::{Duration, Instant};

use super::{Arena, SCRATCH, SCRATCH_LEN};
use crate::machine::Machine;
use crate::ring::{Descriptor, DESC_INDIRECT, DESC_NEXT, DESC_WRITE};
use crate::rng::Rng;
use crate::wire;

/// Breaks rings with `wanted` elements, then starts the driver anew.
pub fn attack(arena: &mut Arena, wanted: u64) -> anyhow::Result<()> {
    let mut done = 0;
    let mut noise = vec![0; usize::try_from(SCRATCH_LEN)?];
    arena.rng.fill(&mut noise);
    arena.machine()?.memory.write(SCRATCH, &noise);
    while arena.go_on(done, wanted) {
        // A device uses few hint buffers, and only when it has something to tell.
        let index =
            if arena.rng.chance(10) { wire::HINTQ } else { 1 + arena.rng.index(wire::QUEUES - 1) };
        done += break_ring(arena, index)?;
    }
    let machine = arena.machine()?;
    machine.reset_broken_device()?;
    machine.sync()?;
    Ok(())
}

/// Fills one queue with bad chains and lets the device work on them. Returns the
/// number of elements that it got to.
fn break_ring(arena: &mut Arena, index: usize) -> anyhow::Result<u64> {
    let Arena { rng, machine: Some(machine), tally, .. } = arena else {
        anyhow::bail!("no connection");
    };
    machine.session.stop_queue(index)?;
    let ring = &mut machine.driver.queue_mut(index).ring;
    ring.reset();
    let size = ring.layout().size;
    let mut kinds = Vec::new();
    if rng.chance(5) {
        whole_table(rng, size, &mut |slot, descriptor| {
            ring.write_descriptor(slot, &descriptor);
        });
        ring.publish(0);
        kinds.push("chain: through the whole table");
    } else {
        // Each chain has three descriptors to itself.
        let count = 1 + rng.bits16() % (size / 3);
        for slot in (0..).step_by(3).take(usize::from(count)) {
            let slots = [slot, slot + 1, slot + 2];
            kinds.push(bad_chain(rng, size, slots, &mut |slot, descriptor| {
                ring.write_descriptor(slot, &descriptor);
            }));
            ring.publish(slot);
        }
    }
    // What a device may stop at comes last, so that it gets so far.
    if rng.chance(20) {
        ring.publish(rng.pick(&[size, size + 1, 0x7fff, 0xffff]));
        kinds.push("ring: head out of the table");
    } else if rng.chance(20) {
        let jump = rng.pick(&[size + 1, 0x7fff, 0x8000, 0xfff0, 2 * size]);
        ring.set_avail_idx(ring.avail_idx().wrapping_add(jump));
        // Nothing in such a ring has to be looked at.
        kinds = vec!["ring: available index jumps"];
    }
    start(machine, index)?;
    let used = wait(machine, index)?;
    // Counted is what the device got to: what it used, and what it stopped at.
    kinds.truncate(usize::from(used) + 1);
    for kind in &kinds {
        tally.count(kind, 1);
    }
    Ok(kinds.len() as u64)
}

fn start(machine: &mut Machine, index: usize) -> anyhow::Result<()> {
    let Machine { memory, session, driver, .. } = machine;
    session.start_queue(index, driver.queue_mut(index), memory, 0)
}

/// Gives the device time until it has used everything or makes no progress, and
/// returns its used index.
fn wait(machine: &mut Machine, index: usize) -> anyhow::Result<u16> {
    let mut last = None;
    let mut since = Instant::now();
    while since.elapsed() < Duration::from_millis(1) {
        let ring = &machine.driver.queue_mut(index).ring;
        let used = ring.used_index_in_memory();
        if used == ring.avail_idx() {
            return Ok(used);
        }
        if last != Some(used) {
            last = Some(used);
            since = Instant::now();
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    Ok(last.unwrap_or(0))
}

/// An address in the scratch area, with room for the longest batch behind it.
fn scratch(rng: &mut Rng) -> u64 {
    SCRATCH + rng.below(SCRATCH_LEN - (256 << 10))
}

fn outside(rng: &mut Rng) -> u64 {
    rng.pick(&[
        super::BLOCKS << 21,
        (super::BLOCKS << 21) + 4096,
        1 << 40,
        1 << 63,
        u64::MAX,
        u64::MAX - 15,
        u64::MAX - 4095,
    ])
}

/// A chain through the whole table, one byte in each descriptor.
fn whole_table(rng: &mut Rng, size: u16, write: &mut dyn FnMut(u16, Descriptor)) {
    for slot in 0..size {
        let descriptor = Descriptor {
            addr: scratch(rng),
            len: 1,
            flags: if slot + 1 < size { DESC_NEXT } else { 0 },
            next: slot + 1,
        };
        write(slot, descriptor);
    }
}

/// Writes a bad chain into at most three slots, the first of which is its head,
/// and returns its kind.
fn bad_chain(
    rng: &mut Rng,
    size: u16,
    [head, second, third]: [u16; 3],
    write: &mut dyn FnMut(u16, Descriptor),
) -> &'static str {
    let writable = if rng.chance(50) { DESC_WRITE } else { 0 };
    let good =
        Descriptor { addr: scratch(rng), len: 1 + rng.bits32() % 4096, flags: writable, next: 0 };
    match rng.below(14) {
        0 => {
            let flags = good.flags | DESC_NEXT;
            write(head, Descriptor { flags, next: head, ..good });
            "chain: loops to itself"
        }
        1 => {
            let flags = good.flags | DESC_NEXT;
            write(head, Descriptor { flags, next: second, ..good });
            write(second, Descriptor { flags, next: third, ..good });
            write(third, Descriptor { flags, next: head, ..good });
            "chain: loops"
        }
        2 => {
            let flags = good.flags | DESC_NEXT;
            let next = size + rng.bits16() / 2;
            write(head, Descriptor { flags, next, ..good });
            "chain: next is out of the table"
        }
        3 => {
            let len = rng.pick(&[u32::MAX, u32::MAX - 15, 1 << 31]);
            write(head, Descriptor { len, ..good });
            "buffer: gigabytes long"
        }
        4 => {
            let addr = outside(rng);
            write(head, Descriptor { addr, ..good });
            "buffer: out of memory"
        }
        5 => {
            let addr = (super::BLOCKS << 21) - 8;
            // Read only: what lies before the end is the guest's.
            let flags = good.flags & !DESC_WRITE;
            write(head, Descriptor { addr, flags, len: 64, ..good });
            "buffer: runs out of memory"
        }
        6 => {
            let addr = u64::MAX - 7;
            write(head, Descriptor { addr, len: 64, ..good });
            "buffer: address overflows"
        }
        7 => {
            write(head, Descriptor { len: 0, ..good });
            "buffer: empty"
        }
        8 => {
            let flags = DESC_INDIRECT | writable;
            let len = 16 * (1 + rng.bits32() % 64);
            write(head, Descriptor { flags, len, ..good });
            "indirect: not negotiated, random table"
        }
        9 => {
            let len = 1 + rng.bits32() % 15;
            write(head, Descriptor { flags: DESC_INDIRECT, len, ..good });
            "indirect: table is no multiple"
        }
        10 => {
            let addr = outside(rng);
            write(head, Descriptor { flags: DESC_INDIRECT, addr, len: 64, ..good });
            "indirect: table out of memory"
        }
        11 => {
            let flags = DESC_INDIRECT | DESC_NEXT;
            write(head, Descriptor { flags, next: second, len: 32, ..good });
            write(second, Descriptor { flags: DESC_INDIRECT, len: u32::MAX, ..good });
            "indirect: with next, gigantic"
        }
        12 => {
            let next = second;
            write(head, Descriptor { flags: DESC_WRITE | DESC_NEXT, next, len: 64, ..good });
            write(second, Descriptor { flags: 0, len: 64, addr: scratch(rng), ..good });
            "chain: writable before readable"
        }
        _ => {
            let flags = rng.bits16() & !(DESC_NEXT | DESC_INDIRECT);
            write(head, Descriptor { flags, ..good });
            "descriptor: unknown flags, random bytes"
        }
    }
}

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
        let index = arena.rng.index(wire::QUEUES);
        done += break_ring(arena, index)?;
    }
    let machine = arena.machine()?;
    machine.reset_device()?;
    machine.sync()?;
    Ok(())
}

/// Fills one queue with bad chains, lets the device work on them, and starts the
/// queue anew. Returns the number of elements.
fn break_ring(arena: &mut Arena, index: usize) -> anyhow::Result<u64> {
    let Arena {
        rng,
        machine: Some(machine),
        tally,
        ..
    } = arena
    else {
        anyhow::bail!("no connection");
    };
    machine.session.stop_queue(index)?;
    let ring = &mut machine.driver.queue_mut(index).ring;
    ring.reset();
    let size = ring.layout().size;
    let count = 1 + rng.below(u64::from(size) - 1);
    for _ in 0..count {
        let (kind, head) = bad_chain(rng, size, &mut |slot, descriptor| {
            ring.write_descriptor(slot, &descriptor);
        });
        ring.publish(head);
        tally.count(kind, 1);
    }
    let mut elements = count;
    if rng.chance(15) {
        let jump = rng.pick(&[size + 1, 0x7fff, 0x8000, 0xfff0, 2 * size]);
        ring.set_avail_idx(ring.avail_idx().wrapping_add(jump));
        tally.count("ring: available index jumps", 1);
        elements += 1;
    }
    start(machine, index)?;
    wait(machine, index)?;
    Ok(elements)
}

fn start(machine: &mut Machine, index: usize) -> anyhow::Result<()> {
    let Machine {
        memory,
        session,
        driver,
        ..
    } = machine;
    session.start_queue(index, driver.queue_mut(index), memory, 0)
}

/// Gives the device time until it has used everything or makes no progress.
fn wait(machine: &mut Machine, index: usize) -> anyhow::Result<()> {
    let mut last = None;
    let mut since = Instant::now();
    while since.elapsed() < Duration::from_millis(1) {
        let ring = &machine.driver.queue_mut(index).ring;
        let used = ring.used_index_in_memory();
        if used == ring.avail_idx() {
            return Ok(());
        }
        if last != Some(used) {
            last = Some(used);
            since = Instant::now();
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    Ok(())
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

/// Writes a bad chain of at most a few descriptors and returns its head.
fn bad_chain(
    rng: &mut Rng,
    size: u16,
    write: &mut dyn FnMut(u16, Descriptor),
) -> (&'static str, u16) {
    let mut slot = || u16::try_from(rng.below(u64::from(size))).unwrap_or(0);
    let (head, second, third) = (slot(), slot(), slot());
    let writable = if rng.chance(50) { DESC_WRITE } else { 0 };
    let good = Descriptor {
        addr: scratch(rng),
        len: 1 + rng.bits32() % 4096,
        flags: writable,
        next: 0,
    };
    let kind = match rng.below(16) {
        0 => {
            let flags = good.flags | DESC_NEXT;
            write(
                head,
                Descriptor {
                    flags,
                    next: head,
                    ..good
                },
            );
            "chain: loops to itself"
        }
        1 => {
            let flags = good.flags | DESC_NEXT;
            write(
                head,
                Descriptor {
                    flags,
                    next: second,
                    ..good
                },
            );
            write(
                second,
                Descriptor {
                    flags,
                    next: third,
                    ..good
                },
            );
            write(
                third,
                Descriptor {
                    flags,
                    next: head,
                    ..good
                },
            );
            "chain: loops"
        }
        2 => {
            let flags = good.flags | DESC_NEXT;
            let next = size + rng.bits16() / 2;
            write(
                head,
                Descriptor {
                    flags,
                    next,
                    ..good
                },
            );
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
            write(
                head,
                Descriptor {
                    addr,
                    flags,
                    len: 64,
                    ..good
                },
            );
            "buffer: runs out of memory"
        }
        6 => {
            let addr = u64::MAX - 7;
            write(
                head,
                Descriptor {
                    addr,
                    len: 64,
                    ..good
                },
            );
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
            write(
                head,
                Descriptor {
                    flags: DESC_INDIRECT,
                    len,
                    ..good
                },
            );
            "indirect: table is no multiple"
        }
        10 => {
            let addr = outside(rng);
            write(
                head,
                Descriptor {
                    flags: DESC_INDIRECT,
                    addr,
                    len: 64,
                    ..good
                },
            );
            "indirect: table out of memory"
        }
        11 => {
            let flags = DESC_INDIRECT | DESC_NEXT;
            write(
                head,
                Descriptor {
                    flags,
                    next: second,
                    len: 32,
                    ..good
                },
            );
            write(
                second,
                Descriptor {
                    flags: DESC_INDIRECT,
                    len: u32::MAX,
                    ..good
                },
            );
            "indirect: with next, gigantic"
        }
        12 => {
            let head = rng.pick(&[size, size + 1, 0x7fff, 0xffff]);
            return ("ring: head out of the table", head);
        }
        13 => {
            let next = second;
            write(
                head,
                Descriptor {
                    flags: DESC_WRITE | DESC_NEXT,
                    next,
                    len: 64,
                    ..good
                },
            );
            write(
                second,
                Descriptor {
                    flags: 0,
                    len: 64,
                    addr: scratch(rng),
                    ..good
                },
            );
            "chain: writable before readable"
        }
        14 => {
            // A chain through the whole table, one byte each.
            for slot in 0..size {
                let flags = if slot + 1 < size { DESC_NEXT } else { 0 };
                let next = slot + 1;
                write(
                    slot,
                    Descriptor {
                        addr: scratch(rng),
                        len: 1,
                        flags,
                        next,
                    },
                );
            }
            return ("chain: through the whole table", 0);
        }
        _ => {
            let flags = rng.bits16() & !(DESC_NEXT | DESC_INDIRECT);
            write(head, Descriptor { flags, ..good });
            "descriptor: unknown flags, random bytes"
        }
    };
    (kind, head)
}

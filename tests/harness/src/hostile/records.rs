//! Unsound records and batches on reportq.

use super::{Arena, BLOCKS};
use crate::machine::PATIENCE;
use crate::rng::Rng;
use crate::wire::{self, Batch, Record};

/// Sends `wanted` records and batches, then starts the driver anew.
pub fn attack(arena: &mut Arena, wanted: u64) -> anyhow::Result<()> {
    let mut done = 0;
    while arena.go_on(done, wanted) {
        let sent = if arena.rng.chance(25) { odd_batch(arena)? } else { odd_records(arena)? };
        done += sent;
    }
    let machine = arena.machine()?;
    machine.reset_device()?;
    machine.sync()?;
    Ok(())
}

/// A sound batch of unsound records. Now and then it is as long as one may be.
fn odd_records(arena: &mut Arena) -> anyhow::Result<u64> {
    let count = if arena.rng.chance(1) { wire::MAX_RECORDS } else { 1 + arena.rng.index(64) };
    let mut records = Vec::with_capacity(count);
    for _ in 0..count {
        let (kind, record) = odd_record(&mut arena.rng);
        arena.tally.count(kind, 1);
        records.push(record);
    }
    let flags = if arena.rng.chance(10) {
        arena.rng.bits16() & (wire::SYNC_START | wire::SYNC_END)
    } else {
        0
    };
    let machine = arena.machine()?;
    let generation = machine.driver.generation().unwrap_or(0);
    let bytes = wire::state_batch(generation, flags, &records);
    machine.driver.send_report(&bytes, PATIENCE)?;
    Ok(count as u64)
}

fn odd_record(rng: &mut Rng) -> (&'static str, Record) {
    let sound = Record {
        first: rng.below(BLOCKS),
        count: 1,
        used: 0,
        state: 1 + u8::try_from(rng.below(5)).unwrap_or(0),
        flags: 0,
    };
    match rng.below(9) {
        0 => {
            let first = BLOCKS + rng.below(1 << 20);
            ("record: first block out of range", Record { first, ..sound })
        }
        1 => {
            let count = u32::try_from(BLOCKS - sound.first + 1 + rng.below(1000)).unwrap_or(1);
            ("record: runs out of range", Record { count, ..sound })
        }
        2 => {
            let record = Record { first: u64::MAX - rng.below(4), count: rng.bits32(), ..sound };
            ("record: first + count overflows", record)
        }
        3 => ("record: no blocks", Record { count: 0, ..sound }),
        4 => {
            let count = u32::MAX - u32::from(rng.bits8());
            ("record: 4 billion blocks", Record { count, ..sound })
        }
        5 => {
            let state = 6 + rng.bits8() % 250;
            ("record: unknown state", Record { state, ..sound })
        }
        6 => {
            let flags = rng.bits8() | 1;
            ("record: reserved flags", Record { flags, ..sound })
        }
        7 => {
            let used = rng.bits32().max(513);
            ("record: more pages than a block has", Record { used, ..sound })
        }
        _ => {
            let count = 1 + u32::try_from(rng.below(BLOCKS - sound.first)).unwrap_or(0);
            ("record: overlaps others, untrue", Record { count, ..sound })
        }
    }
}

/// A batch that is unsound itself; one input.
fn odd_batch(arena: &mut Arena) -> anyhow::Result<u64> {
    let generation = arena.machine()?.driver.generation().unwrap_or(0);
    let rng = &mut arena.rng;
    let sound = Batch { generation, count: 1, kind: wire::BATCH_STATE, flags: 0 };
    let (_, record) = odd_record(rng);
    let (kind, batch, records) = match rng.below(9) {
        0 => {
            let generation = generation.wrapping_sub(1 + rng.below(3));
            ("batch: older generation", Batch { generation, ..sound }, 1)
        }
        1 => {
            let generation = rng.bits();
            ("batch: any generation", Batch { generation, ..sound }, 1)
        }
        2 => {
            let count = 2 + rng.bits32() / 2;
            ("batch: more records than bytes", Batch { count, ..sound }, 1)
        }
        3 => ("batch: fewer records than bytes", sound, 2 + rng.index(100)),
        4 => {
            let count = u32::try_from(wire::MAX_RECORDS + 1 + rng.index(1000)).unwrap_or(0);
            let records = count as usize;
            ("batch: more records than allowed", Batch { count, ..sound }, records)
        }
        5 => {
            let kind = 2 + rng.bits16() / 2;
            ("batch: unknown type", Batch { kind, ..sound }, 1)
        }
        6 => {
            let kind = wire::BATCH_ADVICE;
            ("batch: advice from the driver", Batch { kind, ..sound }, 1)
        }
        7 => {
            let flags = rng.bits16() | 4;
            ("batch: unknown flags", Batch { flags, ..sound }, 1)
        }
        _ => ("batch: truncated", sound, 1),
    };
    let mut bytes = batch.bytes().to_vec();
    // A buffer of the driver has room for 128 KiB.
    for _ in 0..records.min(5000) {
        bytes.extend_from_slice(&record.bytes());
    }
    if kind == "batch: truncated" {
        let len = 1 + rng.index(bytes.len() - 1);
        bytes.truncate(len);
    }
    arena.tally.count(kind, 1);
    arena.machine()?.driver.send_report(&bytes, PATIENCE)?;
    Ok(1)
}

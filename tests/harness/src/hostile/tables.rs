//! Unsound memory tables, and sound ones that are swapped under load.
//!
//! The sessions here have a memory file of their own: nothing of the model
//! guest is in it.

use std::os::fd::RawFd;

use super::raw::{code, mem_table, u64s, Message, Raw, Zoo, NEED_REPLY};
use super::Arena;
use crate::memory::{GuestMemory, Placement, BLOCK_SIZE};
use crate::ring::RingLayout;
use crate::rng::Rng;
use crate::wire;

const SIZE: u64 = 8 * BLOCK_SIZE;

/// Sends `wanted` tables over many connections, then connects soundly, and swaps
/// sound tables while the driver is at work.
pub fn attack(arena: &mut Arena, wanted: u64) -> anyhow::Result<()> {
    let detached = arena.detach()?;
    let zoo = Zoo::new(SIZE)?;
    let memory = GuestMemory::new(SIZE, Placement::Aligned)?;
    let socket = arena.daemon.socket();
    let mut done = 0;
    while arena.go_on(done, wanted) {
        let mut raw = Raw::connect(&socket)?;
        let depth = 1 + arena.rng.below(3);
        raw.handshake(depth, &memory, 0, &sound(&memory))?;
        for _ in 0..1 + arena.rng.below(12) {
            let (kind, mut message) = unsound(&mut arena.rng, &memory, &zoo);
            if arena.rng.chance(50) {
                message.flags |= NEED_REPLY;
            }
            if !raw.send(&message)? {
                break;
            }
            arena.tally.count(kind, 1);
            done += 1;
            raw.kick();
            if !raw.barrier()? {
                break;
            }
        }
    }
    for _ in 0..2 + wanted / 20 {
        cut_short(arena)?;
    }
    arena.attach(detached)?;
    let swaps = 10 + wanted / 50;
    swap_under_load(arena, swaps)
}

/// The memory file is cut short while the rings in it are in use: what was memory
/// is none any more, and touching it is a bus error.
fn cut_short(arena: &mut Arena) -> anyhow::Result<()> {
    let memory = GuestMemory::new(SIZE, Placement::Aligned)?;
    // Each ring says that it has something; its descriptors are all zeros.
    for index in 0..wire::QUEUES as u64 {
        let layout = RingLayout::new(index * (16 << 10), 64);
        memory.store_u16(layout.avail + 2, 1 + arena.rng.bits16() % 64);
    }
    let mut raw = Raw::connect(&arena.daemon.socket())?;
    raw.handshake(3, &memory, 0, &sound(&memory))?;
    if arena.rng.chance(50) {
        raw.barrier()?;
    }
    memory.file().set_len(arena.rng.pick(&[0, 4096, BLOCK_SIZE, SIZE / 2]))?;
    raw.kick();
    raw.barrier()?;
    arena.tally.count("table: file cut short in use", 1);
    Ok(())
}

/// The driver reports and the host collapses while the table comes again and
/// again; contents are checked by the caller.
fn swap_under_load(arena: &mut Arena, swaps: u64) -> anyhow::Result<()> {
    let mut rng = arena.rng.clone();
    let machine = arena.machine()?;
    for _ in 0..swaps {
        for block in machine.guest.in_state(wire::guest_state::HUGE) {
            if rng.chance(30) {
                machine.guest.split(block)?;
            }
        }
        if let Some(block) = machine.guest.free_block(rng.below(super::BLOCKS)) {
            machine.guest.alloc_huge(block)?;
            machine.guest.free_huge(block)?;
        }
        machine.talk()?;
        machine.session.set_memory(&machine.memory)?;
    }
    machine.sync()?;
    arena.rng = rng;
    arena.tally.count("table: swapped under load", swaps);
    Ok(())
}

fn sound(memory: &GuestMemory) -> Message {
    let regions = [[0, SIZE, memory.host_address(0), 0]];
    let descriptors: Vec<RawFd> = memory.table().iter().map(|region| region.mmap_handle).collect();
    Message::new(code::SET_MEM_TABLE, mem_table(1, &regions)).with(&descriptors)
}

fn unsound(rng: &mut Rng, memory: &GuestMemory, zoo: &Zoo) -> (&'static str, Message) {
    let address = memory.host_address(0);
    let fd = zoo.sound();
    let half = SIZE / 2;
    let good = [0, SIZE, address, 0];
    let table = |regions: &[[u64; 4]]| {
        let count = u32::try_from(regions.len()).unwrap_or(0);
        let descriptors = vec![fd; regions.len()];
        Message::new(code::SET_MEM_TABLE, mem_table(count, regions)).with(&descriptors)
    };
    let wrong = zoo.wrong();
    match rng.below(17) {
        0 => {
            let shift = rng.below(half / 4096) * 4096;
            let regions = [[0, half, address, 0], [shift, half, address + half, half]];
            ("table: guest addresses overlap", table(&regions))
        }
        1 => {
            let regions = [[0, half, address, 0], [SIZE, half, address + 4096, half]];
            ("table: monitor addresses overlap", table(&regions))
        }
        2 => {
            let gpa = u64::MAX - rng.below(SIZE);
            ("table: guest addresses overflow", table(&[[gpa, SIZE, address, 0]]))
        }
        3 => {
            let high = u64::MAX - rng.below(SIZE);
            ("table: monitor addresses overflow", table(&[[0, SIZE, high, 0]]))
        }
        4 => {
            let offset = u64::MAX - rng.below(2) * 4095;
            ("table: offset overflows", table(&[[0, SIZE, address, offset]]))
        }
        5 => {
            let size = rng.pick(&[1 << 46, 1 << 62, u64::MAX, u64::MAX - 4095]);
            ("table: gigantic region", table(&[[0, size, address, 0]]))
        }
        6 => ("table: empty region", table(&[[0, 0, address, 0]])),
        7 => {
            let size = SIZE + 4096 * (1 + rng.below(100));
            ("table: behind the end of the file", table(&[[0, size, address, 0]]))
        }
        8 => {
            let size = rng.pick(&[1, 16, 4095, 4096, 8192, BLOCK_SIZE - 4096]);
            let gpa = 4096 * rng.below(1000);
            ("table: tiny region", table(&[[gpa, size, address, 0]]))
        }
        9 => {
            let gpa = 1 + rng.below(4095);
            let offset = rng.pick(&[0, 1, 100, 4096]);
            let region = [gpa, half, address + offset, offset];
            ("table: unaligned region", table(&[region]))
        }
        10 => {
            // Aligned to pages, not to blocks, each region by itself.
            let regions: Vec<_> = (0..8)
                .map(|index| {
                    let start = index * (BLOCK_SIZE + 4096);
                    let size = BLOCK_SIZE / 2;
                    [start, size, address + index * size, index * size]
                })
                .collect();
            ("table: regions without a whole block", table(&regions))
        }
        11 => {
            let count = rng.pick(&[0, 2, 8, 33, 255, u32::MAX]);
            let body = mem_table(count, &[good]);
            ("table: count does not match", Message::new(code::SET_MEM_TABLE, body).with(&[fd]))
        }
        12 => {
            let body = mem_table(1, &[good]);
            let descriptors = vec![fd; rng.pick(&[0, 2, 9, 40])];
            let message = Message::new(code::SET_MEM_TABLE, body).with(&descriptors);
            ("table: descriptors do not match", message)
        }
        13 => {
            let body = mem_table(1, &[good]);
            let message = Message::new(code::SET_MEM_TABLE, body).with(&[rng.pick(&wrong)]);
            ("table: wrong kind of descriptor", message)
        }
        14 => {
            let mut region = good;
            region[rng.index(4)] = rng.bits();
            let body = u64s(&[0, region[0], region[1], region[2], region[3]]);
            let message = Message::new(code::ADD_MEM_REG, body).with(&[fd]);
            ("table: unsound region added", message)
        }
        15 => {
            let gpa = 4096 * rng.below(4096);
            let body = u64s(&[0, gpa, SIZE, address, 0]);
            ("table: unknown region removed", Message::new(code::REM_MEM_REG, body))
        }
        _ => {
            let regions = [[1 << 32, half, address, 0], [0, half, address + half, half]];
            ("table: sound, again and again", table(&regions))
        }
    }
}

//! Unsound messages on the socket, at each stage of a session.

use anyhow::ensure;

use super::raw::{code, mem_table, u64s, vring_addr, vring_state, Message, Raw, Zoo};
use super::raw::{NEED_REPLY, VERSION};
use super::{Arena, SCRATCH, SCRATCH_LEN};
use crate::memory::GuestMemory;
use crate::rng::Rng;

/// Where the rings of these sessions lie.
const RINGS: u64 = SCRATCH;

/// Sends `wanted` messages over many connections, then connects soundly.
pub fn attack(arena: &mut Arena, wanted: u64) -> anyhow::Result<()> {
    let detached = arena.detach()?;
    let zoo = Zoo::new(1 << 24)?;
    let socket = arena.daemon.socket();
    let memory = &detached.memory;
    let mut noise = vec![0; usize::try_from(SCRATCH_LEN)?];
    arena.rng.fill(&mut noise);
    memory.write(SCRATCH, &noise);
    let mut done = 0;
    while arena.go_on(done, wanted) {
        let mut raw = Raw::connect(&socket)?;
        let depth = arena.rng.below(4);
        raw.handshake(depth, memory, RINGS, &sound_table(memory))?;
        done += if arena.rng.chance(10) {
            burst(arena, &raw, memory, &zoo)?
        } else {
            one_by_one(arena, &mut raw, depth, memory, &zoo)?
        };
        if arena.rng.chance(20) {
            done += half(arena, &raw, memory, &zoo)?;
        }
        drop(raw);
        if arena.rng.chance(2) {
            let status = arena.daemon.status()?;
            ensure!(status.block_shift == 21, "status is {status:?}");
        }
    }
    arena.attach(detached)?;
    arena.machine()?.sync()?;
    Ok(())
}

/// Sends unsound messages, each after the one before was dealt with, until the
/// daemon closes the connection. Returns how many.
fn one_by_one(
    arena: &mut Arena,
    raw: &mut Raw,
    depth: u64,
    memory: &GuestMemory,
    zoo: &Zoo,
) -> anyhow::Result<u64> {
    let most = 1 + arena.rng.below(20);
    for sent in 0..most {
        let (kind, message) = unsound(&mut arena.rng, memory, zoo);
        if !raw.send(&message)? {
            return Ok(sent);
        }
        arena.tally.count(kind, 1);
        if depth == 3 && arena.rng.chance(30) {
            raw.kick();
        }
        // Behind a message whose size is a lie, nothing can be asked any more.
        let whole = message.body.len() == usize::try_from(message.size).unwrap_or(0);
        if !whole || !raw.barrier()? {
            return Ok(sent + 1);
        }
    }
    Ok(most)
}

/// Sends many at once. The daemon may close at the first, so all count as one.
fn burst(arena: &mut Arena, raw: &Raw, memory: &GuestMemory, zoo: &Zoo) -> anyhow::Result<u64> {
    for _ in 0..1 + arena.rng.below(20) {
        let (_, message) = unsound(&mut arena.rng, memory, zoo);
        if !raw.send(&message)? {
            break;
        }
    }
    arena.tally.count("message: a burst of all kinds", 1);
    Ok(1)
}

fn half(arena: &mut Arena, raw: &Raw, memory: &GuestMemory, zoo: &Zoo) -> anyhow::Result<u64> {
    let (_, message) = unsound(&mut arena.rng, memory, zoo);
    let bytes = message.bytes();
    let half = 1 + arena.rng.index(bytes.len() - 1);
    let sent = raw.send_bytes(&bytes[..half], &message.descriptors)?;
    let sent = u64::from(sent);
    arena.tally.count("message: half sent", sent);
    Ok(sent)
}

/// The table of the arena's own memory.
fn sound_table(memory: &GuestMemory) -> Message {
    let regions: Vec<_> = memory
        .table()
        .iter()
        .map(|region| {
            (
                [
                    region.guest_phys_addr,
                    region.memory_size,
                    region.userspace_addr,
                    region.mmap_offset,
                ],
                region.mmap_handle,
            )
        })
        .collect();
    let (regions, descriptors): (Vec<_>, Vec<_>) = regions.into_iter().unzip();
    let count = u32::try_from(regions.len()).unwrap_or(0);
    Message::new(code::SET_MEM_TABLE, mem_table(count, &regions)).with(&descriptors)
}

/// Sizes of bodies that messages have.
const SIZES: [usize; 8] = [0, 4, 8, 12, 20, 40, 56, 264];

fn random_body(rng: &mut Rng) -> Vec<u8> {
    let mut body = vec![0; rng.pick(&SIZES)];
    rng.fill(&mut body);
    body
}

/// A message that is unsound in one way or another. None of them has the device
/// write where the model guest has contents: ring addresses are in the scratch
/// area or out of memory.
fn unsound(rng: &mut Rng, memory: &GuestMemory, zoo: &Zoo) -> (&'static str, Message) {
    let any = 1 + rng.bits32() % (code::END - 1);
    let queue = rng.pick(&[0, 1, 2, 3, 4, 5, 100, 255, 0x8000, u32::MAX]);
    let (kind, mut message) = match rng.below(17) {
        0 => {
            let unknown = rng.pick(&[0, code::END, 99, 0xffff, u32::MAX]);
            ("message: unknown", Message::new(unknown, random_body(rng)))
        }
        1 => {
            let mut message = Message::new(any_but_addresses(any), random_body(rng));
            message.flags = rng.bits32() & !NEED_REPLY;
            ("message: any flags", message)
        }
        2 => {
            let mut message = Message::new(any, Vec::new());
            message.size = rng.pick(&[0x1001, 0xffff, 1 << 24, 1 << 31, u32::MAX]);
            ("message: gigantic size", message)
        }
        3 => {
            let mut message = Message::new(any_but_addresses(any), random_body(rng));
            message.size = message.size.wrapping_add(rng.bits32() % 64).max(1);
            ("message: size does not match", message)
        }
        4 => {
            let message = Message::new(any_but_addresses(any), random_body(rng));
            ("message: random body", message)
        }
        5 => {
            let wrong = zoo.wrong();
            let many: Vec<_> = (0..1 + rng.index(60)).map(|_| rng.pick(&wrong)).collect();
            let message = Message::new(any_but_addresses(any), random_body(rng));
            ("message: unexpected descriptors", message.with(&many))
        }
        6 => {
            let code = rng.pick(&[
                code::SET_VRING_KICK,
                code::SET_VRING_CALL,
                code::SET_VRING_ERR,
                code::SET_LOG_FD,
                code::SET_BACKEND_REQ_FD,
            ]);
            ("message: no descriptor", Message::new(code, u64s(&[u64::from(queue % 256)])))
        }
        7 => {
            let code = rng.pick(&[
                code::SET_VRING_KICK,
                code::SET_VRING_CALL,
                code::SET_VRING_ERR,
                code::SET_BACKEND_REQ_FD,
            ]);
            let wrong = zoo.wrong();
            let message = Message::new(code, u64s(&[rng.below(4)])).with(&[rng.pick(&wrong)]);
            ("message: wrong kind of descriptor", message)
        }
        8 => {
            let number = rng.pick(&[0, 1, 3, 0x7fff, 0x8000, 0xffff, 0x10000, u32::MAX]);
            let message = Message::new(code::SET_VRING_NUM, vring_state(queue, number));
            ("message: queue size", message)
        }
        9 => {
            let base = rng.bits32();
            let code =
                rng.pick(&[code::SET_VRING_BASE, code::GET_VRING_BASE, code::SET_VRING_ENABLE]);
            ("message: queue index or base", Message::new(code, vring_state(queue, base)))
        }
        10 => {
            let body = vring_addr(
                queue % 8,
                rng.pick(&[0, 1, u32::MAX]),
                ring_address(rng, memory),
                ring_address(rng, memory),
                ring_address(rng, memory),
            );
            ("message: ring addresses", Message::new(code::SET_VRING_ADDR, body))
        }
        11 => {
            let (offset, size) = (rng.bits32(), rng.pick(&[0, 1, 32, 256, 257, u32::MAX]));
            let len = usize::try_from(size).unwrap_or(0).min(300);
            let mut body = vring_state(offset % 512, size);
            body.extend(rng.bits32().to_le_bytes());
            body.extend(vec![0xaa; len]);
            let code = rng.pick(&[code::GET_CONFIG, code::SET_CONFIG]);
            ("message: configuration space", Message::new(code, body))
        }
        12 => {
            let code = rng.pick(&[code::SET_FEATURES, code::SET_PROTOCOL_FEATURES]);
            ("message: unknown features", Message::new(code, u64s(&[rng.bits()])))
        }
        13 => {
            let body = u64s(&[rng.pick(&[0, 1, 4096, 1 << 40, u64::MAX]), rng.bits()]);
            let message = Message::new(code::SET_LOG_BASE, body);
            let wrong = zoo.wrong();
            let fd = rng.pick(&[zoo.sound(), wrong[0], wrong[wrong.len() - 1]]);
            ("message: dirty log", message.with(&[fd]))
        }
        14 => {
            let code = rng.pick(&[code::GET_INFLIGHT_FD, code::SET_INFLIGHT_FD]);
            let body = u64s(&[rng.bits(), rng.bits(), rng.bits()]);
            let message = Message::new(code, body[..20].to_vec());
            ("message: in-flight buffer", message.with(&[zoo.sound()]))
        }
        15 => {
            // Sound each by itself, but not here and not now.
            let message = match rng.below(9) {
                0 => Message::new(code::SET_OWNER, Vec::new()),
                1 => Message::new(code::RESET_OWNER, Vec::new()),
                2 => Message::new(code::RESET_DEVICE, Vec::new()),
                3 => Message::new(code::GET_VRING_BASE, vring_state(queue % 4, 0)),
                4 => Message::new(code::SET_VRING_ENABLE, vring_state(queue % 4, 1)),
                5 => Message::new(code::GET_QUEUE_NUM, Vec::new()),
                6 => Message::new(code::GET_MAX_MEM_SLOTS, Vec::new()),
                7 => sound_table(memory),
                _ => Message::new(code::SET_FEATURES, u64s(&[0])),
            };
            ("message: out of order", message)
        }
        _ => {
            let mut message = Message::new(any, Vec::new());
            message.flags |= 4;
            ("message: a reply nobody asked for", message)
        }
    };
    if rng.chance(50) {
        message.flags |= NEED_REPLY;
    }
    if kind != "message: any flags" {
        message.flags |= VERSION;
    }
    (kind, message)
}

/// Random bodies are for messages in which no random number can be a ring's
/// address in guest memory by chance, or a memory table that somebody else
/// checks.
fn any_but_addresses(code: u32) -> u32 {
    if code == code::SET_VRING_ADDR {
        code::GET_CONFIG
    } else {
        code
    }
}

fn ring_address(rng: &mut Rng, memory: &GuestMemory) -> u64 {
    let scratch = memory.host_address(memory.offset(SCRATCH));
    let end = memory.host_address(0) + memory.mapping().len();
    match rng.below(6) {
        0 => scratch + rng.below(SCRATCH_LEN / 2),
        1 => scratch + rng.below(SCRATCH_LEN / 2) / 4096 * 4096,
        2 => end + rng.below(1 << 20),
        3 => u64::MAX - rng.below(8192),
        4 => 0,
        _ => rng.bits(),
    }
}

//! Memory blocks of the guest's own kernel (128 MiB and more), set offline and
//! online, and processors.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, Context};

use super::tally::Count;
use super::Worker;
use crate::kernel;

const MEMORY: &str = "/sys/devices/system/memory";

/// The test's machine has this much memory or less at boot, and none of it
/// above this address.
const PLUGGED_FROM: u64 = 4 << 30;

/// How long a memory block may take to go offline. The kernel tries for ever
/// where a page moves only now and then, so the writer is a process that can be
/// interrupted.
const PATIENCE: Duration = Duration::from_secs(20);

/// What is in a memory block has to go somewhere else: how long there may be no
/// room for it before it is tried nevertheless.
const ROOM_PATIENCE: Duration = Duration::from_secs(30);

/// Sets a memory block offline, leaves it there for a moment, and online again;
/// or a processor.
///
/// # Errors
/// If a process cannot be started.
pub fn round(worker: &mut Worker) -> anyhow::Result<()> {
    if worker.random.one_in(6) {
        let cpu = Path::new("/sys/devices/system/cpu/cpu1/online");
        // A guest may have one processor, or one that stays.
        if fs::write(cpu, "0").is_ok() {
            std::thread::sleep(Duration::from_millis(worker.random.between(0..200)));
            fs::write(cpu, "1").context("a processor does not come back")?;
        }
        return Ok(());
    }
    let blocks = memory_blocks()?;
    if blocks.is_empty() {
        return Ok(());
    }
    // Rather the movable ones behind than those that hold the kernel.
    let from = if worker.random.one_in(4) { 0 } else { blocks.len() / 2 };
    let block = &blocks[from + worker.random.below(blocks.len() - from)];
    wait_room()?;
    if set_offline(block)? {
        worker.tally.add(Count::Done);
        std::thread::sleep(Duration::from_millis(worker.random.between(0..1000)));
    } else {
        worker.tally.add(Count::Refused);
    }
    if !block.online(Duration::from_secs(5)) {
        // The device that it belongs to is unplugging it.
        worker.tally.add(Count::Refused);
    }
    Ok(())
}

/// All memory blocks and processors online.
///
/// # Errors
/// If one stays offline.
pub fn all_online() -> anyhow::Result<()> {
    for block in memory_blocks()? {
        if !block.online(Duration::from_secs(60)) {
            bail!("{} does not come back online", block.path.display());
        }
    }
    // Its absence is the reason why a guest has one processor.
    let _ = fs::write("/sys/devices/system/cpu/cpu1/online", "1");
    Ok(())
}

struct MemoryBlock {
    path: PathBuf,
    /// Plugged after the boot, to be unplugged again: nothing that cannot move
    /// belongs there.
    plugged: bool,
}

impl MemoryBlock {
    /// Whether it is online, or gone, within `patience`.
    fn online(&self, patience: Duration) -> bool {
        let zone = if self.plugged { "online_movable" } else { "online_kernel" };
        let start = Instant::now();
        loop {
            let state = fs::read_to_string(self.path.join("state")).unwrap_or_default();
            if state.trim() != "offline" || fs::write(self.path.join("state"), zone).is_ok() {
                return true;
            }
            if start.elapsed() > patience {
                return false;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

/// All memory blocks, by address.
fn memory_blocks() -> anyhow::Result<Vec<MemoryBlock>> {
    let Ok(entries) = fs::read_dir(MEMORY) else { return Ok(Vec::new()) };
    let size = block_size()?;
    let mut blocks: Vec<(u64, PathBuf)> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let number = name.to_str()?.strip_prefix("memory")?.parse().ok()?;
            Some((number, entry.path()))
        })
        .collect();
    blocks.sort_unstable();
    let plugged = |number: u64| number * size >= PLUGGED_FROM;
    Ok(blocks
        .into_iter()
        .map(|(number, path)| MemoryBlock { path, plugged: plugged(number) })
        .collect())
}

/// Waits until what a memory block has in use fits elsewhere, and as much again
/// for whoever allocates meanwhile.
fn wait_room() -> anyhow::Result<()> {
    let start = Instant::now();
    while start.elapsed() < ROOM_PATIENCE {
        let free = kernel::memory()?.get("MemFree").copied().unwrap_or(0);
        if free >= 2 * block_size()? {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn block_size() -> anyhow::Result<u64> {
    let size = fs::read_to_string(Path::new(MEMORY).join("block_size_bytes"))
        .context("memory blocks have no size")?;
    u64::from_str_radix(size.trim(), 16).context("the size of a memory block")
}

/// Whether the kernel did it in time.
fn set_offline(block: &MemoryBlock) -> anyhow::Result<bool> {
    let mut writer = Command::new("/bin/sh")
        .arg("-c")
        .arg(format!("echo offline > {}/state", block.path.display()))
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start a shell")?;
    let start = Instant::now();
    loop {
        if let Some(status) = writer.try_wait()? {
            return Ok(status.success());
        }
        if start.elapsed() > PATIENCE {
            writer.kill()?;
            return Ok(writer.wait()?.success());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

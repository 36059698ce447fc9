//! What it costs the host to get memory back: as whole blocks that the driver
//! releases, and page by page, as a balloon of 4 KiB pages gives it.
//!
//! The balloon is modelled by what QEMU 10 does for each page that its guest
//! puts into it: a hole in the memory file, and the page out of the mapping.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::ensure;

use crate::daemon::{Daemon, Options};
use crate::driver::AREA_BLOCKS;
use crate::figures::{Bar, Scenario};
use crate::machine::{Machine, PATIENCE};
use crate::memory::{GuestMemory, Placement, BLOCK_SIZE};
use crate::outside;
use crate::scratch::Scratch;
use crate::settings;
use crate::sys::{self, PAGE_SIZE};
use crate::wire::{self, host_state, Range};

/// Ours must cost at most this part of the balloon.
const SHARE_BAR: f64 = 0.1;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The daemon's program.
    pub program: PathBuf,
    /// Blocks that are given back.
    pub blocks: u64,
    /// How often each way is measured; the median counts.
    pub rounds: usize,
}

impl Plan {
    /// 1 GiB, or less for a quick look.
    #[must_use]
    pub fn new(program: PathBuf, quick: bool) -> Self {
        let (blocks, rounds) = if quick { (64, 1) } else { (512, 3) };
        Plan { program, blocks, rounds }
    }
}

/// What giving all of it back once took.
#[derive(Clone, Copy, Debug)]
struct Cost {
    seconds: f64,
    cpu_seconds: f64,
    operations: u64,
}

/// Measures both ways on the same memory, which is huge in the host each time.
///
/// # Errors
/// If the host's settings cannot be made, or a request is not answered with OK.
pub fn measure(plan: &Plan) -> anyhow::Result<Scenario> {
    let mut scenario = Scenario::new("give-back");
    scenario.arg("blocks", plan.blocks);
    scenario.arg("rounds", plan.rounds as u64);
    let held = settings::daemon_decides()?;
    scenario.arg("shmem_enabled", held.describe());
    let scratch = Scratch::new()?;
    // What preparing costs is not what is measured.
    let options = Options::new(&plan.program, "gemini").arg("--cpu-share", "100");
    let daemon = Daemon::start(&options, scratch.path())?;
    scenario.version("daemon", daemon.status()?.version);
    // Every second block, as free blocks lie: none can be dropped with another.
    let memory =
        GuestMemory::new((AREA_BLOCKS + 2 * plan.blocks) * BLOCK_SIZE, Placement::Aligned)?;
    let mut machine = Machine::boot(&daemon.socket(), memory)?;
    let blocks: Vec<u64> = (0..plan.blocks).map(|block| AREA_BLOCKS + 2 * block).collect();
    for &block in &blocks {
        machine.guest.book(block)?;
    }
    let (mut ours, mut balloon) = (Vec::new(), Vec::new());
    for _ in 0..plan.rounds {
        make_huge(&mut machine, &blocks)?;
        ours.push(release(&mut machine, &daemon, &blocks)?);
        make_huge(&mut machine, &blocks)?;
        balloon.push(inflate(&mut machine, &blocks)?);
    }
    let gib = (plan.blocks * BLOCK_SIZE) as f64 / f64::from(1 << 30);
    let (ours, balloon) = (median(&mut ours), median(&mut balloon));
    for (name, cost) in [("release", ours), ("balloon_4k", balloon)] {
        let mut figure = |what: &str, value| {
            scenario.figure(&format!("{name}_{what}"), value, Bar::None);
        };
        figure("gib_per_second", gib / cost.seconds);
        figure("cpu_ms_per_gib", cost.cpu_seconds * 1e3 / gib);
        figure("page_operations_per_gib", cost.operations as f64 / gib);
    }
    let share = ours.cpu_seconds / balloon.cpu_seconds;
    scenario.figure("cpu_share_of_balloon", share, Bar::AtMost(SHARE_BAR));
    let share = ours.operations as f64 / balloon.operations as f64;
    scenario.figure("operations_share_of_balloon", share, Bar::AtMost(SHARE_BAR));
    Ok(scenario)
}

/// The round in the middle, by CPU time.
fn median(costs: &mut [Cost]) -> Cost {
    costs.sort_by(|a, b| a.cpu_seconds.total_cmp(&b.cpu_seconds));
    costs[costs.len() / 2]
}

/// Has the host put a huge page under every block.
fn make_huge(machine: &mut Machine, blocks: &[u64]) -> anyhow::Result<()> {
    for batch in blocks.chunks(16) {
        let ranges: Vec<Range> = batch.iter().map(|&first| Range { first, count: 1 }).collect();
        let answer = machine.driver.request(wire::REQ_PREPARE, &ranges, PATIENCE)?;
        ensure!(answer.response.status == wire::S_OK, "{answer:?}");
    }
    machine.wait_host(blocks, |state| state == host_state::HUGE, PATIENCE)
}

/// The driver's way: requests of as many blocks as may be unanswered. All that
/// the daemon does counts, the reports about it and looking at it included.
fn release(machine: &mut Machine, daemon: &Daemon, blocks: &[u64]) -> anyhow::Result<Cost> {
    let before = outside::fine_cpu_seconds(daemon.pid())?;
    let start = Instant::now();
    for batch in blocks.chunks(32) {
        let ranges: Vec<Range> = batch.iter().map(|&first| Range { first, count: 1 }).collect();
        ensure!(machine.drop_blocks(wire::REQ_RELEASE, &ranges)? == wire::S_OK);
    }
    let seconds = start.elapsed().as_secs_f64();
    machine.wait_host(blocks, |state| state == host_state::ABSENT, PATIENCE)?;
    let cpu_seconds = outside::fine_cpu_seconds(daemon.pid())? - before;
    Ok(Cost { seconds, cpu_seconds, operations: blocks.len() as u64 })
}

/// The balloon's way, in this process, which stands for QEMU; what the queue of
/// a balloon costs comes on top, and is left out.
fn inflate(machine: &mut Machine, blocks: &[u64]) -> anyhow::Result<Cost> {
    let memory = machine.guest.memory();
    let before = sys::thread_cpu_seconds()?;
    let start = Instant::now();
    let mut operations = 0;
    for &block in blocks {
        for page in 0..BLOCK_SIZE / PAGE_SIZE {
            let offset = memory.offset(block * BLOCK_SIZE + page * PAGE_SIZE);
            sys::punch_hole(memory.file(), offset, PAGE_SIZE)?;
            memory.mapping().forget(offset, PAGE_SIZE)?;
            operations += 1;
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let cpu_seconds = sys::thread_cpu_seconds()? - before;
    for &block in blocks {
        machine.guest.contents_dropped(block);
    }
    Ok(Cost { seconds, cpu_seconds, operations })
}

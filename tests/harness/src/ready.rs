//! How fast blocks become ready: huge before the guest uses them. A driver that
//! keeps a stock asks for many at once and as fast as it may.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context};

use crate::daemon::{Daemon, Options};
use crate::driver::AREA_BLOCKS;
use crate::figures::{Bar, Scenario};
use crate::machine::{each, Machine, PATIENCE};
use crate::memory::{GuestMemory, Placement, BLOCK_SIZE};
use crate::scratch::Scratch;
use crate::settings;
use crate::wire::{self, host_state, Range};

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The daemon's program.
    pub program: PathBuf,
    /// Blocks of the stock.
    pub blocks: u64,
    /// Blocks that are made ready one after the other, to see how long it takes.
    pub singles: u64,
}

impl Plan {
    /// A stock of 512 MiB, or a small one for a quick look.
    #[must_use]
    pub fn new(program: PathBuf, quick: bool) -> Self {
        let (blocks, singles) = if quick { (64, 16) } else { (256, 64) };
        Plan { program, blocks, singles }
    }
}

/// What a series of requests took.
struct Series {
    seconds: f64,
    cpu_seconds: f64,
    copied: u64,
}

/// Measures, with the daemon's own budgets.
///
/// # Errors
/// If the host's settings cannot be made, or a request is not answered with OK.
pub fn measure(plan: &Plan) -> anyhow::Result<Scenario> {
    let mut scenario = Scenario::new("ready");
    scenario.arg("blocks", plan.blocks);
    let held = settings::daemon_decides()?;
    scenario.arg("shmem_enabled", held.describe());
    let scratch = Scratch::new()?;
    let daemon = Daemon::start(&Options::new(&plan.program, "gemini"), scratch.path())?;
    scenario.version("daemon", daemon.status()?.version);
    // The stock lies behind the driver's own blocks, and is held.
    let memory = GuestMemory::new((AREA_BLOCKS + plan.blocks) * BLOCK_SIZE, Placement::Aligned)?;
    let mut machine = Machine::boot(&daemon.socket(), memory)?;
    for block in AREA_BLOCKS..AREA_BLOCKS + plan.blocks {
        machine.guest.book(block)?;
    }
    // It comes after the full state.
    machine.driver.wait_until("advice", PATIENCE, |driver| driver.advice().is_some())?;
    let most = u64::from(machine.driver.advice().context("no advice")?.release_max);
    for (name, size) in [("renew_by_1", 1), ("renew_by_16", 16)] {
        use_all(&mut machine, plan.blocks)?;
        rest(&daemon)?;
        let series = renew(&mut machine, &daemon, plan.blocks, size, most)?;
        tell(&mut scenario, name, &series, plan.blocks);
        scenario.figure(&format!("{name}_collapse_bytes"), series.copied as f64, Bar::AtMost(0.0));
        release(&mut machine, plan.blocks, most)?;
    }
    rest(&daemon)?;
    let series = prepare(&mut machine, &daemon, plan.blocks)?;
    tell(&mut scenario, "prepare_absent", &series, plan.blocks);
    scenario.figure("prepare_absent_collapse_bytes", series.copied as f64, Bar::AtMost(0.0));

    release(&mut machine, plan.blocks, most)?;
    rest(&daemon)?;
    let mut waits = latencies(&mut machine, plan.singles)?;
    waits.sort_by(f64::total_cmp);
    let at = |share: usize| waits[(waits.len() - 1) * share / 100] * 1000.0;
    scenario.figure("renew_answer_to_told_ms_p50", at(50), Bar::None);
    scenario.figure("renew_answer_to_told_ms_p99", at(99), Bar::None);
    machine.guest.ensure_intact()?;
    Ok(scenario)
}

fn tell(scenario: &mut Scenario, name: &str, series: &Series, blocks: u64) {
    let blocks = blocks as f64;
    scenario.figure(&format!("{name}_blocks_per_second"), blocks / series.seconds, Bar::None);
    let cpu_ms = series.cpu_seconds * 1000.0 / blocks;
    scenario.figure(&format!("{name}_cpu_ms_per_block"), cpu_ms, Bar::None);
}

/// Lets the daemon's CPU budget fill up, so that each series has the same one.
fn rest(daemon: &Daemon) -> anyhow::Result<()> {
    let percent = daemon.control(&serde_json::json!({"cmd": "status"}))?["cpu_share"]
        .as_f64()
        .context("no cpu_share")?;
    std::thread::sleep(Duration::from_secs_f64(100.0 / percent));
    Ok(())
}

/// The stock, as ranges of `size` blocks.
fn ranges(blocks: u64, size: u64) -> VecDeque<Range> {
    let end = AREA_BLOCKS + blocks;
    let starts = (AREA_BLOCKS..end).step_by(usize::try_from(size).unwrap_or(1));
    starts
        .map(|first| Range { first, count: u32::try_from(size.min(end - first)).unwrap_or(1) })
        .collect()
}

/// Sends drops of all of the stock, with at most `most` blocks unanswered, and
/// waits for the answers.
fn drop_all(
    machine: &mut Machine,
    kind: u16,
    mut waiting: VecDeque<Range>,
    most: u64,
) -> anyhow::Result<()> {
    let mut asked: VecDeque<(u64, Range)> = VecDeque::new();
    let mut unanswered = 0;
    while !(waiting.is_empty() && asked.is_empty()) {
        while let Some(&range) = waiting.front() {
            if unanswered + u64::from(range.count) > most {
                break;
            }
            waiting.pop_front();
            unanswered += u64::from(range.count);
            asked.push_back((machine.submit_drop(kind, &[range])?, range));
        }
        if let Some((ticket, range)) = asked.pop_front() {
            let answer = machine.driver.answer(ticket, PATIENCE)?;
            ensure!(answer.response.status == wire::S_OK, "{range:?}: {answer:?}");
            unanswered -= u64::from(range.count);
            each(&[range]).for_each(|block| machine.guest.contents_dropped(block));
        }
    }
    Ok(())
}

/// Has all of the stock in use for a while, as base pages of the host.
fn use_all(machine: &mut Machine, blocks: u64) -> anyhow::Result<()> {
    let all: Vec<u64> = (AREA_BLOCKS..AREA_BLOCKS + blocks).collect();
    for &block in &all {
        machine.guest.unbook(block)?;
        machine.guest.alloc_huge(block)?;
        machine.guest.free_huge(block)?;
        machine.guest.book(block)?;
    }
    machine.talk()?;
    machine.wait_host(&all, |state| state == host_state::BASE, PATIENCE)
}

fn release(machine: &mut Machine, blocks: u64, most: u64) -> anyhow::Result<()> {
    drop_all(machine, wire::REQ_RELEASE, ranges(blocks, most), most)?;
    let all: Vec<u64> = (AREA_BLOCKS..AREA_BLOCKS + blocks).collect();
    machine.wait_host(&all, |state| state == host_state::ABSENT, PATIENCE)
}

/// Takes the time from the first request until the last block is told to be huge.
fn timed(
    machine: &mut Machine,
    daemon: &Daemon,
    blocks: u64,
    ask: impl FnOnce(&mut Machine) -> anyhow::Result<()>,
) -> anyhow::Result<Series> {
    let before = daemon.status()?;
    let start = Instant::now();
    ask(machine)?;
    let all: Vec<u64> = (AREA_BLOCKS..AREA_BLOCKS + blocks).collect();
    machine.wait_host(&all, |state| state == host_state::HUGE, PATIENCE)?;
    let seconds = start.elapsed().as_secs_f64();
    let after = daemon.status()?;
    Ok(Series {
        seconds,
        cpu_seconds: after.cpu_seconds - before.cpu_seconds,
        copied: after.collapse_bytes - before.collapse_bytes,
    })
}

fn renew(
    machine: &mut Machine,
    daemon: &Daemon,
    blocks: u64,
    size: u64,
    most: u64,
) -> anyhow::Result<Series> {
    timed(machine, daemon, blocks, |machine| {
        drop_all(machine, wire::REQ_RENEW, ranges(blocks, size), most)
    })
}

fn prepare(machine: &mut Machine, daemon: &Daemon, blocks: u64) -> anyhow::Result<Series> {
    timed(machine, daemon, blocks, |machine| {
        for range in ranges(blocks, 32) {
            let answer = machine.driver.request(wire::REQ_PREPARE, &[range], PATIENCE)?;
            ensure!(answer.response.status == wire::S_OK, "{answer:?}");
        }
        Ok(())
    })
}

/// One renew after the other: seconds from the answer until the block is told to
/// be huge.
fn latencies(machine: &mut Machine, singles: u64) -> anyhow::Result<Vec<f64>> {
    let mut waits = Vec::new();
    for first in AREA_BLOCKS..AREA_BLOCKS + singles {
        let range = Range { first, count: 1 };
        ensure!(machine.drop_blocks(wire::REQ_RENEW, &[range])? == wire::S_OK);
        let start = Instant::now();
        machine.driver.wait_until("told that it is huge", PATIENCE, |driver| {
            let state = usize::try_from(first).ok().and_then(|block| driver.host().get(block));
            state == Some(&host_state::HUGE)
        })?;
        waits.push(start.elapsed().as_secs_f64());
    }
    Ok(waits)
}

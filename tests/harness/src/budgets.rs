//! What the daemon spends, measured from outside, under a guest that asks for
//! everything: bytes copied per second, its share of a CPU, and huge pages.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context};
use gemini_pagemap::HUGE;

use crate::daemon::{Daemon, Options, Status};
use crate::driver::AREA_BLOCKS;
use crate::figures::{Bar, Scenario};
use crate::machine::{Machine, PATIENCE};
use crate::memory::{GuestMemory, Placement, BLOCK_SHIFT, BLOCK_SIZE};
use crate::outside;
use crate::rng::Rng;
use crate::sampling::{most_within, KernelCounter, Sample, Sampler};
use crate::scratch::Scratch;
use crate::settings::Held;
use crate::sys::{self, PAGE_SIZE};
use crate::wire::{self, guest_state, host_state, Range, Record};

const MIB: u64 = 1 << 20;
/// How often is looked from outside.
const INTERVAL: Duration = Duration::from_millis(4);
const SECOND: Duration = Duration::from_secs(1);
/// Requests of each kind that a greedy guest has asked for at least, for each second that it is
/// given; it takes so many times as long at most.
const ASKED_A_SECOND: u64 = 10;
const ASKING_LIMIT: u32 = 15;
/// How often a part is measured anew because something else collapsed meanwhile.
const ATTEMPTS: usize = 5;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The daemon's program.
    pub program: PathBuf,
    /// Copy rates, in MiB a second.
    pub rates: Vec<u64>,
    /// Blocks of the guest.
    pub blocks: u64,
    /// How long each part lasts, 4 s at least.
    pub time: Duration,
    /// Seed of what the guest asks for.
    pub seed: u64,
}

impl Plan {
    /// The rates that the bars are for, or one for a quick look.
    #[must_use]
    pub fn new(program: PathBuf, quick: bool, seed: u64) -> Self {
        Plan {
            program,
            rates: if quick { vec![100] } else { vec![100, 150, 250] },
            blocks: if quick { 192 } else { 256 },
            time: Duration::from_secs(if quick { 4 } else { 15 }),
            seed,
        }
    }
}

/// Measures.
///
/// # Errors
/// If the host's settings cannot be made, the daemon does not behave, or
/// something else collapses huge pages all the time.
pub fn measure(plan: &Plan) -> anyhow::Result<Scenario> {
    let mut scenario = Scenario::new("budgets");
    scenario.arg("blocks", plan.blocks);
    scenario.arg("seconds", plan.time.as_secs());
    scenario.arg("seed", plan.seed);
    // Alone: others of the project would collapse, too.
    let held = Held::shmem_enabled("never")?;
    scenario.arg("shmem_enabled", held.describe());
    for &rate in &plan.rates {
        copying(plan, rate, &mut scenario)?;
    }
    pinned(plan, &mut scenario)?;
    everything(plan, &mut scenario)?;
    Ok(scenario)
}

/// A machine with a daemon of its own.
pub(crate) struct Guest {
    pub(crate) daemon: Daemon,
    pub(crate) machine: Machine,
    _scratch: Scratch,
}

impl Guest {
    /// A machine whose blocks are all guest huge pages, written by the guest.
    pub(crate) fn start(
        program: &Path,
        blocks: u64,
        arguments: &[(&str, String)],
    ) -> anyhow::Result<Self> {
        let scratch = Scratch::new()?;
        let mut options = Options::new(program, "gemini");
        for (name, value) in arguments {
            options = options.arg(name, value);
        }
        let daemon = Daemon::start(&options, scratch.path())?;
        let memory = GuestMemory::new((AREA_BLOCKS + blocks) * BLOCK_SIZE, Placement::Aligned)?;
        let mut machine = Machine::boot(&daemon.socket(), memory)?;
        for block in AREA_BLOCKS..AREA_BLOCKS + blocks {
            machine.guest.alloc_huge(block)?;
        }
        Ok(Guest { daemon, machine, _scratch: scratch })
    }

    pub(crate) fn own(&self) -> std::ops::Range<u64> {
        AREA_BLOCKS..self.machine.guest.blocks()
    }

    pub(crate) fn hinted(&self, block: u64) -> Option<u8> {
        self.machine.driver.host().get(usize::try_from(block).ok()?).copied()
    }

    /// Takes a page out of a huge page of the host and puts it back: base pages
    /// are left, with the same contents.
    pub(crate) fn break_up(&mut self, block: u64) -> anyhow::Result<()> {
        let mut page = vec![0; usize::try_from(PAGE_SIZE)?];
        let memory = &self.machine.memory;
        memory.peek(block << BLOCK_SHIFT, &mut page)?;
        memory.discard(block << BLOCK_SHIFT, PAGE_SIZE)?;
        memory.write(block << BLOCK_SHIFT, &page);
        // A change that the daemon looks at.
        for state in [guest_state::BASE, guest_state::HUGE] {
            let record = Record { first: block, count: 1, used: 0, state, flags: 0 };
            self.machine.driver.report(&[record], PATIENCE)?;
        }
        Ok(())
    }

    /// Waits until nothing more is tried, and asks the daemon for its totals.
    fn settled(&mut self) -> anyhow::Result<Status> {
        let mut last = self.daemon.status()?;
        loop {
            self.machine.run_for(Duration::from_millis(300))?;
            let status = self.daemon.status()?;
            if spent(&status) == spent(&last) {
                return Ok(status);
            }
            last = status;
        }
    }
}

fn spent(status: &Status) -> (u64, u64, u64) {
    (status.charged_bytes, status.populated, status.collapse_failures)
}

fn mib(blocks: u64) -> f64 {
    (blocks * BLOCK_SIZE / MIB) as f64
}

/// A tenth more, of which the sum is exact.
fn with_tolerance(rate: u64) -> f64 {
    (rate * 11) as f64 / 10.0
}

/// Everything is to be copied, again and again: the host's huge pages fall apart
/// as soon as all are made.
fn copying(plan: &Plan, rate: u64, scenario: &mut Scenario) -> anyhow::Result<()> {
    for attempt in 1..=ATTEMPTS {
        let arguments = [("--copy-rate", format!("{rate}M")), ("--cpu-share", "100".to_owned())];
        let mut counter = KernelCounter::new("thp_collapse_alloc")?;
        let before = counter.read()?;
        let sampler = Sampler::start(INTERVAL, move || counter.read());
        let mut guest = Guest::start(&plan.program, plan.blocks, &arguments)?;
        let start = Instant::now();
        while start.elapsed() < plan.time {
            guest.machine.talk()?;
            // All at once: the daemon rests where the guest faults while it copies.
            if guest.own().all(|block| guest.hinted(block) == Some(host_state::HUGE)) {
                guest.own().try_for_each(|block| guest.break_up(block))?;
            }
            guest.machine.driver.wait(Duration::from_millis(10))?;
        }
        let end = Instant::now();
        let status = guest.settled()?;
        let samples = sampler.finish()?;
        let allocated = samples.last().map_or(0, |last| last.value - before);
        // Each of the daemon's attempts allocates one huge page at most.
        let foreign = allocated.saturating_sub(status.charged_bytes / BLOCK_SIZE);
        if foreign > 0 && attempt < ATTEMPTS {
            eprintln!("something else collapsed {foreign} blocks meanwhile: once more");
            continue;
        }
        guest.machine.guest.ensure_intact()?;
        let most = most_within(&samples, SECOND);
        let bar = Bar::AtMost(with_tolerance(rate));
        let name = |figure: &str| format!("rate_{rate}_{figure}");
        scenario.figure(&name("most_mib_in_1s"), mib(most), bar);
        let until = samples.iter().find(|sample| sample.before >= end);
        let copied = until.map_or(0, |sample| sample.value - before);
        let mean = mib(copied) / (end - start).as_secs_f64();
        // Less would mean that the budget was not what held the daemon back.
        scenario.figure(&name("mean_mib_per_s"), mean, Bar::AtLeast(rate as f64 * 0.8));
        scenario.figure(&name("collapses_of_others"), foreign as f64, Bar::AtMost(0.0));
        return Ok(());
    }
    Ok(())
}

/// A page of every block is held by a pipe, so that no collapse succeeds: each
/// block is tried ever more rarely.
fn pinned(plan: &Plan, scenario: &mut Scenario) -> anyhow::Result<()> {
    let arguments = [("--copy-rate", "4G".to_owned()), ("--cpu-share", "100".to_owned())];
    let mut guest = Guest::start(&plan.program, plan.blocks, &arguments)?;
    let mut pins = Vec::new();
    for block in guest.own() {
        let pipe = sys::Pipe::new()?;
        let memory = &guest.machine.memory;
        memory.mapping().pin_into(&pipe, memory.offset(block << BLOCK_SHIFT), PAGE_SIZE)?;
        pins.push(pipe);
    }
    let cpu = || outside::fine_cpu_seconds(guest.daemon.pid());
    let tried = || Ok::<_, anyhow::Error>(guest.daemon.status()?.collapse_failures);
    let (mut failures, mut cpu_seconds) = (Vec::new(), Vec::new());
    // From before the daemon hears of the blocks: it tries each of them at once.
    let (mut tried_before, mut ran_before) = (tried()?, cpu()?);
    guest.machine.talk()?;
    for _ in 0..2 {
        let start = Instant::now();
        while start.elapsed() < plan.time / 2 {
            guest.machine.driver.wait(Duration::from_millis(50))?;
        }
        let (tried, ran) = (tried()?, cpu()?);
        failures.push((tried - tried_before) as f64);
        cpu_seconds.push((ran - ran_before) / start.elapsed().as_secs_f64());
        (tried_before, ran_before) = (tried, ran);
    }
    let blocks = plan.blocks as f64;
    scenario.figure("pinned_failures_first_half", failures[0], Bar::AtLeast(8.0));
    let quieter = Bar::AtMost(failures[0] / 2.0);
    scenario.figure("pinned_failures_second_half", failures[1], quieter);
    scenario.figure("pinned_cpu_percent_second_half", 100.0 * cpu_seconds[1], Bar::AtMost(2.0));
    drop(pins);
    // Once nothing is pinned any more, no block is given up.
    let deadline = Instant::now() + Duration::from_secs(240);
    let start = Instant::now();
    loop {
        guest.machine.run_for(Duration::from_millis(100))?;
        if guest.daemon.status()?.aligned >= plan.blocks || Instant::now() > deadline {
            break;
        }
    }
    let aligned = guest.daemon.status()?.aligned as f64;
    scenario.figure("unpinned_aligned", aligned, Bar::AtLeast(blocks));
    scenario.figure("unpinned_seconds", start.elapsed().as_secs_f64(), Bar::None);
    guest.machine.guest.ensure_intact()
}

/// The guest asks for everything at once and never stops.
fn everything(plan: &Plan, scenario: &mut Scenario) -> anyhow::Result<()> {
    const RATE: u64 = 100;
    // Well below what such a guest would cost, so that what is saved up is soon spent.
    const SHARE: f64 = 0.05;
    let limit = plan.blocks / 3;
    let arguments = [
        ("--copy-rate", format!("{RATE}M")),
        ("--cpu-share", (SHARE * 100.0).to_string()),
        ("--huge-max", (limit * BLOCK_SIZE).to_string()),
    ];
    let mut counter = KernelCounter::new("thp_collapse_alloc")?;
    let allocated_before = counter.read()?;
    let mut guest = Guest::start(&plan.program, plan.blocks, &arguments)?;
    let memory = Arc::clone(&guest.machine.memory);
    let pagemap = File::open("/proc/self/pagemap").context("cannot open own pagemap")?;
    let huge = Sampler::start(INTERVAL, move || {
        let base = memory.host_address(0);
        let memory = base..base + memory.mapping().len();
        let ranges = gemini_pagemap::ranges(&pagemap, &memory, HUGE)?;
        Ok(ranges.iter().map(|range| range.end - range.start).sum())
    });
    let pid = guest.daemon.pid();
    let cpu = Sampler::start(INTERVAL, move || cpu_microseconds(pid));
    let mut rng = Rng::new(plan.seed);
    let start = Instant::now();
    let time = 2 * plan.time;
    // Each answer costs of the share of a CPU, and how many it pays for in that time is the
    // machine's affair: the guest goes on until it has asked for enough.
    let least = ASKED_A_SECOND * time.as_secs();
    let mut asked = [0u64; 2];
    while start.elapsed() < time
        || (asked.iter().any(|count| *count < least) && start.elapsed() < ASKING_LIMIT * time)
    {
        ask(&mut guest, &mut rng, &mut asked)?;
    }
    let elapsed = start.elapsed().as_secs_f64();
    let cpu = cpu.finish()?;
    let status = guest.settled()?;
    let huge = huge.finish()?;
    let most = huge.iter().map(|sample| sample.value).max().unwrap_or(0);
    let collapses = counter.read()? - allocated_before;
    let copied = collapses.saturating_sub(status.populated);
    #[rustfmt::skip]
    let figures = [
        ("asked_seconds", elapsed, Bar::None),
        ("asked_prepares", asked[0] as f64, Bar::AtLeast(least as f64)),
        ("asked_drops", asked[1] as f64, Bar::AtLeast(least as f64)),
        ("asked_huge_max_mib", (limit * BLOCK_SIZE / MIB) as f64, Bar::None),
        ("asked_huge_most_mib", (most / MIB) as f64, Bar::AtMost((limit * BLOCK_SIZE / MIB) as f64)),
        ("asked_huge_samples", huge.len() as f64, Bar::AtLeast(100.0)),
        ("asked_mean_mib_per_s", mib(copied) / elapsed, Bar::AtMost(with_tolerance(RATE))),
        ("asked_populated_blocks", status.populated as f64, Bar::AtLeast(1.0)),
        ("asked_cpu_most_percent_in_1s", percent(most_within(&cpu, SECOND), 1.0), Bar::None),
        ("asked_cpu_saved_up_percent", percent_after(&cpu, start, 0.0), Bar::None),
        ("asked_cpu_percent", percent_after(&cpu, start, SETTLE), Bar::AtMost(SHARE * 110.0)),
        ("asked_cpu_beyond_share_s", beyond_share(&cpu, SHARE), Bar::AtMost(SHARE * SAVED + 0.1)),
    ];
    for (name, value, bar) in figures {
        scenario.figure(name, value, bar);
    }
    guest.machine.guest.ensure_intact()
}

/// Seconds whose share the daemon can save up, by its documentation.
const SAVED: f64 = 4.0;
/// What was saved is spent after so many seconds.
const SETTLE: f64 = 6.0;

fn percent(microseconds: u64, seconds: f64) -> f64 {
    microseconds as f64 / 1e4 / seconds
}

/// Share of one CPU from `settle` seconds after `start` on.
fn percent_after(samples: &[Sample], start: Instant, settle: f64) -> f64 {
    let from = start + Duration::from_secs_f64(settle);
    let (Some(first), Some(last)) =
        (samples.iter().find(|sample| sample.before >= from), samples.last())
    else {
        return f64::NAN;
    };
    percent(last.value - first.value, (last.before - first.after).as_secs_f64())
}

/// CPU seconds in any window beyond the share of it, at most: what a budget that
/// can be saved up allows is what can be saved.
fn beyond_share(samples: &[Sample], share: f64) -> f64 {
    let (mut lowest, mut most) = (f64::INFINITY, 0.0f64);
    let Some(origin) = samples.first().map(|sample| sample.before) else { return f64::NAN };
    for sample in samples {
        let at = (sample.after - origin).as_secs_f64();
        let level = sample.value as f64 / 1e6 - share * at;
        most = most.max(level - lowest);
        lowest = lowest.min(level);
    }
    most
}

/// CPU time of a process in microseconds.
fn cpu_microseconds(pid: u32) -> anyhow::Result<u64> {
    let seconds = outside::fine_cpu_seconds(pid)?;
    Ok(Duration::from_secs_f64(seconds).as_micros().try_into()?)
}

/// One round of a greedy guest: reports, PREPAREs of anything, drops of what the
/// driver holds, new huge pages everywhere.
fn ask(guest: &mut Guest, rng: &mut Rng, asked: &mut [u64; 2]) -> anyhow::Result<()> {
    let own = guest.own();
    let any = |rng: &mut Rng| own.start + rng.below(own.end - own.start);
    for _ in 0..4 {
        let block = any(rng);
        match guest.machine.guest.state(block).0 {
            guest_state::FREE if rng.chance(50) => guest.machine.guest.alloc_huge(block)?,
            guest_state::FREE => guest.machine.guest.book(block)?,
            guest_state::HUGE if rng.chance(30) => guest.machine.guest.free_huge(block)?,
            guest_state::BOOKED => {
                let kind = if rng.chance(70) { wire::REQ_RENEW } else { wire::REQ_RELEASE };
                let status =
                    guest.machine.drop_blocks(kind, &[Range { first: block, count: 1 }])?;
                ensure!(matches!(status, wire::S_OK | wire::S_BUSY), "drop: status {status}");
                asked[1] += 1;
                guest.machine.guest.unbook(block)?;
            }
            _ if guest.hinted(block) == Some(host_state::HUGE) && rng.chance(50) => {
                guest.break_up(block)?;
            }
            _ => {}
        }
    }
    guest.machine.talk()?;
    let first = any(rng);
    let count = u32::try_from(rng.below(8).min(own.end - first - 1) + 1)?;
    guest.machine.driver.request(wire::REQ_PREPARE, &[Range { first, count }], PATIENCE)?;
    asked[0] += 1;
    Ok(())
}

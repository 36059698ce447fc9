//! How long a program stalls while its memory is collapsed under it: by the
//! daemon, and by the kernel's khugepaged at the same bytes per second.

use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, ensure, Context};
use gemini_pagemap::HUGE;

use crate::cleanup::{self, Guard};
use crate::daemon::{Daemon, Options};
use crate::driver::AREA_BLOCKS;
use crate::figures::{Bar, Scenario};
use crate::guest::Guest;
use crate::machine::Machine;
use crate::memory::{GuestMemory, BLOCK_SIZE};
use crate::rng::Rng;
use crate::scratch::Scratch;
use crate::settings::Held;
use crate::sys::{self, PAGE_SIZE};

/// An access with a page fault that takes longer was a stall. All memory is resident
/// and mapped, so that only a collapse makes a fault; what is slow without one was
/// an interrupt, or the machine below this one.
const STALL: Duration = Duration::from_micros(20);
/// One that takes longer is counted by itself.
const LONG_STALL: Duration = Duration::from_micros(500);
/// How long the toucher works, and then rests, so that the kernel does not throttle
/// what runs before others. The rest is short beside a stall: who
/// collapses has the kernel empty its lists on every CPU first, which a CPU does
/// in a rest, so that a collapse often begins with one.
const WORK: Duration = Duration::from_micros(200);
const REST: Duration = Duration::from_micros(50);
/// Rounds in which nobody collapses anything.
const IDLE_ROUNDS: usize = 2;
/// Longest time for all blocks.
const PATIENCE: Duration = Duration::from_secs(120);

const PAGES_TO_SCAN: &str = "/sys/kernel/mm/transparent_hugepage/khugepaged/pages_to_scan";
const SCAN_SLEEP: &str = "/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs";

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The daemon's program.
    pub program: PathBuf,
    /// Blocks that are collapsed in each round.
    pub blocks: u64,
    /// Rounds of each that count; one before them does not.
    pub rounds: usize,
    /// Milliseconds for which khugepaged sleeps between two blocks.
    pub sleep: u64,
    /// Seed of what is touched.
    pub seed: u64,
}

impl Plan {
    /// Enough for stable medians, or a quick look.
    #[must_use]
    pub fn new(program: PathBuf, quick: bool, seed: u64) -> Self {
        let (blocks, rounds) = if quick { (16, 2) } else { (64, 8) };
        Plan { program, blocks, rounds, sleep: 20, seed }
    }
}

/// What the toucher met while blocks were collapsed.
#[derive(Clone, Copy, Debug, Default)]
struct Met {
    /// Sum of all stalls.
    stalled: Duration,
    /// Stalls that were long.
    long: u64,
    longest: Duration,
    /// Most of any 100 ms that was stalled.
    densest: Duration,
    accesses: u64,
    /// Sum of what was slow without a page fault.
    noise: Duration,
    /// Until all blocks were huge.
    took: Duration,
}

/// Measures.
///
/// # Errors
/// If the host's settings cannot be made, or not all blocks become huge in time.
pub fn measure(plan: &Plan) -> anyhow::Result<Scenario> {
    let mut scenario = Scenario::new("collapse-stall");
    scenario.arg("blocks", plan.blocks);
    scenario.arg("rounds", plan.rounds);
    scenario.arg("seed", plan.seed);
    scenario.arg("khugepaged_sleep_ms", plan.sleep);
    // The memory is of a file system of its own, of which khugepaged takes what has
    // the advice, and nothing else on this machine. It looks at one block at a time.
    let held = Held::shmem_enabled("never")?
        .and(PAGES_TO_SCAN, BLOCK_SIZE / PAGE_SIZE)?
        .and(SCAN_SLEEP, plan.sleep)?;
    scenario.arg("shmem_enabled", held.describe());
    let _equal = run_before_others()?;
    let mut rng = Rng::new(plan.seed);
    // The first collapses of each may meet memory that this machine's own host, if it
    // is a virtual one, has to find first; afterwards the same frames go round. The
    // same bytes in the same time: khugepaged is asked how fast it is.
    let mut rate = rate_of(plan, &by_khugepaged(plan, &mut rng)?);
    by_daemon(plan, rate, &mut rng)?;
    let (mut kernel, mut ours, mut idle) = (Vec::new(), Vec::new(), Vec::new());
    let mut hits = 0;
    for round in 0..plan.rounds {
        // Each comes first in every second round: whatever the first leaves to the
        // second, it leaves to both.
        for daemon in [round % 2 == 0, round % 2 == 1] {
            if daemon {
                let (met, recognised) = by_daemon(plan, rate, &mut rng)?;
                hits += recognised;
                ours.push(met);
            } else {
                let met = by_khugepaged(plan, &mut rng)?;
                rate = rate_of(plan, &met);
                kernel.push(met);
            }
        }
    }
    for _ in 0..IDLE_ROUNDS {
        idle.push(by_nobody(plan, Duration::from_secs(1), &mut rng)?);
    }
    tell(plan, &mut scenario, [&kernel, &ours, &idle]);
    let hits = hits as f64 / (plan.blocks * plan.rounds as u64) as f64;
    scenario.figure("daemon_rested_after", hits, Bar::AtLeast(0.5));
    Ok(scenario)
}

/// Has all that takes part run before everything else, khugepaged too until the
/// result is dropped: it is the kernel's least urgent thread, the daemon an ordinary
/// one, and whoever is put aside on a busy machine while it collapses stalls others
/// for longer, which is not the question.
fn run_before_others() -> anyhow::Result<Guard> {
    let khugepaged = khugepaged()?;
    let guard = cleanup::guard(move || {
        if let Err(error) = sys::run_first(khugepaged, false) {
            eprintln!("cannot put khugepaged's priority back: {error}");
        }
    });
    sys::run_first(khugepaged, true)
        .and_then(|()| sys::run_first(0, true))
        .context("cannot run before others (the superuser can)")?;
    Ok(guard)
}

fn khugepaged() -> anyhow::Result<libc::pid_t> {
    for entry in std::fs::read_dir("/proc")? {
        let path = entry?.path();
        let pid = path.file_name().and_then(|name| name.to_str()?.parse().ok());
        let name = std::fs::read_to_string(path.join("comm")).unwrap_or_default();
        if let (Some(pid), "khugepaged") = (pid, name.trim_end()) {
            return Ok(pid);
        }
    }
    bail!("this kernel runs no khugepaged: nothing is enabled that it would work on")
}

/// Bytes a second.
fn rate_of(plan: &Plan, met: &Met) -> f64 {
    (plan.blocks * BLOCK_SIZE) as f64 / met.took.as_secs_f64()
}

/// What is told of a round.
type Value<'a> = &'a dyn Fn(&Met) -> f64;

/// The value below which so many quarters of the rounds are.
fn quartile(of: &[Met], quarters: usize, value: Value) -> f64 {
    let mut values: Vec<f64> = of.iter().map(value).collect();
    values.sort_by(f64::total_cmp);
    let at = (values.len().saturating_sub(1) * quarters + 2) / 4;
    values.get(at).copied().unwrap_or(f64::NAN)
}

fn tell(plan: &Plan, scenario: &mut Scenario, [kernel, ours, idle]: [&[Met]; 3]) {
    let blocks = plan.blocks as f64;
    let gib = blocks * BLOCK_SIZE as f64 / (1u64 << 30) as f64;
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    let median = |of: &[Met], value: Value| quartile(of, 2, value);
    let rate = |met: &Met| gib * 1024.0 / met.took.as_secs_f64();
    let stalled = |met: &Met| ms(met.stalled) / blocks;
    let long = |met: &Met| met.long as f64 / gib;
    let longest = |met: &Met| ms(met.longest);
    let densest = |met: &Met| ms(met.densest);
    #[rustfmt::skip]
    let figures: [(&str, Value, Option<f64>); 4] = [
        ("stalled_ms_per_block", &stalled, Some(0.0)),
        // No round tells less than one stall from none.
        ("long_stalls_per_gib", &long, Some(1.0 / gib)),
        ("longest_stall_ms", &longest, Some(0.0)),
        ("densest_100ms_stalled_ms", &densest, None),
    ];
    // Slower would be no comparison.
    scenario.figure("khugepaged_mib_per_s", median(kernel, &rate), Bar::None);
    let slowest = Bar::AtLeast(0.9 * median(kernel, &rate));
    scenario.figure("daemon_mib_per_s", median(ours, &rate), slowest);
    for (name, value, resolution) in figures {
        let upper = quartile(kernel, 3, value);
        scenario.figure(&format!("khugepaged_{name}"), median(kernel, value), Bar::None);
        scenario.figure(&format!("khugepaged_{name}_upper_quartile"), upper, Bar::None);
        // Who is as good is above the other's median in every second run.
        let bar = resolution.map_or(Bar::None, |resolution| Bar::AtMost(upper + resolution));
        scenario.figure(&format!("daemon_{name}"), median(ours, value), bar);
        let upper = quartile(ours, 3, value);
        scenario.figure(&format!("daemon_{name}_upper_quartile"), upper, Bar::None);
    }
    let a_second = |part: Duration, met: &Met| ms(part) / met.took.as_secs_f64();
    #[rustfmt::skip]
    let others = [
        ("no_collapse_longest_stall_ms", median(idle, &longest), Bar::None),
        ("no_collapse_stalled_ms_per_s", median(idle, &|met| a_second(met.stalled, met)), Bar::None),
        ("slow_without_fault_ms_per_s", median(ours, &|met| a_second(met.noise, met)), Bar::None),
        ("accesses_per_round", median(ours, &|met| met.accesses as f64), Bar::AtLeast(1e5)),
    ];
    for (name, value, bar) in others {
        scenario.figure(name, value, bar);
    }
}

/// Touches random pages of `memory`, from the model guest's first block on, while
/// `work` goes on, and says what it met.
fn touching<T>(
    memory: &Arc<GuestMemory>,
    rng: &mut Rng,
    work: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<(Met, T)> {
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, memory) = (Arc::clone(&stop), Arc::clone(memory));
    let mut rng = Rng::new(rng.bits());
    let toucher = std::thread::spawn(move || touch(&memory, &mut rng, &stopped));
    let start = Instant::now();
    let result = work();
    let took = start.elapsed();
    stop.store(true, Ordering::Release);
    let mut met = toucher.join().map_err(|_| anyhow!("the toucher panicked"))?;
    met.took = took;
    Ok((met, result?))
}

fn touch(memory: &GuestMemory, rng: &mut Rng, stop: &AtomicBool) -> Met {
    let mut met = Met::default();
    let mut stalls: Vec<(Instant, Duration)> = Vec::new();
    let mut faults = sys::thread_faults();
    let first = AREA_BLOCKS * (BLOCK_SIZE / PAGE_SIZE);
    let pages = memory.blocks() * (BLOCK_SIZE / PAGE_SIZE) - first;
    while !stop.load(Ordering::Acquire) {
        let start = Instant::now();
        let mut last = start;
        while last - start < WORK {
            let page = (first + rng.below(pages)) * PAGE_SIZE;
            // A write, of what is there.
            memory.store_u16(page, memory.load_u16(page));
            let now = Instant::now();
            let took = now - last;
            let faulted = took > STALL && {
                let before = std::mem::replace(&mut faults, sys::thread_faults());
                faults != before
            };
            if took > STALL && !faulted {
                met.noise += took;
            } else if took > STALL {
                met.stalled += took;
                met.long += u64::from(took > LONG_STALL);
                met.longest = met.longest.max(took);
                stalls.push((now, took));
            }
            met.accesses += 1;
            // Not what looking at the faults took.
            last = if took > STALL { Instant::now() } else { now };
        }
        std::thread::sleep(REST);
    }
    let (mut from, mut sum) = (0, Duration::ZERO);
    for &(at, took) in &stalls {
        sum += took;
        while at - stalls[from].0 > Duration::from_millis(100) {
            sum -= stalls[from].1;
            from += 1;
        }
        met.densest = met.densest.max(sum);
    }
    met
}

fn memory(plan: &Plan) -> anyhow::Result<GuestMemory> {
    let size = (AREA_BLOCKS + plan.blocks) * BLOCK_SIZE;
    let scratch = Scratch::new()?;
    let file = sys::tmpfs_file(scratch.path(), size, "huge=advise")
        .context("cannot mount a tmpfs (the superuser can)")?;
    Ok(GuestMemory::of_file(file, size)?)
}

fn fill(guest: &mut Guest) -> anyhow::Result<()> {
    (AREA_BLOCKS..guest.blocks()).try_for_each(|block| guest.alloc_huge(block))
}

/// Waits until this process maps all blocks of the guest huge.
fn wait_huge(
    memory: &GuestMemory,
    mut meanwhile: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let pagemap = File::open("/proc/self/pagemap").context("cannot open own pagemap")?;
    let (start, end) = (
        memory.host_address(AREA_BLOCKS * BLOCK_SIZE),
        memory.host_address(memory.mapping().len()),
    );
    let deadline = Instant::now() + PATIENCE;
    loop {
        let ranges = gemini_pagemap::ranges(&pagemap, &(start..end), HUGE)?;
        let huge: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        if huge == end - start {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "only {} of {} blocks are huge after {PATIENCE:?}",
            huge / BLOCK_SIZE,
            (end - start) / BLOCK_SIZE
        );
        meanwhile()?;
    }
}

fn by_khugepaged(plan: &Plan, rng: &mut Rng) -> anyhow::Result<Met> {
    let memory = Arc::new(memory(plan)?);
    let mut guest = Guest::new(Arc::clone(&memory), AREA_BLOCKS)?;
    fill(&mut guest)?;
    let (met, ()) = touching(&memory, rng, || {
        let start = AREA_BLOCKS * BLOCK_SIZE;
        // Twice: the kernel hands a process to khugepaged if the mapping had the
        // advice before.
        for _ in 0..2 {
            memory.mapping().advise(start, plan.blocks * BLOCK_SIZE, libc::MADV_HUGEPAGE)?;
        }
        wait_huge(&memory, || {
            std::thread::sleep(Duration::from_millis(20));
            Ok(())
        })
    })?;
    guest.ensure_intact()?;
    Ok(met)
}

/// Also says after how many collapses the daemon rested because they were met.
fn by_daemon(plan: &Plan, rate: f64, rng: &mut Rng) -> anyhow::Result<(Met, u64)> {
    let scratch = Scratch::new()?;
    let options = Options::new(&plan.program, "gemini")
        .arg("--copy-rate", &format!("{rate:.0}"))
        .arg("--cpu-share", "100");
    let daemon = Daemon::start(&options, scratch.path())?;
    let mut machine = Machine::boot(&daemon.socket(), memory(plan)?)?;
    fill(&mut machine.guest)?;
    let memory = Arc::clone(&machine.memory);
    let (met, ()) = touching(&memory, rng, || {
        machine.talk()?;
        wait_huge(&memory, || machine.driver.wait(Duration::from_millis(20)).map(|_| ()))
    })?;
    machine.guest.ensure_intact()?;
    Ok((met, daemon.status()?.collapses_met))
}

/// What the toucher meets on this machine anyway.
fn by_nobody(plan: &Plan, time: Duration, rng: &mut Rng) -> anyhow::Result<Met> {
    let memory = Arc::new(memory(plan)?);
    let mut guest = Guest::new(Arc::clone(&memory), AREA_BLOCKS)?;
    fill(&mut guest)?;
    let (met, ()) = touching(&memory, rng, || {
        std::thread::sleep(time);
        Ok(())
    })?;
    Ok(met)
}

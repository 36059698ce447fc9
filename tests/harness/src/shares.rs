//! Several VMs, a daemon each, over a limited supply of huge pages and copying:
//! what each has, seen from outside.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context};
use gemini_pagemap::HUGE;

use crate::budgets::Guest;
use crate::figures::{Bar, Scenario};
use crate::memory::{GuestMemory, BLOCK_SIZE};
use crate::sampling::Sampler;
use crate::scratch::Scratch;
use crate::settings::Held;
use crate::sys;
use crate::wire::host_state;

const MIB: u64 = 1 << 20;
const WEIGHTS: [u64; 3] = [100, 200, 300];
/// How long a newcomer may wait for its share.
const SOON: f64 = 5.0;
/// Longest wait before a figure is a missed one.
const PATIENCE: Duration = Duration::from_secs(20);

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The daemon's program.
    pub program: PathBuf,
    /// Huge pages of the host for all VMs together; each has as many blocks.
    pub supply: u64,
    /// MiB a second that may be copied for all of them.
    pub rate: u64,
    /// How long each part is measured.
    pub time: Duration,
}

impl Plan {
    /// Three VMs on 240 huge pages, or a quick look.
    #[must_use]
    pub fn new(program: PathBuf, quick: bool) -> Self {
        let (supply, time) = if quick { (120, 3) } else { (240, 10) };
        Plan { program, supply, rate: 36, time: Duration::from_secs(time) }
    }
}

/// Measures.
///
/// # Errors
/// If the host's settings cannot be made, or a daemon does not behave.
pub fn measure(plan: &Plan) -> anyhow::Result<Scenario> {
    let mut scenario = Scenario::new("shares");
    scenario.arg("supply_blocks", plan.supply);
    scenario.arg("rate_mib_per_s", plan.rate);
    scenario.arg("weights", WEIGHTS.to_vec());
    let held = Held::shmem_enabled("never")?;
    scenario.arg("shmem_enabled", held.describe());
    huge_pages(plan, &mut scenario)?;
    copying(plan, &mut scenario)?;
    Ok(scenario)
}

fn start(
    plan: &Plan,
    directory: &Path,
    weight: u64,
    limit: (&str, String),
    blocks: u64,
) -> anyhow::Result<Guest> {
    let directory = directory.to_str().context("the directory's name is no text")?;
    let arguments = [
        ("--share-dir", directory.to_owned()),
        ("--weight", weight.to_string()),
        ("--copy-rate", "1G".to_owned()),
        ("--cpu-share", "100".to_owned()),
        limit,
    ];
    Guest::start(&plan.program, blocks, &arguments)
}

/// Huge pages that this process maps of a guest's memory.
fn huge_of(pagemap: &File, memory: &GuestMemory) -> anyhow::Result<u64> {
    let base = memory.host_address(0);
    let memory = base..base + memory.mapping().len();
    let ranges = gemini_pagemap::ranges(pagemap, &memory, HUGE)?;
    Ok(ranges.iter().map(|range| (range.end - range.start) / BLOCK_SIZE).sum())
}

fn own_pagemap() -> anyhow::Result<File> {
    File::open("/proc/self/pagemap").context("cannot open own pagemap")
}

/// Lets all guests live for a while.
fn live(guests: &mut [Guest], time: Duration) -> anyhow::Result<()> {
    let deadline = Instant::now() + time;
    loop {
        for guest in guests.iter_mut() {
            guest.machine.talk()?;
            guest.machine.driver.wait(Duration::from_millis(2))?;
        }
        if Instant::now() >= deadline {
            return Ok(());
        }
    }
}

/// Lives until the guests have what is expected, within a tenth; the seconds.
fn until_shared(guests: &mut [Guest], expected: &[f64]) -> anyhow::Result<f64> {
    let pagemap = own_pagemap()?;
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        if deviation(&pagemap, guests, expected)? <= 10.0 {
            return Ok(start.elapsed().as_secs_f64());
        }
        live(guests, Duration::from_millis(20))?;
    }
    Ok(f64::INFINITY)
}

/// By how many percent of its share a guest is off at most.
fn deviation(pagemap: &File, guests: &[Guest], expected: &[f64]) -> anyhow::Result<f64> {
    ensure!(guests.len() == expected.len(), "a share for each guest");
    let mut most = 0.0f64;
    for (guest, share) in guests.iter().zip(expected) {
        let has = huge_of(pagemap, &guest.machine.memory)? as f64;
        most = most.max(100.0 * (has - share).abs() / share);
    }
    Ok(most)
}

/// The shares of `total` by weight.
fn by_weight(total: f64, weights: &[u64]) -> Vec<f64> {
    let sum = weights.iter().sum::<u64>() as f64;
    weights.iter().map(|weight| total * *weight as f64 / sum).collect()
}

fn huge_pages(plan: &Plan, scenario: &mut Scenario) -> anyhow::Result<()> {
    let directory = Scratch::new()?;
    let supply = plan.supply as f64;
    let limit = || ("--host-huge-max", (plan.supply * BLOCK_SIZE).to_string());
    let enter = |weight| start(plan, directory.path(), weight, limit(), plan.supply);
    let [first, second, third] = WEIGHTS;
    let mut guests = vec![enter(first)?];
    let alone = until_shared(&mut guests, &[supply])?;
    scenario.figure("alone_all_s", alone, Bar::Below(PATIENCE.as_secs_f64()));
    guests.push(enter(second)?);
    let joined = until_shared(&mut guests, &by_weight(supply, &[first, second]))?;
    scenario.figure("second_has_its_share_s", joined, Bar::Below(SOON));
    guests.push(enter(third)?);
    let memories: Vec<Arc<GuestMemory>> =
        guests.iter().map(|guest| Arc::clone(&guest.machine.memory)).collect();
    let pagemap = own_pagemap()?;
    let together = Sampler::start(Duration::from_millis(4), move || {
        memories.iter().map(|memory| huge_of(&pagemap, memory)).sum()
    });
    let all = by_weight(supply, &WEIGHTS);
    let joined = until_shared(&mut guests, &all)?;
    scenario.figure("third_has_its_share_s", joined, Bar::Below(SOON));
    let pagemap = own_pagemap()?;
    let mut worst = 0.0f64;
    let start = Instant::now();
    while start.elapsed() < plan.time {
        live(&mut guests, Duration::from_millis(50))?;
        worst = worst.max(deviation(&pagemap, &guests, &all)?);
    }
    scenario.figure("three_vms_most_off_percent", worst, Bar::AtMost(10.0));

    // The third one's guest frees everything, and comes back.
    idle_and_back(plan, &mut guests, scenario)?;
    let samples = together.finish()?;
    let most = samples.iter().map(|sample| sample.value).max().unwrap_or(0);
    scenario.figure("most_blocks_together", most as f64, Bar::AtMost(supply));

    // Its monitor is killed: the connection and the memory are gone.
    let gone = guests.pop().context("three guests")?;
    let Guest { daemon: left_alone, machine, .. } = gone;
    drop(machine);
    let returned = until_shared(&mut guests, &by_weight(supply, &[first, second]))?;
    scenario.figure("monitor_killed_returned_s", returned, Bar::Below(SOON));
    drop(left_alone);
    // And so is the daemon of the second one; what its guest has stays, so that only
    // the claim returns.
    let Guest { daemon: mut killed, machine, .. } = guests.pop().context("two guests")?;
    sys::kill(killed.pid(), libc::SIGKILL)?;
    killed.wait(PATIENCE)?;
    let returned = until_shared(&mut guests, &[supply])?;
    scenario.figure("daemon_killed_returned_s", returned, Bar::Below(SOON));
    machine.guest.ensure_intact()?;
    guests.iter().try_for_each(|guest| guest.machine.guest.ensure_intact())
}

fn idle_and_back(plan: &Plan, guests: &mut [Guest], scenario: &mut Scenario) -> anyhow::Result<()> {
    let supply = plan.supply as f64;
    let last = guests.last_mut().context("three guests")?;
    for block in last.own() {
        last.machine.guest.free_huge(block)?;
    }
    let pagemap = own_pagemap()?;
    let start = Instant::now();
    // What it keeps to begin with again is small.
    let busy = by_weight(0.9 * supply, &WEIGHTS[..2]);
    let given_up = loop {
        live(guests, Duration::from_millis(20))?;
        let mut enough = true;
        for (guest, share) in guests.iter().zip(&busy) {
            enough &= huge_of(&pagemap, &guest.machine.memory)? as f64 >= *share;
        }
        if enough {
            break start.elapsed().as_secs_f64();
        }
        if start.elapsed() > PATIENCE {
            break f64::INFINITY;
        }
    };
    scenario.figure("idle_one_gave_up_s", given_up, Bar::Below(SOON));
    let last = guests.last_mut().context("three guests")?;
    for block in last.own() {
        last.machine.guest.alloc_huge(block)?;
    }
    let back = until_shared(guests, &by_weight(supply, &WEIGHTS))?;
    scenario.figure("idle_one_has_it_back_s", back, Bar::Below(SOON));
    Ok(())
}

fn copying(plan: &Plan, scenario: &mut Scenario) -> anyhow::Result<()> {
    let directory = Scratch::new()?;
    let limit = || ("--host-copy-rate", format!("{}M", plan.rate));
    let mut guests = WEIGHTS
        .iter()
        .map(|weight| start(plan, directory.path(), *weight, limit(), plan.supply / 3))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let wear = |guests: &mut [Guest], time: Duration| -> anyhow::Result<()> {
        let start = Instant::now();
        while start.elapsed() < time {
            live(guests, Duration::from_millis(5))?;
            for guest in guests.iter_mut() {
                for block in guest.own() {
                    if guest.hinted(block) == Some(host_state::HUGE) {
                        guest.break_up(block)?;
                    }
                }
            }
        }
        Ok(())
    };
    wear(&mut guests, Duration::from_secs(3))?;
    let charged = |guests: &[Guest]| -> anyhow::Result<Vec<u64>> {
        guests.iter().map(|guest| Ok(guest.daemon.status()?.charged_bytes)).collect()
    };
    // What is charged is what the kernel was asked for, as the scenario `budgets` shows.
    let (before, start) = (charged(&guests)?, Instant::now());
    wear(&mut guests, 2 * plan.time)?;
    let (after, seconds) = (charged(&guests)?, start.elapsed().as_secs_f64());
    let (mut worst, mut all) = (0.0f64, 0.0);
    let shares = by_weight(plan.rate as f64, &WEIGHTS);
    for ((before, after), share) in before.iter().zip(&after).zip(&shares) {
        let rate = (after - before) as f64 / MIB as f64 / seconds;
        all += rate;
        worst = worst.max(100.0 * (rate - share).abs() / share);
    }
    scenario.figure("copying_together_mib_per_s", all, Bar::AtMost((plan.rate * 11) as f64 / 10.0));
    scenario.figure("copying_most_off_percent", worst, Bar::AtMost(10.0));
    guests.iter().try_for_each(|guest| guest.machine.guest.ensure_intact())
}

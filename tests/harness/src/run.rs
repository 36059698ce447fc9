//! The same model workload under each policy, and the figures of merit.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context};

use crate::daemon::{Daemon, Options, Status};
use crate::figures::Bar;
use crate::machine::{Machine, PATIENCE};
use crate::memory::{GuestMemory, Placement, BLOCK_SIZE};
use crate::outside;
use crate::report::{ratio, BlockMap, RunFigures};
use crate::rng::Rng;
use crate::scratch::Scratch;
use crate::wire::{guest_state, host_state};

/// What to run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The daemon's program.
    pub program: std::path::PathBuf,
    /// Guest memory in bytes.
    pub memory: u64,
    /// Seed of the workload.
    pub seed: u64,
    /// Random reads of the workload.
    pub reads: u64,
}

/// What one policy gave.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The figures.
    pub figures: RunFigures,
    /// The daemon's map, which agreed with what was seen from outside.
    pub map: BlockMap,
    /// Log of the daemon.
    pub findings: Vec<String>,
}

/// The bars that `figures` misses, in words. The same numbers are asked of a real
/// guest.
#[must_use]
pub fn missed(figures: &RunFigures) -> Vec<String> {
    let RunFigures { policy, aligned_rate, aligned_coverage, .. } = figures;
    let bars = match policy.as_str() {
        "gemini" => [Bar::AtLeast(0.95), Bar::AtLeast(0.9)],
        "none" => [Bar::Below(0.05), Bar::Below(0.05)],
        _ => return Vec::new(),
    };
    [("aligned_rate", aligned_rate), ("aligned_coverage", aligned_coverage)]
        .into_iter()
        .zip(bars)
        .filter(|((_, &value), bar)| !bar.met(value))
        .map(|((name, value), bar)| format!("{policy}: {name} is {value:.3}, bar {bar}"))
        .collect()
}

/// Least guest memory that the workload has room in.
pub const LEAST_MEMORY: u64 = 64 * BLOCK_SIZE;

/// The guest memory to use: `wanted`, or less where the machine has not so much.
///
/// # Errors
/// If the machine has too little for any run.
pub fn fitting_memory(wanted: u64) -> anyhow::Result<u64> {
    let available = outside::available_memory()?;
    // Half is left to the rest of the machine.
    let fitting = wanted.min(available / 2) / BLOCK_SIZE * BLOCK_SIZE;
    ensure!(
        fitting >= LEAST_MEMORY,
        "only {} MiB of memory are available; at least {} MiB are needed",
        available >> 20,
        (2 * LEAST_MEMORY) >> 20
    );
    Ok(fitting)
}

/// Runs the workload under `policy`.
///
/// # Errors
/// If the daemon or the device does not behave, if memory was damaged, or if the
/// daemon's map differs from what is seen from outside.
pub fn run(plan: &Plan, policy: &str) -> anyhow::Result<Outcome> {
    let scratch = Scratch::new()?;
    let mut daemon = Daemon::start(&Options::new(&plan.program, policy), scratch.path())?;
    let memory = GuestMemory::new(plan.memory, Placement::Aligned)?;
    let mut machine = Machine::boot(&daemon.socket(), memory)?;
    let mut rng = Rng::new(plan.seed);

    let start = Instant::now();
    workload(&mut machine, &mut rng, plan.reads)?;
    let workload_seconds = start.elapsed().as_secs_f64();

    if policy == "kubevirt-like" {
        // What it does when the guest has booted, once there is something to do it to.
        daemon.control(&serde_json::json!({"cmd": "set", "policy": policy}))?;
    }
    let settled = settle(&mut machine, &mut daemon)?;
    let (map, host) = agreed_map(&mut machine, &daemon)?;
    machine.guest.ensure_intact().context("after the workload")?;

    let (aligned, guest_only, host_only) = map.counts();
    let (mut user, mut covered) = (0, 0);
    for (block, &host) in (0..).zip(&host) {
        let bytes = machine.guest.user_bytes(block);
        user += bytes;
        if machine.guest.state(block).0 == guest_state::HUGE && host == host_state::HUGE {
            covered += bytes;
        }
    }
    let status = daemon.status()?;
    let figures = RunFigures {
        policy: policy.to_owned(),
        aligned_coverage: ratio(covered, user),
        collapse_bytes: status.collapse_bytes,
        host_rss_bytes: machine.memory.resident_bytes()?,
        daemon_cpu_seconds: outside::ProcessFigures::of(daemon.pid())?.cpu_seconds,
        workload_seconds,
        ..RunFigures::default()
    }
    .with_counts(aligned, guest_only, host_only);

    drop(machine);
    let exit = daemon.terminate()?;
    ensure!(exit.success(), "daemon ended with {exit} on SIGTERM");
    let findings = settled
        .findings
        .iter()
        .map(|finding| format!("{}: {}", finding.severity, finding.message))
        .collect();
    Ok(Outcome { figures, map, findings })
}

/// Fills more than half of memory with guest huge pages and a little with
/// scattered base pages, frees, splits and refills some, then reads at random.
fn workload(machine: &mut Machine, rng: &mut Rng, reads: u64) -> anyhow::Result<()> {
    let blocks = machine.guest.blocks();
    let huge = blocks * 55 / 100;
    let mut filled = Vec::new();
    for _ in 0..huge {
        filled.push(fill_one(machine, rng)?);
        if filled.len() % 16 == 0 {
            machine.talk()?;
        }
    }
    // A tenth of the blocks get a few base pages each: about 2 % of memory in
    // use, which no policy should spend huge pages on.
    for _ in 0..blocks / 10 {
        let block = free_block(machine, rng)?;
        for page in 0..64 {
            machine.guest.alloc_base(block, page * 8 + rng.below(8))?;
        }
    }
    machine.talk()?;
    // Churn: a fifth of the huge pages is freed and allocated again elsewhere.
    for _ in 0..huge / 5 {
        let freed = filled.swap_remove(rng.index(filled.len()));
        machine.guest.free_huge(freed)?;
        filled.push(fill_one(machine, rng)?);
        machine.talk()?;
    }
    for _ in 0..huge / 100 {
        let split = filled.swap_remove(rng.index(filled.len()));
        machine.guest.split(split)?;
    }
    machine.talk()?;
    const SLICE: u64 = 100_000;
    let mut done = 0;
    while done < reads {
        let count = SLICE.min(reads - done);
        std::hint::black_box(machine.guest.read_at_random(rng, count));
        machine.talk()?;
        done += count;
    }
    Ok(())
}

fn free_block(machine: &Machine, rng: &mut Rng) -> anyhow::Result<u64> {
    let from = rng.below(machine.guest.blocks());
    machine
        .guest
        .free_block(from)
        .or_else(|| machine.guest.free_block(0))
        .context("the model guest is out of memory")
}

fn fill_one(machine: &mut Machine, rng: &mut Rng) -> anyhow::Result<u64> {
    let block = free_block(machine, rng)?;
    machine.guest.alloc_huge(block)?;
    Ok(block)
}

/// Waits until the daemon has done what its policy wants: nothing changed for a
/// second.
fn settle(machine: &mut Machine, daemon: &mut Daemon) -> anyhow::Result<Status> {
    let figures = |status: &Status| {
        (
            status.aligned,
            status.guest_only,
            status.host_only,
            status.host,
            status.collapses,
            status.collapse_failures,
        )
    };
    let deadline = Instant::now() + 3 * PATIENCE;
    let mut last = daemon.status()?;
    let mut since = Instant::now();
    while since.elapsed() < Duration::from_secs(1) {
        ensure!(Instant::now() < deadline, "daemon never rests: {last:?}");
        machine.run_for(Duration::from_millis(100))?;
        daemon.ensure_alive()?;
        let status = daemon.status()?;
        if figures(&status) != figures(&last) {
            since = Instant::now();
        }
        last = status;
    }
    Ok(last)
}

/// The daemon's map, once it agrees block by block with the model guest's own
/// states and with the page tables of the monitor; and the host states.
///
/// # Errors
/// If they do not agree in time, with the first differences.
pub fn agreed_map(machine: &mut Machine, daemon: &Daemon) -> anyhow::Result<(BlockMap, Vec<u8>)> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        machine.talk()?;
        let host = outside::host_states(&machine.memory)?;
        let map = daemon.map()?;
        let differences = differences(machine, &map, &host);
        if differences.is_empty() {
            return Ok((map, host));
        }
        // The daemon rescans by and by.
        ensure!(
            Instant::now() < deadline,
            "daemon's map differs in {} blocks from what is seen from outside: {}",
            differences.len(),
            differences.iter().take(5).cloned().collect::<Vec<_>>().join("; ")
        );
        machine.run_for(Duration::from_millis(200))?;
    }
}

fn differences(machine: &Machine, map: &BlockMap, host: &[u8]) -> Vec<String> {
    let mut found = Vec::new();
    let mut next = 0;
    for run in &map.runs {
        for block in run.first..run.first + run.count {
            let index = usize::try_from(block).unwrap_or(usize::MAX);
            let seen_host =
                host.get(index).map_or("outside", |&state| host_state::NAMES[usize::from(state)]);
            let seen_guest = if block < machine.guest.blocks() {
                guest_state::NAMES[usize::from(machine.guest.state(block).0)]
            } else {
                "outside"
            };
            if block != next || run.guest != seen_guest || run.host != seen_host {
                found.push(format!(
                    "block {block}: daemon says guest {} and host {}, seen are {seen_guest} \
                     and {seen_host}",
                    run.guest, run.host
                ));
            }
            next = block + 1;
        }
    }
    if next != host.len() as u64 {
        found.push(format!("the map ends at block {next} of {}", host.len()));
    }
    found
}

/// Where a daemon's program is.
///
/// # Errors
/// If `given` is no file and there is none at the default place.
pub fn program(given: Option<&Path>) -> anyhow::Result<std::path::PathBuf> {
    match given {
        Some(path) => {
            ensure!(path.is_file(), "{} is no program", path.display());
            Ok(path.to_owned())
        }
        None => crate::daemon::default_program(),
    }
}

//! The daemon is killed at each step of a prepare, a release, a renew and a trim,
//! and started again: nothing that was not released is lost, what was answered
//! is true, and the full state is back soon.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{ensure, Context};

use crate::daemon::{Daemon, Options};
use crate::driver::AREA_BLOCKS;
use crate::figures::{Bar, Scenario};
use crate::guest::PAGES_PER_BLOCK;
use crate::machine::{each, singles, Machine, PATIENCE};
use crate::memory::{GuestMemory, Placement, BLOCK_SIZE};
use crate::rng::Rng;
use crate::run::agreed_map;
use crate::scratch::Scratch;
use crate::settings;
use crate::wire::{self, guest_state, Range};

/// Requests that are outstanding when the daemon is killed.
const OUTSTANDING: u64 = 8;
const BLOCKS: u64 = 96;
/// Of so many base pages one stays in use where others are trimmed.
const STRIDE: u64 = 8;
/// The others up to the next one.
const RUN: u32 = 7;
const _: () = assert!(RUN as u64 == STRIDE - 1);

/// What to do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The daemon's program, as it is shipped.
    pub program: PathBuf,
    /// The daemon's program with fault points.
    pub fault_program: PathBuf,
    /// Seed of the model guest.
    pub seed: u64,
    /// At which passages of each fault point the daemon is killed.
    pub passages: Vec<u64>,
}

/// Where the daemon with fault points is unless told: built into
/// `target/fault-points`.
///
/// # Errors
/// If it is not there.
pub fn default_fault_program() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("cannot tell where this program is")?;
    // target/PROFILE/gemini-harness, or target/PROFILE/deps/TEST
    own.ancestors()
        .skip(1)
        .take(2)
        .filter_map(|directory| {
            let profile = directory.file_name()?;
            let target = directory.parent()?.join("fault-points");
            Some(target.join(profile).join("vhost-device-gemini"))
        })
        .find(|path| path.is_file())
        .context(
            "no daemon with fault points: build it (cargo build -p vhost-device-gemini \
             --features fault-points --target-dir target/fault-points), or name it with \
             --fault-daemon",
        )
}

#[derive(Default)]
struct Totals {
    kills: u64,
    answered_before: u64,
    answered_after: u64,
    dropped: u64,
    trimmed: u64,
    void: u64,
    damaged: u64,
    changed: u64,
    worst_resync: Duration,
}

/// Kills at every point and measures.
///
/// # Errors
/// If the daemon or the device does not behave.
pub fn measure(plan: &Plan) -> anyhow::Result<Scenario> {
    let mut scenario = Scenario::new("restart");
    scenario.arg("seed", plan.seed);
    scenario.arg("outstanding", OUTSTANDING);
    scenario.arg("passages", plan.passages.clone());
    let _held = settings::daemon_decides()?;
    let mut totals = Totals::default();
    let mut expected = 0;
    for kind in ["prepare", "release", "renew", "trim"] {
        for step in ["fetched", "done", "published"] {
            for &passage in &plan.passages {
                let fault = format!("{kind}.{step}:{passage}");
                expected += 1;
                kill_at(plan, kind, &fault, expected, &mut totals)
                    .with_context(|| format!("killed at {fault}"))?;
                println!(
                    "killed at {fault}: {} answers so far, worst resync {:.3} s",
                    totals.answered_before + totals.answered_after,
                    totals.worst_resync.as_secs_f64()
                );
            }
        }
    }
    let scratch = Scratch::new()?;
    let daemon = Daemon::start(&Options::new(&plan.program, "gemini"), scratch.path())?;
    scenario.version("daemon", daemon.status()?.version);
    #[rustfmt::skip]
    let figures = [
        ("kills", totals.kills as f64, Bar::AtLeast(f64::from(expected))),
        ("damaged_pages", totals.damaged as f64, Bar::AtMost(0.0)),
        ("resync_seconds_max", totals.worst_resync.as_secs_f64(), Bar::Below(2.0)),
        ("answered_before_restart", totals.answered_before as f64, Bar::None),
        ("answered_after_restart", totals.answered_after as f64, Bar::None),
        ("blocks_dropped", totals.dropped as f64, Bar::AtLeast(1.0)),
        ("pages_trimmed", totals.trimmed as f64, Bar::AtLeast(1.0)),
        ("changes_without_daemon", totals.changed as f64, Bar::AtLeast(1.0)),
        ("void_answers", totals.void as f64, Bar::AtLeast(1.0)),
    ];
    for (name, value, bar) in figures {
        scenario.figure(name, value, bar);
    }
    Ok(scenario)
}

/// Fills the model guest: huge pages, base pages, and blocks that were used and
/// freed; so every block has contents that can be lost.
fn populate(machine: &mut Machine, rng: &mut Rng) -> anyhow::Result<()> {
    for block in AREA_BLOCKS..machine.guest.blocks() {
        match rng.below(4) {
            0 => machine.guest.alloc_huge(block)?,
            1 => {
                for page in 0..rng.below(40) {
                    machine.guest.alloc_base(block, page * 12)?;
                }
            }
            _ => {
                machine.guest.alloc_huge(block)?;
                machine.guest.free_huge(block)?;
            }
        }
    }
    machine.talk()
}

fn kill_at(
    plan: &Plan,
    kind: &str,
    fault: &str,
    number: u32,
    totals: &mut Totals,
) -> anyhow::Result<()> {
    let scratch = Scratch::new()?;
    let options = Options::new(&plan.fault_program, "gemini").env("GEMINI_FAULT", fault);
    let mut doomed = Daemon::start(&options, scratch.path())?;
    let memory = GuestMemory::new(BLOCKS * BLOCK_SIZE, Placement::Aligned)?;
    let mut machine = Machine::boot(&doomed.socket(), memory)?;
    let mut rng = Rng::new(plan.seed ^ u64::from(number));
    populate(&mut machine, &mut rng)?;

    // All is booked before anything is asked for, as a driver does.
    let free = machine.guest.in_state(guest_state::FREE);
    let wanted = 2 * usize::try_from(OUTSTANDING)?;
    ensure!(free.len() >= wanted, "only {} free blocks", free.len());
    let held = &free[..wanted];
    let kind = match kind {
        "prepare" => wire::REQ_PREPARE,
        "release" => wire::REQ_RELEASE,
        "renew" => wire::REQ_RENEW,
        _ => wire::REQ_TRIM,
    };
    for &block in held {
        if kind == wire::REQ_TRIM {
            use_sparsely(&mut machine, block)?;
        } else {
            machine.guest.book(block)?;
        }
    }
    machine.talk()?;
    for pair in held.chunks(2) {
        submit(&mut machine, kind, pair, &mut rng)?;
    }

    let exit =
        doomed.wait(PATIENCE).context("the daemon was not killed (built without fault points?)")?;
    ensure!(exit.signal() == Some(libc::SIGKILL), "the daemon ended with {exit}");
    totals.kills += 1;
    // The guest runs on without a daemon, and sees the answers that were given.
    machine.driver.poll()?;
    totals.answered_before += take_answers(&mut machine, totals);
    let changed = live_on(&mut machine, &mut rng)?;
    totals.changed += changed;
    totals.damaged += damaged(&machine, "after the kill")?;

    let mut daemon = Daemon::start(&Options::new(&plan.program, "gemini"), scratch.path())?;
    let start = Instant::now();
    machine.reconnect(&daemon.socket())?;
    machine.sync()?;
    daemon.wait_status("synchronised", PATIENCE, |status| {
        status.guest_synced && status.host_synced
    })?;
    totals.worst_resync = totals.worst_resync.max(start.elapsed());
    // Nothing that happened meanwhile is missing, at either layer.
    agreed_map(&mut machine, &daemon).context("states after the restart")?;

    machine.driver.wait_until("answers after the restart", PATIENCE, |driver| {
        driver.unanswered().next().is_none()
    })?;
    totals.answered_after += take_answers(&mut machine, totals);
    totals.damaged += damaged(&machine, "after the restart")?;

    reuse(&mut machine, kind, held)?;
    machine.run_for(Duration::from_millis(100))?;
    totals.damaged += damaged(&machine, "after the blocks were used again")?;
    well_behaved_end(&mut machine)?;
    totals.damaged += damaged(&machine, "at the end")?;
    drop(machine);
    let exit = daemon.terminate()?;
    ensure!(exit.success(), "daemon ended with {exit} on SIGTERM");
    Ok(())
}

/// The guest allocates, frees and splits without a daemon, and finds its memory
/// as it was. Returns the number of changes.
fn live_on(machine: &mut Machine, rng: &mut Rng) -> anyhow::Result<u64> {
    let mut changes = 0;
    for block in AREA_BLOCKS..machine.guest.blocks() {
        if !rng.chance(30) {
            continue;
        }
        match machine.guest.state(block).0 {
            guest_state::FREE => machine.guest.alloc_huge(block)?,
            guest_state::HUGE if rng.chance(50) => machine.guest.split(block)?,
            guest_state::HUGE => machine.guest.free_huge(block)?,
            _ => continue,
        }
        changes += 1;
    }
    // Some stay free for what comes later.
    for block in machine.guest.in_state(guest_state::HUGE).into_iter().take(6) {
        machine.guest.free_huge(block)?;
        changes += 1;
    }
    Ok(changes)
}

fn submit(machine: &mut Machine, kind: u16, blocks: &[u64], rng: &mut Rng) -> anyhow::Result<u64> {
    match kind {
        wire::REQ_PREPARE => machine.driver.submit(kind, &singles(blocks)),
        // A run of free pages of each.
        wire::REQ_TRIM => {
            let run = |&block: &u64| Range {
                first: block * PAGES_PER_BLOCK + rng.below(PAGES_PER_BLOCK / STRIDE) * STRIDE + 1,
                count: RUN,
            };
            let runs: Vec<Range> = blocks.iter().map(run).collect();
            machine.submit_trim(&runs)
        }
        _ => machine.submit_drop(kind, &singles(blocks)),
    }
}

/// Has all of a free block written, and one of [`STRIDE`] pages stay in use.
fn use_sparsely(machine: &mut Machine, block: u64) -> anyhow::Result<()> {
    machine.guest.alloc_huge(block)?;
    machine.guest.split(block)?;
    for page in (0..PAGES_PER_BLOCK).filter(|page| page % STRIDE != 0) {
        machine.guest.free_base(block, page)?;
    }
    Ok(())
}

/// Takes all answers and notes what they say about contents. Returns how many.
fn take_answers(machine: &mut Machine, totals: &mut Totals) -> u64 {
    let mut count = 0;
    while let Some(answer) = machine.driver.take_any_answer() {
        count += 1;
        match answer.response.status {
            wire::S_OK if answer.request.kind == wire::REQ_TRIM => {
                for range in &answer.request.ranges {
                    let end = range.first + u64::from(range.count);
                    machine.guest.pages_dropped(range.first..end);
                    totals.trimmed += u64::from(range.count);
                }
            }
            wire::S_OK if answer.request.kind != wire::REQ_PREPARE => {
                for block in each(&answer.request.ranges) {
                    machine.guest.contents_dropped(block);
                    totals.dropped += 1;
                }
            }
            wire::S_VOID => totals.void += 1,
            // Undefined contents stay undefined; PREPARE keeps them anyway.
            _ => {}
        }
    }
    count
}

fn damaged(machine: &Machine, when: &str) -> anyhow::Result<u64> {
    let damages = machine.guest.verify()?;
    for damage in damages.iter().take(3) {
        println!("DAMAGED {when}: {damage}");
    }
    Ok(damages.len() as u64)
}

/// Everything that was held is answered for, so it may be used again: whatever
/// drops it now is a drop that came too late.
fn reuse(machine: &mut Machine, kind: u16, held: &[u64]) -> anyhow::Result<()> {
    for &block in held {
        if kind == wire::REQ_TRIM {
            for page in (0..PAGES_PER_BLOCK).filter(|page| page % STRIDE != 0) {
                machine.guest.alloc_base(block, page)?;
            }
            continue;
        }
        machine.guest.unbook(block)?;
        machine.guest.alloc_huge(block)?;
    }
    machine.talk()
}

/// The restarted daemon serves a prepare, a release, a renew and a trim.
fn well_behaved_end(machine: &mut Machine) -> anyhow::Result<()> {
    let free = machine.guest.in_state(guest_state::FREE);
    let [first, second, third, fourth, ..] = free[..] else {
        anyhow::bail!("only {} free blocks", free.len());
    };
    for block in [first, second, third] {
        machine.guest.book(block)?;
    }
    use_sparsely(machine, fourth)?;
    machine.talk()?;
    for (kind, block) in [(wire::REQ_RELEASE, first), (wire::REQ_RENEW, second)] {
        let status = machine.drop_blocks(kind, &singles(&[block]))?;
        ensure!(status == wire::S_OK, "request {kind} answered with status {status}");
    }
    let answer = machine.driver.request(wire::REQ_PREPARE, &singles(&[third]), PATIENCE)?;
    ensure!(
        answer.response.status == wire::S_OK,
        "PREPARE answered with status {}",
        answer.response.status
    );
    let run = Range { first: fourth * PAGES_PER_BLOCK + 1, count: RUN };
    let ticket = machine.submit_trim(&[run])?;
    let status = machine.driver.answer(ticket, PATIENCE)?.response.status;
    ensure!(status == wire::S_OK, "TRIM answered with status {status}");
    machine.guest.pages_dropped(run.first..run.first + u64::from(run.count));
    Ok(())
}

/// The daemon with fault points: `given`, or where it is built to.
///
/// # Errors
/// If it is not there.
pub fn fault_program(given: Option<&Path>) -> anyhow::Result<PathBuf> {
    match given {
        Some(path) => {
            ensure!(path.is_file(), "{} is no program", path.display());
            Ok(path.to_owned())
        }
        None => default_fault_program(),
    }
}

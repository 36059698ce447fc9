//! What deciding costs where there is much to decide about: one guest of 1 TiB
//! that changes, and many idle guests beside each other.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::ensure;
use serde_json::json;

use crate::daemon::{Daemon, Options};
use crate::driver::AREA_BLOCKS;
use crate::figures::{Bar, Scenario};
use crate::machine::PATIENCE;
use crate::memory::BLOCK_SHIFT;
use crate::outside::{self, ProcessFigures};
use crate::scale::{ensure_memory, sparse_census, sparse_guest, Connected};
use crate::scratch::Scratch;
use crate::settings;
use crate::sys::PAGE_SIZE;
use crate::wire::{guest_state, Record};

const MIB: f64 = (1u64 << 20) as f64;
/// One block of so many changes in one round: 1 %.
const CHANGED: usize = 100;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The daemon's program.
    pub program: PathBuf,
    /// Bytes of the large guest.
    pub large: u64,
    /// Rounds of changes, passes and full reports.
    pub rounds: usize,
    /// Idle daemons, with a guest each.
    pub daemons: usize,
    /// Bytes of each of these guests.
    pub small: u64,
    /// How long the idle daemons are watched.
    pub idle: Duration,
    /// Whether times have bars: they are for the sizes of the full run, on a quiet machine.
    pub timed: bool,
}

impl Plan {
    /// The sizes that the bars are for, or small ones for a quick look.
    #[must_use]
    pub fn new(program: PathBuf, quick: bool) -> Self {
        Plan {
            program,
            large: if quick { 1 << 34 } else { 1 << 40 },
            // A small guest is through in a millisecond: a single stall of a busy machine must
            // not be the median.
            rounds: if quick { 21 } else { 10 },
            daemons: if quick { 4 } else { 16 },
            small: if quick { 1 << 32 } else { 1 << 36 },
            idle: Duration::from_secs(if quick { 5 } else { 20 }),
            timed: !quick,
        }
    }
}

/// Measures.
///
/// # Errors
/// If the machine has too little memory, its settings make a sparse guest
/// impossible, or a daemon does not behave.
pub fn measure(plan: &Plan) -> anyhow::Result<Scenario> {
    let mut scenario = Scenario::new("policy-scale");
    scenario.arg("large_bytes", plan.large);
    scenario.arg("rounds", plan.rounds as u64);
    scenario.arg("daemons", plan.daemons as u64);
    scenario.arg("small_bytes", plan.small);
    scenario.arg("idle_seconds", plan.idle.as_secs());
    let _held = settings::daemon_decides()?;
    large(plan, &mut scenario)?;
    many(plan, &mut scenario)?;
    Ok(scenario)
}

/// The slowest of some rounds.
fn slowest(rounds: &[Duration]) -> f64 {
    rounds.iter().max().map_or(f64::NAN, Duration::as_secs_f64)
}

fn median(rounds: &[Duration]) -> f64 {
    let mut sorted = rounds.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).map_or(f64::NAN, Duration::as_secs_f64)
}

/// A guest that reports changes and, again and again, everything. The daemon is
/// paused: the decisions are measured, not what they lead to.
fn large(plan: &Plan, scenario: &mut Scenario) -> anyhow::Result<()> {
    let blocks = plan.large >> BLOCK_SHIFT;
    ensure_memory(blocks / 2 * PAGE_SIZE * 2 + (1 << 30))?;
    let memory = Arc::new(sparse_guest(plan.large)?);
    let census = sparse_census(blocks);
    let scratch = Scratch::new()?;
    // A share that this never uses up: how fast it can is the question.
    let options = Options::new(&plan.program, "gemini").arg("--cpu-share", "100");
    let mut daemon = Daemon::start(&options, scratch.path())?;
    scenario.version("daemon", daemon.status()?.version);
    let answer = daemon.control(&json!({"cmd": "pause"}))?;
    ensure!(answer["paused"] == json!(true), "the daemon does not pause: {answer}");
    let mut connected = Connected::new(&daemon, &memory)?;
    connected.session.set_memory(&memory)?;
    connected.driver.start(&mut connected.session)?;
    connected.resync(&mut daemon, &census)?;

    let changing: Vec<&Record> = census
        .iter()
        .filter(|record| record.first >= AREA_BLOCKS && record.state == guest_state::BASE)
        .step_by(CHANGED / 2)
        .collect();
    let (mut applied, mut passes, mut full) = (Vec::new(), Vec::new(), Vec::new());
    let mut wrong = 0;
    for _ in 0..plan.rounds {
        // Each changed block becomes one that the policy wants.
        let huge: Vec<Record> =
            changing.iter().map(|r| Record { state: guest_state::HUGE, used: 0, ..**r }).collect();
        applied.push(report(&mut connected, &huge)?);
        let status = daemon.status()?;
        wrong += status.guest_only.abs_diff(huge.len() as u64);
        // And every block of the guest is asked about, the changed ones among them.
        set_policy(&daemon, "none")?;
        passes.push(set_policy(&daemon, "gemini")?);
        let start = Instant::now();
        connected.driver.report_full(&census, 3 * PATIENCE)?;
        wait_for_reports(&mut connected)?;
        full.push(start.elapsed());
        wrong += daemon.status()?.guest_only;
    }
    let memory_used = ProcessFigures::of(daemon.pid())?;
    let reports = blocks as f64 / median(&full);
    let timed = |bar| if plan.timed { bar } else { Bar::None };
    #[rustfmt::skip]
    let figures = [
        ("large_blocks", blocks as f64, Bar::None),
        ("changed_blocks", changing.len() as f64, Bar::AtLeast((blocks / 100 - 2) as f64)),
        ("changes_ms_median", 1e3 * median(&applied), Bar::None),
        ("changes_ms_worst", 1e3 * slowest(&applied), timed(Bar::Below(50.0))),
        ("policy_pass_ms_median", 1e3 * median(&passes), Bar::None),
        ("policy_pass_ms_worst", 1e3 * slowest(&passes), timed(Bar::Below(50.0))),
        ("reports_per_second", reports, timed(Bar::AtLeast(5e6))),
        ("reports_per_second_worst", blocks as f64 / slowest(&full), Bar::None),
        ("wrong_blocks", wrong as f64, Bar::AtMost(0.0)),
        ("rss_anon_mib", memory_used.rss_anon as f64 / MIB, Bar::None),
        ("page_tables_mib", memory_used.page_tables as f64 / MIB, Bar::None),
        ("memory_mib", (memory_used.rss_anon + memory_used.page_tables) as f64 / MIB, Bar::Below(64.0)),
    ];
    for (name, value, bar) in figures {
        scenario.figure(name, value, bar);
    }
    drop(connected);
    let exit = daemon.terminate()?;
    ensure!(exit.success(), "daemon ended with {exit} on SIGTERM");
    Ok(())
}

/// Reports changes; how long it took until the daemon had taken all of them.
fn report(connected: &mut Connected, records: &[Record]) -> anyhow::Result<Duration> {
    let start = Instant::now();
    connected.driver.report(records, PATIENCE)?;
    wait_for_reports(connected)?;
    Ok(start.elapsed())
}

/// A report's buffer comes back once the policy was asked about its blocks.
fn wait_for_reports(connected: &mut Connected) -> anyhow::Result<()> {
    connected
        .driver
        .wait_until("answer to the reports", PATIENCE, |driver| driver.reports_pending() == 0)
}

/// Sets a policy; how long the daemon took to answer. It answers when the policy
/// was asked about every block.
fn set_policy(daemon: &Daemon, policy: &str) -> anyhow::Result<Duration> {
    let start = Instant::now();
    let answer = daemon.control(&json!({"cmd": "set", "policy": policy}))?;
    let took = start.elapsed();
    ensure!(answer == json!({"policy": policy}), "unexpected answer {answer}");
    Ok(took)
}

/// Many daemons with nothing to do.
fn many(plan: &Plan, scenario: &mut Scenario) -> anyhow::Result<()> {
    let blocks = plan.small >> BLOCK_SHIFT;
    ensure_memory(plan.daemons as u64 * (blocks / 2 * PAGE_SIZE * 2 + (1 << 26)) + (1 << 29))?;
    let census = sparse_census(blocks);
    let scratch = Scratch::new()?;
    let mut guests: Vec<(Daemon, Connected)> = Vec::new();
    for number in 0..plan.daemons {
        let memory = Arc::new(sparse_guest(plan.small)?);
        let options = Options::new(&plan.program, "gemini");
        let mut daemon = Daemon::start(&options, &scratch.path().join(number.to_string()))?;
        let mut connected = Connected::new(&daemon, &memory)?;
        connected.session.set_memory(&memory)?;
        connected.driver.start(&mut connected.session)?;
        connected.resync(&mut daemon, &census)?;
        guests.push((daemon, connected));
    }
    // What the first looks started may end first.
    std::thread::sleep(Duration::from_secs(2));
    let ran = |guests: &[(Daemon, Connected)]| -> anyhow::Result<f64> {
        guests.iter().map(|(daemon, _)| outside::fine_cpu_seconds(daemon.pid())).sum()
    };
    let before = ran(&guests)?;
    let start = Instant::now();
    std::thread::sleep(plan.idle);
    let idle = 100.0 * (ran(&guests)? - before) / start.elapsed().as_secs_f64();
    let mut most = 0;
    for (daemon, _) in &mut guests {
        daemon.ensure_alive()?;
        most = most.max(outside::private_memory(daemon.pid())?);
    }
    scenario.figure("idle_daemons", plan.daemons as f64, Bar::None);
    scenario.figure("idle_cpu_percent", idle, Bar::Below(1.0));
    scenario.figure("private_mib_most", most as f64 / MIB, Bar::Below(8.0));
    for (mut daemon, connected) in guests {
        drop(connected);
        let exit = daemon.terminate()?;
        ensure!(exit.success(), "daemon ended with {exit} on SIGTERM");
    }
    Ok(())
}

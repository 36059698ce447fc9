//! The TLB simulator on a real guest: the size of an entry is decided by both
//! layers, and a trace replays as it was recorded.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context};
use gemini_e2e::accel::AccelChoice;
use gemini_e2e::lab::{Bench, Lab};
use gemini_e2e::tlb::{TlbSimulator, TlbView};
use gemini_e2e::MIB;
use gemini_guest::probe::{Instructions, Probe, Work};
use gemini_guest::protocol::PageSize;
use serde_json::Value;

/// How long the daemon may take to collapse what the guest has.
const SETTLE: Duration = Duration::from_secs(60);

const READS: u64 = 100_000;

/// How many times as long a second of the guest's clock takes for a while.
const SLOWDOWN: u32 = 64;

/// Loops of 2000 instructions that are counted.
const LOOPS: u32 = 10_000;

/// Has the guest read at random, and tells what was counted meanwhile.
fn read(lab: &Lab, simulator: &TlbSimulator, seed: u64) -> anyhow::Result<TlbView> {
    let start = simulator.look()?;
    lab.vm.guest.read("a", READS, seed)?;
    Ok(simulator.look()?.since(&start))
}

/// Counts loops of known length, which come on top of what else the guest does,
/// and nothing while nothing is simulated.
fn instructions_are_counted(lab: &Lab, simulator: &TlbSimulator) -> anyhow::Result<()> {
    let run = |units| -> anyhow::Result<u64> {
        let start = simulator.look()?;
        let probe = Probe::Count { work: Work::Loop, units };
        let counted: Option<Instructions> = lab.vm.guest.probe(&probe)?;
        counted.context("the probe was killed")?;
        let seen = simulator.look()?.since(&start).total;
        ensure!(seen.cycles >= seen.instructions, "{seen:?}");
        Ok(seen.instructions)
    };
    let loops = 2000 * u64::from(LOOPS);
    let counted = run(LOOPS)?;
    ensure!((loops..2 * loops).contains(&counted), "{counted} instructions, {loops} in loops");

    simulator.end()?;
    let off = run(1)?;
    ensure!(off == 0, "{off} instructions while nothing is simulated");
    simulator.begin()
}

/// A second of the guest takes as long as it is told to, and then as long as ever: what
/// was lost is not made up for.
fn the_clock_is_slowed(lab: &Lab, simulator: &TlbSimulator) -> anyhow::Result<()> {
    let passes = |slowdown: u32| -> anyhow::Result<(f64, f64)> {
        let uptime = || -> anyhow::Result<f64> {
            let text = lab.vm.guest.read_file("/proc/uptime")?;
            Ok(text.split(' ').next().context("an empty file")?.parse()?)
        };
        simulator.slow_clock(slowdown)?;
        let (began, before) = (Instant::now(), uptime()?);
        // Nothing is waited for: how much of this time the guest sees is the question.
        std::thread::sleep(Duration::from_secs(4));
        Ok((uptime()? - before, began.elapsed().as_secs_f64()))
    };
    let (guest, host) = passes(SLOWDOWN)?;
    let expected = host / f64::from(SLOWDOWN);
    // The guest tells hundredths.
    ensure!((guest - expected).abs() < expected / 2.0, "{guest} s of the guest in {host} s");
    let (guest, host) = passes(1)?;
    ensure!((guest - host).abs() < host / 4.0, "{guest} s of the guest in {host} s");
    Ok(())
}

#[test]
fn alignment_saves_misses_and_a_trace_replays_as_recorded() -> anyhow::Result<()> {
    let bench = Bench::new(AccelChoice::Tcg)?;
    let mut simulator = None;
    let mut lab = Lab::start(&bench, "tlb", "none", |config| {
        // With 512 MiB Linux does without huge pages.
        config.memory = 768 * MIB;
        simulator = Some(TlbSimulator::attach(config, "broadwell", false));
    })?;
    let simulator = simulator.context("no guest was configured")??;
    lab.vm.guest.hints_only()?;
    lab.vm.guest.fill("a", 128 * MIB, 1, PageSize::Huge)?;
    simulator.begin()?;

    // Huge pages of the guest on base pages of the host: 32,768 entries would be
    // needed, of which the second level has 1,536.
    let before = read(&lab, &simulator, 1)?;
    ensure!(before.total.tlb_misses > READS * 9 / 10, "{before:?}");
    ensure!(before.total.misses_guest_only > before.total.tlb_misses * 9 / 10, "{before:?}");

    lab.daemon.control().set_policy("always")?;
    lab.wait_settled(SETTLE)?;
    // Huge pages on huge pages: 64 entries.
    read(&lab, &simulator, 2)?;
    let after = read(&lab, &simulator, 3)?;
    ensure!(after.total.tlb_misses < before.total.tlb_misses / 10, "{after:?}, {before:?}");
    let walks = before.total.tlb_misses + after.total.tlb_misses;
    ensure!(before.disagreements + after.disagreements <= walks / 1000, "{before:?}, {after:?}");

    instructions_are_counted(&lab, &simulator)?;
    the_clock_is_slowed(&lab, &simulator)?;

    let traces = lab.place.directory().join("trace");
    simulator.record(&traces, 64 * MIB)?;
    lab.vm.guest.read("a", READS, 4)?;
    // Wakes every processor, so that each ends its trace.
    lab.vm.guest.shell("for cpu in 0 1; do taskset $((1 << cpu)) true; done")?;
    simulator.stop()?;
    let traces = [0, 1].map(|number| PathBuf::from(format!("{}.{number}", traces.display())));
    let accesses = |profile: &[&str]| -> anyhow::Result<u64> {
        let program = std::env::var_os("GEMINI_TLB_REPLAY").context("no replay was built")?;
        let output = Command::new(program).args(profile).args(&traces).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let counted: Value = serde_json::from_slice(&output.stdout)?;
        counted["accesses"].as_u64().context("a replay counts accesses")
    };
    let recorded = accesses(&[])?;
    ensure!(recorded > READS, "{recorded} accesses in the traces");
    ensure!(accesses(&["--profile", "zen4"])? == recorded);
    ensure!(accesses(&["--profile", "zen4+coalesce4"])? == recorded);
    lab.vm.guest.verify("a")?;
    lab.vm.expect_alive()?;
    lab.daemon.stop()
}

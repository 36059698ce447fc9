//! A program of the host takes memory until there is no more, next to a guest
//! that has some to give back.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::Context;
use gemini_guest::protocol::{PageSize, Program};
use gemini_harness::figures::{Bar, Scenario};

use crate::cgroup::MemoryCgroup;
use crate::daemon::Daemon;
use crate::lab::{Bench, Lab};
use crate::process::Guarded;
use crate::taker::Taker;
use crate::{BLOCK, MIB};

/// Room below the limit when the program begins.
const HEADROOM: u64 = 192 * MIB;
/// What it takes at once, and how often.
const PIECE: u64 = 8 * MIB;
const PAUSE: Duration = Duration::from_millis(125);
/// Size of a file of which somebody needs all again and again.
const FILE: u64 = 64 * MIB;
/// It takes so much of what the guest has to spare, in percent.
const SHARE_PERCENT: u64 = 80;
/// How long both layers may take to come to rest.
const SETTLE: Duration = Duration::from_secs(180);
/// Longest time until the program has what it wants.
const PATIENCE: Duration = Duration::from_secs(240);

/// What the guest has of the host's memory, in blocks.
#[derive(Clone, Copy, Debug, Default)]
struct Sight {
    /// Free in the guest, huge in the host.
    free_huge: u64,
    /// Free in the guest, base pages in the host.
    free_base: u64,
    /// Held by the driver.
    held: u64,
    /// Huge at both layers.
    aligned: u64,
}

impl Sight {
    fn take(daemon: &Daemon) -> anyhow::Result<Self> {
        let mut sight = Sight::default();
        for run in daemon.map()?.runs {
            match (run.guest.as_str(), run.host.as_str()) {
                (_, "absent") => {}
                ("free", "huge") => sight.free_huge += run.count,
                ("free", _) => sight.free_base += run.count,
                ("booked", _) => sight.held += run.count,
                ("huge", "huge") => sight.aligned += run.count,
                _ => {}
            }
        }
        Ok(sight)
    }

    /// Blocks that can be given back.
    fn spare(&self) -> u64 {
        self.free_huge + self.free_base + self.held
    }
}

/// Has a program take what a guest can spare, in a memory cgroup with a limit, in
/// which QEMU and the daemon are too.
///
/// # Errors
/// If guest, QEMU or daemon fail in a way that is no figure, or this machine has
/// no memory cgroups.
pub fn measure(bench: &Bench, seed: u64, quick: bool) -> anyhow::Result<Scenario> {
    let (memory, bytes) = if quick { (1024 * MIB, 128 * MIB) } else { (2048 * MIB, 384 * MIB) };
    let mut scenario = Scenario::new("host-pressure");
    scenario.arg("guest_memory", memory);
    scenario.arg("program_bytes", bytes);
    scenario.arg("piece_bytes", PIECE);
    scenario.arg("pause_seconds", PAUSE.as_secs_f64());
    scenario.arg("headroom_bytes", HEADROOM);

    let group = MemoryCgroup::new()?;
    group.enter()?;
    let started = Lab::start(bench, "bench-host-pressure", "gemini", |config| {
        config.memory = memory;
        config.guest_thp = "madvise".into();
    })
    .and_then(|lab| Ok((lab, Taker::start()?)));
    group.leave()?;
    let (mut lab, mut taker) = started?;
    let log = lab.vm.guest.log_position()?;

    // Of each kind: memory in use, aligned; freed by a program that was aligned;
    // freed by one that had base pages; and memory that comes and goes.
    let program = |seed| Program { bytes, seed, blocks_per_second: 0.0 };
    lab.vm.guest.start_program("stays", program(seed))?;
    lab.vm.guest.start_program("ends", program(seed + 1))?;
    lab.vm.guest.fill("base", bytes, seed + 2, PageSize::Base)?;
    lab.wait_settled(SETTLE)?;
    lab.vm.guest.free("base")?;
    lab.vm.guest.end("ends")?;
    lab.wait_settled(SETTLE)?;
    let stays: BTreeSet<u64> =
        lab.vm.guest.program_blocks("stays")?.into_iter().flatten().collect();
    let aligned = aligned_of(&lab, &stays)?;
    let released = lab.daemon.status()?.released;

    let cached = read_all(&lab, &group)?;
    let usage = group.usage()?;
    group.limit(usage + HEADROOM)?;
    let start_sight = Sight::take(&lab.daemon)?;
    let goal = HEADROOM + start_sight.spare() * BLOCK * SHARE_PERCENT / 100;
    eprintln!("{start_sight:?}; the program is to take {} MiB", goal / MIB);
    lab.vm.guest.start_churn("churn", 32 * MIB, seed)?;
    let stalled = stalled_seconds()?;
    let run = Run::drive(&lab, &mut taker, goal, &stays)?;
    let stalled = stalled_seconds()? - stalled;

    lab.vm.expect_alive()?;
    let churned = lab.vm.guest.stop_churn("churn")?;
    lab.vm.guest.verify_process("stays")?;
    let end_sight = Sight::take(&lab.daemon)?;
    let lost = aligned.saturating_sub(aligned_of(&lab, &stays)?).max(run.aligned_lost);
    let complaints = lab.vm.guest.tell_complaints(log)?;
    drop(cached);

    let mut figure = |name: &str, value: f64, bar| scenario.figure(name, value, bar);
    let blocks = |bytes: u64| bytes as f64 / BLOCK as f64;
    figure("spare_at_start", start_sight.spare() as f64, Bar::AtLeast(64.0));
    figure("free_huge_at_start", start_sight.free_huge as f64, Bar::None);
    figure("free_base_at_start", start_sight.free_base as f64, Bar::None);
    figure("held_at_start", start_sight.held as f64, Bar::None);
    figure("spare_at_end", end_sight.spare() as f64, Bar::None);
    figure("goal_blocks", blocks(goal), Bar::None);
    figure("taken_share", taker.taken() as f64 / goal as f64, Bar::AtLeast(1.0));
    figure("seconds", run.seconds, Bar::None);
    let gained = lab.daemon.status()?.released - released;
    figure("released", gained as f64, Bar::AtLeast(blocks(goal - HEADROOM) * 0.5));
    figure("held_gone_while_free_huge_left", run.early as f64, Bar::AtMost(0.0));
    figure("psi_some_seconds", stalled, Bar::None);
    figure("oom_kills", group.oom_kills()? as f64, Bar::AtMost(0.0));
    figure("aligned_of_program", aligned as f64, Bar::AtLeast(blocks(bytes) * 0.9));
    figure("aligned_lost", lost as f64, Bar::AtMost(0.0));
    figure("churn_rounds", churned.rounds as f64, Bar::AtLeast(1.0));
    figure("guest_complaints", complaints as f64, Bar::AtMost(0.0));
    Ok(scenario)
}

/// What was seen while the program took memory.
struct Run {
    seconds: f64,
    /// Most aligned blocks in use that had lost their huge page.
    aligned_lost: u64,
    /// Looks at which the driver had released ready blocks although free ones
    /// were left.
    early: u64,
}

impl Run {
    fn drive(
        lab: &Lab,
        taker: &mut Taker,
        goal: u64,
        stays: &BTreeSet<u64>,
    ) -> anyhow::Result<Self> {
        let start = Instant::now();
        let aligned = aligned_of(lab, stays)?;
        let mut run = Run { seconds: 0.0, aligned_lost: 0, early: 0 };
        let mut ready = lab.vm.guest.driver_number("ready")?;
        let mut taken = true;
        while taken && taker.taken() < goal && start.elapsed() < PATIENCE {
            taken = taker.take(PIECE.min(goal - taker.taken())).is_ok();
            std::thread::sleep(PAUSE);
            run.aligned_lost =
                run.aligned_lost.max(aligned.saturating_sub(aligned_of(lab, stays)?));
            let sight = Sight::take(&lab.daemon)?;
            let now = lab.vm.guest.driver_number("ready")?;
            // What is on its way to the host is not ready either: a batch.
            run.early += u64::from(now + 32 < ready && sight.free_huge > 32);
            ready = now;
            eprintln!(
                "  {:6.1} s: {} MiB taken, {sight:?}, {now} ready, stalled {:.3} s, wanted {}",
                start.elapsed().as_secs_f64(),
                taker.taken() / MIB,
                stalled_seconds()?,
                lab.vm.guest.driver_number("owed")?,
            );
        }
        run.seconds = start.elapsed().as_secs_f64();
        Ok(run)
    }
}

/// How many of these blocks are huge in the host.
fn aligned_of(lab: &Lab, blocks: &BTreeSet<u64>) -> anyhow::Result<u64> {
    Ok(lab.memory.huge_blocks()?.intersection(blocks).count() as u64)
}

/// Somebody in the group who reads a file over and over, which takes cache: he
/// waits for memory when there is none, which is what PSI counts.
fn read_all(lab: &Lab, group: &MemoryCgroup) -> anyhow::Result<Guarded> {
    let file = crate::assets::cache_dir()?.join("host-pressure.file");
    if std::fs::metadata(&file).map_or(true, |data| data.len() != FILE) {
        let size = usize::try_from(FILE).context("64 MiB")?;
        std::fs::write(&file, vec![7; size])
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    let mut command = std::process::Command::new("sh");
    command.args(["-c", "while cat \"$0\" >/dev/null; do sleep 0.2; done"]).arg(&file);
    group.enter()?;
    let started = Guarded::start("a reader", command, &lab.place.directory().join("reader.log"));
    group.leave()?;
    let reader = started?;
    std::thread::sleep(Duration::from_secs(2));
    Ok(reader)
}

/// Seconds for which some task of this machine has waited for memory.
fn stalled_seconds() -> anyhow::Result<f64> {
    let text = std::fs::read_to_string("/proc/pressure/memory")
        .context("this kernel counts no stalls; boot it with psi=1")?;
    let total = text
        .lines()
        .find(|line| line.starts_with("some "))
        .and_then(|line| line.split_whitespace().find_map(|word| word.strip_prefix("total=")))
        .and_then(|microseconds| microseconds.parse::<f64>().ok());
    Ok(total.context("/proc/pressure/memory has another form")? / 1e6)
}

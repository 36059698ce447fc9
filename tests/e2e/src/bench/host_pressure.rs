//! A program of the host takes memory until there is no more, next to a guest
//! that has some to give back.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::Context;
use gemini_guest::protocol::{Break, PageSize, Program};
use gemini_harness::figures::{Bar, Scenario};

use super::order::{Look, Order};
use crate::cgroup::MemoryCgroup;
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
/// Without it, what is used sparsely would become whole again in other places.
const ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
/// It takes so much of what the guest has to spare, in percent.
const SHARE_PERCENT: u64 = 80;
/// Longer than it takes.
const HOLD_MS: u64 = 600_000;
/// How long both layers may take to come to rest.
const SETTLE: Duration = Duration::from_secs(180);
/// Longest time until the program has what it wants.
const PATIENCE: Duration = Duration::from_secs(480);
/// Memory in use is checked after so many looks.
const VERIFY_EVERY: u32 = 4;

/// Has a program take what a guest can spare, in a memory cgroup with a limit, in
/// which QEMU and the daemon are too.
///
/// # Errors
/// If guest, QEMU or daemon fail in a way that is no figure, or this machine has
/// no memory cgroups.
pub fn measure(bench: &Bench, seed: u64, quick: bool) -> anyhow::Result<Scenario> {
    let (memory, bytes) = if quick { (1024 * MIB, 128 * MIB) } else { (2048 * MIB, 320 * MIB) };
    let sparse_bytes = bytes / 2;
    let mut scenario = Scenario::new("host-pressure");
    scenario.arg("guest_memory", memory);
    scenario.arg("program_bytes", bytes);
    scenario.arg("sparse_bytes", sparse_bytes);
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

    // Of each kind: memory in use, aligned; an eighth used, and huge in the host alone;
    // freed by a program that was aligned, and held again; the same, not held;
    // freed by one that had base pages; and memory that comes and goes.
    let program = |seed| Program { bytes, seed, blocks_per_second: 0.0 };
    lab.vm.guest.start_program("stays", program(seed))?;
    lab.vm.guest.fill("sparse", sparse_bytes, seed + 3, PageSize::Huge)?;
    lab.vm.guest.start_program("held", program(seed + 1))?;
    lab.vm.guest.start_program("ends", program(seed + 4))?;
    lab.vm.guest.fill("base", bytes, seed + 2, PageSize::Base)?;
    lab.wait_settled(SETTLE)?;
    let blocks = |blocks: Vec<Option<u64>>| blocks.into_iter().flatten().collect::<BTreeSet<u64>>();
    let stays = blocks(lab.vm.guest.program_blocks("stays")?);
    let sparse = blocks(lab.vm.guest.blocks_of("sparse")?);
    // They are to stay as they are: neither emptied nor made whole again.
    lab.vm.guest.set_driver("evacuation_rate", 0)?;
    lab.vm.guest.write_file(ENABLED, "never")?;
    // What is held goes because the host wants it, not because its time is over.
    lab.vm.guest.set_driver("booking_timeout_ms", HOLD_MS)?;
    lab.vm.guest.break_pages("sparse", Break::Split, 1)?;
    lab.vm.guest.break_pages("sparse", Break::DropScattered, 1)?;
    lab.vm.guest.end("held")?;
    lab.wait_settled(SETTLE)?;
    for setting in ["booking", "bucket"] {
        lab.vm.guest.set_driver(setting, 0)?;
    }
    lab.vm.guest.free("base")?;
    lab.vm.guest.end("ends")?;
    lab.wait_settled(SETTLE)?;
    let before = lab.daemon.status()?;

    let cached = read_all(&lab, &group)?;
    let usage = group.usage()?;
    group.limit(usage + HEADROOM)?;
    let look = Look::take(&lab)?;
    let mut order = Order::begin(&look, &sparse, &stays);
    let free_base = look.free_base();
    let kinds = [
        ("free_huge", order.last().free.len() as u64),
        ("free_base", free_base),
        ("sparse", order.last().sparse.len() as u64),
        ("ready", order.last().ready.len() as u64),
        ("aligned", order.last().aligned.len() as u64),
    ];
    // Seven eighths of each sparse one.
    let spare = kinds[0].1 + kinds[1].1 + kinds[2].1 * 7 / 8 + kinds[3].1;
    let goal = HEADROOM + spare * BLOCK * SHARE_PERCENT / 100;
    eprintln!("{kinds:?}; the program is to take {} MiB", goal / MIB);
    // It uses what is free in blocks that are in use before whole ones.
    lab.vm.guest.start_churn("churn", bytes / 16, seed)?;
    let stalled = stalled_seconds()?;
    let run = drive(&lab, &mut taker, goal, &mut order)?;
    let stalled = stalled_seconds()? - stalled;

    lab.vm.expect_alive()?;
    let churned = lab.vm.guest.stop_churn("churn")?;
    lab.vm.guest.verify_process("stays")?;
    lab.vm.guest.verify("sparse")?;
    let after = lab.daemon.status()?;
    let left = &order.last().sparse;
    for line in lab.vm.guest.shell("cat /sys/kernel/debug/virtio_gemini/*/blocks")?.lines() {
        let mut words = line.split_whitespace().filter_map(|word| word.parse::<u64>().ok());
        if let (Some(first), Some(count)) = (words.next(), words.next()) {
            if left.range(first..first + count).next().is_some() {
                eprintln!("  sparse, and left: {line}");
            }
        }
    }
    let complaints = lab.vm.guest.tell_complaints(log)?;
    drop(cached);

    let mut figure = |name: &str, value: f64, bar| scenario.figure(name, value, bar);
    let blocks = |bytes: u64| bytes as f64 / BLOCK as f64;
    for (kind, count) in kinds {
        let bar = match kind {
            // What the host has in base pages depends on how busy it is.
            "free_base" => Bar::None,
            "aligned" => Bar::AtLeast(blocks(bytes) * 0.9),
            _ => Bar::AtLeast(1.0),
        };
        figure(&format!("{kind}_at_start"), count as f64, bar);
    }
    figure("goal_blocks", blocks(goal), Bar::None);
    figure("taken_share", taker.taken() as f64 / goal as f64, Bar::AtLeast(1.0));
    figure("seconds", run.seconds, Bar::None);
    figure("looks", f64::from(run.looks), Bar::AtLeast(10.0));
    let gone = order.gone();
    figure("never_to_be_had", gone.never as f64, Bar::None);
    figure("free_gone", gone.free as f64, Bar::AtLeast(1.0));
    figure("trimmed", gone.sparse as f64, Bar::AtLeast(1.0));
    figure("trimmed_while_free_left", gone.sparse_early as f64, Bar::AtMost(0.0));
    figure("ready_gone", gone.ready as f64, Bar::AtLeast(1.0));
    figure("ready_gone_while_free_left", gone.ready_early as f64, Bar::AtMost(0.0));
    // One with a page that cannot be moved at that moment is left alone for a while.
    let most = kinds[2].1 as f64 * 0.1;
    figure("sparse_left_when_ready_gone", gone.sparse_left as f64, Bar::AtMost(most));
    figure("aligned_lost", gone.aligned as f64, Bar::AtMost(0.0));
    figure("aligned_lost_while_others_left", gone.aligned_early as f64, Bar::AtMost(0.0));
    figure("released", (after.released - before.released) as f64, Bar::AtLeast(1.0));
    let trimmed = after.trimmed_pages - before.trimmed_pages;
    figure("trimmed_pages", trimmed as f64, Bar::AtLeast(1.0));
    figure("psi_some_seconds", stalled, Bar::None);
    figure("oom_kills", group.oom_kills()? as f64, Bar::AtMost(0.0));
    figure("verified_meanwhile", f64::from(run.verified), Bar::AtLeast(2.0));
    figure("churn_rounds", churned.rounds as f64, Bar::AtLeast(1.0));
    figure("guest_complaints", complaints as f64, Bar::AtMost(0.0));
    Ok(scenario)
}

/// What was done while the program took memory.
#[derive(Default)]
struct Run {
    seconds: f64,
    looks: u32,
    /// Times that all memory in use was as it had been written.
    verified: u32,
}

/// Has the program take its memory, and looks after each piece.
fn drive(lab: &Lab, taker: &mut Taker, goal: u64, order: &mut Order) -> anyhow::Result<Run> {
    let start = Instant::now();
    let mut run = Run::default();
    let mut taken = true;
    while taken && taker.taken() < goal && start.elapsed() < PATIENCE {
        taken = taker.take(PIECE.min(goal - taker.taken())).is_ok();
        std::thread::sleep(PAUSE);
        order.observe(&Look::take(lab)?);
        run.looks += 1;
        if run.looks % VERIFY_EVERY == 0 {
            lab.vm.guest.verify_process("stays")?;
            lab.vm.guest.verify("sparse")?;
            run.verified += 1;
        }
        let left = order.last();
        eprintln!(
            "  {:6.1} s: {} MiB taken; left: {} free, {} sparse, {} ready, {} aligned; wanted {}",
            start.elapsed().as_secs_f64(),
            taker.taken() / MIB,
            left.free.len(),
            left.sparse.len(),
            left.ready.len(),
            left.aligned.len(),
            lab.vm.guest.driver_number("owed")?,
        );
    }
    run.seconds = start.elapsed().as_secs_f64();
    Ok(run)
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

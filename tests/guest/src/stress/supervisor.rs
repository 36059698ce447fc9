//! Starts the workers, starts those again that were killed, ends them all, and
//! counts what is left in the kernel.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, Context};
use serde::{Deserialize, Serialize};

use super::tally::{Count, Tally};
use super::{disturb, driver, hotplug, say, KINDS, TALLIES};
use crate::protocol::BlockState;
use crate::{blocks, kernel};

/// The end of the line in the kernel's log from which on the driver is there
/// and everybody works.
pub const BEGINS: &str = "stress begins";

/// The same for when nobody works any more, and the driver is gone.
pub const ENDS: &str = "stress ends";

/// Swap; nothing else is on it.
const SWAP: &str = "/dev/vdb";

/// All [`super::Kind::Memory`] workers together want this share of the memory
/// that there is, in percent: more than there is, so that somebody always
/// reclaims.
const DEMAND: u64 = 110;

/// What the kernel tells to be in use, by the names of /proc/meminfo.
const ACCOUNTED: [&str; 11] = [
    "Active",
    "Inactive",
    "Unevictable",
    "Slab",
    "KernelStack",
    "PageTables",
    "SecPageTables",
    "VmallocUsed",
    "Percpu",
    "Hugetlb",
    "Bounce",
];

/// Two looks with no more than this many freed bytes between them: nothing
/// more comes.
const SETTLED: u64 = 1 << 20;

/// The longest wait for that.
const REST_PATIENCE: Duration = Duration::from_secs(300);

/// What one kind of worker did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Figures {
    /// Rounds that came to their end.
    pub rounds: u64,
    /// What was asked of the kernel and done.
    pub done: u64,
    /// What the kernel refused, as it may.
    pub refused: u64,
    /// Pages that did not hold what they must.
    pub wrong: u64,
    /// Workers that were killed for lack of memory, and started again.
    pub killed: u64,
    /// Workers that ended by themselves, which none may.
    pub failed: u64,
}

/// Where the guest's memory is when nobody works.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rest {
    /// Bytes of memory that is online.
    pub total: u64,
    /// Bytes that are free, also on the lists of a processor.
    pub free: u64,
    /// Bytes that are neither free nor told by the kernel to be in any use:
    /// what modules and the kernel itself have taken as whole pages.
    pub unaccounted: u64,
    /// Blocks that are one compound page of no user's.
    pub held_blocks: u64,
}

/// The supervisor's result.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// How long they worked with the driver.
    pub seconds: u64,
    /// What each kind of worker did.
    pub kinds: BTreeMap<String, Figures>,
    /// Before the driver was loaded, after a while of the same work without it.
    pub before: Rest,
    /// After the driver was removed.
    pub after: Rest,
    /// The driver's counters, over all the times that it was loaded.
    pub driver: BTreeMap<String, u64>,
}

/// Kinds of work that are none without the driver.
const NEED_DRIVER: [&str; 2] = ["driver", "reload"];

struct Slot {
    kind: usize,
    number: usize,
    child: Child,
}

/// Runs all kinds of work for `duration`; without the driver, what goes wrong is
/// not its doing.
///
/// # Errors
/// If the guest cannot be set up, or cannot be brought to rest again.
pub fn run(duration: Duration, seed: u64, with_driver: bool) -> anyhow::Result<Report> {
    fs::create_dir_all(TALLIES).context("cannot make a directory for tallies")?;
    protect();
    swap_on()?;
    // Everything that grows once and stays (slabs, per-CPU lists, the disk's
    // structures) shall have grown before the first look.
    driver::unload()?;
    let mut figures = vec![Figures::default(); KINDS.len()];
    let warm_up = (duration / 10).clamp(Duration::from_secs(10), Duration::from_secs(60));
    disturb::keep_tracing();
    work(warm_up, seed ^ 1, false, &mut vec![Figures::default(); KINDS.len()])?;
    fs::remove_dir_all(TALLIES)?;
    fs::create_dir_all(TALLIES)?;
    let before = look(None)?;

    if with_driver {
        driver::load()?;
    }
    say(6, BEGINS);
    work(duration, seed, with_driver, &mut figures)?;
    driver::keep_counters();
    driver::unload()?;
    say(6, ENDS);
    let after = look(Some(before.total))?;

    let (seconds, driver) = (duration.as_secs(), driver::kept_counters());
    let mut report = Report { seconds, before, after, driver, ..Report::default() };
    for (figures, (_, name, ..)) in figures.iter_mut().zip(KINDS) {
        if !with_driver && NEED_DRIVER.contains(&name) {
            continue;
        }
        let tally = Tally::open(&Path::new(TALLIES).join(name))?;
        figures.rounds = tally.get(Count::Rounds);
        figures.done = tally.get(Count::Done);
        figures.refused = tally.get(Count::Refused);
        figures.wrong = tally.get(Count::Wrong);
        report.kinds.insert(name.to_owned(), *figures);
    }
    Ok(report)
}

/// Neither this process nor the one that answers the host may be killed, and
/// both run before the workers, some of which take all that they can get.
fn protect() {
    // SAFETY: takes nothing.
    let parent = unsafe { libc::getppid() };
    for pid in [std::process::id(), parent.unsigned_abs()] {
        // Its own fault if it is gone.
        let _ = fs::write(format!("/proc/{pid}/oom_score_adj"), "-1000");
        let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        for thread in threads.filter_map(|entry| entry.file_name().to_str()?.parse().ok()) {
            // SAFETY: takes no memory.
            unsafe { libc::setpriority(libc::PRIO_PROCESS, thread, -20) };
        }
    }
}

fn swap_on() -> anyhow::Result<()> {
    if !Path::new(SWAP).exists() {
        bail!("this guest has no {SWAP} to swap to");
    }
    for command in [format!("mkswap {SWAP}"), format!("swapon {SWAP}")] {
        let output = Command::new("/bin/sh").args(["-c", &command]).output()?;
        // It may be on since an earlier run.
        let on = fs::read_to_string("/proc/swaps")?.contains(SWAP);
        if !output.status.success() && !on {
            bail!("`{command}`: {}", String::from_utf8_lossy(&output.stderr));
        }
    }
    Ok(())
}

/// Has the workers work for `duration`; with the driver, or without what needs
/// it.
fn work(
    duration: Duration,
    seed: u64,
    with_driver: bool,
    figures: &mut [Figures],
) -> anyhow::Result<()> {
    let memory = kernel::memory()?.get("MemTotal").copied().context("no MemTotal")?;
    let mut slots = Vec::new();
    for (kind, &(_, name, processes, _)) in KINDS.iter().enumerate() {
        if !with_driver && NEED_DRIVER.contains(&name) {
            continue;
        }
        for number in 0..processes {
            let child = start(kind, number, seed, memory)?;
            slots.push(Slot { kind, number, child });
        }
    }
    let end = Instant::now() + duration;
    let mut incarnation = 0;
    while Instant::now() < end {
        std::thread::sleep(Duration::from_millis(200));
        for slot in &mut slots {
            let Some(status) = slot.child.try_wait()? else { continue };
            kill_group(&slot.child);
            count_end(&mut figures[slot.kind], KINDS[slot.kind].1, status);
            incarnation += 1;
            let seed = seed.wrapping_add(incarnation << 40);
            slot.child = start(slot.kind, slot.number, seed, memory)?;
        }
    }
    for slot in &mut slots {
        kill_group(&slot.child);
        slot.child.wait()?;
    }
    disturb::quiet();
    hotplug::all_online()
}

/// Starts a worker at the head of a process group of its own.
fn start(kind: usize, number: usize, seed: u64, memory: u64) -> anyhow::Result<Child> {
    let (_, name, processes, _) = KINDS[kind];
    let bytes = memory / 100 * DEMAND / processes as u64;
    let seed = seed.wrapping_add((kind as u64) << 16);
    // Not the supervisor's: this one may be killed, and made to wait.
    let command = format!(
        "echo 0 > /proc/self/oom_score_adj; renice 0 -p $$ > /dev/null; \
         exec /bin/gemini-guest stress-worker {name} {number} {seed} {bytes}"
    );
    Command::new("/bin/sh")
        .args(["-c", &command])
        .stdin(Stdio::null())
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot start worker {name}"))
}

/// Kills a worker and what it has started.
fn kill_group(child: &Child) {
    if let Ok(group) = libc::pid_t::try_from(child.id()) {
        // SAFETY: takes no memory; the group is the child's own, and lasts as
        // long as one of its processes. It fails if none is left.
        unsafe { libc::kill(-group, libc::SIGKILL) };
    }
}

fn count_end(figures: &mut Figures, name: &str, status: ExitStatus) {
    if status.signal() == Some(libc::SIGKILL) {
        figures.killed += 1;
    } else {
        figures.failed += 1;
        say(3, &format!("worker {name} ended with {status}"));
    }
}

/// Has the kernel give back what it keeps for later, and looks where memory
/// is. Waits for `total` bytes of memory, which the host may just be plugging.
fn look(total: Option<u64>) -> anyhow::Result<Rest> {
    let start = Instant::now();
    let mut last = Rest::default();
    // Pages go back from lists of processors, after grace periods, and with the
    // last reference to the huge zero page: until nothing more comes.
    loop {
        for _ in 0..3 {
            fs::write("/proc/sys/vm/drop_caches", "3").context("caches cannot be dropped")?;
            std::thread::sleep(Duration::from_millis(500));
        }
        let rest = rest()?;
        let enough = total.is_none_or(|total| rest.total == total);
        let settled = rest.free <= last.free + SETTLED && rest.total == last.total;
        if (enough && settled) || start.elapsed() > REST_PATIENCE {
            tell_where_memory_is()?;
            return Ok(rest);
        }
        last = rest;
    }
}

fn rest() -> anyhow::Result<Rest> {
    let info = kernel::memory()?;
    // `MemFree` leaves them out.
    let on_lists = kernel::pages_on_cpu_lists()? * 4096;
    let value = |name: &str| info.get(name).copied().unwrap_or(0);
    let (total, free) = (value("MemTotal"), value("MemFree") + on_lists);
    let used: u64 = ACCOUNTED.iter().map(|name| value(name)).sum();
    let held_blocks = blocks::read()?
        .runs
        .iter()
        .filter(|run| run.state == BlockState::Held)
        .map(|run| run.count)
        .sum();
    Ok(Rest { total, free, unaccounted: total.saturating_sub(free + used), held_blocks })
}

/// Leaves a trace of what a difference may come from.
fn tell_where_memory_is() -> anyhow::Result<()> {
    for (name, bytes) in kernel::memory()? {
        say(6, &format!("at rest: {name} {bytes}"));
    }
    Ok(())
}

//! Stress: memory of known contents, and everything around it that takes,
//! moves, splits or drops pages, at the same time.
//!
//! Each kind of work is a process of its own, so that the kernel may kill it
//! for lack of memory; the supervisor starts it again. What it did is kept in a
//! `tally::Tally`. What nobody may see is told to the kernel's log, where
//! whoever looks for the kernel's own complaints finds it.

mod bpf;
mod checked;
mod disk;
mod disturb;
mod driver;
mod hotplug;
mod memory;
mod oom;
mod random;
mod supervisor;
mod tally;

use std::path::Path;
use std::time::Duration;

use anyhow::bail;

pub use supervisor::{Figures, Report, Rest, BEGINS, ENDS};

use random::Random;
use tally::{Count, Tally};

/// Where tallies are.
const TALLIES: &str = "/tmp/stress";

/// A kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Memory of known contents, worked on in every way.
    Memory,
    /// Page cache of a disk, of known contents.
    Disk,
    /// Small allocations: processes, pipes, files.
    Small,
    /// Compaction and dropped caches.
    Compaction,
    /// Settings of memory management.
    Settings,
    /// Tracing of the functions that the driver hooks.
    Tracing,
    /// BPF programs on the functions that the driver hooks.
    Bpf,
    /// Memory blocks set offline and online.
    Hotplug,
    /// A memory cgroup too small for its processes.
    CgroupOom,
    /// A process that wants all memory.
    Oom,
    /// Settings and commands of the driver.
    Driver,
    /// The driver unloaded and loaded.
    Reload,
    /// The promoter started and killed.
    Promoter,
}

/// Every kind, how many processes of it there are, and the longest rest
/// between two rounds in milliseconds.
const KINDS: [(Kind, &str, usize, u64); 13] = [
    (Kind::Memory, "memory", 4, 0),
    (Kind::Disk, "disk", 1, 20),
    (Kind::Small, "small", 1, 50),
    (Kind::Compaction, "compaction", 1, 4000),
    (Kind::Settings, "settings", 1, 1500),
    (Kind::Tracing, "tracing", 1, 3000),
    (Kind::Bpf, "bpf", 1, 8000),
    (Kind::Hotplug, "hotplug", 1, 2000),
    (Kind::CgroupOom, "cgroup_oom", 1, 8000),
    (Kind::Oom, "oom", 1, 20_000),
    (Kind::Driver, "driver", 1, 500),
    (Kind::Reload, "reload", 1, 15_000),
    (Kind::Promoter, "promoter", 1, 20_000),
];

/// One process that does work.
struct Worker {
    kind: &'static str,
    tally: Tally,
    random: Random,
}

impl Worker {
    /// Tells of contents that must not be. The kernel's log is watched, and
    /// has what the kernel did at that time beside it.
    fn report_wrong(&mut self, what: &str) {
        self.tally.add(Count::Wrong);
        say(3, what);
    }
}

/// Writes a line to the kernel's log with the severity `level`.
fn say(level: u8, text: &str) {
    for line in text.lines() {
        // A log that cannot be written is no reason to end: the tally has it too.
        let _ = std::fs::write("/dev/kmsg", format!("<{level}>gemini-guest: {line}"));
    }
}

/// What the command line asks for: `stress SECONDS SEED` is the supervisor, with
/// `control` behind it one that leaves the driver out,
/// `stress-worker KIND NUMBER SEED BYTES` one of its processes, and
/// `stress-eater BYTES` takes memory until it is killed for it.
///
/// # Errors
/// If the words are others, or the work cannot go on.
pub fn run(words: &[String]) -> anyhow::Result<()> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["stress", seconds, seed, ref control @ ..] if matches!(control, [] | ["control"]) => {
            let duration = Duration::from_secs(seconds.parse()?);
            let report = supervisor::run(duration, seed.parse()?, control.is_empty())?;
            println!("{}", serde_json::to_string(&report)?);
            Ok(())
        }
        ["stress-worker", kind, number, seed, bytes] => {
            let result = work(kind, number.parse()?, seed.parse()?, bytes.parse()?);
            if let Err(error) = &result {
                // Nobody reads what a worker prints.
                say(3, &format!("{kind}: {error:#}"));
            }
            result
        }
        ["stress-eater", bytes] => oom::eat(bytes.parse()?),
        _ => bail!(
            "stress SECONDS SEED [control], stress-worker KIND NUMBER SEED BYTES, or stress-eater BYTES"
        ),
    }
}

/// Works until it is killed.
fn work(kind: &str, number: u64, seed: u64, bytes: u64) -> anyhow::Result<()> {
    let Some(&(kind, name, _, rest)) = KINDS.iter().find(|(_, name, ..)| *name == kind) else {
        bail!("there is no kind of work named {kind}");
    };
    let mut worker = Worker {
        kind: name,
        tally: Tally::open(&Path::new(TALLIES).join(name))?,
        random: Random::new(seed.wrapping_add(number << 32)),
    };
    let mut memory = memory::Workload::new(bytes);
    let mut disk = None;
    loop {
        match kind {
            Kind::Memory => memory.round(&mut worker)?,
            Kind::Disk => match &mut disk {
                None => disk = Some(disk::Disk::open()?),
                Some(disk) => disk.round(&mut worker)?,
            },
            Kind::Small => disturb::small(&mut worker)?,
            Kind::Compaction => disturb::compaction(&mut worker),
            Kind::Settings => disturb::settings(&mut worker),
            Kind::Tracing => disturb::tracing(&mut worker),
            Kind::Bpf => bpf::round(&mut worker)?,
            Kind::Hotplug => hotplug::round(&mut worker)?,
            Kind::CgroupOom => oom::in_cgroup(&mut worker)?,
            Kind::Oom => oom::everywhere(&mut worker)?,
            Kind::Driver => driver::poke(&mut worker),
            Kind::Reload => driver::reload(&mut worker)?,
            Kind::Promoter => driver::promoter(&mut worker)?,
        }
        worker.tally.add(Count::Rounds);
        if rest > 0 {
            let rest = worker.random.between(0..rest);
            std::thread::sleep(Duration::from_millis(rest));
        }
    }
}

//! A hostile guest and a hostile monitor: malformed and adversarial input over
//! the rings and over the socket, all of it seeded.
//!
//! What an input is: one element of a ring, one record, or one message. A batch
//! with a thousand unsound records counts as a thousand; every kind is counted
//! and printed by its name.
//!
//! Whatever is sent, no byte may be lost that was not asked to be dropped by a
//! sound request: the model guest knows what every page must hold, and all of
//! memory is checked again and again.

mod messages;
mod raw;
mod records;
mod requests;
mod resets;
mod rings;
mod tables;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context};

use crate::daemon::{Daemon, Options};
use crate::driver::AREA_BLOCKS;
use crate::figures::{Bar, Scenario};
use crate::machine::{singles, Detached, Machine, PATIENCE};
use crate::memory::{GuestMemory, Placement, BLOCK_SIZE};
use crate::outside::ProcessFigures;
use crate::rng::Rng;
use crate::scratch::Scratch;
use crate::settings;
use crate::wire::{self, guest_state, host_state};

/// Blocks behind the driver's own that hold hostile buffers and rings. What is
/// in them may be overwritten by the device, because it was told to.
const SCRATCH_BLOCKS: u64 = 4;
const SCRATCH: u64 = AREA_BLOCKS * BLOCK_SIZE;
const SCRATCH_LEN: u64 = SCRATCH_BLOCKS * BLOCK_SIZE;
const BLOCKS: u64 = 96;

/// Rounds over all kinds of input. The first one warms the daemon up; from then
/// on it must not grow.
const ROUNDS: u64 = 10;

/// What to do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The daemon's program.
    pub program: PathBuf,
    /// Seed of everything.
    pub seed: u64,
    /// Inputs to send.
    pub inputs: u64,
    /// Time after which no more is sent; the scenario then misses its bar.
    pub limit: Duration,
}

impl Plan {
    /// A million inputs, or few for a test.
    #[must_use]
    pub fn new(program: PathBuf, seed: u64, quick: bool) -> Self {
        Plan {
            program,
            seed,
            inputs: if quick { 50_000 } else { 1_000_000 },
            limit: Duration::from_secs(if quick { 300 } else { 2400 }),
        }
    }
}

/// Inputs by kind.
#[derive(Debug, Default)]
struct Tally(BTreeMap<&'static str, u64>);

impl Tally {
    fn count(&mut self, kind: &'static str, inputs: u64) {
        *self.0.entry(kind).or_default() += inputs;
    }

    fn total(&self) -> u64 {
        self.0.values().sum()
    }
}

/// The place where it happens.
struct Arena {
    daemon: Daemon,
    machine: Option<Machine>,
    rng: Rng,
    tally: Tally,
    deadline: Instant,
    /// Pages that did not hold what they must.
    damaged: u64,
    /// Requests that were answered with success and must not have been.
    wrong_answers: u64,
}

impl Arena {
    fn machine(&mut self) -> anyhow::Result<&mut Machine> {
        self.machine.as_mut().context("no connection")
    }

    fn detach(&mut self) -> anyhow::Result<Detached> {
        Ok(self.machine.take().context("no connection")?.detach())
    }

    fn attach(&mut self, detached: Detached) -> anyhow::Result<()> {
        // What was unanswered is over with the old connection.
        let (machine, _) = detached.attach(&self.daemon.socket())?;
        self.machine = Some(machine);
        Ok(())
    }

    /// Whether there is time, and `done` inputs are fewer than `wanted`.
    fn go_on(&self, done: u64, wanted: u64) -> bool {
        done < wanted && Instant::now() < self.deadline
    }

    /// Checks all of memory.
    fn verify(&mut self, when: &str) -> anyhow::Result<()> {
        let damages = self.machine()?.guest.verify()?;
        for damage in damages.iter().take(5) {
            println!("DAMAGED {when}: {damage}");
        }
        self.damaged += damages.len() as u64;
        Ok(())
    }
}

/// What happens in one part of a round.
type Part = fn(&mut Arena, u64) -> anyhow::Result<()>;

/// The parts of a round and the share (in 1000) of the inputs that each sends;
/// a message costs a thousand times as much as a record.
const PARTS: [(&str, u64, Part); 6] = [
    ("records", 500, records::attack),
    ("requests", 180, requests::attack),
    ("rings", 290, rings::attack),
    ("resets", 20, resets::attack),
    ("messages", 7, messages::attack),
    ("tables", 4, tables::attack),
];

/// Attacks and measures.
///
/// # Errors
/// If the daemon ends, hangs, or does what it must not do to a sound driver.
pub fn measure(plan: &Plan) -> anyhow::Result<Scenario> {
    let mut scenario = Scenario::new("hostile");
    scenario.arg("seed", plan.seed);
    scenario.arg("inputs", plan.inputs);
    let _held = settings::daemon_decides()?;
    let scratch = Scratch::new()?;
    // The limits of the CPU budget would only make this slow.
    let options = Options::new(&plan.program, "gemini").arg("--cpu-share", "100");
    let mut daemon = Daemon::start(&options, scratch.path())?;
    scenario.version("daemon", daemon.status()?.version);
    let pid = daemon.pid();

    warm_up(&mut daemon)?;
    let empty = resting(&mut daemon)?;
    let start = Instant::now();
    let memory = GuestMemory::new(BLOCKS * BLOCK_SIZE, Placement::Aligned)?;
    let pinned = AREA_BLOCKS + SCRATCH_BLOCKS;
    let mut machine = Machine::connect_with_pinned(&daemon.socket(), memory, pinned)?;
    populate(&mut machine)?;
    machine.sync()?;
    let mut arena = Arena {
        daemon,
        machine: Some(machine),
        rng: Rng::new(plan.seed),
        tally: Tally::default(),
        deadline: start + plan.limit,
        damaged: 0,
        wrong_answers: 0,
    };

    let bystander = Bystander::new()?;
    let mut warm = ProcessFigures::default();
    let mut served = 0;
    let mut slowest = Duration::ZERO;
    for round in 0..ROUNDS {
        // In every other round there are huge pages for few blocks or none.
        let huge_max = (round % 2 == 1).then_some(round / 2 * BLOCKS / 16 * BLOCK_SIZE);
        arena.daemon.set_huge_max(huge_max)?;
        for (name, share, part) in PARTS {
            let wanted = plan.inputs * share / 1000 / ROUNDS + 1;
            part(&mut arena, wanted).with_context(|| format!("{name}, round {round}"))?;
            arena.daemon.ensure_alive().with_context(|| format!("after {name}, round {round}"))?;
            arena.verify(name)?;
        }
        arena.daemon.set_huge_max(None)?;
        let began = Instant::now();
        serve_good_guest(&mut arena).with_context(|| format!("good guest, round {round}"))?;
        slowest = slowest.max(began.elapsed());
        served += 1;
        let figures = ProcessFigures::of(pid)?;
        if round == 0 {
            warm = figures;
        }
        println!(
            "round {round}: {} inputs, {:.0} s, daemon has {} KiB of memory, {} descriptors, \
             {} threads",
            arena.tally.total(),
            start.elapsed().as_secs_f64(),
            figures.rss_anon >> 10,
            figures.descriptors,
            figures.threads
        );
    }
    let end = ProcessFigures::of(pid)?;
    arena.verify("at the end")?;
    arena.machine = None;
    let rest = resting(&mut arena.daemon)?;
    let log = std::fs::read(arena.daemon.log_path())?;
    let exit = arena.daemon.terminate()?;

    println!("inputs by kind:");
    for (kind, count) in &arena.tally.0 {
        println!("  {count:>9}  {kind}");
    }
    let growth = end.rss_anon.saturating_sub(warm.rss_anon) as f64 / f64::from(1 << 20);
    let more = |after: u64, before: u64| after as f64 - before as f64;
    #[rustfmt::skip]
    let figures = [
        ("inputs", arena.tally.total() as f64, Bar::AtLeast(plan.inputs as f64)),
        ("kinds", arena.tally.0.len() as f64, Bar::None),
        ("damaged_pages", arena.damaged as f64, Bar::AtMost(0.0)),
        ("wrong_answers", arena.wrong_answers as f64, Bar::AtMost(0.0)),
        ("bystander_damaged_bytes", bystander.damaged()? as f64, Bar::AtMost(0.0)),
        ("panics", count(&log, b"panicked at") as f64, Bar::AtMost(0.0)),
        ("good_guests_served", f64::from(served), Bar::AtLeast(ROUNDS as f64)),
        ("good_guest_seconds_max", slowest.as_secs_f64(), Bar::None),
        ("memory_growth_mib", growth, Bar::AtMost(4.0)),
        ("descriptors_left", more(rest.descriptors, empty.descriptors), Bar::AtMost(0.0)),
        ("threads_left", more(rest.threads, empty.threads), Bar::AtMost(0.0)),
        ("log_bytes", log.len() as f64, Bar::AtMost(1048576.0)),
        ("unclean_exits", if exit.success() { 0.0 } else { 1.0 }, Bar::AtMost(0.0)),
        ("seconds", start.elapsed().as_secs_f64(), Bar::None),
    ];
    for (name, value, bar) in figures {
        scenario.figure(name, value, bar);
    }
    Ok(scenario)
}

/// Memory of the machine that is none of the guest's and of no table's: in the
/// same process, and in a file of the same kind.
struct Bystander {
    memory: GuestMemory,
    expected: Vec<u8>,
}

impl Bystander {
    fn new() -> anyhow::Result<Self> {
        let memory = GuestMemory::new(4 * BLOCK_SIZE, Placement::Aligned)?;
        let mut expected = vec![0; usize::try_from(4 * BLOCK_SIZE)?];
        Rng::new(7).fill(&mut expected);
        memory.write(0, &expected);
        Ok(Bystander { memory, expected })
    }

    fn damaged(&self) -> anyhow::Result<usize> {
        let mut found = vec![0; self.expected.len()];
        self.memory.peek(0, &mut found)?;
        Ok(found.iter().zip(&self.expected).filter(|(found, expected)| found != expected).count())
    }
}

fn count(text: &[u8], word: &[u8]) -> usize {
    text.windows(word.len()).filter(|found| *found == word).count()
}

/// One good connection, so that what the daemon sets up only once is there.
fn warm_up(daemon: &mut Daemon) -> anyhow::Result<()> {
    let memory = GuestMemory::new(BLOCKS * BLOCK_SIZE, Placement::Aligned)?;
    Machine::boot(&daemon.socket(), memory)?;
    Ok(())
}

/// The daemon's figures once nobody is connected.
fn resting(daemon: &mut Daemon) -> anyhow::Result<ProcessFigures> {
    daemon.wait_status("without a monitor", PATIENCE, |status| !status.connected)?;
    // The last of a connection may end just behind the status.
    let deadline = Instant::now() + Duration::from_secs(2);
    let mut least = ProcessFigures::of(daemon.pid())?;
    while Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
        let figures = ProcessFigures::of(daemon.pid())?;
        least.descriptors = least.descriptors.min(figures.descriptors);
        least.threads = least.threads.min(figures.threads);
    }
    Ok(least)
}

/// Every block gets contents that can be lost: in use as huge and as base pages,
/// and free.
fn populate(machine: &mut Machine) -> anyhow::Result<()> {
    for block in AREA_BLOCKS + SCRATCH_BLOCKS..machine.guest.blocks() {
        machine.guest.alloc_huge(block)?;
        match block % 4 {
            0 => {}
            1 => machine.guest.split(block)?,
            _ => machine.guest.free_huge(block)?,
        }
    }
    Ok(())
}

/// After all that, a well-behaved driver is served: its full state is taken, the
/// host follows a guest huge page, a release and a renew drop what they say.
fn serve_good_guest(arena: &mut Arena) -> anyhow::Result<()> {
    let detached = arena.detach()?;
    arena.attach(detached)?;
    let machine = arena.machine()?;
    machine.sync()?;
    let free = machine.guest.in_state(guest_state::FREE);
    let [huge, released, renewed, ..] = free[..] else {
        anyhow::bail!("only {} free blocks", free.len());
    };
    machine.guest.alloc_huge(huge)?;
    for block in [released, renewed] {
        machine.guest.book(block)?;
    }
    machine.talk()?;
    machine.wait_host(&[huge], |state| state == host_state::HUGE, PATIENCE)?;
    for (kind, block) in [(wire::REQ_RELEASE, released), (wire::REQ_RENEW, renewed)] {
        let status = machine.drop_blocks(kind, &singles(&[block]))?;
        ensure!(status == wire::S_OK, "request {kind} answered with status {status}");
    }
    let damages = machine.guest.verify_blocks(&[huge, released, renewed])?;
    ensure!(damages.is_empty(), "wrong contents: {:?}", damages.first());
    let answer = machine.driver.request(wire::REQ_STATS, &[], PATIENCE)?;
    ensure!(
        answer.stats.is_some_and(|stats| stats.blocks == BLOCKS),
        "STATS answered {:?}",
        answer.stats
    );
    machine.guest.free_huge(huge)?;
    for block in [released, renewed] {
        machine.guest.unbook(block)?;
        machine.guest.write_block(block);
    }
    machine.talk()
}

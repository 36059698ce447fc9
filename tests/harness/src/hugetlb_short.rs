//! Guests on hugetlb memory while the host's pool of huge pages runs short, at
//! every possible moment.
//!
//! Two guests live on one pool: one whose pages are set aside, as QEMU does
//! unless told otherwise, and one for which nothing is set aside. Somebody
//! changes the size of the pool all the time, while they connect, prepare,
//! release, come back and hand over their memory anew. What the daemon says is
//! there must be there: a touch of it must not be SIGBUS, whatever the pool has
//! by then. The second guest touches nothing else.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context};

use crate::daemon::{Daemon, Options};
use crate::driver::AREA_BLOCKS;
use crate::figures::{Bar, Scenario};
use crate::machine::{each, singles, Machine, PATIENCE};
use crate::memory::{GuestMemory, Placement, BLOCK_SHIFT, BLOCK_SIZE, GIGANTIC_SIZE};
use crate::rng::Rng;
use crate::scratch::Scratch;
use crate::settings::{Held, Pool};
use crate::wire::{self, guest_state, host_state, Range, Record};

/// Blocks of each guest, those of the driver included.
const BLOCKS: u64 = 24;
/// Pages of the pool when it has enough for both guests.
const ENOUGH: u64 = 2 * BLOCKS + 16;
/// How often a step is repeated until the pool was changed in the middle of it.
const TRIES: u32 = 10;
/// Longest pause between two changes of the pool, in microseconds.
const PAUSE: u64 = 2_000;
/// What the daemon says where a touch of its own found no memory.
const OWN_SIGBUS: &str = "truncated the guest's memory file";
/// What it says of a short pool.
const SHORT: &str = "huge pages is short";

/// What to do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The daemon's program.
    pub program: PathBuf,
    /// How often two guests are started anew.
    pub rounds: u64,
    /// Steps of each round.
    pub steps: u64,
    /// Seed of everything random.
    pub seed: u64,
    /// Whether pages of 1 GiB are tried, too: to clear one takes seconds.
    pub gigantic: bool,
}

impl Plan {
    /// Some minutes, or some seconds for a quick look.
    #[must_use]
    pub fn new(program: PathBuf, quick: bool, seed: u64) -> Self {
        let (rounds, steps) = if quick { (5, 60) } else { (60, 200) };
        Plan { program, rounds, steps, seed, gigantic: !quick }
    }
}

/// What a guest does, and the pool is changed in the middle of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Connect,
    Prepare,
    Release,
    Reacquire,
    Reconnect,
    Table,
    Touch,
}

impl Step {
    const ALL: [(Step, &'static str); 7] = [
        (Step::Connect, "connect"),
        (Step::Prepare, "prepare"),
        (Step::Release, "release"),
        (Step::Reacquire, "reacquire"),
        (Step::Reconnect, "reconnect"),
        (Step::Table, "memory_table"),
        (Step::Touch, "touch"),
    ];

    fn name(self) -> &'static str {
        Step::ALL.iter().find(|(step, _)| *step == self).map_or("", |(_, name)| name)
    }

    fn any(rng: &mut Rng) -> Step {
        match rng.below(100) {
            0..=44 => Step::Prepare,
            45..=59 => Step::Release,
            60..=69 => Step::Reacquire,
            70..=72 => Step::Reconnect,
            73..=77 => Step::Table,
            _ => Step::Touch,
        }
    }
}

#[derive(Debug, Default)]
struct Totals {
    /// Changes of the pool in the middle of steps, and steps, by kind.
    changes: [u64; Step::ALL.len()],
    steps: [u64; Step::ALL.len()],
    /// Touches that would have been SIGBUS.
    sigbus: u64,
    own_sigbus: u64,
    damaged: u64,
    /// Blocks that were asked for, and those that the daemon said are there.
    prepared: u64,
    refused: u64,
    longest: Duration,
    /// The same where pages are set aside.
    refused_reserved: u64,
    /// Answers to what may not be done.
    drops_refused: u64,
    dropped: u64,
    messages: u64,
    daemons: u64,
    daemon_seconds: f64,
}

/// Somebody who changes the pool all the time.
struct Squeezer {
    stop: Arc<AtomicBool>,
    changes: Arc<AtomicU64>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

impl Squeezer {
    fn start(pool: Arc<Pool>, seed: u64) -> Self {
        let (stop, changes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (theirs, counter) = (Arc::clone(&stop), Arc::clone(&changes));
        let thread = std::thread::spawn(move || {
            let mut rng = Rng::new(seed);
            while !theirs.load(Ordering::Relaxed) {
                let pages = match rng.below(4) {
                    0 => 0,
                    1 => ENOUGH,
                    _ => rng.below(ENOUGH),
                };
                pool.resize(pages)?;
                counter.fetch_add(1, Ordering::Relaxed);
                std::thread::park_timeout(Duration::from_micros(rng.below(PAUSE)));
            }
            Ok(())
        });
        Squeezer { stop, changes, thread: Some(thread) }
    }

    /// Has the next change come about now.
    fn now(&self) {
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }

    fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }

    fn finish(mut self) -> anyhow::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            _ => anyhow::bail!("what changes the pool panicked"),
        }
    }
}

impl Drop for Squeezer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// A guest with its daemon.
struct Pair {
    options: Options,
    daemon: Daemon,
    machine: Machine,
    reserved: bool,
    /// Blocks of which the daemon said that they are there.
    there: Vec<bool>,
    started: Instant,
    scratch: Scratch,
}

impl Pair {
    fn start(plan: &Plan, reserved: bool, memory: GuestMemory) -> anyhow::Result<Self> {
        let options = Options::new(&plan.program, "gemini").arg("--cpu-share", "100");
        let scratch = Scratch::new()?;
        let daemon = Daemon::start(&options, scratch.path())?;
        let machine = Machine::boot(&daemon.socket(), memory)?;
        let there = vec![false; usize::try_from(BLOCKS)?];
        let started = Instant::now();
        Ok(Pair { options, daemon, machine, reserved, there, started, scratch })
    }

    fn own(&self) -> std::ops::Range<u64> {
        AREA_BLOCKS..BLOCKS
    }

    fn any(&self, rng: &mut Rng) -> u64 {
        self.own().start + rng.below(self.own().end - self.own().start)
    }

    fn note(&mut self, records: &[Record]) {
        for record in records.iter().filter(|record| record.state == host_state::HUGETLB) {
            for block in record.first..record.first + u64::from(record.count) {
                if let Some(there) = usize::try_from(block).ok().and_then(|b| self.there.get_mut(b))
                {
                    *there = true;
                }
            }
        }
    }

    fn is_there(&self, block: u64) -> bool {
        usize::try_from(block).is_ok_and(|block| self.there.get(block) == Some(&true))
    }

    fn step(&mut self, step: Step, rng: &mut Rng, totals: &mut Totals) -> anyhow::Result<()> {
        match step {
            Step::Prepare => self.prepare(rng, totals),
            Step::Release => self.release(rng, totals),
            Step::Reacquire => self.reacquire(rng, totals),
            Step::Reconnect => self.reconnect(totals),
            Step::Table => {
                self.machine.session.set_memory(&self.machine.memory)?;
                self.machine.driver.expect_resync();
                self.machine.sync()
            }
            .map(|_| ()),
            Step::Touch | Step::Connect => self.touch(rng, totals),
        }
    }

    fn prepare(&mut self, rng: &mut Rng, totals: &mut Totals) -> anyhow::Result<()> {
        let first = self.any(rng);
        let count = u32::try_from((rng.below(6) + 1).min(self.own().end - first))?;
        self.ask(&[Range { first, count }], totals)
    }

    /// Asks for blocks. The daemon may refuse, and must say truly which it did not.
    fn ask(&mut self, ranges: &[Range], totals: &mut Totals) -> anyhow::Result<()> {
        let start = Instant::now();
        let answer = self.machine.driver.request(wire::REQ_PREPARE, ranges, PATIENCE)?;
        totals.longest = totals.longest.max(start.elapsed());
        let status = answer.response.status;
        // A new memory table makes what was asked before void.
        let ordinary = [wire::S_OK, wire::S_FAILED, wire::S_VOID];
        ensure!(ordinary.contains(&status), "PREPARE answered with status {status}");
        if status == wire::S_VOID {
            return Ok(());
        }
        self.note(&answer.records);
        for block in each(ranges) {
            totals.prepared += 1;
            if !self.is_there(block) {
                ensure!(status != wire::S_OK, "block {block} is not there after OK");
                totals.refused += 1;
                totals.refused_reserved += u64::from(self.reserved);
            }
        }
        Ok(())
    }

    /// Asks for a drop of a block that is held, which must be refused and change
    /// nothing: a hole could not be filled again.
    fn release(&mut self, rng: &mut Rng, totals: &mut Totals) -> anyhow::Result<()> {
        let block = self.any(rng);
        if self.machine.guest.state(block).0 != guest_state::FREE {
            return Ok(());
        }
        self.machine.guest.book(block)?;
        self.machine.talk()?;
        let kind = if rng.chance(50) { wire::REQ_RELEASE } else { wire::REQ_RENEW };
        let stake = self.machine.guest.put_at_stake(block);
        let answer = self.machine.driver.request(kind, &singles(&[block]), PATIENCE)?;
        if answer.response.status == wire::S_OK {
            totals.dropped += 1;
            self.machine.guest.contents_dropped(block);
        } else {
            totals.drops_refused += 1;
            self.machine.guest.put_back(&stake);
        }
        self.machine.guest.unbook(block)?;
        self.machine.talk()
    }

    /// Asks for a block that is there already, or whose release was refused: it
    /// must be there afterwards, however short the pool is.
    fn reacquire(&mut self, rng: &mut Rng, totals: &mut Totals) -> anyhow::Result<()> {
        let block = self.any(rng);
        let was_there = self.is_there(block);
        let start = Instant::now();
        let answer =
            self.machine.driver.request(wire::REQ_PREPARE, &singles(&[block]), PATIENCE)?;
        totals.longest = totals.longest.max(start.elapsed());
        self.note(&answer.records);
        if was_there && answer.response.status != wire::S_VOID {
            // A daemon that was started anew knows of a page that nobody touched
            // yet only once it asked for it, which takes nothing.
            let found = self.machine.memory.resident_bytes()?;
            ensure!(found > 0, "nothing is there");
            totals.refused_reserved +=
                u64::from(self.reserved && answer.response.status != wire::S_OK);
        }
        Ok(())
    }

    fn reconnect(&mut self, totals: &mut Totals) -> anyhow::Result<()> {
        self.end_daemon(totals)?;
        self.daemon = Daemon::start(&self.options, self.scratch.path())?;
        self.started = Instant::now();
        self.machine.reconnect(&self.daemon.socket())?;
        self.machine.sync().map(|_| ())
    }

    fn end_daemon(&mut self, totals: &mut Totals) -> anyhow::Result<()> {
        self.daemon.ensure_alive()?;
        totals.daemons += 1;
        totals.daemon_seconds += self.started.elapsed().as_secs_f64();
        let exit = self.daemon.terminate()?;
        ensure!(exit.success(), "daemon ended with {exit} on SIGTERM");
        Ok(())
    }

    /// The guest uses a block, or gives one back.
    fn touch(&mut self, rng: &mut Rng, totals: &mut Totals) -> anyhow::Result<()> {
        let block = self.any(rng);
        match self.machine.guest.state(block).0 {
            guest_state::HUGE => self.machine.guest.free_huge(block)?,
            guest_state::FREE if self.reserved || self.is_there(block) => {
                let memory = &self.machine.memory;
                if let Err(error) = memory.mapping().fault_in(block << BLOCK_SHIFT, BLOCK_SIZE) {
                    println!("SIGBUS at block {block} (reserved: {}): {error}", self.reserved);
                    totals.sigbus += 1;
                    return Ok(());
                }
                self.machine.guest.alloc_huge(block)?;
                if let Some(there) = self.there.get_mut(usize::try_from(block)?) {
                    *there = true;
                }
            }
            _ => {}
        }
        self.machine.talk()
    }

    /// What its daemons said, and whether memory is as it must be.
    fn finish(mut self, totals: &mut Totals) -> anyhow::Result<()> {
        let damages = self.machine.guest.verify()?;
        for damage in damages.iter().take(3) {
            println!("DAMAGED: {damage}");
        }
        totals.damaged += damages.len() as u64;
        self.end_daemon(totals)?;
        let log = std::fs::read_to_string(self.daemon.log_path())?;
        totals.messages += log.matches(SHORT).count() as u64;
        totals.own_sigbus += log.matches(OWN_SIGBUS).count() as u64;
        Ok(())
    }
}

/// Memory whose first blocks, in which the driver's rings are, are touched.
fn memory(placement: Placement) -> anyhow::Result<GuestMemory> {
    let memory = GuestMemory::new(BLOCKS * BLOCK_SIZE, placement)
        .context("cannot map hugetlb memory: the host has too few free huge pages")?;
    memory.mapping().fault_in(0, AREA_BLOCKS * BLOCK_SIZE)?;
    Ok(memory)
}

/// Gives the pool enough for both guests.
fn fill(pool: &Pool) -> anyhow::Result<()> {
    pool.resize(ENOUGH)?;
    let found = pool.unclaimed()?;
    ensure!(
        found >= 2 * BLOCKS,
        "the host found {found} huge pages, and {} are needed: it is short of memory in one piece",
        2 * BLOCKS
    );
    Ok(())
}

/// Two guests live through a pool that changes all the time.
fn round(plan: &Plan, pool: &Arc<Pool>, seed: u64, totals: &mut Totals) -> anyhow::Result<()> {
    let mut rng = Rng::new(seed);
    fill(pool)?;
    let memories = [memory(Placement::Reserved)?, memory(Placement::Unreserved)?];
    let squeezer = Squeezer::start(Arc::clone(pool), rng.below(u64::MAX));
    let count = |step: Step, before: u64, totals: &mut Totals| {
        let at = Step::ALL.iter().position(|(other, _)| *other == step).unwrap_or(0);
        totals.changes[at] += squeezer.changes() - before;
        totals.steps[at] += 1;
    };
    let mut pairs = Vec::new();
    for (memory, reserved) in memories.into_iter().zip([true, false]) {
        let before = squeezer.changes();
        pairs.push(Pair::start(plan, reserved, memory)?);
        count(Step::Connect, before, totals);
    }
    for _ in 0..plan.steps {
        // What a step draws depends on what the pool did; the next one must not.
        let mut rng = Rng::new(rng.below(u64::MAX));
        let pair = &mut pairs[rng.index(2)];
        let step = Step::any(&mut rng);
        // Most steps are over in less time than passes between two changes.
        for _ in 0..TRIES {
            let before = squeezer.changes();
            squeezer.now();
            pair.step(step, &mut rng, totals)
                .with_context(|| format!("in the middle of {}", step.name()))?;
            count(step, before, totals);
            if squeezer.changes() > before {
                break;
            }
        }
    }
    squeezer.finish()?;
    for pair in pairs {
        pair.finish(totals)?;
    }
    Ok(())
}

/// How a shortage is told, and its end.
#[derive(Debug, Default)]
struct Told {
    scarce_seconds: f64,
    refused: u64,
    refusal_seconds: f64,
    messages: u64,
    findings: u64,
    back_seconds: f64,
    prepared_after: u64,
}

/// A pool that is short for a while under a guest without reservation.
fn told(plan: &Plan, pool: &Pool) -> anyhow::Result<Told> {
    let mut told = Told::default();
    fill(pool)?;
    let mut pair = Pair::start(plan, false, memory(Placement::Unreserved)?)?;
    let own = Range { first: AREA_BLOCKS, count: 4 };
    let later = Range { first: AREA_BLOCKS + 4, count: 8 };
    let mut totals = Totals::default();
    pair.ask(&[own], &mut totals)?;
    ensure!(totals.refused == 0, "refused while the pool had enough");
    pool.resize(0)?;
    let short = Instant::now();
    for _ in 0..20 {
        let start = Instant::now();
        pair.ask(&[later], &mut totals)?;
        told.refusal_seconds = told.refusal_seconds.max(start.elapsed().as_secs_f64());
    }
    told.refused = totals.refused;
    let is_scarce = |machine: &Machine| {
        machine.driver.advice().is_some_and(|advice| advice.flags & wire::ADVICE_SCARCE != 0)
    };
    wait(&mut pair.machine, "advice that pages are scarce", is_scarce)?;
    told.scarce_seconds = short.elapsed().as_secs_f64();
    let codes = |pair: &Pair| -> anyhow::Result<u64> {
        let findings = pair.daemon.status()?.findings;
        Ok(findings.iter().filter(|finding| finding.code == "hugetlb-pool-short").count() as u64)
    };
    told.findings = codes(&pair)?;
    // What was said to be there is, and the guest may use it.
    for block in each(&[own]) {
        pair.machine.memory.mapping().fault_in(block << BLOCK_SHIFT, BLOCK_SIZE)?;
    }
    // Long enough for whoever says it again and again.
    pair.machine.run_for(Duration::from_secs(2))?;
    fill(pool)?;
    let back = Instant::now();
    wait(&mut pair.machine, "advice that pages are back", |machine| !is_scarce(machine))?;
    told.back_seconds = back.elapsed().as_secs_f64();
    ensure!(codes(&pair)? == 0, "the finding stays");
    let mut after = Totals::default();
    pair.ask(&[later], &mut after)?;
    told.prepared_after = after.prepared - after.refused;
    pair.finish(&mut totals)?;
    told.messages = totals.messages;
    Ok(told)
}

/// Pages of 1 GiB: two, of which the guest has one.
#[derive(Debug, Default)]
struct Gigantic {
    refused: u64,
    prepare_seconds: f64,
    neighbours: u64,
    sigbus: u64,
    damaged: u64,
}

/// A pool of 1 GiB pages that is short, and then is not; `None` where the host
/// has no two such pages in one piece, or nobody wants to know.
fn gigantic(plan: &Plan) -> anyhow::Result<Option<Gigantic>> {
    if !plan.gigantic {
        return Ok(None);
    }
    let mut seen = Gigantic::default();
    let Ok(pool) = Held::pool(true) else { return Ok(None) };
    pool.resize(2)?;
    if pool.unclaimed()? < 2 {
        return Ok(None);
    }
    let memory = GuestMemory::new(2 * GIGANTIC_SIZE, Placement::Gigantic)?;
    memory.mapping().fault_in(0, BLOCK_SIZE)?;
    let options = Options::new(&plan.program, "gemini").arg("--cpu-share", "100");
    let scratch = Scratch::new()?;
    let daemon = Daemon::start(&options, scratch.path())?;
    let mut machine = Machine::boot(&daemon.socket(), memory)?;
    let first = GIGANTIC_SIZE >> BLOCK_SHIFT;
    pool.resize(1)?;
    for block in [first, first + 200] {
        seen.refused += u64::from(prepare_one(&mut machine, block)? == wire::S_FAILED);
    }
    pool.resize(2)?;
    if pool.unclaimed()? < 1 {
        // Somebody has taken a piece of it meanwhile.
        return Ok(None);
    }
    let deadline = Instant::now() + PATIENCE;
    loop {
        let start = Instant::now();
        if prepare_one(&mut machine, first + 200)? == wire::S_OK {
            seen.prepare_seconds = start.elapsed().as_secs_f64();
            break;
        }
        ensure!(Instant::now() < deadline, "nothing is prepared after {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
    // All of the page is there: its other blocks take nothing any more.
    pool.resize(0)?;
    for block in [first, 2 * first - 1] {
        seen.neighbours += u64::from(prepare_one(&mut machine, block)? == wire::S_OK);
    }
    let used = [first, first + 200, 2 * first - 1];
    for block in used {
        let touched = machine.memory.mapping().fault_in(block << BLOCK_SHIFT, BLOCK_SIZE);
        seen.sigbus += u64::from(touched.is_err());
        if touched.is_ok() {
            machine.guest.alloc_huge(block)?;
        }
    }
    seen.damaged = machine.guest.verify_blocks(&used)?.len() as u64;
    Ok(Some(seen))
}

/// Has one block prepared; the status of the answer.
fn prepare_one(machine: &mut Machine, block: u64) -> anyhow::Result<u32> {
    let patience = 4 * PATIENCE; // all of a page of 1 GiB is cleared
    let answer = machine.driver.request(wire::REQ_PREPARE, &singles(&[block]), patience)?;
    Ok(answer.response.status)
}

fn wait(machine: &mut Machine, what: &str, done: impl Fn(&Machine) -> bool) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !done(machine) {
        ensure!(Instant::now() < deadline, "no {what} after {PATIENCE:?}");
        machine.talk()?;
        machine.driver.wait(Duration::from_millis(50))?;
    }
    Ok(())
}

/// Measures.
///
/// # Errors
/// If the host's pool cannot be changed, or the daemon does not behave.
pub fn measure(plan: &Plan) -> anyhow::Result<Scenario> {
    let mut scenario = Scenario::new("hugetlb-short");
    scenario.arg("seed", plan.seed);
    scenario.arg("rounds", plan.rounds);
    scenario.arg("steps", plan.steps);
    scenario.arg("blocks_per_guest", BLOCKS);
    scenario.arg("pool_pages", ENOUGH);
    let gigantic = gigantic(plan)?;
    let pool = Arc::new(Held::pool(false)?);
    scenario.arg("nr_hugepages", pool.describe());
    let told = told(plan, &pool)?;
    let mut totals = Totals::default();
    for number in 0..plan.rounds {
        let seed = plan.seed.wrapping_mul(0x9e37_79b9).wrapping_add(number);
        round(plan, &pool, seed, &mut totals).with_context(|| format!("round {number}"))?;
    }
    for ((_, name), (changes, steps)) in
        Step::ALL.iter().zip(totals.changes.into_iter().zip(totals.steps))
    {
        scenario.figure(&format!("{name}_steps"), steps as f64, Bar::AtLeast(1.0));
        let name = format!("pool_changes_during_{name}");
        scenario.figure(&name, changes as f64, Bar::AtLeast(1.0));
    }
    // One message a minute at most, and one more for each daemon that is new to it.
    let messages = totals.daemons as f64 + totals.daemon_seconds / 60.0;
    #[rustfmt::skip]
    let figures = [
        ("sigbus_guest", totals.sigbus as f64, Bar::AtMost(0.0)),
        ("sigbus_daemon", totals.own_sigbus as f64, Bar::AtMost(0.0)),
        ("damaged_pages", totals.damaged as f64, Bar::AtMost(0.0)),
        ("blocks_asked_for", totals.prepared as f64, Bar::AtLeast(1.0)),
        ("prepare_seconds_max", totals.longest.as_secs_f64(), Bar::None),
        ("blocks_refused", totals.refused as f64, Bar::AtLeast(1.0)),
        ("blocks_refused_though_set_aside", totals.refused_reserved as f64, Bar::AtMost(0.0)),
        ("drops_refused", totals.drops_refused as f64, Bar::AtLeast(1.0)),
        ("drops_done", totals.dropped as f64, Bar::AtMost(0.0)),
        ("daemons", totals.daemons as f64, Bar::None),
        ("messages", totals.messages as f64, Bar::AtMost(messages)),
        ("short_refused_blocks", told.refused as f64, Bar::AtLeast(160.0)),
        ("short_refusal_seconds_max", told.refusal_seconds, Bar::AtMost(1.0)),
        ("short_messages", told.messages as f64, Bar::AtLeast(1.0)),
        ("short_messages_most", told.messages as f64, Bar::AtMost(1.0)),
        ("short_findings", told.findings as f64, Bar::AtLeast(1.0)),
        ("short_scarce_seconds", told.scarce_seconds, Bar::AtMost(2.0)),
        ("short_over_seconds", told.back_seconds, Bar::AtMost(4.0)),
        ("short_prepared_after", told.prepared_after as f64, Bar::AtLeast(8.0)),
    ];
    for (name, value, bar) in figures {
        scenario.figure(name, value, bar);
    }
    let Some(seen) = gigantic else {
        let why = match plan.gigantic {
            true => "not run: the host has no two in one piece",
            false => "not run: it takes long",
        };
        println!("pages of 1 GiB: {why}");
        scenario.arg("pages_of_1_gib", why);
        return Ok(scenario);
    };
    scenario.arg("pages_of_1_gib", 2);
    #[rustfmt::skip]
    let figures = [
        ("gib_refused_while_short", seen.refused as f64, Bar::AtLeast(2.0)),
        ("gib_prepare_seconds", seen.prepare_seconds, Bar::None),
        ("gib_neighbours_there", seen.neighbours as f64, Bar::AtLeast(2.0)),
        ("gib_sigbus", seen.sigbus as f64, Bar::AtMost(0.0)),
        ("gib_damaged_pages", seen.damaged as f64, Bar::AtMost(0.0)),
    ];
    for (name, value, bar) in figures {
        scenario.figure(name, value, bar);
    }
    Ok(scenario)
}

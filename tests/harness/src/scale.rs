//! A guest of 1 TiB with a state of its own in every block, and a small guest
//! that is wholly resident: how long a full resync takes, and what the daemon
//! costs.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::ensure;

use crate::daemon::{Daemon, Options};
use crate::driver::{Driver, AREA_BLOCKS};
use crate::figures::{Bar, Scenario};
use crate::frontend::Session;
use crate::machine::PATIENCE;
use crate::memory::{GuestMemory, Placement, BLOCK_SHIFT};
use crate::outside::{self, ProcessFigures};
use crate::scratch::Scratch;
use crate::settings;
use crate::sys::PAGE_SIZE;
use crate::wire::{guest_state, host_state, Record};

const MIB: f64 = (1u64 << 20) as f64;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The daemon's program.
    pub program: PathBuf,
    /// Bytes of the sparse guest.
    pub sparse: u64,
    /// Bytes of the resident guest.
    pub resident: u64,
    /// How long the daemon's idle CPU time is measured.
    pub idle: Duration,
}

impl Plan {
    /// The sizes that the bars are for, or small ones for a quick look.
    #[must_use]
    pub fn new(program: PathBuf, quick: bool) -> Self {
        Plan {
            program,
            sparse: if quick { 1 << 34 } else { 1 << 40 },
            resident: if quick { 1 << 28 } else { 1 << 32 },
            idle: Duration::from_secs(if quick { 5 } else { 20 }),
        }
    }
}

/// Measures.
///
/// # Errors
/// If the machine has too little memory, its settings make a sparse guest
/// impossible, or the daemon does not behave.
pub fn measure(plan: &Plan) -> anyhow::Result<Scenario> {
    let mut scenario = Scenario::new("scale");
    scenario.arg("sparse_bytes", plan.sparse);
    scenario.arg("resident_bytes", plan.resident);
    scenario.arg("idle_seconds", plan.idle.as_secs());
    let _held = settings::daemon_decides()?;
    sparse(plan, &mut scenario)?;
    resident(plan, &mut scenario)?;
    Ok(scenario)
}

/// Fails where `needed` bytes are more than the machine has left.
pub(crate) fn ensure_memory(needed: u64) -> anyhow::Result<()> {
    let available = outside::available_memory()?;
    ensure!(
        available >= needed,
        "{} MiB of memory are available and {} MiB are needed (--quick needs less)",
        available >> 20,
        needed >> 20
    );
    Ok(())
}

/// A guest of `size` bytes with one page in every second block.
pub(crate) fn sparse_guest(size: u64) -> anyhow::Result<GuestMemory> {
    let memory = GuestMemory::new(size, Placement::Aligned)?;
    for block in (0..size >> BLOCK_SHIFT).step_by(2) {
        memory.write(block << BLOCK_SHIFT, &[1]);
    }
    Ok(memory)
}

/// Its full state. Neighbours differ everywhere, so that no run of blocks merges.
pub(crate) fn sparse_census(blocks: u64) -> Vec<Record> {
    (0..blocks)
        .map(|first| Record {
            first,
            count: 1,
            used: u32::from(first % 2 == 0),
            state: match first {
                0..AREA_BLOCKS => guest_state::PINNED,
                _ if first % 2 == 0 => guest_state::BASE,
                _ => guest_state::FREE,
            },
            flags: 0,
        })
        .collect()
}

/// A driver on `memory` that is connected to `daemon`; the census is given.
pub(crate) struct Connected {
    memory: Arc<GuestMemory>,
    pub(crate) session: Session,
    pub(crate) driver: Driver,
}

impl Connected {
    pub(crate) fn new(daemon: &Daemon, memory: &Arc<GuestMemory>) -> anyhow::Result<Self> {
        Ok(Connected {
            memory: Arc::clone(memory),
            session: Session::connect(&daemon.socket(), PATIENCE)?,
            driver: Driver::new(Arc::clone(memory), 0)?,
        })
    }

    /// Exchanges the full states of both layers; both sides have them when this
    /// returns. The queues were just started.
    pub(crate) fn resync(&mut self, daemon: &mut Daemon, census: &[Record]) -> anyhow::Result<()> {
        let deadline = Instant::now() + 3 * PATIENCE;
        loop {
            self.driver.wait_until("full host state", 3 * PATIENCE, |driver| {
                driver.report_due() || driver.host_synced()
            })?;
            if self.driver.report_due() {
                self.driver.report_full(census, 3 * PATIENCE)?;
                continue;
            }
            let status = daemon.status()?;
            if status.guest_synced && status.host_synced {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "no full state: {status:?}");
            self.driver.wait(Duration::from_millis(5))?;
        }
    }

    fn restart_queues(&mut self) -> anyhow::Result<()> {
        self.session.stop_queues()?;
        self.driver.reset()?;
        self.driver.start(&mut self.session)
    }
}

fn sparse(plan: &Plan, scenario: &mut Scenario) -> anyhow::Result<()> {
    let blocks = plan.sparse >> BLOCK_SHIFT;
    // Each second block has a page, and a page of page tables in the monitor;
    // the file's own index and the daemon come on top.
    ensure_memory(blocks / 2 * PAGE_SIZE * 2 + (1 << 30))?;
    let memory = Arc::new(sparse_guest(plan.sparse)?);
    let census = sparse_census(blocks);

    let scratch = Scratch::new()?;
    let options = Options::new(&plan.program, "gemini");
    let mut daemon = Daemon::start(&options, scratch.path())?;
    scenario.version("daemon", daemon.status()?.version);
    let start_pid = daemon.pid();

    let mut connected = Connected::new(&daemon, &memory)?;
    let start = Instant::now();
    connected.session.set_memory(&memory)?;
    connected.driver.start(&mut connected.session)?;
    connected.resync(&mut daemon, &census)?;
    let first = start.elapsed().as_secs_f64();
    let wrong = wrong_hints(&connected, blocks);

    let start = Instant::now();
    connected.restart_queues()?;
    connected.resync(&mut daemon, &census)?;
    let again = start.elapsed().as_secs_f64();
    let wrong_again = wrong_hints(&connected, blocks);

    // What the resync started may end first.
    idle(&mut connected, Duration::from_secs(2))?;
    let before = outside::fine_cpu_seconds(start_pid)?;
    let start = Instant::now();
    idle(&mut connected, plan.idle)?;
    let ran = outside::fine_cpu_seconds(start_pid)? - before;
    let idle = 100.0 * ran / start.elapsed().as_secs_f64();
    let after = ProcessFigures::of(start_pid)?;

    let status = daemon.status()?;
    scenario.figure("sparse_blocks", blocks as f64, Bar::None);
    #[rustfmt::skip]
    let figures = [
        ("first_sync_seconds", first, Bar::Below(2.0)),
        ("resync_seconds", again, Bar::Below(2.0)),
        ("wrong_hints", (wrong + wrong_again) as f64, Bar::AtMost(0.0)),
        ("sparse_rss_anon_mib", after.rss_anon as f64 / MIB, Bar::None),
        ("sparse_page_tables_mib", after.page_tables as f64 / MIB, Bar::None),
        ("sparse_memory_mib", (after.rss_anon + after.page_tables) as f64 / MIB, Bar::Below(48.0)),
        ("idle_cpu_percent", idle, Bar::Below(0.5)),
        // Looking must not fill the guest: only the driver's buffers came on top.
        ("sparse_growth_mib", growth(&memory, blocks)?, Bar::AtMost(16.0)),
        ("sparse_guest_base", status.guest.base as f64, Bar::AtLeast((blocks / 2 - 2) as f64)),
    ];
    for (name, value, bar) in figures {
        scenario.figure(name, value, bar);
    }
    drop(connected);
    let exit = daemon.terminate()?;
    ensure!(exit.success(), "daemon ended with {exit} on SIGTERM");
    Ok(())
}

fn growth(memory: &GuestMemory, blocks: u64) -> anyhow::Result<f64> {
    let touched = blocks / 2 * PAGE_SIZE;
    Ok(memory.resident_bytes()?.saturating_sub(touched) as f64 / MIB)
}

/// Blocks outside of the driver's own whose hinted state is not what was done
/// to them.
fn wrong_hints(connected: &Connected, blocks: u64) -> u64 {
    (0..blocks)
        .zip(connected.driver.host())
        .skip(usize::try_from(AREA_BLOCKS).unwrap_or(0))
        .filter(|(block, &state)| {
            let expected = if block % 2 == 0 { host_state::BASE } else { host_state::ABSENT };
            state != expected
        })
        .count() as u64
}

fn idle(connected: &mut Connected, time: Duration) -> anyhow::Result<()> {
    let deadline = Instant::now() + time;
    while Instant::now() < deadline {
        let left = deadline.saturating_duration_since(Instant::now());
        connected.driver.wait(left.min(Duration::from_millis(200)))?;
    }
    Ok(())
}

fn resident(plan: &Plan, scenario: &mut Scenario) -> anyhow::Result<()> {
    ensure_memory(plan.resident + plan.resident / 4 + (1 << 29))?;
    let memory = Arc::new(GuestMemory::new(plan.resident, Placement::Aligned)?);
    for page in 0..plan.resident / PAGE_SIZE {
        memory.write(page * PAGE_SIZE, &[1]);
    }
    let blocks = plan.resident >> BLOCK_SHIFT;
    let guest = |first, count, state| Record {
        first,
        count,
        used: if state == guest_state::BASE { 512 } else { 0 },
        state,
        flags: 0,
    };
    let own = u32::try_from(blocks - AREA_BLOCKS)?;
    let pinned = guest(0, u32::try_from(AREA_BLOCKS)?, guest_state::PINNED);
    let census = [pinned, guest(AREA_BLOCKS, own, guest_state::BASE)];

    let scratch = Scratch::new()?;
    // The work shall be over soon; what it costs in memory is the question.
    let options =
        Options::new(&plan.program, "gemini").arg("--copy-rate", "4G").arg("--cpu-share", "100");
    let mut daemon = Daemon::start(&options, scratch.path())?;
    let mut connected = Connected::new(&daemon, &memory)?;
    connected.session.set_memory(&connected.memory)?;
    connected.driver.start(&mut connected.session)?;
    connected.resync(&mut daemon, &census)?;
    let synced = ProcessFigures::of(daemon.pid())?;

    // Then the guest makes all of it huge, and the host follows.
    connected.driver.report(&[guest(AREA_BLOCKS, own, guest_state::HUGE)], PATIENCE)?;
    let deadline = Instant::now() + Duration::from_secs(120);
    let mut peak = synced.rss_anon + synced.page_tables;
    let aligned = loop {
        connected.driver.wait(Duration::from_millis(50))?;
        daemon.ensure_alive()?;
        let figures = ProcessFigures::of(daemon.pid())?;
        peak = peak.max(figures.rss_anon + figures.page_tables);
        let status = daemon.status()?;
        if status.aligned >= u64::from(own) || Instant::now() > deadline {
            break status.aligned;
        }
    };
    let states = outside::host_states(&memory)?;
    let huge = states.iter().filter(|&&state| state == host_state::HUGE).count();
    #[rustfmt::skip]
    let figures = [
        ("resident_blocks", blocks as f64, Bar::None),
        ("resident_memory_mib", (synced.rss_anon + synced.page_tables) as f64 / MIB, Bar::Below(16.0)),
        ("resident_peak_mib", peak as f64 / MIB, Bar::Below(16.0)),
        ("resident_aligned", aligned as f64, Bar::AtLeast(f64::from(own))),
        ("resident_huge_outside", huge as f64, Bar::AtLeast(f64::from(own))),
    ];
    for (name, value, bar) in figures {
        scenario.figure(name, value, bar);
    }
    drop(connected);
    let exit = daemon.terminate()?;
    ensure!(exit.success(), "daemon ended with {exit} on SIGTERM");
    Ok(())
}

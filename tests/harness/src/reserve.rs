//! What a reserve of huge pages would be worth to the daemon: blocks are collapsed in
//! a host whose free memory is fragmented, every other one after a huge page was let
//! go that had been gained before, as a reserve would for it.
//!
//! The daemon has no reserve; this is the experiment that decided it (docs/measurements.md).

use std::fs::File;
use std::time::{Duration, Instant};

use gemini_guest::buddy;

use crate::figures::{Bar, Scenario};
use crate::fragment::{Fragments, Until};
use crate::memory::BLOCK_SIZE;
use crate::rng::Rng;
use crate::settings::Held;
use crate::sys::{self, Mapping, Pages, PAGE_SIZE};

/// Longest time of fragmenting, once for each state of the host.
const FRAGMENTING: Duration = Duration::from_secs(45);
/// Rest of the daemon between two huge pages that it tries to gain.
const PACE: Duration = Duration::from_millis(50);
/// Blocks that are collapsed with and without, in each state of the host.
const BLOCKS: u64 = 128;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Blocks of each kind in each state.
    pub blocks: u64,
    /// Index to which free memory is fragmented first, 0 to 1.
    pub index: f64,
    /// Whether the kernel's last huge page is taken afterwards.
    pub exhaust: bool,
    /// Seed of everything random.
    pub seed: u64,
}

impl Plan {
    /// Both states, or a quick look at the first.
    #[must_use]
    pub fn new(quick: bool, seed: u64) -> Self {
        let blocks = if quick { BLOCKS / 8 } else { BLOCKS };
        Plan { blocks, index: 0.98, exhaust: !quick, seed }
    }
}

/// Huge pages that are there to be let go.
struct Reserve {
    file: File,
    held: Vec<u64>,
    tried: u64,
    took: Duration,
}

impl Reserve {
    /// Tries to gain huge pages, as the daemon would in the background.
    fn gain(pages: u64, rest: Duration) -> anyhow::Result<Self> {
        let file = sys::memfd(pages * BLOCK_SIZE, Pages::Any)?;
        let mapping = Mapping::new(&file, pages * BLOCK_SIZE, BLOCK_SIZE, 0, true)?;
        let (mut held, mut took) = (Vec::new(), Duration::ZERO);
        for at in (0..pages).map(|page| page * BLOCK_SIZE) {
            let start = Instant::now();
            mapping.fault_in(at, PAGE_SIZE)?;
            match mapping.advise(at, BLOCK_SIZE, libc::MADV_COLLAPSE) {
                Ok(()) => held.push(at),
                Err(_) => sys::punch_hole(&file, at, BLOCK_SIZE)?,
            }
            took += start.elapsed();
            std::thread::sleep(rest);
        }
        Ok(Reserve { file, held, tried: pages, took })
    }

    /// Lets a huge page go; false if there is none.
    fn let_go(&mut self) -> anyhow::Result<bool> {
        let Some(at) = self.held.pop() else { return Ok(false) };
        sys::punch_hole(&self.file, at, BLOCK_SIZE)?;
        Ok(true)
    }
}

/// Collapses that were tried, each with the time that it took.
#[derive(Default)]
struct Tried {
    done: Vec<Duration>,
    failed: Vec<Duration>,
}

impl Tried {
    fn rate(&self) -> f64 {
        self.done.len() as f64 / (self.done.len() + self.failed.len()) as f64
    }

    /// The time in milliseconds below which so many of a hundred attempts are.
    fn ms(&self, percent: usize) -> f64 {
        let mut all: Vec<_> = self.done.iter().chain(&self.failed).collect();
        all.sort();
        let at = all.len().saturating_sub(1) * percent / 100;
        all.get(at).map_or(f64::NAN, |time| time.as_secs_f64() * 1000.0)
    }
}

/// Measures.
///
/// # Errors
/// If memory cannot be fragmented, or a setting of the host not be made.
pub fn measure(plan: &Plan) -> anyhow::Result<Scenario> {
    let mut scenario = Scenario::new("reserve");
    scenario.arg("blocks", plan.blocks);
    scenario.arg("index", plan.index);
    scenario.arg("seed", plan.seed);
    // Nobody else's measurement is disturbed meanwhile.
    let held = Held::shmem_enabled("never")?;
    scenario.arg("shmem_enabled", held.describe());
    let mut rng = Rng::new(plan.seed);
    let mut fragments = Fragments::new(rng.bits())?;
    let mut states = vec![("fragmented", Until::Index(plan.index))];
    if plan.exhaust {
        states.push(("exhausted", Until::Exhausted));
    }
    // What is used in every state is gained before the first.
    let mut reserve = Reserve::gain(plan.blocks * states.len() as u64, Duration::ZERO)?;
    let gained = reserve.held.len() as f64 / reserve.tried as f64;
    scenario.figure("gained_before", gained, Bar::AtLeast(0.9));
    for (name, until) in states {
        let reached = fragments.add(until, FRAGMENTING)?;
        let mut tell = |what: &str, value, bar| {
            scenario.figure(&format!("{name}_{what}"), value, bar);
        };
        tell("reached", f64::from(u8::from(reached)), Bar::None);
        tell("index", buddy::read()?.fmfi, Bar::None);
        tell("blocks_broken", fragments.blocks() as f64, Bar::None);
        let memory = resident(2 * plan.blocks)?;
        let [with, without] = collapse(plan, &memory, &mut reserve, &mut rng)?;
        for (kind, tried) in [("with_reserve", &with), ("without", &without)] {
            tell(&format!("{kind}_succeeded"), tried.rate(), Bar::None);
            tell(&format!("{kind}_ms_median"), tried.ms(50), Bar::None);
            tell(&format!("{kind}_ms_95th"), tried.ms(95), Bar::None);
            tell(&format!("{kind}_ms_longest"), tried.ms(100), Bar::None);
        }
        // Where the next pages of a reserve would come from, while what was freed by the
        // collapses, which lay together, is not the answer.
        let again = Reserve::gain(plan.blocks, PACE)?;
        drop(memory);
        tell("gained_again", again.held.len() as f64 / again.tried as f64, Bar::None);
        let each = again.took.as_secs_f64() * 1000.0 / again.tried as f64;
        tell("gained_again_ms_each", each, Bar::None);
    }
    Ok(scenario)
}

/// Blocks of base pages.
fn resident(blocks: u64) -> anyhow::Result<Mapping> {
    let file = sys::memfd(blocks * BLOCK_SIZE, Pages::Any)?;
    let mapping = Mapping::new(&file, blocks * BLOCK_SIZE, BLOCK_SIZE, 0, true)?;
    mapping.fault_in(0, mapping.len())?;
    Ok(mapping)
}

/// Collapses blocks with contents, in random order every other one after a page of
/// the reserve was let go: [with, without].
fn collapse(
    plan: &Plan,
    memory: &Mapping,
    reserve: &mut Reserve,
    rng: &mut Rng,
) -> anyhow::Result<[Tried; 2]> {
    let mut tried = [Tried::default(), Tried::default()];
    for pair in 0..plan.blocks {
        let first = rng.below(2);
        for turn in [first, 1 - first] {
            let start = Instant::now();
            // Letting go is a part of what it takes.
            let with = turn == 0 && reserve.let_go()?;
            let at = (2 * pair + turn) * BLOCK_SIZE;
            let done = memory.advise(at, BLOCK_SIZE, libc::MADV_COLLAPSE).is_ok();
            let tried = &mut tried[usize::from(!with)];
            let times = if done { &mut tried.done } else { &mut tried.failed };
            times.push(start.elapsed());
        }
    }
    Ok(tried)
}

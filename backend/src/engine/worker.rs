//! The threads on which system calls may block: one looks at the host, one acts.

use super::repair::{Outcome, Work};
use super::scan::Look;
use super::Engine;
use crate::backing::{thread_cpu_time, Collapsed, Holes, HostRun, Memory, Refusal};
use std::sync::mpsc::Receiver;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Something to do for a worker.
pub enum Job {
    /// Look at the host.
    Look {
        /// Where.
        memory: Arc<Memory>,
        /// Which blocks.
        look: Look,
    },
    /// Change the host.
    Act {
        /// Where.
        memory: Arc<Memory>,
        /// The generation that asks.
        generation: u64,
        /// What.
        work: Work,
        /// What becomes of blocks that lack some pages, where the policy wants it.
        holes: Holes,
        /// Bytes of the copy budget that were taken for it.
        advance: u64,
    },
}

/// What a look found.
pub struct Looked {
    /// The memory that was looked at.
    pub memory: Arc<Memory>,
    /// Which blocks.
    pub look: Look,
    /// Their states.
    pub runs: Vec<HostRun>,
    /// CPU time that it took: on a busy host one that was put aside is no dear one.
    pub took: Duration,
}

/// What an action did.
pub struct Acted {
    /// The memory that was acted on.
    pub memory: Arc<Memory>,
    /// The generation that asked.
    pub generation: u64,
    /// Bytes of the copy budget that were taken for it.
    pub advance: u64,
    /// What came of it.
    pub deed: Deed,
}

/// What came of an action.
#[derive(Default)]
pub struct Deed {
    /// Blocks collapsed with a copy.
    pub copied: u64,
    /// Bytes that these copied.
    pub copied_bytes: u64,
    /// Blocks that the kernel was asked to copy, whether it did or not: what the copy budget is
    /// charged for.
    pub attempts: u64,
    /// Blocks made huge without a copy.
    pub populated: u64,
    /// Blocks made base pages.
    pub demoted: u64,
    /// Attempts that failed.
    pub failed: u64,
    /// How long a collapse took that the guest may have met: it faulted meanwhile.
    pub met: Option<Duration>,
    /// Whether the guest had asked for it.
    pub requested: bool,
    /// How each attempt ended.
    pub outcomes: Vec<(u64, Outcome)>,
    /// The PREPARE whose blocks were all tried, and looked at.
    pub settled: Option<u64>,
    /// Its ranges.
    pub ranges: Vec<(u64, u32)>,
    /// The host states that were seen afterwards, of all blocks that were acted on.
    pub runs: Vec<HostRun>,
    /// Whether they could be seen.
    pub seen: bool,
}

/// Does jobs until the deciding thread ends.
pub fn run(engine: &Engine, jobs: &Receiver<Job>) {
    while let Ok(job) = jobs.recv() {
        match job {
            Job::Look { memory, look } => {
                let start = thread_cpu_time();
                let mut runs = Vec::new();
                let _ = scan(&memory, look.first, look.count, &mut runs);
                engine.looked(Looked {
                    memory,
                    look,
                    runs,
                    took: thread_cpu_time().saturating_sub(start),
                });
            }
            Job::Act { memory, generation, work, holes, advance } => {
                let block_size = 1u64 << engine.settings().block_shift;
                let deed = act(&memory, work, holes, advance / block_size);
                engine.acted(Acted { memory, generation, advance, deed });
            }
        }
    }
}

/// Looks at blocks; whether all of them could be seen.
pub fn scan(memory: &Memory, first: u64, count: u32, runs: &mut Vec<HostRun>) -> bool {
    let result = memory.scan(first, u64::from(count), runs);
    if let Err(error) = &result {
        log::warn!("cannot see how {count} block(s) from {first:#x} on are backed: {error}");
    }
    result.is_ok()
}

/// Does it, and has the kernel copy no more than `leave` blocks.
fn act(memory: &Memory, work: Work, holes: Holes, leave: u64) -> Deed {
    let requested = matches!(work, Work::Populate { .. } | Work::Settle { .. });
    let mut acted = Deed { seen: true, requested, ..Deed::default() };
    let mut results = Vec::new();
    match work {
        Work::Collapse { first, count } => {
            let (faults, start) = (memory.faults(), Instant::now());
            memory.collapse(first, u64::from(count), holes, &mut results);
            // Where nobody can tell, the guest may have met it.
            let met = memory.faults().zip(faults).is_none_or(|(after, before)| after > before);
            acted.met = met.then(|| start.elapsed());
            acted.seen = scan(memory, first, count, &mut acted.runs);
        }
        Work::Populate { first, count } => {
            memory.populate(first, u64::from(count), leave, &mut results);
            acted.seen = scan(memory, first, count, &mut acted.runs);
        }
        Work::Demote { block } => {
            let demoted = memory.demote(block);
            acted.seen = scan(memory, block, 1, &mut acted.runs);
            if acted.runs.iter().any(|run| run.state.is_huge()) {
                log::debug!("block {block:#x} stays huge: {demoted:?}");
                // Not to be tried again and again.
                acted.outcomes.push((block, Outcome::Idle));
            } else {
                acted.demoted += 1;
            }
        }
        Work::Settle { id, ranges } => {
            for &(first, count) in &ranges {
                acted.seen &= scan(memory, first, count, &mut acted.runs);
            }
            acted.settled = Some(id);
            acted.ranges = ranges;
        }
    }
    for (block, result) in results {
        let outcome = match result {
            Ok(Collapsed::Copied { bytes }) => {
                acted.copied += 1;
                acted.copied_bytes += bytes;
                acted.attempts += 1;
                Outcome::Done
            }
            Ok(Collapsed::Populated) => {
                acted.populated += 1;
                Outcome::Done
            }
            // The guest frees it, or fills it only now: its next reports tell.
            Ok(Collapsed::AlreadyHuge) | Err(Refusal::Holes) => Outcome::Idle,
            Err(Refusal::Unaffordable) => Outcome::Deferred,
            Err(Refusal::Absent | Refusal::NotPermitted | Refusal::Gone) => {
                // Nothing was even begun.
                acted.failed += 1;
                Outcome::Failed
            }
            Err(Refusal::Space) => {
                acted.failed += 1;
                Outcome::Lacking
            }
            Err(refusal) => {
                log::debug!("block {block:#x} stays as it is: {refusal:?}");
                acted.attempts += 1;
                acted.failed += 1;
                if refusal == Refusal::NoMemory {
                    Outcome::Lacking
                } else {
                    Outcome::Failed
                }
            }
        };
        acted.outcomes.push((block, outcome));
    }
    acted
}

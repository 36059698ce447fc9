//! The threads on which system calls may block: one looks at the host, one acts.

use super::repair::{Outcome, Work};
use super::scan::Look;
use super::Engine;
use crate::backing::{Collapsed, HostRun, Memory, Refusal};
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
    /// How long it took.
    pub took: Duration,
}

/// What an action did.
#[derive(Default)]
pub struct Acted {
    /// The generation that asked.
    pub generation: u64,
    /// Blocks collapsed with a copy.
    pub copied: u64,
    /// Bytes that these copied.
    pub copied_bytes: u64,
    /// Bytes of the budget that were not copied.
    pub not_copied: u64,
    /// Blocks made huge without a copy.
    pub populated: u64,
    /// Attempts that failed.
    pub failed: u64,
    /// How each attempt ended.
    pub outcomes: Vec<(u64, Outcome)>,
    /// The PREPARE whose blocks were all tried, and looked at.
    pub settled: Option<u64>,
    /// Its ranges.
    pub ranges: Vec<(u64, u32)>,
    /// Their host states.
    pub runs: Vec<HostRun>,
}

/// Does jobs until the deciding thread ends.
pub fn run(engine: &Engine, jobs: &Receiver<Job>) {
    while let Ok(job) = jobs.recv() {
        match job {
            Job::Look { memory, look } => {
                let start = Instant::now();
                let mut runs = Vec::new();
                scan(&memory, look.first, look.count, &mut runs);
                engine.looked(Looked { memory, look, runs, took: start.elapsed() });
            }
            Job::Act { memory, generation, work } => {
                let block_size = 1 << engine.settings().block_shift;
                engine.acted(Acted { generation, ..act(&memory, work, block_size) });
            }
        }
    }
}

fn scan(memory: &Memory, first: u64, count: u32, runs: &mut Vec<HostRun>) {
    if let Err(error) = memory.scan(first, u64::from(count), runs) {
        log::warn!("cannot see how {count} block(s) from {first:#x} on are backed: {error}");
    }
}

fn act(memory: &Memory, work: Work, block_size: u64) -> Acted {
    let mut acted = Acted::default();
    let mut results = Vec::new();
    match work {
        Work::Collapse { first, count } => {
            memory.collapse(first, u64::from(count), &mut results);
        }
        Work::Populate { first, count } => {
            for block in first..first + u64::from(count) {
                results.push((block, memory.populate(block)));
            }
        }
        Work::Settle { id, ranges } => {
            for &(first, count) in &ranges {
                scan(memory, first, count, &mut acted.runs);
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
                Outcome::Done
            }
            Ok(Collapsed::Populated) => {
                acted.populated += 1;
                acted.not_copied += block_size;
                Outcome::Done
            }
            Ok(Collapsed::AlreadyHuge) => {
                acted.not_copied += block_size;
                Outcome::Idle
            }
            Err(Refusal::Absent | Refusal::NotPermitted | Refusal::Space | Refusal::Gone) => {
                // Nothing was even begun.
                acted.not_copied += block_size;
                acted.failed += 1;
                Outcome::Failed
            }
            Err(refusal) => {
                log::debug!("block {block:#x} stays as it is: {refusal:?}");
                acted.failed += 1;
                Outcome::Failed
            }
        };
        acted.outcomes.push((block, outcome));
    }
    acted
}

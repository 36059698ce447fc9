//! What one pass found and did.

use std::collections::BTreeMap;

use serde::{Serialize, Serializer};

use crate::kernel::Thp;
use crate::plan::{Candidate, Skip};

/// One pass over all processes.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The agent's version.
    pub version: &'static str,
    /// Nothing was promoted on purpose.
    pub dry_run: bool,
    /// The system's setting.
    pub thp: Thp,
    /// Fragmentation of free memory when the pass began, 0 to 1.
    pub fmfi: f64,
    /// Whether there is a driver to tell where the host has huge pages.
    pub driver: bool,
    /// Blocks of guest memory on host huge pages; 0 where nothing was found to
    /// promote, so that nobody asked.
    pub host_huge_blocks: u64,
    /// No process was looked at: nothing could be promoted the last time, and all
    /// together have as much memory as then.
    pub unchanged: bool,
    /// Processes whose page tables were looked at.
    pub processes: u64,
    /// Processes that were passed over because nothing has changed in them.
    pub quiet: u64,
    /// Processes that ended, or could not be looked at, meanwhile.
    pub unreadable: u64,
    /// Processes that declined huge pages as a whole.
    pub opted_out_processes: u64,
    /// Ranges with base pages that were left alone, by reason.
    pub skipped: BTreeMap<Skip, u64>,
    /// The plan, in the order in which it was carried out.
    pub ranges: Vec<Planned>,
    /// Ranges that are huge now.
    pub promoted: u64,
    /// Ranges that the kernel did not promote.
    pub failed: u64,
    /// The plan was ended early: no free huge page was left, or it was time to
    /// look again.
    pub ended_early: bool,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// CPU seconds of the agent, the kernel's work for it included.
    pub cpu_seconds: f64,
}

impl Report {
    /// A range was left alone.
    pub fn skip(&mut self, reason: Skip) {
        *self.skipped.entry(reason).or_default() += 1;
    }
}

/// A range of the plan.
#[derive(Debug, Serialize)]
pub struct Planned {
    /// Whose it is.
    pub pid: i32,
    /// Where it starts.
    pub address: u64,
    /// Base pages present.
    pub present: u64,
    /// Those of them on host huge pages.
    pub on_host_huge: u64,
    /// Most pages are on host huge pages.
    pub type2: bool,
    /// What became of it.
    pub outcome: Outcome,
}

impl Planned {
    /// What became of `candidate`.
    #[must_use]
    pub fn new(candidate: &Candidate, outcome: Outcome) -> Self {
        Planned {
            pid: candidate.process.pid,
            address: candidate.address,
            present: candidate.present,
            on_host_huge: candidate.on_host_huge,
            type2: candidate.is_type2(),
            outcome,
        }
    }
}

/// What became of a range of the plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is a huge page now, as its page table shows.
    Promoted,
    /// A dry run leaves it at the plan.
    Planned,
    /// Left alone when its turn came.
    Skipped(Skip),
    /// Its process is gone, or has changed it.
    Gone,
    /// The kernel did not do it.
    Failed(String),
    /// The pass ended before.
    NotTried,
}

impl Serialize for Outcome {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Outcome::Promoted => serializer.serialize_str("promoted"),
            Outcome::Planned => serializer.serialize_str("planned"),
            Outcome::Skipped(reason) => reason.serialize(serializer),
            Outcome::Gone => serializer.serialize_str("gone"),
            Outcome::Failed(error) => serializer.serialize_str(&format!("failed: {error}")),
            Outcome::NotTried => serializer.serialize_str("not_tried"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_are_plain_words() {
        let text = |outcome| serde_json::to_string(&outcome).expect("plain data");
        assert_eq!(text(Outcome::Promoted), r#""promoted""#);
        assert_eq!(text(Outcome::Skipped(Skip::Headroom)), r#""headroom""#);
        assert_eq!(text(Outcome::Failed("busy".into())), r#""failed: busy""#);
    }
}

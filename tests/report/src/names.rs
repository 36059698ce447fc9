//! The policies, states and workloads of the evaluation, in the order in which pages show them.

/// How a policy stands to the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Base pages only: what memory use and performance are measured against.
    Base,
    /// Huge pages that guest and host make without knowing of each other.
    Uncoordinated,
    /// Huge pages set aside at both layers: the upper bound.
    Static,
    /// This project.
    Gemini,
    /// This project without one of its components.
    Ablation,
}

/// A policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Its name in records.
    pub name: &'static str,
    /// How it stands to the others.
    pub kind: Kind,
    /// What it is, in a line.
    pub what: &'static str,
}

/// The policy that others are measured against.
pub const BASE: &str = "none";
/// The project's own.
pub const GEMINI: &str = "gemini";
/// The same, with more huge pages of the host under the guest's kernel.
pub const GEMINI_KERNEL: &str = "gemini-kernel";
/// The upper bound.
pub const STATIC: &str = "hugetlb";

/// Every policy.
pub const POLICIES: [Policy; 15] = [
    Policy { name: BASE, kind: Kind::Base, what: "base pages at both layers" },
    uncoordinated(
        "misaligned",
        "as many huge pages at the host as in the guest, none on the same block: the worst that \
         can happen (the paper's has base pages in the guest)",
    ),
    uncoordinated(
        "thp",
        "Linux's transparent huge pages, always, at both layers, from the guest's boot on",
    ),
    uncoordinated(
        "kubevirt-like",
        "the host collapses all that is resident, once the data is loaded",
    ),
    uncoordinated(
        "ingens-like",
        "an emulation of Ingens at the host, from the boot on, without its access bits; Linux's \
         THP in the guest (the paper ran Ingens at both)",
    ),
    uncoordinated("hawkeye-like", "the same of HawkEye"),
    Policy {
        name: STATIC,
        kind: Kind::Static,
        what: "the host's from a pool, set aside for all of the guest; a guest whose memory is \
               whole, with THP and without the driver",
    },
    Policy { name: GEMINI, kind: Kind::Gemini, what: "this project, all of it" },
    Policy {
        name: GEMINI_KERNEL,
        kind: Kind::Gemini,
        what: "the same, and the host's huge pages under all that the guest's kernel has for \
               itself; where the host is fragmented, under what it works with much",
    },
    without("gemini-no-placement", "guest huge pages are not put on ready blocks"),
    without("gemini-no-booking", "no block is held for a huge page"),
    without("gemini-no-bucket", "freed blocks are not held back whole"),
    without("gemini-no-prepare", "no stock of blocks is made ready ahead"),
    without("gemini-no-repair", "the host collapses nothing that the guest did not ask for"),
    without("gemini-no-promoter", "the guest's agent promotes nothing"),
];

const fn uncoordinated(name: &'static str, what: &'static str) -> Policy {
    Policy { name, kind: Kind::Uncoordinated, what }
}

const fn without(name: &'static str, what: &'static str) -> Policy {
    Policy { name, kind: Kind::Ablation, what }
}

/// Names of the policies of one kind.
pub fn policies(kind: Kind) -> impl Iterator<Item = &'static str> {
    POLICIES.iter().filter(move |policy| policy.kind == kind).map(|policy| policy.name)
}

/// Names of all policies but those without a component.
pub fn main_policies() -> impl Iterator<Item = &'static str> {
    POLICIES.iter().filter(|policy| policy.kind != Kind::Ablation).map(|policy| policy.name)
}

/// How memory was before the workload started.
pub const STATES: [&str; 3] = ["unfragmented", "fragmented", "scarce"];
/// Whether another workload was there before.
pub const VMS: [&str; 2] = ["clean", "reused"];
/// The state that bars are for, as in the paper.
pub const FRAGMENTED: &str = "fragmented";

/// The workloads that are known, and the paper's most like them; others are shown after these.
pub const WORKLOADS: [(&str, Option<&str>); 11] = [
    ("redis", Some("Redis")),
    ("memcached", Some("Memcached")),
    ("rocksdb", Some("RocksDB")),
    ("xapian", Some("Xapian")),
    ("liblinear", Some("SVM")),
    ("cg", Some("CG.D")),
    ("h2", None),
    // An in-memory database with transactions like TPC-C's, too.
    ("sqlite-memory", Some("Silo")),
    (MICROBENCHMARK, None),
    ("zstd", None),
    ("sqlite-disk", None),
];

/// Workloads for which TLB misses are no cost worth speaking of.
pub const INDIFFERENT: [&str; 2] = ["zstd", "sqlite-disk"];

/// A program that only reads at random: no workload that anybody has.
pub const MICROBENCHMARK: &str = "reader";

/// The place of `workload` among the known ones; unknown ones come last.
#[must_use]
pub fn workload_rank(workload: &str) -> usize {
    WORKLOADS.iter().position(|(known, _)| *known == workload).unwrap_or(WORKLOADS.len())
}

/// What the paper calls a workload that is most like `workload`.
#[must_use]
pub fn in_paper(workload: &str) -> Option<&'static str> {
    WORKLOADS.iter().find(|(known, _)| *known == workload).and_then(|(_, paper)| *paper)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indifferent_workloads_are_known_and_every_name_is_there_once() {
        for workload in INDIFFERENT {
            assert!(workload_rank(workload) < WORKLOADS.len());
        }
        let mut names: Vec<_> = POLICIES.iter().map(|policy| policy.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), POLICIES.len());
    }
}

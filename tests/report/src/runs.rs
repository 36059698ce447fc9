//! The runs that pages are made from, and the questions that are asked of them.

use std::collections::BTreeMap;

use crate::metrics::{Better, Metric};
use crate::names::{self, STATIC};
use crate::record::{Record, Records, Run};
use crate::stats::Summary;

/// Which runs: all repetitions of one policy somewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place<'a> {
    /// Name of the workload.
    pub workload: &'a str,
    /// Name of the policy.
    pub policy: &'a str,
    /// Before the workload started.
    pub state: &'a str,
    /// `clean` or `reused`.
    pub vm: &'a str,
}

impl<'a> Place<'a> {
    fn of(record: &'a Record) -> Self {
        let Run { workload, policy, state, vm, .. } = &record.run;
        Place { workload, policy, state, vm }
    }

    /// The same place under another policy.
    #[must_use]
    pub fn under(self, policy: &'a str) -> Self {
        Place { policy, ..self }
    }
}

/// Runs that may be compared.
#[derive(Clone, Debug)]
pub struct Runs {
    /// Ordered by what was run, so that the runs of a place are neighbours.
    records: Vec<Record>,
    /// Records of quick runs that were left out, because there are full ones.
    pub quick_left_out: usize,
    /// Files that were left out, and why.
    pub unreadable: Vec<(String, String)>,
}

/// What there is of one policy somewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// Runs with figures.
    Runs(usize),
    /// Runs, and all of them failed.
    Failed,
    /// No run.
    Nothing,
}

impl Runs {
    /// Quick runs count only where there are no others: they show that it works, and measure less.
    #[must_use]
    pub fn select(records: Records) -> Self {
        let Records { all, unreadable } = records;
        let (quick, full): (Vec<_>, Vec<_>) = all.into_iter().partition(Record::quick);
        let (mut records, quick_left_out) =
            if full.is_empty() { (quick, 0) } else { (full, quick.len()) };
        records.sort_by(|one, other| one.run.cmp(&other.run));
        Runs { records, quick_left_out, unreadable }
    }

    /// All of them, those that failed included.
    #[must_use]
    pub fn all(&self) -> &[Record] {
        &self.records
    }

    /// Those that failed.
    pub fn failed(&self) -> impl Iterator<Item = (&Record, &str)> {
        self.records.iter().filter_map(|record| Some((record, record.failure.as_deref()?)))
    }

    /// Whether the runs only show that it works.
    #[must_use]
    pub fn quick(&self) -> bool {
        self.records.iter().all(Record::quick)
    }

    /// Whether a guest was emulated: then wall times show nothing of TLBs, and TLB figures are
    /// simulated.
    #[must_use]
    pub fn emulated(&self) -> bool {
        !self.records.iter().all(Record::on_hardware)
    }

    /// Names of the workloads, known ones first.
    #[must_use]
    pub fn workloads(&self) -> Vec<&str> {
        let mut names: Vec<_> =
            self.records.iter().map(|record| record.run.workload.as_str()).collect();
        names.dedup();
        names.sort_by_key(|name| names::workload_rank(name));
        names
    }

    /// Names of the workloads that were run, or tried, with memory and VM like that.
    #[must_use]
    pub fn workloads_at(&self, state: &str, vm: &str) -> Vec<&str> {
        let there = |run: &Run| run.state == state && run.vm == vm;
        let at = |name: &&str| {
            self.records.iter().any(|record| there(&record.run) && record.run.workload == *name)
        };
        self.workloads().into_iter().filter(at).collect()
    }

    /// The runs of `place` with figures, in the order of their repetitions.
    #[must_use]
    pub fn at(&self, place: Place) -> Vec<&Record> {
        self.tried_at(place).iter().filter(|record| record.failure.is_none()).collect()
    }

    /// Those that failed, too.
    fn tried_at(&self, place: Place) -> &[Record] {
        let start = self.records.partition_point(|record| Place::of(record) < place);
        let end = self.records.partition_point(|record| Place::of(record) <= place);
        &self.records[start..end]
    }

    /// What there is of `place`.
    #[must_use]
    pub fn done(&self, place: Place) -> Done {
        match self.at(place).len() {
            0 if !self.tried_at(place).is_empty() => Done::Failed,
            0 => Done::Nothing,
            runs => Done::Runs(runs),
        }
    }

    /// A figure at `place`, over its repetitions.
    #[must_use]
    pub fn summary(&self, place: Place, metric: Metric) -> Option<Summary> {
        Summary::of(self.at(place).into_iter().filter_map(metric.of).collect())
    }

    /// A figure at `place` as a ratio to the median under the policy `base` at the same place.
    #[must_use]
    pub fn relative(&self, place: Place, base: &str, metric: Metric) -> Option<Summary> {
        let base = self.summary(place.under(base), metric)?;
        self.summary(place, metric)?.relative_to(base.median)
    }

    /// The upper bound at `place`: static huge pages there, else in unfragmented memory, where
    /// they have to be taken from in any case.
    #[must_use]
    pub fn upper_bound(&self, place: Place, metric: Metric) -> Option<Summary> {
        let place = place.under(STATIC);
        self.summary(place, metric)
            .or_else(|| self.summary(Place { state: "unfragmented", ..place }, metric))
    }

    /// The best policy among `others` at `place`, and its median.
    pub fn best<'a>(
        &self,
        place: Place,
        others: impl Iterator<Item = &'a str>,
        metric: Metric,
    ) -> Option<(&'a str, f64)> {
        let medians = others
            .filter_map(|policy| Some((policy, self.summary(place.under(policy), metric)?.median)));
        medians.reduce(|best, other| if better(metric, other.1, best.1) { other } else { best })
    }

    /// The values that an argument has, with the number of runs that have it.
    #[must_use]
    pub fn argument(&self, name: &str) -> BTreeMap<String, usize> {
        self.count(|record| record.argument(name))
    }

    /// Counts what `of` says of each run.
    #[must_use]
    pub fn count(&self, of: impl Fn(&Record) -> Option<String>) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for value in self.records.iter().filter_map(of) {
            *counts.entry(value).or_default() += 1;
        }
        counts
    }
}

/// Whether `value` is better than `other`.
#[must_use]
pub fn better(metric: Metric, value: f64, other: f64) -> bool {
    match metric.better {
        Better::Higher => value > other,
        Better::Lower => value < other,
    }
}

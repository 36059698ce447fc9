//! What is run, in which order, and how long it will take.

use std::collections::BTreeMap;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::policy::Policy;

/// How much of memory can be huge.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Free memory is whole at both layers.
    Unfragmented,
    /// Free memory is fragmented at both layers.
    Fragmented,
    /// The guest's is fragmented, and the host has huge pages for a quarter of it.
    Scarce,
}

/// What ran in a guest before.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Vm {
    /// Nothing.
    Clean,
    /// A program of the same size, which has ended.
    Reused,
}

/// One run.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Run {
    /// The program that is measured.
    pub workload: String,
    /// What the guest runs under.
    pub policy: Policy,
    /// How much of memory can be huge.
    pub state: State,
    /// What ran in the guest before.
    pub vm: Vm,
    /// Seed of everything random.
    pub seed: u64,
    /// Number of the repetition, from 0 on; each has a seed of its own.
    pub repetition: u32,
}

impl Run {
    /// Name of its record's file.
    #[must_use]
    pub fn file_name(&self) -> String {
        format!("{}.json", self.to_string().replace(' ', "_"))
    }

    /// Why it cannot be, if it cannot.
    #[must_use]
    pub fn impossible(&self) -> Option<&'static str> {
        let scarce = self.policy == Policy::Hugetlb && self.state == State::Scarce;
        scarce.then_some("a guest whose huge pages cannot all be set aside does not start")
    }
}

impl std::fmt::Display for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (policy, state) = (self.policy.name(), super::name_of(self.state));
        let vm = super::name_of(self.vm);
        write!(f, "{} {policy} {state} {vm} {}", self.workload, self.repetition)
    }
}

/// What is to be run.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// Names of programs.
    pub workloads: Vec<String>,
    /// Policies.
    pub policies: Vec<Policy>,
    /// States of memory.
    pub states: Vec<State>,
    /// Histories of guests.
    pub vms: Vec<Vm>,
    /// How often.
    pub repetitions: u32,
    /// Seed of the first repetition.
    pub seed: u64,
}

impl Matrix {
    /// All runs in order: those that are compared with each other, which differ in
    /// nothing but the policy, follow each other, so that an evaluation that was
    /// broken off is one of fewer workloads. Each time another policy is the first,
    /// so that none has always the machine that the last one has left.
    #[must_use]
    pub fn runs(&self) -> Vec<Run> {
        let mut runs = Vec::new();
        let mut groups = 0;
        for repetition in 0..self.repetitions {
            for &state in &self.states {
                for &vm in &self.vms {
                    for workload in &self.workloads {
                        let mut policies = self.policies.clone();
                        policies.rotate_left(groups % self.policies.len().max(1));
                        groups += 1;
                        runs.extend(policies.into_iter().map(|policy| Run {
                            workload: workload.clone(),
                            policy,
                            state,
                            vm,
                            seed: self.seed + u64::from(repetition),
                            repetition,
                        }));
                    }
                }
            }
        }
        runs
    }
}

/// How long runs take, learnt from those that are done.
#[derive(Clone, Debug, Default)]
pub struct Pace {
    /// Sum of the seconds, and number, by workload.
    done: BTreeMap<String, (f64, u32)>,
}

impl Pace {
    /// A run of `workload` took `seconds`.
    pub fn add(&mut self, workload: &str, seconds: f64) {
        let (sum, count) = self.done.entry(workload.to_owned()).or_default();
        *sum += seconds;
        *count += 1;
    }

    /// Seconds that `runs` will take, if anything is known: each as long as those
    /// of its workload, or as long as all in the mean.
    #[must_use]
    pub fn estimate<'a>(&self, runs: impl IntoIterator<Item = &'a Run>) -> Option<f64> {
        let all = self.done.values().fold((0.0, 0), |all, one| (all.0 + one.0, all.1 + one.1));
        if all.1 == 0 {
            return None;
        }
        let mean = |(sum, count): (f64, u32)| sum / f64::from(count);
        let of = |run: &Run| mean(self.done.get(&run.workload).copied().unwrap_or(all));
        Some(runs.into_iter().map(of).sum())
    }
}

#[cfg(test)]
mod tests {
    use super::super::name_of;
    use super::super::program::READER;
    use super::*;
    use crate::workload::OF_IMAGE;

    fn matrix() -> Matrix {
        Matrix {
            workloads: vec!["a".into(), "b".into()],
            policies: vec![Policy::None, Policy::Thp, Policy::Gemini],
            states: vec![State::Fragmented, State::Scarce],
            vms: vec![Vm::Clean, Vm::Reused],
            repetitions: 2,
            seed: 7,
        }
    }

    #[test]
    fn what_is_compared_follows_each_other_and_repetitions_come_last() {
        let runs = matrix().runs();
        assert_eq!(runs.len(), 2 * 3 * 2 * 2 * 2);
        for group in runs.chunks(3) {
            let same = |run: &Run| Run { policy: Policy::None, ..run.clone() };
            assert!(group.iter().all(|run| same(run) == same(&group[0])), "{group:?}");
            let mut policies: Vec<_> = group.iter().map(|run| run.policy).collect();
            policies.sort();
            assert_eq!(policies, [Policy::None, Policy::Thp, Policy::Gemini]);
        }
        assert!(runs[..24].iter().all(|run| run.repetition == 0 && run.seed == 7));
        assert!(runs[24..].iter().all(|run| run.repetition == 1 && run.seed == 8));
        let firsts: Vec<_> = runs.chunks(3).take(3).map(|group| group[0].policy).collect();
        assert_eq!(firsts, [Policy::None, Policy::Thp, Policy::Gemini]);
    }

    /// What two programs know by themselves, and have to know alike.
    #[test]
    fn the_report_knows_all_that_can_be_run_and_nothing_else() {
        use gemini_report::names;
        let policies: Vec<_> = names::POLICIES.iter().map(|policy| policy.name).collect();
        let ours: Vec<_> = Policy::value_variants().iter().map(|policy| policy.name()).collect();
        assert_eq!(policies, ours);
        let ours: Vec<_> = State::value_variants().iter().copied().map(name_of).collect();
        assert_eq!(names::STATES.as_slice(), ours);
        let ours: Vec<_> = Vm::value_variants().iter().copied().map(name_of).collect();
        assert_eq!(names::VMS.as_slice(), ours);

        let kinds = [&[READER], &OF_IMAGE[..]].concat();
        let sorted = |mut names: Vec<&'static str>| {
            names.sort_unstable();
            names
        };
        let known = names::WORKLOADS.iter().map(|(name, _)| *name).collect();
        assert_eq!(sorted(known), sorted(kinds.iter().map(|kind| kind.name).collect()));
        let indifferent = kinds.iter().filter(|kind| kind.indifferent).map(|kind| kind.name);
        assert_eq!(sorted(names::INDIFFERENT.to_vec()), sorted(indifferent.collect()));
    }

    #[test]
    fn every_run_has_a_file_of_its_own() {
        let mut names: Vec<_> = matrix().runs().iter().map(Run::file_name).collect();
        assert_eq!(names[0], "a_none_fragmented_clean_0.json");
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 48);
    }

    #[test]
    fn estimate_goes_by_the_workload_and_else_by_the_mean() {
        let runs = matrix().runs();
        let (a, b) = (&runs[0], &runs[3]);
        assert_eq!((a.workload.as_str(), b.workload.as_str()), ("a", "b"));
        let mut pace = Pace::default();
        assert_eq!(pace.estimate([a]), None);
        pace.add("a", 10.0);
        pace.add("a", 20.0);
        assert_eq!(pace.estimate([a, b]), Some(30.0));
        pace.add("b", 3.0);
        assert_eq!(pace.estimate([a, b]), Some(18.0));
        assert_eq!(pace.estimate([]), Some(0.0));
    }
}

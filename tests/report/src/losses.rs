//! Where `gemini` loses or ties: its figures against the best of what needs no coordination.

use crate::document::{share, significant};
use crate::metrics::{
    Better, Metric, ALIGNED_COVERAGE, ALIGNED_RATE, MISSES, THROUGHPUT, TLB_CYCLES, USER_MISSES,
};
use crate::names::{policies, Kind, BASE, GEMINI, INDIFFERENT, STATES, VMS};
use crate::record::Alignment;
use crate::runs::{Place, Runs};
use crate::stats::Summary;

/// Better by less than this is a tie.
pub const MARGIN: f64 = 0.02;

/// Coverages that differ by less are alike: about a block in 200.
const ALIKE: f64 = 0.005;

/// How `gemini` stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Better by the margin at least.
    Wins,
    /// Neither better nor worse by the margin.
    Ties,
    /// Worse by the margin at least.
    Loses,
}

/// One figure somewhere, against the best alternative.
#[derive(Clone, Debug)]
pub struct Comparison<'a> {
    /// Where.
    pub place: Place<'a>,
    /// What is compared.
    pub metric: Metric,
    /// Median under `gemini`.
    pub gemini: f64,
    /// The best alternative.
    pub other: &'a str,
    /// Its median.
    pub best: f64,
    /// How much better `gemini` is, as a share of the alternative's figure.
    pub advantage: f64,
    /// How it stands.
    pub outcome: Outcome,
}

/// Policies that need no coordination of guest and host, base pages included.
pub fn alternatives() -> impl Iterator<Item = &'static str> {
    std::iter::once(BASE).chain(policies(Kind::Uncoordinated))
}

/// Figures that are compared. Wall times of an emulated guest are not: they show nothing of TLBs.
#[must_use]
pub fn metrics(runs: &Runs) -> Vec<Metric> {
    let mut metrics = vec![ALIGNED_RATE, ALIGNED_COVERAGE, MISSES, TLB_CYCLES];
    if !runs.emulated() {
        metrics.push(THROUGHPUT);
    }
    metrics
}

/// Every comparison that the runs allow.
#[must_use]
pub fn compare(runs: &Runs) -> Vec<Comparison<'_>> {
    let mut comparisons = Vec::new();
    for metric in metrics(runs) {
        for state in STATES {
            for vm in VMS {
                for workload in runs.workloads() {
                    let place = Place { workload, policy: GEMINI, state, vm };
                    comparisons.extend(compare_at(runs, place, metric));
                }
            }
        }
    }
    comparisons
}

fn compare_at<'a>(runs: &Runs, place: Place<'a>, metric: Metric) -> Option<Comparison<'a>> {
    let gemini = runs.summary(place, metric)?.median;
    let (other, best) = runs.best(place, alternatives(), metric)?;
    let advantage = advantage(metric, gemini, best);
    let outcome = if advantage >= MARGIN {
        Outcome::Wins
    } else if advantage > -MARGIN {
        Outcome::Ties
    } else {
        Outcome::Loses
    };
    Some(Comparison { place, metric, gemini, other, best, advantage, outcome })
}

/// How much better `gemini` is than `best`, as a share of `best`.
fn advantage(metric: Metric, gemini: f64, best: f64) -> f64 {
    let more = match best {
        _ if gemini == best => 0.0,
        0.0 => f64::INFINITY,
        best => gemini / best - 1.0,
    };
    match metric.better {
        Better::Higher => more,
        Better::Lower => -more,
    }
}

/// Whether the kernel's misses, so many `more` than under the other policy, are most of the
/// difference beside those of programs, or more than all of it; and are a difference at all, of
/// what that policy has in `total`.
fn is_of_kernel(more: f64, of_programs: f64, total: f64) -> bool {
    more >= MARGIN * total && more > of_programs
}

/// What the runs show of why `gemini` is not better there.
#[must_use]
pub fn reason(runs: &Runs, comparison: &Comparison) -> String {
    let Comparison { place, metric, other, .. } = comparison;
    let coverage = |policy| Some(runs.summary(place.under(policy), ALIGNED_COVERAGE)?.median);
    let (gemini, theirs) = (coverage(GEMINI), coverage(other));
    if metric.name == ALIGNED_RATE.name {
        return lone_blocks(runs, *place);
    }
    let indifferent = INDIFFERENT.contains(&place.workload);
    let misses = |policy| {
        let of_programs = runs.summary(place.under(policy), USER_MISSES)?.median;
        Some((of_programs, runs.summary(place.under(policy), MISSES)?.median - of_programs))
    };
    if let (Some((ours, our_kernels)), Some((theirs, their_kernels))) =
        (misses(GEMINI), misses(other))
    {
        let (more, of_programs) = (our_kernels - their_kernels, ours - theirs);
        let of_kernel = if metric.name == MISSES.name {
            is_of_kernel(more, of_programs, theirs + their_kernels)
        } else {
            // Most of these cycles are hits of the second level, which misses stand in for.
            metric.name == TLB_CYCLES.name && more > of_programs
        };
        if of_kernel && !indifferent {
            return format!(
                "the guest's kernel, whose addresses the host's pages alone decide: programs miss \
                 {} times an operation there, {} here",
                significant(theirs),
                significant(ours)
            );
        }
    }
    match (gemini, theirs) {
        (Some(gemini), Some(theirs)) if metric.name == ALIGNED_COVERAGE.name => {
            if theirs >= 1.0 - ALIKE && gemini >= 1.0 - ALIKE {
                return "nearly all memory is aligned under both".into();
            }
            format!("{} of user memory is not in aligned blocks", share(1.0 - gemini))
        }
        _ if indifferent => "the workload is indifferent to the TLB".into(),
        (Some(gemini), Some(theirs)) if (gemini - theirs).abs() < ALIKE => {
            format!("as much is aligned there: coverage {}, here {}", share(theirs), share(gemini))
        }
        (Some(gemini), Some(theirs)) if gemini < theirs => {
            format!("more is aligned there: coverage {}, here {}", share(theirs), share(gemini))
        }
        (Some(gemini), Some(theirs)) => format!(
            "not explained by alignment: coverage {} there, {} here",
            share(theirs),
            share(gemini)
        ),
        _ => "alignment was not measured".into(),
    }
}

/// Blocks that only one layer has huge: what lowers the rate.
fn lone_blocks(runs: &Runs, place: Place) -> String {
    let lone = |of: fn(&Alignment) -> Option<f64>| {
        let found = runs.at(place).into_iter().filter_map(|run| run.alignment.as_ref());
        Summary::of(found.filter_map(|found| Some(of(found)? - found.aligned?)).collect())
    };
    match (lone(|found| found.guest_huge), lone(|found| found.host_huge)) {
        (Some(guest), Some(host)) => format!(
            "{:.0} blocks are huge in the guest alone, {:.0} in use or held in the host alone",
            guest.median, host.median
        ),
        _ => "the counts of huge blocks were not had".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advantage_is_positive_where_gemini_is_better() {
        assert_eq!(advantage(MISSES, 50.0, 100.0), 0.5);
        assert_eq!(advantage(THROUGHPUT, 150.0, 100.0), 0.5);
        assert_eq!(advantage(MISSES, 0.0, 0.0), 0.0);
        assert_eq!(advantage(MISSES, 1.0, 0.0), f64::NEG_INFINITY);
        assert_eq!(advantage(ALIGNED_RATE, 0.9, 0.0), f64::INFINITY);
    }

    #[test]
    fn the_kernel_is_the_reason_only_where_it_misses_more() {
        assert!(is_of_kernel(1.5, 0.5, 1.0));
        assert!(is_of_kernel(1.5, -20.0, 25.0));
        assert!(!is_of_kernel(0.5, 1.5, 1.0));
        // Both miss less, programs by more: then it is not the kernel that is to blame.
        assert!(!is_of_kernel(-4.0, -10.0, 100.0));
        assert!(!is_of_kernel(6.0, -10.0, 1000.0));
    }
}

//! What each component of `gemini` brings: what is lost without it, as a share of all that
//! `gemini` gains over base pages.

use crate::metrics::{Better, Metric, ALIGNED_COVERAGE};
use crate::names::{BASE, GEMINI};
use crate::runs::{Place, Runs};

/// The least gain over base pages, as a share of theirs, whose parts are worth telling. Below
/// it, shares are noise over noise.
pub const LEAST_GAIN: f64 = 0.10;

/// Share of the gain in `metric` at `place` that is lost under the policy there. It is negative
/// where that one is better than all of `gemini`. None where something was not measured, or the
/// gain is less than [`LEAST_GAIN`].
#[must_use]
pub fn share_of_gain(runs: &Runs, place: Place, metric: Metric) -> Option<f64> {
    let median = |policy| Some(runs.summary(place.under(policy), metric)?.median);
    let (base, gemini, part) = (median(BASE)?, median(GEMINI)?, median(place.policy)?);
    let better_by = |value: f64, other: f64| match metric.better {
        Better::Higher => value - other,
        Better::Lower => other - value,
    };
    let gain = better_by(gemini, base);
    // A coverage is a share already, and that of base pages may be 0.
    let least = if metric.name == ALIGNED_COVERAGE.name { LEAST_GAIN } else { LEAST_GAIN * base };
    (gain > 0.0 && gain >= least).then(|| better_by(gemini, part) / gain)
}

/// The shares of all workloads that have one.
#[must_use]
pub fn shares<'a>(
    runs: &'a Runs,
    policy: &'a str,
    state: &'a str,
    vm: &'a str,
    metric: Metric,
) -> Vec<f64> {
    let at = |workload| Place { workload, policy, state, vm };
    let workloads = runs.workloads().into_iter();
    workloads.filter_map(|workload| share_of_gain(runs, at(workload), metric)).collect()
}

//! What the evaluation must show, and whether it does.
//!
//! A goal is met only by all that it asks for: with fewer workloads than Table 3 has to have, or
//! without one of the policies, it counts as not measured, or as missed if what there is falls
//! short already. Reuse asks for no number of workloads.

use crate::ablation;
use crate::document::{percent, share, significant, Cell};
use crate::losses::{self, Outcome};
use crate::metrics::{
    Metric, ALIGNED_COVERAGE, ALIGNED_RATE, ALL_MISSES, COPIED_PER_BLOCK, CPU_PER_BLOCK, CYCLES,
    HOST_RSS, INSTRUCTIONS, MISSES, REUSED, TLB_CYCLES, USER_MISSES,
};
use crate::names::{
    policies, Kind, BASE, FRAGMENTED, GEMINI, GEMINI_KERNEL, INDIFFERENT, MICROBENCHMARK, STATES,
    VMS,
};
use crate::paper;
use crate::runs::{Place, Runs};
use crate::stats::{geometric_mean, mean};

/// Workloads that Table 3 has to have.
const WORKLOADS: usize = 8;

/// Workloads that have to have 83 % fewer misses.
const FEWER_ON: usize = 3;

/// What became of a goal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The bar is reached.
    Met,
    /// It is not.
    Missed,
    /// There is no bar, and the figure is there.
    Told,
    /// The figure is not there, or not all of it.
    NotMeasured,
}

impl Verdict {
    /// As a cell of a table.
    #[must_use]
    pub fn cell(self) -> Cell {
        match self {
            Verdict::Met => Cell::Met,
            Verdict::Missed => Cell::Missed,
            Verdict::Told => Cell::text("told"),
            Verdict::NotMeasured => Cell::text("not measured"),
        }
    }
}

/// One thing that the evaluation must show.
#[derive(Clone, Debug)]
pub struct Goal {
    /// Its name, for notes.
    pub id: &'static str,
    /// What it is about.
    pub what: &'static str,
    /// What has to be reached.
    pub bar: &'static str,
    /// What was measured.
    pub figure: String,
    /// Whether that reaches it.
    pub verdict: Verdict,
    /// What the paper tells.
    pub paper: &'static str,
}

/// Every goal, in order.
#[must_use]
pub fn goals(runs: &Runs) -> Vec<Goal> {
    let mut goals = Vec::new();
    table_3(runs, &mut goals);
    misses(runs, &mut goals);
    reuse(runs, &mut goals);
    costs(runs, &mut goals);
    ablation(runs, &mut goals);
    losses(runs, &mut goals);
    goals
}

/// Medians of the workloads under `policy`, memory fragmented.
fn medians<'a>(runs: &'a Runs, policy: &str, vm: &str, metric: Metric) -> Vec<(&'a str, f64)> {
    let of = |workload| {
        let place = Place { workload, policy, state: FRAGMENTED, vm };
        Some((workload, runs.summary(place, metric)?.median))
    };
    runs.workloads().into_iter().filter_map(of).collect()
}

/// Medians relative to those under `base`, in a clean VM with memory fragmented.
fn ratios<'a>(runs: &'a Runs, base: &str, metric: Metric) -> Vec<(&'a str, f64)> {
    let of = |workload| {
        let place = Place { workload, policy: GEMINI, state: FRAGMENTED, vm: "clean" };
        Some((workload, runs.relative(place, base, metric)?.median))
    };
    runs.workloads().into_iter().filter_map(of).collect()
}

fn values(named: &[(&str, f64)]) -> Vec<f64> {
    named.iter().map(|(_, value)| *value).collect()
}

fn lowest<'a>(named: &[(&'a str, f64)]) -> Option<(&'a str, f64)> {
    named.iter().copied().min_by(|one, other| one.1.total_cmp(&other.1))
}

fn highest<'a>(named: &[(&'a str, f64)]) -> Option<(&'a str, f64)> {
    named.iter().copied().max_by(|one, other| one.1.total_cmp(&other.1))
}

fn verdict(met: bool) -> Verdict {
    if met {
        Verdict::Met
    } else {
        Verdict::Missed
    }
}

/// Met only if `complete`.
fn verdict_of_part(met: bool, complete: bool) -> Verdict {
    match (met, complete) {
        (true, false) => Verdict::NotMeasured,
        (met, _) => verdict(met),
    }
}

/// A goal whose figure may be missing.
fn goal(
    id: &'static str,
    what: &'static str,
    bar: &'static str,
    paper: &'static str,
    found: Option<(String, Verdict)>,
) -> Goal {
    let (figure, verdict) = found.unwrap_or(("n/m".into(), Verdict::NotMeasured));
    Goal { id, what, bar, figure, verdict, paper }
}

fn over(workloads: usize) -> String {
    format!("{workloads} workload{}", if workloads == 1 { "" } else { "s" })
}

fn cares(workload: &str) -> bool {
    !INDIFFERENT.contains(&workload) && workload != MICROBENCHMARK
}

fn table_3(runs: &Runs, goals: &mut Vec<Goal>) {
    // As the paper's: of workloads that benefit. The others are judged by themselves.
    let of_gemini = |metric, counts: fn(&str) -> bool| {
        let mut found = medians(runs, GEMINI, "clean", metric);
        found.retain(|(workload, _)| counts(workload));
        found
    };
    let (rates, coverages) = (of_gemini(ALIGNED_RATE, cares), of_gemini(ALIGNED_COVERAGE, cares));
    let complete = rates.len() >= WORKLOADS;
    goals.push(goal(
        "1.workloads",
        "Table 3, both layers fragmented: workloads",
        ">= 8",
        "16",
        (!rates.is_empty()).then(|| (rates.len().to_string(), verdict(complete))),
    ));
    // A mean over too few is neither met nor missed.
    let mean_goal = |found: &[(&str, f64)], bar: f64| {
        let mean = mean(&values(found))?;
        let judged =
            if found.len() >= WORKLOADS { verdict(mean >= bar) } else { Verdict::NotMeasured };
        Some((format!("{} over {}", share(mean), over(found.len())), judged))
    };
    goals.push(goal(
        "1.rate",
        "mean `aligned_rate` of `gemini`",
        ">= 0.90",
        paper::RATES,
        mean_goal(&rates, 0.90),
    ));
    goals.push(goal(
        "1.lowest",
        "lowest `aligned_rate` of a workload",
        ">= 0.80",
        "0.50 (Streamcluster)",
        lowest(&rates).map(|(workload, rate)| {
            let judged = verdict_of_part(rate >= 0.80, complete);
            (format!("{} ({workload})", share(rate)), judged)
        }),
    ));
    goals.push(goal(
        "1.coverage",
        "mean `aligned_coverage` of `gemini`",
        ">= 0.85",
        "not told",
        mean_goal(&coverages, 0.85),
    ));
    let indifferent = of_gemini(ALIGNED_RATE, |name| INDIFFERENT.contains(&name));
    let told = |found: &[(&str, f64)]| {
        let each = found.iter().map(|(workload, value)| format!("{} ({workload})", share(*value)));
        each.collect::<Vec<_>>().join(", ")
    };
    goals.push(goal(
        "1.indifferent",
        "lowest `aligned_rate` of the workloads that are indifferent to the TLB, which count in \
         none of these",
        ">= 0.80",
        "not told",
        lowest(&indifferent).map(|(_, lowest)| {
            let coverages = told(&of_gemini(ALIGNED_COVERAGE, |name| INDIFFERENT.contains(&name)));
            let figure = format!("{}; `aligned_coverage` {coverages}", told(&indifferent));
            let all = indifferent.len() == INDIFFERENT.len();
            (figure, verdict_of_part(lowest >= 0.80, all))
        }),
    ));
    let others = policies(Kind::Uncoordinated).filter_map(|policy| {
        let mut found = medians(runs, policy, "clean", ALIGNED_RATE);
        found.retain(|(workload, _)| cares(workload));
        Some((policy, mean(&values(&found))?, found.len()))
    });
    let others: Vec<_> = others.collect();
    let complete = others.len() == policies(Kind::Uncoordinated).count()
        && others.iter().all(|(.., count)| *count >= WORKLOADS);
    let told: Vec<_> = others
        .into_iter()
        .map(|(policy, mean, count)| format!("`{policy}` {} ({count})", share(mean)))
        .collect();
    goals.push(goal(
        "1.others",
        "mean `aligned_rate` of every uncoordinated policy, workloads in brackets",
        "told",
        "at most 33 % on average",
        (!told.is_empty()).then(|| {
            let judged = if complete { Verdict::Told } else { Verdict::NotMeasured };
            (told.join("; "), judged)
        }),
    ));
}

/// Misses of each workload under a policy to those at the upper bound.
fn to_static<'a>(runs: &'a Runs, policy: &'a str, metric: Metric) -> Vec<(&'a str, f64)> {
    let of = |(workload, misses)| {
        let place = Place { workload, policy, state: FRAGMENTED, vm: "clean" };
        let bound = runs.upper_bound(place, metric)?.median;
        (bound > 0.0).then_some((workload, misses / bound))
    };
    medians(runs, policy, "clean", metric).into_iter().filter_map(of).collect()
}

/// Of what static huge pages at both layers gain over base pages the share that `gemini` gains, of
/// the workloads that care. A ratio to a bound of next to nothing tells little of what is left.
fn of_static(runs: &Runs, metric: Metric) -> Vec<(&str, f64)> {
    let of = |(workload, misses)| {
        let place = Place { workload, policy: BASE, state: FRAGMENTED, vm: "clean" };
        let base = runs.summary(place, metric)?.median;
        let bound = runs.upper_bound(place, metric)?.median;
        let gains = cares(workload) && base > bound;
        gains.then(|| (workload, (base - misses) / (base - bound)))
    };
    medians(runs, GEMINI, "clean", metric).into_iter().filter_map(of).collect()
}

/// What workloads that care have under a policy, to the best uncoordinated one that was run.
fn to_best<'a>(runs: &'a Runs, policy: &'a str, metric: Metric) -> Vec<(&'a str, f64)> {
    let of = |(workload, value)| {
        let place = Place { workload, policy, state: FRAGMENTED, vm: "clean" };
        let (_, best) = runs.best(place, policies(Kind::Uncoordinated), metric)?;
        (cares(workload) && best > 0.0).then_some((workload, value / best))
    };
    medians(runs, policy, "clean", metric).into_iter().filter_map(of).collect()
}

/// Part of the misses under the best uncoordinated policy that is not there under `gemini`, of the
/// workloads that were run under all of them: the best of some may not be the best.
fn fewer(runs: &Runs, metric: Metric) -> Vec<(&str, f64)> {
    let of = |(workload, misses)| {
        let has = |policy| {
            let place = Place { workload, policy, state: FRAGMENTED, vm: "clean" };
            runs.summary(place, metric).is_some()
        };
        if !cares(workload) || !policies(Kind::Uncoordinated).all(has) {
            return None;
        }
        let place = Place { workload, policy: GEMINI, state: FRAGMENTED, vm: "clean" };
        let (_, best) = runs.best(place, policies(Kind::Uncoordinated), metric)?;
        (best > 0.0).then_some((workload, 1.0 - misses / best))
    };
    medians(runs, GEMINI, "clean", metric).into_iter().filter_map(of).collect()
}

fn worst_and_mean(ratios: &[(&str, f64)]) -> Option<(String, f64)> {
    let (workload, worst) = highest(ratios)?;
    let mean = geometric_mean(&values(ratios)).map_or("n/m".into(), significant);
    let of = over(ratios.len());
    Some((format!("{} ({workload}); geometric mean {mean} over {of}", significant(worst)), worst))
}

fn with_many_fewer<'a>(fewer: &[(&'a str, f64)]) -> Vec<&'a str> {
    fewer.iter().filter(|(_, fewer)| *fewer >= 0.83).map(|(name, _)| *name).collect()
}

fn misses(runs: &Runs, goals: &mut Vec<Goal>) {
    let ratios = to_static(runs, GEMINI, MISSES);
    goals.push(goal(
        "2.static",
        "TLB misses of `gemini` against `hugetlb`, worst workload",
        "<= 1.15",
        "not told",
        worst_and_mean(&ratios).map(|(figure, worst)| {
            (figure, verdict_of_part(worst <= 1.15, ratios.len() >= WORKLOADS))
        }),
    ));
    goals.push(goal(
        "2.counted",
        "the same and the next of all that was counted in the emulated guest, with what happens \
         by the clock",
        "told",
        "not told",
        worst_and_mean(&to_static(runs, GEMINI, ALL_MISSES)).map(|(figure, _)| {
            let fewer = fewer(runs, ALL_MISSES);
            let (reached, all) = (with_many_fewer(&fewer).len(), fewer.len());
            let figure = format!("against `hugetlb` {figure}; 83 % fewer on {reached} of {all}");
            (figure, Verdict::Told)
        }),
    ));
    let gains = of_static(runs, MISSES);
    goals.push(goal(
        "2.gain",
        "of the misses that `hugetlb` saves over `none`, the share that `gemini` saves, mean",
        "told",
        "not told",
        lowest(&gains).zip(mean(&values(&gains))).map(|((workload, lowest), mean)| {
            let figure = format!(
                "{} over {}; lowest {} ({workload})",
                percent(mean),
                over(gains.len()),
                percent(lowest)
            );
            (figure, Verdict::Told)
        }),
    ));
    let fewer = fewer(runs, MISSES);
    goals.push(goal(
        "2.uncoordinated",
        "workloads with at least 83 % fewer misses than under the best uncoordinated policy",
        ">= 3",
        paper::FEWER_MISSES,
        (!fewer.is_empty()).then(|| {
            let reached = with_many_fewer(&fewer);
            let which = if reached.is_empty() {
                String::new()
            } else {
                format!(" ({})", reached.join(", "))
            };
            let judged = if reached.len() >= FEWER_ON {
                Verdict::Met
            } else if fewer.len() < FEWER_ON {
                Verdict::NotMeasured
            } else {
                Verdict::Missed
            };
            (format!("{} of {}{which}", reached.len(), fewer.len()), judged)
        }),
    ));
    goals.push(goal(
        "2.mean",
        "mean of that reduction",
        "told",
        "not told",
        mean(&values(&fewer))
            .map(|mean| (format!("{} over {}", percent(mean), over(fewer.len())), Verdict::Told)),
    ));
    // What alignment is about; the kernel's own addresses are mapped huge in every guest.
    goals.push(goal(
        "2.programs",
        "the same of misses at addresses of programs alone",
        "told",
        "not told",
        worst_and_mean(&to_static(runs, GEMINI, USER_MISSES)).map(|(figure, _)| {
            let fewer = self::fewer(runs, USER_MISSES);
            let figure = format!(
                "against `hugetlb` {figure}; 83 % fewer under {} of {}",
                with_many_fewer(&fewer).len(),
                fewer.len()
            );
            (figure, Verdict::Told)
        }),
    ));
    // Hits of the second level cost, too, and the kernel's addresses have most of them.
    goals.push(goal(
        "2.cycles",
        "cycles that the TLB costs, against the best uncoordinated policy that was run",
        "told",
        "not told",
        worst_and_mean(&to_best(runs, GEMINI, TLB_CYCLES))
            .map(|(figure, _)| (figure, Verdict::Told)),
    ));
    goals.push(goal(
        "2.kernel",
        "the same under `gemini-kernel`, and its misses against `hugetlb`",
        "told",
        "not told",
        worst_and_mean(&to_best(runs, GEMINI_KERNEL, TLB_CYCLES)).map(|(cycles, _)| {
            let misses = worst_and_mean(&to_static(runs, GEMINI_KERNEL, MISSES));
            let misses = misses.map_or("n/m".into(), |(figure, _)| figure);
            let rates = medians(runs, GEMINI_KERNEL, "clean", ALIGNED_RATE);
            let rate = mean(&values(&rates)).map_or("n/m".into(), significant);
            let figure = format!("{cycles}; misses {misses}; mean `aligned_rate` {rate}");
            (figure, Verdict::Told)
        }),
    ));
}

fn reuse(runs: &Runs, goals: &mut Vec<Goal>) {
    let reused = medians(runs, GEMINI, "reused", REUSED);
    goals.push(goal(
        "3.reuse",
        "reused VM: aligned blocks that are reused, mean",
        ">= 95 %",
        "88 %",
        mean(&values(&reused)).map(|mean| {
            let (workload, low) = lowest(&reused).unwrap_or_default();
            let figure = format!(
                "{} over {}; lowest {} ({workload})",
                percent(mean),
                over(reused.len()),
                percent(low)
            );
            (figure, verdict(mean >= 0.95))
        }),
    ));
}

fn costs(runs: &Runs, goals: &mut Vec<Goal>) {
    // In fragmented memory the fragmenter has touched all of the guest's, under every policy.
    let mut memory = Vec::new();
    for (state, vm) in STATES.iter().flat_map(|state| VMS.map(|vm| (*state, vm))) {
        for workload in runs.workloads() {
            let place = Place { workload, policy: GEMINI, state, vm };
            let ratio = runs.relative(place, BASE, HOST_RSS);
            memory.extend(ratio.map(|ratio| (workload, state, ratio.median)));
        }
    }
    let worst = memory.iter().copied().max_by(|one, other| one.2.total_cmp(&other.2));
    let of_all: Vec<f64> = memory.iter().map(|(.., ratio)| *ratio).collect();
    goals.push(goal(
        "4.rss",
        "host RSS above that of `none`, worst workload in any state of memory",
        "<= 5 %",
        "not told",
        worst.map(|(workload, state, worst)| {
            let mean = geometric_mean(&of_all).map_or("n/m".into(), |mean| percent(mean - 1.0));
            let figure = format!(
                "{} ({workload}, {state}); mean {mean} over {} in all states",
                percent(worst - 1.0),
                memory.len()
            );
            let whole = memory.iter().any(|(_, state, _)| *state == "unfragmented");
            let complete = whole && ratios(runs, BASE, HOST_RSS).len() >= WORKLOADS;
            (figure, verdict_of_part(worst <= 1.05, complete))
        }),
    ));
    for (id, what, metric, unit) in [
        ("4.copying", "copied per aligned block, mean", COPIED_PER_BLOCK, "MiB"),
        ("4.cpu", "CPU of the daemon per aligned block, mean", CPU_PER_BLOCK, "s"),
    ] {
        let found = medians(runs, GEMINI, "clean", metric);
        let told = mean(&values(&found)).map(|mean| {
            (format!("{} {unit} over {}", significant(mean), over(found.len())), Verdict::Told)
        });
        goals.push(goal(id, what, "told", "not told", told));
    }
    for (id, what, metric) in [
        (
            "4.instructions",
            "overhead on indifferent workloads, by instructions, worst",
            INSTRUCTIONS,
        ),
        ("4.cycles", "overhead on indifferent workloads, by estimated cycles, worst", CYCLES),
    ] {
        let mut found = ratios(runs, BASE, metric);
        found.retain(|(workload, _)| INDIFFERENT.contains(workload));
        let told = highest(&found).map(|(workload, worst)| {
            let all = found.len() == INDIFFERENT.len();
            let figure =
                format!("{} ({workload}) over {}", percent(worst - 1.0), over(found.len()));
            (figure, verdict_of_part(worst <= 1.01, all))
        });
        goals.push(goal(id, what, "<= 1 %", paper::OVERHEAD, told));
    }
}

fn ablation(runs: &Runs, goals: &mut Vec<Goal>) {
    for (id, what, vm) in [
        ("5.clean", "share of the gain in TLB misses lost without a component, clean VM", "clean"),
        ("5.reused", "the same, reused VM", "reused"),
    ] {
        let told: Vec<_> = policies(Kind::Ablation)
            .filter_map(|policy| {
                let shares = ablation::shares(runs, policy, FRAGMENTED, vm, MISSES);
                Some(format!("`{policy}` {}", percent(mean(&shares)?)))
            })
            .collect();
        let all = told.len() == policies(Kind::Ablation).count();
        let judged = if all { Verdict::Told } else { Verdict::NotMeasured };
        let found = (!told.is_empty()).then(|| (told.join("; "), judged));
        goals.push(goal(id, what, "told", paper::BREAKDOWN, found));
    }
}

fn losses(runs: &Runs, goals: &mut Vec<Goal>) {
    let comparisons = losses::compare(runs);
    let count = |outcome| comparisons.iter().filter(|found| found.outcome == outcome).count();
    goals.push(goal(
        "6.losses",
        "where `gemini` loses or ties is told",
        "told",
        "not told",
        (!comparisons.is_empty()).then(|| {
            let figure = format!(
                "loses {}, ties {} of {} comparisons",
                count(Outcome::Loses),
                count(Outcome::Ties),
                comparisons.len()
            );
            (figure, Verdict::Told)
        }),
    ));
}

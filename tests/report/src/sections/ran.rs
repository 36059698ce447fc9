//! What was run, by what, where, and what is missing.

use std::collections::BTreeMap;

use crate::document::{plain, Cell, Part, Section, Table};
use crate::names::{POLICIES, STATES, VMS};
use crate::record::Record;
use crate::runs::{Done, Place, Runs};

/// Failures that are told one by one.
const MOST_TOLD: usize = 30;

/// Share of the walks that the simulator may see end elsewhere than QEMU's own.
const DISAGREEMENTS: f64 = 1e-4;

/// Arguments that runs have to share to be compared: of one workload, or of all.
const OF_WORKLOAD: [&str; 2] = ["workload_mib", "operations"];
const OF_ALL: [&str; 10] = [
    "guest_mib",
    "cpus",
    "profile",
    "pcid",
    "accel",
    "host_blocks_percent",
    "settle_seconds",
    "slowdown",
    "warm",
    "quick",
];

/// Machine, versions, number of runs, failures.
#[must_use]
pub fn section(runs: &Runs) -> Section {
    let mut section = Section::new("What was run");
    section.table(origin(runs));
    mixtures(runs, &mut section);
    section.table(policies());
    section.table(matrix(runs));
    missing(runs, &mut section);
    section.text(
        "n/m: not measured. A bar that is missing is marked with a cross. A figure with a range \
         is the median of its repetitions, from the smallest to the greatest of them. Means are of \
         the workloads that have the figure.",
    );
    failures(runs, &mut section);
    section
}

/// The values with how many runs have them, if they differ.
fn listed(counts: &BTreeMap<String, usize>) -> String {
    let one = counts.len() == 1;
    let told = counts.iter().map(|(value, runs)| match one {
        true => plain(value),
        false => format!("{} ({runs} runs)", plain(value)),
    });
    told.collect::<Vec<_>>().join("; ")
}

fn origin(runs: &Runs) -> Table {
    let mut table = Table::new("Origin of the runs", ["", "value"]);
    let mut tell = |name: &str, text: String| {
        let text = if text.is_empty() { Cell::NotMeasured } else { Cell::Text(text) };
        table.row(vec![Cell::text(name), text]);
    };
    let all = runs.all();
    let failed = runs.failed().count();
    tell("runs with figures", (all.len() - failed).to_string());
    tell("failed runs", failed.to_string());
    let dates = || all.iter().filter_map(|record| record.made.date.as_deref());
    let span = dates().min().zip(dates().max()).map(|(first, last)| format!("{first} to {last}"));
    tell("made", plain(&span.unwrap_or_default()));
    let hours: f64 = all.iter().filter_map(|record| record.made.seconds).sum::<f64>() / 3600.0;
    tell("time of all runs", format!("{hours:.1} h"));
    tell("commit", listed(&runs.count(|record| record.made.commit.clone())));
    tell("machine", listed(&runs.count(|record| Some(record.made.machine.to_string()))));
    let mut names: Vec<&String> =
        all.iter().flat_map(|record| record.made.versions.keys()).collect();
    names.sort();
    names.dedup();
    for name in names.iter().filter(|name| name.as_str() != "workload") {
        let versions = runs.count(|record| record.made.versions.get(*name)?.clone());
        tell(&format!("version of `{}`", plain(name)), listed(&versions));
    }
    // One a workload, so not to be counted over all of them.
    let programs = runs.workloads().into_iter().filter_map(|workload| {
        let of = |record: &Record| {
            let version = record.made.versions.get("workload")?.clone()?;
            (record.run.workload == workload).then_some(version)
        };
        let versions = runs.count(of);
        (!versions.is_empty()).then(|| format!("{}: {}", plain(workload), listed(&versions)))
    });
    tell("programs", programs.collect::<Vec<_>>().join("; "));
    for name in OF_ALL {
        tell(&format!("`{name}`"), listed(&runs.argument(name)));
    }
    for name in OF_WORKLOAD {
        let told = runs.workloads().into_iter().filter_map(|workload| {
            let values = of_workload(runs, workload, name);
            (!values.is_empty()).then(|| format!("{}: {}", plain(workload), listed(&values)))
        });
        tell(&format!("`{name}`"), told.collect::<Vec<_>>().join("; "));
    }
    let seeds = runs.count(|record| Some(record.run.seed.to_string()));
    tell("seeds", listed(&seeds));
    table
}

fn of_workload(runs: &Runs, workload: &str, name: &str) -> BTreeMap<String, usize> {
    runs.count(|record| {
        let of_it = record.run.workload == workload;
        of_it.then(|| record.argument(name)).flatten()
    })
}

/// What makes runs less comparable than they look.
fn mixtures(runs: &Runs, section: &mut Section) {
    let mut warn = |differs: bool, what: &str| {
        if differs {
            section.warning(format!("The runs differ in {what}: compare with care."));
        }
    };
    warn(runs.count(|record| record.made.commit.clone()).len() > 1, "the project's commit");
    warn(runs.count(|record| Some(record.made.machine.to_string())).len() > 1, "the machine");
    for name in OF_ALL {
        warn(runs.argument(name).len() > 1, &format!("`{name}`"));
    }
    for name in OF_WORKLOAD {
        let differ = |workload: &&str| of_workload(runs, workload, name).len() > 1;
        for workload in runs.workloads().iter().filter(|workload| differ(workload)) {
            warn(true, &format!("`{name}` of {}", plain(workload)));
        }
    }
    if runs.quick_left_out > 0 {
        section.text(format!(
            "{} quick runs were left out, because there are full ones.",
            runs.quick_left_out
        ));
    }
    if !runs.unreadable.is_empty() {
        section.warning("Files that are no records of runs, and were left out:");
        let told = runs.unreadable.iter().map(|(name, why)| plain(&format!("{name}: {why}")));
        section.parts.push(Part::List(told.collect()));
    }
    let astray: Vec<_> = runs.all().iter().filter(|record| astray(record)).collect();
    if !astray.is_empty() {
        section.warning(format!(
            "In {} runs, more than one walk in 10,000 of the simulator ended elsewhere than \
             QEMU's own. Their TLB figures are less sure:",
            astray.len()
        ));
        let told = astray.iter().take(MOST_TOLD).map(|record| plain(&record.run.to_string()));
        section.parts.push(Part::List(told.collect()));
    }
}

fn astray(record: &Record) -> bool {
    let Some(tlb) = &record.tlb else {
        return false;
    };
    match (tlb.disagreements, tlb.misses) {
        // One is less than can be told of few misses.
        (Some(astray), Some(misses)) => astray > 1.0 + DISAGREEMENTS * misses,
        _ => false,
    }
}

fn policies() -> Table {
    let mut table = Table::new("Policies", ["policy", "what it is"]);
    for policy in POLICIES {
        table.row(vec![Cell::text(format!("`{}`", policy.name)), Cell::text(policy.what)]);
    }
    table
}

fn matrix(runs: &Runs) -> Table {
    let columns: Vec<(&str, &str)> =
        STATES.iter().flat_map(|state| VMS.map(|vm| (*state, vm))).collect();
    let header = std::iter::once("policy".to_owned())
        .chain(columns.iter().map(|(state, vm)| format!("{state}, {vm} VM")));
    let workloads = runs.workloads();
    let caption = format!(
        "Workloads with figures, of the {} that were run at all, and their runs in brackets; what \
         is missing was not run or failed",
        workloads.len()
    );
    let mut table = Table::new(caption, header);
    for policy in POLICIES {
        let mut row = vec![Cell::text(format!("`{}`", policy.name))];
        for &(state, vm) in &columns {
            let (mut done, mut count, mut failed) = (0, 0, 0);
            for workload in &workloads {
                match runs.done(Place { workload, policy: policy.name, state, vm }) {
                    Done::Runs(runs) => {
                        done += 1;
                        count += runs;
                    }
                    Done::Failed => failed += 1,
                    Done::Nothing => {}
                }
            }
            row.push(match (done, failed) {
                (0, 0) => Cell::NotMeasured,
                (done, 0) => Cell::Number(format!("{done} ({count})")),
                (done, failed) => Cell::Number(format!("{done} ({count}), {failed} failed")),
            });
        }
        table.row(row);
    }
    table
}

/// What would have to be run to have all workloads everywhere.
fn missing(runs: &Runs, section: &mut Section) {
    let workloads = runs.workloads();
    let mut told = Vec::new();
    for state in STATES {
        for vm in VMS {
            let lacks = |policy: &str| -> Vec<String> {
                let at = |workload| Place { workload, policy, state, vm };
                let done = |workload| matches!(runs.done(at(workload)), Done::Runs(_));
                let lacking = workloads.iter().filter(|workload| !done(workload));
                lacking.map(|workload| plain(workload)).collect()
            };
            let mut policies = Vec::new();
            for policy in POLICIES {
                let lacking = lacks(policy.name);
                match lacking.len() {
                    0 => {}
                    all if all == workloads.len() => policies.push(format!("`{}`", policy.name)),
                    _ => policies.push(format!("`{}` ({})", policy.name, lacking.join(", "))),
                }
            }
            if !policies.is_empty() {
                told.push(format!("{state} memory, {vm} VM: {}", policies.join(", ")));
            }
        }
    }
    if !told.is_empty() {
        section.text(
            "Missing of all workloads under all policies, without figures for what is in brackets, \
             or for any workload:",
        );
        section.parts.push(Part::List(told));
    }
}

fn failures(runs: &Runs, section: &mut Section) {
    let mut told: Vec<_> =
        runs.failed().map(|(record, why)| plain(&format!("{}: {why}", record.run))).collect();
    if told.is_empty() {
        return;
    }
    let more = told.len().saturating_sub(MOST_TOLD);
    told.truncate(MOST_TOLD);
    if more > 0 {
        told.push(format!("and {more} more"));
    }
    section.text("Runs that failed, and why:");
    section.parts.push(Part::List(told));
}

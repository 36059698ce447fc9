//! What policies cost: memory, copying, CPU time, and time until memory is aligned.

use super::{by_workload, mean_cell, medians, or_nothing, ratios, relative_bars, Mean};
use crate::document::{percent, significant, Cell, Scale, Section, Table};
use crate::metrics::{
    Metric, COPIED, COPIED_PER_BLOCK, CPU_PER_BLOCK, DAEMON_CPU, GUEST_KERNEL_CPU, GUEST_USED,
    HOST_KERNEL_CPU, HOST_RSS, MOVED, SECONDS_TO_ALIGNMENT,
};
use crate::names::{FRAGMENTED, POLICIES, STATES, VMS};
use crate::runs::Runs;
use crate::stats::{geometric_mean, mean};

/// Columns of CPU time and copying, with how they are written.
const COLUMNS: [(&str, Metric); 9] = [
    ("copied, MiB", COPIED),
    ("blocks moved in the guest", MOVED),
    ("daemon CPU, s", DAEMON_CPU),
    ("host kernel CPU, s", HOST_KERNEL_CPU),
    ("guest kernel CPU, s", GUEST_KERNEL_CPU),
    ("copied per aligned block, MiB", COPIED_PER_BLOCK),
    ("daemon CPU per aligned block, s", CPU_PER_BLOCK),
    ("seconds to alignment", SECONDS_TO_ALIGNMENT),
    ("used in the guest, MiB", GUEST_USED),
];

/// All costs.
#[must_use]
pub fn section(runs: &Runs) -> Section {
    let mut section = Section::new("Costs: memory, copying, CPU, time to alignment");
    if runs.all().iter().any(|record| record.costs.is_some()) {
        section.text(
            "From the start of the workload to its end: what the policies did before, the driver's first \
             stock of ready blocks included, is not in it. Host RSS of `hugetlb` is all of the pool \
             that its guest was given: nobody else can use it. CPU of the host's kernel is that of \
             the threads that make and find huge pages, whoever they worked for; that of the \
             guest's kernel includes its agent, and is that of an emulated processor.",
        );
    }
    section.bars(relative_bars(
        runs,
        "Host RSS, fragmented memory, clean VM",
        "ratio to none",
        (FRAGMENTED, "clean"),
        HOST_RSS,
        Scale::Linear,
    ));
    section.table(bloat(runs));
    for state in STATES {
        for vm in VMS {
            section.table(means(runs, state, vm));
        }
    }
    section.table(by_workload(
        runs,
        "Seconds from the data being loaded to nine tenths of the final coverage, fragmented \
         memory, clean VM",
        (FRAGMENTED, "clean"),
        SECONDS_TO_ALIGNMENT,
        significant,
        Mean::Arithmetic,
    ));
    or_nothing(section)
}

fn bloat(runs: &Runs) -> Table {
    let columns = STATES.iter().flat_map(|state| VMS.map(|vm| (*state, vm)));
    let mut table = Table::new(
        "Memory bloat: host RSS above that of `none`, geometric mean over workloads; worst in \
         brackets",
        ["policy".to_owned()]
            .into_iter()
            .chain(columns.clone().map(|(state, vm)| format!("{state}, {vm}"))),
    );
    for policy in POLICIES {
        let mut row = vec![Cell::text(format!("`{}`", policy.name))];
        row.extend(columns.clone().map(|place| {
            let found = ratios(runs, policy.name, place, HOST_RSS);
            let worst = found.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            Cell::number(
                geometric_mean(&found).map(|mean| {
                    format!("{} (worst {})", percent(mean - 1.0), percent(worst - 1.0))
                }),
            )
        }));
        if row[1..].iter().any(|cell| *cell != Cell::NotMeasured) {
            table.row(row);
        }
    }
    table
}

fn means(runs: &Runs, state: &str, vm: &str) -> Table {
    let mut table = Table::new(
        format!("Means over workloads, {state} memory, {vm} VM"),
        std::iter::once("policy").chain(COLUMNS.iter().map(|(name, _)| *name)),
    );
    let all = runs.workloads_at(state, vm).len();
    for policy in POLICIES {
        let mut row = vec![Cell::text(format!("`{}`", policy.name))];
        for (_, metric) in COLUMNS {
            let found = medians(runs, policy.name, (state, vm), metric);
            row.push(mean_cell(&found, all, mean(&found), significant));
        }
        if row[1..].iter().any(|cell| *cell != Cell::NotMeasured) {
            table.row(row);
        }
    }
    table
}

//! After the paper's figures of breakdown and overhead: what each component brings, and what `gemini` costs where there is
//! nothing to gain.

use super::{mean_cell, medians, or_nothing};
use crate::ablation::{shares, LEAST_GAIN};
use crate::document::{
    percent, share, significant, Bars, Cell, Scale, Section, Series, Style, Table,
};
use crate::metrics::{
    ACCESSES, ALIGNED_COVERAGE, ALIGNED_RATE, COPIED, CYCLES, INSTRUCTIONS, MISSES, REUSED,
    SECONDS_TO_ALIGNMENT, THROUGHPUT,
};
use crate::names::{policies, Kind, BASE, FRAGMENTED, GEMINI, INDIFFERENT, VMS};
use crate::paper;
use crate::runs::{Place, Runs};
use crate::stats::{mean, Summary};

/// The ablation and the overhead.
#[must_use]
pub fn sections(runs: &Runs) -> Vec<Section> {
    vec![ablation(runs), overhead(runs)]
}

fn ablation(runs: &Runs) -> Section {
    let mut section = Section::new("Breakdown: what each component brings");
    let names: Vec<_> = policies(Kind::Ablation).collect();
    let measured = |vm: &str| {
        names.iter().any(|name| !medians(runs, name, (FRAGMENTED, vm), ALIGNED_RATE).is_empty())
    };
    if !VMS.iter().any(|vm| measured(vm)) {
        return or_nothing(section);
    }
    section.text(format!(
        "Each component switched off alone. Its share is what is then lost of all that `gemini` \
         gains over base pages, as the mean over workloads where that gain is at least {}. \
         Components stand in for each other (what is not placed is repaired by copying), so the \
         shares do not add up to the whole, and one that loses nothing in TLB misses may have \
         saved all of the copying. The paper's breakdown: {}.",
        percent(LEAST_GAIN),
        paper::BREAKDOWN
    ));
    let series = VMS.iter().zip([3, 7]).map(|(vm, style)| Series {
        name: format!("{vm} VM"),
        style: Style(style),
        values: names
            .iter()
            .map(|name| mean(&shares(runs, name, FRAGMENTED, vm, MISSES)))
            .map(|mean| Summary::of(vec![mean?]))
            .collect(),
    });
    let short = |name: &&str| name.trim_start_matches("gemini-no-").to_owned();
    section.bars(Bars {
        title: "Share of the gain in TLB misses that is lost without a component".into(),
        axis: "share of the gain".into(),
        scale: Scale::Linear,
        group: "component".into(),
        groups: names.iter().map(short).collect(),
        series: series.collect(),
        line: None,
        in_table: true,
    });
    for vm in VMS.into_iter().filter(|vm| measured(vm)) {
        section.table(ablation_table(runs, vm));
    }
    section
}

fn ablation_table(runs: &Runs, vm: &str) -> Table {
    let mut table = Table::new(
        format!("Without each component, {FRAGMENTED} memory, {vm} VM: means over workloads"),
        [
            "policy",
            "gain in TLB misses lost",
            "gain in coverage lost",
            "aligned_rate",
            "aligned_coverage",
            "copied, MiB",
            "seconds to alignment",
            "reused",
        ],
    );
    let all = runs.workloads_at(FRAGMENTED, vm).len();
    for policy in std::iter::once(GEMINI).chain(policies(Kind::Ablation)) {
        let lost = |metric| {
            let found = shares(runs, policy, FRAGMENTED, vm, metric);
            mean_cell(&found, all, mean(&found), percent)
        };
        let mut row = vec![Cell::text(format!("`{policy}`")), lost(MISSES), lost(ALIGNED_COVERAGE)];
        for (metric, show) in [
            (ALIGNED_RATE, share as fn(f64) -> String),
            (ALIGNED_COVERAGE, share),
            (COPIED, significant),
            (SECONDS_TO_ALIGNMENT, significant),
            (REUSED, percent),
        ] {
            let found = medians(runs, policy, (FRAGMENTED, vm), metric);
            row.push(mean_cell(&found, all, mean(&found), show));
        }
        table.row(row);
    }
    table
}

fn overhead(runs: &Runs) -> Section {
    let mut section = Section::new("Overhead where nothing is to be gained");
    let (mut heads, mut metrics) = (
        vec!["workload", "VM", "instructions", "cycles", "accesses to data"],
        vec![INSTRUCTIONS, CYCLES, ACCESSES],
    );
    // Of an emulated guest it tells nothing.
    if !runs.emulated() {
        heads.push("throughput");
        metrics.push(THROUGHPUT);
    }
    let mut table = Table::new(
        format!(
            "`gemini` against `none` on workloads that are indifferent to the TLB, {FRAGMENTED} \
             memory (the paper: {})",
            paper::OVERHEAD
        ),
        heads,
    );
    for workload in INDIFFERENT {
        for vm in VMS {
            let place = Place { workload, policy: GEMINI, state: FRAGMENTED, vm };
            let mut row = vec![Cell::text(workload), Cell::text(vm)];
            for &metric in &metrics {
                let ratio = runs.relative(place, BASE, metric);
                let change = ratio.map(|ratio| Summary {
                    median: ratio.median - 1.0,
                    low: ratio.low - 1.0,
                    high: ratio.high - 1.0,
                    ..ratio
                });
                row.push(Cell::summary(change, percent));
            }
            if row[2..].iter().any(|cell| *cell != Cell::NotMeasured) {
                table.row(row);
            }
        }
    }
    section.table(table);
    or_nothing(section)
}

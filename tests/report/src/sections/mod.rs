//! The sections of the page, each made from the runs.

pub mod alignment;
pub mod breakdown;
pub mod costs;
pub mod figure2;
pub mod losses;
pub mod maps;
pub mod performance;
pub mod ran;
pub mod verdicts;

use std::collections::BTreeMap;

use crate::document::{plain, Bars, Cell, Document, Scale, Section, Series, Style, Table};
use crate::figure2::Figure2;
use crate::metrics::Metric;
use crate::names::{main_policies, BASE, INDIFFERENT};
use crate::runs::{Done, Place, Runs};
use crate::stats::{geometric_mean, mean, Summary};

/// What people have found out, by what it is about: the name of a goal, or a workload.
pub type Notes = BTreeMap<String, String>;

/// The whole page. The same runs give the same page.
#[must_use]
pub fn page(runs: &Runs, figure2: Option<&Figure2>, notes: &Notes) -> Document {
    let mut sections =
        vec![verdicts::section(runs, notes), ran::section(runs), figure2::section(figure2)];
    sections.extend(alignment::sections(runs));
    sections.extend(performance::sections(runs));
    sections.extend(breakdown::sections(runs));
    sections.push(costs::section(runs));
    sections.push(maps::section(runs));
    sections.push(losses::section(runs, notes));
    Document { title: "Results of the paper evaluation".into(), sections }
}

/// A median of `place`, or why there is none.
fn cell(runs: &Runs, place: Place, metric: Metric, show: fn(f64) -> String) -> Cell {
    match runs.summary(place, metric) {
        None if runs.done(place) == Done::Failed => Cell::Failed,
        found => Cell::summary(found, show),
    }
}

/// A mean over workloads, with how many they are if not all of `all`.
fn mean_cell(values: &[f64], all: usize, mean: Option<f64>, show: fn(f64) -> String) -> Cell {
    Cell::number(mean.map(|mean| match values.len() {
        count if count == all => show(mean),
        count => format!("{} (of {count})", show(mean)),
    }))
}

/// What stands below a table of workloads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mean {
    /// Of figures in the same unit.
    Arithmetic,
    /// Nothing: an operation of one workload is not one of another.
    Nothing,
}

/// One line a workload and one column a policy. Nothing if nothing was measured.
fn by_workload(
    runs: &Runs,
    caption: &str,
    (state, vm): (&str, &str),
    metric: Metric,
    show: fn(f64) -> String,
    mean_of_all: Mean,
) -> Table {
    let workloads = runs.workloads_at(state, vm);
    let header = std::iter::once("workload").chain(main_policies());
    let mut table = Table::new(caption, header);
    let at = |workload, policy| Place { workload, policy, state, vm };
    for workload in &workloads {
        let mut row = vec![Cell::text(plain(workload))];
        row.extend(main_policies().map(|policy| cell(runs, at(workload, policy), metric, show)));
        if row[1..].iter().any(|cell| *cell != Cell::NotMeasured) {
            table.row(row);
        }
    }
    if table.rows.is_empty() || mean_of_all == Mean::Nothing {
        return table;
    }
    let mut mean_row = |name: &str, workloads: &[&str]| {
        let mut row = vec![Cell::text(name)];
        for policy in main_policies() {
            let of = |workload: &&str| runs.summary(Place { workload, policy, state, vm }, metric);
            let found = workloads.iter().filter_map(of);
            let medians: Vec<f64> = found.map(|summary| summary.median).collect();
            row.push(mean_cell(&medians, workloads.len(), mean(&medians), show));
        }
        table.row(row);
    };
    let (indifferent, others): (Vec<&str>, Vec<&str>) =
        workloads.iter().partition(|workload| INDIFFERENT.contains(workload));
    if !indifferent.is_empty() && !others.is_empty() {
        mean_row(&format!("mean without {}", indifferent.join(", ")), &others);
    }
    mean_row("mean", &workloads);
    table
}

/// Medians of all workloads that have one.
fn medians(runs: &Runs, policy: &str, (state, vm): (&str, &str), metric: Metric) -> Vec<f64> {
    let of = |workload| runs.summary(Place { workload, policy, state, vm }, metric);
    runs.workloads().into_iter().filter_map(of).map(|summary| summary.median).collect()
}

/// Ratios to base pages of all workloads that have one.
fn ratios(runs: &Runs, policy: &str, (state, vm): (&str, &str), metric: Metric) -> Vec<f64> {
    let of = |workload| runs.relative(Place { workload, policy, state, vm }, BASE, metric);
    runs.workloads().into_iter().filter_map(of).map(|summary| summary.median).collect()
}

/// Bars of a figure as ratios to base pages: one group a workload, one bar a policy, and the
/// geometric mean of what was measured as the last group.
fn relative_bars(
    runs: &Runs,
    title: &str,
    axis: &str,
    (state, vm): (&str, &str),
    metric: Metric,
    scale: Scale,
) -> Bars {
    let relative =
        |workload, policy| runs.relative(Place { workload, policy, state, vm }, BASE, metric);
    let mut groups = runs.workloads();
    groups.retain(|workload| {
        main_policies().any(|policy| policy != BASE && relative(workload, policy).is_some())
    });
    let shown = main_policies().enumerate().filter(|(_, policy)| *policy != BASE);
    let series = shown.map(|(style, policy)| {
        let mut values: Vec<Option<Summary>> =
            groups.iter().map(|workload| relative(workload, policy)).collect();
        let medians: Vec<f64> = values.iter().flatten().map(|value| value.median).collect();
        values.push(geometric_mean(&medians).and_then(|mean| Summary::of(vec![mean])));
        Series { name: policy.into(), style: Style(style), values }
    });
    let series = series.collect();
    let mut groups: Vec<String> = groups.into_iter().map(plain).collect();
    groups.push("geo. mean".into());
    Bars {
        title: title.into(),
        axis: axis.into(),
        scale,
        group: "workload".into(),
        groups,
        series,
        line: Some((1.0, "none (base pages)".into())),
        in_table: false,
    }
}

/// Says that nothing was measured, if a section says nothing else.
fn or_nothing(mut section: Section) -> Section {
    if section.parts.is_empty() {
        section.text("Not measured.");
    }
    section
}

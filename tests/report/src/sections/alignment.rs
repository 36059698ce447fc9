//! Table 3, and the same for a reused VM, which is taken to be what Table 4 is about: how the huge
//! pages of both layers meet.

use super::{by_workload, mean_cell, medians, or_nothing, Mean};
use crate::document::{percent, plain, share, Bars, Cell, Scale, Section, Series, Style, Table};
use crate::metrics::{ALIGNED_COVERAGE, ALIGNED_RATE, REUSED, WAITING};
use crate::names::{in_paper, main_policies, FRAGMENTED, GEMINI, POLICIES, STATES, VMS};
use crate::paper;
use crate::runs::{Place, Runs};
use crate::stats::{mean, Summary};

const NO_BUCKET: &str = "gemini-no-bucket";

const DEFINITIONS: &str = "Counted from outside, by QEMU's page tables and the guest's \
    kernel. `aligned_rate`: of the huge pages in use at either layer, the share that is huge at \
    both. `aligned_coverage`: the share of resident user memory in such blocks; a high rate over \
    few pages is worth nothing. Huge in the guest is what its kernel allocated as a huge page, \
    however it is mapped. The rate calls blocks misaligned that the host alone has huge; under \
    the kernel's memory, which it maps by pages of 1 GiB, these help nevertheless. The policies \
    that need no coordination work from the guest's boot on, as they do where they are used, so \
    that most of the host's huge pages are under memory that the fragmenter touched first. The \
    guest's memory is fragmented with movable pages, so its kernel can still make huge pages by \
    moving them, under every policy; what is scarce is the host's.";

/// Table 3, the reused VM, and all states.
#[must_use]
pub fn sections(runs: &Runs) -> Vec<Section> {
    vec![table_3(runs), reused_vm(runs), states(runs)]
}

fn table_3(runs: &Runs) -> Section {
    let place = (FRAGMENTED, "clean");
    let mut section = Section::new("Table 3: alignment in a clean VM, both layers fragmented");
    let rates = by_workload(runs, "`aligned_rate`", place, ALIGNED_RATE, share, Mean::Arithmetic);
    if !rates.rows.is_empty() {
        section.text(DEFINITIONS);
    }
    section.bars(bars(runs, place));
    section.table(rates);
    section.table(by_workload(
        runs,
        "`aligned_coverage`",
        place,
        ALIGNED_COVERAGE,
        share,
        Mean::Arithmetic,
    ));
    if !section.parts.is_empty() {
        section.table(beside_the_paper(runs));
    }
    or_nothing(section)
}

fn bars(runs: &Runs, (state, vm): (&str, &str)) -> Bars {
    let workloads = runs.workloads_at(state, vm);
    let series = main_policies().enumerate().map(|(style, policy)| {
        let of =
            |workload: &&str| runs.summary(Place { workload, policy, state, vm }, ALIGNED_RATE);
        let mut values: Vec<Option<Summary>> = workloads.iter().map(of).collect();
        let medians: Vec<f64> = values.iter().flatten().map(|value| value.median).collect();
        values.push(mean(&medians).and_then(|mean| Summary::of(vec![mean])));
        Series { name: policy.into(), style: Style(style), values }
    });
    let series = series.collect();
    let names = workloads.iter().map(|workload| plain(workload));
    Bars {
        title: format!("Alignment, {state} memory, {vm} VM"),
        axis: "aligned_rate".into(),
        scale: Scale::Linear,
        group: "workload".into(),
        groups: names.chain(["mean".into()]).collect(),
        series,
        line: None,
        in_table: true,
    }
}

/// Ours and the paper's, where a policy and a workload have a counterpart there.
fn beside_the_paper(runs: &Runs) -> Table {
    let pairs: Vec<_> =
        main_policies().filter_map(|policy| Some((policy, paper::system(policy)?))).collect();
    let names = pairs
        .iter()
        .flat_map(|(policy, system)| [format!("{policy}, here"), format!("{system}, paper")]);
    let mut table = Table::new(
        "`aligned_rate` beside the paper's Table 3 (its columns of systems that are emulated \
         here; programs of the same kind, not of the same size)",
        ["workload".to_owned(), "the paper's".to_owned()].into_iter().chain(names),
    );
    let ours = |workload, policy| {
        let place = Place { workload, policy, state: FRAGMENTED, vm: "clean" };
        Cell::number(runs.summary(place, ALIGNED_RATE).map(|found| share(found.median)))
    };
    for workload in runs.workloads() {
        let Some(theirs) = in_paper(workload) else { continue };
        let mut row = vec![Cell::text(workload), Cell::text(theirs)];
        for (policy, system) in &pairs {
            row.push(ours(workload, policy));
            row.push(Cell::number(paper::rate(theirs, system).map(share)));
        }
        table.row(row);
    }
    let all = runs.workloads_at(FRAGMENTED, "clean").len();
    let mut row = vec![Cell::text("mean of all"), Cell::text("mean of its 16")];
    for (policy, system) in &pairs {
        let found = medians(runs, policy, (FRAGMENTED, "clean"), ALIGNED_RATE);
        row.push(mean_cell(&found, all, mean(&found), share));
        row.push(Cell::number(paper::mean_rate(system).map(share)));
    }
    table.row(row);
    table
}

fn reused_vm(runs: &Runs) -> Section {
    let place = (FRAGMENTED, "reused");
    let mut section = Section::new("Alignment in a reused VM, both layers fragmented");
    let rates = by_workload(
        runs,
        "`aligned_rate`, reused VM",
        place,
        ALIGNED_RATE,
        share,
        Mean::Arithmetic,
    );
    let coverages = by_workload(
        runs,
        "`aligned_coverage`, reused VM",
        place,
        ALIGNED_COVERAGE,
        share,
        Mean::Arithmetic,
    );
    if !rates.rows.is_empty() {
        section.text(
            "A program with as much data, an SVM training as in the paper, was in the guest and ended \
             before the one that is measured was started, with no pause between them. The paper's \
             filled nearly all of its guest; here it is a quarter.",
        );
        section.bars(bars(runs, place));
    }
    section.table(rates);
    section.table(coverages);
    section.table(reuse(runs));
    or_nothing(section)
}

/// What became of the first program's aligned blocks, with the bucket and without.
fn reuse(runs: &Runs) -> Table {
    let columns = [
        ("gemini", GEMINI, REUSED),
        ("still waiting", GEMINI, WAITING),
        ("without the bucket", NO_BUCKET, REUSED),
        ("still waiting", NO_BUCKET, WAITING),
    ];
    let mut table = Table::new(
        format!(
            "Share of the first program's aligned blocks that the second one has, aligned, and of \
             those that are held whole for the next one (the paper, by its huge bucket: {})",
            percent(paper::REUSED)
        ),
        std::iter::once("workload").chain(columns.map(|(name, ..)| name)),
    );
    let place = |workload, policy| Place { workload, policy, state: FRAGMENTED, vm: "reused" };
    for workload in runs.workloads() {
        let found =
            columns.map(|(_, policy, metric)| runs.summary(place(workload, policy), metric));
        if found.iter().any(Option::is_some) {
            let cells = found.into_iter().map(|found| Cell::summary(found, percent));
            table.row(std::iter::once(Cell::text(plain(workload))).chain(cells).collect());
        }
    }
    if !table.rows.is_empty() {
        let mut row = vec![Cell::text("mean")];
        for (_, policy, metric) in columns {
            let found = medians(runs, policy, (FRAGMENTED, "reused"), metric);
            let all = runs.workloads_at(FRAGMENTED, "reused").len();
            row.push(mean_cell(&found, all, mean(&found), percent));
        }
        table.row(row);
    }
    table
}

/// Means of every state, so that the fragmented one is seen among the others.
fn states(runs: &Runs) -> Section {
    let mut section = Section::new("Alignment in every state");
    for (metric, caption) in [
        (ALIGNED_RATE, "mean `aligned_rate` over workloads"),
        (ALIGNED_COVERAGE, "mean `aligned_coverage` over workloads"),
    ] {
        let policies = POLICIES.map(|policy| policy.name);
        let mut table = Table::new(
            caption,
            ["policy".to_owned()]
                .into_iter()
                .chain(STATES.iter().flat_map(|state| VMS.map(|vm| format!("{state}, {vm}")))),
        );
        for policy in policies {
            let mut row = vec![Cell::text(format!("`{policy}`"))];
            for state in STATES {
                for vm in VMS {
                    let found = medians(runs, policy, (state, vm), metric);
                    let all = runs.workloads_at(state, vm).len();
                    row.push(mean_cell(&found, all, mean(&found), share));
                }
            }
            if policy == GEMINI || row[1..].iter().any(|cell| *cell != Cell::NotMeasured) {
                table.row(row);
            }
        }
        section.table(table);
    }
    section
}

//! After the paper's figures of throughput, latency and TLB misses, against base pages.

use super::{by_workload, ratios, relative_bars, Mean};
use crate::document::{significant, Cell, Scale, Section, Table};
use crate::metrics::{
    Metric, ALL_MISSES, CYCLES, IDLE_INSTRUCTIONS, IDLE_MISSES, MEAN_LATENCY, MISSES, P99_LATENCY,
    THROUGHPUT, TLB_CYCLES, USER_MISSES, WALK_READS,
};
use crate::names::{main_policies, policies, Kind, BASE, FRAGMENTED, GEMINI, STATES, VMS};
use crate::paper;
use crate::runs::{Place, Runs};
use crate::stats::geometric_mean;

/// Means beside the paper's, TLB misses, and performance.
#[must_use]
pub fn sections(runs: &Runs) -> Vec<Section> {
    vec![beside_the_paper(runs), misses(runs), speed(runs)]
}

/// What is said of figures of the TLB.
fn tlb_kind(runs: &Runs) -> &'static str {
    if runs.emulated() {
        "simulated; walk costs unvalidated"
    } else {
        "hardware counters"
    }
}

fn beside_the_paper(runs: &Runs) -> Section {
    let mut section = Section::new("After the paper's Figures 8 to 16: means beside the paper's");
    section.text(format!(
        "The paper's figures of its evaluation show throughput, latency and TLB misses of each \
         workload under each system, in a clean and in a reused VM, what each component brings, \
         and the overhead. Here are the means; the sections that follow have each workload. TLB: \
         {}.",
        tlb_kind(runs)
    ));
    let mut table = Table::new(
        "Geometric means over workloads, fragmented memory",
        ["figure", "clean VM", "the paper's", "reused VM", "the paper's"],
    );
    // Of an emulated guest they tell nothing, the less beside a processor's.
    let times = [
        ("throughput of `gemini` to `none`", THROUGHPUT, paper::THROUGHPUT),
        ("mean latency of `gemini` to `none`", MEAN_LATENCY, paper::MEAN_LATENCY),
        ("p99 latency of `gemini` to `none`", P99_LATENCY, paper::P99_LATENCY),
    ];
    for (name, metric, paper) in times.into_iter().filter(|_| !runs.emulated()) {
        let ours = |vm| geometric_mean(&ratios(runs, GEMINI, (FRAGMENTED, vm), metric));
        row(&mut table, name, VMS.map(ours), paper);
    }
    row(
        &mut table,
        "TLB misses of the uncoordinated policies to those of `gemini`",
        VMS.map(|vm| geometric_mean(&misses_of_others(runs, vm))),
        paper::MISSES_OF_OTHERS,
    );
    section.table(table);
    section
}

fn row(table: &mut Table, name: &str, [clean, reused]: [Option<f64>; 2], paper: paper::Mean) {
    table.row(vec![
        Cell::text(name),
        Cell::number(clean.map(significant)),
        Cell::Number(significant(paper.clean)),
        Cell::number(reused.map(significant)),
        Cell::Number(significant(paper.reused)),
    ]);
}

/// Misses of each uncoordinated policy under each workload, as ratios to those of `gemini`.
fn misses_of_others(runs: &Runs, vm: &str) -> Vec<f64> {
    let mut ratios = Vec::new();
    for workload in runs.workloads() {
        for policy in policies(Kind::Uncoordinated) {
            let place = Place { workload, policy, state: FRAGMENTED, vm };
            ratios.extend(runs.relative(place, GEMINI, MISSES).map(|ratio| ratio.median));
        }
    }
    ratios
}

fn misses(runs: &Runs) -> Section {
    let mut section = Section::new(format!("TLB misses ({})", tlb_kind(runs)));
    for vm in VMS {
        let title =
            format!("TLB misses an operation, {FRAGMENTED} memory, {vm} VM ({})", tlb_kind(runs));
        let axis = "ratio to none, logarithmic";
        let place = (FRAGMENTED, vm);
        section.bars(relative_bars(runs, &title, axis, place, MISSES, Scale::Logarithmic));
        let caption = format!("TLB misses an operation, {FRAGMENTED} memory, {vm} VM");
        section.table(by_workload(runs, &caption, place, MISSES, significant, Mean::Nothing));
        let caption = format!("Of these at addresses of programs, {FRAGMENTED} memory, {vm} VM");
        section.table(by_workload(runs, &caption, place, USER_MISSES, significant, Mean::Nothing));
    }
    section.text(
        "What the guest does by the clock (timers, the agent, the driver's census) was measured \
         for some seconds while the program waited. An emulated guest takes hundreds of times as \
         long for an operation as a processor, so that it would count as many times; everywhere \
         it counts for the time that a processor of 2.1 GHz would take by the estimate of cycles. \
         These tables have all that was counted, and what is by the clock alone.",
    );
    for vm in VMS {
        let place = (FRAGMENTED, vm);
        let which = format!("{FRAGMENTED} memory, {vm} VM");
        let caption = format!("TLB misses an operation, all that were counted, {which}");
        section.table(by_workload(runs, &caption, place, ALL_MISSES, significant, Mean::Nothing));
        let caption = format!("TLB misses a second while the program waits, {which}");
        section.table(by_workload(runs, &caption, place, IDLE_MISSES, significant, Mean::Nothing));
        let caption = format!("Instructions a second while the program waits, {which}");
        section.table(by_workload(
            runs,
            &caption,
            place,
            IDLE_INSTRUCTIONS,
            significant,
            Mean::Nothing,
        ));
    }
    section.text(
        "Misses that are not at addresses of programs are the kernel's, at its own. It maps all \
         memory by pages of 1 GiB, so there the host's pages alone decide, and blocks that only \
         the host has huge help: `aligned_rate`, which is about the memory of programs, calls \
         them misaligned.",
    );
    section.text(
        "The TLB costs more than its misses: an address that its first level does not have and \
         its second does costs cycles, too.",
    );
    for vm in VMS {
        let caption =
            format!("Cycles that the TLB costs an operation, {FRAGMENTED} memory, {vm} VM");
        let place = (FRAGMENTED, vm);
        section.table(by_workload(runs, &caption, place, TLB_CYCLES, significant, Mean::Nothing));
    }
    section.table(states(runs, "TLB misses an operation", MISSES));
    section.table(states(runs, "Cycles that the TLB costs an operation", TLB_CYCLES));
    section.table(states(runs, "Reads of page tables an operation", WALK_READS));
    super::or_nothing(section)
}

/// Geometric means over workloads, of every state.
fn states(runs: &Runs, what: &str, metric: Metric) -> Table {
    let shown = || main_policies().filter(|policy| *policy != BASE);
    let mut table = Table::new(
        format!("{what}, ratio to `none`: geometric mean over workloads"),
        std::iter::once("memory, VM").chain(shown()),
    );
    for state in STATES {
        for vm in VMS {
            let mut row = vec![Cell::text(format!("{state}, {vm}"))];
            for policy in shown() {
                let found = ratios(runs, policy, (state, vm), metric);
                let mean = geometric_mean(&found);
                let all = runs.workloads_at(state, vm).len();
                row.push(super::mean_cell(&found, all, mean, significant));
            }
            if row[1..].iter().any(|cell| *cell != Cell::NotMeasured) {
                table.row(row);
            }
        }
    }
    table
}

fn speed(runs: &Runs) -> Section {
    let times =
        [("Throughput", THROUGHPUT), ("Mean latency", MEAN_LATENCY), ("p99 latency", P99_LATENCY)];
    if runs.emulated() {
        let mut section = Section::new("Estimated cycles");
        section.text(
            "Throughput and latency of an emulated guest are those of QEMU's software, the \
             simulator's own work for every miss included: they are in the records, and tell \
             nothing of what a processor would gain. Cycles are an estimate, one an instruction \
             and what the TLB costs, with walk costs that were not validated.",
        );
        compared(runs, &mut section, &[("Cycles", CYCLES)], tlb_kind(runs));
        return section;
    }
    let mut section = Section::new("Throughput and latency (wall time)");
    compared(runs, &mut section, &[("Cycles", CYCLES)], tlb_kind(runs));
    compared(runs, &mut section, &times, "wall time");
    section
}

/// Bars of each figure, and its means in every state.
fn compared(runs: &Runs, section: &mut Section, figures: &[(&str, Metric)], kind: &str) {
    for vm in VMS {
        for (name, metric) in figures {
            let title = format!("{name}, {FRAGMENTED} memory, {vm} VM ({kind})");
            let (axis, place) = ("ratio to none", (FRAGMENTED, vm));
            section.bars(relative_bars(runs, &title, axis, place, *metric, Scale::Linear));
        }
    }
    for (name, metric) in figures {
        section.table(states(runs, name, *metric));
    }
}

//! What the evaluation must show, and whether it does.

use super::Notes;
use crate::document::{Cell, Part, Section, Table};
use crate::goals::{goals, Goal, Verdict};
use crate::paper;
use crate::runs::Runs;

/// The bars, and notes to them.
#[must_use]
pub fn section(runs: &Runs, notes: &Notes) -> Section {
    let mut section = Section::new("What it must show, and whether it does");
    section.text(format!(
        "The evaluation of the Gemini paper ({}) redone with this project, on real guests. Where \
         nothing else is said, figures are medians over repetitions in fragmented memory and a \
         clean VM. The paper's numbers are from another machine, other kernels and other sizes \
         of data: they stand beside ours for orientation.",
        paper::CITATION
    ));
    if runs.quick() {
        section.warning(
            "These are quick runs. They show that everything works, and measure little: data fit \
             the TLB better than they should.",
        );
    }
    if runs.emulated() {
        section.warning(
            "Guests were emulated. TLB figures are simulated (docs/tlb-simulator.md), and not \
             validated for what a walk costs. Wall times are those of QEMU's software, the \
             simulator's own work included, and tell nothing of what a processor would gain.",
        );
    }
    let header = ["goal", "what", "measured", "bar", "verdict", "the paper's"];
    let mut table = Table::new("Goals, in fragmented memory", header);
    let goals = goals(runs);
    for goal in &goals {
        table.row(vec![
            Cell::text(format!("`{}`", goal.id)),
            Cell::text(goal.what),
            Cell::text(&goal.figure),
            Cell::Number(goal.bar.into()),
            goal.verdict.cell(),
            Cell::text(goal.paper),
        ]);
    }
    let count = |verdict| goals.iter().filter(|goal| goal.verdict == verdict).count();
    section.text(format!(
        "Met: {}. Missed: {}. Not measured, or not all of it: {}. Told, without a bar: {}.",
        count(Verdict::Met),
        count(Verdict::Missed),
        count(Verdict::NotMeasured),
        count(Verdict::Told)
    ));
    section.table(table);
    let told: Vec<_> = goals.iter().filter_map(|goal| shortfall(goal, notes)).collect();
    if !told.is_empty() {
        section.text("What fell short, and why, and what else was found out:");
        section.parts.push(Part::List(told));
    }
    section
}

/// What is known of why a goal is not met.
fn shortfall(goal: &Goal, notes: &Notes) -> Option<String> {
    let note = notes.get(goal.id).map(String::as_str);
    let why = match goal.verdict {
        Verdict::Missed => note.unwrap_or("no cause is told yet"),
        Verdict::NotMeasured | Verdict::Told => note?,
        Verdict::Met => return None,
    };
    Some(format!("`{}`: {why}", goal.id))
}

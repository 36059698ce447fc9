//! Where `gemini` loses or ties.

use super::Notes;
use crate::document::{percent, plain, significant, Cell, Part, Section, Table};
use crate::losses::{compare, metrics, reason, Outcome, MARGIN};
use crate::runs::Runs;

/// Every loss and tie, with what the runs show of its reason.
#[must_use]
pub fn section(runs: &Runs, notes: &Notes) -> Section {
    let mut section = Section::new("Where gemini loses or ties");
    let names: Vec<_> = metrics(runs).iter().map(|metric| metric.name).collect();
    section.text(format!(
        "The rule: `gemini` against the best of all policies that need no coordination, `none` \
         included, by medians, for each workload, state of memory and VM. Better by less than {} \
         is a tie, worse by that much a loss. Compared are: {}.{} The reason is what the runs \
         themselves show.",
        percent(MARGIN),
        names.join(", "),
        if runs.emulated() { " Wall times of emulated guests are not." } else { "" }
    ));
    let comparisons = compare(runs);
    let mut counts = Table::new("Comparisons", ["figure", "wins", "ties", "loses"]);
    for name in names {
        let of_it: Vec<_> = comparisons.iter().filter(|found| found.metric.name == name).collect();
        let of = |outcome| {
            let found = of_it.iter().filter(|found| found.outcome == outcome).count();
            Cell::number((!of_it.is_empty()).then(|| found.to_string()))
        };
        let row = [Outcome::Wins, Outcome::Ties, Outcome::Loses].map(of);
        counts.row(std::iter::once(Cell::text(name)).chain(row).collect());
    }
    section.table(counts);
    let mut table = Table::new(
        "Losses and ties",
        ["figure", "workload", "memory, VM", "", "gemini", "best other", "better by", "reason"],
    );
    for found in comparisons.iter().filter(|found| found.outcome != Outcome::Wins) {
        let place = found.place;
        let better = if found.advantage.is_finite() {
            percent(found.advantage)
        } else {
            "the other has none".into()
        };
        table.row(vec![
            Cell::text(found.metric.name),
            Cell::text(plain(place.workload)),
            Cell::text(format!("{}, {}", place.state, place.vm)),
            Cell::text(if found.outcome == Outcome::Ties { "ties" } else { "loses" }),
            Cell::Number(significant(found.gemini)),
            Cell::text(format!("{} `{}`", significant(found.best), found.other)),
            Cell::Number(better),
            Cell::text(reason(runs, found)),
        ]);
    }
    section.table(table);
    let told = notes.iter().filter(|(name, _)| runs.workloads().contains(&name.as_str()));
    let told: Vec<_> = told.map(|(name, note)| format!("{}: {note}", plain(name))).collect();
    if !told.is_empty() {
        section.text("What was found out beyond that:");
        section.parts.push(Part::List(told));
    }
    section
}

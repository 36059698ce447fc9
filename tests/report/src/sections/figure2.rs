//! Figure 2: what huge pages at one layer gain, and at both.

use crate::document::{plain, significant, Cell, Lines, Part, Section, Series, Style, Table};
use crate::figure2::{Figure2, COMBINATIONS};
use crate::stats::Summary;

/// The micro-benchmark.
#[must_use]
pub fn section(document: Option<&Figure2>) -> Section {
    let mut section = Section::new("Figure 2: reads at random, on the processor itself");
    let Some(document) = document else {
        section.text(
            "Not measured: there is no result of `scripts/bench figure2 --json` beside the runs.",
        );
        return section;
    };
    section.text(
        "No guest: a process whose mappings stand for a guest's page tables, over memory that \
         stands for the host's. The processor has an entry of 2 MiB only where both are huge. The \
         walk has one dimension, so that the times are not those of nested paging, where a miss \
         costs more. The paper's Figure 2 shows the same of nested paging: all four alike while \
         data are small; once they are large, only huge pages at both layers are clearly faster.",
    );
    let fact = |name| plain(&document.fact(name).unwrap_or_else(|| "unknown".into()));
    section.text(format!(
        "Processor: {}, {} of them, Linux {}; {} rounds of {} reads, seed {}.",
        fact("cpu"),
        fact("cpus"),
        fact("kernel"),
        fact("rounds"),
        fact("reads"),
        fact("seed")
    ));
    let sizes = document.sizes();
    let series = COMBINATIONS.iter().enumerate().map(|(style, (name, title))| Series {
        name: (*title).into(),
        style: Style(style),
        values: sizes.iter().map(|&size| Summary::of(vec![document.time(size, name)?])).collect(),
    });
    section.parts.push(Part::Lines(Lines {
        title: "Reads at random, by size of the data".into(),
        across: "size of the data, MiB".into(),
        axis: "time of a read, ns".into(),
        at: sizes.iter().map(|&size| f64::from(size)).collect(),
        series: series.collect(),
    }));
    section.table(table(document));
    section
}

fn table(document: &Figure2) -> Table {
    let titles = COMBINATIONS.iter().map(|(_, title)| *title);
    let ratios = COMBINATIONS[..3].iter().map(|(name, _)| match *name {
        "none" => "both to neither",
        "host_only" => "both to host alone",
        _ => "both to guest alone",
    });
    let mut table = Table::new(
        "Median time of a read in ns, distance of its quartiles in brackets; misses of a read \
         by the hardware's counter, where there is one; and the ratio of huge pages at both layers \
         to each other combination",
        std::iter::once("MiB").chain(titles).chain(ratios),
    );
    for size in document.sizes() {
        let mut row = vec![Cell::Number(size.to_string())];
        for (name, _) in COMBINATIONS {
            row.push(Cell::number(document.time(size, name).map(|time| {
                let spread = document.spread(size, name).map(significant);
                let misses = document.misses(size, name).map(significant);
                let mut text = significant(time);
                if let Some(spread) = spread {
                    text.push_str(&format!(" ({spread})"));
                }
                if let Some(misses) = misses {
                    text.push_str(&format!(", {misses} misses"));
                }
                text
            })));
        }
        for (name, _) in &COMBINATIONS[..3] {
            let ratio = document.time(size, "both").zip(document.time(size, name));
            row.push(Cell::number(ratio.map(|(both, other)| significant(both / other))));
        }
        table.row(row);
    }
    table
}

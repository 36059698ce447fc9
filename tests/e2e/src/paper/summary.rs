//! The table of a set of runs.

use super::record::Record;

/// One line a run, in the order of `records`, under a heading.
#[must_use]
pub fn table(records: &[Record]) -> String {
    let heading = [
        "workload",
        "policy",
        "state",
        "vm",
        "rep",
        "rate",
        "coverage",
        "seconds to",
        "per second",
        "misses",
        "rss MiB",
        "copied MiB",
        "reused",
    ];
    let mut rows = vec![heading.map(str::to_owned)];
    rows.extend(records.iter().map(row));
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..heading.len()).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, width))| {
            // Words stand left, numbers right.
            if column < 4 {
                format!("{cell:<width$}")
            } else {
                format!("{cell:>width$}")
            }
        });
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

fn row(record: &Record) -> [String; 13] {
    let run = &record.run;
    let told = |value: Option<f64>, digits: usize| {
        value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
    };
    let alignment = record.alignment.as_ref();
    let costs = record.costs.as_ref();
    let misses = record.tlb.and_then(|tlb| tlb.misses);
    let reused = record.reuse.map(|reuse| format!("{}/{}", reuse.reused, reuse.aligned_before));
    let policy = run.policy.name();
    [
        run.workload.clone(),
        if record.failure.is_some() { format!("{policy} FAILED") } else { policy },
        super::name_of(run.state),
        super::name_of(run.vm),
        run.repetition.to_string(),
        told(alignment.map(|of| of.aligned_rate), 3),
        told(alignment.map(|of| of.aligned_coverage), 3),
        told(alignment.and_then(|of| of.seconds_to_alignment), 1),
        told(record.performance.as_ref().map(|of| of.per_second), 0),
        misses.map_or_else(|| "-".to_owned(), |misses| misses.to_string()),
        told(costs.map(|of| of.host_rss_mib), 0),
        told(costs.map(|of| of.copied_mib), 0),
        reused.unwrap_or_else(|| "-".to_owned()),
    ]
}

//! What a person and a script see of a run: the table of figures, the picture
//! of the block map, and their JSON.
//!
//! The harness and the real-VM demo both print through this module, so that
//! their tables can be laid side by side.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context;
use serde::{Deserialize, Serialize};

const MIB: u64 = 1 << 20;

/// Blocks in one row of the picture, for each of the two layers: both fit in a
/// terminal of 80 columns.
const PICTURE_ROW: u64 = 32;

/// The figures of merit of one workload under one policy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunFigures {
    /// Policy of the daemon.
    pub policy: String,
    /// Blocks that are huge at both layers.
    pub aligned: u64,
    /// Blocks that only the guest maps huge.
    pub guest_only: u64,
    /// Blocks in use, or held by the driver, that only the host maps huge.
    pub host_only: u64,
    /// `aligned / (aligned + guest_only + host_only)`, 0 where all are 0.
    pub aligned_rate: f64,
    /// Share (0 to 1) of the guest's resident user memory that lies in aligned
    /// blocks.
    pub aligned_coverage: f64,
    /// Bytes that the host copied to make huge pages.
    pub collapse_bytes: u64,
    /// Bytes of guest memory that the host holds.
    pub host_rss_bytes: u64,
    /// CPU time of the daemon, user and system, in seconds.
    pub daemon_cpu_seconds: f64,
    /// Wall-clock time of the workload in seconds.
    pub workload_seconds: f64,
}

impl RunFigures {
    /// Sets the three counts and the rate that follows from them.
    #[must_use]
    pub fn with_counts(mut self, aligned: u64, guest_only: u64, host_only: u64) -> Self {
        self.aligned = aligned;
        self.guest_only = guest_only;
        self.host_only = host_only;
        self.aligned_rate = ratio(aligned, aligned + guest_only + host_only);
        self
    }
}

/// `part / whole`, and 0 where there is no whole.
#[must_use]
pub fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 / whole as f64
    }
}

/// The document that `--json` writes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunsDocument {
    /// One element a policy, in the order in which they ran.
    pub runs: Vec<RunFigures>,
}

/// Writes `document` as indented JSON to `path`.
///
/// # Errors
/// If the file cannot be written.
pub fn write_json<T: Serialize>(path: &Path, document: &T) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(document)?;
    text.push('\n');
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// The table of `runs`, one line a policy, with its heading.
#[must_use]
pub fn table(runs: &[RunFigures]) -> String {
    let heading = [
        "policy",
        "aligned",
        "guest_only",
        "host_only",
        "aligned_rate",
        "aligned_coverage",
        "collapse_bytes",
        "host_rss",
        "daemon_cpu",
        "workload",
    ]
    .map(String::from);
    let mut rows = vec![heading];
    rows.extend(runs.iter().map(|run| {
        [
            run.policy.clone(),
            run.aligned.to_string(),
            run.guest_only.to_string(),
            run.host_only.to_string(),
            format!("{:.3}", run.aligned_rate),
            format!("{:.3}", run.aligned_coverage),
            mib(run.collapse_bytes),
            mib(run.host_rss_bytes),
            format!("{:.2} s", run.daemon_cpu_seconds),
            format!("{:.2} s", run.workload_seconds),
        ]
    }));

    let mut widths = [0; 10];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.len());
        }
    }
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(widths).enumerate() {
            // The policy is a word and stands left; numbers stand right.
            let _ = if column == 0 {
                write!(line, "{cell:<width$}")
            } else {
                write!(line, "  {cell:>width$}")
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Prints [`table`] to standard output.
pub fn print_table(runs: &[RunFigures]) {
    print!("{}", table(runs));
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / MIB as f64)
}

/// Neighbouring blocks that are alike at both layers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapRun {
    /// Number of the first block.
    pub first: u64,
    /// Number of blocks.
    pub count: u64,
    /// `unknown`, `free`, `base`, `huge`, `booked` or `pinned`.
    pub guest: String,
    /// `absent`, `base`, `huge` or `hugetlb`.
    pub host: String,
}

/// The answer of the daemon's control socket to `{"cmd":"map"}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockMap {
    /// Generation of the memory table that the map is of.
    pub generation: u64,
    /// log2 of the size of a block in bytes.
    pub block_shift: u32,
    /// Managed blocks in ascending order; blocks in no run are managed by
    /// nobody.
    pub runs: Vec<MapRun>,
}

impl BlockMap {
    /// The counts of `aligned`, `guest_only` and `host_only` blocks.
    #[must_use]
    pub fn counts(&self) -> (u64, u64, u64) {
        let mut counts = (0, 0, 0);
        for run in &self.runs {
            match alignment(&run.guest, &run.host) {
                Alignment::Aligned => counts.0 += run.count,
                Alignment::GuestOnly => counts.1 += run.count,
                Alignment::HostOnly => counts.2 += run.count,
                Alignment::Neither => {}
            }
        }
        counts
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Alignment {
    Aligned,
    GuestOnly,
    HostOnly,
    Neither,
}

fn alignment(guest: &str, host: &str) -> Alignment {
    let host_huge = matches!(host, "huge" | "hugetlb");
    match guest {
        "huge" if host_huge => Alignment::Aligned,
        "huge" => Alignment::GuestOnly,
        // A free block costs nothing until somebody uses it; memory that is in
        // use or held back counts.
        "base" | "booked" | "pinned" if host_huge => Alignment::HostOnly,
        _ => Alignment::Neither,
    }
}

fn guest_cell(run: &MapRun) -> char {
    match (run.guest.as_str(), alignment(&run.guest, &run.host)) {
        ("huge", Alignment::Aligned) => '#',
        ("huge", _) => 'G',
        ("base", _) => 'b',
        ("booked", _) => 'o',
        ("pinned", _) => 'x',
        ("free", _) => '.',
        _ => '?',
    }
}

fn host_cell(run: &MapRun) -> char {
    match (run.host.as_str(), alignment(&run.guest, &run.host)) {
        ("huge" | "hugetlb", Alignment::Aligned) => '#',
        ("huge" | "hugetlb", Alignment::HostOnly) => 'H',
        ("huge" | "hugetlb", _) => 'h',
        ("base", _) => 'b',
        ("absent", _) => '.',
        _ => '?',
    }
}

/// What the characters of [`picture`] mean.
pub const LEGEND: &str = "\
guest: # huge, aligned   G huge, host is not   b base pages   o booked   x pinned   . free   ? unknown
host:  # huge, aligned   H huge, guest is not  b base pages   h huge, guest uses none   . absent
";

/// The block map with both layers side by side, one character a block, 32
/// blocks a row, and the legend below. Where block numbers have a gap, so has
/// the picture.
#[must_use]
pub fn picture(map: &BlockMap) -> String {
    let width = usize::try_from(PICTURE_ROW).unwrap_or(0);
    let mut text = format!("{:>9}   {:<width$}   host\n", "block", "guest");
    let mut row: Option<(u64, String, String)> = None;
    let mut last_row = None;
    let flush = |text: &mut String, row: &mut Option<(u64, String, String)>| {
        if let Some((number, guest, host)) = row.take() {
            let start = number * PICTURE_ROW;
            let _ = writeln!(text, "{start:>9}  |{guest:<width$}| |{host:<width$}|");
        }
    };
    for run in &map.runs {
        for block in run.first..run.first.saturating_add(run.count) {
            let number = block / PICTURE_ROW;
            if row.as_ref().is_none_or(|(current, ..)| *current != number) {
                flush(&mut text, &mut row);
                if last_row.is_some_and(|last| number > last + 1) {
                    let _ = writeln!(text, "{:>9}", "...");
                }
                row = Some((number, String::new(), String::new()));
                last_row = Some(number);
            }
            if let Some((_, guest, host)) = &mut row {
                // Blocks of the row that nobody manages stay blank.
                let column = usize::try_from(block % PICTURE_ROW).unwrap_or(0);
                while guest.len() < column {
                    guest.push(' ');
                    host.push(' ');
                }
                guest.push(guest_cell(run));
                host.push(host_cell(run));
            }
        }
    }
    flush(&mut text, &mut row);
    text.push_str(LEGEND);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, count: u64, guest: &str, host: &str) -> MapRun {
        MapRun { first, count, guest: guest.into(), host: host.into() }
    }

    #[test]
    fn counts_follow_the_definition_of_alignment() {
        let map = BlockMap {
            generation: 1,
            block_shift: 21,
            runs: vec![
                run(0, 2, "huge", "huge"),
                run(2, 3, "huge", "base"),
                run(5, 4, "base", "huge"),
                run(9, 5, "booked", "hugetlb"),
                run(14, 6, "free", "huge"),
                run(20, 7, "unknown", "huge"),
                run(27, 1, "base", "base"),
            ],
        };
        assert_eq!(map.counts(), (2, 3, 9));
    }

    #[test]
    fn rate_of_nothing_is_zero() {
        let figures = RunFigures::default().with_counts(0, 0, 0);
        assert_eq!(figures.aligned_rate, 0.0);
        let figures = RunFigures::default().with_counts(3, 1, 0);
        assert_eq!(figures.aligned_rate, 0.75);
    }

    #[test]
    fn picture_shows_one_character_a_block_and_gaps() {
        let map = BlockMap {
            generation: 1,
            block_shift: 21,
            runs: vec![
                run(1, 2, "huge", "huge"),
                run(3, 1, "huge", "base"),
                run(4, 1, "base", "huge"),
                run(5, 30, "free", "absent"),
                run(128, 1, "booked", "huge"),
            ],
        };
        let picture = picture(&map);
        let lines: Vec<_> = picture.lines().collect();
        assert!(lines[1].contains("| ##Gb..........................."));
        assert!(lines[1].contains("| ##bH..........................."));
        assert!(lines[2].contains("|...  "));
        assert_eq!(lines[3].trim(), "...");
        assert!(lines[4].contains("|o ") && lines[4].contains("|H "));
        assert!(lines[1..5].iter().all(|line| line.len() <= 80));
    }

    #[test]
    fn json_has_the_published_names() {
        let document = RunsDocument { runs: vec![RunFigures::default()] };
        let value = serde_json::to_value(document).expect("figures are plain data");
        let mut names: Vec<_> =
            value["runs"][0].as_object().expect("a run is an object").keys().cloned().collect();
        names.sort();
        assert_eq!(
            names,
            [
                "aligned",
                "aligned_coverage",
                "aligned_rate",
                "collapse_bytes",
                "daemon_cpu_seconds",
                "guest_only",
                "host_only",
                "host_rss_bytes",
                "policy",
                "workload_seconds"
            ]
        );
    }

    #[test]
    fn table_has_a_line_a_run() {
        let runs = [
            RunFigures { policy: "none".into(), ..Default::default() },
            RunFigures { policy: "gemini".into(), collapse_bytes: 3 << 20, ..Default::default() }
                .with_counts(96, 2, 2),
        ];
        let table = table(&runs);
        assert_eq!(table.lines().count(), 3);
        assert!(table.lines().nth(2).is_some_and(|line| {
            line.starts_with("gemini") && line.contains("0.960") && line.contains("3.0 MiB")
        }));
    }
}

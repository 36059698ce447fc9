//! The block map as a picture: both layers side by side, one character a block.

use serde::Deserialize;
use serde_json::Value;
use std::fmt::Write;

/// Blocks in a row.
const ROW: u64 = 64;

#[derive(Deserialize)]
struct Run {
    first: u64,
    count: u64,
    guest: String,
    host: String,
}

/// What the characters mean.
const LEGEND: &str = "\
guest  # huge, aligned   G huge, host is not   b base pages   o booked   x pinned   . free   \
? unknown
host   # huge, aligned   H huge, guest is not   b base pages   h huge, guest uses none   \
. absent
";

fn cells(run: &Run) -> (char, char) {
    let host_huge = matches!(run.host.as_str(), "huge" | "hugetlb");
    let guest = match run.guest.as_str() {
        "huge" if host_huge => '#',
        "huge" => 'G',
        "base" => 'b',
        "booked" => 'o',
        "pinned" => 'x',
        "free" => '.',
        _ => '?',
    };
    let host = match (run.host.as_str(), run.guest.as_str()) {
        (_, "huge") if host_huge => '#',
        (_, "base" | "booked" | "pinned") if host_huge => 'H',
        _ if host_huge => 'h',
        ("base", _) => 'b',
        ("absent", _) => '.',
        _ => '?',
    };
    (guest, host)
}

/// The picture of an answer to `map`, and the legend. Rows that are all alike are told once, with
/// their number; where block numbers have a gap, so has the picture.
pub fn picture(answer: &Value) -> String {
    let runs: Vec<Run> = serde_json::from_value(answer["runs"].clone()).unwrap_or_default();
    if runs.is_empty() {
        return "no blocks: no VMM is connected\n".into();
    }
    let shift = answer["block_shift"].as_u64().unwrap_or_default();
    let mut text = String::new();
    let mut row = Row::default();
    for run in &runs {
        let (guest, host) = cells(run);
        let mut block = run.first;
        let end = run.first.saturating_add(run.count);
        while block < end {
            if block / ROW != row.number || row.is_empty() {
                row.end(&mut text, block / ROW);
            }
            let stop = end.min((row.number + 1) * ROW);
            row.put(block % ROW, stop - block, guest, host);
            block = stop;
            // A long run fills many rows with the same.
            let whole = (end - block) / ROW;
            if block % ROW == 0 && whole > 1 {
                row.end(&mut text, block / ROW);
                row.put(0, ROW, guest, host);
                row.repeated = whole - 1;
                block += whole * ROW;
            }
        }
    }
    row.end(&mut text, 0);
    let size = 1u64.checked_shl(u32::try_from(shift).unwrap_or(0)).unwrap_or(0) >> 20;
    format!("{:>9}   {:<64}   host   (a block: {size} MiB)\n{text}{LEGEND}", "block", "guest")
}

/// A row while it is filled.
#[derive(Default)]
struct Row {
    number: u64,
    guest: String,
    host: String,
    /// Further rows that are the same.
    repeated: u64,
}

impl Row {
    fn is_empty(&self) -> bool {
        self.guest.is_empty()
    }

    /// Puts `count` cells at a column; before them what nobody manages is blank.
    fn put(&mut self, column: u64, count: u64, guest: char, host: char) {
        for (cells, cell) in [(&mut self.guest, guest), (&mut self.host, host)] {
            let blank = column.saturating_sub(cells.len() as u64);
            cells.extend((0..blank).map(|_| ' '));
            cells.extend((0..count).map(|_| cell));
        }
    }

    /// Writes what is there, and begins another row.
    fn end(&mut self, text: &mut String, next: u64) {
        // Writing to a string does not fail.
        if !self.is_empty() {
            let _ = writeln!(
                text,
                "{:>9}  |{:<64}| |{:<64}|",
                self.number * ROW,
                self.guest,
                self.host
            );
            if self.repeated > 0 {
                let _ = writeln!(text, "{:>9}   the same {} more times", "", self.repeated);
            }
            if next > self.number + self.repeated + 1 {
                let _ = writeln!(text, "{:>9}", "...");
            }
        }
        *self = Self { number: next, ..Self::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn run(first: u64, count: u64, guest: &str, host: &str) -> Value {
        json!({"first": first, "count": count, "guest": guest, "host": host})
    }

    #[test]
    fn one_character_a_block_with_gaps() {
        let map = json!({"block_shift": 21, "runs": [
            run(1, 2, "huge", "huge"),
            run(3, 1, "huge", "base"),
            run(4, 1, "base", "hugetlb"),
            run(5, 60, "free", "absent"),
            run(256, 1, "booked", "huge"),
            run(257, 1, "free", "huge"),
            run(258, 1, "pinned", "base"),
        ]});
        let picture = picture(&map);
        let lines: Vec<_> = picture.lines().collect();
        let dots = ".".repeat(59);
        assert_eq!(lines[1], format!("        0  | ##Gb{dots}| | ##bH{dots}|"));
        assert_eq!(lines[2], format!("       64  |{:<64}| |{:<64}|", ".", "."));
        assert_eq!(lines[3].trim(), "...");
        assert_eq!(lines[4], format!("      256  |{:<64}| |{:<64}|", "o.x", "Hhb"));
        assert!(lines[5].starts_with("guest  #"), "{picture}");
        assert!(lines[0].contains("2 MiB"));
    }

    #[test]
    fn a_long_run_is_told_once() {
        let tebibyte = json!({"block_shift": 21, "runs": [
            run(0, 10, "base", "base"),
            run(10, 524_278, "free", "absent"),
        ]});
        let picture = picture(&tebibyte);
        assert_eq!(picture.lines().count(), 6, "{picture}");
        // Of 8192 rows one is begun by others, one stands for the rest.
        assert!(picture.contains("the same 8190 more times"), "{picture}");
    }

    #[test]
    fn nothing_is_told_as_nothing() {
        assert!(picture(&json!({"block_shift": 21, "runs": []})).contains("no VMM"));
        assert!(picture(&json!({})).contains("no VMM"));
    }
}

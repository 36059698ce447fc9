//! How far an evaluation has come: a line a run.

use std::io::{IsTerminal, Write};

use super::matrix::{Pace, Run};
use super::record::Record;

/// Tells of runs on standard error.
#[derive(Debug)]
pub struct Progress {
    all: usize,
    is_terminal: bool,
}

impl Progress {
    /// For `all` runs.
    #[must_use]
    pub fn new(all: usize) -> Self {
        Progress { all, is_terminal: std::io::stderr().is_terminal() }
    }

    /// Run `number`, from 1 on, begins. On a terminal its line is written over
    /// when it is done.
    pub fn begin(&self, number: usize, run: &Run) {
        if self.is_terminal {
            eprint!("[{number}/{}] {run} ...", self.all);
            // Only a terminal that is gone refuses, and then nobody looks.
            let _ = std::io::stderr().flush();
        }
    }

    /// It is done, and `open` are left.
    pub fn end(&self, number: usize, record: &Record, pace: &Pace, open: &[Run]) {
        let start = if self.is_terminal { "\r\x1b[K" } else { "" };
        let left = pace.estimate(open).map_or_else(String::new, |seconds| {
            if open.is_empty() {
                String::new()
            } else {
                format!("; {} left", duration(seconds))
            }
        });
        eprintln!(
            "{start}[{number}/{}] {} {:.0} s: {}{left}",
            self.all,
            record.run,
            record.made.seconds,
            outcome(record)
        );
    }
}

fn outcome(record: &Record) -> String {
    if let Some(failure) = &record.failure {
        return format!("FAILED: {failure}");
    }
    let mut text = String::new();
    if let Some(alignment) = &record.alignment {
        text = format!(
            "rate {:.2}, coverage {:.2}",
            alignment.aligned_rate, alignment.aligned_coverage
        );
    }
    if let Some(misses) = record.tlb.and_then(|tlb| tlb.misses) {
        text += &format!(", {misses} misses");
    }
    text
}

/// About how long something takes.
#[must_use]
pub fn duration(seconds: f64) -> String {
    // Saturates; nobody waits that long.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let minutes = (seconds / 60.0).ceil() as u64;
    match minutes {
        0..=1 => "about a minute".to_owned(),
        2..=119 => format!("about {minutes} min"),
        _ => format!("about {} h {:02} min", minutes / 60, minutes % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_told_in_minutes_and_hours() {
        assert_eq!(duration(20.0), "about a minute");
        assert_eq!(duration(61.0), "about 2 min");
        assert_eq!(duration(7200.0), "about 2 h 00 min");
        assert_eq!(duration(9000.5), "about 2 h 31 min");
    }
}

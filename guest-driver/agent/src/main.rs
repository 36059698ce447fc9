//! `gemini-guestd`: promotes base pages of processes to huge pages, those that
//! lie on huge pages of the host first. It runs inside the guest.

mod backoff;
mod blocks;
mod budget;
mod cgroup;
mod fmfi;
mod kernel;
mod pace;
mod pagemap;
mod plan;
mod process;
mod promote;
mod quiet;
mod report;
mod sys;

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

use crate::budget::Debt;
use crate::kernel::Geometry;
use crate::pace::Pace;
use crate::promote::{Promoter, Settings};
use crate::report::{Outcome, Report};

/// Longest time that a plan is worked on before all processes are looked at
/// again.
const PASS_LIMIT: Duration = Duration::from_secs(30);

/// Share of one CPU that passes without work may take in the long run.
const IDLE_SHARE: f64 = 0.005;

/// CPU seconds that they may take ahead of that: the first look at a large
/// process is no reason to miss what it does next.
const IDLE_CREDIT: f64 = 0.5;

/// Rest when there is no free huge page.
const SHORTAGE: Duration = Duration::from_secs(10);

/// How often the log tells what was done.
const LOG_PERIOD: Duration = Duration::from_secs(60);

/// Promotes base pages of processes in this guest to huge pages: ranges on host
/// huge pages first, then the densest.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// CPU time for all of it, in percent of one CPU
    #[arg(long, value_name = "PERCENT", default_value_t = 5,
          value_parser = clap::value_parser!(u32).range(1..=100))]
    cpu_share: u32,
    /// Bytes promoted a second at most, with K, M or G
    #[arg(long, value_name = "BYTES", default_value = "64M", value_parser = parse_size)]
    rate: u64,
    /// Seconds between two looks at all processes
    #[arg(long, value_name = "SECONDS", default_value_t = 2,
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
    /// Only this process; may be given several times
    #[arg(long = "pid", value_name = "PID",
          value_parser = clap::value_parser!(i32).range(1..))]
    pids: Vec<i32>,
    /// Looks and promotes once, then ends
    #[arg(long)]
    once: bool,
    /// Only shows what would be promoted
    #[arg(long)]
    dry_run: bool,
    /// Prints what each pass found and did as one line of JSON
    #[arg(long)]
    json: bool,
    /// error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    log_level: log::LevelFilter,
}

/// A number with K, M or G, at least 1 MiB.
fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .filter(|size| (1 << 20..=1 << 50).contains(size))
        .ok_or_else(|| "a size from 1M to 1048576G, such as 64M".to_owned())
}

fn main() -> ExitCode {
    let args = Args::parse();
    env_logger::Builder::new().filter_level(args.log_level).init();
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> anyhow::Result<()> {
    let geometry = Geometry::read()?;
    let pace = Pace::new(args.cpu_share, args.rate)?;
    let settings = Settings { rate: args.rate, dry_run: args.dry_run, pids: args.pids };
    let mut promoter = Promoter::new(settings, geometry, pace);
    let limit = (!args.once).then_some(PASS_LIMIT);
    let mut summary = Summary::default();
    let mut idle = Debt::new(IDLE_SHARE, IDLE_CREDIT);
    loop {
        let report = match promoter.pass(limit) {
            // Asked to end: that is no error.
            Err(_) if promoter.pace().stopped() => break,
            result => result?,
        };
        if args.json {
            let line = serde_json::to_string(&report)?;
            writeln!(std::io::stdout(), "{line}")?;
        }
        summary.add(&report);
        if args.once {
            break;
        }
        summary.log(promoter.pace().now());
        let interval = Duration::from_secs(args.interval);
        let wait = pause(&report, interval, &mut idle, promoter.pace().now());
        match promoter.pace().wait(wait) {
            Err(_) if promoter.pace().stopped() => break,
            result => result?,
        }
    }
    summary.finish();
    Ok(())
}

/// How long to wait after a pass that ended at `now`.
fn pause(report: &Report, interval: Duration, idle: &mut Debt, now: Duration) -> Duration {
    if report.promoted > 0 {
        return interval;
    }
    idle.charge(report.cpu_seconds, now);
    let least = if report.ended_early { SHORTAGE } else { Duration::ZERO };
    interval.max(least).max(idle.rest())
}

/// What the log will tell next.
#[derive(Debug, Default)]
struct Summary {
    promoted: u64,
    failed: u64,
    last_failure: Option<String>,
    driver: Option<bool>,
    told: Option<Duration>,
}

impl Summary {
    fn add(&mut self, report: &Report) {
        if self.driver.replace(report.driver) != Some(report.driver) {
            if report.driver {
                log::info!("the driver tells where the host has huge pages");
            } else {
                log::info!("no driver tells where the host has huge pages: density decides");
            }
        }
        self.promoted += report.promoted;
        self.failed += report.failed;
        let failure = report.ranges.iter().rev().find_map(|range| match &range.outcome {
            Outcome::Failed(error) => Some(error.clone()),
            _ => None,
        });
        self.last_failure = failure.or(self.last_failure.take());
    }

    /// Tells what was done, now and then.
    fn log(&mut self, now: Duration) {
        if self.told.is_none_or(|told| now.saturating_sub(told) >= LOG_PERIOD) {
            if self.promoted + self.failed > 0 {
                self.told = Some(now);
            }
            self.finish();
        }
    }

    fn finish(&mut self) {
        if self.promoted + self.failed > 0 {
            let why = self.last_failure.take().map_or(String::new(), |why| format!(": {why}"));
            log::info!("{} ranges promoted, {} failed{why}", self.promoted, self.failed);
        }
        (self.promoted, self.failed) = (0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_is_consistent() {
        Args::command().debug_assert();
        let args = Args::parse_from(["gemini-guestd", "--pid", "3", "--pid", "4", "--once"]);
        assert_eq!((args.pids, args.rate, args.cpu_share), (vec![3, 4], 64 << 20, 5));
    }

    #[test]
    fn sizes_have_suffixes_and_bounds() {
        assert_eq!(parse_size("64M"), Ok(64 << 20));
        assert_eq!(parse_size("1048576"), Ok(1 << 20));
        assert_eq!(parse_size("2048K"), Ok(2 << 20));
        for text in ["", "M", "0", "1", "-1M", "1T", "99999999999G", "1Ö"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}

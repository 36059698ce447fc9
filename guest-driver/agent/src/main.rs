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
use gemini_guestd::Args;

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

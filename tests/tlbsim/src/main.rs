//! `gemini-tlb-replay`: runs recorded traces through the model again.

use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{bail, Context};
use clap::{Parser, ValueEnum};
use gemini_tlbsim::blocks::Blocks;
use gemini_tlbsim::counters::Counters;
use gemini_tlbsim::estimate::Estimate;
use gemini_tlbsim::profile::{self, Profile};
use gemini_tlbsim::replay::{replay, Host};
use serde_json::json;

#[derive(Parser)]
#[command(version, about = "Replays traces of the TLB simulator")]
struct Cli {
    /// Traces, one of each virtual processor
    #[arg(required = true)]
    traces: Vec<PathBuf>,
    /// Simulate another processor than the one that was recorded; NAME+coalesceN has
    /// entries for N base pages
    #[arg(long, value_name = "NAME", value_parser = parse_profile)]
    profile: Option<Profile>,
    /// What the host is taken to be
    #[arg(long, value_enum, default_value = "recorded")]
    host: HostChoice,
    /// Tell the N blocks of guest memory that cost most, too
    #[arg(long, value_name = "N", default_value_t = 0)]
    blocks: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum HostChoice {
    /// What it was
    Recorded,
    /// Base pages alone
    Base,
    /// Huge pages everywhere
    Huge,
}

fn parse_profile(name: &str) -> anyhow::Result<Profile> {
    profile::find(name).with_context(|| {
        let names = profile::ALL.map(|profile| profile.name).join(", ");
        format!("there is: {names}; each with +coalesce2, 4, 8 or 16, too")
    })
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Prints what all traces count together, and the cycles that it costs: traces know
/// no instructions, so that is the TLB's part alone. A replay as it was recorded
/// must count what was counted then. Traces that reached their limit are named.
fn run(cli: &Cli) -> anyhow::Result<()> {
    let host = match cli.host {
        HostChoice::Recorded => Host::Recorded,
        HostChoice::Base => Host::Base,
        HostChoice::Huge => Host::Huge,
    };
    let mut estimates = Vec::new();
    let mut blocks = Blocks::default();
    let mut full = Vec::new();
    for path in &cli.traces {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let replayed = replay(BufReader::new(file), cli.profile, host)
            .with_context(|| format!("cannot replay {}", path.display()))?;
        let counters = Counters { skipped: replayed.recorded.skipped, ..replayed.counters };
        let unchanged =
            cli.profile.is_none_or(|profile| profile.to_string() == replayed.header.profile);
        if unchanged && host == Host::Recorded && counters != replayed.recorded {
            bail!(
                "{} does not replay as it was recorded: {counters:?}, then {:?}",
                path.display(),
                replayed.recorded
            );
        }
        if replayed.full {
            eprintln!(
                "note: {} is as large as it might be: what came later is not in it",
                path.display()
            );
            full.push(path);
        }
        blocks = blocks.plus(&replayed.blocks);
        estimates.push(Estimate::of(&replayed.profile, counters, None));
    }
    let total = estimates.into_iter().reduce(|sum, next| sum.plus(&next));
    let mut answer = json!(total);
    answer["full_traces"] = json!(full);
    if cli.blocks > 0 {
        let mut ranked = blocks.ranked();
        ranked.truncate(cli.blocks);
        answer["blocks"] = json!(ranked);
    }
    println!("{answer:#}");
    Ok(())
}

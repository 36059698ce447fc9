//! Command line of the simulator.

use anyhow::Context;
use clap::{Parser, Subcommand};
use gemini_harness::report::{self, BlockMap};
use gemini_simulator::record;
use gemini_simulator::scenario::{self, Size};
use gemini_simulator::simulation::{self, Plan};
use gemini_simulator::trace::Trace;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use vhost_device_gemini::policy::Policy;

/// A simulation of the daemon's decisions: no memory, no guest, no daemon.
#[derive(Debug, Parser)]
#[command(name = "gemini-simulator", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The same generated guest under each policy.
    Simulate {
        /// Write the result as JSON.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// Seed of everything random.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// A smaller guest.
        #[arg(long)]
        quick: bool,
    },
    /// A recorded guest under one policy.
    Replay {
        /// The trace.
        trace: PathBuf,
        /// The policy.
        #[arg(long, default_value = "gemini")]
        policy: Policy,
        /// Bytes that may be copied per second.
        #[arg(long, value_name = "BYTES", default_value_t = 256 << 20)]
        copy_rate: u64,
        /// Seconds that it goes on after the last event.
        #[arg(long, value_name = "SECONDS", default_value_t = 5)]
        rest: u64,
    },
    /// Records a trace of the guest of a running daemon, and prints it.
    Record {
        /// The daemon's control socket.
        #[arg(long, value_name = "PATH")]
        control_socket: PathBuf,
        /// For how long.
        #[arg(long, value_name = "SECONDS", default_value_t = 10)]
        seconds: u64,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("gemini-simulator: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(command: Command) -> anyhow::Result<bool> {
    match command {
        Command::Simulate { json, seed, quick } => {
            let scenario = scenario::measure(Size::new(quick), seed);
            print!("{scenario}");
            if let Some(path) = json {
                report::write_json(&path, &scenario.document()?)?;
            }
            Ok(scenario.passed())
        }
        Command::Replay { trace, policy, copy_rate, rest } => {
            let text = std::fs::read_to_string(&trace)
                .with_context(|| format!("cannot read {}", trace.display()))?;
            let trace: Trace = text.parse()?;
            let rest = Duration::from_secs(rest);
            let report = simulation::run(&trace, &Plan { copy_rate, rest, ..Plan::new(policy) });
            println!("simulated: {report:#?}");
            Ok(report.wrong.is_empty())
        }
        Command::Record { control_socket, seconds } => {
            let mut recorder = record::Recorder::default();
            record::watch(&control_socket, Duration::from_secs(seconds), |at, map: &BlockMap| {
                recorder.take(at, map);
            })?;
            print!("{}", recorder.finish());
            Ok(true)
        }
    }
}

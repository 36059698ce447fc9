//! Measured scenarios that need a real guest.

pub mod restart;

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use gemini_harness::figures::Scenario;
use gemini_harness::report;

use crate::accel::AccelChoice;
use crate::lab::Bench;

/// `gemini-lab bench`
#[derive(Args, Clone, Debug)]
pub struct BenchArgs {
    /// What to measure
    scenario: Name,
    /// Write the figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Seed of everything random
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Fewer rounds: shows that it works, measures less
    #[arg(long)]
    quick: bool,
}

/// The scenarios of this program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Name {
    /// The daemon is killed and restarted under a guest under load
    Restart,
}

/// Measures a scenario and prints its figures against their bars. Returns
/// whether all were reached.
///
/// # Errors
/// If a part does not come up, or a figure cannot be measured.
pub fn run(args: &BenchArgs) -> anyhow::Result<bool> {
    let bench = Bench::new(AccelChoice::from_env()?)?;
    let mut scenario = match args.scenario {
        Name::Restart => restart::measure(&bench, args.seed, args.quick)?,
    };
    scenario.arg("seed", args.seed);
    scenario.arg("quick", args.quick);
    describe(&mut scenario, &bench)?;
    print!("{scenario}");
    if let Some(path) = &args.json {
        report::write_json(path, &scenario.document()?)?;
    }
    Ok(scenario.passed())
}

fn describe(scenario: &mut Scenario, bench: &Bench) -> anyhow::Result<()> {
    scenario.arg("accel", bench.accel.name());
    scenario.version("guest_kernel", bench.assets.guest.release.clone());
    let qemu = std::process::Command::new(&bench.assets.qemu)
        .arg("--version")
        .output()?;
    let qemu = String::from_utf8_lossy(&qemu.stdout);
    scenario.version("qemu", qemu.lines().next().unwrap_or("unknown"));
    Ok(())
}

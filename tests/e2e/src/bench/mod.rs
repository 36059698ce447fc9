//! Measured scenarios that need a real guest.

pub mod base_pages;
pub mod driver_cycle;
pub mod faults;
pub mod first_touch;
pub mod fragmented;
pub mod give_back;
pub mod host_pressure;
pub mod memory_changes;
pub mod migrate;
pub mod order;
pub mod pressure;
pub mod restart;
pub mod reuse;
pub mod scarce_host;
pub mod spread;
pub mod stress;
pub mod tlb;
pub mod workloads;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};
use gemini_harness::figures::Scenario;
use gemini_harness::report;
use serde_json::Value;

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
    /// How long `stress` works [default: 30, or 2 with --quick]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=10_000))]
    minutes: Option<u64>,
    /// `stress` and `memory-changes` without the driver: what goes wrong then is
    /// the kernel's own
    #[arg(long)]
    control: bool,
}

/// The scenarios of this program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Name {
    /// The daemon is killed and restarted under a guest under load
    Restart,
    /// The driver is loaded and unloaded under memory load
    DriverCycle,
    /// A program touches huge pages in a fragmented guest
    FirstTouch,
    /// Aligned blocks of a program that ended serve the next one
    Reuse,
    /// Everything that takes, moves or drops pages, at the same time
    Stress,
    /// The host has huge pages for a quarter of the guest
    ScarceHost,
    /// A program that needs all memory gets it from a driver that holds it
    GuestPressure,
    /// A guest frees memory, and the host gets it back
    GiveBack,
    /// A program of the host takes what a guest can spare
    HostPressure,
    /// Memory is plugged, unplugged, ballooned, and the daemon killed
    MemoryChanges,
    /// A guest moves from QEMU to QEMU, and parts of that die
    Migrate,
    /// Base pages become aligned through the promoter in the guest
    BasePages,
    /// What the driver's hooks cost page faults
    FaultLatency,
    /// Simulated TLB misses of a program that reads at random
    Tlb,
    /// Each workload of the evaluation, alone and without the driver
    Workloads,
}

/// Measures a scenario and prints its figures against their bars. Returns
/// whether all were reached.
///
/// # Errors
/// If a part does not come up, or a figure cannot be measured.
pub fn run(args: &BenchArgs) -> anyhow::Result<bool> {
    let accel = match args.scenario {
        // Only an emulator shows every access.
        Name::Tlb => AccelChoice::Tcg,
        _ => AccelChoice::from_env()?,
    };
    let bench = match args.scenario {
        // No figure of them depends on settings, and they take long.
        Name::DriverCycle | Name::Stress | Name::Workloads => Bench::with_any_settings(accel)?,
        _ => Bench::new(accel)?,
    };
    let minutes = args.minutes.unwrap_or(if args.quick { 2 } else { 30 });
    let mut scenario = match args.scenario {
        Name::Restart => restart::measure(&bench, args.seed, args.quick)?,
        Name::ScarceHost => scarce_host::measure(&bench, args.seed, args.quick)?,
        Name::DriverCycle => driver_cycle::measure(&bench, args.seed, args.quick)?,
        Name::FirstTouch => first_touch::measure(&bench, args.seed, args.quick)?,
        Name::Reuse => reuse::measure(&bench, args.seed, args.quick)?,
        Name::Stress => {
            let duration = Duration::from_secs(60 * minutes);
            stress::measure(&bench, args.seed, duration, args.control)?
        }
        Name::GiveBack => give_back::measure(&bench, args.seed, args.quick)?,
        Name::HostPressure => host_pressure::measure(&bench, args.seed, args.quick)?,
        Name::MemoryChanges => {
            memory_changes::measure(&bench, args.seed, args.quick, args.control)?
        }
        Name::Migrate => migrate::measure(&bench, args.seed, args.quick)?,
        Name::BasePages => base_pages::measure(&bench, args.seed, args.quick)?,
        Name::FaultLatency => faults::measure(&bench, args.seed, args.quick)?,
        Name::Tlb => tlb::measure(&bench, args.seed, args.quick)?,
        Name::Workloads => workloads::measure(&bench, args.seed, args.quick)?,
        Name::GuestPressure => pressure::measure(&bench, args.quick)?,
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

/// `gemini-lab join`
#[derive(Args, Clone, Debug)]
pub struct JoinArgs {
    /// Document of the scenario with a real guest
    real: PathBuf,
    /// Document of the same scenario with a model guest
    model: PathBuf,
}

/// Prints one document made of the two halves of a scenario: the figures of the
/// model guest get the prefix `model_`.
///
/// # Errors
/// If a document cannot be read.
pub fn join(args: &JoinArgs) -> anyhow::Result<()> {
    let mut joined = read_document(&args.real)?;
    let model = read_document(&args.model)?;
    for part in ["figures", "args", "versions"] {
        let from = model[part].as_object().cloned().unwrap_or_default();
        let into = joined[part]
            .as_object_mut()
            .with_context(|| format!("{} has no {part}", args.real.display()))?;
        for (name, value) in from {
            into.insert(format!("model_{name}"), value);
        }
    }
    println!("{joined:#}");
    Ok(())
}

fn read_document(path: &Path) -> anyhow::Result<Value> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is no JSON", path.display()))
}

fn describe(scenario: &mut Scenario, bench: &Bench) -> anyhow::Result<()> {
    scenario.arg("accel", bench.accel.name());
    scenario.version("guest_kernel", bench.assets.guest.release.clone());
    for (name, program) in [("qemu", &bench.assets.qemu), ("daemon", &bench.assets.daemon)] {
        let output = std::process::Command::new(program).arg("--version").output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        scenario.version(name, text.lines().next().unwrap_or("unknown"));
    }
    Ok(())
}

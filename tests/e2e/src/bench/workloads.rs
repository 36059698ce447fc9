//! Each workload of the evaluation, alone in a guest: that it works, and what
//! it does where nothing is done for huge pages.

use std::time::Instant;

use anyhow::Context;
use gemini_guest::protocol::{Loaded, Measured};
use gemini_harness::figures::{Bar, Scenario};

use crate::lab::Bench;
use crate::vm::{Vm, VmConfig};
use crate::workload::{Kind, Size, Workload, Workloads, OF_IMAGE};

/// Share of the data that is to be resident when it is loaded. A program whose
/// data is on a disk has none.
const RESIDENT_BAR: f64 = 0.8;

/// Runs one phase of every workload, each in a guest of its own.
///
/// # Errors
/// If a guest does not come up, or a workload fails.
pub fn measure(bench: &Bench, seed: u64, quick: bool) -> anyhow::Result<Scenario> {
    let workloads = Workloads::from_env()?
        .context("GEMINI_WORKLOADS is not set; scripts/bench workloads sets it")?;
    let mut scenario = Scenario::new("workloads");
    for (package, version) in &workloads.packages {
        scenario.version(package, version.clone());
    }
    println!(
        "{:<14} {:>5} {:>8} {:>7} {:>10} {:>8} {:>8} {:>10} {:>11} {:>11}  of what",
        "workload",
        "MiB",
        "resident",
        "load s",
        "operations",
        "seconds",
        "QEMU s",
        "per second",
        "mean us",
        "p99 us"
    );
    for kind in OF_IMAGE {
        let size = kind.size(quick, None);
        eprintln!("==> {}", kind.name);
        let ran = run(bench, &workloads, kind, size, seed).with_context(|| kind.name)?;
        let measured = &ran.measured;
        let rate = measured.operations as f64 / measured.seconds;
        println!(
            "{:<14} {:>5} {:>8.0} {:>7.1} {:>10} {:>8.2} {:>8.2} {:>10.1} {:>11.0} {:>11.0}  {}, {}",
            kind.name,
            size.mib,
            ran.loaded.resident_mib,
            ran.load_seconds,
            measured.operations,
            measured.seconds,
            ran.cpu_seconds,
            rate,
            measured.mean_us,
            measured.p99_us,
            measured.unit,
            measured.version
        );
        let mut figure = |name: &str, value, bar| {
            scenario.figure(&format!("{}_{name}", kind.name), value, bar);
        };
        let bar = if kind.indifferent { 0.0 } else { size.mib as f64 * RESIDENT_BAR };
        figure("resident_mib", ran.loaded.resident_mib, Bar::AtLeast(bar));
        figure("load_seconds", ran.load_seconds, Bar::None);
        figure("seconds", measured.seconds, Bar::None);
        figure("qemu_cpu_seconds", ran.cpu_seconds, Bar::None);
        figure("per_second", rate, Bar::None);
        figure("mean_us", measured.mean_us, Bar::None);
        figure("p99_us", measured.p99_us, Bar::None);
    }
    Ok(scenario)
}

/// What a workload has come to.
struct Run {
    loaded: Loaded,
    load_seconds: f64,
    measured: Measured,
    /// Of QEMU in the measured phase: what else runs on this machine does not
    /// change it much.
    cpu_seconds: f64,
}

fn run(
    bench: &Bench,
    workloads: &Workloads,
    kind: Kind,
    size: Size,
    seed: u64,
) -> anyhow::Result<Run> {
    let mut config = VmConfig::new(&format!("workloads-{}", kind.name), bench.accel);
    config.workloads = Some(workloads.clone());
    let vm = Vm::boot(&bench.assets, config)?;
    let start = Instant::now();
    let mut workload = Workload::start(&vm.guest, kind.name, size.mib, seed, size.operations)?;
    let loaded = workload.wait_loaded()?;
    let load_seconds = start.elapsed().as_secs_f64();
    let before = vm.process.cpu_seconds()?;
    let measured = workload.go(&vm.guest)?;
    let cpu_seconds = vm.process.cpu_seconds()? - before;
    workload.end(&vm.guest)?;
    Ok(Run { loaded, load_seconds, measured, cpu_seconds })
}

//! The workloads of the evaluation work in a real guest, and a seed decides
//! what they do.

use std::collections::BTreeMap;

use anyhow::{ensure, Context};
use gemini_e2e::accel::AccelChoice;
use gemini_e2e::assets::Assets;
use gemini_e2e::vm::{Vm, VmConfig};
use gemini_e2e::workload::{Kind, Workload, Workloads, OF_IMAGE};

fn boot(assets: &Assets, workloads: &Workloads) -> anyhow::Result<Vm> {
    // No setting of the host matters here.
    let accel = AccelChoice::from_env()?.resolve(assets)?;
    let mut config = VmConfig::new("workloads", accel);
    config.workloads = Some(workloads.clone());
    Vm::boot(assets, config)
}

/// Runs two phases; returns what both have answered.
fn run(vm: &Vm, kind: Kind, seed: u64) -> anyhow::Result<[String; 2]> {
    let size = kind.quick;
    let mut workload = Workload::start(&vm.guest, kind.name, size.mib, seed, size.operations)?;
    let loaded = workload.wait_loaded()?;
    if !kind.indifferent {
        let bytes = size.mib as f64;
        ensure!(loaded.resident_mib > bytes * 0.8, "{loaded:?} of {bytes}");
    }
    let mut digests = [String::new(), String::new()];
    for digest in &mut digests {
        let measured = workload.go(&vm.guest)?;
        eprintln!("{}: {loaded:?}, {measured:?}", kind.name);
        ensure!(measured.operations == size.operations, "{measured:?}");
        let mean = measured.mean_us * 1e-6 * size.operations as f64;
        ensure!(mean > 0.0 && mean <= measured.seconds, "{measured:?}");
        ensure!(measured.p99_us > 0.0 && measured.p99_us * 1e-6 <= measured.seconds);
        ensure!(measured.version.contains(|letter: char| letter.is_ascii_digit()));
        *digest = measured.digest;
    }
    workload.end(&vm.guest)?;
    Ok(digests)
}

#[test]
#[ignore = "takes ten minutes, and GEMINI_WORKLOADS: see docs/workloads.md"]
fn each_works_and_a_seed_decides_what_it_does() -> anyhow::Result<()> {
    let workloads = Workloads::from_env()?
        .context("GEMINI_WORKLOADS is not what scripts/build-workloads printed last")?;
    let assets = Assets::from_env()?;
    let mut first = BTreeMap::new();
    for round in 0..2 {
        let vm = boot(&assets, &workloads)?;
        let position = vm.guest.log_position()?;
        for kind in OF_IMAGE {
            let digests = run(&vm, kind, 1).with_context(|| kind.name)?;
            if round == 0 {
                // The state of a program that does not change may repeat.
                first.insert(kind.name, digests);
            } else {
                ensure!(first[kind.name] == digests, "{} does another thing", kind.name);
            }
        }
        ensure!(vm.guest.tell_complaints(position)? == 0, "the guest complains");
    }
    Ok(())
}

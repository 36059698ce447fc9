//! The demonstration: the same guest and the same workload under each policy.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use gemini_guest::protocol::PageSize;
use gemini_harness::report::{self, RunFigures, RunsDocument};

use crate::accel::AccelChoice;
use crate::lab::{Bench, Lab};
use crate::settings::SHMEM_ENABLED;
use crate::MIB;

/// How long the daemon may take to bring the host to where the policy wants it.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(60);

/// Random reads of the workload.
const READS: u64 = 10_000_000;

/// `gemini-lab demo`
#[derive(Args, Clone, Debug)]
pub struct DemoArgs {
    /// Guest memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 1536,
          value_parser = clap::value_parser!(u64).range(512..=1 << 20))]
    mem: u64,
    /// Run only this policy (may be given several times)
    #[arg(long, value_name = "POLICY", value_parser = ["none", "always", "gemini"])]
    policy: Vec<String>,
    /// What guests run on: auto takes KVM only if a probe guest boots under it
    #[arg(long, value_name = "auto|tcg|kvm", default_value = "auto")]
    accel: AccelChoice,
    /// Write the figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Runs the demonstration and prints table and picture.
///
/// # Errors
/// If a part does not come up, or a figure cannot be measured.
pub fn run(args: &DemoArgs) -> anyhow::Result<()> {
    let policies = if args.policy.is_empty() {
        ["none", "always", "gemini"].map(String::from).to_vec()
    } else {
        args.policy.clone()
    };
    let bench = Bench::new(args.accel)?;
    let workload = workload_bytes(args.mem * MIB);
    println!(
        "guest: Linux {}, {} MiB on {}, huge pages on; workload: fill {} MiB, \
         read {READS} words at random",
        bench.assets.guest.release,
        args.mem,
        bench.accel.name(),
        workload / MIB,
    );
    println!(
        "host: {SHMEM_ENABLED} was `{}`, is `never` for this run (so that the policy alone \
         decides), and is put back",
        bench.shmem_before
    );

    let mut runs = Vec::new();
    let mut pictures = Vec::new();
    for policy in &policies {
        eprintln!("==> policy {policy}");
        let (figures, picture) = run_policy(&bench, policy, args.mem * MIB, workload)
            .with_context(|| format!("policy {policy}"))?;
        runs.push(figures);
        pictures.push((policy, picture));
    }

    if let Some((policy, picture)) = pictures.last() {
        println!("\nblocks of 2 MiB under `{policy}`, both layers side by side:\n{picture}");
    }
    report::print_table(&runs);
    println!(
        "\naligned, guest_only, host_only: blocks of 2 MiB, counted from the guest's \
         /proc/kpageflags and\nQEMU's page tables, not from the daemon. host_rss: memory behind \
         the guest."
    );
    if bench.accel == crate::accel::Accel::Tcg {
        println!("The guest is emulated: its workload time shows no effect of the TLB.");
    }
    if let Some(path) = &args.json {
        report::write_json(path, &RunsDocument { runs })?;
    }
    Ok(())
}

/// Several hundred MiB, and room for the rest of the guest.
fn workload_bytes(memory: u64) -> u64 {
    (memory / 2).min(640 * MIB) / crate::BLOCK * crate::BLOCK
}

fn run_policy(
    bench: &Bench,
    policy: &str,
    memory: u64,
    workload: u64,
) -> anyhow::Result<(RunFigures, String)> {
    let mut lab = Lab::start(bench, &format!("demo-{policy}"), policy, |config| {
        config.memory = memory;
    })?;
    let guest = &lab.vm.guest;
    if policy == "gemini" {
        lab.wait_stocked(SETTLE_TIMEOUT)?;
    } else {
        // What one has without this project: a guest that places by itself.
        guest.hints_only()?;
    }
    let filled = guest.fill("workload", workload, 1, PageSize::System)?;
    let read = guest.read("workload", READS, 2)?;
    if policy == "gemini" {
        // A stock for a demand that is over would count as memory held back.
        lab.wait_burst_over(SETTLE_TIMEOUT)?;
    }
    lab.wait_settled(SETTLE_TIMEOUT)?;

    let view = lab.view()?;
    let counts = view.counts();
    let status = lab.daemon.status()?;
    for finding in &status.findings {
        eprintln!("{}: {} ({})", finding.severity, finding.message, finding.code);
    }
    let figures = RunFigures {
        policy: policy.to_owned(),
        aligned_coverage: counts.aligned_coverage(),
        collapse_bytes: status.collapse_bytes,
        host_rss_bytes: lab.memory.resident_bytes()?,
        daemon_cpu_seconds: lab.daemon.process.cpu_seconds()?,
        workload_seconds: filled.seconds + read.seconds,
        ..RunFigures::default()
    }
    .with_counts(counts.aligned, counts.guest_only, counts.host_only);
    lab.vm.guest.verify("workload")?;
    let picture = report::picture(&view.to_map());
    drop(lab.vm);
    lab.daemon.stop()?;
    Ok((figures, picture))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workload_is_several_hundred_mib_of_whole_blocks() {
        assert_eq!(workload_bytes(1536 * MIB), 640 * MIB);
        assert_eq!(workload_bytes(513 * MIB), 256 * MIB);
    }
}

//! Command line of the harness.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use gemini_harness::figures::Scenario;
use gemini_harness::{
    budgets, cleanup, figure2, fragment, give_back, hostile, hugetlb_short, policy_scale, ready,
    report, reserve, restart, run, scale, settings, shares, stall,
};

/// Drive a real vhost-device-gemini with a model guest: no virtual machine, no root.
#[derive(Debug, Parser)]
#[command(name = "gemini-harness", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct Common {
    /// Write the result as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Seed of everything random.
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Do less: for tests and demos.
    #[arg(long)]
    quick: bool,

    /// The daemon's program [default: beside this one].
    #[arg(long, value_name = "PATH")]
    daemon: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The same workload under each policy: the table and the block map.
    Run {
        #[command(flatten)]
        common: Common,

        /// Guest memory in MiB; less is taken where the machine has less.
        #[arg(long, value_name = "MIB", default_value_t = 1024)]
        mem: u64,

        /// Policies, in this order.
        #[arg(long, value_delimiter = ',', default_value = "none,always,gemini")]
        policy: Vec<String>,
    },
    /// A million malformed and adversarial inputs over the socket and the rings.
    Hostile {
        #[command(flatten)]
        common: Common,

        /// Inputs to send [default: 1000000, with --quick 50000].
        #[arg(long)]
        inputs: Option<u64>,
    },
    /// A guest of 1 TiB and one of 4 GiB: time of a resync, cost of the daemon.
    Scale {
        #[command(flatten)]
        common: Common,
    },
    /// What deciding costs: a guest of 1 TiB that changes, and 16 idle daemons.
    PolicyScale {
        #[command(flatten)]
        common: Common,
    },
    /// What the daemon spends under a guest that asks for everything.
    Budgets {
        #[command(flatten)]
        common: Common,
    },
    /// How long a program stalls while its memory is collapsed under it.
    CollapseStall {
        #[command(flatten)]
        common: Common,
    },
    /// What each of several VMs has of a limited supply.
    Shares {
        #[command(flatten)]
        common: Common,
    },
    /// How fast blocks are made huge before the guest uses them.
    Ready {
        #[command(flatten)]
        common: Common,
    },
    /// What it costs to give memory back, beside a balloon of 4 KiB pages.
    GiveBack {
        #[command(flatten)]
        common: Common,
    },
    /// Guests on hugetlb memory while the host's pool runs short at any moment.
    HugetlbShort {
        #[command(flatten)]
        common: Common,
    },
    /// When a TLB entry covers 2 MiB, on this machine's own processor.
    Figure2 {
        #[command(flatten)]
        common: Common,
    },
    /// What a reserve of huge pages would be worth in a fragmented host.
    Reserve {
        #[command(flatten)]
        common: Common,
    },
    /// Fragments this machine's free memory until standard input ends.
    Fragment {
        /// The unusable free space index for huge pages that is to be reached.
        #[arg(long, default_value_t = 0.95)]
        fmfi: f64,

        /// Seed of which page of each block is pinned.
        #[arg(long, default_value_t = 1)]
        seed: u64,

        /// Longest time that it may take.
        #[arg(long, default_value_t = 60)]
        seconds: u64,
    },
    /// The daemon is killed at each step of a request and started again.
    Restart {
        #[command(flatten)]
        common: Common,

        /// A daemon that was built with the feature fault-points
        /// [default: target/fault-points/PROFILE/vhost-device-gemini].
        #[arg(long, value_name = "PATH")]
        fault_daemon: Option<PathBuf>,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(error) = cleanup::on_signals() {
        eprintln!("gemini-harness: cannot handle signals: {error}");
        return ExitCode::from(2);
    }
    let result = match cli.command {
        Command::Run { common, mem, policy } => run_policies(&common, mem, &policy),
        Command::Hostile { common, inputs } => hostile(&common, inputs),
        Command::Scale { common } => scale(&common),
        Command::PolicyScale { common } => policy_scale(&common),
        Command::Budgets { common } => budgets(&common),
        Command::CollapseStall { common } => collapse_stall(&common),
        Command::Shares { common } => shares(&common),
        Command::Ready { common } => ready(&common),
        Command::GiveBack { common } => give_back(&common),
        Command::HugetlbShort { common } => hugetlb_short(&common),
        Command::Figure2 { common } => figure2(&common),
        Command::Reserve { common } => reserve(&common),
        Command::Fragment { fmfi, seed, seconds } => hold_fragments(fmfi, seed, seconds),
        Command::Restart { common, fault_daemon } => restart(&common, fault_daemon.as_deref()),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("gemini-harness: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run_policies(common: &Common, mem: u64, policies: &[String]) -> anyhow::Result<bool> {
    let start = Instant::now();
    let held = settings::daemon_decides()?;
    let wanted = mem.checked_mul(1 << 20).context("--mem is too large")?;
    let memory = run::fitting_memory(wanted)?;
    let plan = run::Plan {
        program: run::program(common.daemon.as_deref())?,
        memory,
        seed: common.seed,
        reads: if common.quick { 2_000_000 } else { 20_000_000 },
    };
    println!("model guest, no virtual machine: {} MiB of memory", memory >> 20);
    if memory < wanted {
        println!("({mem} MiB do not fit this machine)");
    }
    println!("shmem_enabled: {}", held.describe());
    let mut document = report::RunsDocument::default();
    for policy in policies {
        let outcome = run::run(&plan, policy).with_context(|| format!("policy {policy}"))?;
        println!("\npolicy {policy}");
        for finding in &outcome.findings {
            println!("daemon says: {finding}");
        }
        print!("{}", report::picture(&outcome.map));
        document.runs.push(outcome.figures);
    }
    println!("\nmodel guest, no virtual machine; seen from outside and by the daemon alike");
    report::print_table(&document.runs);
    println!("took {:.1} s", start.elapsed().as_secs_f64());
    if let Some(path) = &common.json {
        report::write_json(path, &document)?;
    }
    let missed: Vec<_> = document.runs.iter().flat_map(run::missed).collect();
    for bar in &missed {
        println!("MISSED {bar}");
    }
    Ok(missed.is_empty())
}

fn hostile(common: &Common, inputs: Option<u64>) -> anyhow::Result<bool> {
    let program = run::program(common.daemon.as_deref())?;
    let mut plan = hostile::Plan::new(program, common.seed, common.quick);
    plan.inputs = inputs.unwrap_or(plan.inputs);
    finish(&hostile::measure(&plan)?, common.json.as_deref())
}

fn scale(common: &Common) -> anyhow::Result<bool> {
    let plan = scale::Plan::new(run::program(common.daemon.as_deref())?, common.quick);
    finish(&scale::measure(&plan)?, common.json.as_deref())
}

fn policy_scale(common: &Common) -> anyhow::Result<bool> {
    let plan = policy_scale::Plan::new(run::program(common.daemon.as_deref())?, common.quick);
    finish(&policy_scale::measure(&plan)?, common.json.as_deref())
}

fn budgets(common: &Common) -> anyhow::Result<bool> {
    let program = run::program(common.daemon.as_deref())?;
    let plan = budgets::Plan::new(program, common.quick, common.seed);
    finish(&budgets::measure(&plan)?, common.json.as_deref())
}

fn collapse_stall(common: &Common) -> anyhow::Result<bool> {
    let program = run::program(common.daemon.as_deref())?;
    let plan = stall::Plan::new(program, common.quick, common.seed);
    finish(&stall::measure(&plan)?, common.json.as_deref())
}

fn shares(common: &Common) -> anyhow::Result<bool> {
    let plan = shares::Plan::new(run::program(common.daemon.as_deref())?, common.quick);
    finish(&shares::measure(&plan)?, common.json.as_deref())
}

fn ready(common: &Common) -> anyhow::Result<bool> {
    let plan = ready::Plan::new(run::program(common.daemon.as_deref())?, common.quick);
    finish(&ready::measure(&plan)?, common.json.as_deref())
}

fn give_back(common: &Common) -> anyhow::Result<bool> {
    let plan = give_back::Plan::new(run::program(common.daemon.as_deref())?, common.quick);
    finish(&give_back::measure(&plan)?, common.json.as_deref())
}

fn hugetlb_short(common: &Common) -> anyhow::Result<bool> {
    let program = run::program(common.daemon.as_deref())?;
    let plan = hugetlb_short::Plan::new(program, common.quick, common.seed);
    finish(&hugetlb_short::measure(&plan)?, common.json.as_deref())
}

fn figure2(common: &Common) -> anyhow::Result<bool> {
    let plan = figure2::Plan::new(common.quick, common.seed);
    finish(&figure2::measure(&plan)?, common.json.as_deref())
}

fn reserve(common: &Common) -> anyhow::Result<bool> {
    let plan = reserve::Plan::new(common.quick, common.seed);
    finish(&reserve::measure(&plan)?, common.json.as_deref())
}

fn hold_fragments(fmfi: f64, seed: u64, seconds: u64) -> anyhow::Result<bool> {
    let mut fragments = fragment::Fragments::new(seed)?;
    let most = Duration::from_secs(seconds);
    let reached = fragments.add(fragment::Until::Index(fmfi), most)?;
    let index = gemini_guest::buddy::read()?.fmfi;
    println!(
        "index {index:.3}, {} blocks broken; they are whole again at the end",
        fragments.blocks()
    );
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    Ok(reached)
}

fn restart(common: &Common, fault_daemon: Option<&Path>) -> anyhow::Result<bool> {
    let plan = restart::Plan {
        program: run::program(common.daemon.as_deref())?,
        fault_program: restart::fault_program(fault_daemon)?,
        seed: common.seed,
        passages: if common.quick { vec![2] } else { vec![1, 2, 5] },
    };
    finish(&restart::measure(&plan)?, common.json.as_deref())
}

/// Prints a scenario against its bars, writes it, and tells whether it passed.
fn finish(scenario: &Scenario, json: Option<&Path>) -> anyhow::Result<bool> {
    print!("{scenario}");
    if let Some(path) = json {
        report::write_json(path, &scenario.document()?)?;
    }
    Ok(scenario.passed())
}

//! `gemini-lab`: what `scripts/demo`, `scripts/vm` and `scripts/bench` call.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use gemini_e2e::{attached, bench, demo, libvirt, paper, shell, taker};

#[derive(Parser)]
#[command(version, about = "Real guests under vhost-device-gemini")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Boot the same guest and workload under each policy; print one table
    Demo(demo::DemoArgs),
    /// Boot one guest to log into
    Vm(shell::ShellArgs),
    /// Measure one scenario against its bar
    Bench(bench::BenchArgs),
    /// Run the paper's evaluation: programs under each policy, a record a run
    Paper(paper::PaperArgs),
    /// Take one domain through its life under a real libvirtd; see scripts/test-libvirt
    Libvirt(libvirt::LibvirtArgs),
    /// Look whether a guest that runs already becomes aligned; see scripts/test-packages
    Attached(attached::AttachedArgs),
    /// Make one document of the two halves of a scenario
    Join(bench::JoinArgs),
    /// Take memory, as many bytes as each line of the input says
    #[command(hide = true)]
    TakeMemory,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Demo(args) => demo::run(&args).map(|()| true),
        Command::Vm(args) => shell::run(&args).map(|()| true),
        Command::Bench(args) => bench::run(&args),
        Command::Paper(args) => paper::run(&args),
        Command::Libvirt(args) => libvirt::run(&args).map(|()| true),
        Command::Attached(args) => attached::run(&args).map(|()| true),
        Command::Join(args) => bench::join(&args).map(|()| true),
        Command::TakeMemory => taker::run().map(|()| true),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

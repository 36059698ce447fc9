//! The evaluation of the paper: real programs under each policy, in each state of
//! memory, with a record of every run.

mod costs;
mod counters;
pub mod matrix;
mod misalign;
pub mod policy;
mod program;
mod progress;
pub mod record;
mod run;
mod settle;
mod state;
mod summary;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{ensure, Context};
use clap::{Args, ValueEnum};

use self::matrix::{Matrix, Pace, Run, State, Vm};
use self::policy::Policy;
use self::progress::Progress;
use self::record::{Arguments, Machine, Made, Record, Store};
use self::run::Making;
use self::state::Host;
use crate::accel::{Accel, AccelChoice};
use crate::assets::{self, Assets};
use crate::lab::Bench;
use crate::workload::{Kind, Workloads};
use crate::MIB;

/// The processor of the paper's test-bed.
const PROFILE: &str = "broadwell";

/// Commit of the sources; the script sets it, where there is one.
const COMMIT: &str = "GEMINI_COMMIT";

/// After so many failures in a row something is wrong that more runs do not show.
const MOST_FAILURES: u32 = 5;

/// `gemini-lab paper`
#[derive(Args, Clone, Debug)]
pub struct PaperArgs {
    /// Where the record of every run is kept [default: results/paper, or with --quick
    /// results/paper-quick, in $GEMINI_CACHE]; what is there already is not run again
    #[arg(long, value_name = "DIR")]
    results: Option<PathBuf>,
    /// Programs [default: all that are built; with --quick reader and redis]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    workloads: Vec<String>,
    /// Policies [default: all; with --quick none, thp, hugetlb and gemini]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    policies: Vec<Policy>,
    /// States of free memory [default: all; with --quick fragmented]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    states: Vec<State>,
    /// What ran in the guest before [default: both; with --quick clean]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    vms: Vec<Vm>,
    /// How often each run is made, with other seeds [default: 3; with --quick 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    repetitions: Option<u32>,
    /// Seed of the first repetition; the next has the next
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Guest memory [default: 1024; with --quick 768]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(640..=1 << 20))]
    guest_mib: Option<u64>,
    /// Virtual processors of a guest. With one no program moves to another processor, whose
    /// TLB has nothing of it
    #[arg(long, value_name = "N", default_value_t = 2,
          value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// Data of every program [default: each has its own]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(4..=1 << 20))]
    workload_mib: Option<u64>,
    /// Longest time that both layers are given to come to rest before a program is
    /// measured [default: 60; with --quick 20]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=3600))]
    settle: Option<u64>,
    /// Whole free blocks that a fragmented host has left, in percent of the guest's
    #[arg(long, value_name = "PERCENT", default_value_t = 40)]
    host_blocks: u64,
    /// Processor whose TLBs are simulated; NAME+coalesceN merges N base pages
    #[arg(long, value_name = "NAME", default_value = PROFILE)]
    profile: String,
    /// Guests run on an emulator, which is asked about every access, or on hardware,
    /// whose counters are read
    #[arg(long, value_name = "tcg|kvm", default_value = "tcg")]
    accel: AccelChoice,
    /// Keeps a trace of each program's measured phase there, one a processor, of 1 GiB at
    /// most, for gemini-tlb-replay; to write them takes time, so these are not runs to
    /// compare, and have results of their own
    #[arg(long, value_name = "DIR", requires = "results")]
    traces: Option<PathBuf>,
    /// Shows in less than ten minutes that it works
    #[arg(long)]
    quick: bool,
    /// Prints what would be run, and runs nothing
    #[arg(long)]
    list: bool,
}

/// The name of a value as it is written on the command line.
fn name_of(value: impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

/// What was chosen, or else the `default`.
fn chosen<T: Clone>(of: &[T], default: &[T]) -> Vec<T> {
    if of.is_empty() { default } else { of }.to_vec()
}

impl PaperArgs {
    fn matrix(&self, kinds: &[Kind]) -> Matrix {
        let quick = [Policy::None, Policy::Thp, Policy::Hugetlb, Policy::Gemini];
        let states: &[State] =
            if self.quick { &[State::Fragmented] } else { State::value_variants() };
        let vms: &[Vm] = if self.quick { &[Vm::Clean] } else { Vm::value_variants() };
        let policies: &[Policy] = if self.quick { &quick } else { Policy::value_variants() };
        let is_quick = |kind: &&Kind| !self.quick || matches!(kind.name, "reader" | "redis");
        let names: Vec<String> =
            kinds.iter().filter(is_quick).map(|kind| kind.name.to_owned()).collect();
        Matrix {
            workloads: chosen(&self.workloads, &names),
            policies: chosen(&self.policies, policies),
            states: chosen(&self.states, states),
            vms: chosen(&self.vms, vms),
            repetitions: self.repetitions.unwrap_or(if self.quick { 1 } else { 3 }),
            seed: self.seed,
        }
    }

    /// Where traces are kept, by its full name: QEMU writes them.
    fn traces(&self) -> anyhow::Result<Option<PathBuf>> {
        let Some(directory) = &self.traces else { return Ok(None) };
        let made = fs::create_dir_all(directory).and_then(|()| directory.canonicalize());
        made.map(Some).with_context(|| format!("cannot make {}", directory.display()))
    }

    fn guest_mib(&self) -> u64 {
        self.guest_mib.unwrap_or(if self.quick { 768 } else { 1024 })
    }

    fn arguments(&self, kind: &Kind, accel: Accel) -> Arguments {
        let size = kind.size(self.quick, self.workload_mib);
        Arguments {
            guest_mib: self.guest_mib(),
            workload_mib: size.mib,
            operations: size.operations,
            profile: (accel == Accel::Tcg).then(|| self.profile.clone()),
            accel: accel.name().to_owned(),
            cpus: self.cpus,
            quick: self.quick,
            settle_seconds: self.settle.unwrap_or(if self.quick { 20 } else { 60 }),
            host_blocks_percent: self.host_blocks,
            // As the paper's processor, and its kernel, have them. A wake-up in a guest
            // that is so slow would cost all that a program has in its TLB otherwise.
            pcid: (accel == Accel::Tcg).then_some(true),
            slowdown: if accel == Accel::Tcg { run::SLOWDOWN } else { 1 },
            warm: true,
        }
    }

    fn directory(&self) -> anyhow::Result<PathBuf> {
        if let Some(directory) = &self.results {
            return Ok(directory.clone());
        }
        let name = if self.quick { "paper-quick" } else { "paper" };
        Ok(assets::cache_dir()?.join("results").join(name))
    }
}

/// Runs what is not recorded yet, and prints a table of all that was asked for.
/// Returns whether every run counts.
///
/// # Errors
/// If nothing can be run at all, or a record cannot be kept.
pub fn run(args: &PaperArgs) -> anyhow::Result<bool> {
    let image = Workloads::from_env()?;
    let kinds = program::all(image.as_ref());
    let matrix = args.matrix(&kinds);
    let kinds = program::select(&kinds, &matrix.workloads)?;
    let (runs, impossible): (Vec<_>, Vec<_>) =
        matrix.runs().into_iter().partition(|run| run.impossible().is_none());
    if let Some(run) = impossible.first() {
        let reason = run.impossible().unwrap_or_default();
        eprintln!("{} runs like `{run}` cannot be: {reason}", impossible.len());
    }
    if args.list {
        runs.iter().for_each(|run| println!("{run}"));
        return Ok(true);
    }

    let bench = Bench::new(args.accel)?;
    let arguments: BTreeMap<&str, Arguments> =
        kinds.iter().map(|kind| (kind.name, args.arguments(kind, bench.accel))).collect();
    let store = Store::open(&args.directory()?)?;
    let mut evaluation = Evaluation::open(&bench, &store, &arguments, runs)?;
    let pool = if matrix.policies.contains(&Policy::Hugetlb) { args.guest_mib() * MIB } else { 0 };
    let mut host = Host::new(&bench, args.seed, pool)?;
    let making = Making {
        image: image.filter(|_| kinds.iter().any(program::is_of_image)),
        counters: has_counters(bench.accel),
        bench: bench.clone(),
        traces: args.traces()?,
    };
    evaluation.run(&making, &mut host)?;
    print!("{}", summary::table(&evaluation.done));
    println!("\nrecords: {}", store.directory().display());
    Ok(evaluation.open.is_empty() && evaluation.done.iter().all(|record| record.failure.is_none()))
}

/// Whether hardware can be asked; says so if it cannot and would have been.
fn has_counters(accel: Accel) -> bool {
    if accel != Accel::Kvm {
        return false;
    }
    match counters::Counters::probe() {
        Ok(()) => true,
        Err(error) => {
            eprintln!("{error:#}: records will have no figures of TLBs");
            false
        }
    }
}

/// Runs that are done, and those that are not.
struct Evaluation<'a> {
    store: &'a Store,
    arguments: &'a BTreeMap<&'a str, Arguments>,
    versions: BTreeMap<String, String>,
    done: Vec<Record>,
    open: Vec<Run>,
}

impl<'a> Evaluation<'a> {
    fn open(
        bench: &Bench,
        store: &'a Store,
        arguments: &'a BTreeMap<&'a str, Arguments>,
        runs: Vec<Run>,
    ) -> anyhow::Result<Self> {
        let (mut done, mut open) = (Vec::new(), Vec::new());
        for run in runs {
            match store.find(&run, &arguments[run.workload.as_str()])? {
                Some(record) if record.failure.is_none() => done.push(record),
                _ => open.push(run),
            }
        }
        let versions = versions(&bench.assets)?;
        Ok(Evaluation { store, arguments, versions, done, open })
    }

    /// Runs what is open, in order.
    fn run(&mut self, making: &Making, host: &mut Host) -> anyhow::Result<()> {
        let mut pace = Pace::default();
        for record in &self.done {
            pace.add(&record.run.workload, record.made.seconds);
        }
        let already = self.done.len();
        let all = already + self.open.len();
        let left = pace.estimate(&self.open).filter(|seconds| *seconds > 0.0);
        let left = left.map_or_else(String::new, |left| format!(", {}", progress::duration(left)));
        eprintln!("{all} runs, {already} of them done before, {} to do{left}", self.open.len());
        let progress = Progress::new(all);
        let mut failures = 0;
        let open = std::mem::take(&mut self.open);
        for (at, run) in open.iter().enumerate() {
            let number = already + at + 1;
            progress.begin(number, run);
            let record = self.measure(making, host, run);
            self.store.write(&record)?;
            pace.add(&run.workload, record.made.seconds);
            progress.end(number, &record, &pace, &open[at + 1..]);
            failures = if record.failure.is_some() { failures + 1 } else { 0 };
            self.done.push(record);
            if failures == MOST_FAILURES {
                self.open = open[at + 1..].to_vec();
                eprintln!("{failures} runs have failed in a row: the others are left for later");
                break;
            }
        }
        Ok(())
    }

    /// The record of one run, whatever becomes of it.
    fn measure(&self, making: &Making, host: &mut Host, run: &Run) -> Record {
        let start = Instant::now();
        let made = Made {
            commit: std::env::var(COMMIT).ok().filter(|commit| !commit.is_empty()),
            date: String::new(),
            seconds: 0.0,
            machine: Machine::this(),
            versions: self.versions.clone(),
        };
        let arguments = self.arguments[run.workload.as_str()].clone();
        let mut record = Record::new(run.clone(), arguments, made);
        if let Err(error) = run::run(making, host, &mut record) {
            record.failure = Some(run::reason(&error));
        }
        record.made.seconds = start.elapsed().as_secs_f64();
        record.made.date = record::now();
        record
    }
}

/// Versions of what every run needs.
fn versions(assets: &Assets) -> anyhow::Result<BTreeMap<String, String>> {
    let mut versions = BTreeMap::new();
    versions.insert("guest_kernel".to_owned(), assets.guest.release.clone());
    for (name, program) in [("qemu", &assets.qemu), ("daemon", &assets.daemon)] {
        let output = std::process::Command::new(program).arg("--version").output();
        let output = output.with_context(|| format!("cannot run {}", program.display()))?;
        ensure!(output.status.success(), "{} --version fails", program.display());
        let text = String::from_utf8_lossy(&output.stdout);
        versions.insert(name.to_owned(), text.lines().next().unwrap_or_default().to_owned());
    }
    Ok(versions)
}

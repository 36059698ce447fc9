//! One run: a guest, the state of its memory, a program, and what is seen.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use gemini_guest::protocol::BlockState;

use super::costs::Meter;
use super::counters::Counters;
use super::matrix::{Run, Vm};
use super::misalign;
use super::policy::Setup;
use super::program::{self, Program};
use super::record::{Alignment, Arguments, Idle, Maps, Record, Reuse, Tlb};
use super::settle;
use super::state::{self, Host, Limiter, FRAGMENTS};
use crate::compare::View;
use crate::daemon::DaemonConfig;
use crate::lab::{Bench, Lab};
use crate::outside::HostState;
use crate::tlb::{TlbSimulator, TlbView};
use crate::workload::{Size, Workloads};
use crate::{BLOCK, MIB};

/// How long an emulated guest may take to boot on a busy machine.
const BOOT_TIMEOUT: Duration = Duration::from_secs(240);

/// How long the driver is given to have its stock; without huge pages in the host
/// it never has.
const STOCK_TIMEOUT: Duration = Duration::from_secs(30);

/// How long the guest is counted while the program waits: longer than the second
/// that kernel and agent do things in.
const IDLE: Duration = Duration::from_secs(6);

/// How many times as long a second of a simulated guest's clock takes in the measured
/// phase: about as many times as the same work takes longer than on a processor, so that
/// the clock's ticks come after as much of it as there.
pub const SLOWDOWN: u32 = 64;

/// Most bytes of a trace.
const TRACE_LIMIT: u64 = 1 << 30;

/// One in so many walks may end elsewhere than QEMU's own, and one beside: page
/// tables change under them.
const WALKS_A_DISAGREEMENT: u64 = 10_000;

/// What a reused guest ran before.
const FORMER: &str = "liblinear";

/// As the guests of all runs are made.
#[derive(Clone, Debug)]
pub struct Making {
    /// This machine and the built parts.
    pub bench: Bench,
    /// Drives with programs, if there are any.
    pub image: Option<Workloads>,
    /// Whether the hardware's counters are read where nothing is simulated.
    pub counters: bool,
    /// Where traces of measured phases are kept, if they are.
    pub traces: Option<PathBuf>,
}

impl Making {
    /// Where the trace of a run is kept, but for the number of the processor.
    fn trace_of(&self, run: &Run) -> Option<PathBuf> {
        Some(self.traces.as_ref()?.join(run.file_name()).with_extension("trace"))
    }
}

/// What TLBs are counted by.
#[derive(Debug)]
enum Counting {
    Simulator(TlbSimulator, Option<PathBuf>),
    Hardware,
    Nothing,
}

/// Runs what `record` names, and puts into it what is seen, as far as it comes.
///
/// # Errors
/// Why the run does not count.
pub fn run(making: &Making, host: &mut Host, record: &mut Record) -> anyhow::Result<()> {
    let setup = record.run.policy.setup();
    let ground = host.prepare(record.run.state, &setup, record.arguments.host_blocks())?;
    let mut counting = Counting::Nothing;
    let lab = start(making, &record.run, &record.arguments, &setup, &mut counting)?;
    let result = in_guest(lab, counting, record, &setup);
    drop(ground);
    result
}

/// Boots the guest.
fn start(
    making: &Making,
    run: &Run,
    arguments: &Arguments,
    setup: &Setup,
    counting: &mut Counting,
) -> anyhow::Result<Lab> {
    let bytes = arguments.guest_mib * MIB;
    let mut daemon = DaemonConfig::new(&making.bench.assets.daemon, setup.daemon);
    if let Some(supply) = state::supply(run.state, bytes) {
        daemon.arguments.extend(["--huge-max".to_owned(), supply.to_string()]);
    }
    let mut simulator = None;
    let lab = Lab::start_with(&making.bench, "paper", daemon, |config| {
        config.memory = bytes;
        config.cpus = arguments.cpus;
        config.boot_timeout = BOOT_TIMEOUT;
        config.driver = setup.driver.is_some();
        config.guest_thp = setup.guest_thp.into();
        config.workloads.clone_from(&making.image);
        if setup.hugetlb {
            config.memory_options = ["hugetlb=on", "hugetlbsize=2M"].map(str::to_owned).to_vec();
        }
        let profile = arguments.profile.as_ref();
        let pcid = arguments.pcid.unwrap_or(false);
        simulator = profile.map(|profile| TlbSimulator::attach(config, profile, pcid));
    })?;
    *counting = match simulator.transpose()? {
        Some(simulator) => Counting::Simulator(simulator, making.trace_of(run)),
        None if making.counters => Counting::Hardware,
        None => Counting::Nothing,
    };
    Ok(lab)
}

/// What happens in the guest, from the state of its memory to the end.
fn in_guest(
    mut lab: Lab,
    counting: Counting,
    record: &mut Record,
    setup: &Setup,
) -> anyhow::Result<()> {
    let run = record.run.clone();
    let log = lab.vm.guest.log_position()?;
    let settle = Duration::from_secs(record.arguments.settle_seconds);
    let size = Size { mib: record.arguments.workload_mib, operations: record.arguments.operations };
    let supply = state::supply(run.state, lab.vm.config.memory);
    let limiter = supply
        .filter(|_| setup.shmem == "always")
        .map(|bytes| Limiter::start(&lab.bench, &lab.memory, bytes));

    if setup.driver.is_some() {
        // Nothing is booked while memory is fragmented.
        lab.vm.guest.hints_only()?;
    }
    record.fmfi = Some(state::prepare_guest(&lab, &run, setup)?);
    let_loose(&lab, setup)?;
    let former = match run.vm {
        Vm::Clean => None,
        Vm::Reused => Some(run_former(&lab, setup, size, run.seed, settle)?),
    };

    let meter = Meter::start(&lab, setup)?;
    let program = Program::load(&lab.vm.guest, &run.workload, size, run.seed)?;
    let loaded = Instant::now();
    let before = lab.view()?;
    // What it allocates when it first works is not what it works with.
    program.go(&lab.vm.guest)?;
    if setup.on_demand {
        lab.daemon.control().set_policy(setup.daemon)?;
    }
    let watched = settle::watch(&lab, loaded, settle)?.since(&before.counts());
    if setup.misalign {
        misalign::misalign(&lab, supply.map(|bytes| bytes / BLOCK))?;
    }

    if run.state == super::matrix::State::Scarce {
        // Where there is not enough for all, it shows only at work who needs most.
        let begun = Instant::now();
        while begun.elapsed() < settle {
            program.go(&lab.vm.guest)?;
        }
    }

    let (performance, tlb, idle) = {
        let slowdown = record.arguments.slowdown;
        let (result, tlb, idle) =
            counted(&mut lab, &counting, slowdown, |lab| program.go(&lab.vm.guest))?;
        let (performance, version) = result;
        record.made.versions.insert("workload".into(), version);
        (performance.by_true_time(slowdown), tlb, idle)
    };
    record.performance = Some(performance);
    (record.tlb, record.idle) = (tlb, idle);

    // Looked at when the counting has ended: to look is to access memory.
    let view = lab.view()?;
    record.costs = Some(meter.finish(&lab, setup)?);
    record.alignment = Some(alignment(&view, &watched));
    record.reuse = former.map(|former| reuse(&view, &former));
    record.maps = Some(Maps { before: before.letters(), after: view.letters() });

    limiter.map_or(Ok(()), Limiter::finish)?;
    program.end(&lab.vm.guest)?;
    if run.state != super::matrix::State::Unfragmented && setup.guest_fragments {
        lab.vm.guest.verify_process(FRAGMENTS)?;
    }
    check(&mut lab, log, record.tlb)?;
    lab.daemon.stop()
}

/// What must hold in the end for the figures to count.
fn check(lab: &mut Lab, log: u64, tlb: Option<Tlb>) -> anyhow::Result<()> {
    let complaints = lab.vm.guest.complaints(log)?;
    if let Some(first) = complaints.first() {
        bail!("the guest's kernel complains {} times, first: {}", complaints.len(), first.text);
    }
    if let Some(Tlb { misses: Some(misses), disagreements: Some(astray), .. }) = tlb {
        ensure!(
            astray <= 1 + misses / WALKS_A_DISAGREEMENT,
            "{astray} of {misses} simulated walks ended elsewhere than QEMU's own"
        );
    }
    lab.vm.expect_alive()
}

/// Switches on what the policy has of this project in the guest.
fn let_loose(lab: &Lab, setup: &Setup) -> anyhow::Result<()> {
    let guest = &lab.vm.guest;
    for (name, value) in setup.driver.unwrap_or_default() {
        guest.set_driver(name, *value)?;
    }
    if setup.promoter {
        guest.shell("gemini-guestd --log-level warn >/tmp/gemini-guestd.log 2>&1 &")?;
    }
    if setup.stock {
        // As in a guest that booted a while ago.
        let deadline = Instant::now() + STOCK_TIMEOUT;
        let has_stock = || -> anyhow::Result<bool> {
            let target = guest.driver_number("stock_target")?;
            Ok(target > 0 && guest.driver_number("ready")? >= target)
        };
        while Instant::now() < deadline && !has_stock()? {
            std::thread::sleep(Duration::from_millis(250));
        }
    }
    Ok(())
}

/// Has a program of the same size load its data and end: an SVM training, as in the
/// paper, or the reader where there are no others. Returns the blocks that were
/// aligned for it.
fn run_former(
    lab: &Lab,
    setup: &Setup,
    size: Size,
    seed: u64,
    settle: Duration,
) -> anyhow::Result<BTreeSet<u64>> {
    let guest = &lab.vm.guest;
    let name = if lab.vm.config.workloads.is_some() { FORMER } else { program::READER.name };
    let aligned =
        || -> anyhow::Result<_> { Ok(lab.view()?.in_state(BlockState::Huge, HostState::Huge)) };
    let before = aligned()?;
    let former = Program::load(guest, name, size, !seed)?;
    if setup.on_demand {
        lab.daemon.control().set_policy(setup.daemon)?;
    }
    settle::watch(lab, Instant::now(), settle)?;
    let after = aligned()?;
    former.end(guest)?;
    Ok(after.difference(&before).copied().collect())
}

/// Does something while accesses are counted, and then nothing where a clock that
/// runs on makes a difference.
fn counted<T>(
    lab: &mut Lab,
    counting: &Counting,
    slowdown: u32,
    act: impl Fn(&Lab) -> anyhow::Result<T>,
) -> anyhow::Result<(T, Option<Tlb>, Option<Idle>)> {
    match counting {
        Counting::Nothing => Ok((act(lab)?, None, None)),
        Counting::Hardware => {
            let counters = Counters::start(&mut lab.vm.qmp)?;
            let result = act(lab)?;
            Ok((result, Some(counters.total()?), None))
        }
        Counting::Simulator(simulator, trace) => {
            simulator.begin()?;
            simulator.slow_clock(slowdown)?;
            // It begins with empty TLBs. What fills them would count as much as what the
            // program misses in the part of a second that is simulated.
            act(lab)?;
            if let Some(trace) = trace {
                simulator.record(trace, TRACE_LIMIT)?;
            }
            let start = simulator.look()?;
            let result = act(lab)?;
            let end = simulator.look()?;
            // Who sleeps is waited for below.
            simulator.slow_clock(1)?;
            if trace.is_some() {
                simulator.stop()?;
            }
            let since = Instant::now();
            std::thread::sleep(IDLE);
            let seconds = since.elapsed().as_secs_f64();
            let idle = tlb(&simulator.look()?.since(&end));
            simulator.end()?;
            Ok((result, Some(tlb(&end.since(&start))), Some(Idle { seconds, tlb: idle })))
        }
    }
}

fn tlb(seen: &TlbView) -> Tlb {
    Tlb {
        accesses: Some(seen.total.accesses),
        misses: Some(seen.total.tlb_misses),
        user_misses: Some(seen.total.user_tlb_misses),
        walk_reads: Some(seen.total.page_walk_refs),
        cycles: Some(seen.total.cycles),
        instructions: Some(seen.total.instructions),
        disagreements: Some(seen.disagreements),
    }
}

fn alignment(view: &View, watched: &settle::Watched) -> Alignment {
    let counts = view.counts();
    let coverage = counts.aligned_coverage();
    Alignment {
        guest_huge: counts.aligned + counts.guest_only,
        host_huge: counts.aligned + counts.host_only,
        aligned: counts.aligned,
        aligned_rate: counts.aligned_rate(),
        aligned_coverage: coverage,
        seconds_to_alignment: watched.seconds_to(coverage),
    }
}

fn reuse(view: &View, former: &BTreeSet<u64>) -> Reuse {
    let of_former = |guest| {
        let now = view.in_state(guest, HostState::Huge);
        former.intersection(&now).count() as u64
    };
    Reuse {
        aligned_before: former.len() as u64,
        reused: of_former(BlockState::Huge),
        waiting: of_former(BlockState::Held),
    }
}

/// The text of a failure, without the logs that follow it.
#[must_use]
pub fn reason(error: &anyhow::Error) -> String {
    let text = format!("{error:#}");
    text.lines().next().unwrap_or_default().to_owned()
}

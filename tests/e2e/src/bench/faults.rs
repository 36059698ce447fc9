//! What the driver costs page faults: their latency with its hooks in place and
//! without, and the instructions that the hooks add.

use std::time::Duration;

use anyhow::{bail, Context};
use gemini_guest::probe::{Instructions, Latencies, Probe, Work};
use gemini_guest::protocol::{Fragment, PageSize};
use gemini_harness::figures::{Bar, Scenario};

use super::spread::{median, percentile, spread};
use crate::accel::Accel;
use crate::lab::{Bench, Lab};
use crate::process;
use crate::MIB;

/// Guest memory, and how much of it the fragmenter leaves free.
const MEMORY: u64 = 2048 * MIB;
const FREE: u64 = 768 * MIB;

/// Instructions of one round of the loop of known length: the loop itself, and
/// the call and the count that it begins with.
const LOOP: std::ops::RangeInclusive<f64> = 2000.0..=2004.0;

/// Faults of one run. Huge ones are fewer than the stock has blocks.
const BASE_FAULTS: u32 = 4000;
const HUGE_FAULTS: u32 = 48;
const STOCK: u64 = 64;

/// How long the driver may take to have its stock ready.
const STOCK_TIMEOUT: Duration = Duration::from_secs(60);

/// The agent of the guest, for the CPU that it takes.
const PROMOTER: &str = "gemini-guestd --log-level warn";
const PROMOTER_PID: &str = "/tmp/gemini-guestd.pid";

/// How long it and the driver may do what they do once. A time: the promoter
/// tells of its passes only if it prints them, which would be part of what it is
/// seen to cost.
const FIRST_LOOKS: Duration = Duration::from_secs(5);

/// There while booking is to be busy.
const BUSY: &str = "/tmp/busy";

/// What the driver has as its rate of evacuation.
const EVACUATION_RATE: u64 = 32;

/// Measures instructions, and the CPU time of a guest that does nothing, in a
/// guest that counts them, and all else in one that does not.
///
/// # Errors
/// If guest, QEMU or daemon fail in a way that is no figure.
pub fn measure(bench: &Bench, seed: u64, quick: bool) -> anyhow::Result<Scenario> {
    let mut scenario = Scenario::new("fault-latency");
    count(bench, &mut scenario, quick)?;
    let mut lab = Lab::start(bench, "bench-fault-latency", "gemini", |config| {
        config.memory = MEMORY;
    })?;
    let log = lab.vm.guest.log_position()?;
    let runs = if quick { 3 } else { 10 };
    scenario.arg("guest_memory", MEMORY);
    scenario.arg("runs", runs);
    scenario.arg("stock_blocks", STOCK);
    start_promoter(&lab)?;
    lab.vm.guest.start_churn("load", 256 * MIB, seed)?;
    cpu_shares(&lab, "load", if quick { 5 } else { 20 }, &mut scenario)?;
    lab.vm.guest.stop_churn("load")?;
    stop_promoter(&lab)?;
    lab.vm.guest.set_driver("stock_cap", STOCK)?;
    lab.vm.guest.set_driver("stock_floor", STOCK)?;
    pairs(&lab, "whole", runs, false, &mut scenario)?;
    lab.vm.guest.fragment("fragments", Fragment::new(seed, FREE))?;
    pairs(&lab, "fragmented", runs, false, &mut scenario)?;
    pairs(&lab, "busy", runs, true, &mut scenario)?;
    lab.vm.guest.verify_process("fragments")?;
    lab.vm.expect_alive()?;
    let complaints = lab.vm.guest.tell_complaints(log)?;
    scenario.figure("guest_complaints", complaints as f64, Bar::AtMost(0.0));
    Ok(scenario)
}

/// Whether the driver's hooks are in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hooks {
    /// They are, and blocks are booked.
    On,
    /// They are, and nothing is booked. (While the kernel takes a block at its
    /// address, it puts no pages on its lists of one CPU, which lengthens every
    /// fault of the system by some 540 instructions: no work of the hooks.)
    Alone,
    /// They are not, and nothing is held.
    Off,
    /// The driver is not even loaded.
    Unloaded,
}

/// Exact instructions of a fault. Every count is a median: what a fault takes
/// that no interrupt falls into.
fn count(bench: &Bench, scenario: &mut Scenario, quick: bool) -> anyhow::Result<()> {
    let mut counting = bench.clone();
    counting.accel = Accel::Counting;
    let lab = Lab::start(&counting, "bench-fault-count", "gemini", |config| {
        config.cpus = 1;
        config.memory = MEMORY;
        config.boot_timeout *= 3;
    })?;
    // Here a CPU second is 10^9 instructions, however busy this machine is.
    start_promoter(&lab)?;
    let idle = cpu_shares(&lab, "idle", if quick { 10 } else { 30 }, scenario)?;
    scenario.figure("idle_cpu_percent", idle, Bar::Below(1.0));
    stop_promoter(&lab)?;
    let units = if quick { 1000 } else { 5000 };
    let counted = |work| -> anyhow::Result<f64> {
        let counted: Instructions = probe(&lab, &Probe::Count { work, units })?;
        let counts: Vec<f64> = counted.counts.iter().map(|&count| count as f64).collect();
        Ok(median(&counts))
    };
    let known = counted(Work::Loop)?;
    scenario.figure("counted_loop_instructions", known, Bar::AtLeast(*LOOP.start()));
    scenario.figure("counted_loop_error", known - LOOP.start(), Bar::AtMost(4.0));
    let mut seen: [Vec<f64>; 4] = Default::default();
    for hooks in [Hooks::Alone, Hooks::Off, Hooks::Alone, Hooks::Off, Hooks::Unloaded] {
        switch(&lab, hooks)?;
        let (fault, cache) = (counted(Work::AnonymousPage)?, counted(Work::CachePage)?);
        eprintln!("{hooks:?}: {fault} instructions a fault, {cache} a page of the page cache");
        let on = usize::from(hooks == Hooks::Alone);
        seen[on].push(fault);
        seen[2 + on].push(cache);
    }
    let [off, on, cache_off, cache_on] = seen.map(|counts| median(&counts));
    scenario.figure("fault_4k_instructions_off", off, Bar::None);
    scenario.figure("fault_4k_instructions_on", on, Bar::None);
    scenario.figure("fault_4k_more_percent", (on - off) / off * 100.0, Bar::AtMost(1.0));
    scenario.figure("cache_page_instructions_off", cache_off, Bar::None);
    scenario.figure("cache_page_more_instructions", cache_on - cache_off, Bar::AtMost(0.0));
    Ok(())
}

/// Puts the hooks in place, or takes them out.
fn switch(lab: &Lab, hooks: Hooks) -> anyhow::Result<()> {
    let guest = &lab.vm.guest;
    match hooks {
        Hooks::On | Hooks::Alone => {
            guest.set_driver("placement", 1)?;
            guest.set_driver("booking", u64::from(hooks == Hooks::On))?;
            if hooks == Hooks::Alone {
                guest.driver_command("free all")?;
            }
            let state = "cat /sys/bus/virtio/drivers/virtio_gemini/virtio*/gemini/placement_state";
            process::wait_for("placement is on", STOCK_TIMEOUT, || {
                Ok((guest.shell(state)?.trim() == "on").then_some(()))
            })?;
        }
        Hooks::Off => {
            guest.set_driver("placement", 0)?;
            guest.hints_only()?;
        }
        Hooks::Unloaded => drop(guest.unload_driver()?),
    }
    Ok(())
}

fn probe<T: serde::de::DeserializeOwned>(lab: &Lab, probe: &Probe) -> anyhow::Result<T> {
    lab.vm.guest.probe(probe)?.with_context(|| format!("{probe:?} is killed: memory is short"))
}

/// Keeps booking and evacuation busy: a third of the stock is given back, over
/// and over, and has to be booked again.
fn keep_busy(lab: &Lab) -> anyhow::Result<()> {
    let again = format!(
        "cd /sys/kernel/debug/virtio_gemini/*/ || exit; while [ -e {BUSY} ]; do \
         awk '/held,ready/ && n < {} {{ print \"free\", $1, 1; n++ }}' blocks | \
         while read line; do echo $line > command; done; sleep 0.1; done",
        STOCK / 3
    );
    lab.vm.guest.set_driver("evacuation_rate", 1000)?;
    lab.vm.guest.shell(&format!("touch {BUSY}; ({again}) < /dev/null > /dev/null 2>&1 &")).map(drop)
}

fn rest(lab: &Lab) -> anyhow::Result<()> {
    lab.vm.guest.shell(&format!("rm {BUSY}"))?;
    lab.vm.guest.set_driver("evacuation_rate", EVACUATION_RATE)
}

/// CPU time of the driver and the promoter, in percent of one CPU, while the
/// guest does nothing, or while its memory is under load. Of the driver it is at
/// most as much: that of all kernel worker threads.
fn cpu_shares(lab: &Lab, name: &str, seconds: u32, scenario: &mut Scenario) -> anyhow::Result<f64> {
    let guest = &lab.vm.guest;
    let workers = "for p in /proc/[0-9]*; do read name < $p/comm; case $name in \
                   kworker*) read time rest < $p/schedstat; echo $time;; esac; done 2> /dev/null";
    let promoter = format!("cut -d' ' -f1 /proc/$(cat {PROMOTER_PID})/schedstat");
    let text = guest.shell(&format!(
        "sum() {{ ({workers}) | awk '{{ n += $1 }} END {{ printf \"%.0f\\n\", n }}'; }}; \
         one=$({promoter}); before=$(sum); sleep {seconds}; after=$(sum); two=$({promoter}); \
         echo $before $after $one $two"
    ))?;
    let times: Vec<f64> = text.split_whitespace().map_while(|word| word.parse().ok()).collect();
    let &[before, after, one, two] = times.as_slice() else { bail!("no four times: {text}") };
    let percent = |nanoseconds: f64| nanoseconds / 1e9 / f64::from(seconds) * 100.0;
    let (driver, agent) = (percent(after - before), percent(two - one));
    scenario.figure(&format!("{name}_kernel_workers_cpu_percent"), driver, Bar::None);
    scenario.figure(&format!("{name}_agent_cpu_percent"), agent, Bar::None);
    Ok(driver + agent)
}

/// Starts the promoter, and lets driver and promoter do what they do once.
fn start_promoter(lab: &Lab) -> anyhow::Result<()> {
    let command = format!("{PROMOTER} < /dev/null > /dev/null 2>&1 & echo $! > {PROMOTER_PID}");
    lab.vm.guest.shell(&command)?;
    std::thread::sleep(FIRST_LOOKS);
    Ok(())
}

fn stop_promoter(lab: &Lab) -> anyhow::Result<()> {
    lab.vm.guest.shell(&format!("kill -TERM $(cat {PROMOTER_PID})")).map(drop)
}

/// What the runs of one kind have shown.
#[derive(Default)]
struct Runs {
    /// Median of each run, in microseconds.
    p50: Vec<f64>,
    /// All faults, in microseconds.
    all: Vec<f64>,
    /// Faults in all, of whatever kind they became.
    faults: usize,
    /// Whether it is about faults that got a huge page.
    huge_wanted: bool,
}

impl Runs {
    fn new(huge_wanted: bool) -> Self {
        Runs { huge_wanted, ..Runs::default() }
    }

    fn add(&mut self, seen: &Latencies) {
        // A fault that found no huge page took a base page: another kind.
        let us: Vec<f64> = seen
            .nanoseconds
            .iter()
            .zip(&seen.huge)
            .filter_map(|(time, huge)| (*huge == self.huge_wanted).then_some(time / 1000.0))
            .collect();
        self.faults += seen.huge.len();
        if !us.is_empty() {
            self.p50.push(median(&us));
        }
        self.all.extend(us);
    }
}

/// Runs with the hooks on and off in turns, and compares them.
fn pairs(
    lab: &Lab,
    name: &str,
    runs: u32,
    busy: bool,
    scenario: &mut Scenario,
) -> anyhow::Result<()> {
    let mut base = [Runs::new(false), Runs::new(false)];
    let mut huge = [Runs::new(true), Runs::new(true)];
    for run in 0..runs {
        // The first of a pair may find other memory than the second.
        let order = if run % 2 == 0 { [Hooks::Off, Hooks::On] } else { [Hooks::On, Hooks::Off] };
        for hooks in order {
            switch(lab, hooks)?;
            let on = hooks == Hooks::On;
            if on {
                process::wait_for("the driver's stock is ready", STOCK_TIMEOUT, || {
                    Ok((lab.vm.guest.driver_number("ready")? >= STOCK).then_some(()))
                })?;
            }
            if on && busy {
                keep_busy(lab)?;
            }
            let index = usize::from(on);
            let faults = Probe::Faults { pages: PageSize::Base, faults: BASE_FAULTS };
            base[index].add(&probe(lab, &faults)?);
            let faults = Probe::Faults { pages: PageSize::Huge, faults: HUGE_FAULTS };
            huge[index].add(&probe(lab, &faults)?);
            if on && busy {
                rest(lab)?;
            }
        }
    }
    let mut figure =
        |figure: &str, value: f64, bar| scenario.figure(&format!("{name}_{figure}"), value, bar);
    for (kind, [off, on]) in [("4k", &base), ("2m", &huge)] {
        for (state, runs) in [("off", off), ("on", on)] {
            figure(&format!("{kind}_{state}_p50_us"), median(&runs.p50), Bar::None);
            figure(&format!("{kind}_{state}_p99_us"), percentile(&runs.all, 99), Bar::None);
            figure(&format!("{kind}_{state}_spread_us"), spread(&runs.p50), Bar::None);
        }
        // In spreads of the runs, so that 1 is as far as chance goes.
        let slower = median(&on.p50) - median(&off.p50);
        let spread = spread(&off.p50).max(spread(&on.p50)).max(f64::EPSILON);
        let bar = if kind == "2m" { Bar::AtMost(1.0) } else { Bar::None };
        figure(&format!("{kind}_slower_in_spreads"), slower / spread, bar);
    }
    for (state, runs) in [("off", &huge[0]), ("on", &huge[1])] {
        let share = runs.all.len() as f64 / runs.faults as f64;
        figure(&format!("2m_{state}_huge_share"), share, Bar::None);
    }
    Ok(())
}

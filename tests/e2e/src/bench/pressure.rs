//! The driver holds nine tenths of the guest's memory, and a program wants it.

use std::time::Duration;

use anyhow::{ensure, Context};
use gemini_guest::probe::{Echoed, Probe, Take, Taken};
use gemini_harness::figures::{Bar, Scenario};

use crate::lab::{Bench, Lab};
use crate::process;
use crate::{BLOCK, MIB};

const PAGE: u64 = 4096;

/// Guest memory.
const MEMORY: u64 = 3072 * MIB;

/// Percent of the guest's memory that the driver holds.
const HELD_PERCENT: u64 = 90;

/// What a program that takes everything leaves of `MemAvailable` as it was when
/// the driver held nothing: a program without swap that takes the last of it is
/// killed with or without a driver.
const MARGIN: u64 = 48 * MIB;

/// Longest time that a single page may take.
const STALL_BAR: f64 = 1.0;

/// Most that `MemAvailable` may fall short of what it should be: a hundredth of
/// the guest's memory.
const MISSING_BAR_MIB: f64 = 30.0;

/// A packet of the loopback device, and how many of them are 64 MiB.
const PACKET: u16 = 60_000;
const PACKETS: u32 = 1118;

/// How long the driver may take to hold that much.
const HOLD_TIMEOUT: Duration = Duration::from_secs(120);

/// For so long nothing has become ready when all is that will be.
const REST: Duration = Duration::from_secs(3);

/// Ways to want memory, and the prefix of their figures.
const WAYS: [(Take, &str); 3] =
    [(Take::Base, "base"), (Take::Huge, "huge"), (Take::File, "page_cache")];

/// What was seen while the driver held memory.
#[derive(Default)]
struct Seen {
    held_share: f64,
    /// `MemAvailable`, as a share of what it was when nothing was held.
    available_share: f64,
    /// Bytes that `MemAvailable` fell by, beyond what the kernel takes off
    /// whatever can be reclaimed: the zones' low watermarks.
    missing: i128,
    ready_share: f64,
}

/// Lets programs take all memory of a guest of 3 GiB: anonymous memory in base
/// and in huge pages, and the page cache; then a burst of packets.
///
/// # Errors
/// If guest, QEMU or daemon fail in a way that is no figure.
pub fn measure(bench: &Bench, quick: bool) -> anyhow::Result<Scenario> {
    let mut lab = Lab::start(bench, "bench-guest-pressure", "gemini", |config| {
        config.memory = MEMORY;
        config.kernel_arguments.push("psi=1".into());
    })?;
    let log = lab.vm.guest.log_position()?;
    // What is held is what this scenario says.
    lab.vm.guest.set_driver("booking", 0)?;
    lab.vm.guest.shell("ifconfig lo 127.0.0.1 up")?;
    let before = oom_kills(&lab)?;
    let free = available(&lab)?;
    let wanted = free.checked_sub(MARGIN).context("this guest has next to no memory")?;

    let mut scenario = Scenario::new("guest-pressure");
    scenario.arg("guest_memory", MEMORY);
    scenario.arg("program_bytes", wanted);
    let mut seen = Vec::new();
    let ways = if quick { &WAYS[..1] } else { &WAYS[..] };
    for (kind, name) in ways {
        let program = Probe::Take { kind: *kind, bytes: wanted };
        // Without anything held, for comparison; the first touch of this memory
        // by the host is over then, too.
        let alone = lab.vm.guest.probe::<Taken>(&program)?;
        let alone = alone.context("the program is killed although the driver holds nothing")?;
        scenario.figure(
            &format!("{name}_longest_ms_unheld"),
            alone.longest_seconds * 1e3,
            Bar::None,
        );
        scenario.figure(&format!("{name}_seconds_unheld"), alone.seconds, Bar::None);
        seen.push(hold(&lab)?);
        let taken = lab.vm.guest.probe::<Taken>(&program)?;
        scenario.figure(&format!("{name}_killed"), f64::from(taken.is_none()), Bar::AtMost(0.0));
        let taken = taken.unwrap_or_default();
        eprintln!("{name}: {alone:?} unheld, {taken:?} held");
        let longest = taken.longest_seconds;
        scenario.figure(&format!("{name}_longest_ms"), longest * 1e3, Bar::Below(STALL_BAR * 1e3));
        scenario.figure(&format!("{name}_seconds"), taken.seconds, Bar::None);
        scenario.figure(&format!("{name}_psi_full_seconds"), taken.full_stalled_seconds, Bar::None);
    }
    seen.push(hold(&lab)?);
    let echoed: Echoed = lab
        .vm
        .guest
        .probe(&Probe::Echo { size: PACKET, count: PACKETS })?
        .context("the program that sends packets is killed")?;
    eprintln!("packets: {echoed:?}");
    lab.vm.expect_alive()?;
    let complaints = lab.vm.guest.tell_complaints(log)?;

    let least = |value: fn(&Seen) -> f64| seen.iter().map(value).fold(f64::INFINITY, f64::min);
    let held = Bar::AtLeast(HELD_PERCENT as f64 / 100.0);
    scenario.figure("held_share", least(|seen| seen.held_share), held);
    scenario.figure("available_share", least(|seen| seen.available_share), Bar::None);
    let missing = -least(|seen| -(seen.missing as f64));
    scenario.figure("available_missing_mib", missing / MIB as f64, Bar::AtMost(MISSING_BAR_MIB));
    scenario.figure("ready_share", least(|seen| seen.ready_share), Bar::None);
    scenario.figure("atomic_packets", f64::from(echoed.sent), Bar::AtLeast(f64::from(PACKETS)));
    scenario.figure("atomic_packets_lost", f64::from(echoed.sent - echoed.answered), Bar::None);
    scenario.figure("atomic_longest_ms", echoed.longest_seconds * 1e3, Bar::Below(STALL_BAR * 1e3));
    scenario.figure("oom_kills", (oom_kills(&lab)? - before) as f64, Bar::AtMost(0.0));
    scenario.figure("guest_complaints", complaints as f64, Bar::AtMost(0.0));
    Ok(scenario)
}

/// Lets the driver hold its share, and says what the guest says of it.
fn hold(lab: &Lab) -> anyhow::Result<Seen> {
    // Both are looked at in the same state: what lies in lists of one CPU is
    // not available, and how much that is changes with what was freed last.
    lab.vm.guest.driver_command("free all")?;
    let free = available(lab)?;
    let total = lab.vm.guest.memory()?.get("MemTotal").copied().context("no MemTotal")?;
    let blocks = (total * HELD_PERCENT).div_ceil(100 * BLOCK);
    let mut refusal = None;
    process::wait_for("the driver holds nine tenths of memory", HOLD_TIMEOUT, || {
        let held = lab.vm.guest.driver_number("held")?;
        if held >= blocks {
            return Ok(Some(()));
        }
        // Plain allocations end at a block that is not the driver's to keep,
        // for that is offered again and again. The rest is had by address.
        refusal = lab.vm.guest.driver_command(&format!("book any {}", blocks - held)).err();
        if refusal.is_some() {
            lab.vm.guest.driver_command("census")?;
            refusal = book_free(lab, blocks)?;
        }
        Ok(None)
    })
    .with_context(|| format!("the driver refused last: {refusal:?}"))?;
    make_ready(lab)?;
    let held = lab.vm.guest.driver_number("held")?;
    let ready = lab.vm.guest.driver_number("ready")?;
    let available = available(lab)?;
    let expected = i128::from(free) - i128::from(low_watermarks(lab)?);
    Ok(Seen {
        held_share: (held * BLOCK) as f64 / total as f64,
        available_share: available as f64 / free as f64,
        missing: expected - i128::from(available),
        ready_share: (ready * BLOCK) as f64 / total as f64,
    })
}

/// Books free blocks at their addresses until `most` are held; returns what was
/// refused last. A refusal is no failure: where some blocks are in use again,
/// there are others. A guest that does not answer fails in the next command.
fn book_free(lab: &Lab, most: u64) -> anyhow::Result<Option<anyhow::Error>> {
    let guest = &lab.vm.guest;
    let mut refusal = None;
    for run in guest.driver_blocks()? {
        let held = guest.driver_number("held")?;
        if run.guest == "free" && held < most {
            let count = run.count.min(most - held);
            let booked = guest.driver_command(&format!("book {} {count}", run.first));
            refusal = booked.err().or(refusal);
        }
    }
    Ok(refusal)
}

/// Has the host put huge pages under what is held.
fn make_ready(lab: &Lab) -> anyhow::Result<()> {
    for run in lab.vm.guest.driver_blocks()? {
        if run.guest == "booked" && run.host != "huge" {
            lab.vm.guest.driver_command(&format!("renew {} {}", run.first, run.count))?;
        }
    }
    // The driver hears of it a little later, and the host may have too few.
    let ready = || lab.vm.guest.driver_number("ready");
    process::wait_until_still("what is ready", REST, HOLD_TIMEOUT, ready).map(drop)
}

fn available(lab: &Lab) -> anyhow::Result<u64> {
    let memory = lab.vm.guest.memory()?;
    let value = memory.get("MemAvailable").copied().context("no MemAvailable")?;
    ensure!(value > 0, "the guest has no memory left");
    Ok(value)
}

/// Sum of the low watermarks of all zones, in bytes.
fn low_watermarks(lab: &Lab) -> anyhow::Result<u64> {
    let text = lab.vm.guest.read_file("/proc/zoneinfo")?;
    let pages = text.lines().filter_map(|line| line.trim().strip_prefix("low "));
    let pages: Option<u64> = pages.map(|pages| pages.trim().parse::<u64>().ok()).sum();
    Ok(pages.context("/proc/zoneinfo has another form")? * PAGE)
}

/// Processes that the guest's kernel has killed for want of memory.
fn oom_kills(lab: &Lab) -> anyhow::Result<u64> {
    let text = lab.vm.guest.read_file("/proc/vmstat")?;
    text.lines()
        .find_map(|line| line.strip_prefix("oom_kill "))
        .and_then(|number| number.trim().parse().ok())
        .context("/proc/vmstat counts no oom_kill")
}

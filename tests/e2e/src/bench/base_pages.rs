//! A program's base pages become aligned huge pages through `gemini-guestd`.

use std::time::{Duration, Instant};

use anyhow::{ensure, Context};
use gemini_guest::protocol::{Fragment, PageSize, Sparse};
use gemini_harness::figures::{Bar, Scenario};
use gemini_harness::report::ratio;
use serde_json::Value;

use crate::lab::{Bench, Lab};
use crate::process;
use crate::{BLOCK, MIB};

/// Guest memory, and how much of it the fragmenter leaves free.
const MEMORY: u64 = 2048 * MIB;
const FREE: u64 = 640 * MIB;

/// Size of the program.
const PROGRAM: u64 = 128 * MIB;

/// Base pages of each block that the program uses at first, of 512.
const SPARSE_PAGES: u32 = 100;

/// How often the promoter passes by the program while it is sparse.
const SPARSE_PASSES: usize = 2;

/// How long that may take.
const PASSES_TIMEOUT: Duration = Duration::from_secs(60);

/// From the moment on that the program is dense. A time, since the figure is
/// what is aligned when it is over.
const DENSE_TIME: Duration = Duration::from_secs(10);

/// CPU share of the promoter, in percent: an emulated guest needs several
/// milliseconds to copy a block.
const CPU_SHARE: u32 = 20;

/// Blocks that the driver is to have ready: the whole program, and some.
const STOCK: u64 = PROGRAM / BLOCK + 8;

/// How long the driver may take to have its stock ready.
const STOCK_TIMEOUT: Duration = Duration::from_secs(60);

const THP: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
const REPORTS: &str = "/tmp/gemini-guestd.json";

/// What became of the program.
#[derive(Default)]
struct Seen {
    /// Ranges that were huge while the program was sparse.
    huge_when_sparse: u64,
    /// Ranges of the program.
    ranges: u64,
    /// Aligned ones when the time was up.
    aligned: u64,
    /// Guest huge pages then.
    huge: u64,
    /// Seconds until nine tenths were aligned.
    seconds: Option<f64>,
    /// Of the promoter, while the program was dense.
    agent_cpu_seconds: f64,
    agent_failed: u64,
    /// Bytes that the host copied meanwhile.
    host_copied: u64,
}

/// Lets a program of 128 MiB grow into its holes in a fragmented guest of 2 GiB,
/// with placement, and in another without.
///
/// # Errors
/// If guest, QEMU or daemon fail in a way that is no figure.
pub fn measure(bench: &Bench, seed: u64, quick: bool) -> anyhow::Result<Scenario> {
    let mut scenario = Scenario::new("base-pages");
    scenario.arg("guest_memory", MEMORY);
    scenario.arg("program_bytes", PROGRAM);
    scenario.arg("agent_cpu_share_percent", CPU_SHARE);
    scenario.arg("stock_blocks", STOCK);
    round(bench, seed, true, &mut scenario)?;
    if !quick {
        // The same with huge pages where the kernel likes: the host follows.
        round(bench, seed, false, &mut scenario)?;
    }
    Ok(scenario)
}

/// The program in a guest of its own.
fn round(bench: &Bench, seed: u64, placement: bool, scenario: &mut Scenario) -> anyhow::Result<()> {
    let (prefix, bar) = if placement { ("", Bar::AtLeast(0.9)) } else { ("unplaced_", Bar::None) };
    let mut lab = Lab::start(bench, "bench-base-pages", "gemini", |config| {
        config.memory = MEMORY;
        config.guest_thp = "madvise".into();
    })?;
    let log = lab.vm.guest.log_position()?;
    // The kernel's own promoter sleeps: what is measured is this project's.
    lab.vm.guest.shell(
        "cd /sys/kernel/mm/transparent_hugepage/khugepaged && \
         echo 1 > pages_to_scan && echo 3600000 > scan_sleep_millisecs",
    )?;
    if !placement {
        lab.vm.guest.set_driver("placement", 0)?;
        lab.vm.guest.hints_only()?;
    }
    let fragmented = lab.vm.guest.fragment("fragments", Fragment::new(seed, FREE))?;
    scenario.figure(&format!("{prefix}fmfi"), fragmented.after.fmfi, Bar::AtLeast(0.8));
    if placement {
        // Room for the whole program, made ready before it grows.
        lab.vm.guest.set_driver("stock_cap", STOCK)?;
        lab.vm.guest.set_driver("stock_floor", STOCK)?;
        let warm_up = Instant::now();
        process::wait_for("the driver's stock is ready", STOCK_TIMEOUT, || {
            Ok((lab.vm.guest.driver_number("ready")? >= STOCK).then_some(()))
        })?;
        scenario.figure("stock_warm_up_seconds", warm_up.elapsed().as_secs_f64(), Bar::None);
    }
    tell(scenario, prefix, &grow(&lab, seed)?, bar);
    lab.vm.guest.verify_process("fragments")?;
    lab.vm.expect_alive()?;
    let complaints = lab.vm.guest.tell_complaints(log)? as f64;
    scenario.figure(&format!("{prefix}guest_complaints"), complaints, Bar::AtMost(0.0));
    Ok(())
}

fn tell(scenario: &mut Scenario, prefix: &str, seen: &Seen, bar: Bar) {
    let mut figure =
        |name: &str, value: f64, bar| scenario.figure(&format!("{prefix}{name}"), value, bar);
    figure("aligned_share", ratio(seen.aligned, seen.ranges), bar);
    figure("huge_share", ratio(seen.huge, seen.ranges), Bar::None);
    figure("seconds_to_90_percent", seen.seconds.unwrap_or(f64::INFINITY), Bar::None);
    figure("promoted_while_sparse", seen.huge_when_sparse as f64, Bar::AtMost(0.0));
    figure("agent_cpu_ms_per_range", seen.agent_cpu_seconds * 1e3 / seen.ranges as f64, Bar::None);
    figure("agent_failed", seen.agent_failed as f64, Bar::None);
    figure("host_copied_mib", seen.host_copied as f64 / MIB as f64, Bar::None);
}

/// The life of the program: sparse while the system gives huge pages to those
/// who ask, dense after it began to give them to all.
fn grow(lab: &Lab, seed: u64) -> anyhow::Result<Seen> {
    let guest = &lab.vm.guest;
    guest.write_file(THP, "madvise")?;
    let advice = PageSize::System;
    let sparse = Sparse { bytes: PROGRAM, seed, pages: SPARSE_PAGES, advice };
    guest.start_sparse("program", sparse)?;
    guest.shell(&format!(
        "gemini-guestd --cpu-share {CPU_SHARE} --json --log-level warn > {REPORTS} 2>&1 & \
         echo $! > /tmp/gemini-guestd.pid"
    ))?;
    guest.write_file(THP, "always")?;
    process::wait_for("the promoter passes by", PASSES_TIMEOUT, || {
        // Asking costs the guest time.
        std::thread::sleep(Duration::from_millis(250));
        let reports = reports(&guest.read_file(REPORTS)?)?;
        // Before, it had to leave the program alone.
        let passes = reports.iter().filter(|report| report["thp"] == "always").count();
        Ok((passes >= SPARSE_PASSES).then_some(()))
    })?;
    let before = guest.program_blocks("program")?;
    let mut seen = Seen {
        huge_when_sparse: before.iter().flatten().count() as u64,
        ranges: before.len() as u64,
        ..Seen::default()
    };
    let copied = lab.daemon.status()?.collapse_bytes;
    let passes = reports(&guest.read_file(REPORTS)?)?.len();

    guest.grow("program")?;
    let dense = Instant::now();
    loop {
        let blocks = guest.program_blocks("program")?;
        let host = lab.memory.huge_blocks()?;
        let elapsed = dense.elapsed();
        // Only what was seen in time counts.
        if elapsed <= DENSE_TIME {
            seen.huge = blocks.iter().flatten().count() as u64;
            seen.aligned =
                blocks.iter().flatten().filter(|&block| host.contains(block)).count() as u64;
            if seen.aligned * 10 >= seen.ranges * 9 {
                seen.seconds.get_or_insert(elapsed.as_secs_f64());
            }
        }
        let left = DENSE_TIME.saturating_sub(elapsed);
        if left.is_zero() {
            break;
        }
        std::thread::sleep(left.min(Duration::from_millis(500)));
    }
    guest.shell("kill -TERM $(cat /tmp/gemini-guestd.pid)")?;
    seen.host_copied = lab.daemon.status()?.collapse_bytes - copied;
    for report in &reports(&guest.read_file(REPORTS)?)?[passes..] {
        seen.agent_cpu_seconds += report["cpu_seconds"].as_f64().unwrap_or(0.0);
        seen.agent_failed += report["failed"].as_u64().unwrap_or(0);
    }
    ensure!(seen.ranges == PROGRAM / BLOCK, "the program has {} ranges", seen.ranges);
    guest.verify_process("program")?;
    guest.end("program")?;
    Ok(seen)
}

/// What the promoter has said of each of its passes. The last line may not be
/// written to its end yet.
fn reports(text: &str) -> anyhow::Result<Vec<Value>> {
    let (whole, _) = text.rsplit_once('\n').unwrap_or_default();
    whole
        .lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("no report: {line}")))
        .collect()
}

//! A guest frees a program's memory, and the host gets it back: from the driver,
//! and from virtio-balloon's free page reporting.

use std::time::{Duration, Instant};

use anyhow::{ensure, Context};
use gemini_guest::protocol::{Break, PageSize, Program};
use gemini_harness::figures::{Bar, Scenario};

use crate::daemon::DaemonConfig;
use crate::lab::{Bench, Lab, SYNC_TIMEOUT};
use crate::outside::HostState;
use crate::process;
use crate::{BLOCK, MIB};

/// Memory that stays in use meanwhile: half of each of its huge pages.
const KEPT: u64 = 64 * MIB;

/// How long the driver holds free blocks. Reporting waits as long.
const HOLD: Duration = Duration::from_secs(2);

/// Longest time after the hold until [`SHARE`] of the memory is back.
const DELAY_BAR: f64 = 1.0;
/// Shares of the memory: when they are back tells when it begins, how fast it
/// is, and when it is over.
const SHARES: [f64; 4] = [0.05, 0.25, 0.5, SHARE];
const SHARE: f64 = 0.95;

/// The host's memory is at rest when it did not change for so long: longer than
/// any of the three waits.
const REST: Duration = Duration::from_secs(6);
const SETTLE: Duration = Duration::from_secs(120);

/// How long is waited for the memory. What is not back then, does not come.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at the host.
const LOOK: Duration = Duration::from_millis(20);

/// Without it, what is kept would become whole again in other places.
const ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
const ORDER: &str = "/sys/module/page_reporting/parameters/page_reporting_order";

/// Who gives memory back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// The driver.
    Driver,
    /// Free page reporting, of what is at least that large: 2^order pages.
    Reporting(u32),
}

const WAYS: [(Way, &str); 3] = [
    (Way::Driver, "ours"),
    (Way::Reporting(9), "reporting"),
    (Way::Reporting(0), "reporting_order_0"),
];

/// What one way has shown.
struct Returned {
    /// Bytes that came back in the end.
    bytes: u64,
    /// Seconds from the end of the program until each of [`SHARES`] was back.
    passed: [Option<f64>; SHARES.len()],
    /// Host huge pages in use before, and those of them that were split.
    used: u64,
    split: u64,
    daemon_cpu: f64,
    qemu_cpu: f64,
}

/// Frees the same program three times in the same guest.
///
/// # Errors
/// If guest, QEMU or daemon fail in a way that is no figure.
pub fn measure(bench: &Bench, seed: u64, quick: bool) -> anyhow::Result<Scenario> {
    let (memory, bytes) = if quick { (1024 * MIB, 256 * MIB) } else { (3072 * MIB, 1024 * MIB) };
    let mut scenario = Scenario::new("give-back");
    scenario.arg("guest_memory", memory);
    scenario.arg("program_bytes", bytes);
    scenario.arg("kept_bytes", KEPT);
    scenario.arg("hold_seconds", HOLD.as_secs_f64());
    scenario.arg("init_on_alloc", true);

    let mut daemon = DaemonConfig::new(&bench.assets.daemon, "gemini");
    daemon.arguments.extend(["--give-back".to_owned(), "always".to_owned()]);
    let mut lab = Lab::start_with(bench, "bench-give-back", daemon, |config| {
        config.memory = memory;
        config.guest_thp = "madvise".into();
        config.qemu_arguments.extend(
            ["-device", "virtio-balloon-pci,free-page-reporting=on"].map(ToOwned::to_owned),
        );
    })?;
    let log = lab.vm.guest.log_position()?;
    for (number, (way, name)) in WAYS.into_iter().enumerate() {
        eprintln!("{name}");
        let returned = run(&mut lab, way, bytes, seed + number as u64)?;
        let share = returned.bytes as f64 / bytes as f64;
        let ours = way == Way::Driver;
        let mut figure = |what: &str, value: f64, bar: Bar| {
            let bar = if ours { bar } else { Bar::None };
            scenario.figure(&format!("{name}_{what}"), value, bar);
        };
        figure("returned_share", share, Bar::AtLeast(SHARE));
        let [first, early, _, most] =
            returned.passed.map(|seconds| seconds.unwrap_or(f64::INFINITY));
        figure("first_seconds", first, Bar::None);
        figure("delay_seconds", most, Bar::None);
        if ours {
            figure("delay_after_hold_seconds", most - HOLD.as_secs_f64(), Bar::Below(DELAY_BAR));
        }
        let gib = (SHARE - SHARES[1]) * bytes as f64 / f64::from(1 << 30);
        figure("gib_per_second", gib / (most - early).max(LOOK.as_secs_f64()), Bar::None);
        figure("used_huge_pages", returned.used as f64, Bar::AtLeast((KEPT / BLOCK) as f64 * 0.9));
        figure("split_huge_pages", returned.split as f64, Bar::AtMost(0.0));
        figure("daemon_cpu_seconds", returned.daemon_cpu, Bar::None);
        figure("qemu_cpu_seconds", returned.qemu_cpu, Bar::None);
    }
    let complaints = lab.vm.guest.tell_complaints(log)?;
    scenario.figure("guest_complaints", complaints as f64, Bar::AtMost(0.0));
    Ok(scenario)
}

fn run(lab: &mut Lab, way: Way, bytes: u64, seed: u64) -> anyhow::Result<Returned> {
    let hold = u64::try_from(HOLD.as_millis()).context("a hold of this age")?;
    if lab.vm.guest.shell("ls /sys/module/virtio_gemini").is_err() {
        lab.vm.guest.load_driver()?;
        lab.daemon.wait_synced(SYNC_TIMEOUT)?;
    }
    lab.vm.guest.set_driver("booking_timeout_ms", hold)?;
    // What is kept is to stay where it is.
    lab.vm.guest.set_driver("evacuation_rate", 0)?;

    lab.vm.guest.write_file(ENABLED, "madvise")?;
    let program = Program { bytes, seed, blocks_per_second: 0.0 };
    lab.vm.guest.start_program("program", program)?;
    lab.vm.guest.fill("kept", KEPT, seed, PageSize::Huge)?;
    lab.wait_settled(SETTLE)?;
    lab.vm.guest.write_file(ENABLED, "never")?;
    let kept: Vec<u64> = lab.vm.guest.blocks_of("kept")?.into_iter().flatten().collect();
    let count = |lab: &Lab, wanted: HostState| -> anyhow::Result<u64> {
        let states = lab.memory.states()?;
        let found = states.iter().filter(|(block, state)| kept.contains(block) && *state == wanted);
        Ok(found.count() as u64)
    };
    let used = count(lab, HostState::Huge)?;
    ensure!(used > 0, "nothing is huge, so nothing can be split");
    lab.vm.guest.break_pages("kept", Break::Split, 1)?;
    lab.vm.guest.break_pages("kept", Break::DropHalf, 1)?;
    if let Way::Reporting(order) = way {
        lab.vm.guest.unload_driver()?;
        // Only a module that is not there yet takes it over.
        lab.vm.guest.write_file(ORDER, &order.to_string())?;
        lab.vm.guest.load_balloon()?;
    }
    // What is free already comes first, and is not what is measured.
    at_rest(lab)?;
    let before = lab.memory.resident_bytes()?;
    let daemon_cpu = lab.daemon.process.cpu_seconds()?;
    let qemu_cpu = lab.vm.process.cpu_seconds()?;

    lab.vm.guest.end("program")?;
    let start = Instant::now();
    let mut passed = [None; SHARES.len()];
    let mut back = 0;
    while start.elapsed() < PATIENCE && passed.contains(&None) {
        back = before.saturating_sub(lab.memory.resident_bytes()?);
        let now = start.elapsed().as_secs_f64();
        for (passed, share) in passed.iter_mut().zip(SHARES) {
            if back as f64 >= share * bytes as f64 {
                passed.get_or_insert(now);
            }
        }
        std::thread::sleep(LOOK);
    }
    eprintln!("  {} MiB back; shares of {SHARES:?} after {passed:?} s", back / MIB);
    let daemon_cpu = lab.daemon.process.cpu_seconds()? - daemon_cpu;
    let qemu_cpu = lab.vm.process.cpu_seconds()? - qemu_cpu;
    at_rest(lab)?;
    let split = count(lab, HostState::Base)?;
    eprintln!("  of {used} huge pages in use {} are huge", count(lab, HostState::Huge)?);
    lab.vm.guest.verify("kept")?;
    lab.vm.guest.free("kept")?;
    if matches!(way, Way::Reporting(_)) {
        lab.vm.guest.shell("rmmod virtio_balloon")?;
    }
    Ok(Returned { bytes: back, passed, used, split, daemon_cpu, qemu_cpu })
}

/// Waits until the guest costs the host the same for a while.
fn at_rest(lab: &Lab) -> anyhow::Result<()> {
    let mut last = (0, Instant::now());
    process::wait_for("the host's memory is at rest", SETTLE, || {
        std::thread::sleep(Duration::from_millis(200));
        let now = lab.memory.resident_bytes()?;
        // A page here and there is the guest's own life.
        if now.abs_diff(last.0) > MIB {
            last = (now, Instant::now());
        }
        Ok((last.1.elapsed() >= REST).then_some(()))
    })
}

//! A guest under memory load moves from QEMU to QEMU, over and over; is held
//! back; and loses one of the four processes at any moment.

use std::time::{Duration, Instant};

use anyhow::{ensure, Context};
use gemini_guest::protocol::PageSize;
use gemini_harness::figures::{Bar, Scenario};
use gemini_harness::rng::Rng;

use super::spread::median;
use crate::lab::{Bench, Lab, SYNC_TIMEOUT};
use crate::migration::{self, State};
use crate::process;
use crate::vm::{Vm, VmConfig};
use crate::MIB;

/// Memory that stays and is compared after every move.
const KEPT: u64 = 256 * MIB;
/// Most memory that is mapped, filled, compared and unmapped all the time.
const LOAD: u64 = 48 * MIB;

/// Share of its former coverage that a guest has again in so long.
const REFORMED: f64 = 0.9;
const REFORM_BAR_SECONDS: f64 = 10.0;
/// Downtime against that of the same guest without the device.
const DOWNTIME_BAR: f64 = 1.1;

/// A device of QEMU's own, as a yardstick: what any device of virtio costs.
const BALLOON: [&str; 2] = ["-device", "virtio-balloon-pci,free-page-reporting=on"];

/// How long is waited for coverage; the bar is judged apart.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often somebody is killed at most, until it happens in time.
const ATTEMPTS: u32 = 5;
/// How long the guest is given to hand back what a cancelled migration filled.
const GIVEN_BACK: Duration = Duration::from_secs(30);
/// How often the host's memory is looked at meanwhile.
const LOOK: Duration = Duration::from_millis(500);

/// Who dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    SourceDaemon,
    TargetDaemon,
    SourceQemu,
    TargetQemu,
}

const VICTIMS: [Victim; 4] =
    [Victim::SourceDaemon, Victim::TargetDaemon, Victim::TargetQemu, Victim::SourceQemu];

/// What a series of migrations has shown.
#[derive(Default)]
struct Seen {
    downtime_ms: Vec<f64>,
    /// Of that the device's state alone.
    save_ms: Vec<f64>,
    load_ms: Vec<f64>,
    total_seconds: Vec<f64>,
    reform_seconds: Vec<f64>,
    coverage_ratio: Vec<f64>,
    /// Times that memory was not what had been written to it.
    losses: u32,
}

/// What failures have shown.
#[derive(Default)]
struct Failures {
    /// Somebody died while the guest was on its way.
    in_time: u32,
    /// Not one guest was left where one had to be, or two.
    wrong: u32,
    /// The guest had moved before anything died.
    late: u32,
}

/// Moves a guest 20 times in turn with one without the device, and with one that has another
/// device in its place; cancels, and kills.
///
/// # Errors
/// If guest, QEMU or daemon fail in a way that is no figure.
pub fn measure(bench: &Bench, seed: u64, quick: bool) -> anyhow::Result<Scenario> {
    let rounds = if quick { 3 } else { 20 };
    let kills = if quick { 1 } else { 5 };
    let mut rng = Rng::new(seed);
    let mut seen = Seen::default();

    let mut lab = Lab::start(bench, "bench-migrate", "gemini", migration::log_downtime)?;
    let log = lab.vm.guest.log_position()?;
    let plain = Other::boot(bench, "plain", None, &[])?;
    let balloon = Other::boot(bench, "balloon", Some("virtio-balloon"), &BALLOON)?;
    balloon.vm.guest.load_balloon()?;
    let mut others = [plain, balloon];
    for vm in others.iter().map(|other| &other.vm).chain([&lab.vm]) {
        vm.guest.fill("kept", KEPT, seed, PageSize::Huge)?;
        vm.guest.start_churn("load", LOAD, seed)?;
    }
    let former = settled_coverage(&mut lab)?;
    // A guest that has moved is resident as a whole.
    for other in &mut others {
        other.vm.pause()?;
    }
    let cancelled = cancel(&mut lab, &mut rng)?;
    for round in 0..rounds {
        // None is in another's way.
        lab = move_lab(lab, round, former, &mut seen)?;
        lab.vm.pause()?;
        let [plain, balloon] = others;
        others = [plain.move_on(bench, round)?, balloon.move_on(bench, round)?];
        lab.vm.resume()?;
    }
    let [plain, balloon] = others.map(|other| other.seen);

    let mut failures = Failures::default();
    for kill in 0..kills {
        for victim in VICTIMS {
            let share = rng.below(80) as f64 / 100.0;
            let mut moment = Duration::from_secs_f64(median(&seen.total_seconds) * share);
            // After the guest has moved nothing is at stake: that is tried again, earlier.
            for _ in 0..ATTEMPTS {
                let late = failures.late;
                lab = lose(lab, victim, moment, seed, &mut failures, &mut seen).with_context(
                    || format!("{victim:?} killed {moment:?} after the begin, {kill}"),
                )?;
                if failures.late == late {
                    break;
                }
                moment /= 2;
            }
        }
    }
    let churned = lab.vm.guest.stop_churn("load")?;
    lab.vm.guest.verify("kept")?;
    // Of the guest that runs last; one that died with its QEMU cannot be asked.
    let complaints = lab.vm.guest.tell_complaints(log)?;
    let mut idle = lab.destination("bench-migrate-postcopy")?;
    let postcopy = migration::allow_postcopy(&mut idle.vm);

    let mut scenario = Scenario::new("migrate");
    scenario.arg("rounds", rounds);
    scenario.arg("kills_of_each", kills);
    scenario.figure("migrations", seen.downtime_ms.len() as f64, Bar::AtLeast(f64::from(rounds)));
    let losses = seen.losses + plain.losses + balloon.losses;
    scenario.figure("losses", f64::from(losses), Bar::AtMost(0.0));
    let ratio = |of: &Seen| median(&of.downtime_ms) / median(&plain.downtime_ms);
    scenario.figure("downtime_ratio", ratio(&seen), Bar::AtMost(DOWNTIME_BAR));
    scenario.figure("downtime_ratio_of_balloon", ratio(&balloon), Bar::None);
    for (name, found) in [
        ("downtime_ms", &seen),
        ("downtime_ms_without_device", &plain),
        ("downtime_ms_with_balloon", &balloon),
    ] {
        let extreme =
            |of: fn(f64, f64) -> f64, from| found.downtime_ms.iter().copied().fold(from, of);
        scenario.figure(name, median(&found.downtime_ms), Bar::None);
        scenario.figure(&format!("{name}_min"), extreme(f64::min, f64::INFINITY), Bar::None);
        scenario.figure(&format!("{name}_max"), extreme(f64::max, 0.0), Bar::None);
    }
    for (name, found) in [("device", &seen), ("balloon", &balloon)] {
        scenario.figure(&format!("{name}_state_save_ms"), median(&found.save_ms), Bar::None);
        scenario.figure(&format!("{name}_state_load_ms"), median(&found.load_ms), Bar::None);
    }
    scenario.figure("total_seconds", median(&seen.total_seconds), Bar::None);
    scenario.figure("total_seconds_without_device", median(&plain.total_seconds), Bar::None);
    scenario.figure("coverage_before", former, Bar::None);
    let worst = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
    let slowest = worst(&seen.reform_seconds);
    scenario.figure("reform_seconds_max", slowest, Bar::Below(REFORM_BAR_SECONDS));
    scenario.figure("reform_seconds", median(&seen.reform_seconds), Bar::None);
    let least = seen.coverage_ratio.iter().copied().fold(f64::INFINITY, f64::min);
    scenario.figure("coverage_ratio_min", least, Bar::AtLeast(REFORMED));
    let Cancelled { before, after, least, end } = cancelled;
    scenario.figure("source_mib_before_cancel", before, Bar::None);
    scenario.figure("source_mib_after_cancel", after, Bar::None);
    let half = (after - before) / 2.0;
    scenario.figure("source_mib_given_back", after - least, Bar::AtLeast(half));
    // The load touches what was given back, in the course of time.
    scenario.figure("source_mib_30_s_later", end, Bar::None);
    scenario.figure("kills", f64::from(failures.in_time), Bar::AtLeast(f64::from(kills) * 4.0));
    scenario.figure("kills_too_late", f64::from(failures.late), Bar::None);
    scenario.figure("wrong_number_of_guests", f64::from(failures.wrong), Bar::AtMost(0.0));
    scenario.figure("postcopy_refused", f64::from(postcopy.is_err()), Bar::AtLeast(1.0));
    scenario.figure("guest_complaints", complaints as f64, Bar::AtMost(0.0));
    scenario.figure("load_rounds", churned.rounds as f64, Bar::AtLeast(1.0));
    Ok(scenario)
}

/// Coverage of a guest that has been running for a while.
fn settled_coverage(lab: &mut Lab) -> anyhow::Result<f64> {
    let enough = KEPT / (2 * MIB) - 2;
    process::wait_for("the host follows the guest", PATIENCE, || {
        Ok((lab.daemon.status()?.aligned >= enough).then_some(()))
    })?;
    let samples: Vec<f64> = (0..5)
        .map(|_| Ok(lab.view()?.counts().aligned_coverage()))
        .collect::<anyhow::Result<_>>()?;
    Ok(median(&samples))
}

fn compare(guest: &crate::guest::Guest, seen: &mut Seen) {
    if let Err(error) = guest.verify("kept") {
        eprintln!("{error:#}");
        seen.losses += 1;
    }
}

/// A guest without the device, and what its moves have shown.
struct Other {
    kind: &'static str,
    /// The device in the place of ours, as QEMU names its state.
    device: Option<&'static str>,
    vm: Vm,
    seen: Seen,
}

impl Other {
    fn boot(
        bench: &Bench,
        kind: &'static str,
        device: Option<&'static str>,
        arguments: &[&str],
    ) -> anyhow::Result<Self> {
        let mut config = VmConfig::new(&format!("bench-migrate-{kind}"), bench.accel);
        migration::log_downtime(&mut config);
        config.qemu_arguments.extend(arguments.iter().map(|&argument| argument.to_owned()));
        Ok(Other { kind, device, vm: Vm::boot(&bench.assets, config)?, seen: Seen::default() })
    }

    /// Moves the guest, which is paused before and after.
    fn move_on(self, bench: &Bench, round: u32) -> anyhow::Result<Self> {
        let Other { kind, device, vm: mut from, mut seen } = self;
        let name = format!("bench-migrate-{kind}-{}", round % 2);
        let config = VmConfig { name, ..from.config.clone() };
        let mut to = Vm::await_guest(&bench.assets, config)?;
        from.resume()?;
        let began = Instant::now();
        migration::migrate(&mut from, &mut to)?;
        note(&mut seen, began, &from, &to, device)?;
        compare(&to.guest, &mut seen);
        to.pause()?;
        Ok(Other { kind, device, vm: to, seen })
    }
}

fn note(
    seen: &mut Seen,
    began: Instant,
    from: &Vm,
    to: &Vm,
    device: Option<&str>,
) -> anyhow::Result<()> {
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    seen.total_seconds.push(began.elapsed().as_secs_f64());
    seen.downtime_ms.push(ms(migration::downtime(from, to)?));
    if let Some(device) = device {
        let (save, load) = migration::state_time(from, to, device)?;
        seen.save_ms.push(ms(save));
        seen.load_ms.push(ms(load));
    }
    Ok(())
}

/// Moves a guest, and takes the time until it is aligned again.
fn move_lab(mut from: Lab, round: u32, former: f64, seen: &mut Seen) -> anyhow::Result<Lab> {
    let mut to = from.destination(&format!("bench-migrate-{}", round % 2))?;
    let began = Instant::now();
    migration::migrate(&mut from.vm, &mut to.vm)?;
    let arrived = Instant::now();
    note(seen, began, &from.vm, &to.vm, Some("vhost-user-gemini"))?;
    drop(from);
    let mut last = 0.0;
    let reformed = process::wait_for("coverage is back", PATIENCE, || {
        last = to.view()?.counts().aligned_coverage();
        Ok((last >= REFORMED * former).then_some(()))
    });
    if let Err(error) = reformed {
        eprintln!("round {round}: {error:#}; it is {last:.3}, it was {former:.3}");
    }
    seen.reform_seconds.push(arrived.elapsed().as_secs_f64());
    seen.coverage_ratio.push(last / former);
    compare(&to.vm.guest, seen);
    Ok(to)
}

/// MiB of the host's memory that the source of a cancelled migration has.
struct Cancelled {
    before: f64,
    after: f64,
    /// The least of what was seen in the time after it.
    least: f64,
    end: f64,
}

/// Gives a migration up at a random moment of its first pass over memory.
fn cancel(lab: &mut Lab, rng: &mut Rng) -> anyhow::Result<Cancelled> {
    let mib = |lab: &Lab| anyhow::Ok(lab.memory.resident_bytes()? as f64 / MIB as f64);
    let mut to = lab.destination("bench-migrate-cancelled")?;
    let left = 0.1 + 0.4 * rng.below(100) as f64 / 100.0;
    let before = mib(lab)?;
    migration::begin(&mut lab.vm, &mut to.vm)?;
    process::wait_for("the moment", PATIENCE, || {
        let (state, now) = migration::state(&mut lab.vm)?;
        ensure!(state == State::Active, "{state:?} too early");
        // Nothing is known at first.
        Ok((now > 0.0 && now <= left).then_some(()))
    })?;
    migration::cancel(&mut lab.vm)?;
    let state = migration::wait_over(&mut lab.vm)?;
    ensure!(state == State::Cancelled, "{state:?}");
    drop(to);
    let after = mib(lab)?;
    lab.vm.expect_alive()?;
    let since = Instant::now();
    let (mut least, mut end) = (after, after);
    while since.elapsed() < GIVEN_BACK {
        std::thread::sleep(LOOK);
        end = mib(lab)?;
        least = least.min(end);
    }
    lab.vm.guest.verify("kept")?;
    Ok(Cancelled { before, after, least, end })
}

/// Kills one of four at a moment of a migration, and looks who runs the guest.
fn lose(
    mut from: Lab,
    victim: Victim,
    moment: Duration,
    seed: u64,
    failures: &mut Failures,
    seen: &mut Seen,
) -> anyhow::Result<Lab> {
    let mut to = from.destination("bench-migrate-failing")?;
    let began = Instant::now();
    migration::begin(&mut from.vm, &mut to.vm)?;
    let over = || began.elapsed() >= moment;
    process::wait_for("the moment", PATIENCE, || Ok(over().then_some(())))?;
    let late = migration::state(&mut from.vm)?.0 != State::Active;
    failures.late += u32::from(late);
    failures.in_time += u32::from(!late);
    match victim {
        Victim::SourceDaemon => from.kill_daemon()?,
        Victim::TargetDaemon => to.kill_daemon()?,
        Victim::SourceQemu => from.vm.process.kill()?,
        // It is the guest's own by then.
        Victim::TargetQemu if late => {}
        Victim::TargetQemu => to.vm.process.kill()?,
    }
    let mut winner = match victim {
        Victim::SourceQemu => {
            // Either it has all of the guest, or it gives up: it never runs a half.
            let complete = process::wait_for("the target runs or ends", PATIENCE, || {
                if !to.vm.process.is_running()? {
                    return Ok(Some(false));
                }
                Ok(to.vm.qmp.is_running().unwrap_or(false).then_some(true))
            })?;
            failures.wrong += u32::from(late && !complete);
            if complete {
                to
            } else {
                replace(&from, seed)?
            }
        }
        Victim::SourceDaemon | Victim::TargetDaemon | Victim::TargetQemu => {
            let state = migration::wait_over(&mut from.vm)?;
            let moved = state == State::Completed;
            if moved {
                migration::wait_running(&mut to.vm)?;
            }
            let both = moved && from.vm.qmp.is_running()?;
            let none = !moved && !from.vm.qmp.is_running()?;
            failures.wrong += u32::from(both || none);
            if moved {
                to
            } else {
                from
            }
        }
    };
    if !winner.daemon.process.is_running()? {
        winner.restart_daemon()?;
    }
    winner.daemon.wait_synced(SYNC_TIMEOUT)?;
    compare(&winner.vm.guest, seen);
    Ok(winner)
}

/// A guest in the place of one that died with its QEMU.
fn replace(dead: &Lab, seed: u64) -> anyhow::Result<Lab> {
    let lab = Lab::start(&dead.bench, "bench-migrate", "gemini", |_| {})?;
    lab.vm.guest.fill("kept", KEPT, seed, PageSize::Huge)?;
    lab.vm.guest.start_churn("load", LOAD, seed)?;
    Ok(lab)
}

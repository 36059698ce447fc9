//! The daemon dies by SIGKILL under a guest under load, and comes back.

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context};
use gemini_guest::protocol::{Break, PageSize};
use gemini_harness::figures::{Bar, Scenario};

use crate::assets;
use crate::daemon::DaemonConfig;
use crate::lab::{Bench, Lab};
use crate::process;
use crate::{BLOCK, MIB};

/// Time from the reconnect to both layers' full state.
const RESYNC_BAR_SECONDS: f64 = 2.0;

/// How long QEMU and guest may take to be back; the bar is judged apart.
const RESYNC_TIMEOUT: Duration = Duration::from_secs(60);

/// Requests about whole blocks, and where each, and a trim, can be when the daemon dies.
const REQUESTS: [&str; 3] = ["prepare", "release", "renew"];
const STEPS: [&str; 3] = ["fetched", "done", "published"];

/// Requests under way at such a time, and which of them the daemon dies of.
const OUTSTANDING: u32 = 6;
const FATAL: u32 = 3;

/// Bytes of the program whose blocks are trimmed. Each block is several requests.
const SPARSE: u64 = 16 * MIB;

/// How long the daemon may take to make that program's memory huge.
const SETTLE: Duration = Duration::from_secs(120);

/// What a series of deaths has shown.
#[derive(Default)]
struct Seen {
    kills: u32,
    resync_seconds: Vec<f64>,
    /// Times that memory was not what had been written to it.
    losses: u32,
}

/// Kills and restarts the daemon: at random times, at every step of a request,
/// and with a reset of the guest while it is away.
///
/// # Errors
/// If guest, QEMU or daemon fail in a way that is no figure.
pub fn measure(bench: &Bench, seed: u64, quick: bool) -> anyhow::Result<Scenario> {
    let rounds: u32 = if quick { 2 } else { 12 };
    let mut seen = Seen::default();
    let mut lab = Lab::start(bench, "bench-restart", "gemini", |_| {})?;
    let log = lab.vm.guest.log_position()?;
    lab.vm.guest.fill("kept", 128 << 20, seed, PageSize::Huge)?;
    lab.vm.guest.start_churn("load", 160 << 20, seed)?;

    for _ in 0..rounds {
        lab.kill_daemon()?;
        // Long enough for reports to pile up behind the dead daemon.
        std::thread::sleep(Duration::from_millis(300));
        come_back(&mut lab, &mut seen)?;
    }
    // From here on requests are made by hand, of blocks that nobody else takes.
    lab.vm.guest.hints_only()?;
    let mut points = 0;
    for request in REQUESTS {
        for step in STEPS {
            let point = format!("{request}.{step}");
            die_at(&mut lab, &mut seen, request, &point).with_context(|| point.clone())?;
            points += 1;
        }
    }
    for step in STEPS {
        let point = format!("trim.{step}");
        die_trimming(&mut lab, &mut seen, &point).with_context(|| point.clone())?;
        points += 1;
    }
    let churned = lab.vm.guest.stop_churn("load")?;
    let complaints = lab.vm.guest.tell_complaints(log)?;

    // Disconnected: the guest reads the device's configuration and is reset.
    lab.kill_daemon()?;
    seen.kills += 1;
    lab.vm.guest.shell("cat /sys/bus/virtio/devices/*/features > /dev/null")?;
    lab.vm.reset()?;
    lab.restart_daemon()?;
    lab.daemon.wait_synced(RESYNC_TIMEOUT)?;
    lab.vm.expect_alive()?;

    let slowest = seen.resync_seconds.iter().copied().fold(0.0, f64::max);
    let mean = seen.resync_seconds.iter().sum::<f64>() / seen.resync_seconds.len() as f64;
    let mut scenario = Scenario::new("restart");
    scenario.arg("rounds", rounds);
    scenario.arg("outstanding_requests", OUTSTANDING);
    scenario.figure("kills", f64::from(seen.kills), Bar::None);
    let all_points = ((REQUESTS.len() + 1) * STEPS.len()) as f64;
    scenario.figure("kill_points", f64::from(points), Bar::AtLeast(all_points));
    scenario.figure("resync_seconds_max", slowest, Bar::Below(RESYNC_BAR_SECONDS));
    scenario.figure("resync_seconds_mean", mean, Bar::None);
    scenario.figure("losses", f64::from(seen.losses), Bar::AtMost(0.0));
    scenario.figure("guest_complaints", complaints as f64, Bar::AtMost(0.0));
    scenario.figure("load_rounds", churned.rounds as f64, Bar::AtLeast(1.0));
    Ok(scenario)
}

/// Starts another daemon in place of the one that runs: one that will die at `point`. Those after
/// it will not.
fn arm(lab: &mut Lab, seen: &mut Seen, point: &str) -> anyhow::Result<()> {
    lab.kill_daemon()?;
    let ordinary = lab.daemon_config.clone();
    lab.daemon_config = DaemonConfig {
        program: assets::fault_daemon()?,
        environment: vec![("GEMINI_FAULT".to_owned(), format!("{point}:{FATAL}"))],
        ..ordinary.clone()
    };
    let came_back = come_back(lab, seen);
    lab.daemon_config = ordinary;
    came_back
}

/// Waits for the daemon's death, and for the next one.
fn follow(lab: &mut Lab, seen: &mut Seen) -> anyhow::Result<()> {
    let status = lab.daemon.process.wait(RESYNC_TIMEOUT)?;
    ensure!(status.signal() == Some(libc::SIGKILL), "the daemon ended with {status}");
    come_back(lab, seen)
}

/// Waits until all that was under way is answered.
fn wait_answered(lab: &Lab) -> anyhow::Result<()> {
    process::wait_for("every request is answered", RESYNC_TIMEOUT, || {
        let pending = lab.vm.guest.driver_number("ctrl_pending")?
            + lab.vm.guest.driver_number("release_pending")?;
        Ok((pending == 0).then_some(()))
    })
}

/// Starts a program whose blocks are huge in the host, with an eighth of each in use; which these
/// are.
fn sparse_program(lab: &mut Lab) -> anyhow::Result<Vec<String>> {
    lab.vm.guest.fill("sparse", SPARSE, 7, PageSize::Huge)?;
    let own: BTreeSet<u64> = lab.vm.guest.blocks_of("sparse")?.into_iter().flatten().collect();
    let aligned = process::wait_for("the sparse program is aligned", SETTLE, || {
        let aligned: Vec<u64> = own.intersection(&lab.memory.huge_blocks()?).copied().collect();
        Ok((aligned.len() as u64 * BLOCK >= SPARSE * 3 / 4).then_some(aligned))
    })?;
    lab.vm.guest.break_pages("sparse", Break::Split, 1)?;
    lab.vm.guest.break_pages("sparse", Break::DropScattered, 1)?;
    lab.vm.guest.driver_command("census")?;
    Ok(aligned.iter().map(u64::to_string).collect())
}

/// Has the daemon die at `point` while blocks are trimmed, one after the other.
fn die_trimming(lab: &mut Lab, seen: &mut Seen, point: &str) -> anyhow::Result<()> {
    arm(lab, seen, point)?;
    let trimmed = |lab: &Lab| lab.vm.guest.driver_number("trimmed_pages");
    let before = trimmed(lab)?;
    let blocks = sparse_program(lab)?;
    // A round of the load that is of base pages may have all that is free in these blocks, until
    // it ends: so they are trimmed again and again. The command waits for its answers, those of
    // the next daemon, too.
    lab.vm.guest.shell(&format!(
        "rm -f /enough; cd /sys/kernel/debug/virtio_gemini/*/ || exit; \
         (until test -e /enough; do \
          (for block in {}; do echo trim $block > command; cat command; done) > /trimmed 2>&1; \
          done; echo all >> /trimmed) < /dev/null > /dev/null 2>&1 &",
        blocks.join(" ")
    ))?;
    let told = |lab: &Lab| lab.vm.guest.read_file("/trimmed").unwrap_or_default();
    follow(lab, seen).with_context(|| told(lab))?;
    process::wait_for("pages are trimmed", RESYNC_TIMEOUT, || {
        Ok((trimmed(lab)? - before >= u64::from(FATAL)).then_some(()))
    })
    .with_context(|| told(lab))?;
    lab.vm.guest.shell("touch /enough")?;
    process::wait_for("the blocks are trimmed", RESYNC_TIMEOUT, || {
        Ok(told(lab).ends_with("all\n").then_some(()))
    })?;
    wait_answered(lab)?;
    if let Err(error) = lab.vm.guest.verify("sparse") {
        eprintln!("{point}: {error:#}");
        seen.losses += 1;
    }
    lab.vm.guest.free("sparse")
}

/// Has the daemon die at `point`, with several requests under way.
fn die_at(lab: &mut Lab, seen: &mut Seen, request: &str, point: &str) -> anyhow::Result<()> {
    arm(lab, seen, point)?;
    let told = lab.vm.guest.driver_command(&format!("book any {OUTSTANDING}"))?;
    let blocks: Vec<u64> = told.lines().filter_map(|line| line.parse().ok()).collect();
    ensure!(blocks.len() == OUTSTANDING as usize, "the driver booked {told}");
    for block in &blocks {
        lab.vm.guest.driver_command(&format!("fill {block} 5"))?;
    }
    for block in &blocks {
        lab.vm.guest.driver_command(&format!("{request} {block} 1 nowait"))?;
    }
    follow(lab, seen)?;
    wait_answered(lab)?;
    if request == "prepare" {
        // The other two may have dropped these; nothing drops on ctrlq.
        for block in &blocks {
            if let Err(error) = lab.vm.guest.driver_command(&format!("check {block} 5")) {
                eprintln!("{point}: block {block} is not what was written to it: {error:#}");
                seen.losses += 1;
            }
        }
    }
    lab.vm.guest.driver_command("free all")?;
    Ok(())
}

/// Starts the next daemon, takes the time, and looks for losses.
fn come_back(lab: &mut Lab, seen: &mut Seen) -> anyhow::Result<()> {
    lab.vm.expect_alive()?;
    lab.restart_daemon()?;
    seen.resync_seconds.push(resync_seconds(lab)?);
    seen.kills += 1;
    if let Err(error) = lab.vm.guest.verify("kept") {
        eprintln!("{error:#}");
        seen.losses += 1;
    }
    Ok(())
}

/// Seconds from the reconnect to the full state of both layers.
///
/// # Errors
/// If it does not come in time.
pub fn resync_seconds(lab: &mut Lab) -> anyhow::Result<f64> {
    let daemon = &mut lab.daemon;
    process::wait_for("QEMU reconnects", RESYNC_TIMEOUT, || {
        daemon.process.expect_running()?;
        Ok(daemon.status()?.connected.then_some(()))
    })?;
    let connected = Instant::now();
    daemon.wait_synced(RESYNC_TIMEOUT)?;
    Ok(connected.elapsed().as_secs_f64())
}

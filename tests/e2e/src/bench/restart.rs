//! The daemon dies by SIGKILL under a guest under load, and comes back.

use std::time::{Duration, Instant};

use gemini_guest::protocol::PageSize;
use gemini_harness::figures::{Bar, Scenario};

use crate::lab::{Bench, Lab};

/// Time from the reconnect to both layers' full state.
const RESYNC_BAR_SECONDS: f64 = 2.0;

/// How long QEMU and guest may take to be back; the bar is judged apart.
const RESYNC_TIMEOUT: Duration = Duration::from_secs(60);

/// Kills and restarts the daemon, with a guest reset while it is away in the
/// end.
///
/// # Errors
/// If guest, QEMU or daemon fail in a way that is no figure.
pub fn measure(bench: &Bench, seed: u64, quick: bool) -> anyhow::Result<Scenario> {
    let rounds: u32 = if quick { 3 } else { 20 };
    let mut lab = Lab::start(bench, "bench-restart", "gemini", |_| {})?;
    let log = lab.vm.guest.log_position()?;
    lab.vm.guest.fill("kept", 128 << 20, seed, PageSize::Huge)?;
    lab.vm.guest.start_churn("load", 192 << 20, seed)?;

    let mut slowest: f64 = 0.0;
    let mut sum = 0.0;
    let mut lost_words = 0_u64;
    for _ in 0..rounds {
        lab.kill_daemon()?;
        // Long enough for requests to pile up behind the dead daemon.
        std::thread::sleep(Duration::from_millis(300));
        lab.vm.expect_alive()?;
        lab.restart_daemon()?;
        let seconds = resync_seconds(&mut lab)?;
        slowest = slowest.max(seconds);
        sum += seconds;
        if lab.vm.guest.verify("kept").is_err() {
            lost_words += 1;
        }
    }
    let churned = lab.vm.guest.stop_churn("load")?;
    let complaints = lab.vm.guest.complaints(log)?;
    for complaint in &complaints {
        eprintln!("guest: {}", complaint.text);
    }

    // Disconnected: the guest reads the device's configuration and is reset.
    lab.kill_daemon()?;
    lab.vm.guest.shell("cat /sys/bus/virtio/devices/*/features > /dev/null")?;
    lab.vm.reset()?;
    lab.restart_daemon()?;
    lab.daemon.wait_synced(RESYNC_TIMEOUT)?;
    lab.vm.expect_alive()?;

    let mut scenario = Scenario::new("restart");
    scenario.arg("rounds", rounds);
    scenario.figure("kills", f64::from(rounds) + 1.0, Bar::None);
    scenario.figure("resync_seconds_max", slowest, Bar::Below(RESYNC_BAR_SECONDS));
    scenario.figure("resync_seconds_mean", sum / f64::from(rounds), Bar::None);
    scenario.figure("rounds_with_lost_bytes", lost_words as f64, Bar::AtMost(0.0));
    scenario.figure("guest_complaints", complaints.len() as f64, Bar::AtMost(0.0));
    scenario.figure("load_rounds", churned.rounds as f64, Bar::AtLeast(1.0));
    Ok(scenario)
}

/// Seconds from the reconnect to the full state of both layers.
///
/// # Errors
/// If it does not come in time.
pub fn resync_seconds(lab: &mut Lab) -> anyhow::Result<f64> {
    let daemon = &mut lab.daemon;
    crate::process::wait_for("QEMU reconnects", RESYNC_TIMEOUT, || {
        daemon.process.expect_running()?;
        Ok(daemon.status()?.connected.then_some(()))
    })?;
    let connected = Instant::now();
    daemon.wait_synced(RESYNC_TIMEOUT)?;
    Ok(connected.elapsed().as_secs_f64())
}

//! Daemon, QEMU and guest die and return in every order.

use std::time::Duration;

use anyhow::{ensure, Context};
use gemini_e2e::bench::restart::resync_seconds;
use gemini_e2e::daemon::DaemonConfig;
use gemini_e2e::lab::{Bench, Lab, Place, SYNC_TIMEOUT};
use gemini_e2e::process;
use gemini_e2e::vm::{Vm, VmConfig};
use gemini_e2e::MIB;
use gemini_guest::protocol::PageSize;

const SETTLE: Duration = Duration::from_secs(60);
const AGREE: Duration = Duration::from_secs(30);

#[test]
fn killed_daemon_returns_under_load_and_no_byte_is_lost() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let mut lab = Lab::start(&bench, "daemon-killed", "gemini", |_| {})?;
    let log = lab.vm.guest.log_position()?;
    lab.vm.guest.fill("kept", 192 * MIB, 1, PageSize::Huge)?;
    lab.vm.guest.start_churn("load", 192 * MIB, 2)?;
    for round in 0..3_u32 {
        let before = lab.daemon.status()?.generation;
        lab.kill_daemon()?;
        std::thread::sleep(Duration::from_millis(u64::from(round) * 400));
        lab.vm.expect_alive()?;
        lab.restart_daemon()?;
        let seconds = resync_seconds(&mut lab)?;
        ensure!(seconds < 2.0, "full state only after {seconds:.2} s");
        ensure!(lab.daemon.status()?.generation != before);
        lab.vm.guest.verify("kept")?;
    }
    let churned = lab.vm.guest.stop_churn("load")?;
    ensure!(churned.rounds > 0);
    let complaints = lab.vm.guest.complaints(log)?;
    ensure!(complaints.is_empty(), "{complaints:?}");
    // The new daemon knows as much as the old one did, and works on.
    lab.wait_settled(SETTLE)?;
    let (view, _) = lab.agree(AGREE)?;
    let counts = view.counts();
    ensure!(counts.aligned >= 90, "{counts:?}");
    lab.daemon.stop()
}

#[test]
fn guest_survives_reset_and_config_reads_while_disconnected() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let mut lab = Lab::start(&bench, "reset-disconnected", "gemini", |_| {})?;
    lab.kill_daemon()?;
    read_device(&mut lab.vm)?;
    // A driver that is loaded anew reads the whole configuration space.
    lab.vm.guest.unload_driver()?;
    read_device(&mut lab.vm)?;
    lab.vm.guest.load_driver()?;
    lab.vm.expect_alive()?;
    lab.vm.reset()?;
    lab.vm.expect_alive()?;
    read_device(&mut lab.vm)?;

    lab.restart_daemon()?;
    lab.daemon.wait_synced(SYNC_TIMEOUT)?;
    lab.vm.guest.fill("a", 64 * MIB, 1, PageSize::Huge)?;
    lab.wait_settled(SETTLE)?;
    lab.agree(AGREE)?;
    lab.vm.guest.verify("a")?;
    lab.daemon.stop()
}

/// Has guest and QEMU look at the device in every way that is cheap.
fn read_device(vm: &mut Vm) -> anyhow::Result<()> {
    vm.guest.shell(
        "for device in /sys/bus/virtio/devices/*; do cat $device/features $device/status; done; \
         for device in /sys/bus/pci/devices/*; do cat $device/config > /dev/null; done",
    )?;
    let devices = vm.qmp.monitor("info virtio")?;
    let path = devices
        .lines()
        .find(|line| line.contains("[virtio-gemini]"))
        .and_then(|line| line.split_whitespace().next())
        .with_context(|| format!("QEMU has no such device: {devices}"))?
        .to_owned();
    let status = vm.qmp.monitor(&format!("info virtio-status {path}"))?;
    ensure!(status.contains("virtio-gemini"), "{status}");
    Ok(())
}

#[test]
fn reset_guest_syncs_again_with_the_same_daemon() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let mut lab = Lab::start(&bench, "reset", "gemini", |_| {})?;
    let before = lab.daemon.status()?.generation;
    lab.vm.guest.fill("a", 64 * MIB, 1, PageSize::Huge)?;
    lab.vm.reset()?;
    process::wait_for("a new generation", SYNC_TIMEOUT, || {
        Ok((lab.daemon.status()?.generation != before).then_some(()))
    })?;
    lab.daemon.wait_synced(SYNC_TIMEOUT)?;
    lab.vm.guest.fill("a", 64 * MIB, 2, PageSize::Huge)?;
    lab.wait_settled(SETTLE)?;
    lab.agree(AGREE)?;
    lab.vm.guest.verify("a")?;
    lab.daemon.stop()
}

#[test]
fn daemon_survives_killed_qemu_and_serves_the_next_vm() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let mut lab = Lab::start(&bench, "qemu-killed", "gemini", |_| {})?;
    lab.vm.guest.start_churn("load", 128 * MIB, 1)?;
    lab.vm.process.kill()?;
    process::wait_for("the daemon notices", SYNC_TIMEOUT, || {
        lab.daemon.process.expect_running()?;
        Ok((!lab.daemon.status()?.connected).then_some(()))
    })?;

    let config = VmConfig::new("qemu-killed-next", bench.accel).with_device(&lab.place.socket());
    let next = Vm::boot(&bench.assets, config)?;
    lab.daemon.wait_synced(SYNC_TIMEOUT)?;
    next.guest.fill("a", 64 * MIB, 1, PageSize::Huge)?;
    process::wait_for("the host follows the next guest", SETTLE, || {
        Ok((lab.daemon.status()?.aligned >= 30).then_some(()))
    })?;
    next.guest.verify("a")?;
    lab.daemon.stop()
}

#[test]
fn daemon_started_after_qemu_is_found() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let place = Place::new("daemon-late")?;
    let config = VmConfig::new("daemon-late", bench.accel).with_device(&place.socket());
    let mut vm = Vm::boot(&bench.assets, config)?;
    vm.expect_alive()?;
    let mut daemon = place.start(&DaemonConfig::new(&bench.assets.daemon, "gemini"))?;
    daemon.wait_synced(SYNC_TIMEOUT)?;
    vm.guest.fill("a", 64 * MIB, 1, PageSize::Huge)?;
    process::wait_for("the host follows the guest", SETTLE, || {
        Ok((daemon.status()?.aligned >= 30).then_some(()))
    })?;
    vm.guest.verify("a")?;
    daemon.stop()
}

#[test]
fn terminated_daemon_leaves_the_guest_as_it_is() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let mut lab = Lab::start(&bench, "sigterm", "gemini", |_| {})?;
    lab.vm.guest.fill("a", 128 * MIB, 1, PageSize::Huge)?;
    lab.wait_settled(SETTLE)?;
    let before = lab.view()?.counts();
    ensure!(before.aligned >= 60, "{before:?}");
    let Lab { mut vm, memory, daemon, .. } = lab;
    daemon.stop()?;
    vm.expect_alive()?;
    vm.guest.verify("a")?;
    let after = gemini_e2e::compare::View::take(&vm.guest, &memory)?.counts();
    ensure!(
        after.aligned + 2 >= before.aligned,
        "{before:?} before, {after:?} after the daemon's end"
    );
    Ok(())
}

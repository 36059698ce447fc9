//! The driver comes and goes.

use std::time::Duration;

use anyhow::ensure;
use gemini_e2e::lab::{Bench, Lab, SYNC_TIMEOUT};
use gemini_e2e::MIB;
use gemini_guest::protocol::PageSize;

#[test]
fn driver_unloads_and_reloads_under_memory_load() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let mut lab = Lab::start(&bench, "driver-reload", "gemini", |_| {})?;
    let log = lab.vm.guest.log_position()?;
    lab.vm.guest.fill("kept", 64 * MIB, 1, PageSize::Huge)?;
    lab.vm.guest.start_churn("load", 256 * MIB, 1)?;
    for cycle in 0..10_u64 {
        lab.vm.guest.unload_driver()?;
        lab.vm.guest.load_driver()?;
        std::thread::sleep(Duration::from_millis((cycle % 3) * 80));
    }
    lab.vm.guest.stop_churn("load")?;
    lab.daemon.wait_synced(SYNC_TIMEOUT)?;
    lab.vm.guest.verify("kept")?;
    let complaints = lab.vm.guest.complaints(log)?;
    ensure!(complaints.is_empty(), "{complaints:?}");
    lab.wait_settled(Duration::from_secs(60))?;
    lab.agree(Duration::from_secs(30))?;
    lab.vm.expect_alive()?;
    lab.daemon.stop()
}

#[test]
fn daemon_without_a_driver_does_nothing_to_the_guest() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let lab = Lab::start(&bench, "no-driver", "gemini", |config| {
        config.driver = false;
    })?;
    lab.vm.guest.fill("a", 128 * MIB, 1, PageSize::Huge)?;
    std::thread::sleep(Duration::from_secs(3));
    let counts = lab.view()?.counts();
    ensure!(counts.guest_only >= 60 && counts.aligned == 0, "{counts:?}");
    let status = lab.daemon.status()?;
    ensure!(!status.guest_synced && status.collapse_bytes == 0, "{status:?}");
    lab.daemon.stop()
}

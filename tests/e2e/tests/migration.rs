//! A guest moves to another QEMU with another daemon.

use std::time::Duration;

use anyhow::{ensure, Context};
use gemini_e2e::lab::{Bench, Lab, SYNC_TIMEOUT};
use gemini_e2e::migration::{self, State};
use gemini_e2e::process;
use gemini_e2e::MIB;
use gemini_guest::protocol::PageSize;

const SETTLE: Duration = Duration::from_secs(60);
const AGREE: Duration = Duration::from_secs(30);

/// Blocks of what the guest keeps.
const KEPT: u64 = 48;

#[test]
fn guest_is_aligned_again_after_a_migration_and_no_byte_is_lost() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let mut source = Lab::start(&bench, "migration-source", "gemini", |_| {})?;
    let log = source.vm.guest.log_position()?;
    source.vm.guest.fill("kept", KEPT * 2 * MIB, 1, PageSize::Huge)?;
    wait_aligned(&source)?;
    source.vm.guest.start_churn("load", 32 * MIB, 2)?;

    // First in vain: the guest stays, and so does its daemon's knowledge.
    let mut target = source.destination("migration-cancelled")?;
    let refused = migration::allow_postcopy(&mut target.vm).err().context("postcopy is taken")?;
    ensure!(format!("{refused:#}").contains("postcopy"), "{refused:#}");
    migration::begin(&mut source.vm, &mut target.vm)?;
    migration::cancel(&mut source.vm)?;
    let state = migration::wait_over(&mut source.vm)?;
    ensure!(state == State::Cancelled, "{state:?}");
    drop(target);
    source.vm.expect_alive()?;

    let mut target = source.destination("migration-target")?;
    migration::migrate(&mut source.vm, &mut target.vm)?;
    drop(source);
    target.daemon.wait_synced(SYNC_TIMEOUT)?;
    wait_aligned(&target)?;
    target.vm.guest.verify("kept")?;
    ensure!(target.vm.guest.stop_churn("load")?.rounds > 0);
    let complaints = target.vm.guest.complaints(log)?;
    ensure!(complaints.is_empty(), "{complaints:?}");
    target.agree(AGREE)?;
    target.daemon.stop()
}

fn wait_aligned(lab: &Lab) -> anyhow::Result<()> {
    process::wait_for("the host follows the guest", SETTLE, || {
        Ok((lab.daemon.status()?.aligned >= KEPT - 2).then_some(()))
    })
}

//! What the balloon takes stays away.

use std::time::Duration;

use anyhow::ensure;
use gemini_e2e::daemon::DaemonConfig;
use gemini_e2e::lab::{Bench, Lab};
use gemini_e2e::process;
use gemini_e2e::{BLOCK, MIB};
use gemini_guest::protocol::PageSize;
use serde_json::json;

/// Linux has no huge pages in a guest of 512 MiB.
const MEMORY: u64 = 768 * MIB;
const FREED: u64 = 192 * MIB;
/// No whole number of blocks.
const STEP: u64 = 9 * MIB;

const SETTLE: Duration = Duration::from_secs(60);

/// Inflates or deflates the balloon, and waits until the guest followed.
fn set_balloon(lab: &mut Lab, guest_bytes: u64) -> anyhow::Result<()> {
    lab.vm.qmp.execute("balloon", json!({"value": guest_bytes}))?;
    process::wait_for("the balloon has its size", SETTLE, || {
        let told = lab.vm.qmp.execute("query-balloon", json!({}))?;
        Ok((told["actual"] == guest_bytes).then_some(()))
    })
}

/// The daemon knows for up to a second of huge pages that the guest has freed
/// since. Where the balloon got their pages meanwhile, a collapse would bring
/// them back.
#[test]
fn freed_huge_pages_that_the_balloon_took_are_not_collapsed() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let mut daemon = DaemonConfig::new(&bench.assets.daemon, "gemini");
    // Slow enough that blocks wait for their turn.
    daemon.arguments.extend(["--copy-rate".to_owned(), "32M".to_owned()]);
    let mut lab = Lab::start_with(&bench, "balloon", daemon, |config| {
        config.memory = MEMORY;
        config.qemu_arguments.extend(["-device".to_owned(), "virtio-balloon-pci".to_owned()]);
    })?;
    lab.vm.guest.load_balloon()?;
    // Nothing but the policy makes blocks huge.
    lab.vm.guest.hints_only()?;
    // That second, as long as it takes here.
    lab.vm.guest.set_driver("census_period_ms", 3_600_000)?;
    lab.vm.guest.fill("a", FREED, 1, PageSize::Huge)?;
    lab.vm.guest.driver_command("census")?;
    process::wait_for("the daemon knows of huge pages", SETTLE, || {
        let status = lab.daemon.status()?;
        Ok((status.guest_only + status.aligned >= FREED / BLOCK - 8).then_some(()))
    })?;
    lab.vm.guest.free("a")?;
    let mut size = MEMORY;
    while size > MEMORY - FREED {
        // At each end a block of which the balloon has a part.
        size -= STEP;
        set_balloon(&mut lab, size)?;
        // For the daemon, which is not to do anything: that is no event.
        std::thread::sleep(Duration::from_millis(200));
    }
    let status = lab.daemon.status()?;
    ensure!(status.guest_only > 0 || status.aligned > 0, "the daemon knows better: {status:?}");
    let pages = lab.vm.guest.pages()?;
    let inflated: u64 = pages.given_away.iter().map(|run| run.count * 4096).sum();
    ensure!(inflated >= FREED, "{inflated} bytes are in the balloon");
    let without_owner = lab.memory.without_owner(&pages)?;
    let back = lab.memory.come_back(&without_owner);
    ensure!(back.is_empty(), "pages came back: {back:x?}, of {without_owner:x?}");
    lab.daemon.stop()
}

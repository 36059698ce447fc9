//! Guest and host tell each other where their huge pages are, and the host
//! follows the guest: confirmed by three sides that do not know of each other.

use std::time::Duration;

use anyhow::ensure;
use gemini_e2e::lab::{Bench, Lab};
use gemini_e2e::{BLOCK, MIB};
use gemini_guest::protocol::{Break, PageSize};

/// How long the daemon may take to collapse what these tests fill.
const SETTLE: Duration = Duration::from_secs(60);

/// How long the driver's walk and the daemon may lag behind.
const AGREE: Duration = Duration::from_secs(30);

#[test]
fn gemini_policy_puts_host_huge_pages_under_guest_huge_pages() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let mut lab = Lab::start(&bench, "align-gemini", "gemini", |_| {})?;
    ensure!(lab.memory.is_aligned());
    lab.vm.guest.fill("a", 512 * MIB, 1, PageSize::System)?;
    lab.wait_settled(SETTLE)?;

    let (view, agreement) = lab.agree(AGREE)?;
    let counts = view.counts();
    ensure!(agreement.compared > 400, "{} compared", agreement.compared);
    ensure!(counts.aligned >= 240, "{counts:?}");
    ensure!(counts.aligned_rate() >= 0.95, "{counts:?}");
    ensure!(counts.aligned_coverage() >= 0.90, "{counts:?}");

    let status = lab.daemon.status()?;
    // Nobody else makes them huge: by a copy, or before the guest used them.
    let made = status.collapse_bytes + status.populated * BLOCK;
    ensure!(made >= counts.aligned * BLOCK, "{status:?}");
    ensure!(status.bad_records == 0, "{status:?}");
    // Collapsing kept every byte.
    lab.vm.guest.verify("a")?;
    lab.vm.expect_alive()?;
    lab.daemon.stop()
}

#[test]
fn none_policy_leaves_the_host_with_base_pages() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let mut lab = Lab::start(&bench, "align-none", "none", |_| {})?;
    lab.vm.guest.fill("a", 384 * MIB, 1, PageSize::System)?;
    lab.wait_settled(SETTLE)?;

    let (view, _) = lab.agree(AGREE)?;
    let counts = view.counts();
    ensure!(counts.guest_only >= 180, "{counts:?}");
    ensure!(counts.aligned_rate() < 0.05, "{counts:?}");
    ensure!(counts.aligned_coverage() < 0.05, "{counts:?}");
    ensure!(lab.daemon.status()?.collapse_bytes == 0);
    lab.daemon.stop()
}

#[test]
fn always_policy_makes_what_is_resident_huge_in_the_host() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let mut lab = Lab::start(&bench, "align-always", "always", |_| {})?;
    // Base pages in the guest: no policy that asks the guest would do this.
    lab.vm.guest.fill("a", 128 * MIB, 1, PageSize::Base)?;
    lab.wait_settled(SETTLE)?;

    let (view, _) = lab.agree(AGREE)?;
    let counts = view.counts();
    ensure!(counts.host_only >= 60, "{counts:?}");
    lab.vm.guest.verify("a")?;
    lab.daemon.stop()
}

#[test]
fn split_and_freed_guest_huge_pages_are_reported() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let mut lab = Lab::start(&bench, "split", "gemini", |_| {})?;
    lab.vm.guest.fill("a", 256 * MIB, 1, PageSize::System)?;
    lab.wait_settled(SETTLE)?;
    let (before, _) = lab.agree(AGREE)?;
    let before = before.counts();
    ensure!(before.aligned >= 120, "{before:?}");

    // The kernel splits every second page: the host's stay huge.
    lab.vm.guest.break_pages("a", Break::Split, 2)?;
    let (split, _) = lab.agree(AGREE)?;
    let split = split.counts();
    ensure!(split.aligned + 60 <= before.aligned, "{split:?}");
    ensure!(split.host_only >= before.host_only + 60, "{split:?}");
    lab.vm.guest.verify("a")?;

    // Halves go away: what the host has must not change what is left.
    lab.vm.guest.break_pages("a", Break::DropHalf, 3)?;
    lab.wait_settled(SETTLE)?;
    lab.agree(AGREE)?;
    lab.vm.guest.verify("a")?;

    lab.vm.guest.free("a")?;
    lab.wait_settled(SETTLE)?;
    let (freed, _) = lab.agree(AGREE)?;
    let freed = freed.counts();
    ensure!(freed.aligned <= 8, "{freed:?}");
    lab.daemon.stop()
}

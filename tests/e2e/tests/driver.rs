//! The driver comes and goes.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context};
use gemini_e2e::lab::{Bench, Lab, SYNC_TIMEOUT};
use gemini_e2e::process::wait_for;
use gemini_e2e::qmp::Qmp;
use gemini_e2e::{BLOCK, MIB};
use gemini_guest::protocol::PageSize;

/// How long the host may take to follow the guest.
const SETTLE: Duration = Duration::from_secs(60);

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

/// Where the kernel's data are is told by /proc/iomem. Its processors have theirs in one block
/// here, which nobody tells from outside.
#[test]
fn driver_names_what_its_kernel_works_with_and_gemini_makes_it_huge() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let mut lab = Lab::start(&bench, "kernel-data", "none", |_| {})?;
    let named = lab.vm.guest.kernel_blocks()?;
    let memory = lab.vm.guest.shell("cat /proc/iomem")?;
    let used = lab.vm.guest.blocks_kernel_uses(1)?;
    for (part, named) in [("rodata", &named), ("data", &named), ("bss", &used)] {
        let part = format!("Kernel {part}");
        let line = memory.lines().find(|line| line.ends_with(&part)).context("no such part")?;
        let start = line.trim().split('-').next().context("a range")?;
        let block = u64::from_str_radix(start, 16)? / BLOCK;
        ensure!(named.contains(&block), "{part} begins in block {block}, named are {named:?}");
    }
    ensure!((4..=5).contains(&named.len()), "{named:?}");
    ensure!((1..=2).contains(&(used.len() - named.len())), "{used:?}");

    let huge = |lab: &Lab| anyhow::Ok(&lab.memory.huge_blocks()? & &named);
    let before = huge(&lab)?;
    ensure!(before.is_empty(), "huge before anybody makes them so: {before:?}");
    lab.daemon.control().set_policy("gemini")?;
    lab.wait_settled(SETTLE)?;
    let after = huge(&lab)?;
    // A block that is not wholly resident is not filled for it.
    ensure!(after.len() + 1 >= named.len(), "of {named:?} the host has {after:?} huge");
    lab.vm.expect_alive()?;
    lab.daemon.stop()
}

/// A kernel that works much is found at it, where it has its objects: what a block holds is told
/// by /proc/kpageflags.
#[test]
fn driver_finds_where_its_kernel_works() -> anyhow::Result<()> {
    /// Bits of a page that the kernel's allocator has, and of one that it set aside at boot,
    /// as it did for its array of pages.
    const KERNELS: u64 = 1 << 7 | 1 << 32;
    let bench = Bench::from_env()?;
    let mut lab = Lab::start(&bench, "kernel-work", "none", |_| {})?;
    let (guest, qmp) = (&lab.vm.guest, &mut lab.vm.qmp);
    let known = guest.blocks_kernel_uses(1)?;
    // The top level of page tables lies in a page without a mark. Where those in use are, the
    // processors know.
    let mut page_tables = BTreeSet::new();
    guest.shell("for i in 1 2; do (while :; do /bin/true; done) >/dev/null 2>&1 & done")?;
    let found = wait_for("the kernel is found at work", Duration::from_secs(150), || {
        page_tables.extend(page_tables_in_use(qmp)?);
        let found = &guest.blocks_kernel_uses(1)? - &known;
        Ok((found.len() > 2).then_some(found))
    })?;
    ensure!(found.len() <= 16, "{found:?}");
    for block in &found {
        // Eight bytes a page, so that a block has 4096.
        let pages = guest.shell(&format!(
            "dd if=/proc/kpageflags bs=4096 skip={block} count=1 2>/dev/null | od -An -v -tx8"
        ))?;
        let mut flags = pages.split_whitespace().map(|word| u64::from_str_radix(word, 16));
        let kernels = flags.any(|flags| flags.is_ok_and(|flags| flags & KERNELS != 0));
        ensure!(
            kernels || page_tables.contains(block),
            "block {block} has nothing of the kernel's; page tables are in {page_tables:?}: {pages}"
        );
    }
    ensure!(guest.kernel_blocks()?.is_subset(&known), "a guest of few huge pages");

    // Nine tenths of what the host makes huge stay with programs, if it makes anything huge.
    lab.daemon.control().set_policy("gemini")?;
    guest.fill("many", 128 * BLOCK, 1, PageSize::Huge)?;
    let hot = wait_for("some are as hot as what is known", Duration::from_secs(120), || {
        let hot = guest.kernel_blocks()?;
        Ok((!hot.is_subset(&known)).then_some(hot))
    })?;
    let huge = guest.driver_number("guest_huge")?;
    ensure!(huge >= 128 && hot.len() as u64 * 13 <= huge, "{hot:?}, {huge} huge pages");
    lab.daemon.stop()
}

/// Blocks of the page tables that the virtual processors go by at this moment.
fn page_tables_in_use(qmp: &mut Qmp) -> anyhow::Result<Vec<u64>> {
    let registers = qmp.monitor("info registers -a")?;
    let roots = registers.split_whitespace().filter_map(|word| word.strip_prefix("CR3="));
    let blocks = roots.map(|root| Ok(u64::from_str_radix(root, 16)? / BLOCK));
    let blocks = blocks.collect::<anyhow::Result<Vec<u64>>>()?;
    ensure!(!blocks.is_empty(), "QEMU tells no CR3: {registers}");
    Ok(blocks)
}

#[test]
fn census_rests_while_nothing_changes() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let mut lab = Lab::start(&bench, "census", "none", |_| {})?;
    lab.wait_settled(SETTLE)?;
    let three_passes = || {
        let begun = Instant::now();
        let last = lab.vm.guest.driver_number("census_passes")? + 3;
        wait_for("three passes", SETTLE, || {
            Ok((lab.vm.guest.driver_number("census_passes")? >= last).then_some(begun.elapsed()))
        })
    };
    let idle = three_passes()?;
    lab.vm.guest.start_churn("load", 64 * MIB, 1)?;
    let busy = three_passes()?;
    lab.vm.guest.stop_churn("load")?;
    ensure!(
        idle > 2 * busy,
        "three passes of an idle guest in {idle:?}, of a busy one in {busy:?}"
    );
    lab.daemon.stop()
}

//! Guests on hugetlb memory, and a pool that somebody else needs, too.

use std::time::Duration;

use anyhow::{ensure, Context};
use gemini_e2e::lab::{Bench, Lab};
use gemini_e2e::process;
use gemini_guest::protocol::PageSize;
use gemini_harness::settings::NR_HUGEPAGES;

const MIB: u64 = 1 << 20;
/// With less the guest's kernel makes no huge pages.
const MEMORY: u64 = 640 * MIB;

/// Pages that the host has beside what the guest may touch.
const SPARE: u64 = 8;
/// How long both layers may take to come to rest.
const SETTLE: Duration = Duration::from_secs(30);
/// How long the daemon may take to see that the pool has pages again.
const FOLLOW: Duration = Duration::from_secs(10);

fn pool_size() -> anyhow::Result<u64> {
    let text = std::fs::read_to_string(NR_HUGEPAGES).context(NR_HUGEPAGES)?;
    Ok(text.trim().parse()?)
}

fn host_state(lab: &Lab, block: u64) -> anyhow::Result<String> {
    let runs = lab.vm.guest.driver_blocks()?;
    let run = runs.into_iter().find(|run| (run.first..run.first + run.count).contains(&block));
    Ok(run.context("the driver does not know the block")?.host)
}

fn prepare(lab: &Lab, block: u64) -> anyhow::Result<String> {
    lab.vm.guest.driver_command(&format!("prepare {block} 1"))
}

/// Blocks that the driver holds and the host has nothing under.
fn held_and_absent(lab: &Lab, count: usize) -> anyhow::Result<Vec<u64>> {
    let told = lab.vm.guest.driver_command("book any 48")?;
    let mut absent = Vec::new();
    for block in told.lines().filter_map(|line| line.parse::<u64>().ok()) {
        if host_state(lab, block)? == "absent" {
            absent.push(block);
        }
    }
    ensure!(absent.len() >= count, "only {absent:?} are absent of {told}");
    Ok(absent)
}

/// A block is prepared while the pool has a page for all that the guest may
/// still touch, and not after: the guest, which runs on, would be the one to
/// miss it.
#[test]
fn blocks_come_from_the_pool_as_long_as_it_can_spare_them() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let wanted = pool_size()? + MEMORY / (2 * MIB) + SPARE;
    bench.set(NR_HUGEPAGES, &wanted.to_string())?;
    ensure!(pool_size()? == wanted, "the host has not so much memory in huge pages");
    let mut lab = Lab::start(&bench, "hugetlb", "gemini", |config| {
        config.memory = MEMORY;
        let options = ["hugetlb=on", "hugetlbsize=2M", "reserve=off"];
        config.memory_options = options.map(str::to_owned).to_vec();
        // A driver that holds a block would touch all of it.
        config.kernel_arguments.push("init_on_alloc=0".into());
    })?;
    lab.vm.guest.hints_only()?;
    let blocks = held_and_absent(&lab, 6)?;

    for block in &blocks[..4] {
        prepare(&lab, *block).with_context(|| format!("block {block}"))?;
        ensure!(host_state(&lab, *block)? == "hugetlb");
        lab.vm.guest.driver_command(&format!("fill {block} 5"))?;
    }
    let status = lab.daemon.status()?;
    let [pool] = status.hugetlb[..] else { anyhow::bail!("{status:?}") };
    ensure!(pool.unreserved == pool.missing && !pool.short, "{pool:?}");
    ensure!(status.populated >= 4, "{status:?}");

    // Pages for all but two blocks of what the guest did not touch yet. It is
    // idle, and keeps far away from them.
    bench.set(NR_HUGEPAGES, &(wanted - SPARE - 2).to_string())?;
    let refused = prepare(&lab, blocks[4]);
    ensure!(refused.is_err(), "prepared with {refused:?}");
    ensure!(host_state(&lab, blocks[4])? == "absent");
    let status = lab.daemon.status()?;
    let short = status.findings.iter().find(|finding| finding.code == "hugetlb-pool-short");
    let message = &short.context("no finding")?.message;
    ensure!(message.contains("nr_hugepages"), "{message}");
    lab.vm.expect_alive()?;

    bench.set(NR_HUGEPAGES, &wanted.to_string())?;
    process::wait_for("the daemon prepares again", FOLLOW, || Ok(prepare(&lab, blocks[4]).ok()))?;
    for block in &blocks[..4] {
        lab.vm.guest.driver_command(&format!("check {block} 5"))?;
    }
    ensure!(lab.daemon.status()?.bad_records == 0);
    lab.vm.guest.driver_command("free all")?;
    lab.vm.expect_alive()?;
    lab.daemon.stop()
}

/// The driver as it comes: what a program gets is aligned at once, nothing is
/// dropped and nothing asked for in vain again and again. Then the guest is reset
/// while nothing but what is set aside for it is left in the pool.
#[test]
fn a_guest_whose_pages_are_set_aside_needs_no_more_than_these() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let before = pool_size()?;
    let wanted = before + MEMORY / (2 * MIB);
    bench.set(NR_HUGEPAGES, &wanted.to_string())?;
    ensure!(pool_size()? == wanted, "the host has not so much memory in huge pages");
    let mut lab = Lab::start(&bench, "hugetlb-reserved", "gemini", |config| {
        config.memory = MEMORY;
        config.memory_options = ["hugetlb=on", "hugetlbsize=2M"].map(str::to_owned).to_vec();
    })?;
    bench.set(NR_HUGEPAGES, &before.to_string())?;
    lab.vm.guest.fill("a", 128 * MIB, 1, PageSize::System)?;
    lab.wait_settled(SETTLE)?;
    let status = lab.daemon.status()?;
    ensure!(status.aligned >= 60 && status.guest_only == 0, "{status:?}");
    ensure!(status.released == 0 && status.collapse_bytes == 0, "{status:?}");
    ensure!(status.findings.iter().all(|finding| finding.severity == "info"), "{status:?}");
    lab.vm.guest.verify("a")?;
    lab.wait_stocked(SETTLE)?;

    lab.vm.reset()?;
    lab.daemon.wait_synced(SETTLE)?;
    lab.vm.guest.fill("b", 192 * MIB, 2, PageSize::System)?;
    lab.vm.guest.verify("b")?;
    lab.vm.expect_alive()?;
    lab.daemon.stop()
}

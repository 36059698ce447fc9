//! Where the host has fewer huge pages than the guest could use, they go where programs work.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context};
use gemini_e2e::lab::{Bench, Lab};
use gemini_e2e::BLOCK;
use gemini_guest::protocol::PageSize;

/// Blocks that the host may have huge, and of each of two kinds of memory.
const BLOCKS: u64 = 16;
/// Of a kind of memory that has the huge pages so many have one at least.
const MOST: usize = 12;
/// How long the huge pages may take to follow.
const FOLLOW: Duration = Duration::from_secs(120);
/// Reads at random addresses between two looks.
const READS: u64 = 200_000;

/// The blocks of the memory `name` that are huge in QEMU's page tables, out of how many.
fn aligned(lab: &Lab, name: &str) -> anyhow::Result<(usize, usize)> {
    let blocks: BTreeSet<u64> = lab.vm.guest.blocks_of(name)?.into_iter().flatten().collect();
    let huge = lab.memory.huge_blocks()?;
    Ok((blocks.intersection(&huge).count(), blocks.len()))
}

/// Memory that nobody works with has the huge pages, because it came first. Other memory is worked
/// with then, and gets them, for about one copy of each block.
#[test]
fn huge_pages_go_where_programs_work() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let mut lab = Lab::start(&bench, "heat", "gemini", |_| {})?;
    let log = lab.vm.guest.log_position()?;
    // The kernel's own blocks have some as well.
    let limit = (BLOCKS + lab.vm.guest.kernel_blocks()?.len() as u64) * BLOCK;
    lab.vm.guest.hints_only()?;
    lab.vm.guest.fill("first", BLOCKS * BLOCK, 1, PageSize::Huge)?;
    lab.wait_settled(Duration::from_secs(60))?;
    let (huge, of) = aligned(&lab, "first")?;
    ensure!(huge >= MOST, "{huge} of {of} blocks of the first memory are aligned");
    lab.daemon.control().set_huge_max(limit)?;
    lab.vm.guest.fill("hot", BLOCKS * BLOCK, 2, PageSize::Huge)?;
    let (huge, _) = aligned(&lab, "hot")?;
    ensure!(huge < MOST, "{huge} blocks are aligned before anybody works with them");
    let copied = lab.daemon.status()?.collapses;
    let begun = Instant::now();
    loop {
        lab.vm.guest.read("hot", READS, 3)?;
        let (huge, of) = aligned(&lab, "hot")?;
        if huge >= MOST {
            break;
        }
        ensure!(begun.elapsed() < FOLLOW, "{huge} of {of} blocks of the hot memory are aligned")
    }
    let (cold, of) = aligned(&lab, "first")?;
    ensure!(cold + MOST <= of, "{cold} cold blocks of {of} are aligned");
    let status = lab.daemon.status()?;
    let copied = status.collapses - copied;
    ensure!(copied <= 2 * BLOCKS, "{copied} blocks were copied for {BLOCKS}");
    for name in ["first", "hot"] {
        lab.vm.guest.verify(name).with_context(|| name.to_owned())?;
    }
    let complaints = lab.vm.guest.complaints(log)?;
    ensure!(complaints.is_empty(), "{complaints:?}");
    lab.vm.expect_alive()?;
    lab.daemon.stop()
}

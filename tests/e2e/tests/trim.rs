//! Free base pages of blocks that are in use, which go back to the host.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::ensure;
use gemini_e2e::lab::{Bench, Lab};
use gemini_e2e::outside::HostState;
use gemini_e2e::process;
use gemini_e2e::{BLOCK, MIB};
use gemini_guest::protocol::{Break, PageSize};

const SETTLE: Duration = Duration::from_secs(60);
const BYTES: u64 = 32 * MIB;
/// Free in each block that is scattered: seven eighths.
const SPARE: u64 = BLOCK / 8 * 7;

/// Every eighth part of the guest's memory is in use, in every block of the host's
/// huge pages: what is free comes back, what is used stays what it is, and all of
/// the guest's memory is there when the driver has gone.
#[test]
fn trimmed_blocks_cost_the_host_what_is_used_of_them() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let mut lab = Lab::start(&bench, "trim", "gemini", |_| {})?;
    let log = lab.vm.guest.log_position()?;
    lab.vm.guest.fill("kept", BYTES, 5, PageSize::Huge)?;
    lab.wait_settled(SETTLE)?;
    lab.vm.guest.hints_only()?;
    let blocks: BTreeSet<u64> = lab.vm.guest.blocks_of("kept")?.into_iter().flatten().collect();
    let huge = lab.memory.huge_blocks()?;
    let blocks: Vec<u64> = blocks.intersection(&huge).copied().collect();
    ensure!(blocks.len() as u64 * BLOCK >= BYTES * 3 / 4, "{} blocks are aligned", blocks.len());
    lab.vm.guest.break_pages("kept", Break::Split, 1)?;
    lab.vm.guest.break_pages("kept", Break::DropScattered, 1)?;
    lab.vm.guest.driver_command("census")?;

    let free = lab.vm.guest.memory()?["MemFree"];
    let before = lab.memory.resident_bytes()?;
    let mut busy = 0;
    for block in &blocks {
        process::wait_for(&format!("block {block} is trimmed"), SETTLE, || {
            match lab.vm.guest.driver_command(&format!("trim {block}")) {
                Ok(_) => Ok(Some(())),
                // The shell that says so lives in these pages, too: the kernel cannot take
                // what is on its way to or from it at that moment.
                Err(error) if format!("{error:#}").contains("-EBUSY") => {
                    busy += 1;
                    Ok(None)
                }
                Err(error) => Err(error),
            }
        })?;
    }
    let pages = lab.vm.guest.driver_number("trimmed_pages")?;
    let after = lab.memory.resident_bytes()?;
    let gone = before.saturating_sub(after);
    eprintln!(
        "{} blocks, {busy} times busy, {pages} pages trimmed, {} KiB came back",
        blocks.len(),
        gone >> 10
    );
    // Others may have taken pages of these blocks meanwhile.
    let spare = blocks.len() as u64 * SPARE;
    ensure!(pages * 4096 >= spare * 9 / 10, "{pages} pages of {}", spare / 4096);
    // What the guest does meanwhile costs a little.
    ensure!(gone + 2 * MIB >= pages * 4096, "{gone} bytes came back of {pages} pages");
    let states = lab.memory.states()?;
    let split = states.iter().filter(|(block, _)| blocks.contains(block));
    ensure!(split.into_iter().all(|(_, state)| *state == HostState::Base), "{states:?}");
    lab.vm.guest.verify("kept")?;
    // No more than was asked for.
    process::wait_for("the daemon has counted them", SETTLE, || {
        Ok((lab.daemon.status()?.trimmed_pages == pages).then_some(()))
    })?;
    ensure!(lab.daemon.status()?.bad_records == 0);

    // Written to again, it is ordinary memory.
    lab.vm.guest.fill("again", BYTES / 2, 6, PageSize::Base)?;
    lab.vm.guest.verify("again")?;
    lab.vm.guest.verify("kept")?;
    lab.vm.guest.free("again")?;
    lab.vm.guest.unload_driver()?;
    let left = lab.vm.guest.memory()?["MemFree"];
    ensure!(left + 8 * MIB >= free, "{free} bytes were free, {left} are");
    let complaints = lab.vm.guest.complaints(log)?;
    ensure!(complaints.is_empty(), "{complaints:?}");
    lab.daemon.stop()
}

//! What the driver learns of the host, and what it asks the host for.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{ensure, Context};
use gemini_e2e::lab::{Bench, Lab};
use gemini_e2e::outside::HostState;
use gemini_e2e::process;
use gemini_e2e::MIB;
use gemini_guest::protocol::PageSize;

const SETTLE: Duration = Duration::from_secs(60);

/// How long a hint, or work that follows an answer, may take.
const FOLLOW: Duration = Duration::from_secs(20);

fn host_states(lab: &Lab) -> anyhow::Result<BTreeMap<u64, HostState>> {
    Ok(lab.memory.states()?.into_iter().collect())
}

/// Books `count` blocks of the driver's choice.
fn book(lab: &Lab, count: u32) -> anyhow::Result<Vec<u64>> {
    let told = lab.vm.guest.driver_command(&format!("book any {count}"))?;
    let blocks: Vec<u64> = told.lines().filter_map(|line| line.parse().ok()).collect();
    ensure!(blocks.len() == count as usize, "the driver booked {told}");
    Ok(blocks)
}

fn command_each(lab: &Lab, blocks: &[u64], before: &str, after: &str) -> anyhow::Result<()> {
    for block in blocks {
        lab.vm
            .guest
            .driver_command(&format!("{before} {block} {after}"))
            .with_context(|| format!("{before} {block} {after}"))?;
    }
    Ok(())
}

fn wait_host(lab: &Lab, blocks: &[u64], wanted: HostState) -> anyhow::Result<()> {
    process::wait_for(&format!("blocks {blocks:?} are {wanted:?}"), FOLLOW, || {
        let states = host_states(lab)?;
        Ok(blocks.iter().all(|block| states.get(block) == Some(&wanted)).then_some(()))
    })
}

/// What the daemon hinted is what QEMU's page tables say, for every block that
/// the driver knows of.
#[test]
fn hints_bring_the_hosts_state_to_the_driver() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let mut lab = Lab::start(&bench, "hints", "gemini", |_| {})?;
    lab.vm.guest.fill("a", 256 * MIB, 1, PageSize::System)?;
    lab.wait_settled(SETTLE)?;
    let mut last = String::new();
    let compared = process::wait_for("the driver knows the host's state", FOLLOW, || {
        let outside = host_states(&lab)?;
        let (mut compared, mut huge, mut wrong) = (0, 0, Vec::new());
        for run in lab.vm.guest.driver_blocks()? {
            for block in run.first..run.first + run.count {
                // The first block has a hole for the firmware: nobody's.
                let Some(state) = outside.get(&block).filter(|_| block > 0) else {
                    continue;
                };
                let name = match state {
                    HostState::Absent => "absent",
                    HostState::Base => "base",
                    HostState::Huge => "huge",
                };
                compared += 1;
                huge += u32::from(name == "huge");
                if run.host != name {
                    wrong.push(format!("{block}: driver {}, QEMU {name}", run.host));
                }
            }
        }
        last = format!("{wrong:?}");
        Ok((wrong.is_empty() && huge >= 120).then_some(compared))
    })
    .with_context(|| last)?;
    ensure!(compared > 400, "{compared} blocks compared");
    lab.daemon.stop()
}

#[test]
fn prepared_blocks_are_host_huge_and_keep_their_contents() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let lab = Lab::start(&bench, "prepare", "gemini", |_| {})?;
    lab.vm.guest.hints_only()?;
    let blocks = book(&lab, 8)?;
    command_each(&lab, &blocks, "fill", "77")?;
    command_each(&lab, &blocks, "prepare", "1")?;
    // Answered means done: nothing to wait for.
    let states = host_states(&lab)?;
    for block in &blocks {
        ensure!(states.get(block) == Some(&HostState::Huge), "{block}: {:?}", states.get(block));
    }
    command_each(&lab, &blocks, "check", "77")?;
    ensure!(lab.daemon.status()?.bad_records == 0);
    lab.vm.guest.driver_command("free all")?;
    lab.daemon.stop()
}

#[test]
fn released_blocks_cost_the_host_nothing_and_read_as_zeros() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let lab = Lab::start(&bench, "release", "gemini", |_| {})?;
    lab.vm.guest.hints_only()?;
    lab.vm.guest.fill("kept", 64 * MIB, 3, PageSize::Huge)?;
    let blocks = book(&lab, 8)?;
    command_each(&lab, &blocks, "fill", "78")?;
    let before = lab.memory.resident_bytes()?;
    command_each(&lab, &blocks, "release", "1")?;
    wait_host(&lab, &blocks, HostState::Absent)?;
    let after = lab.memory.resident_bytes()?;
    ensure!(after + 12 * MIB < before, "{before} bytes before, {after} after");
    ensure!(lab.daemon.status()?.released >= 8);

    command_each(&lab, &blocks, "check", "zero")?;
    // Written to again, it is ordinary memory.
    command_each(&lab, &blocks, "fill", "79")?;
    command_each(&lab, &blocks, "check", "79")?;
    lab.vm.guest.verify("kept")?;
    lab.vm.guest.driver_command("free all")?;
    lab.daemon.stop()
}

#[test]
fn renewed_blocks_are_host_huge_and_zero() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let mut lab = Lab::start(&bench, "renew", "gemini", |_| {})?;
    lab.vm.guest.hints_only()?;
    // What the guest's kernel works with is made huge after the boot, by copies.
    lab.wait_settled(SETTLE)?;
    let blocks = book(&lab, 8)?;
    command_each(&lab, &blocks, "fill", "80")?;
    let copied = lab.daemon.status()?.collapse_bytes;
    command_each(&lab, &blocks, "renew", "1")?;
    wait_host(&lab, &blocks, HostState::Huge)?;
    command_each(&lab, &blocks, "check", "zero")?;
    let copied = lab.daemon.status()?.collapse_bytes - copied;
    ensure!(copied == 0, "{copied} bytes were copied for contents that are dead");
    lab.vm.guest.driver_command("free all")?;
    lab.daemon.stop()
}

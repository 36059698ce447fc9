//! The guest itself, and what is said about it from outside.

use std::time::Duration;

use anyhow::{ensure, Context};
use gemini_e2e::lab::Bench;
use gemini_e2e::outside::{GuestMemory, HostState};
use gemini_e2e::process;
use gemini_e2e::vm::{Vm, VmConfig};
use gemini_e2e::MIB;
use gemini_guest::probe::{Executed, Probe, Register};
use gemini_guest::protocol::{BlockState, Break, PageSize};
use serde_json::json;

/// How long the guest may take to follow.
const PATIENCE: Duration = Duration::from_secs(60);

/// A guest without the device: what the other tests rely on holds.
#[test]
fn plain_guest_boots_and_both_outside_views_see_its_memory() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let mut vm = Vm::boot(&bench.assets, VmConfig::new("plain", bench.accel))?;
    let memory = GuestMemory::find(vm.process.pid(), vm.config.memory, &mut vm.qmp)?;
    ensure!(memory.is_aligned(), "QEMU's mapping of the guest's memory cannot hold huge pages");

    vm.guest.fill("a", 256 * MIB, 1, PageSize::Huge)?;
    let blocks = vm.guest.blocks()?;
    let huge: u64 = blocks
        .runs
        .iter()
        .filter(|run| run.state == BlockState::Huge && run.user == 512)
        .map(|run| run.count)
        .sum();
    ensure!(huge >= 120, "only {huge} of 128 blocks are huge");
    // Every block that the guest filled has memory in the host.
    let states: std::collections::BTreeMap<u64, HostState> = memory.states()?.into_iter().collect();
    for run in blocks.runs.iter().filter(|run| run.user == 512) {
        for block in run.first..run.first + run.count {
            let state = states.get(&block);
            ensure!(
                matches!(state, Some(HostState::Base | HostState::Huge)),
                "block {block} is full in the guest and {state:?} in the host"
            );
        }
    }
    ensure!(memory.resident_bytes()? >= 256 * MIB);

    vm.guest.break_pages("a", Break::Split, 2)?;
    let left: u64 = vm
        .guest
        .blocks()?
        .runs
        .iter()
        .filter(|run| run.state == BlockState::Huge)
        .map(|run| run.count)
        .sum();
    ensure!(left <= huge - 60, "{huge} huge pages before, {left} after");
    vm.guest.verify("a")?;
    vm.reset()?;
    ensure!(vm.guest.verify("a").is_err(), "memory of before the reset is still known");
    Ok(())
}

/// A vCPU that does MMIO while another one changes the memory map reaches the
/// device that it means, and QEMU does not abort: Linux does both while it boots
/// (qemu-patches, "keep the section that a TLB entry was made from").
#[test]
fn mmio_reaches_its_device_while_the_memory_map_changes() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let mut config = VmConfig::new("memory-map", bench.accel);
    // The one between is read while the others go, so that
    // whatever follows them in the map moves.
    for slot in ["0x1c", "0x1d", "0x1e"] {
        let device = format!("virtio-rng-pci,disable-legacy=on,addr={slot}");
        config.qemu_arguments.extend(["-device".to_owned(), device]);
    }
    let mut vm = Vm::boot(&bench.assets, config)?;
    let register: Register = vm
        .guest
        .probe(&Probe::Mmio {
            read: "0000:00:1d.0".to_owned(),
            others: ["0000:00:1c.0", "0000:00:1e.0"].map(str::to_owned).to_vec(),
            rounds: 1000,
        })?
        .context("the probe was killed")?;
    vm.expect_alive()?;
    ensure!(register.value != u32::MAX && register.reads > 1000, "{register:?}");
    ensure!(register.wrong == 0, "{register:?}");
    Ok(())
}

/// A guest executes what stands in its memory, also where a DIMM was exchanged
/// for another one (qemu-patches, "forget the code of RAM that goes").
#[test]
fn code_in_an_exchanged_dimm_is_what_was_written() -> anyhow::Result<()> {
    const MEMORY: u64 = 768 * MIB;
    const DIMM: u64 = 256 * MIB;
    const ROUNDS: u32 = 3;
    /// Devices' memory begins there in a q35 machine with so little of its own.
    const FROM: u64 = 1 << 20;
    let bench = Bench::from_env()?;
    let mut config = VmConfig::new("exchanged-dimm", bench.accel);
    config.memory = MEMORY;
    // Programs get their memory from there first.
    config.kernel_arguments.push("memhp_default_state=online_movable".to_owned());
    // Each time another slot, at the same address: a slot that is filled before the
    // guest has asked whether it is empty stays unused ("Eject incomplete").
    let sizes = format!("{}M,slots={ROUNDS},maxmem={}M", MEMORY / MIB, (MEMORY + (1 << 30)) / MIB);
    config.qemu_arguments.extend(["-m".to_owned(), sizes]);
    let mut vm = Vm::boot(&bench.assets, config)?;
    for round in 0..ROUNDS {
        let backend = json!({
            "qom-type": "memory-backend-memfd", "id": "memory", "size": DIMM, "share": true,
        });
        vm.qmp.execute("object-add", backend)?;
        let dimm = json!({"driver": "pc-dimm", "id": "dimm", "memdev": "memory", "slot": round});
        vm.qmp.execute("device_add", dimm)?;
        let guest = &vm.guest;
        process::wait_for("the guest has its DIMM", PATIENCE, || {
            let online = guest.pages()?.online;
            let pages = online.iter().filter(|run| run.first >= FROM).map(|run| run.count);
            Ok((pages.sum::<u64>() * 4096 == DIMM).then_some(()))
        })?;
        let code = Probe::Code { bytes: DIMM / 2, seed: round << 24, from: FROM };
        let executed: Executed = guest.probe(&code)?.context("the probe was killed")?;
        ensure!(executed.above > 10_000, "round {round}: {executed:?}");
        ensure!(executed.wrong == 0, "round {round}: {executed:?}");
        vm.qmp.execute("device_del", json!({"id": "dimm"}))?;
        process::wait_for("the guest gives up its DIMM", PATIENCE, || {
            Ok(vm.qmp.memory_devices()?.is_empty().then_some(()))
        })?;
        vm.qmp.execute("object-del", json!({"id": "memory"}))?;
    }
    vm.expect_alive()
}

//! What virtio-mem takes from the guest stays away from it.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::ensure;
use gemini_e2e::daemon::DaemonConfig;
use gemini_e2e::lab::{Bench, Lab};
use gemini_e2e::{process, BLOCK, MIB};
use serde_json::json;

const MEMORY: u64 = 896 * MIB;
const PLUGGABLE: u64 = 384 * MIB;
/// Blocks that the host is asked to make huge; one request has room for them.
const BLOCKS: u64 = 32;
/// So many of them it has to owe when the memory is taken.
const OWED: u64 = 24;
/// What is being made huge just when the memory goes is so much at most, and nobody can stop it.
const UNDER_WAY: usize = 8;
/// How long the guest may take to follow.
const FOLLOW: Duration = Duration::from_secs(60);
/// By then a daemon that had not forgotten would have made what it owes.
const LATER: Duration = Duration::from_secs(4);

/// Tells the guest how much memory of virtio-mem's it is to have, and waits for it.
fn resize(lab: &mut Lab, bytes: u64) -> anyhow::Result<()> {
    let arguments = json!({"path": "vmem", "property": "requested-size", "value": bytes});
    lab.vm.qmp.execute("qom-set", arguments)?;
    process::wait_for("virtio-mem has its size", FOLLOW, || {
        let size = lab.vm.qmp.execute("qom-get", json!({"path": "vmem", "property": "size"}))?;
        Ok((size == bytes).then_some(()))
    })
}

/// Blocks that the driver held are unplugged while a daemon with little time of the processor owes
/// huge pages for them. It must not pay then: nobody would ever give that memory back.
#[test]
fn what_the_host_owes_is_forgotten_where_memory_is_unplugged() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let mut daemon = DaemonConfig::new(&bench.assets.daemon, "gemini");
    daemon.arguments.extend(["--cpu-share".into(), "1".into()]);
    let mut lab = Lab::start_with(&bench, "pluggable", daemon, |config| {
        config.memory = MEMORY;
        config.kernel_arguments.push("memhp_default_state=online_movable".into());
        let arguments = [
            "-m".to_owned(),
            format!("{}M,maxmem=8G", MEMORY / MIB),
            "-object".to_owned(),
            format!("memory-backend-memfd,id=plug,size={}M,share=on", PLUGGABLE / MIB),
            "-device".to_owned(),
            "virtio-mem-pci,id=vmem,memdev=plug,requested-size=0".to_owned(),
        ];
        config.qemu_arguments.extend(arguments);
    })?;
    let log = lab.vm.guest.log_position()?;
    for round in 0..3 {
        resize(&mut lab, PLUGGABLE)?;
        lab.vm.guest.hints_only()?;
        let devices = lab.vm.qmp.memory_devices()?;
        let first = devices.iter().map(|device| device.gpa.end).max().unwrap_or(0) / BLOCK - BLOCKS;
        lab.vm.guest.driver_command(&format!("book {first} {BLOCKS}"))?;
        let mut owed = 0;
        for _ in 0..40 {
            let before = lab.daemon.status()?.populated;
            lab.vm.guest.driver_command(&format!("renew {first} {BLOCKS}"))?;
            owed = BLOCKS.saturating_sub(lab.daemon.status()?.populated - before);
            if owed >= OWED {
                break;
            }
        }
        ensure!(owed >= OWED, "the daemon is too fast, it owes {owed} blocks");
        let returned = lab.vm.guest.driver_number("returned_isolation")?;
        resize(&mut lab, 0)?;
        let returned = lab.vm.guest.driver_number("returned_isolation")? - returned;
        ensure!(returned == BLOCKS, "the driver gave {returned} blocks back");
        std::thread::sleep(LATER);
        lab.find_memory()?;
        let without = lab.memory.without_owner(&lab.vm.guest.pages()?)?;
        let blocks: BTreeSet<u64> = without.iter().map(|page| page / BLOCK).collect();
        ensure!(
            blocks.len() <= UNDER_WAY,
            "round {round}: the host has blocks {blocks:?}, and nobody in the guest"
        );
    }
    let complaints = lab.vm.guest.complaints(log)?;
    ensure!(complaints.is_empty(), "{complaints:?}");
    lab.daemon.stop()
}

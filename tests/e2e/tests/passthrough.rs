//! Devices that pin guest memory, and the device that drops it, exclude each
//! other: whichever comes second is refused, and told why.
//!
//! No hardware is passed through. QEMU's NVMe driver asks for memory that stays
//! before it looks for its controller; a vfio-user device is all that VFIO is
//! to QEMU, where QEMU has it (from 10.1 on).

use std::process::Command;
use std::time::Duration;

use anyhow::{bail, ensure, Context};
use gemini_e2e::daemon::DaemonConfig;
use gemini_e2e::lab::{Bench, Lab, Place};
use gemini_e2e::process;
use gemini_e2e::vfio_user;
use gemini_e2e::vm::{Vm, VmConfig};
use gemini_e2e::MIB;
use gemini_guest::protocol::PageSize;
use serde_json::json;

/// What QEMU says to a device that comes when memory may be dropped already.
const REFUSED: &str = "Cannot set discarding of RAM broken";

const SETTLE: Duration = Duration::from_secs(60);

/// A QEMU with the device, in which nothing runs.
fn idle(bench: &Bench, place: &Place, name: &str, release: bool) -> anyhow::Result<Vm> {
    let mut config = VmConfig::new(name, bench.accel).with_device(&place.socket());
    config.release = release;
    Vm::await_guest(&bench.assets, config)
}

/// QEMU's word on an NVMe controller that is passed to its own driver.
fn attach_nvme(vm: &mut Vm) -> anyhow::Result<String> {
    let node =
        json!({"driver": "nvme", "node-name": "n", "device": "0000:00:1f.7", "namespace": 1});
    match vm.qmp.execute("blockdev-add", node) {
        Ok(_) => bail!("this machine has an NVMe controller at 0000:00:1f.7"),
        Err(error) => Ok(format!("{error:#}")),
    }
}

fn has_vfio_user(bench: &Bench) -> anyhow::Result<bool> {
    let output = Command::new(&bench.assets.qemu).args(["-device", "help"]).output()?;
    let found = String::from_utf8_lossy(&output.stdout).contains("\"vfio-user-pci\"");
    if !found {
        eprintln!("this QEMU has no vfio-user-pci: 10.2 has");
    }
    Ok(found)
}

/// QEMU's argument for the device at the socket in a directory.
fn vfio_user_device(place: &Place) -> anyhow::Result<String> {
    let path = place.directory().join("vfio-user");
    vfio_user::serve(&path)?;
    let socket = json!({"type": "unix", "path": path});
    Ok(json!({"driver": "vfio-user-pci", "socket": socket}).to_string())
}

#[test]
fn nvme_of_the_host_is_refused_where_memory_may_be_dropped() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let place = Place::new("passthrough-nvme")?;
    let told = attach_nvme(&mut idle(&bench, &place, "passthrough-nvme", true)?)?;
    ensure!(told.contains(REFUSED), "{told}");
    // Then only the hardware is missing.
    let told = attach_nvme(&mut idle(&bench, &place, "passthrough-nvme", false)?)?;
    ensure!(!told.contains(REFUSED), "{told}");
    Ok(())
}

#[test]
fn whichever_comes_second_is_refused() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    if !has_vfio_user(&bench)? {
        return Ok(());
    }
    let place = Place::new("passthrough-order")?;
    let device = vfio_user_device(&place)?;
    let start = |first: &[String], second: &[String]| -> anyhow::Result<String> {
        // A QEMU in which both work together would stay.
        let output = Command::new("timeout")
            .arg("20")
            .arg(&bench.assets.qemu)
            .args(["-nodefaults", "-display", "none", "-machine", "q35,memory-backend=mem"])
            .args(["-S", "-m", "64M", "-object", "memory-backend-memfd,id=mem,size=64M,share=on"])
            .args(first)
            .args(second)
            .output()
            .context("cannot start QEMU")?;
        ensure!(output.status.code() == Some(1), "QEMU ends with {}", output.status);
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let socket = place.socket();
    let ours = [
        "-chardev".to_owned(),
        format!("socket,id=gem,path={},reconnect-ms=500", socket.display()),
        "-device".to_owned(),
        // As JSON like the other: QEMU makes all devices of the one notation first.
        json!({"driver": "vhost-user-gemini-pci", "chardev": "gem"}).to_string(),
    ];
    let theirs = ["-device".to_owned(), device];
    let told = start(&ours, &theirs)?;
    ensure!(told.contains(REFUSED), "{told}");
    let told = start(&theirs, &ours)?;
    let expected = "memory cannot be released, another device forbids discarding it";
    ensure!(told.contains(expected) && told.contains("release=off"), "{told}");
    Ok(())
}

/// Nothing is dropped, and everything else works.
#[test]
fn with_release_off_the_guest_is_aligned_beside_it_and_nothing_is_dropped() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let theirs = Place::new("passthrough-beside")?;
    let device = if has_vfio_user(&bench)? { Some(vfio_user_device(&theirs)?) } else { None };
    let mut daemon = DaemonConfig::new(&bench.assets.daemon, "gemini");
    daemon.arguments.extend(["--give-back".to_owned(), "always".to_owned()]);
    let beside = device.is_some();
    let mut lab = Lab::start_with(&bench, "passthrough-beside", daemon, |config| {
        config.release = false;
        config.qemu_arguments.extend(["-device".to_owned(), "virtio-balloon-pci".to_owned()]);
        if let Some(device) = device {
            config.qemu_arguments.extend(["-device".to_owned(), device]);
        }
    })?;
    let log = lab.vm.guest.log_position()?;
    lab.vm.guest.set_driver("booking_timeout_ms", 1000)?;
    lab.vm.guest.fill("a", 128 * MIB, 1, PageSize::Huge)?;
    process::wait_for("the host follows the guest", SETTLE, || {
        Ok((lab.daemon.status()?.aligned >= 60).then_some(()))
    })?;
    // By hand, in a place that nobody else takes.
    lab.vm.guest.hints_only()?;
    let told = lab.vm.guest.driver_command("book any 1")?;
    let block: Option<u64> = told.lines().find_map(|line| line.parse().ok());
    let block = block.with_context(|| format!("the driver says {told}"))?;
    lab.vm.guest.driver_command(&format!("fill {block} 5"))?;
    for request in ["release", "renew"] {
        let result = lab.vm.guest.driver_command(&format!("{request} {block} 1"));
        ensure!(result.is_err(), "the driver can {request}: {result:?}");
    }
    lab.vm.guest.driver_command(&format!("check {block} 5"))?;
    lab.vm.guest.driver_command("free all")?;
    lab.vm.guest.verify("a")?;
    lab.vm.guest.free("a")?;

    // The balloon is QEMU's: it discards unless QEMU itself was forbidden to.
    lab.vm.guest.load_balloon()?;
    let before = lab.memory.resident_bytes()?;
    lab.vm.qmp.execute("balloon", json!({"value": 768 * MIB}))?;
    process::wait_for("the balloon has its size", SETTLE, || {
        let told = lab.vm.qmp.execute("query-balloon", json!({}))?;
        Ok((told["actual"] == 768 * MIB).then_some(()))
    })?;
    let pages = lab.vm.guest.pages()?;
    let inflated: u64 = pages.given_away.iter().map(|run| run.count * 4096).sum();
    ensure!(inflated == 256 * MIB, "{inflated} bytes are in the balloon");
    let left = lab.memory.without_owner(&pages)?;
    eprintln!("{before} bytes before, {} pages left, pinned: {beside}", left.len());
    ensure!(beside || lab.memory.come_back(&left).is_empty(), "left under the balloon: {left:x?}");

    let status = lab.daemon.status()?;
    ensure!(status.released == 0 && status.trimmed_pages == 0, "{status:?}");
    let complaints = lab.vm.guest.complaints(log)?;
    ensure!(complaints.is_empty(), "{complaints:?}");
    lab.vm.expect_alive()?;
    lab.daemon.stop()
}

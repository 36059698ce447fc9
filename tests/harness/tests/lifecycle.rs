//! The daemon's life: it waits, serves, survives, serves again, and ends.

mod common;

use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use anyhow::ensure;
use common::{lab, memory, options, start, start_under, Result};
use gemini_harness::daemon::{default_program, Daemon};
use gemini_harness::frontend::Session;
use gemini_harness::machine::{Machine, PATIENCE};
use gemini_harness::memory::{GuestMemory, Placement, BLOCK_SIZE};
use gemini_harness::outside;
use gemini_harness::scratch::Scratch;
use gemini_harness::settings::Held;
use gemini_harness::sys;
use gemini_harness::wire::host_state;
use serde_json::json;

#[test]
fn daemon_without_a_monitor_waits_and_ends_cleanly_on_sigterm() -> Result {
    let mut lab = lab("gemini")?;
    let status = lab.daemon.status()?;
    ensure!(!status.connected && status.blocks == 0, "{status:?}");
    ensure!(lab.daemon.map()?.runs.is_empty());
    let exit = lab.daemon.terminate()?;
    ensure!(exit.success(), "{exit}");
    ensure!(!lab.daemon.socket().exists(), "the socket is left behind");
    Ok(())
}

#[test]
fn daemon_survives_a_monitor_that_vanishes_and_serves_the_next() -> Result {
    let mut lab = lab("gemini")?;
    let first = lab.boot(32)?;
    let before = lab.daemon.status()?;
    ensure!(before.connected && before.blocks == 32, "{before:?}");
    drop(first);
    lab.daemon.wait_status("without a monitor", PATIENCE, |status| !status.connected)?;
    let _second = lab.boot(48)?;
    let after = lab.daemon.wait_status("synchronised", PATIENCE, |status| status.guest_synced)?;
    ensure!(after.blocks == 48, "{after:?}");
    ensure!(after.generation != before.generation);
    Ok(())
}

#[test]
fn connections_leave_nothing_behind() -> Result {
    let mut lab = lab("gemini")?;
    let figures = |daemon: &mut Daemon| -> Result<(u64, u64)> {
        daemon.wait_status("without a monitor", PATIENCE, |status| !status.connected)?;
        std::thread::sleep(Duration::from_millis(200));
        let figures = outside::ProcessFigures::of(daemon.pid())?;
        Ok((figures.descriptors, figures.threads))
    };
    drop(lab.boot(16)?);
    let before = figures(&mut lab.daemon)?;
    for _ in 0..20 {
        drop(lab.boot(16)?);
    }
    let after = figures(&mut lab.daemon)?;
    ensure!(after == before, "descriptors and threads: {before:?}, then {after:?}");
    Ok(())
}

#[test]
fn daemon_serves_on_an_inherited_socket() -> Result {
    let mut options = options("gemini")?;
    options.pass_listener = true;
    let mut lab = start(options)?;
    let _machine = lab.boot(16)?;
    ensure!(lab.daemon.status()?.connected);
    let exit = lab.daemon.terminate()?;
    ensure!(exit.success(), "{exit}");
    Ok(())
}

#[test]
fn sigterm_leaves_the_memory_as_it_is() -> Result {
    let mut lab = lab("gemini")?;
    let mut machine = lab.boot(32)?;
    for block in 8..16 {
        machine.guest.alloc_huge(block)?;
    }
    machine.talk()?;
    let blocks: Vec<_> = (8..16).collect();
    machine.wait_host(&blocks, |state| state == host_state::HUGE, PATIENCE)?;
    let before = machine.memory.resident_bytes()?;
    let exit = lab.daemon.terminate()?;
    ensure!(exit.success(), "{exit}");
    machine.guest.ensure_intact()?;
    // A last hint may have filled another page of the driver's buffers.
    ensure!(machine.memory.resident_bytes()? >= before);
    let states = outside::host_states(&machine.memory)?;
    ensure!(states[8..16].iter().all(|&state| state == host_state::HUGE));
    Ok(())
}

#[test]
fn sigterm_ends_a_daemon_that_is_at_work() -> Result {
    // So little budget that work is left for minutes.
    let mut lab = start(options("gemini")?.arg("--copy-rate", "4M"))?;
    let mut machine = lab.boot(96)?;
    for block in 8..90 {
        machine.guest.alloc_huge(block)?;
    }
    machine.talk()?;
    let began = std::time::Instant::now();
    let exit = lab.daemon.terminate()?;
    ensure!(exit.success(), "{exit}");
    ensure!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    machine.guest.ensure_intact()
}

#[test]
fn status_adds_up_and_the_map_covers_every_block() -> Result {
    let mut lab = lab("none")?;
    let mut machine = lab.boot(64)?;
    machine.guest.alloc_huge(10)?;
    machine.guest.alloc_base(11, 3)?;
    machine.guest.book(12)?;
    machine.talk()?;
    let status = lab.daemon.wait_status("told", PATIENCE, |status| {
        status.guest.huge == 1 && status.guest.booked == 1
    })?;
    let guest = status.guest;
    let sum = guest.unknown + guest.free + guest.base + guest.huge + guest.booked + guest.pinned;
    ensure!(sum == 64, "{guest:?}");
    let host = status.host;
    ensure!(host.absent + host.base + host.huge + host.hugetlb == 64, "{host:?}");
    let map = lab.daemon.map()?;
    ensure!(map.block_shift == 21 && map.generation == status.generation);
    let mut next = 0;
    for run in &map.runs {
        ensure!(run.first == next && run.count > 0, "{run:?} behind block {next}");
        next += run.count;
    }
    ensure!(next == 64, "the map ends at {next}");
    ensure!(map.counts() == (status.aligned, status.guest_only, status.host_only));
    Ok(())
}

#[test]
fn control_socket_answers_nonsense_with_an_error() -> Result {
    let mut lab = lab("none")?;
    for request in [json!({"cmd": "explode"}), json!(7), json!({})] {
        let answer = lab.daemon.control(&request)?;
        ensure!(answer.get("error").is_some(), "{request} is answered {answer}");
    }
    let mut stream = UnixStream::connect(lab.scratch.path().join("control.sock"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    // No line end in sight: the daemon must not collect it all.
    let _ = stream.write_all(&vec![b'x'; 1 << 20]);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    lab.daemon.ensure_alive()?;
    ensure!(lab.daemon.status()?.policy == "none");
    Ok(())
}

#[test]
fn a_second_daemon_does_not_steal_a_live_socket() -> Result {
    let mut lab = lab("none")?;
    let output =
        Command::new(default_program()?).arg("--socket-path").arg(lab.daemon.socket()).output()?;
    ensure!(!output.status.success(), "it started");
    let message = String::from_utf8_lossy(&output.stderr);
    ensure!(message.contains("gemini.sock"), "the socket is not named: {message}");
    drop(lab.boot(16)?);
    lab.daemon.ensure_alive()
}

#[test]
fn capabilities_are_printed_as_json() -> Result {
    let output = Command::new(default_program()?).arg("--print-capabilities").output()?;
    ensure!(output.status.success());
    let capabilities: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    ensure!(capabilities.is_object(), "{capabilities}");
    Ok(())
}

#[test]
fn the_sandbox_holds_every_thread_and_can_be_left_out() -> Result {
    // As the kernel calls it: a filter, or none.
    for (mode, filter) in [(None, 2), (Some("log"), 2), (Some("off"), 0)] {
        let mut options = options("gemini")?;
        if let Some(mode) = mode {
            options = options.arg("--sandbox", mode);
        }
        let mut lab = start(options)?;
        let _machine = lab.boot(16)?;
        for task in std::fs::read_dir(format!("/proc/{}/task", lab.daemon.pid()))? {
            let status = std::fs::read_to_string(task?.path().join("status"))?;
            ensure!(status.contains(&format!("Seccomp:\t{filter}\n")), "{mode:?}: {status}");
        }
        let exit = lab.daemon.terminate()?;
        ensure!(exit.success(), "{mode:?}: {exit}");
        ensure!(!lab.daemon.socket().exists(), "{mode:?}: the socket is left behind");
    }
    Ok(())
}

#[test]
fn a_configuration_that_is_a_link_is_followed_at_each_load() -> Result {
    let scratch = Scratch::new()?;
    let (links, files) = (scratch.path().join("links"), scratch.path().join("files"));
    std::fs::create_dir(&links)?;
    std::fs::create_dir(&files)?;
    let link = links.join("vm.toml");
    let lead_to = |weight: u32| -> Result {
        std::fs::write(files.join(format!("{weight}.toml")), format!("weight = {weight}\n"))?;
        symlink(format!("../files/{weight}.toml"), links.join("new"))?;
        Ok(std::fs::rename(links.join("new"), &link)?)
    };
    lead_to(1)?;
    let lab = start(options("gemini")?.arg("--config", &link.to_string_lossy()))?;
    for weight in [2, 3] {
        lead_to(weight)?;
        let settings = lab.daemon.control(&json!({"cmd": "reload"}))?;
        ensure!(settings["weight"] == weight, "{settings}");
    }
    Ok(())
}

/// Connects with `memory` and returns the codes of the findings.
fn findings(daemon: &mut Daemon, memory: &GuestMemory) -> Result<Vec<(String, String)>> {
    let session = Session::connect(&daemon.socket(), PATIENCE)?;
    session.set_memory(memory)?;
    // What is found out needs no more than the table.
    let status =
        daemon.wait_status("connected", PATIENCE, |status| status.blocks == memory.blocks())?;
    Ok(status.findings.into_iter().map(|finding| (finding.severity, finding.code)).collect())
}

#[test]
fn aligned_shared_memory_has_no_errors() -> Result {
    let mut lab = lab("gemini")?;
    let found = findings(&mut lab.daemon, &memory(16)?)?;
    ensure!(found.iter().all(|(severity, _)| severity != "error"), "{found:?}");
    Ok(())
}

#[test]
fn a_monitor_that_maps_unaligned_is_found() -> Result {
    let mut lab = lab("gemini")?;
    let skewed = GuestMemory::new(16 * BLOCK_SIZE, Placement::Skewed)?;
    let found = findings(&mut lab.daemon, &skewed)?;
    ensure!(found.iter().any(|(_, code)| code == "vmm-mapping-unaligned"), "{found:?}");
    let log = lab.daemon.log_tail();
    ensure!(log.contains("share=on"), "the log has no remedy: {log}");
    Ok(())
}

#[test]
fn memory_that_is_not_shared_is_found() -> Result {
    let mut lab = lab("gemini")?;
    let private = GuestMemory::new(16 * BLOCK_SIZE, Placement::Private)?;
    let found = findings(&mut lab.daemon, &private)?;
    ensure!(found.iter().any(|(_, code)| code == "memory-not-shared"), "{found:?}");
    Ok(())
}

#[test]
fn denied_huge_pages_are_found_and_nothing_breaks() -> Result {
    if !sys::is_root() {
        eprintln!("not tested: only the superuser can deny huge pages");
        return Ok(());
    }
    let held = Held::shmem_enabled("deny")?;
    let mut lab = start_under(options("gemini")?, held)?;
    let mut machine = Machine::boot(&lab.daemon.socket(), memory(32)?)?;
    let found = lab.daemon.status()?.findings;
    ensure!(found.iter().any(|finding| finding.code == "shmem-thp-denied"), "{found:?}");
    machine.guest.alloc_huge(10)?;
    machine.talk()?;
    machine.run_for(Duration::from_millis(500))?;
    lab.daemon.ensure_alive()?;
    ensure!(lab.daemon.status()?.guest_only == 1);
    machine.guest.ensure_intact()
}

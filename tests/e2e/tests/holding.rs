//! How long blocks are held for nothing, while somebody needs the memory.

use std::time::Duration;

use anyhow::{ensure, Context};
use gemini_e2e::cgroup::MemoryCgroup;
use gemini_e2e::lab::{Bench, Lab};
use gemini_e2e::{process, MIB};
use gemini_guest::protocol::PageSize;

const SETTLE: Duration = Duration::from_secs(60);
const TIMEOUT_MS: u64 = 60_000;
/// A guest with less than this part of its memory free is under pressure.
const FREE_SHARE: u64 = 8;
/// Below what a guest is asked for memory, in a cgroup with a limit as here.
const ROOM: u64 = 64 * MIB;
/// How often the host wants something, until somebody saw it.
const WISHES: u32 = 8;
/// Until the file is gone, prints how long blocks are held and what is left of the
/// host's wish, as long as there is one before and after; by the shell's own means,
/// as a wish is soon met: sometimes before anybody looks.
const WATCH: &str =
    "cd /sys/bus/virtio/drivers/virtio_gemini/virtio*/gemini && touch /tmp/watch && \
    while [ -e /tmp/watch ]; do \
    read before < owed; read hold < hold_ms; read owed < owed; \
    [ $before = 0 -o $owed = 0 ] || echo $hold $owed; done";

/// The timeout shrinks in proportion to what the guest itself lacks, and to what
/// the host wants of what is held, and is whole again when nobody does.
#[test]
fn pressure_of_guest_and_host_shrinks_the_hold() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let group = MemoryCgroup::new()?;
    group.enter()?;
    let started = Lab::start(&bench, "holding", "gemini", |_| {});
    group.leave()?;
    let mut lab = started?;
    // What it takes is not free: before, the program would ask for more than there is.
    lab.wait_stocked(SETTLE)?;
    let guest = &lab.vm.guest;
    let log = guest.log_position()?;
    guest.set_driver("booking_timeout_ms", TIMEOUT_MS)?;
    let hold_ms = || guest.driver_number("hold_ms");
    ensure!(hold_ms()? == TIMEOUT_MS, "{} ms without any pressure", hold_ms()?);

    // The guest itself.
    let memory = guest.memory()?;
    let (total, free) = (memory["MemTotal"], memory["MemFree"]);
    guest.fill("needed", free - total / (2 * FREE_SHARE), 1, PageSize::Base)?;
    let held = hold_ms()?;
    let share = guest.memory()?["MemFree"] as f64 / (total / FREE_SHARE) as f64;
    eprintln!("{held} ms while {share:.2} of what is no pressure is free");
    ensure!(held < TIMEOUT_MS * 3 / 4, "{held} ms are left");
    let expected = TIMEOUT_MS as f64 * share.min(1.0);
    ensure!((held as f64 - expected).abs() < TIMEOUT_MS as f64 / 8.0, "{held} ms, not {expected}");
    guest.free("needed")?;
    process::wait_for("the hold is whole again", SETTLE, || {
        Ok((hold_ms()? == TIMEOUT_MS).then_some(()))
    })?;

    // The host, which wants memory while there is some to be had.
    let mut seen = String::new();
    for _ in 0..WISHES {
        seen = looks_at_wish(&mut lab, &group)?;
        if !seen.is_empty() {
            break;
        }
    }
    for line in seen.lines() {
        let (hold_ms, owed) = line.split_once(' ').context("two numbers a line")?;
        let hold_ms: u64 = hold_ms.parse().with_context(|| line.to_owned())?;
        ensure!(hold_ms < TIMEOUT_MS, "{hold_ms} ms while {owed} blocks are wanted");
    }
    eprintln!(
        "{} looks saw a wish, the first one: {:?}",
        seen.lines().count(),
        seen.lines().next()
    );
    ensure!(!seen.is_empty(), "nobody saw any of {WISHES} wishes");
    let guest = &lab.vm.guest;
    let complaints = guest.complaints(log)?;
    ensure!(complaints.is_empty(), "{complaints:?}");
    lab.daemon.stop()
}

/// Has the host want some of what the guest holds, and leaves it in peace again;
/// returns what was seen meanwhile.
fn looks_at_wish(lab: &mut Lab, group: &MemoryCgroup) -> anyhow::Result<String> {
    lab.vm.guest.fill("aligned", 256 * MIB, 2, PageSize::Huge)?;
    lab.wait_settled(SETTLE)?;
    let guest = &lab.vm.guest;
    guest.free("aligned")?;
    process::wait_for("freed blocks are held", SETTLE, || {
        Ok((guest.driver_number("held")? > 64).then_some(()))
    })?;
    let released = lab.daemon.status()?.released;
    let watched = guest.start_shell(WATCH)?;
    process::wait_for("somebody watches", SETTLE, || Ok(guest.shell("test -e /tmp/watch").ok()))?;
    group.limit(group.usage()? + ROOM / 2)?;
    process::wait_for("the host got some", SETTLE, || {
        Ok((lab.daemon.status()?.released > released).then_some(()))
    })?;
    guest.shell("rm /tmp/watch")?;
    let seen = watched.wait(SETTLE)?.output;
    group.limit(group.usage()? + 4 * ROOM)?;
    process::wait_for("the hold is whole again", SETTLE, || {
        Ok((guest.driver_number("hold_ms")? == TIMEOUT_MS).then_some(()))
    })
    .context("after the host's wish")?;
    Ok(seen)
}

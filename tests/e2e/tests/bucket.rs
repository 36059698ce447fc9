//! What the driver does with blocks that processes free, and how it lets go of
//! those that it holds.

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::Duration;

use anyhow::{ensure, Context};
use gemini_e2e::guest::Guest;
use gemini_e2e::lab::{Bench, Lab, SYNC_TIMEOUT};
use gemini_e2e::offlining::sort_out_retries;
use gemini_e2e::outside::HostState;
use gemini_e2e::process;
use gemini_e2e::{BLOCK, MIB};
use gemini_guest::protocol::{Fragment, PageSize};

const SETTLE: Duration = Duration::from_secs(60);
const FOLLOW: Duration = Duration::from_secs(30);
const SYSFS: &str = "/sys/bus/virtio/drivers/virtio_gemini/virtio*/gemini";

/// Blocks in this guest state that the host backs with a huge page, as the
/// driver's map has it.
fn host_huge_blocks(guest: &Guest, state: &str) -> anyhow::Result<BTreeSet<u64>> {
    Ok(guest
        .driver_blocks()?
        .into_iter()
        .filter(|run| run.guest == state && run.host == "huge")
        .flat_map(|run| run.first..run.first + run.count)
        .collect())
}

fn text_of(guest: &Guest, name: &str) -> anyhow::Result<String> {
    Ok(guest.shell(&format!("cat {SYSFS}/{name}"))?.trim().to_owned())
}

fn wait_number(
    guest: &Guest,
    name: &str,
    wanted: impl Fn(u64) -> bool,
    timeout: Duration,
) -> anyhow::Result<u64> {
    let mut last = 0;
    process::wait_for(&format!("the driver's {name}"), timeout, || {
        last = guest.driver_number(name)?;
        Ok(wanted(last).then_some(last))
    })
    .with_context(|| format!("{name} is {last}"))
}

fn expect_calm(guest: &Guest, log: u64) -> anyhow::Result<()> {
    let complaints = guest.complaints(log)?;
    let texts = complaints.iter().map(|complaint| complaint.text.as_str());
    // That it has to wait for a block is what some of these tests are about.
    let (_, others) = sort_out_retries(texts);
    ensure!(others.is_empty(), "{others:?}");
    Ok(())
}

/// An aligned program of 256 MiB frees its memory, small allocations follow at
/// once, then a second such program: the blocks are whole until it comes, and
/// then they are its own.
#[test]
fn freed_aligned_blocks_survive_small_allocations_and_are_reused() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let mut lab = Lab::start(&bench, "bucket-reuse", "gemini", |_| {})?;
    let log = lab.vm.guest.log_position()?;
    ensure!(!text_of(&lab.vm.guest, "bucket_hooks")?.contains("off"));
    lab.vm.guest.fill("first", 256 * MIB, 1, PageSize::Huge)?;
    lab.wait_settled(SETTLE)?;
    let guest = &lab.vm.guest;
    let aligned = host_huge_blocks(guest, "huge")?;
    ensure!(aligned.len() >= 120, "{} aligned blocks to begin with", aligned.len());

    let free = guest.memory()?.get("MemFree").copied().unwrap_or(0) + 256 * MIB;
    guest.free("first")?;
    guest.fill("storm", free / 2, 2, PageSize::Base)?;
    let rebooked = guest.driver_number("rebooked")?;
    let freed = guest.driver_number("bucket_freed")?;
    let kept = host_huge_blocks(guest, "booked")?.intersection(&aligned).count();
    println!("{} aligned, {freed} seen freed, {rebooked} held again", aligned.len());
    ensure!(
        kept * 100 >= aligned.len() * 95,
        "{kept} of {} aligned blocks are held after the storm",
        aligned.len()
    );

    guest.fill("second", 256 * MIB, 3, PageSize::Huge)?;
    guest.driver_command("census")?;
    // By what QEMU and the program's own page table say.
    let huge: BTreeSet<u64> = lab
        .memory
        .states()?
        .into_iter()
        .filter(|(_, state)| *state == HostState::Huge)
        .map(|(block, _)| block)
        .collect();
    let second = guest.blocks_of("second")?;
    let got = second.iter().flatten().filter(|block| huge.contains(block)).count();
    ensure!(
        got * 100 >= second.len() * 95,
        "{got} of {} blocks of the second program are aligned at once",
        second.len()
    );
    // The stock may have been filled up meanwhile: as many as came from there still wait.
    let waiting = host_huge_blocks(guest, "booked")?;
    let kept = |block: &&u64| second.contains(&Some(**block)) || waiting.contains(*block);
    let kept = aligned.intersection(&huge).filter(kept).count();
    ensure!(
        kept * 100 >= aligned.len() * 95,
        "{kept} of {} aligned blocks are aligned again, or wait for it",
        aligned.len()
    );
    for name in ["storm", "second"] {
        guest.verify(name)?;
    }
    expect_calm(guest, log)?;
    lab.daemon.stop()
}

/// What nobody comes for goes back when the timeout says so, not before.
#[test]
fn timeout_gives_blocks_back_and_adapts() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let mut lab = Lab::start(&bench, "bucket-timeout", "gemini", |_| {})?;
    let log = lab.vm.guest.log_position()?;
    lab.vm.guest.fill("first", 128 * MIB, 1, PageSize::Huge)?;
    lab.wait_settled(SETTLE)?;
    let guest = &lab.vm.guest;
    // No huge page is asked for from here on: the stock goes to its floor.
    guest.set_driver("stock_floor", 0)?;
    guest.set_driver("stock_active", 0)?;
    ensure!(guest.driver_number("timeout_ms")? == 60_000);
    // An emulated guest has no counters of its own.
    ensure!(text_of(guest, "timeout_source")? == "misaligned");
    guest.free("first")?;
    wait_number(guest, "rebooked", |count| count >= 60, FOLLOW)?;
    let held = guest.driver_number("held")?;
    // After a period with the timeout as it is, a longer one is tried.
    wait_number(guest, "timeout_ms", |ms| ms == 66_000, FOLLOW)?;
    let later = guest.driver_number("held")?;
    ensure!(later * 10 >= held * 9, "{held} blocks held, {later} well before the timeout");

    for refused in [999_u64, 600_001] {
        ensure!(guest.set_driver("booking_timeout_ms", refused).is_err(), "{refused} is taken");
    }
    let expired = guest.driver_number("expired")?;
    guest.set_driver("booking_timeout_ms", 1000)?;
    ensure!(guest.driver_number("timeout_ms")? == 1000);
    ensure!(text_of(guest, "timeout_source")? == "fixed");
    wait_number(guest, "held", |held| held <= 4, FOLLOW)?;
    let expired = guest.driver_number("expired")? - expired;
    ensure!(expired + 4 >= later, "{expired} of {later} blocks expired");

    guest.set_driver("booking_timeout_ms", 0)?;
    ensure!(guest.driver_number("timeout_ms")? == 60_000, "adapting does not start anew");
    expect_calm(guest, log)?;
    lab.daemon.stop()
}

/// Per mille, as the driver's fmfi.c defines it, of `/proc/buddyinfo` and `held`
/// idle blocks.
fn fmfi_of(buddyinfo: &str, held: u64) -> u64 {
    let (mut free, mut usable) = (held * 512, held * 512);
    for line in buddyinfo.lines() {
        let counts = line.split_once("zone").map_or("", |(_, rest)| rest);
        for (order, count) in counts.split_whitespace().skip(1).enumerate() {
            let pages = count.parse::<u64>().unwrap_or(0) << order;
            free += pages;
            usable += if order >= 9 { pages } else { 0 };
        }
    }
    ((free - usable) * 1000).checked_div(free).unwrap_or(1000)
}

#[test]
fn fragmentation_is_what_the_allocators_lists_say() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let lab = Lab::start(&bench, "bucket-fmfi", "none", |_| {})?;
    let guest = &lab.vm.guest;
    guest.hints_only()?;
    let compare = |what: &str| -> anyhow::Result<u64> {
        // One command, so that little changes in between.
        let text = guest
            .shell(&format!("cd {SYSFS}; cat held; cat fmfi; cat /proc/buddyinfo; cat fmfi"))?;
        let mut lines = text.splitn(3, '\n');
        let held: u64 = lines.next().unwrap_or_default().trim().parse()?;
        let before: u64 = lines.next().unwrap_or_default().trim().parse()?;
        let (buddyinfo, after) =
            lines.next().unwrap_or_default().trim_end().rsplit_once('\n').context("no lines")?;
        let after: u64 = after.trim().parse()?;
        let here = fmfi_of(buddyinfo, held);
        println!("{what}: {before}, {here} from buddyinfo with {held} held, {after}");
        ensure!(
            here + 5 >= before.min(after) && here <= before.max(after) + 5,
            "{what}: the driver says {before} and {after}, /proc/buddyinfo {here}"
        );
        Ok(here)
    };
    let whole = compare("fresh")?;
    guest.fragment("holes", Fragment { fmfi: 0.5, ..Fragment::new(1, 400 * MIB) })?;
    let full = compare("fragmented")?;
    ensure!(full >= 450, "fragmented to an index of {full}");
    guest.driver_command("book any 40")?;
    let held = compare("with blocks held")?;
    // Not counting them would add 200. What lies on the processors' own lists, which neither
    // counts, is up to an eighth of what is free here, and whole blocks are among it.
    ensure!(held.abs_diff(full) <= 100, "holding blocks looks like another state: {full}, {held}");
    guest.driver_command("free all")?;
    guest.end("holes")?;
    ensure!(whole < 500, "a fresh guest with an index of {whole}");
    lab.daemon.stop()
}

/// A section of the guest's memory that can go offline.
struct Section<'a> {
    guest: &'a Guest,
    state: String,
    blocks: Range<u64>,
}

impl<'a> Section<'a> {
    fn find(guest: &'a Guest) -> anyhow::Result<Self> {
        // By trying it: the kernel's own memory may be anywhere.
        let number: u64 = guest
            .shell(
                "cd /sys/devices/system/memory && for m in memory*; do \
                 grep -q '^Movable' $m/valid_zones && echo offline 2>/dev/null > $m/state && \
                 echo online_movable > $m/state && echo ${m#memory} && break; done",
            )?
            .trim()
            .parse()
            .context("no memory can go offline")?;
        let size = guest.read_file("/sys/devices/system/memory/block_size_bytes")?;
        let count = u64::from_str_radix(size.trim(), 16)? / BLOCK;
        // For as long as it is remembered that somebody wanted it offline.
        std::thread::sleep(Duration::from_secs(3));
        Ok(Section {
            guest,
            state: format!("/sys/devices/system/memory/memory{number}/state"),
            blocks: number * count..(number + 1) * count,
        })
    }

    /// Its blocks that the driver holds.
    fn held(&self) -> anyhow::Result<Vec<u64>> {
        Ok(self
            .guest
            .driver_blocks()?
            .into_iter()
            .filter(|run| run.guest == "booked")
            .flat_map(|run| run.first..run.first + run.count)
            .filter(|block| self.blocks.contains(block))
            .collect())
    }

    /// Has the driver hold `count` blocks anywhere, 20 and more of them here.
    fn hold(&self, count: u32) -> anyhow::Result<Vec<u64>> {
        self.guest.driver_command(&format!("book any {count}"))?;
        let held = self.held()?;
        ensure!(held.len() >= 20, "{} blocks held in {}", held.len(), self.state);
        Ok(held)
    }

    /// Asks for it to go offline, and does not wait.
    fn start_offlining(&self) -> anyhow::Result<()> {
        let state = &self.state;
        self.guest.shell(&format!(
            ": > /offlined; (echo offline > {state}; echo $? > /offlined) \
             < /dev/null > /dev/null 2>&1 &"
        ))?;
        Ok(())
    }

    fn is(&self, state: &str) -> anyhow::Result<bool> {
        Ok(self.guest.read_file(&self.state)?.trim() == state)
    }

    fn wait_offline(&self) -> anyhow::Result<()> {
        process::wait_for("memory goes offline", FOLLOW, || Ok(self.is("offline")?.then_some(())))?;
        process::wait_for("the one who asked for it knows", FOLLOW, || {
            Ok((self.guest.read_file("/offlined")?.trim() == "0").then_some(()))
        })
    }

    fn bring_online(&self) -> anyhow::Result<()> {
        self.guest.write_file(&self.state, "online_movable")
    }
}

fn boot_with_movable_memory(bench: &Bench, name: &str) -> anyhow::Result<Lab> {
    let lab = Lab::start(bench, name, "none", |config| {
        config.kernel_arguments = vec!["movablecore=512M".into()];
    })?;
    lab.vm.guest.hints_only()?;
    ensure!(text_of(&lab.vm.guest, "isolation")? == "on");
    Ok(lab)
}

/// Memory whose blocks are held goes offline; not while the host may still drop
/// one of them, but as soon as it answered.
#[test]
fn held_blocks_make_way_for_offlining() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let mut lab = boot_with_movable_memory(&bench, "bucket-offline")?;
    let guest = &lab.vm.guest;
    let section = Section::find(guest)?;
    // The kernel tells of those that cannot.
    let log = guest.log_position()?;
    let inside = section.hold(220)?;
    let held = guest.driver_number("held")?;

    // The host may drop this one at any time, until it answers.
    lab.daemon.process.signal(libc::SIGSTOP)?;
    guest.driver_command(&format!("release {} 1 nowait", inside[0]))?;
    section.start_offlining()?;
    wait_number(guest, "returned_isolation", |count| count + 1 >= inside.len() as u64, FOLLOW)?;
    // Longer than it takes to give a daemon up that is gone; this one is not.
    std::thread::sleep(Duration::from_secs(4));
    let under_way = section.is("going-offline")?;
    let left = section.held()?;
    lab.daemon.process.signal(libc::SIGCONT)?;
    ensure!(left == inside[..1], "{left:?} are held with one release under way");
    ensure!(under_way, "{} did not wait", section.state);

    section.wait_offline()?;
    let returned = guest.driver_number("returned_isolation")?;
    ensure!(returned == inside.len() as u64, "{returned} of {} returned", inside.len());
    let left = guest.driver_number("held")?;
    ensure!(left + returned == held, "{left} left, {returned} returned");

    // And once more, with nothing under way.
    section.bring_online()?;
    std::thread::sleep(Duration::from_secs(3));
    let inside = section.hold(50)?.len();
    guest.write_file(&section.state, "offline").context("held blocks did not make way")?;
    let again = guest.driver_number("returned_isolation")? - returned;
    ensure!(again == inside as u64, "{again} of {inside} returned");
    section.bring_online()?;
    guest.driver_command("free all")?;
    expect_calm(guest, log)?;
    lab.daemon.stop()
}

/// Memory goes offline though a daemon had some of it to drop when it died, and
/// nobody starts another one; and the driver can be unloaded meanwhile.
#[test]
fn memory_goes_offline_without_a_daemon() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let mut lab = boot_with_movable_memory(&bench, "bucket-offline-alone")?;
    {
        let section = Section::find(&lab.vm.guest)?;
        // The kernel tells of those that cannot go offline.
        let log = lab.vm.guest.log_position()?;
        let inside = section.hold(220)?;
        lab.daemon.process.signal(libc::SIGSTOP)?;
        lab.vm.guest.driver_command(&format!("release {} 1 nowait", inside[0]))?;
        section.start_offlining()?;
        lab.daemon.process.kill()?;
        section.wait_offline()?;
        ensure!(section.held()?.is_empty());
        section.bring_online()?;
        let told = lab.vm.guest.complaints(log)?;
        let (_, told) = sort_out_retries(told.iter().map(|complaint| complaint.text.as_str()));
        let once = told.len() == 1 && told[0].ends_with("resetting the device");
        ensure!(once, "{told:?}");
    }
    lab.restart_daemon()?;
    lab.daemon.wait_synced(SYNC_TIMEOUT)?;

    let section = Section::find(&lab.vm.guest)?;
    let log = lab.vm.guest.log_position()?;
    lab.vm.guest.driver_command("free all")?;
    let inside = section.hold(220)?;
    lab.daemon.process.signal(libc::SIGSTOP)?;
    lab.vm.guest.driver_command(&format!("release {} 1 nowait", inside[0]))?;
    section.start_offlining()?;
    process::wait_for("it goes offline", FOLLOW, || {
        Ok(section.is("going-offline")?.then_some(()))
    })?;
    lab.daemon.process.kill()?;
    // Before the driver gives the daemon up.
    lab.vm.guest.unload_driver()?;
    section.wait_offline()?;
    section.bring_online()?;
    expect_calm(&lab.vm.guest, log)
}

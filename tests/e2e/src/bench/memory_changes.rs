//! Memory comes and goes while the daemon works: DIMMs, virtio-mem, a balloon
//! with free page reporting, resets of the guest and deaths of the daemon, in
//! random order and at the same time.
//!
//! After each sequence, once all that was asked for has happened, guest, QEMU's
//! page tables and daemon must agree on every block, no byte may be lost, and
//! what was taken from the guest must stay away from it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context};
use gemini_guest::protocol::{PageRun, PageSize};
use gemini_harness::figures::{Bar, Scenario};
use gemini_harness::rng::Rng;
use serde_json::json;

use crate::lab::{Bench, Lab, SYNC_TIMEOUT};
use crate::offlining::sort_out_retries;
use crate::outside::HostState;
use crate::process;
use crate::MIB;

/// Memory that is always there: enough for everything that the guest does, so
/// that whatever is plugged can be unplugged.
const MEMORY: u64 = 896 * MIB;
/// DIMMs, of two of the guest's memory blocks each.
const DIMMS: usize = 2;
/// Slots of a DIMM, taken in turn: the guest may look at a slot that it emptied only
/// when it is filled again, and then leaves it unused ("Eject incomplete").
const SLOTS: usize = 8;
const DIMM: u64 = 256 * MIB;
/// Memory of virtio-mem, in steps of less than a memory block.
const PLUGGABLE: u64 = 384 * MIB;
const STEP: u64 = 6 * MIB;
/// Most memory in the balloon, and of each kind of work.
const BALLOON: u64 = 192 * MIB;
const FILL: u64 = 64 * MIB;
const FILLS: usize = 3;
const CHURN: u64 = 64 * MIB;

/// How long the guest may take to follow; emulated, on a machine with other work.
const FOLLOW: Duration = Duration::from_secs(60);
/// How long the kernel is left to itself with a size that it could not reach. A page
/// that somebody looks at for a moment is enough for that, and its virtio-mem driver
/// tries again after 50 s, then after 100 s (drivers/virtio/virtio_mem.c), or when it
/// is told another size.
const LEFT_ALONE: Duration = Duration::from_secs(10);
/// The daemon is at rest after so long without a change.
const REST: Duration = Duration::from_millis(700);
/// How long free memory is watched.
const LATER: Duration = Duration::from_secs(3);
/// What is nobody's at so many looks stays nobody's.
const LOOKS: u32 = 3;
const BETWEEN_LOOKS: Duration = Duration::from_secs(1);
const AGREE: Duration = Duration::from_secs(30);
/// Longest pause between two things that happen.
const PAUSE_MS: u64 = 400;

/// What can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Action {
    PlugDimm,
    UnplugDimm,
    Inflate,
    Deflate,
    Grow,
    Shrink,
    KillDaemon,
    RestartDaemon,
    Reset,
    Fill,
    Free,
}

impl Action {
    /// Each as often as it is to happen.
    const ALL: [Self; 23] = [
        Self::PlugDimm,
        Self::PlugDimm,
        Self::PlugDimm,
        Self::UnplugDimm,
        Self::UnplugDimm,
        Self::UnplugDimm,
        Self::Inflate,
        Self::Inflate,
        Self::Deflate,
        Self::Deflate,
        Self::Grow,
        Self::Grow,
        Self::Shrink,
        Self::Shrink,
        Self::KillDaemon,
        Self::KillDaemon,
        Self::RestartDaemon,
        Self::Reset,
        Self::Fill,
        Self::Fill,
        Self::Fill,
        Self::Free,
        Self::Free,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::PlugDimm => "dimms_plugged",
            Self::UnplugDimm => "dimms_unplugged",
            Self::Inflate => "balloon_inflated",
            Self::Deflate => "balloon_deflated",
            Self::Grow => "virtio_mem_grown",
            Self::Shrink => "virtio_mem_shrunk",
            Self::KillDaemon => "daemon_kills",
            Self::RestartDaemon => "daemon_restarts",
            Self::Reset => "resets",
            Self::Fill => "fills",
            Self::Free => "frees",
        }
    }
}

/// What was found.
#[derive(Default)]
struct Seen {
    actions: BTreeMap<Action, u32>,
    sequences: u32,
    bytes_lost: u64,
    map_differences: u32,
    /// Bytes under pages that the guest does not have, and that came back.
    without_owner: u64,
    /// The same of pages that never left.
    stayed: u64,
    /// Bytes that came back under blocks that nobody used.
    repopulated: u64,
    refused_because_of_us: u32,
    refused_anyway: u32,
    deaths: u32,
    complaints: usize,
    /// Times that the guest's kernel told that it had to try again to move a
    /// page out of what it sets offline.
    retries: usize,
    told_again: u32,
    /// Times that the driver reset the device, as it does where memory is to go
    /// offline and no daemon is there to answer for it.
    device_resets: usize,
    /// Files of memory that the daemon holds though QEMU does not.
    leftover_files: usize,
    /// Most bytes of the guest's free blocks that the host did not have.
    free_absent: u64,
}

/// The guest, and what it was asked to be.
struct Changing {
    lab: Lab,
    random: Rng,
    seen: Seen,
    log: u64,
    daemon_down: bool,
    dimms: BTreeSet<usize>,
    /// How often each was plugged.
    plugged: [usize; DIMMS],
    unplugging: BTreeSet<usize>,
    balloon: u64,
    pluggable: u64,
    fills: Vec<String>,
    filled: u64,
    churning: bool,
}

/// Goes through random sequences in one guest; as a `control`, without the
/// driver.
///
/// # Errors
/// If guest or QEMU end, or do not follow, which is no figure any more.
pub fn measure(bench: &Bench, seed: u64, quick: bool, control: bool) -> anyhow::Result<Scenario> {
    let sequences = if quick { 6 } else { 100 };
    let mut changing = Changing::start(bench, seed, !control)?;
    let start = Instant::now();
    for number in 0..sequences {
        if let Err(error) = changing.sequence() {
            // Nobody could look into it without what the guest says.
            changing.log = 0;
            if let Err(error) = changing.complaints() {
                eprintln!("no log of the guest: {error:#}");
            }
            return Err(error.context(format!("sequence {number}")));
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    changing.complaints()?;
    let seen = changing.seen;
    let mut scenario = Scenario::new("memory-changes");
    scenario.arg("guest_memory", MEMORY);
    scenario.arg("dimms", DIMMS);
    scenario.arg("dimm", DIMM);
    scenario.arg("virtio_mem", PLUGGABLE);
    scenario.arg("balloon", BALLOON);
    scenario.arg("control", control);
    let wanted = f64::from(sequences);
    scenario.figure("sequences", f64::from(seen.sequences), Bar::AtLeast(wanted));
    scenario.figure("bytes_lost", seen.bytes_lost as f64, Bar::AtMost(0.0));
    scenario.figure("map_differences", f64::from(seen.map_differences), Bar::AtMost(0.0));
    let refused = f64::from(seen.refused_because_of_us);
    scenario.figure("unplugs_refused_because_of_us", refused, Bar::AtMost(0.0));
    scenario.figure("unplugs_refused_anyway", f64::from(seen.refused_anyway), Bar::None);
    scenario.figure("bytes_without_owner", seen.without_owner as f64, Bar::AtMost(0.0));
    scenario.figure("bytes_that_stayed", seen.stayed as f64, Bar::None);
    scenario.figure("repopulated_bytes", seen.repopulated as f64, Bar::AtMost(0.0));
    scenario.figure("daemon_deaths", f64::from(seen.deaths), Bar::AtMost(0.0));
    scenario.figure("guest_complaints", seen.complaints as f64, Bar::AtMost(0.0));
    scenario.figure("migrations_retried", seen.retries as f64, Bar::None);
    scenario.figure("sizes_told_again", f64::from(seen.told_again), Bar::None);
    scenario.figure("device_resets", seen.device_resets as f64, Bar::None);
    scenario.figure("leftover_files", seen.leftover_files as f64, Bar::AtMost(0.0));
    scenario.figure("free_absent_bytes_max", seen.free_absent as f64, Bar::AtLeast(1.0));
    for action in Action::ALL.into_iter().collect::<BTreeSet<_>>() {
        let done = f64::from(seen.actions.get(&action).copied().unwrap_or(0));
        let bar = if quick { Bar::None } else { Bar::AtLeast(1.0) };
        scenario.figure(action.name(), done, bar);
    }
    scenario.figure("seconds", seconds, Bar::None);
    Ok(scenario)
}

impl Changing {
    fn start(bench: &Bench, seed: u64, driver: bool) -> anyhow::Result<Self> {
        let lab = Lab::start(bench, "bench-memory-changes", "gemini", |config| {
            config.driver = driver;
            config.memory = MEMORY;
            config.kernel_arguments.push("memhp_default_state=online_movable".into());
            let most = MEMORY + PLUGGABLE + DIMMS as u64 * DIMM;
            let arguments = [
                "-m".to_owned(),
                // Room to align each device in.
                format!(
                    "{}M,slots={},maxmem={}M",
                    MEMORY / MIB,
                    DIMMS * SLOTS,
                    (most + (4 << 30)) / MIB
                ),
                "-object".to_owned(),
                format!("memory-backend-memfd,id=plug,size={}M,share=on", PLUGGABLE / MIB),
                "-device".to_owned(),
                "virtio-mem-pci,id=vmem,memdev=plug,requested-size=0".to_owned(),
                "-device".to_owned(),
                "virtio-balloon-pci,free-page-reporting=on".to_owned(),
            ];
            config.qemu_arguments.extend(arguments);
        })?;
        let mut changing = Changing {
            lab,
            random: Rng::new(seed),
            seen: Seen::default(),
            log: 0,
            daemon_down: false,
            dimms: BTreeSet::new(),
            plugged: [0; DIMMS],
            unplugging: BTreeSet::new(),
            balloon: 0,
            pluggable: 0,
            fills: Vec::new(),
            filled: 0,
            churning: false,
        };
        changing.booted()?;
        Ok(changing)
    }

    /// What a guest needs after its boot.
    fn booted(&mut self) -> anyhow::Result<()> {
        self.lab.vm.guest.load_balloon()?;
        self.log = self.lab.vm.guest.log_position()?;
        Ok(())
    }

    fn sequence(&mut self) -> anyhow::Result<()> {
        let seed = self.random.below(u64::MAX);
        self.lab.vm.guest.start_churn("load", CHURN, seed)?;
        self.churning = true;
        let actions = 3 + self.random.below(6);
        let mut told = Vec::new();
        for _ in 0..actions {
            let action = self.random.pick(&Action::ALL);
            if self.act(action).with_context(|| format!("{action:?} after {told:?}"))? {
                *self.seen.actions.entry(action).or_default() += 1;
                told.push(action);
            }
            std::thread::sleep(Duration::from_millis(self.random.below(PAUSE_MS)));
        }
        self.settle().with_context(|| format!("after {told:?}"))?;
        self.check().with_context(|| format!("after {told:?}"))?;
        self.seen.sequences += 1;
        eprintln!("{}: {told:?}", self.seen.sequences);
        Ok(())
    }

    /// Does something; whether it was possible.
    fn act(&mut self, action: Action) -> anyhow::Result<bool> {
        match action {
            Action::PlugDimm => {
                let Some(dimm) = (0..DIMMS).find(|dimm| !self.dimms.contains(dimm)) else {
                    return Ok(false);
                };
                self.plug_dimm(dimm)?;
            }
            Action::UnplugDimm => {
                let Some(&dimm) = self.dimms.difference(&self.unplugging).next() else {
                    return Ok(false);
                };
                self.unplug_dimm(dimm)?;
            }
            Action::Inflate => {
                let more = self.random.below((BALLOON - self.balloon) / 4096 + 1) * 4096;
                self.balloon += more;
                self.set_balloon()?;
            }
            Action::Deflate => {
                self.balloon = self.random.below(self.balloon / 4096 + 1) * 4096;
                self.set_balloon()?;
            }
            Action::Grow => {
                let more = self.random.below((PLUGGABLE - self.pluggable) / STEP + 1) * STEP;
                return self.set_pluggable(self.pluggable + more);
            }
            Action::Shrink => {
                let less = self.random.below(self.pluggable / STEP + 1) * STEP;
                return self.set_pluggable(less);
            }
            Action::KillDaemon => {
                if self.daemon_down {
                    return Ok(false);
                }
                self.count_death()?;
                self.lab.kill_daemon()?;
                self.daemon_down = true;
            }
            Action::RestartDaemon => {
                if !self.daemon_down {
                    return Ok(false);
                }
                self.restart_daemon()?;
            }
            Action::Reset => self.reset()?,
            Action::Fill => {
                if self.fills.len() == FILLS {
                    return Ok(false);
                }
                self.filled += 1;
                let name = format!("fill{}", self.filled);
                let bytes = self.random.below(FILL) + 1;
                let pages = if self.random.chance(33) { PageSize::Base } else { PageSize::Huge };
                self.lab.vm.guest.fill(&name, bytes, self.filled, pages)?;
                self.fills.push(name);
            }
            Action::Free => {
                let Some(name) = self.fills.pop() else { return Ok(false) };
                self.verify(&name);
                self.lab.vm.guest.free(&name)?;
            }
        }
        Ok(true)
    }

    fn plug_dimm(&mut self, dimm: usize) -> anyhow::Result<()> {
        let backend = json!({
            "qom-type": "memory-backend-memfd",
            "id": format!("memory{dimm}"),
            "size": DIMM,
            "share": true,
        });
        self.lab.vm.qmp.execute("object-add", backend)?;
        let device = json!({
            "driver": "pc-dimm",
            "id": format!("dimm{dimm}"),
            "memdev": format!("memory{dimm}"),
            "slot": dimm * SLOTS + self.plugged[dimm] % SLOTS,
        });
        self.plugged[dimm] += 1;
        self.lab.vm.qmp.execute("device_add", device)?;
        self.dimms.insert(dimm);
        Ok(())
    }

    /// Asks the guest to give a DIMM up.
    fn unplug_dimm(&mut self, dimm: usize) -> anyhow::Result<()> {
        // The guest has to know it first.
        self.wait_dimm_online(dimm)?;
        self.lab.vm.qmp.take_events();
        self.lab.vm.qmp.execute("device_del", json!({"id": format!("dimm{dimm}")}))?;
        self.unplugging.insert(dimm);
        Ok(())
    }

    fn set_balloon(&mut self) -> anyhow::Result<()> {
        let dimms = self.lab.vm.qmp.memory_devices()?;
        let dimms = dimms.iter().filter(|device| !device.pluggable);
        let size: u64 = dimms.map(|device| device.gpa.end - device.gpa.start).sum();
        let value = MEMORY + size - self.balloon;
        self.lab.vm.qmp.execute("balloon", json!({"value": value})).map(drop)
    }

    fn set_pluggable(&mut self, bytes: u64) -> anyhow::Result<bool> {
        let arguments = json!({"path": "vmem", "property": "requested-size", "value": bytes});
        self.lab.vm.qmp.execute("qom-set", arguments)?;
        self.pluggable = bytes;
        Ok(true)
    }

    fn restart_daemon(&mut self) -> anyhow::Result<()> {
        self.lab.restart_daemon()?;
        self.daemon_down = false;
        Ok(())
    }

    fn count_death(&mut self) -> anyhow::Result<()> {
        if let Err(error) = self.lab.daemon.process.expect_running() {
            eprintln!("{error:#}");
            self.seen.deaths += 1;
            self.restart_daemon()?;
        }
        Ok(())
    }

    fn verify(&mut self, name: &str) {
        if let Err(error) = self.lab.vm.guest.verify(name) {
            eprintln!("{error:#}");
            self.seen.bytes_lost += 1;
        }
    }

    fn stop_churn(&mut self) {
        if !std::mem::take(&mut self.churning) {
            return;
        }
        if let Err(error) = self.lab.vm.guest.stop_churn("load") {
            eprintln!("{error:#}");
            self.seen.bytes_lost += 1;
        }
    }

    fn complaints(&mut self) -> anyhow::Result<()> {
        let complaints = self.lab.vm.guest.complaints(self.log)?;
        let reset = |text: &&str| text.ends_with("resetting the device");
        let texts = complaints.iter().map(|complaint| complaint.text.as_str());
        self.seen.device_resets += texts.clone().filter(reset).count();
        let (retries, others) = sort_out_retries(texts.filter(|text| !reset(text)));
        for other in &others {
            eprintln!("guest: {other}");
        }
        self.seen.retries += retries;
        self.seen.complaints += others.len();
        self.log = self.lab.vm.guest.log_position()?;
        Ok(())
    }

    fn reset(&mut self) -> anyhow::Result<()> {
        // A reset takes back what an unplug asks for.
        self.wait_unplugged()?;
        self.stop_churn();
        for name in std::mem::take(&mut self.fills) {
            self.verify(&name);
        }
        self.complaints()?;
        self.lab.vm.reset()?;
        self.booted()
    }

    /// Waits until everything that was asked for has happened.
    fn settle(&mut self) -> anyhow::Result<()> {
        self.stop_churn();
        if self.daemon_down {
            self.restart_daemon()?;
        }
        self.count_death()?;
        self.wait_synced()?;
        self.wait_unplugged()?;
        for dimm in self.dimms.clone() {
            self.wait_dimm_online(dimm)?;
        }
        self.wait_pluggable()?;
        let wanted = self.balloon / 4096;
        let guest = &self.lab.vm.guest;
        process::wait_for("the balloon has its size", FOLLOW, || {
            let text = guest.read_file("/proc/vmstat")?;
            let count = |name: &str| -> Option<u64> {
                text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
            };
            let inflated = count("balloon_inflate ").context("the kernel counts no balloon")?;
            let deflated = count("balloon_deflate ").context("the kernel counts no balloon")?;
            Ok((inflated - deflated == wanted).then_some(()))
        })
    }

    fn wait_dimm_online(&mut self, dimm: usize) -> anyhow::Result<()> {
        let id = format!("dimm{dimm}");
        let devices = self.lab.vm.qmp.memory_devices()?;
        let device = devices.iter().find(|device| device.id == id).context("it was plugged")?;
        let wanted = device.gpa.start >> 12..device.gpa.end >> 12;
        let guest = &self.lab.vm.guest;
        process::wait_for("the guest has its DIMM", FOLLOW, || {
            let pages = guest.pages()?;
            let online =
                |run: &PageRun| run.first <= wanted.start && run.first + run.count >= wanted.end;
            Ok(pages.online.iter().any(online).then_some(()))
        })
    }

    /// Waits until all DIMMs that are to go are gone.
    fn wait_unplugged(&mut self) -> anyhow::Result<()> {
        while let Some(&dimm) = self.unplugging.first() {
            if !self.follows_unplug(dimm)? {
                self.blame(|changing| {
                    changing.lab.vm.qmp.take_events();
                    let id = json!({"id": format!("dimm{dimm}")});
                    changing.lab.vm.qmp.execute("device_del", id)?;
                    changing.follows_unplug(dimm)
                })?;
                if self.has_dimm(dimm)? {
                    self.unplugging.remove(&dimm);
                    continue;
                }
            }
            let backend = json!({"id": format!("memory{dimm}")});
            self.lab.vm.qmp.execute("object-del", backend)?;
            self.unplugging.remove(&dimm);
            self.dimms.remove(&dimm);
        }
        Ok(())
    }

    fn has_dimm(&mut self, dimm: usize) -> anyhow::Result<bool> {
        let id = format!("dimm{dimm}");
        Ok(self.lab.vm.qmp.memory_devices()?.iter().any(|device| device.id == id))
    }

    /// Whether the guest gives a DIMM up; it may refuse, or not answer.
    fn follows_unplug(&mut self, dimm: usize) -> anyhow::Result<bool> {
        // ACPI 6.5, 6.3.5: the guest's answer to a request to eject.
        const EJECT: u64 = 3;
        const SUCCESS: u64 = 0;
        const IN_PROGRESS: u64 = 0x84;
        let deadline = Instant::now() + FOLLOW;
        while self.has_dimm(dimm)? {
            for event in self.lab.vm.qmp.take_events() {
                let info = &event["data"]["info"];
                let refused = event["event"] == "ACPI_DEVICE_OST"
                    && info["device"] == format!("dimm{dimm}")
                    && info["source"] == EJECT
                    && !matches!(info["status"].as_u64(), Some(SUCCESS | IN_PROGRESS));
                if refused {
                    eprintln!("the guest refuses to give up a DIMM: {info}");
                    return Ok(false);
                }
            }
            if Instant::now() > deadline {
                eprintln!("the guest does not give up a DIMM");
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(true)
    }

    fn wait_pluggable(&mut self) -> anyhow::Result<()> {
        if !self.follows_size()? && !self.blame(Self::follows_size)? {
            bail!("virtio-mem does not get its size, without the driver either");
        }
        Ok(())
    }

    fn follows_size(&mut self) -> anyhow::Result<bool> {
        let deadline = Instant::now() + FOLLOW;
        let mut tell_again = Instant::now() + LEFT_ALONE;
        loop {
            let size =
                self.lab.vm.qmp.execute("qom-get", json!({"path": "vmem", "property": "size"}))?;
            if size == self.pluggable {
                return Ok(true);
            }
            if Instant::now() > tell_again {
                tell_again = Instant::now() + LEFT_ALONE;
                self.seen.told_again += 1;
                let wanted = self.pluggable;
                // The same size again would be no news.
                self.set_pluggable(if wanted < PLUGGABLE { wanted + STEP } else { wanted - STEP })?;
                self.set_pluggable(wanted)?;
            }
            if Instant::now() > deadline {
                eprintln!("virtio-mem has {size} bytes instead of {}", self.pluggable);
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn wait_synced(&mut self) -> anyhow::Result<()> {
        if !self.lab.vm.config.driver {
            return Ok(());
        }
        self.lab.daemon.wait_synced(SYNC_TIMEOUT).map(drop)
    }

    /// Something was not given up: tries it again without the driver, to know
    /// whose fault it is. Whether it then is.
    fn blame(
        &mut self,
        again: impl FnOnce(&mut Self) -> anyhow::Result<bool>,
    ) -> anyhow::Result<bool> {
        let driver = self.lab.vm.config.driver;
        if driver {
            self.lab.vm.guest.unload_driver()?;
        }
        let given_up = again(self)?;
        if given_up && driver {
            self.seen.refused_because_of_us += 1;
        } else {
            self.seen.refused_anyway += 1;
        }
        if driver {
            self.lab.vm.guest.load_driver()?;
            self.wait_synced()?;
        }
        Ok(given_up)
    }

    /// Compares what everybody says.
    fn check(&mut self) -> anyhow::Result<()> {
        self.lab.find_memory()?;
        self.lab.wait_at_rest(REST, FOLLOW)?;
        if self.lab.vm.config.driver {
            if let Err(error) = self.lab.agree(AGREE) {
                eprintln!("{error:#}");
                self.seen.map_differences += 1;
            }
        }
        let view = self.lab.view()?;
        let without_owner = self.without_owner()?;
        if !without_owner.is_empty() {
            eprintln!("pages that the guest does not have: {without_owner:x?}");
            self.tell_map()?;
            let back = self.lab.memory.come_back(&without_owner).len() as u64 * 4096;
            self.seen.without_owner += back;
            self.seen.stayed += without_owner.len() as u64 * 4096 - back;
        }
        for name in self.fills.clone() {
            self.verify(&name);
        }
        let absent = view.free(HostState::Absent);
        let (before, looked) = (self.lab.daemon.status()?, Instant::now());
        self.seen.free_absent = self.seen.free_absent.max(absent.len() as u64 * crate::BLOCK);
        for state in [HostState::Base, HostState::Huge] {
            if state == HostState::Huge {
                // Huge pages come back whenever somebody makes them; base pages that came back
                // later the guest itself may have used.
                std::thread::sleep(LATER);
            }
            let mut back = self.lab.view()?.free(state);
            back.retain(|block| absent.contains(block));
            if state == HostState::Huge {
                self.wait_held(&mut back)?;
            }
            if !back.is_empty() {
                let memory = self.lab.memory.memory_in(&back)?;
                eprintln!("blocks that are {state:?} again, and free: {back:?}: {memory:x?}");
                let (after, passed) = (self.lab.daemon.status()?, looked.elapsed());
                eprintln!("the daemon {passed:?} before: {before:?}, and now: {after:?}");
                self.seen.repopulated += memory.iter().map(|r| r.end - r.start).sum::<u64>();
            }
        }
        self.count_files()
    }

    /// Pages that the host has and the guest does not, at every look: a page is the
    /// balloon's a moment before QEMU is told to drop it, also where the guest's kernel
    /// exchanges one for another while it compacts memory.
    fn without_owner(&self) -> anyhow::Result<BTreeSet<u64>> {
        let look = || {
            let pages = self.lab.vm.guest.pages()?;
            self.lab.memory.without_owner(&pages)
        };
        let mut without = look()?;
        for _ in 1..LOOKS {
            if without.is_empty() {
                break;
            }
            std::thread::sleep(BETWEEN_LOOKS);
            let now = look()?;
            without.retain(|page| now.contains(page));
        }
        Ok(without)
    }

    /// What the driver has made huge for its stock while it was free it holds
    /// soon: takes those blocks out.
    fn wait_held(&self, blocks: &mut BTreeSet<u64>) -> anyhow::Result<()> {
        if !self.lab.vm.config.driver {
            return Ok(());
        }
        let deadline = Instant::now() + AGREE;
        while !blocks.is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(200));
            for run in self.lab.vm.guest.driver_blocks()? {
                if run.guest == "booked" {
                    blocks.retain(|block| !(run.first..run.first + run.count).contains(block));
                }
            }
        }
        Ok(())
    }

    /// What there is to know of memory that came back: where the guest has
    /// memory, what the host has there, and what the driver asked for.
    fn tell_map(&mut self) -> anyhow::Result<()> {
        eprintln!("devices: {:?}", self.lab.vm.qmp.memory_devices()?);
        eprintln!("daemon: {:?}", self.lab.daemon.map()?.runs);
        if self.lab.vm.config.driver {
            for name in ["prepared", "renewed", "given_back", "returned_isolation"] {
                eprintln!("driver: {name} {}", self.lab.vm.guest.driver_number(name)?);
            }
        }
        Ok(())
    }

    /// Memory that QEMU has let go of must not live on in the daemon.
    fn count_files(&mut self) -> anyhow::Result<()> {
        let wanted = self.lab.memory.inodes()?;
        let held = memfds(self.lab.daemon.process.pid())?;
        ensure!(!held.is_empty(), "the daemon has no memory");
        let leftover = held.difference(&wanted).count();
        if leftover > 0 {
            eprintln!("the daemon holds {leftover} files that QEMU does not");
            self.seen.leftover_files += leftover;
        }
        Ok(())
    }
}

/// Inodes of the guest's memory that a process has open or mapped.
fn memfds(pid: u32) -> anyhow::Result<BTreeSet<u64>> {
    const NAME: &str = "memfd:memory-backend-memfd";
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let path = entry?.path();
        // One that was closed meanwhile is not held.
        let Ok(target) = fs::read_link(&path) else { continue };
        if target.to_string_lossy().contains(NAME) {
            found.insert(fs::metadata(&path)?.ino());
        }
    }
    for line in fs::read_to_string(format!("/proc/{pid}/maps"))?.lines() {
        if line.contains(NAME) {
            let inode = line.split_whitespace().nth(4).and_then(|inode| inode.parse().ok());
            found.insert(inode.context("a mapping has an inode")?);
        }
    }
    Ok(found)
}

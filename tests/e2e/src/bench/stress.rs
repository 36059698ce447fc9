//! Everything at once, for a long time, with a kernel that checks itself.
//!
//! The guest's own part is the program `stress` of the test guest. From outside
//! come deaths of the daemon and memory that is plugged and unplugged.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{bail, Context};
use gemini_guest::protocol::{Command, Message, Output};
use gemini_guest::stress::{Report, BEGINS, ENDS};
use gemini_harness::figures::{Bar, Scenario};
use gemini_harness::rng::Rng;
use serde_json::json;

use crate::daemon::{Daemon, DaemonConfig};
use crate::guest::Guest;
use crate::lab::{Bench, Place};
use crate::vm::{log_directory, Vm, VmConfig};
use crate::MIB;

/// Memory that is always there, on two nodes.
const MEMORY: u64 = 1536 * MIB;

/// Memory that can be plugged besides, all of it movable, in steps of this. All
/// of it is plugged when nothing is going on.
const PLUGGABLE: u64 = 512 * MIB;
const PLUG_STEP: u64 = 128 * MIB;

/// Disks for page cache and for swap.
const DISKS: [(&str, u64); 2] = [("cache", 128 * MIB), ("swap", 256 * MIB)];

/// The longest wait for the guest to come to rest and to answer, beside the
/// time that it works. Emulated, with all checks, on a machine with other work,
/// bringing swapped memory back takes minutes.
const AROUND: Duration = Duration::from_secs(900);

/// How often the guest's log is read.
const POLL: Duration = Duration::from_secs(5);

/// Timeouts of the kernel's own watchdogs. An emulated processor that checks
/// every access is about fifty times slower than a real one, and stands still
/// whenever the host has other work; a true deadlock outlasts these as well.
const WATCHDOGS: [&str; 4] = [
    "watchdog_thresh=60",
    "rcupdate.rcu_cpu_stall_timeout=120",
    "rcupdate.rcu_task_stall_timeout=300000",
    "workqueue.watchdog_thresh=240",
];
const HUNG_TASK: &str = "/proc/sys/kernel/hung_task_timeout_secs";
const HUNG_TASK_SECONDS: &str = "600";

/// What the driver lost if this much more memory is neither free nor accounted
/// for afterwards: less than one block. The checks of a debug kernel keep a
/// record of every call chain that they have seen, which grows for as long as
/// new ones come.
const LOST: u64 = 2 * MIB;
const LOST_DEBUG: u64 = 8 * MIB;

/// What was done to the guest from outside.
#[derive(Default)]
struct Outside {
    daemon_kills: u64,
    resizes: u64,
    refused_resizes: u64,
    /// Of the resizes, those that the guest had followed when the next came.
    reached: u64,
    wanted: u64,
}

/// Works on a guest for `duration`; as a `control`, without the driver.
///
/// # Errors
/// If guest, QEMU or daemon end, which is no figure any more.
pub fn measure(
    bench: &Bench,
    seed: u64,
    duration: Duration,
    control: bool,
) -> anyhow::Result<Scenario> {
    let debug = bench.assets.guest.release.ends_with("-debug");
    let place = Place::new("bench-stress")?;
    let daemon_config = DaemonConfig::new(&bench.assets.daemon, "gemini");
    let mut daemon = place.start(&daemon_config)?;
    let mut config = VmConfig::new("bench-stress", bench.accel).with_device(&place.socket());
    config.memory = MEMORY;
    config.nodes = 2;
    config.driver = false;
    config.boot_timeout = Duration::from_secs(300);
    config.qemu_arguments = devices(place.directory())?;
    config.kernel_arguments = WATCHDOGS.map(str::to_owned).to_vec();
    config.kernel_arguments.push("log_buf_len=32M".into());
    // Under page poisoning a page that nobody zeroed is seen at once.
    config.kernel_arguments.push("page_poison=1".into());
    config.kernel_arguments.push("memhp_default_state=online_movable".into());
    let mut vm = Vm::boot(&bench.assets, config)?;
    // Not every kernel has this watchdog; one that has it must be patient.
    vm.guest.shell(&format!("[ ! -e {HUNG_TASK} ] || echo {HUNG_TASK_SECONDS} > {HUNG_TASK}"))?;
    plug(&mut vm, PLUGGABLE)?;

    let mut log = Log::new()?;
    let mut command = format!("exec gemini-guest stress {} {seed}", duration.as_secs());
    if control {
        command += " control";
    }
    let pending = vm.guest.start::<Output>(Command::Exec { command })?;
    let mut outside = Outside::default();
    // What happens from outside, and when.
    let mut random = Rng::new(seed);
    let deadline = Instant::now() + duration + AROUND;
    let output = loop {
        if let Some(output) = pending.poll(POLL)? {
            break output;
        }
        if Instant::now() > deadline {
            log.read(&vm.guest)?;
            bail!("the guest does not come to rest\n{}", log.tail());
        }
        vm.process.expect_running()?;
        let at_work = log.read(&vm.guest)?;
        if let Some(oops) = log.found.splats.iter().find(|splat| splat.contains("Oops: ")) {
            bail!("the guest's kernel is broken from here on: {oops}\n{}", log.tail());
        }
        if at_work {
            disturb(&mut vm, &place, &mut daemon, &daemon_config, &mut random, &mut outside)?;
        } else if log.ended {
            plug(&mut vm, PLUGGABLE)?;
        }
    };
    log.read(&vm.guest)?;
    vm.expect_alive()?;
    if output.code != 0 {
        bail!("the guest's stress fails: {}\n{}", output.output, log.tail());
    }
    let line = output.output.lines().last().unwrap_or_default();
    let report: Report = serde_json::from_str(line)
        .with_context(|| format!("the guest's report has another form: {}", output.output))?;
    log.found.finish();
    log.show();
    let mut scenario = figures(&report, &outside, &log, debug);
    scenario.arg("control", control);
    Ok(scenario)
}

/// Arguments for disks and for memory that can be plugged.
fn devices(directory: &Path) -> anyhow::Result<Vec<String>> {
    let mut arguments: Vec<String> = Vec::new();
    let mut add = |words: [&str; 2]| arguments.extend(words.map(str::to_owned));
    for (name, bytes) in DISKS {
        let path = directory.join(name);
        File::create(&path)
            .and_then(|file| file.set_len(bytes))
            .with_context(|| format!("cannot make {}", path.display()))?;
        let drive = format!("file={},format=raw,if=none,id={name}", path.display());
        add(["-drive", &drive]);
        add(["-device", &format!("virtio-blk-pci,drive={name}")]);
    }
    add(["-m", &format!("{}M,maxmem={}M", MEMORY / MIB, (MEMORY + 2 * PLUGGABLE) / MIB)]);
    let backend = format!("memory-backend-memfd,id=plug,size={}M,share=on", PLUGGABLE / MIB);
    add(["-object", &backend]);
    add(["-device", "virtio-mem-pci,id=vmem,memdev=plug,node=1,requested-size=0"]);
    Ok(arguments)
}

/// Asks the guest to have `bytes` of the pluggable memory.
fn plug(vm: &mut Vm, bytes: u64) -> anyhow::Result<()> {
    let arguments = json!({"path": "vmem", "property": "requested-size", "value": bytes});
    vm.qmp.execute("qom-set", arguments).map(drop)
}

/// Bytes of the pluggable memory that the guest has.
fn plugged(vm: &mut Vm) -> anyhow::Result<u64> {
    let size = vm.qmp.execute("qom-get", json!({"path": "vmem", "property": "size"}))?;
    size.as_u64().with_context(|| format!("QEMU has plugged {size}"))
}

/// One thing from outside.
fn disturb(
    vm: &mut Vm,
    place: &Place,
    daemon: &mut Daemon,
    config: &DaemonConfig,
    random: &mut Rng,
    outside: &mut Outside,
) -> anyhow::Result<()> {
    match random.below(4) {
        0 => {
            daemon.process.kill()?;
            std::thread::sleep(Duration::from_millis(random.below(3000)));
            *daemon = place.start(config)?;
            outside.daemon_kills += 1;
        }
        1 => {
            outside.reached += u64::from(outside.resizes > 0 && plugged(vm)? == outside.wanted);
            // Never all of it away: to plug the first of it again Linux 6.12 needs a page for
            // its page tables, and where memory is full goes on without one (phys_pud_init
            // does not look at what alloc_low_page gives: an Oops).
            outside.wanted = (random.below(PLUGGABLE / PLUG_STEP) + 1) * PLUG_STEP;
            match plug(vm, outside.wanted) {
                Ok(()) => outside.resizes += 1,
                // While the guest has not answered the last one.
                Err(_) => outside.refused_resizes += 1,
            }
        }
        _ => daemon.process.expect_running()?,
    }
    Ok(())
}

fn figures(report: &Report, outside: &Outside, log: &Log, debug: bool) -> Scenario {
    let mut scenario = Scenario::new("stress");
    scenario.arg("seconds", report.seconds);
    scenario.arg("guest_memory", MEMORY);
    scenario.arg("pluggable_memory", PLUGGABLE);
    let sum = |of: fn(&gemini_guest::stress::Figures) -> u64| {
        report.kinds.values().map(of).sum::<u64>() as f64
    };
    scenario.figure("splats", log.found.splats.len() as f64, Bar::AtMost(0.0));
    scenario.figure("lock_reports_without_the_driver", log.found.foreign as f64, Bar::None);
    scenario.figure("wrong_pages", sum(|kind| kind.wrong), Bar::AtMost(0.0));
    scenario.figure("failed_workers", sum(|kind| kind.failed), Bar::AtMost(0.0));
    let (before, after) = (report.before, report.after);
    let lost = after.unaccounted as f64 - before.unaccounted as f64;
    let tolerance = if debug { LOST_DEBUG } else { LOST };
    scenario.figure("lost_mib", lost / MIB as f64, Bar::Below((tolerance / MIB) as f64));
    let held = after.held_blocks as f64 - before.held_blocks as f64;
    scenario.figure("blocks_left_behind", held, Bar::AtMost(0.0));
    let online = (after.total as f64 - before.total as f64) / MIB as f64;
    scenario.figure("memory_online_change_mib", online, Bar::AtMost(0.0));
    scenario.figure("free_before_mib", before.free as f64 / MIB as f64, Bar::None);
    scenario.figure("free_after_mib", after.free as f64 / MIB as f64, Bar::None);
    scenario.figure("daemon_kills", outside.daemon_kills as f64, Bar::AtLeast(1.0));
    scenario.figure("plug_requests", outside.resizes as f64, Bar::AtLeast(1.0));
    scenario.figure("plug_requests_refused", outside.refused_resizes as f64, Bar::None);
    scenario.figure("plug_requests_reached", outside.reached as f64, Bar::None);
    for (name, kind) in &report.kinds {
        // A stressor that does nothing would find nothing.
        scenario.figure(&format!("{name}_rounds"), kind.rounds as f64, Bar::AtLeast(1.0));
        let needed =
            if MUST_SUCCEED.contains(&name.as_str()) { Bar::AtLeast(1.0) } else { Bar::None };
        scenario.figure(&format!("{name}_done"), kind.done as f64, needed);
        scenario.figure(&format!("{name}_refused"), kind.refused as f64, Bar::None);
        scenario.figure(&format!("{name}_killed"), kind.killed as f64, Bar::None);
    }
    for (name, value) in &report.driver {
        scenario.figure(&format!("driver_{name}"), *value as f64, Bar::None);
    }
    scenario.figure("driver_warnings", log.found.warnings.len() as f64, Bar::None);
    scenario
}

/// Kinds of work that must have succeeded at least once.
const MUST_SUCCEED: [&str; 9] = [
    "memory",
    "disk",
    "compaction",
    "settings",
    "tracing",
    "hotplug",
    "cgroup_oom",
    "driver",
    "reload",
];

/// The guest's log, as far as it was read.
struct Log {
    /// Where all of it is kept.
    file: File,
    next: u64,
    begun: bool,
    ended: bool,
    last: Vec<String>,
    found: Findings,
}

/// What the messages say.
#[derive(Default)]
struct Findings {
    splats: Vec<String>,
    warnings: Vec<String>,
    /// A report on the order of locks that has not ended.
    report: Option<LockReport>,
    /// Such reports in which the driver does not occur.
    foreign: u64,
}

/// What lockdep says of locks that are taken in both orders, with the call
/// chains that took each of them.
///
/// Linux 6.12 has one of its own: a write to a memory block's `state` takes the
/// locks of memory hotplug under the file, virtio-mem removes that file under
/// them. A third lock keeps both apart, which lockdep does not know. After its
/// first report it is silent.
struct LockReport {
    title: String,
    ours: bool,
}

impl LockReport {
    const BEGINS: &str = "possible circular locking dependency";
    const ENDS: &str = "</TASK>";
    const OURS: &str = "[virtio_gemini]";
}

impl Log {
    /// From the boot on.
    fn new() -> anyhow::Result<Self> {
        let path = log_directory("bench-stress")?.join("kernel.log");
        let file =
            File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Log {
            file,
            next: 0,
            begun: false,
            ended: false,
            last: Vec::new(),
            found: Findings::default(),
        })
    }

    /// Reads what is new, and returns whether the guest is at work.
    fn read(&mut self, guest: &Guest) -> anyhow::Result<bool> {
        let new = guest.messages(self.next)?;
        self.next = new.next;
        for message in new.messages {
            writeln!(self.file, "{}", message.text)?;
            self.begun |= message.text.ends_with(BEGINS);
            self.ended |= message.text.ends_with(ENDS);
            self.found.judge(&message);
            self.last.push(message.text);
        }
        let surplus = self.last.len().saturating_sub(400);
        self.last.drain(..surplus);
        Ok(self.begun && !self.ended)
    }

    fn tail(&self) -> String {
        let from = self.last.len().saturating_sub(60);
        self.last[from..].join("\n")
    }

    /// What the driver warned of, each once.
    fn show(&self) {
        let mut warnings: Vec<&String> = self.found.warnings.iter().collect();
        warnings.sort();
        warnings.dedup();
        for warning in warnings {
            eprintln!("guest: {warning}");
        }
    }
}

impl Findings {
    fn judge(&mut self, message: &Message) {
        let text = &message.text;
        if let Some(report) = &mut self.report {
            report.ours |= text.contains(LockReport::OURS);
            if is_splat(message) {
                self.splat(text.clone());
            } else if text.contains(LockReport::ENDS) {
                self.end_report();
            }
        } else if is_splat(message) && text.contains(LockReport::BEGINS) {
            self.report = Some(LockReport { title: text.clone(), ours: false });
        } else if is_splat(message) {
            self.splat(text.clone());
        } else if is_warning(message) {
            self.warnings.push(text.clone());
        }
    }

    fn end_report(&mut self) {
        match self.report.take() {
            Some(report) if report.ours => self.splat(report.title),
            Some(_) => self.foreign += 1,
            None => {}
        }
    }

    fn splat(&mut self, text: String) {
        eprintln!("guest: {text}");
        self.splats.push(text);
    }

    /// Nothing more comes: a report that did not end counts.
    fn finish(&mut self) {
        if let Some(report) = self.report.take() {
            self.splat(report.title);
        }
    }
}

/// How messages of the driver and of the test begin.
const OURS: [&str; 2] = ["virtio_gemini", "gemini-guest"];

/// Whether a kernel message says that something is broken. Under stress the
/// kernel has much to say that only tells of stress: processes killed for lack
/// of memory, with call traces, allocations that failed, memory that cannot be
/// set offline.
fn is_splat(message: &Message) -> bool {
    const SPLATS: [&str; 24] = [
        "BUG:",
        "BUG at",
        "WARNING:",
        "KASAN",
        "Oops",
        "general protection",
        "unable to handle",
        "blocked for more than",
        "detected stall",
        "self-detected stall",
        "rcu_tasks detected",
        "soft lockup",
        "hard LOCKUP",
        "workqueue lockup",
        "possible recursive locking",
        "possible circular locking",
        "possible irq lock inversion",
        "inconsistent lock state",
        "suspicious RCU usage",
        "list_add corruption",
        "list_del corruption",
        "pagealloc: ",
        "refcount_t:",
        "ODEBUG:",
    ];
    const MORE: [&str; 3] = ["UBSAN:", "use-after-free", "Kernel panic"];
    /// Less urgent than this the kernel tells, of its checks among others.
    const INFO: u8 = 6;
    let told = |text: &&str| message.level < INFO && message.text.contains(*text);
    SPLATS.iter().any(told)
        || MORE.iter().any(told)
        || (message.level <= 3 && OURS.iter().any(|prefix| message.text.starts_with(prefix)))
}

/// Whether the driver, or the test itself, warns of something else than that a
/// process lacks memory, or that the driver is not of the kernel's own tree.
fn is_warning(message: &Message) -> bool {
    const EXPECTED: [&str; 2] = ["invoked oom-killer", "out-of-tree module"];
    message.level == 4
        && !EXPECTED.iter().any(|text| message.text.contains(text))
        && OURS.iter().any(|prefix| message.text.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(level: u8, text: &str) -> Message {
        Message { level, text: text.into() }
    }

    #[test]
    fn lock_reports_count_unless_the_driver_is_not_in_them() {
        let warning = message(4, "WARNING: possible circular locking dependency detected");
        let chain = |function: &str| message(4, &format!("       {function}+0x1/0x2"));
        let mut log = Findings::default();
        for line in [&warning, &chain("virtio_mem_run_wq"), &message(4, " </TASK>")] {
            log.judge(line);
        }
        assert_eq!((log.splats.len(), log.foreign), (0, 1));
        let ours = message(4, "       gemini_remove+0x1/0x2 [virtio_gemini]");
        for line in [&warning, &ours, &message(4, " </TASK>"), &warning, &chain("vfs_write")] {
            log.judge(line);
        }
        log.finish();
        assert_eq!((log.splats.len(), log.foreign), (2, 1));
    }

    #[test]
    fn splats_are_told_from_ordinary_trouble() {
        assert!(is_splat(&message(1, "BUG: KASAN: slab-use-after-free in gemini_hold_take")));
        assert!(is_splat(&message(4, "WARNING: possible circular locking dependency detected")));
        assert!(is_splat(&message(3, "gemini-guest: memory: Wrong { page: 1 }")));
        assert!(!is_splat(&message(6, "rcu: RCU callback double-/use-after-free debug is on")));
        assert!(!is_splat(&message(3, "Out of memory: Killed process 99 (gemini-guest)")));
        assert!(!is_splat(&message(4, "page allocation failure: order:9")));
        assert!(!is_splat(&message(4, "virtio_gemini virtio3: placement off: a tracer is there")));
        assert!(is_warning(&message(4, "virtio_gemini virtio3: placement off: a tracer is there")));
    }
}

//! The agent against processes on this machine's own kernel. It is a guest like
//! any other: what is tested here needs no host below.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

const BLOCK: usize = 2 << 20;
const PAGE: usize = 4096;
const BLOCKS: usize = 8;

/// Whether the test can run here; says so if not.
fn possible(test: &str) -> bool {
    const THP: &str = "/sys/kernel/mm/transparent_hugepage";
    let setting = |name: &str| fs::read_to_string(format!("{THP}/{name}"));
    // The size's own setting is there from Linux 6.8 on.
    let off = [setting("enabled"), setting("hugepages-2048kB/enabled")]
        .iter()
        .flatten()
        .any(|text| text.contains("[never]"));
    let why = if !unsafe_calls::is_root() {
        "it needs root"
    } else if off || setting("enabled").is_err() {
        "huge pages are off"
    } else {
        return true;
    };
    eprintln!("{test} is skipped: {why}");
    false
}

/// Runs `test`, again where it fails while the kernel's own promoter was at
/// work: that takes what the test is about.
fn undisturbed(test: impl Fn()) {
    const COUNTER: &str = "/sys/kernel/mm/transparent_hugepage/khugepaged/pages_collapsed";
    for _ in 0..5 {
        let before = fs::read_to_string(COUNTER).expect("a counter");
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(&test));
        let disturbed = fs::read_to_string(COUNTER).expect("a counter") != before;
        match result {
            Ok(()) => return,
            Err(_) if disturbed => eprintln!("khugepaged was at work: once more"),
            Err(cause) => std::panic::resume_unwind(cause),
        }
    }
    panic!("khugepaged is at work all the time");
}

/// How a target's memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// That many pages of each block are written, and it asks for huge pages.
    Filled(usize),
    /// The first half is written, the second one only read.
    HalfZero,
    /// MADV_NOHUGEPAGE.
    Declined,
    /// PR_SET_THP_DISABLE.
    DeclinedByProcess,
    /// A second process has the same pages.
    Forked,
    /// A userfaultfd is registered for it.
    Watched,
    /// mlock.
    Locked,
}

/// A process whose memory the agent is let loose on.
struct Target {
    pid: i32,
    channel: UnixStream,
}

impl Target {
    fn start(kind: Kind) -> Self {
        let (mut ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        let pid = unsafe_calls::fork(|| {
            let memory = unsafe_calls::prepare(kind);
            serve(&theirs, kind, memory);
        });
        // So that a target that ends early is seen to.
        drop(theirs);
        ours.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
        let mut ready = [0];
        ours.read_exact(&mut ready).expect("the target prepares its memory");
        Target { pid, channel: ours }
    }

    /// Whether its memory is what it wrote.
    fn verify(&mut self) -> bool {
        self.channel.write_all(b"v").expect("the target listens");
        let mut answer = [0];
        self.channel.read_exact(&mut answer).expect("the target answers");
        answer == *b"y"
    }

    /// One pass over this process alone.
    fn promote(&self, arguments: &[&str]) -> Value {
        let output = Command::new(env!("CARGO_BIN_EXE_gemini-guestd"))
            .args(["--once", "--json", "--cpu-share", "100", "--rate", "4G"])
            .args(["--pid", &self.pid.to_string()])
            .args(arguments)
            .output()
            .expect("the agent runs");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_str(&text).expect("a report")
    }

    /// Blocks that huge pages map, as the kernel tells it.
    fn huge(&self) -> usize {
        let smaps = fs::read_to_string(format!("/proc/{}/smaps_rollup", self.pid));
        let smaps = smaps.expect("the target lives");
        let line = smaps.lines().find_map(|line| line.strip_prefix("AnonHugePages:"));
        let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<usize>().ok());
        kilobytes.expect("a number") * 1024 / BLOCK
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        unsafe_calls::end(self.pid);
    }
}

fn serve(mut channel: &UnixStream, kind: Kind, memory: &[u8]) {
    let mut byte = *b"r";
    while channel.write_all(&byte).is_ok() && channel.read_exact(&mut byte).is_ok() {
        let good = (0..BLOCKS * BLOCK).step_by(PAGE / 4).all(|at| memory[at] == pattern(kind, at));
        byte = if good { *b"y" } else { *b"n" };
    }
}

/// Byte number `at` of a target's memory.
fn pattern(kind: Kind, at: usize) -> u8 {
    let page = at % BLOCK / PAGE;
    let written = match kind {
        Kind::Filled(pages) => page < pages,
        Kind::HalfZero => page < 256,
        _ => true,
    };
    if written {
        u8::try_from((at / PAGE * 7 + at) % 251 + 1).unwrap_or(1)
    } else {
        0
    }
}

fn skipped(report: &Value, reason: &str) -> usize {
    usize::try_from(report["skipped"][reason].as_u64().unwrap_or(0)).expect("a small number")
}

#[test]
fn full_ranges_are_promoted_and_keep_their_contents() {
    if !possible("full_ranges_are_promoted_and_keep_their_contents") {
        return;
    }
    undisturbed(promote_full_ranges);
}

fn promote_full_ranges() {
    let mut target = Target::start(Kind::Filled(512));
    let planned = target.promote(&["--dry-run"]);
    assert_eq!(planned["ranges"].as_array().map(Vec::len), Some(BLOCKS), "{planned}");
    assert_eq!((target.huge(), &planned["promoted"]), (0, &Value::from(0)), "{planned}");

    let report = target.promote(&[]);
    assert_eq!(report["promoted"], BLOCKS, "{report}");
    assert_eq!(target.huge(), BLOCKS);
    assert!(target.verify());

    let again = target.promote(&[]);
    assert_eq!(again["ranges"].as_array().map(Vec::len), Some(0), "{again}");
}

#[test]
fn missing_pages_are_filled_in_unless_memory_is_fragmented() {
    if !possible("missing_pages_are_filled_in_unless_memory_is_fragmented") {
        return;
    }
    undisturbed(|| promote_half_full_ranges(Kind::Filled(256)));
    undisturbed(|| promote_half_full_ranges(Kind::HalfZero));
}

fn promote_half_full_ranges(kind: Kind) {
    let mut target = Target::start(kind);
    let report = target.promote(&[]);
    if report["fmfi"].as_f64().expect("a number") <= 0.5 {
        assert_eq!(report["promoted"], BLOCKS, "{kind:?}: {report}");
        assert_eq!(target.huge(), BLOCKS);
    } else {
        assert!(skipped(&report, "fragmented") >= BLOCKS, "{kind:?}: {report}");
        assert_eq!(target.huge(), 0);
    }
    assert!(target.verify(), "{kind:?}");
}

/// What `kind` is left alone for.
fn assert_left_alone(kind: Kind, reason: &str) {
    let mut target = Target::start(kind);
    let report = target.promote(&[]);
    assert_eq!(report["ranges"].as_array().map(Vec::len), Some(0), "{kind:?}: {report}");
    // The target has its parent's memory, too.
    assert!(skipped(&report, reason) >= BLOCKS, "{kind:?}: {report}");
    assert_eq!(target.huge(), 0, "{kind:?}: {report}");
    assert!(target.verify(), "{kind:?}");
}

#[test]
fn what_must_not_be_promoted_is_left_alone() {
    if !possible("what_must_not_be_promoted_is_left_alone") {
        return;
    }
    undisturbed(|| assert_left_alone(Kind::Filled(255), "sparse"));
    undisturbed(|| assert_left_alone(Kind::Declined, "opted_out"));
    undisturbed(|| assert_left_alone(Kind::Forked, "shared"));
    undisturbed(|| assert_left_alone(Kind::Watched, "userfaultfd"));
    undisturbed(|| assert_left_alone(Kind::Locked, "special"));
}

#[test]
fn process_that_declined_huge_pages_is_left_alone() {
    if !possible("process_that_declined_huge_pages_is_left_alone") {
        return;
    }
    let target = Target::start(Kind::DeclinedByProcess);
    let report = target.promote(&[]);
    assert_eq!(report["opted_out_processes"], 1, "{report}");
    assert_eq!((target.huge(), &report["promoted"]), (0, &Value::from(0)), "{report}");
}

#[test]
fn rate_is_kept() {
    if !possible("rate_is_kept") {
        return;
    }
    undisturbed(promote_slowly);
}

fn promote_slowly() {
    let target = Target::start(Kind::Filled(512));
    let output = Command::new(env!("CARGO_BIN_EXE_gemini-guestd"))
        .args(["--once", "--json", "--rate", "8M", "--pid", &target.pid.to_string()])
        .output()
        .expect("the agent runs");
    let report: Value = serde_json::from_slice(&output.stdout).expect("a report");
    assert_eq!(report["promoted"], BLOCKS, "{report}");
    // 16 MiB at 8 MiB a second, less what little may be owed.
    assert!(report["seconds"].as_f64() >= Some(1.7), "{report}");
}

#[test]
fn process_that_is_gone_is_no_error() {
    let mut child = Command::new("true").spawn().expect("a process");
    let pid = child.id().to_string();
    child.wait().expect("an exit code");
    let output = Command::new(env!("CARGO_BIN_EXE_gemini-guestd"))
        .args(["--once", "--json", "--pid", &pid])
        .output()
        .expect("the agent runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// What no safe interface offers.
mod unsafe_calls {
    use super::{pattern, Kind, BLOCK, BLOCKS, PAGE};

    const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
    const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
    const UFFD_API: u64 = 0xaa;
    const REGISTER_MODE_MISSING: u64 = 1;

    pub fn is_root() -> bool {
        // SAFETY: the call takes nothing.
        unsafe { libc::geteuid() == 0 }
    }

    /// Runs `child` in a new process, and returns its number.
    pub fn fork(child: impl FnOnce()) -> i32 {
        // SAFETY: the child makes system calls and touches memory that it maps
        // itself; it takes no lock that another thread might hold.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child));
            // SAFETY: ends the process; nothing of the parent's is run.
            unsafe { libc::_exit(i32::from(result.is_err())) };
        }
        assert!(pid > 0, "{}", std::io::Error::last_os_error());
        pid
    }

    pub fn end(pid: i32) {
        // SAFETY: the process is a child that was not waited for yet.
        unsafe {
            libc::kill(pid, libc::SIGKILL);
            libc::waitpid(pid, std::ptr::null_mut(), 0);
        }
    }

    fn check(result: libc::c_int) {
        assert!(result >= 0, "{}", std::io::Error::last_os_error());
    }

    /// Maps and fills the memory of a target of `kind`.
    pub fn prepare(kind: Kind) -> &'static [u8] {
        let length = BLOCKS * BLOCK;
        // SAFETY: a new mapping, larger than needed by one block so that the
        // aligned part lies inside; it stays until the process ends.
        let memory = unsafe {
            let mapping = libc::mmap(
                std::ptr::null_mut(),
                length + BLOCK,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            assert!(mapping != libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
            let mapping = mapping.cast::<u8>();
            std::slice::from_raw_parts_mut(mapping.add(mapping.align_offset(BLOCK)), length)
        };
        let start = memory.as_mut_ptr().cast::<libc::c_void>();
        // SAFETY: advice on that mapping keeps what is in it.
        let advise = |advice| check(unsafe { libc::madvise(start, length, advice) });
        // Base pages at first, whatever the system's setting.
        advise(libc::MADV_NOHUGEPAGE);
        for at in (0..length).step_by(PAGE / 4) {
            let byte = pattern(kind, at);
            if byte != 0 {
                memory[at] = byte;
            } else if kind == Kind::HalfZero {
                std::hint::black_box(memory[at]);
            }
        }
        if kind != Kind::Declined {
            advise(libc::MADV_HUGEPAGE);
        }
        match kind {
            Kind::DeclinedByProcess => {
                let none: libc::c_ulong = 0;
                // SAFETY: the call takes numbers.
                check(unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1_u64, none, none, none) });
            }
            Kind::Forked => {
                // SAFETY: the second process only waits for its end.
                let second = unsafe { libc::fork() };
                if second == 0 {
                    // SAFETY: these calls take numbers; it ends with its parent.
                    unsafe {
                        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                        libc::pause();
                        libc::_exit(0);
                    }
                }
                check(second);
            }
            Kind::Watched => watch(start as u64, length as u64),
            // SAFETY: the range is mapped.
            Kind::Locked => check(unsafe { libc::mlock(start, length) }),
            Kind::Filled(_) | Kind::HalfZero | Kind::Declined => {}
        }
        memory
    }

    /// Registers a userfaultfd, which stays open.
    fn watch(start: u64, length: u64) {
        let mut api = [UFFD_API, 0, 0];
        let mut register = [start, length, REGISTER_MODE_MISSING, 0];
        // SAFETY: both structs of linux/userfaultfd.h are made of words like
        // these, and the kernel fills the last ones.
        unsafe {
            let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC);
            let fd = libc::c_int::try_from(fd).unwrap_or(-1);
            check(fd);
            check(libc::ioctl(fd, UFFDIO_API, api.as_mut_ptr()));
            check(libc::ioctl(fd, UFFDIO_REGISTER, register.as_mut_ptr()));
        }
    }
}

//! Real processes for the tests of `backing`: one plays the VMM, one, where rights matter, the
//! daemon. Both are this test program, started again.
//!
//! Every test file that uses this has a test named `helper_process` that calls [`child::serve`];
//! it does nothing unless it was started as a helper.

// Each test program uses another part of this.
#![allow(dead_code)]
#![allow(clippy::unwrap_used)] // a test that cannot go on must fail

pub mod attempts;
pub mod child;
pub mod host;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use vhost_device_gemini::backing::{
    Collapsed, Holes, HostRun, HostState, Memory, Refusal, RegionDesc,
};

/// Size of a block.
pub const BLOCK: u64 = 2 << 20;
/// log2 of it.
pub const SHIFT: u32 = 21;
/// Size of a base page.
pub const PAGE: u64 = 4096;
/// Base pages of a block, as `HostRun` counts them.
pub const PAGES: u32 = 512;

/// A memfd of `len` bytes; `flags` beyond close-on-exec.
pub fn memfd(len: u64, flags: libc::c_uint) -> File {
    // SAFETY: the name is a valid C string.
    let fd = unsafe { libc::memfd_create(c"gemini-test".as_ptr(), libc::MFD_CLOEXEC | flags) };
    assert!(fd >= 0, "memfd_create: {}", std::io::Error::last_os_error());
    // SAFETY: the descriptor was made for us just now.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(len).unwrap();
    file
}

/// Takes the memory of a range of a file away, as a VMM does for a balloon.
pub fn punch(file: &File, from: u64, len: u64) {
    let (from, len) = (i64::try_from(from).unwrap(), i64::try_from(len).unwrap());
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: takes no pointers.
    let result = unsafe { libc::fallocate64(file.as_raw_fd(), mode, from, len) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// A region of the whole file at guest address 0.
pub fn whole(file: &File) -> RegionDesc {
    let size = file.metadata().unwrap().len();
    RegionDesc { guest_addr: 0, size, file: file.try_clone().unwrap(), file_offset: 0 }
}

/// The memory of one region, the whole file.
pub fn memory(file: &File) -> Memory {
    Memory::new(vec![whole(file)], SHIFT).unwrap()
}

/// Codes of the findings.
pub fn codes(memory: &Memory) -> Vec<&'static str> {
    memory.findings().iter().map(|finding| finding.code).collect()
}

/// Looks at blocks.
pub fn scan(memory: &Memory, first: u64, count: u64) -> Vec<HostRun> {
    let mut runs = Vec::new();
    memory.scan(first, count, &mut runs).unwrap();
    runs
}

/// Looks at one block.
pub fn state(memory: &Memory, block: u64) -> HostState {
    scan(memory, block, 1)[0].state
}

/// How a block was made huge, or why not.
pub type Outcome = Result<Collapsed, Refusal>;

/// Collapses blocks, and returns the results in order of blocks.
pub fn collapse(memory: &Memory, first: u64, count: u64) -> Vec<Outcome> {
    let mut results = Vec::new();
    memory.collapse(first, count, Holes::Fill, &mut results);
    let blocks: Vec<u64> = results.iter().map(|(block, _)| *block).collect();
    assert_eq!(blocks, (first..first + count).collect::<Vec<_>>(), "one result for each block");
    let again = |block| {
        let mut result = Vec::new();
        memory.collapse(block, 1, Holes::Fill, &mut result);
        result[0].1
    };
    results.into_iter().map(|(block, result)| patiently(result, || again(block))).collect()
}

/// Populates a block.
pub fn populate(memory: &Memory, block: u64) -> Outcome {
    let once = || {
        let mut results = Vec::new();
        memory.populate(block, 1, u64::MAX, &mut results);
        results[0].1
    };
    match once() {
        // It holds its first page by now, or is huge: khugepaged, which a first look at a process
        // wakes up where faults give huge pages, takes a block with one page, too.
        Err(Refusal::Again) => match patiently(Err(Refusal::Again), once) {
            Ok(Collapsed::Copied { bytes: PAGE } | Collapsed::AlreadyHuge) => {
                Ok(Collapsed::Populated)
            }
            other => other,
        },
        other => other,
    }
}

/// Repeats what was refused because somebody held a page at that moment: on a busy machine that
/// is anybody, and ordinary.
fn patiently(mut result: Outcome, again: impl Fn() -> Outcome) -> Outcome {
    for _ in 0..100 {
        if result != Err(Refusal::Again) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
        result = again();
    }
    result
}

/// A run, for comparison.
pub fn run(first: u64, count: u32, state: HostState, resident: u32) -> HostRun {
    HostRun { first, count, state, resident }
}

/// A helper process; it ends with this.
pub struct Child {
    process: std::process::Child,
    channel: BufReader<UnixStream>,
}

impl Child {
    /// Starts a helper that has `file`.
    pub fn spawn(file: &File) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let process = Command::new(std::env::current_exe().unwrap())
            .args(["helper_process", "--exact", "--nocapture", "--test-threads=1"])
            .env(child::ROLE, format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()))
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut child = Self { process, channel: BufReader::new(ours) };
        assert_eq!(child.ask("hello"), "hello");
        child
    }

    /// A VMM that maps all of `file`, aligned and shared.
    pub fn vmm(file: &File) -> Self {
        let mut child = Self::spawn(file);
        let len = file.metadata().unwrap().len();
        child.ask(&format!("map 0 {len} 0 shared"));
        child
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    fn answer(&mut self, command: &str) -> String {
        writeln!(self.channel.get_mut(), "{command}").unwrap();
        let mut answer = String::new();
        self.channel.read_line(&mut answer).unwrap();
        answer.trim_end().to_owned()
    }

    /// The signal of which it dies when it has a command done; its answer if it does not.
    pub fn dies_of(&mut self, command: &str) -> Result<i32, String> {
        match self.answer(command) {
            answer if !answer.is_empty() => Err(answer),
            _ => Ok(self.process.wait().unwrap().signal().unwrap()),
        }
    }

    /// Has a command done; its answer.
    pub fn ask(&mut self, command: &str) -> String {
        let answer = self.answer(command);
        assert!(!answer.is_empty(), "the helper died of {command:?}");
        assert!(!answer.starts_with("error"), "{command:?}: {answer}");
        answer
    }

    /// The same, with a number for an answer.
    pub fn number(&mut self, command: &str) -> u64 {
        self.ask(command).parse().unwrap()
    }

    /// Stores a pattern into pages [page, page + count) of a block.
    pub fn fill(&mut self, block: u64, page: u64, count: u64) {
        self.ask(&format!("fill {} {}", block * BLOCK + page * PAGE, count * PAGE));
    }

    /// Whether pages of a block hold the pattern that [`Child::fill`] stored.
    pub fn is_filled(&mut self, block: u64, page: u64, count: u64) -> bool {
        self.ask(&format!("filled {} {}", block * BLOCK + page * PAGE, count * PAGE)) == "true"
    }

    /// Whether pages of a block are zero. Touches them.
    pub fn is_zero(&mut self, block: u64, page: u64, count: u64) -> bool {
        self.ask(&format!("zero {} {}", block * BLOCK + page * PAGE, count * PAGE)) == "true"
    }

    /// Blocks that it maps as huge pages, by smaps: not the way the daemon asks.
    pub fn huge_blocks(&mut self) -> u64 {
        self.number("huge") / BLOCK
    }

    /// Base pages of a block that are in memory, by mincore: not the way the daemon asks.
    pub fn resident(&mut self, block: u64) -> u64 {
        self.number(&format!("resident {} {BLOCK}", block * BLOCK))
    }

    /// Ends it as an accident would, and waits for that.
    pub fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // It may be dead already, which is what we want.
        if self.process.try_wait().is_ok_and(|status| status.is_none()) {
            self.kill();
        }
    }
}

//! What host and guest say to each other on the channel.
//!
//! The host writes one [`Request`] a line, the guest answers with one
//! [`Answer`] a line. Requests run at the same time; answers carry the number
//! of their request and come in any order.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Serial number of the drive with the workloads' image.
pub const IMAGE_SERIAL: &str = "gemini-workloads";

/// Serial number of the drive that workloads keep files on.
pub const SCRATCH_SERIAL: &str = "gemini-scratch";

/// Name of the virtio-serial port that carries the channel.
pub const PORT_NAME: &str = "gemini.channel";

/// Where the initramfs keeps the driver.
pub const DRIVER_PATH: &str = "/lib/gemini/virtio_gemini.ko";

/// The driver's name as a module.
pub const DRIVER_NAME: &str = "virtio_gemini";

/// One request of the host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the host; the answer repeats it.
    pub id: u64,
    /// What is to be done.
    #[serde(flatten)]
    pub command: Command,
}

/// One answer of the guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// The request's number; 0 where the request could not be read.
    pub id: u64,
    /// The command's result, where it succeeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ok: Option<Value>,
    /// What went wrong, where it did not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Which page size the guest kernel is asked to use for a workload's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PageSize {
    /// `MADV_HUGEPAGE`.
    Huge,
    /// `MADV_NOHUGEPAGE`.
    Base,
    /// No advice: the system's setting decides.
    System,
}

/// How a workload's huge pages are broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Break {
    /// The kernel splits the huge page into base pages, contents kept
    /// (`split_huge_pages` of debugfs).
    Split,
    /// The second half is dropped (`MADV_DONTNEED`); the kernel splits the rest
    /// when it wants the memory.
    DropHalf,
    /// Of every 64 base pages all but the first eight are dropped likewise.
    DropScattered,
    /// The second half becomes read-only: two mappings of base pages, while the
    /// page itself stays whole.
    ProtectHalf,
}

/// What the host can ask for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "snake_case")]
pub enum Command {
    /// Is the agent there? Answered by [`Pong`].
    Ping,
    /// Runs a shell command. Answered by [`Output`].
    Exec {
        /// Given to `sh -c`.
        command: String,
    },
    /// Loads a kernel module from a file. Answered by [`Elapsed`].
    LoadModule {
        /// The module's file.
        path: String,
        /// `name=value` words, or nothing.
        #[serde(default)]
        parameters: String,
    },
    /// Unloads a kernel module. Answered by [`Elapsed`].
    UnloadModule {
        /// The module's name.
        name: String,
    },
    /// Maps memory and fills it with a pattern. Answered by [`Filled`].
    Fill {
        /// Names the memory in later commands; must be new.
        name: String,
        /// Size in bytes, rounded up to whole 2 MiB.
        bytes: u64,
        /// Seed of the pattern.
        seed: u64,
        /// What the kernel is told about huge pages.
        pages: PageSize,
    },
    /// As [`Command::Fill`], in shared memory. Answered by [`Filled`].
    FillShared {
        /// Names the memory in later commands; must be new.
        name: String,
        /// Size in bytes, rounded up to whole 2 MiB.
        bytes: u64,
        /// Seed of the pattern.
        seed: u64,
        /// What the kernel is told about huge pages.
        pages: PageSize,
    },
    /// Maps new memory, touches it, looks for words that are not zero, and
    /// unmaps it. Answered by [`Verified`].
    CountDirty {
        /// Size in bytes, rounded up to whole 2 MiB.
        bytes: u64,
        /// What the kernel is told about huge pages.
        pages: PageSize,
    },
    /// Makes a workload's memory huge (`MADV_COLLAPSE`). Answered by null.
    Collapse {
        /// The memory.
        name: String,
    },
    /// The blocks behind a workload's memory. Answered by a list with a number
    /// or null for every 2 MiB of it.
    BlocksOf {
        /// The memory.
        name: String,
    },
    /// Reads words of a workload's memory at random. Answered by [`Elapsed`].
    Read {
        /// The memory.
        name: String,
        /// Number of reads.
        reads: u64,
        /// Seed of the order.
        seed: u64,
    },
    /// Compares all of a workload's memory with its pattern. Answered by
    /// [`Verified`].
    Verify {
        /// The memory.
        name: String,
    },
    /// Breaks huge pages of a workload. Answered by [`Broken`].
    Break {
        /// The memory.
        name: String,
        /// How.
        how: Break,
        /// Every how many'th 2 MiB of the memory; 1 is all of it.
        every: u64,
    },
    /// Unmaps a workload's memory. Answered by null.
    Free {
        /// The memory.
        name: String,
    },
    /// Starts to map, fill, verify and unmap memory over and over. Answered by
    /// null.
    StartChurn {
        /// Names the churn.
        name: String,
        /// Most bytes mapped at a time.
        bytes: u64,
        /// Seed of sizes and patterns.
        seed: u64,
    },
    /// Ends a churn. Answered by [`Churned`].
    StopChurn {
        /// The churn.
        name: String,
    },
    /// Starts a process that does a task and holds what it made. Answered when
    /// the task is done, by [`Fragmented`], [`Touched`], [`Stormed`], [`Elapsed`] or
    /// [`Loaded`].
    Start {
        /// Names the process; must be new.
        name: String,
        /// What it does.
        task: Task,
    },
    /// Asks such a process. Answered by [`ProgramBlocks`], [`Verified`],
    /// [`Elapsed`] or [`Measured`].
    Ask {
        /// The process.
        name: String,
        /// What is asked.
        question: Question,
    },
    /// Ends such a process. Answered by null when it is gone.
    End {
        /// The process.
        name: String,
    },
    /// How fragmented free memory is. Answered by [`Fragmentation`].
    Fragmentation,
    /// The state of every block, from `/proc/kpageflags`. Answered by
    /// [`BlockStates`].
    Blocks,
    /// The pages that the kernel has, from `/proc/kpageflags`. Answered by
    /// [`PageRuns`].
    Pages,
    /// The kernel's log. Answered by [`Messages`].
    Messages {
        /// Leaves out messages before this sequence number.
        since: u64,
    },
    /// `/proc/meminfo` in bytes. Answered by an object of numbers.
    Memory,
    /// The text of a file. Answered by a string.
    ReadFile {
        /// The file.
        path: String,
    },
    /// Writes text to an existing file. Answered by null.
    WriteFile {
        /// The file.
        path: String,
        /// What is written, in one write.
        text: String,
    },
}

/// What a process of its own does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "task", rename_all = "snake_case")]
pub enum Task {
    /// Fragments free memory.
    Fragment(Fragment),
    /// Touches huge pages.
    Program(Program),
    /// Makes small allocations of many kinds.
    Storm(Storm),
    /// Uses memory sparsely.
    Sparse(Sparse),
    /// A real program with a load generator.
    Workload(Workload),
}

/// What can be asked of such a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Question {
    /// Where the huge pages of a program lie.
    Blocks,
    /// Is the memory of a program or a fragmenter what was written to it?
    Verify,
    /// Use the rest of the memory that was used sparsely. Answered by
    /// [`Elapsed`].
    Grow,
    /// Run a workload's measured phase. Answered by [`Measured`].
    Go,
}

/// A workload of the image that scripts/build-workloads makes: loads its data,
/// and runs its measured phase as often as it is asked to. Answered by
/// [`Loaded`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    /// The program in the image's `/workloads`.
    pub program: String,
    /// Data that it is to hold, in MiB.
    pub mib: u64,
    /// Seed of data and operations.
    pub seed: u64,
    /// Operations of one measured phase.
    pub operations: u64,
}

/// What a workload says when its data is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Loaded {
    /// Resident memory of the program and its load generator, in MiB.
    pub resident_mib: f64,
}

/// What a workload says of one measured phase.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Operations done: those asked for.
    pub operations: u64,
    /// Wall-clock seconds of all of them.
    pub seconds: f64,
    /// Mean time of an operation, in microseconds.
    pub mean_us: f64,
    /// 99th percentile of it.
    pub p99_us: f64,
    /// What an operation is, in the plural.
    pub unit: String,
    /// Depends on what the operations answered, and on nothing else: the same
    /// for the same seed, size, operations and round.
    pub digest: String,
    /// The program and its version.
    pub version: String,
}

/// Touches some base pages of each block of anonymous memory, and the rest when
/// it is asked to. Answered by [`Elapsed`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sparse {
    /// Size in bytes, rounded up to whole 2 MiB.
    pub bytes: u64,
    /// Seed of the pattern.
    pub seed: u64,
    /// Base pages of each block that are touched at first, below 512.
    pub pages: u32,
    /// What the kernel is told about huge pages.
    pub advice: PageSize,
}

/// Fills all free memory with base pages, then frees some of each block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fragment {
    /// Together with a page's frame number it decides whether the page is kept.
    pub seed: u64,
    /// Bytes that are free in the end.
    pub free_bytes: u64,
    /// Unusable free space index for huge pages to end with, at least, 0 to 1.
    /// Below 1, some blocks are let go of as a whole; every other one keeps a
    /// page. It ends higher where the kernel has pages in the former.
    pub fmfi: f64,
    /// Share of page cache among the kept pages, 0 to 1; the rest is anonymous
    /// memory of the process. Both can be moved.
    pub cache: f64,
    /// Share of the kept anonymous pages that are pinned where they are.
    pub unmovable: f64,
}

impl Fragment {
    /// Every block keeps a page, a quarter of the kept ones are page cache, and
    /// all can be moved.
    #[must_use]
    pub fn new(seed: u64, free_bytes: u64) -> Self {
        Fragment { seed, free_bytes, fmfi: 1.0, cache: 0.25, unmovable: 0.0 }
    }
}

/// Touches anonymous memory with `MADV_HUGEPAGE`, block after block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Program {
    /// Size in bytes, rounded up to whole 2 MiB.
    pub bytes: u64,
    /// Seed of the pattern.
    pub seed: u64,
    /// Blocks touched in a second; 0 is as fast as it goes.
    pub blocks_per_second: f64,
}

/// Anonymous memory, page cache, files and directory entries, pipes, and
/// processes that come and go, mixed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Storm {
    /// Bytes allocated in all.
    pub bytes: u64,
    /// Seed of the order.
    pub seed: u64,
}

/// Answer to [`Command::Ping`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pong {
    /// Seconds since the guest kernel started.
    pub uptime: f64,
    /// The kernel's release.
    pub release: String,
}

/// Answer to [`Command::Exec`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Output {
    /// Exit code; 128 + N where signal N ended the command.
    pub code: i32,
    /// Both output streams, as they came.
    pub output: String,
}

/// How long something took.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Elapsed {
    /// Wall-clock seconds.
    pub seconds: f64,
}

/// Answer to [`Command::Fill`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Filled {
    /// Wall-clock seconds.
    pub seconds: f64,
    /// Bytes mapped and filled.
    pub bytes: u64,
}

/// Answer to [`Command::Verify`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// Words of 8 bytes compared.
    pub words: u64,
    /// Words that differ from the pattern.
    pub bad_words: u64,
    /// Offset of the first such word in bytes.
    pub first_bad: Option<u64>,
}

/// Answer to [`Command::Break`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Broken {
    /// Ranges of 2 MiB that were treated.
    pub ranges: u64,
}

/// Answer to [`Command::StopChurn`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Churned {
    /// Times that memory was mapped, filled, verified and unmapped.
    pub rounds: u64,
    /// Bytes filled and verified in all.
    pub bytes: u64,
    /// Words that differed from their pattern.
    pub bad_words: u64,
}

/// Answer to [`Command::Fragmentation`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Fragmentation {
    /// Share of the free memory that is in chunks too small for a huge page, 0
    /// to 1.
    pub fmfi: f64,
    /// Free base pages.
    pub free_pages: u64,
    /// Blocks that are free as a whole.
    pub free_blocks: u64,
}

/// Answer to [`Task::Fragment`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Fragmented {
    /// Before anything was done.
    pub before: Fragmentation,
    /// When it was done.
    pub after: Fragmentation,
    /// Base pages taken at first: all that there were.
    pub filled_pages: u64,
    /// Movable anonymous pages kept.
    pub kept_anonymous: u64,
    /// Page-cache pages kept.
    pub kept_cache: u64,
    /// Pinned pages kept.
    pub kept_unmovable: u64,
    /// Blocks in which a page is kept.
    pub kept_blocks: u64,
    /// Seconds that taking them took.
    pub filled_seconds: f64,
    /// Seconds in all.
    pub seconds: f64,
}

/// Answer to [`Task::Program`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Touched {
    /// Wall-clock seconds.
    pub seconds: f64,
    /// Blocks touched.
    pub blocks: u64,
    /// The longest that touching a single block took, in seconds.
    pub longest_seconds: f64,
}

/// Answer to [`Task::Storm`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stormed {
    /// Anonymous base pages, in bytes.
    pub anonymous_bytes: u64,
    /// Page cache, in bytes.
    pub cache_bytes: u64,
    /// Empty files, as bytes of slab (an estimate).
    pub slab_bytes: u64,
    /// Pipes with a page each, in bytes (an estimate).
    pub pipe_bytes: u64,
    /// Processes that came and went.
    pub forks: u64,
    /// Free memory before and after, in bytes.
    pub free_before: u64,
    /// See `free_before`.
    pub free_after: u64,
    /// Wall-clock seconds.
    pub seconds: f64,
}

impl Stormed {
    /// Bytes allocated and kept.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.anonymous_bytes + self.cache_bytes + self.slab_bytes + self.pipe_bytes
    }
}

/// Answer to [`Question::Blocks`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramBlocks {
    /// For each 2 MiB of the program: the number of the block that it lies on as
    /// one huge page, or null where it is no huge page.
    pub blocks: Vec<Option<u64>>,
}

/// Answer to [`Command::Messages`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Messages {
    /// The messages in order.
    pub messages: Vec<Message>,
    /// The sequence number after the last one.
    pub next: u64,
}

/// One message of the kernel's log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Severity: 0 emergency .. 4 warning .. 7 debug.
    pub level: u8,
    /// The text, without its time.
    pub text: String,
}

/// Answer to [`Command::Blocks`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockStates {
    /// Runs of blocks that are alike, ascending; blocks without memory are in
    /// none.
    pub runs: Vec<BlockRun>,
}

/// What the pages of a block are, as `/proc/kpageflags` tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlockState {
    /// Every page is in the page allocator.
    Free,
    /// No page has a flag: free, on a list of a processor, or the kernel's own.
    /// Such blocks are said to be [`BlockState::Base`] if there are more of them
    /// than lists of processors have pages for.
    Bare,
    /// Pages of several owners, or base pages.
    Base,
    /// One huge page of user memory.
    Huge,
    /// One compound page that is no user memory: held by a driver.
    Held,
}

/// Neighbouring blocks that are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockRun {
    /// Number of the first block (physical address >> 21).
    pub first: u64,
    /// Number of blocks.
    pub count: u64,
    /// State of each of them.
    pub state: BlockState,
    /// Base pages of user memory in each of them, 0 to 512.
    pub user: u32,
}

/// Answer to [`Command::Pages`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageRuns {
    /// Pages that the kernel has, ascending; no others are of any use to it.
    pub online: Vec<PageRun>,
    /// Those of them that it has given away: the balloon's, and those of
    /// virtio-mem that are not plugged.
    pub given_away: Vec<PageRun>,
}

/// Neighbouring base pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageRun {
    /// Frame number of the first page.
    pub first: u64,
    /// Number of pages.
    pub count: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_is_one_flat_object() {
        let request = Request {
            id: 7,
            command: Command::Fill {
                name: "w".into(),
                bytes: 1 << 21,
                seed: 3,
                pages: PageSize::Huge,
            },
        };
        let text = serde_json::to_string(&request).expect("plain data");
        assert_eq!(
            text,
            r#"{"id":7,"cmd":"fill","name":"w","bytes":2097152,"seed":3,"pages":"huge"}"#
        );
        let back: Request = serde_json::from_str(&text).expect("what was written");
        assert_eq!(back, request);
    }
}

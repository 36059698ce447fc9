//! What a measurement runs as a process of its own and gets one result from:
//! `gemini-guest probe JSON`, with the result as JSON on stdout. The kernel can
//! choose such a process when memory is short, without the agent.

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::protocol::PageSize;
use crate::{code, counting, echo, faults, mmio, pressure};

/// A probe and its arguments.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "probe", rename_all = "snake_case")]
pub enum Probe {
    /// Touches new memory page by page and times each fault. Prints
    /// [`Latencies`].
    Faults {
        /// Which pages: [`PageSize::Base`] or [`PageSize::Huge`].
        pages: PageSize,
        /// How many faults.
        faults: u32,
    },
    /// Counts instructions, one by one, on a machine whose time stamp counter
    /// counts them. Prints [`Instructions`].
    Count {
        /// Of what.
        work: Work,
        /// How many units of it.
        units: u32,
    },
    /// Takes memory and keeps it until all is taken. Prints [`Taken`].
    Take {
        /// How.
        kind: Take,
        /// Bytes.
        bytes: u64,
    },
    /// Sends echo requests to this machine itself and does not read the answers
    /// before the last one was sent: each answer is memory that the kernel has
    /// to find in a context that cannot wait. Prints [`Echoed`].
    Echo {
        /// Bytes of each request.
        size: u16,
        /// Number of requests.
        count: u32,
    },
    /// Takes PCI devices from their drivers and reads a register of one, of
    /// virtio, while the others' memory is switched off and on. Prints
    /// [`Register`].
    Mmio {
        /// The device, as in `/sys/bus/pci/devices`.
        read: String,
        /// The others.
        others: Vec<String>,
        /// How often they are switched off and on.
        rounds: u32,
    },
    /// Executes a function in each page of new memory. Prints [`Executed`].
    Code {
        /// Bytes of memory.
        bytes: u64,
        /// What the first function returns; the next ones return what follows.
        seed: u32,
        /// Page frame from which on pages are counted.
        from: u64,
    },
}

/// What instructions are counted of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// A loop of 2000 instructions: shows that the counter counts them.
    Loop,
    /// The first touch of a base page of anonymous memory.
    AnonymousPage,
    /// The first write to a page of a file in the page cache.
    CachePage,
}

/// How memory is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Take {
    /// Anonymous memory in base pages.
    Base,
    /// Anonymous memory, huge pages where the kernel has them.
    Huge,
    /// A file in the page cache.
    File,
}

/// How long faults took.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Latencies {
    /// Nanoseconds of each fault, in the order of the faults.
    pub nanoseconds: Vec<f64>,
    /// Whether it got a huge page.
    pub huge: Vec<bool>,
}

/// How many instructions something took.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Instructions {
    /// Those of each unit, in order; what it takes to read the counter is taken
    /// off.
    pub counts: Vec<u64>,
}

/// What it took to get memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Taken {
    /// Wall-clock seconds in all.
    pub seconds: f64,
    /// Longest time for a single page, in seconds.
    pub longest_seconds: f64,
    /// Seconds that some task of the system was stalled on memory, by
    /// `/proc/pressure/memory`.
    pub some_stalled_seconds: f64,
    /// Seconds that all of them were.
    pub full_stalled_seconds: f64,
    /// `MemAvailable` when all was taken.
    pub available: u64,
}

/// What became of echo requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Echoed {
    /// Requests sent.
    pub sent: u32,
    /// Answers that arrived.
    pub answered: u32,
    /// Longest time to send one, in seconds.
    pub longest_seconds: f64,
    /// Wall-clock seconds in all.
    pub seconds: f64,
}

/// What a register that never changes was read as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Register {
    /// Its value.
    pub value: u32,
    /// How often it was read.
    pub reads: u64,
    /// How often another value was read.
    pub wrong: u64,
}

/// What came of functions that were written and executed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Executed {
    /// Pages with a function.
    pub pages: u64,
    /// Functions that returned something else than what they were written to.
    pub wrong: u64,
    /// Pages at the given frame or above.
    pub above: u64,
}

/// Runs the probe that `text` describes and returns what it prints.
///
/// # Errors
/// If `text` describes none, or it fails.
pub fn run(text: &str) -> anyhow::Result<String> {
    let probe: Probe = serde_json::from_str(text).context("this is no probe")?;
    let result = match probe {
        Probe::Faults { pages, faults } => serde_json::to_value(faults::measure(pages, faults)?),
        Probe::Count { work, units } => serde_json::to_value(counting::count(work, units)?),
        Probe::Take { kind, bytes } => serde_json::to_value(pressure::take(kind, bytes)?),
        Probe::Echo { size, count } => serde_json::to_value(echo::flood(size, count)?),
        Probe::Code { bytes, seed, from } => serde_json::to_value(code::run(bytes, seed, from)?),
        Probe::Mmio { read, others, rounds } => {
            serde_json::to_value(mmio::read_while_others_go(&read, &others, rounds)?)
        }
    };
    Ok(result?.to_string())
}

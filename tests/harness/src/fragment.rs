//! Fragments the free memory of this machine, without ever holding much of it.
//!
//! A free block is taken as a huge page, one of its base pages is pinned (by a pipe,
//! so that the kernel cannot move it), and the other 511 are given back: that block
//! cannot become a huge page again as long as the pin lasts. So it costs 4 KiB for
//! each block, others keep all memory that they could use, only not in huge pages,
//! and everything is as before when the pipes are closed, which the kernel does if
//! nobody else does.

use std::fs::File;
use std::time::{Duration, Instant};

use anyhow::{bail, Context};
use gemini_guest::buddy;

use crate::memory::BLOCK_SIZE;
use crate::outside::available_memory;
use crate::rng::Rng;
use crate::sys::{self, Mapping, Pages, Pipe, PAGE_SIZE};

/// Pages that one pipe pins: as many as any user's may.
const PIPE_PAGES: u64 = 256;
/// Attempts to gain nothing more: others use and free memory all the time.
const ROUNDS: u32 = 5;
/// Memory counts as fragmented when compaction gains less than one such part of
/// what is left on purpose.
const SPARE_PART: u64 = 50;
/// Blocks between two looks at the state of memory.
const STEP: u64 = 32;
/// No block is taken while less memory than this is left for others.
const MARGIN: u64 = 1 << 30;
/// The kernel found no block so many times in a row, each time after it had tried to
/// make one: it has none.
const EXHAUSTED: u32 = 64;
/// Attempts to split a huge page. The kernel clears what it cannot split, and it splits none that
/// somebody has a reference to (mm/truncate.c, mm/huge_memory.c), and nobody is told when that is
/// gone. One block in some hundred thousand was not split at once.
const SPLITS: u32 = 100;
const BETWEEN_SPLITS: Duration = Duration::from_millis(1);

/// Compacts all memory at once.
pub const COMPACT: &str = "/proc/sys/vm/compact_memory";

/// When enough is fragmented.
#[derive(Clone, Copy, Debug)]
pub enum Until {
    /// The unusable free space index for huge pages, 0 to 1, is this.
    Index(f64),
    /// The kernel makes no huge page any more.
    Exhausted,
}

/// Memory that stays fragmented as long as this lives.
#[derive(Debug)]
pub struct Fragments {
    rng: Rng,
    file: File,
    /// One block of the file, in which each huge page is taken.
    block: Mapping,
    pipes: Vec<Pipe>,
    pinned: u64,
    failures: u32,
}

impl Fragments {
    /// None yet. Which page of a block is pinned is random.
    ///
    /// # Errors
    /// If there is no memory file.
    pub fn new(seed: u64) -> anyhow::Result<Self> {
        let file = sys::memfd(BLOCK_SIZE, Pages::Any)?;
        let block = Mapping::new(&file, BLOCK_SIZE, BLOCK_SIZE, 0, true)?;
        let rng = Rng::new(seed);
        Ok(Fragments { rng, file, block, pipes: Vec::new(), pinned: 0, failures: 0 })
    }

    /// Fragments more, for some time at most. Whether it came that far.
    ///
    /// # Errors
    /// If the kernel refuses something else than a huge page.
    pub fn add(&mut self, until: Until, most: Duration) -> anyhow::Result<bool> {
        let deadline = Instant::now() + most;
        self.failures = 0;
        loop {
            let done = match until {
                Until::Index(index) => buddy::read()?.fmfi >= index,
                Until::Exhausted => self.failures >= EXHAUSTED,
            };
            if done || Instant::now() >= deadline || available_memory()? < MARGIN {
                return Ok(done);
            }
            for _ in 0..STEP {
                if self.break_block()? {
                    self.failures = 0;
                } else {
                    self.failures += 1;
                }
            }
        }
    }

    /// Leaves `whole` free blocks, and besides hardly any that compaction could make
    /// of what is in use. Takes some time at most; whether it came that far.
    ///
    /// # Errors
    /// If the kernel refuses something else than a huge page.
    pub fn leave(&mut self, whole: u64, most: Duration) -> anyhow::Result<bool> {
        let deadline = Instant::now() + most;
        // Held meanwhile, so that they are neither broken nor counted.
        let supply = Supply::new(whole)?;
        while !supply.fill()? {
            // What a pipe pins were whole blocks once.
            if self.pipes.pop().is_none() || Instant::now() >= deadline {
                return Ok(false);
            }
            self.pinned = self.pipes.len() as u64 * PIPE_PAGES;
        }
        for _ in 0..ROUNDS {
            let before = self.pinned;
            // The kernel's attempts on demand are deferred after some have failed.
            std::fs::write(COMPACT, "1").context(COMPACT)?;
            if !self.add(Until::Exhausted, deadline.saturating_duration_since(Instant::now()))? {
                return Ok(false);
            }
            if self.pinned - before <= whole / SPARE_PART {
                break;
            }
        }
        Ok(true)
    }

    /// Blocks that cannot become huge pages.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.pinned
    }

    /// False if the kernel has no block to break.
    fn break_block(&mut self) -> anyhow::Result<bool> {
        self.block.fault_in(0, PAGE_SIZE).context("cannot touch a page")?;
        if self.block.advise(0, BLOCK_SIZE, libc::MADV_COLLAPSE).is_err() {
            return Ok(false);
        }
        self.split()?;
        if self.pinned % PIPE_PAGES == 0 {
            self.pipes.push(Pipe::with_room(PIPE_PAGES)?);
        }
        let pipe = self.pipes.last().context("one was added above")?;
        let page = 1 + self.rng.below(BLOCK_SIZE / PAGE_SIZE - 1);
        self.block.pin_into(pipe, page * PAGE_SIZE, PAGE_SIZE).context("cannot pin a page")?;
        self.pinned += 1;
        sys::punch_hole(&self.file, 0, BLOCK_SIZE)?;
        Ok(true)
    }

    /// Splits the file's huge page, by a hole in it.
    fn split(&self) -> anyhow::Result<()> {
        let mut data = None;
        for _ in 0..SPLITS {
            sys::punch_hole(&self.file, 0, PAGE_SIZE)?;
            data = sys::seek(&self.file, 0, true)?;
            if data == Some(PAGE_SIZE) {
                return Ok(());
            }
            std::thread::sleep(BETWEEN_SPLITS);
        }
        bail!(
            "{SPLITS} holes at the begin of a huge page of a memory file do not split it (its data \
             begin at {data:?}): does a program sample or move this machine's memory all the time?"
        )
    }
}

/// Huge pages that are free again when this is dropped.
#[derive(Debug)]
struct Supply {
    memory: Mapping,
    blocks: u64,
}

impl Supply {
    fn new(blocks: u64) -> anyhow::Result<Self> {
        // The kernel maps no file without a length.
        let bytes = blocks.max(1) * BLOCK_SIZE;
        let file = sys::memfd(bytes, Pages::Any)?;
        Ok(Supply { memory: Mapping::new(&file, bytes, BLOCK_SIZE, 0, true)?, blocks })
    }

    /// Takes what is missing. False if the kernel does not have that much.
    fn fill(&self) -> anyhow::Result<bool> {
        for block in 0..self.blocks {
            let start = block * BLOCK_SIZE;
            self.memory.fault_in(start, PAGE_SIZE).context("cannot touch a page")?;
            if self.memory.advise(start, BLOCK_SIZE, libc::MADV_COLLAPSE).is_err() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_block_costs_a_page_and_gives_the_rest_back() {
        let mut fragments = Fragments::new(7).expect("a memory file");
        for _ in 0..4 {
            // A machine without a block to break shows nothing.
            fragments.break_block().expect("only huge pages may be missing");
        }
        let resident = sys::seek(&fragments.file, 0, true).expect("a seekable file");
        assert_eq!(resident, None, "nothing is left in the file");
        assert!(fragments.blocks() <= 4 && fragments.pipes.len() <= 1);
    }
}

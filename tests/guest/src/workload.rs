//! Memory that is filled with a known pattern, read, broken and verified.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::Context;

use crate::mapping::{Mapping, Sharing, HUGE, PAGES};
use crate::pagemap::{whole_block, Pagemap};
use crate::protocol::{Break, Broken, Churned, PageSize, Verified};

const HALF: usize = HUGE / 2;
/// Of so many bytes so many are kept where pages are dropped here and there.
const STRIDE: usize = 64 * 4096;
const STRIDE_KEPT: usize = 8 * 4096;

/// What was dropped of a huge page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dropped {
    Nothing,
    Half,
    Scattered,
}

impl Dropped {
    /// Whether the byte at an offset was dropped.
    fn has(self, offset: usize) -> bool {
        match self {
            Dropped::Nothing => false,
            Dropped::Half => offset >= HALF,
            Dropped::Scattered => offset % STRIDE >= STRIDE_KEPT,
        }
    }
}

/// The pattern's word number `index`: every word differs, and any word can be
/// checked alone.
#[must_use]
pub fn word(seed: u64, index: u64) -> u64 {
    // The finisher of splitmix64: neighbouring inputs give unrelated outputs.
    let mut value = seed.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Memory of whole huge pages, filled with a pattern.
pub struct Memory {
    mapping: Mapping,
    seed: u64,
    /// By huge page.
    dropped: Vec<Dropped>,
}

impl Memory {
    /// Maps memory for at least `bytes` and fills it with the pattern of
    /// `seed`.
    ///
    /// # Errors
    /// If the memory cannot be mapped or the advice is refused.
    pub fn fill(bytes: u64, seed: u64, pages: PageSize) -> anyhow::Result<Self> {
        let memory = Self::map(bytes, seed, pages, Sharing::Private)?;
        memory.write_pattern();
        Ok(memory)
    }

    /// As [`Memory::fill`], in shared memory (shmem).
    ///
    /// # Errors
    /// As there.
    pub fn fill_shared(bytes: u64, seed: u64, pages: PageSize) -> anyhow::Result<Self> {
        let memory = Self::map(bytes, seed, pages, Sharing::Shared)?;
        memory.write_pattern();
        Ok(memory)
    }

    /// Maps memory, writes one word into every 2 MiB of it, and looks at all
    /// the others: the kernel owes zeros.
    ///
    /// # Errors
    /// As [`Memory::fill`].
    pub fn count_dirty(bytes: u64, pages: PageSize) -> anyhow::Result<Verified> {
        let memory = Self::map(bytes, 0, pages, Sharing::Private)?;
        let mut result = Verified { words: 0, bad_words: 0, first_bad: None };
        for index in 0..memory.mapping.words() {
            if index * 8 % HUGE == 0 {
                // Not a read: that would map the kernel's page of zeros.
                memory.mapping.write(index, 1);
                continue;
            }
            result.words += 1;
            if memory.mapping.read(index) != 0 {
                result.bad_words += 1;
                result.first_bad.get_or_insert(index as u64 * 8);
            }
        }
        Ok(result)
    }

    /// Maps memory that nothing was written to.
    fn map(bytes: u64, seed: u64, pages: PageSize, sharing: Sharing) -> anyhow::Result<Self> {
        let mapping = Mapping::new(bytes, pages, sharing)?;
        let dropped = vec![Dropped::Nothing; mapping.bytes() / HUGE];
        Ok(Memory { mapping, seed, dropped })
    }

    fn write_pattern(&self) {
        for index in 0..self.mapping.words() {
            self.mapping.write(index, word(self.seed, index as u64));
        }
    }

    /// Asks for huge pages where there are base pages (`MADV_COLLAPSE`).
    ///
    /// # Errors
    /// If the kernel refuses, or has none.
    pub fn collapse(&self) -> anyhow::Result<()> {
        // Linux 6.1; the constant is missing in the C library of Debian 12.
        const MADV_COLLAPSE: libc::c_int = 25;
        self.mapping.advise(0, self.bytes(), MADV_COLLAPSE)
    }

    /// The block behind every 2 MiB, from `/proc/self/pagemap`; none where it
    /// is not one whole block in order.
    ///
    /// # Errors
    /// If the page map cannot be read.
    pub fn blocks(&self) -> anyhow::Result<Vec<Option<u64>>> {
        let pagemap = Pagemap::open()?;
        let mut frames = [0; PAGES];
        (0..self.dropped.len())
            .map(|page| {
                pagemap.frames(self.mapping.address() + page * HUGE, &mut frames)?;
                Ok(whole_block(&frames))
            })
            .collect()
    }

    /// Size in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.mapping.bytes()
    }

    /// Reads `reads` words in an order that `seed` decides, and returns their
    /// sum so that the reads cannot be left out.
    #[must_use]
    pub fn read_random(&self, reads: u64, seed: u64) -> u64 {
        let words = self.mapping.words() as u64;
        let mut state = seed | 1;
        let mut sum = 0_u64;
        for _ in 0..reads {
            // xorshift64: cheaper than the memory access that it chooses.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let index = usize::try_from(state % words).unwrap_or(0);
            sum = sum.wrapping_add(self.mapping.read(index));
        }
        sum
    }

    /// Compares every word that was not dropped with the pattern.
    #[must_use]
    pub fn verify(&self) -> Verified {
        let mut result = Verified { words: 0, bad_words: 0, first_bad: None };
        for (page, dropped) in self.dropped.iter().enumerate() {
            let first = page * HUGE / 8;
            for index in (first..first + HUGE / 8).filter(|index| !dropped.has(index * 8 % HUGE)) {
                let found = self.mapping.read(index);
                result.words += 1;
                if found != word(self.seed, index as u64) {
                    result.bad_words += 1;
                    result.first_bad.get_or_insert(index as u64 * 8);
                }
            }
        }
        result
    }

    /// Breaks every `every`'th huge page.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn break_up(&mut self, how: Break, every: u64) -> anyhow::Result<Broken> {
        let step = usize::try_from(every.max(1)).unwrap_or(usize::MAX);
        let mut ranges = 0;
        for page in (0..self.dropped.len()).step_by(step) {
            let offset = page * HUGE;
            match how {
                Break::Split => self.split(offset)?,
                Break::DropHalf => {
                    self.mapping.advise(offset + HALF, HALF, libc::MADV_DONTNEED)?;
                    self.dropped[page] = Dropped::Half;
                }
                Break::DropScattered => {
                    for at in (0..HUGE).step_by(STRIDE) {
                        let from = offset + at + STRIDE_KEPT;
                        self.mapping.advise(from, STRIDE - STRIDE_KEPT, libc::MADV_DONTNEED)?;
                    }
                    self.dropped[page] = Dropped::Scattered;
                }
                Break::ProtectHalf => self.mapping.protect(offset + HALF, HALF)?,
            }
            ranges += 1;
        }
        Ok(Broken { ranges })
    }

    fn split(&self, offset: usize) -> anyhow::Result<()> {
        let start = self.mapping.address() + offset;
        let request = format!("{},{start:#x},{:#x}", std::process::id(), start + HUGE);
        std::fs::write("/sys/kernel/debug/split_huge_pages", request)
            .context("the kernel does not split huge pages on request")
    }
}

/// A thread that maps, fills, verifies and unmaps memory until it is told to
/// stop.
pub struct Churn {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<Churned>>,
}

impl Churn {
    /// Starts a thread that uses at most `bytes` at a time.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub fn start(bytes: u64, seed: u64) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("churn".into())
            .spawn(move || churn(bytes, seed, &stopped))
            .context("cannot start a thread")?;
        Ok(Churn { stop, thread })
    }

    /// Ends the thread after its current round.
    ///
    /// # Errors
    /// What went wrong in the thread.
    pub fn stop(self) -> anyhow::Result<Churned> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the churning thread panicked"))?
    }
}

fn churn(bytes: u64, seed: u64, stop: &AtomicBool) -> anyhow::Result<Churned> {
    let mut done = Churned::default();
    while !stop.load(Ordering::Relaxed) {
        let random = word(seed, done.rounds);
        let size = random % bytes.max(1) + 1;
        // Mostly huge pages, and base pages to break free blocks up.
        let pages = if random >> 62 == 0 { PageSize::Base } else { PageSize::Huge };
        let memory = Memory::fill(size, random, pages)?;
        let verified = memory.verify();
        done.rounds += 1;
        done.bytes += memory.bytes() as u64;
        done.bad_words += verified.bad_words;
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filled_memory_verifies_and_a_changed_word_is_found() {
        let memory = Memory::fill(1, 42, PageSize::System).expect("2 MiB");
        assert_eq!(memory.bytes(), HUGE);
        assert_eq!(memory.verify().bad_words, 0);
        memory.mapping.write(1000, 0);
        let found = memory.verify();
        assert_eq!(found.bad_words, 1);
        assert_eq!(found.first_bad, Some(8000));
    }

    #[test]
    fn dropped_halves_are_not_compared_and_the_rest_is() {
        let mut memory = Memory::fill(2 * HUGE as u64, 1, PageSize::System).expect("4 MiB");
        let broken = memory.break_up(Break::DropHalf, 2).expect("own memory");
        assert_eq!(broken.ranges, 1);
        let verified = memory.verify();
        assert_eq!(verified.bad_words, 0);
        assert_eq!(verified.words, (HUGE + HALF) as u64 / 8);
    }

    #[test]
    fn scattered_pages_are_kept_and_compared() {
        let mut memory = Memory::fill(HUGE as u64, 1, PageSize::System).expect("2 MiB");
        memory.break_up(Break::DropScattered, 1).expect("own memory");
        let verified = memory.verify();
        assert_eq!((verified.bad_words, verified.words), (0, HUGE as u64 / 8 / 8));
        memory.mapping.write(STRIDE / 8 + 1, 0);
        assert_eq!(memory.verify().bad_words, 1);
    }

    #[test]
    fn protected_halves_keep_their_contents() {
        let mut memory = Memory::fill(HUGE as u64, 1, PageSize::System).expect("2 MiB");
        memory.break_up(Break::ProtectHalf, 1).expect("own memory");
        assert_eq!(memory.verify().bad_words, 0);
    }

    #[test]
    fn untouched_memory_is_zero_and_shared_memory_is_filled() {
        let found = Memory::count_dirty(1, PageSize::System).expect("2 MiB");
        assert_eq!((found.words, found.bad_words), (HUGE as u64 / 8 - 1, 0));
        let memory = Memory::fill_shared(1, 8, PageSize::System).expect("2 MiB");
        assert_eq!(memory.verify().bad_words, 0);
    }

    #[test]
    fn random_reads_depend_on_the_seed_alone() {
        let memory = Memory::fill(1, 9, PageSize::System).expect("2 MiB");
        assert_eq!(memory.read_random(100, 5), memory.read_random(100, 5));
        assert_ne!(memory.read_random(100, 5), memory.read_random(100, 7));
    }

    #[test]
    fn churn_counts_what_it_verified() {
        let churn = Churn::start(4 << 20, 3).expect("a thread");
        std::thread::sleep(std::time::Duration::from_millis(50));
        let done = churn.stop().expect("nothing refused");
        assert!(done.rounds > 0 && done.bytes > 0);
        assert_eq!(done.bad_words, 0);
    }
}

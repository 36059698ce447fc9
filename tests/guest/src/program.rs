//! A program that touches huge pages, and knows where they came to lie.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context};
use serde_json::Value;

use crate::blocks;
use crate::mapping::{Mapping, Sharing, HUGE, PAGE, PAGES};
use crate::pagemap::{whole_block, Pagemap};
use crate::protocol::{BlockState, PageSize, Program, ProgramBlocks, Question, Touched, Verified};
use crate::worker::Holder;
use crate::workload::word;

/// The memory of the program.
pub struct Touching {
    mapping: Mapping,
    seed: u64,
}

/// Touches memory as `options` say.
///
/// # Errors
/// If the memory cannot be mapped.
pub fn start(options: &Program) -> anyhow::Result<(Touched, Touching)> {
    ensure!(
        options.blocks_per_second >= 0.0 && options.blocks_per_second.is_finite(),
        "{} blocks per second are no rate",
        options.blocks_per_second
    );
    let mapping = Mapping::new(options.bytes, PageSize::Huge, Sharing::Private)?;
    let program = Touching::new(mapping, options.seed);
    let started = Instant::now();
    let mut longest = Duration::ZERO;
    for block in 0..program.blocks() {
        if options.blocks_per_second > 0.0 {
            let due = Duration::from_secs_f64(block as f64 / options.blocks_per_second);
            std::thread::sleep(due.saturating_sub(started.elapsed()));
        }
        let touch = Instant::now();
        program.touch_block(block);
        longest = longest.max(touch.elapsed());
    }
    let touched = Touched {
        seconds: started.elapsed().as_secs_f64(),
        blocks: program.blocks() as u64,
        longest_seconds: longest.as_secs_f64(),
    };
    Ok((touched, program))
}

impl Touching {
    /// The memory of `mapping`, in which nothing was written yet.
    pub(crate) fn new(mapping: Mapping, seed: u64) -> Self {
        Touching { mapping, seed }
    }

    /// Number of base pages.
    pub(crate) fn pages(&self) -> usize {
        self.mapping.bytes() / PAGE
    }

    /// Writes to a page.
    pub(crate) fn touch(&self, page: usize) {
        self.mapping.write(page * PAGE / 8, mark(self.seed, page));
    }

    fn blocks(&self) -> usize {
        self.mapping.bytes() / HUGE
    }

    /// Writes to every page: where the kernel has no huge page, all base pages
    /// become resident.
    fn touch_block(&self, block: usize) {
        for page in block * PAGES..(block + 1) * PAGES {
            self.touch(page);
        }
    }

    /// Where every 2 MiB of the program lie.
    fn placed(&self) -> anyhow::Result<ProgramBlocks> {
        let pagemap = Pagemap::open()?;
        let kinds = File::open("/proc/kpageflags").context("cannot open /proc/kpageflags")?;
        let mut frames = [0; PAGES];
        let mut flags = vec![0; PAGES * 8];
        let mut result = ProgramBlocks { blocks: Vec::with_capacity(self.blocks()) };
        for block in 0..self.blocks() {
            pagemap.frames(self.mapping.address() + block * HUGE, &mut frames)?;
            let Some(number) = whole_block(&frames) else {
                result.blocks.push(None);
                continue;
            };
            kinds
                .read_exact_at(&mut flags, frames[0] * 8)
                .context("cannot read /proc/kpageflags")?;
            let huge = blocks::state_of(&flags) == Some(BlockState::Huge);
            result.blocks.push(huge.then_some(number));
        }
        Ok(result)
    }

    /// Compares every word: what this program never wrote must read as zero.
    fn verify(&self) -> Verified {
        let mut result = Verified { words: 0, bad_words: 0, first_bad: None };
        for index in 0..self.mapping.words() {
            let page = index * 8 / PAGE;
            let expected = if index * 8 % PAGE == 0 { mark(self.seed, page) } else { 0 };
            result.words += 1;
            if self.mapping.read(index) != expected {
                result.bad_words += 1;
                result.first_bad.get_or_insert(index as u64 * 8);
            }
        }
        result
    }
}

impl Holder for Touching {
    fn ask(&mut self, question: Question) -> anyhow::Result<Value> {
        Ok(match question {
            Question::Blocks => serde_json::to_value(self.placed()?)?,
            Question::Verify => serde_json::to_value(self.verify())?,
            Question::Grow => bail!("this program has used all of its memory already"),
            Question::Go => bail!("this program is no workload"),
        })
    }
}

/// First word of a page.
fn mark(seed: u64, page: usize) -> u64 {
    word(seed, page as u64) | 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn untouched_words_must_be_zero_and_marks_must_stand() {
        let options = Program { bytes: 1, seed: 5, blocks_per_second: 0.0 };
        let (touched, program) = start(&options).expect("2 MiB");
        assert_eq!(touched.blocks, 1);
        assert_eq!(program.verify().bad_words, 0);
        program.mapping.write(3, 1);
        program.mapping.write(PAGE / 8, 0);
        let found = program.verify();
        assert_eq!((found.bad_words, found.first_bad), (2, Some(24)));
    }

    #[test]
    fn a_rate_takes_its_time() {
        let options = Program { bytes: 3 * HUGE as u64, seed: 5, blocks_per_second: 20.0 };
        let (touched, _program) = start(&options).expect("6 MiB");
        assert!(touched.seconds >= 0.1, "{touched:?}");
        assert!(start(&Program { blocks_per_second: -1.0, ..options }).is_err());
    }
}

//! A program that uses its memory sparsely first and densely later, as a heap
//! that grows into its holes.

use std::time::Instant;

use anyhow::ensure;
use serde_json::Value;

use crate::kernel;
use crate::mapping::{Mapping, Sharing, PAGES};
use crate::program::Touching;
use crate::protocol::{Elapsed, Question, Sparse};
use crate::worker::Holder;

/// The memory of the program.
pub struct Growing {
    memory: Touching,
    /// Base pages of each block that were used at first.
    pages: usize,
}

/// Uses `options.pages` base pages of each block.
///
/// # Errors
/// If the memory cannot be mapped.
pub fn start(options: &Sparse) -> anyhow::Result<(Elapsed, Growing)> {
    let pages = usize::try_from(options.pages)?;
    ensure!(pages < PAGES, "{pages} of {PAGES} base pages are not a part");
    let mapping = Mapping::new(options.bytes, options.advice, Sharing::Private)?;
    let growing = Growing { memory: Touching::new(mapping, options.seed), pages };
    Ok((growing.touch(true), growing))
}

impl Growing {
    /// Writes to the pages that are used at first, or to all others.
    fn touch(&self, first: bool) -> Elapsed {
        let start = Instant::now();
        for page in 0..self.memory.pages() {
            if is_first(page % PAGES, self.pages) == first {
                self.memory.touch(page);
            }
        }
        kernel::elapsed(start)
    }
}

impl Holder for Growing {
    fn ask(&mut self, question: Question) -> anyhow::Result<Value> {
        match question {
            Question::Grow => Ok(serde_json::to_value(self.touch(false))?),
            other => self.memory.ask(other),
        }
    }
}

/// Whether the page at this place in its block is one of the `count` that are
/// used at first: they are apart from each other.
fn is_first(place: usize, count: usize) -> bool {
    place * count % PAGES < count
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::PageSize;

    #[test]
    fn as_many_pages_are_used_at_first_as_wanted() {
        for count in [0, 1, 100, 255, 511] {
            assert_eq!((0..PAGES).filter(|&place| is_first(place, count)).count(), count);
        }
    }

    #[test]
    fn all_pages_are_written_in_the_end() {
        let options = Sparse { bytes: 1, seed: 5, pages: 100, advice: PageSize::Base };
        let (_, mut growing) = start(&options).expect("2 MiB");
        let bad = |growing: &mut Growing| {
            let found = growing.ask(Question::Verify).expect("own memory");
            found["bad_words"].as_u64().expect("a number")
        };
        assert_eq!(bad(&mut growing), 412);
        growing.ask(Question::Grow).expect("own memory");
        assert_eq!(bad(&mut growing), 0);
    }
}

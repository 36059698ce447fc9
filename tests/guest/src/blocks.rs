//! The state of every block of guest memory, from `/proc/kpageflags`.

use std::fs::File;
use std::io::Read;

use anyhow::Context;

use crate::kernel;
use crate::protocol::{BlockRun, BlockState, BlockStates, PageRun, PageRuns};

/// Base pages in a block of 2 MiB.
const PAGES: usize = 512;

// Bits of the kernel's Documentation/admin-guide/mm/pagemap.rst.
const SLAB: u64 = 1 << 7;
const BUDDY: u64 = 1 << 10;
const MMAP: u64 = 1 << 11;
const ANON: u64 = 1 << 12;
const COMPOUND_HEAD: u64 = 1 << 15;
const COMPOUND_TAIL: u64 = 1 << 16;
const HUGE: u64 = 1 << 17;
const NOPAGE: u64 = 1 << 20;
const THP: u64 = 1 << 22;
const OFFLINE: u64 = 1 << 23;
const ZERO_PAGE: u64 = 1 << 24;

/// Reads the state of all blocks.
///
/// Freed blocks wait on lists of processors. There `/proc/kpageflags` tells
/// nothing of their pages, as it does of pages that the kernel has taken for
/// itself. They are told apart if the kernel says to have as many pages on those
/// lists.
///
/// # Errors
/// If `/proc/kpageflags` cannot be read: it needs root and
/// CONFIG_PROC_PAGE_MONITOR.
pub fn read() -> anyhow::Result<BlockStates> {
    let mut blocks = Vec::new();
    let mut bare = 0;
    each_block(|number, flags| {
        if let Some((state, user)) = classify(flags) {
            let is_bare = flags.len() == PAGES && flags.iter().all(|&page| page == 0);
            bare += u64::from(is_bare);
            blocks.push((number, state, user, is_bare));
        }
    })?;
    let on_lists = kernel::pages_on_cpu_lists()? / PAGES as u64;
    let mut states = BlockStates::default();
    for (number, state, user, is_bare) in blocks {
        let state = if is_bare && bare <= on_lists { BlockState::Bare } else { state };
        push(&mut states.runs, number, state, user);
    }
    Ok(states)
}

/// Reads which pages the kernel has, and which of them it has given away.
///
/// # Errors
/// As [`read`].
pub fn pages() -> anyhow::Result<PageRuns> {
    let mut runs = PageRuns::default();
    each_block(|number, flags| {
        for (page, flags) in (number * PAGES as u64..).zip(flags) {
            if flags & NOPAGE == 0 {
                push_page(&mut runs.online, page);
            }
            if flags & OFFLINE != 0 {
                push_page(&mut runs.given_away, page);
            }
        }
    })?;
    Ok(runs)
}

/// Calls `look` with the number and the page flags of every block, up to the end
/// of memory.
fn each_block(mut look: impl FnMut(u64, &[u64])) -> anyhow::Result<()> {
    let mut file = File::open("/proc/kpageflags").context("cannot open /proc/kpageflags")?;
    let mut bytes = vec![0; PAGES * 8];
    for number in 0.. {
        let mut filled = 0;
        while filled < bytes.len() {
            match file.read(&mut bytes[filled..]) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) => return Err(error).context("cannot read /proc/kpageflags"),
            }
        }
        if filled > 0 {
            look(number, &parse(&bytes[..filled]));
        }
        if filled < bytes.len() {
            break;
        }
    }
    Ok(())
}

/// State of the block with these bytes of `/proc/kpageflags`; `None` where there
/// is no memory.
#[must_use]
pub fn state_of(bytes: &[u8]) -> Option<BlockState> {
    classify(&parse(bytes)).map(|(state, _)| state)
}

fn parse(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).filter_map(|word| word.try_into().ok().map(u64::from_le_bytes)).collect()
}

/// State and number of user pages of the block with these page flags; `None`
/// where there is no memory.
fn classify(flags: &[u64]) -> Option<(BlockState, u32)> {
    if flags.iter().all(|page| page & NOPAGE != 0) {
        return None;
    }
    let is_user = |page: &&u64| {
        **page & (ANON | MMAP) != 0 && **page & (NOPAGE | ZERO_PAGE | SLAB | BUDDY) == 0
    };
    let user = u32::try_from(flags.iter().filter(is_user).count()).unwrap_or(u32::MAX);
    // The head at the boundary and a tail in every other page: one compound
    // page of the block's size. A larger one (a hugetlb page of 1 GiB) has only
    // tails in its later blocks.
    let one_page = flags.len() == PAGES
        && flags[0] & (COMPOUND_HEAD | COMPOUND_TAIL) != 0
        && flags[1..].iter().all(|page| page & COMPOUND_TAIL != 0);
    let state = if one_page && flags[0] & (THP | HUGE) != 0 && flags[0] & ZERO_PAGE == 0 {
        BlockState::Huge
    } else if one_page && user == 0 {
        BlockState::Held
    } else if flags.iter().all(|page| page & BUDDY != 0) {
        BlockState::Free
    } else {
        BlockState::Base
    };
    Some((state, user))
}

fn push(runs: &mut Vec<BlockRun>, number: u64, state: BlockState, user: u32) {
    if let Some(last) = runs.last_mut() {
        if last.first + last.count == number && last.state == state && last.user == user {
            last.count += 1;
            return;
        }
    }
    runs.push(BlockRun { first: number, count: 1, state, user });
}

fn push_page(runs: &mut Vec<PageRun>, page: u64) {
    match runs.last_mut() {
        Some(last) if last.first + last.count == page => last.count += 1,
        _ => runs.push(PageRun { first: page, count: 1 }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(head: u64, tail: u64) -> Vec<u64> {
        let mut flags = vec![tail; PAGES];
        flags[0] = head;
        flags
    }

    #[test]
    fn anonymous_huge_page_is_huge_and_all_user() {
        let flags = block(COMPOUND_HEAD | THP | ANON | MMAP, COMPOUND_TAIL | THP | ANON | MMAP);
        assert_eq!(classify(&flags), Some((BlockState::Huge, 512)));
    }

    #[test]
    fn large_folios_smaller_than_the_block_are_base() {
        let mut flags = block(COMPOUND_HEAD | THP | ANON, COMPOUND_TAIL | THP | ANON);
        flags[256] = COMPOUND_HEAD | THP | ANON;
        assert_eq!(classify(&flags), Some((BlockState::Base, 512)));
    }

    #[test]
    fn compound_page_of_a_driver_is_held() {
        let flags = block(COMPOUND_HEAD, COMPOUND_TAIL);
        assert_eq!(classify(&flags), Some((BlockState::Held, 0)));
    }

    #[test]
    fn huge_zero_page_is_not_a_huge_page_of_the_user() {
        let flags = block(COMPOUND_HEAD | THP | ZERO_PAGE, COMPOUND_TAIL | THP | ZERO_PAGE);
        assert_eq!(classify(&flags), Some((BlockState::Held, 0)));
    }

    #[test]
    fn one_used_page_makes_a_free_block_base() {
        let mut flags = vec![BUDDY; PAGES];
        assert_eq!(classify(&flags), Some((BlockState::Free, 0)));
        flags[17] = ANON | MMAP;
        assert_eq!(classify(&flags), Some((BlockState::Base, 1)));
    }

    #[test]
    fn no_memory_is_no_block() {
        assert_eq!(classify(&vec![NOPAGE; PAGES]), None);
    }

    #[test]
    fn runs_join_only_neighbours_that_are_alike() {
        let mut runs = Vec::new();
        push(&mut runs, 1, BlockState::Free, 0);
        push(&mut runs, 2, BlockState::Free, 0);
        push(&mut runs, 3, BlockState::Base, 1);
        push(&mut runs, 5, BlockState::Base, 1);
        let seen: Vec<_> = runs.iter().map(|run| (run.first, run.count)).collect();
        assert_eq!(seen, [(1, 2), (3, 1), (5, 1)]);
    }
}

//! Memory that is a hugetlb file: huge as soon as it is there.
//!
//! hugetlbfs tells nothing about holes (no SEEK_DATA, no cachestat). What is known: a file with
//! as many bytes as it is long has none, and what the VMM maps is there. A page that was
//! allocated and never touched by the VMM shows as absent until it is touched.

use super::findings::Finding;
use super::home::Home;
use super::ranges::{push_run, Mapped};
use super::sys;
use super::{Backing, Collapsed, HostRun, HostState, Kind, Outcome, Refusal};
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

/// Blocks that are looked at in one go.
const LOOK_BLOCKS: u64 = 512;

/// One region of a hugetlb file.
pub struct Hugetlb {
    home: Home,
    page_size: u64,
}

impl Hugetlb {
    /// Takes charge of a region in pages of `page_size` bytes.
    pub fn new(home: Home, page_size: u64) -> Self {
        Self { home, page_size }
    }

    fn is_complete(&self) -> io::Result<bool> {
        let metadata = self.home.file.metadata()?;
        Ok(metadata.blocks().saturating_mul(512) >= metadata.len())
    }

    fn is_present(&self, block: u64) -> io::Result<bool> {
        let mut runs = Vec::new();
        self.scan(block..block + 1, &mut runs)?;
        Ok(runs.iter().all(|run| run.state == HostState::Hugetlb))
    }

    fn populate_one(&self, block: u64) -> Outcome {
        let refuse = |error: io::Error| Refusal::from(&error);
        if self.is_present(block).map_err(refuse)? {
            return Ok(Collapsed::AlreadyHuge);
        }
        let size = self.page_size.max(1);
        let offset = self.home.offset(block);
        let from = offset / size * size;
        let until = (offset + self.home.block_size()).next_multiple_of(size);
        match sys::allocate(&self.home.file, from, until - from) {
            Ok(()) => Ok(Collapsed::Populated),
            // The pool is empty.
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => Err(Refusal::NoMemory),
            Err(error) => Err(refuse(error)),
        }
    }
}

impl Backing for Hugetlb {
    fn kind(&self) -> Kind {
        Kind::Hugetlb { page_size: self.page_size }
    }

    fn findings(&self) -> Vec<Finding> {
        Vec::new()
    }

    /// A hole punched in a reserved mapping loses its reservation, and the VMM's next touch of it
    /// can be SIGBUS.
    fn may_discard(&self) -> bool {
        false
    }

    fn scan(&self, blocks: Range<u64>, out: &mut Vec<HostRun>) -> io::Result<()> {
        let complete = self.is_complete()?;
        let mut at = blocks.start;
        while at < blocks.end {
            let part = at..blocks.end.min(at + LOOK_BLOCKS);
            at = part.end;
            let count = usize::try_from(part.end - part.start).map_err(io::Error::other)?;
            let mut mapped = vec![Mapped::Nothing; count];
            if !complete {
                if let Some((vmm, range)) = self.home.at_vmm(&part) {
                    // Where the VMM cannot be looked into, nothing is known to be there.
                    let _unseen = vmm.mapped(range.start, self.home.block_shift, &mut mapped);
                }
            }
            for (first, mapped) in part.zip(mapped) {
                let state = if complete || mapped != Mapped::Nothing {
                    HostState::Hugetlb
                } else {
                    HostState::Absent
                };
                push_run(out, HostRun { first, count: 1, state, resident: 0 });
            }
        }
        Ok(())
    }

    fn collapse(&self, blocks: Range<u64>, results: &mut Vec<(u64, Outcome)>) {
        for block in blocks {
            let outcome = match self.is_present(block) {
                Ok(true) => Ok(Collapsed::AlreadyHuge),
                Ok(false) => Err(Refusal::Absent),
                Err(error) => Err(Refusal::from(&error)),
            };
            results.push((block, outcome));
        }
    }

    /// Nothing is ever copied here.
    fn populate(&self, blocks: Range<u64>, _: &mut u64, results: &mut Vec<(u64, Outcome)>) {
        results.extend(blocks.map(|block| (block, self.populate_one(block))));
    }

    fn demote(&self, _block: u64) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }

    fn discard(&self, _blocks: Range<u64>) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }
}

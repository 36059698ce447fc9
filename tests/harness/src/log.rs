//! The log of dirty pages that a monitor shares with a daemon while it migrates
//! its guest.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::memory::GuestMemory;
use crate::sys::{self, Pages, PAGE_SIZE};

/// A bit for each page of guest memory, by guest physical address.
#[derive(Debug)]
pub struct DirtyLog {
    file: File,
    size: u64,
}

impl DirtyLog {
    /// A log in which nothing is dirty, long enough for `memory`.
    ///
    /// # Errors
    /// Those of making the file.
    pub fn new(memory: &GuestMemory) -> io::Result<Self> {
        let ends = memory.regions().iter().map(|region| region.gpa + region.size);
        let size = (ends.max().unwrap_or(0) / PAGE_SIZE).div_ceil(8);
        Ok(DirtyLog { file: sys::memfd(size, Pages::Any)?, size })
    }

    /// The file to share.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Its length in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Numbers of the pages that are marked.
    ///
    /// # Errors
    /// Those of reading the file.
    pub fn pages(&self) -> io::Result<BTreeSet<u64>> {
        let mut bytes = vec![0; usize::try_from(self.size).map_err(io::Error::other)?];
        self.file.read_exact_at(&mut bytes, 0)?;
        let mut pages = BTreeSet::new();
        for (index, byte) in (0_u64..).zip(bytes) {
            pages.extend((0..8).filter(|bit| byte >> bit & 1 == 1).map(|bit| index * 8 + bit));
        }
        Ok(pages)
    }
}

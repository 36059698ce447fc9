//! What a worker has done, kept where its sudden death does not lose it.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context;

/// One of the numbers that a worker keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Count {
    /// Rounds that came to their end.
    Rounds,
    /// Requests that the kernel refused, as it may.
    Refused,
    /// What the worker is there for and what succeeded: memory blocks set
    /// offline, modules reloaded, processes killed for lack of memory.
    Done,
    /// Pages that did not hold what they must.
    Wrong,
}

const COUNTS: usize = 4;
const BYTES: usize = COUNTS * 8;

/// The numbers of one kind of worker, in a file that all its incarnations and
/// the supervisor map.
#[derive(Debug)]
pub struct Tally {
    start: NonNull<AtomicU64>,
}

impl Tally {
    /// Opens the tally in the file `path`, made if there is none.
    ///
    /// # Errors
    /// If the file cannot be made or mapped.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        file.set_len(BYTES as u64)?;
        // SAFETY: a new mapping of a file that has this many bytes.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error()).context("cannot map a tally");
        }
        let start = NonNull::new(start.cast()).context("the kernel mapped address 0")?;
        Ok(Tally { start })
    }

    fn count(&self, count: Count) -> &AtomicU64 {
        // SAFETY: the mapping holds a number of each kind, and lives as long as
        // this value; all access to it is atomic.
        unsafe { self.start.add(count as usize).as_ref() }
    }

    /// Counts one more.
    pub fn add(&self, count: Count) {
        self.count(count).fetch_add(1, Ordering::Relaxed);
    }

    /// The number so far.
    #[must_use]
    pub fn get(&self, count: Count) -> u64 {
        self.count(count).load(Ordering::Relaxed)
    }
}

impl Drop for Tally {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and no reference into it
        // outlives a call.
        unsafe { libc::munmap(self.start.as_ptr().cast(), BYTES) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_outlive_the_one_who_counted() {
        let path = std::env::temp_dir().join(format!("gemini-tally-{}", std::process::id()));
        let first = Tally::open(&path).expect("a file");
        first.add(Count::Wrong);
        first.add(Count::Rounds);
        drop(first);
        let second = Tally::open(&path).expect("the same file");
        second.add(Count::Rounds);
        assert_eq!([Count::Rounds, Count::Wrong, Count::Done].map(|c| second.get(c)), [2, 1, 0]);
        std::fs::remove_file(path).expect("made above");
    }
}

//! Page cache of known contents.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use anyhow::Context;

use super::random::Random;
use super::tally::Count;
use super::Worker;
use crate::workload::word;

/// The disk; nothing else is on it.
const DISK: &str = "/dev/vda";

/// What is written or read at a time.
const CHUNK: usize = 64 << 10;

/// The disk and what its chunks hold.
pub struct Disk {
    file: File,
    /// The seed of every chunk's words; `None` where nothing was written yet.
    seeds: Vec<Option<u64>>,
    stamps: Random,
}

impl Disk {
    /// Opens the disk.
    ///
    /// # Errors
    /// If there is none.
    pub fn open() -> anyhow::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(DISK)
            .with_context(|| format!("cannot open {DISK}"))?;
        let bytes = io::Seek::seek(&mut &file, io::SeekFrom::End(0))?;
        let chunks = usize::try_from(bytes)? / CHUNK;
        // Another worker before this one may have left anything there.
        let seed = u64::from(std::process::id());
        Ok(Disk { file, seeds: vec![None; chunks], stamps: Random::new(seed) })
    }

    /// Writes or reads some neighbouring chunks.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn round(&mut self, worker: &mut Worker) -> anyhow::Result<()> {
        let first = worker.random.below(self.seeds.len());
        let last = (first + worker.random.below(64)).min(self.seeds.len());
        let write = worker.random.one_in(2);
        for chunk in first..last {
            let offset = (chunk * CHUNK) as u64;
            let mut bytes = vec![0; CHUNK];
            if write {
                let seed = self.stamps.next();
                self.seeds[chunk] = Some(seed);
                fill(&mut bytes, seed);
                self.file.write_all_at(&bytes, offset).context("the disk fails")?;
                continue;
            }
            self.file.read_exact_at(&mut bytes, offset).context("the disk fails")?;
            let Some(seed) = self.seeds[chunk] else { continue };
            let mut wanted = vec![0; CHUNK];
            fill(&mut wanted, seed);
            if let Some(at) = (0..CHUNK).find(|&at| bytes[at] != wanted[at]) {
                worker.report_wrong(&format!("disk: byte {at} of chunk {chunk} is wrong"));
            }
            worker.tally.add(Count::Done);
        }
        if worker.random.one_in(8) {
            self.file.sync_data().context("the disk fails")?;
            // SAFETY: takes no memory.
            unsafe { libc::posix_fadvise(self.file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        }
        Ok(())
    }
}

fn fill(bytes: &mut [u8], seed: u64) {
    for (index, word_bytes) in bytes.chunks_exact_mut(8).enumerate() {
        word_bytes.copy_from_slice(&word(seed, index as u64).to_ne_bytes());
    }
}

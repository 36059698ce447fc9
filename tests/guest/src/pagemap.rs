//! Which page frames this process has at its addresses, from
//! `/proc/self/pagemap`.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{ensure, Context};

use crate::mapping::{PAGE, PAGES};

const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;

/// This process's own page tables.
pub struct Pagemap {
    file: File,
}

impl Pagemap {
    /// Opens them.
    ///
    /// # Errors
    /// If there are none to be read.
    pub fn open() -> anyhow::Result<Self> {
        let file = File::open("/proc/self/pagemap").context("cannot open /proc/self/pagemap")?;
        Ok(Pagemap { file })
    }

    /// Frame number of each of the `frames.len()` pages from `address` on, 0
    /// where nothing is present.
    ///
    /// # Errors
    /// If they cannot be read, or without the right (CAP_SYS_ADMIN) to see
    /// frame numbers.
    pub fn frames(&self, address: usize, frames: &mut [u64]) -> anyhow::Result<()> {
        // Few at a time, because memory may be short.
        let mut bytes = [0_u8; PAGES * 8];
        let mut first = address / PAGE;
        for part in frames.chunks_mut(PAGES) {
            let bytes = &mut bytes[..part.len() * 8];
            self.file
                .read_exact_at(bytes, first as u64 * 8)
                .context("cannot read /proc/self/pagemap")?;
            for (frame, entry) in part.iter_mut().zip(bytes.chunks_exact(8)) {
                let entry = entry.try_into().map_or(0, u64::from_le_bytes);
                *frame = if entry & PRESENT == 0 { 0 } else { entry & FRAME };
                ensure!(
                    entry & PRESENT == 0 || *frame != 0,
                    "the kernel hides frame numbers: CAP_SYS_ADMIN is needed"
                );
            }
            first += part.len();
        }
        Ok(())
    }
}

/// The number of the block that these frames are, in order, all of them.
#[must_use]
pub fn whole_block(frames: &[u64; PAGES]) -> Option<u64> {
    let first = frames[0];
    let whole = first != 0
        && first % PAGES as u64 == 0
        && frames.iter().zip(first..).all(|(&frame, expected)| frame == expected);
    whole.then_some(first / PAGES as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_aligned_and_contiguous_frames_are_a_block() {
        let mut frames = [0; PAGES];
        assert_eq!(whole_block(&frames), None);
        for (frame, number) in frames.iter_mut().zip(1024..) {
            *frame = number;
        }
        assert_eq!(whole_block(&frames), Some(2));
        frames[17] = 9;
        assert_eq!(whole_block(&frames), None);
        for (frame, number) in frames.iter_mut().zip(1025..) {
            *frame = number;
        }
        assert_eq!(whole_block(&frames), None);
    }
}

//! What a process's page tables hold, block by block.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::kernel::Geometry;
use crate::sys::{self, Region, Wanted, PAGE_IS_PFNZERO, PAGE_IS_PRESENT, PAGE_IS_SWAPPED};

/// Regions that one call of the kernel may fill; 12 KiB. Linux gathers as many at once
/// (fs/proc/task_mmu.c), and asked for more it may tell a wrong end.
const REGIONS: usize = 512;

// Bits of the words of /proc/PID/pagemap.
const PRESENT: u64 = 1 << 63;
const EXCLUSIVE: u64 = 1 << 56;
const FRAME: u64 = (1 << 55) - 1;

/// How many base pages of a block are what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Occupancy {
    /// In memory, pages of zeros left out.
    pub present: u64,
    /// The kernel's page of zeros: read, and never written.
    pub zero: u64,
    /// Swapped out, or just being moved.
    pub swapped: u64,
}

/// Where the present pages of a block are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// Pages that another process, or another address, has as well.
    pub shared: u64,
    /// Pages that lie on host huge pages.
    pub on_host_huge: u64,
}

/// Folds regions into blocks.
struct Fold {
    geometry: Geometry,
    block: u64,
    occupancy: Occupancy,
}

impl Fold {
    fn new(geometry: Geometry) -> Self {
        Fold { geometry, block: 0, occupancy: Occupancy::default() }
    }

    /// Takes the next region, in ascending order; hands complete blocks that
    /// hold anything to `visit`.
    fn push(
        &mut self,
        region: Region,
        visit: &mut impl FnMut(u64, Occupancy) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut start = region.start;
        while start < region.end {
            let block = start - start % self.geometry.block;
            if block != self.block {
                self.finish(visit)?;
                self.block = block;
            }
            let end = region.end.min(block.saturating_add(self.geometry.block));
            let pages = (end - start) / self.geometry.page;
            let counter = if region.categories & PAGE_IS_SWAPPED != 0 {
                &mut self.occupancy.swapped
            } else if region.categories & PAGE_IS_PFNZERO != 0 {
                &mut self.occupancy.zero
            } else if region.categories & PAGE_IS_PRESENT != 0 {
                &mut self.occupancy.present
            } else {
                break;
            };
            *counter += pages;
            start = end;
        }
        Ok(())
    }

    fn finish(
        &mut self,
        visit: &mut impl FnMut(u64, Occupancy) -> io::Result<()>,
    ) -> io::Result<()> {
        let occupancy = std::mem::take(&mut self.occupancy);
        if occupancy == Occupancy::default() {
            return Ok(());
        }
        visit(self.block, occupancy)
    }
}

/// The page tables of one process.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    geometry: Geometry,
}

impl Pagemap {
    /// Opens those of process `pid`.
    ///
    /// # Errors
    /// If it is gone, or the right to trace it is missing.
    pub fn open(pid: i32, geometry: Geometry) -> io::Result<Self> {
        let file = File::open(format!("/proc/{pid}/pagemap"))?;
        Ok(Pagemap { file, geometry })
    }

    /// Hands every block of `range` (whole blocks) that has base pages in it to
    /// `visit`, ascending.
    ///
    /// # Errors
    /// If the process is gone; or the error of `visit`, which ends the walk.
    pub fn blocks(
        &self,
        range: &Range<u64>,
        mut visit: impl FnMut(u64, Occupancy) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut fold = Fold::new(self.geometry);
        self.regions(range, Wanted::Base, |region| fold.push(region, &mut visit))?;
        fold.finish(&mut visit)
    }

    /// Bytes of `range` that huge pages map.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn huge_bytes(&self, range: &Range<u64>) -> io::Result<u64> {
        let mut bytes = 0;
        self.regions(range, Wanted::Huge, |region| {
            bytes += region.end - region.start;
            Ok(())
        })?;
        Ok(bytes)
    }

    fn regions(
        &self,
        range: &Range<u64>,
        wanted: Wanted,
        mut each: impl FnMut(Region) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut regions = [Region::default(); REGIONS];
        let mut left = range.clone();
        while left.start < left.end {
            let (count, next) = sys::scan(&self.file, &left, wanted, &mut regions)?;
            regions[..count].iter().try_for_each(|region| each(*region))?;
            if next <= left.start {
                return Err(io::Error::other("the kernel's scan of page tables stands still"));
            }
            left.start = next;
        }
        Ok(())
    }

    /// Where the pages of the block at `address` are; `on_host_huge` tells for
    /// a block of guest memory, by number.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn placement(
        &self,
        address: u64,
        zero: u64,
        on_host_huge: impl Fn(u64) -> bool,
    ) -> io::Result<Placement> {
        let count = usize::try_from(self.geometry.pages()).map_err(io::Error::other)?;
        let mut bytes = vec![0; count * 8];
        self.file.read_exact_at(&mut bytes, address / self.geometry.page * 8)?;
        let words = bytes.chunks_exact(8).filter_map(|word| word.try_into().ok());
        Ok(place(words.map(u64::from_ne_bytes), zero, self.geometry, on_host_huge))
    }
}

/// A page of zeros counts as not exclusive, so `zero` of them are taken off.
/// Frames read as 0 without CAP_SYS_ADMIN; frame 0 is no page of a process.
fn place(
    words: impl Iterator<Item = u64>,
    zero: u64,
    geometry: Geometry,
    on_host_huge: impl Fn(u64) -> bool,
) -> Placement {
    let mut placement = Placement::default();
    for word in words.filter(|word| word & PRESENT != 0) {
        placement.shared += u64::from(word & EXCLUSIVE == 0);
        let frame = word & FRAME;
        let block = frame / geometry.pages();
        placement.on_host_huge += u64::from(frame != 0 && on_host_huge(block));
    }
    placement.shared = placement.shared.saturating_sub(zero);
    placement
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GEOMETRY: Geometry = Geometry { page: 4096, block: 2 << 20 };
    const BLOCK: u64 = 2 << 20;

    fn fold(regions: &[Region]) -> Vec<(u64, Occupancy)> {
        let mut seen = Vec::new();
        let mut visit = |block, occupancy| {
            seen.push((block, occupancy));
            Ok(())
        };
        let mut fold = Fold::new(GEOMETRY);
        for region in regions {
            fold.push(*region, &mut visit).expect("visit never fails");
        }
        fold.finish(&mut visit).expect("visit never fails");
        seen
    }

    #[test]
    fn region_over_several_blocks_is_divided() {
        let region = Region { start: BLOCK / 2, end: 5 * BLOCK / 2, categories: PAGE_IS_PRESENT };
        let present: Vec<_> =
            fold(&[region]).iter().map(|(block, seen)| (*block, seen.present)).collect();
        assert_eq!(present, [(0, 256), (BLOCK, 512), (2 * BLOCK, 256)]);
    }

    #[test]
    fn zero_pages_and_swapped_pages_are_not_present() {
        let page = |number: u64, categories| Region {
            start: number * 4096,
            end: (number + 1) * 4096,
            categories,
        };
        let seen = fold(&[
            page(0, PAGE_IS_PRESENT),
            page(1, PAGE_IS_PRESENT | PAGE_IS_PFNZERO),
            page(2, PAGE_IS_SWAPPED),
        ]);
        assert_eq!(seen, [(0, Occupancy { present: 1, zero: 1, swapped: 1 })]);
    }

    #[test]
    fn pages_are_placed_by_their_frames() {
        let words = [
            PRESENT | EXCLUSIVE | 512,
            PRESENT | EXCLUSIVE | 1023,
            PRESENT | EXCLUSIVE | 1024,
            PRESENT | 1025,
            PRESENT,
            EXCLUSIVE | 512,
        ];
        let placement = place(words.into_iter(), 1, GEOMETRY, |block| block == 1);
        assert_eq!(placement, Placement { shared: 1, on_host_huge: 2 });
    }

    proptest! {
        #[test]
        fn folding_loses_no_page(
            runs in proptest::collection::vec((0_u64..700, 1_u64..1500, 0_u64..3), 0..20),
        ) {
            let mut regions = Vec::new();
            let mut at = 0;
            let mut expected = [0_u64; 3];
            for (gap, count, kind) in runs {
                let start = (at + gap) * 4096;
                at += gap + count;
                let categories = match kind {
                    0 => PAGE_IS_PRESENT,
                    1 => PAGE_IS_PRESENT | PAGE_IS_PFNZERO,
                    _ => PAGE_IS_SWAPPED,
                };
                expected[usize::try_from(kind).expect("below 3")] += count;
                regions.push(Region { start, end: at * 4096, categories });
            }
            let seen = fold(&regions);
            prop_assert!(seen.windows(2).all(|pair| pair[0].0 < pair[1].0));
            let mut sums = [0_u64; 3];
            for (block, occupancy) in &seen {
                prop_assert_eq!(block % BLOCK, 0);
                let counts = [occupancy.present, occupancy.zero, occupancy.swapped];
                prop_assert!(counts.iter().sum::<u64>() <= 512);
                for (sum, count) in sums.iter_mut().zip(counts) {
                    *sum += count;
                }
            }
            prop_assert_eq!(sums, expected);
        }
    }
}

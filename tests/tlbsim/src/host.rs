//! Which blocks of guest memory the host has huge.

use crate::paging::PageSize;

/// log2 of the size of a block.
pub(crate) const BLOCK_SHIFT: u32 = 21;

/// Where QEMU's q35 machine continues memory that does not fit below.
const HIGH_START: u64 = 4 << 30;

/// From this size on it leaves a gap below 4 GiB...
const LOW_LIMIT: u64 = 0xb000_0000;

/// ...and has this much below the gap.
const LOW_BYTES: u64 = 0x8000_0000;

/// How guest physical addresses map to offsets in the guest's one piece of
/// memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamLayout {
    low: u64,
    bytes: u64,
}

impl RamLayout {
    /// The layout of QEMU's q35 machine with `bytes` of memory.
    #[must_use]
    pub fn q35(bytes: u64) -> Self {
        RamLayout { low: if bytes >= LOW_LIMIT { LOW_BYTES } else { bytes }, bytes }
    }

    /// Bytes of memory.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Offset of the memory at a guest physical address; `None` where none is.
    #[must_use]
    pub fn offset(&self, gpa: u64) -> Option<u64> {
        if gpa < self.low {
            return Some(gpa);
        }
        let offset = gpa.checked_sub(HIGH_START)?.checked_add(self.low)?;
        (offset < self.bytes).then_some(offset)
    }
}

/// The size of page that the host maps each block of guest memory with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostMap {
    layout: RamLayout,
    /// Size of the host's huge pages.
    huge: PageSize,
    /// One bit a block of memory, in the order of offsets.
    bits: Vec<u64>,
}

impl HostMap {
    /// A host with base pages alone, whose huge pages have the size `huge`.
    #[must_use]
    pub fn new(layout: RamLayout, huge: PageSize) -> Self {
        let blocks = layout.bytes.div_ceil(1 << BLOCK_SHIFT);
        let words = usize::try_from(blocks.div_ceil(64)).unwrap_or(0);
        HostMap { layout, huge, bits: vec![0; words] }
    }

    /// Where memory is.
    #[must_use]
    pub fn layout(&self) -> RamLayout {
        self.layout
    }

    /// Size of the host's huge pages.
    #[must_use]
    pub fn huge_size(&self) -> PageSize {
        self.huge
    }

    /// The bits themselves: one a block of 2 MiB, in the order of offsets.
    #[must_use]
    pub fn bits(&self) -> &[u64] {
        &self.bits
    }

    /// Replaces the bits. Missing ones are 0, and what is too much is left out.
    pub fn set_bits(&mut self, bits: &[u64]) {
        for (index, word) in self.bits.iter_mut().enumerate() {
            *word = bits.get(index).copied().unwrap_or(0);
        }
    }

    /// Says that all blocks that lie in `offset..offset + bytes` as a whole are
    /// huge.
    pub fn set_huge(&mut self, offset: u64, bytes: u64) {
        let first = offset.div_ceil(1 << BLOCK_SHIFT);
        let end = (offset + bytes) >> BLOCK_SHIFT;
        for block in first..end {
            let word = usize::try_from(block / 64).unwrap_or(usize::MAX);
            if let Some(word) = self.bits.get_mut(word) {
                *word |= 1 << (block % 64);
            }
        }
    }

    /// Size of the page under a guest physical address.
    ///
    /// Block 0 never counts as huge: a PC's memory has a hole below 1 MiB, so
    /// that KVM has two memory slots there and maps both with base pages.
    #[must_use]
    pub fn page_size(&self, gpa: u64) -> PageSize {
        let Some(offset) = self.layout.offset(gpa) else {
            return PageSize::Base;
        };
        let block = offset >> BLOCK_SHIFT;
        let word = usize::try_from(block / 64).ok().and_then(|index| self.bits.get(index));
        let huge = block != 0 && word.is_some_and(|word| word >> (block % 64) & 1 == 1);
        if huge {
            self.huge
        } else {
            PageSize::Base
        }
    }

    /// Number of blocks that are huge.
    #[must_use]
    pub fn huge_blocks(&self) -> u64 {
        self.bits.iter().map(|word| u64::from(word.count_ones())).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: u64 = 1 << BLOCK_SHIFT;

    #[test]
    fn small_machines_are_in_one_piece_and_large_ones_in_two() {
        let small = RamLayout::q35(1 << 30);
        assert_eq!(small.offset((1 << 30) - 1), Some((1 << 30) - 1));
        assert_eq!(small.offset(1 << 30), None);
        let large = RamLayout::q35(4 << 30);
        assert_eq!(large.offset(LOW_BYTES), None);
        assert_eq!(large.offset(HIGH_START), Some(LOW_BYTES));
        assert_eq!(large.offset(HIGH_START + LOW_BYTES - 1), Some((4 << 30) - 1));
        assert_eq!(large.offset(HIGH_START + LOW_BYTES), None);
    }

    #[test]
    fn only_whole_blocks_are_huge_and_never_the_first() {
        let mut map = HostMap::new(RamLayout::q35(8 * BLOCK), PageSize::Huge);
        map.set_huge(0, 2 * BLOCK);
        map.set_huge(3 * BLOCK - 4096, BLOCK + 8192);
        map.set_huge(100 * BLOCK, BLOCK);
        let sizes: Vec<_> = (0..5).map(|block| map.page_size(block * BLOCK)).collect();
        let (base, huge) = (PageSize::Base, PageSize::Huge);
        assert_eq!(sizes, [base, huge, base, huge, base]);
        assert_eq!(map.huge_blocks(), 3);
    }
}

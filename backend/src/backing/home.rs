//! Where the blocks of one region are: in the memory file, and in the VMM's address space.

use super::vmm::Vmm;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

/// One region and its way to the system calls. All blocks that come here lie wholly in the
/// region (the layout has made sure of it), so that no sum overflows.
pub struct Home {
    /// The memory file, as the VMM gave it.
    pub file: File,
    /// The same, to be searched for data: that moves the file position, and the one of `file` is
    /// shared with the VMM.
    pub searched: File,
    /// First guest physical address.
    pub guest_addr: u64,
    /// Where in the file the region begins.
    pub file_offset: u64,
    /// log2 of the block size.
    pub block_shift: u32,
    /// The VMM and its address of the region.
    pub vmm: Option<(Arc<Vmm>, u64)>,
}

impl Home {
    /// Size of a block in bytes.
    pub fn block_size(&self) -> u64 {
        1 << self.block_shift
    }

    fn distance(&self, block: u64) -> u64 {
        (block << self.block_shift) - self.guest_addr
    }

    /// Offset of a block in the file.
    pub fn offset(&self, block: u64) -> u64 {
        self.file_offset + self.distance(block)
    }

    /// Offset of a guest physical address of the region in the file.
    pub fn offset_of(&self, addr: u64) -> u64 {
        self.file_offset + (addr - self.guest_addr)
    }

    /// Bytes of the file that blocks occupy.
    pub fn bytes(&self, blocks: &Range<u64>) -> u64 {
        (blocks.end - blocks.start) << self.block_shift
    }

    /// The VMM and its addresses of blocks.
    pub fn at_vmm(&self, blocks: &Range<u64>) -> Option<(&Vmm, Range<u64>)> {
        let (vmm, addr) = self.vmm.as_ref()?;
        let start = addr + self.distance(blocks.start);
        Some((vmm, start..start + self.bytes(blocks)))
    }
}

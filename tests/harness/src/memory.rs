//! Guest memory: a memory file, its regions of guest physical addresses, and
//! the mapping that stands for the virtual machine monitor's.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Mutex, PoisonError};

use crate::sys::{self, Mapping, Pages};

/// log2 of the block size that the harness works with.
pub const BLOCK_SHIFT: u32 = 21;
/// Size of a block in bytes.
pub const BLOCK_SIZE: u64 = 1 << BLOCK_SHIFT;
/// Size of a page of [`Placement::Gigantic`] in bytes.
pub const GIGANTIC_SIZE: u64 = 1 << 30;

/// A range of guest physical addresses and where in the file it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First guest physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub size: u64,
    /// Offset in the memory file.
    pub offset: u64,
}

/// How the memory is mapped in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// At a multiple of the block size, so that huge mappings are possible.
    Aligned,
    /// One page below a multiple, as a careless monitor has it: no block can be
    /// mapped huge.
    Skewed,
    /// Aligned, yet private: what is written never reaches the file, as with a
    /// monitor whose memory is not shared.
    Private,
    /// Aligned, in huge pages from the host's pool (hugetlb), all of which are
    /// set aside for it.
    Reserved,
    /// The same, and nothing is set aside (QEMU's `reserve=off`): who touches
    /// memory while the pool is empty dies of SIGBUS.
    Unreserved,
    /// As [`Placement::Unreserved`], in pages of 1 GiB.
    Gigantic,
}

/// The memory of the model guest.
#[derive(Debug)]
pub struct GuestMemory {
    file: File,
    mapping: Mapping,
    regions: Vec<Region>,
    /// Pages that the guest wrote to, as a hypervisor sees it.
    written: Mutex<BTreeSet<u64>>,
}

impl GuestMemory {
    /// Memory of `size` bytes in one region from address 0 on.
    ///
    /// # Errors
    /// Those of creating and mapping the memory file.
    pub fn new(size: u64, placement: Placement) -> io::Result<Self> {
        let region = Region { gpa: 0, size, offset: 0 };
        Self::with_regions(size, placement, vec![region])
    }

    /// Memory of `size` bytes in one region from address 0 on, which are those of
    /// `file`.
    ///
    /// # Errors
    /// Those of mapping it.
    pub fn of_file(file: File, size: u64) -> io::Result<Self> {
        let mapping = Mapping::new(&file, size, BLOCK_SIZE, 0, true)?;
        let regions = vec![Region { gpa: 0, size, offset: 0 }];
        Ok(GuestMemory { file, mapping, regions, written: Mutex::default() })
    }

    /// Memory of `size` bytes of which `regions` are the guest's.
    ///
    /// # Errors
    /// Those of creating and mapping the memory file.
    pub fn with_regions(size: u64, placement: Placement, regions: Vec<Region>) -> io::Result<Self> {
        let (pages, align) = match placement {
            Placement::Reserved | Placement::Unreserved => (Pages::Huge, BLOCK_SIZE),
            Placement::Gigantic => (Pages::Gigantic, GIGANTIC_SIZE),
            _ => (Pages::Any, BLOCK_SIZE),
        };
        let file = sys::memfd(size, pages)?;
        let skew = match placement {
            Placement::Skewed => BLOCK_SIZE - sys::PAGE_SIZE,
            _ => 0,
        };
        let shared = placement != Placement::Private;
        let mapping = match placement {
            Placement::Reserved => Mapping::reserving(&file, size, align)?,
            _ => Mapping::new(&file, size, align, skew, shared)?,
        };
        Ok(GuestMemory { file, mapping, regions, written: Mutex::default() })
    }

    /// The regions, in the order given.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The memory file.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The mapping of the whole file in this process.
    #[must_use]
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// Address in this process of the byte at `offset` of the file.
    #[must_use]
    pub fn host_address(&self, offset: u64) -> u64 {
        self.mapping.address() + offset
    }

    /// Blocks of the file; where there is one region from 0 on, the blocks of
    /// the guest.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.mapping.len() >> BLOCK_SHIFT
    }

    /// The table as the vhost-user message has it.
    #[must_use]
    pub fn table(&self) -> Vec<vhost::VhostUserMemoryRegionInfo> {
        self.regions
            .iter()
            .map(|region| vhost::VhostUserMemoryRegionInfo {
                guest_phys_addr: region.gpa,
                memory_size: region.size,
                userspace_addr: self.host_address(region.offset),
                mmap_offset: region.offset,
                mmap_handle: self.file.as_raw_fd(),
            })
            .collect()
    }

    /// Offset in the file of `gpa`.
    ///
    /// # Panics
    /// If the address is in no region.
    #[must_use]
    pub fn offset(&self, gpa: u64) -> u64 {
        self.regions
            .iter()
            .find(|region| gpa >= region.gpa && gpa - region.gpa < region.size)
            .map(|region| gpa - region.gpa + region.offset)
            .unwrap_or_else(|| panic!("guest address {gpa:#x} is in no region"))
    }

    /// Writes `bytes` at a guest address, as the guest does.
    ///
    /// # Panics
    /// If they do not lie in guest memory.
    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        self.note(gpa, bytes.len() as u64);
        self.mapping.write(self.offset(gpa), bytes);
    }

    /// Reads at a guest address, as the guest does.
    ///
    /// # Panics
    /// If the range is not in guest memory.
    pub fn read(&self, gpa: u64, bytes: &mut [u8]) {
        self.mapping.read(self.offset(gpa), bytes);
    }

    /// Reads a little-endian u16 at a guest address.
    ///
    /// # Panics
    /// If it is not in guest memory.
    #[must_use]
    pub fn load_u16(&self, gpa: u64) -> u16 {
        self.mapping.load_u16(self.offset(gpa))
    }

    /// Writes a little-endian u16 at a guest address.
    ///
    /// # Panics
    /// If it is not in guest memory.
    pub fn store_u16(&self, gpa: u64, value: u16) {
        self.note(gpa, 2);
        self.mapping.store_u16(self.offset(gpa), value);
    }

    /// Notes pages that the guest writes to.
    fn note(&self, gpa: u64, len: u64) {
        let pages = gpa / sys::PAGE_SIZE..(gpa + len).div_ceil(sys::PAGE_SIZE);
        self.written.lock().unwrap_or_else(PoisonError::into_inner).extend(pages);
    }

    /// Numbers of the pages that the guest wrote to since this was called last.
    #[must_use]
    pub fn take_written(&self) -> BTreeSet<u64> {
        std::mem::take(&mut self.written.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Reads the file without touching the mapping: looking must not fill holes
    /// or page tables.
    ///
    /// # Errors
    /// Those of `pread`.
    pub fn peek(&self, gpa: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, self.offset(gpa))
    }

    /// Bytes that the host holds for this memory.
    ///
    /// # Errors
    /// Those of `fstat`.
    pub fn resident_bytes(&self) -> io::Result<u64> {
        // st_blocks counts units of 512 bytes, whatever the file system.
        Ok(self.file.metadata()?.blocks() * 512)
    }

    /// Takes the memory of `len` bytes at `gpa` away, as a balloon does.
    ///
    /// # Errors
    /// Those of `fallocate`.
    pub fn discard(&self, gpa: u64, len: u64) -> io::Result<()> {
        sys::punch_hole(&self.file, self.offset(gpa), len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapping_is_placed_as_asked() {
        let aligned = GuestMemory::new(4 * BLOCK_SIZE, Placement::Aligned).expect("memory");
        assert_eq!(aligned.host_address(0) % BLOCK_SIZE, 0);
        let skewed = GuestMemory::new(4 * BLOCK_SIZE, Placement::Skewed).expect("memory");
        assert_eq!(skewed.host_address(0) % BLOCK_SIZE, BLOCK_SIZE - 4096);
    }

    #[test]
    fn peek_sees_writes_and_fills_no_hole() {
        let memory = GuestMemory::new(4 * BLOCK_SIZE, Placement::Aligned).expect("memory");
        let mut bytes = [1; 8];
        memory.peek(BLOCK_SIZE, &mut bytes).expect("peek");
        assert_eq!(bytes, [0; 8]);
        assert_eq!(memory.resident_bytes().expect("stat"), 0);
        memory.write(BLOCK_SIZE, &[7; 8]);
        memory.peek(BLOCK_SIZE, &mut bytes).expect("peek");
        assert_eq!(bytes, [7; 8]);
    }

    #[test]
    fn addresses_follow_the_regions() {
        let regions = vec![
            Region { gpa: 0, size: BLOCK_SIZE, offset: 0 },
            Region { gpa: 1 << 32, size: BLOCK_SIZE, offset: BLOCK_SIZE },
        ];
        let memory =
            GuestMemory::with_regions(2 * BLOCK_SIZE, Placement::Aligned, regions).expect("memory");
        assert_eq!(memory.offset((1 << 32) + 5), BLOCK_SIZE + 5);
        assert_eq!(memory.table().len(), 2);
    }
}

//! Memory of whole huge pages.

use std::io;
use std::ptr::NonNull;

use anyhow::Context;

use crate::protocol::PageSize;

/// Size of a huge page in bytes.
pub const HUGE: usize = 2 << 20;

/// Size of a base page in bytes.
pub const PAGE: usize = 4096;

/// Base pages in a huge page.
pub const PAGES: usize = HUGE / PAGE;

/// Whose memory it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Anonymous memory.
    Private,
    /// Shared memory without a name (shmem).
    Shared,
}

/// Memory without a file, aligned to a huge page and a multiple of it.
pub struct Mapping {
    /// Start of the mapping, before alignment.
    base: NonNull<libc::c_void>,
    /// Length of the mapping in bytes.
    mapped: usize,
    /// First aligned word.
    start: NonNull<u64>,
    /// Usable bytes from `start` on.
    bytes: usize,
}

// SAFETY: the mapping belongs to this value alone, and nothing about it is tied
// to a thread.
unsafe impl Send for Mapping {}

// SAFETY: through a shared reference the memory is reached only by single reads
// and writes whose callers must keep them apart (see `write`), and by calls to
// the kernel.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `bytes`, rounded up to whole huge pages and at least one; nothing of
    /// it is resident yet.
    ///
    /// # Errors
    /// If the memory cannot be mapped or the advice is refused.
    pub fn new(bytes: u64, pages: PageSize, sharing: Sharing) -> anyhow::Result<Self> {
        let bytes = usize::try_from(bytes)
            .ok()
            .and_then(|bytes| bytes.max(1).checked_next_multiple_of(HUGE))
            .context("more memory than addresses")?;
        let mapped = bytes.checked_add(HUGE).context("more memory than addresses")?;
        let sharing = match sharing {
            Sharing::Private => libc::MAP_PRIVATE,
            Sharing::Shared => libc::MAP_SHARED,
        };
        // SAFETY: a new mapping without a file at an address of the kernel's
        // choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped,
                libc::PROT_READ | libc::PROT_WRITE,
                sharing | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error())
                .with_context(|| format!("cannot map {bytes} bytes"));
        }
        let base = NonNull::new(base).context("the kernel mapped address 0")?;
        let offset = base.as_ptr().align_offset(HUGE);
        // SAFETY: one huge page more than needed was mapped, so the aligned
        // address and `bytes` from it on lie inside the mapping.
        let start = unsafe { base.byte_add(offset) }.cast();
        let mapping = Mapping { base, mapped, start, bytes };
        let advice = match pages {
            PageSize::Huge => Some(libc::MADV_HUGEPAGE),
            PageSize::Base => Some(libc::MADV_NOHUGEPAGE),
            PageSize::System => None,
        };
        if let Some(advice) = advice {
            mapping.advise(0, bytes, advice)?;
        }
        Ok(mapping)
    }

    /// Size in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Number of words of 8 bytes.
    #[must_use]
    pub fn words(&self) -> usize {
        self.bytes / 8
    }

    /// Address of the first byte.
    #[must_use]
    pub fn address(&self) -> usize {
        self.start.as_ptr() as usize
    }

    /// The word number `index`.
    ///
    /// # Panics
    /// If it lies outside.
    #[must_use]
    pub fn read(&self, index: usize) -> u64 {
        assert!(index < self.words());
        // SAFETY: the word lies inside the mapping.
        unsafe { self.start.add(index).read_volatile() }
    }

    /// Writes the word number `index`. Two threads must not do so at the same
    /// time to the same word.
    ///
    /// # Panics
    /// If it lies outside.
    pub fn write(&self, index: usize, value: u64) {
        assert!(index < self.words());
        // SAFETY: the word lies inside the mapping, to which there are no
        // references.
        unsafe { self.start.add(index).write_volatile(value) };
    }

    /// `madvise` on a part, in bytes.
    ///
    /// # Errors
    /// If the kernel refuses.
    ///
    /// # Panics
    /// If the part lies outside.
    pub fn advise(&self, offset: usize, length: usize, advice: libc::c_int) -> anyhow::Result<()> {
        assert!(length <= self.bytes && offset <= self.bytes - length);
        // SAFETY: the range lies inside the mapping, which this value owns; no
        // reference to its words exists outside of single reads and writes.
        let result =
            unsafe { libc::madvise(self.start.as_ptr().byte_add(offset).cast(), length, advice) };
        if result != 0 {
            return Err(io::Error::last_os_error())
                .with_context(|| format!("madvise({advice}) is refused"));
        }
        Ok(())
    }

    /// Makes a part read-only, in bytes.
    ///
    /// # Errors
    /// If the kernel refuses.
    ///
    /// # Panics
    /// If the part lies outside.
    pub fn protect(&self, offset: usize, length: usize) -> anyhow::Result<()> {
        assert!(length <= self.bytes && offset <= self.bytes - length);
        // SAFETY: as in `advise`; who calls this writes there no more, or gets
        // the signal that was asked for.
        let result = unsafe {
            libc::mprotect(self.start.as_ptr().byte_add(offset).cast(), length, libc::PROT_READ)
        };
        if result != 0 {
            return Err(io::Error::last_os_error()).context("mprotect is refused");
        }
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own and nothing uses it any more.
        unsafe { libc::munmap(self.base.as_ptr(), self.mapped) };
    }
}

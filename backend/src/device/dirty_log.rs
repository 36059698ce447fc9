//! The log of pages that we wrote, which the VMM reads during a live migration.
//!
//! The frame gives every region of its map a part of the log when the VMM hands the log over, and
//! marks what is written through that map. Two things are left for us: regions of a memory table
//! that comes while the log is on have no part yet (a guest that reboots during a migration gets
//! several), and a migration that ends without the guest leaving has the log taken away.

use super::vring::GuestMap;
use crate::engine::lock;
use std::io;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use vhost_user_backend::bitmap::{
    AtomicBitmapMmap, BitmapMmapRegion, BitmapReplace, MemRegionBitmap, MmapLogReg,
};
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::mmap::NewBitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

/// The part of a log that is about one region.
#[derive(Debug)]
pub struct Part {
    log: Arc<MmapLogReg>,
    pages: BitmapMmapRegion,
}

impl MemRegionBitmap for Part {
    fn new<R: GuestMemoryRegion>(region: &R, log: Arc<MmapLogReg>) -> io::Result<Self> {
        let pages = BitmapMmapRegion::default();
        pages.replace(AtomicBitmapMmap::new(region, Arc::clone(&log))?);
        Ok(Self { log, pages })
    }
}

/// The pages of one region, or of a slice of it, as far as somebody wants to know of them.
#[derive(Clone, Debug, Default)]
pub struct DirtyPages {
    /// Shared by all slices of the region.
    part: Arc<RwLock<Option<Part>>>,
    /// Where the slice begins in the region.
    start: usize,
}

impl DirtyPages {
    fn read<T>(&self, read: impl FnOnce(&Part) -> T) -> Option<T> {
        self.part.read().unwrap_or_else(PoisonError::into_inner).as_ref().map(read)
    }

    fn set(&self, part: Option<Part>) {
        *self.part.write().unwrap_or_else(PoisonError::into_inner) = part;
    }
}

impl Bitmap for DirtyPages {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.read(|part| part.pages.mark_dirty(self.start.saturating_add(offset), len));
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.read(|part| part.pages.dirty_at(self.start.saturating_add(offset))).unwrap_or(false)
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self { part: Arc::clone(&self.part), start: self.start.saturating_add(offset) }
    }
}

impl BitmapSlice for DirtyPages {}

impl WithBitmapSlice<'_> for DirtyPages {
    type S = Self;
}

impl NewBitmap for DirtyPages {
    fn with_len(_len: usize) -> Self {
        Self::default()
    }
}

impl BitmapReplace for DirtyPages {
    type InnerBitmap = Part;

    fn replace(&self, part: Part) {
        self.set(Some(part));
    }
}

/// The log of one connection, over its memory tables.
#[derive(Debug, Default)]
pub struct DirtyLog {
    /// Of one region of the last table: what the VMM's log is now. Keeps no guest memory mapped.
    last: Mutex<DirtyPages>,
}

impl DirtyLog {
    /// A memory table came: what is in it is logged as the one before was.
    ///
    /// # Errors
    /// If the log is too short for it.
    pub fn follow(&self, memory: &GuestMap) -> io::Result<()> {
        let mut last = lock(&self.last);
        if let Some(log) = last.read(|part| Arc::clone(&part.log)) {
            for region in memory.iter().filter(|region| region.bitmap().read(|_| ()).is_none()) {
                region.bitmap().replace(Part::new(region, Arc::clone(&log))?);
            }
        }
        *last = memory.iter().next().map(GuestMemoryRegion::bitmap).unwrap_or_default();
        Ok(())
    }

    /// The VMM reads the log no more.
    pub fn end(&self, memory: &GuestMap) {
        memory.iter().for_each(|region| region.bitmap().set(None));
    }
}

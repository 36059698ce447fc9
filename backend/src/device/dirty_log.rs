//! The log of pages that we wrote, which the VMM reads during a live migration.
//!
//! The frame gives every region of its map a part of the log when the VMM hands the log over, and
//! marks what is written through that map. Two things are left for us: regions of a memory table
//! that comes while the log is on have no part yet (a guest that reboots during a migration gets
//! several), and a migration that ends without the guest leaving has the log taken away. The frame
//! puts a new table in force before it tells us, while queues run: so a new region remembers what was
//! written to it until then.

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

/// Writes that a new region remembers one by one; after more than these all of it counts as written.
const REMEMBERED_MAX: usize = 1024;

/// What becomes of a write to a region.
#[derive(Debug)]
enum Writes {
    /// The region is new: they are remembered, as offset and length.
    Remembered(Mutex<Vec<(usize, usize)>>),
    /// Nobody wants to know.
    Ignored,
    /// They are logged.
    Logged(Part),
}

/// The pages of one region, or of a slice of it, as far as somebody wants to know of them.
#[derive(Clone, Debug)]
pub struct DirtyPages {
    /// Shared by all slices of the region.
    writes: Arc<RwLock<Writes>>,
    /// Where the slice begins in the region.
    start: usize,
}

impl Default for DirtyPages {
    fn default() -> Self {
        let remembered = Writes::Remembered(Mutex::default());
        Self { writes: Arc::new(RwLock::new(remembered)), start: 0 }
    }
}

impl DirtyPages {
    fn read<T>(&self, read: impl FnOnce(&Writes) -> T) -> T {
        read(&self.writes.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// From now on writes are treated so; those that were remembered are as well.
    fn set(&self, new: Writes) {
        let mut writes = self.writes.write().unwrap_or_else(PoisonError::into_inner);
        if let (Writes::Remembered(remembered), Writes::Logged(part)) = (&*writes, &new) {
            for &(offset, len) in lock(remembered).iter() {
                part.pages.mark_dirty(offset, len);
            }
        }
        *writes = new;
    }

    fn is_new(&self) -> bool {
        self.read(|writes| matches!(writes, Writes::Remembered(_)))
    }

    /// The log, if there is one.
    fn log(&self) -> Option<Arc<MmapLogReg>> {
        self.read(|writes| match writes {
            Writes::Logged(part) => Some(Arc::clone(&part.log)),
            Writes::Remembered(_) | Writes::Ignored => None,
        })
    }
}

impl Bitmap for DirtyPages {
    fn mark_dirty(&self, offset: usize, len: usize) {
        let offset = self.start.saturating_add(offset);
        self.read(|writes| match writes {
            Writes::Remembered(remembered) => {
                let mut remembered = lock(remembered);
                match remembered.len() {
                    0..REMEMBERED_MAX => remembered.push((offset, len)),
                    _ => *remembered = vec![(0, usize::MAX)],
                }
            }
            Writes::Ignored => {}
            Writes::Logged(part) => part.pages.mark_dirty(offset, len),
        });
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let offset = self.start.saturating_add(offset);
        self.read(|writes| match writes {
            Writes::Logged(part) => part.pages.dirty_at(offset),
            Writes::Remembered(_) | Writes::Ignored => false,
        })
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self { writes: Arc::clone(&self.writes), start: self.start.saturating_add(offset) }
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
        self.set(Writes::Logged(part));
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
        let log = last.log();
        for region in memory.iter().filter(|region| region.bitmap().is_new()) {
            region.bitmap().set(match &log {
                Some(log) => Writes::Logged(Part::new(region, Arc::clone(log))?),
                None => Writes::Ignored,
            });
        }
        *last = memory.iter().next().map(GuestMemoryRegion::bitmap).unwrap_or_default();
        Ok(())
    }

    /// The VMM reads the log no more.
    pub fn end(&self, memory: &GuestMap) {
        memory.iter().for_each(|region| region.bitmap().set(Writes::Ignored));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_region_remembers_what_is_written_to_any_slice_of_it() {
        let pages = DirtyPages::default();
        pages.slice_at(0x2000).slice_at(0x800).mark_dirty(8, 4);
        let remembered = |pages: &DirtyPages| {
            pages.read(|writes| match writes {
                Writes::Remembered(remembered) => lock(remembered).clone(),
                _ => Vec::new(),
            })
        };
        assert_eq!(remembered(&pages), [(0x2808, 4)]);
        for offset in 0..REMEMBERED_MAX {
            pages.mark_dirty(offset, 1);
        }
        assert_eq!(remembered(&pages), [(0, usize::MAX)], "all of it");
        pages.set(Writes::Ignored);
        assert!(!pages.is_new() && pages.log().is_none());
    }
}

//! Memory of which every page's contents are known, whatever the kernel does
//! with it.
//!
//! Beside the memory stands what each page must hold: zeros, or a pattern that
//! no other page of this or another process holds. So a page that is lost,
//! swapped for another, handed out without having been zeroed, or dropped while
//! it was in use, is found by the next look at it.

use std::collections::VecDeque;
use std::fmt::{self, Display, Formatter};
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use anyhow::Context;

use super::random::Random;
use crate::mapping::HUGE;
use crate::pagemap::Pagemap;
use crate::workload::word;

/// Size of a base page in bytes.
pub const PAGE: usize = 4096;

/// Words of 8 bytes in a page.
const WORDS: usize = PAGE / 8;

/// Base pages in a huge page.
pub const PAGES: usize = HUGE / PAGE;

/// Between two neighbouring words of a page.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// What a page must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holds {
    /// Never written, or dropped.
    Zero,
    /// The pattern of this stamp.
    Pattern(u64),
    /// Given to `MADV_FREE`: the pattern as long as the kernel leaves it there.
    PatternOrZero(u64),
}

/// Where memory comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Anonymous, of this process.
    Private,
    /// A memfd, mapped shared.
    Shared,
    /// A hole of a memfd, mapped private: pages are copied when written.
    PrivateFile,
}

/// A page that does not hold what it must.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// Number of the page in its region.
    pub page: usize,
    /// Number of the word in the page.
    pub word: usize,
    /// What is there.
    pub found: u64,
    /// What must be there.
    pub wanted: u64,
}

/// What was done to pages of a region.
#[derive(Clone, Debug)]
struct Deed {
    name: &'static str,
    /// Which advice, which node.
    argument: libc::c_int,
    pages: Range<usize>,
    error: Option<i32>,
}

/// Deeds that a region remembers.
const DEEDS: usize = 64;

/// A mapping with a known content.
#[derive(Debug)]
pub struct Region {
    start: NonNull<u64>,
    kind: Kind,
    holds: Vec<Holds>,
    stamps: Random,
    deeds: VecDeque<Deed>,
}

impl Region {
    /// Maps `huge` huge pages, aligned to one. Nothing is touched yet.
    ///
    /// # Errors
    /// If the kernel has no address space or file for it.
    pub fn map(kind: Kind, huge: usize, seed: u64) -> anyhow::Result<Self> {
        let length = huge.max(1) * HUGE;
        // The mapping keeps the file.
        let file = match kind {
            Kind::Private => None,
            Kind::Shared | Kind::PrivateFile => Some(memfd(length)?),
        };
        let start = reserve(length)?;
        let flags = match kind {
            Kind::Private => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            Kind::Shared => libc::MAP_SHARED,
            Kind::PrivateFile => libc::MAP_PRIVATE,
        };
        let fd = file.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        // SAFETY: replaces a part of the reservation that `reserve` made for
        // this region alone.
        let mapped = unsafe {
            libc::mmap(
                start.as_ptr().cast(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                flags | libc::MAP_FIXED | libc::MAP_NORESERVE,
                fd,
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            unmap(start, length);
            return Err(error).context("cannot map memory");
        }
        let pages = length / PAGE;
        Ok(Region {
            start: start.cast(),
            kind,
            holds: vec![Holds::Zero; pages],
            stamps: Random::new(word(seed, 0)),
            deeds: VecDeque::new(),
        })
    }

    /// Number of base pages.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.holds.len()
    }

    /// Remembers what was done, for whom to understand a wrong page.
    pub fn remember(
        &mut self,
        name: &'static str,
        argument: libc::c_int,
        pages: Range<usize>,
        result: &io::Result<()>,
    ) {
        if self.deeds.len() == DEEDS {
            self.deeds.pop_front();
        }
        let error = result.as_ref().err().map(|error| error.raw_os_error().unwrap_or(-1));
        self.deeds.push_back(Deed { name, argument, pages, error });
    }

    fn bytes(&self) -> usize {
        self.pages() * PAGE
    }

    fn page(&self, page: usize) -> *mut u64 {
        debug_assert!(page < self.pages());
        // SAFETY: `page` is below the number of pages of the mapping.
        unsafe { self.start.as_ptr().byte_add(page * PAGE) }
    }

    /// The address of a page.
    #[must_use]
    pub fn address(&self, page: usize) -> usize {
        self.page(page) as usize
    }

    /// Writes a new pattern into each of these pages.
    pub fn write(&mut self, pages: Range<usize>) {
        self.remember("write", 0, pages.clone(), &Ok(()));
        for page in pages {
            let stamp = self.stamps.next();
            let base = self.page(page);
            for index in 0..WORDS {
                // SAFETY: `index` is below the words of a page, and the page
                // lies in the mapping.
                unsafe { base.add(index).write_volatile(pattern(stamp, index)) };
            }
            self.holds[page] = Holds::Pattern(stamp);
        }
    }

    /// The first of these pages that does not hold what it must.
    #[must_use]
    pub fn verify(&self, pages: Range<usize>) -> Option<Wrong> {
        pages.into_iter().find_map(|page| {
            let base = self.page(page);
            // SAFETY: as in `write`.
            let read = |index: usize| unsafe { base.add(index).read_volatile() };
            check(page, self.holds[page], read)
        })
    }

    /// `madvise` on these pages, with what it does to their contents.
    ///
    /// # Errors
    /// The kernel's; contents are then as before, except that a part may have
    /// been dropped if the advice drops.
    pub fn advise(&mut self, pages: Range<usize>, advice: libc::c_int) -> io::Result<()> {
        // SAFETY: the range lies in the mapping, which this value owns.
        let result =
            unsafe { libc::madvise(self.page(pages.start).cast(), pages.len() * PAGE, advice) };
        let result = if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
        self.remember("advise", advice, pages.clone(), &result);
        for holds in &mut self.holds[pages] {
            *holds = match (advice, self.kind, *holds, &result) {
                // A private file's hole shows again: zeros.
                (libc::MADV_DONTNEED, Kind::Private | Kind::PrivateFile, _, Ok(()))
                | (libc::MADV_REMOVE, Kind::Shared, _, Ok(())) => Holds::Zero,
                (libc::MADV_FREE, Kind::Private, Holds::Pattern(stamp), _)
                | (
                    libc::MADV_DONTNEED,
                    Kind::Private | Kind::PrivateFile,
                    Holds::Pattern(stamp),
                    Err(_),
                ) => Holds::PatternOrZero(stamp),
                (_, _, same, _) => same,
            };
        }
        result
    }

    /// Makes these pages read-only, and writable again.
    ///
    /// # Errors
    /// The kernel's.
    pub fn protect(&self, pages: Range<usize>) -> io::Result<()> {
        for protection in [libc::PROT_READ, libc::PROT_READ | libc::PROT_WRITE] {
            // SAFETY: the range lies in the mapping; nothing writes to it
            // meanwhile, as this value is borrowed.
            check_call(unsafe {
                libc::mprotect(self.page(pages.start).cast(), pages.len() * PAGE, protection)
            })?;
        }
        Ok(())
    }

    /// Locks these pages in memory, and lets them go.
    ///
    /// # Errors
    /// The kernel's, such as too little memory.
    pub fn lock(&self, pages: Range<usize>) -> io::Result<()> {
        let (start, length) = (self.page(pages.start).cast(), pages.len() * PAGE);
        // SAFETY: the range lies in the mapping.
        let locked = check_call(unsafe { libc::mlock(start, length) });
        // SAFETY: as above.
        check_call(unsafe { libc::munlock(start, length) })?;
        locked
    }

    /// Moves the whole mapping to another address.
    ///
    /// # Errors
    /// If there is no other address, or the kernel refuses.
    pub fn relocate(&mut self) -> anyhow::Result<()> {
        let target = reserve(self.bytes())?;
        // SAFETY: both ranges belong to this value; nothing points into the old
        // one except `start`, which changes with it.
        let moved = unsafe {
            libc::mremap(
                self.start.as_ptr().cast(),
                self.bytes(),
                self.bytes(),
                libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                target.as_ptr(),
            )
        };
        if moved == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            unmap(target, self.bytes());
            return Err(error).context("cannot move a mapping");
        }
        self.start = target.cast();
        Ok(())
    }

    /// Moves these pages to `node`.
    ///
    /// # Errors
    /// The kernel's. That single pages cannot be moved is none.
    pub fn migrate(&self, pages: Range<usize>, node: libc::c_int) -> io::Result<()> {
        let addresses: Vec<usize> = pages.map(|page| self.address(page)).collect();
        let nodes = vec![node; addresses.len()];
        let mut states = vec![0_i32; addresses.len()];
        // MPOL_MF_MOVE
        const MOVE: libc::c_int = 1 << 1;
        // SAFETY: three arrays of as many entries as are told.
        let result = unsafe {
            libc::syscall(
                libc::SYS_move_pages,
                0,
                addresses.len(),
                addresses.as_ptr(),
                nodes.as_ptr(),
                states.as_mut_ptr(),
                MOVE,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Sends these pages (at most 16, what a pipe holds) through a pipe by
    /// reference, and compares what comes out.
    ///
    /// # Errors
    /// The kernel's.
    pub fn splice(&self, pages: Range<usize>) -> io::Result<Option<Wrong>> {
        let pages = pages.start..pages.end.min(pages.start + 16);
        let mut ends = [0; 2];
        // SAFETY: a place for two descriptors.
        check_call(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) })?;
        // SAFETY: two new descriptors that nobody else owns.
        let [out, into] = ends.map(|end| unsafe { File::from_raw_fd(end) });
        let part =
            libc::iovec { iov_base: self.page(pages.start).cast(), iov_len: pages.len() * PAGE };
        // SAFETY: one range of the mapping, which the kernel only reads.
        let sent = unsafe { libc::vmsplice(into.as_raw_fd(), &part, 1, libc::SPLICE_F_NONBLOCK) };
        let sent = usize::try_from(sent).map_err(|_| io::Error::last_os_error())?;
        drop(into);
        let mut bytes = vec![0; sent];
        (&out).read_exact(&mut bytes)?;
        Ok(pages.zip(bytes.chunks_exact(PAGE)).find_map(|(page, bytes)| {
            let read = |index: usize| {
                let word = bytes[index * 8..].first_chunk::<8>();
                word.map_or(0, |word| u64::from_ne_bytes(*word))
            };
            check(page, self.holds[page], read)
        }))
    }

    /// Whether a child process has a memory of its own here, that it may change.
    #[must_use]
    pub fn is_copied_by_fork(&self) -> bool {
        self.kind != Kind::Shared
    }
}

/// Everything that may tell why a page is wrong, in lines that the kernel's log
/// takes.
pub struct Evidence<'a>(pub &'a Region, pub Wrong);

impl Display for Evidence<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Evidence(region, wrong) = *self;
        let pages = region.pages();
        writeln!(f, "{wrong:x?} of {pages:x} pages, {:?}", region.kind)?;
        let mut frames = vec![0; pages];
        match Pagemap::open().and_then(|map| map.frames(region.address(0), &mut frames)) {
            Ok(()) => {}
            Err(error) => writeln!(f, "{error:#}")?,
        }
        let mut page = 0;
        while page < pages {
            let first = region.verify(page..page + 1);
            let end = (page + 1..pages)
                .find(|&next| {
                    region.verify(next..next + 1).is_some() != first.is_some()
                        || frames[next] != frames[next - 1] + 1
                })
                .unwrap_or(pages);
            if let Some(first) = first {
                let last = region.verify(end - 1..end);
                writeln!(f, "wrong up to {end:x}, frames from {:x}: {first:x?}", frames[page])?;
                writeln!(f, "    the last of these: {last:x?}")?;
            }
            page = end;
        }
        for deed in region.deeds.iter().filter(|deed| deed.pages.contains(&wrong.page)) {
            let Deed { name, argument, pages, error } = deed;
            writeln!(f, "{name} {argument} {pages:x?} {error:?}")?;
        }
        Ok(())
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        unmap(self.start.cast(), self.bytes());
    }
}

/// The word number `index` of a page with this stamp.
fn pattern(stamp: u64, index: usize) -> u64 {
    stamp.wrapping_add((index as u64).wrapping_mul(STEP))
}

/// Compares a page, given by its words, with what it must hold.
fn check(page: usize, holds: Holds, read: impl Fn(usize) -> u64) -> Option<Wrong> {
    let compare = |stamp: Option<u64>| {
        (0..WORDS).find_map(|index| {
            let wanted = stamp.map_or(0, |stamp| pattern(stamp, index));
            let found = read(index);
            (found != wanted).then_some(Wrong { page, word: index, found, wanted })
        })
    };
    match holds {
        Holds::Zero => compare(None),
        Holds::Pattern(stamp) => compare(Some(stamp)),
        // The whole page goes at once, and at any time: also between two words.
        // Then all of them are zero from there on.
        Holds::PatternOrZero(stamp) => match compare(Some(stamp)) {
            Some(Wrong { found: 0, .. }) => compare(None),
            result => result,
        },
    }
}

fn check_call(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn memfd(length: usize) -> anyhow::Result<OwnedFd> {
    // SAFETY: the name ends with a zero.
    let fd = unsafe { libc::memfd_create(c"checked".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error()).context("cannot make a memfd");
    }
    // SAFETY: a new descriptor that nobody else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let length = libc::off_t::try_from(length).context("a file of that size")?;
    // SAFETY: takes no memory.
    check_call(unsafe { libc::ftruncate(fd.as_raw_fd(), length) })
        .context("cannot size a memfd")?;
    Ok(fd)
}

/// Reserves `length` bytes of address space, aligned to a huge page.
fn reserve(length: usize) -> anyhow::Result<NonNull<libc::c_void>> {
    // SAFETY: a new mapping at an address of the kernel's choice.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            length + HUGE,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error()).context("no address space is left");
    }
    let base = NonNull::new(base).context("the kernel mapped address 0")?;
    let before = base.as_ptr().align_offset(HUGE);
    let after = HUGE - before;
    // SAFETY: one huge page more than needed was mapped; what lies before and
    // behind the aligned range goes back.
    let start = unsafe { base.byte_add(before) };
    if before > 0 {
        unmap(base, before);
    }
    if after > 0 {
        // SAFETY: as above.
        unmap(unsafe { start.byte_add(length) }, after);
    }
    Ok(start)
}

fn unmap(start: NonNull<libc::c_void>, length: usize) {
    // SAFETY: the callers own the range and use it no more.
    unsafe { libc::munmap(start.as_ptr(), length) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_memory_is_zero_and_written_memory_is_not() {
        for kind in [Kind::Private, Kind::Shared, Kind::PrivateFile] {
            let mut region = Region::map(kind, 1, 1).expect("2 MiB");
            assert_eq!(region.verify(0..PAGES), None, "{kind:?}");
            region.write(3..5);
            assert_eq!(region.verify(0..PAGES), None, "{kind:?}");
            // SAFETY: page 4 lies in the region.
            unsafe { region.page(4).add(7).write(9) };
            let wrong = region.verify(0..PAGES).expect("a wrong word");
            assert_eq!((wrong.page, wrong.word, wrong.found), (4, 7, 9), "{kind:?}");
        }
    }

    #[test]
    fn a_page_in_the_place_of_another_is_found() {
        let mut region = Region::map(Kind::Private, 1, 1).expect("2 MiB");
        region.write(0..2);
        // SAFETY: both pages lie in the region.
        unsafe { std::ptr::copy_nonoverlapping(region.page(0), region.page(1), WORDS) };
        assert_eq!(region.verify(0..2).map(|wrong| wrong.page), Some(1));
    }

    #[test]
    fn dropped_pages_must_be_zero_and_freed_ones_may_be() {
        let mut region = Region::map(Kind::Private, 1, 1).expect("2 MiB");
        region.write(0..8);
        region.advise(0..4, libc::MADV_FREE).expect("own memory");
        assert_eq!(region.verify(0..8), None);
        // SAFETY: page 1 lies in the region.
        unsafe { region.page(1).write_bytes(0, WORDS) };
        assert_eq!(region.verify(0..8), None);
        region.advise(4..8, libc::MADV_DONTNEED).expect("own memory");
        assert_eq!(region.verify(0..8), None);
        // SAFETY: as above; a page that was never freed.
        unsafe { region.page(6).write(1) };
        assert!(region.verify(0..8).is_some());
    }

    #[test]
    fn freed_pages_may_go_while_they_are_looked_at() {
        for reads in 0..=WORDS {
            let left = std::cell::Cell::new(reads);
            let look = |after: u64| {
                left.set(reads);
                check(0, Holds::PatternOrZero(5), |index| {
                    if left.get() == 0 {
                        return after;
                    }
                    left.set(left.get() - 1);
                    pattern(5, index)
                })
            };
            assert_eq!(look(0), None, "{reads}");
            assert_eq!(look(1).is_some(), reads < WORDS, "{reads}");
        }
        let half_zero = |index| if index < 9 { 0 } else { pattern(5, index) };
        assert_eq!(check(0, Holds::PatternOrZero(5), half_zero).map(|wrong| wrong.word), Some(9));
    }

    #[test]
    fn contents_move_with_the_mapping_and_through_a_pipe() {
        let mut region = Region::map(Kind::Shared, 1, 5).expect("2 MiB");
        region.write(0..20);
        let before = region.address(0);
        region.relocate().expect("address space");
        assert_ne!(region.address(0), before);
        assert_eq!(region.verify(0..PAGES), None);
        assert_eq!(region.splice(2..PAGES).expect("a pipe"), None);
        region.advise(0..8, libc::MADV_REMOVE).expect("own file");
        assert_eq!(region.verify(0..PAGES), None);
    }
}

//! Fragments free memory: fills all of it with base pages, then keeps some of
//! them in every block.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{ensure, Context};
use serde_json::Value;

use crate::buddy;
use crate::mapping::{Mapping, Sharing, PAGE};
use crate::pagemap::Pagemap;
use crate::protocol::{Fragment, Fragmented, PageSize, Question, Verified};
use crate::scatter::{unit, Scatter, BLOCK_PAGES};
use crate::settings::Setting;
use crate::worker::{free_memory, Holder};
use crate::workload::word;

/// Pages of a kind that follow each other: small against a block, so that every
/// block gets pages of both kinds.
const RUN: usize = 64;

/// Pages looked at and let go in one step.
const STEP: usize = 512;

/// Free memory at which filling ends, in bytes: what the kernel keeps to
/// itself, and what two threads may take before they look again.
const REST: u64 = 10 << 20;

/// `vm.min_free_kbytes` while memory is filled.
const MIN_FREE_KIB: u64 = 2048;

/// Pages that one pipe pins.
const PIPE_PAGES: usize = 4096;

/// Pages in one call of vmsplice (UIO_MAXIOV).
const SPLICE_PAGES: usize = 1024;

/// Memory that stays fragmented as long as this lives.
pub struct Fragments {
    seed: u64,
    anonymous: Region<Mapping>,
    cache: Region<CacheFile>,
    pins: Vec<Pin>,
    /// Free memory stays as it is: the kernel does not compact it unasked.
    _compaction: Setting,
}

/// Fills and fragments memory.
///
/// # Errors
/// If the kernel refuses something, or the index that was asked for is not
/// reached.
pub fn start(options: &Fragment) -> anyhow::Result<(Fragmented, Fragments)> {
    for (name, share) in
        [("fmfi", options.fmfi), ("cache", options.cache), ("unmovable", options.unmovable)]
    {
        ensure!((0.0..=1.0).contains(&share), "{name} is a share from 0 to 1, not {share}");
    }
    let started = Instant::now();
    let before = buddy::read()?;
    // The kernel keeps parts of the lower zones, and some memory in all, for
    // itself: pages are to lie there, too. Put back when memory is free again.
    let reserve = Setting::change("/proc/sys/vm/lowmem_reserve_ratio", "0\t0\t0\t0")?;
    let minimum = Setting::change("/proc/sys/vm/min_free_kbytes", &MIN_FREE_KIB.to_string())?;
    let compaction = Setting::change("/proc/sys/vm/compaction_proactiveness", "0")?;
    let room = free_memory()?;
    let mut fragments = Fragments {
        seed: options.seed,
        anonymous: Region::new(Mapping::new(room, PageSize::Base, Sharing::Private)?),
        cache: Region::new(CacheFile::new(room)?),
        pins: Vec::new(),
        _compaction: compaction,
    };
    let filled = fragments.fill(options.cache)?;
    let filled_seconds = started.elapsed().as_secs_f64();

    let more = options.free_bytes.saturating_sub(free_memory()?) / PAGE as u64;
    ensure!(
        more < filled,
        "of {filled} pages {more} would have to be free: ask for less than {} bytes",
        options.free_bytes
    );
    let free_pages = options.free_bytes / PAGE as u64;
    let scatter = Scatter::new(
        options.seed,
        1.0 - more as f64 / filled as f64,
        (1.0 - options.fmfi) * free_pages as f64 / filled as f64,
    );
    let mut result = fragments.thin_out(&scatter, options.unmovable)?;
    drop((reserve, minimum));
    result.before = before;
    result.after = buddy::read()?;
    result.filled_pages = filled;
    result.filled_seconds = filled_seconds;
    result.seconds = started.elapsed().as_secs_f64();
    // What was never taken may be whole blocks, and in a small guest that is a
    // part of the free memory that shows.
    ensure!(
        result.after.fmfi >= options.fmfi - 0.1,
        "the index is {:.3} and not {:.3}: {result:?}",
        result.after.fmfi,
        options.fmfi
    );
    Ok((result, fragments))
}

impl Fragments {
    /// Takes all memory, `cache` of it as page cache. Returns the number of
    /// pages.
    fn fill(&self, cache: f64) -> anyhow::Result<u64> {
        let ticket = AtomicU64::new(0);
        on_all_cpus(|| loop {
            if free_memory()? <= REST {
                return Ok(());
            }
            let run = ticket.fetch_add(1, Ordering::Relaxed);
            let more = if unit(self.seed ^ 5, run) < cache {
                self.cache.populate()?
            } else {
                self.anonymous.populate()?
            };
            if !more {
                return Ok(());
            }
        })?;
        Ok((self.anonymous.filled() + self.cache.filled()) as u64)
    }

    /// Lets go of every page that `scatter` does not keep.
    fn thin_out(&mut self, scatter: &Scatter, unmovable: f64) -> anyhow::Result<Fragmented> {
        let anonymous = self.anonymous.thin_out(self.seed, scatter)?;
        let cache = self.cache.thin_out(self.seed, scatter)?;
        let mut blocks = anonymous.blocks;
        blocks.extend(cache.blocks);
        blocks.sort_unstable();
        blocks.dedup();
        // Nothing has the page cache mapped: its pages are found by the file
        // alone from here on.
        self.cache.memory.unmap();
        let pinned = self.pin(unmovable)?;
        Ok(Fragmented {
            kept_anonymous: anonymous.kept - pinned,
            kept_cache: cache.kept,
            kept_unmovable: pinned,
            kept_blocks: blocks.len() as u64,
            ..Fragmented::default()
        })
    }

    /// Pins `share` of the kept anonymous pages: a page in a pipe has a
    /// reference that keeps it from being moved.
    fn pin(&mut self, share: f64) -> anyhow::Result<u64> {
        let mut pages = Vec::new();
        for index in self.anonymous.kept_pages() {
            if unit(self.seed ^ 6, index as u64) < share {
                pages.push(self.anonymous.memory.address() + index * PAGE);
            }
        }
        for pages in pages.chunks(PIPE_PAGES) {
            let mut pin = Pin::new()?;
            pin.add(pages)?;
            self.pins.push(pin);
        }
        Ok(pages.len() as u64)
    }

    fn verify(&self) -> anyhow::Result<Verified> {
        let mut result = Verified { words: 0, bad_words: 0, first_bad: None };
        let mut compare = |index: usize, found: u64| {
            result.words += 1;
            if found != mark(self.seed, index) {
                result.bad_words += 1;
                result.first_bad.get_or_insert((index * PAGE) as u64);
            }
        };
        for index in self.anonymous.kept_pages() {
            compare(index, self.anonymous.memory.word(index)?);
        }
        for index in self.cache.kept_pages() {
            compare(index, self.cache.memory.word(index)?);
        }
        Ok(result)
    }
}

impl Holder for Fragments {
    fn ask(&mut self, question: Question) -> anyhow::Result<Value> {
        match question {
            Question::Verify => Ok(serde_json::to_value(self.verify()?)?),
            Question::Blocks => anyhow::bail!("a fragmenter has no huge pages to tell of"),
            Question::Grow | Question::Go => anyhow::bail!("a fragmenter only holds memory"),
        }
    }
}

/// First word of a kept page.
fn mark(seed: u64, index: usize) -> u64 {
    word(seed, index as u64) | 1
}

/// Memory that can be populated and let go page by page.
trait Pages: Sync {
    fn pages(&self) -> usize;
    /// Where it is mapped.
    fn address(&self) -> usize;
    fn populate(&self, first: usize, count: usize) -> anyhow::Result<()>;
    fn let_go(&self, first: usize, count: usize) -> anyhow::Result<()>;
    /// Writes the first word of a page that is mapped.
    fn set_word(&self, page: usize, value: u64);
    fn word(&self, page: usize) -> anyhow::Result<u64>;
}

/// Pages from the start on are populated; of those, some are kept.
struct Region<M> {
    memory: M,
    taken: AtomicUsize,
    /// One bit a page.
    kept: Vec<AtomicU64>,
}

/// What thinning out has left.
#[derive(Default)]
struct Left {
    kept: u64,
    /// Blocks with a kept page, each once or more.
    blocks: Vec<u64>,
}

impl<M: Pages> Region<M> {
    fn new(memory: M) -> Self {
        let words = memory.pages().div_ceil(64);
        let kept = (0..words).map(|_| AtomicU64::new(0)).collect();
        Region { memory, taken: AtomicUsize::new(0), kept }
    }

    fn filled(&self) -> usize {
        self.taken.load(Ordering::Relaxed).min(self.memory.pages())
    }

    /// Populates the next run of pages; false where there is no more room.
    fn populate(&self) -> anyhow::Result<bool> {
        let first = self.taken.fetch_add(RUN, Ordering::Relaxed);
        if first + RUN > self.memory.pages() {
            self.taken.fetch_sub(RUN, Ordering::Relaxed);
            return Ok(false);
        }
        self.memory.populate(first, RUN)?;
        Ok(true)
    }

    /// Lets go of what `scatter` does not keep, and marks what it does.
    fn thin_out(&self, seed: u64, scatter: &Scatter) -> anyhow::Result<Left> {
        let filled = self.filled();
        let pagemap = Pagemap::open()?;
        let mut left = Left::default();
        // One thread: with two, every page that goes interrupts the other CPU to
        // flush its TLB, which takes far longer than the rest.
        for first in (0..filled).step_by(STEP) {
            self.thin_out_step(seed, scatter, &pagemap, first, filled, &mut left)?;
        }
        Ok(left)
    }

    fn thin_out_step(
        &self,
        seed: u64,
        scatter: &Scatter,
        pagemap: &Pagemap,
        first: usize,
        filled: usize,
        left: &mut Left,
    ) -> anyhow::Result<()> {
        let mut frames = [0_u64; STEP];
        let frames = &mut frames[..STEP.min(filled - first)];
        pagemap.frames(self.memory.address() + first * PAGE, frames)?;
        let mut run = first;
        for (index, &frame) in (first..).zip(frames.iter()) {
            if frame == 0 || !scatter.keeps(frame) {
                continue;
            }
            self.memory.set_word(index, mark(seed, index));
            self.kept[index / 64].fetch_or(1 << (index % 64), Ordering::Relaxed);
            left.kept += 1;
            if left.blocks.last() != Some(&(frame / BLOCK_PAGES)) {
                left.blocks.push(frame / BLOCK_PAGES);
            }
            if run < index {
                self.memory.let_go(run, index - run)?;
            }
            run = index + 1;
        }
        let end = first + frames.len();
        if run < end {
            self.memory.let_go(run, end - run)?;
        }
        Ok(())
    }

    /// Numbers of the pages that are kept, ascending.
    fn kept_pages(&self) -> impl Iterator<Item = usize> + '_ {
        let filled = self.filled();
        (0..filled).filter(|index| {
            self.kept[index / 64].load(Ordering::Relaxed) & (1 << (index % 64)) != 0
        })
    }
}

impl Pages for Mapping {
    fn pages(&self) -> usize {
        self.bytes() / PAGE
    }

    fn address(&self) -> usize {
        Mapping::address(self)
    }

    fn populate(&self, first: usize, count: usize) -> anyhow::Result<()> {
        self.advise(first * PAGE, count * PAGE, libc::MADV_POPULATE_WRITE)
    }

    fn let_go(&self, first: usize, count: usize) -> anyhow::Result<()> {
        self.advise(first * PAGE, count * PAGE, libc::MADV_DONTNEED)
    }

    fn set_word(&self, page: usize, value: u64) {
        self.write(page * PAGE / 8, value);
    }

    fn word(&self, page: usize) -> anyhow::Result<u64> {
        Ok(self.read(page * PAGE / 8))
    }
}

/// Page cache: a file in memory, mapped only while it is set up.
struct CacheFile {
    file: File,
    bytes: usize,
    mapped: Option<NonNull<u64>>,
}

// SAFETY: the mapping belongs to this value alone, is tied to no thread, and is
// reached only by single reads and writes.
unsafe impl Send for CacheFile {}

// SAFETY: as above; two threads never have the same page.
unsafe impl Sync for CacheFile {}

impl CacheFile {
    fn new(bytes: u64) -> anyhow::Result<Self> {
        // SAFETY: the name ends with a zero.
        let fd = unsafe { libc::memfd_create(c"fragments".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error()).context("cannot make a file in memory");
        }
        // SAFETY: the descriptor was just opened and is owned by nothing else.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(bytes).context("cannot size a file in memory")?;
        let bytes = usize::try_from(bytes)? / PAGE * PAGE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error()).context("cannot map a file in memory");
        }
        Ok(CacheFile { file, bytes, mapped: NonNull::new(start.cast()) })
    }

    fn unmap(&mut self) {
        if let Some(start) = self.mapped.take() {
            // SAFETY: the mapping is this value's own, and no longer known.
            unsafe { libc::munmap(start.as_ptr().cast(), self.bytes) };
        }
    }

    fn start(&self) -> *mut u64 {
        self.mapped.map_or(std::ptr::null_mut(), NonNull::as_ptr)
    }
}

impl Drop for CacheFile {
    fn drop(&mut self) {
        self.unmap();
    }
}

impl Pages for CacheFile {
    fn pages(&self) -> usize {
        self.bytes / PAGE
    }

    fn address(&self) -> usize {
        self.start() as usize
    }

    fn populate(&self, first: usize, count: usize) -> anyhow::Result<()> {
        ensure!(self.mapped.is_some() && first + count <= self.pages());
        // SAFETY: the range lies inside the mapping; populating changes no
        // contents.
        let result = unsafe {
            libc::madvise(
                self.start().byte_add(first * PAGE).cast(),
                count * PAGE,
                libc::MADV_POPULATE_WRITE,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error()).context("cannot populate page cache");
        }
        Ok(())
    }

    fn let_go(&self, first: usize, count: usize) -> anyhow::Result<()> {
        let (first, count) = (i64::try_from(first * PAGE)?, i64::try_from(count * PAGE)?);
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: takes a descriptor and numbers.
        let result = unsafe { libc::fallocate(self.file.as_raw_fd(), mode, first, count) };
        if result != 0 {
            return Err(io::Error::last_os_error()).context("cannot punch a hole");
        }
        Ok(())
    }

    fn set_word(&self, page: usize, value: u64) {
        assert!(self.mapped.is_some() && page < self.pages());
        // SAFETY: the word lies inside the mapping, to which there are no
        // references.
        unsafe { self.start().add(page * PAGE / 8).write_volatile(value) };
    }

    fn word(&self, page: usize) -> anyhow::Result<u64> {
        let mut bytes = [0; 8];
        self.file
            .read_exact_at(&mut bytes, (page * PAGE) as u64)
            .context("cannot read page cache")?;
        Ok(u64::from_le_bytes(bytes))
    }
}

/// Pages that a pipe holds references to.
struct Pin {
    // Kept open: what is written stays as long as it can be read.
    _reader: File,
    writer: File,
}

impl Pin {
    fn new() -> anyhow::Result<Self> {
        let mut ends = [0; 2];
        // SAFETY: `ends` has room for both descriptors.
        if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
            return Err(io::Error::last_os_error()).context("cannot make a pipe");
        }
        // SAFETY: both were just opened and are owned by nothing else.
        let (reader, writer) = unsafe { (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1])) };
        let size = PIPE_PAGES * PAGE;
        // SAFETY: takes a descriptor and a number.
        let result = unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETPIPE_SZ, size) };
        if result < 0 {
            return Err(io::Error::last_os_error()).context("cannot enlarge a pipe");
        }
        Ok(Pin { _reader: reader, writer })
    }

    /// Takes at most [`PIPE_PAGES`] pages in all.
    fn add(&mut self, pages: &[usize]) -> anyhow::Result<()> {
        for pages in pages.chunks(SPLICE_PAGES) {
            let parts: Vec<libc::iovec> = pages
                .iter()
                .map(|&page| libc::iovec { iov_base: page as *mut libc::c_void, iov_len: PAGE })
                .collect();
            // SAFETY: `parts` lives throughout the call and names memory of this
            // process; the pipe only refers to it.
            let spliced = unsafe {
                libc::vmsplice(
                    self.writer.as_raw_fd(),
                    parts.as_ptr(),
                    parts.len(),
                    libc::SPLICE_F_NONBLOCK,
                )
            };
            let Ok(spliced) = usize::try_from(spliced) else {
                return Err(io::Error::last_os_error()).context("cannot pin pages in a pipe");
            };
            ensure!(spliced == pages.len() * PAGE, "a pipe took {spliced} bytes of {parts:?}");
        }
        Ok(())
    }
}

/// Runs `action` on as many threads as there are CPUs.
fn on_all_cpus(action: impl Fn() -> anyhow::Result<()> + Sync) -> anyhow::Result<()> {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cpus).map(|_| scope.spawn(&action)).collect();
        threads.into_iter().try_for_each(|thread| {
            thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn left(memory: impl Pages, keep: f64) -> (usize, usize) {
        let region = Region::new(memory);
        while region.populate().expect("a few pages") {}
        let filled = region.filled();
        // Frame numbers are hidden from an ordinary user.
        let scatter = Scatter::new(1, keep, 0.0);
        if region.thin_out(1, &scatter).is_err() {
            return (0, 0);
        }
        let kept: Vec<usize> = region.kept_pages().collect();
        for &page in &kept {
            assert_eq!(region.memory.word(page).expect("kept"), mark(1, page));
        }
        (filled, kept.len())
    }

    #[test]
    fn kept_pages_of_both_kinds_have_their_mark_and_about_the_share_is_kept() {
        let anonymous =
            left(Mapping::new(8 << 20, PageSize::Base, Sharing::Private).expect("8 MiB"), 0.5);
        let cache = left(CacheFile::new(8 << 20).expect("8 MiB"), 0.5);
        for (filled, kept) in [anonymous, cache] {
            if filled > 0 {
                assert_eq!(filled, 2048);
                assert!((200..1800).contains(&kept), "{kept}");
            }
        }
    }

    #[test]
    fn a_pipe_takes_as_many_pages_as_it_is_made_for() {
        let memory = Mapping::new((PIPE_PAGES * PAGE) as u64, PageSize::Base, Sharing::Private)
            .expect("16 MiB");
        let pages: Vec<usize> =
            (0..PIPE_PAGES).map(|page| memory.address() + page * PAGE).collect();
        // More than an ordinary user's pipe may have.
        if let Ok(mut pin) = Pin::new() {
            pin.add(&pages).expect("room for all of them");
            assert!(pin.add(&pages[..1]).is_err());
        }
    }
}

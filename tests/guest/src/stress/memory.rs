//! Works on memory of known contents, in every way that moves, splits, shares
//! or drops pages.

use std::io;
use std::ops::Range;

use anyhow::Context;

use super::checked::{Evidence, Kind, Region, Wrong, PAGES};
use super::random::Random;
use super::tally::Count;
use super::Worker;

/// Regions that a worker has at a time.
const REGIONS: usize = 6;

/// Advice that changes how memory is backed, or drops it.
const ADVICE: [libc::c_int; 12] = [
    libc::MADV_DONTNEED,
    libc::MADV_FREE,
    libc::MADV_REMOVE,
    libc::MADV_COLLAPSE,
    libc::MADV_COLLAPSE,
    libc::MADV_HUGEPAGE,
    libc::MADV_NOHUGEPAGE,
    libc::MADV_PAGEOUT,
    libc::MADV_COLD,
    libc::MADV_MERGEABLE,
    libc::MADV_UNMERGEABLE,
    libc::MADV_POPULATE_WRITE,
];

/// The memory of one worker.
pub struct Workload {
    regions: Vec<Region>,
    /// Huge pages in all.
    limit: usize,
}

impl Workload {
    /// A workload of at most `bytes`.
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        let limit = usize::try_from(bytes >> 21).unwrap_or(usize::MAX).max(REGIONS);
        Workload { regions: Vec::new(), limit }
    }

    /// Does one thing with one region.
    ///
    /// # Errors
    /// If memory cannot be mapped at all.
    pub fn round(&mut self, worker: &mut Worker) -> anyhow::Result<()> {
        if self.regions.len() < REGIONS {
            let kind = *worker.random.pick(&[
                Kind::Private,
                Kind::Private,
                Kind::Private,
                Kind::Shared,
                Kind::PrivateFile,
            ]);
            let huge = 1 + worker.random.below(self.limit / REGIONS);
            let region = Region::map(kind, huge, worker.random.next())?;
            self.regions.push(region);
        }
        let number = worker.random.below(self.regions.len());
        let range = some_pages(&mut worker.random, self.regions[number].pages());
        let region = &mut self.regions[number];
        let wrong = match worker.random.below(24) {
            0..=6 => {
                let wrong = region.verify(range.clone());
                report(worker, region, wrong);
                region.write(range);
                None
            }
            7..=10 => region.verify(0..region.pages()),
            11..=15 => {
                let advice = *worker.random.pick(&ADVICE);
                allowed(worker, &region.advise(range.clone(), advice));
                region.verify(range)
            }
            16 => {
                let result = region.protect(range.clone());
                done(worker, region, "protect", range.clone(), &result);
                region.verify(range)
            }
            17 => {
                let result = region.lock(range.clone());
                done(worker, region, "lock", range.clone(), &result);
                region.verify(range)
            }
            18 => {
                // Refused where the mapping has fallen into several.
                let result = region.relocate().map_err(io::Error::other);
                done(worker, region, "relocate", 0..region.pages(), &result);
                region.verify(range)
            }
            19 => {
                let node = i32::from(worker.random.one_in(2));
                let result = region.migrate(range.clone(), node);
                done(worker, region, "migrate", range.clone(), &result);
                region.verify(range)
            }
            20 => match region.splice(range.clone()) {
                Ok(wrong) => wrong,
                Err(error) => {
                    done(worker, region, "splice", range, &Err(error));
                    None
                }
            },
            21 => {
                split(region, range.clone());
                region.remember("split", 0, range.clone(), &Ok(()));
                region.verify(range)
            }
            22 => return self.fork(worker),
            _ => {
                let mut region = self.regions.swap_remove(number);
                let wrong = region.verify(0..region.pages());
                report(worker, &mut region, wrong);
                return Ok(());
            }
        };
        report(worker, region, wrong);
        if worker.random.one_in(64) {
            prefer_node(worker);
        }
        Ok(())
    }

    /// A child and this process change what was one memory, and each must see
    /// its own.
    fn fork(&mut self, worker: &mut Worker) -> anyhow::Result<()> {
        let seed = worker.random.next();
        // SAFETY: this process has one thread, so the child may go on with all
        // that is here.
        let child = unsafe { libc::fork() };
        if child < 0 {
            allowed(worker, &Err(io::Error::last_os_error()));
            return Ok(());
        }
        let mut random = Random::new(seed ^ u64::from(child == 0));
        for region in self.regions.iter_mut().filter(|region| region.is_copied_by_fork()) {
            region.remember("fork", child, 0..region.pages(), &Ok(()));
            for _ in 0..2 {
                let range = some_pages(&mut random, region.pages());
                let wrong = region.verify(range.clone());
                report(worker, region, wrong);
                region.write(range);
            }
            let wrong = region.verify(0..region.pages());
            report(worker, region, wrong);
        }
        if child == 0 {
            // SAFETY: ends the child at once; its mappings go with it.
            unsafe { libc::_exit(0) };
        }
        let mut status = 0;
        // SAFETY: a place for the status of the child that was made above.
        if unsafe { libc::waitpid(child, &mut status, 0) } != child {
            return Err(io::Error::last_os_error()).context("a child is lost");
        }
        Ok(())
    }
}

/// Tells of a wrong page, if there is one, and only once.
fn report(worker: &mut Worker, region: &mut Region, wrong: Option<Wrong>) {
    if let Some(wrong) = wrong {
        worker.report_wrong(&format!("memory: {}", Evidence(region, wrong)));
        region.write(0..region.pages());
    }
}

/// Counts and remembers what was done.
fn done(
    worker: &Worker,
    region: &mut Region,
    name: &'static str,
    pages: Range<usize>,
    result: &io::Result<()>,
) {
    allowed(worker, result);
    region.remember(name, 0, pages, result);
}

/// A part of a region: whole huge pages or some base pages.
fn some_pages(random: &mut Random, pages: usize) -> Range<usize> {
    if random.one_in(2) {
        let huge = pages / PAGES;
        let first = random.below(huge);
        let count = 1 + random.below((huge - first).min(4));
        return first * PAGES..(first + count) * PAGES;
    }
    let first = random.below(pages);
    let count = 1 + random.below((pages - first).min(PAGES));
    first..first + count
}

/// Counts what the kernel may refuse: for lack of memory, because a page is in
/// use elsewhere, because the kind of memory knows no such thing.
fn allowed(worker: &Worker, result: &io::Result<()>) {
    worker.tally.add(if result.is_ok() { Count::Done } else { Count::Refused });
}

/// Has the kernel split the huge pages of a range into base pages.
fn split(region: &Region, range: Range<usize>) {
    let (start, end) = (region.address(range.start), region.address(range.end - 1) + 1);
    let request = format!("{},{start:#x},{end:#x}", std::process::id());
    // Not every kernel has it.
    let _ = std::fs::write("/sys/kernel/debug/split_huge_pages", request);
}

/// Sets where this process wants its memory from now on.
fn prefer_node(worker: &mut Worker) {
    let mode = *worker.random.pick(&[
        libc::MPOL_DEFAULT,
        libc::MPOL_BIND,
        libc::MPOL_PREFERRED,
        libc::MPOL_INTERLEAVE,
    ]);
    let nodes: libc::c_ulong = match mode {
        libc::MPOL_DEFAULT => 0,
        libc::MPOL_INTERLEAVE => 0b11,
        _ => 1 << worker.random.below(2),
    };
    // SAFETY: a mask of 64 bits, which the kernel only reads.
    let result = unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, &nodes, 64) };
    let result = if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    allowed(worker, &result);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_lie_in_the_region() {
        let mut random = Random::new(4);
        for pages in [PAGES, 3 * PAGES] {
            for _ in 0..1000 {
                let range = some_pages(&mut random, pages);
                assert!(range.start < range.end && range.end <= pages, "{range:?} of {pages}");
            }
        }
    }
}

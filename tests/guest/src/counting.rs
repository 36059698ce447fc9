//! The processor's time stamp counter: how long something took, and on a
//! machine that counts instructions with it (QEMU's `-icount shift=0`: one tick
//! an instruction), how many instructions.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::Context;

use crate::mapping::{Mapping, Sharing, PAGE};
use crate::probe::{Instructions, Work};
use crate::protocol::PageSize;

/// Rounds of the loop of known length, of two instructions each.
const LOOP_ROUNDS: u64 = 1000;

/// A file system without a block device whose files live in the page cache.
const CACHE: &str = "/run/page-cache";

/// The time stamp counter.
#[must_use]
pub fn ticks() -> u64 {
    // SAFETY: both instructions are part of every x86-64 processor, and touch
    // no memory. The fence keeps earlier work from being counted as later.
    unsafe {
        std::arch::x86_64::_mm_lfence();
        std::arch::x86_64::_rdtsc()
    }
}

/// Ticks of each call of `unit`, without those that reading the counter takes.
fn each(units: u32, mut unit: impl FnMut(usize) -> anyhow::Result<()>) -> anyhow::Result<Vec<u64>> {
    let units = units as usize;
    // Written once, so that noting a count is no fault.
    let mut counts = vec![u64::MAX; units];
    let overhead = {
        let first = ticks();
        ticks() - first
    };
    for (index, count) in counts.iter_mut().enumerate() {
        let begin = ticks();
        unit(index)?;
        *count = ticks().saturating_sub(begin + overhead);
    }
    Ok(counts)
}

/// Counts the instructions of `units` of `work`.
///
/// # Errors
/// If the memory or the file for it cannot be had.
pub fn count(work: Work, units: u32) -> anyhow::Result<Instructions> {
    let counts = match work {
        Work::Loop => each(units, |_| {
            spin();
            Ok(())
        }),
        Work::AnonymousPage => {
            let mapping =
                Mapping::new(u64::from(units) * PAGE as u64, PageSize::Base, Sharing::Private)?;
            each(units, |index| {
                mapping.write(index * PAGE / 8, 1);
                Ok(())
            })
        }
        Work::CachePage => {
            let (file, path) = cache_file()?;
            let page = [1_u8; PAGE];
            let counts = each(units, |index| {
                file.write_all_at(&page, (index * PAGE) as u64).context("the page cache is full")
            });
            std::fs::remove_file(path).context("cannot remove the file in the page cache")?;
            counts
        }
    };
    Ok(Instructions { counts: counts? })
}

fn spin() {
    // SAFETY: changes one register, which is declared, and the flags.
    unsafe {
        std::arch::asm!(
            "2:",
            "dec {rounds}",
            "jnz 2b",
            rounds = inout(reg) LOOP_ROUNDS => _,
            options(nomem, nostack)
        );
    }
}

/// A new, empty file in the page cache, and its path.
///
/// # Errors
/// If the kernel has no ramfs.
pub fn cache_file() -> anyhow::Result<(File, String)> {
    if !std::path::Path::new(CACHE).exists() {
        std::fs::create_dir_all(CACHE).with_context(|| format!("cannot make {CACHE}"))?;
        let (source, target) = (c"ramfs", c"/run/page-cache");
        // SAFETY: all strings end with a zero, and ramfs takes no data.
        let result = unsafe {
            libc::mount(source.as_ptr(), target.as_ptr(), source.as_ptr(), 0, std::ptr::null())
        };
        if result != 0 {
            return Err(std::io::Error::last_os_error())
                .with_context(|| format!("cannot mount ramfs on {CACHE}"));
        }
    }
    let path = format!("{CACHE}/{}", std::process::id());
    let file = File::create_new(&path).with_context(|| format!("cannot make {path}"))?;
    Ok((file, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_is_counted_and_takes_time() {
        let counted = count(Work::Loop, 64).expect("no memory is needed");
        assert_eq!(counted.counts.len(), 64);
        assert!(counted.counts.iter().all(|count| (1..u64::MAX).contains(count)));
    }

    #[test]
    fn pages_are_touched_one_by_one() {
        let counted = count(Work::AnonymousPage, 32).expect("32 pages");
        assert!(counted.counts.iter().all(|count| *count > 0));
    }
}

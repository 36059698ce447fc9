//! How long page faults take, one by one.

use std::time::Instant;

use crate::counting::ticks;
use crate::mapping::{Mapping, Sharing, HUGE, PAGE};
use crate::pagemap::Pagemap;
use crate::probe::Latencies;
use crate::protocol::PageSize;

/// Touches `faults` new pages of one size, and times each.
///
/// # Errors
/// If the memory cannot be mapped, or its page table cannot be read.
pub fn measure(pages: PageSize, faults: u32) -> anyhow::Result<Latencies> {
    let size = if pages == PageSize::Huge { HUGE } else { PAGE };
    let mapping = Mapping::new(u64::from(faults) * size as u64, pages, Sharing::Private)?;
    // Written once, so that noting a time is no fault.
    let mut times = vec![u64::MAX; faults as usize];
    let pagemap = Pagemap::open()?;
    let mut frame = [0];
    let mut huge = Vec::with_capacity(times.len());
    let clock = Instant::now();
    let start = ticks();
    for (index, time) in times.iter_mut().enumerate() {
        let begin = ticks();
        mapping.write(index * size / 8, 1);
        *time = ticks().saturating_sub(begin);
        // A huge page has its last base page present, too.
        pagemap.frames(mapping.address() + (index + 1) * size - PAGE, &mut frame)?;
        huge.push(size == HUGE && frame[0] != 0);
    }
    // The counter's rate is that of this very run.
    let ticks = ticks().saturating_sub(start).max(1);
    let nanoseconds = clock.elapsed().as_secs_f64() * 1e9 / ticks as f64;
    Ok(Latencies {
        nanoseconds: times.iter().map(|&time| time as f64 * nanoseconds).collect(),
        huge,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_fault_has_its_time() {
        // Page frames are for root alone to see.
        let Ok(seen) = measure(PageSize::Base, 100) else { return };
        assert_eq!(seen.nanoseconds.len(), 100);
        assert!(seen.nanoseconds.iter().all(|time| *time > 0.0));
        assert!(seen.huge.iter().all(|huge| !huge));
    }
}

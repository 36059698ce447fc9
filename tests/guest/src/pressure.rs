//! A program that needs all the memory there is, and what it has to wait for.

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::counting::cache_file;
use crate::kernel;
use crate::mapping::{Mapping, Sharing, HUGE, PAGE};
use crate::probe::{Take, Taken};
use crate::protocol::PageSize;

/// Takes `bytes` of memory and gives them back.
///
/// # Errors
/// If the memory cannot be mapped or written; where there is too little, the
/// kernel ends this process instead.
pub fn take(kind: Take, bytes: u64) -> anyhow::Result<Taken> {
    // Whatever the kernel thinks of others: it takes this process first.
    std::fs::write("/proc/self/oom_score_adj", "1000").context("cannot offer this process")?;
    let stalled = Stalled::read()?;
    let start = Instant::now();
    let (longest, available) = match kind {
        Take::Base => touch(&Mapping::new(bytes, PageSize::Base, Sharing::Private)?, PAGE)?,
        Take::Huge => touch(&Mapping::new(bytes, PageSize::Huge, Sharing::Private)?, HUGE)?,
        Take::File => fill(bytes)?,
    };
    let seconds = start.elapsed().as_secs_f64();
    let now = Stalled::read()?;
    Ok(Taken {
        seconds,
        longest_seconds: longest.as_secs_f64(),
        some_stalled_seconds: (now.some - stalled.some) as f64 / 1e6,
        full_stalled_seconds: (now.full - stalled.full) as f64 / 1e6,
        available,
    })
}

/// Touches all base pages; the longest time for as many as a `unit` has bytes.
fn touch(mapping: &Mapping, unit: usize) -> anyhow::Result<(Duration, u64)> {
    let mut longest = Duration::ZERO;
    let mut begin = Instant::now();
    for offset in (0..mapping.bytes()).step_by(PAGE) {
        mapping.write(offset / 8, offset as u64);
        if (offset + PAGE) % unit == 0 {
            let now = Instant::now();
            longest = longest.max(now - begin);
            begin = now;
        }
    }
    Ok((longest, available()?))
}

fn fill(bytes: u64) -> anyhow::Result<(Duration, u64)> {
    let (file, path) = cache_file()?;
    let page = [1_u8; PAGE];
    let mut longest = Duration::ZERO;
    for offset in (0..bytes).step_by(PAGE) {
        let begin = Instant::now();
        file.write_all_at(&page, offset).context("cannot write to the page cache")?;
        longest = longest.max(begin.elapsed());
    }
    let available = available();
    std::fs::remove_file(path).context("cannot remove the file in the page cache")?;
    Ok((longest, available?))
}

fn available() -> anyhow::Result<u64> {
    kernel::memory()?.get("MemAvailable").copied().context("no MemAvailable in /proc/meminfo")
}

/// Microseconds that tasks were stalled on memory since the boot.
struct Stalled {
    some: u64,
    full: u64,
}

impl Stalled {
    fn read() -> anyhow::Result<Self> {
        let text = std::fs::read_to_string("/proc/pressure/memory")
            .context("cannot read /proc/pressure/memory: boot with psi=1")?;
        Self::parse(&text).context("/proc/pressure/memory has another form")
    }

    /// `some avg10=0.00 avg60=0.00 avg300=0.00 total=12`
    fn parse(text: &str) -> Option<Self> {
        let total = |name: &str| {
            let line = text.lines().find(|line| line.starts_with(name))?;
            line.rsplit_once("total=")?.1.trim().parse().ok()
        };
        Some(Stalled { some: total("some")?, full: total("full")? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stalls_are_the_totals() {
        let text = "some avg10=0.00 avg60=0.01 avg300=0.00 total=1234\n\
                    full avg10=0.00 avg60=0.00 avg300=0.00 total=56\n";
        let stalled = Stalled::parse(text).expect("two totals");
        assert_eq!((stalled.some, stalled.full), (1234, 56));
        assert!(Stalled::parse("some total=1").is_none());
    }

    #[test]
    fn every_page_is_touched() {
        let mapping = Mapping::new(1, PageSize::Base, Sharing::Private).expect("2 MiB");
        let (longest, _) = touch(&mapping, PAGE).expect("/proc/meminfo");
        assert!(longest > Duration::ZERO);
        let words = PAGE / 8;
        assert!((0..HUGE / PAGE).all(|page| mapping.read(page * words) == (page * PAGE) as u64));
    }
}

//! How fragmented free memory is, from `/proc/buddyinfo`.
//!
//! The promoter reads the same file with code of its own, and so does this: what
//! tests judge by must not share the mistakes of what they judge.

use anyhow::Context;

use crate::protocol::Fragmentation;

/// log2 of the base pages in a block of 2 MiB.
pub const HUGE_ORDER: u32 = 9;

/// The fragmentation of free memory, all zones together: user memory may come
/// from each of them.
///
/// # Errors
/// If `/proc/buddyinfo` cannot be read or has another form.
pub fn read() -> anyhow::Result<Fragmentation> {
    let text = std::fs::read_to_string("/proc/buddyinfo").context("cannot read /proc/buddyinfo")?;
    parse(&text)
}

/// `Node 0, zone Normal N0 N1 N2 ...` with the number of free chunks of each
/// order.
fn parse(text: &str) -> anyhow::Result<Fragmentation> {
    let mut found = Fragmentation { fmfi: 0.0, free_pages: 0, free_blocks: 0 };
    for line in text.lines() {
        let (_, zone) = line.split_once("zone").context("a line names no zone")?;
        for (order, count) in (0_u32..).zip(zone.split_whitespace().skip(1)) {
            let count: u64 = count.parse().with_context(|| format!("no number in `{line}`"))?;
            found.free_pages += count << order;
            if order >= HUGE_ORDER {
                found.free_blocks += count << (order - HUGE_ORDER);
            }
        }
    }
    found.fmfi = index(found.free_pages, found.free_blocks);
    Ok(found)
}

/// The unusable free space index: the share of free memory that is in chunks
/// too small for a huge page. Without free memory there is none to be had: 1.
fn index(free_pages: u64, free_blocks: u64) -> f64 {
    if free_pages == 0 {
        return 1.0;
    }
    (free_pages - (free_blocks << HUGE_ORDER)) as f64 / free_pages as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_of_all_zones_and_orders_count() {
        let text = "Node 0, zone      DMA  0 0 0 0 0 0 0 0 0 0 1 \n\
                    Node 0, zone   Normal  1024 0 0 0 0 0 0 0 1 1 0 \n";
        let found = parse(text).expect("two zones");
        assert_eq!(found.free_pages, 1024 + 1024 + 256 + 512);
        assert_eq!(found.free_blocks, 3);
        assert!((found.fmfi - 1280.0 / 2816.0).abs() < 1e-12, "{found:?}");
    }

    #[test]
    fn no_free_memory_is_fully_fragmented() {
        let found = parse("Node 0, zone DMA 0 0 0 0 0 0 0 0 0 0 0\n").expect("a zone");
        assert_eq!((found.free_pages, found.fmfi), (0, 1.0));
    }

    #[test]
    fn another_form_is_an_error() {
        assert!(parse("Node 0, zone DMA 1 x\n").is_err());
        assert!(parse("nothing of the kind\n").is_err());
    }
}

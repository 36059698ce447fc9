//! How fragmented the host's free memory is for huge pages.

use std::fs;

/// The unusable free space index for blocks of `1 << order` base pages, over all zones: the share
/// of free memory, in thousandths, that is not in free blocks of at least that size. 0 where
/// nothing is free. `None` if the kernel does not tell.
pub fn host(order: u32) -> Option<u32> {
    unusable(&fs::read_to_string("/proc/buddyinfo").ok()?, order)
}

/// The same from the text of /proc/buddyinfo: a line a zone, with the number of free blocks of
/// each order behind the zone's name.
fn unusable(buddyinfo: &str, order: u32) -> Option<u32> {
    let (mut free, mut usable) = (0u64, 0u64);
    for line in buddyinfo.lines() {
        let (_, zone) = line.split_once("zone")?;
        for (order_of, count) in (0..).zip(zone.split_ascii_whitespace().skip(1)) {
            let pages = count.parse::<u64>().ok()?.checked_shl(order_of)?;
            free = free.saturating_add(pages);
            if order_of >= order {
                usable = usable.saturating_add(pages);
            }
        }
    }
    let share = u128::from(free - usable) * 1000 / u128::from(free.max(1));
    u32::try_from(share).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_blocks_too_small_is_unusable() {
        let line = |counts: &str| format!("Node 0, zone   Normal {counts}\n");
        assert_eq!(unusable(&line("0 0 0 0 0 0 0 0 0 0 4"), 9), Some(0));
        assert_eq!(unusable(&line("512 0 0 0 0 0 0 0 0 0 0"), 9), Some(1000));
        let zones = line("512 0 0 0 0 0 0 0 0 1 0") + &line("0 256 0 0 0 0 0 0 0 1 0");
        assert_eq!(unusable(&zones, 9), Some(500));
        assert_eq!(unusable(&zones, 1), Some(250));
        assert_eq!(unusable(&line("0 0"), 9), Some(0), "nothing is free");
    }

    #[test]
    fn what_is_no_buddyinfo_tells_nothing() {
        for text in ["what\n", "Node 0, zone Normal x\n", "Node 0, zone Normal -1\n"] {
            assert_eq!(unusable(text, 9), None, "{text}");
        }
        assert!(host(9).is_none_or(|index| index <= 1000));
    }
}

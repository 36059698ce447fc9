//! The free memory fragmentation index: how much of the free memory is of no
//! use for a huge page.

use std::path::Path;

/// Above this index missing pages are not filled in: huge pages are scarce
/// then, and those that are whole already go first (the paper's rule).
pub const PREALLOCATION_LIMIT: f64 = 0.5;

/// The index of the whole system for blocks of `2^order` pages: 0 where all
/// free memory could become such blocks, 1 where none could. `ready` blocks of
/// that size are free for huge pages although the allocator does not have them.
///
/// # Errors
/// If `/proc/buddyinfo` cannot be read.
pub fn read(order: u32, ready: u64) -> std::io::Result<f64> {
    Ok(index(&std::fs::read_to_string(Path::new("/proc/buddyinfo"))?, order, ready))
}

/// `Node 0, zone Normal N0 N1 N2 ...` with the number of free blocks of each
/// order. All zones count together: user memory may come from each of them.
fn index(buddyinfo: &str, order: u32, ready: u64) -> f64 {
    let mut usable = ready.saturating_mul(1 << order);
    let mut free = usable;
    for line in buddyinfo.lines() {
        let Some((_, zone)) = line.split_once("zone") else {
            continue;
        };
        let counts = zone.split_whitespace().skip(1).map(|word| word.parse().unwrap_or(0_u64));
        for (of_order, count) in (0_u32..64).zip(counts) {
            let pages = count.saturating_mul(1 << of_order);
            free = free.saturating_add(pages);
            if of_order >= order {
                usable = usable.saturating_add(pages);
            }
        }
    }
    if free == 0 {
        return 1.0;
    }
    // Pages of free memory: far below the 2^53 that a double holds exactly.
    (free - usable) as f64 / free as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn index_is_the_share_of_free_memory_in_smaller_blocks() {
        let text = "Node 0, zone      DMA      0      0      0      0      0      0      0      0      0      0      1 \n\
                    Node 0, zone   Normal   1024      0      0      0      0      0      0      0      0      0      0 \n";
        assert_eq!(index(text, 9, 0), 0.5);
        assert_eq!(index(text, 0, 0), 0.0);
    }

    #[test]
    fn ready_blocks_are_usable() {
        let text = "Node 0, zone   Normal   1024 0 0 0 0 0 0 0 0 0 0\n";
        assert_eq!(index(text, 9, 0), 1.0);
        assert_eq!(index(text, 9, 2), 0.5);
        assert_eq!(index("", 9, 1), 0.0);
    }

    #[test]
    fn no_free_memory_is_fully_fragmented() {
        assert_eq!(index("", 9, 0), 1.0);
        assert_eq!(index("Node 0, zone DMA 0 0 0\n", 9, 0), 1.0);
    }

    proptest! {
        #[test]
        fn index_lies_between_0_and_1_and_grows_with_the_order(
            counts in proptest::collection::vec(0_u64..1_000_000, 1..12),
        ) {
            let words: Vec<String> = counts.iter().map(u64::to_string).collect();
            let text = format!("Node 0, zone Normal {}\n", words.join(" "));
            let of = |order| index(&text, order, 0);
            prop_assert!((0.0..=1.0).contains(&of(9)));
            prop_assert!(of(1) <= of(2) && of(2) <= of(9));
        }

        #[test]
        fn any_text_gives_an_index(text in ".*") {
            prop_assert!((0.0..=1.0).contains(&index(&text, 9, 0)));
        }
    }
}

//! Which blocks of guest memory lie on huge pages of the host, as the driver
//! tells it. Without the driver, none are known to.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::ops::Range;
use std::path::Path;

/// Where the driver shows its devices.
pub const DRIVER: &str = "/sys/kernel/debug/virtio_gemini";

/// Where the driver shows settings and counters of its devices.
pub const SETTINGS: &str = "/sys/bus/virtio/drivers/virtio_gemini";

/// Whether `driver` shows the map of a device.
#[must_use]
pub fn is_there(driver: &Path) -> bool {
    let devices = std::fs::read_dir(driver);
    devices.is_ok_and(|mut all| {
        all.any(|device| device.is_ok_and(|device| device.path().join("blocks").exists()))
    })
}

/// Number of blocks that the driver holds ready for the next huge pages: free
/// memory that the allocator does not count. None where it places no pages.
#[must_use]
pub fn ready(settings: &Path) -> u64 {
    let Ok(devices) = std::fs::read_dir(settings) else { return 0 };
    let of_device = |device: std::fs::DirEntry| -> Option<u64> {
        let read = |name| std::fs::read_to_string(device.path().join("gemini").join(name)).ok();
        (read("placement_state")?.trim() == "on").then_some(())?;
        read("ready")?.trim().parse().ok()
    };
    devices.flatten().filter_map(of_device).sum()
}

/// The blocks that are huge in the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostHuge {
    /// Ranges of block numbers, ascending, apart from each other.
    runs: Vec<Range<u64>>,
}

impl HostHuge {
    /// Reads the map of every device below `driver`; `None` where there is no
    /// driver, or no right to see what it knows.
    #[must_use]
    pub fn read(driver: &Path) -> Option<Self> {
        let mut runs = Vec::new();
        let mut devices = 0;
        for device in std::fs::read_dir(driver).ok()?.flatten() {
            // A device may go away while its map is read.
            let Ok(map) = File::open(device.path().join("blocks")) else { continue };
            if collect(BufReader::new(map), &mut runs).is_ok() {
                devices += 1;
            }
        }
        (devices > 0).then(|| HostHuge { runs: merge(runs) })
    }

    /// Whether `block` is huge in the host.
    #[must_use]
    pub fn contains(&self, block: u64) -> bool {
        let after = self.runs.partition_point(|run| run.start <= block);
        after > 0 && self.runs[after - 1].contains(&block)
    }

    /// Number of blocks.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.runs.iter().map(|run| run.end - run.start).sum()
    }
}

/// `FIRST COUNT GUEST USED HOST FLAGS` a line. Blocks that the driver holds
/// have no pages of processes, so they need not be told apart.
fn collect(map: impl BufRead, runs: &mut Vec<Range<u64>>) -> io::Result<()> {
    for line in map.lines() {
        let line = line?;
        let mut words = line.split_whitespace();
        let (Some(first), Some(count)) = (words.next(), words.next()) else { continue };
        let (Ok(first), Ok(count)) = (first.parse::<u64>(), count.parse::<u64>()) else {
            continue; // the heading
        };
        if matches!(words.nth(2), Some("huge" | "hugetlb")) {
            runs.push(first..first.saturating_add(count));
        }
    }
    Ok(())
}

/// Joins what touches or overlaps.
fn merge(mut runs: Vec<Range<u64>>) -> Vec<Range<u64>> {
    runs.sort_unstable_by_key(|run| run.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for run in runs {
        match merged.last_mut() {
            Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
            _ => merged.push(run),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn host_huge_blocks_are_read_whatever_the_guest_has_there() {
        let directory = tempfile::tempdir().expect("a directory");
        let device = directory.path().join("virtio3");
        std::fs::create_dir(&device).expect("a directory");
        let map = "# first count guest used host flags\n\
                   1 2 base 17 huge -\n3 4 base 0 base -\n7 1 huge 0 hugetlb -\n8 1 free 0 huge -\n";
        std::fs::write(device.join("blocks"), map).expect("a file");
        let blocks = HostHuge::read(directory.path()).expect("a driver");
        let seen: Vec<u64> = (0..12).filter(|block| blocks.contains(*block)).collect();
        assert_eq!(seen, [1, 2, 7, 8]);
        assert_eq!(blocks.count(), 4);
    }

    #[test]
    fn absent_driver_is_told_from_one_that_has_no_host_huge_block() {
        let directory = tempfile::tempdir().expect("a directory");
        assert_eq!(HostHuge::read(&directory.path().join("none")), None);
        assert_eq!(HostHuge::read(directory.path()), None);
        let device = directory.path().join("virtio0");
        std::fs::create_dir(&device).expect("a directory");
        std::fs::write(device.join("blocks"), "0 9 free 0 absent -\n").expect("a file");
        assert_eq!(HostHuge::read(directory.path()), Some(HostHuge::default()));
        assert!(is_there(directory.path()));
        assert!(!is_there(&directory.path().join("none")) && !is_there(&device));
    }

    #[test]
    fn ready_blocks_count_where_pages_are_placed() {
        let directory = tempfile::tempdir().expect("a directory");
        assert_eq!(ready(directory.path()), 0);
        for (name, state, blocks) in
            [("virtio3", "on\n", "17\n"), ("virtio4", "no hook\n", "5\n"), ("bind", "", "x")]
        {
            let gemini = directory.path().join(name).join("gemini");
            std::fs::create_dir_all(&gemini).expect("a directory");
            std::fs::write(gemini.join("placement_state"), state).expect("a file");
            std::fs::write(gemini.join("ready"), blocks).expect("a file");
        }
        assert_eq!(ready(directory.path()), 17);
        assert_eq!(ready(&directory.path().join("none")), 0);
    }

    proptest! {
        #[test]
        fn merged_runs_contain_what_the_runs_contained(
            runs in proptest::collection::vec((0_u64..60, 1_u64..9), 0..12),
            block in 0_u64..80,
        ) {
            let runs: Vec<_> = runs.iter().map(|(start, count)| *start..start + count).collect();
            let expected = runs.iter().any(|run| run.contains(&block));
            let blocks = HostHuge { runs: merge(runs) };
            prop_assert_eq!(blocks.contains(block), expected);
            prop_assert!(blocks.runs.windows(2).all(|pair| pair[0].end < pair[1].start));
        }
    }
}

//! How much memory a process's control groups leave it.

use std::io;
use std::path::{Component, Path, PathBuf};

/// Where the unified hierarchy is. The old one (version 1) is not looked at.
pub const ROOT: &str = "/sys/fs/cgroup";

/// Bytes that can be charged to the groups of process `pid` before one of them
/// is at its limit; `u64::MAX` where there is none. A huge page is charged
/// while the pages that it replaces still are.
///
/// # Errors
/// If the process is gone, or its group cannot be seen from here.
pub fn headroom(pid: i32) -> io::Result<u64> {
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    below(Path::new(ROOT), &groups)
}

/// The smallest headroom from the group of `groups` (the text of
/// /proc/PID/cgroup) up to `root`.
fn below(root: &Path, groups: &str) -> io::Result<u64> {
    let Some(group) = groups.lines().find_map(|line| line.strip_prefix("0::/")) else {
        return Ok(u64::MAX);
    };
    let group = Path::new(group);
    if group.components().any(|part| !matches!(part, Component::Normal(_))) {
        return Err(io::Error::other("a control group outside of this namespace"));
    }
    let mut left = u64::MAX;
    let mut path: PathBuf = root.join(group);
    // The root itself has no limit.
    while path != root && path.starts_with(root) {
        // Groups without the memory controller have none of these files.
        if let Some(usage) = number(&path.join("memory.current")) {
            // Above `high` every allocation of the group is slowed down.
            for limit in ["memory.max", "memory.high"] {
                if let Some(limit) = number(&path.join(limit)) {
                    left = left.min(limit.saturating_sub(usage));
                }
            }
        }
        path.pop();
    }
    Ok(left)
}

/// A number; `None` for `max`, too.
fn number(path: &Path) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(path: &Path, current: &str, max: &str, high: &str) {
        std::fs::create_dir_all(path).expect("a directory");
        for (name, text) in
            [("memory.current", current), ("memory.max", max), ("memory.high", high)]
        {
            std::fs::write(path.join(name), text).expect("a file");
        }
    }

    #[test]
    fn nearest_limit_of_all_parents_counts() {
        let root = tempfile::tempdir().expect("a directory");
        let root = root.path();
        group(&root.join("a"), "100\n", "1000\n", "max\n");
        group(&root.join("a/b"), "100\n", "max\n", "max\n");
        assert_eq!(below(root, "0::/a/b\n").expect("a number"), 900);
        group(&root.join("a/b"), "100\n", "max\n", "150\n");
        assert_eq!(below(root, "0::/a/b\n").expect("a number"), 50);
        group(&root.join("a/b"), "200\n", "max\n", "150\n");
        assert_eq!(below(root, "0::/a/b\n").expect("a number"), 0);
    }

    #[test]
    fn no_group_and_no_limit_are_no_bound() {
        let root = tempfile::tempdir().expect("a directory");
        assert_eq!(below(root.path(), "0::/\n").expect("a number"), u64::MAX);
        assert_eq!(below(root.path(), "1:memory:/x\n").expect("a number"), u64::MAX);
    }

    #[test]
    fn group_of_another_namespace_is_an_error() {
        assert!(below(Path::new("/nowhere"), "0::/../other\n").is_err());
    }
}

//! Settings of the host that tests change, and put back: each by a value that does it when it is
//! dropped. One lock keeps tests (of all programs of this project) from changing them at once.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

const LOCK: &str = "/run/lock/virtio-gemini-settings.lock";
const SHMEM_ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
const NR_HUGEPAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// Whether the test runs as root; where it does not, says so past the capturing of output, since
/// a test that was skipped looks like one that passed.
pub fn is_root(test: &str) -> bool {
    // SAFETY: takes nothing, and always succeeds.
    let root = unsafe { libc::geteuid() } == 0;
    if !root {
        skipped(test, "it needs root, to change settings of the host and to start services");
    }
    root
}

/// Says that a test was skipped.
pub fn skipped(test: &str, why: &str) {
    let message = format!("\n*** SKIPPED {test}: {why}\n");
    // Nothing to be done about a closed standard error.
    let _ = io::stderr().write_all(message.as_bytes());
}

/// The right to change the host's settings.
pub struct Lock(#[allow(dead_code)] File);

impl Lock {
    /// Waits for it.
    pub fn take() -> Self {
        let file = OpenOptions::new().create(true).append(true).open(LOCK).unwrap();
        // SAFETY: takes no pointers.
        assert_eq!(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) }, 0);
        Self(file)
    }
}

/// A setting, put back at the end.
pub struct Setting {
    path: PathBuf,
    before: String,
}

impl Setting {
    fn set(path: &str, before: String, value: &str) -> Self {
        std::fs::write(path, value).unwrap_or_else(|error| panic!("{path}: {error}"));
        Self { path: path.into(), before }
    }

    /// Sets `shmem_enabled`.
    pub fn shmem_enabled(_lock: &Lock, value: &str) -> Self {
        let text = std::fs::read_to_string(SHMEM_ENABLED).unwrap();
        let before = text.split(['[', ']']).nth(1).unwrap().to_owned();
        Self::set(SHMEM_ENABLED, before, value)
    }

    /// Adds 2 MiB pages to the hugetlb pool; `None` if the host has too little memory in one
    /// piece.
    pub fn more_hugepages(_lock: &Lock, more: u64) -> Option<Self> {
        let text = std::fs::read_to_string(NR_HUGEPAGES).unwrap();
        let before = text.trim().to_owned();
        let wanted = before.parse::<u64>().unwrap() + more;
        let setting = Self::set(NR_HUGEPAGES, before, &wanted.to_string());
        let got = std::fs::read_to_string(NR_HUGEPAGES).unwrap();
        (got.trim() == wanted.to_string()).then_some(setting)
    }

    /// Changes the pool's size once more: to what it was at first, and `more` pages.
    pub fn resize_hugepages(&self, more: u64) {
        assert_eq!(self.path, Path::new(NR_HUGEPAGES));
        let pages = self.before.parse::<u64>().unwrap() + more;
        std::fs::write(&self.path, pages.to_string()).unwrap();
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        if let Err(error) = std::fs::write(&self.path, &self.before) {
            skipped("cleaning up", &format!("{} stays changed: {error}", self.path.display()));
        }
    }
}

/// A memory cgroup, in whichever hierarchy has the controller.
pub struct Cgroup {
    path: PathBuf,
    usage: &'static str,
}

impl Cgroup {
    /// Makes one; `None` where no hierarchy has the memory controller.
    pub fn new(name: &str) -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("gemini-test-{}-{number}-{name}", std::process::id());
        let version_1 = Path::new("/sys/fs/cgroup/memory/memory.stat").exists();
        let root = if version_1 {
            PathBuf::from("/sys/fs/cgroup/memory")
        } else {
            ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].into_iter().map(PathBuf::from).find(
                |root| {
                    std::fs::read_to_string(root.join("cgroup.subtree_control"))
                        .is_ok_and(|text| text.split_ascii_whitespace().any(|c| c == "memory"))
                },
            )?
        };
        let path = root.join(name);
        std::fs::create_dir(&path).unwrap();
        let usage = if version_1 { "memory.usage_in_bytes" } else { "memory.current" };
        Some(Self { path, usage })
    }

    /// Moves a process in.
    pub fn add(&self, pid: u32) {
        std::fs::write(self.path.join("cgroup.procs"), pid.to_string()).unwrap();
    }

    /// Bytes that are charged to it. (Its statistics by kind of memory are no help: a collapse
    /// does not move what they count.)
    pub fn charged(&self) -> u64 {
        let usage = std::fs::read_to_string(self.path.join(self.usage)).unwrap();
        usage.trim().parse().unwrap()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Its processes may still be on their way out.
        for _ in 0..100 {
            if std::fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        skipped("cleaning up", &format!("{} stays", self.path.display()));
    }
}

/// A small tmpfs.
pub struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    /// Mounts one of `size` bytes.
    pub fn mount(size: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "gemini-test"])
            .arg(directory.path())
            .status()
            .unwrap();
        assert!(status.success());
        Self(directory)
    }

    /// A file of `len` bytes, all of it a hole.
    pub fn file(&self, len: u64) -> File {
        let path = self.0.path().join("memory");
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path).unwrap();
        file.set_len(len).unwrap();
        file
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
        if !unmounted.is_ok_and(|status| status.success()) {
            skipped("cleaning up", &format!("{} stays mounted", self.0.path().display()));
        }
    }
}

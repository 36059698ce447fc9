//! A memory cgroup with a limit, so that a lack of memory stays inside it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{bail, Context};

use crate::process;

/// How long processes may take to leave.
const LEAVE: Duration = Duration::from_secs(10);

/// A cgroup below the root; it is removed when dropped.
#[derive(Debug)]
pub struct MemoryCgroup {
    path: PathBuf,
    /// Whether it is of version 2.
    unified: bool,
    /// Where processes are put when it is removed.
    parent: PathBuf,
}

impl MemoryCgroup {
    /// A new group without a limit.
    ///
    /// # Errors
    /// If this machine has no memory controller, or it may not be used.
    pub fn new() -> anyhow::Result<Self> {
        let unified = Path::new("/sys/fs/cgroup");
        let legacy = Path::new("/sys/fs/cgroup/memory");
        let controllers = fs::read_to_string(unified.join("cgroup.controllers"));
        let has_memory =
            controllers.is_ok_and(|text| text.split_whitespace().any(|c| c == "memory"));
        let (parent, unified) = if has_memory {
            fs::write(unified.join("cgroup.subtree_control"), "+memory")
                .context("the memory controller cannot be switched on for new cgroups")?;
            (unified, true)
        } else if legacy.join("memory.limit_in_bytes").exists() {
            (legacy, false)
        } else {
            bail!("no memory controller in /sys/fs/cgroup: mount cgroup2 there");
        };
        let path = parent.join(format!("virtio-gemini-{}", std::process::id()));
        fs::create_dir(&path)
            .with_context(|| format!("cannot make {}; this needs root", path.display()))?;
        Ok(MemoryCgroup { path, unified, parent: parent.to_owned() })
    }

    /// Puts this process into the group: what it starts from now on is in it.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn enter(&self) -> anyhow::Result<()> {
        put(&self.path, std::process::id())
    }

    /// Takes this process out again; what it started stays.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn leave(&self) -> anyhow::Result<()> {
        put(&self.parent, std::process::id())
    }

    /// Bytes that are charged to it, cache included.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn usage(&self) -> anyhow::Result<u64> {
        let name = if self.unified { "memory.current" } else { "memory.usage_in_bytes" };
        self.read(name)?.trim().parse().with_context(|| format!("{name} is no number"))
    }

    /// Limits it.
    ///
    /// # Errors
    /// If the kernel refuses, as where more is in use and cannot be reclaimed.
    pub fn limit(&self, bytes: u64) -> anyhow::Result<()> {
        let name = if self.unified { "memory.max" } else { "memory.limit_in_bytes" };
        fs::write(self.path.join(name), bytes.to_string())
            .with_context(|| format!("cannot limit {} to {bytes} bytes", self.path.display()))
    }

    /// Processes in it that the kernel has killed for want of memory.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn oom_kills(&self) -> anyhow::Result<u64> {
        let name = if self.unified { "memory.events" } else { "memory.oom_control" };
        self.read(name)?
            .lines()
            .find_map(|line| line.strip_prefix("oom_kill "))
            .and_then(|number| number.trim().parse().ok())
            .with_context(|| format!("{name} counts no oom_kill"))
    }

    fn read(&self, name: &str) -> anyhow::Result<String> {
        let path = self.path.join(name);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    }
}

fn put(group: &Path, pid: u32) -> anyhow::Result<()> {
    fs::write(group.join("cgroup.procs"), pid.to_string())
        .with_context(|| format!("cannot move process {pid} to {}", group.display()))
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        let removed = process::wait_for("the cgroup is empty", LEAVE, || {
            let _ = self.leave();
            Ok(fs::remove_dir(&self.path).is_ok().then_some(()))
        });
        if let Err(error) = removed {
            eprintln!("cannot remove {}: {error:#}", self.path.display());
        }
    }
}

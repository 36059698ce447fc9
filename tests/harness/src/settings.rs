//! The host-wide settings that decide whether a memory file may have huge pages.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use anyhow::{bail, ensure, Context};

use crate::cleanup::{self, Guard};
use crate::sys::{self, Lock};

const SHMEM_ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// The pool of hugetlb pages of 2 MiB, in pages.
pub const NR_HUGEPAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
const NR_GIGANTIC: &str = "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages";

/// Held by whoever changes a host-wide setting (exclusively) or depends on one
/// (shared), in all of the project's programs.
const LOCK: &str = "/run/lock/virtio-gemini-settings.lock";

/// The value of `shmem_enabled`.
///
/// # Errors
/// If the kernel has no transparent huge pages.
pub fn shmem_enabled() -> anyhow::Result<String> {
    let text = std::fs::read_to_string(SHMEM_ENABLED)
        .with_context(|| format!("{SHMEM_ENABLED}: this kernel has no huge pages for shmem"))?;
    text.split_whitespace()
        .find_map(|word| word.strip_prefix('[')?.strip_suffix(']'))
        .map(str::to_owned)
        .with_context(|| format!("{SHMEM_ENABLED} has no value: {text:?}"))
}

/// A setting that stays as it is while this lives. If it was changed for that,
/// dropping this puts the old value back.
#[derive(Debug)]
pub struct Held {
    value: String,
    // What it was, and what puts it back (before the lock is let go).
    old: Option<(String, Guard)>,
    _others: Vec<Guard>,
    // None where this user can neither open nor create it.
    _lock: Option<File>,
}

impl Held {
    /// Holds `shmem_enabled` at `value`, whatever it was, for as long as the
    /// result lives. Waits for others that depend on it.
    ///
    /// # Errors
    /// If this process may not change it.
    pub fn shmem_enabled(value: &str) -> anyhow::Result<Self> {
        let lock = lock(Lock::Exclusive)?;
        let old = shmem_enabled()?;
        Self::set(lock, SHMEM_ENABLED, old, value)
    }

    /// Reserves `count` more huge pages for as long as the result lives.
    ///
    /// # Errors
    /// If this process may not, or the host has not so many.
    pub fn reserved_huge_pages(count: u64) -> anyhow::Result<Self> {
        let lock = lock(Lock::Exclusive)?;
        let read = || -> anyhow::Result<u64> {
            let text = std::fs::read_to_string(NR_HUGEPAGES)?;
            text.trim().parse().with_context(|| format!("{NR_HUGEPAGES} holds {text:?}"))
        };
        let old = read()?;
        let wanted = old + count;
        let held = Self::set(lock, NR_HUGEPAGES, old.to_string(), &wanted.to_string())?;
        let found = read()?;
        ensure!(found >= wanted, "the host reserved {found} huge pages of {wanted}");
        Ok(held)
    }

    /// The pool of huge pages, or of pages of 1 GiB, for one who changes its
    /// size all the time and may be killed meanwhile: what it was is put back
    /// whatever happens.
    ///
    /// # Errors
    /// If this process may not change it.
    pub fn pool(gigantic: bool) -> anyhow::Result<Pool> {
        let path = if gigantic { NR_GIGANTIC } else { NR_HUGEPAGES };
        let lock = lock(Lock::Exclusive)?;
        let old = std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
        let held = Self::set(lock, path, old.trim().to_owned(), old.trim())?;
        Ok(Pool { _keeper: Keeper::start(path, old.trim())?, held, path })
    }

    fn set(
        lock: Option<File>,
        path: &'static str,
        old: String,
        value: &str,
    ) -> anyhow::Result<Self> {
        let theirs = old.clone();
        let guard = cleanup::guard(move || put_back(path, &theirs));
        std::fs::write(path, value).with_context(|| format!("cannot write {value:?} to {path}"))?;
        let old = Some((old, guard));
        Ok(Held { value: value.to_owned(), old, _others: Vec::new(), _lock: lock })
    }

    /// Has another setting, a number, hold as well, under the same lock.
    ///
    /// # Errors
    /// If this process may not change it.
    pub fn and(mut self, path: &'static str, value: u64) -> anyhow::Result<Self> {
        let old = std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
        self._others.push(cleanup::guard(move || put_back(path, old.trim())));
        std::fs::write(path, value.to_string())
            .with_context(|| format!("cannot write {value} to {path}"))?;
        Ok(self)
    }

    /// What holds, for people.
    #[must_use]
    pub fn describe(&self) -> String {
        match &self.old {
            Some((old, _)) => format!("{} (was {old}, put back at the end)", self.value),
            None => self.value.clone(),
        }
    }
}

/// The pool of huge pages, held.
#[derive(Debug)]
pub struct Pool {
    // Dropped first, while the lock is still held.
    _keeper: Keeper,
    held: Held,
    path: &'static str,
}

impl Pool {
    /// Asks the kernel for a pool of `pages`. Pages in use, and those that are
    /// set aside, it keeps; and it may find fewer than asked for.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn resize(&self, pages: u64) -> anyhow::Result<()> {
        std::fs::write(self.path, pages.to_string())
            .with_context(|| format!("cannot write {}", self.path))
    }

    /// Pages that are free and not set aside.
    ///
    /// # Errors
    /// If that cannot be read.
    pub fn unclaimed(&self) -> anyhow::Result<u64> {
        let read = |name: &str| -> anyhow::Result<u64> {
            let path = std::path::Path::new(self.path).with_file_name(name);
            let text = std::fs::read_to_string(&path)
                .with_context(|| format!("cannot read {}", path.display()))?;
            Ok(text.trim().parse()?)
        };
        Ok(read("free_hugepages")?.saturating_sub(read("resv_hugepages")?))
    }

    /// What holds, for people.
    #[must_use]
    pub fn describe(&self) -> String {
        self.held.describe()
    }
}

/// A process that writes a setting back when this one ends, however it ends.
#[derive(Debug)]
struct Keeper(Child);

impl Keeper {
    fn start(path: &str, old: &str) -> anyhow::Result<Self> {
        let mut command = Command::new("sh");
        // It reads until the other end of its input is closed: by us, or by our death.
        command
            .args(["-c", "cat >/dev/null; echo \"$1\" >\"$0\"", path, old])
            .stdin(Stdio::piped())
            .process_group(0);
        Ok(Keeper(command.spawn().context("cannot start sh")?))
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        if let Err(error) = self.0.wait() {
            eprintln!("cannot wait for what puts a setting back: {error}");
        }
    }
}

fn put_back(path: &str, old: &str) {
    if let Err(error) = std::fs::write(path, old) {
        eprintln!("cannot put {path} back to {old}: {error}");
    }
}

/// The lock, taken; says so if it has to wait for others. None where this user
/// may not have it: such a user cannot change a setting either, and at worst
/// measures under one that changes.
fn lock(how: Lock) -> anyhow::Result<Option<File>> {
    let opened = match File::open(LOCK) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            File::options().create(true).append(true).mode(0o644).open(LOCK)
        }
        other => other,
    };
    let file = match opened {
        Ok(file) => file,
        Err(_) if !sys::is_root() => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot open {LOCK}")),
    };
    if !sys::try_lock(&file, how)? {
        eprintln!("waiting for others that use the host's settings ({LOCK})");
        sys::lock(&file, how)?;
    }
    Ok(Some(file))
}

/// Makes sure that the daemon alone decides about huge pages, as long as the
/// result lives: where every fault would give one, or none can exist, the setting
/// is changed for the time being (which takes the superuser).
///
/// # Errors
/// If nothing can be measured under the setting; the error has the remedy.
pub fn daemon_decides() -> anyhow::Result<Held> {
    let lock = lock(Lock::Shared)?;
    let held = Held { value: shmem_enabled()?, old: None, _others: Vec::new(), _lock: lock };
    if matches!(held.value.as_str(), "never" | "advise") {
        return Ok(held);
    }
    if sys::is_root() {
        drop(held);
        return Held::shmem_enabled("never");
    }
    let why = if held.value == "deny" {
        "no memory file can have huge pages"
    } else {
        "every page fault gives a huge page, whatever the daemon does"
    };
    bail!(
        "shmem_enabled is {}: {why}. Remedy: as root, echo never > {SHMEM_ENABLED} (or \
         advise), or run this as root, which sets it and puts it back",
        held.value
    )
}

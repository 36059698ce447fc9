//! The host-wide setting that decides whether a memory file may have huge pages.

use std::fs::File;
use std::path::Path;

use anyhow::{bail, Context};

use crate::sys;

const SHMEM_ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

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

/// A changed setting; dropping it puts the old value back.
#[derive(Debug)]
pub struct Changed {
    old: String,
    // Held while the setting differs, so that two tests cannot each take the
    // other's value for the machine's own.
    _lock: File,
}

impl Changed {
    /// Sets `shmem_enabled` to `value` for as long as the result lives. Others
    /// that change it through here wait meanwhile.
    ///
    /// # Errors
    /// If this process may not change it.
    pub fn shmem_enabled(value: &str) -> anyhow::Result<Self> {
        let path = std::env::temp_dir().join("gemini-host-settings.lock");
        let lock = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        sys::lock(&lock)?;
        let old = shmem_enabled()?;
        std::fs::write(SHMEM_ENABLED, value)
            .with_context(|| format!("cannot write {value:?} to {SHMEM_ENABLED}"))?;
        Ok(Changed { old, _lock: lock })
    }
}

impl Drop for Changed {
    fn drop(&mut self) {
        if let Err(error) = std::fs::write(SHMEM_ENABLED, &self.old) {
            eprintln!("cannot put {SHMEM_ENABLED} back to {}: {error}", self.old);
        }
    }
}

/// Makes sure that the daemon alone decides about huge pages: where every fault
/// would give one, or none can exist, the setting is changed for the time being
/// (which takes the superuser). Says what holds.
///
/// # Errors
/// If nothing can be measured under the setting; the error has the remedy.
pub fn daemon_decides() -> anyhow::Result<(String, Option<Changed>)> {
    let value = shmem_enabled()?;
    if matches!(value.as_str(), "never" | "advise") {
        return Ok((value, None));
    }
    if sys::is_root() && Path::new(SHMEM_ENABLED).exists() {
        let changed = Changed::shmem_enabled("never")?;
        return Ok((format!("never (was {value}, put back at the end)"), Some(changed)));
    }
    let why = if value == "deny" {
        "no memory file can have huge pages"
    } else {
        "every page fault gives a huge page, whatever the daemon does"
    };
    bail!(
        "shmem_enabled is {value}: {why}. Remedy: as root, \
         echo never > {SHMEM_ENABLED} (or advise), or run this as root, which sets it \
         and puts it back"
    )
}

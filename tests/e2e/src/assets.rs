//! The built parts that a lab needs, as the scripts hand them over.

use std::path::PathBuf;

use anyhow::{bail, Context};
use serde::Deserialize;

/// Environment variables that name the parts; `scripts/lib.sh` sets them.
const QEMU: &str = "GEMINI_QEMU";
const DAEMON: &str = "GEMINI_DAEMON";
const GUEST: &str = "GEMINI_GUEST";
const FAULT_DAEMON: &str = "GEMINI_FAULT_DAEMON";
const TLB_PLUGIN: &str = "GEMINI_TLB_PLUGIN";

/// Where the parts are.
#[derive(Clone, Debug)]
pub struct Assets {
    /// `qemu-system-x86_64` with the project's patches.
    pub qemu: PathBuf,
    /// `vhost-device-gemini`.
    pub daemon: PathBuf,
    /// The test guest.
    pub guest: GuestAssets,
}

/// What `scripts/build-guest` prints.
#[derive(Clone, Debug, Deserialize)]
pub struct GuestAssets {
    /// Release of the guest's kernel.
    pub release: String,
    /// The kernel's image.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
}

impl Assets {
    /// Reads the paths from the environment.
    ///
    /// # Errors
    /// If one is missing: the scripts build the parts and set the paths, so
    /// that this crate never runs with parts that are older than the sources.
    pub fn from_env() -> anyhow::Result<Self> {
        let guest = variable(GUEST)?;
        let guest: GuestAssets = serde_json::from_str(&guest)
            .with_context(|| format!("{GUEST} is not what scripts/build-guest prints"))?;
        let assets =
            Assets { qemu: variable(QEMU)?.into(), daemon: variable(DAEMON)?.into(), guest };
        for path in [&assets.qemu, &assets.daemon, &assets.guest.kernel, &assets.guest.initrd] {
            if !path.exists() {
                bail!("{} does not exist; run scripts/test again", path.display());
            }
        }
        Ok(assets)
    }
}

fn variable(name: &str) -> anyhow::Result<String> {
    std::env::var(name).with_context(|| {
        format!("{name} is not set: start this through scripts/demo, vm, bench or test")
    })
}

/// A `vhost-device-gemini` that was built with the feature `fault-points`, as
/// scripts/bench hands it over.
///
/// # Errors
/// If there is none.
pub fn fault_daemon() -> anyhow::Result<PathBuf> {
    variable(FAULT_DAEMON).map(PathBuf::from)
}

/// QEMU's plugin that simulates TLBs.
///
/// # Errors
/// If there is none.
pub fn tlb_plugin() -> anyhow::Result<PathBuf> {
    variable(TLB_PLUGIN).map(PathBuf::from)
}

/// The directory for things that are kept between runs; the scripts' default.
///
/// # Errors
/// If neither `GEMINI_CACHE` nor a home directory is set.
pub fn cache_dir() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("GEMINI_CACHE") {
        return Ok(path.into());
    }
    let base = match std::env::var_os("XDG_CACHE_HOME") {
        Some(path) => PathBuf::from(path),
        None => PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?).join(".cache"),
    };
    Ok(base.join("virtio-gemini"))
}

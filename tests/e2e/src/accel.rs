//! Whether KVM can be used: only a guest that boots under it tells.

use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use anyhow::bail;

use crate::assets::{self, Assets};
use crate::vm::{Vm, VmConfig};

/// How long a guest that works needs to reach user space, and more: under
/// hardware virtualisation it is about a second.
const PROBE_TIMEOUT: Duration = Duration::from_secs(12);

/// What a person asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccelChoice {
    /// KVM if a guest boots under it, else emulation.
    Auto,
    /// Emulation.
    Tcg,
    /// KVM, or failure.
    Kvm,
}

/// What a guest runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// Emulation with a thread for each virtual CPU.
    Tcg,
    /// Emulation in which the guest's clocks and its time stamp counter advance
    /// by one nanosecond, or tick, an instruction. For one virtual CPU.
    Counting,
    /// Hardware virtualisation.
    Kvm,
}

impl FromStr for AccelChoice {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        Ok(match text {
            "auto" => AccelChoice::Auto,
            "tcg" => AccelChoice::Tcg,
            "kvm" => AccelChoice::Kvm,
            _ => bail!("{text} is none of auto, tcg, kvm"),
        })
    }
}

/// The emulated processor: all that QEMU can do, but for fast string
/// instructions. Kernels that see those clear and copy pages byte by byte with
/// them, which an emulator does one byte at a time: eight times as long as by
/// words.
const EMULATED_CPU: &str = "max,-erms,-fsrm";

impl Accel {
    /// QEMU's arguments.
    #[must_use]
    pub fn arguments(self) -> &'static [&'static str] {
        match self {
            Accel::Tcg => &["-accel", "tcg,thread=multi", "-cpu", EMULATED_CPU],
            Accel::Counting => {
                &["-accel", "tcg,thread=single", "-icount", "shift=0", "-cpu", EMULATED_CPU]
            }
            Accel::Kvm => &["-accel", "kvm", "-cpu", "host"],
        }
    }

    /// The name as people write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Accel::Tcg => "tcg",
            Accel::Counting => "tcg, counting instructions",
            Accel::Kvm => "kvm",
        }
    }
}

impl AccelChoice {
    /// The choice that `GEMINI_ACCEL` makes; `auto` where it is not set.
    ///
    /// # Errors
    /// If it holds another word.
    pub fn from_env() -> anyhow::Result<Self> {
        match std::env::var("GEMINI_ACCEL") {
            Ok(text) => text.parse(),
            Err(_) => Ok(AccelChoice::Auto),
        }
    }

    /// Decides, with a probe boot where that is needed. `/dev/kvm` and even a
    /// created VM prove nothing: nested virtualisation can fail later.
    ///
    /// # Errors
    /// If KVM was asked for and does not work.
    pub fn resolve(self, assets: &Assets) -> anyhow::Result<Accel> {
        match self {
            AccelChoice::Tcg => Ok(Accel::Tcg),
            AccelChoice::Kvm => match probe(assets) {
                Ok(()) => Ok(Accel::Kvm),
                Err(error) => bail!("KVM was asked for, and no guest boots under it: {error:#}"),
            },
            AccelChoice::Auto => Ok(if kvm_works(assets) { Accel::Kvm } else { Accel::Tcg }),
        }
    }
}

/// The probe's result, remembered until the next boot of this machine.
fn kvm_works(assets: &Assets) -> bool {
    if !Path::new("/dev/kvm").exists() {
        return false;
    }
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let key = format!("{} {}", boot.trim(), assets.qemu.display());
    let memory = assets::cache_dir().map(|cache| cache.join("kvm-probe"));
    if let Ok(text) = memory.as_ref().map_or(Ok(String::new()), std::fs::read_to_string) {
        if let Some(result) = text.strip_prefix(&key) {
            return result.trim() == "works";
        }
    }
    let works = match probe(assets) {
        Ok(()) => true,
        Err(error) => {
            // The error goes on with the ends of two logs.
            let text = error.to_string();
            let cause = text.lines().next().unwrap_or_default();
            eprintln!("KVM is there but no guest boots under it, so guests are emulated: {cause}");
            false
        }
    };
    if let Ok(path) = memory {
        let word = if works { "works" } else { "fails" };
        // Not being able to remember costs the next run a probe, no more.
        if let Err(error) = std::fs::write(&path, format!("{key} {word}\n")) {
            eprintln!("cannot write {}: {error}", path.display());
        }
    }
    works
}

fn probe(assets: &Assets) -> anyhow::Result<()> {
    let mut config = VmConfig::new("kvm-probe", Accel::Kvm);
    config.memory = 256 << 20;
    config.cpus = 1;
    config.boot_timeout = PROBE_TIMEOUT;
    Vm::boot(assets, config).map(drop)
}

//! What each policy means for host, daemon and guest.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// What guests run under.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// Base pages at both layers.
    None,
    /// Huge pages at both layers, never on the same block.
    Misaligned,
    /// What Linux does at both layers, neither of which knows of the other.
    Thp,
    /// The daemon's emulation of KubeVirt's THP backing; THP in the guest.
    KubevirtLike,
    /// The daemon's emulation of Ingens; THP in the guest.
    IngensLike,
    /// The daemon's emulation of HawkEye; THP in the guest.
    HawkeyeLike,
    /// Huge pages that were set aside before the guest started.
    Hugetlb,
    /// All of this project.
    Gemini,
    /// The same, and the host's huge pages under what the guest's kernel has for
    /// itself.
    GeminiKernel,
    /// Huge pages of the guest lie where its kernel likes.
    GeminiNoPlacement,
    /// The driver books no block.
    GeminiNoBooking,
    /// Aligned blocks that a process frees are not held for the next one.
    GeminiNoBucket,
    /// No stock of blocks that were made ready before somebody asks.
    GeminiNoPrepare,
    /// The host collapses nothing that the guest did not ask for.
    GeminiNoRepair,
    /// Nobody collapses base pages in the guest but its kernel.
    GeminiNoPromoter,
}

/// How a guest under a policy is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setup {
    /// The daemon's policy.
    pub daemon: &'static str,
    /// `shmem_enabled` of the host: whether its kernel makes guest memory huge.
    pub shmem: &'static str,
    /// Whether guest memory comes from the host's pool of hugetlb pages.
    pub hugetlb: bool,
    /// Whether free memory of the guest may be fragmented before; else it is as if
    /// its huge pages had been set aside when it booted.
    pub guest_fragments: bool,
    /// `transparent_hugepage=` of the guest.
    pub guest_thp: &'static str,
    /// The driver's settings, over a driver that only exchanges hints; none where
    /// it is not loaded.
    pub driver: Option<&'static [(&'static str, u64)]>,
    /// Whether the driver makes blocks ready in advance, so that there is a stock
    /// to wait for.
    pub stock: bool,
    /// Whether `gemini-guestd` runs.
    pub promoter: bool,
    /// Whether the host's huge pages are put where the guest has none.
    pub misalign: bool,
    /// Whether the daemon's policy is set once more when the data is loaded: what
    /// is done on demand is asked for then.
    pub on_demand: bool,
}

/// Linux without this project: the device is there, as in all guests, and no
/// driver.
const LINUX: Setup = Setup {
    daemon: "none",
    shmem: "never",
    hugetlb: false,
    guest_fragments: true,
    guest_thp: "always",
    driver: None,
    stock: false,
    promoter: false,
    misalign: false,
    on_demand: false,
};

/// The driver as it is by default.
const GEMINI: Setup = Setup {
    daemon: "gemini",
    driver: Some(&[("booking", 1), ("bucket", 1), ("placement", 1)]),
    stock: true,
    promoter: true,
    ..LINUX
};

/// A host policy of the daemon's, told by the driver what the guest has, as the
/// daemon's own policies are.
const EMULATED: Setup = Setup { driver: Some(&[]), ..LINUX };

impl Policy {
    /// How its guests are set up.
    #[must_use]
    pub fn setup(self) -> Setup {
        match self {
            Policy::None => Setup { guest_thp: "never", ..LINUX },
            Policy::Misaligned => Setup { misalign: true, ..LINUX },
            Policy::Thp => Setup { shmem: "always", ..LINUX },
            Policy::KubevirtLike => Setup { daemon: "kubevirt-like", on_demand: true, ..EMULATED },
            Policy::IngensLike => Setup { daemon: "ingens-like", ..EMULATED },
            Policy::HawkeyeLike => Setup { daemon: "hawkeye-like", ..EMULATED },
            Policy::Hugetlb => Setup { hugetlb: true, guest_fragments: false, ..LINUX },
            Policy::Gemini => GEMINI,
            Policy::GeminiKernel => Setup { daemon: "gemini-kernel", ..GEMINI },
            // Nobody takes from a stock without placement.
            Policy::GeminiNoPlacement => Setup {
                driver: Some(&[("booking", 1), ("bucket", 1), ("placement", 0)]),
                stock: false,
                ..GEMINI
            },
            Policy::GeminiNoBooking => Setup {
                driver: Some(&[("booking", 0), ("bucket", 1), ("placement", 1)]),
                stock: false,
                ..GEMINI
            },
            Policy::GeminiNoBucket => {
                Setup { driver: Some(&[("booking", 1), ("bucket", 0), ("placement", 1)]), ..GEMINI }
            }
            Policy::GeminiNoPrepare => Setup {
                driver: Some(&[
                    ("stock_floor", 0),
                    ("stock_cap", 0),
                    ("booking", 1),
                    ("bucket", 1),
                    ("placement", 1),
                ]),
                stock: false,
                ..GEMINI
            },
            Policy::GeminiNoRepair => Setup { daemon: "prepare-only", ..GEMINI },
            Policy::GeminiNoPromoter => Setup { promoter: false, ..GEMINI },
        }
    }

    /// The name as it is written on the command line and in records.
    #[must_use]
    pub fn name(self) -> String {
        super::name_of(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_gemini_differs_from_every_other() {
        let kinds: Vec<_> = Policy::value_variants()
            .iter()
            .filter(|policy| policy.name().starts_with("gemini"))
            .map(|policy| policy.setup())
            .collect();
        assert_eq!(kinds.len(), 8);
        for (at, setup) in kinds.iter().enumerate() {
            assert!(!kinds[..at].contains(setup), "{setup:?}");
        }
    }

    #[test]
    fn only_the_kernel_or_the_daemon_makes_the_host_huge() {
        for policy in Policy::value_variants() {
            let setup = policy.setup();
            let by_kernel = setup.shmem == "always";
            assert!(!(by_kernel && setup.daemon != "none"), "{policy:?}");
            assert!(setup.driver.is_some() || !setup.promoter, "{policy:?}");
        }
    }

    #[test]
    fn record_and_command_line_have_the_same_names() {
        for policy in Policy::value_variants() {
            let written = serde_json::to_value(policy).expect("a name");
            assert_eq!(written, policy.name());
        }
    }
}

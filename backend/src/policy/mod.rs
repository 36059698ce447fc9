//! Which blocks the host should make huge, and in which order: functions of what is known of a
//! block, and of the time and the state of the host, which are passed in.
//!
//! A policy decides, it never acts; the engine spends the budget and the backing does the work.

mod agenda;
mod ages;
mod coverage;

pub use agenda::Agenda;
pub use ages::{Ages, AGES};

use crate::backing::{Holes, HostState};
use crate::block_map::Block;
use crate::protocol::GuestState;

/// The policies that one binary offers, so that a comparison differs in nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// Leave the memory as the host's kernel backs it: the baseline.
    None,
    /// Collapse everything that is resident, wherever the guest has huge pages or not.
    Always,
    /// Put host huge pages under guest huge pages (Gemini paper, section 4), and prepare what
    /// the guest asks for.
    Gemini,
    /// The same, and put the host's huge pages under what the guest's kernel has for itself, too:
    /// all of it while the host is not fragmented, else a share ([`Spare`]). The kernel maps all
    /// memory by pages of 1 GiB or 2 MiB, so that the host's alone decide there.
    GeminiKernel,
    /// Half of `Gemini`: prepare what the guest asks for, and collapse nothing unasked.
    PrepareOnly,
    /// After the manner of KubeVirt's THP backing: once after the guest has booted, and each time
    /// that the policy is set, collapse what is resident then, in ascending order, each block once.
    KubevirtLike,
    /// After the manner of Ingens: collapse blocks of which nine tenths are resident, those first
    /// that came to be so first; all that are resident while the host is not fragmented.
    IngensLike,
    /// After the manner of `HawkEye`: collapse everything, those first that have most pages.
    HawkeyeLike,
}

/// Base pages of a block from which on Ingens makes it huge: 90 % of 512.
const INGENS_PAGES: u16 = 460;
/// Fragmentation index of the host, in thousandths, from which on it looks at them.
pub const FRAGMENTED: u32 = 500;
/// In a fragmented host the guest's kernel has huge pages under one block in so many of the
/// guest's: a few for what it uses most, which leaves the others to programs.
const KERNEL_SHARE: usize = 32;
/// Base pages of a block from which on its kernel is given one there: full ones of 2 MiB, such as
/// the kernel's own image and its array of pages. Those that it works with all the time, by the
/// word of its driver, come before and beside the share: they are few, and have most of its
/// accesses.
const FULL: u16 = 512;

/// What the host has for blocks in which no program of the guest has a huge page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Spare {
    /// Huge pages are hard to find, and the share of the guest's kernel is used up.
    None,
    /// They are hard to find, and some of the share is left.
    Share,
    /// They are easily found.
    #[default]
    Plenty,
}

impl Spare {
    /// What there is for a guest of `blocks` blocks, whose kernel has `kernel` huge pages;
    /// `fragmented` tells whether huge pages are hard to find in the host.
    pub fn of(fragmented: bool, kernel: u64, blocks: usize) -> Self {
        match fragmented {
            false => Self::Plenty,
            true if kernel < (blocks / KERNEL_SHARE) as u64 => Self::Share,
            true => Self::None,
        }
    }
}

impl Policy {
    /// Whether the host should collapse the block now.
    ///
    /// Absent blocks are never wanted: nothing that another device gave back is filled again
    /// unasked.
    pub fn wants_collapse(self, block: &Block, spare: Spare) -> bool {
        block.host == HostState::Base
            && match self {
                Self::None | Self::PrepareOnly => false,
                Self::Always | Self::KubevirtLike | Self::HawkeyeLike => true,
                Self::IngensLike => spare == Spare::Plenty || block.resident >= INGENS_PAGES,
                Self::Gemini => block.guest == GuestState::Huge,
                Self::GeminiKernel => match block.guest {
                    GuestState::Huge => true,
                    GuestState::Pinned => match spare {
                        Spare::Plenty => true,
                        Spare::Share => block.is_kernels_data() || block.resident >= FULL,
                        Spare::None => block.is_kernels_data(),
                    },
                    _ => false,
                },
            }
    }

    /// What becomes of the missing pages of a block that is collapsed because it is wanted.
    ///
    /// A guest huge page is wholly resident, so what is missing was given back since the guest
    /// reported it. The baselines fill, as what they follow does.
    pub fn holes(self) -> Holes {
        match self {
            Self::Gemini | Self::GeminiKernel | Self::PrepareOnly => Holes::Leave,
            _ => Holes::Fill,
        }
    }

    /// Whether the guest may ask for blocks to be prepared.
    pub fn prepares(self) -> bool {
        matches!(self, Self::Gemini | Self::GeminiKernel | Self::PrepareOnly)
    }

    /// Whether it goes by how fragmented the host is.
    pub fn minds_fragmentation(self) -> bool {
        matches!(self, Self::GeminiKernel | Self::IngensLike)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum;

    fn block(guest: GuestState, host: HostState) -> Block {
        Block { guest, host, ..Block::default() }
    }

    #[test]
    fn gemini_collapses_only_under_guest_huge_pages() {
        for guest in GuestState::ALL {
            let wanted =
                Policy::Gemini.wants_collapse(&block(guest, HostState::Base), Spare::Plenty);
            assert_eq!(wanted, guest == GuestState::Huge, "{guest:?}");
        }
    }

    #[test]
    fn the_guests_kernel_has_what_the_host_can_spare_and_a_share_of_what_it_cannot() {
        for guest in GuestState::ALL {
            for (resident, used, spare, pinned) in [
                (1, 0, Spare::Plenty, true),
                (511, 0, Spare::Share, false),
                (512, 0, Spare::Share, true),
                (512, 0, Spare::None, false),
                // What its driver says that it works with all the time.
                (1, 512, Spare::Share, true),
                (1, 512, Spare::None, true),
            ] {
                let block = Block { resident, used, ..block(guest, HostState::Base) };
                let wanted = Policy::GeminiKernel.wants_collapse(&block, spare);
                let expected = match guest {
                    GuestState::Huge => true,
                    GuestState::Pinned => pinned,
                    _ => false,
                };
                assert_eq!(wanted, expected, "{block:?} {spare:?}");
            }
        }
    }

    #[test]
    fn the_kernels_share_is_one_block_in_32() {
        for (fragmented, kernel, spare) in [
            (false, 1000, Spare::Plenty),
            (true, 0, Spare::Share),
            (true, 15, Spare::Share),
            (true, 16, Spare::None),
        ] {
            assert_eq!(Spare::of(fragmented, kernel, 512), spare);
        }
    }

    #[test]
    fn who_only_prepares_wants_no_block_by_itself() {
        assert!(Policy::PrepareOnly.prepares());
        for guest in GuestState::ALL {
            let block = block(guest, HostState::Base);
            assert!(!Policy::PrepareOnly.wants_collapse(&block, Spare::Plenty), "{guest:?}");
        }
    }

    #[test]
    fn only_the_baselines_bring_missing_pages_back() {
        for policy in Policy::value_variants() {
            let left = policy.holes() == Holes::Leave;
            assert_eq!(left, policy.prepares(), "{policy:?}");
        }
    }

    #[test]
    fn no_policy_touches_absent_or_huge_blocks() {
        for policy in Policy::value_variants() {
            for guest in GuestState::ALL {
                for host in [HostState::Absent, HostState::Huge, HostState::Hugetlb] {
                    assert!(
                        !policy.wants_collapse(&block(guest, host), Spare::Plenty),
                        "{policy:?} {host:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn ingens_wants_full_blocks_where_the_host_is_fragmented_and_else_all() {
        for (resident, spare, wanted) in [
            (1, Spare::Plenty, true),
            (459, Spare::Share, false),
            (460, Spare::Share, true),
            (512, Spare::None, true),
        ] {
            let block = Block { resident, ..block(GuestState::Base, HostState::Base) };
            assert_eq!(Policy::IngensLike.wants_collapse(&block, spare), wanted);
        }
    }
}

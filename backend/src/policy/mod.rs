//! Which blocks the host should make huge, and in which order: functions of what is known of a
//! block, and of the time and the state of the host, which are passed in.
//!
//! A policy decides, it never acts; the engine spends the budget and the backing does the work.

mod agenda;
mod ages;
mod coverage;
mod heat;

pub use agenda::Agenda;
pub use ages::{Ages, AGES};
pub use heat::{COLD, WARM};

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
    /// Put host huge pages under guest huge pages (Gemini paper, section 4) and under the few
    /// blocks that the guest's kernel works with most, and prepare what the guest asks for. The
    /// kernel maps all memory by pages of 1 GiB or 2 MiB: its blocks are huge in the guest,
    /// whatever they hold.
    Gemini,
    /// The same, and under all that the guest's kernel works with much; and under all that it has
    /// for itself while the host is not fragmented.
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

/// Used pages, by the word of the driver, of a block that the guest's kernel works with all the time.
const ALWAYS: u16 = 512;
/// Base pages of a block from which on Ingens makes it huge: 90 % of 512.
const INGENS_PAGES: u16 = 460;
/// Fragmentation index of the host, in thousandths, from which on it looks at them.
pub const FRAGMENTED: u32 = 500;
impl Policy {
    /// Whether the host should collapse the block now; `fragmented` tells whether huge pages are
    /// hard to find in the host.
    ///
    /// Absent blocks are never wanted: nothing that another device gave back is filled again
    /// unasked.
    pub fn wants_collapse(self, block: &Block, fragmented: bool) -> bool {
        block.host == HostState::Base
            && match self {
                Self::None | Self::PrepareOnly => false,
                Self::Always | Self::KubevirtLike | Self::HawkeyeLike => true,
                Self::IngensLike => !fragmented || block.resident >= INGENS_PAGES,
                Self::Gemini => match block.guest {
                    GuestState::Pinned => block.used >= ALWAYS,
                    _ => block.guest_is_huge(),
                },
                Self::GeminiKernel => {
                    block.guest_is_huge() || (block.guest == GuestState::Pinned && !fragmented)
                }
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
    fn gemini_collapses_where_the_guest_is_huge_or_its_kernel_works() {
        for guest in GuestState::ALL {
            let all = [0, 256, 512].map(|used| [(used, false), (used, true)]);
            for (used, fragmented) in all.concat() {
                let block = Block { used, ..block(guest, HostState::Base) };
                let (gemini, kernel) = match guest {
                    GuestState::Huge => (true, true),
                    GuestState::Pinned => (used == 512, used > 0 || !fragmented),
                    _ => (false, false),
                };
                let wants = |policy: Policy| policy.wants_collapse(&block, fragmented);
                assert_eq!(wants(Policy::Gemini), gemini, "{block:?} {fragmented}");
                assert_eq!(wants(Policy::GeminiKernel), kernel, "{block:?} {fragmented}");
            }
        }
    }

    #[test]
    fn who_only_prepares_wants_no_block_by_itself() {
        assert!(Policy::PrepareOnly.prepares());
        for guest in GuestState::ALL {
            let block = block(guest, HostState::Base);
            assert!(!Policy::PrepareOnly.wants_collapse(&block, false), "{guest:?}");
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
                        !policy.wants_collapse(&block(guest, host), false),
                        "{policy:?} {host:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn ingens_wants_full_blocks_where_the_host_is_fragmented_and_else_all() {
        for (resident, fragmented, wanted) in
            [(1, false, true), (459, true, false), (460, true, true), (512, true, true)]
        {
            let block = Block { resident, ..block(GuestState::Base, HostState::Base) };
            assert_eq!(Policy::IngensLike.wants_collapse(&block, fragmented), wanted);
        }
    }
}

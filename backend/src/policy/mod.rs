//! Which blocks the host should make huge: pure functions of a block's two states.
//!
//! A policy decides, it never acts; the engine spends the budget and the backing does the work.

use crate::backing::HostState;
use crate::block_map::Block;
use crate::protocol::GuestState;

/// The policies that one binary offers, so that a comparison differs in nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// Leave the memory as the host's kernel backs it: the baseline.
    None,
    /// Collapse everything that is resident, wherever the guest has huge pages or not.
    Always,
    /// Put host huge pages under guest huge pages (Gemini paper, section 4), and prepare what
    /// the guest asks for.
    Gemini,
}

impl Policy {
    /// Whether the host should collapse the block now.
    ///
    /// Absent blocks are never wanted: nothing that another device gave back is filled again
    /// unasked.
    pub fn wants_collapse(self, block: &Block) -> bool {
        block.host == HostState::Base
            && match self {
                Self::None => false,
                Self::Always => true,
                Self::Gemini => block.guest == GuestState::Huge,
            }
    }

    /// Whether the guest may ask for blocks to be prepared.
    pub fn prepares(self) -> bool {
        self == Self::Gemini
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(guest: GuestState, host: HostState) -> Block {
        Block { guest, host, ..Block::default() }
    }

    #[test]
    fn gemini_collapses_only_under_guest_huge_pages() {
        for guest in GuestState::ALL {
            let wanted = Policy::Gemini.wants_collapse(&block(guest, HostState::Base));
            assert_eq!(wanted, guest == GuestState::Huge, "{guest:?}");
        }
    }

    #[test]
    fn no_policy_touches_absent_or_huge_blocks() {
        for policy in [Policy::None, Policy::Always, Policy::Gemini] {
            for guest in GuestState::ALL {
                for host in [HostState::Absent, HostState::Huge, HostState::Hugetlb] {
                    assert!(!policy.wants_collapse(&block(guest, host)), "{policy:?} {host:?}");
                }
            }
        }
    }
}

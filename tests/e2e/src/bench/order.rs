//! In which order a guest's memory goes back to its host, told from outside: by
//! the guest's `/proc/kpageflags` and QEMU's page tables alone.

use std::collections::{BTreeMap, BTreeSet};

use gemini_guest::protocol::{BlockRun, BlockState};

use crate::lab::Lab;
use crate::outside::HostState;

/// Base pages of user memory in a block whose other pages go back. The driver
/// counts the kernel's own as well, and trims up to twice as many.
const SPARSE: u32 = 128;

/// One look at every block.
#[derive(Debug)]
pub struct Look {
    blocks: BTreeMap<u64, Block>,
}

#[derive(Clone, Copy, Debug)]
struct Block {
    guest: BlockState,
    /// Base pages of user memory.
    user: u32,
    host: HostState,
}

impl Block {
    fn is_free(self) -> bool {
        matches!(self.guest, BlockState::Free | BlockState::Bare)
    }

    fn is_sparse(self) -> bool {
        self.guest == BlockState::Base && (1..=SPARSE).contains(&self.user)
    }
}

impl Look {
    /// Looks at the guest first: what is free then, and huge in the host
    /// afterwards, was there while others went.
    ///
    /// # Errors
    /// If either cannot be read.
    pub fn take(lab: &Lab) -> anyhow::Result<Self> {
        let guest = lab.vm.guest.blocks()?;
        Ok(Self::join(&guest.runs, &lab.memory.states()?))
    }

    fn join(guest: &[BlockRun], host: &[(u64, HostState)]) -> Self {
        let host: BTreeMap<u64, HostState> = host.iter().copied().collect();
        let each = |run: &BlockRun| {
            let (state, user) = (run.state, run.user);
            (run.first..run.first + run.count).map(move |number| (number, state, user))
        };
        let blocks = guest.iter().flat_map(each).filter_map(|(number, guest, user)| {
            let host = *host.get(&number)?;
            Some((number, Block { guest, user, host }))
        });
        Look { blocks: blocks.collect() }
    }

    fn huge(&self, is: impl Fn(Block) -> bool) -> BTreeSet<u64> {
        let huge = |block: &Block| block.host == HostState::Huge && is(*block);
        self.blocks.iter().filter(|(_, block)| huge(block)).map(|(number, _)| *number).collect()
    }

    /// Free blocks that the host backs with base pages.
    pub fn free_base(&self) -> u64 {
        let free = |block: &&Block| block.is_free() && block.host == HostState::Base;
        self.blocks.values().filter(free).count() as u64
    }
}

/// What is huge in the host at one look.
#[derive(Clone, Debug, Default)]
pub struct Kinds {
    /// Free in the guest.
    pub free: BTreeSet<u64>,
    /// In base pages, and sparsely used when it began.
    pub sparse: BTreeSet<u64>,
    /// Those of them that are so now.
    spare: BTreeSet<u64>,
    /// Held by the driver since it began.
    pub ready: BTreeSet<u64>,
    /// Huge in the guest as well when it began.
    pub aligned: BTreeSet<u64>,
}

/// How many of the look before are not huge any more.
#[derive(Clone, Copy, Debug)]
struct Lost {
    free: u64,
    sparse: u64,
    ready: u64,
    aligned: u64,
}

/// Follows the blocks of each kind from the first look on.
#[derive(Debug)]
pub struct Order {
    first: Kinds,
    later: Vec<(Lost, Kinds)>,
}

/// Blocks that lost their huge page in the host, and those of them that did
/// while such were left that come first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gone {
    /// Free ones.
    pub free: u64,
    /// Sparse ones: they were trimmed.
    pub sparse: u64,
    /// While free ones were left.
    pub sparse_early: u64,
    /// Ready ones.
    pub ready: u64,
    /// While free ones were left.
    pub ready_early: u64,
    /// Most sparse ones that were left when a ready one went.
    pub sparse_left: u64,
    /// Aligned ones.
    pub aligned: u64,
    /// While any other was left.
    pub aligned_early: u64,
    /// Not gone, but free at every single look: nobody can have them, as where
    /// the kernel keeps what cannot be moved. They are not counted as left.
    pub never: u64,
}

impl Order {
    /// Begins with this look. Of blocks in use only `sparse` and `aligned` are
    /// followed: others come and go.
    pub fn begin(look: &Look, sparse: &BTreeSet<u64>, aligned: &BTreeSet<u64>) -> Self {
        let sparse = &look.huge(Block::is_sparse) & sparse;
        let first = Kinds {
            free: look.huge(Block::is_free),
            spare: sparse.clone(),
            sparse,
            ready: look.huge(|block| block.guest == BlockState::Held),
            aligned: &look.huge(|block| block.guest == BlockState::Huge) & aligned,
        };
        Order { first, later: Vec::new() }
    }

    /// The last look.
    pub fn last(&self) -> &Kinds {
        self.later.last().map_or(&self.first, |(_, kinds)| kinds)
    }

    /// Takes the next look.
    pub fn observe(&mut self, look: &Look) {
        let last = self.last();
        let huge = look.huge(|_| true);
        let lost = |of: &BTreeSet<u64>| (of - &huge).len() as u64;
        let lost = Lost {
            free: lost(&last.free),
            sparse: lost(&last.sparse),
            ready: lost(&last.ready),
            aligned: lost(&last.aligned),
        };
        let next = Kinds {
            free: look.huge(Block::is_free),
            sparse: &last.sparse & &huge,
            spare: &last.sparse & &look.huge(Block::is_sparse),
            // What the driver let go of is free, what it let somebody have is used.
            ready: &last.ready & &look.huge(|block| block.guest == BlockState::Held),
            aligned: &last.aligned & &huge,
        };
        self.later.push((lost, next));
    }

    /// What has gone from look to look. What was there at both was left all the
    /// time, as far as can be told.
    pub fn gone(&self) -> Gone {
        let mut never = self.first.free.clone();
        for (_, kinds) in &self.later {
            never.retain(|block| kinds.free.contains(block));
        }
        let mut gone = Gone { never: never.len() as u64, ..Gone::default() };
        let mut before = &self.first;
        for (lost, now) in &self.later {
            let free_left = before.free.intersection(&now.free).any(|block| !never.contains(block));
            let sparse_left = before.spare.intersection(&now.spare).count() as u64;
            let ready_left = !now.ready.is_empty();
            let early = |left: bool, count: u64| if left { count } else { 0 };
            gone.free += lost.free;
            gone.sparse += lost.sparse;
            gone.sparse_early += early(free_left, lost.sparse);
            gone.ready += lost.ready;
            gone.ready_early += early(free_left, lost.ready);
            if lost.ready > 0 {
                gone.sparse_left = gone.sparse_left.max(sparse_left);
            }
            gone.aligned += lost.aligned;
            gone.aligned_early += early(free_left || sparse_left > 0 || ready_left, lost.aligned);
            before = now;
        }
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks 0, 1 are free, 2, 3 sparse, 4, 5 ready, 6, 7 aligned; of these
    /// the `absent` are not huge in the host.
    fn look(absent: &[u64]) -> Look {
        let run = |first, state, user| BlockRun { first, count: 2, state, user };
        let guest = [
            run(0, BlockState::Free, 0),
            run(2, BlockState::Base, 64),
            run(4, BlockState::Held, 0),
            run(6, BlockState::Huge, 512),
        ];
        let state = |block| if absent.contains(&block) { HostState::Base } else { HostState::Huge };
        let host: Vec<_> = (0..8).map(|block| (block, state(block))).collect();
        Look::join(&guest, &host)
    }

    fn order(looks: &[&[u64]]) -> Gone {
        let all = (0..8).collect();
        let mut order = Order::begin(&look(&[]), &all, &all);
        for absent in looks {
            order.observe(&look(absent));
        }
        order.gone()
    }

    #[test]
    fn the_right_order_is_never_early() {
        let gone = order(&[&[0], &[0, 1], &[0, 1, 2, 3], &[0, 1, 2, 3, 4, 5]]);
        let right = Gone { free: 2, sparse: 2, ready: 2, ..Gone::default() };
        assert_eq!(gone, right);
        // All at once, between two looks, is no wrong order either.
        assert_eq!(order(&[&[0, 1, 2, 3, 4, 5]]), right);
    }

    #[test]
    fn each_kind_is_early_while_a_better_one_is_left() {
        let early = |looks: &[&[u64]]| {
            // In the end everything goes, or it would not have been left.
            let mut looks = looks.to_vec();
            looks.push(&[0, 1, 2, 3, 4, 5, 6, 7]);
            let looks = &looks[..];
            let gone = order(looks);
            (gone.sparse_early, gone.ready_early, gone.sparse_left, gone.aligned_early)
        };
        assert_eq!(early(&[&[0, 2]]), (1, 0, 0, 0));
        assert_eq!(early(&[&[0, 1, 2, 4]]), (0, 0, 1, 0));
        assert_eq!(early(&[&[0, 4]]), (0, 1, 2, 0));
        assert_eq!(early(&[&[0, 1, 2, 3, 4, 7]]), (0, 0, 0, 1));
        assert_eq!(early(&[&[0, 1, 2, 3, 4, 5, 6, 7]]), (0, 0, 0, 0));
    }

    #[test]
    fn what_is_free_to_the_end_is_nobodys() {
        let gone = order(&[&[0, 2], &[0, 2, 4]]);
        assert_eq!((gone.never, gone.sparse_early, gone.ready_early), (1, 0, 0));
    }
}

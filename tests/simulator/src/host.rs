//! A host of a few rules: what is under each block, and what may become of it.

use crate::trace::PAGES;
use std::time::Duration;
use vhost_device_gemini::backing::{HostRun, HostState};

/// What things cost: CPU time of the daemon, and the time until they are done.
pub struct Costs;

impl Costs {
    /// A collapse with its copy.
    pub const COPY: Duration = Duration::from_millis(1);
    /// A block populated, split, or refused.
    pub const OTHER: Duration = Duration::from_micros(50);
    /// A look, and each block of it.
    pub const LOOK: (Duration, Duration) = (Duration::from_micros(5), Duration::from_nanos(250));
}

/// Who changes what is under a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The guest touches it.
    Touch,
    /// The daemon collapses it.
    Collapse,
    /// The daemon makes it huge for the guest's driver.
    Populate,
    /// The daemon splits it.
    Demote,
    /// The guest's driver has it dropped.
    Drop,
}

/// Whether a block may go from one state to the other: every way there is.
///
/// ```text
///              touch                collapse, populate
///   Absent ------------->  Base  -------------------------> Huge
///     |  ^                 ^  |  <-------------------------  |  |
///     |  |     drop        |  |           demote             |  |
///     |  +-----------------|--+------------------------------+  |
///     |                    +-- touch of what is there: no change|
///     +----------------------- populate ----------------------->+
/// ```
#[must_use]
pub fn is_legal(from: HostState, cause: Cause, to: HostState) -> bool {
    use HostState::{Absent, Base, Huge};
    matches!(
        (from, cause, to),
        (Absent | Base, Cause::Touch, Base)
            | (Huge, Cause::Touch, Huge)
            | (Base, Cause::Collapse, Huge)
            | (Absent | Base, Cause::Populate, Huge)
            | (Huge, Cause::Demote, Base)
            | (_, Cause::Drop, Absent)
    )
}

/// What the host has.
#[derive(Debug)]
pub struct Host {
    blocks: Vec<(HostState, u16)>,
    /// Huge pages that it still finds.
    pub pages: u64,
    /// Blocks that are huge.
    pub huge: u64,
    /// Changes that may not be, in words; few of them.
    pub illegal: Vec<String>,
}

impl Host {
    /// Nothing is there, and any number of huge pages is to be had.
    #[must_use]
    pub fn new(blocks: usize) -> Self {
        let blocks = vec![(HostState::Absent, 0); blocks];
        Self { blocks, pages: u64::MAX, huge: 0, illegal: Vec::new() }
    }

    /// What is under a block.
    #[must_use]
    pub fn state(&self, index: usize) -> HostState {
        self.blocks[index].0
    }

    /// Changes what is under a block.
    pub fn change(&mut self, index: usize, cause: Cause, to: HostState) {
        let from = self.blocks[index].0;
        if !is_legal(from, cause, to) && self.illegal.len() < 10 {
            self.illegal.push(format!("block {index}: {from:?} to {to:?} by {cause:?}"));
        }
        self.huge = self.huge + u64::from(to.is_huge()) - u64::from(from.is_huge());
        let resident = if to == HostState::Base { PAGES } else { 0 };
        self.blocks[index] = (to, resident);
    }

    /// The guest uses so many pages of a block.
    pub fn touch(&mut self, index: usize, pages: u16) {
        match self.blocks[index] {
            (HostState::Absent, _) => {
                self.change(index, Cause::Touch, HostState::Base);
                self.blocks[index].1 = pages;
            }
            (HostState::Base, resident) => self.blocks[index].1 = resident.max(pages),
            _ => {}
        }
    }

    /// Takes a huge page for a block; whether there was one.
    pub fn take(&mut self, index: usize, cause: Cause) -> bool {
        let taken = self.pages > 0;
        if taken {
            self.pages -= u64::from(self.pages != u64::MAX);
            self.change(index, cause, HostState::Huge);
        }
        taken
    }

    /// What a look at blocks sees.
    #[must_use]
    pub fn look(&self, first: u64, count: u32) -> Vec<HostRun> {
        let mut runs: Vec<HostRun> = Vec::new();
        for block in first..first + u64::from(count) {
            let (state, resident) = self.blocks[index_of(block)];
            let resident = u32::from(resident);
            match runs.last_mut() {
                Some(last) if (last.state, last.resident) == (state, resident) => last.count += 1,
                _ => runs.push(HostRun { first: block, count: 1, state, resident }),
            }
        }
        runs
    }
}

/// Blocks are numbered from 0 on here, so that each is its own index.
pub(crate) fn index_of(block: u64) -> usize {
    usize::try_from(block).unwrap_or(usize::MAX)
}

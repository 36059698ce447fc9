//! Three sides, laid side by side: the guest's kernel, QEMU's page tables, and
//! the daemon.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::bail;
use gemini_guest::protocol::{BlockState, BlockStates};
use gemini_harness::report::{ratio, BlockMap, MapRun};

use crate::daemon::Control;
use crate::guest::Guest;
use crate::outside::{GuestMemory, HostState};
use crate::BLOCK_SHIFT;

/// Blocks that may change between two looks at them in a guest that does
/// nothing of note; more, and the comparison would say too little.
const MOST_MOVING: usize = 8;

/// Disagreements told one by one in an error.
const MOST_TOLD: usize = 20;

const PAGE: u64 = 4096;

/// What guest and host say of each block, without the daemon.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    blocks: BTreeMap<u64, Block>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Block {
    /// None where the guest's kernel has no memory.
    guest: Option<BlockState>,
    /// Base pages of user memory.
    user: u32,
    host: HostState,
}

/// The figures of a view.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counts {
    /// Blocks that are huge at both layers.
    pub aligned: u64,
    /// Blocks that only the guest has huge.
    pub guest_only: u64,
    /// Blocks in use, or held, that only the host has huge.
    pub host_only: u64,
    /// Bytes of resident user memory in aligned blocks.
    pub aligned_user_bytes: u64,
    /// Bytes of resident user memory.
    pub user_bytes: u64,
}

impl Counts {
    /// `aligned / (aligned + guest_only + host_only)`.
    #[must_use]
    pub fn aligned_rate(&self) -> f64 {
        ratio(self.aligned, self.aligned + self.guest_only + self.host_only)
    }

    /// Share of the resident user memory that lies in aligned blocks.
    #[must_use]
    pub fn aligned_coverage(&self) -> f64 {
        ratio(self.aligned_user_bytes, self.user_bytes)
    }
}

impl View {
    /// Asks the guest and looks at QEMU.
    ///
    /// # Errors
    /// If either cannot be read.
    pub fn take(guest: &Guest, memory: &GuestMemory) -> anyhow::Result<Self> {
        Ok(Self::join(&guest.blocks()?, &memory.states()?))
    }

    fn join(guest: &BlockStates, host: &[(u64, HostState)]) -> Self {
        let without = |host| Block { guest: None, user: 0, host };
        let mut blocks: BTreeMap<u64, Block> =
            host.iter().map(|&(number, host)| (number, without(host))).collect();
        for run in &guest.runs {
            for (_, block) in blocks.range_mut(run.first..run.first + run.count) {
                block.guest = Some(run.state);
                block.user = run.user;
            }
        }
        View { blocks }
    }

    /// The blocks that are huge in the host, and what they are in the guest.
    pub fn host_huge(&self) -> impl Iterator<Item = (u64, BlockState)> + '_ {
        let huge = self.blocks.iter().filter(|(_, block)| block.host == HostState::Huge);
        huge.filter_map(|(number, block)| Some((*number, block.guest?)))
    }

    /// The blocks that are free in the guest, by the host's state.
    #[must_use]
    pub fn free(&self, host: HostState) -> BTreeSet<u64> {
        let free = |block: &Block| {
            matches!(block.guest, Some(BlockState::Free | BlockState::Bare)) && block.host == host
        };
        self.blocks.iter().filter(|(_, block)| free(block)).map(|(number, _)| *number).collect()
    }

    /// The blocks that are so in the guest and so in the host.
    #[must_use]
    pub fn in_state(&self, guest: BlockState, host: HostState) -> BTreeSet<u64> {
        let is = |block: &Block| block.guest == Some(guest) && block.host == host;
        self.blocks.iter().filter(|(_, block)| is(block)).map(|(number, _)| *number).collect()
    }

    /// A letter a block, ascending: `A` huge at both layers, `g` in the guest
    /// alone, `h` in the host alone and in use or held, `f` free and huge in the
    /// host, `b` in use as base pages at both, `.` anything else.
    #[must_use]
    pub fn letters(&self) -> String {
        let letter = |block: &Block| match (block.guest, block.host) {
            (Some(BlockState::Huge), HostState::Huge) => 'A',
            (Some(BlockState::Huge), _) => 'g',
            (Some(BlockState::Base | BlockState::Held), HostState::Huge) => 'h',
            (Some(BlockState::Free | BlockState::Bare), HostState::Huge) => 'f',
            (Some(BlockState::Base), _) => 'b',
            _ => '.',
        };
        self.blocks.values().map(letter).collect()
    }

    /// The figures.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for block in self.blocks.values() {
            let user_bytes = u64::from(block.user) * PAGE;
            counts.user_bytes += user_bytes;
            match (block.guest, block.host) {
                (Some(BlockState::Huge), HostState::Huge) => {
                    counts.aligned += 1;
                    counts.aligned_user_bytes += user_bytes;
                }
                (Some(BlockState::Huge), _) => counts.guest_only += 1,
                (Some(BlockState::Base | BlockState::Held), HostState::Huge) => {
                    counts.host_only += 1
                }
                _ => {}
            }
        }
        counts
    }

    /// The view in the form that the picture is drawn from.
    #[must_use]
    pub fn to_map(&self) -> BlockMap {
        let mut runs: Vec<MapRun> = Vec::new();
        for (&number, block) in &self.blocks {
            let guest = match block.guest {
                None => "pinned",
                Some(BlockState::Free | BlockState::Bare) => "free",
                Some(BlockState::Base) => "base",
                Some(BlockState::Huge) => "huge",
                Some(BlockState::Held) => "booked",
            };
            let host = match block.host {
                HostState::Absent => "absent",
                HostState::Base => "base",
                HostState::Huge => "huge",
            };
            match runs.last_mut() {
                Some(last)
                    if last.first + last.count == number
                        && last.guest == guest
                        && last.host == host =>
                {
                    last.count += 1;
                }
                _ => runs.push(MapRun {
                    first: number,
                    count: 1,
                    guest: guest.to_owned(),
                    host: host.to_owned(),
                }),
            }
        }
        BlockMap { generation: 0, block_shift: BLOCK_SHIFT, runs }
    }
}

/// How well the three sides agree.
#[derive(Clone, Debug, Default)]
pub struct Agreement {
    /// Blocks that were compared.
    pub compared: usize,
    /// Blocks that changed while they were looked at.
    pub moving: usize,
    /// What each disagreement is about.
    pub disagreements: Vec<String>,
}

/// Takes all three views until they agree on every block.
///
/// The daemon is asked before and after the others: a block whose state it
/// reports differently the second time was moving, and is not judged. The driver
/// reports what it sees in a walk around memory, so the daemon may lag; it is
/// given `timeout` to catch up.
///
/// # Errors
/// If they still disagree in the end, or too many blocks never stand still.
pub fn three_sides(
    guest: &Guest,
    memory: &GuestMemory,
    control: &Control,
    timeout: Duration,
) -> anyhow::Result<(View, Agreement)> {
    let deadline = Instant::now() + timeout;
    loop {
        let before = control.map()?;
        let view = View::take(guest, memory)?;
        let after = control.map()?;
        let agreement = agreement(&view, &before, &after);
        if agreement.disagreements.is_empty() && agreement.moving <= MOST_MOVING {
            return Ok((view, agreement));
        }
        if Instant::now() > deadline {
            let mut text = String::new();
            for line in agreement.disagreements.iter().take(MOST_TOLD) {
                let _ = writeln!(text, "  {line}");
            }
            bail!(
                "of {} blocks {} are seen differently, {} do not stand still\n{text}",
                agreement.compared,
                agreement.disagreements.len(),
                agreement.moving
            );
        }
        std::thread::sleep(Duration::from_millis(250));
    }
}

fn agreement(view: &View, before: &BlockMap, after: &BlockMap) -> Agreement {
    let before = expand(before);
    let after = expand(after);
    let mut result = Agreement::default();
    // A block that only some sides know would be left out silently otherwise.
    let numbers: BTreeSet<u64> = before.keys().chain(after.keys()).copied().collect();
    for number in numbers {
        let (Some(old), Some(new)) = (before.get(&number), after.get(&number)) else {
            result.moving += 1;
            continue;
        };
        if old != new {
            result.moving += 1;
            continue;
        }
        let Some(block) = view.blocks.get(&number) else {
            result.disagreements.push(format!("block {number}: QEMU has no memory there"));
            continue;
        };
        result.compared += 1;
        let guest_agrees = match block.guest {
            // The end of memory may belong to the firmware, or not be plugged:
            // the driver must not claim anything there.
            None => matches!(new.0, "pinned" | "unknown"),
            Some(BlockState::Huge) => new.0 == "huge",
            // Pages that lie in a list of one CPU are free to the driver, and
            // not to /proc/kpageflags; what is booked, only the driver knows.
            Some(BlockState::Bare | BlockState::Base | BlockState::Held) => new.0 != "huge",
            Some(BlockState::Free) => new.0 == "free" || new.0 == "booked",
        };
        let host_agrees = match block.host {
            HostState::Huge => new.1 == "huge" || new.1 == "hugetlb",
            HostState::Base => new.1 == "base",
            HostState::Absent => new.1 == "absent",
        };
        if !guest_agrees || !host_agrees {
            result.disagreements.push(format!(
                "block {number}: the guest's kernel says {:?} with {} user pages, \
                 QEMU's page table {:?}, the daemon guest={} host={}",
                block.guest, block.user, block.host, new.0, new.1
            ));
        }
    }
    result
}

fn expand(map: &BlockMap) -> BTreeMap<u64, (&str, &str)> {
    let mut blocks = BTreeMap::new();
    for run in &map.runs {
        for number in run.first..run.first + run.count {
            blocks.insert(number, (run.guest.as_str(), run.host.as_str()));
        }
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;
    use gemini_guest::protocol::BlockRun;

    fn view() -> View {
        let run = |first, count, state, user| BlockRun { first, count, state, user };
        let guest = BlockStates {
            runs: vec![
                run(1, 2, BlockState::Huge, 512),
                run(3, 1, BlockState::Base, 256),
                run(4, 2, BlockState::Free, 0),
            ],
        };
        let host = [
            (1, HostState::Huge),
            (2, HostState::Base),
            (3, HostState::Huge),
            (4, HostState::Huge),
            (5, HostState::Absent),
        ];
        View::join(&guest, &host)
    }

    fn map(runs: &[(u64, u64, &str, &str)]) -> BlockMap {
        BlockMap {
            generation: 1,
            block_shift: BLOCK_SHIFT,
            runs: runs
                .iter()
                .map(|&(first, count, guest, host)| MapRun {
                    first,
                    count,
                    guest: guest.into(),
                    host: host.into(),
                })
                .collect(),
        }
    }

    #[test]
    fn counts_weigh_blocks_and_bytes() {
        let counts = view().counts();
        assert_eq!((counts.aligned, counts.guest_only, counts.host_only), (1, 1, 1));
        assert_eq!(counts.user_bytes, (512 + 512 + 256) * PAGE);
        assert!((counts.aligned_coverage() - 0.4).abs() < 1e-9);
    }

    #[test]
    fn letters_and_states_name_every_block() {
        assert_eq!(view().letters(), "Aghf.");
        let huge = view().in_state(BlockState::Huge, HostState::Huge);
        assert_eq!(huge, BTreeSet::from([1]));
    }

    #[test]
    fn agreeing_sides_agree_on_every_block() {
        let daemon = map(&[
            (1, 1, "huge", "huge"),
            (2, 1, "huge", "base"),
            (3, 1, "base", "huge"),
            (4, 1, "free", "huge"),
            (5, 1, "free", "absent"),
        ]);
        let result = agreement(&view(), &daemon, &daemon);
        assert_eq!(result.compared, 5);
        assert!(result.disagreements.is_empty());
    }

    #[test]
    fn each_wrong_layer_is_a_disagreement_and_moving_blocks_are_not_judged() {
        let before = map(&[
            (1, 1, "base", "huge"),
            (2, 1, "huge", "huge"),
            (3, 1, "base", "huge"),
            (4, 1, "base", "huge"),
            (5, 1, "free", "absent"),
        ]);
        let mut after = before.clone();
        after.runs[3].guest = "huge".into();
        let result = agreement(&view(), &before, &after);
        assert_eq!(result.disagreements.len(), 2);
        assert_eq!((result.compared, result.moving), (4, 1));
    }

    #[test]
    fn map_of_a_view_counts_as_the_view_does() {
        assert_eq!(view().to_map().counts(), (1, 1, 1));
    }
}

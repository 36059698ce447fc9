//! The model guest: an allocator of guest huge pages and base pages that works
//! on the real memory, and knows what every byte of it must be.
//!
//! Every page that is handed out is written, with contents that follow from its
//! number and a stamp; so all of memory can be checked at any time, also what
//! was freed, as long as nobody was asked to drop it.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use anyhow::{ensure, Context};

use crate::memory::{GuestMemory, BLOCK_SHIFT, BLOCK_SIZE};
use crate::rng::Rng;
use crate::sys::PAGE_SIZE;
use crate::wire::{guest_state, Record};

/// Base pages in a block.
pub const PAGES_PER_BLOCK: u64 = BLOCK_SIZE / PAGE_SIZE;
// The same as lengths of slices.
const PAGE: usize = 4096;
const PAGES: usize = 512;
const _: () = assert!(PAGE as u64 == PAGE_SIZE && PAGES as u64 == PAGES_PER_BLOCK);

/// Who uses a block.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Use {
    /// Reserved for the driver's rings, or not the model's.
    Pinned,
    /// Nobody.
    Free,
    /// Single base pages: one bit for each that is in use.
    Base(Box<[u64; PAGES / 64]>),
    /// One guest huge page.
    Huge,
    /// The driver.
    Booked,
}

/// What a page must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    /// Zeros: never written, or dropped.
    Zero,
    /// Anything: a drop was asked for and not answered with success.
    Undefined,
    /// What was written with this stamp.
    Stamp(u32),
}

/// A page that does not hold what it must.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damage {
    /// Number of the page: guest physical address / page size.
    pub page: u64,
    /// Whether it must read as zeros; else it must hold what was written.
    pub must_be_zero: bool,
    /// The first 8 bytes found.
    pub found: u64,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "page {:#x} (block {}, page {} of it) begins with {:#018x} and must {}",
            self.page,
            self.page / PAGES_PER_BLOCK,
            self.page % PAGES_PER_BLOCK,
            self.found,
            if self.must_be_zero { "be zero" } else { "hold what was written" }
        )
    }
}

/// What a block held before a drop of it was asked for.
#[derive(Clone, Debug)]
pub struct Stake {
    /// The block.
    pub block: u64,
    contents: Vec<Content>,
}

/// The model guest.
#[derive(Debug)]
pub struct Guest {
    memory: Arc<GuestMemory>,
    blocks: Vec<Use>,
    contents: Vec<Content>,
    /// Blocks whose state changed since the last report.
    changed: BTreeSet<u64>,
    template: Vec<u8>,
    next_stamp: u32,
}

impl Guest {
    /// Its memory.
    #[must_use]
    pub fn memory(&self) -> Arc<GuestMemory> {
        Arc::clone(&self.memory)
    }

    /// A guest on `memory`, which has one region from address 0 on, whose first
    /// `pinned` blocks are not its own. Nothing is in use.
    ///
    /// # Errors
    /// If the memory is not as said.
    pub fn new(memory: Arc<GuestMemory>, pinned: u64) -> anyhow::Result<Self> {
        let simple = matches!(memory.regions(), [region] if region.gpa == 0);
        ensure!(simple, "the model guest needs one region from address 0 on");
        let blocks = usize::try_from(memory.blocks())?;
        let pinned = usize::try_from(pinned)?;
        ensure!(pinned < blocks, "{blocks} blocks, of which {pinned} pinned");
        let mut template = vec![0; 64 * PAGE];
        Rng::new(0x6765_6d69_6e69).fill(&mut template);
        let mut uses = vec![Use::Free; blocks];
        uses[..pinned].fill(Use::Pinned);
        Ok(Guest {
            memory,
            blocks: uses,
            contents: vec![Content::Zero; blocks * PAGES],
            changed: BTreeSet::new(),
            template,
            next_stamp: 1,
        })
    }

    /// Number of blocks, pinned ones included.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.blocks.len() as u64
    }

    /// State of a block as it is reported, and its used base pages.
    ///
    /// # Panics
    /// If there is no such block.
    #[must_use]
    pub fn state(&self, block: u64) -> (u8, u32) {
        match &self.blocks[index(block)] {
            Use::Pinned => (guest_state::PINNED, 0),
            Use::Free => (guest_state::FREE, 0),
            Use::Huge => (guest_state::HUGE, 0),
            Use::Booked => (guest_state::BOOKED, 0),
            Use::Base(used) => (guest_state::BASE, used.iter().map(|word| word.count_ones()).sum()),
        }
    }

    /// The blocks in `state`, ascending.
    pub fn in_state(&self, state: u8) -> Vec<u64> {
        (0..self.blocks()).filter(|&block| self.state(block).0 == state).collect()
    }

    /// The state of all blocks; what is alike is merged.
    #[must_use]
    pub fn census(&self) -> Vec<Record> {
        self.records(0..self.blocks())
    }

    /// The state of the blocks that changed since this was last asked.
    pub fn changes(&mut self) -> Vec<Record> {
        let changed = std::mem::take(&mut self.changed);
        self.records(changed)
    }

    fn records(&self, blocks: impl IntoIterator<Item = u64>) -> Vec<Record> {
        let mut records: Vec<Record> = Vec::new();
        for block in blocks {
            let (state, used) = self.state(block);
            match records.last_mut() {
                Some(last)
                    if last.first + u64::from(last.count) == block
                        && (last.state, last.used) == (state, used) =>
                {
                    last.count += 1;
                }
                _ => records.push(Record { first: block, count: 1, used, state, flags: 0 }),
            }
        }
        records
    }

    fn set(&mut self, block: u64, what: Use) {
        self.blocks[index(block)] = what;
        self.changed.insert(block);
    }

    /// The first free block at or after `from`.
    #[must_use]
    pub fn free_block(&self, from: u64) -> Option<u64> {
        (from..self.blocks()).find(|&block| self.blocks[index(block)] == Use::Free)
    }

    /// Takes `block` as a guest huge page and writes all of it.
    ///
    /// # Errors
    /// If it is not free.
    pub fn alloc_huge(&mut self, block: u64) -> anyhow::Result<()> {
        self.expect(block, guest_state::FREE)?;
        self.set(block, Use::Huge);
        self.write_block(block);
        Ok(())
    }

    /// Takes the page `page` of `block` as a base page and writes it.
    ///
    /// # Errors
    /// If it is in use already, or the block is not free or in base pages.
    pub fn alloc_base(&mut self, block: u64, page: u64) -> anyhow::Result<()> {
        let slot = index(page);
        ensure!(slot < PAGES, "page {page} of a block");
        if self.blocks[index(block)] == Use::Free {
            self.set(block, Use::Base(Box::new([0; PAGES / 64])));
        }
        let Use::Base(used) = &mut self.blocks[index(block)] else {
            anyhow::bail!("block {block} is not in base pages");
        };
        let bit = 1 << (slot % 64);
        ensure!(used[slot / 64] & bit == 0, "page {page} of block {block} is in use");
        used[slot / 64] |= bit;
        self.changed.insert(block);
        let stamp = self.stamp();
        self.write_page(block * PAGES_PER_BLOCK + page, stamp);
        Ok(())
    }

    /// Gives a base page back. Its contents stay, as a kernel leaves them.
    ///
    /// # Errors
    /// If it is not in use.
    pub fn free_base(&mut self, block: u64, page: u64) -> anyhow::Result<()> {
        let slot = index(page);
        let Some(Use::Base(used)) = self.blocks.get_mut(index(block)) else {
            anyhow::bail!("block {block} is not in base pages");
        };
        let bit = 1 << (slot % 64);
        ensure!(
            slot < PAGES && used[slot / 64] & bit != 0,
            "page {page} of block {block} is not in use"
        );
        used[slot / 64] &= !bit;
        if used.iter().all(|&word| word == 0) {
            self.set(block, Use::Free);
        }
        self.changed.insert(block);
        Ok(())
    }

    /// Gives a guest huge page back. Its contents stay.
    ///
    /// # Errors
    /// If it is none.
    pub fn free_huge(&mut self, block: u64) -> anyhow::Result<()> {
        self.expect(block, guest_state::HUGE)?;
        self.set(block, Use::Free);
        Ok(())
    }

    /// Splits a guest huge page into base pages, contents kept.
    ///
    /// # Errors
    /// If it is none.
    pub fn split(&mut self, block: u64) -> anyhow::Result<()> {
        self.expect(block, guest_state::HUGE)?;
        self.set(block, Use::Base(Box::new([u64::MAX; PAGES / 64])));
        Ok(())
    }

    /// Moves the base pages of `from` into one huge page at `to`, as the guest's
    /// own collapse does; pages that were not in use are zeros there.
    ///
    /// # Errors
    /// If `from` is not in base pages or `to` is not free.
    pub fn collapse(&mut self, from: u64, to: u64) -> anyhow::Result<()> {
        self.expect(to, guest_state::FREE)?;
        let Use::Base(used) = self.blocks[index(from)].clone() else {
            anyhow::bail!("block {from} is not in base pages");
        };
        let mut page = [0; PAGE];
        for slot in 0..PAGES {
            let (source, target) =
                (from * PAGES_PER_BLOCK + slot as u64, to * PAGES_PER_BLOCK + slot as u64);
            let in_use = used[slot / 64] & (1 << (slot % 64)) != 0;
            if in_use {
                self.memory.read(source * PAGE_SIZE, &mut page);
                let intact = self.matches(source, &page);
                ensure!(intact, "page {source:#x} was damaged before it was moved");
                let stamp = self.stamp();
                self.write_page(target, stamp);
            } else {
                self.memory.write(target * PAGE_SIZE, &[0; PAGE]);
                self.contents[index(target)] = Content::Zero;
            }
        }
        self.set(to, Use::Huge);
        self.set(from, Use::Free);
        Ok(())
    }

    /// Has the driver hold a free block.
    ///
    /// # Errors
    /// If it is not free.
    pub fn book(&mut self, block: u64) -> anyhow::Result<()> {
        self.expect(block, guest_state::FREE)?;
        self.set(block, Use::Booked);
        Ok(())
    }

    /// Ends the driver's hold.
    ///
    /// # Errors
    /// If it is not held.
    pub fn unbook(&mut self, block: u64) -> anyhow::Result<()> {
        self.expect(block, guest_state::BOOKED)?;
        self.set(block, Use::Free);
        Ok(())
    }

    /// Notes that a drop of `block` was asked for: until it is answered, and for
    /// good if it fails, its contents are undefined.
    pub fn contents_undefined(&mut self, block: u64) {
        self.set_contents(block, Content::Undefined);
    }

    /// Notes that a drop of `block` was answered with success.
    pub fn contents_dropped(&mut self, block: u64) {
        self.set_contents(block, Content::Zero);
    }

    /// Whether nobody uses the base page with this number, of a block in base
    /// pages of which others are in use.
    #[must_use]
    pub fn is_free_base(&self, page: u64) -> bool {
        let slot = index(page % PAGES_PER_BLOCK);
        match &self.blocks[index(page / PAGES_PER_BLOCK)] {
            Use::Base(used) => used[slot / 64] & (1 << (slot % 64)) == 0,
            _ => false,
        }
    }

    /// Notes that a drop of base pages, by their numbers, was asked for.
    pub fn pages_undefined(&mut self, pages: Range<u64>) {
        self.contents[index(pages.start)..index(pages.end)].fill(Content::Undefined);
    }

    /// Notes that base pages of a block, by their numbers, were dropped.
    pub fn pages_dropped(&mut self, pages: Range<u64>) {
        self.contents[index(pages.start)..index(pages.end)].fill(Content::Zero);
    }

    /// Notes that a drop of `block` was asked for, and returns what the block
    /// held before, in case the answer is that nothing was dropped.
    pub fn put_at_stake(&mut self, block: u64) -> Stake {
        let start = index(block) * PAGES;
        let contents = self.contents[start..start + PAGES].to_vec();
        self.contents_undefined(block);
        Stake { block, contents }
    }

    /// Notes that nothing was dropped after all: the block must hold what it
    /// held before.
    pub fn put_back(&mut self, stake: &Stake) {
        let start = index(stake.block) * PAGES;
        self.contents[start..start + PAGES].copy_from_slice(&stake.contents);
    }

    fn set_contents(&mut self, block: u64, content: Content) {
        let start = index(block) * PAGES;
        self.contents[start..start + PAGES].fill(content);
    }

    /// Writes all of a block, whoever uses it, with contents to be checked.
    pub fn write_block(&mut self, block: u64) {
        let stamp = self.stamp();
        for page in block * PAGES_PER_BLOCK..(block + 1) * PAGES_PER_BLOCK {
            self.write_page(page, stamp);
        }
    }

    fn expect(&self, block: u64, state: u8) -> anyhow::Result<()> {
        let found = self.state(block).0;
        ensure!(
            found == state,
            "block {block} is {}, not {}",
            guest_state::NAMES[usize::from(found)],
            guest_state::NAMES[usize::from(state)]
        );
        Ok(())
    }

    fn stamp(&mut self) -> u32 {
        let stamp = self.next_stamp;
        self.next_stamp = self.next_stamp.wrapping_add(1);
        stamp
    }

    /// What a page with `stamp` holds: part of a random text, headed by page
    /// number and stamp so that a page that strays is recognised.
    fn pattern(&self, page: u64, stamp: u32) -> ([u8; 16], &[u8]) {
        let mut head = [0; 16];
        head[..8].copy_from_slice(&page.to_le_bytes());
        head[8..12].copy_from_slice(&stamp.to_le_bytes());
        head[12..].copy_from_slice(b"page");
        let start = (index(page).wrapping_mul(13) + stamp as usize) % 63 * PAGE + 16;
        (head, &self.template[start..start + PAGE - 16])
    }

    fn write_page(&mut self, page: u64, stamp: u32) {
        let (head, body) = self.pattern(page, stamp);
        self.memory.write(page * PAGE_SIZE, &head);
        self.memory.write(page * PAGE_SIZE + 16, body);
        self.contents[index(page)] = Content::Stamp(stamp);
    }

    fn matches(&self, page: u64, bytes: &[u8]) -> bool {
        match self.contents[index(page)] {
            Content::Undefined => true,
            Content::Zero => bytes.iter().all(|&byte| byte == 0),
            Content::Stamp(stamp) => {
                let (head, body) = self.pattern(page, stamp);
                bytes[..16] == head && bytes[16..] == *body
            }
        }
    }

    /// Checks every page of every block that is the guest's, in use or not, and
    /// returns those that do not hold what they must.
    ///
    /// # Errors
    /// If memory cannot be read.
    pub fn verify(&self) -> anyhow::Result<Vec<Damage>> {
        let mut damages = Vec::new();
        for (block, what) in (0..).zip(&self.blocks) {
            if *what != Use::Pinned {
                self.verify_block(block, &mut damages)?;
            }
        }
        Ok(damages)
    }

    /// As [`Guest::verify`], of `blocks` only.
    ///
    /// # Errors
    /// If memory cannot be read.
    pub fn verify_blocks(&self, blocks: &[u64]) -> anyhow::Result<Vec<Damage>> {
        let mut damages = Vec::new();
        for &block in blocks {
            self.verify_block(block, &mut damages)?;
        }
        Ok(damages)
    }

    fn verify_block(&self, block: u64, damages: &mut Vec<Damage>) -> anyhow::Result<()> {
        let mut bytes = vec![0; PAGES * PAGE];
        self.memory
            .peek(block << BLOCK_SHIFT, &mut bytes)
            .with_context(|| format!("cannot read block {block}"))?;
        for (page, bytes) in (block * PAGES_PER_BLOCK..).zip(bytes.chunks(PAGE)) {
            if !self.matches(page, bytes) {
                let mut found = [0; 8];
                found.copy_from_slice(&bytes[..8]);
                damages.push(Damage {
                    page,
                    must_be_zero: self.contents[index(page)] == Content::Zero,
                    found: u64::from_le_bytes(found),
                });
            }
        }
        Ok(())
    }

    /// Fails with the first damages, if there are any.
    ///
    /// # Errors
    /// If a page does not hold what it must.
    pub fn ensure_intact(&self) -> anyhow::Result<()> {
        let damages = self.verify()?;
        let shown: Vec<_> = damages.iter().take(5).map(ToString::to_string).collect();
        ensure!(
            damages.is_empty(),
            "{} pages of memory were damaged: {}",
            damages.len(),
            shown.join("; ")
        );
        Ok(())
    }

    /// Reads `count` random words of memory in use, as a workload does, and
    /// returns something that depends on them.
    pub fn read_at_random(&self, rng: &mut Rng, count: u64) -> u64 {
        let mut pages = Vec::new();
        for (block, what) in (0..).zip(&self.blocks) {
            let first = block * PAGES_PER_BLOCK;
            match what {
                Use::Huge => pages.extend(first..first + PAGES_PER_BLOCK),
                Use::Base(used) => pages.extend((0..PAGES_PER_BLOCK).filter_map(|page| {
                    let slot = index(page);
                    (used[slot / 64] & (1 << (slot % 64)) != 0).then_some(first + page)
                })),
                _ => {}
            }
        }
        if pages.is_empty() {
            return 0;
        }
        let mut sum = 0u64;
        let mut word = [0; 8];
        for _ in 0..count {
            let page = pages[rng.index(pages.len())];
            let offset = rng.below(PAGE_SIZE / 8) * 8;
            self.memory.read(page * PAGE_SIZE + offset, &mut word);
            sum = sum.wrapping_add(u64::from_le_bytes(word));
        }
        sum
    }

    /// Bytes in use by "user space": huge pages and base pages of each block.
    #[must_use]
    pub fn user_bytes(&self, block: u64) -> u64 {
        match self.state(block) {
            (guest_state::HUGE, _) => BLOCK_SIZE,
            (guest_state::BASE, used) => u64::from(used) * PAGE_SIZE,
            _ => 0,
        }
    }
}

fn index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Placement;

    fn guest(blocks: u64) -> Guest {
        let memory = GuestMemory::new(blocks * BLOCK_SIZE, Placement::Aligned).expect("memory");
        Guest::new(Arc::new(memory), 1).expect("guest")
    }

    #[test]
    fn census_merges_what_is_alike_and_counts_base_pages() {
        let mut guest = guest(8);
        guest.alloc_huge(1).expect("free");
        guest.alloc_huge(2).expect("free");
        guest.alloc_base(4, 7).expect("free");
        guest.alloc_base(4, 9).expect("free");
        let census = guest.census();
        let found: Vec<_> = census
            .iter()
            .map(|record| (record.first, record.count, record.state, record.used))
            .collect();
        assert_eq!(
            found,
            [
                (0, 1, guest_state::PINNED, 0),
                (1, 2, guest_state::HUGE, 0),
                (3, 1, guest_state::FREE, 0),
                (4, 1, guest_state::BASE, 2),
                (5, 3, guest_state::FREE, 0),
            ]
        );
    }

    #[test]
    fn changes_are_told_once() {
        let mut guest = guest(4);
        guest.alloc_huge(2).expect("free");
        assert_eq!(guest.changes().len(), 1);
        assert!(guest.changes().is_empty());
        guest.split(2).expect("huge");
        let changes = guest.changes();
        assert_eq!((changes[0].state, changes[0].used), (guest_state::BASE, 512));
    }

    #[test]
    fn a_lost_byte_is_found_also_in_freed_memory() {
        let mut guest = guest(4);
        guest.alloc_huge(1).expect("free");
        guest.free_huge(1).expect("huge");
        guest.ensure_intact().expect("untouched");
        let address = BLOCK_SIZE + 5 * PAGE_SIZE + 100;
        let mut byte = [0];
        guest.memory.read(address, &mut byte);
        guest.memory.write(address, &[!byte[0]]);
        let damages = guest.verify().expect("readable");
        assert_eq!(damages.len(), 1);
        assert_eq!(damages[0].page, PAGES_PER_BLOCK + 5);
    }

    #[test]
    fn a_dropped_block_must_read_as_zeros() {
        let mut guest = guest(4);
        guest.alloc_huge(1).expect("free");
        guest.contents_dropped(1);
        assert_eq!(guest.verify().expect("readable").len(), PAGES);
        guest.memory.discard(BLOCK_SIZE, BLOCK_SIZE).expect("punch");
        guest.ensure_intact().expect("zeros");
    }

    #[test]
    fn collapse_moves_the_contents() {
        let mut guest = guest(4);
        for page in [0, 63, 64, 511] {
            guest.alloc_base(1, page).expect("free");
        }
        guest.collapse(1, 3).expect("room");
        assert_eq!(guest.state(1).0, guest_state::FREE);
        assert_eq!(guest.state(3).0, guest_state::HUGE);
        guest.ensure_intact().expect("intact");
    }
}

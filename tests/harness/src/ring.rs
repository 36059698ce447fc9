//! The driver's side of a split virtqueue that lies in guest memory.
//!
//! It also checks the device: every used buffer must be one that was offered,
//! in the order of the ring.

use std::collections::VecDeque;
use std::sync::Arc;

use anyhow::{bail, ensure};

use crate::memory::GuestMemory;

/// Bytes of a descriptor.
pub const DESC_LEN: u64 = 16;
/// Descriptor flag: another one follows.
pub const DESC_NEXT: u16 = 1;
/// Descriptor flag: the device writes.
pub const DESC_WRITE: u16 = 2;
/// Descriptor flag: a table of descriptors.
pub const DESC_INDIRECT: u16 = 4;

/// A descriptor as it stands in the table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest physical address of the buffer.
    pub addr: u64,
    /// Its length in bytes.
    pub len: u32,
    /// `DESC_` flags.
    pub flags: u16,
    /// The next descriptor of the chain.
    pub next: u16,
}

impl Descriptor {
    /// As it stands in memory.
    #[must_use]
    pub fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[0..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..16].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// A buffer that is offered to the device.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// Guest physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// Whether the device writes it.
    pub writable: bool,
}

/// Where the three parts of a ring lie, in guest physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingLayout {
    /// Number of descriptors, a power of two.
    pub size: u16,
    /// Descriptor table.
    pub desc: u64,
    /// Available ring.
    pub avail: u64,
    /// Used ring.
    pub used: u64,
}

impl RingLayout {
    /// A ring of `size` descriptors from `gpa` (page-aligned) on.
    #[must_use]
    pub fn new(gpa: u64, size: u16) -> Self {
        let entries = u64::from(size);
        let avail = gpa + entries * DESC_LEN;
        // The used ring is aligned to 4; a page of its own is simplest.
        let used = (avail + 6 + 2 * entries).next_multiple_of(4096);
        RingLayout { size, desc: gpa, avail, used }
    }

    /// Bytes from the start of the table to the end of the used ring.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.used + 6 + 8 * u64::from(self.size) - self.desc
    }

    /// Never: a ring has at least its indices.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }
}

/// One virtqueue, as its driver has it.
#[derive(Debug)]
pub struct Ring {
    memory: Arc<GuestMemory>,
    layout: RingLayout,
    free: Vec<u16>,
    /// Offered and not used yet, oldest first: head and number of descriptors.
    outstanding: VecDeque<(u16, Vec<u16>)>,
    avail_idx: u16,
    used_idx: u16,
}

impl Ring {
    /// An empty ring; its memory is cleared.
    #[must_use]
    pub fn new(memory: Arc<GuestMemory>, layout: RingLayout) -> Self {
        let mut ring = Ring {
            memory,
            layout,
            free: Vec::new(),
            outstanding: VecDeque::new(),
            avail_idx: 0,
            used_idx: 0,
        };
        ring.reset();
        ring
    }

    /// Where it lies.
    #[must_use]
    pub fn layout(&self) -> RingLayout {
        self.layout
    }

    /// Forgets everything and clears the memory, as after a device reset.
    pub fn reset(&mut self) {
        let len = usize::try_from(self.layout.len()).unwrap_or(0);
        self.memory.write(self.layout.desc, &vec![0; len]);
        self.free = (0..self.layout.size).rev().collect();
        self.outstanding.clear();
        self.avail_idx = 0;
        self.used_idx = 0;
    }

    /// Buffers that were offered and not used yet.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.outstanding.len()
    }

    /// Index of the next buffer that the device has to use, as a monitor reads
    /// it from the ring after its back end died.
    #[must_use]
    pub fn used_index_in_memory(&self) -> u16 {
        self.memory.load_u16(self.layout.used + 2)
    }

    /// Offers a chain of buffers and returns its head.
    ///
    /// # Errors
    /// If the ring has not enough free descriptors.
    pub fn add(&mut self, buffers: &[Buffer]) -> anyhow::Result<u16> {
        ensure!(
            !buffers.is_empty() && buffers.len() <= self.free.len(),
            "ring is full: {} of {} descriptors are free, {} needed",
            self.free.len(),
            self.layout.size,
            buffers.len()
        );
        let chain = self.free.split_off(self.free.len() - buffers.len());
        for (position, (buffer, &index)) in buffers.iter().zip(&chain).enumerate() {
            let next = chain.get(position + 1).copied();
            let mut flags = 0;
            if buffer.writable {
                flags |= DESC_WRITE;
            }
            if next.is_some() {
                flags |= DESC_NEXT;
            }
            let descriptor =
                Descriptor { addr: buffer.addr, len: buffer.len, flags, next: next.unwrap_or(0) };
            self.write_descriptor(index, &descriptor);
        }
        let head = chain[0];
        self.publish(head);
        self.outstanding.push_back((head, chain));
        Ok(head)
    }

    /// Writes a descriptor as it is, sound or not.
    pub fn write_descriptor(&self, index: u16, descriptor: &Descriptor) {
        let slot = u64::from(index % self.layout.size);
        self.memory.write(self.layout.desc + slot * DESC_LEN, &descriptor.bytes());
    }

    /// Puts `head`, sound or not, into the available ring.
    pub fn publish(&mut self, head: u16) {
        let slot = u64::from(self.avail_idx % self.layout.size);
        self.memory.store_u16(self.layout.avail + 4 + 2 * slot, head);
        self.set_avail_idx(self.avail_idx.wrapping_add(1));
    }

    /// Index that the next offered buffer gets.
    #[must_use]
    pub fn avail_idx(&self) -> u16 {
        self.avail_idx
    }

    /// Writes the available index as it is, sound or not.
    pub fn set_avail_idx(&mut self, index: u16) {
        self.avail_idx = index;
        self.memory.store_u16(self.layout.avail + 2, index);
    }

    /// Takes the next used buffer: its head and the number of bytes that the
    /// device says it wrote.
    ///
    /// # Errors
    /// If the device used what was not offered, or not in ring order.
    pub fn take_used(&mut self) -> anyhow::Result<Option<(u16, u32)>> {
        if self.used_index_in_memory() == self.used_idx {
            return Ok(None);
        }
        let slot = u64::from(self.used_idx % self.layout.size);
        let mut element = [0; 8];
        self.memory.read(self.layout.used + 4 + 8 * slot, &mut element);
        let [id @ .., l0, l1, l2, l3] = element;
        let id = u32::from_le_bytes(id);
        let len = u32::from_le_bytes([l0, l1, l2, l3]);
        let Some((head, chain)) = self.outstanding.pop_front() else {
            bail!("device used buffer {id}, yet none is outstanding");
        };
        ensure!(id == u32::from(head), "device used buffer {id} where ring order has {head}");
        self.free.extend(chain);
        self.used_idx = self.used_idx.wrapping_add(1);
        Ok(Some((head, len)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Placement, BLOCK_SIZE};

    fn ring() -> Ring {
        let memory = Arc::new(GuestMemory::new(BLOCK_SIZE, Placement::Aligned).expect("memory"));
        Ring::new(memory, RingLayout::new(0, 8))
    }

    fn device_uses(ring: &Ring, index: u16, id: u32, len: u32) {
        let layout = ring.layout();
        let slot = u64::from(index % layout.size);
        let mut element = id.to_le_bytes().to_vec();
        element.extend(len.to_le_bytes());
        ring.memory.write(layout.used + 4 + 8 * slot, &element);
        ring.memory.store_u16(layout.used + 2, index.wrapping_add(1));
    }

    const BUFFER: Buffer = Buffer { addr: 0x1000, len: 16, writable: false };

    #[test]
    fn used_buffers_come_back_and_free_their_descriptors() {
        let mut ring = ring();
        let head = ring.add(&[BUFFER; 8]).expect("room");
        assert!(ring.add(&[BUFFER]).is_err());
        device_uses(&ring, 0, u32::from(head), 12);
        assert_eq!(ring.take_used().expect("sound"), Some((head, 12)));
        assert_eq!(ring.take_used().expect("sound"), None);
        assert!(ring.add(&[BUFFER; 8]).is_ok());
    }

    #[test]
    fn use_out_of_order_is_found() {
        let mut ring = ring();
        ring.add(&[BUFFER]).expect("room");
        let second = ring.add(&[BUFFER]).expect("room");
        device_uses(&ring, 0, u32::from(second), 0);
        assert!(ring.take_used().is_err());
    }

    #[test]
    fn use_of_nothing_is_found() {
        let mut ring = ring();
        device_uses(&ring, 0, 0, 0);
        assert!(ring.take_used().is_err());
    }
}

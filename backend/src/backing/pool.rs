//! The host's pool of hugetlb pages of one size, and what one guest may still want of it.
//!
//! A mapping with a reservation (the rule) has its pages set aside in the pool. One without
//! (`MAP_NORESERVE`; QEMU's `reserve=off`) takes them as they are touched, and the touch that finds
//! the pool empty is SIGBUS. So a page is made ready for such a guest only as long as the pool has
//! one for every page that it has not touched yet: else the one that is taken for a block that
//! nobody uses so far is the one that a later touch of another block misses.

use super::mempolicy::{self, Nodes};
use super::vmm::FileId;
use crate::pressure::HugetlbCgroups;
use serde::Serialize;
use std::fs::{read_to_string, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Where the kernel tells of its pools.
const POOLS: &str = "/sys/kernel/mm/hugepages";

/// The state of a pool at one moment, in pages of its size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PoolState {
    /// Size of its pages in bytes.
    pub page_size: u64,
    /// Pages of the pool, used and free, surplus ones included.
    pub total: u64,
    /// Pages that nobody uses.
    pub free: u64,
    /// Of the free ones, those that are set aside for mappings that have not touched them yet.
    pub reserved: u64,
    /// Pages beyond the pool's size.
    pub surplus: u64,
    /// Most pages beyond its size that the kernel may try to find.
    pub overcommit: u64,
    /// Pages that this guest's memory does not have yet.
    pub missing: u64,
    /// Of these, the ones that nothing is set aside for.
    pub unreserved: u64,
    /// Bytes that the cgroup which pays for prepared pages, that of the daemon, has left; `None`
    /// without a limit.
    pub cgroup_room: Option<u64>,
    /// Whether it is too short to prepare anything for the guest.
    pub short: bool,
}

impl PoolState {
    /// Free pages that are not set aside. What the kernel may find beyond the size of the pool
    /// does not count: nobody knows whether it will.
    pub fn unclaimed(&self) -> u64 {
        self.free.saturating_sub(self.reserved)
    }

    /// Why nothing is prepared, and the remedy.
    pub fn shortage(&self) -> String {
        let kib = self.page_size >> 10;
        let cause = match self.cgroup_room {
            Some(room) if room < self.page_size => {
                return format!(
                    "the hugetlb limit of the daemon's cgroup has {room} bytes left, less than one \
                     page of {kib} kB: blocks are not prepared; raise hugetlb.*.max of its cgroup, \
                     which pays for prepared pages"
                );
            }
            _ if self.unreserved > self.unclaimed() => format!(
                "{} free pages are not set aside for others, and the guest, whose memory has no \
                 reservation, may still touch {}",
                self.unclaimed(),
                self.unreserved
            ),
            _ => format!(
                "{} pages are free, {} of them set aside, but not on the nodes that the guest's \
                 memory is bound to",
                self.free, self.reserved
            ),
        };
        format!(
            "the pool of {kib} kB huge pages is short: {cause}; blocks are not prepared until that \
             changes; raise {POOLS}/hugepages-{kib}kB/nr_hugepages (on NUMA hosts that of the \
             node), or give the memory backend reserve=on or prealloc=on"
        )
    }
}

/// A file of the guest that takes its pages from the pool.
#[derive(Debug)]
struct Claim {
    id: FileId,
    file: File,
    reserved: bool,
}

/// A pool, and the files of one guest that live on it.
#[derive(Debug)]
pub struct Pool {
    page_size: u64,
    directory: PathBuf,
    cgroups: HugetlbCgroups,
    claims: Mutex<Vec<Claim>>,
}

impl Pool {
    /// The pool of pages of `page_size` bytes.
    pub fn new(page_size: u64) -> Self {
        let directory = Path::new(POOLS).join(format!("hugepages-{}kB", page_size >> 10));
        Self { page_size, directory, cgroups: HugetlbCgroups::find(), claims: Mutex::default() }
    }

    /// Notes a file, and whether its pages are set aside.
    pub fn claim(&self, file: &File, reserved: bool) -> io::Result<()> {
        let id = FileId::of(file)?;
        let mut claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
        match claims.iter_mut().find(|claim| claim.id == id) {
            Some(claim) => claim.reserved &= reserved,
            None => claims.push(Claim { id, file: file.try_clone()?, reserved }),
        }
        Ok(())
    }

    /// Looks at the pool. `short` is left to be found out by who knows where pages must lie.
    pub fn look(&self) -> io::Result<PoolState> {
        let (mut missing, mut unreserved) = (0, 0);
        for claim in self.claims.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let holes = missing_pages(&claim.file, self.page_size)?;
            missing += holes;
            unreserved += if claim.reserved { 0 } else { holes };
        }
        let state = PoolState {
            page_size: self.page_size,
            total: self.number("nr_hugepages")?,
            free: self.number("free_hugepages")?,
            reserved: self.number("resv_hugepages")?,
            surplus: self.number("surplus_hugepages")?,
            overcommit: self.number("nr_overcommit_hugepages")?,
            missing,
            unreserved,
            cgroup_room: self.cgroups.room(self.page_size),
            short: false,
        };
        let unpaid = state.cgroup_room.is_some_and(|room| room < self.page_size);
        let short = missing > 0 && (unpaid || unreserved > state.unclaimed());
        Ok(PoolState { short, ..state })
    }

    /// Pages that are free on some nodes.
    pub fn free_on(&self, nodes: &Nodes) -> io::Result<u64> {
        let Some(name) = self.directory.file_name() else { return Ok(0) };
        nodes
            .iter()
            .map(|node| {
                let node = Path::new(mempolicy::NODES).join(format!("node{node}"));
                number(&node.join("hugepages").join(name).join("free_hugepages"))
            })
            .sum()
    }

    fn number(&self, name: &str) -> io::Result<u64> {
        number(&self.directory.join(name))
    }
}

/// Pages that a file is long and does not have.
pub fn missing_pages(file: &File, page_size: u64) -> io::Result<u64> {
    let metadata = file.metadata()?;
    let missing = metadata.len().saturating_sub(metadata.blocks().saturating_mul(512));
    Ok(missing.div_ceil(page_size.max(1)))
}

fn number(path: &Path) -> io::Result<u64> {
    let text = read_to_string(path)?;
    text.trim().parse().map_err(|error| io::Error::other(format!("{}: {error}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 2 << 20;

    #[test]
    fn a_shortage_names_its_cause_and_a_remedy() {
        let state = PoolState { page_size: SIZE, free: 5, reserved: 3, ..PoolState::default() };
        let unreserved = PoolState { missing: 4, unreserved: 4, ..state }.shortage();
        assert!(unreserved.contains("2 free pages are not set aside"), "{unreserved}");
        assert!(unreserved.contains("may still touch 4"), "{unreserved}");
        assert!(unreserved.contains("hugepages-2048kB/nr_hugepages"), "{unreserved}");
        let bound = PoolState { missing: 4, ..state }.shortage();
        assert!(bound.contains("nodes"), "{bound}");
        let unpaid = PoolState { cgroup_room: Some(SIZE - 1), ..state }.shortage();
        assert!(unpaid.contains("cgroup") && unpaid.contains("hugetlb.*.max"), "{unpaid}");
        for message in [unreserved, bound, unpaid] {
            assert!(!message.contains("  ") && !message.contains('\n'), "{message}");
        }
    }

    #[test]
    fn more_may_be_set_aside_than_is_free_for_a_moment() {
        let state = PoolState { free: 2, reserved: 3, ..PoolState::default() };
        assert_eq!(state.unclaimed(), 0);
    }
}

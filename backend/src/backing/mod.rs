//! The guest's memory as the host backs it: how it is backed, making it huge, dropping it.
//!
//! This is the only place of the daemon with `unsafe`, with mappings and with advice to the
//! kernel. It knows blocks, files and the VMM's process; it decides nothing. No action here
//! stores a byte into guest memory, and only [`Memory::discard`] and [`Memory::trim`] drop any.

#[allow(unsafe_code)]
mod counters;
#[allow(unsafe_code)]
mod descriptor;
mod findings;
mod home;
mod hugetlb;
mod mempolicy;
mod pool;
#[allow(unsafe_code)]
mod process;
mod ranges;
mod shmem;
#[allow(unsafe_code)]
mod sys;
#[allow(unsafe_code)]
mod truncation;
mod vmm;
mod window;

pub use counters::TlbCounters;
pub use descriptor::{
    bind_private, close_abandoned, inherit_listener, lock_for_life, lock_is_held, set_nonblocking,
    signal_event,
};
pub use findings::{Finding, Severity};
pub use pool::PoolState;
pub use process::{kill_self, own_proc, process_cpu_time, thread_cpu_time};
pub use ranges::LayoutError;
pub use sys::page_size;
pub(crate) use sys::{PAGEMAP_SCAN, SYS_CACHESTAT};
pub use truncation::{memory_was_truncated, survive_truncated_memory};

use home::Home;
use hugetlb::Hugetlb;
use pool::Pool;
use ranges::{Extent, Layout};
use serde::{Deserialize, Serialize};
use shmem::Shmem;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use thiserror::Error;
use vmm::{FileId, Search, Wanted};

/// Where the kernel keeps its settings for transparent huge pages.
const THP: &str = "/sys/kernel/mm/transparent_hugepage";

/// One region of the VMM's memory table.
#[derive(Debug)]
pub struct RegionDesc {
    /// First guest physical address.
    pub guest_addr: u64,
    /// Length in bytes.
    pub size: u64,
    /// The memory file, shared with the VMM.
    pub file: File,
    /// Where in the file the region begins, in bytes.
    pub file_offset: u64,
}

/// What a region's memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A shmem file: memfd or tmpfs.
    Shmem,
    /// A hugetlb file.
    Hugetlb {
        /// Size of its pages in bytes.
        page_size: u64,
    },
    /// A file on another filesystem.
    File,
    /// The VMM maps it privately: the file is not what the guest sees.
    Unshared,
}

/// How the host backs a block. The values are those of the wire.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HostState {
    /// No memory.
    #[default]
    Absent = 0,
    /// Base pages, at least one.
    Base = 1,
    /// One transparent huge page.
    Huge = 2,
    /// Hugetlb.
    Hugetlb = 3,
}

impl HostState {
    /// All states, in the order of their wire values.
    pub const ALL: [Self; 4] = [Self::Absent, Self::Base, Self::Huge, Self::Hugetlb];

    /// The state of a wire value.
    pub fn from_wire(value: u8) -> Option<Self> {
        Self::ALL.get(usize::from(value)).copied()
    }

    /// The name used in status output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::Base => "base",
            Self::Huge => "huge",
            Self::Hugetlb => "hugetlb",
        }
    }

    /// Whether the host uses a huge page.
    pub fn is_huge(self) -> bool {
        matches!(self, Self::Huge | Self::Hugetlb)
    }
}

/// Adjacent blocks that are backed alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostRun {
    /// First block number.
    pub first: u64,
    /// Number of blocks, never 0.
    pub count: u32,
    /// How they are backed.
    pub state: HostState,
    /// For `Base`: base pages resident in each of the blocks; 0 if not known.
    pub resident: u32,
}

/// What making a block huge took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Collapsed {
    /// Nothing was copied: the file had a huge page there. The VMM may map it only when it
    /// touches it next.
    AlreadyHuge,
    /// Resident base pages were copied.
    Copied {
        /// How many bytes.
        bytes: u64,
    },
    /// It was absent, and is zero.
    Populated,
}

/// What a collapse does with a block that lacks some of its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holes {
    /// It becomes wholly resident.
    Fill,
    /// It stays as it is. Where all of a block is in use, a missing page is one that was given back
    /// since, to a balloon for example.
    Leave,
}

/// Why a block was not made huge. All of these are ordinary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// There is nothing to collapse.
    Absent,
    /// Some of its pages are not there, and are not to be filled.
    Holes,
    /// Something holds its pages for now, or some are swapped out.
    Again,
    /// The host has no huge page to give, or the cgroup is full.
    NoMemory,
    /// We may not do this to the VMM.
    NotPermitted,
    /// It cannot be: unaligned, declined by the VMM, or switched off in the kernel.
    Unsupported,
    /// It would take memory that the filesystem lacks for the rest of the guest.
    Space,
    /// It has contents, and the caller gave no leave to copy them.
    Unaffordable,
    /// The VMM has exited.
    Gone,
    /// Another errno.
    Other(i32),
}

impl From<&io::Error> for Refusal {
    fn from(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EINTR) => Self::Again,
            Some(libc::ENOMEM | libc::EBUSY) => Self::NoMemory,
            Some(libc::EPERM | libc::EACCES) => Self::NotPermitted,
            Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS) => Self::Unsupported,
            // A fault that ends in SIGBUS would end with EFAULT here: no room, or no file.
            Some(libc::ENOSPC | libc::EFAULT) => Self::Space,
            Some(libc::ESRCH) => Self::Gone,
            Some(other) => Self::Other(other),
            None => Self::Other(0),
        }
    }
}

/// How an attempt to make a block huge ended.
type Outcome = Result<Collapsed, Refusal>;

/// Why a memory table is refused, or an action on it failed. Each message is complete: it holds
/// the cause, which is therefore not told as a source again.
#[derive(Debug, Error)]
pub enum Error {
    /// The table contradicts itself.
    #[error("bad memory table: {0}")]
    Layout(LayoutError),
    /// A region reaches beyond its file: touching it would be SIGBUS.
    #[error(
        "the region at guest address {guest_addr:#x} ends at offset {end:#x} of a file of \
         {length:#x} bytes"
    )]
    BeyondEnd {
        /// First guest physical address of the region.
        guest_addr: u64,
        /// One past its last byte in the file.
        end: u64,
        /// Length of the file.
        length: u64,
    },
    /// A region's file cannot be looked at.
    #[error("cannot look at the file of the region at guest address {guest_addr:#x}: {cause}")]
    File {
        /// First guest physical address of the region.
        guest_addr: u64,
        /// Why.
        cause: io::Error,
    },
    /// Blocks that no region holds.
    #[error("{count} block(s) from {first:#x} on are not all managed")]
    NotManaged {
        /// First block number.
        first: u64,
        /// Number of blocks.
        count: u64,
    },
    /// A system call failed.
    #[error("cannot {action} block(s) {first:#x} to {last:#x}: {cause}")]
    System {
        /// What was tried.
        action: &'static str,
        /// First block number.
        first: u64,
        /// Last block number.
        last: u64,
        /// Why.
        cause: io::Error,
    },
}

/// What is done to the blocks of one region, by kind of memory. All blocks lie in the region.
trait Backing: Send + Sync {
    fn kind(&self) -> Kind;
    /// The file that the region lies in.
    fn file(&self) -> &File;
    /// What turned out since the region was taken charge of.
    fn findings(&self) -> Vec<Finding>;
    /// The pool that its pages come from, as it is now; `None` where there is none.
    fn pool(&self) -> Option<PoolState> {
        None
    }
    /// Page faults of the VMM so far; `None` where that is not known.
    fn faults(&self) -> Option<u64> {
        None
    }
    fn may_discard(&self) -> bool;
    fn scan(&self, blocks: Range<u64>, out: &mut Vec<HostRun>) -> io::Result<()>;
    fn collapse(&self, blocks: Range<u64>, holes: Holes, results: &mut Vec<(u64, Outcome)>);
    fn populate(&self, blocks: Range<u64>, leave: &mut u64, results: &mut Vec<(u64, Outcome)>);
    fn demote(&self, block: u64) -> io::Result<()>;
    /// Drops a range of guest physical addresses: whole pages of the host, all of this region.
    fn discard(&self, bytes: Range<u64>) -> io::Result<()>;
}

/// The memory of one memory table.
pub struct Memory {
    layout: Layout,
    /// log2 of the size of a block in bytes.
    block_shift: u32,
    /// By index of the region in the table; `None` for regions without managed blocks.
    regions: Vec<Option<Box<dyn Backing>>>,
    findings: Vec<Finding>,
    vmm: Option<i32>,
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memory").field("spans", &self.layout.spans()).finish_non_exhaustive()
    }
}

impl Memory {
    /// Takes a memory table, with blocks of `1 << block_shift` bytes, and looks for the VMM.
    /// What is merely pointless is no error but a finding.
    ///
    /// # Errors
    /// If the table contradicts itself, or a region reaches beyond its file.
    pub fn new(table: Vec<RegionDesc>, block_shift: u32) -> Result<Self, Error> {
        let mut said = Vec::new();
        let mut extents = Vec::with_capacity(table.len());
        for region in &table {
            extents.push(Extent {
                guest_addr: region.guest_addr,
                size: region.size,
                file_offset: region.file_offset,
                usable: is_regular(region)?,
            });
        }
        let layout = Layout::new(&extents, block_shift).map_err(Error::Layout)?;
        for (region, extent) in table.iter().zip(&extents) {
            check_length(region, extent)?;
            if !extent.usable {
                said.push(findings::not_a_file(region.guest_addr));
            } else if !extent.is_congruent(block_shift)
                && !extent.whole_blocks(block_shift).is_empty()
            {
                said.push(findings::not_congruent(region.guest_addr, region.file_offset));
            }
        }
        let mut regions: Vec<Option<Box<dyn Backing>>> = Vec::new();
        regions.resize_with(table.len(), || None);
        let homes: Vec<usize> = layout.pieces(0, u64::MAX).map(|(region, _)| region).collect();
        if homes.is_empty() {
            return Ok(Self { layout, block_shift, regions, findings: said, vmm: None });
        }
        let mut vmm = find_vmm(&table, &homes, block_shift, &mut said)?;
        let own_pagemap = open_own_pagemap(&mut said).map(Arc::new);
        let mut collapsible = None;
        let mut pools = BTreeMap::new();
        for (index, region) in table.into_iter().enumerate() {
            if !homes.contains(&index) {
                continue;
            }
            let guest_addr = region.guest_addr;
            let fail = |cause| Error::File { guest_addr, cause };
            let place = vmm.as_mut().and_then(|(vmm, places)| {
                let (_, place) = places.iter().find(|(region, _)| *region == index)?;
                Some((Arc::clone(vmm), *place))
            });
            let system = sys::file_system(&region.file).map_err(fail)?;
            let kind = kind_of(&system, place.as_ref().is_none_or(|(_, place)| place.shared));
            let home = Home {
                searched: reopened(&region.file).map_err(fail)?,
                file: region.file,
                guest_addr,
                file_offset: region.file_offset,
                block_shift,
                vmm: place.as_ref().map(|(vmm, place)| (Arc::clone(vmm), place.addr)),
            };
            regions[index] = Some(match kind {
                Kind::Hugetlb { page_size } => {
                    said.push(findings::hugetlb(page_size));
                    let pool =
                        pools.entry(page_size).or_insert_with(|| Arc::new(Pool::new(page_size)));
                    Box::new(Hugetlb::new(home, page_size, Arc::clone(pool)).map_err(fail)?)
                }
                Kind::Unshared | Kind::File | Kind::Shmem => {
                    match kind {
                        Kind::Unshared => {
                            said.extend(place.map(|(vmm, _)| findings::not_shared(vmm.pid())));
                        }
                        Kind::File => said.push(findings::not_shmem(system.magic)),
                        _ => {}
                    }
                    let collapsible = kind == Kind::Shmem
                        && *collapsible.get_or_insert_with(|| check_thp(block_shift, &mut said));
                    let pagemap = own_pagemap.clone();
                    let shmem = Shmem::new(home, kind, collapsible, pagemap, &mut said);
                    Box::new(shmem.map_err(fail)?)
                }
            });
        }
        let mut findings: Vec<Finding> = Vec::new();
        for finding in said {
            // Regions of one guest mostly have the same fault.
            if !findings.iter().any(|known| known.code == finding.code) {
                findings.push(finding);
            }
        }
        let vmm = vmm.map(|(vmm, _)| vmm.pid());
        Ok(Self { layout, block_shift, regions, findings, vmm })
    }

    /// The process that runs the guest, if it was found. It may have ended since.
    pub fn vmm(&self) -> Option<i32> {
        self.vmm
    }

    /// What the operator should know, worst first.
    pub fn findings(&self) -> Vec<Finding> {
        let mut findings = self.findings.clone();
        for finding in self.regions.iter().flatten().flat_map(|region| region.findings()) {
            if !findings.iter().any(|known| known.code == finding.code) {
                findings.push(finding);
            }
        }
        findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity as u8));
        findings
    }

    /// Looks at the pools that hugetlb memory comes from: one state for each size of pages.
    pub fn pools(&self) -> Vec<PoolState> {
        let mut pools: BTreeMap<u64, PoolState> = BTreeMap::new();
        for state in self.regions.iter().flatten().filter_map(|region| region.pool()) {
            let known = pools.entry(state.page_size).or_insert(state);
            known.short |= state.short;
        }
        pools.into_values().collect()
    }

    /// What the memory of each region with managed blocks is.
    pub fn kinds(&self) -> Vec<Kind> {
        self.regions.iter().flatten().map(|region| region.kind()).collect()
    }

    /// The managed blocks: those that lie wholly inside one region. Ascending, disjoint, merged
    /// where adjacent.
    pub fn spans(&self) -> &[Range<u64>] {
        self.layout.spans()
    }

    /// Whether all of `count` blocks from `first` on are managed; false for no blocks.
    pub fn is_managed(&self, first: u64, count: u64) -> bool {
        self.layout.contains(first, count)
    }

    /// Whether memory may be dropped at all: not where a drop could take more than the contents
    /// (hugetlb reservations), nor where it would not drop what the guest sees.
    pub fn may_discard(&self) -> bool {
        let mut regions = self.regions.iter().flatten().peekable();
        regions.peek().is_some() && regions.all(|region| region.may_discard())
    }

    /// Page faults of the VMM so far, which tell whether a guest met a collapse; `None` where that
    /// is not known.
    pub fn faults(&self) -> Option<u64> {
        self.regions.iter().flatten().find_map(|region| region.faults())
    }

    /// Bytes of memory that the files of the managed regions have; 0 where that cannot be told.
    pub fn allocated(&self) -> u64 {
        let files = self.regions.iter().flatten().filter_map(|region| {
            let file = region.file().metadata().ok()?;
            Some(((file.dev(), file.ino()), file.blocks() * 512))
        });
        files.collect::<BTreeMap<_, _>>().values().sum()
    }

    fn pieces(
        &self,
        first: u64,
        count: u64,
    ) -> impl Iterator<Item = (&dyn Backing, Range<u64>)> + '_ {
        self.layout.pieces(first, count).filter_map(|(region, blocks)| {
            let region = self.regions.get(region)?.as_deref()?;
            Some((region, blocks))
        })
    }

    /// Looks at how the managed ones among `count` blocks from `first` on are backed, and appends
    /// what it sees, ascending. What is huge, is told in the module `shmem`.
    ///
    /// # Errors
    /// If the memory file cannot be looked at; what was appended until then is true.
    pub fn scan(&self, first: u64, count: u64, out: &mut Vec<HostRun>) -> Result<(), Error> {
        for (region, blocks) in self.pieces(first, count) {
            region.scan(blocks.clone(), out).map_err(system_error("look at", &blocks))?;
        }
        Ok(())
    }

    /// Makes the managed ones among `count` blocks from `first` on huge, as far as they are
    /// resident; keeps their contents. Appends one result for each block that is managed.
    pub fn collapse(
        &self,
        first: u64,
        count: u64,
        holes: Holes,
        results: &mut Vec<(u64, Outcome)>,
    ) {
        for (region, blocks) in self.pieces(first, count) {
            region.collapse(blocks, holes, results);
        }
    }

    /// Makes the managed ones among `count` blocks from `first` on huge, resident or not; keeps
    /// their contents, and copies those of at most `leave` blocks. Appends one result for each
    /// block that is managed.
    pub fn populate(
        &self,
        first: u64,
        count: u64,
        mut leave: u64,
        results: &mut Vec<(u64, Outcome)>,
    ) {
        for (region, blocks) in self.pieces(first, count) {
            region.populate(blocks, &mut leave, results);
        }
    }

    /// Has a transparent huge page split into base pages; keeps its contents. It may stay whole
    /// without an error, where somebody else maps it too.
    ///
    /// # Errors
    /// If that cannot be done with this memory, or not at this VMM.
    pub fn demote(&self, block: u64) -> Result<(), Error> {
        let Some((region, blocks)) = self.pieces(block, 1).next() else {
            return Err(Error::NotManaged { first: block, count: 1 });
        };
        region.demote(block).map_err(system_error("demote", &blocks))
    }

    /// Drops the contents of `count` blocks from `first` on: afterwards they read as zeros.
    ///
    /// # Errors
    /// If not all of them are managed, or if memory may not be dropped: then nothing was dropped.
    /// If the kernel refuses: then some may have been.
    pub fn discard(&self, first: u64, count: u64) -> Result<(), Error> {
        if !self.is_managed(first, count) {
            return Err(Error::NotManaged { first, count });
        }
        let shift = self.block_shift;
        self.drop_bytes(first << shift..(first + count) << shift)
    }

    /// Drops a range of guest physical addresses, of whole pages of the host: afterwards they read
    /// as zeros. Blocks that hold more than that keep the rest, in base pages.
    ///
    /// # Errors
    /// As [`Self::discard`], and for a part of a page.
    pub fn trim(&self, bytes: Range<u64>) -> Result<(), Error> {
        let blocks = self.blocks_of(&bytes);
        let (first, count) = (blocks.start, blocks.end.saturating_sub(blocks.start));
        if bytes.is_empty() || !self.is_managed(first, count) {
            return Err(Error::NotManaged { first, count });
        }
        if (bytes.start | bytes.end) & (page_size() - 1) != 0 {
            let error = io::Error::from_raw_os_error(libc::EINVAL);
            return Err(system_error("trim", &blocks)(error));
        }
        self.drop_bytes(bytes)
    }

    /// The blocks that a range of addresses touches.
    fn blocks_of(&self, bytes: &Range<u64>) -> Range<u64> {
        bytes.start >> self.block_shift..bytes.end.div_ceil(1 << self.block_shift)
    }

    /// Drops bytes of managed blocks.
    fn drop_bytes(&self, bytes: Range<u64>) -> Result<(), Error> {
        let all = self.blocks_of(&bytes);
        let pieces = || self.pieces(all.start, all.end - all.start);
        if let Some((_, blocks)) = pieces().find(|(region, _)| !region.may_discard()) {
            let error = io::Error::from_raw_os_error(libc::EOPNOTSUPP);
            return Err(system_error("drop", &blocks)(error));
        }
        for (region, blocks) in pieces() {
            let start = bytes.start.max(blocks.start << self.block_shift);
            let end = bytes.end.min(blocks.end << self.block_shift);
            region.discard(start..end).map_err(system_error("drop", &blocks))?;
        }
        Ok(())
    }
}

fn system_error(action: &'static str, blocks: &Range<u64>) -> impl FnOnce(io::Error) -> Error {
    let (first, last) = (blocks.start, blocks.end.saturating_sub(1));
    move |cause| Error::System { action, first, last, cause }
}

fn is_regular(region: &RegionDesc) -> Result<bool, Error> {
    let metadata = region.file.metadata();
    let fail = |cause| Error::File { guest_addr: region.guest_addr, cause };
    Ok(metadata.map_err(fail)?.is_file())
}

fn check_length(region: &RegionDesc, extent: &Extent) -> Result<(), Error> {
    let guest_addr = region.guest_addr;
    let metadata = region.file.metadata().map_err(|cause| Error::File { guest_addr, cause })?;
    let (length, end) = (metadata.len(), extent.file_end().unwrap_or(u64::MAX));
    if extent.usable && end > length {
        return Err(Error::BeyondEnd { guest_addr, end, length });
    }
    Ok(())
}

fn kind_of(system: &sys::FileSystem, shared: bool) -> Kind {
    // As file_system() gives them: 32 bits wide, however the target declares the constants.
    #[allow(clippy::cast_sign_loss, clippy::cast_lossless, clippy::unnecessary_cast)]
    const HUGETLBFS: u64 = libc::HUGETLBFS_MAGIC as u64 & 0xffff_ffff;
    #[allow(clippy::cast_sign_loss, clippy::cast_lossless, clippy::unnecessary_cast)]
    const TMPFS: u64 = libc::TMPFS_MAGIC as u64 & 0xffff_ffff;
    match system.magic {
        _ if !shared => Kind::Unshared,
        HUGETLBFS => Kind::Hugetlb { page_size: system.block_size },
        TMPFS => Kind::Shmem,
        _ => Kind::File,
    }
}

/// The file opened anew, for a file position of our own. Only to read: the sandbox lets nothing be
/// opened to be changed. Where that is not permitted, the VMM's file position has to do.
fn reopened(file: &File) -> io::Result<File> {
    let open = || {
        let path = own_proc()?.join("fd").join(file.as_raw_fd().to_string());
        // Not to wait for a lease on it.
        OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)
    };
    open().or_else(|error| {
        log::debug!("cannot open the memory file anew: {error}");
        file.try_clone()
    })
}

/// Our own page tables, as the kernel shows them.
fn open_own_pagemap(said: &mut Vec<Finding>) -> Option<File> {
    let pagemap = match own_proc().and_then(|own| File::open(own.join("pagemap"))) {
        Ok(pagemap) => pagemap,
        Err(error) => {
            log::debug!("cannot open our own pagemap: {error}");
            said.push(findings::self_not_visible());
            return None;
        }
    };
    if let Err(error) = sys::pagemap_scan(&pagemap, &(0..page_size()), &mut []) {
        said.push(findings::scan_unavailable(&error));
        return None;
    }
    Some(pagemap)
}

/// The VMM and, by index of the region, where it maps it.
type Located = (Arc<vmm::Vmm>, Vec<(usize, vmm::Place)>);

fn find_vmm(
    table: &[RegionDesc],
    homes: &[usize],
    block_shift: u32,
    said: &mut Vec<Finding>,
) -> Result<Option<Located>, Error> {
    let mut wanted = Vec::with_capacity(homes.len());
    for region in homes.iter().filter_map(|index| table.get(*index)) {
        let file = FileId::of(&region.file)
            .map_err(|cause| Error::File { guest_addr: region.guest_addr, cause })?;
        wanted.push(Wanted { file, offset: region.file_offset, size: region.size });
    }
    let Search { found, others, denied, blind } = vmm::find(&wanted, block_shift);
    let Some((vmm, places)) = found else {
        said.push(findings::vmm_not_found(denied, blind));
        return Ok(None);
    };
    if !others.is_empty() {
        said.push(findings::ambiguous(vmm.pid(), &others));
    }
    log::debug!("the VMM is process {}", vmm.pid());
    Ok(Some((Arc::new(vmm), homes.iter().copied().zip(places).collect())))
}

/// What is wrong with the host for guests with blocks of `1 << block_shift` bytes, whatever VMM
/// comes.
pub fn host_findings(block_shift: u32) -> Vec<Finding> {
    let mut said = Vec::new();
    check_thp(block_shift, &mut said);
    said
}

/// Whether blocks of this size can be collapsed here, as far as the kernel's settings tell.
fn check_thp(block_shift: u32, said: &mut Vec<Finding>) -> bool {
    let thp = Path::new(THP);
    match std::fs::read_to_string(thp.join("hpage_pmd_size")) {
        Ok(size) => {
            let block = 1u64 << block_shift;
            if let Some(size) = size.trim().parse().ok().filter(|size| *size != block) {
                said.push(findings::block_size(block, size));
                return false;
            }
        }
        Err(error) if thp.parent().is_some_and(Path::exists) => {
            said.push(findings::thp_unavailable(&error));
        }
        Err(error) => log::debug!("cannot read the settings of huge pages: {error}"),
    }
    let enabled = std::fs::read_to_string(thp.join("shmem_enabled"));
    if enabled.is_ok_and(|text| text.contains("[deny]")) {
        said.push(findings::thp_denied());
    }
    true
}

#[cfg(test)]
mod tests;

//! Memory that is a hugetlb file: huge as soon as it is there.
//!
//! hugetlbfs tells nothing about holes (no SEEK_DATA, no cachestat). What is known: a file with
//! as many bytes as it is long has none; what the VMM maps is there; and what was allocated here is
//! there, though the VMM may not have touched it yet. A page that somebody else allocated and the
//! VMM never touched shows as absent until it is touched, or prepared, which then takes nothing.

use super::findings::{self, Finding};
use super::home::Home;
use super::mempolicy::{self, Policy};
use super::pool::{missing_pages, Pool, PoolState};
use super::ranges::{push_run, Mapped};
use super::sys;
use super::{Backing, Collapsed, Holes, HostRun, HostState, Kind, Outcome, Refusal};
use crate::bitmap::Bitmap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Blocks that are looked at in one go.
const LOOK_BLOCKS: u64 = 512;
/// For how long the VMM's memory policy is taken to be as it was. Reading it has the kernel walk
/// the page tables of the whole VMM, and it changes about never.
const POLICY_AGE: Duration = Duration::from_secs(10);

/// One region of a hugetlb file.
pub struct Hugetlb {
    home: Home,
    page_size: u64,
    pool: Arc<Pool>,
    /// Pages (or blocks, where those are larger) that were allocated here, by their number in the
    /// file.
    allocated: Mutex<Bitmap>,
    policy: Mutex<Option<(Instant, Result<Policy, ()>)>>,
    short: Mutex<Option<PoolState>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Hugetlb {
    /// Takes charge of a region in pages of `page_size` bytes, which come from `pool`.
    pub fn new(home: Home, page_size: u64, pool: Arc<Pool>) -> io::Result<Self> {
        // Where it cannot be told, the guest is taken to have no page set aside.
        let reserved = home.vmm.as_ref().is_some_and(|(vmm, addr)| vmm.reserves_at(*addr));
        pool.claim(&home.file, reserved)?;
        let unit = page_size.max(home.block_size()).max(1);
        let units = usize::try_from(home.file.metadata()?.len().div_ceil(unit));
        let this = Self {
            page_size,
            pool,
            allocated: Mutex::new(Bitmap::new(units.map_err(io::Error::other)?)),
            policy: Mutex::default(),
            short: Mutex::default(),
            home,
        };
        // Asked now for the sake of the finding.
        let _ = this.policy();
        Ok(this)
    }

    /// What can be allocated at once: a page, or a block of several.
    fn unit(&self) -> u64 {
        self.page_size.max(self.home.block_size()).max(1)
    }

    fn unit_of(&self, block: u64) -> usize {
        usize::try_from(self.home.offset(block) / self.unit()).unwrap_or(usize::MAX)
    }

    fn is_complete(&self) -> io::Result<bool> {
        let metadata = self.home.file.metadata()?;
        Ok(metadata.blocks().saturating_mul(512) >= metadata.len())
    }

    fn is_present(&self, block: u64) -> io::Result<bool> {
        let mut runs = Vec::new();
        self.scan(block..block + 1, &mut runs)?;
        Ok(runs.iter().all(|run| run.state == HostState::Hugetlb))
    }

    /// The policy under which pages are allocated for the VMM; `None` where it makes no
    /// difference.
    fn policy(&self) -> Result<Option<Policy>, Refusal> {
        if mempolicy::with_memory().len() < 2 {
            return Ok(None);
        }
        let mut known = lock(&self.policy);
        let policy = match *known {
            Some((at, policy)) if at.elapsed() < POLICY_AGE => policy,
            _ => {
                let policy = match &self.home.vmm {
                    Some((vmm, addr)) => mempolicy::of(vmm, *addr).map_err(|error| {
                        log::debug!("cannot tell the memory policy of the VMM: {error}");
                    }),
                    None => Err(()),
                };
                known.insert((Instant::now(), policy)).1
            }
        };
        policy.map(Some).map_err(|()| Refusal::NotPermitted)
    }

    /// Looks whether the pool can do without the page for a block that nobody may come to use.
    fn look_at_pool(&self, policy: Option<&Policy>) -> io::Result<PoolState> {
        let mut state = self.pool.look()?;
        if let Some(nodes) = policy.and_then(Policy::binding) {
            // What is set aside for a mapping is so on no node in particular: one that is bound
            // must find all of its pages on its own ones.
            let missing = missing_pages(&self.home.file, self.page_size)?;
            state.short |= missing > self.pool.free_on(nodes)?;
        }
        *lock(&self.short) = state.short.then_some(state);
        Ok(state)
    }

    /// How the VMM maps blocks; where it cannot be looked into, nothing is known to be mapped.
    fn mapped(&self, blocks: &Range<u64>) -> io::Result<Vec<Mapped>> {
        let count = usize::try_from(blocks.end - blocks.start).map_err(io::Error::other)?;
        let mut mapped = vec![Mapped::Nothing; count];
        if let Some((vmm, range)) = self.home.at_vmm(blocks) {
            let _unseen = vmm.mapped(range.start, self.home.block_shift, &mut mapped);
        }
        Ok(mapped)
    }

    fn populate_one(&self, block: u64) -> Outcome {
        let refuse = |error: io::Error| Refusal::from(&error);
        let mapped = self.mapped(&(block..block + 1)).map_err(refuse)?;
        if mapped != [Mapped::Nothing] || self.is_complete().map_err(refuse)? {
            return Ok(Collapsed::AlreadyHuge);
        }
        let policy = self.policy()?;
        // What was allocated here is there, unless the VMM took it away meanwhile (a balloon): to
        // allocate it once more takes nothing where it is, so that no shortage matters.
        let known = lock(&self.allocated).get(self.unit_of(block));
        if !known && self.look_at_pool(policy.as_ref()).map_err(refuse)?.short {
            return Err(Refusal::Space);
        }
        let from = self.home.offset(block) / self.unit() * self.unit();
        let allocate = || sys::allocate(&self.home.file, from, self.unit());
        let allocated = match &policy {
            None => allocate(),
            Some(policy) => mempolicy::under(policy, allocate).map_err(|error| {
                log::debug!("cannot take on the memory policy of the VMM: {error}");
                Refusal::NotPermitted
            })?,
        };
        lock(&self.allocated).assign(self.unit_of(block), allocated.is_ok());
        allocated.map_err(refuse)?;
        Ok(if known { Collapsed::AlreadyHuge } else { Collapsed::Populated })
    }
}

impl Backing for Hugetlb {
    fn kind(&self) -> Kind {
        Kind::Hugetlb { page_size: self.page_size }
    }

    fn file(&self) -> &File {
        &self.home.file
    }

    fn findings(&self) -> Vec<Finding> {
        let hidden = matches!(*lock(&self.policy), Some((_, Err(()))));
        let mut findings: Vec<Finding> = hidden.then(findings::policy_hidden).into_iter().collect();
        findings.extend(lock(&self.short).as_ref().map(findings::pool_short));
        findings
    }

    fn pool(&self) -> Option<PoolState> {
        // Where the policy cannot be told, nothing is allocated; the pool may be full.
        let policy = self.policy().ok().flatten();
        self.look_at_pool(policy.as_ref())
            .inspect_err(|error| log::debug!("cannot look at the pool of huge pages: {error}"))
            .ok()
    }

    /// A hole punched in a reserved mapping loses its reservation, and the VMM's next touch of it
    /// can be SIGBUS.
    fn may_discard(&self) -> bool {
        false
    }

    fn scan(&self, blocks: Range<u64>, out: &mut Vec<HostRun>) -> io::Result<()> {
        let complete = self.is_complete()?;
        let mut at = blocks.start;
        while at < blocks.end {
            let part = at..blocks.end.min(at + LOOK_BLOCKS);
            at = part.end;
            if complete {
                let count = u32::try_from(part.end - part.start).map_err(io::Error::other)?;
                let state = HostState::Hugetlb;
                push_run(out, HostRun { first: part.start, count, state, resident: 0 });
                continue;
            }
            let mapped = self.mapped(&part)?;
            let allocated = lock(&self.allocated);
            for (first, mapped) in part.zip(mapped) {
                let there = mapped != Mapped::Nothing || allocated.get(self.unit_of(first));
                let state = if there { HostState::Hugetlb } else { HostState::Absent };
                push_run(out, HostRun { first, count: 1, state, resident: 0 });
            }
        }
        Ok(())
    }

    /// A page of hugetlb is there, or is not.
    fn collapse(&self, blocks: Range<u64>, _: Holes, results: &mut Vec<(u64, Outcome)>) {
        for block in blocks {
            let outcome = match self.is_present(block) {
                Ok(true) => Ok(Collapsed::AlreadyHuge),
                Ok(false) => Err(Refusal::Absent),
                Err(error) => Err(Refusal::from(&error)),
            };
            results.push((block, outcome));
        }
    }

    /// Nothing is ever copied here.
    fn populate(&self, blocks: Range<u64>, _: &mut u64, results: &mut Vec<(u64, Outcome)>) {
        results.extend(blocks.map(|block| (block, self.populate_one(block))));
    }

    fn demote(&self, _block: u64) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }

    fn discard(&self, _bytes: Range<u64>) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }
}

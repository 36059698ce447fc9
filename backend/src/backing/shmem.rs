//! Memory that is a shmem file (memfd without hugetlb, tmpfs). Also other files, and memory that
//! the VMM maps privately: those are looked at, and never changed.
//!
//! What counts as huge: a block that the VMM's page tables map with one huge page; or one that
//! is a huge page of the file, and of which the VMM maps nothing, so that its next touch maps the
//! huge page (a collapse through our own mapping leaves blocks like this, and so does populating
//! one that the guest never touched). A huge page that the VMM maps by base pages is not: the
//! processor sees base pages there. Only a wholly resident block can be huge, so the others need
//! not be looked up in page tables.

use super::findings::{self, Finding};
use super::home::Home;
use super::ranges::{push_run, runs_of, Mapped};
use super::sys::{self, page_size, Advice, Cached};
use super::vmm::Permission;
use super::window::{Window, WINDOW_BLOCKS};
use super::{Backing, Collapsed, Holes, HostRun, HostState, Kind, Outcome, Refusal};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

/// Blocks that are looked at in one go: bounds the scratch memory.
const LOOK_BLOCKS: u64 = 512;
/// Most blocks in one collapse: each costs milliseconds, during which nothing stops it.
const COLLAPSE_BLOCKS: u64 = 16;

/// Through whose mapping blocks are collapsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route {
    /// The VMM's: charges stay with it.
    Vmm,
    /// Ours: charges move to us.
    Own,
    /// Nobody's: it would be pointless, or is not wanted.
    Closed(Refusal),
}

/// One region of a shmem file.
pub struct Shmem {
    home: Home,
    kind: Kind,
    route: Route,
    /// Whether the VMM could map a huge page of the file, as far as we know.
    usable: bool,
    /// Our own page tables, through which windows are looked at.
    own_pagemap: Option<Arc<File>>,
    /// The kernel's last word on a collapse at the VMM was EINVAL, without a reason in sight.
    refused: AtomicBool,
}

/// What a block turned out to be.
#[derive(Clone, Copy, Debug, Default)]
struct Look {
    cached: Cached,
    seen: Seen,
    /// It is one huge page of the file, however the VMM maps it; known where that was asked for.
    file_huge: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Seen {
    #[default]
    Absent,
    Base,
    Huge,
}

impl Look {
    fn is_swapped(&self) -> bool {
        self.cached.swapped > 0
    }
}

impl Shmem {
    /// Takes charge of a region and says what is wrong with it. `collapsible` is false where the
    /// host's huge pages are not of the size of blocks.
    pub fn new(
        home: Home,
        kind: Kind,
        collapsible: bool,
        own_pagemap: Option<Arc<File>>,
        said: &mut Vec<Finding>,
    ) -> io::Result<Self> {
        let route = choose_route(&home, kind, collapsible, said);
        let usable = !matches!(route, Route::Closed(_));
        let this = Self { home, kind, route, usable, own_pagemap, refused: AtomicBool::new(false) };
        if kind == Kind::Shmem {
            if let Some((room, holes)) = this.shortage()? {
                said.push(findings::too_small(room, holes));
            }
        }
        Ok(this)
    }

    /// How many bytes the filesystem has left, and how many the file may still need, where the
    /// former are fewer. A memfd's filesystem has no limit.
    fn shortage(&self) -> io::Result<Option<(u64, u64)>> {
        let system = sys::file_system(&self.home.file)?;
        if system.blocks == 0 {
            return Ok(None);
        }
        let metadata = self.home.file.metadata()?;
        let room = system.available.saturating_mul(system.block_size);
        let holes = metadata.len().saturating_sub(metadata.blocks().saturating_mul(512));
        Ok((room < holes).then_some((room, holes)))
    }

    /// Whether memory may be added to the file: never so much that the guest's own touch of what
    /// is still a hole would find the filesystem full, which kills it.
    fn has_room(&self) -> bool {
        matches!(self.shortage(), Ok(None))
    }

    /// Looks at blocks. With `probe_all` it is also found out whether blocks that the VMM maps by
    /// base pages are huge pages of the file.
    fn look(&self, blocks: &Range<u64>, probe_all: bool) -> io::Result<Vec<Look>> {
        let mut looks = vec![Look::default(); index(blocks, blocks.end)];
        let mut mapped = vec![Mapped::Nothing; looks.len()];
        let data = self.blocks_with_data(blocks)?;
        let Some(&first) = data.first() else { return Ok(looks) };
        // Counting the pages of a file costs some 50 ns a page, page tables a tenth of that; but
        // where pages are few it is the other way round. Where the first block is full, so are
        // its neighbours, likely, and the page tables are asked first: they may tell all.
        let first_cached = self.residency(first)?;
        let dense = self.is_full(first_cached);
        let mut visible = dense && self.look_at_vmm(blocks, &data, &mut mapped);
        let mut full = Vec::new();
        for block in data {
            let at = index(blocks, block);
            let cached = match mapped.get(at) {
                Some(Mapped::Huge | Mapped::Full) => {
                    Cached { resident: self.home.block_size() / page_size(), swapped: 0 }
                }
                _ if block == first => first_cached,
                _ => self.residency(block)?,
            };
            if self.is_full(cached) {
                full.push(block);
            }
            // Without any page it was dropped since, or its data is on a disk.
            if cached != Cached::default() {
                looks[at] = Look { cached, seen: Seen::Base, file_huge: false };
            }
        }
        if !dense {
            visible = self.look_at_vmm(blocks, &full, &mut mapped);
        }
        let mut doubtful = Vec::new();
        for block in full {
            let at = index(blocks, block);
            match mapped[at] {
                Mapped::Huge => {
                    looks[at].seen = Seen::Huge;
                    looks[at].file_huge = true;
                }
                Mapped::Nothing if self.usable => doubtful.push(block),
                _ if self.usable && (probe_all || !visible) => doubtful.push(block),
                _ => {}
            }
        }
        self.look_through_window(blocks, &doubtful, &mut looks);
        for block in doubtful {
            let at = index(blocks, block);
            if looks[at].file_huge && (!visible || mapped[at] == Mapped::Nothing) {
                looks[at].seen = Seen::Huge;
            }
        }
        Ok(looks)
    }

    /// The blocks that are not wholly holes: one system call for each. (To find their ends by
    /// SEEK_HOLE would walk through all of a resident guest.)
    fn blocks_with_data(&self, blocks: &Range<u64>) -> io::Result<Vec<u64>> {
        let start = self.home.offset(blocks.start);
        let end = start + self.home.bytes(blocks);
        let mut found = Vec::new();
        let mut at = start;
        while at < end {
            let Some(data) = sys::seek_data(&self.home.searched, at)?.filter(|data| *data < end)
            else {
                break;
            };
            let block = blocks.start + ((data.max(at) - start) >> self.home.block_shift);
            found.push(block);
            at = self.home.offset(block) + self.home.block_size();
        }
        Ok(found)
    }

    fn is_full(&self, cached: Cached) -> bool {
        cached.resident.saturating_mul(page_size()) >= self.home.block_size()
    }

    /// Pages of a block.
    fn residency(&self, block: u64) -> io::Result<Cached> {
        let (from, size) = (self.home.offset(block), self.home.block_size());
        match sys::cachestat(&self.home.file, from, size) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) => {
                residency_by_seeking(&self.home.searched, from, size)
            }
            other => other,
        }
    }

    /// Asks the VMM's page tables about some of `blocks`; whether they could be asked.
    fn look_at_vmm(&self, blocks: &Range<u64>, some: &[u64], mapped: &mut [Mapped]) -> bool {
        runs_of(some.iter().copied(), LOOK_BLOCKS).iter().all(|run| {
            let part = &mut mapped[index(blocks, run.start)..index(blocks, run.end)];
            let asked = self
                .home
                .at_vmm(run)
                .and_then(|(vmm, range)| vmm.mapped(range.start, self.home.block_shift, part));
            asked.is_some()
        })
    }

    /// Finds out whether wholly resident blocks are huge pages of the file.
    fn look_through_window(&self, blocks: &Range<u64>, doubtful: &[u64], looks: &mut [Look]) {
        for run in runs_of(doubtful.iter().copied(), WINDOW_BLOCKS) {
            let mut mapped = vec![Mapped::Nothing; index(&run, run.end)];
            if let Err(error) = self.probe(&run, &mut mapped) {
                log::debug!("cannot look at the memory file through a window: {error}");
            }
            for (block, mapped) in run.clone().zip(&mapped) {
                looks[index(blocks, block)].file_huge = *mapped == Mapped::Huge;
            }
        }
    }

    fn probe(&self, run: &Range<u64>, mapped: &mut [Mapped]) -> io::Result<()> {
        let Some(pagemap) = &self.own_pagemap else {
            return Ok(());
        };
        let count = run.end - run.start;
        let file = &self.home.file;
        let window = Window::new(file, self.home.offset(run.start), count, self.home.block_shift)?;
        for block in 0..count {
            // Maps the huge page where there is one. The block was resident when it was looked
            // at; should it have been dropped since, one page of zeros comes back.
            window.touch(block, Advice::PopulateRead)?;
        }
        window.mapped(pagemap, mapped)
    }

    /// Collapses resident blocks that lie together, at most [`COLLAPSE_BLOCKS`].
    fn collapse_run(&self, run: &Range<u64>, looks: &[Look]) -> Vec<Outcome> {
        let done = |look: &Look| {
            if look.file_huge {
                Ok(Collapsed::AlreadyHuge)
            } else {
                Ok(Collapsed::Copied { bytes: look.cached.resident * page_size() })
            }
        };
        let mut outcomes: Vec<Outcome> = looks.iter().map(done).collect();
        let mut rest = run.clone();
        while !rest.is_empty() {
            let Err(error) = self.collapse_call(&rest) else {
                self.refused.store(false, Ordering::Relaxed);
                break;
            };
            let refusal = Refusal::from(&error);
            let hopeless = matches!(refusal, Refusal::NotPermitted | Refusal::Gone);
            let now = if hopeless { None } else { self.look(&rest, true).ok() };
            let Some(now) = now else {
                outcomes[index(run, rest.start)..].fill(Err(refusal));
                break;
            };
            // The kernel goes on after some failures and stops at others, and tells one reason
            // for all: the first block that is not huge takes it, the rest is tried by itself.
            let Some(at) = now.iter().position(|look| !look.file_huge) else {
                break;
            };
            let blamed = rest.start + at as u64;
            outcomes[index(run, blamed)] = Err(match &now[at] {
                look if look.seen == Seen::Absent => Refusal::Absent,
                look if look.is_swapped() => Refusal::Again,
                _ => {
                    if refusal == Refusal::Unsupported && self.route == Route::Vmm {
                        self.refused.store(true, Ordering::Relaxed);
                    }
                    refusal
                }
            });
            rest.start = blamed + 1;
        }
        outcomes
    }

    fn collapse_call(&self, run: &Range<u64>) -> io::Result<()> {
        match (self.route, self.home.at_vmm(run)) {
            (Route::Vmm, Some((vmm, range))) => vmm.collapse(&range),
            (Route::Own, _) => {
                let count = run.end - run.start;
                let from = self.home.offset(run.start);
                Window::new(&self.home.file, from, count, self.home.block_shift)?
                    .advise(&(0..count), Advice::Collapse)
            }
            _ => Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
        }
    }

    /// What a look decides about a collapse; `None` if it is worth a try.
    fn verdict(&self, look: &Look, holes: Holes, room: &mut Option<bool>) -> Option<Outcome> {
        if look.seen == Seen::Absent {
            return Some(Err(Refusal::Absent));
        }
        if look.is_swapped() {
            return Some(Err(Refusal::Again));
        }
        // Through our own mapping nothing would change. At the VMM a collapse maps a huge page
        // that is not mapped as such, for next to nothing.
        if look.file_huge && self.route == Route::Own {
            return Some(Ok(Collapsed::AlreadyHuge));
        }
        if !self.is_full(look.cached) && holes == Holes::Leave {
            return Some(Err(Refusal::Holes));
        }
        if !self.is_full(look.cached) && !*room.get_or_insert_with(|| self.has_room()) {
            return Some(Err(Refusal::Space));
        }
        None
    }

    /// Collapses blocks, as far as they are resident: those of `fresh`, which hold one page that
    /// was just faulted in, and up to `leave` others.
    fn collapse_some(
        &self,
        blocks: &Range<u64>,
        fresh: &[u64],
        holes: Holes,
        leave: &mut u64,
        results: &mut Vec<(u64, Outcome)>,
    ) {
        let looks = match self.look(blocks, true) {
            Ok(looks) => looks,
            Err(error) => {
                results.extend(blocks.clone().map(|block| (block, Err(Refusal::from(&error)))));
                return;
            }
        };
        let mut room = None;
        let mut outcomes: Vec<Option<Outcome>> =
            looks.iter().map(|look| self.verdict(look, holes, &mut room)).collect();
        let open: Vec<u64> =
            blocks.clone().filter(|block| outcomes[index(blocks, *block)].is_none()).collect();
        // Contents are copied block by block: of a range in which several fail the kernel does not
        // tell which it tried, and each try costs a copy.
        let (costly, cheap): (Vec<u64>, Vec<u64>) = open.into_iter().partition(|block| {
            let look = &looks[index(blocks, *block)];
            !look.file_huge && (look.cached.resident > 1 || fresh.binary_search(block).is_err())
        });
        let mut runs = runs_of(cheap, COLLAPSE_BLOCKS);
        for block in costly {
            match leave.checked_sub(1) {
                Some(left) => {
                    *leave = left;
                    runs.push(block..block + 1);
                }
                None => outcomes[index(blocks, block)] = Some(Err(Refusal::Unaffordable)),
            }
        }
        for run in runs {
            let part = index(blocks, run.start)..index(blocks, run.end);
            let tried = self.collapse_run(&run, &looks[part.clone()]);
            for (outcome, tried) in outcomes[part].iter_mut().zip(tried) {
                *outcome = Some(tried);
            }
        }
        for (block, outcome) in blocks.clone().zip(outcomes) {
            results.push((block, outcome.unwrap_or(Err(Refusal::Again))));
        }
    }

    /// Faults in one page of each of `absent`, which are some of the blocks of `run`; what came of
    /// each.
    fn touch(&self, run: &Range<u64>, absent: &[u64]) -> io::Result<Vec<io::Result<()>>> {
        let home = &self.home;
        let count = run.end - run.start;
        let window = Window::new(&home.file, home.offset(run.start), count, home.block_shift)?;
        // A huge page faulted in here would be charged to us. Where the collapse is made at the
        // VMM, one base page is enough: it is freed by the collapse, whose page the VMM pays.
        let advice = match self.route {
            Route::Vmm => Advice::NoHugepage,
            _ => Advice::Hugepage,
        };
        window.advise(&(0..count), advice)?;
        Ok(absent
            .iter()
            .map(|block| window.touch(block - run.start, Advice::PopulateWrite))
            .collect())
    }

    fn populate_some(&self, run: &Range<u64>, leave: &mut u64, results: &mut Vec<(u64, Outcome)>) {
        let refuse = |error: &io::Error| Refusal::from(error);
        let looks = match self.look(run, true) {
            Ok(looks) => looks,
            Err(error) => {
                results.extend(run.clone().map(|block| (block, Err(refuse(&error)))));
                return;
            }
        };
        let blocks = run.clone().zip(&looks);
        let absent: Vec<u64> =
            blocks.filter(|(_, look)| look.seen == Seen::Absent).map(|(block, _)| block).collect();
        // Should a collapse fail, the one page stays: to drop it again could drop what the guest
        // has written there meanwhile.
        let touched: Vec<Option<Refusal>> = match self.has_room() {
            false => vec![Some(Refusal::Space); absent.len()],
            true if absent.is_empty() => Vec::new(),
            true => match self.touch(run, &absent) {
                Ok(touched) => touched.iter().map(|t| t.as_ref().err().map(refuse)).collect(),
                Err(error) => vec![Some(refuse(&error)); absent.len()],
            },
        };
        let mut collapsed = Vec::new();
        self.collapse_some(run, &absent, Holes::Fill, leave, &mut collapsed);
        for (block, outcome) in collapsed {
            let at = absent.binary_search(&block);
            let refused = at.ok().and_then(|at| touched.get(at).copied().flatten());
            let outcome = match (outcome, at.is_ok(), refused) {
                // Used by the guest in between.
                (Ok(Collapsed::Copied { bytes }), true, _) if bytes > page_size() => {
                    Ok(Collapsed::Copied { bytes })
                }
                (Ok(_), true, _) => Ok(Collapsed::Populated),
                (Err(Refusal::Absent), _, Some(refused)) => Err(refused),
                // Dropped by the guest in between.
                (Err(Refusal::Absent), _, None) => Err(Refusal::Again),
                (outcome, _, _) => outcome,
            };
            results.push((block, outcome));
        }
    }
}

impl Backing for Shmem {
    fn kind(&self) -> Kind {
        self.kind
    }

    fn file(&self) -> &File {
        &self.home.file
    }

    fn findings(&self) -> Vec<Finding> {
        let refused = self.refused.load(Ordering::Relaxed);
        let vmm = self.home.vmm.as_ref().filter(|_| refused);
        vmm.map(|(vmm, _)| findings::refused(vmm.pid())).into_iter().collect()
    }

    fn faults(&self) -> Option<u64> {
        self.home.vmm.as_ref()?.0.faults()
    }

    fn may_discard(&self) -> bool {
        self.kind == Kind::Shmem
    }

    fn scan(&self, blocks: Range<u64>, out: &mut Vec<HostRun>) -> io::Result<()> {
        for part in parts(&blocks, LOOK_BLOCKS) {
            for (first, look) in part.clone().zip(self.look(&part, false)?) {
                let (state, resident) = match look.seen {
                    Seen::Absent => (HostState::Absent, 0),
                    Seen::Base => {
                        (HostState::Base, u32::try_from(look.cached.resident).unwrap_or(u32::MAX))
                    }
                    Seen::Huge => (HostState::Huge, 0),
                };
                push_run(out, HostRun { first, count: 1, state, resident });
            }
        }
        Ok(())
    }

    fn collapse(&self, blocks: Range<u64>, holes: Holes, results: &mut Vec<(u64, Outcome)>) {
        if let Route::Closed(refusal) = self.route {
            results.extend(blocks.map(|block| (block, Err(refusal))));
            return;
        }
        let mut leave = u64::MAX;
        for part in parts(&blocks, COLLAPSE_BLOCKS) {
            self.collapse_some(&part, &[], holes, &mut leave, results);
        }
    }

    fn populate(&self, blocks: Range<u64>, leave: &mut u64, results: &mut Vec<(u64, Outcome)>) {
        if let Route::Closed(refusal) = self.route {
            results.extend(blocks.map(|block| (block, Err(refusal))));
            return;
        }
        for part in parts(&blocks, COLLAPSE_BLOCKS) {
            self.populate_some(&part, leave, results);
        }
    }

    fn demote(&self, block: u64) -> io::Result<()> {
        // Through our own mapping it would be shared, and the kernel splits nothing.
        match (self.route, self.home.at_vmm(&(block..block + 1))) {
            (Route::Vmm, Some((vmm, range))) => vmm.split(range.start),
            _ => Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
        }
    }

    fn discard(&self, bytes: Range<u64>) -> io::Result<()> {
        if !self.may_discard() {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        let from = self.home.offset_of(bytes.start);
        sys::punch_hole(&self.home.file, from, bytes.end - bytes.start)
    }
}

/// Decides through whose mapping blocks are collapsed, and says why where it is not the VMM's.
fn choose_route(home: &Home, kind: Kind, collapsible: bool, said: &mut Vec<Finding>) -> Route {
    if kind != Kind::Shmem || !collapsible {
        return Route::Closed(Refusal::Unsupported);
    }
    let Some((vmm, addr)) = &home.vmm else {
        return Route::Own;
    };
    let region_start = addr.wrapping_sub(home.file_offset);
    if region_start & (home.block_size() - 1) != 0 {
        said.push(findings::unaligned(vmm.pid(), region_start, home.block_shift));
        return Route::Closed(Refusal::Unsupported);
    }
    if vmm.declines_huge_pages() {
        said.push(findings::declined(vmm.pid(), "PR_SET_THP_DISABLE"));
        return Route::Closed(Refusal::Unsupported);
    }
    if !vmm.is_visible() {
        said.push(findings::not_visible(vmm.pid()));
    }
    let finding = match vmm.permission() {
        Permission::Granted => return Route::Vmm,
        Permission::NotNice => findings::not_nice(vmm.pid()),
        Permission::NotTraceable => findings::not_traceable(vmm.pid()),
        Permission::Unavailable => findings::collapse_unavailable(vmm.pid()),
    };
    // Through our own mapping the kernel would not notice that the VMM declined.
    if vmm.declines_huge_pages_at(*addr) == Some(true) {
        said.push(findings::declined(vmm.pid(), "MADV_NOHUGEPAGE"));
        return Route::Closed(Refusal::Unsupported);
    }
    said.push(finding);
    Route::Own
}

/// The same without cachestat (a seccomp filter may not know it): swapped pages count as
/// resident, and the last SEEK_HOLE may walk beyond the block.
fn residency_by_seeking(file: &File, from: u64, size: u64) -> io::Result<Cached> {
    let end = from + size;
    let mut bytes = 0;
    let mut at = from;
    while at < end {
        let Some(data) = sys::seek_data(file, at)?.filter(|data| *data < end) else {
            break;
        };
        let hole = sys::seek_hole(file, data)?.unwrap_or(end).clamp(data, end);
        bytes += hole - data;
        if hole == data {
            break; // dropped while we looked
        }
        at = hole;
    }
    Ok(Cached { resident: bytes / page_size(), swapped: 0 })
}

/// Position of a block in a range of blocks.
fn index(blocks: &Range<u64>, block: u64) -> usize {
    usize::try_from(block.saturating_sub(blocks.start)).unwrap_or(usize::MAX)
}

/// Cuts a range into parts of at most `most` blocks.
fn parts(blocks: &Range<u64>, most: u64) -> impl Iterator<Item = Range<u64>> {
    let (mut at, end) = (blocks.start, blocks.end);
    std::iter::from_fn(move || {
        let part = at..end.min(at.saturating_add(most));
        at = part.end;
        (!part.is_empty()).then_some(part)
    })
}

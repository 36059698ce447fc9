//! One pass: look at all processes, plan, promote.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader};
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use crate::backoff::Backoff;
use crate::blocks::{self, HostHuge};
use crate::kernel::{self, Geometry, Thp};
use crate::pace::Pace;
use crate::pagemap::{Occupancy, Pagemap};
use crate::plan::{self, Candidate, Run, Shortlist, Skip};
use crate::process::{self, Flags, Identity, Refusal};
use crate::quiet::Quiet;
use crate::report::{Outcome, Planned, Report};
use crate::sys::{self, Pidfd};
use crate::{cgroup, fmfi};

/// Ranges that one pass plans; what is left over is found again by the next
/// one. 4 GiB are more than half a minute's work at the default rate.
const PLAN_LIMIT: usize = 2048;

/// Most blocks of one call: each call makes every CPU drain its lists of pages,
/// and each block in it stalls its owner for as long as it is copied.
const LONGEST_RUN: u64 = 16;

/// Blocks that must be left of a process's memory limit.
const HEADROOM_BLOCKS: u64 = 2;

/// What the agent is told to do.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Bytes a second.
    pub rate: u64,
    /// Plan, and promote nothing.
    pub dry_run: bool,
    /// Only these processes; all where there are none.
    pub pids: Vec<i32>,
}

/// Looks and promotes, again and again.
pub struct Promoter {
    settings: Settings,
    geometry: Geometry,
    pace: Pace,
    backoff: Backoff,
    quiet: Quiet,
}

/// A process that is being promoted.
struct Target {
    process: Identity,
    pidfd: Pidfd,
    pagemap: Pagemap,
}

impl Target {
    /// # Errors
    /// If `process` is gone, though another may have its number.
    fn open(process: Identity, geometry: Geometry) -> io::Result<Self> {
        let pidfd = Pidfd::open(process.pid)?;
        let pagemap = Pagemap::open(process.pid, geometry)?;
        // Checked last: what was opened before belongs to this process then.
        if Identity::read(process.pid)? != process {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        Ok(Target { process, pidfd, pagemap })
    }
}

impl Promoter {
    /// A promoter that has seen nothing yet.
    #[must_use]
    pub fn new(settings: Settings, geometry: Geometry, pace: Pace) -> Self {
        Promoter { settings, geometry, pace, backoff: Backoff::default(), quiet: Quiet::default() }
    }

    /// The clock, and whether to end.
    pub fn pace(&mut self) -> &mut Pace {
        &mut self.pace
    }

    /// Looks at all processes and promotes what it finds, for about `limit`
    /// where one is given.
    ///
    /// # Errors
    /// Interrupted if a signal asks to end; or if the kernel does not show what
    /// is needed.
    pub fn pass(&mut self, limit: Option<Duration>) -> anyhow::Result<Report> {
        let begin = self.pace.now();
        let cpu = sys::cpu_time()?;
        let mut report = Report {
            version: env!("CARGO_PKG_VERSION"),
            dry_run: self.settings.dry_run,
            thp: Thp::read(self.geometry.block)?,
            fmfi: self.fmfi()?,
            driver: blocks::is_there(Path::new(blocks::DRIVER)),
            host_huge_blocks: 0,
            unchanged: false,
            processes: 0,
            quiet: 0,
            unreadable: 0,
            opted_out_processes: 0,
            skipped: BTreeMap::new(),
            ranges: Vec::new(),
            promoted: 0,
            failed: 0,
            ended_early: false,
            seconds: 0.0,
            cpu_seconds: 0.0,
        };
        self.backoff.tidy(begin);
        self.quiet.begin(report.thp, report.fmfi <= fmfi::PREALLOCATION_LIMIT, begin);
        // Nobody is to have huge pages: nothing to look for.
        if report.thp != Thp::Never {
            let plan = self.survey(&mut report)?;
            self.carry_out(plan, limit.map(|limit| begin.saturating_add(limit)), &mut report)?;
        }
        report.seconds = self.pace.now().saturating_sub(begin).as_secs_f64();
        report.cpu_seconds = sys::cpu_time()?.saturating_sub(cpu).as_secs_f64();
        Ok(report)
    }

    /// How fragmented free memory is, for huge pages of processes.
    fn fmfi(&self) -> io::Result<f64> {
        fmfi::read(self.geometry.order(), blocks::ready(Path::new(blocks::SETTINGS)))
    }

    fn survey(&mut self, report: &mut Report) -> io::Result<Vec<Run>> {
        let mut shortlist = Shortlist::new(PLAN_LIMIT);
        let pages = kernel::anonymous_pages(self.geometry)?;
        report.unchanged = self.quiet.contains_all(pages, self.geometry);
        if report.unchanged {
            return Ok(Vec::new());
        }
        let mut all_quiet = true;
        let mut host_huge = None;
        let own = i32::try_from(std::process::id()).unwrap_or(-1);
        for pid in process::all()? {
            let wanted = self.settings.pids.is_empty() || self.settings.pids.contains(&pid);
            if pid == own || !wanted {
                continue;
            }
            match self.survey_process(pid, &mut host_huge, &mut shortlist, report) {
                Ok(is_quiet) => all_quiet &= is_quiet,
                Err(error) if self.pace.stopped() => return Err(error),
                // Older kernels lack what this cannot work without.
                Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
                    return Err(io::Error::other(
                        "this kernel does not scan page tables (PAGEMAP_SCAN): Linux 6.7 or \
                         newer is needed",
                    ));
                }
                Err(error) => {
                    log::debug!("process {pid} is left alone: {error}");
                    report.unreadable += 1;
                }
            }
            self.pace.rest()?;
        }
        self.quiet.insert_all(all_quiet, pages, self.pace.now());
        // Long runs, but no more at a time than a quarter of a second's rate.
        let longest = (self.settings.rate / 4 / self.geometry.block).clamp(1, LONGEST_RUN);
        Ok(shortlist.plan(usize::try_from(longest).unwrap_or(1), self.geometry))
    }

    /// Looks at one process, and tells whether it has nothing to promote before its
    /// memory changes.
    fn survey_process(
        &mut self,
        pid: i32,
        host_huge: &mut Option<HostHuge>,
        shortlist: &mut Shortlist,
        report: &mut Report,
    ) -> io::Result<bool> {
        // Kernel threads have none, small processes not enough.
        let pages = process::anonymous_pages(pid)?;
        if pages < self.geometry.pages() / 2 {
            return Ok(true);
        }
        let process = Identity::read(pid)?;
        if self.quiet.contains(process, pages, self.geometry) {
            report.quiet += 1;
            return Ok(true);
        }
        if !process::allows_huge_pages(pid)? {
            report.opted_out_processes += 1;
            return Ok(true);
        }
        let pagemap = Pagemap::open(pid, self.geometry)?;
        let mut flags = None;
        // What may change without a change of the memory's size is no reason to
        // look away.
        let mut is_quiet = true;
        report.processes += 1;
        for mapping in process::mappings(pid)? {
            let Some(range) = whole_blocks(&mapping, self.geometry.block) else { continue };
            pagemap.blocks(&range, |address, occupancy| {
                self.pace.rest()?;
                let block = address..address + self.geometry.block;
                let judged = match plan::judge(&occupancy, report.fmfi, self.geometry) {
                    Ok(()) if self.backoff.rests(process, address, self.pace.now()) => {
                        Err(Skip::Resting)
                    }
                    Ok(()) => allowed(&mut flags, pid, &block, report.thp)?,
                    Err(reason) => Err(reason),
                };
                is_quiet &= matches!(judged, Err(Skip::Sparse | Skip::Fragmented));
                if let Err(reason) = judged {
                    report.skip(reason);
                    return Ok(());
                }
                // The driver is asked only where there is something to promote.
                let host_huge = host_huge.get_or_insert_with(|| {
                    let map = HostHuge::read(Path::new(blocks::DRIVER)).unwrap_or_default();
                    report.host_huge_blocks = map.count();
                    map
                });
                let on_host_huge = |number| host_huge.contains(number);
                let placement = pagemap.placement(address, occupancy.zero, on_host_huge)?;
                if placement.shared > 0 {
                    report.skip(Skip::Shared);
                    return Ok(());
                }
                shortlist.push(Candidate::new(
                    process,
                    address,
                    &occupancy,
                    &placement,
                    self.geometry,
                ));
                Ok(())
            })?;
        }
        if is_quiet {
            self.quiet.insert(process, pages, self.pace.now());
        }
        Ok(is_quiet)
    }

    fn carry_out(
        &mut self,
        plan: Vec<Run>,
        deadline: Option<Duration>,
        report: &mut Report,
    ) -> io::Result<()> {
        let mut target: Option<Target> = None;
        for run in plan {
            let late = deadline.is_some_and(|deadline| self.pace.now() >= deadline);
            if report.ended_early || late {
                report.ended_early = true;
                note(report, &run, &Outcome::NotTried);
            } else if self.settings.dry_run {
                note(report, &run, &Outcome::Planned);
            } else {
                if target.as_ref().is_none_or(|target| target.process != run.process()) {
                    target = Target::open(run.process(), self.geometry).ok();
                }
                match &target {
                    Some(target) => self.promote(target, run, report),
                    None => note(report, &run, &Outcome::Gone),
                }
                self.pace.rest()?;
            }
        }
        Ok(())
    }

    /// Promotes a run, except for what has changed since it was planned.
    fn promote(&mut self, target: &Target, run: Run, report: &mut Report) {
        let fmfi = self.fmfi().unwrap_or(1.0);
        let now = self.pace.now();
        // The survey may be half a minute old.
        let pieces = run.split(|block| match look_again(target, block, fmfi, self.geometry) {
            Ok(()) => true,
            Err(outcome) => {
                report.ranges.push(Planned::new(block, outcome));
                false
            }
        });
        for piece in pieces {
            if report.ended_early {
                note(report, &piece, &Outcome::NotTried);
            } else if !has_headroom(&piece, self.geometry) {
                for block in piece.blocks() {
                    self.backoff.failed(piece.process(), block.address, now);
                }
                note(report, &piece, &Outcome::Skipped(Skip::Headroom));
            } else {
                self.collapse(target, &piece, report);
            }
        }
    }

    fn collapse(&mut self, target: &Target, piece: &Run, report: &mut Report) {
        let result = target.pidfd.collapse(&piece.range(self.geometry));
        let error = result.err();
        // No free huge page: asking for more would only stir memory up.
        report.ended_early |=
            error.as_ref().is_some_and(|error| error.raw_os_error() == Some(libc::ENOMEM));
        let now = self.pace.now();
        for block in piece.blocks() {
            // Page tables tell what was done; a failed call may have done some.
            let range = block.address..block.address + self.geometry.block;
            let outcome = match (target.pagemap.huge_bytes(&range), &error) {
                (Ok(bytes), _) if bytes == self.geometry.block => Outcome::Promoted,
                (Err(_), _) | (_, None) => Outcome::Gone,
                (_, Some(error)) if error.raw_os_error() == Some(libc::ESRCH) => Outcome::Gone,
                (_, Some(error)) => Outcome::Failed(error.to_string()),
            };
            match &outcome {
                Outcome::Promoted => {
                    report.promoted += 1;
                    self.pace.copied(self.geometry.block);
                }
                Outcome::Failed(error) => {
                    let (pid, address) = (piece.process().pid, block.address);
                    log::debug!("process {pid}, {address:#x}: {error}");
                    report.failed += 1;
                    self.backoff.failed(piece.process(), block.address, now);
                }
                _ => {}
            }
            report.ranges.push(Planned::new(block, outcome));
        }
    }
}

/// Notes the same outcome for all of `run`.
fn note(report: &mut Report, run: &Run, outcome: &Outcome) {
    report.ranges.extend(run.blocks().iter().map(|block| Planned::new(block, outcome.clone())));
}

/// The whole blocks inside of `mapping`, if there is one.
fn whole_blocks(mapping: &Range<u64>, block: u64) -> Option<Range<u64>> {
    let start = mapping.start.checked_next_multiple_of(block)?;
    let end = mapping.end - mapping.end % block;
    (start < end).then_some(start..end)
}

/// What the flags of the mapping say, which are opened when first needed.
fn allowed(
    flags: &mut Option<Flags<BufReader<File>>>,
    pid: i32,
    block: &Range<u64>,
    thp: Thp,
) -> io::Result<Result<(), Skip>> {
    let flags = match flags {
        Some(flags) => flags,
        None => flags.insert(Flags::open(pid, thp)?),
    };
    Ok(flags.allow(block)?.map_err(|refusal| match refusal {
        Refusal::OptedOut => Skip::OptedOut,
        Refusal::Userfaultfd => Skip::Userfaultfd,
        Refusal::Special => Skip::Special,
    }))
}

/// Judges a planned range as it is now. (Opt-outs by madvise and prctl that came
/// in between are enforced by the kernel itself.)
fn look_again(
    target: &Target,
    block: &Candidate,
    fmfi: f64,
    geometry: Geometry,
) -> Result<(), Outcome> {
    let range = block.address..block.address + geometry.block;
    let mut occupancy = Occupancy::default();
    let seen = target.pagemap.blocks(&range, |_, found| {
        occupancy = found;
        Ok(())
    });
    seen.map_err(|_| Outcome::Gone)?;
    plan::judge(&occupancy, fmfi, geometry).map_err(Outcome::Skipped)?;
    let placement = target.pagemap.placement(block.address, occupancy.zero, |_| false);
    match placement {
        Ok(placement) if placement.shared == 0 => Ok(()),
        Ok(_) => Err(Outcome::Skipped(Skip::Shared)),
        Err(_) => Err(Outcome::Gone),
    }
}

/// Whether the process's control groups, and the system, can spare what a run
/// takes: the copy of a block for a moment, and missing pages for good.
fn has_headroom(run: &Run, geometry: Geometry) -> bool {
    let missing: u64 =
        run.blocks().iter().map(|block| geometry.pages().saturating_sub(block.present)).sum();
    let needed = HEADROOM_BLOCKS * geometry.block + missing * geometry.page;
    // What cannot be read is no permission.
    let group = cgroup::headroom(run.process().pid).unwrap_or(0);
    group.min(kernel::available().unwrap_or(0)) >= needed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_blocks_of_a_mapping_count() {
        assert_eq!(whole_blocks(&(1..40), 10), Some(10..40));
        assert_eq!(whole_blocks(&(10..29), 10), Some(10..20));
        assert_eq!(whole_blocks(&(11..29), 10), None);
        assert_eq!(whole_blocks(&(u64::MAX - 3..u64::MAX), 10), None);
    }
}

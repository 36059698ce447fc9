//! What can be seen of guest memory and of the daemon from outside, without
//! asking the daemon.

use std::fs::File;
use std::io;
use std::ops::Range;

use anyhow::Context;
use gemini_pagemap::HUGE;

use crate::memory::{GuestMemory, BLOCK_SHIFT, BLOCK_SIZE};
use crate::sys;
use crate::wire::host_state;

/// The host state of every block of the memory file, from the page tables of
/// this process (it stands for the monitor) and from the holes of the file.
///
/// The guest's next access maps what was collapsed behind its back; so that this
/// does not depend on which access came last, all that is resident is read once
/// before (holes are not: reading would fill them).
///
/// # Errors
/// If the page tables cannot be looked at; Linux 6.7 is needed for that.
pub fn host_states(memory: &GuestMemory) -> anyhow::Result<Vec<u8>> {
    let blocks = usize::try_from(memory.blocks())?;
    let mut states = vec![host_state::ABSENT; blocks];
    let size = memory.mapping().len();
    let mut position = 0;
    while let Some(start) = sys::seek(memory.file(), position, true)? {
        let end = sys::seek(memory.file(), start, false)?.unwrap_or(size);
        populate(memory, start, end)?;
        for block in (start >> BLOCK_SHIFT)..end.div_ceil(BLOCK_SIZE) {
            states[usize::try_from(block)?] = host_state::BASE;
        }
        position = end;
        if position >= size {
            break;
        }
    }
    let pagemap = File::open("/proc/self/pagemap").context("cannot open own pagemap")?;
    let base = memory.host_address(0);
    let huge = gemini_pagemap::ranges(&pagemap, &(base..base + size), HUGE)
        .context("cannot scan own page tables (PAGEMAP_SCAN; Linux 6.7 or newer is needed)")?;
    for Range { start, end } in huge {
        let first = (start - base).div_ceil(BLOCK_SIZE);
        for block in first..(end - base) >> BLOCK_SHIFT {
            states[usize::try_from(block)?] = host_state::HUGE;
        }
    }
    Ok(states)
}

fn populate(memory: &GuestMemory, start: u64, end: u64) -> anyhow::Result<()> {
    match memory.mapping().advise(start, end - start, libc::MADV_POPULATE_READ) {
        // A page that was resident a moment ago may be gone or hidden now;
        // looking on is right, as the scan decides.
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        other => other.context("cannot read resident guest memory"),
    }
}

/// What /proc tells of a process.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ProcessFigures {
    /// Anonymous memory in bytes.
    pub rss_anon: u64,
    /// Page tables in bytes.
    pub page_tables: u64,
    /// Open descriptors.
    pub descriptors: u64,
    /// Threads.
    pub threads: u64,
    /// CPU time, user and system, in seconds.
    pub cpu_seconds: f64,
}

impl ProcessFigures {
    /// Reads them for the process `pid`.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn of(pid: u32) -> anyhow::Result<Self> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))
            .with_context(|| format!("process {pid} is gone"))?;
        let field = |name: &str| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
                .with_context(|| format!("no {name} in /proc/{pid}/status"))
        };
        Ok(ProcessFigures {
            rss_anon: field("RssAnon")? * 1024,
            page_tables: field("VmPTE")? * 1024,
            descriptors: std::fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64,
            threads: field("Threads")?,
            cpu_seconds: Self::cpu_seconds_of(pid)?,
        })
    }

    /// Only [`ProcessFigures::cpu_seconds`], of the process `pid`.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn cpu_seconds_of(pid: u32) -> anyhow::Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))
            .with_context(|| format!("process {pid} is gone"))?;
        // The name in parentheses may contain anything; fields count behind it.
        let fields: Vec<&str> = stat
            .rsplit_once(") ")
            .map(|(_, rest)| rest.split_whitespace().collect())
            .unwrap_or_default();
        let ticks = |index: usize| {
            fields
                .get(index)
                .and_then(|field| field.parse::<u64>().ok())
                .with_context(|| format!("no CPU times in /proc/{pid}/stat"))
        };
        Ok((ticks(11)? + ticks(12)?) as f64 / sys::clock_ticks())
    }
}

/// CPU time of a process so far, in seconds. Finer than
/// [`ProcessFigures::cpu_seconds`], which counts clock ticks.
///
/// # Errors
/// If the process is gone.
pub fn fine_cpu_seconds(pid: u32) -> anyhow::Result<f64> {
    let time = sys::process_cpu_time(pid);
    Ok(time.with_context(|| format!("cannot read the CPU clock of process {pid}"))?.as_secs_f64())
}

/// Memory of a process that no other one has a part in, with its page tables, in
/// bytes.
///
/// # Errors
/// If the process is gone.
pub fn private_memory(pid: u32) -> anyhow::Result<u64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let kib = |name: &str| {
        text.lines()
            .find_map(|line| {
                line.strip_prefix(name)?.split_whitespace().next()?.parse::<u64>().ok()
            })
            .with_context(|| format!("no {name} in {path}"))
    };
    let pages = kib("Private_Clean:")? + kib("Private_Dirty:")?;
    Ok(pages * 1024 + ProcessFigures::of(pid)?.page_tables)
}

/// Memory that can be used without swapping, in bytes.
///
/// # Errors
/// If /proc/meminfo does not tell.
pub fn available_memory() -> anyhow::Result<u64> {
    std::fs::read_to_string("/proc/meminfo")?
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
        .map(|kib| kib * 1024)
        .context("no MemAvailable in /proc/meminfo")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Placement;

    #[test]
    fn holes_and_base_pages_are_told_apart() {
        let memory = GuestMemory::new(4 * BLOCK_SIZE, Placement::Aligned).expect("memory");
        memory.mapping().advise(0, 4 * BLOCK_SIZE, libc::MADV_NOHUGEPAGE).expect("advice");
        memory.write(BLOCK_SIZE + 8192, &[1]);
        let states = host_states(&memory).expect("scan");
        assert_eq!(
            states,
            [host_state::ABSENT, host_state::BASE, host_state::ABSENT, host_state::ABSENT]
        );
        assert_eq!(memory.resident_bytes().expect("stat"), 4096);
    }

    #[test]
    fn own_figures_can_be_read() {
        let figures = ProcessFigures::of(std::process::id()).expect("own process");
        assert!(figures.rss_anon > 0 && figures.threads > 0 && figures.descriptors > 2);
    }
}

//! What a run costs guest and host.

use std::fs;

use anyhow::Context;

use super::policy::Setup;
use super::record::Costs;
use crate::lab::Lab;
use crate::{outside, BLOCK, MIB};

/// Threads of the host's kernel that make huge pages and room for them.
const HOST_THREADS: [&str; 3] = ["khugepaged", "kcompactd", "kswapd"];

/// The parent of all threads of a kernel, which is one itself.
const KTHREADD: u64 = 2;

/// The promoter's process in the guest.
const PROMOTER: &str = "gemini-guestd";

/// Ticks a second in /proc/PID/stat, on every x86-64 kernel.
const TICKS: f64 = 100.0;

/// Counters when a run began.
#[derive(Debug)]
pub struct Meter {
    start: Reading,
    by_kernel: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Reading {
    collapses: u64,
    populated: u64,
    daemon: f64,
    host_kernel: f64,
    guest_kernel: Option<f64>,
    moved: Option<u64>,
}

impl Meter {
    /// Costs count from now on.
    ///
    /// # Errors
    /// If one cannot be read.
    pub fn start(lab: &Lab, setup: &Setup) -> anyhow::Result<Self> {
        // Else what the host's khugepaged does has nothing to do with guests.
        let by_kernel = setup.shmem == "always";
        Ok(Meter { start: Reading::take(lab, by_kernel)?, by_kernel })
    }

    /// What was spent since, and what is held now.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn finish(&self, lab: &Lab, setup: &Setup) -> anyhow::Result<Costs> {
        let (now, start) = (Reading::take(lab, self.by_kernel)?, self.start);
        let memory = lab.vm.guest.memory()?;
        let used = memory["MemTotal"].saturating_sub(memory["MemAvailable"]);
        // What is set aside is of use to nobody else, touched or not.
        let resident =
            if setup.hugetlb { lab.vm.config.memory } else { lab.memory.resident_bytes()? };
        let mib = |bytes: u64| bytes as f64 / MIB as f64;
        let populated = now.populated - start.populated;
        let copied = now.collapses.saturating_sub(start.collapses + populated);
        let guest_kernel = now.guest_kernel.zip(start.guest_kernel);
        Ok(Costs {
            host_rss_mib: mib(resident),
            guest_used_mib: mib(used),
            copied_mib: mib(copied * BLOCK),
            daemon_cpu_seconds: now.daemon - start.daemon,
            host_kernel_cpu_seconds: now.host_kernel - start.host_kernel,
            // A thread that ended meanwhile takes its time with it.
            guest_kernel_cpu_seconds: guest_kernel.map(|(now, start)| (now - start).max(0.0)),
            moved_blocks: now.moved.zip(start.moved).map(|(now, start)| now - start),
        })
    }
}

impl Reading {
    fn take(lab: &Lab, by_kernel: bool) -> anyhow::Result<Self> {
        let guest = &lab.vm.guest;
        // By the word of the host's kernel: of all huge pages that it made for a collapse, only
        // those that the daemon populated held nothing to be copied.
        let mut collapses = outside::requested_collapses()?;
        if by_kernel {
            collapses += outside::khugepageds_collapses()?;
        }
        let populated = lab.daemon.status()?.populated;
        // A process may end while its file is looked for.
        let stats = guest.shell("cat /proc/[0-9]*/stat 2>/dev/null; true")?;
        let is_counted = |task: &Task| task.is_kernel() || task.name == PROMOTER;
        let moved = match lab.vm.config.driver {
            true => Some(guest.driver_number("moved")?),
            false => None,
        };
        Ok(Reading {
            collapses,
            populated,
            daemon: lab.daemon.process.cpu_seconds()?,
            host_kernel: host_kernel()?,
            guest_kernel: Some(cpu_seconds(&stats, is_counted)),
            moved,
        })
    }
}

fn host_kernel() -> anyhow::Result<f64> {
    let mut stats = String::new();
    for entry in fs::read_dir("/proc").context("cannot read /proc")? {
        // Processes come and go.
        stats += &fs::read_to_string(entry?.path().join("stat")).unwrap_or_default();
    }
    let is_counted = |task: &Task| {
        task.is_kernel() && HOST_THREADS.iter().any(|name| task.name.starts_with(name))
    };
    Ok(cpu_seconds(&stats, is_counted))
}

/// A line of `/proc/PID/stat`.
struct Task<'a> {
    name: &'a str,
    parent: u64,
    ticks: u64,
}

impl<'a> Task<'a> {
    /// The name may hold anything but a new line, so fields are counted from its
    /// last parenthesis.
    fn parse(line: &'a str) -> Option<Self> {
        let (front, rest) = line.rsplit_once(')')?;
        let (_, name) = front.split_once('(')?;
        let mut fields = rest.split_whitespace().skip(1);
        let parent = fields.next()?.parse().ok()?;
        let mut times = fields.skip(9);
        let user: u64 = times.next()?.parse().ok()?;
        let system: u64 = times.next()?.parse().ok()?;
        Some(Task { name, parent, ticks: user + system })
    }

    fn is_kernel(&self) -> bool {
        self.parent == KTHREADD
    }
}

/// CPU time, user and system, of those of the tasks in `stats` that count.
fn cpu_seconds(stats: &str, is_counted: impl Fn(&Task) -> bool) -> f64 {
    let tasks = stats.lines().filter_map(Task::parse).filter(is_counted);
    tasks.map(|task| task.ticks).sum::<u64>() as f64 / TICKS
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATS: &str = "\
34 (khugepaged) S 2 0 0 0 -1 2129984 0 0 0 0 3 40 0 0 39 19 1 0 84 0
77 (a) b) R 1 0 0 0 -1 2129984 0 0 0 0 100 7 0 0 39 19 1 0 84 0
90 (gemini-guestd) S 1 0 0 0 -1 2129984 0 0 0 0 5 2 0 0 39 19 1 0 84 0
torn line (";

    #[test]
    fn threads_of_the_kernel_and_named_processes_are_told_from_others() {
        assert_eq!(cpu_seconds(STATS, |task| task.is_kernel()), 0.43);
        assert_eq!(cpu_seconds(STATS, |task| task.name == PROMOTER), 0.07);
        assert_eq!(cpu_seconds(STATS, |task| task.name == "a) b"), 1.07);
    }
}

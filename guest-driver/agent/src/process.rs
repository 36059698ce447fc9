//! What /proc tells about a process. Processes come and go at any time: every
//! error here means no more than that this one is left alone.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::ops::Range;

use crate::kernel::Thp;

/// One process, told from a later one of the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity {
    /// Its number.
    pub pid: i32,
    /// When it started, in the kernel's ticks.
    pub start: u64,
}

impl Identity {
    /// The process that has number `pid` now.
    ///
    /// # Errors
    /// If there is none.
    pub fn read(pid: i32) -> io::Result<Self> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let start = start_time(&text).ok_or_else(|| io::Error::other("stat of another form"))?;
        Ok(Identity { pid, start })
    }
}

/// Field 22; the name before it may hold anything, so count from its end.
fn start_time(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(19)?.parse().ok()
}

/// The numbers of all processes.
///
/// # Errors
/// If `/proc` cannot be read.
pub fn all() -> io::Result<Vec<i32>> {
    let mut pids = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        // Entries vanish while the directory is read.
        if let Some(pid) = entry.ok().and_then(|entry| entry.file_name().to_str()?.parse().ok()) {
            pids.push(pid);
        }
    }
    pids.sort_unstable();
    Ok(pids)
}

/// Pages of anonymous memory that process `pid` has in memory, none for a kernel
/// thread: the cheapest question that tells most processes from those worth a
/// look.
///
/// # Errors
/// If the process is gone.
pub fn anonymous_pages(pid: i32) -> io::Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/statm"))?;
    resident_less_shared(&text).ok_or_else(|| io::Error::other("statm of another form"))
}

/// `SIZE RESIDENT SHARED ...`, where files and shared memory are shared.
fn resident_less_shared(statm: &str) -> Option<u64> {
    let mut numbers = statm.split_whitespace().map(str::parse::<u64>);
    let resident = numbers.nth(1)?.ok()?;
    Some(resident.saturating_sub(numbers.next()?.ok()?))
}

/// False where process `pid` asked for no huge pages at all
/// (PR_SET_THP_DISABLE).
///
/// # Errors
/// If the process is gone.
pub fn allows_huge_pages(pid: i32) -> io::Result<bool> {
    Ok(thp_enabled(&std::fs::read_to_string(format!("/proc/{pid}/status"))?))
}

fn thp_enabled(status: &str) -> bool {
    let value = status.lines().find_map(|line| line.strip_prefix("THP_enabled:"));
    value.is_none_or(|value| value.trim() != "0")
}

/// The private anonymous mappings of process `pid`, ascending.
///
/// # Errors
/// If the process is gone.
pub fn mappings(pid: i32) -> io::Result<impl Iterator<Item = Range<u64>>> {
    let maps = BufReader::new(File::open(format!("/proc/{pid}/maps"))?);
    Ok(maps.lines().map_while(Result::ok).filter_map(|line| anonymous(&line)))
}

/// `START-END PERMISSIONS OFFSET DEVICE INODE NAME`. Stacks are left out: they
/// grow, and seldom fill a huge page.
fn anonymous(line: &str) -> Option<Range<u64>> {
    let mut words = line.split_whitespace();
    let range = parse_range(words.next()?)?;
    let private = words.next()?.ends_with('p');
    let inode = words.nth(2)?;
    let name = words.next().unwrap_or("");
    let anonymous = name.is_empty() || name == "[heap]" || name.starts_with("[anon:");
    (private && inode == "0" && anonymous).then_some(range)
}

fn parse_range(word: &str) -> Option<Range<u64>> {
    let (start, end) = word.split_once('-')?;
    Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
}

/// Why a mapping gets no huge pages from the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Its owner, or the system for it, does not want huge pages.
    OptedOut,
    /// A userfaultfd watches it: filling it in, or moving its pages, is its
    /// owner's business.
    Userfaultfd,
    /// It is locked in memory, so that it never waits for a fault; or it is no
    /// ordinary memory.
    Special,
}

/// The `VmFlags:` of a mapping.
///
/// `nh` no huge pages, `hg` huge pages; `um`, `uw`, `ui` userfaultfd for
/// missing, write-protected, minor; `lo` locked, `io` `pf` `mm` device memory,
/// `ht` hugetlb, `gd` grows down.
fn verdict(flags: &str, thp: Thp) -> Result<(), Refusal> {
    let has = |names: &[&str]| flags.split_whitespace().any(|flag| names.contains(&flag));
    if has(&["um", "uw", "ui"]) {
        Err(Refusal::Userfaultfd)
    } else if has(&["lo", "io", "pf", "mm", "ht", "gd"]) {
        Err(Refusal::Special)
    } else if has(&["nh"]) || thp == Thp::Never || (thp == Thp::Madvise && !has(&["hg"])) {
        Err(Refusal::OptedOut)
    } else {
        Ok(())
    }
}

/// Goes through a process's mappings for their flags, in ascending order.
///
/// Only smaps has them, and it is expensive: the kernel counts every page of
/// every mapping for it. So it is opened only when the cheap scan of page tables
/// has found a range worth promoting, and read only up to the last such range.
/// What it costs is paid from the agent's share of the CPU.
#[derive(Debug)]
pub struct Flags<R> {
    smaps: R,
    line: String,
    /// The mapping whose lines are being read.
    heading: Range<u64>,
    /// The last one that was read whole.
    mapping: Range<u64>,
    verdict: Result<(), Refusal>,
    thp: Thp,
}

impl Flags<BufReader<File>> {
    /// Opens the flags of process `pid`.
    ///
    /// # Errors
    /// If it is gone.
    pub fn open(pid: i32, thp: Thp) -> io::Result<Self> {
        Ok(Self::new(BufReader::new(File::open(format!("/proc/{pid}/smaps"))?), thp))
    }
}

impl<R: BufRead> Flags<R> {
    fn new(smaps: R, thp: Thp) -> Self {
        Flags { smaps, line: String::new(), heading: 0..0, mapping: 0..0, verdict: Ok(()), thp }
    }

    /// Whether the mapping that `range` lies in allows huge pages. Ranges are
    /// asked for in ascending order.
    ///
    /// # Errors
    /// If the process is gone, or the range lies in no mapping any more.
    pub fn allow(&mut self, range: &Range<u64>) -> io::Result<Result<(), Refusal>> {
        while self.mapping.end <= range.start {
            self.line.clear();
            if self.smaps.read_line(&mut self.line)? == 0 {
                return Err(io::ErrorKind::NotFound.into());
            }
            if let Some(flags) = self.line.strip_prefix("VmFlags:") {
                // The last line of a mapping: now all is known of it.
                self.mapping = self.heading.clone();
                self.verdict = verdict(flags, self.thp);
            } else if let Some(heading) = self.line.split_whitespace().next().and_then(parse_range)
            {
                self.heading = heading;
            }
        }
        if self.mapping.start <= range.start && range.end <= self.mapping.end {
            Ok(self.verdict)
        } else {
            Err(io::ErrorKind::NotFound.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_time_is_found_behind_any_name() {
        let stat = "12 (a) b (c)) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 777 20 21";
        assert_eq!(start_time(stat), Some(777));
        assert_eq!(start_time("12 (a) S 1"), None);
        let own = i32::try_from(std::process::id()).expect("a small number");
        assert!(Identity::read(own).expect("this process").start > 0);
    }

    #[test]
    fn kernel_threads_have_no_anonymous_pages() {
        assert_eq!(resident_less_shared("0 0 0 0 0 0 0\n"), Some(0));
        assert_eq!(resident_less_shared("900 700 200 1 0 500 0\n"), Some(500));
        assert_eq!(resident_less_shared("900"), None);
    }

    #[test]
    fn opt_out_of_the_process_is_in_its_status() {
        assert!(!thp_enabled("RssAnon:\t 12 kB\nTHP_enabled:\t0\n"));
        assert!(thp_enabled("THP_enabled:\t1\n"));
        assert!(thp_enabled("Name:\tkthreadd\n"));
    }

    #[test]
    fn only_private_anonymous_memory_is_taken() {
        let taken = [
            "7f0000000000-7f0000400000 rw-p 00000000 00:00 0 ",
            "55000000-55400000 rw-p 00000000 00:00 0                    [heap]",
            "7f0000000000-7f0000400000 rw-p 00000000 00:00 0    [anon:jit code]",
        ];
        for line in taken {
            assert!(anonymous(line).is_some(), "{line}");
        }
        let left = [
            "7f0000000000-7f0000400000 rw-s 00000000 00:01 9  /dev/zero (deleted)",
            "7f0000000000-7f0000400000 rw-s 00000000 00:00 0 ",
            "7f0000000000-7f0000400000 r--p 00000000 08:01 77  /lib/x.so",
            "7ffc00000000-7ffc00400000 rw-p 00000000 00:00 0   [stack]",
            "7ffc00000000-7ffc00400000 r-xp 00000000 00:00 0   [vdso]",
            "garbage",
            "",
        ];
        for line in left {
            assert_eq!(anonymous(line), None, "{line}");
        }
    }

    #[test]
    fn flags_decide_with_the_systems_setting() {
        assert_eq!(verdict(" rd wr mr", Thp::Always), Ok(()));
        assert_eq!(verdict(" rd wr mr", Thp::Madvise), Err(Refusal::OptedOut));
        assert_eq!(verdict(" rd wr hg", Thp::Madvise), Ok(()));
        assert_eq!(verdict(" rd wr hg", Thp::Never), Err(Refusal::OptedOut));
        assert_eq!(verdict(" rd wr nh", Thp::Always), Err(Refusal::OptedOut));
        for flag in ["um", "uw", "ui"] {
            assert_eq!(verdict(flag, Thp::Always), Err(Refusal::Userfaultfd));
        }
        assert_eq!(verdict("rd lo", Thp::Always), Err(Refusal::Special));
    }

    const SMAPS: &str = "\
        1000-3000 rw-p 00000000 00:00 0 \nSize: 8 kB\nVmFlags: rd wr nh \n\
        3000-9000 rw-p 00000000 00:00 0 [heap]\nSize: 24 kB\nVmFlags: rd wr \n";

    #[test]
    fn flags_are_those_of_the_mapping_that_the_range_lies_in() {
        let mut flags = Flags::new(SMAPS.as_bytes(), Thp::Always);
        let mut ask = |range: Range<u64>| flags.allow(&range).ok();
        assert_eq!(ask(0x1000..0x2000), Some(Err(Refusal::OptedOut)));
        assert_eq!(ask(0x2000..0x3000), Some(Err(Refusal::OptedOut)));
        assert_eq!(ask(0x3000..0x4000), Some(Ok(())));
        assert_eq!(ask(0x8000..0xa000), None, "half outside of every mapping");
        assert_eq!(ask(0x9000..0xa000), None);
    }

    #[test]
    fn range_over_two_mappings_is_in_none() {
        let mut flags = Flags::new(SMAPS.as_bytes(), Thp::Always);
        assert!(flags.allow(&(0x2000..0x4000)).is_err());
    }
}

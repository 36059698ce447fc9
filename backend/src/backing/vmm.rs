//! The VMM, found by what it maps: whoever opened the socket may be somebody else, and the
//! addresses in the messages are the peer's word. What the kernel says a process maps is neither;
//! who opened the socket only says whom to ask first.

use super::descriptor;
use super::ranges::Mapped;
use super::sys;
use super::window::scan_mapped;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI32, Ordering};

/// The process found last: tried first at the next memory table, of which a VMM sends several
/// while its firmware boots. Only a hint; it is verified like every other process.
static FOUND_LAST: AtomicI32 = AtomicI32::new(0);

/// A file as /proc/PID/maps names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId {
    major: u32,
    minor: u32,
    inode: u64,
}

impl FileId {
    /// The identity of an open file.
    pub fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self {
            major: libc::major(metadata.dev()),
            minor: libc::minor(metadata.dev()),
            inode: metadata.ino(),
        })
    }
}

/// One line of /proc/PID/maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct MapEntry {
    start: u64,
    end: u64,
    shared: bool,
    offset: u64,
    file: FileId,
}

impl MapEntry {
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let shared = match fields.next()?.as_bytes() {
            [_, _, _, b's'] => true,
            [_, _, _, b'p'] => false,
            _ => return None,
        };
        let offset = fields.next()?;
        let (major, minor) = fields.next()?.split_once(':')?;
        let inode = fields.next()?.parse().ok()?;
        let hex = |text| u64::from_str_radix(text, 16).ok();
        let (start, end) = (hex(start)?, hex(end)?);
        Some(Self {
            start,
            end: (end > start).then_some(end)?,
            shared,
            offset: hex(offset)?,
            file: FileId {
                major: u32::from_str_radix(major, 16).ok()?,
                minor: u32::from_str_radix(minor, 16).ok()?,
                inode,
            },
        })
    }

    /// One past the last byte of the file that it maps.
    fn file_end(&self) -> u64 {
        self.offset.saturating_add(self.end - self.start)
    }
}

/// A piece of a file to look for.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Which file.
    pub file: FileId,
    /// Where in it.
    pub offset: u64,
    /// How long, in bytes.
    pub size: u64,
}

/// Where a process maps a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// First address.
    pub addr: u64,
    /// Writes of the process reach the file.
    pub shared: bool,
}

/// Where `entries`, in ascending order of addresses, map the whole of a piece with one distance
/// between address and offset. Several such mappings: a huge-page-congruent one is preferred.
fn locate(entries: &[MapEntry], wanted: &Wanted, block_shift: u32) -> Option<Place> {
    let end = wanted.offset.checked_add(wanted.size)?;
    // By distance: up to which offset the piece is covered, and whether all of that is shared.
    let mut covered: BTreeMap<u64, (u64, bool)> = BTreeMap::new();
    for entry in entries.iter().filter(|e| e.file == wanted.file) {
        if entry.offset >= end || entry.file_end() <= wanted.offset {
            continue;
        }
        let distance = entry.start.wrapping_sub(entry.offset);
        let (until, shared) = covered.entry(distance).or_insert((wanted.offset, true));
        if entry.offset <= *until && entry.file_end() > *until {
            *until = entry.file_end();
            *shared &= entry.shared;
        }
    }
    let mask = (1u64 << block_shift) - 1;
    covered
        .into_iter()
        .filter(|(_, (until, _))| *until >= end)
        .map(|(distance, (_, shared))| (distance & mask != 0, distance, shared))
        .min_by_key(|(unaligned, ..)| *unaligned)
        .map(|(_, distance, shared)| Place { addr: wanted.offset.wrapping_add(distance), shared })
}

/// What the kernel lets us do to a process's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permission {
    /// Collapsing is permitted.
    Granted,
    /// We may look at the process, but lack CAP_SYS_NICE.
    NotNice,
    /// We may not look at the process.
    NotTraceable,
    /// The kernel knows no such call, or something in between forbids it.
    Unavailable,
}

/// The VMM: a process that maps all regions of the memory table.
#[derive(Debug)]
pub struct Vmm {
    pid: i32,
    pidfd: OwnedFd,
    /// Kept open: it stays usable where opening it again would be forbidden by then.
    pagemap: Option<File>,
    permission: Permission,
}

impl Vmm {
    /// Its process id, for messages.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it can be asked how it maps its memory.
    pub fn is_visible(&self) -> bool {
        self.pagemap.is_some()
    }

    /// Whether collapsing at the VMM is permitted.
    pub fn permission(&self) -> Permission {
        self.permission
    }

    /// Whether it still runs.
    pub fn is_alive(&self) -> bool {
        sys::pidfd_alive(self.pidfd.as_fd())
    }

    /// How it maps the blocks from its address `base` on. `None` if that cannot be seen.
    pub fn mapped(&self, base: u64, block_shift: u32, blocks: &mut [Mapped]) -> Option<()> {
        let pagemap = self.pagemap.as_ref()?;
        scan_mapped(pagemap, base, block_shift, blocks)
            .inspect_err(|error| log::debug!("cannot see the page tables of the VMM: {error}"))
            .ok()
    }

    /// Collapses a range of its addresses.
    pub fn collapse(&self, range: &Range<u64>) -> io::Result<()> {
        sys::process_collapse(self.pidfd.as_fd(), range)
    }

    /// Has the huge page at an address split.
    pub fn split(&self, addr: u64) -> io::Result<()> {
        sys::process_cold(self.pidfd.as_fd(), &(addr..addr + sys::page_size()))
    }

    /// Page faults of all its threads so far that needed no disk; `None` if that cannot be seen.
    pub fn faults(&self) -> Option<u64> {
        let stat = std::fs::read_to_string(proc_of(self.pid).join("stat")).ok()?;
        // The name in parentheses may contain anything; the fields count behind it.
        let faults = stat.rsplit_once(") ")?.1.split(' ').nth(7)?.parse().ok()?;
        self.is_alive().then_some(faults)
    }

    /// Whether it declined huge pages for all its memory (PR_SET_THP_DISABLE).
    pub fn declines_huge_pages(&self) -> bool {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid));
        status.is_ok_and(|text| {
            text.lines().any(|line| {
                line.strip_prefix("THP_enabled:").is_some_and(|value| value.trim() == "0")
            }) && self.is_alive()
        })
    }

    /// Whether it declined huge pages (MADV_NOHUGEPAGE) for the mapping around `addr`. Expensive,
    /// so only asked where the kernel does not tell us by refusing. `None` if that cannot be seen.
    pub fn declines_huge_pages_at(&self, addr: u64) -> Option<bool> {
        self.has_flag_at(addr, "nh")
    }

    /// Whether the pages of its hugetlb mapping around `addr` are set aside in the pool; false if
    /// that cannot be seen.
    pub fn reserves_at(&self, addr: u64) -> bool {
        self.has_flag_at(addr, "nr") == Some(false)
    }

    /// Whether the mapping around `addr` has a flag of those that smaps tells. Expensive: it makes
    /// the kernel count pages.
    fn has_flag_at(&self, addr: u64, flag: &str) -> Option<bool> {
        let smaps = File::open(format!("/proc/{}/smaps", self.pid)).ok()?;
        let mut inside = false;
        for line in BufReader::new(smaps).lines() {
            let line = line.ok()?;
            if let Some(flags) = line.strip_prefix("VmFlags:") {
                if inside {
                    let found = flags.split_ascii_whitespace().any(|word| word == flag);
                    return self.is_alive().then_some(found);
                }
            } else if let Some(entry) = MapEntry::parse(&line) {
                inside = (entry.start..entry.end).contains(&addr);
            }
        }
        None
    }
}

/// The outcome of a search.
#[derive(Debug, Default)]
pub struct Search {
    /// The VMM, and where it maps each wanted piece.
    pub found: Option<(Vmm, Vec<Place>)>,
    /// Other processes that map all of it too.
    pub others: Vec<i32>,
    /// Processes into which we may not look.
    pub denied: usize,
    /// /proc cannot be read, or belongs to another PID namespace.
    pub blind: bool,
}

struct Candidate {
    pid: i32,
    pidfd: OwnedFd,
    places: Vec<Place>,
    /// Bytes of the wanted files that it maps in all.
    extent: u64,
}

fn proc_of(pid: i32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}"))
}

/// Our own number as /proc knows it; `None` where /proc is not that of our PID namespace, so
/// that its numbers are not those of our system calls.
fn own_pid() -> Option<i32> {
    let link = std::fs::read_link("/proc/self").ok()?;
    let pid: i32 = link.to_str()?.parse().ok()?;
    (i32::try_from(std::process::id()).ok()? == pid).then_some(pid)
}

/// Looks for the process that maps all of `wanted`. Whoever opened a connection to us is asked
/// first, and taken if it shares all of it: to look through all processes takes some 50 us for
/// each, and a guest that arrives by migration stands still meanwhile. Where that is another one (the
/// connection was passed on) all are looked through. Other vhost-user back ends of the guest map
/// it as well, but each region by itself, while the VMM maps its files whole: the process that
/// maps most is taken (sharing it, if any does), then one that runs a KVM guest.
pub fn find(wanted: &[Wanted], block_shift: u32) -> Search {
    let mut search = Search::default();
    if wanted.is_empty() {
        return search;
    }
    let Some(own) = own_pid() else {
        search.blind = true;
        return search;
    };
    search.found = find_among_peers(wanted, block_shift);
    if search.found.is_some() {
        return search;
    }
    let last = FOUND_LAST.load(Ordering::Relaxed);
    if last > 0 && last != own {
        if let Ok(Some(candidate)) = examine(last, wanted, block_shift) {
            search.found = adopt(candidate);
            if search.found.is_some() {
                return search;
            }
        }
    }
    let Ok(entries) = std::fs::read_dir("/proc") else {
        search.blind = true;
        return search;
    };
    let mut candidates = Vec::new();
    for entry in entries.flatten() {
        let pid = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok());
        let Some(pid) = pid.filter(|pid| *pid != own) else {
            continue;
        };
        match examine(pid, wanted, block_shift) {
            Ok(Some(candidate)) => candidates.push(candidate),
            Ok(None) => {}
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => search.denied += 1,
            // It ended meanwhile.
            Err(error) => log::trace!("cannot look into process {pid}: {error}"),
        }
    }
    if candidates.len() > 1 {
        candidates.sort_by_cached_key(|c| {
            let shared = c.places.iter().all(|place| place.shared);
            (shared, c.extent, runs_kvm(c.pid), std::cmp::Reverse(c.pid))
        });
    }
    search.found = candidates.pop().and_then(adopt);
    search.others = candidates.iter().map(|c| c.pid).collect();
    // Where there was a choice it is made again each time.
    let only = search.found.as_ref().filter(|_| search.others.is_empty());
    let pid = only.map_or(0, |(vmm, _)| vmm.pid);
    FOUND_LAST.store(pid, Ordering::Relaxed);
    search
}

/// The one process at the other end of a connection that maps all of `wanted` shared. Who that is,
/// the kernel says; what it maps, too. Connections to the control socket are among them.
fn find_among_peers(wanted: &[Wanted], block_shift: u32) -> Option<(Vmm, Vec<Place>)> {
    let peers = descriptor::peers().into_iter();
    let mut candidates = peers
        .filter_map(|pid| examine(pid, wanted, block_shift).ok().flatten())
        .filter(|candidate| candidate.places.iter().all(|place| place.shared));
    let only = candidates.next()?;
    candidates.next().is_none().then_some(only).and_then(adopt)
}

/// Whether a process maps all of `wanted`. The pidfd is taken first and found alive last, so
/// that the number cannot have passed to another process in between.
fn examine(pid: i32, wanted: &[Wanted], block_shift: u32) -> io::Result<Option<Candidate>> {
    let pidfd = sys::pidfd_open(pid)?;
    let entries = read_maps(&proc_of(pid).join("maps"), wanted)?;
    let places: Option<Vec<Place>> =
        wanted.iter().map(|piece| locate(&entries, piece, block_shift)).collect();
    let extent = entries.iter().map(|e| e.end - e.start).fold(0, u64::saturating_add);
    if !sys::pidfd_alive(pidfd.as_fd()) {
        return Ok(None);
    }
    Ok(places.map(|places| Candidate { pid, pidfd, places, extent }))
}

fn read_maps(path: &Path, wanted: &[Wanted]) -> io::Result<Vec<MapEntry>> {
    let mut reader = BufReader::with_capacity(1 << 16, File::open(path)?);
    let mut entries = Vec::new();
    let mut line = Vec::new(); // file names need not be UTF-8
    while reader.read_until(b'\n', &mut line)? > 0 {
        let entry = MapEntry::parse(&String::from_utf8_lossy(&line));
        entries.extend(entry.filter(|e| wanted.iter().any(|w| w.file == e.file)));
        line.clear();
    }
    Ok(entries)
}

fn runs_kvm(pid: i32) -> bool {
    let Ok(entries) = std::fs::read_dir(proc_of(pid).join("fd")) else {
        return false;
    };
    entries.flatten().any(|entry| {
        std::fs::read_link(entry.path())
            .is_ok_and(|target| target.as_os_str() == "anon_inode:kvm-vm")
    })
}

/// Opens what we need of the process; `None` if it ended meanwhile.
fn adopt(candidate: Candidate) -> Option<(Vmm, Vec<Place>)> {
    let Candidate { pid, pidfd, places, .. } = candidate;
    let pagemap = File::open(proc_of(pid).join("pagemap"))
        .inspect_err(|error| log::debug!("cannot open the pagemap of process {pid}: {error}"))
        .ok();
    let permission = match sys::process_collapse(pidfd.as_fd(), &(0..0)) {
        Ok(()) => Permission::Granted,
        Err(error) => match error.raw_os_error() {
            Some(libc::EPERM) => Permission::NotNice,
            Some(libc::EACCES) => Permission::NotTraceable,
            _ => Permission::Unavailable,
        },
    };
    let vmm = Vmm { pid, pidfd, pagemap, permission };
    vmm.is_alive().then_some((vmm, places))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;
    const SHIFT: u32 = 21;

    fn entry(start: u64, len: u64, offset: u64, inode: u64) -> MapEntry {
        let file = FileId { major: 0, minor: 1, inode };
        MapEntry { start, end: start + len, shared: true, offset, file }
    }

    fn wanted(offset: u64, size: u64) -> Wanted {
        Wanted { file: FileId { major: 0, minor: 1, inode: 7 }, offset, size }
    }

    #[test]
    fn maps_line_is_parsed_whatever_the_name() {
        let line = "7f5c3fe00000-7f5cbfe00000 rw-s 00200000 00:01 2057   /memfd:a b (deleted)";
        let parsed = MapEntry::parse(line).unwrap();
        let file = FileId { major: 0, minor: 1, inode: 2057 };
        let expected = MapEntry {
            start: 0x7f5c_3fe0_0000,
            end: 0x7f5c_bfe0_0000,
            shared: true,
            offset: 0x20_0000,
            file,
        };
        assert_eq!(parsed, expected);
        assert!(!MapEntry::parse("1000-2000 r--p 0 fe:00 1 /x").unwrap().shared);
        for bad in ["", "1000", "2000-1000 rw-s 0 0:1 1", "1000-2000 rw-s 0 01 1", "VmFlags: rd"] {
            assert_eq!(MapEntry::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn locate_joins_the_pieces_of_one_mapping() {
        let base = 0x7f00_0000_0000;
        let entries = [
            entry(base, 2 * MIB, 0, 7),
            entry(base + 2 * MIB, 4 * MIB, 2 * MIB, 7),
            entry(base + 8 * MIB, 8 * MIB, 8 * MIB, 7),
        ];
        let place = |addr| Some(Place { addr, shared: true });
        assert_eq!(locate(&entries, &wanted(MIB, 4 * MIB), SHIFT), place(base + MIB));
        assert_eq!(locate(&entries, &wanted(4 * MIB, 6 * MIB), SHIFT), None);
        assert_eq!(locate(&entries, &wanted(8 * MIB, 8 * MIB), SHIFT), place(base + 8 * MIB));
    }

    #[test]
    fn locate_does_not_join_different_mappings_of_a_file() {
        let entries = [entry(0x1000_0000, 2 * MIB, 0, 7), entry(0x2000_0000, 2 * MIB, 2 * MIB, 7)];
        assert_eq!(locate(&entries, &wanted(0, 4 * MIB), SHIFT), None);
        assert_eq!(locate(&[entry(0x1000_0000, 4 * MIB, 0, 8)], &wanted(0, MIB), SHIFT), None);
    }

    #[test]
    fn locate_prefers_the_congruent_one_of_two_mappings() {
        let entries = [entry(0x1000_1000, 4 * MIB, 0, 7), entry(0x2000_0000, 4 * MIB, 0, 7)];
        let found = locate(&entries, &wanted(0, 4 * MIB), SHIFT).unwrap();
        assert_eq!(found.addr, 0x2000_0000);
    }

    #[test]
    fn locate_reports_private_pieces() {
        let mut entries =
            [entry(0x2000_0000, 2 * MIB, 0, 7), entry(0x2020_0000, 2 * MIB, 2 * MIB, 7)];
        entries[1].shared = false;
        assert!(!locate(&entries, &wanted(0, 4 * MIB), SHIFT).unwrap().shared);
    }

    #[test]
    fn faults_of_a_process_are_those_that_it_made() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let pidfd = sys::pidfd_open(pid).unwrap();
        let vmm = Vmm { pid, pidfd, pagemap: None, permission: Permission::Unavailable };
        let before = vmm.faults().unwrap();
        let fresh = vec![1u8; 64 << 12];
        assert!(fresh.iter().all(|byte| *byte == 1));
        assert!(vmm.faults().unwrap() > before);
    }

    proptest! {
        #[test]
        fn maps_parser_survives_any_line(line in "\\PC*") {
            let _ = MapEntry::parse(&line);
        }

        #[test]
        fn locate_survives_any_numbers(
            entries in prop::collection::vec((any::<u64>(), 1..u64::MAX, any::<u64>()), 0..8),
            offset in any::<u64>(),
            size in any::<u64>(),
        ) {
            let entries: Vec<MapEntry> = entries
                .iter()
                .map(|&(start, len, offset)| MapEntry {
                    start: start.min(u64::MAX - 1),
                    end: start.saturating_add(len).max(start.min(u64::MAX - 1) + 1),
                    ..entry(0, 1, offset, 7)
                })
                .collect();
            let _ = locate(&entries, &wanted(offset, size), SHIFT);
        }
    }
}

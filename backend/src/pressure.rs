//! How short of memory the host is, and what a guest is therefore asked to give back.
//!
//! Three things tell: what the whole machine has left (`MemAvailable`), what the memory cgroups
//! that the VMM is charged to have left below their limits, and how much time tasks lose waiting
//! for memory (PSI). Room alone starts and ends a wish; stalls make more room necessary. A stall
//! without want of room is somebody else's, in a cgroup of his own, and nothing that a guest gives
//! would help him.
//!
//! [`Sources`] and [`HugetlbCgroups`] read files; all else is a pure computation.

use crate::backing::own_proc;
use crate::files::Files;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Below this part of a limit a guest is asked for memory.
const LOW: u64 = 32;
/// The same, in bytes: at least and at most.
const LOW_MIN: u64 = 64 << 20;
const LOW_MAX: u64 = 1 << 30;
/// Shares of time lost, in thousandths, from which on twice and four times as much room is kept.
const STALLED: u64 = 10;
const STALLED_MUCH: u64 = 100;
/// Between two looks: while there is room, and while there is little.
const CALM: Duration = Duration::from_secs(1);
const ALERT: Duration = Duration::from_millis(100);
/// A wish is told again this often, as long as it lasts.
const REPEAT: Duration = Duration::from_millis(200);
/// Most bytes of one wish: the next look may find that it was enough.
const MOST: u64 = 512 << 20;

/// How much of something there may be, and how much is left of it, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Room {
    /// All of it.
    pub limit: u64,
    /// What can still be had without anybody losing more than cache.
    pub free: u64,
}

/// What the host says at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Room of the machine, and of each cgroup with a limit that the VMM is in.
    pub rooms: Vec<Room>,
    /// Time for which at least one task of the machine has waited for memory, ever.
    pub stalled: Duration,
}

/// Where the host tells it. To look takes some tens of microseconds, as often as once a second for
/// as long as there is a guest: nothing is searched for anew that can be where it was.
#[derive(Debug, Default)]
pub struct Sources {
    files: Files,
    /// What the VMM's cgroups were found by: the process, and what it says of them.
    member: Option<(i32, String)>,
    /// Directories of the cgroups, from the VMM's own upwards.
    cgroups: Vec<(PathBuf, Version)>,
}

impl Sources {
    /// Looks; `vmm` is the process whose cgroups count. What cannot be read is left out.
    pub fn view(&mut self, vmm: Option<i32>) -> View {
        self.find_cgroups(vmm);
        let Self { files, cgroups, .. } = self;
        let mut rooms = Vec::with_capacity(1 + cgroups.len());
        rooms.extend(files.read(Path::new("/proc/meminfo")).as_deref().and_then(machine));
        rooms.extend(cgroups.iter().filter_map(|(dir, version)| cgroup(files, dir, *version)));
        let stalled = files.read(Path::new("/proc/pressure/memory"));
        View { rooms, stalled: stalled.as_deref().and_then(stalled_time).unwrap_or_default() }
    }

    /// There is no guest: keeps nothing open.
    pub fn close(&mut self) {
        *self = Self::default();
    }

    /// Finds the VMM's memory cgroups, if it is another one or has moved to others.
    fn find_cgroups(&mut self, vmm: Option<i32>) {
        let member = vmm.and_then(|pid| {
            let groups = self.files.read(Path::new(&format!("/proc/{pid}/cgroup")))?;
            Some((pid, groups))
        });
        if member == self.member {
            return;
        }
        // Also of a VMM that is gone nothing stays open.
        self.files.close();
        self.cgroups = member.as_ref().map_or_else(Vec::new, |(_, groups)| {
            let mounts = own("mountinfo").unwrap_or_default();
            cgroups_of("memory", groups, &mounts)
        });
        self.member = member;
    }
}

/// A file of /proc about this process.
fn own(name: &str) -> io::Result<String> {
    fs::read_to_string(own_proc()?.join(name))
}

/// The machine's room, from /proc/meminfo.
fn machine(meminfo: &str) -> Option<Room> {
    let field = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    };
    Some(Room { limit: field("MemTotal:")?, free: field("MemAvailable:")? })
}

/// The time of the line `some`, from /proc/pressure/memory.
fn stalled_time(pressure: &str) -> Option<Duration> {
    let some = pressure.lines().find(|line| line.starts_with("some "))?;
    let total = some.split_ascii_whitespace().find_map(|word| word.strip_prefix("total="))?;
    total.parse().ok().map(Duration::from_micros)
}

/// Which files a cgroup has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// The directory of a process's cgroup of a controller, and that of the topmost one that can be
/// seen, from /proc/PID/cgroup and /proc/self/mountinfo.
fn cgroup_of(controller: &str, groups: &str, mounts: &str) -> Option<(PathBuf, PathBuf, Version)> {
    // "ID:CONTROLLERS:PATH"; version 2 has ID 0 and no controllers.
    let path_of = |version| {
        groups.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':');
            let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
            let found = match version {
                Version::One => controllers.split(',').any(|name| name == controller),
                Version::Two => controllers.is_empty(),
            };
            found.then_some(path)
        })
    };
    // A machine may have both; then the controller is with the first version.
    for version in [Version::One, Version::Two] {
        let Some(path) = path_of(version) else { continue };
        for line in mounts.lines() {
            let Some((fields, kind)) = line.split_once(" - ") else { continue };
            let mut kind = kind.split(' ');
            let is_kind = match version {
                Version::One => {
                    kind.next() == Some("cgroup")
                        && kind.nth(1).is_some_and(|o| o.split(',').any(|name| name == controller))
                }
                Version::Two => kind.next() == Some("cgroup2"),
            };
            let mut fields = fields.split(' ').skip(3);
            let (Some(root), Some(top)) = (fields.next(), fields.next()) else { continue };
            let below = Path::new(path).strip_prefix(root);
            if let (true, Ok(below)) = (is_kind, below) {
                return Some((Path::new(top).join(below), PathBuf::from(top), version));
            }
        }
    }
    None
}

/// The same and all above it, from the process's own upwards; none where nothing is found.
fn cgroups_of(controller: &str, groups: &str, mounts: &str) -> Vec<(PathBuf, Version)> {
    let found = cgroup_of(controller, groups, mounts).map(|(dir, top, version)| {
        let chain = dir.ancestors().take_while(|dir| dir.starts_with(&top));
        chain.map(|dir| (dir.to_owned(), version)).collect()
    });
    found.unwrap_or_default()
}

/// The hugetlb cgroups that this process allocates in.
#[derive(Debug, Default)]
pub struct HugetlbCgroups(Vec<(PathBuf, Version)>);

impl HugetlbCgroups {
    /// Those that it is in now; none where there are no such cgroups.
    pub fn find() -> Self {
        let groups = own("cgroup").unwrap_or_default();
        let mounts = own("mountinfo").unwrap_or_default();
        Self(cgroups_of("hugetlb", &groups, &mounts))
    }

    /// Bytes of pages of a size that may still be allocated; `None` without a limit.
    pub fn room(&self, page_size: u64) -> Option<u64> {
        self.0.iter().filter_map(|(dir, version)| hugetlb_room_of(dir, *version, page_size)).min()
    }
}

fn hugetlb_room_of(dir: &Path, version: Version, page_size: u64) -> Option<u64> {
    let (limit, used) = match version {
        Version::One => ("limit_in_bytes", "usage_in_bytes"),
        Version::Two => ("max", "current"),
    };
    let file = |what: &str| dir.join(format!("hugetlb.{}.{what}", size_name(page_size)));
    // Without a limit it is "max", or a number beyond all memory.
    let number = |what| fs::read_to_string(file(what)).ok()?.trim().parse::<u64>().ok();
    let limit = number(limit).filter(|limit| *limit < 1 << 60)?;
    Some(limit.saturating_sub(number(used)?))
}

/// A size of pages as hugetlb's files have it.
fn size_name(bytes: u64) -> String {
    match bytes {
        b if b >= 1 << 30 => format!("{}GB", b >> 30),
        b if b >= 1 << 20 => format!("{}MB", b >> 20),
        b => format!("{}KB", b >> 10),
    }
}

/// The room of one cgroup, if it has a limit. Without one nothing else is read.
fn cgroup(files: &mut Files, dir: &Path, version: Version) -> Option<Room> {
    let (limits, usage): (&[&str], _) = match version {
        Version::One => (&["memory.limit_in_bytes"], "memory.usage_in_bytes"),
        Version::Two => (&["memory.high", "memory.max"], "memory.current"),
    };
    let mut number = |name: &str| files.read(&dir.join(name))?.trim().parse::<u64>().ok();
    // Version 1 writes "none" as a number of this size.
    let limit = limits.iter().filter_map(|name| number(name)).min().filter(|l| *l < 1 << 60)?;
    let used = number(usage)?;
    let cache = cache(&files.read(&dir.join("memory.stat"))?, version);
    Some(Room { limit, free: limit.saturating_sub(used) + cache })
}

/// Bytes of a cgroup's cache that could be dropped: what is on the lists of files. Memory of a
/// guest in a memfd is on those of anonymous memory.
fn cache(stat: &str, version: Version) -> u64 {
    let prefix = if version == Version::One { "total_" } else { "" };
    let is_cache = |name: &str| {
        name.strip_prefix(prefix)
            .is_some_and(|name| ["inactive_file", "active_file"].contains(&name))
    };
    stat.lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(name, _)| is_cache(name))
        .filter_map(|(_, bytes)| bytes.trim().parse::<u64>().ok())
        .sum()
}

/// Bytes that have to be left of a limit: below the first a wish begins, at the second it ends.
fn marks(limit: u64, stalled: u64) -> (u64, u64) {
    let mut low = (limit / LOW).clamp(LOW_MIN, LOW_MAX).min(limit / 4);
    low *= match stalled {
        s if s >= STALLED_MUCH => 4,
        s if s >= STALLED => 2,
        _ => 1,
    };
    (low.min(limit / 4), (2 * low).min(limit / 3))
}

/// Follows the host's pressure, and says what a guest is asked for.
#[derive(Debug)]
pub struct Watch {
    last: Option<(Duration, Instant)>,
    /// Thousandths of the time between the last two looks that some task lost.
    stalled: u64,
    /// Bytes that are missing, 0 while there is no wish.
    missing: u64,
    tight: Option<Room>,
    due: Instant,
}

impl Watch {
    /// Nothing is known; a look is due.
    pub fn new(now: Instant) -> Self {
        Self { last: None, stalled: 0, missing: 0, tight: None, due: now }
    }

    /// When the next look is due.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// Takes a look. Bytes that the guest is asked for from now on: 0 for none.
    pub fn look(&mut self, view: &View, now: Instant) -> u64 {
        if let Some((before, at)) = self.last {
            let passed = now.saturating_duration_since(at).as_micros().max(1);
            let lost = view.stalled.saturating_sub(before).as_micros();
            self.stalled = u64::try_from(lost * 1000 / passed).unwrap_or(u64::MAX);
        }
        self.last = Some((view.stalled, now));
        let asking = self.missing > 0;
        let stalled = self.stalled;
        let want = |room: &Room| {
            let (low, high) = marks(room.limit, stalled);
            let begins = room.free < if asking { high } else { low };
            if begins {
                high - room.free
            } else {
                0
            }
        };
        // What one gives serves all rooms that it is charged to.
        self.missing = view.rooms.iter().map(want).max().unwrap_or(0);
        self.tight = view.rooms.iter().min_by_key(|room| room.free).copied();
        let near = |room: &Room| room.free < 4 * marks(room.limit, 0).0;
        let alert = self.missing > 0 || view.rooms.iter().any(near);
        self.due = now + if alert { ALERT } else { CALM };
        self.missing.min(MOST)
    }

    /// What the last look found, for status output.
    pub fn status(&self) -> serde_json::Value {
        serde_json::json!({
            "stalled": self.stalled,
            "missing": self.missing,
            "tightest": self.tight,
        })
    }
}

/// What the driver is told of all this.
#[derive(Debug)]
pub struct Wish {
    blocks: u64,
    told: Instant,
}

impl Wish {
    /// None.
    pub fn new(now: Instant) -> Self {
        Self { blocks: 0, told: now }
    }

    /// Blocks that the driver is asked for.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Sets what is wanted, of a guest that could give `most` blocks. True if the driver is to be
    /// told, also if it is as much as before: each advice asks for so much from then on.
    pub fn set(&mut self, wanted: u64, most: u64, now: Instant) -> bool {
        let blocks = wanted.min(most);
        let over = blocks == 0 && self.blocks > 0;
        let due = blocks > 0 && (self.blocks == 0 || now >= self.told + REPEAT);
        if over || due {
            self.blocks = blocks;
            self.told = now;
        }
        over || due
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;
    const MIB: u64 = 1 << 20;

    fn view(free: u64, stalled: Duration) -> View {
        View { rooms: vec![Room { limit: 16 * GIB, free }], stalled }
    }

    #[test]
    fn files_of_the_kernel_are_understood() {
        let meminfo = "MemTotal:       24684000 kB\nMemFree:  1 kB\nMemAvailable:  23051000 kB\n";
        let room = machine(meminfo).unwrap();
        assert_eq!((room.limit, room.free), (24_684_000 << 10, 23_051_000 << 10));
        let pressure = "some avg10=0.00 avg60=0.00 avg300=0.00 total=1500\nfull avg10=0 total=7\n";
        assert_eq!(stalled_time(pressure), Some(Duration::from_micros(1500)));
        assert_eq!(stalled_time(""), None);
        let stat = "inactive_file 5\nactive_file 7\ntotal_inactive_file 50\ntotal_active_file 70\n";
        assert_eq!(cache(stat, Version::Two), 12);
        assert_eq!(cache(stat, Version::One), 120);
    }

    #[test]
    fn the_cgroup_is_found_below_its_mount() {
        let one = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
                   41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw";
        let groups = "4:memory:/vm/a\n0::/elsewhere";
        let (dir, top, version) = cgroup_of("memory", groups, one).unwrap();
        assert_eq!(dir, Path::new("/sys/fs/cgroup/memory/vm/a"));
        assert_eq!((top.as_path(), version), (Path::new("/sys/fs/cgroup/memory"), Version::One));
        let two = "41 31 0:38 /outer /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw";
        let (dir, _, version) = cgroup_of("memory", "0::/outer/vm", two).unwrap();
        assert_eq!((dir.as_path(), version), (Path::new("/sys/fs/cgroup/vm"), Version::Two));
        assert_eq!(cgroup_of("memory", "0::/other", two), None, "it cannot be seen from here");
    }

    #[test]
    fn a_cgroup_has_room_below_its_limit_and_what_it_has_cached() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        let mut files = Files::default();
        let mut room = |version| cgroup(&mut files, dir.path(), version).map(|r| (r.limit, r.free));
        assert_eq!(room(Version::Two), None);
        write("memory.max", "max\n");
        write("memory.current", "300\n");
        write("memory.stat", "active_file 20\ntotal_active_file 30\n");
        assert_eq!(room(Version::Two), None);
        write("memory.max", "1000\n");
        assert_eq!(room(Version::Two), Some((1000, 720)));
        write("memory.high", "400\n");
        assert_eq!(room(Version::Two), Some((400, 120)));
        write("memory.limit_in_bytes", "9223372036854771712\n");
        write("memory.usage_in_bytes", "500\n");
        assert_eq!(room(Version::One), None);
        write("memory.limit_in_bytes", "600\n");
        assert_eq!(room(Version::One), Some((600, 130)));
    }

    #[test]
    fn hugetlb_limits_are_read_in_both_versions() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        let room = |version| hugetlb_room_of(dir.path(), version, 2 << 20);
        assert_eq!(room(Version::Two), None);
        write("hugetlb.2MB.current", "4194304\n");
        write("hugetlb.2MB.max", "max\n");
        assert_eq!(room(Version::Two), None);
        write("hugetlb.2MB.max", "10485760\n");
        assert_eq!(room(Version::Two), Some(6 << 20));
        write("hugetlb.2MB.usage_in_bytes", "0\n");
        write("hugetlb.2MB.limit_in_bytes", "9223372036854771712\n");
        assert_eq!(room(Version::One), None);
        let names = [64 << 10, 32 << 20, 1 << 30].map(size_name);
        assert_eq!(names, ["64KB", "32MB", "1GB"]);
    }

    #[test]
    fn a_wish_begins_below_the_low_mark_and_ends_above_the_high_one() {
        let now = Instant::now();
        let mut watch = Watch::new(now);
        assert_eq!(watch.look(&view(GIB, Duration::ZERO), now), 0);
        assert_eq!(watch.look(&view(600 * MIB, Duration::ZERO), now), 0);
        let short = watch.look(&view(500 * MIB, Duration::ZERO), now);
        assert_eq!(short, MOST, "the mark is 512 MiB, and 1 GiB is to be free");
        assert_eq!(watch.look(&view(924 * MIB, Duration::ZERO), now), 100 * MIB);
        assert_eq!(watch.look(&view(GIB, Duration::ZERO), now), 0);
        assert_eq!(watch.look(&view(600 * MIB, Duration::ZERO), now), 0);
    }

    #[test]
    fn stalls_make_more_room_necessary_but_want_none_by_themselves() {
        let mut now = Instant::now();
        let mut watch = Watch::new(now);
        watch.look(&view(15 * GIB, Duration::ZERO), now);
        now += CALM;
        assert_eq!(watch.look(&view(15 * GIB, CALM / 2), now), 0);
        now += CALM;
        assert!(watch.look(&view(GIB, CALM), now) > 0);
        now += CALM;
        assert_eq!(watch.look(&view(GIB, CALM), now), 0, "without stalls that is enough");
    }

    #[test]
    fn a_wish_is_repeated_while_it_lasts_and_its_end_is_told_at_once() {
        let now = Instant::now();
        let mut wish = Wish::new(now);
        assert!(!wish.set(0, 100, now));
        assert!(wish.set(50, 100, now));
        assert!(!wish.set(50, 100, now + REPEAT / 2));
        assert!(wish.set(50, 100, now + REPEAT));
        assert!(wish.set(50, 10, now + 2 * REPEAT));
        assert_eq!(wish.blocks(), 10);
        assert!(wish.set(0, 100, now + 2 * REPEAT));
        assert!(!wish.set(0, 100, now + 9 * REPEAT));
    }

    proptest! {
        /// Whatever the kernel says, a wish is bounded and never for more than is missing.
        #[test]
        fn wishes_are_bounded(
            looks in prop::collection::vec((0u64..1 << 45, 0u64..1 << 45, 0u64..1 << 40), 1..50),
        ) {
            let mut now = Instant::now();
            let mut watch = Watch::new(now);
            for (limit, free, stalled) in looks {
                now += ALERT;
                let view = View {
                    rooms: vec![Room { limit, free }],
                    stalled: Duration::from_micros(stalled),
                };
                let wanted = watch.look(&view, now);
                prop_assert!(wanted <= MOST && wanted <= limit / 3);
                prop_assert!(free < limit / 3 || wanted == 0);
                prop_assert!(watch.due() > now);
            }
        }
    }
}

//! The system calls that no safe interface offers. All `unsafe` code of the
//! harness is here.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::ptr;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

/// Size of a base page in bytes. The harness runs on machines with 4 KiB pages.
pub const PAGE_SIZE: u64 = 4096;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn to_usize(value: u64) -> io::Result<usize> {
    usize::try_from(value).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn to_off(value: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(value).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// What the pages of a memory file are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// Base pages, or what the kernel makes of them.
    Any,
    /// Pages of 2 MiB from the host's pool.
    Huge,
    /// Pages of 1 GiB from the host's pool.
    Gigantic,
}

/// An anonymous shared memory file of `size` bytes, without any page in it.
///
/// # Errors
/// Those of `memfd_create` and `ftruncate`.
pub fn memfd(size: u64, pages: Pages) -> io::Result<File> {
    let huge = match pages {
        Pages::Any => 0,
        Pages::Huge => libc::MFD_HUGETLB | libc::MFD_HUGE_2MB,
        Pages::Gigantic => libc::MFD_HUGETLB | libc::MFD_HUGE_1GB,
    };
    let flags = libc::MFD_CLOEXEC | huge;
    // SAFETY: the name is a valid C string; the call touches no other memory.
    let fd = check(unsafe { libc::memfd_create(c"gemini-guest".as_ptr(), flags) })?;
    // SAFETY: the descriptor was just created and nobody else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size)?;
    Ok(file)
}

/// A file of `size` bytes without any page, in a tmpfs of its own that is mounted
/// with `options` and vanishes with the file. `place` is an empty directory.
///
/// # Errors
/// Those of `mount`, which takes the superuser, and of creating the file.
pub fn tmpfs_file(place: &Path, size: u64, options: &str) -> io::Result<File> {
    let place_c = CString::new(place.as_os_str().as_bytes())?;
    let options = CString::new(format!("size={},{options}", 2 * size))?;
    let name = c"tmpfs".as_ptr();
    // SAFETY: all are valid C strings that live across the call.
    check(unsafe { libc::mount(name, place_c.as_ptr(), name, 0, options.as_ptr().cast()) })?;
    let file = File::options().read(true).write(true).custom_flags(libc::O_TMPFILE).open(place);
    // SAFETY: as above. What is open stays.
    check(unsafe { libc::umount2(place_c.as_ptr(), libc::MNT_DETACH) })?;
    let file = file?;
    file.set_len(size)?;
    Ok(file)
}

/// A shared mapping of a whole memory file. Another process writes to it too,
/// so it is only ever copied from and to, never borrowed as a slice.
#[derive(Debug)]
pub struct Mapping {
    base: *mut u8,
    len: usize,
    reserved: (*mut u8, usize),
    shared: bool,
}

// SAFETY: the mapping lives until it is dropped, whichever thread holds it, and
// is accessed by copies and atomics only.
unsafe impl Send for Mapping {}
// SAFETY: as above; concurrent access is what shared memory is for, and no
// reference into it is ever handed out.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `file` at an address that is `skew` bytes above a
    /// multiple of `align`. Writes reach the file only if it is `shared`.
    ///
    /// # Errors
    /// Those of `mmap`.
    pub fn new(file: &File, len: u64, align: u64, skew: u64, shared: bool) -> io::Result<Self> {
        Self::with_flags(file, len, (align, skew), shared, libc::MAP_NORESERVE)
    }

    /// As [`Mapping::new`], aligned and shared, with all of its huge pages set
    /// aside in the host's pool.
    ///
    /// # Errors
    /// Those of `mmap`: ENOMEM if the pool has not so many.
    pub fn reserving(file: &File, len: u64, align: u64) -> io::Result<Self> {
        Self::with_flags(file, len, (align, 0), true, 0)
    }

    fn with_flags(
        file: &File,
        len: u64,
        (align, skew): (u64, u64),
        shared: bool,
        flags: libc::c_int,
    ) -> io::Result<Self> {
        let (len, align, skew) = (to_usize(len)?, to_usize(align)?, to_usize(skew)?);
        let reserve = len.checked_add(2 * align).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let reserved = unsafe {
            libc::mmap(
                ptr::null_mut(),
                reserve,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if reserved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let reserved = reserved.cast::<u8>();
        let base = reserved.wrapping_add(reserved.align_offset(align) + skew);
        let sharing = if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        // SAFETY: [base, base + len) lies inside the reservation made above,
        // which nobody else uses.
        let mapped = unsafe {
            libc::mmap(
                base.cast(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                sharing | flags | libc::MAP_FIXED,
                file.as_raw_fd(),
                0,
            )
        };
        let mapping = Mapping { base, len, reserved: (reserved, reserve), shared };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(mapping)
    }

    /// Address of the first byte.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.base as u64
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Whether it has no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Faults a range in for writing, as a touch of each page would. Where the
    /// touch would be SIGBUS, this is the error EFAULT.
    ///
    /// # Errors
    /// Those of `madvise`.
    pub fn fault_in(&self, offset: u64, len: u64) -> io::Result<()> {
        let length = to_usize(len)?;
        // SAFETY: the range is ours (checked), and the advice stores nothing.
        check(unsafe {
            libc::madvise(self.at(offset, length).cast(), length, libc::MADV_POPULATE_WRITE)
        })
        .map(|_| ())
    }

    fn at(&self, offset: u64, len: usize) -> *mut u8 {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        assert!(
            offset <= self.len && len <= self.len - offset,
            "access of {len} bytes at {offset:#x} outside of {:#x} bytes",
            self.len
        );
        self.base.wrapping_add(offset)
    }

    /// Copies `bytes` to `offset`.
    ///
    /// # Panics
    /// If they do not fit.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        let target = self.at(offset, bytes.len());
        // SAFETY: `at` checked the range; source and mapping cannot overlap
        // because no slice of the mapping exists.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) };
    }

    /// Copies from `offset` into `bytes`.
    ///
    /// # Panics
    /// If the range is not inside.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) {
        let source = self.at(offset, bytes.len());
        // SAFETY: as in `write`.
        unsafe { ptr::copy_nonoverlapping(source, bytes.as_mut_ptr(), bytes.len()) };
    }

    /// Reads a little-endian u16 that another process may be writing.
    ///
    /// # Panics
    /// If `offset` is odd or outside.
    #[must_use]
    pub fn load_u16(&self, offset: u64) -> u16 {
        u16::from_le(self.atomic(offset).load(Ordering::Acquire))
    }

    /// Writes a little-endian u16; what was written before is visible to whoever
    /// reads it.
    ///
    /// # Panics
    /// If `offset` is odd or outside.
    pub fn store_u16(&self, offset: u64, value: u16) {
        self.atomic(offset).store(value.to_le(), Ordering::Release);
    }

    fn atomic(&self, offset: u64) -> &AtomicU16 {
        assert!(offset % 2 == 0, "unaligned u16 at {offset:#x}");
        let address = self.at(offset, 2);
        // SAFETY: in range and aligned (the base is page-aligned); the mapping
        // outlives the borrow of self.
        unsafe { AtomicU16::from_ptr(address.cast()) }
    }

    /// Applies `advice` to `len` bytes at `offset`.
    ///
    /// # Errors
    /// Those of `madvise`.
    pub fn advise(&self, offset: u64, len: u64, advice: libc::c_int) -> io::Result<()> {
        assert!(
            !matches!(advice, libc::MADV_DONTNEED | libc::MADV_REMOVE),
            "advice that drops contents is not for this function"
        );
        let len = to_usize(len)?;
        let address = self.at(offset, len);
        // SAFETY: the range is ours, and the advice changes only how it is backed.
        check(unsafe { libc::madvise(address.cast(), len, advice) }).map(|_| ())
    }
}

impl Mapping {
    /// Takes pages of the file out of the mapping; the next touch brings back
    /// what the file has there.
    ///
    /// # Errors
    /// Those of `madvise`.
    ///
    /// # Panics
    /// If the mapping is private: there the pages are all that there is.
    pub fn forget(&self, offset: u64, len: u64) -> io::Result<()> {
        assert!(self.shared, "a private mapping's contents are in no file");
        let len = to_usize(len)?;
        let address = self.at(offset, len);
        // SAFETY: the range is ours and shared, so its contents are the file's.
        check(unsafe { libc::madvise(address.cast(), len, libc::MADV_DONTNEED) }).map(|_| ())
    }
}

impl Mapping {
    /// Maps `len` bytes of `file` from `from` on at `offset`, in place of what is
    /// mapped there.
    ///
    /// # Errors
    /// Those of `mmap`.
    ///
    /// # Panics
    /// If the range is not inside.
    pub fn replace(&self, offset: u64, file: &File, from: u64, len: u64) -> io::Result<()> {
        let length = to_usize(len)?;
        let address = self.at(offset, length);
        // SAFETY: the range lies inside our mapping, of which no reference exists.
        let mapped = unsafe {
            libc::mmap(
                address.cast(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE | libc::MAP_FIXED,
                file.as_raw_fd(),
                to_off(from)?,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Reads `count` words at random places of the first `len` bytes, each place
    /// known only when the word before is there, and returns how long it took.
    ///
    /// # Panics
    /// If `len` is not a power of two, or not inside.
    pub fn read_at_random(&self, len: u64, count: u64, seed: u64) -> Duration {
        assert!(len.is_power_of_two() && len <= self.len(), "{len} bytes at random");
        let mask = (len - 1) & !7;
        let base = self.base as u64;
        let mut state = seed;
        let start = Instant::now();
        for _ in 0..count {
            // Knuth's multiplier; the upper bits are the random ones.
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let place = (base + ((state >> 20) & mask)) as *const u64;
            // SAFETY: aligned, and inside the mapping by the mask.
            state = state.wrapping_add(unsafe { place.read_volatile() });
        }
        let time = start.elapsed();
        std::hint::black_box(state);
        time
    }
}

/// What a processor counts, as `perf_event_open` has it.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    kind: u32,
    config: u64,
}

impl Event {
    /// `PERF_TYPE_HARDWARE`: cycles, and instructions that were completed.
    pub const CYCLES: Event = Event { kind: 0, config: 0 };
    /// See [`Self::CYCLES`].
    pub const INSTRUCTIONS: Event = Event { kind: 0, config: 1 };
    /// `PERF_TYPE_HW_CACHE`, `PERF_COUNT_HW_CACHE_DTLB`: loads and stores, and those of them that
    /// the data TLB missed.
    pub const DTLB_LOADS: Event = Event { kind: 3, config: 3 };
    /// See [`Self::DTLB_LOADS`].
    pub const DTLB_STORES: Event = Event { kind: 3, config: 3 | 1 << 8 };
    /// See [`Self::DTLB_LOADS`].
    pub const DTLB_LOAD_MISSES: Event = Event { kind: 3, config: 3 | 1 << 16 };
    /// See [`Self::DTLB_LOADS`].
    pub const DTLB_STORE_MISSES: Event = Event { kind: 3, config: 3 | 1 << 8 | 1 << 16 };
}

/// Whose work is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// The program's alone.
    Program,
    /// The kernel's, too, and that of a guest that the thread runs.
    Everybody,
}

/// Counts an event of one thread, from when it was made on.
#[derive(Debug)]
pub struct EventCounter(File);

impl EventCounter {
    /// Begins to count; thread 0 is the calling one.
    ///
    /// # Errors
    /// Those of `perf_event_open`: ENOENT where the processor, or a hypervisor
    /// under it, has no such counter.
    pub fn new(thread: i32, event: Event, whose: Whose) -> io::Result<Self> {
        /// `struct perf_event_attr` in its first version, `PERF_ATTR_SIZE_VER0`, which every
        /// kernel takes.
        #[repr(C)]
        #[derive(Default)]
        struct Attributes {
            kind: u32,
            size: u32,
            config: u64,
            sample_period: u64,
            sample_type: u64,
            read_format: u64,
            flags: u64,
            wakeup_events: u32,
            breakpoint: u32,
            config1: u64,
        }
        const SIZE: u32 = 64;
        const _: () = assert!(size_of::<Attributes>() == SIZE as usize);
        const EXCLUDE_KERNEL_AND_HYPERVISOR: u64 = 1 << 5 | 1 << 6;
        /// `PERF_FORMAT_TOTAL_TIME_ENABLED | PERF_FORMAT_TOTAL_TIME_RUNNING`.
        const TIMES: u64 = 1 | 2;
        /// `PERF_FLAG_FD_CLOEXEC`.
        const CLOEXEC: libc::c_ulong = 1 << 3;
        let attributes = Attributes {
            kind: event.kind,
            size: SIZE,
            config: event.config,
            read_format: TIMES,
            flags: if whose == Whose::Program { EXCLUDE_KERNEL_AND_HYPERVISOR } else { 0 },
            ..Attributes::default()
        };
        let (any_cpu, no_group) = (-1, -1);
        // SAFETY: the attributes live across the call, and tell their size.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_perf_event_open,
                &raw const attributes,
                thread,
                any_cpu,
                no_group,
                CLOEXEC,
            )
        };
        let fd = check(libc::c_int::try_from(fd).map_err(io::Error::other)?)?;
        // SAFETY: the descriptor was just created and nobody else owns it.
        Ok(EventCounter(unsafe { File::from_raw_fd(fd) }))
    }

    /// Events so far, estimated where the counter had to share its hardware.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn read(&self) -> io::Result<u64> {
        let mut words = [[0; 8]; 3];
        (&self.0).read_exact(words.as_flattened_mut())?;
        let [value, enabled, running] = words.map(u64::from_ne_bytes);
        Ok(scaled(value, enabled, running))
    }
}

/// A count for all the time that it was wanted, of which it ran a part.
fn scaled(value: u64, enabled: u64, running: u64) -> u64 {
    if running == 0 {
        return 0;
    }
    let total = u128::from(value) * u128::from(enabled) / u128::from(running);
    u64::try_from(total).unwrap_or(u64::MAX)
}

/// A pipe, to hold pages.
#[derive(Debug)]
pub struct Pipe {
    _reader: OwnedFd,
    writer: OwnedFd,
}

impl Pipe {
    /// An empty pipe.
    ///
    /// # Errors
    /// Those of `pipe2`.
    pub fn new() -> io::Result<Self> {
        Self::with_room(16)
    }

    /// An empty pipe that takes so many pages; beyond 256 for the superuser alone.
    ///
    /// # Errors
    /// Those of `pipe2` and of resizing it.
    pub fn with_room(pages: u64) -> io::Result<Self> {
        let mut ends = [-1; 2];
        // SAFETY: room for two descriptors.
        check(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) })?;
        // SAFETY: both were just created and nobody else owns them.
        let [reader, writer] = ends.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
        let room = libc::c_int::try_from(pages * PAGE_SIZE).map_err(io::Error::other)?;
        // SAFETY: a call on a descriptor that we own; no pointers.
        check(unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETPIPE_SZ, room) })?;
        Ok(Pipe { _reader: reader, writer })
    }
}

impl Mapping {
    /// Puts the pages of a range into `pipe`, without a copy: until the pipe is
    /// dropped nobody can move them.
    ///
    /// # Errors
    /// Those of `vmsplice`, or if not all of them fit.
    pub fn pin_into(&self, pipe: &Pipe, offset: u64, len: u64) -> io::Result<()> {
        let len = to_usize(len)?;
        let pages = libc::iovec { iov_base: self.at(offset, len).cast(), iov_len: len };
        // SAFETY: the range is ours; the pipe is read by nobody.
        let taken = unsafe { libc::vmsplice(pipe.writer.as_raw_fd(), &pages, 1, 0) };
        match usize::try_from(taken) {
            Ok(taken) if taken == len => Ok(()),
            Ok(_) => Err(io::ErrorKind::WriteZero.into()),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the reservation, and the mapping inside it, are ours, and no
        // pointer into them outlives self.
        unsafe { libc::munmap(self.reserved.0.cast(), self.reserved.1) };
    }
}

/// CPU time of the calling thread, in seconds.
///
/// # Errors
/// Those of `clock_gettime`.
pub fn thread_cpu_seconds() -> io::Result<f64> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes a structure of ours.
    check(unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) })?;
    Ok(time.tv_sec as f64 + time.tv_nsec as f64 / 1e9)
}

/// Takes the pages of a range out of a memory file; it then reads as zeros.
///
/// # Errors
/// Those of `fallocate`.
pub fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: a call on a descriptor that we own; no pointers.
    check(unsafe { libc::fallocate(file.as_raw_fd(), mode, to_off(offset)?, to_off(len)?) })
        .map(|_| ())
}

/// The next offset at or after `offset` where the file has (`data`) or has not
/// (`!data`) a page; `None` after the last.
///
/// # Errors
/// Those of `lseek`.
pub fn seek(file: &File, offset: u64, data: bool) -> io::Result<Option<u64>> {
    let whence = if data { libc::SEEK_DATA } else { libc::SEEK_HOLE };
    // SAFETY: a call on a descriptor that we own; no pointers.
    let found = unsafe { libc::lseek(file.as_raw_fd(), to_off(offset)?, whence) };
    match u64::try_from(found) {
        Ok(found) => Ok(Some(found)),
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}

/// Waits until one of `fds` is readable or `timeout` has passed.
///
/// # Errors
/// Those of `poll`, an interrupted call apart, which counts as a timeout.
pub fn wait_readable(fds: &[RawFd], timeout: Duration) -> io::Result<()> {
    let mut polled: Vec<libc::pollfd> =
        fds.iter().map(|&fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 }).collect();
    let timeout = libc::timespec {
        tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: libc::c_long::from(timeout.subsec_nanos()),
    };
    let count = polled.len() as libc::nfds_t;
    // SAFETY: the array and the timeout live across the call; its length is given.
    let result = unsafe { libc::ppoll(polled.as_mut_ptr(), count, &timeout, ptr::null()) };
    match check(result) {
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        _ => Ok(()),
    }
}

/// Sends `signal` to the process `pid`.
///
/// # Errors
/// Those of `kill`.
pub fn kill(pid: u32, signal: libc::c_int) -> io::Result<()> {
    let pid = libc::pid_t::try_from(pid).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: no pointers.
    check(unsafe { libc::kill(pid, signal) }).map(|_| ())
}

/// Has `command` die with the thread that starts it, so that a harness that is
/// itself killed leaves no daemon behind.
pub fn die_with_parent(command: &mut Command) -> &mut Command {
    // SAFETY: prctl is safe to call between fork and exec.
    unsafe {
        command.pre_exec(|| check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL)).map(|_| ()))
    }
}

/// Has `command` inherit `fd` under the number `target`.
pub fn inherit<'a>(command: &'a mut Command, fd: BorrowedFd<'_>, target: RawFd) -> &'a mut Command {
    let fd = fd.as_raw_fd();
    // SAFETY: dup2 is safe to call between fork and exec, and clears
    // close-on-exec of the new descriptor.
    unsafe { command.pre_exec(move || check(libc::dup2(fd, target)).map(|_| ())) }
}

/// Has a thread (0: the calling one), and what it starts from then on, run before
/// all ordinary ones, or among them again.
///
/// # Errors
/// If this user may not, or there is no such thread.
pub fn run_first(thread: libc::pid_t, first: bool) -> io::Result<()> {
    // SAFETY: all fields are integers.
    let mut priority: libc::sched_param = unsafe { std::mem::zeroed() };
    priority.sched_priority = i32::from(first);
    let policy = if first { libc::SCHED_FIFO } else { libc::SCHED_OTHER };
    // SAFETY: the parameter lives across the call.
    check(unsafe { libc::sched_setscheduler(thread, policy, &priority) }).map(|_| ())
}

/// Page faults of the calling thread so far.
#[must_use]
pub fn thread_faults() -> i64 {
    // SAFETY: all fields are integers.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: room for the result.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &mut usage) };
    usage.ru_minflt + usage.ru_majflt
}

/// How a file is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lock {
    /// Together with others that share.
    Shared,
    /// Alone.
    Exclusive,
}

impl Lock {
    fn operation(self) -> libc::c_int {
        match self {
            Lock::Shared => libc::LOCK_SH,
            Lock::Exclusive => libc::LOCK_EX,
        }
    }
}

/// Waits for a lock on `file`, held until it is closed.
///
/// # Errors
/// Those of `flock`.
pub fn lock(file: &File, how: Lock) -> io::Result<()> {
    loop {
        // SAFETY: a call on a descriptor that we own; no pointers.
        match check(unsafe { libc::flock(file.as_raw_fd(), how.operation()) }) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other.map(|_| ()),
        }
    }
}

/// As [`lock`], yet returns false instead of waiting.
///
/// # Errors
/// Those of `flock`.
pub fn try_lock(file: &File, how: Lock) -> io::Result<bool> {
    // SAFETY: a call on a descriptor that we own; no pointers.
    match check(unsafe { libc::flock(file.as_raw_fd(), how.operation() | libc::LOCK_NB) }) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error),
    }
}

/// CPU time of all threads that a process has and had.
///
/// # Errors
/// If there is no such process.
pub fn process_cpu_time(pid: u32) -> io::Result<Duration> {
    let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
    let mut clock = 0;
    // SAFETY: the clock is a place for one, and lives across the call.
    let error = unsafe { libc::clock_getcpuclockid(pid, &raw mut clock) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the time is a place for one, and lives across the call.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let seconds = u64::try_from(time.tv_sec).map_err(io::Error::other)?;
    let nanoseconds = u32::try_from(time.tv_nsec).map_err(io::Error::other)?;
    Ok(Duration::new(seconds, nanoseconds))
}

/// Clock ticks a second in which /proc counts CPU time.
#[must_use]
pub fn clock_ticks() -> f64 {
    // SAFETY: no pointers.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    if ticks > 0 {
        ticks as f64
    } else {
        100.0
    }
}

/// Whether this process runs as the superuser.
#[must_use]
pub fn is_root() -> bool {
    // SAFETY: no pointers.
    unsafe { libc::geteuid() == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counter_of_a_thread_counts_what_it_does() {
        // PERF_COUNT_SW_TASK_CLOCK, which needs no hardware.
        let clock = Event { kind: 1, config: 1 };
        let counter = EventCounter::new(0, clock, Whose::Everybody).expect("a kernel with events");
        let first = counter.read().expect("it was opened");
        let mut product = 1_u64;
        for factor in 1..2_000_000_u64 {
            product = std::hint::black_box(product.wrapping_mul(factor | 1));
        }
        assert!(counter.read().expect("it was opened") > first);
    }

    #[test]
    fn counters_that_share_hardware_are_scaled() {
        assert_eq!(scaled(10, 100, 50), 20);
        assert_eq!(scaled(10, 100, 0), 0);
    }
}

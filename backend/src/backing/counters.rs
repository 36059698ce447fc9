//! TLB misses of a guest, counted by the processor on the VMM's threads that run it.

use super::sys::check;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;

/// `PERF_TYPE_HW_CACHE` of linux/perf_event.h.
const HW_CACHE: u32 = 3;
/// Misses of the data TLB (`PERF_COUNT_HW_CACHE_DTLB`, `..._RESULT_MISS`): of loads, of stores.
const DTLB_LOAD_MISSES: Event = Event { kind: HW_CACHE, config: 3 | 1 << 16 };
const DTLB_STORE_MISSES: Event = Event { kind: HW_CACHE, config: 3 | 1 << 8 | 1 << 16 };
/// `PERF_FORMAT_TOTAL_TIME_ENABLED | PERF_FORMAT_TOTAL_TIME_RUNNING`.
const TIMES: u64 = 1 | 2;
/// `PERF_FLAG_FD_CLOEXEC`.
const CLOEXEC: libc::c_ulong = 1 << 3;
/// How often the threads of a process are listed at most.
const LISTS_MAX: usize = 8;

/// Something that the kernel counts.
#[derive(Clone, Copy, Debug)]
struct Event {
    kind: u32,
    config: u64,
}

/// `struct perf_event_attr` of linux/perf_event.h, in its first version, which every kernel takes.
/// All zero otherwise: user space and kernel, host and guest alike are counted.
#[repr(C)]
#[derive(Debug, Default)]
struct Attr {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    breakpoint_type: u32,
    breakpoint_address: u64,
}

/// Counters of the threads that run a guest, since they were opened.
#[derive(Debug)]
pub struct TlbCounters(Vec<File>);

impl TlbCounters {
    /// Counts from now on, on the threads that `vmm` has now for the guest's processors.
    ///
    /// # Errors
    /// If the processor has no such counters (most virtual ones), if we may not use them, or if
    /// no thread can be told to run a guest. QEMU names its threads under
    /// `-name debug-threads=on`, as libvirt starts it.
    pub fn open(vmm: i32) -> io::Result<Self> {
        let threads = vcpu_threads(vmm)?;
        let mut counters = open_on(&threads, DTLB_LOAD_MISSES)?;
        // Some processors count both as one.
        counters.extend(open_on(&threads, DTLB_STORE_MISSES).unwrap_or_default());
        Ok(Self(counters))
    }

    /// TLB misses since then, estimated where a counter had to share its hardware.
    ///
    /// # Errors
    /// If a counter cannot be read.
    pub fn total(&self) -> io::Result<u64> {
        self.0.iter().map(count_of).sum()
    }
}

/// The threads of a process that run a guest's processors. Where a thread ends while the kernel
/// lists them (`proc_task_readdir` in its fs/proc/base.c), the list may end there, or lack one
/// that came later: so they are listed until that brings no more. A VMM that makes new ones all
/// the time is not followed for ever.
fn vcpu_threads(pid: i32) -> io::Result<BTreeSet<i32>> {
    let mut threads = listed_vcpus(pid)?;
    for _ in 1..LISTS_MAX {
        let known = threads.len();
        threads.extend(listed_vcpus(pid)?);
        if threads.len() == known {
            break;
        }
    }
    Ok(threads)
}

/// Those that one list has, by the names that QEMU gives them.
fn listed_vcpus(pid: i32) -> io::Result<BTreeSet<i32>> {
    let mut threads = BTreeSet::new();
    for entry in fs::read_dir(Path::new("/proc").join(pid.to_string()).join("task"))? {
        let entry = entry?;
        // A thread may have ended meanwhile.
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if is_vcpu(name.trim_end()) {
            threads.extend(entry.file_name().to_str().and_then(|tid| tid.parse::<i32>().ok()));
        }
    }
    Ok(threads)
}

/// "CPU 3/KVM", "CPU 3/TCG"; where one thread of an emulator runs all, "ALL CPUs/TCG".
fn is_vcpu(name: &str) -> bool {
    let Some((cpu, how)) = name.split_once('/') else { return false };
    let number = cpu.strip_prefix("CPU ").unwrap_or_default();
    let numbered = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    (numbered || cpu == "ALL CPUs") && matches!(how, "KVM" | "TCG")
}

fn open_on(threads: &BTreeSet<i32>, event: Event) -> io::Result<Vec<File>> {
    if threads.is_empty() {
        return Err(io::ErrorKind::NotFound.into());
    }
    threads.iter().map(|thread| open(*thread, event)).collect()
}

fn open(thread: i32, event: Event) -> io::Result<File> {
    let attr = Attr {
        kind: event.kind,
        size: u32::try_from(size_of::<Attr>()).unwrap_or(u32::MAX),
        config: event.config,
        read_format: TIMES,
        ..Attr::default()
    };
    // SAFETY: `attr` has the layout and the size that it tells, and outlives the call.
    let fd = check(unsafe {
        libc::syscall(libc::SYS_perf_event_open, &raw const attr, thread, -1, -1, CLOEXEC)
    })?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

fn count_of(mut counter: &File) -> io::Result<u64> {
    let mut bytes = [0; 24];
    counter.read_exact(&mut bytes)?;
    let word = |at: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[at..at + 8]);
        u64::from_ne_bytes(word)
    };
    Ok(scaled(word(0), word(8), word(16)))
}

/// A count as it would be, had the counter run all the time for which it was enabled.
fn scaled(count: u64, enabled: u64, running: u64) -> u64 {
    if running == 0 || running >= enabled {
        return count;
    }
    let estimate = u128::from(count) * u128::from(enabled) / u128::from(running);
    u64::try_from(estimate).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    /// `PERF_TYPE_SOFTWARE`, `PERF_COUNT_SW_PAGE_FAULTS`: every machine has them.
    const PAGE_FAULTS: Event = Event { kind: 1, config: 2 };
    /// No kernel knows it.
    const NONSENSE: Event = Event { kind: HW_CACHE, config: 0xff };

    fn own_pid() -> i32 {
        i32::try_from(std::process::id()).unwrap()
    }

    /// Touches fresh pages.
    fn fault(pages: usize) {
        let mut memory = memmap(pages * 4096);
        memory.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
        std::hint::black_box(&memory);
    }

    /// Memory that nothing has touched yet: beyond what an allocator keeps for reuse.
    fn memmap(len: usize) -> Vec<u8> {
        assert!(len >= 64 << 20, "the allocator might reuse it");
        vec![0; len]
    }

    /// Returns when a thread of this process sleeps.
    fn wait_asleep(thread: i32) {
        let stat = format!("/proc/self/task/{thread}/stat");
        // The state follows the name, which is in brackets.
        while !fs::read_to_string(&stat).unwrap().contains(") S ") {
            std::thread::yield_now();
        }
    }

    #[test]
    fn only_what_the_threads_of_the_guest_do_is_counted() {
        let ((go, may_go), (tell, told)) = (channel::<()>(), channel());
        let vcpu = std::thread::Builder::new().name("CPU 7/KVM".into());
        let vcpu = vcpu
            .spawn(move || {
                tell.send(()).unwrap();
                may_go.recv().unwrap();
                fault(16_384);
                tell.send(()).unwrap();
                may_go.recv().unwrap();
            })
            .unwrap();
        told.recv().unwrap();
        let threads = vcpu_threads(own_pid()).unwrap();
        assert_eq!(threads.len(), 1, "this process runs one such test");
        // It may have page faults of its own on the way to its sleep.
        threads.iter().for_each(|thread| wait_asleep(*thread));
        let counters = match open_on(&threads, PAGE_FAULTS) {
            Ok(counters) => TlbCounters(counters),
            // perf_event_paranoid, or a sandbox.
            Err(error) => {
                assert!(
                    matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM)),
                    "{error}"
                );
                eprintln!("skipped: {error}");
                go.send(()).and_then(|()| go.send(())).unwrap();
                return vcpu.join().unwrap();
            }
        };
        fault(16_384);
        assert_eq!(counters.total().unwrap(), 0, "another thread's");
        go.send(()).unwrap();
        told.recv().unwrap();
        let count = counters.total().unwrap();
        assert!((1..=17_000).contains(&count), "{count}");
        go.send(()).unwrap();
        vcpu.join().unwrap();
    }

    #[test]
    fn where_nothing_can_be_counted_that_is_an_error() {
        let error = open_on(&[own_pid()].into(), NONSENSE).unwrap_err();
        assert!(error.raw_os_error().is_some(), "{error}");
        assert!(open_on(&BTreeSet::new(), PAGE_FAULTS).is_err(), "nobody runs a guest");
        assert!(TlbCounters::open(i32::MAX).is_err(), "no such process");
    }

    #[test]
    fn names_of_threads_tell_which_run_a_guest() {
        for name in ["CPU 0/KVM", "CPU 12/TCG", "ALL CPUs/TCG"] {
            assert!(is_vcpu(name), "{name}");
        }
        for name in ["", "CPU /KVM", "CPU 0/IO", "worker", "IO CPU 0/KVM", "CPU x/KVM"] {
            assert!(!is_vcpu(name), "{name}");
        }
    }

    #[test]
    fn counts_of_shared_hardware_are_estimated() {
        assert_eq!(scaled(10, 100, 100), 10);
        assert_eq!(scaled(10, 100, 50), 20);
        assert_eq!(scaled(10, 100, 0), 10, "it never ran");
        assert_eq!(scaled(u64::MAX, u64::MAX, 1), u64::MAX);
    }
}

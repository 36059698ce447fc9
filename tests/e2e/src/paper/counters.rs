//! TLB misses by the hardware's own counters, on the threads that run a guest's
//! processors.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{FromRawFd, OwnedFd};

use anyhow::Context;
use serde_json::json;

use super::record::Tlb;
use crate::qmp::Qmp;

/// `PERF_TYPE_HARDWARE`, `PERF_TYPE_HW_CACHE` of linux/perf_event.h.
const HARDWARE: u32 = 0;
const HW_CACHE: u32 = 3;

/// `PERF_COUNT_HW_CACHE_DTLB`; above it the operation, above that the result.
const DTLB: u64 = 3;
const LOADS: u64 = 0;
const STORES: u64 = 1 << 8;
const ACCESSES: u64 = 0;
const MISSES: u64 = 1 << 16;

/// `PERF_FORMAT_TOTAL_TIME_ENABLED | PERF_FORMAT_TOTAL_TIME_RUNNING`.
const TIMES: u64 = 1 | 2;
/// `PERF_FLAG_FD_CLOEXEC`.
const CLOEXEC: libc::c_ulong = 1 << 3;

/// Something that a processor counts.
#[derive(Clone, Copy, Debug)]
struct Event {
    kind: u32,
    config: u64,
}

const CYCLES: Event = Event { kind: HARDWARE, config: 0 };
const INSTRUCTIONS: Event = Event { kind: HARDWARE, config: 1 };

const fn dtlb(operation: u64, result: u64) -> Event {
    Event { kind: HW_CACHE, config: DTLB | operation | result }
}

/// `struct perf_event_attr` in its first version, which every kernel takes. All
/// zero otherwise: user space and kernel, host and guest alike are counted.
#[repr(C)]
#[derive(Debug, Default)]
struct Attributes {
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

/// Counters that run since they were opened.
#[derive(Debug)]
pub struct Counters {
    /// Of loads and stores, by thread.
    accesses: Vec<File>,
    misses: Vec<File>,
    cycles: Vec<File>,
    instructions: Vec<File>,
}

impl Counters {
    /// Counts from now on, on all threads that run the guest's processors.
    ///
    /// # Errors
    /// If the processor has no such counters, or QEMU names no threads.
    pub fn start(qmp: &mut Qmp) -> anyhow::Result<Self> {
        let answer = qmp.execute("query-cpus-fast", json!({}))?;
        let processors = answer.as_array().context("QEMU lists no processors")?;
        let thread = |processor: &serde_json::Value| {
            let thread = processor["thread-id"].as_i64().and_then(|id| i32::try_from(id).ok());
            thread.context("a processor without a thread")
        };
        let threads: Vec<i32> = processors.iter().map(thread).collect::<anyhow::Result<_>>()?;
        Self::open(&threads)
    }

    /// Whether the processor of this machine counts its TLB's misses.
    ///
    /// # Errors
    /// If it does not; what the kernel says.
    pub fn probe() -> anyhow::Result<()> {
        // This thread.
        Self::open(&[0]).map(drop)
    }

    fn open(threads: &[i32]) -> anyhow::Result<Self> {
        let of = |event| -> io::Result<Vec<File>> {
            threads.iter().map(|thread| open(*thread, event)).collect()
        };
        let mut misses = of(dtlb(LOADS, MISSES))
            .context("this processor does not count misses of its TLB, or does not let us")?;
        // Some processors count both as one, or only some of it.
        misses.extend(of(dtlb(STORES, MISSES)).unwrap_or_default());
        let mut accesses = of(dtlb(LOADS, ACCESSES)).unwrap_or_default();
        accesses.extend(of(dtlb(STORES, ACCESSES)).unwrap_or_default());
        let cycles = of(CYCLES).unwrap_or_default();
        Ok(Counters {
            accesses,
            misses,
            cycles,
            instructions: of(INSTRUCTIONS).unwrap_or_default(),
        })
    }

    /// What was counted since, estimated where a counter had to share its hardware.
    ///
    /// # Errors
    /// If a counter cannot be read.
    pub fn total(&self) -> anyhow::Result<Tlb> {
        Ok(Tlb {
            accesses: sum(&self.accesses)?,
            misses: sum(&self.misses)?,
            cycles: sum(&self.cycles)?,
            instructions: sum(&self.instructions)?,
            ..Tlb::default()
        })
    }
}

/// None where nothing is counted.
fn sum(counters: &[File]) -> anyhow::Result<Option<u64>> {
    if counters.is_empty() {
        return Ok(None);
    }
    let total = counters.iter().map(count).sum::<io::Result<u64>>();
    total.map(Some).context("a counter cannot be read")
}

fn open(thread: i32, event: Event) -> io::Result<File> {
    let attributes = Attributes {
        kind: event.kind,
        size: u32::try_from(size_of::<Attributes>()).map_err(io::Error::other)?,
        config: event.config,
        read_format: TIMES,
        ..Attributes::default()
    };
    // SAFETY: the attributes have the layout and the size that they tell, and
    // outlive the call.
    let fd = unsafe {
        let attributes = &raw const attributes;
        libc::syscall(libc::SYS_perf_event_open, attributes, thread, -1, -1, CLOEXEC)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

fn count(mut counter: &File) -> io::Result<u64> {
    let mut bytes = [0; 24];
    counter.read_exact(&mut bytes)?;
    let mut words = bytes
        .chunks_exact(8)
        .map(|word| u64::from_ne_bytes(<[u8; 8]>::try_from(word).unwrap_or_default()));
    let mut next = || words.next().unwrap_or_default();
    Ok(scaled(next(), next(), next()))
}

/// A count for all the time that it was wanted, of which it ran a part.
fn scaled(value: u64, enabled: u64, running: u64) -> u64 {
    if running == 0 {
        return 0;
    }
    let total = u128::from(value) * u128::from(enabled) / u128::from(running);
    u64::try_from(total).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `PERF_COUNT_SW_TASK_CLOCK`: a counter that every machine has.
    const TASK_CLOCK: Event = Event { kind: 1, config: 1 };

    #[test]
    fn counter_of_a_thread_counts_what_it_does() {
        let counter = open(0, TASK_CLOCK).expect("a kernel with perf events");
        let first = count(&counter).expect("it was opened");
        let mut product = 1_u64;
        for factor in 1..2_000_000_u64 {
            product = std::hint::black_box(product.wrapping_mul(factor | 1));
        }
        assert!(count(&counter).expect("it was opened") > first);
    }

    #[test]
    fn shared_counters_are_scaled_and_absent_ones_are_none() {
        assert_eq!(scaled(10, 100, 50), 20);
        assert_eq!(scaled(10, 100, 0), 0);
        assert_eq!(sum(&[]).expect("nothing to read"), None);
    }
}

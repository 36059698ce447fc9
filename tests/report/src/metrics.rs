//! The figures that are compared, each with the way to read it from a record.

use crate::record::{Alignment, Costs, Performance, Record, Tlb};

/// Which way is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    /// More is.
    Higher,
    /// Less is.
    Lower,
}

/// A figure of a run.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// What it is called on pages.
    pub name: &'static str,
    /// Which way is good.
    pub better: Better,
    /// Reads it; none if the run has not got it.
    pub of: fn(&Record) -> Option<f64>,
}

const fn higher(name: &'static str, of: fn(&Record) -> Option<f64>) -> Metric {
    Metric { name, better: Better::Higher, of }
}

const fn lower(name: &'static str, of: fn(&Record) -> Option<f64>) -> Metric {
    Metric { name, better: Better::Lower, of }
}

/// Share of the huge pages in use that meet.
pub const ALIGNED_RATE: Metric =
    higher("aligned_rate", |run| alignment(run, |alignment| alignment.aligned_rate));
/// Share of user memory in aligned blocks.
pub const ALIGNED_COVERAGE: Metric =
    higher("aligned_coverage", |run| alignment(run, |alignment| alignment.aligned_coverage));
/// Seconds from loaded to aligned.
pub const SECONDS_TO_ALIGNMENT: Metric =
    lower("seconds to alignment", |run| alignment(run, |alignment| alignment.seconds_to_alignment));

/// Operations a second.
pub const THROUGHPUT: Metric =
    higher("throughput", |run| performance(run, |performance| performance.per_second));
/// Mean latency in microseconds.
pub const MEAN_LATENCY: Metric =
    lower("mean latency", |run| performance(run, |performance| performance.mean_us));
/// 99th percentile of latencies in microseconds.
pub const P99_LATENCY: Metric =
    lower("p99 latency", |run| performance(run, |performance| performance.p99_us));

/// Cycles a second of the paper's processor, the Xeon E5-2620 v4.
const CLOCK: f64 = 2.1e9;

/// TLB misses an operation, with those by the clock as a processor would have them.
pub const MISSES: Metric = lower("TLB misses", |run| per_operation(run, |tlb| tlb.misses));
/// Those at addresses of programs.
pub const USER_MISSES: Metric =
    lower("TLB misses of programs", |run| per_operation(run, |tlb| tlb.user_misses));
/// Misses an operation, as they were counted.
pub const ALL_MISSES: Metric = lower("all TLB misses", |run| {
    share(run.tlb.as_ref()?.misses?, run.performance.as_ref()?.operations?)
});
/// Misses of a second in which the program waits.
pub const IDLE_MISSES: Metric = lower("TLB misses a second, idle", |run| {
    let idle = run.idle.as_ref()?;
    share(idle.tlb.misses?, idle.seconds?)
});
/// Instructions of such a second.
pub const IDLE_INSTRUCTIONS: Metric = lower("instructions a second, idle", |run| {
    let idle = run.idle.as_ref()?;
    share(idle.tlb.instructions?, idle.seconds?)
});
/// Reads of page tables an operation.
pub const WALK_READS: Metric =
    lower("page table reads", |run| per_operation(run, |tlb| tlb.walk_reads));
/// Cycles an operation.
pub const CYCLES: Metric = lower("cycles", |run| per_operation(run, |tlb| tlb.cycles));
/// Cycles that the TLB costs an operation: hits of its second level, and walks.
pub const TLB_CYCLES: Metric =
    lower("TLB cycles", |run| per_operation(run, |tlb| Some(tlb.cycles? - tlb.instructions?)));
/// Instructions an operation.
pub const INSTRUCTIONS: Metric =
    lower("instructions", |run| per_operation(run, |tlb| tlb.instructions));

/// Guest memory that the host holds, in MiB.
pub const HOST_RSS: Metric = lower("host RSS", |run| costs(run, |costs| costs.host_rss_mib));
/// Memory that the guest uses, in MiB.
pub const GUEST_USED: Metric =
    lower("memory used in the guest", |run| costs(run, |costs| costs.guest_used_mib));
/// Copied by the host, in MiB.
pub const COPIED: Metric = lower("copied", |run| costs(run, |costs| costs.copied_mib));
/// Blocks emptied by the guest.
pub const MOVED: Metric = lower("moved blocks", |run| costs(run, |costs| costs.moved_blocks));
/// CPU seconds of the daemon.
pub const DAEMON_CPU: Metric =
    lower("daemon CPU", |run| costs(run, |costs| costs.daemon_cpu_seconds));
/// CPU seconds of the host's kernel threads.
pub const HOST_KERNEL_CPU: Metric =
    lower("host kernel CPU", |run| costs(run, |costs| costs.host_kernel_cpu_seconds));
/// CPU seconds of the guest's kernel.
pub const GUEST_KERNEL_CPU: Metric =
    lower("guest kernel CPU", |run| costs(run, |costs| costs.guest_kernel_cpu_seconds));
/// MiB copied for each aligned block.
pub const COPIED_PER_BLOCK: Metric =
    lower("copied per aligned block", |run| per_block(run, costs(run, |costs| costs.copied_mib)?));
/// CPU seconds of the daemon for each aligned block. Not of the host's kernel: its threads work for
/// all of the machine.
pub const CPU_PER_BLOCK: Metric = lower("daemon CPU per aligned block", |run| {
    per_block(run, costs(run, |costs| costs.daemon_cpu_seconds)?)
});

/// Accesses to data an operation: what stands for work where no instructions are counted.
pub const ACCESSES: Metric =
    lower("accesses to data", |run| per_operation(run, |tlb| tlb.accesses));

/// Share of the first program's aligned blocks that still wait, whole, for the next one.
pub const WAITING: Metric = higher("waiting", |run| {
    let reuse = run.reuse.as_ref()?;
    share(reuse.waiting?, reuse.aligned_before?)
});

/// Share of the first program's aligned blocks that the second one has.
pub const REUSED: Metric = higher("reused", |run| {
    let reuse = run.reuse.as_ref()?;
    share(reuse.reused?, reuse.aligned_before?)
});

fn alignment(run: &Record, of: fn(&Alignment) -> Option<f64>) -> Option<f64> {
    run.alignment.as_ref().and_then(of)
}

fn performance(run: &Record, of: fn(&Performance) -> Option<f64>) -> Option<f64> {
    run.performance.as_ref().and_then(of)
}

fn costs(run: &Record, of: fn(&Costs) -> Option<f64>) -> Option<f64> {
    run.costs.as_ref().and_then(of)
}

/// By the operations that were done: runs need not do the same number. What the guest does by the
/// clock counts for as long as the operations would take a processor: an emulated one takes hundreds
/// of times as long for them, and what happens once a second would count as many times.
fn per_operation(run: &Record, of: fn(&Tlb) -> Option<f64>) -> Option<f64> {
    let (tlb, performance) = (run.tlb.as_ref()?, run.performance.as_ref()?);
    let too_much = run.idle.as_ref().and_then(|idle| {
        let a_second = share(of(&idle.tlb)?, idle.seconds?)?;
        let by_the_guests_clock = performance.seconds? / run.slowdown();
        Some(a_second * (by_the_guests_clock - tlb.cycles? / CLOCK).max(0.0))
    });
    let left = of(tlb)? - too_much.unwrap_or(0.0);
    // What would be taken off is only known about: it cannot be all there is.
    (left >= 0.0).then(|| share(left, performance.operations?))?
}

fn per_block(run: &Record, cost: f64) -> Option<f64> {
    share(cost, alignment(run, |alignment| alignment.aligned)?)
}

fn share(part: f64, whole: f64) -> Option<f64> {
    (whole > 0.0).then(|| part / whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(rest: &str) -> Record {
        let run = r#"{"workload":"w","policy":"none","state":"scarce","vm":"clean"}"#;
        Record::parse(&format!(r#"{{"schema":1,"run":{run},{rest}}}"#)).expect("a record")
    }

    #[test]
    fn misses_are_per_operation_and_nothing_is_made_up() {
        let run = record(r#""performance":{"operations":50},"tlb":{"misses":100,"cycles":null}"#);
        assert_eq!((MISSES.of)(&run), Some(2.0));
        assert_eq!((CYCLES.of)(&run), None);
        assert_eq!((MISSES.of)(&record(r#""tlb":{"misses":100}"#)), None);
    }

    #[test]
    fn what_happens_by_the_clock_counts_as_long_as_a_processor_would_take() {
        let rest = r#""performance":{"operations":50,"seconds":20},
            "tlb":{"misses":100,"cycles":8.4e9},"idle":{"seconds":4,"tlb":{"misses":10}}"#;
        let run = record(rest);
        // 2.5 a second, and 16 of the 20 seconds are the emulator's own.
        assert_eq!((MISSES.of)(&run), Some(1.2));
        assert_eq!((ALL_MISSES.of)(&run), Some(2.0));
        assert_eq!((IDLE_MISSES.of)(&run), Some(2.5));
        // By its own clock the guest took 8 seconds, or less than a processor would have.
        let slow = |slowdown| record(&format!(r#""arguments":{{"slowdown":{slowdown}}},{rest}"#));
        assert_eq!((MISSES.of)(&slow("2.5")), Some(1.8));
        assert_eq!((MISSES.of)(&slow("64")), Some(2.0));
        let busy = record(&rest.replace("\"misses\":10}", "\"misses\":1000}"));
        assert_eq!((MISSES.of)(&busy), None);
        let fast = record(&rest.replace("\"seconds\":20", "\"seconds\":2"));
        assert_eq!((MISSES.of)(&fast), Some(2.0));
        // Without an estimate of its time nothing is taken off.
        let untimed = record(&rest.replace("8.4e9", "null"));
        assert_eq!((MISSES.of)(&untimed), Some(2.0));
    }

    #[test]
    fn costs_per_block_need_a_block() {
        let costs =
            r#""costs":{"copied_mib":8,"daemon_cpu_seconds":1,"host_kernel_cpu_seconds":3}"#;
        let run = record(&format!(r#"{costs},"alignment":{{"aligned":4}}"#));
        assert_eq!((COPIED_PER_BLOCK.of)(&run), Some(2.0));
        assert_eq!((CPU_PER_BLOCK.of)(&run), Some(0.25));
        let run = record(&format!(r#"{costs},"alignment":{{"aligned":0}}"#));
        assert_eq!((COPIED_PER_BLOCK.of)(&run), None);
    }

    #[test]
    fn reuse_is_a_share_of_what_was_aligned() {
        let run = record(r#""reuse":{"aligned_before":100,"reused":97}"#);
        assert_eq!((REUSED.of)(&run), Some(0.97));
    }
}

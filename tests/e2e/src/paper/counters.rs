//! TLB misses by the hardware's own counters, on the threads that run a guest's
//! processors.

use std::io;

use anyhow::Context;
use gemini_harness::sys::{Event, EventCounter, Whose};
use serde_json::json;

use super::record::Tlb;
use crate::qmp::Qmp;

/// Counters that run since they were opened, by thread.
#[derive(Debug)]
pub struct Counters {
    /// Of loads and stores.
    accesses: Vec<EventCounter>,
    misses: Vec<EventCounter>,
    cycles: Vec<EventCounter>,
    instructions: Vec<EventCounter>,
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
        let of = |event| -> io::Result<Vec<EventCounter>> {
            let open = |thread: &i32| EventCounter::new(*thread, event, Whose::Everybody);
            threads.iter().map(open).collect()
        };
        let mut misses = of(Event::DTLB_LOAD_MISSES)
            .context("this processor does not count misses of its TLB, or does not let us")?;
        // Some processors count both as one, or only some of it.
        misses.extend(of(Event::DTLB_STORE_MISSES).unwrap_or_default());
        let mut accesses = of(Event::DTLB_LOADS).unwrap_or_default();
        accesses.extend(of(Event::DTLB_STORES).unwrap_or_default());
        let cycles = of(Event::CYCLES).unwrap_or_default();
        let instructions = of(Event::INSTRUCTIONS).unwrap_or_default();
        Ok(Counters { accesses, misses, cycles, instructions })
    }

    /// What was counted since, estimated where a counter had to share its hardware.
    ///
    /// # Errors
    /// If a counter cannot be read.
    pub fn total(&self) -> anyhow::Result<Tlb> {
        Ok(Tlb {
            accesses: sum(&self.accesses)?,
            misses: sum(&self.misses)?,
            user_misses: None,
            cycles: sum(&self.cycles)?,
            instructions: sum(&self.instructions)?,
            ..Tlb::default()
        })
    }
}

/// None where nothing is counted.
fn sum(counters: &[EventCounter]) -> anyhow::Result<Option<u64>> {
    if counters.is_empty() {
        return Ok(None);
    }
    let total = counters.iter().map(EventCounter::read).sum::<io::Result<u64>>();
    total.map(Some).context("a counter cannot be read")
}

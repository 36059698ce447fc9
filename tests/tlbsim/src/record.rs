//! Records what a processor is told while it is told it.

use std::collections::HashMap;
use std::io::{self, Write};

use crate::counters::Counters;
use crate::cpu::Cpu;
use crate::host::HostMap;
use crate::paging::{PageSize, Translation};
use crate::trace::{Event, Header, Writer};

/// Most translations that are remembered, to be written once.
const KNOWN_LIMIT: usize = 1 << 18;

/// A trace in the making.
///
/// While it is made, translations come from what the trace holds: a processor
/// may go by an old one until it is told to flush it, so every replay, with
/// whatever TLB, sees what this processor sees. Pages that the guest has mapped since,
/// beside a page whose translation the trace holds, are not seen meanwhile: that takes
/// no flush. A processor that merges pages merges fewer while it is recorded.
#[derive(Debug)]
pub struct Recorder<W> {
    writer: Writer<W>,
    known: HashMap<u64, Translation>,
    start: Counters,
    limit: u64,
    /// The first thing that went wrong; nothing is written after it.
    error: Option<io::Error>,
}

impl<W: Write> Recorder<W> {
    /// Begins a trace of at most about `limit` bytes, for a processor that is new:
    /// its TLBs are empty.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn new(
        output: W,
        header: &Header,
        cpu: &Cpu,
        host: &HostMap,
        limit: u64,
    ) -> io::Result<Self> {
        let mut writer = Writer::new(output, header)?;
        writer.event(&Event::Host(host.bits().to_vec()))?;
        let start = cpu.counters().snapshot();
        Ok(Recorder { writer, known: HashMap::new(), start, limit, error: None })
    }

    /// Whether the trace is as large as it may be, or cannot be written.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.writer.written() >= self.limit || self.error.is_some()
    }

    /// Tells the processor of an access, and the trace.
    pub fn access(
        &mut self,
        cpu: &mut Cpu,
        address: u64,
        host: &HostMap,
        translate: impl FnOnce(u64) -> Option<Translation>,
    ) {
        let page = address >> PageSize::Base.shift();
        let translation = match self.known.get(&page) {
            Some(known) => *known,
            None => {
                let Some(found) = translate(address) else {
                    cpu.skip();
                    return;
                };
                if self.known.len() >= KNOWN_LIMIT {
                    self.known.clear();
                }
                self.known.insert(page, found);
                self.write(&Event::Translation(page, found));
                found
            }
        };
        self.write(&Event::Access(page));
        cpu.access(address, host, |_| Some(translation));
    }

    /// Records what else happened. Translations may be others after it.
    pub fn event(&mut self, event: &Event) {
        self.known.clear();
        self.write(event);
    }

    /// Ends the trace.
    ///
    /// # Errors
    /// If it could not be written, now or before: no replay takes it then.
    pub fn finish(mut self, cpu: &Cpu) -> io::Result<()> {
        let counted = cpu.counters().snapshot().since(&self.start);
        let full = self.is_full();
        self.write(&Event::End { counted, full });
        self.error.map_or(Ok(()), Err)
    }

    fn write(&mut self, event: &Event) {
        if self.error.is_none() {
            self.error = self.writer.event(event).err();
        }
    }
}

//! What the guest's driver says and asks for: reports on one queue, requests on two others.

use super::{trim, worker, Answer, Engine, State};
use crate::backing::Memory;
use crate::fault;
use crate::protocol::{
    Batch, Record, Request, Stats, PAGE_SHIFT, REQ_RENEW, REQ_TRIM, S_BUSY, S_FAILED, S_INVALID,
    S_OK, S_UNSUPPORTED, S_VOID,
};
use std::sync::Arc;

impl Engine {
    /// Whether the driver trims blocks, as it said when it started.
    pub fn set_trims(&self, trims: bool) {
        let pages = 1 << (self.settings.block_shift - PAGE_SHIFT);
        self.lock().state.block_pages = trims.then_some(pages);
    }

    /// Counts a chain that could not be understood.
    pub fn refuse(&self) {
        self.lock().state.totals.bad_records += 1;
    }

    /// Takes a report of the driver.
    pub fn report(&self, batch: &Batch, records: &[Record]) {
        let mut inner = self.lock();
        let refused = inner.state.apply_report(batch, records);
        inner.state.totals.bad_records += refused;
        drop(inner);
        if refused > 0 {
            log::warn!("{refused} record(s) of a report refused: unknown state or no such block");
        }
        self.wake();
    }

    /// Takes a PREPARE; the device serves one at a time.
    pub fn prepare(&self, request: &Request, ranges: &[(u64, u32)]) -> (u64, Answer) {
        let mut inner = self.lock();
        if let Some(status) = inner.state.refusal(request, ranges) {
            return (0, Answer::Now(status, Vec::new()));
        }
        if !inner.state.policy.prepares() {
            return (0, Answer::Now(S_UNSUPPORTED, Vec::new()));
        }
        let id = inner.next_prepare;
        inner.next_prepare += 1;
        inner.state.repair.prepare(id, ranges.to_vec());
        if inner.state.makes_nothing() {
            // Answered with what is there.
            inner.state.repair.skip_prepare();
        }
        fault::point("prepare.fetched");
        drop(inner);
        self.wake();
        (id, Answer::Later)
    }

    /// The queue stops: the PREPARE `id` will not be answered by the engine.
    pub fn cancel_prepare(&self, id: u64) {
        self.lock().state.repair.end_prepare(id);
    }

    /// Answers a QUERY from what is known.
    pub fn query(&self, request: &Request, ranges: &[(u64, u32)]) -> Answer {
        let inner = self.lock();
        match inner.state.refusal(request, ranges) {
            Some(status) => Answer::Now(status, Vec::new()),
            None => Answer::Now(S_OK, inner.state.host_records(ranges)),
        }
    }

    /// Answers a STATS request.
    pub fn stats(&self) -> Stats {
        self.lock().state.stats()
    }

    /// Does a RELEASE, a RENEW or a TRIM, on the release queue's thread: returns its status. Never
    /// waits for a collapse. The caller holds the release queue, so that a stop of it, and a
    /// new memory table, wait for the end of this.
    pub fn release(&self, request: &Request, ranges: &[(u64, u32)]) -> u32 {
        let trim = request.kind == REQ_TRIM;
        // What is named is dropped; what becomes of it is looked at by blocks.
        let touched = trim.then(|| trim::blocks_of(ranges, self.settings.block_shift));
        let blocks = touched.as_deref().unwrap_or(ranges);
        let memory = match self.begin_release(request, blocks) {
            Ok(memory) => memory,
            Err(status) => return status,
        };
        let [fetched, done] = match request.kind {
            REQ_RENEW => ["renew.fetched", "renew.done"],
            REQ_TRIM => ["trim.fetched", "trim.done"],
            _ => ["release.fetched", "release.done"],
        };
        fault::point(fetched);
        let (dropped, status) = drop_ranges(&memory, trim, ranges);
        let mut runs = Vec::new();
        let mut seen = true;
        for &(first, count) in blocks {
            seen &= worker::scan(&memory, first, count, &mut runs);
        }
        fault::point(done);
        let mut inner = self.lock();
        let state = &mut inner.state;
        state.apply_dropped(&runs);
        let complete = seen && status == S_OK;
        let renewed = request.kind == REQ_RENEW && status == S_OK && state.serves_requests();
        state.end_release(blocks, renewed, complete);
        match request.kind {
            REQ_RENEW => state.totals.renewed += dropped,
            REQ_TRIM => state.totals.trimmed_pages += dropped,
            _ => state.totals.released += dropped,
        }
        drop(inner);
        self.wake();
        status
    }

    /// The memory of which `blocks` may be dropped now, or the status that says why not.
    fn begin_release(&self, request: &Request, blocks: &[(u64, u32)]) -> Result<Arc<Memory>, u32> {
        let mut inner = self.lock();
        let state = &mut inner.state;
        if let Some(status) = state.refusal(request, blocks) {
            return Err(status);
        }
        let memory = state.memory.clone().ok_or(S_BUSY)?;
        if !memory.may_discard() {
            return Err(S_UNSUPPORTED);
        }
        if state.logging {
            return Err(S_BUSY);
        }
        match request.kind {
            REQ_RENEW if state.policy.prepares() => {
                if state.paused || !state.may_renew(blocks) {
                    state.timeout.request_failed();
                    return Err(S_BUSY);
                }
                state.renewing = blocks.iter().map(|(_, count)| u64::from(*count)).sum();
            }
            REQ_RENEW | REQ_TRIM => {}
            // Before anything is dropped, or it could be filled again at once.
            _ => {
                for index in indices(state, blocks) {
                    state.repair.forget_fill(index);
                }
            }
        }
        state.begin_drop();
        Ok(memory)
    }
}

/// Drops ranges of pages or of blocks; up to the first that cannot be, and how many that were.
fn drop_ranges(memory: &Memory, pages: bool, ranges: &[(u64, u32)]) -> (u64, u32) {
    let mut dropped = 0;
    for &(first, count) in ranges {
        let count = u64::from(count);
        let (what, result) = if pages {
            ("page(s)", memory.trim(first << PAGE_SHIFT..(first + count) << PAGE_SHIFT))
        } else {
            ("block(s)", memory.discard(first, count))
        };
        if let Err(error) = result {
            log::warn!("cannot drop {count} {what} from {first:#x} on: {error}");
            return (dropped, S_FAILED);
        }
        dropped += count;
    }
    (dropped, S_OK)
}

/// Indices of the blocks of `ranges`.
fn indices(state: &State, ranges: &[(u64, u32)]) -> Vec<usize> {
    let spans = ranges.iter().flat_map(|&(first, count)| state.map.index_ranges(first, count));
    spans.flatten().collect()
}

impl State {
    /// Why a request is refused, before anything is done; `None` if it is not.
    fn refusal(&self, request: &Request, ranges: &[(u64, u32)]) -> Option<u32> {
        if request.generation != self.generation {
            return Some(S_VOID);
        }
        // Each block once at most: bounds the cost of one request by the size of the guest.
        let blocks: u64 = ranges.iter().map(|(_, count)| u64::from(*count)).sum();
        let valid = !ranges.is_empty()
            && blocks <= self.map.len() as u64
            && ranges.iter().all(|&(first, count)| self.map.is_managed(first, count));
        (!valid).then_some(S_INVALID)
    }

    /// The known host states of ranges, as records.
    pub(super) fn host_records(&self, ranges: &[(u64, u32)]) -> Vec<Record> {
        let mut records: Vec<Record> = Vec::new();
        for &(first, count) in ranges {
            let end = first.saturating_add(u64::from(count));
            let Some(from) = self.map.index_of(first) else { continue };
            for (run, length, host, _) in self.map.runs(from, |b| b.host) {
                if run >= end {
                    break;
                }
                let length = u64::from(length).min(end - run);
                records.push(Record {
                    first: run,
                    count: u32::try_from(length).unwrap_or(u32::MAX),
                    state: host as u8,
                    ..Record::default()
                });
            }
        }
        records
    }

    /// After a drop: blocks that are `renewed` are to be made huge; of the others the driver is told,
    /// also of what is as it was. What was not all done, or seen, is looked at again.
    fn end_release(&mut self, blocks: &[(u64, u32)], renewed: bool, complete: bool) {
        for index in indices(self, blocks) {
            if renewed {
                self.repair.fill(index);
            } else {
                self.repair.forget_fill(index);
                self.hints.changed(index);
            }
            if !complete {
                self.scan.look_at(index);
            }
        }
        self.renewing = 0;
    }
}

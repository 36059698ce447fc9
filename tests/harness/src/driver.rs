//! The guest driver's side of virtio-gemini, for the model guest.
//!
//! It follows the device specification and holds the device to it: what the
//! device must not do is an error here.

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context};

use crate::frontend::{Queue, Session};
use crate::memory::{GuestMemory, BLOCK_SHIFT, BLOCK_SIZE};
use crate::ring::{Buffer, Ring, RingLayout};
use crate::sys;
use crate::wire::{
    self, host_state, Advice, Batch, Range, Record, Response, Stats, CTRLQ, HINTQ, RELEASEQ,
    REPORTQ,
};

/// Guest memory that the driver keeps for its rings and buffers, in blocks.
pub const AREA_BLOCKS: u64 = 4;

const RING_SIZE: u16 = 64;
const RING_STRIDE: u64 = 16 << 10;
const BUFFER_LEN: u64 = 128 << 10;
const REQUEST_ROOM: u64 = 8 << 10;
const HINT_SLOTS: u64 = 16;
const REPORT_SLOTS: u64 = 16;
const CTRL_SLOTS: u64 = 16;
const RELEASE_SLOTS: u64 = 32;
const HINT_BUFFERS: u64 = 1 << 20;
const REPORT_BUFFERS: u64 = HINT_BUFFERS + HINT_SLOTS * BUFFER_LEN;
const CTRL_BUFFERS: u64 = REPORT_BUFFERS + REPORT_SLOTS * BUFFER_LEN;
const RELEASE_BUFFERS: u64 = CTRL_BUFFERS + CTRL_SLOTS * BUFFER_LEN;
const RELEASE_STRIDE: u64 = 2 * REQUEST_ROOM;
const _: () = assert!(
    RELEASE_BUFFERS + RELEASE_SLOTS * RELEASE_STRIDE <= AREA_BLOCKS * BLOCK_SIZE,
    "the buffers do not fit into the area"
);
const _: () = assert!(wire::MAX_RECORDS * wire::RECORD_LEN + wire::BATCH_LEN <= 128 << 10);

/// A request that the device has not answered yet.
#[derive(Clone, Debug)]
pub struct Request {
    /// Number that the driver gave it.
    pub ticket: u64,
    /// One of the `REQ_` constants.
    pub kind: u16,
    /// Generation that it was made in.
    pub generation: u64,
    /// What it is about.
    pub ranges: Vec<Range>,
    slot: u64,
}

/// The device's answer to a request.
#[derive(Clone, Debug)]
pub struct Answer {
    /// What was asked.
    pub request: Request,
    /// How it went.
    pub response: Response,
    /// Host states, for PREPARE and QUERY.
    pub records: Vec<Record>,
    /// The statistics, for STATS.
    pub stats: Option<Stats>,
}

/// What the driver counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Hint batches that were taken.
    pub hint_batches: u64,
    /// Hint records that were taken.
    pub hint_records: u64,
    /// Hint batches of another generation, which were ignored.
    pub stale_batches: u64,
    /// Full host states that began.
    pub sync_starts: u64,
    /// Report records that were sent.
    pub report_records: u64,
}

/// The model driver.
#[derive(Debug)]
pub struct Driver {
    memory: Arc<GuestMemory>,
    area: u64,
    queues: Vec<Queue>,
    generation: Option<u64>,
    host: Vec<u8>,
    host_synced: bool,
    report_due: bool,
    advice: Option<Advice>,
    counters: Counters,
    hint_slots: VecDeque<u64>,
    report_slots: VecDeque<u64>,
    report_free: Vec<u64>,
    ctrl: VecDeque<Request>,
    ctrl_free: Vec<u64>,
    release: VecDeque<Request>,
    release_free: Vec<u64>,
    answers: VecDeque<Answer>,
    next_ticket: u64,
}

impl Driver {
    /// A driver whose rings and buffers are in the [`AREA_BLOCKS`] blocks from
    /// `area` (a guest physical address) on.
    ///
    /// # Errors
    /// Those of `eventfd`.
    pub fn new(memory: Arc<GuestMemory>, area: u64) -> anyhow::Result<Self> {
        let queues = (0..wire::QUEUES as u64)
            .map(|index| {
                let layout = RingLayout::new(area + index * RING_STRIDE, RING_SIZE);
                Queue::new(Ring::new(Arc::clone(&memory), layout))
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        let end = memory
            .regions()
            .iter()
            .map(|region| (region.gpa + region.size) >> BLOCK_SHIFT)
            .max()
            .unwrap_or(0);
        let mut driver = Driver {
            area,
            queues,
            generation: None,
            host: vec![host_state::ABSENT; usize::try_from(end)?],
            host_synced: false,
            report_due: false,
            advice: None,
            counters: Counters::default(),
            hint_slots: VecDeque::new(),
            report_slots: VecDeque::new(),
            report_free: Vec::new(),
            ctrl: VecDeque::new(),
            ctrl_free: Vec::new(),
            release: VecDeque::new(),
            release_free: Vec::new(),
            answers: VecDeque::new(),
            next_ticket: 1,
            memory,
        };
        driver.reset()?;
        Ok(driver)
    }

    /// Starts anew, as after a completed device reset: clears the rings, forgets
    /// what the device told, and offers all hint buffers. Returns the requests
    /// that were never answered; what they asked to be dropped has undefined
    /// contents, and no later drop can follow.
    ///
    /// # Errors
    /// Never for sound rings.
    pub fn reset(&mut self) -> anyhow::Result<Vec<Request>> {
        for queue in &mut self.queues {
            queue.ring.reset();
        }
        self.forget();
        self.report_slots.clear();
        self.report_free = (0..REPORT_SLOTS).rev().collect();
        self.ctrl_free = (0..CTRL_SLOTS).rev().collect();
        self.release_free = (0..RELEASE_SLOTS).rev().collect();
        self.answers.clear();
        self.hint_slots.clear();
        for slot in 0..HINT_SLOTS {
            self.offer_hint_buffer(slot)?;
        }
        let mut unanswered: Vec<_> = self.ctrl.drain(..).collect();
        unanswered.extend(self.release.drain(..));
        Ok(unanswered)
    }

    fn forget(&mut self) {
        self.generation = None;
        self.host.fill(host_state::ABSENT);
        self.host_synced = false;
        self.report_due = false;
        self.advice = None;
    }

    /// Starts all queues of a new session with rings that begin at 0.
    ///
    /// # Errors
    /// If the daemon refuses a step of it.
    pub fn start(&mut self, session: &mut Session) -> anyhow::Result<()> {
        for (index, queue) in self.queues.iter().enumerate() {
            session.start_queue(index, queue, &self.memory, 0)?;
        }
        Ok(())
    }

    /// Starts all queues of a new session after the daemon died without stopping
    /// them: each goes on at the first buffer that was not used, as QEMU has it.
    ///
    /// # Errors
    /// If the daemon refuses a step of it.
    pub fn resume(&mut self, session: &mut Session) -> anyhow::Result<()> {
        for (index, queue) in self.queues.iter().enumerate() {
            let base = queue.ring.used_index_in_memory();
            session.start_queue(index, queue, &self.memory, base)?;
        }
        Ok(())
    }

    /// Notes that a new generation must come: the full host state that is known
    /// is an old one from here on.
    pub fn expect_resync(&mut self) {
        self.host_synced = false;
    }

    /// The generation, once a full host state began.
    #[must_use]
    pub fn generation(&self) -> Option<u64> {
        self.generation
    }

    /// Whether the full host state is in.
    #[must_use]
    pub fn host_synced(&self) -> bool {
        self.host_synced
    }

    /// Whether the device waits for the full guest state.
    #[must_use]
    pub fn report_due(&self) -> bool {
        self.report_due
    }

    /// Host state of each block, as hinted, by block number.
    #[must_use]
    pub fn host(&self) -> &[u8] {
        &self.host
    }

    /// The last advice.
    #[must_use]
    pub fn advice(&self) -> Option<Advice> {
        self.advice
    }

    /// What was counted.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Requests that are not answered yet.
    pub fn unanswered(&self) -> impl Iterator<Item = &Request> {
        self.ctrl.iter().chain(&self.release)
    }

    /// All queues.
    #[must_use]
    pub fn queues(&self) -> &[Queue] {
        &self.queues
    }

    /// A queue, for those who want to misuse it.
    pub fn queue_mut(&mut self, index: usize) -> &mut Queue {
        &mut self.queues[index]
    }

    fn offer_hint_buffer(&mut self, slot: u64) -> anyhow::Result<()> {
        let buffer = Buffer {
            addr: self.area + HINT_BUFFERS + slot * BUFFER_LEN,
            len: u32::try_from(BUFFER_LEN)?,
            writable: true,
        };
        self.queues[HINTQ].ring.add(&[buffer])?;
        self.hint_slots.push_back(slot);
        Ok(())
    }

    /// Takes what the device has told on hintq. Returns whether there was
    /// anything.
    ///
    /// # Errors
    /// If the device did what it must not.
    pub fn poll_hints(&mut self) -> anyhow::Result<bool> {
        let mut refilled = false;
        while let Some((_, len)) = self.queues[HINTQ].ring.take_used().context("hintq")? {
            let slot = self.hint_slots.pop_front().context("hintq: no slot")?;
            self.take_hints(slot, len).context("hintq")?;
            self.offer_hint_buffer(slot)?;
            refilled = true;
        }
        if refilled {
            self.queues[HINTQ].kick.write(1)?;
        }
        Ok(refilled)
    }

    /// Takes whatever the device has used by now. Returns whether there was
    /// anything.
    ///
    /// # Errors
    /// If the device did what it must not.
    pub fn poll(&mut self) -> anyhow::Result<bool> {
        let mut any = self.poll_hints()?;
        while let Some((_, len)) = self.queues[REPORTQ].ring.take_used().context("reportq")? {
            ensure!(len == 0, "reportq: device says it wrote {len} bytes");
            let slot = self.report_slots.pop_front().context("reportq: no slot")?;
            self.report_free.push(slot);
            any = true;
        }
        while let Some((_, len)) = self.queues[CTRLQ].ring.take_used().context("ctrlq")? {
            let request = self.ctrl.pop_front().context("ctrlq: no request")?;
            self.ctrl_free.push(request.slot);
            let at = self.area + CTRL_BUFFERS + request.slot * BUFFER_LEN + REQUEST_ROOM;
            self.take_answer(request, at, len).context("ctrlq")?;
            any = true;
        }
        while let Some((_, len)) = self.queues[RELEASEQ].ring.take_used().context("releaseq")? {
            let request = self.release.pop_front().context("releaseq: no request")?;
            self.release_free.push(request.slot);
            let at = self.area + RELEASE_BUFFERS + request.slot * RELEASE_STRIDE + REQUEST_ROOM;
            self.take_answer(request, at, len).context("releaseq")?;
            any = true;
        }
        Ok(any)
    }

    fn take_hints(&mut self, slot: u64, len: u32) -> anyhow::Result<()> {
        ensure!(
            len as usize >= wire::BATCH_LEN && u64::from(len) <= BUFFER_LEN,
            "batch of {len} bytes"
        );
        let mut bytes = vec![0; len as usize];
        self.memory.read(self.area + HINT_BUFFERS + slot * BUFFER_LEN, &mut bytes);
        let batch = Batch::parse(&bytes);
        let elements = &bytes[wire::BATCH_LEN..];
        let element_len = match batch.kind {
            wire::BATCH_STATE => wire::RECORD_LEN,
            wire::BATCH_ADVICE => wire::ADVICE_LEN,
            other => bail!("batch of unknown type {other}"),
        };
        ensure!(
            elements.len() == batch.count as usize * element_len,
            "batch says {} elements and has {} bytes of them",
            batch.count,
            elements.len()
        );

        let starts = batch.kind == wire::BATCH_STATE && batch.flags & wire::SYNC_START != 0;
        if starts {
            ensure!(batch.generation != 0, "a generation is 0");
            self.forget();
            self.generation = Some(batch.generation);
            self.report_due = true;
            self.counters.sync_starts += 1;
        }
        if self.generation != Some(batch.generation) {
            self.counters.stale_batches += 1;
            return Ok(());
        }
        self.counters.hint_batches += 1;
        if batch.kind == wire::BATCH_ADVICE {
            ensure!(batch.count == 1, "{} advices in a batch", batch.count);
            self.advice = Some(Advice::parse(elements));
            return Ok(());
        }
        for bytes in elements.chunks(wire::RECORD_LEN) {
            self.apply(Record::parse(bytes))?;
        }
        if batch.flags & wire::SYNC_END != 0 {
            self.host_synced = true;
        }
        Ok(())
    }

    fn apply(&mut self, record: Record) -> anyhow::Result<()> {
        let known = usize::from(record.state) < host_state::NAMES.len();
        ensure!(record.count > 0 && known && record.flags == 0, "unsound {record:?}");
        let first = usize::try_from(record.first)?;
        let blocks = first
            .checked_add(record.count as usize)
            .and_then(|end| self.host.get_mut(first..end))
            .with_context(|| format!("{record:?} is out of guest memory"))?;
        blocks.fill(record.state);
        self.counters.hint_records += 1;
        Ok(())
    }

    fn take_answer(&mut self, request: Request, at: u64, len: u32) -> anyhow::Result<()> {
        ensure!(len as usize >= wire::RESPONSE_LEN, "answer of {len} bytes to {request:?}");
        let mut bytes = vec![0; len as usize];
        self.memory.read(at, &mut bytes);
        let response = Response::parse(&bytes);
        let elements = &bytes[wire::RESPONSE_LEN..];
        ensure!(response.status <= wire::S_BUSY, "unknown status {}", response.status);
        let (mut records, mut stats) = (Vec::new(), None);
        let expected = match request.kind {
            wire::REQ_STATS => {
                if response.count == 1 {
                    stats = Some(Stats::parse(elements));
                }
                response.count as usize * wire::STATS_LEN
            }
            wire::REQ_PREPARE | wire::REQ_QUERY => {
                records.extend(elements.chunks(wire::RECORD_LEN).map(Record::parse));
                response.count as usize * wire::RECORD_LEN
            }
            _ => {
                ensure!(response.count == 0, "{} elements", response.count);
                0
            }
        };
        ensure!(
            elements.len() == expected,
            "answer says {} elements and has {} bytes of them",
            response.count,
            elements.len()
        );
        self.answers.push_back(Answer { request, response, records, stats });
        Ok(())
    }

    /// Sleeps until the device signals, `limit` at most, then polls.
    ///
    /// # Errors
    /// As [`Driver::poll`].
    pub fn wait(&mut self, limit: Duration) -> anyhow::Result<bool> {
        if self.poll()? {
            return Ok(true);
        }
        let calls: Vec<_> = self.queues.iter().map(|queue| queue.call.as_raw_fd()).collect();
        sys::wait_readable(&calls, limit)?;
        for queue in &self.queues {
            // An event that was not signalled would block: nothing to take.
            let _ = queue.call.read();
        }
        self.poll()
    }

    /// Polls until `done`.
    ///
    /// # Errors
    /// If it is not in time, or as [`Driver::poll`].
    pub fn wait_until(
        &mut self,
        what: &str,
        patience: Duration,
        mut done: impl FnMut(&Driver) -> bool,
    ) -> anyhow::Result<()> {
        let deadline = Instant::now() + patience;
        while !done(self) {
            let now = Instant::now();
            ensure!(now < deadline, "no {what} after {patience:?}");
            self.wait((deadline - now).min(Duration::from_millis(100)))?;
        }
        Ok(())
    }

    /// Sends one batch on reportq as it is, waiting for a free buffer.
    ///
    /// # Errors
    /// If no buffer comes back within `patience`.
    pub fn send_report(&mut self, bytes: &[u8], patience: Duration) -> anyhow::Result<()> {
        self.wait_until("free report buffer", patience, |driver| !driver.report_free.is_empty())?;
        let slot = self.report_free.pop().context("no free report buffer")?;
        let addr = self.area + REPORT_BUFFERS + slot * BUFFER_LEN;
        self.memory.write(addr, bytes);
        let queue = &mut self.queues[REPORTQ];
        queue.ring.add(&[Buffer { addr, len: u32::try_from(bytes.len())?, writable: false }])?;
        self.report_slots.push_back(slot);
        queue.kick.write(1)?;
        Ok(())
    }

    /// Batches on reportq that the device has not taken yet.
    #[must_use]
    pub fn reports_pending(&self) -> usize {
        self.report_slots.len()
    }

    /// Reports changes. Before a generation is known nothing is sent: the full
    /// state that follows tells everything.
    ///
    /// # Errors
    /// If the device takes no reports within `patience`.
    pub fn report(&mut self, records: &[Record], patience: Duration) -> anyhow::Result<()> {
        let Some(generation) = self.generation else {
            return Ok(());
        };
        for chunk in records.chunks(wire::MAX_RECORDS) {
            let batch = wire::state_batch(generation, 0, chunk);
            self.send_report(&batch, patience)?;
            self.counters.report_records += chunk.len() as u64;
        }
        Ok(())
    }

    /// Reports the full state. Returns whether it was sent to the end; it was not
    /// if a new generation began meanwhile (then it is due again).
    ///
    /// # Errors
    /// If the device takes no reports within `patience`.
    pub fn report_full(&mut self, records: &[Record], patience: Duration) -> anyhow::Result<bool> {
        let generation = self.generation.context("no generation yet")?;
        self.report_due = false;
        let batches = records.len().div_ceil(wire::MAX_RECORDS).max(1);
        for index in 0..batches {
            let start = index * wire::MAX_RECORDS;
            let end = records.len().min(start + wire::MAX_RECORDS);
            let mut flags = 0;
            if index == 0 {
                flags |= wire::SYNC_START;
            }
            if index + 1 == batches {
                flags |= wire::SYNC_END;
            }
            let batch = wire::state_batch(generation, flags, &records[start..end]);
            self.send_report(&batch, patience)?;
            self.counters.report_records += (end - start) as u64;
            if self.generation != Some(generation) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Sends a request in the current generation; the ticket finds its answer.
    ///
    /// # Errors
    /// If there is no generation yet, or no free slot.
    pub fn submit(&mut self, kind: u16, ranges: &[Range]) -> anyhow::Result<u64> {
        let generation = self.generation.context("no generation yet")?;
        self.submit_in(generation, kind, ranges)
    }

    /// Sends a request in a generation of the caller's choice.
    ///
    /// # Errors
    /// If there is no free slot.
    pub fn submit_in(
        &mut self,
        generation: u64,
        kind: u16,
        ranges: &[Range],
    ) -> anyhow::Result<u64> {
        let drops = matches!(kind, wire::REQ_RELEASE | wire::REQ_RENEW | wire::REQ_TRIM);
        let free = if drops { &mut self.release_free } else { &mut self.ctrl_free };
        let slot = free.pop().context("all request slots are taken")?;
        let (queue, at, room) = if drops {
            let at = self.area + RELEASE_BUFFERS + slot * RELEASE_STRIDE;
            (RELEASEQ, at, RELEASE_STRIDE - REQUEST_ROOM)
        } else {
            let at = self.area + CTRL_BUFFERS + slot * BUFFER_LEN;
            (CTRLQ, at, BUFFER_LEN - REQUEST_ROOM)
        };
        let bytes = wire::request(kind, generation, ranges);
        ensure!(bytes.len() as u64 <= REQUEST_ROOM, "request is too long");
        self.memory.write(at, &bytes);
        let buffers = [
            Buffer { addr: at, len: u32::try_from(bytes.len())?, writable: false },
            Buffer { addr: at + REQUEST_ROOM, len: u32::try_from(room)?, writable: true },
        ];
        self.queues[queue].ring.add(&buffers)?;
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        let request = Request { ticket, kind, generation, ranges: ranges.to_vec(), slot };
        if drops {
            self.release.push_back(request);
        } else {
            self.ctrl.push_back(request);
        }
        self.queues[queue].kick.write(1)?;
        Ok(ticket)
    }

    /// Takes the oldest answer that nobody has taken.
    pub fn take_any_answer(&mut self) -> Option<Answer> {
        self.answers.pop_front()
    }

    /// Waits for the answer to `ticket`.
    ///
    /// # Errors
    /// If it does not come in time.
    pub fn answer(&mut self, ticket: u64, patience: Duration) -> anyhow::Result<Answer> {
        let found = |driver: &Driver| {
            driver.answers.iter().position(|answer| answer.request.ticket == ticket)
        };
        self.wait_until("answer", patience, |driver| found(driver).is_some())?;
        found(self).and_then(|position| self.answers.remove(position)).context("answer vanished")
    }

    /// Sends a request and waits for its answer.
    ///
    /// # Errors
    /// As [`Driver::submit`] and [`Driver::answer`].
    pub fn request(
        &mut self,
        kind: u16,
        ranges: &[Range],
        patience: Duration,
    ) -> anyhow::Result<Answer> {
        let ticket = self.submit(kind, ranges)?;
        self.answer(ticket, patience)
    }
}

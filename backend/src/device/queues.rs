//! The four virtqueues: when each runs, and who may touch it.
//!
//! Every queue has its own lock, held from the moment a chain is taken until it is answered or
//! handed over. Stopping a queue takes that lock, which makes every stop a barrier (safety rule
//! 4 of the device specification). Order of locks: a queue's, then the engine's.

use super::vring::{GuestMemory, Vring};
use super::wire::{self, Chain};
use crate::backing::{memory_was_truncated, signal_event};
use crate::engine::{lock, Answer, Engine, HintBatch, Port};
use crate::fault;
use crate::protocol::{
    Batch, Record, Response, F_RELEASE, F_TRIM, REQ_PREPARE, REQ_QUERY, REQ_RELEASE, REQ_RENEW,
    REQ_STATS, REQ_TRIM, S_BUSY, S_INVALID, S_UNSUPPORTED, S_VOID, VQ_COUNT, VQ_CTRL, VQ_HINT,
    VQ_RELEASE, VQ_REPORT,
};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use vhost_user_backend::VringT;
use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;

/// One queue.
#[derive(Default)]
struct Slot {
    /// The ring, while it runs.
    vring: Option<Vring>,
    /// `ctrlq` only: the PREPARE that the engine is at, by its id.
    prepare: Option<(u64, Chain)>,
    /// The driver's indices make no sense: the ring is left alone until it is started anew.
    broken: bool,
}

impl Slot {
    /// Takes the next chain, if the ring runs and has one.
    fn pop(&mut self, memory: &GuestMemory) -> Option<Chain> {
        if self.broken {
            return None;
        }
        let mut state = self.vring.as_ref()?.get_mut();
        if !state.is_enabled() || !state.get_queue().ready() {
            return None;
        }
        let memory = memory.memory();
        let queue = state.get_queue_mut();
        let available = queue.avail_idx(&*memory, Ordering::Acquire).map(|index| index.0);
        if available.as_ref().is_ok_and(|index| *index == queue.next_avail()) {
            return None;
        }
        let chain = queue.pop_descriptor_chain(memory);
        if chain.is_none() {
            log::warn!("the driver's ring is broken, it is left alone until it is reset");
            self.broken = true;
        }
        chain
    }

    /// Gives a chain back with `length` bytes written, and tells the driver.
    fn publish(&self, chain: &Chain, length: u32) {
        let Some(vring) = &self.vring else { return };
        let told = vring.add_used(chain.head_index(), length).map(|()| {
            if vring.needs_notification().unwrap_or(true) {
                if let Err(error) = vring.signal_used_queue() {
                    log::warn!("cannot interrupt the guest: {error}");
                }
            }
        });
        if let Err(error) = told {
            log::warn!("cannot give a buffer back to the driver: {error}");
        }
    }

    /// Lets the frame's thread look at the ring again, as if the driver had kicked it: what
    /// waited behind a request that was answered here is not served on this thread.
    fn kick_again(&self) {
        let Some(vring) = &self.vring else { return };
        if let Some(kick) = vring.get_ref().get_kick() {
            if let Err(error) = signal_event(kick) {
                log::warn!("cannot wake the queue's thread: {error}");
            }
        }
    }

    /// Asks for kicks again; true if chains came in meanwhile.
    fn rearm(&self) -> bool {
        // A ring that does not run has nothing to give, whatever its indices say.
        !self.broken
            && self.vring.as_ref().is_some_and(|vring| {
                let state = vring.get_ref();
                let runs = state.is_enabled() && state.get_queue().ready();
                drop(state);
                runs && vring.enable_notification().unwrap_or(false)
            })
    }
}

/// The queues of one connection.
pub struct Queues {
    slots: [Mutex<Slot>; VQ_COUNT],
    memory: GuestMemory,
    engine: Arc<Engine>,
    /// Feature bits that the driver accepted.
    features: AtomicU64,
    /// The connection ended: nobody waits for budgets any more.
    closing: AtomicBool,
}

impl Queues {
    /// Four queues that do not run yet.
    pub fn new(memory: GuestMemory, engine: Arc<Engine>) -> Self {
        Self {
            slots: Default::default(),
            memory,
            engine,
            features: AtomicU64::new(0),
            closing: AtomicBool::new(false),
        }
    }

    /// The driver accepted these feature bits.
    pub fn set_features(&self, features: u64) {
        self.features.store(features, Ordering::Relaxed);
        self.engine.set_trims(self.has(F_TRIM));
    }

    fn has(&self, feature: u32) -> bool {
        self.features.load(Ordering::Relaxed) & (1 << feature) != 0
    }

    /// The ring runs, and may have chains. The first time since a stop it is a start; the start
    /// of `hintq` begins a new generation.
    pub fn kicked(&self, queue: usize, vring: &Vring) {
        let Some(slot) = self.slots.get(queue) else { return };
        let started = {
            let mut slot = lock(slot);
            let started = slot.vring.is_none();
            slot.vring = Some(vring.clone());
            started
        };
        match queue {
            VQ_HINT if started => self.quiesced(|| self.engine.restart()),
            VQ_HINT => self.engine.wake(),
            VQ_REPORT => self.drain(queue, Self::one_report),
            VQ_CTRL => self.drain(queue, Self::one_request),
            VQ_RELEASE => self.drain(queue, Self::one_release),
            _ => {}
        }
    }

    /// Stops a queue: returns when nothing of it is in flight and all that was taken from it is
    /// answered.
    pub fn stop(&self, queue: usize) {
        let Some(slot) = self.slots.get(queue) else { return };
        let mut slot = lock(slot);
        if let Some((id, chain)) = slot.prepare.take() {
            self.engine.cancel_prepare(id);
            self.answer(&slot, &chain, S_BUSY, &[]);
        }
        let ran = slot.vring.take().is_some();
        slot.broken = false;
        if ran && queue == VQ_HINT {
            self.engine.driver_left();
        }
    }

    /// Stops all queues.
    pub fn stop_all(&self) {
        (0..VQ_COUNT).for_each(|queue| self.stop(queue));
    }

    /// Runs `change` while nothing is in flight on any queue, and every taken request is
    /// answered; the queues run on afterwards.
    pub fn quiesced(&self, change: impl FnOnce()) {
        let mut slots: Vec<_> = self.slots.iter().map(lock).collect();
        let waiting = slots[VQ_CTRL].prepare.take();
        if let Some((id, chain)) = &waiting {
            self.engine.cancel_prepare(*id);
            self.answer(&slots[VQ_CTRL], chain, S_BUSY, &[]);
        }
        change();
        drop(slots);
        if waiting.is_some() {
            lock(&self.slots[VQ_CTRL]).kick_again();
        }
    }

    /// The connection ended: whoever waits for a budget gives up.
    pub fn close(&self) {
        self.closing.store(true, Ordering::Relaxed);
    }

    /// Serves a queue until it is empty, one chain at a time, within the CPU budget.
    fn drain(&self, queue: usize, one: fn(&Self, &mut Slot) -> bool) {
        let slot = &self.slots[queue];
        while !self.closing.load(Ordering::Relaxed) {
            // Waits outside the lock, so that a stop never waits for a budget.
            if self.engine.throttle() {
                continue;
            }
            let mut slot = lock(slot);
            if !one(self, &mut slot) && (slot.prepare.is_some() || !slot.rearm()) {
                return;
            }
            self.check_memory(&mut slot);
        }
    }

    /// Leaves a ring alone whose memory the VMM took away.
    fn check_memory(&self, slot: &mut Slot) {
        if memory_was_truncated() {
            log::error!(
                "the VMM truncated the guest's memory file; the queue stops until it is reset"
            );
            slot.broken = true;
        }
    }

    fn bad(&self, queue: &str, error: &wire::Error) {
        self.engine.refuse();
        log::warn!("{queue}: buffer refused: {error}");
    }

    /// Serves one report; false if there is none.
    fn one_report(&self, slot: &mut Slot) -> bool {
        let Some(chain) = slot.pop(&self.memory) else { return false };
        match wire::read_report(&chain) {
            Ok((batch, records)) => self.engine.report(&batch, &records),
            Err(error) => self.bad("reportq", &error),
        }
        slot.publish(&chain, 0);
        true
    }

    fn answer(&self, slot: &Slot, chain: &Chain, status: u32, records: &[Record]) {
        let written = wire::write_answer(chain, status, self.engine.generation(), records);
        self.finish(slot, chain, written);
    }

    fn finish(&self, slot: &Slot, chain: &Chain, written: Result<u32, wire::Error>) {
        let length = written.unwrap_or_else(|error| {
            self.bad("answer", &error);
            0
        });
        slot.publish(chain, length);
    }

    /// Serves one request of `ctrlq`; false if there is none, or one is still at work.
    fn one_request(&self, slot: &mut Slot) -> bool {
        if slot.prepare.is_some() {
            return false;
        }
        let Some(chain) = slot.pop(&self.memory) else { return false };
        let (request, ranges) = match wire::read_request(&chain) {
            Ok(read) => read,
            Err(error) => {
                self.bad("ctrlq", &error);
                self.answer(slot, &chain, S_INVALID, &[]);
                return true;
            }
        };
        let answer = match request.kind {
            REQ_PREPARE if self.has(crate::protocol::F_PREPARE) => {
                let (id, answer) = self.engine.prepare(&request, &ranges);
                if let Answer::Later = answer {
                    slot.prepare = Some((id, chain));
                    return false;
                }
                answer
            }
            REQ_QUERY => self.engine.query(&request, &ranges),
            REQ_STATS if self.has(crate::protocol::F_STATS) => {
                let generation = self.engine.generation();
                if request.generation != generation {
                    self.answer(slot, &chain, S_VOID, &[]);
                    return true;
                }
                let stats = self.engine.stats();
                let written = wire::write_stats(&chain, generation, &stats);
                self.finish(slot, &chain, written);
                return true;
            }
            _ => Answer::Now(S_UNSUPPORTED, Vec::new()),
        };
        if let Answer::Now(status, records) = answer {
            self.answer(slot, &chain, status, &records);
        }
        true
    }

    /// Serves one request of `releaseq`; false if there is none.
    fn one_release(&self, slot: &mut Slot) -> bool {
        let Some(chain) = slot.pop(&self.memory) else { return false };
        let (kind, status) = match wire::read_request(&chain) {
            // A request whose answer cannot be written must not be carried out: the driver could
            // never learn that its memory was dropped.
            _ if !matches!(wire::room(&chain, Response::SIZE), Ok(Some(_))) => (0, S_INVALID),
            Ok((request, ranges)) => match request.kind {
                REQ_RELEASE | REQ_RENEW if self.has(F_RELEASE) => {
                    (request.kind, self.engine.release(&request, &ranges))
                }
                REQ_TRIM if self.has(F_TRIM) => {
                    (request.kind, self.engine.release(&request, &ranges))
                }
                _ => (0, S_UNSUPPORTED),
            },
            Err(error) => {
                self.bad("releaseq", &error);
                (0, S_INVALID)
            }
        };
        self.answer(slot, &chain, status, &[]);
        fault::point(match kind {
            REQ_RELEASE => "release.published",
            REQ_RENEW => "renew.published",
            REQ_TRIM => "trim.published",
            _ => "",
        });
        true
    }
}

impl Port for Queues {
    fn send_hint(&self, fill: &mut dyn FnMut(usize) -> Option<(u64, HintBatch)>) -> bool {
        let mut slot = lock(&self.slots[VQ_HINT]);
        loop {
            let Some(chain) = slot.pop(&self.memory) else {
                if slot.rearm() {
                    continue;
                }
                return false;
            };
            // One buffer a call, also a useless one: a driver that goes on giving those must not
            // keep us here, with the lock, past the end of the connection or of the CPU budget.
            // An advice is as long as a record: room for one is room for either.
            let room = match wire::room(&chain, Batch::SIZE) {
                Ok(Some(room)) if room > 0 => room,
                Ok(_) => {
                    self.bad("hintq", &wire::Error::TooMany(1, 0));
                    slot.publish(&chain, 0);
                    return true;
                }
                Err(error) => {
                    self.bad("hintq", &error);
                    slot.publish(&chain, 0);
                    return true;
                }
            };
            let Some((generation, hint)) = fill(room) else {
                // Nothing to tell after all: the buffer stays with us for the next time.
                if let Some(vring) = &slot.vring {
                    let mut state = vring.get_mut();
                    let next = state.get_queue().next_avail().wrapping_sub(1);
                    state.get_queue_mut().set_next_avail(next);
                }
                return false;
            };
            let written = wire::write_hint(&chain, generation, &hint);
            self.finish(&slot, &chain, written);
            self.check_memory(&mut slot);
            return true;
        }
    }

    fn answer_prepare(&self, id: u64, status: u32, records: &[Record]) {
        let mut slot = lock(&self.slots[VQ_CTRL]);
        if slot.prepare.as_ref().is_none_or(|(waiting, _)| *waiting != id) {
            return;
        }
        if let Some((_, chain)) = slot.prepare.take() {
            self.answer(&slot, &chain, status, records);
            fault::point("prepare.published");
        }
        slot.kick_again();
    }
}

//! The deciding thread: takes what the device learnt, asks the policy, spends the budgets and
//! publishes hints. System calls that may block run on two workers (one looks, one acts);
//! discards run on the release queue's own thread, in [`Engine::release`].

mod decide;
mod demotion;
mod hints;
mod moving;
mod pools;
mod refill;
mod repair;
mod scan;
mod state;
mod supply;
mod timeout;
mod trim;
mod worker;

pub use decide::{Budgets, PrepareAnswer, Standing};
pub use hints::{HintBatch, HintBody};
pub use repair::{Outcome, Work};
pub use scan::Look;
pub use state::{GuestSync, State, Totals};
pub use timeout::Source;
pub use worker::Deed;

use crate::backing::{
    page_size, process_cpu_time, HostState, Kind, Memory, PoolState, TlbCounters,
};
use crate::budget::{CopyBudget, CpuBudget};
use crate::fault;
use crate::fmfi;
use crate::policy::{Policy, FRAGMENTED};
use crate::pressure::{Sources, Watch};
use crate::protocol::{
    Advice, Batch, GuestState, Record, Request, Stats, ADVICE_MOVE, ADVICE_RETURN, ADVICE_SCARCE,
    PAGE_SHIFT, REQ_RENEW, REQ_TRIM, S_BUSY, S_FAILED, S_INVALID, S_OK, S_UNSUPPORTED, S_VOID,
};
use crate::shares::{Limits, Shares, Usage};
use pools::{Pools, Word};
use std::ops::Range;
use std::sync::mpsc::{sync_channel, SyncSender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use timeout::End;
use worker::Job;

/// Most unanswered blocks on `releaseq`: what a stopped daemon can cost a guest, 64 MiB.
pub const RELEASE_MAX: u32 = 32;
/// Longest sleep of the deciding thread; it is woken for everything that matters.
const SLEEP_MAX: Duration = Duration::from_secs(60);
/// Time between two looks how fragmented the host is, for a policy that goes by it.
const FRAGMENTATION_PERIOD: Duration = Duration::from_secs(5);
/// Pause of the deciding thread after a memory table. Queues are started right after one, while the
/// guest stands still if it arrives by migration: the first look at all of its memory would take
/// the processors from the threads that the VMM waits for.
const SETTLE: Duration = Duration::from_millis(20);
/// Shortest pause for a budget.
const THROTTLE: Duration = Duration::from_millis(10);
/// Longest pause of whoever serves the guest while the CPU budget is overdrawn: he has to see that
/// the budget was changed, or that all ends. To ask more often could cost more than a small share.
const THROTTLE_MAX: Duration = Duration::from_millis(200);

/// The engine's way to the driver; the device implements it.
pub trait Port: Send + Sync {
    /// Offers the next free `hintq` buffer: `fill` is called with the number of records that it
    /// holds, and what it returns is published; a buffer that holds none is given back unused.
    /// False if there is no buffer.
    fn send_hint(&self, fill: &mut dyn FnMut(usize) -> Option<(u64, HintBatch)>) -> bool;

    /// Answers the PREPARE `id`, if it is still waiting.
    fn answer_prepare(&self, id: u64, status: u32, records: &[Record]);
}

/// When a guest is asked to give memory back that it does not use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum GiveBack {
    /// Never.
    Never,
    /// While the host is short of memory.
    Pressure,
    /// All the time, what nobody came for within the driver's booking timeout; at once while the
    /// host is short of memory.
    Always,
}

/// What the engine may spend, and by which policy.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Which blocks the host makes huge.
    pub policy: Policy,
    /// Bytes that collapses may copy per second at first.
    pub copy_rate: u64,
    /// Share of one CPU at first, 1.0 being all of it.
    pub cpu_share: f64,
    /// log2 of the block size.
    pub block_shift: u32,
    /// Most bytes of huge pages that the guest may have at first; `None` for any amount.
    pub huge_max: Option<u64>,
    /// When the guest is asked for memory, at first.
    pub give_back: GiveBack,
    /// What is shared with other VMs at first, where anything is.
    pub limits: Limits,
    /// How long what is of no use is kept at first, in milliseconds; `None`: to be found out.
    pub booking_timeout_ms: Option<u32>,
}

impl Settings {
    /// How many blocks a number of bytes is at most; `u64::MAX` for any amount.
    fn blocks(&self, bytes: Option<u64>) -> u64 {
        bytes.map_or(u64::MAX, |bytes| bytes >> self.block_shift)
    }
}

/// How the device is to answer a request of `ctrlq`.
#[derive(Debug)]
pub enum Answer {
    /// At once, with this status and these records.
    Now(u32, Vec<Record>),
    /// When the engine calls [`Port::answer_prepare`].
    Later,
}

struct Inner {
    state: State,
    port: Option<Arc<dyn Port>>,
    /// A worker is out looking, or acting.
    looking: bool,
    acting: bool,
    /// Until then nothing is decided.
    settling_until: Instant,
    woken: bool,
    stopping: bool,
    next_prepare: u64,
}

/// What may be spent per second, as it was set last.
#[derive(Clone, Copy, Debug)]
struct Rates {
    copy_rate: u64,
    cpu_share: f64,
    limits: Limits,
    shares: Option<Shares>,
}

impl Rates {
    /// The copy rate in force.
    fn copies(&self) -> u64 {
        let share = self.shares.and_then(|shares| shares.copy_rate);
        share.unwrap_or(u64::MAX).min(self.copy_rate)
    }
}

/// One guest's engine: shared by the device's threads, the deciding thread and the workers.
pub struct Engine {
    settings: Settings,
    inner: Mutex<Inner>,
    wake: Condvar,
    rates: Mutex<Rates>,
    cpu: Mutex<CpuBudget>,
    copy: Mutex<CopyBudget>,
    pressure: Mutex<Watch>,
    pools: Mutex<Pools>,
}

/// The engine's threads; they end when this is dropped.
pub struct Threads {
    engine: Arc<Engine>,
    threads: Vec<JoinHandle<()>>,
}

/// Locks, also after a panic elsewhere: the daemon's state is soft, and a guest is better served
/// by a slightly stale one than by none.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Engine {
    /// Starts the engine's threads.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub fn start(settings: Settings) -> std::io::Result<Threads> {
        let now = Instant::now();
        let mut state = State::new(settings.policy, settings.blocks(settings.huge_max), now);
        state.give_back = settings.give_back;
        state.timeout.set(settings.booking_timeout_ms, now);
        let engine = Arc::new(Self {
            inner: Mutex::new(Inner {
                state,
                port: None,
                looking: false,
                acting: false,
                settling_until: now,
                woken: false,
                stopping: false,
                next_prepare: 1,
            }),
            wake: Condvar::new(),
            rates: Mutex::new(Rates {
                copy_rate: settings.copy_rate,
                cpu_share: settings.cpu_share,
                limits: settings.limits,
                shares: None,
            }),
            cpu: Mutex::new(CpuBudget::new(settings.cpu_share, process_cpu_time(), now)),
            pressure: Mutex::new(Watch::new(now)),
            pools: Mutex::new(Pools::new(now)),
            copy: Mutex::new(CopyBudget::new(settings.copy_rate, 1 << settings.block_shift, now)),
            settings,
        });
        // One place each: the deciding thread never sends to a busy worker.
        let (look, looks) = sync_channel(1);
        let (act, acts) = sync_channel(1);
        let mut threads = Vec::new();
        for (name, jobs) in [("look", looks), ("act", acts)] {
            let engine = Arc::clone(&engine);
            threads.push(
                std::thread::Builder::new()
                    .name(name.into())
                    .spawn(move || worker::run(&engine, &jobs))?,
            );
        }
        let deciding = Arc::clone(&engine);
        threads.push(
            std::thread::Builder::new()
                .name("engine".into())
                .spawn(move || deciding.run(&look, &act))?,
        );
        Ok(Threads { engine, threads })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    /// What the engine was started with.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Wakes the deciding thread: something changed.
    pub fn wake(&self) {
        self.lock().woken = true;
        self.wake.notify_one();
    }

    /// A VMM connected (or left: `None`): what was known of the former one is forgotten.
    pub fn attach(&self, port: Option<Arc<dyn Port>>) {
        let mut inner = self.lock();
        inner.state.connected = port.is_some();
        inner.port = port;
        inner.state.forget_migration();
        inner.state.set_memory(None, Instant::now());
        drop(inner);
        lock(&self.pools).changed(Instant::now());
        self.wake();
    }

    /// Takes a new memory table. The caller has made sure that no request is in flight.
    pub fn set_memory(&self, memory: Arc<Memory>) {
        let now = Instant::now();
        let mut inner = self.lock();
        inner.state.set_memory(Some(memory), now);
        inner.settling_until = now + SETTLE;
        drop(inner);
        lock(&self.pools).changed(now);
        self.wake();
    }

    /// The driver (re)started: a new generation begins.
    pub fn restart(&self) {
        self.lock().state.new_generation();
        self.wake();
    }

    /// The driver stopped.
    pub fn driver_left(&self) {
        self.lock().state.driver_left();
        self.wake();
    }

    /// The generation in force.
    pub fn generation(&self) -> u64 {
        self.lock().state.generation
    }

    /// Sets another limit to the guest's huge pages, in bytes; `None` for none. What it has beyond
    /// a lower limit, it keeps.
    pub fn set_huge_max(&self, bytes: Option<u64>) {
        self.lock().state.set_huge_max(self.settings.blocks(bytes));
        self.wake();
    }

    /// The limit to the guest's huge pages, in bytes, if there is one.
    pub fn huge_max(&self) -> Option<u64> {
        let limit = self.lock().state.supply.limit();
        (limit != u64::MAX).then(|| limit << self.settings.block_shift)
    }

    /// Sets how many bytes collapses may copy per second, from now on.
    pub fn set_copy_rate(&self, bytes: u64) {
        self.set_rates(|rates| rates.copy_rate = bytes);
    }

    fn set_rates(&self, set: impl FnOnce(&mut Rates)) {
        let mut rates = lock(&self.rates);
        let before = rates.copies();
        set(&mut rates);
        let now = rates.copies();
        if now != before {
            lock(&self.copy).set_rate(now, 1 << self.settings.block_shift, Instant::now());
        }
        drop(rates);
        self.wake();
    }

    /// Sets what is shared with other VMs.
    pub fn set_limits(&self, limits: Limits) {
        lock(&self.rates).limits = limits;
    }

    /// What is shared with other VMs.
    pub fn limits(&self) -> Limits {
        lock(&self.rates).limits
    }

    /// Keeps the guest to its share; huge pages beyond it are given back.
    pub fn set_shares(&self, shares: Shares) {
        self.lock().state.set_share(self.settings.blocks(shares.huge));
        self.set_rates(|rates| rates.shares = Some(shares));
    }

    /// The share in force, where anything is shared.
    pub fn shares(&self) -> Option<Shares> {
        lock(&self.rates).shares
    }

    /// What the guest has, and could use.
    pub fn usage(&self) -> Usage {
        let copy_rate = self.copy_rate();
        let inner = self.lock();
        let (held, demand) = inner.state.demand();
        let bytes = |blocks: u64| blocks << self.settings.block_shift;
        Usage {
            huge: bytes(held),
            huge_demand: bytes(demand),
            copying: inner.state.has_to_copy(),
            copy_rate,
        }
    }

    /// Bytes that collapses may copy per second.
    pub fn copy_rate(&self) -> u64 {
        lock(&self.rates).copy_rate
    }

    /// Sets the share of one CPU that the daemon may use (1.0 is all of it), from now on.
    pub fn set_cpu_share(&self, share: f64) {
        lock(&self.rates).cpu_share = share;
        lock(&self.cpu).set_share(share, Instant::now());
        self.wake();
    }

    /// Share of one CPU that the daemon may use.
    pub fn cpu_share(&self) -> f64 {
        lock(&self.rates).cpu_share
    }

    /// Sets another policy, from now on. What the former one made huge stays so.
    pub fn set_policy(&self, policy: Policy) {
        self.lock().state.set_policy(policy);
        self.wake();
    }

    /// Stops (or lets go on) everything that makes huge pages, also what the guest asks for. An
    /// action under way ends by itself. Looks, reports, hints and releases go on.
    pub fn set_paused(&self, paused: bool) {
        self.lock().state.set_paused(paused);
        self.wake();
    }

    /// The VMM began (or ended) to log what is written: the guest is being migrated. Meanwhile
    /// nothing is made huge, since the copy starts with base pages again, and nothing is dropped: the
    /// VMM would fill it again, and whoever drops would have to log it. The caller has made sure
    /// that no request is in flight.
    pub fn set_logging(&self, logging: bool) {
        self.lock().state.set_logging(logging, Instant::now());
        self.wake();
    }

    /// Whether an action is under way, which may be one that a pause did not stop.
    pub fn is_acting(&self) -> bool {
        self.lock().acting
    }

    /// Reads the state, for status output.
    pub fn inspect<T>(&self, read: impl FnOnce(&State) -> T) -> T {
        read(&self.lock().state)
    }

    /// Whether the driver trims blocks, as it said when it started.
    pub fn set_trims(&self, trims: bool) {
        let pages = 1 << (self.settings.block_shift - PAGE_SHIFT);
        self.lock().state.block_pages = trims.then_some(pages);
    }

    /// Counts a chain that could not be understood.
    pub fn refuse(&self) {
        self.lock().state.totals.bad_records += 1;
    }

    /// Waits while the CPU budget is overdrawn, a fraction of a second at a time; whoever serves
    /// the guest calls it, so that no flood of requests exceeds the share. True if it waited.
    pub fn throttle(&self) -> bool {
        let pause = self.overdrawn(Instant::now());
        pause.map(std::thread::sleep).is_some()
    }

    /// How long to pause if the CPU budget is overdrawn.
    fn overdrawn(&self, now: Instant) -> Option<Duration> {
        let mut cpu = lock(&self.cpu);
        cpu.update(process_cpu_time(), now);
        let wait = cpu.foreground_wait(now);
        (!wait.is_zero()).then(|| wait.clamp(THROTTLE, THROTTLE_MAX))
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
        let renew = request.kind == REQ_RENEW;
        let trim = request.kind == REQ_TRIM;
        // What is named is dropped; what becomes of it is looked at by blocks.
        let named = ranges;
        let touched = trim.then(|| trim::blocks_of(named, self.settings.block_shift));
        let ranges = touched.as_deref().unwrap_or(named);
        let memory = {
            let mut inner = self.lock();
            let state = &mut inner.state;
            if let Some(status) = state.refusal(request, ranges) {
                return status;
            }
            let Some(memory) = state.memory.clone() else { return S_BUSY };
            if !memory.may_discard() {
                return S_UNSUPPORTED;
            }
            if state.logging {
                return S_BUSY;
            }
            if renew && state.policy.prepares() {
                if state.paused || !state.may_renew(ranges) {
                    state.timeout.request_failed();
                    return S_BUSY;
                }
                state.renewing = ranges.iter().map(|(_, count)| u64::from(*count)).sum();
            }
            if !renew && !trim {
                // Before anything is dropped, or it could be filled again at once.
                for &(first, count) in ranges {
                    for index in indices(state, first, count) {
                        state.repair.forget_fill(index);
                    }
                }
            }
            state.begin_drop();
            memory
        };
        let [fetched, done] = match request.kind {
            REQ_RENEW => ["renew.fetched", "renew.done"],
            REQ_TRIM => ["trim.fetched", "trim.done"],
            _ => ["release.fetched", "release.done"],
        };
        fault::point(fetched);
        let mut status = S_OK;
        let mut dropped = 0;
        let mut runs = Vec::new();
        let mut seen = true;
        for &(first, count) in named {
            let count = u64::from(count);
            let result = if trim {
                memory.trim(first << PAGE_SHIFT..(first + count) << PAGE_SHIFT)
            } else {
                memory.discard(first, count)
            };
            if let Err(error) = result {
                let what = if trim { "page(s)" } else { "block(s)" };
                log::warn!("cannot drop {count} {what} from {first:#x} on: {error}");
                status = S_FAILED;
                break;
            }
            dropped += count;
        }
        for &(first, count) in ranges {
            seen &= worker::scan(&memory, first, count, &mut runs);
        }
        fault::point(done);
        let mut inner = self.lock();
        let state = &mut inner.state;
        state.apply_dropped(&runs);
        for &(first, count) in ranges {
            for index in indices(state, first, count) {
                if renew && status == S_OK && state.serves_requests() {
                    state.repair.fill(index);
                } else {
                    state.repair.forget_fill(index);
                    // The driver is told again, also of what is as it was.
                    state.hints.changed(index);
                }
                if !seen || status != S_OK {
                    state.scan.look_at(index);
                }
            }
        }
        state.renewing = 0;
        match request.kind {
            REQ_RENEW => state.totals.renewed += dropped,
            REQ_TRIM => state.totals.trimmed_pages += dropped,
            _ => state.totals.released += dropped,
        }
        drop(inner);
        self.wake();
        status
    }

    /// What the host would like of the driver.
    fn advice(state: &State) -> Advice {
        // Who prepares nothing has nothing to give, however much there is.
        let scarce = state.supply.is_scarce() || !state.serves_requests();
        let mut flags = if scarce { ADVICE_SCARCE } else { 0 };
        if state.give_back == GiveBack::Always && !state.logging {
            flags |= ADVICE_RETURN;
        }
        if state.moving.is_wanted() && !state.logging {
            flags |= ADVICE_MOVE;
        }
        let wanted = if state.logging { 0 } else { state.wish.blocks() };
        let booking_timeout_ms = state.timeout.wish_ms();
        Advice { booking_timeout_ms, release_max: RELEASE_MAX, flags, wanted, ..Advice::default() }
    }

    /// Sets when the guest is asked for memory, from now on.
    pub fn set_give_back(&self, give_back: GiveBack) {
        self.lock().state.give_back = give_back;
        self.wake();
    }

    /// Looks how short of memory the host is, and lets the wish follow.
    fn watch_pressure(&self, sources: &mut Sources, now: Instant, sleep: &mut Duration) {
        let (vmm, never) = {
            let inner = self.lock();
            let Some(memory) = &inner.state.memory else {
                sources.close();
                return;
            };
            (memory.vmm(), inner.state.give_back == GiveBack::Never)
        };
        let mut watch = lock(&self.pressure);
        if watch.due() <= now {
            let missing = watch.look(&sources.view(vmm), now);
            let mut inner = self.lock();
            let before = inner.state.wish.blocks();
            let block_size = 1 << self.settings.block_shift;
            let owed = inner.state.owed(block_size, now);
            let wanted = missing.div_ceil(block_size).max(owed);
            inner.state.want(if never { 0 } else { wanted }, now);
            match (before, inner.state.wish.blocks()) {
                (0, 1..) if owed > 0 => {
                    log::info!("the guest is asked for what a migration filled")
                }
                (0, 1..) => log::info!("the host is short of memory: the guest is asked for some"),
                (1.., 0) => log::info!("the guest is not asked for memory any more"),
                _ => {}
            }
        }
        *sleep = (*sleep).min(watch.due().saturating_duration_since(now));
    }

    /// Sets how long what is of no use is kept, in milliseconds; `None`: to be found out.
    pub fn set_booking_timeout(&self, ms: Option<u32>) {
        self.lock().state.timeout.set(ms, Instant::now());
        self.wake();
    }

    /// At the end of a period: what it brought decides on the timeout of the next one. `tlb` counts
    /// the guest's TLB misses in it, where that can be.
    fn watch_timeout(&self, tlb: &mut Option<TlbCounters>, now: Instant, sleep: &mut Duration) {
        let vmm = {
            let inner = self.lock();
            let ends = inner.state.timeout.ends();
            let (Some(ends), Some(memory)) = (ends, &inner.state.memory) else {
                *tlb = None;
                return;
            };
            if ends > now {
                *sleep = (*sleep).min(ends - now);
                return;
            }
            memory.vmm()
        };
        let tlb_misses = tlb.take().and_then(|counters| counters.total().ok());
        // Anew for each period: processors of a guest come and go.
        *tlb = vmm.and_then(|vmm| {
            TlbCounters::open(vmm)
                .inspect_err(|error| log::debug!("TLB misses are not counted: {error}"))
                .ok()
        });
        let fmfi = self.fmfi();
        let mut inner = self.lock();
        let state = &mut inner.state;
        let keeps = state.keeps();
        let misaligned = state.misaligned();
        let end = End { tlb_misses, misaligned, fmfi, keeps, counting: tlb.is_some() };
        state.timeout.end_period(&end, now);
        if let Some(ends) = state.timeout.ends() {
            *sleep = (*sleep).min(ends.saturating_duration_since(now));
        }
    }

    /// How fragmented the host's free memory is for blocks.
    fn fmfi(&self) -> Option<u32> {
        let order = self.settings.block_shift.saturating_sub(page_size().trailing_zeros());
        fmfi::host(order)
    }

    /// Looks how fragmented the host is, where it matters, and decides whether the guest is to move
    /// its huge pages.
    fn watch_fragmentation(&self, now: Instant, sleep: &mut Duration) {
        let look = self.inspect(|state| state.moving.wants_look(&state.situation(), now));
        let fmfi = look.then(|| self.fmfi());
        let mut inner = self.lock();
        if let Some(fmfi) = fmfi {
            inner.state.moving.looked(fmfi, now);
        }
        inner.state.update_moving(now, sleep);
    }

    /// Looks how fragmented the host is, where the policy goes by it.
    fn tell_fragmentation(&self, due: &mut Instant, now: Instant, sleep: &mut Duration) {
        if !self.inspect(|state| state.policy.minds_fragmentation()) {
            return;
        }
        if *due <= now {
            *due = now + FRAGMENTATION_PERIOD;
            let fragmented = self.fmfi().is_some_and(|index| index >= FRAGMENTED);
            self.lock().state.set_fragmented(fragmented);
        }
        *sleep = (*sleep).min(due.saturating_duration_since(now));
    }

    /// Looks at the pools that the guest's hugetlb memory comes from, and lets the promises follow.
    fn watch_pools(&self, now: Instant, sleep: &mut Duration) {
        let mut pools = lock(&self.pools);
        if pools.due() <= now {
            let memory = self.lock().state.memory.clone();
            self.look_at_pools(&mut pools, memory.as_deref(), now);
        }
        *sleep = (*sleep).min(pools.due().saturating_duration_since(now));
    }

    fn look_at_pools(&self, pools: &mut Pools, memory: Option<&Memory>, now: Instant) {
        match pools.look(memory.map_or_else(Vec::new, Memory::pools), now) {
            Some(Word::Short(message)) => log::warn!("{message}"),
            Some(Word::Over) => log::info!("the pool of huge pages suffices again"),
            None => {}
        }
        self.lock().state.supply.set_pool_short(pools.short());
    }

    /// There was no page for a block of `memory`: whether that is because its pool is short.
    fn is_pool_short(&self, memory: &Arc<Memory>, now: Instant) -> bool {
        let mut pools = lock(&self.pools);
        let current = self.lock().state.memory.as_ref().is_some_and(|m| Arc::ptr_eq(m, memory));
        if current && memory.kinds().iter().any(|kind| matches!(kind, Kind::Hugetlb { .. })) {
            self.look_at_pools(&mut pools, Some(memory), now);
        }
        pools.short()
    }

    /// The pools of hugetlb pages as they were last seen, for status output.
    pub fn pools(&self) -> Vec<PoolState> {
        lock(&self.pools).seen().to_vec()
    }

    /// How short of memory the host is, for status output.
    pub fn pressure(&self) -> serde_json::Value {
        lock(&self.pressure).status()
    }

    /// Waits while a new memory table settles.
    fn settle(&self) {
        let mut inner = self.lock();
        while !inner.stopping {
            let left = inner.settling_until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.wake.wait_timeout(inner, left);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The deciding thread.
    fn run(&self, look: &SyncSender<Job>, act: &SyncSender<Job>) {
        let mut tlb = None;
        let mut sources = Sources::default();
        let mut fragmentation_due = Instant::now();
        loop {
            self.settle();
            let now = Instant::now();
            lock(&self.cpu).update(process_cpu_time(), now);
            let mut sleep = SLEEP_MAX;
            self.watch_pressure(&mut sources, now, &mut sleep);
            self.watch_pools(now, &mut sleep);
            self.watch_timeout(&mut tlb, now, &mut sleep);
            self.watch_fragmentation(now, &mut sleep);
            self.tell_fragmentation(&mut fragmentation_due, now, &mut sleep);
            {
                let mut inner = self.lock();
                if inner.stopping {
                    return;
                }
                self.dispatch_look(&mut inner, look, now, &mut sleep);
                self.dispatch_act(&mut inner, act, now, &mut sleep);
                inner.state.update_supply(now, &mut sleep);
            }
            self.publish_hints(&mut sleep);
            let inner = self.lock();
            if !inner.woken && !inner.stopping {
                let waited = self.wake.wait_timeout_while(inner, sleep, |i| !i.woken);
                waited.unwrap_or_else(PoisonError::into_inner).0.woken = false;
            } else {
                let mut inner = inner;
                inner.woken = false;
            }
        }
    }

    fn dispatch_look(
        &self,
        inner: &mut Inner,
        look: &SyncSender<Job>,
        now: Instant,
        sleep: &mut Duration,
    ) {
        let Inner { state, looking, .. } = inner;
        let Some(memory) = state.memory.clone() else { return };
        if *looking {
            return;
        }
        if let Some(next) = state.next_look(&mut lock(&self.cpu), now, sleep) {
            let job = Job::Look { memory, look: next };
            *looking = look.try_send(job).is_ok();
        }
    }

    fn dispatch_act(
        &self,
        inner: &mut Inner,
        act: &SyncSender<Job>,
        now: Instant,
        sleep: &mut Duration,
    ) {
        let Inner { state, acting, .. } = inner;
        if state.wake(now) {
            *sleep = Duration::ZERO;
        }
        if let Some(memory) = state.memory.clone().filter(|_| !*acting) {
            let mut budgets = Budgets {
                copy: &mut lock(&self.copy),
                cpu: &mut lock(&self.cpu),
                block_size: 1 << self.settings.block_shift,
            };
            if let Some((work, advance)) = state.next_work(&mut budgets, now, sleep) {
                let (generation, holes) = (state.generation, state.policy.holes());
                let job = Job::Act { memory, generation, work, holes, advance };
                *acting = act.try_send(job).is_ok();
            }
        }
        if let Some(at) = state.repair.wakes_at() {
            *sleep = (*sleep).min(at.saturating_duration_since(now));
        }
    }

    /// Tells the driver what it does not know, as far as it has posted buffers.
    fn publish_hints(&self, sleep: &mut Duration) {
        loop {
            let port = {
                let inner = self.lock();
                let state = &inner.state;
                let advice = Self::advice(state);
                if inner.stopping || !state.scan.complete() || !state.hints.pending(&advice) {
                    return;
                }
                inner.port.clone()
            };
            let Some(port) = port else { return };
            if let Some(pause) = self.overdrawn(Instant::now()) {
                *sleep = (*sleep).min(pause);
                return;
            }
            let sent = port.send_hint(&mut |room| {
                let mut inner = self.lock();
                let state = &mut inner.state;
                // A new generation may have begun since: then the host is looked at first.
                if !state.scan.complete() {
                    return None;
                }
                let advice = Self::advice(state);
                let batch = state.hints.next(&state.map, &advice, room)?;
                state.totals.hint_batches += 1;
                Some((state.generation, batch))
            });
            if !sent {
                return; // a kick of the hint queue wakes us
            }
        }
    }

    /// A look came back.
    fn looked(&self, job: worker::Looked) {
        let now = Instant::now();
        let mut inner = self.lock();
        inner.looking = false;
        let state = &mut inner.state;
        // Should the driver have restarted meanwhile: what was seen of the host is still true.
        if state.memory.as_ref().is_some_and(|memory| Arc::ptr_eq(memory, &job.memory)) {
            state.take_look(&job.look, &job.runs, job.took, now);
        }
        drop(inner);
        self.wake();
    }

    /// An action ended.
    fn acted(&self, done: worker::Acted) {
        let worker::Acted { memory, generation, advance, deed } = done;
        let now = Instant::now();
        let block_size = 1 << self.settings.block_shift;
        lock(&self.copy).settle(advance, deed.attempts * block_size, now);
        let lacking = deed.outcomes.iter().any(|(_, outcome)| *outcome == Outcome::Lacking);
        let pool_short = lacking && self.is_pool_short(&memory, now);
        let mut inner = self.lock();
        inner.acting = false;
        let port = inner.port.clone();
        let state = &mut inner.state;
        let current = state.generation == generation;
        let same = state.memory.as_ref().is_some_and(|current| Arc::ptr_eq(current, &memory));
        let answer =
            state.take_deed(&deed, block_size, &Standing { current, same, pool_short }, now);
        drop(inner);
        if let (Some(port), Some(PrepareAnswer { id, status, records })) = (port, answer) {
            fault::point("prepare.done");
            port.answer_prepare(id, status, &records);
        }
        self.wake();
    }
}

fn indices(state: &State, first: u64, count: u32) -> Vec<usize> {
    let ranges: Vec<Range<usize>> = state.map.index_ranges(first, count).collect();
    ranges.into_iter().flatten().collect()
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

    /// Asks the guest for as many blocks, or for what it has. What it reports as free is no leave
    /// to take it, but tells what there is to be asked for.
    fn want(&mut self, blocks: u64, now: Instant) {
        let most = if blocks == 0 { 0 } else { self.spare_blocks() };
        if self.wish.set(blocks, most, now) {
            self.hints.repeat_advice();
        }
    }

    /// Blocks' worth of memory that the guest could give back.
    fn spare_blocks(&self) -> u64 {
        let unused = |index: &usize| {
            self.map.get(*index).is_some_and(|block| {
                block.host != HostState::Absent
                    && matches!(block.guest, GuestState::Free | GuestState::Booked)
            })
        };
        let unused = (0..self.map.len()).filter(unused).count() as u64;
        unused + self.block_pages.map_or(0, |pages| trim::spare_blocks(&self.map, pages))
    }

    /// Notes whether huge pages are scarce, and shortens `sleep` to when that may change by itself.
    pub fn update_supply(&mut self, now: Instant, sleep: &mut Duration) {
        let before = self.supply.is_scarce();
        let (scarce, wakes_at) = self.supply.update(self.huge_or_promised(), now);
        if let Some(at) = wakes_at {
            *sleep = (*sleep).min(at.saturating_duration_since(now));
        }
        if scarce != before {
            log::info!("huge pages for the guest are {}", if scarce { "used up" } else { "back" });
        }
    }

    /// The known host states of ranges, as records.
    fn host_records(&self, ranges: &[(u64, u32)]) -> Vec<Record> {
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
}

impl Threads {
    /// The engine that the threads serve.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.engine.lock().stopping = true;
        self.engine.wake();
        for thread in self.threads.drain(..).rev() {
            // The deciding thread was started last and ends first; with it the workers' channels
            // close. A thread that panicked was reported by the panic hook.
            if thread.join().is_err() {
                log::error!("a thread of the engine had panicked");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_does_not_wait_for_a_memory_table_to_settle() {
        let threads = Engine::start(crate::settings::Settings::default().engine(21)).unwrap();
        let began = Instant::now();
        let long = Duration::from_secs(600);
        threads.engine().lock().settling_until = began + long;
        threads.engine().wake();
        drop(threads);
        assert!(began.elapsed() < long);
    }
}

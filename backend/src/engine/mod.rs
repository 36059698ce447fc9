//! One guest's engine: takes what the device learnt, asks the policy, spends the budgets and
//! publishes hints. A thread of its own decides (`thread`); system calls that may block run on two
//! workers (`worker`: one looks, one acts); discards run on the release queue's own thread, in
//! [`Engine::release`].

mod decide;
mod demotion;
mod hints;
mod limits;
mod moving;
mod pools;
mod refill;
mod repair;
mod requests;
mod scan;
mod state;
mod supply;
mod thread;
mod timeout;
mod trim;
mod watches;
mod worker;

pub use decide::{Budgets, PrepareAnswer, Standing};
pub use hints::{HintBatch, HintBody};
pub use repair::{Outcome, Work};
pub use scan::Look;
pub use state::{GuestSync, State, Totals};
pub use timeout::Source;
pub use worker::Deed;

use crate::backing::{process_cpu_time, Memory};
use crate::budget::{CopyBudget, CpuBudget};
use crate::policy::Policy;
use crate::pressure::Watch;
use crate::protocol::Record;
use crate::shares::Limits;
use limits::Rates;
use pools::Pools;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Most unanswered blocks on `releaseq`: what a stopped daemon can cost a guest, 64 MiB.
pub const RELEASE_MAX: u32 = 32;
/// Pause of the deciding thread after a memory table. Queues are started right after one, while the
/// guest stands still if it arrives by migration: the first look at all of its memory would take
/// the processors from the threads that the VMM waits for.
const SETTLE: Duration = Duration::from_millis(20);

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

    /// Sets when the guest is asked for memory, from now on.
    pub fn set_give_back(&self, give_back: GiveBack) {
        self.lock().state.give_back = give_back;
        self.wake();
    }

    /// Sets how long what is of no use is kept, in milliseconds; `None`: to be found out.
    pub fn set_booking_timeout(&self, ms: Option<u32>) {
        self.lock().state.timeout.set(ms, Instant::now());
        self.wake();
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

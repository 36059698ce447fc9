//! What all virtual processors share: how the host maps the guest, and whether
//! traces are made.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::{bail, ensure, Context};
use gemini_tlbsim::counters::{Counters, LiveCounters};
use gemini_tlbsim::estimate::Estimate;
use gemini_tlbsim::host::HostMap;
use gemini_tlbsim::options::Options;
use serde_json::{json, Value};

use crate::control;
use crate::sys::{GuestRam, Instructions, Registers};
use crate::vcpu::Vcpu;

/// How long virtual processors may take to do what they are asked for: one that
/// sleeps does it when it wakes up.
const WAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Traces that are to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recording {
    /// Path of the traces, without the number of the processor.
    pub path: PathBuf,
    /// Most bytes of each.
    pub limit: u64,
}

/// What virtual processors take over when the version has changed.
#[derive(Clone, Debug)]
pub struct Shared {
    /// How the host maps the guest.
    pub host: Arc<HostMap>,
    /// How often simulating has begun: each time with empty TLBs.
    pub round: u64,
    /// Traces to be made, if any.
    pub recording: Option<Arc<Recording>>,
}

/// The plugin.
#[derive(Debug)]
pub struct Plugin {
    /// How it was told to work.
    pub options: Options,
    /// What code that tells of accesses executes.
    pub instructions: Instructions,
    /// Whether accesses are to be simulated.
    wanted: AtomicBool,
    /// Whether the code that QEMU translates tells of accesses.
    instrumented: Mutex<bool>,
    instrumented_changed: Condvar,
    /// Changes with every change of what is shared. Never 0.
    version: AtomicU64,
    /// There as soon as the first virtual processor is.
    memory: OnceLock<(GuestRam, Mutex<Shared>)>,
    failure: OnceLock<String>,
    /// By their numbers in QEMU.
    processors: Mutex<Vec<(u32, Arc<LiveCounters>)>>,
    /// Number of traces that are being made.
    traces: Mutex<usize>,
    trace_ended: Condvar,
    /// Walks that QEMU's own ended elsewhere.
    disagreements: AtomicU64,
}

impl Plugin {
    /// Reads the arguments.
    ///
    /// # Errors
    /// As [`Options::parse`].
    pub fn new<'a>(
        words: impl IntoIterator<Item = &'a str>,
        instructions: Instructions,
    ) -> anyhow::Result<Self> {
        let options = Options::parse(words)?;
        Ok(Plugin {
            wanted: AtomicBool::new(options.simulate),
            instrumented: Mutex::new(options.simulate),
            instrumented_changed: Condvar::new(),
            options,
            instructions,
            version: AtomicU64::new(1),
            memory: OnceLock::new(),
            failure: OnceLock::new(),
            processors: Mutex::default(),
            traces: Mutex::default(),
            trace_ended: Condvar::new(),
            disagreements: AtomicU64::new(0),
        })
    }

    /// Starts to listen.
    ///
    /// # Errors
    /// If that is not possible.
    pub fn start(&'static self) -> anyhow::Result<()> {
        control::start(self)
    }

    /// A virtual processor has come. The first one finds the guest's memory, which
    /// is mapped before it runs.
    ///
    /// # Errors
    /// If the memory cannot be found, or its page tables cannot be read.
    pub fn add_vcpu(&'static self, number: u32, registers: Registers) -> anyhow::Result<Vcpu> {
        let shared = match self.memory.get() {
            Some((_, shared)) => lock(shared).clone(),
            None => self.find_memory()?,
        };
        let counters = Arc::new(LiveCounters::default());
        lock(&self.processors).push((number, Arc::clone(&counters)));
        Ok(Vcpu::new(number, registers, &self.options, counters, shared))
    }

    fn find_memory(&'static self) -> anyhow::Result<Shared> {
        let ram = GuestRam::find(self.options.memory)?;
        let shared = Shared { host: Arc::new(ram.scan()?), round: 0, recording: None };
        let (_, shared) = self.memory.get_or_init(|| (ram, Mutex::new(shared)));
        std::thread::Builder::new()
            .name("tlbsim-epochs".into())
            .spawn(|| self.watch_host())
            .context("cannot start a thread")?;
        Ok(lock(shared).clone())
    }

    /// Looks at the host's page tables every epoch, for ever.
    fn watch_host(&self) {
        while let Some((ram, shared)) = self.memory.get() {
            std::thread::sleep(self.options.epoch);
            match ram.scan() {
                Ok(host) => {
                    let mut shared = lock(shared);
                    if *shared.host != host {
                        shared.host = Arc::new(host);
                        self.version.fetch_add(1, Ordering::Release);
                    }
                }
                Err(error) => return self.fail(&error),
            }
        }
    }

    /// Nothing is to be believed from here on: says so, and to whoever asks.
    pub fn fail(&self, error: &anyhow::Error) {
        let text = format!("{error:#}");
        if self.failure.set(text).is_ok() {
            eprintln!("gemini-tlbsim: {error:#}");
        }
    }

    /// Whether the code that QEMU translates is to tell of accesses.
    pub fn instrumented(&self) -> bool {
        *lock(&self.instrumented)
    }

    /// Whether that is not as it was asked for: all code has to be translated anew.
    pub fn must_translate_anew(&self) -> bool {
        self.wanted.load(Ordering::Relaxed) != self.instrumented()
    }

    /// All code is translated anew from here on.
    pub fn translating_anew(&self) {
        *lock(&self.instrumented) = self.wanted.load(Ordering::Relaxed);
        self.instrumented_changed.notify_all();
    }

    /// Begins to simulate, with empty TLBs, or ends it. That happens when a virtual
    /// processor wakes up, and is waited for.
    ///
    /// # Errors
    /// If the guest does not run yet, or no virtual processor wakes up in time.
    pub fn simulate(&self, on: bool) -> anyhow::Result<()> {
        let (_, shared) = self.memory.get().context("the guest does not run yet")?;
        if on {
            lock(shared).round += 1;
            self.version.fetch_add(1, Ordering::Release);
        }
        self.wanted.store(on, Ordering::Relaxed);
        let (now, _) = self
            .instrumented_changed
            .wait_timeout_while(lock(&self.instrumented), WAKE_TIMEOUT, |now| *now != on)
            .unwrap_or_else(PoisonError::into_inner);
        ensure!(*now == on, "no virtual processor wakes up");
        Ok(())
    }

    /// The version of what is shared.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// What is shared now.
    pub fn shared(&self) -> Option<Shared> {
        self.memory.get().map(|(_, shared)| lock(shared).clone())
    }

    /// The guest's memory.
    pub fn ram(&self) -> Option<&GuestRam> {
        self.memory.get().map(|(ram, _)| ram)
    }

    /// A walk through the guest's page tables ended elsewhere than QEMU's own.
    pub fn disagree(&self) {
        self.disagreements.fetch_add(1, Ordering::Relaxed);
    }

    /// Counters of all virtual processors, and what they are to be read with.
    ///
    /// # Errors
    /// If the guest does not run yet, or something has failed.
    pub fn counters(&self) -> anyhow::Result<Value> {
        if let Some(failure) = self.failure.get() {
            bail!("{failure}");
        }
        let shared = self.shared().context("the guest does not run yet")?;
        let estimate = |counters, instructions| {
            Estimate::of(&self.options.profile, counters, Some(instructions))
        };
        let processors: Vec<Estimate> = lock(&self.processors)
            .iter()
            .map(|(number, live)| estimate(live.snapshot(), self.instructions.executed_by(*number)))
            .collect();
        let total =
            processors.iter().fold(estimate(Counters::default(), 0), |sum, next| sum.plus(next));
        Ok(json!({
            "profile": self.options.profile.to_string(),
            "pcid": self.options.pcid,
            "simulating": self.instrumented(),
            "host_huge_blocks": shared.host.huge_blocks(),
            "version": self.version(),
            "disagreements": self.disagreements.load(Ordering::Relaxed),
            "total": total,
            "processors": processors,
        }))
    }

    /// Has all virtual processors make traces, with empty TLBs to begin with.
    ///
    /// # Errors
    /// If the guest does not run yet, or traces are being made.
    pub fn record(&self, recording: Recording) -> anyhow::Result<()> {
        let (_, shared) = self.memory.get().context("the guest does not run yet")?;
        ensure!(*lock(&self.traces) == 0, "traces are being made");
        ensure!(self.instrumented(), "nothing is simulated");
        lock(shared).recording = Some(Arc::new(recording));
        self.version.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// Ends all traces, and waits until they are written.
    ///
    /// # Errors
    /// If a virtual processor does not end its trace in time.
    pub fn stop(&self) -> anyhow::Result<()> {
        let (_, shared) = self.memory.get().context("the guest does not run yet")?;
        lock(shared).recording = None;
        self.version.fetch_add(1, Ordering::Release);
        let waiting = lock(&self.traces);
        let (left, _) = self
            .trace_ended
            .wait_timeout_while(waiting, WAKE_TIMEOUT, |left| *left > 0)
            .unwrap_or_else(PoisonError::into_inner);
        ensure!(*left == 0, "{left} virtual processors are asleep over their traces");
        Ok(())
    }

    /// A trace was begun.
    pub fn trace_begun(&self) {
        *lock(&self.traces) += 1;
    }

    /// A trace was ended.
    pub fn trace_ended(&self) {
        let mut left = lock(&self.traces);
        *left = left.saturating_sub(1);
        self.trace_ended.notify_all();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

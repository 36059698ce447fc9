//! Keeps the agent to its share of the CPU and its rate of copying, and tells
//! it when to end.

use std::io;
use std::time::{Duration, Instant};

use crate::budget::Debt;
use crate::sys::{self, Signals};

/// CPU seconds that may be spent at a stretch.
const CPU_CREDIT: f64 = 0.01;

/// Clock, debts and signals.
pub struct Pace {
    signals: Signals,
    begin: Instant,
    /// In CPU seconds.
    cpu: Debt,
    cpu_seen: Duration,
    /// In bytes.
    copies: Debt,
    stopped: bool,
}

impl Pace {
    /// A pace of `cpu_share` percent of one CPU and `rate` bytes a second.
    ///
    /// # Errors
    /// If the kernel has no CPU clock or does not block signals.
    pub fn new(cpu_share: u32, rate: u64) -> io::Result<Self> {
        Ok(Pace {
            signals: Signals::block()?,
            begin: Instant::now(),
            cpu: Debt::new(f64::from(cpu_share) / 100.0, CPU_CREDIT),
            cpu_seen: sys::cpu_time()?,
            // Rates are far below the 2^53 that a double holds exactly.
            copies: Debt::new(rate as f64, 0.0),
            stopped: false,
        })
    }

    /// Time since the start.
    #[must_use]
    pub fn now(&self) -> Duration {
        self.begin.elapsed()
    }

    /// Whether a signal asked to end.
    #[must_use]
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// Notes that `bytes` were copied.
    pub fn copied(&mut self, bytes: u64) {
        self.copies.charge(bytes as f64, self.begin.elapsed());
    }

    /// Rests until what was spent is paid for.
    ///
    /// # Errors
    /// Interrupted if a signal asks to end; or if the kernel refuses to wait.
    pub fn rest(&mut self) -> io::Result<()> {
        let now = self.now();
        let cpu = sys::cpu_time()?;
        self.cpu.charge(cpu.saturating_sub(self.cpu_seen).as_secs_f64(), now);
        self.cpu_seen = cpu;
        self.copies.charge(0.0, now);
        let time = self.cpu.rest().max(self.copies.rest());
        if time.is_zero() && !self.stopped {
            return Ok(());
        }
        self.wait(time)
    }

    /// Waits for `time`.
    ///
    /// # Errors
    /// Interrupted if a signal asks to end; or if the kernel refuses to wait.
    pub fn wait(&mut self, time: Duration) -> io::Result<()> {
        let end = self.now().saturating_add(time);
        while !self.stopped {
            // A wait may end early for a signal that is none of ours.
            self.stopped = self.signals.wait(end.saturating_sub(self.now()))?;
            if !self.stopped && self.now() >= end {
                return Ok(());
            }
        }
        Err(io::ErrorKind::Interrupted.into())
    }
}

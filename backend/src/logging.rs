//! The log: everything passes a rate limit, so that no guest and no peer can fill a disk,
//! whichever crate the message comes from. Errors have a limit of their own: no flood of
//! warnings, which a guest can cause, hides them.

use crate::budget::Bucket;
use crate::engine::lock;
use log::{Level, LevelFilter, Log, Metadata, Record};
use std::sync::Mutex;
use std::time::Instant;

/// Lines that may come at once.
const BURST: f64 = 200.0;
/// Lines a second in the long run.
const RATE: f64 = 2.0;

struct Limited {
    inner: env_logger::Logger,
    errors: Mutex<Limit>,
    others: Mutex<Limit>,
}

struct Limit {
    bucket: Bucket,
    /// Messages left out since the last one that passed.
    suppressed: u64,
}

impl Limit {
    fn new() -> Mutex<Self> {
        Mutex::new(Self { bucket: Bucket::new(RATE, BURST, Instant::now()), suppressed: 0 })
    }

    /// Whether a message may pass; then, how many were left out before it.
    fn pass(&mut self, now: Instant) -> Option<u64> {
        if self.bucket.available(now) < 1.0 {
            self.suppressed += 1;
            return None;
        }
        self.bucket.spend(1.0, now);
        Some(std::mem::take(&mut self.suppressed))
    }
}

impl Log for Limited {
    fn enabled(&self, metadata: &Metadata) -> bool {
        self.inner.enabled(metadata)
    }

    fn log(&self, record: &Record) {
        if !self.inner.matches(record) {
            return;
        }
        let limit = if record.level() == Level::Error { &self.errors } else { &self.others };
        let Some(suppressed) = lock(limit).pass(Instant::now()) else { return };
        if suppressed > 0 {
            self.inner.log(
                &Record::builder()
                    .args(format_args!("{suppressed} message(s) left out: too many at once"))
                    .level(record.level())
                    .build(),
            );
        }
        self.inner.log(record);
    }

    fn flush(&self) {
        self.inner.flush();
    }
}

/// Sets the least important level that is logged, from now on.
pub fn set_level(level: LevelFilter) {
    log::set_max_level(level);
}

/// Starts logging to standard error.
pub fn init(level: LevelFilter) {
    // The level may change later: [`set_level`] decides, and the logger itself takes everything.
    let everything = LevelFilter::Trace;
    let inner = env_logger::Builder::new().filter_level(everything).format_target(false).build();
    set_level(level);
    let limited = Limited { inner, errors: Limit::new(), others: Limit::new() };
    if log::set_boxed_logger(Box::new(limited)).is_err() {
        log::warn!("logging was started twice");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn limit_lets_a_burst_pass_and_counts_the_rest() {
        let limit = Limit::new();
        let mut limit = lock(&limit);
        let now = Instant::now();
        let passed = (0..1000).filter(|_| limit.pass(now).is_some()).count();
        assert!((190..=210).contains(&passed), "{passed}");
        let later = now + Duration::from_secs(10);
        assert_eq!(limit.pass(later), Some(1000 - passed as u64));
        assert_eq!(limit.pass(later), Some(0));
    }
}

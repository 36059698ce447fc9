//! The log: everything passes one rate limit, so that no guest and no peer can fill a disk,
//! whichever crate the message comes from.

use crate::budget::Bucket;
use crate::engine::lock;
use log::{LevelFilter, Log, Metadata, Record};
use std::sync::Mutex;
use std::time::Instant;

/// Lines that may come at once.
const BURST: f64 = 200.0;
/// Lines a second in the long run.
const RATE: f64 = 2.0;

struct Limited {
    inner: env_logger::Logger,
    state: Mutex<(Bucket, u64)>,
}

impl Log for Limited {
    fn enabled(&self, metadata: &Metadata) -> bool {
        self.inner.enabled(metadata)
    }

    fn log(&self, record: &Record) {
        if !self.inner.matches(record) {
            return;
        }
        let suppressed = {
            let now = Instant::now();
            let mut state = lock(&self.state);
            let (bucket, suppressed) = &mut *state;
            if bucket.available(now) < 1.0 {
                *suppressed += 1;
                return;
            }
            bucket.spend(1.0, now);
            std::mem::take(suppressed)
        };
        if suppressed > 0 {
            let note = format_args!("{suppressed} message(s) left out: too many at once");
            self.inner.log(&Record::builder().args(note).level(record.level()).build());
        }
        self.inner.log(record);
    }

    fn flush(&self) {
        self.inner.flush();
    }
}

/// Starts logging to standard error.
pub fn init(level: LevelFilter) {
    let inner = env_logger::Builder::new().filter_level(level).format_target(false).build();
    log::set_max_level(inner.filter());
    let state = Mutex::new((Bucket::new(RATE, BURST, Instant::now()), 0));
    if log::set_boxed_logger(Box::new(Limited { inner, state })).is_err() {
        log::warn!("logging was started twice");
    }
}

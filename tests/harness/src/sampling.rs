//! Looking at a number again and again, finely, beside what is measured.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{anyhow, Context};

/// A number as it was at some time between two moments.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Before it was read.
    pub before: Instant,
    /// After it was read.
    pub after: Instant,
    /// What was read.
    pub value: u64,
}

/// A thread that samples until it is stopped.
#[derive(Debug)]
pub struct Sampler {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<anyhow::Result<Vec<Sample>>>>,
}

impl Sampler {
    /// Calls `read` at once and then every `interval`.
    pub fn start(
        interval: Duration,
        mut read: impl FnMut() -> anyhow::Result<u64> + Send + 'static,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut samples = Vec::new();
            loop {
                // Asked first, so that the last sample is later than the wish to stop.
                let last = stopped.load(Ordering::Acquire);
                let before = Instant::now();
                let value = read()?;
                samples.push(Sample { before, after: Instant::now(), value });
                if last {
                    return Ok(samples);
                }
                std::thread::sleep(interval);
            }
        });
        Sampler { stop, thread: Some(thread) }
    }

    /// Takes a last sample and returns them all, in order.
    ///
    /// # Errors
    /// If one could not be read.
    pub fn finish(mut self) -> anyhow::Result<Vec<Sample>> {
        self.stop.store(true, Ordering::Release);
        let thread = self.thread.take().context("the sampler was finished before")?;
        thread.join().map_err(|_| anyhow!("the sampler panicked"))?
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

/// By how much a counter grew at most in any time of no more than `window`.
#[must_use]
pub fn most_within(samples: &[Sample], window: Duration) -> u64 {
    let (mut first, mut most) = (0, 0);
    for last in samples {
        while last.after - samples[first].before > window {
            first += 1;
            if samples[first].before >= last.before {
                break;
            }
        }
        most = most.max(last.value.saturating_sub(samples[first].value));
    }
    most
}

/// A counter of /proc/vmstat, kept open.
#[derive(Debug)]
pub struct KernelCounter {
    file: File,
    name: &'static str,
    text: Vec<u8>,
}

impl KernelCounter {
    /// The counter `name`.
    ///
    /// # Errors
    /// If /proc/vmstat cannot be opened.
    pub fn new(name: &'static str) -> anyhow::Result<Self> {
        let file = File::open("/proc/vmstat").context("cannot open /proc/vmstat")?;
        Ok(KernelCounter { file, name, text: vec![0; 1 << 15] })
    }

    /// What it is now.
    ///
    /// # Errors
    /// If there is no such counter.
    pub fn read(&mut self) -> anyhow::Result<u64> {
        let mut length = 0;
        // The kernel gives a page at a time.
        loop {
            let read = self.file.read_at(&mut self.text[length..], length as u64)?;
            length += read;
            if read == 0 || length == self.text.len() {
                break;
            }
        }
        std::str::from_utf8(&self.text[..length])?
            .lines()
            .find_map(|line| line.strip_prefix(self.name)?.strip_prefix(' ')?.parse().ok())
            .with_context(|| format!("/proc/vmstat has no {}", self.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_never_longer_than_asked_for() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let sample = |(ms, value)| Sample { before: at(ms), after: at(ms + 1), value };
        let samples: Vec<_> =
            [(0, 0), (400, 10), (900, 20), (1000, 50), (2500, 51)].map(sample).into();
        assert_eq!(most_within(&samples, Duration::from_millis(1000)), 40);
        assert_eq!(most_within(&samples, Duration::from_millis(1001)), 50);
        assert_eq!(most_within(&samples, Duration::from_millis(50)), 0);
        assert_eq!(most_within(&samples, Duration::from_secs(9)), 51);
        assert_eq!(most_within(&[], Duration::from_secs(9)), 0);
    }

    #[test]
    fn the_last_sample_is_later_than_the_wish_to_stop() {
        let sampler = Sampler::start(Duration::from_millis(1), || Ok(7));
        let now = Instant::now();
        let samples = sampler.finish().expect("samples");
        assert!(samples.last().is_some_and(|last| last.after > now && last.value == 7));
    }

    #[test]
    fn kernel_counters_are_found_by_their_whole_name() {
        let mut counter = KernelCounter::new("pgfault").expect("vmstat");
        assert!(counter.read().expect("counter") > 0);
        assert!(KernelCounter::new("pgfaul").expect("vmstat").read().is_err());
    }
}

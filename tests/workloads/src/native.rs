//! Libraries of Debian's, each in a small server of ours (`native/`) that loads
//! it with data and answers a line with a line.

use std::fmt::Write;

use anyhow::{ensure, Context};

use crate::lines::Lines;
use crate::load::Load;
use crate::rng::Rng;
use crate::Options;

/// Keys that one read of rocksdb's asks for.
const KEYS: usize = 10;

/// Number of different words in the documents of xapian's.
const WORDS: u64 = 50_000;

/// Makes the line of an operation; `size` is what the server has said.
type Request = fn(&mut Rng, size: u64) -> String;

/// A server that has its data.
pub struct Native {
    lines: Lines,
    unit: &'static str,
    version: String,
    size: u64,
    request: Request,
}

/// A key-value store whose values are all in its block cache.
///
/// # Errors
/// If the server fails.
pub fn rocksdb(options: Options) -> anyhow::Result<Native> {
    Native::start("rocksdb-server", options, "requests", |rng, keys| {
        if rng.below(11) == 0 {
            return format!("write {} {}", rng.below(keys), rng.any());
        }
        let mut line = "read".to_owned();
        for _ in 0..KEYS {
            // A text takes everything.
            let _ = write!(line, " {}", rng.below(keys));
        }
        line
    })
}

/// Searches among documents that are in memory.
///
/// # Errors
/// If the server fails.
pub fn xapian(options: Options) -> anyhow::Result<Native> {
    Native::start("xapian-server", options, "searches", |rng, _| {
        let mut line = "search".to_owned();
        for _ in 0..2 + rng.below(2) {
            let _ = write!(line, " {}", rng.skewed(WORDS));
        }
        line
    })
}

/// Trains a classifier with a part of the examples.
///
/// # Errors
/// If the server fails.
pub fn liblinear(options: Options) -> anyhow::Result<Native> {
    Native::start("liblinear-server", options, "trainings", |rng, _| format!("train {}", rng.any()))
}

impl Native {
    /// Starts a server, and waits until it has its data.
    fn start(
        program: &str,
        options: Options,
        unit: &'static str,
        request: Request,
    ) -> anyhow::Result<Self> {
        let arguments = [options.mib.to_string(), options.seed.to_string()];
        let mut lines = Lines::start(&format!("/workloads/{program}"), &arguments)?;
        let ready = lines.hear()?;
        // loaded SIZE VERSION
        let mut words = ready.splitn(3, ' ');
        ensure!(words.next() == Some("loaded"), "{program} says {ready}");
        let size = words.next().and_then(|word| word.parse().ok());
        let size = size.with_context(|| format!("{program} says {ready}"))?;
        let version = words.next().unwrap_or_default().to_owned();
        Ok(Native { lines, unit, version, size, request })
    }
}

impl Load for Native {
    fn unit(&self) -> &'static str {
        self.unit
    }

    fn version(&self) -> String {
        self.version.clone()
    }

    fn server(&self) -> Option<u32> {
        Some(self.lines.pid())
    }

    fn operate(&mut self, rng: &mut Rng) -> anyhow::Result<u64> {
        let mut line = (self.request)(rng, self.size);
        line.push('\n');
        self.lines.send(&line)?;
        let answer = self.lines.hear()?;
        answer.parse().with_context(|| format!("the server says {answer}"))
    }
}

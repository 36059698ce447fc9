//! What a workload says and is told, and how its operations are timed.

use std::io::{self, BufRead, Write};
use std::time::Instant;

use anyhow::Context;
use gemini_guest::protocol::{Loaded, Measured};
use gemini_guest::workload::word;
use serde_json::{json, Value};

use crate::rng::Rng;
use crate::server;
use crate::Options;

/// A program that has its data.
pub trait Load {
    /// What an operation is, in the plural.
    fn unit(&self) -> &'static str;

    /// The program and its version.
    fn version(&self) -> String;

    /// Process that holds the data, if it is not this one.
    fn server(&self) -> Option<u32>;

    /// Before the first operation of a phase.
    ///
    /// # Errors
    /// If the program fails.
    fn begin(&mut self) -> anyhow::Result<()> {
        Ok(())
    }

    /// One operation. Returns a number that depends on the program's answer.
    ///
    /// # Errors
    /// If the program fails, or its answer is wrong.
    fn operate(&mut self, rng: &mut Rng) -> anyhow::Result<u64>;

    /// After the last operation of a phase, and part of its time. Returns a
    /// number like [`Load::operate`].
    ///
    /// # Errors
    /// If the program fails.
    fn finish(&mut self) -> anyhow::Result<u64> {
        Ok(0)
    }
}

/// Says that the data is loaded, and runs a phase at every line of standard
/// input until its end.
///
/// # Errors
/// If the program fails, or nobody listens.
pub fn serve(load: &mut dyn Load, options: Options) -> anyhow::Result<()> {
    let mut bytes = server::resident_bytes(std::process::id())?;
    if let Some(server) = load.server() {
        bytes += server::resident_bytes(server)?;
    }
    say("loaded", json!(Loaded { resident_mib: bytes as f64 / f64::from(1 << 20) }))?;
    let mut round = 0;
    for line in io::stdin().lock().lines() {
        line.context("standard input fails")?;
        round += 1;
        // Not the sequence that the data came from.
        let rng = Rng::new(word(options.seed, round));
        say("done", json!(measure(load, rng, options.operations)?))?;
    }
    Ok(())
}

fn say(phase: &str, mut value: Value) -> anyhow::Result<()> {
    value["phase"] = phase.into();
    let mut output = io::stdout().lock();
    writeln!(output, "{value}").and_then(|()| output.flush()).context("nobody listens")
}

fn measure(load: &mut dyn Load, mut rng: Rng, operations: u64) -> anyhow::Result<Measured> {
    let mut micros = Vec::new();
    let mut digest = 0;
    let start = Instant::now();
    load.begin()?;
    for _ in 0..operations {
        let operation = Instant::now();
        digest = word(digest, load.operate(&mut rng)?);
        micros.push(operation.elapsed().as_secs_f64() * 1e6);
    }
    digest = word(digest, load.finish()?);
    let seconds = start.elapsed().as_secs_f64();
    Ok(Measured {
        operations,
        seconds,
        mean_us: micros.iter().sum::<f64>() / operations as f64,
        p99_us: percentile_99(micros),
        unit: load.unit().to_owned(),
        digest: format!("{digest:016x}"),
        version: load.version(),
    })
}

/// The smallest value that no more than one in a hundred are above.
fn percentile_99(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let above = values.len() / 100;
    values.iter().rev().nth(above).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo;

    impl Load for Echo {
        fn unit(&self) -> &'static str {
            "echoes"
        }
        fn version(&self) -> String {
            "echo 1".into()
        }
        fn server(&self) -> Option<u32> {
            None
        }
        fn operate(&mut self, rng: &mut Rng) -> anyhow::Result<u64> {
            Ok(rng.any())
        }
    }

    #[test]
    fn digest_follows_from_the_seed() {
        let digest = |seed| measure(&mut Echo, Rng::new(seed), 100).expect("it echoes").digest;
        assert_eq!(digest(1), digest(1));
        assert_ne!(digest(1), digest(2));
    }

    #[test]
    fn one_in_a_hundred_is_above_the_percentile() {
        assert_eq!(percentile_99((1..=1000).map(f64::from).collect()), 990.0);
        assert_eq!(percentile_99(vec![3.0, 1.0]), 3.0);
        assert_eq!(percentile_99(Vec::new()), 0.0);
    }
}

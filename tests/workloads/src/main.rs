//! A workload of the image that scripts/build-workloads makes: loads a real
//! program with data, and then, as often as it is told to, with operations.
//!
//! One program for all of them; the name that it is called by decides. Data and
//! operations follow from the seed alone, so that two runs differ in nothing but
//! what the memory below them is.

mod cg;
mod key_value;
mod lines;
mod load;
mod memcached;
mod native;
mod redis;
mod rng;
mod server;
mod sql;
mod zstd;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use clap::Parser;

use crate::load::Load;

/// What every workload is told.
#[derive(Clone, Copy, Debug, Parser)]
#[command(
    version,
    about = "Loads a program with data, then with operations at every `go` on stdin"
)]
struct Options {
    /// Data that is to be resident, in MiB
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    mib: u64,
    /// Seed of data and operations
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
    /// Operations of one measured phase
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    operations: u64,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("workload: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let words: Vec<OsString> = std::env::args_os().collect();
    let name = words.first().map(PathBuf::from).unwrap_or_default();
    let name = name.file_name().unwrap_or_default().to_string_lossy();
    let options = Options::parse_from(&words);
    let mut workload = start(&name, options)?;
    load::serve(workload.as_mut(), options)
}

fn start(name: &str, options: Options) -> anyhow::Result<Box<dyn Load>> {
    Ok(match name {
        "redis" => Box::new(redis::start(options)?),
        "memcached" => Box::new(memcached::start(options)?),
        "rocksdb" => Box::new(native::rocksdb(options)?),
        "xapian" => Box::new(native::xapian(options)?),
        "liblinear" => Box::new(native::liblinear(options)?),
        "sqlite-memory" => Box::new(sql::sqlite_memory(options)?),
        "sqlite-disk" => Box::new(sql::sqlite_disk(options)?),
        "h2" => Box::new(sql::h2(options)?),
        "cg" => Box::new(cg::Cg::new(options)?),
        "zstd" => Box::new(zstd::Zstd::new(options)?),
        _ => bail!("there is no workload named {name}"),
    })
}

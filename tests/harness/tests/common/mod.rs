//! A daemon of its own for each test.

// Each test program uses another part of this.
#![allow(dead_code)]

use gemini_harness::daemon::{Daemon, Options};
use gemini_harness::machine::Machine;
use gemini_harness::memory::{GuestMemory, Placement, BLOCK_SIZE};
use gemini_harness::scratch::Scratch;
use gemini_harness::settings::{self, Held};

/// Result of a test: an error fails it and is printed.
pub type Result<T = ()> = anyhow::Result<T>;

/// A running daemon, its directory, and the host's setting held for it.
pub struct Lab {
    // Dropped in this order: the daemon before its directory.
    pub daemon: Daemon,
    pub scratch: Scratch,
    _held: Held,
}

/// Options for the daemon under test.
pub fn options(policy: &str) -> Result<Options> {
    Ok(Options::new(&gemini_harness::daemon::default_program()?, policy))
}

/// A daemon with `policy`.
pub fn lab(policy: &str) -> Result<Lab> {
    // Nothing here is about budgets.
    start(options(policy)?.arg("--cpu-share", "100"))
}

/// A daemon with `options`.
pub fn start(options: Options) -> Result<Lab> {
    start_under(options, settings::daemon_decides()?)
}

/// A daemon with `options` under a setting that is held already.
pub fn start_under(options: Options, held: Held) -> Result<Lab> {
    let scratch = Scratch::new()?;
    let daemon = Daemon::start(&options, scratch.path())?;
    Ok(Lab { daemon, scratch, _held: held })
}

/// Memory of `blocks` blocks, as it should be.
pub fn memory(blocks: u64) -> Result<GuestMemory> {
    Ok(GuestMemory::new(blocks * BLOCK_SIZE, Placement::Aligned)?)
}

impl Lab {
    /// A machine of `blocks` blocks that is connected and synchronised.
    pub fn boot(&self, blocks: u64) -> Result<Machine> {
        Machine::boot(&self.daemon.socket(), memory(blocks)?)
    }
}

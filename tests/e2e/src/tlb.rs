//! The TLB simulator in an emulated guest: see tests/tlbsim.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{bail, Context};
use serde::Deserialize;
use serde_json::Value;

use crate::assets;
use crate::vm::VmConfig;

/// How long the plugin may take to answer: `stop` waits for processors that sleep.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The way to the simulator in one QEMU.
#[derive(Clone, Debug)]
pub struct TlbSimulator {
    socket: PathBuf,
}

/// What was counted of all processors, as far as it is used here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct TlbCounters {
    /// Accesses to data.
    pub accesses: u64,
    /// Those that no level of the TLB had an entry for.
    pub tlb_misses: u64,
    /// Misses at addresses of programs.
    pub user_tlb_misses: u64,
    /// Entries of page tables that were read for them, guest's and host's.
    pub page_walk_refs: u64,
    /// Misses where only the guest has a huge page.
    pub misses_guest_only: u64,
    /// Misses where both layers have one.
    pub misses_aligned: u64,
    /// Flushes because the host's page tables changed.
    pub host_flushes: u64,
    /// Accesses that were not simulated.
    pub skipped: u64,
    /// Instructions, of user programs and the kernel.
    pub instructions: u64,
    /// Cycles: an estimate.
    pub cycles: u64,
}

/// An answer of the plugin's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct TlbView {
    /// What was counted since QEMU was started.
    pub total: TlbCounters,
    /// Walks that ended elsewhere than QEMU's own.
    pub disagreements: u64,
}

impl TlbView {
    /// What was counted since `start`.
    #[must_use]
    pub fn since(&self, start: &Self) -> Self {
        let (now, then) = (&self.total, &start.total);
        TlbView {
            total: TlbCounters {
                accesses: now.accesses - then.accesses,
                tlb_misses: now.tlb_misses - then.tlb_misses,
                user_tlb_misses: now.user_tlb_misses - then.user_tlb_misses,
                page_walk_refs: now.page_walk_refs - then.page_walk_refs,
                misses_guest_only: now.misses_guest_only - then.misses_guest_only,
                misses_aligned: now.misses_aligned - then.misses_aligned,
                host_flushes: now.host_flushes - then.host_flushes,
                skipped: now.skipped - then.skipped,
                instructions: now.instructions - then.instructions,
                cycles: now.cycles - then.cycles,
            },
            disagreements: self.disagreements - start.disagreements,
        }
    }
}

impl TlbSimulator {
    /// Has the guest of `config` simulated as a processor of `profile`, with a
    /// socket beside the daemon's. A profile's name may end with `+coalesceN`, for
    /// entries that hold N base pages. The guest gets page tables of four levels, as
    /// the paper's test-bed has. With `pcid` a processor keeps what it has of an
    /// address space while it is in another one, as all have done since 2010.
    ///
    /// # Errors
    /// If the plugin was not built, or the guest has no daemon.
    pub fn attach(config: &mut VmConfig, profile: &str, pcid: bool) -> anyhow::Result<Self> {
        let device = config.device.as_ref().context("a guest without the device")?;
        let socket = device.with_extension("tlbsim");
        let plugin = assets::tlb_plugin()?;
        let pcid = if pcid { "on" } else { "off" };
        config.qemu_arguments.push("-plugin".into());
        config.qemu_arguments.push(format!(
            "{},profile={profile},pcid={pcid},memory={},control={},simulate=off",
            plugin.display(),
            config.memory,
            socket.display()
        ));
        // For QEMU to ask it for the time.
        config.preload = Some(plugin);
        // Without the second, a kernel whose emulator is slow finds no timer; without the
        // third it may tell the time by what is not slowed down with the rest.
        config
            .kernel_arguments
            .extend(["no5lvl", "no_timer_check", "tsc=unstable"].map(str::to_owned));
        Ok(TlbSimulator { socket })
    }

    /// Begins to simulate: nothing is before.
    ///
    /// # Errors
    /// As [`TlbSimulator::look`].
    pub fn begin(&self) -> anyhow::Result<()> {
        self.ask("simulate on").map(drop)
    }

    /// Ends simulating; the guest is faster then.
    ///
    /// # Errors
    /// As [`TlbSimulator::look`].
    pub fn end(&self) -> anyhow::Result<()> {
        self.ask("simulate off").map(drop)
    }

    /// Has the guest's clock take `slowdown` times as long for a second.
    ///
    /// # Errors
    /// As [`TlbSimulator::look`].
    pub fn slow_clock(&self, slowdown: u32) -> anyhow::Result<()> {
        self.ask(&format!("slowdown {slowdown}")).map(drop)
    }

    /// What was counted so far.
    ///
    /// # Errors
    /// If the plugin does not answer, or cannot go on.
    pub fn look(&self) -> anyhow::Result<TlbView> {
        let answer = self.ask("counters")?;
        serde_json::from_value(answer).context("the simulator's answer has another form")
    }

    /// Begins traces PATH.0 and so on, one of each processor, of at most `limit`
    /// bytes.
    ///
    /// # Errors
    /// As [`TlbSimulator::look`], or if traces are being made.
    pub fn record(&self, path: &Path, limit: u64) -> anyhow::Result<()> {
        self.ask(&format!("record {limit} {}", path.display())).map(drop)
    }

    /// Ends traces.
    ///
    /// # Errors
    /// As [`TlbSimulator::look`], or if a processor sleeps.
    pub fn stop(&self) -> anyhow::Result<()> {
        self.ask("stop").map(drop)
    }

    fn ask(&self, command: &str) -> anyhow::Result<Value> {
        let mut stream = UnixStream::connect(&self.socket)
            .with_context(|| format!("cannot connect to {}", self.socket.display()))?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.write_all(format!("{command}\n").as_bytes())?;
        let mut line = String::new();
        BufReader::new(stream)
            .read_line(&mut line)
            .with_context(|| format!("the simulator does not answer `{command}`"))?;
        let answer: Value = serde_json::from_str(&line)
            .with_context(|| format!("the answer to `{command}` is no JSON: {line}"))?;
        match answer.get("error") {
            Some(error) => bail!("the simulator says: {error}"),
            None => Ok(answer),
        }
    }
}

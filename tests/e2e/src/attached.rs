//! A guest that somebody else started with the device attached: does it become aligned?
//!
//! scripts/test-packages asks this of a domain that it made by the commands of the operating
//! guide, and of the agent that is a service there.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{ensure, Context};
use clap::Args;
use gemini_guest::protocol::{BlockState, PageSize};

use crate::compare;
use crate::daemon::Control;
use crate::guest::Guest;
use crate::lab::SYNC_TIMEOUT;
use crate::outside::GuestMemory;
use crate::process;
use crate::qmp::Qmp;

const FILLED: u64 = 128 << 20;
/// Of the 64 blocks that [`FILLED`] has, those that must become aligned.
const ALIGNED_AT_LEAST: u64 = 60;
/// Of a whole Debian, emulated.
const BOOT_TIMEOUT: Duration = Duration::from_secs(300);
const SETTLE: Duration = Duration::from_secs(90);

/// `gemini-lab attached`
#[derive(Args, Clone, Debug)]
pub struct AttachedArgs {
    /// The guest's channel for tests
    #[arg(long, value_name = "SOCKET")]
    guest: PathBuf,
    /// QEMU's monitor
    #[arg(long, value_name = "SOCKET")]
    qmp: PathBuf,
    /// File with QEMU's process id
    #[arg(long, value_name = "FILE")]
    pid_file: PathBuf,
    /// The daemon's control socket
    #[arg(long, value_name = "SOCKET")]
    control: PathBuf,
    /// The guest's memory
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    mem: u64,
    /// Run this in the guest first, line by line
    #[arg(long, value_name = "FILE")]
    commands: Option<PathBuf>,
    /// Also have gemini-guestd promote base pages there, as systemd runs it
    #[arg(long)]
    promoter: bool,
}

/// Fills the guest's memory, and looks from outside and from inside.
///
/// # Errors
/// If a command fails, or the guest is not aligned in time.
pub fn run(args: &AttachedArgs) -> anyhow::Result<()> {
    let guest = Guest::connect(&args.guest)?;
    guest.wait_ready(BOOT_TIMEOUT, || Ok(()))?;
    if let Some(path) = &args.commands {
        let commands = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        for command in commands.lines() {
            let output =
                guest.shell(command).with_context(|| format!("in the guest: {command}"))?;
            eprintln!("guest# {command}\n{}", output.trim_end());
        }
    }
    let pid = std::fs::read_to_string(&args.pid_file)
        .with_context(|| format!("cannot read {}", args.pid_file.display()))?
        .trim()
        .parse()
        .context("a process id")?;
    let memory = GuestMemory::find(pid, args.mem << 20, &mut Qmp::connect(&args.qmp)?)?;
    let aligned = become_aligned(&guest, &memory, &Control::new(&args.control))?;
    eprintln!("ok: {aligned} blocks aligned");
    if args.promoter {
        let promoted = service_promotes(&guest)?;
        eprintln!("ok: {promoted} ranges promoted by gemini-guestd.service");
    }
    Ok(())
}

/// Fills base pages, and waits until the agent has made huge pages of them.
fn service_promotes(guest: &Guest) -> anyhow::Result<u64> {
    guest.shell("systemctl is-active gemini-guestd")?;
    // The kernel promotes next to nothing by itself.
    guest.shell(
        "cd /sys/kernel/mm/transparent_hugepage && echo 1 > khugepaged/pages_to_scan && \
         echo 3600000 > khugepaged/scan_sleep_millisecs && echo madvise > enabled",
    )?;
    guest.fill("base", FILLED, 2, PageSize::System)?;
    let huge_blocks = || -> anyhow::Result<u64> {
        let runs = guest.blocks()?.runs;
        Ok(runs.iter().filter(|run| run.state == BlockState::Huge).map(|run| run.count).sum())
    };
    let before = huge_blocks()?;
    guest.shell("echo always > /sys/kernel/mm/transparent_hugepage/enabled")?;
    let promoted = process::wait_for("gemini-guestd promotes", SETTLE, || {
        let promoted = huge_blocks()?.saturating_sub(before);
        Ok((promoted >= ALIGNED_AT_LEAST).then_some(promoted))
    })?;
    guest.verify("base")?;
    let told = guest.shell("journalctl --unit=gemini-guestd --output=cat")?;
    let restarts = guest.shell("systemctl show --property=NRestarts --value gemini-guestd")?;
    ensure!(restarts.trim() == "0", "gemini-guestd ended {} times: {told}", restarts.trim());
    ensure!(!told.contains("WARN") && !told.contains("ERROR"), "gemini-guestd finds fault: {told}");
    Ok(promoted)
}

/// Fills memory of the guest under the name `kept`, and waits until both layers have huge pages in
/// the same places; how many.
///
/// # Errors
/// If they do not in time, or what was filled is not as it was.
pub fn become_aligned(
    guest: &Guest,
    memory: &GuestMemory,
    control: &Control,
) -> anyhow::Result<u64> {
    process::wait_for("both sides know each other", SYNC_TIMEOUT, || {
        let status = control.status()?;
        Ok((status.connected && status.guest_synced && status.host_synced).then_some(()))
    })?;
    guest.fill("kept", FILLED, 1, PageSize::Huge)?;
    process::wait_for("the host follows the guest", SETTLE, || {
        let view = compare::View::take(guest, memory)?;
        Ok((view.counts().aligned >= ALIGNED_AT_LEAST).then_some(()))
    })?;
    let (view, _) = compare::three_sides(guest, memory, control, SETTLE)?;
    let counts = view.counts();
    ensure!(counts.aligned >= ALIGNED_AT_LEAST, "{counts:?}");
    guest.verify("kept")?;
    Ok(counts.aligned)
}

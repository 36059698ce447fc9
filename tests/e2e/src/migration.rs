//! Live migration between two QEMUs of this machine.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context};
use gemini_harness::report::ratio;
use serde_json::{json, Value};

use crate::lab::Lab;
use crate::process;
use crate::qmp::Qmp;
use crate::vm::{Vm, VmConfig};
use crate::MIB;

/// How long a migration may take.
pub const TIMEOUT: Duration = Duration::from_secs(120);

/// QEMU stops the guest for its last pass when that would take no longer.
const DOWNTIME_LIMIT_MS: u64 = 100;

/// What that pass then has to send at most, close to what the device itself adds, so that a move with
/// it can be told from one without. QEMU would find out by itself how much it can send in that
/// time; but it goes by the last 100 ms, and may have met nothing but zeros in them: by chance guests
/// would be stopped with 1 MiB left, or with 50.
const LEFT_AT_STOP: u64 = 8 * MIB;

/// How long a guest may be faster than that; then QEMU decides by itself after all.
const CONVERGENCE: Duration = Duration::from_secs(20);

/// How a migration stands, as the source tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It goes on.
    Active,
    /// The guest is the destination's.
    Completed,
    /// It was cancelled; the guest is the source's.
    Cancelled,
    /// It failed; the guest is the source's.
    Failed,
}

/// The socket that the guest of `to` comes through.
fn uri(to: &Vm) -> String {
    format!("unix:{}", path(to).display())
}

fn path(to: &Vm) -> PathBuf {
    to.directory().join("migration")
}

fn set_capability(qmp: &mut Qmp, capability: &str) -> anyhow::Result<()> {
    let on = json!({"capabilities": [{"capability": capability, "state": true}]});
    qmp.execute("migrate-set-capabilities", on).map(drop)
}

/// Whether the waiting QEMU `to` would take a guest by postcopy.
///
/// # Errors
/// What QEMU says against it.
pub fn allow_postcopy(to: &mut Vm) -> anyhow::Result<()> {
    set_capability(&mut to.qmp, "postcopy-ram")
}

/// Begins to migrate the guest of `from` into `to`, which waits for it.
///
/// # Errors
/// If either refuses.
pub fn begin(from: &mut Vm, to: &mut Vm) -> anyhow::Result<()> {
    // The source keeps its guest until the destination has said that it runs.
    for qmp in [&mut to.qmp, &mut from.qmp] {
        set_capability(qmp, "return-path")?;
    }
    to.qmp.execute("migrate-incoming", json!({"uri": uri(to)}))?;
    let parameters = json!({
        "max-bandwidth": 0,
        "downtime-limit": DOWNTIME_LIMIT_MS,
        "avail-switchover-bandwidth": LEFT_AT_STOP * 1000 / DOWNTIME_LIMIT_MS,
    });
    from.qmp.execute("migrate-set-parameters", parameters)?;
    from.qmp.execute("migrate", json!({"uri": uri(to)})).map(drop)
}

/// How the migration out of `from` stands, and the share of the memory that is still to be looked
/// at, or sent again.
///
/// # Errors
/// If QEMU is gone, or says what nobody knows.
pub fn state(from: &mut Vm) -> anyhow::Result<(State, f64)> {
    let told = from.qmp.execute("query-migrate", json!({}))?;
    let state = match told["status"].as_str().unwrap_or_default() {
        "completed" => State::Completed,
        "cancelled" => State::Cancelled,
        "failed" => State::Failed,
        "setup" | "active" | "device" | "cancelling" | "pre-switchover" | "wait-unplug" => {
            State::Active
        }
        other => bail!("the migration is {other:?}: {told}"),
    };
    let number = |value: &Value| value.as_u64().unwrap_or_default();
    let ram = &told["ram"];
    Ok((state, ratio(number(&ram["remaining"]), number(&ram["total"]))))
}

/// Waits until the migration out of `from` is over, in whatever way.
///
/// # Errors
/// If it is not in time, or QEMU is gone.
pub fn wait_over(from: &mut Vm) -> anyhow::Result<State> {
    let began = Instant::now();
    let mut helped = false;
    process::wait_for("the migration is over", TIMEOUT, || {
        from.process.expect_running()?;
        if !helped && began.elapsed() > CONVERGENCE {
            let by_itself = json!({"avail-switchover-bandwidth": 0});
            from.qmp.execute("migrate-set-parameters", by_itself)?;
            helped = true;
        }
        let (state, _) = state(from)?;
        Ok((state != State::Active).then_some(state))
    })
}

/// Takes the guest of `from` into `to`, where it runs when this returns.
///
/// # Errors
/// If it does not.
pub fn migrate(from: &mut Vm, to: &mut Vm) -> anyhow::Result<()> {
    begin(from, to)?;
    let state = wait_over(from)?;
    ensure!(state == State::Completed, "{state:?}\n{}", to.process.log_tail());
    wait_running(to)
}

/// Has the QEMU of `config`, and those that its guest moves to, log what [`downtime`] and
/// [`state_time`] read.
pub fn log_downtime(config: &mut VmConfig) {
    let arguments = ["-trace", "vmstate_downtime_*", "-msg", "timestamp=on"];
    config.qemu_arguments.extend(arguments.map(str::to_owned));
}

/// How long a guest stood still that has just moved: from when the source begins to stop it, its
/// devices included, until it and they run at the destination. What `query-migrate` tells is in whole
/// milliseconds.
///
/// # Errors
/// If QEMU did not log it.
pub fn downtime(from: &Vm, to: &Vm) -> anyhow::Result<Duration> {
    let stop = checkpoint(from, "src-downtime-start")?;
    let start = checkpoint(to, "dst-precopy-bh-vm-started")?;
    start.checked_sub(stop).context("the guest went on before it had stopped")
}

/// How long a device's state took in a move that has ended, to be saved and to be loaded. A PCI
/// device's name ends with that of its kind.
///
/// # Errors
/// If QEMU did not log it.
pub fn state_time(from: &Vm, to: &Vm, kind: &str) -> anyhow::Result<(Duration, Duration)> {
    Ok((section_time(from, "save", kind)?, section_time(to, "load", kind)?))
}

/// What QEMU last logged of a section: `vmstate_downtime_load type=non-iterable
/// idstr=0000:00:01.0/vhost-user-gemini instance_id=0 downtime=MICROSECONDS`.
fn section_time(vm: &Vm, what: &str, kind: &str) -> anyhow::Result<Duration> {
    let log = vm.process.log()?;
    let (event, name) = (format!(":vmstate_downtime_{what} "), format!("/{kind} "));
    let line = log.lines().rfind(|line| line.contains(&event) && line.contains(&name));
    let micros = line.and_then(|line| line.rsplit_once("downtime=")?.1.trim().parse().ok());
    micros.map(Duration::from_micros).with_context(|| {
        format!("{what} of {kind} is not in QEMU's log\n{}", vm.process.log_tail())
    })
}

/// When QEMU last logged so, by the machine's clock: `PID@SECONDS.MICROSECONDS:EVENT NAME`.
fn checkpoint(vm: &Vm, name: &str) -> anyhow::Result<Duration> {
    let log = vm.process.log()?;
    let line = log.lines().rfind(|line| line.ends_with(name));
    let time = line.and_then(|line| {
        let (seconds, micros) = line.split_once('@')?.1.split_once(':')?.0.split_once('.')?;
        Some(Duration::new(seconds.parse().ok()?, micros.parse::<u32>().ok()? * 1000))
    });
    time.with_context(|| format!("{name} is not in QEMU's log\n{}", vm.process.log_tail()))
}

/// Waits until the guest runs in `to`.
///
/// # Errors
/// If it does not in time.
pub fn wait_running(to: &mut Vm) -> anyhow::Result<()> {
    process::wait_for("the guest runs at the destination", TIMEOUT, || {
        to.process.expect_running()?;
        Ok(to.qmp.is_running()?.then_some(()))
    })
}

/// Cancels the migration out of `from`; where it was over already nothing is
/// changed.
///
/// # Errors
/// If QEMU is gone.
pub fn cancel(from: &mut Vm) -> anyhow::Result<()> {
    from.qmp.execute("migrate_cancel", json!({})).map(drop)
}

impl Lab {
    /// A place for the guest to migrate to: another QEMU with another daemon.
    ///
    /// # Errors
    /// If one of them does not come up.
    pub fn destination(&self, name: &str) -> anyhow::Result<Lab> {
        Lab::await_guest(&self.bench, name, &self.daemon_config, &self.vm.config)
            .with_context(|| format!("no destination {name}"))
    }
}

//! The process under test, and its control socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{bail, ensure, Context};
use gemini_harness::report::BlockMap;
use serde::de::DeserializeOwned;
use serde::Deserialize;
use serde_json::{json, Value};

use crate::process::{self, Guarded};

/// How long the daemon may take to listen, or to answer.
const TIMEOUT: Duration = Duration::from_secs(20);

/// How a daemon is started.
#[derive(Clone, Debug)]
pub struct DaemonConfig {
    /// The program.
    pub program: PathBuf,
    /// `none`, `always` or `gemini`.
    pub policy: String,
    /// Further arguments.
    pub arguments: Vec<String>,
    /// Further environment.
    pub environment: Vec<(String, String)>,
}

impl DaemonConfig {
    /// The program with a policy, and its own defaults for everything else.
    #[must_use]
    pub fn new(program: &Path, policy: &str) -> Self {
        DaemonConfig {
            program: program.to_owned(),
            policy: policy.to_owned(),
            arguments: Vec::new(),
            environment: Vec::new(),
        }
    }
}

/// A running daemon.
#[derive(Debug)]
pub struct Daemon {
    /// The process.
    pub process: Guarded,
    control: Control,
}

/// The way to a daemon's control socket.
#[derive(Clone, Debug)]
pub struct Control {
    path: PathBuf,
}

/// The answer to `{"cmd":"status"}`, as far as it is used here.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Status {
    /// The daemon's version.
    pub version: String,
    /// Whether a VMM is connected.
    pub connected: bool,
    /// Generation of the memory table.
    pub generation: u64,
    /// Blocks that the daemon manages.
    pub blocks: u64,
    /// Whether the driver's full state is in.
    pub guest_synced: bool,
    /// Whether the host's state was scanned and hinted in full.
    pub host_synced: bool,
    /// Blocks that are huge at both layers.
    pub aligned: u64,
    /// Blocks that only the guest has huge.
    pub guest_only: u64,
    /// Blocks in use that only the host has huge.
    pub host_only: u64,
    /// Bytes copied.
    pub collapse_bytes: u64,
    /// Blocks made huge by copying.
    pub collapses: u64,
    /// Blocks made huge without a copy.
    pub populated: u64,
    /// Blocks made base pages again, for want of huge pages.
    pub demoted: u64,
    /// Blocks dropped.
    pub released: u64,
    /// Base pages dropped.
    pub trimmed_pages: u64,
    /// Records and requests refused.
    pub bad_records: u64,
    /// Batches sent to the guest.
    pub hint_batches: u64,
    /// Batches that the guest sent.
    pub report_batches: u64,
    /// What the daemon thinks is wrong with this machine or VMM.
    #[serde(default)]
    pub findings: Vec<Finding>,
    /// The pools that hugetlb memory comes from.
    #[serde(default)]
    pub hugetlb: Vec<HugetlbPool>,
}

/// A pool of hugetlb pages, in the daemon's eyes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct HugetlbPool {
    /// Pages of the pool.
    pub total: u64,
    /// Those that nobody uses.
    pub free: u64,
    /// Of these, those that are set aside.
    pub reserved: u64,
    /// Pages that the guest's memory does not have yet.
    pub missing: u64,
    /// Of these, those that nothing is set aside for.
    pub unreserved: u64,
    /// Whether it is too short to prepare anything.
    pub short: bool,
}

/// Something that the daemon complains about.
#[derive(Clone, Debug, Deserialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: String,
    /// A short name.
    pub code: String,
    /// Cause and remedy.
    pub message: String,
}

impl Daemon {
    /// Starts a daemon that listens on `socket`, and waits until it does.
    ///
    /// # Errors
    /// If it ends, or does not listen in time.
    pub fn start(config: &DaemonConfig, socket: &Path, log: &Path) -> anyhow::Result<Self> {
        let control = Control { path: socket.with_extension("control") };
        let mut command = Command::new(&config.program);
        command
            .arg("--socket-path")
            .arg(socket)
            .arg("--control-socket")
            .arg(&control.path)
            .args(["--policy", &config.policy])
            .args(&config.arguments)
            .envs(config.environment.iter().cloned());
        let mut process = Guarded::start("the daemon", command, log)?;
        process::wait_for("the daemon listens", TIMEOUT, || {
            process.expect_running()?;
            // A socket left by a daemon that was killed refuses connections,
            // so only an answer counts.
            Ok((socket.exists() && control.status().is_ok()).then_some(()))
        })?;
        Ok(Daemon { process, control })
    }

    /// The control socket.
    #[must_use]
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// The daemon's own figures.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn status(&self) -> anyhow::Result<Status> {
        self.control.status()
    }

    /// The daemon's view of every block it manages.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn map(&self) -> anyhow::Result<BlockMap> {
        self.control.map()
    }

    /// Waits until guest and daemon know each other's full state.
    ///
    /// # Errors
    /// If the daemon ends, or the state is not there in time.
    pub fn wait_synced(&mut self, timeout: Duration) -> anyhow::Result<Status> {
        let mut last = None;
        let result = process::wait_for("both layers are synced", timeout, || {
            self.process.expect_running()?;
            let status = self.control.status()?;
            let synced = status.connected && status.guest_synced && status.host_synced;
            last = Some(status.clone());
            Ok(synced.then_some(status))
        });
        result.with_context(|| format!("last status {last:?}\n{}", self.process.log_tail()))
    }

    /// SIGTERM, and waits for the clean end.
    ///
    /// # Errors
    /// If it takes too long, or exits with anything but 0.
    pub fn stop(mut self) -> anyhow::Result<()> {
        self.process.expect_running()?;
        self.process.signal(libc::SIGTERM)?;
        let status = self.process.wait(TIMEOUT)?;
        if !status.success() {
            bail!("the daemon ends with {status}\n{}", self.process.log_tail());
        }
        Ok(())
    }
}

impl Control {
    /// The control socket at `path`.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Control { path: path.to_owned() }
    }

    /// The daemon's own figures.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn status(&self) -> anyhow::Result<Status> {
        self.ask(&json!({"cmd": "status"}))
    }

    /// Sets the most bytes of huge pages that the guest may have.
    ///
    /// # Errors
    /// If it does not answer, or sets another limit.
    pub fn set_huge_max(&self, bytes: u64) -> anyhow::Result<()> {
        let answer: Value = self.ask(&json!({"cmd": "set", "huge_max": bytes}))?;
        ensure!(answer["huge_max"] == bytes, "the daemon answers {answer}");
        Ok(())
    }

    /// Sets the policy.
    ///
    /// # Errors
    /// If it does not answer, or has no such policy.
    pub fn set_policy(&self, policy: &str) -> anyhow::Result<()> {
        let answer: Value = self.ask(&json!({"cmd": "set", "policy": policy}))?;
        ensure!(answer["policy"] == policy, "the daemon answers {answer}");
        Ok(())
    }

    /// The daemon's view of every block it manages.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn map(&self) -> anyhow::Result<BlockMap> {
        self.ask(&json!({"cmd": "map"}))
    }

    fn ask<T: DeserializeOwned>(&self, command: &Value) -> anyhow::Result<T> {
        let mut stream = UnixStream::connect(&self.path)
            .with_context(|| format!("cannot connect to {}", self.path.display()))?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.write_all(format!("{command}\n").as_bytes())?;
        let mut line = String::new();
        BufReader::new(stream)
            .read_line(&mut line)
            .with_context(|| format!("the daemon does not answer `{command}`"))?;
        serde_json::from_str(&line)
            .with_context(|| format!("the answer to `{command}` has another form: {line}"))
    }
}

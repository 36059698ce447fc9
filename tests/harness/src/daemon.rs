//! The daemon under test: a child process that does not outlive its guard.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context};
use serde::Deserialize;
use serde_json::Value;

use crate::report::BlockMap;
use crate::sys;

/// Longest wait for the daemon to listen, or to end.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where the daemon's program is unless told: beside the harness, or, for a
/// test program, one directory up.
///
/// # Errors
/// If it is in neither place.
pub fn default_program() -> anyhow::Result<PathBuf> {
    program("vhost-device-gemini")
}

fn program(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("cannot tell where this program is")?;
    own.ancestors()
        .skip(1)
        .take(2)
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
        .with_context(|| {
            format!(
                "no {name} beside {}: build it (cargo build -p vhost-device-gemini), \
                 or name it with --daemon",
                own.display()
            )
        })
}

/// How to start a daemon.
#[derive(Clone, Debug)]
pub struct Options {
    /// The program.
    pub program: PathBuf,
    /// `--policy`.
    pub policy: String,
    /// Further arguments.
    pub arguments: Vec<String>,
    /// Further environment.
    pub environment: Vec<(String, String)>,
    /// Whether it gets a listening descriptor instead of a path.
    pub pass_listener: bool,
}

impl Options {
    /// `program` with `policy` and nothing else.
    #[must_use]
    pub fn new(program: &Path, policy: &str) -> Self {
        Options {
            program: program.to_owned(),
            policy: policy.to_owned(),
            arguments: Vec::new(),
            environment: Vec::new(),
            pass_listener: false,
        }
    }

    /// Adds an argument with its value.
    #[must_use]
    pub fn arg(mut self, name: &str, value: &str) -> Self {
        self.arguments.push(name.into());
        self.arguments.push(value.into());
        self
    }

    /// Adds an environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }
}

/// A running daemon. Dropping it kills it.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    directory: PathBuf,
    exited: Option<ExitStatus>,
}

/// Blocks by state at the guest, in the daemon's eyes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct GuestCounts {
    /// Not reported.
    pub unknown: u64,
    /// No page in use.
    pub free: u64,
    /// Base pages in use.
    pub base: u64,
    /// One guest huge page.
    pub huge: u64,
    /// Held by the driver.
    pub booked: u64,
    /// Unmovable, reserved, offline.
    pub pinned: u64,
}

/// Blocks by state at the host, in the daemon's eyes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct HostCounts {
    /// No memory behind them.
    pub absent: u64,
    /// Base pages.
    pub base: u64,
    /// One huge page.
    pub huge: u64,
    /// One hugetlb page.
    pub hugetlb: u64,
}

/// Something that the daemon found worth telling an operator.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: String,
    /// Short name of the kind.
    pub code: String,
    /// What is the matter, and the remedy.
    pub message: String,
}

/// The daemon's answer to `{"cmd":"status"}`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Status {
    /// Version of the daemon.
    pub version: String,
    /// Its policy.
    pub policy: String,
    /// Whether a monitor is connected.
    pub connected: bool,
    /// Generation of the states.
    pub generation: u64,
    /// log2 of the block size.
    pub block_shift: u32,
    /// Managed blocks.
    pub blocks: u64,
    /// Whether the driver's full state is in.
    pub guest_synced: bool,
    /// Whether the host's full state was scanned and hinted.
    pub host_synced: bool,
    /// Guest states.
    pub guest: GuestCounts,
    /// Host states.
    pub host: HostCounts,
    /// Huge at both layers.
    pub aligned: u64,
    /// Huge at the guest only.
    pub guest_only: u64,
    /// Huge at the host only, in use or held.
    pub host_only: u64,
    /// Bytes copied to make huge pages.
    pub collapse_bytes: u64,
    /// Bytes charged to the copy budget: 2 MiB an attempt.
    pub charged_bytes: u64,
    /// Blocks made huge by copying.
    pub collapses: u64,
    /// Collapses that the guest may have met.
    pub collapses_met: u64,
    /// Attempts that failed.
    pub collapse_failures: u64,
    /// Blocks made huge without copying.
    pub populated: u64,
    /// Blocks made base pages again, for want of huge pages.
    pub demoted: u64,
    /// Blocks dropped.
    pub released: u64,
    /// Blocks dropped and to be made huge.
    pub renewed: u64,
    /// Base pages dropped.
    pub trimmed_pages: u64,
    /// Records and requests refused.
    pub bad_records: u64,
    /// CPU time of the daemon in seconds.
    pub cpu_seconds: f64,
    /// Batches sent.
    pub hint_batches: u64,
    /// Batches received.
    pub report_batches: u64,
    /// Most bytes of huge pages that it lets the guest have, if there is a limit.
    pub huge_max: Option<u64>,
    /// Whether the driver is advised that huge pages are scarce.
    pub scarce: bool,
    /// What an operator should know.
    pub findings: Vec<Finding>,
}

impl Daemon {
    /// Starts a daemon whose sockets and log are in `directory`, and waits until
    /// it answers.
    ///
    /// # Errors
    /// If it does not start or does not listen in time; its log is in the error.
    pub fn start(options: &Options, directory: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(directory)?;
        let socket = directory.join("gemini.sock");
        let control = directory.join("control.sock");
        for stale in [&socket, &control] {
            if stale.exists() {
                std::fs::remove_file(stale)
                    .with_context(|| format!("cannot remove stale {}", stale.display()))?;
            }
        }
        let log = File::options()
            .create(true)
            .append(true)
            .open(directory.join("daemon.log"))
            .context("cannot write the daemon's log")?;

        let mut command = Command::new(&options.program);
        command
            .arg("--policy")
            .arg(&options.policy)
            .arg("--control-socket")
            .arg(&control)
            .args(&options.arguments)
            .envs(options.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let listener;
        if options.pass_listener {
            listener = UnixListener::bind(&socket)?;
            sys::inherit(&mut command, listener.as_fd(), 3);
            command.args(["--fd", "3"]);
        } else {
            command.arg("--socket-path").arg(&socket);
        }
        let child = sys::die_with_parent(&mut command)
            .spawn()
            .with_context(|| format!("cannot start {}", options.program.display()))?;
        let mut daemon = Daemon { child, directory: directory.to_owned(), exited: None };
        let deadline = Instant::now() + PATIENCE;
        while !(socket.exists() && UnixStream::connect(&control).is_ok()) {
            if let Some(status) = daemon.try_wait()? {
                bail!("daemon ended at start ({status}): {}", daemon.log_tail());
            }
            ensure!(
                Instant::now() < deadline,
                "daemon does not listen after {PATIENCE:?}: {}",
                daemon.log_tail()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(daemon)
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The vhost-user socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.directory.join("gemini.sock")
    }

    /// Its log.
    #[must_use]
    pub fn log_path(&self) -> PathBuf {
        self.directory.join("daemon.log")
    }

    /// The last lines of the log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let bytes = std::fs::read(self.log_path()).unwrap_or_default();
        let tail = &bytes[bytes.len().saturating_sub(4096)..];
        String::from_utf8_lossy(tail).into_owned()
    }

    /// Whether it has ended.
    ///
    /// # Errors
    /// Those of `waitpid`.
    pub fn try_wait(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        if self.exited.is_none() {
            self.exited = self.child.try_wait()?;
        }
        Ok(self.exited)
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// If it has not after `patience`.
    pub fn wait(&mut self, patience: Duration) -> anyhow::Result<ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            ensure!(Instant::now() < deadline, "daemon still runs after {patience:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Fails if it has ended, with how it did and what it logged last.
    ///
    /// # Errors
    /// If it has ended.
    pub fn ensure_alive(&mut self) -> anyhow::Result<()> {
        match self.try_wait()? {
            None => Ok(()),
            Some(status) => match status.signal() {
                Some(signal) => bail!("daemon died of signal {signal}: {}", self.log_tail()),
                None => bail!("daemon ended ({status}): {}", self.log_tail()),
            },
        }
    }

    /// Asks it to end and waits for that.
    ///
    /// # Errors
    /// If it does not end in time.
    pub fn terminate(&mut self) -> anyhow::Result<ExitStatus> {
        if self.try_wait()?.is_none() {
            sys::kill(self.pid(), libc::SIGTERM)?;
        }
        self.wait(PATIENCE)
    }

    /// One request on the control socket.
    ///
    /// # Errors
    /// If it is not answered with JSON.
    pub fn control(&self, request: &Value) -> anyhow::Result<Value> {
        let path = self.directory.join("control.sock");
        let mut stream = UnixStream::connect(&path)
            .with_context(|| format!("cannot connect to {}", path.display()))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(format!("{request}\n").as_bytes())?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).context("no answer on the control socket")?;
        serde_json::from_str(&line).with_context(|| format!("answer is no JSON: {line:?}"))
    }

    /// Its status.
    ///
    /// # Errors
    /// If it does not answer with one.
    pub fn status(&self) -> anyhow::Result<Status> {
        let answer = self.control(&serde_json::json!({"cmd": "status"}))?;
        serde_json::from_value(answer.clone())
            .with_context(|| format!("unexpected status {answer}"))
    }

    /// Sets the most bytes of huge pages that it lets the guest have.
    ///
    /// # Errors
    /// If it refuses.
    pub fn set_huge_max(&self, bytes: Option<u64>) -> anyhow::Result<()> {
        let answer = self.control(&serde_json::json!({"cmd": "set", "huge_max": bytes}))?;
        ensure!(answer == serde_json::json!({"huge_max": bytes}), "unexpected answer {answer}");
        Ok(())
    }

    /// Its block map.
    ///
    /// # Errors
    /// If it does not answer with one.
    pub fn map(&self) -> anyhow::Result<BlockMap> {
        let answer = self.control(&serde_json::json!({"cmd": "map"}))?;
        serde_json::from_value(answer).context("unexpected map")
    }

    /// Waits until the status is as `wanted` says, and returns it.
    ///
    /// # Errors
    /// If it is not in time; the error has the last status.
    pub fn wait_status(
        &mut self,
        what: &str,
        patience: Duration,
        mut wanted: impl FnMut(&Status) -> bool,
    ) -> anyhow::Result<Status> {
        let deadline = Instant::now() + patience;
        loop {
            self.ensure_alive()?;
            let status = self.status()?;
            if wanted(&status) {
                return Ok(status);
            }
            ensure!(
                Instant::now() < deadline,
                "daemon is not {what} after {patience:?}: {status:?}"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.exited.is_none() {
            // Neither can fail for a child that is not waited for yet.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

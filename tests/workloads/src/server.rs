//! The real program, as a child of the load generator.

use std::ffi::OsStr;
use std::io;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, Context};

/// How long a server may take until it listens, in an emulated guest.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// A child that ends with this process, or when it is dropped.
pub struct Server {
    name: String,
    child: Child,
}

impl Server {
    /// Starts a program that has a socket.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(program: &str, arguments: &[impl AsRef<OsStr>]) -> anyhow::Result<Self> {
        let mut command = Command::new(program);
        // Standard output is for what this process says.
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null());
        Self::spawn(program, command)
    }

    /// Starts a program that is talked to through pipes.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn piped(
        program: &str,
        arguments: &[impl AsRef<OsStr>],
    ) -> anyhow::Result<(Self, ChildStdin, ChildStdout)> {
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut server = Self::spawn(program, command)?;
        let input = server.child.stdin.take().context("a child without its input")?;
        let output = server.child.stdout.take().context("a child without its output")?;
        Ok((server, input, output))
    }

    fn spawn(program: &str, mut command: Command) -> anyhow::Result<Self> {
        // SAFETY: between fork and exec there is one system call, which takes no
        // memory.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            });
        }
        let child = command.spawn().with_context(|| format!("cannot start {program}"))?;
        Ok(Server { name: program.to_owned(), child })
    }

    /// Connects to a Unix socket as soon as the server listens there.
    ///
    /// # Errors
    /// If it ends, or does not listen in time.
    pub fn connect(&mut self, socket: &Path) -> anyhow::Result<UnixStream> {
        let start = Instant::now();
        loop {
            match UnixStream::connect(socket) {
                Ok(stream) => return Ok(stream),
                Err(error) if start.elapsed() > START_TIMEOUT => {
                    return Err(error).with_context(|| format!("{} does not listen", self.name));
                }
                Err(_) => {}
            }
            if let Some(status) = self.child.try_wait().context("cannot wait for a child")? {
                bail!("{} ended before it listened: {status}", self.name);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    /// If it ends with another status than 0.
    pub fn wait(mut self) -> anyhow::Result<()> {
        let status = self.child.wait().context("cannot wait for a child")?;
        if !status.success() {
            bail!("{} ended with {status}", self.name);
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Its data is of no use any more. Both fail only if it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Resident memory of a process.
///
/// # Errors
/// If there is no such process.
pub fn resident_bytes(pid: u32) -> anyhow::Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    text.lines()
        .find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse().ok())
        .map(|kib: u64| kib << 10)
        .with_context(|| format!("{path} tells no VmRSS"))
}

//! Child processes that never outlive their owner.

use std::fs::File;
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, Context};

/// How often a wait looks again.
const POLL: Duration = Duration::from_millis(10);

/// How often it looks whether something changes: seldom enough to cost a daemon
/// or a guest nothing that is measured.
const LOOK: Duration = Duration::from_millis(100);

/// A child process with a log file, killed when this is dropped, and by the
/// kernel if the thread that started it dies first.
#[derive(Debug)]
pub struct Guarded {
    name: &'static str,
    child: Child,
    log: PathBuf,
}

impl Guarded {
    /// Starts `command` with both output streams in the file `log`.
    ///
    /// # Errors
    /// If the log cannot be made or the program cannot be started.
    pub fn start(name: &'static str, mut command: Command, log: &Path) -> anyhow::Result<Self> {
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("cannot write {}", log.display()))?;
        command
            .stdin(Stdio::null())
            .stdout(file.try_clone().context("cannot copy a descriptor")?)
            .stderr(file);
        Self::start_as_is(name, command, log)
    }

    /// Starts `command` with whatever streams it has been given.
    ///
    /// # Errors
    /// If the program cannot be started.
    pub fn start_as_is(
        name: &'static str,
        mut command: Command,
        log: &Path,
    ) -> anyhow::Result<Self> {
        // SAFETY: between fork and exec the closure makes one system call and
        // touches no memory.
        unsafe {
            command.pre_exec(|| {
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child =
            command.spawn().with_context(|| format!("cannot start {:?}", command.get_program()))?;
        Ok(Guarded { name, child, log: log.to_owned() })
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn is_running(&mut self) -> anyhow::Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Fails, with the end of the log, if the process has ended.
    ///
    /// # Errors
    /// If the process has ended.
    pub fn expect_running(&mut self) -> anyhow::Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("{} has ended: {status}\n{}", self.name, self.log_tail());
        }
        Ok(())
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn signal(&mut self, signal: i32) -> anyhow::Result<()> {
        let pid = libc::pid_t::try_from(self.pid()).context("a pid that is none")?;
        // SAFETY: the child has not been waited for, so the pid is still its own.
        if unsafe { libc::kill(pid, signal) } != 0 {
            return Err(io::Error::last_os_error())
                .with_context(|| format!("cannot signal {}", self.name));
        }
        Ok(())
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// If it does not end in time.
    pub fn wait(&mut self, timeout: Duration) -> anyhow::Result<ExitStatus> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("{} did not end within {timeout:?}", self.name);
            }
            std::thread::sleep(POLL);
        }
    }

    /// Waits for the end, however long it takes.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn wait_for_ever(&mut self) -> anyhow::Result<ExitStatus> {
        Ok(self.child.wait()?)
    }

    /// SIGKILL, and returns when the process is gone.
    ///
    /// # Errors
    /// If it had ended by itself before.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.expect_running()?;
        self.child.kill()?;
        let status = self.child.wait()?;
        if status.signal() != Some(libc::SIGKILL) {
            bail!("{} ended by itself: {status}\n{}", self.name, self.log_tail());
        }
        Ok(())
    }

    /// CPU time used so far, user and system, in seconds.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn cpu_seconds(&self) -> anyhow::Result<f64> {
        cpu_seconds(self.pid())
    }

    /// The last lines of the log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        tail(&self.log)
    }

    /// The whole log.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn log(&self) -> anyhow::Result<String> {
        std::fs::read_to_string(&self.log)
            .with_context(|| format!("cannot read {}", self.log.display()))
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // Both fail only if the process has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The last lines of a log file, with its name.
#[must_use]
pub fn tail(path: &Path) -> String {
    const LINES: usize = 25;
    let text = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    let start = lines.len().saturating_sub(LINES);
    format!("--- {}\n{}", path.display(), lines[start..].join("\n"))
}

/// CPU time of process `pid`, user and system, in seconds.
fn cpu_seconds(pid: u32) -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .with_context(|| format!("process {pid} is gone"))?;
    let ticks = parse_cpu_ticks(&stat).context("/proc/PID/stat has another form")?;
    // SAFETY: a query without arguments in memory.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    Ok(ticks as f64 / per_second as f64)
}

/// utime + stime. The command's name may hold anything, so fields are counted
/// from its closing parenthesis.
fn parse_cpu_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

/// Calls `condition` until it returns a value.
///
/// # Errors
/// The condition's own error, or that `what` did not happen in time.
pub fn wait_for<T>(
    what: &str,
    timeout: Duration,
    mut condition: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(value) = condition()? {
            return Ok(value);
        }
        if Instant::now() > deadline {
            bail!("{what}: not within {timeout:?}");
        }
        std::thread::sleep(POLL);
    }
}

/// Calls `look` until it has returned the same for `rest`, and returns that.
///
/// # Errors
/// The error of `look`, or that `what` was not at rest in time.
pub fn wait_until_still<T: PartialEq>(
    what: &str,
    rest: Duration,
    timeout: Duration,
    mut look: impl FnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + timeout;
    let (mut last, mut since) = (look()?, Instant::now());
    while since.elapsed() < rest {
        if Instant::now() > deadline {
            bail!("{what}: no rest of {rest:?} within {timeout:?}");
        }
        std::thread::sleep(LOOK);
        let now = look()?;
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
    Ok(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_ticks_are_found_behind_a_strange_name() {
        let stat = "12 (a b) c) S 1 2 3 4 5 6 7 8 9 10 30 12 0 0";
        assert_eq!(parse_cpu_ticks(stat), Some(42));
    }

    #[test]
    fn dropped_guard_kills_its_child() {
        let log = std::env::temp_dir().join(format!("gemini-guard-{}", std::process::id()));
        let mut command = Command::new("sleep");
        command.arg("1000");
        let child = Guarded::start("sleep", command, &log).expect("sleep is there");
        let proc = PathBuf::from(format!("/proc/{}", child.pid()));
        assert!(proc.exists());
        drop(child);
        assert!(!proc.exists());
        std::fs::remove_file(log).expect("the log was made");
    }

    #[test]
    fn wait_for_gives_up() {
        let result = wait_for("never", Duration::from_millis(20), || Ok(None::<()>));
        assert!(result.is_err());
    }

    #[test]
    fn rest_begins_anew_with_every_change() {
        let mut looks = 0;
        let still = wait_until_still("a count", LOOK * 2, LOOK * 100, || {
            looks += 1;
            Ok(looks.min(4))
        });
        assert_eq!(still.expect("it ends at 4"), 4);
        assert!(looks >= 5, "{looks} looks");
    }

    #[test]
    fn what_never_rests_is_an_error() {
        let mut looks = 0;
        let still = wait_until_still("a count", LOOK * 2, LOOK * 3, || {
            looks += 1;
            Ok(looks)
        });
        assert!(still.is_err());
    }
}

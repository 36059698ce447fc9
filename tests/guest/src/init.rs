//! Process 1 of the test guest.
//!
//! Words on the kernel's command line decide what it does:
//! `gemini.driver=1` loads the driver, `gemini.parameters=A=B,C=D` gives it
//! module parameters, `gemini.shell=1` starts a shell on the console and
//! switches the guest off when it ends.

use std::process::Command as Process;
use std::time::Duration;

use anyhow::Context;

use crate::protocol::{DRIVER_NAME, DRIVER_PATH};
use crate::{image, kernel};

/// Modules of the stock kernel that this guest needs, in order of loading.
const BOOT_MODULES: &str = "/lib/gemini/boot";

/// Source, mount point and type of what is mounted at boot.
const MOUNTS: [(&str, &str, bool); 7] = [
    ("proc", "/proc", true),
    ("sysfs", "/sys", true),
    ("devtmpfs", "/dev", true),
    ("tmpfs", "/tmp", true),
    // Not every kernel has these, and only some tests want them.
    ("debugfs", "/sys/kernel/debug", false),
    ("tracefs", "/sys/kernel/tracing", false),
    ("cgroup2", "/sys/fs/cgroup", false),
];

/// Sets the guest up and looks after its processes, for ever.
///
/// # Errors
/// If something is missing without which the guest is of no use. The kernel
/// then panics, and says so on the console.
pub fn run() -> anyhow::Result<()> {
    for (kind, target, needed) in MOUNTS {
        match kernel::mount(kind, target, kind, 0) {
            Err(error) if needed => return Err(error),
            Err(error) => eprintln!("gemini-guest: {error:#}"),
            Ok(()) => {}
        }
    }
    let options = Options::read()?;
    kernel::load_modules(BOOT_MODULES)?;
    image::mount()?;
    if options.driver {
        kernel::load_module(DRIVER_PATH, &options.parameters)?;
        eprintln!("gemini-guest: {DRIVER_NAME} is loaded");
    }

    let mut agent = start_agent()?;
    let shell = if options.shell { Some(start_shell()?) } else { None };
    loop {
        let ended = wait_any();
        if ended == Some(agent) {
            eprintln!("gemini-guest: the agent ended; starting it again");
            std::thread::sleep(Duration::from_secs(1));
            agent = start_agent()?;
        } else if ended.is_some() && ended == shell {
            power_off();
        }
    }
}

struct Options {
    driver: bool,
    parameters: String,
    shell: bool,
}

impl Options {
    fn read() -> anyhow::Result<Self> {
        let line = std::fs::read_to_string("/proc/cmdline").context("cannot read /proc/cmdline")?;
        Ok(Self::parse(&line))
    }

    fn parse(line: &str) -> Self {
        let value = |name: &str| {
            line.split_whitespace()
                .filter_map(|word| word.split_once('='))
                .filter(|(key, _)| *key == name)
                .map(|(_, value)| value)
                .next_back()
        };
        Options {
            driver: value("gemini.driver") == Some("1"),
            parameters: value("gemini.parameters").unwrap_or("").replace(',', " "),
            shell: value("gemini.shell") == Some("1"),
        }
    }
}

/// Starts the agent as a process of its own: process 1 must collect every
/// process that ends, and would take the exit codes away from it.
fn start_agent() -> anyhow::Result<u32> {
    Ok(Process::new("/bin/gemini-guest")
        .arg("agent")
        .env("PATH", "/bin")
        .spawn()
        .context("cannot start the agent")?
        .id())
}

fn start_shell() -> anyhow::Result<u32> {
    // `cttyhack` makes the console the shell's terminal, so that Ctrl-C works.
    Ok(Process::new("/bin/setsid")
        .args(["/bin/cttyhack", "/bin/sh", "-l"])
        .env("PATH", "/bin")
        .env("HOME", "/root")
        .env("PS1", "guest:\\w# ")
        .current_dir("/root")
        .spawn()
        .context("cannot start a shell")?
        .id())
}

/// Waits for any process to end; `None` where there is none.
fn wait_any() -> Option<u32> {
    let mut status = 0;
    // SAFETY: `status` is a valid place for the exit status.
    let pid = unsafe { libc::waitpid(-1, &mut status, 0) };
    if pid < 0 {
        std::thread::sleep(Duration::from_millis(100));
    }
    u32::try_from(pid).ok()
}

fn power_off() {
    // SAFETY: both calls take no memory; nothing here is left to be saved.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_POWER_OFF);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_come_from_whole_words_and_the_last_one_counts() {
        let options = Options::parse(
            "console=ttyS0 gemini.driver=0 gemini.driver=1 gemini.parameters=a=1,b=2 xgemini.shell=1",
        );
        assert!(options.driver);
        assert_eq!(options.parameters, "a=1 b=2");
        assert!(!options.shell);
    }
}

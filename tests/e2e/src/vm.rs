//! One QEMU with a test guest in it.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{bail, Context};
use gemini_guest::protocol::PORT_NAME;
use serde_json::json;

use crate::accel::Accel;
use crate::assets::{self, Assets};
use crate::guest::Guest;
use crate::process::{self, Guarded};
use crate::qmp::Qmp;
use crate::workload::Workloads;

/// How long QEMU may take to open its sockets.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// How a guest is booted.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// Names the log directory.
    pub name: String,
    /// What it runs on.
    pub accel: Accel,
    /// Bytes of guest memory.
    pub memory: u64,
    /// NUMA nodes that memory and CPUs are divided among evenly; not more than
    /// CPUs.
    pub nodes: u32,
    /// Further options of the memory backends.
    pub memory_options: Vec<String>,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Socket of the daemon; none for a guest without the device.
    pub device: Option<PathBuf>,
    /// Whether that device may drop what the driver releases.
    pub release: bool,
    /// Whether the driver is loaded at boot.
    pub driver: bool,
    /// The guest's `transparent_hugepage=`.
    pub guest_thp: String,
    /// Further words for the kernel's command line.
    pub kernel_arguments: Vec<String>,
    /// Drives with the programs of [`crate::workload`], if it is to have them.
    pub workloads: Option<Workloads>,
    /// Further arguments for QEMU.
    pub qemu_arguments: Vec<String>,
    /// A library that is loaded ahead of all others of QEMU's.
    pub preload: Option<PathBuf>,
    /// How long until the agent answers.
    pub boot_timeout: Duration,
}

impl VmConfig {
    /// A guest of 1 GiB and two CPUs with huge pages on, without the device.
    #[must_use]
    pub fn new(name: &str, accel: Accel) -> Self {
        VmConfig {
            name: name.to_owned(),
            accel,
            memory: 1 << 30,
            nodes: 1,
            memory_options: Vec::new(),
            cpus: 2,
            device: None,
            release: true,
            driver: false,
            guest_thp: "always".into(),
            kernel_arguments: Vec::new(),
            workloads: None,
            qemu_arguments: Vec::new(),
            preload: None,
            boot_timeout: Duration::from_secs(90),
        }
    }

    /// The same guest with the device of the daemon at `socket`, and the driver.
    #[must_use]
    pub fn with_device(mut self, socket: &Path) -> Self {
        self.device = Some(socket.to_owned());
        self.driver = true;
        self
    }

    /// QEMU's arguments that make the machine, its memory and its devices.
    #[must_use]
    pub fn machine_arguments(&self, assets: &Assets) -> Vec<String> {
        let mut arguments: Vec<String> = Vec::new();
        let mut add = |words: &[&str]| arguments.extend(words.iter().map(|&word| word.to_owned()));
        add(&["-nodefaults", "-no-user-config", "-display", "none"]);
        add(self.accel.arguments());
        // A socket is on one node.
        add(&["-smp", &format!("{},sockets={}", self.cpus, self.nodes)]);
        add(&["-m", &format!("{}M", self.memory >> 20)]);
        let backend = |id: &str, bytes: u64| {
            let size = format!("size={}M", bytes >> 20);
            let own = ["memory-backend-memfd", &format!("id={id}"), &size, "share=on"];
            let all = own.into_iter().chain(self.memory_options.iter().map(String::as_str));
            all.collect::<Vec<_>>().join(",")
        };
        if self.nodes > 1 {
            add(&["-machine", "q35"]);
            for node in 0..self.nodes {
                let id = format!("mem{node}");
                add(&["-object", &backend(&id, self.memory / u64::from(self.nodes))]);
                let first = node * self.cpus / self.nodes;
                let last = ((node + 1) * self.cpus / self.nodes).saturating_sub(1);
                add(&["-numa", &format!("node,nodeid={node},memdev={id},cpus={first}-{last}")]);
            }
        } else {
            add(&["-object", &backend("mem", self.memory)]);
            add(&["-machine", "q35,memory-backend=mem"]);
        }
        add(&["-kernel", &assets.guest.kernel.to_string_lossy()]);
        add(&["-initrd", &assets.guest.initrd.to_string_lossy()]);
        add(&["-append", &self.command_line()]);
        if let Some(socket) = &self.device {
            // Without a daemon at the start QEMU goes on trying, as it does
            // when the daemon dies later.
            let chardev =
                format!("socket,id=gem,path={},reconnect-ms=500", socket.to_string_lossy());
            add(&["-chardev", &chardev]);
            let release = if self.release { "on" } else { "off" };
            let device = format!("vhost-user-gemini-pci,chardev=gem,release={release}");
            add(&["-device", &device]);
        }
        if let Some(workloads) = &self.workloads {
            arguments.extend(workloads.arguments());
        }
        arguments.extend(self.qemu_arguments.iter().cloned());
        arguments
    }

    fn command_line(&self) -> String {
        let mut words = vec![
            "console=ttyS0".to_owned(),
            "quiet".to_owned(),
            "panic=-1".to_owned(),
            format!("transparent_hugepage={}", self.guest_thp),
        ];
        if self.driver {
            words.push("gemini.driver=1".to_owned());
        }
        words.extend(self.kernel_arguments.iter().cloned());
        words.join(" ")
    }
}

/// A running QEMU, and the guest in it.
#[derive(Debug)]
pub struct Vm {
    /// QEMU.
    pub process: Guarded,
    /// The guest's agent.
    pub guest: Guest,
    /// QEMU's monitor.
    pub qmp: Qmp,
    /// How it was started.
    pub config: VmConfig,
    /// From QEMU's start to the agent's first answer.
    pub boot_time: Duration,
    serial_log: PathBuf,
    // Last, so that the sockets outlive their users.
    directory: RunDirectory,
}

impl Vm {
    /// Starts QEMU and waits until the guest's agent answers.
    ///
    /// # Errors
    /// If QEMU ends or the guest does not come up in time; the error shows the
    /// end of both logs.
    pub fn boot(assets: &Assets, config: VmConfig) -> anyhow::Result<Self> {
        let start = Instant::now();
        let mut vm = Self::start(assets, config)?;
        if let Err(error) = vm.wait_ready() {
            bail!("{error:#}\n{}", vm.process.log_tail());
        }
        vm.boot_time = start.elapsed();
        Ok(vm)
    }

    /// Starts QEMU for a guest that migrates into it: nothing runs in it until
    /// then.
    ///
    /// # Errors
    /// If QEMU ends.
    pub fn await_guest(assets: &Assets, mut config: VmConfig) -> anyhow::Result<Self> {
        config.qemu_arguments.extend(["-incoming".to_owned(), "defer".to_owned()]);
        let vm = Self::start(assets, config);
        vm.map(|mut vm| {
            // Its own copies are to boot.
            vm.config.qemu_arguments.truncate(vm.config.qemu_arguments.len() - 2);
            vm
        })
    }

    /// Starts QEMU and connects to it.
    fn start(assets: &Assets, config: VmConfig) -> anyhow::Result<Self> {
        let directory = RunDirectory::new()?;
        let logs = log_directory(&config.name)?;
        let serial_log = logs.join("serial.log");
        let qmp_path = directory.path().join("qmp");
        let channel_path = directory.path().join("guest");

        let mut command = Command::new(&assets.qemu);
        command
            .args(config.machine_arguments(assets))
            .args(["-serial", &format!("file:{}", serial_log.display())])
            // An interrupt has the guest look at the queues of all ports that there may be,
            // 62 by default, and to talk to a guest would cost it as many TLB entries.
            .args(["-device", "virtio-serial-pci,max_ports=2"])
            .arg("-chardev")
            .arg(format!("socket,id=channel,server=on,wait=off,path={}", channel_path.display()))
            .arg("-device")
            .arg(format!("virtserialport,chardev=channel,name={PORT_NAME}"))
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", qmp_path.display()));

        if let Some(library) = &config.preload {
            command.env("LD_PRELOAD", library);
        }

        let log = logs.join("qemu.log");
        std::fs::write(&log, "")?;
        let mut process = Guarded::start("QEMU", command, &log)?;
        process::wait_for("QEMU opens its sockets", START_TIMEOUT, || {
            process.expect_running()?;
            Ok((qmp_path.exists() && channel_path.exists()).then_some(()))
        })?;
        let qmp = process::wait_for("QEMU's monitor answers", START_TIMEOUT, || {
            process.expect_running()?;
            Ok(Qmp::connect(&qmp_path).ok())
        })?;
        let guest = Guest::connect(&channel_path)?;
        let boot_time = Duration::ZERO;
        Ok(Vm { process, guest, qmp, config, boot_time, serial_log, directory })
    }

    /// Resets the machine and waits until the guest is up again.
    ///
    /// # Errors
    /// If QEMU ends or the guest does not come up in time.
    pub fn reset(&mut self) -> anyhow::Result<()> {
        self.qmp.reset()?;
        // Let the reset happen before the first ping, or the old agent answers.
        std::thread::sleep(Duration::from_millis(500));
        self.wait_ready()
    }

    /// Stops the guest's CPUs.
    ///
    /// # Errors
    /// If QEMU is gone.
    pub fn pause(&mut self) -> anyhow::Result<()> {
        self.qmp.execute("stop", json!({})).map(drop)
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// If QEMU is gone.
    pub fn resume(&mut self) -> anyhow::Result<()> {
        self.qmp.execute("cont", json!({})).map(drop)
    }

    /// Waits until the agent answers.
    ///
    /// # Errors
    /// If QEMU ends or the agent does not answer in time.
    pub fn wait_ready(&mut self) -> anyhow::Result<()> {
        let process = &mut self.process;
        self.guest
            .wait_ready(self.config.boot_timeout, || process.expect_running())
            .map(drop)
            .with_context(|| process::tail(&self.serial_log))
    }

    /// Fails unless QEMU runs, the guest is not paused and its agent answers.
    ///
    /// # Errors
    /// If one of them does not hold.
    pub fn expect_alive(&mut self) -> anyhow::Result<()> {
        self.process.expect_running()?;
        if !self.qmp.is_running()? {
            bail!("the guest does not run");
        }
        self.wait_ready()
    }

    /// The directory of this VM's sockets.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }
}

/// A new directory for sockets, removed on drop. Short: a socket's path has at
/// most 107 bytes.
#[derive(Debug)]
pub struct RunDirectory {
    path: PathBuf,
}

impl RunDirectory {
    /// Makes the directory, for this user alone.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn new() -> anyhow::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        remove_abandoned(&std::env::temp_dir());
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("gemini-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700))?;
        Ok(RunDirectory { path })
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Removes the directories of this process, which is about to end without dropping
/// anything.
pub(crate) fn remove_run_directories() {
    remove_directories(&std::env::temp_dir(), |pid| pid == std::process::id());
}

/// Removes directories of processes that a signal has ended. What cannot be
/// removed belongs to somebody else, or waits for the next time.
fn remove_abandoned(parent: &Path) {
    remove_directories(parent, |pid| !Path::new("/proc").join(pid.to_string()).exists());
}

/// Removes directories below `parent` that are this user's, by the process that
/// they belong to.
fn remove_directories(parent: &Path, is_wanted: impl Fn(u32) -> bool) {
    for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name
            .to_str()
            .and_then(|name| name.strip_prefix("gemini-"))
            .and_then(|rest| rest.split_once('-'))
            .and_then(|(pid, _)| pid.parse::<u32>().ok());
        // SAFETY: takes nothing, and always succeeds.
        let user = unsafe { libc::geteuid() };
        let ours = entry.metadata().is_ok_and(|data| data.is_dir() && data.uid() == user);
        if owner.is_some_and(&is_wanted) && ours {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

impl Drop for RunDirectory {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.path) {
            eprintln!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// The directory of the logs of test `name`, kept until its next run.
///
/// # Errors
/// If it cannot be made.
pub fn log_directory(name: &str) -> anyhow::Result<PathBuf> {
    let path = assets::cache_dir()?.join("logs").join("vm").join(name);
    std::fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_of_dead_processes_are_removed_and_others_are_not() {
        let parent = std::env::temp_dir().join(format!("gemini-parent-{}", std::process::id()));
        // No pid reaches this far.
        let dead = parent.join("gemini-4294967295-0");
        let alive = parent.join(format!("gemini-{}-7", std::process::id()));
        let other = parent.join("gemini-harness");
        for path in [&dead, &alive, &other] {
            std::fs::create_dir_all(path).expect("a directory");
        }
        remove_abandoned(&parent);
        assert!(!dead.exists() && alive.exists() && other.exists());
        std::fs::remove_dir_all(parent).expect("made above");
    }
}

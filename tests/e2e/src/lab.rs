//! A daemon and a guest together, ready for a test.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;

use crate::accel::{Accel, AccelChoice};
use crate::assets::Assets;
use crate::compare::{self, Agreement, View};
use crate::daemon::{Daemon, DaemonConfig};
use crate::outside::GuestMemory;
use crate::process;
use crate::settings::{Settings, SHMEM_ENABLED};
use crate::vm::{log_directory, RunDirectory, Vm, VmConfig};

/// How long both layers may take to tell each other everything after a boot.
pub const SYNC_TIMEOUT: Duration = Duration::from_secs(30);

/// This machine and the built parts, as every measurement needs them.
#[derive(Clone, Debug)]
pub struct Bench {
    /// The built parts.
    pub assets: Assets,
    /// What guests run on.
    pub accel: Accel,
    /// What [`SHMEM_ENABLED`] was, and will be again.
    pub shmem_before: String,
    /// Shared, so that the settings are put back with the last user.
    settings: Option<Arc<Settings>>,
}

impl Bench {
    /// Reads the environment that the scripts set.
    ///
    /// # Errors
    /// As [`Bench::new`].
    pub fn from_env() -> anyhow::Result<Self> {
        Self::new(AccelChoice::from_env()?)
    }

    /// Reads the environment that the scripts set, settles the accelerator, and
    /// sets this machine up so that the daemon's policy alone decides about
    /// huge pages. One bench exists at a time on a machine: another waits.
    ///
    /// # Errors
    /// If something is missing, a setting cannot be changed, or KVM was asked
    /// for and does not work.
    pub fn new(accel: AccelChoice) -> anyhow::Result<Self> {
        let assets = Assets::from_env()?;
        let settings = Settings::hold()?;
        let shmem_before = settings.set(SHMEM_ENABLED, "never")?;
        let accel = accel.resolve(&assets)?;
        Ok(Bench { assets, accel, shmem_before, settings: Some(Arc::new(settings)) })
    }

    /// Sets a further setting of this machine, to be put back with the others,
    /// and returns what it was.
    ///
    /// # Errors
    /// If it cannot be read or written, or this bench does not hold settings.
    pub fn set(&self, path: &str, value: &str) -> anyhow::Result<String> {
        self.settings.as_ref().context("this bench leaves settings alone")?.set(path, value)
    }

    /// The same for what does not depend on this machine's settings: they stay
    /// as they are, others may change them meanwhile, and nobody waits.
    ///
    /// # Errors
    /// If something is missing, or KVM was asked for and does not work.
    pub fn with_any_settings(accel: AccelChoice) -> anyhow::Result<Self> {
        let assets = Assets::from_env()?;
        let shmem_before = std::fs::read_to_string(SHMEM_ENABLED)
            .with_context(|| format!("cannot read {SHMEM_ENABLED}"))?;
        let accel = accel.resolve(&assets)?;
        Ok(Bench { assets, accel, shmem_before, settings: None })
    }
}

/// A directory for a daemon's sockets, and its log.
#[derive(Debug)]
pub struct Place {
    directory: RunDirectory,
    log: PathBuf,
}

impl Place {
    /// A place whose log is kept under `name`.
    ///
    /// # Errors
    /// If a directory cannot be made.
    pub fn new(name: &str) -> anyhow::Result<Self> {
        let log = log_directory(name)?.join("daemon.log");
        // The log is appended to, over several daemons of one test.
        std::fs::write(&log, "")?;
        Ok(Place { directory: RunDirectory::new()?, log })
    }

    /// The daemon's socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("gemini.sock")
    }

    /// For files that are needed as long as the daemon.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Starts a daemon here.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start(&self, config: &DaemonConfig) -> anyhow::Result<Daemon> {
        Daemon::start(config, &self.socket(), &self.log)
    }
}

/// A guest with the driver, connected to a daemon, both layers synced.
#[derive(Debug)]
pub struct Lab {
    /// The guest.
    pub vm: Vm,
    /// Its memory as QEMU maps it.
    pub memory: GuestMemory,
    /// The daemon.
    pub daemon: Daemon,
    /// How the daemon was started.
    pub daemon_config: DaemonConfig,
    /// Where the daemon's sockets are.
    pub place: Place,
    /// The parts of this machine.
    pub bench: Bench,
}

impl Lab {
    /// Boots a guest as `adjust` wants it, with a daemon of `policy`.
    ///
    /// # Errors
    /// If one of them does not come up, or they do not sync.
    pub fn start(
        bench: &Bench,
        name: &str,
        policy: &str,
        adjust: impl FnOnce(&mut VmConfig),
    ) -> anyhow::Result<Self> {
        let daemon_config = DaemonConfig::new(&bench.assets.daemon, policy);
        Self::start_with(bench, name, daemon_config, adjust)
    }

    /// Boots a guest as `adjust` wants it, with the given daemon.
    ///
    /// # Errors
    /// If one of them does not come up, or they do not sync.
    pub fn start_with(
        bench: &Bench,
        name: &str,
        daemon_config: DaemonConfig,
        adjust: impl FnOnce(&mut VmConfig),
    ) -> anyhow::Result<Self> {
        let place = Place::new(name)?;
        let mut daemon = place.start(&daemon_config)?;
        let mut config = VmConfig::new(name, bench.accel).with_device(&place.socket());
        adjust(&mut config);
        let size = config.memory;
        let driver = config.driver;
        let mut vm = Vm::boot(&bench.assets, config)?;
        if driver {
            daemon.wait_synced(SYNC_TIMEOUT)?;
        }
        let memory = GuestMemory::find(vm.process.pid(), size, &mut vm.qmp)?;
        Ok(Lab { vm, memory, daemon, daemon_config, place, bench: bench.clone() })
    }

    /// A daemon, and a QEMU that waits for a guest made like `model`.
    pub(crate) fn await_guest(
        bench: &Bench,
        name: &str,
        daemon_config: &DaemonConfig,
        model: &VmConfig,
    ) -> anyhow::Result<Self> {
        let place = Place::new(name)?;
        let daemon = place.start(daemon_config)?;
        let config =
            VmConfig { name: name.to_owned(), device: Some(place.socket()), ..model.clone() };
        let size = config.memory;
        let mut vm = Vm::await_guest(&bench.assets, config)?;
        let memory = GuestMemory::find(vm.process.pid(), size, &mut vm.qmp)?;
        let daemon_config = daemon_config.clone();
        Ok(Lab { vm, memory, daemon, daemon_config, place, bench: bench.clone() })
    }

    /// All three views, once they agree on every block.
    ///
    /// # Errors
    /// If they do not in time.
    pub fn agree(&self, timeout: Duration) -> anyhow::Result<(View, Agreement)> {
        compare::three_sides(&self.vm.guest, &self.memory, self.daemon.control(), timeout)
    }

    /// What guest and QEMU say, without the daemon.
    ///
    /// # Errors
    /// If either cannot be read.
    pub fn view(&self) -> anyhow::Result<View> {
        View::take(&self.vm.guest, &self.memory)
    }

    /// Finds the guest's memory again, after some was plugged or unplugged.
    ///
    /// # Errors
    /// As [`GuestMemory::find`].
    pub fn find_memory(&mut self) -> anyhow::Result<()> {
        let (pid, size) = (self.vm.process.pid(), self.vm.config.memory);
        self.memory = GuestMemory::find(pid, size, &mut self.vm.qmp)?;
        Ok(())
    }

    /// SIGKILLs the daemon.
    ///
    /// # Errors
    /// If it had ended by itself.
    pub fn kill_daemon(&mut self) -> anyhow::Result<()> {
        self.daemon.process.kill()
    }

    /// Starts the daemon again, in the same place and the same way.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn restart_daemon(&mut self) -> anyhow::Result<()> {
        self.daemon = self.place.start(&self.daemon_config)?;
        Ok(())
    }

    /// Waits until the driver places huge pages and has its stock of ready
    /// blocks, as in a guest that booted a while ago.
    ///
    /// # Errors
    /// If that does not come in time.
    pub fn wait_stocked(&self, timeout: Duration) -> anyhow::Result<()> {
        let guest = &self.vm.guest;
        process::wait_for("the driver has its stock", timeout, || {
            let target = guest.driver_number("stock_target")?;
            Ok((target > 0 && guest.driver_number("ready")? >= target).then_some(()))
        })
    }

    /// Waits until the driver's stock is as small as it gets soon after a demand.
    ///
    /// # Errors
    /// If that does not come in time.
    pub fn wait_burst_over(&self, timeout: Duration) -> anyhow::Result<()> {
        let guest = &self.vm.guest;
        process::wait_for("the driver's stock is over its burst", timeout, || {
            let floor =
                guest.driver_number("stock_floor")?.max(guest.driver_number("stock_active")?);
            // Right after a burst the stock is empty, and about to grow.
            let at_rest = guest.driver_number("stock_target")? <= floor
                && guest.driver_number("ready")? <= floor;
            Ok(at_rest.then_some(()))
        })
    }

    /// Waits until the daemon has heard of the guest's present state and has
    /// nothing left to do: nothing changes for a while.
    ///
    /// # Errors
    /// If it does not come to rest in time.
    pub fn wait_settled(&mut self, timeout: Duration) -> anyhow::Result<()> {
        self.wait_at_rest(Duration::from_secs(2), timeout)
    }

    /// As [`Lab::wait_settled`], for `rest` without a change.
    ///
    /// # Errors
    /// If it does not come to rest in time.
    pub fn wait_at_rest(&mut self, rest: Duration, timeout: Duration) -> anyhow::Result<()> {
        if self.vm.config.driver {
            // A whole walk around memory that begins now, and its report.
            self.vm.guest.driver_command("census")?;
        }
        process::wait_until_still("the daemon", rest, timeout, || {
            self.daemon.process.expect_running()?;
            let status = self.daemon.status()?;
            Ok((status.collapse_bytes, status.aligned, status.guest_only, status.host_only))
        })
        .map(drop)
    }
}

//! One guest for a person to log into.

use std::path::PathBuf;
use std::process::Command;

use anyhow::bail;
use clap::Args;

use crate::accel::AccelChoice;
use crate::assets::Assets;
use crate::daemon::DaemonConfig;
use crate::lab::Place;
use crate::process::Guarded;
use crate::vm::{log_directory, VmConfig};

/// `gemini-lab vm`
#[derive(Args, Clone, Debug)]
pub struct ShellArgs {
    /// Socket of a running daemon; without it one is started for this guest
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Policy of the daemon that is started
    #[arg(long, value_name = "POLICY", default_value = "gemini", conflicts_with = "socket",
          value_parser = ["none", "always", "gemini"])]
    policy: String,
    /// Guest memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 2048,
          value_parser = clap::value_parser!(u64).range(256..=1 << 20))]
    mem: u64,
    /// Virtual CPUs
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// What the guest runs on
    #[arg(long, value_name = "auto|tcg|kvm", default_value = "auto")]
    accel: AccelChoice,
    /// Print QEMU's command line instead of running it
    #[arg(long, requires = "socket")]
    print: bool,
}

/// Starts the guest with its console on this terminal.
///
/// # Errors
/// If a part does not come up, or QEMU ends with an error.
pub fn run(args: &ShellArgs) -> anyhow::Result<()> {
    let assets = Assets::from_env()?;
    let accel = args.accel.resolve(&assets)?;
    let place = Place::new("vm")?;
    let (socket, daemon) = match &args.socket {
        Some(socket) => {
            if !socket.exists() {
                eprintln!("{} does not exist yet: QEMU will wait for it", socket.display());
            }
            (socket.clone(), None)
        }
        None => {
            let config = DaemonConfig::new(&assets.daemon, &args.policy);
            (place.socket(), Some(place.start(&config)?))
        }
    };
    let mut config = VmConfig::new("vm", accel).with_device(&socket);
    config.memory = args.mem << 20;
    config.cpus = args.cpus;
    config.kernel_arguments = vec!["gemini.shell=1".to_owned()];
    let mut command = Command::new(&assets.qemu);
    command.args(config.machine_arguments(&assets)).args(["-serial", "mon:stdio"]);
    if args.print {
        println!("{command:?}");
        return Ok(());
    }
    eprintln!(
        "Linux {} on {}; daemon socket {}",
        assets.guest.release,
        accel.name(),
        socket.display()
    );
    if let Some(daemon) = &daemon {
        eprintln!("daemon: pid {}, policy {}", daemon.process.pid(), args.policy);
    }
    eprintln!("`exit` switches the guest off, Ctrl-A X ends QEMU");
    let mut vm = Guarded::start_as_is("QEMU", command, &log_directory("vm")?.join("qemu.log"))?;
    let status = vm.wait_for_ever()?;
    if !status.success() {
        bail!("QEMU ends with {status}");
    }
    if let Some(daemon) = daemon {
        daemon.stop()?;
    }
    Ok(())
}

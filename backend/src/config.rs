//! The command line.

use crate::sandbox::Mode;
use crate::settings::Given;
use clap::Parser;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Align the huge pages of a guest with those of its host.
///
/// Serves one virtual machine at a time over a vhost-user socket; waits for the VMM, survives
/// its exit, and serves the next one. SIGTERM ends it and leaves the guest's memory as it is.
#[derive(Debug, Parser)]
#[command(name = "vhost-device-gemini", version)]
#[command(group(clap::ArgGroup::new("socket").required(true).args(
    ["socket_path", "fd", "print_capabilities"])))]
pub struct Args {
    /// Path of the vhost-user socket to listen on; it is created.
    #[arg(long, value_name = "PATH")]
    pub socket_path: Option<PathBuf>,

    /// Inherited file descriptor of a listening vhost-user socket.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(i32).range(3..))]
    pub fd: Option<i32>,

    /// File of settings (TOML: `name = value`, the names of the options below), read again at
    /// SIGHUP. What the command line gives wins over it.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Path of the socket for geminictl; it is created, for the daemon's user alone.
    #[arg(long, value_name = "PATH")]
    pub control_socket: Option<PathBuf>,

    /// Loopback address and port at which Prometheus finds the metrics, for example
    /// 127.0.0.1:9797, under /metrics.
    #[arg(long, value_name = "ADDRESS:PORT", value_parser = parse_metrics_address)]
    pub metrics_address: Option<SocketAddr>,

    /// Directory that is shared with the daemons of other VMs on this host: what host-huge-max and
    /// host-copy-rate allow is divided among them by weight. Whoever may write there may lay claim
    /// to a share. Without it the daemon works alone, and the two do nothing.
    #[arg(long, value_name = "PATH")]
    pub share_dir: Option<PathBuf>,

    /// What the virtual machine is called in status and metrics (label `vm`). By default the name
    /// of the vhost-user socket, without its suffix.
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,

    /// What the daemon gives up before it serves: system calls, files and capabilities that it
    /// has no use for. A call that is not allowed ends the daemon; with log it is made, and the
    /// kernel logs it. Files are shut away only where the daemon has CAP_SYS_ADMIN.
    #[arg(long, value_enum, default_value_t, value_name = "MODE")]
    pub sandbox: Mode,

    /// What may also be changed while the daemon runs.
    #[command(flatten)]
    pub settings: Given,

    /// Print what the device can do as JSON, after vhost-user's conventions, and exit.
    #[arg(long)]
    pub print_capabilities: bool,
}

/// Reads the address of the metrics. They carry no secret but are protected by nothing, and the
/// daemon has better to do than to meet a whole network.
///
/// # Errors
/// A message that says what was expected.
fn parse_metrics_address(text: &str) -> Result<SocketAddr, String> {
    let address: SocketAddr =
        text.parse().map_err(|_| "give an address and a port, for example 127.0.0.1:9797")?;
    if address.ip().is_loopback() {
        Ok(address)
    } else {
        Err("only loopback addresses, for example 127.0.0.1:9797: for another machine put a \
             proxy before it, or have the textfile collector of node_exporter read what \
             `geminictl metrics` prints"
            .into())
    }
}

impl Args {
    /// What the virtual machine is called.
    pub fn name(&self) -> String {
        match (&self.name, &self.socket_path) {
            (Some(name), _) => name.clone(),
            (None, Some(path)) => {
                path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
            }
            (None, None) => String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn args_want_exactly_one_socket() {
        let parse = |args: &[&str]| Args::try_parse_from(args);
        assert!(parse(&["x"]).is_err());
        assert!(parse(&["x", "--socket-path", "a", "--fd", "3"]).is_err());
        assert!(parse(&["x", "--fd", "2"]).is_err());
        assert!(parse(&["x", "--fd", "3"]).is_ok());
        assert!(parse(&["x", "--print-capabilities"]).is_ok());
        assert!(parse(&["x", "--socket-path", "a", "--cpu-share", "0"]).is_err());
    }

    #[test]
    fn metrics_stay_on_this_machine() {
        assert!(parse_metrics_address("127.0.0.1:9797").is_ok());
        assert!(parse_metrics_address("[::1]:9797").is_ok());
        assert!(parse_metrics_address("0.0.0.0:9797").unwrap_err().contains("textfile"));
        assert!(parse_metrics_address("9797").is_err());
        assert!(parse_metrics_address("localhost").is_err());
    }

    #[test]
    fn a_machine_is_named_after_its_socket_unless_told() {
        let name = |args: &[&str]| Args::try_parse_from(args).unwrap().name();
        assert_eq!(name(&["x", "--socket-path", "/run/gemini/vm1.sock"]), "vm1");
        assert_eq!(name(&["x", "--socket-path", "a", "--name", "db"]), "db");
        assert_eq!(name(&["x", "--fd", "3"]), "");
    }
}

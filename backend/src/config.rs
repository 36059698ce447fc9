//! The command line.

use crate::policy::Policy;
use clap::Parser;
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

    /// Which blocks the host makes huge.
    #[arg(long, value_enum, default_value_t = Policy::Gemini)]
    pub policy: Policy,

    /// Most bytes that collapses may copy per second (K, M, G: powers of 1024), at least 2M.
    #[arg(long, value_name = "BYTES", default_value = "256M", value_parser = parse_copy_rate)]
    pub copy_rate: u64,

    /// Most bytes of host huge pages that the daemon lets the VM have (K, M, G: powers of 1024).
    /// Unlimited if not given. It holds only where no huge page comes unasked: with
    /// /sys/kernel/mm/transparent_hugepage/shmem_enabled set to never.
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub huge_max: Option<u64>,

    /// Most CPU time the daemon may use, in percent of one CPU.
    #[arg(long, value_name = "PERCENT", default_value_t = 25,
          value_parser = clap::value_parser!(u32).range(1..=100))]
    pub cpu_share: u32,

    /// Path of a socket that answers `{"cmd":"status"}` and `{"cmd":"map"}`, and takes
    /// `{"cmd":"set","huge_max":BYTES}` (null: unlimited); it is created.
    #[arg(long, value_name = "PATH")]
    pub control_socket: Option<PathBuf>,

    /// Least important messages that are logged: error, warn, info, debug or trace.
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log_level: log::LevelFilter,

    /// Print what the device can do as JSON, after vhost-user's conventions, and exit.
    #[arg(long)]
    pub print_capabilities: bool,
}

/// Reads a number of bytes: digits, then perhaps K, M, G or T (powers of 1024).
///
/// # Errors
/// A message that says what was expected.
fn parse_bytes(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        Some(b'T' | b't') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| format!("'{text}' is not a number of bytes; give for example 256M"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("'{text}' is too large"))
}

/// Reads a copy rate. Less than a block a second would leave requests of the guest waiting for
/// longer than anybody means.
///
/// # Errors
/// A message that says what was expected.
fn parse_copy_rate(text: &str) -> Result<u64, String> {
    let rate = parse_bytes(text)?;
    if rate < 1 << 21 {
        return Err("at least 2M, one block a second; to copy nothing use --policy none".into());
    }
    Ok(rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_bytes_understands_suffixes() {
        assert_eq!(parse_bytes("0"), Ok(0));
        assert_eq!(parse_bytes("256M"), Ok(256 << 20));
        assert_eq!(parse_bytes("3g"), Ok(3 << 30));
        assert!(parse_bytes("").is_err());
        assert!(parse_bytes("M").is_err());
        assert!(parse_bytes("99999999999999T").is_err());
        assert!(parse_bytes("-1").is_err());
    }

    #[test]
    fn parse_copy_rate_refuses_less_than_a_block() {
        assert!(parse_copy_rate("0").is_err());
        assert!(parse_copy_rate("1M").is_err());
        assert_eq!(parse_copy_rate("2M"), Ok(2 << 20));
    }

    #[test]
    fn args_want_exactly_one_socket() {
        let parse = |args: &[&str]| Args::try_parse_from(args);
        assert!(parse(&["x"]).is_err());
        assert!(parse(&["x", "--socket-path", "a", "--fd", "3"]).is_err());
        assert!(parse(&["x", "--fd", "2"]).is_err());
        assert!(parse(&["x", "--fd", "3"]).is_ok());
        assert!(parse(&["x", "--print-capabilities"]).is_ok());
        assert!(parse(&["x", "--socket-path", "a", "--cpu-share", "0"]).is_err());
        let huge_max = |args: &[&str]| parse(args).map(|args| args.huge_max).ok();
        assert_eq!(huge_max(&["x", "--fd", "3"]), Some(None));
        assert_eq!(huge_max(&["x", "--fd", "3", "--huge-max", "512M"]), Some(Some(512 << 20)));
        assert_eq!(huge_max(&["x", "--fd", "3", "--huge-max", "-1"]), None);
    }
}

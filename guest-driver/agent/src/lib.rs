//! The command line of `gemini-guestd`, for the program itself and for what is made of it: its
//! manual page and completions.

use clap::Parser;

/// Promotes base pages of processes in this guest to huge pages: ranges on host
/// huge pages first, then the densest.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Args {
    /// CPU time for all of it, in percent of one CPU
    #[arg(long, value_name = "PERCENT", default_value_t = 5,
          value_parser = clap::value_parser!(u32).range(1..=100))]
    pub cpu_share: u32,
    /// Bytes promoted a second at most, with K, M or G
    #[arg(long, value_name = "BYTES", default_value = "64M", value_parser = parse_size)]
    pub rate: u64,
    /// Seconds between two looks at all processes
    #[arg(long, value_name = "SECONDS", default_value_t = 2,
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub interval: u64,
    /// Only this process; may be given several times
    #[arg(long = "pid", value_name = "PID",
          value_parser = clap::value_parser!(i32).range(1..))]
    pub pids: Vec<i32>,
    /// Looks and promotes once, then ends
    #[arg(long)]
    pub once: bool,
    /// Only shows what would be promoted
    #[arg(long)]
    pub dry_run: bool,
    /// Prints what each pass found and did as one line of JSON
    #[arg(long)]
    pub json: bool,
    /// error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log_level: log::LevelFilter,
}

/// A number with K, M or G, at least 1 MiB.
fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .filter(|size| (1 << 20..=1 << 50).contains(size))
        .ok_or_else(|| "a size from 1M to 1048576G, such as 64M".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_is_consistent() {
        Args::command().debug_assert();
        let args = Args::parse_from(["gemini-guestd", "--pid", "3", "--pid", "4", "--once"]);
        assert_eq!((args.pids, args.rate, args.cpu_share), (vec![3, 4], 64 << 20, 5));
    }

    #[test]
    fn sizes_have_suffixes_and_bounds() {
        assert_eq!(parse_size("64M"), Ok(64 << 20));
        assert_eq!(parse_size("1048576"), Ok(1 << 20));
        assert_eq!(parse_size("2048K"), Ok(2 << 20));
        for text in ["", "M", "0", "1", "-1M", "1T", "99999999999G", "1Ö"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}

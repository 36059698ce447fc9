//! Kernel modules, the kernel's log, and memory figures.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Instant;

use anyhow::Context;

use crate::protocol::{Elapsed, Message, Messages};

/// Loads the module in the file `path`.
///
/// # Errors
/// If there is no such file, or the kernel refuses it (see its log).
pub fn load_module(path: &str, parameters: &str) -> anyhow::Result<Elapsed> {
    let file = File::open(path).with_context(|| format!("cannot open {path}"))?;
    let parameters = CString::new(parameters).context("parameters hold a zero byte")?;
    let start = Instant::now();
    // SAFETY: the descriptor is open and the string ends with a zero; the call
    // keeps neither.
    let result =
        unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), parameters.as_ptr(), 0) };
    if result != 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("cannot load {path}"));
    }
    Ok(elapsed(start))
}

/// Loads the modules that the file `order` in a directory names, in that order.
///
/// # Errors
/// If there is no such file, or the kernel refuses one.
pub fn load_modules(directory: &str) -> anyhow::Result<()> {
    let order = format!("{directory}/order");
    let order = fs::read_to_string(&order).with_context(|| format!("cannot read {order}"))?;
    for name in order.lines() {
        load_module(&format!("{directory}/{name}"), "")?;
    }
    Ok(())
}

/// Mounts a file system on a directory, which is made if need be.
///
/// # Errors
/// If the directory cannot be made, or the kernel refuses.
pub fn mount(source: &str, target: &str, kind: &str, flags: libc::c_ulong) -> anyhow::Result<()> {
    // A read-only file system has its directories.
    if !Path::new(target).is_dir() {
        fs::create_dir_all(target).with_context(|| format!("cannot make {target}"))?;
    }
    let text = |text: &str| CString::new(text).context("a name with a zero byte");
    let (from, path, kind) = (text(source)?, text(target)?, text(kind)?);
    // SAFETY: all strings end with a zero, and no file system here takes data.
    let result = unsafe {
        libc::mount(from.as_ptr(), path.as_ptr(), kind.as_ptr(), flags, std::ptr::null())
    };
    if result != 0 {
        return Err(io::Error::last_os_error())
            .with_context(|| format!("cannot mount {source} on {target}"));
    }
    Ok(())
}

/// Unloads the module `name`, and returns when its exit function has returned.
///
/// # Errors
/// If it is not loaded, or in use.
pub fn unload_module(name: &str) -> anyhow::Result<Elapsed> {
    let text = CString::new(name).context("the name holds a zero byte")?;
    let start = Instant::now();
    // SAFETY: the string ends with a zero; the call does not keep it.
    let result = unsafe { libc::syscall(libc::SYS_delete_module, text.as_ptr(), libc::O_NONBLOCK) };
    if result != 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("cannot unload {name}"));
    }
    Ok(elapsed(start))
}

/// The time since `start`.
#[must_use]
pub fn elapsed(start: Instant) -> Elapsed {
    Elapsed { seconds: start.elapsed().as_secs_f64() }
}

/// The messages of the kernel's log from sequence number `since` on.
///
/// # Errors
/// If `/dev/kmsg` cannot be read.
pub fn messages(since: u64) -> anyhow::Result<Messages> {
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/kmsg")
        .context("cannot open /dev/kmsg")?;
    let mut result = Messages { messages: Vec::new(), next: since };
    let mut buffer = vec![0; 8192];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(result),
            Ok(count) => {
                let record = String::from_utf8_lossy(&buffer[..count]);
                if let Some((sequence, message)) = parse_record(&record) {
                    if sequence >= since {
                        result.messages.push(message);
                        result.next = sequence + 1;
                    }
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(result),
            // Messages were overwritten while they were read: the next read
            // goes on with the oldest that is left.
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
            Err(error) => return Err(error).context("cannot read /dev/kmsg"),
        }
    }
}

/// "level,sequence,time,flags;text", with the facility above the level's three
/// bits.
fn parse_record(record: &str) -> Option<(u64, Message)> {
    let (prefix, text) = record.split_once(';')?;
    let mut fields = prefix.split(',');
    let priority: u32 = fields.next()?.parse().ok()?;
    let sequence = fields.next()?.parse().ok()?;
    Some((
        sequence,
        Message {
            level: u8::try_from(priority & 7).ok()?,
            text: text.lines().next().unwrap_or("").to_owned(),
        },
    ))
}

/// `/proc/meminfo`, in bytes where the kernel tells kB.
///
/// # Errors
/// If it cannot be read.
pub fn memory() -> anyhow::Result<BTreeMap<String, u64>> {
    let text = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    Ok(text.lines().filter_map(parse_meminfo).collect())
}

fn parse_meminfo(line: &str) -> Option<(String, u64)> {
    let (name, rest) = line.split_once(':')?;
    let mut words = rest.split_whitespace();
    let value: u64 = words.next()?.parse().ok()?;
    let unit = if words.next() == Some("kB") { 1024 } else { 1 };
    Some((name.to_owned(), value * unit))
}

/// Free pages that wait on lists of processors.
///
/// # Errors
/// If `/proc/zoneinfo` cannot be read.
pub fn pages_on_cpu_lists() -> anyhow::Result<u64> {
    let zones = fs::read_to_string("/proc/zoneinfo").context("cannot read /proc/zoneinfo")?;
    Ok(on_cpu_lists(&zones))
}

/// As [`pages_on_cpu_lists`], by the text of `/proc/zoneinfo`.
#[must_use]
pub fn on_cpu_lists(zoneinfo: &str) -> u64 {
    zoneinfo
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("count:"))
        .filter_map(|count| count.trim().parse::<u64>().ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_record_gives_level_and_first_line() {
        let (sequence, message) =
            parse_record("12,345,678900,-;hello; world\n SUBSYSTEM=x\n").expect("a record");
        assert_eq!(sequence, 345);
        assert_eq!(message.level, 4);
        assert_eq!(message.text, "hello; world");
        assert_eq!(parse_record("no record"), None);
    }

    #[test]
    fn meminfo_is_in_bytes_except_for_counts() {
        assert_eq!(parse_meminfo("MemTotal:  16 kB"), Some(("MemTotal".into(), 16384)));
        assert_eq!(parse_meminfo("HugePages_Total:   3"), Some(("HugePages_Total".into(), 3)));
    }

    #[test]
    fn pages_on_lists_of_processors_are_counted_in_every_zone() {
        let text = "Node 0, zone   Normal\n  pagesets\n    cpu: 0\n              count:    5\n\
                    \x20             high:     14\n    cpu: 1\n              count:    2\n";
        assert_eq!(on_cpu_lists(text), 7);
    }
}

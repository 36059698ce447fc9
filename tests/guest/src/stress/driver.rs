//! The driver itself: settings, commands, loaded and unloaded; and the
//! promoter.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context;

use super::disturb::try_write;
use super::tally::Count;
use super::Worker;
use crate::kernel;
use crate::protocol::{DRIVER_NAME, DRIVER_PATH};

const DRIVER: &str = "/sys/bus/virtio/drivers/virtio_gemini";
const DEBUG: &str = "/sys/kernel/debug/virtio_gemini";

/// Settings of the driver, and values that they take.
const SETTINGS: [(&str, &[&str]); 9] = [
    ("census_period_ms", &["10", "100", "1000", "5000"]),
    ("placement", &["1", "1", "1", "0"]),
    ("booking", &["1", "1", "1", "0"]),
    ("bucket", &["1", "1", "1", "0"]),
    ("stock_floor", &["0", "4", "16", "64"]),
    ("stock_active", &["0", "8", "64"]),
    ("stock_cap", &["0", "16", "64", "256", "1024"]),
    ("evacuation_rate", &["0", "10", "100", "1000"]),
    ("booking_timeout_ms", &["0", "100", "1000", "60000"]),
];

/// Commands of the driver's debugfs; `N` stands for a block.
const COMMANDS: [&str; 12] = [
    "book any 8",
    "book any 32",
    "book N 4",
    "renew N 4",
    "renew N 2 nowait",
    "release N 4",
    "release N 2 nowait",
    "prepare N 4 nowait",
    "free N 8",
    "free all",
    "census",
    "reset",
];

/// Changes a setting, gives a command, or reads everything.
pub fn poke(worker: &mut Worker) {
    match worker.random.below(8) {
        0 => {
            for device in devices(Path::new(DEBUG)) {
                let made = make_ready(&device.join("command"), 1 + worker.random.below(16));
                worker.tally.add(if made.is_ok() { Count::Done } else { Count::Refused });
            }
        }
        1 | 2 => {
            let (name, values) = *worker.random.pick(&SETTINGS);
            let value = *worker.random.pick(values);
            for device in devices(Path::new(DRIVER)) {
                try_write(worker, &device.join("gemini").join(name), value);
            }
        }
        3 | 4 => {
            let highest = usize::try_from(memory_end().unwrap_or(1 << 30) >> 21).unwrap_or(1);
            let block = worker.random.below(highest).to_string();
            let command = worker.random.pick(&COMMANDS).replace('N', &block);
            for device in devices(Path::new(DEBUG)) {
                try_write(worker, &device.join("command"), &command);
            }
        }
        5 => on_some(worker, "move", "huge"),
        6 => on_some(worker, "trim", "base"),
        _ => {
            for device in devices(Path::new(DRIVER)) {
                read_all(&device.join("gemini"));
            }
            for device in devices(Path::new(DEBUG)) {
                read_all(&device);
            }
        }
    }
}

/// Books blocks, whichever are free, and has the host make them huge: the next
/// huge pages come from there.
fn make_ready(command: &Path, count: usize) -> io::Result<()> {
    let mut file = OpenOptions::new().read(true).write(true).open(command)?;
    file.write_all(format!("book any {count}").as_bytes())?;
    // What a command tells is read through the file that gave it.
    let mut told = String::new();
    file.read_to_string(&mut told)?;
    for block in told.lines().filter(|line| line.parse::<u64>().is_ok()) {
        file.write_all(format!("renew {block}").as_bytes())?;
    }
    Ok(())
}

/// Gives a command for a few neighbours of the blocks that the guest has in `state`: chosen blindly,
/// hardly any would be such.
fn on_some(worker: &mut Worker, command: &str, state: &str) {
    for device in devices(Path::new(DEBUG)) {
        let map = fs::read_to_string(device.join("blocks")).unwrap_or_default();
        let runs: Vec<(u64, u64)> = map.lines().filter_map(|line| run_in(line, state)).collect();
        if runs.is_empty() {
            worker.tally.add(Count::Refused);
            continue;
        }
        let (first, count) = *worker.random.pick(&runs);
        let line = format!("{command} {first} {}", count.min(4));
        try_write(worker, &device.join("command"), &line);
    }
}

/// First block and length of a run of the map, if it is in `state`.
fn run_in(line: &str, state: &str) -> Option<(u64, u64)> {
    let mut words = line.split_whitespace();
    let run = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    (words.next()? == state).then_some(run)
}

/// The end of the last address range of memory.
fn memory_end() -> Option<u64> {
    let text = fs::read_to_string("/proc/iomem").ok()?;
    text.lines().filter(|line| line.ends_with("System RAM")).filter_map(end_of).max()
}

fn end_of(line: &str) -> Option<u64> {
    let (range, _) = line.trim_start().split_once(' ')?;
    let (_, end) = range.split_once('-')?;
    u64::from_str_radix(end, 16).ok()
}

/// Devices of the driver, or none while it is not loaded.
fn devices(parent: &Path) -> Vec<PathBuf> {
    fs::read_dir(parent)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("virtio"))
        .map(|entry| entry.path())
        .collect()
}

/// Reads every file; what goes away meanwhile is no matter.
fn read_all(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let _ = fs::read(entry.path());
    }
}

/// Counters of the driver that tell whether its parts were at work. A driver
/// may have none of one name.
const COUNTERS: [&str; 17] = [
    "placed",
    "placement_misses",
    "placement_declined",
    "booked_plain",
    "booked_exact",
    "evacuated_blocks",
    "evacuation_failures",
    "moved",
    "move_failures",
    "trimmed_pages",
    "prepared",
    "renewed",
    "rebooked",
    "expired",
    "returned_pressure",
    "returned_isolation",
    "release_requests",
];

/// Where they are kept beyond the driver's life, one "name value" a line.
const KEPT: &str = "/tmp/stress/counters";

/// Adds the driver's counters to those of its earlier lives.
pub fn keep_counters() {
    let lines: String = devices(Path::new(DRIVER))
        .iter()
        .flat_map(|device| COUNTERS.map(|name| (name, device.join("gemini").join(name))))
        .filter_map(|(name, path)| Some(format!("{name} {}", fs::read_to_string(path).ok()?)))
        .collect();
    // They decide nothing: without memory to keep them in they are lost.
    let _ = OpenOptions::new()
        .create(true)
        .append(true)
        .open(KEPT)
        .and_then(|mut file| file.write_all(lines.as_bytes()));
}

/// The sums of what was kept.
pub fn kept_counters() -> BTreeMap<String, u64> {
    let mut sums = BTreeMap::new();
    for line in fs::read_to_string(KEPT).unwrap_or_default().lines() {
        if let Some((name, value)) = line.split_once(' ') {
            *sums.entry(name.to_owned()).or_insert(0) += value.parse::<u64>().unwrap_or(0);
        }
    }
    sums
}

/// Unloads the driver and loads it again, whatever others do meanwhile.
///
/// # Errors
/// If the kernel does not take it back.
pub fn reload(worker: &mut Worker) -> anyhow::Result<()> {
    keep_counters();
    match kernel::unload_module(DRIVER_NAME) {
        Ok(_) => worker.tally.add(Count::Done),
        // Somebody has one of its files open.
        Err(_) => worker.tally.add(Count::Refused),
    }
    std::thread::sleep(Duration::from_millis(worker.random.between(0..1000)));
    load()
}

/// Loads the driver unless it is loaded.
///
/// # Errors
/// If the kernel does not take it.
pub fn load() -> anyhow::Result<()> {
    if is_loaded() {
        return Ok(());
    }
    kernel::load_module(DRIVER_PATH, "").map(drop)
}

fn is_loaded() -> bool {
    Path::new("/sys/module").join(DRIVER_NAME).exists()
}

/// Unloads the driver if it is loaded; whoever has a file of it open is gone
/// soon.
///
/// # Errors
/// If it stays in use.
pub fn unload() -> anyhow::Result<()> {
    if !is_loaded() {
        return Ok(());
    }
    let mut result = Ok(());
    for _ in 0..50 {
        result = kernel::unload_module(DRIVER_NAME).map(drop);
        if result.is_ok() {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    result
}

/// Has the promoter work at its highest rate for a while, and kills it.
///
/// # Errors
/// If it cannot be started.
pub fn promoter(worker: &mut Worker) -> anyhow::Result<()> {
    let mut promoter = Command::new("/bin/gemini-guestd")
        .args(["--cpu-share", "50", "--rate", "1G", "--interval", "1", "--log-level", "error"])
        .stdin(Stdio::null())
        .spawn()
        .context("cannot start the promoter")?;
    std::thread::sleep(Duration::from_millis(worker.random.between(500..10_000)));
    if promoter.try_wait()?.is_none() {
        worker.tally.add(Count::Done);
        promoter.kill()?;
    }
    promoter.wait().context("the promoter is lost")?;
    Ok(())
}

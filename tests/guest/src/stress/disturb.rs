//! What the kernel is asked to do to everybody's memory.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::Context;

use super::tally::Count;
use super::Worker;

/// Functions that a driver can hook to place huge pages and to see them freed;
/// those that this kernel does not have are left out by it.
pub const HOOKED: [&str; 6] = [
    "vma_alloc_folio_noprof",
    "__folio_alloc_noprof",
    "folio_alloc_mpol_noprof",
    "start_isolate_page_range",
    "__folio_unqueue_deferred_split",
    "zap_huge_pmd",
];

const TRACING: &str = "/sys/kernel/tracing";

/// Settings of memory management, and values that they take.
const SETTINGS: [(&str, &[&str]); 18] = [
    ("/sys/kernel/mm/transparent_hugepage/enabled", &["always", "always", "madvise", "never"]),
    (
        "/sys/kernel/mm/transparent_hugepage/defrag",
        &["always", "defer", "defer+madvise", "madvise", "never"],
    ),
    (
        "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
        &["always", "always", "advise", "within_size", "never"],
    ),
    ("/sys/kernel/mm/transparent_hugepage/use_zero_page", &["0", "1"]),
    ("/sys/kernel/mm/transparent_hugepage/khugepaged/defrag", &["0", "1"]),
    ("/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs", &["10", "1000"]),
    ("/sys/kernel/mm/transparent_hugepage/khugepaged/alloc_sleep_millisecs", &["10", "1000"]),
    ("/sys/kernel/mm/transparent_hugepage/khugepaged/pages_to_scan", &["512", "65536"]),
    ("/sys/kernel/mm/transparent_hugepage/khugepaged/max_ptes_none", &["0", "511"]),
    ("/sys/kernel/mm/ksm/run", &["1", "0", "2"]),
    ("/proc/sys/vm/nr_hugepages", &["0", "0", "4", "16"]),
    ("/proc/sys/vm/swappiness", &["0", "60", "200"]),
    ("/proc/sys/vm/compaction_proactiveness", &["0", "20", "100"]),
    ("/proc/sys/vm/defrag_mode", &["0", "1"]),
    ("/proc/sys/vm/zone_reclaim_mode", &["0", "1", "7"]),
    ("/proc/sys/vm/min_free_kbytes", &["4096", "16384"]),
    ("/proc/sys/kernel/numa_balancing", &["0", "1"]),
    ("/proc/sys/vm/percpu_pagelist_high_fraction", &["0", "8"]),
];

/// What settings are set to when all is over.
const QUIET: [(&str, &str); 9] = [
    ("/sys/kernel/mm/transparent_hugepage/enabled", "always"),
    ("/sys/kernel/mm/transparent_hugepage/defrag", "madvise"),
    ("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "never"),
    ("/sys/kernel/mm/ksm/run", "2"),
    ("/proc/sys/vm/nr_hugepages", "0"),
    ("/proc/sys/vm/swappiness", "60"),
    ("/proc/sys/vm/zone_reclaim_mode", "0"),
    ("/proc/sys/kernel/numa_balancing", "0"),
    ("/proc/sys/vm/percpu_pagelist_high_fraction", "0"),
];

/// Writes to a file that the kernel may not have, or may refuse to take.
pub fn try_write(worker: &Worker, path: &Path, text: &str) -> bool {
    let done = fs::write(path, text).is_ok();
    worker.tally.add(if done { Count::Done } else { Count::Refused });
    done
}

/// Compacts all memory or one node, or drops caches.
pub fn compaction(worker: &mut Worker) {
    match worker.random.below(4) {
        0 => try_write(worker, Path::new("/proc/sys/vm/compact_memory"), "1"),
        1 => {
            let node = worker.random.below(2);
            let path = format!("/sys/devices/system/node/node{node}/compact");
            try_write(worker, Path::new(&path), "1")
        }
        what => {
            let what = (what - 1).to_string();
            try_write(worker, Path::new("/proc/sys/vm/drop_caches"), &what)
        }
    };
}

/// Changes one setting.
pub fn settings(worker: &mut Worker) {
    let (path, values) = *worker.random.pick(&SETTINGS);
    let value = *worker.random.pick(values);
    try_write(worker, Path::new(path), value);
}

/// Switches function tracing off and on, traces the hooked functions, and puts
/// probes on them.
pub fn tracing(worker: &mut Worker) {
    let file = |name: &str| Path::new(TRACING).join(name);
    match worker.random.below(6) {
        0 => {
            try_write(worker, Path::new("/proc/sys/kernel/ftrace_enabled"), "0");
        }
        1 => {
            try_write(worker, Path::new("/proc/sys/kernel/ftrace_enabled"), "1");
        }
        2 => {
            let names = HOOKED.join("\n");
            try_write(worker, &file("set_ftrace_filter"), &names);
            try_write(worker, &file("current_tracer"), "function");
        }
        3 => {
            try_write(worker, &file("current_tracer"), "nop");
        }
        4 => {
            let function = *worker.random.pick(&HOOKED);
            let kind = *worker.random.pick(&["p", "r"]);
            let probe = format!("{kind}:stress/{function} {function}\n");
            if try_write(worker, &file("kprobe_events"), &probe) {
                try_write(worker, &file("events/stress/enable"), "1");
            }
        }
        _ => {
            remove_probes();
        }
    }
}

/// Has the kernel make its trace buffers, which stay, and traces a function
/// that nobody calls.
///
/// As long as that one is traced the list of tracers is never empty. Linux 6.12
/// keeps flags of a function whose tracer goes while `ftrace_enabled` is 0, and
/// if that was the last one it warns of them when the next one goes, and
/// switches function tracing off for good: with any tracer, whether the driver
/// is there or not.
pub fn keep_tracing() {
    let tracer = Path::new(TRACING).join("current_tracer");
    let instance = Path::new(TRACING).join("instances/stress");
    // Without tracing in the kernel there is nothing to keep.
    let _ = fs::write(&tracer, "function");
    let _ = fs::write(&tracer, "nop");
    let _ = fs::create_dir(&instance);
    let _ = fs::write(instance.join("set_ftrace_filter"), "kernel_restart");
    let _ = fs::write(instance.join("current_tracer"), "function");
}

fn remove_probes() {
    let tracing = Path::new(TRACING);
    // Neither is there before the first probe.
    let _ = fs::write(tracing.join("events/stress/enable"), "0");
    let _ = fs::write(tracing.join("kprobe_events"), "");
}

/// Ends everything that [`settings`] and [`tracing`] have begun.
pub fn quiet() {
    // What the kernel does not have needs no end.
    for (path, value) in QUIET {
        let _ = fs::write(path, value);
    }
    remove_probes();
    let tracing = Path::new(TRACING);
    for (name, value) in [("current_tracer", "nop"), ("set_ftrace_filter", ""), ("trace", "")] {
        let _ = fs::write(tracing.join(name), value);
    }
    let _ = fs::write("/proc/sys/kernel/ftrace_enabled", "1");
}

/// Takes small pieces of memory for the kernel and for processes, so that free
/// huge blocks are broken.
///
/// # Errors
/// If nothing of the kind can be had at all.
pub fn small(worker: &mut Worker) -> anyhow::Result<()> {
    let directory = Path::new("/tmp/stress-small");
    fs::create_dir_all(directory).context("cannot make a directory")?;
    match worker.random.below(4) {
        // Directory entries and inodes, with a page each.
        0 => {
            for number in 0..worker.random.below(500) {
                fs::write(directory.join(number.to_string()), "small")?;
            }
        }
        1 => {
            for entry in fs::read_dir(directory)?.flatten() {
                fs::remove_file(entry.path())?;
            }
        }
        // Processes.
        2 => {
            for _ in 0..8 {
                let status = Command::new("/bin/true").stdin(Stdio::null()).status();
                worker.tally.add(if status.is_ok() { Count::Done } else { Count::Refused });
            }
        }
        // Full pipes.
        _ => {
            let mut pipes = Vec::new();
            for _ in 0..64 {
                let (reader, mut writer) = pipe()?;
                writer.write_all(&[7; 32 << 10])?;
                pipes.push((reader, writer));
            }
            for (mut reader, writer) in pipes {
                drop(writer);
                let mut bytes = Vec::new();
                reader.read_to_end(&mut bytes)?;
                if bytes.len() != 32 << 10 || bytes.iter().any(|byte| *byte != 7) {
                    worker.report_wrong("a pipe holds something else");
                }
            }
        }
    }
    Ok(())
}

/// `std::io::pipe` is younger than the oldest compiler that builds this.
fn pipe() -> anyhow::Result<(fs::File, fs::File)> {
    let mut ends = [0; 2];
    // SAFETY: a place for two descriptors.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(std::io::Error::last_os_error()).context("cannot make a pipe");
    }
    // SAFETY: two new descriptors that nobody else owns.
    let [reader, writer] = ends.map(|end| unsafe { fs::File::from_raw_fd(end) });
    Ok((reader, writer))
}

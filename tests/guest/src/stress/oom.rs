//! Processes that want more memory than there is.

use std::fs;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context;

use super::checked::{Kind, Region};
use super::tally::Count;
use super::{say, Worker};

/// Where the small cgroup is.
const CGROUP: &str = "/sys/fs/cgroup/stress";

/// Exit status of a process that got all that it wanted.
const CONTENT: i32 = 3;

/// Has a process fill a cgroup that is too small for it, with huge pages.
///
/// # Errors
/// If there are no memory cgroups.
pub fn in_cgroup(worker: &mut Worker) -> anyhow::Result<()> {
    let group = Path::new(CGROUP);
    // Either may be so already.
    let _ = fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
    let _ = fs::create_dir(group);
    let limit = worker.random.between(8..64) << 20;
    fs::write(group.join("memory.max"), limit.to_string())
        .context("this kernel has no memory cgroups")?;
    // Else it would be swapped, and nobody killed.
    let _ = fs::write(group.join("memory.swap.max"), "0");
    let status = eater(limit * 2, 0, Some(group))?;
    tell(worker, status);
    fs::remove_dir(group).context("a cgroup without processes cannot be removed")
}

/// Has a process take all memory and swap. It is the one that the kernel kills
/// first.
///
/// # Errors
/// If a process cannot be started.
pub fn everywhere(worker: &mut Worker) -> anyhow::Result<()> {
    let info = crate::kernel::memory()?;
    let all =
        info.get("MemTotal").copied().unwrap_or(0) + info.get("SwapTotal").copied().unwrap_or(0);
    let status = eater(all, 1000, None)?;
    tell(worker, status);
    Ok(())
}

/// The number of processes that were killed counts; one that was not had more
/// memory than it was to have.
fn tell(worker: &Worker, status: std::process::ExitStatus) {
    if status.signal() == Some(libc::SIGKILL) {
        worker.tally.add(Count::Done);
    } else {
        worker.tally.add(Count::Refused);
        if status.code() != Some(CONTENT) {
            say(3, &format!("{}: a process ended with {status}", worker.kind));
        }
    }
}

fn eater(bytes: u64, score: i32, group: Option<&Path>) -> anyhow::Result<std::process::ExitStatus> {
    let group =
        group.map_or(String::new(), |group| format!("echo 0 > {}/cgroup.procs; ", group.display()));
    // Before the others, who else keep it from ever getting there.
    let command = format!(
        "{group}renice -n -20 -p $$ > /dev/null; echo {score} > /proc/self/oom_score_adj; exec /bin/gemini-guest stress-eater {bytes}"
    );
    let mut child = Command::new("/bin/sh")
        .args(["-c", &command])
        .stdin(Stdio::null())
        .spawn()
        .context("cannot start a shell")?;
    child.wait().context("a process is lost")
}

/// What the process does that [`eater`] starts: takes `bytes` of memory, and
/// looks at them.
///
/// # Errors
/// If the memory cannot be mapped.
pub fn eat(bytes: u64) -> anyhow::Result<()> {
    let huge = usize::try_from(bytes >> 21)?;
    let mut regions = Vec::new();
    for number in 0..huge {
        if number % 64 == 63 {
            say(6, &format!("eater: {number} of {huge} huge pages"));
        }
        let mut region = Region::map(Kind::Private, 1, number as u64)?;
        region.advise(0..region.pages(), libc::MADV_HUGEPAGE).or_else(without_huge_pages)?;
        // Quicker than writing each, and writing each where it is refused: then
        // somebody has to be killed.
        let whole = region.advise(0..region.pages(), libc::MADV_POPULATE_WRITE).is_ok();
        region.write(if whole { 0..1 } else { 0..region.pages() });
        regions.push(region);
    }
    if let Some(wrong) = regions.iter().find_map(|region| region.verify(0..region.pages())) {
        say(3, &format!("eater: {wrong:x?}"));
    }
    // Some live for a while.
    std::thread::sleep(Duration::from_millis(500));
    std::process::exit(CONTENT)
}

fn without_huge_pages(error: io::Error) -> io::Result<()> {
    if error.raw_os_error() == Some(libc::EINVAL) {
        Ok(())
    } else {
        Err(error)
    }
}

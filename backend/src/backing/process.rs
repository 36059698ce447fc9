//! This process: where the kernel tells of it, its CPU time, and its end.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The directory of /proc that tells of this process. `/proc/self` leads there too, but is a
/// symbolic link, of which the sandbox lets none be followed; and in another PID namespace the
/// number there is not that of our system calls.
///
/// # Errors
/// If there is no /proc.
pub fn own_proc() -> io::Result<PathBuf> {
    Ok(Path::new("/proc").join(std::fs::read_link("/proc/self")?))
}

/// CPU time that this process has used, in all its threads.
pub fn process_cpu_time() -> Duration {
    clock(libc::CLOCK_PROCESS_CPUTIME_ID)
}

/// CPU time that the calling thread has used.
pub fn thread_cpu_time() -> Duration {
    clock(libc::CLOCK_THREAD_CPUTIME_ID)
}

fn clock(id: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place for the result.
    let result = unsafe { libc::clock_gettime(id, &raw mut time) };
    if result != 0 {
        return Duration::ZERO;
    }
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// Kills this process as an unforeseen SIGKILL would, for tests of what survives one.
pub fn kill_self() {
    // SAFETY: signals this process; nothing is left to be unsafe afterwards.
    unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
}

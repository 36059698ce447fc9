//! A storm of small allocations, of all the kinds that break free blocks up.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::FromRawFd;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{bail, Context};
use serde_json::Value;

use crate::mapping::{Mapping, Sharing, PAGE};
use crate::protocol::{PageSize, Question, Storm, Stormed};
use crate::scatter::unit;
use crate::worker::{free_memory, Holder};

/// Where the files are, in a file system that ends with this process.
const DIRECTORY: &str = "/tmp";

/// Bytes of one gust of anonymous memory or page cache.
const GUST: u64 = 2 << 20;

/// Empty files of one gust: an inode and a directory entry each.
const FILES: u64 = 512;

/// Bytes that the kernel takes for such a file, more or less.
const FILE_BYTES: u64 = 1024;

/// Pipes of one gust, each with one page in it.
const PIPES: u64 = 64;

/// Bytes that a pipe with a page in it takes, more or less.
const PIPE_BYTES: u64 = 8192;

/// Descriptors that pipes may use.
const DESCRIPTORS: u64 = 65536;

/// Processes of one gust.
const FORKS: u64 = 8;

/// Pages that each of them writes.
const FORK_PAGES: usize = 64;

/// Small allocations that are kept.
pub struct Kept {
    anonymous: Vec<Mapping>,
    pipes: Vec<(File, File)>,
}

/// Allocates `options.bytes` in small pieces, and keeps them.
///
/// # Errors
/// If the kernel refuses one.
pub fn start(options: &Storm) -> anyhow::Result<(Stormed, Kept)> {
    raise_descriptor_limit()?;
    mount_private(DIRECTORY)?;
    let mut kept = Kept { anonymous: Vec::new(), pipes: Vec::new() };
    let started = Instant::now();
    let free_before = free_memory()?;
    let mut done = Stormed::default();
    for gust in 0_u64.. {
        if done.bytes() >= options.bytes {
            break;
        }
        let chance = unit(options.seed, gust);
        if chance < 0.4 {
            done.anonymous_bytes += kept.map()?;
        } else if chance < 0.75 {
            done.cache_bytes += kept.write_file(gust)?;
        } else if chance < 0.9 {
            done.slab_bytes += kept.make_files(gust)?;
        } else if chance < 0.95 && (kept.pipes.len() as u64 + PIPES) * 2 < DESCRIPTORS {
            done.pipe_bytes += kept.make_pipes()?;
        } else {
            done.forks += fork_processes()?;
        }
    }
    done.seconds = started.elapsed().as_secs_f64();
    done.free_before = free_before;
    done.free_after = free_memory()?;
    Ok((done, kept))
}

impl Kept {
    fn map(&mut self) -> anyhow::Result<u64> {
        let mapping = Mapping::new(GUST, PageSize::Base, Sharing::Private)?;
        mapping.advise(0, mapping.bytes(), libc::MADV_POPULATE_WRITE)?;
        self.anonymous.push(mapping);
        Ok(GUST)
    }

    fn write_file(&self, number: u64) -> anyhow::Result<u64> {
        let path = PathBuf::from(format!("{DIRECTORY}/cache-{number}"));
        let mut file =
            File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
        let page = [0x5a; PAGE];
        for _ in 0..GUST / PAGE as u64 {
            file.write_all(&page).context("cannot write page cache")?;
        }
        Ok(GUST)
    }

    fn make_files(&self, number: u64) -> anyhow::Result<u64> {
        for file in 0..FILES {
            let path = PathBuf::from(format!("{DIRECTORY}/empty-{number}-{file}"));
            File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
        }
        Ok(FILES * FILE_BYTES)
    }

    fn make_pipes(&mut self) -> anyhow::Result<u64> {
        for _ in 0..PIPES {
            let mut ends = [0; 2];
            // SAFETY: `ends` has room for both descriptors.
            if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
                return Err(io::Error::last_os_error()).context("cannot make a pipe");
            }
            // SAFETY: both were just opened and are owned by nothing else.
            let (reader, mut writer) =
                unsafe { (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1])) };
            writer.write_all(&[1; PAGE]).context("cannot write to a pipe")?;
            self.pipes.push((reader, writer));
        }
        Ok(PIPES * PIPE_BYTES)
    }
}

impl Holder for Kept {
    fn ask(&mut self, _: Question) -> anyhow::Result<Value> {
        bail!("a storm answers no questions")
    }
}

fn raise_descriptor_limit() -> anyhow::Result<()> {
    let limit = libc::rlimit { rlim_cur: DESCRIPTORS, rlim_max: DESCRIPTORS };
    // SAFETY: `limit` is a valid structure.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) } != 0 {
        return Err(io::Error::last_os_error()).context("cannot raise the limit of descriptors");
    }
    Ok(())
}

/// Mounts a file system in memory that this process alone sees, so that nothing
/// of it is left when the process ends, however it ends.
fn mount_private(target: &str) -> anyhow::Result<()> {
    let path = CString::new(target).context("a name with a zero byte")?;
    // SAFETY: takes flags alone; this process has one thread.
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
        return Err(io::Error::last_os_error()).context("cannot leave the mount namespace");
    }
    // SAFETY: all strings end with a zero.
    let result = unsafe {
        libc::mount(
            c"tmpfs".as_ptr(),
            path.as_ptr(),
            c"tmpfs".as_ptr(),
            0,
            c"size=100%,nr_inodes=0".as_ptr().cast(),
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("cannot mount {target}"));
    }
    Ok(())
}

/// Starts processes that write some pages and end, one after the other.
fn fork_processes() -> anyhow::Result<u64> {
    for _ in 0..FORKS {
        // SAFETY: this process has one thread, and the child only writes to its
        // own memory and ends without running anything of the parent's.
        let pid = unsafe { libc::fork() };
        if pid < 0 {
            return Err(io::Error::last_os_error()).context("cannot fork");
        }
        if pid == 0 {
            let mut pages = [0_u8; FORK_PAGES * PAGE];
            for page in pages.chunks_mut(PAGE) {
                page[0] = 1;
            }
            std::hint::black_box(&mut pages);
            // SAFETY: ends this process at once.
            unsafe { libc::_exit(0) };
        }
        let mut status = 0;
        // SAFETY: `status` is a valid place for the exit status.
        if unsafe { libc::waitpid(pid, &mut status, 0) } != pid || status != 0 {
            bail!("a forked process ended with {status:#x}");
        }
    }
    Ok(FORKS)
}

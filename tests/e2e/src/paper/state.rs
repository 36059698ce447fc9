//! The state of memory that a run begins with, at both layers, and the supply of
//! huge pages that the host has for it.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{anyhow, ensure, Context};
use gemini_guest::buddy;
use gemini_guest::protocol::Fragment;
use gemini_harness::fragment::{Fragments, COMPACT};
use gemini_harness::settings::NR_HUGEPAGES;

use super::matrix::{Run, State};
use super::policy::Setup;
use super::record::Fmfi;
use crate::lab::{Bench, Lab};
use crate::outside::GuestMemory;
use crate::settings::SHMEM_ENABLED;
use crate::BLOCK;

/// Unusable free space index that free memory of the guest is fragmented to: every
/// block keeps a page.
pub const GUEST_FMFI: f64 = 1.0;

/// Percent of the guest's free memory that the fragmenter keeps: little, because
/// it is user memory of which nothing can be aligned.
const KEPT_PERCENT: u64 = 3;

/// Of the guest's memory as much may be huge in a scarce host.
const SCARCE_PART: u64 = 4;

/// The fragmenter's process in the guest.
pub const FRAGMENTS: &str = "fragments";

/// Longest time that fragmenting the host may take.
const HOST_TIMEOUT: Duration = Duration::from_secs(300);

/// How often a limited supply is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// The kernel gives up early where much is going on.
const POOL_ATTEMPTS: u32 = 5;

const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";

/// khugepaged of host and guest: pauses between scans, and after it has found no
/// huge page. The defaults are 10 s and 60 s; so that the kernel, too, gets
/// somewhere in the time that a policy is given.
const KHUGEPAGED: [&str; 2] = ["scan_sleep_millisecs", "alloc_sleep_millisecs"];
const KHUGEPAGED_MS: &str = "1000";
const KHUGEPAGED_DIRECTORY: &str = "/sys/kernel/mm/transparent_hugepage/khugepaged";

/// Whether private memory has huge pages; since Linux 6.8. Without the setting for all sizes, by
/// which older kernels stop khugepaged for shared memory, too.
const PRIVATE_ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/hugepages-2048kB/enabled";

/// This machine, in the state that a run wants.
#[derive(Debug)]
pub struct Host {
    bench: Bench,
    seed: u64,
    fragments: Option<Fragments>,
}

/// A setting of this machine that is put back when this is dropped.
#[derive(Debug)]
struct Scoped {
    bench: Bench,
    path: String,
    before: String,
}

/// The settings of this machine for one run; they end with it.
#[derive(Debug)]
pub struct Ground(#[allow(dead_code, reason = "held for what dropping it does")] Vec<Scoped>);

impl Host {
    /// A machine whose memory is as it was found. `pool` bytes are set aside as
    /// hugetlb pages until the end: before memory is fragmented, as a static pool
    /// is.
    ///
    /// # Errors
    /// If there is not so much memory.
    pub fn new(bench: &Bench, seed: u64, pool: u64) -> anyhow::Result<Self> {
        if pool > 0 {
            let wanted = pool_pages()? + pool / BLOCK;
            // As there is when a machine boots.
            drop_caches()?;
            std::fs::write(COMPACT, "1").context(COMPACT)?;
            for _ in 0..POOL_ATTEMPTS {
                bench.set(NR_HUGEPAGES, &wanted.to_string())?;
                if pool_pages()? >= wanted {
                    break;
                }
            }
            let found = pool_pages()?;
            ensure!(found >= wanted, "this machine has {found} hugetlb pages and not {wanted}");
        }
        Ok(Host { bench: bench.clone(), seed, fragments: None })
    }

    /// Brings free memory into `state`, with `whole` free blocks where it is to be
    /// fragmented, and the settings to what `setup` wants.
    ///
    /// # Errors
    /// If free memory cannot be fragmented, or a setting cannot be changed.
    pub fn prepare(&mut self, state: State, setup: &Setup, whole: u64) -> anyhow::Result<Ground> {
        if state == State::Fragmented {
            let fragments = match &mut self.fragments {
                Some(fragments) => fragments,
                none => {
                    // It can be moved, and would make room for as many huge pages as
                    // it happens to be large.
                    drop_caches()?;
                    none.insert(Fragments::new(self.seed)?)
                }
            };
            // What the last run has used or freed is another part of memory.
            let reached = fragments.leave(whole, HOST_TIMEOUT)?;
            ensure!(
                reached,
                "this machine's memory cannot be fragmented: it is needed, or too busy"
            );
        } else {
            self.fragments = None;
        }
        let mut scoped = Vec::new();
        if state == State::Fragmented && Path::new(PRIVATE_ENABLED).exists() {
            // What is left is for the guest: an emulator, which QEMU on hardware is not, asks for
            // huge pages for the code that it makes.
            scoped.push(Scoped::set(&self.bench, PRIVATE_ENABLED.to_owned(), "never")?);
        }
        if setup.shmem == "always" {
            for name in KHUGEPAGED {
                let path = format!("{KHUGEPAGED_DIRECTORY}/{name}");
                scoped.push(Scoped::set(&self.bench, path, KHUGEPAGED_MS)?);
            }
        }
        scoped.push(Scoped::set(&self.bench, SHMEM_ENABLED.to_owned(), setup.shmem)?);
        Ok(Ground(scoped))
    }
}

impl Scoped {
    fn set(bench: &Bench, path: String, value: &str) -> anyhow::Result<Self> {
        let before = bench.set(&path, value)?;
        Ok(Scoped { bench: bench.clone(), path, before })
    }
}

impl Drop for Scoped {
    fn drop(&mut self) {
        // In the end the bench puts everything back once more.
        if let Err(error) = self.bench.set(&self.path, &self.before) {
            eprintln!("{error:#}");
        }
    }
}

fn drop_caches() -> anyhow::Result<()> {
    std::fs::write(DROP_CACHES, "1").context(DROP_CACHES)
}

fn pool_pages() -> anyhow::Result<u64> {
    let text = std::fs::read_to_string(NR_HUGEPAGES).context(NR_HUGEPAGES)?;
    text.trim().parse().with_context(|| format!("{NR_HUGEPAGES} holds no number"))
}

/// Bytes of a guest that may be huge in the host, if there is a limit.
#[must_use]
pub fn supply(state: State, guest_bytes: u64) -> Option<u64> {
    (state == State::Scarce).then_some(guest_bytes / SCARCE_PART / BLOCK * BLOCK)
}

/// Brings the guest's khugepaged and its free memory into the state that `run`
/// wants; returns the indices of both layers.
///
/// # Errors
/// If the guest cannot.
pub fn prepare_guest(lab: &Lab, run: &Run, setup: &Setup) -> anyhow::Result<Fmfi> {
    let guest = &lab.vm.guest;
    for name in KHUGEPAGED {
        guest.write_file(&format!("{KHUGEPAGED_DIRECTORY}/{name}"), KHUGEPAGED_MS)?;
    }
    if run.state != State::Unfragmented && setup.guest_fragments {
        let free = guest.memory()?["MemFree"] * (100 - KEPT_PERCENT) / 100;
        let options = Fragment { fmfi: GUEST_FMFI, ..Fragment::new(run.seed, free) };
        guest.fragment(FRAGMENTS, options)?;
    }
    Ok(Fmfi { guest: guest.fragmentation()?.fmfi, host: buddy::read()?.fmfi })
}

/// Takes huge pages away from a kernel that gives them at first touch, as soon as
/// a guest has its share: that kernel knows no limit.
#[derive(Debug)]
pub struct Limiter {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

impl Limiter {
    /// Watches `memory` until it has `bytes` of huge pages, or this is stopped.
    #[must_use]
    pub fn start(bench: &Bench, memory: &GuestMemory, bytes: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, bench, memory) = (Arc::clone(&stop), bench.clone(), memory.clone());
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Acquire) {
                if memory.huge_blocks()?.len() as u64 >= bytes / BLOCK {
                    return bench.set(SHMEM_ENABLED, "never").map(drop);
                }
                std::thread::sleep(LOOK);
            }
            Ok(())
        });
        Limiter { stop, thread: Some(thread) }
    }

    /// Ends watching.
    ///
    /// # Errors
    /// If it could not watch.
    pub fn finish(mut self) -> anyhow::Result<()> {
        self.stop.store(true, Ordering::Release);
        let thread = self.thread.take().context("it is finished once")?;
        thread.join().map_err(|_| anyhow!("the thread that watches the supply has panicked"))?
    }
}

impl Drop for Limiter {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // The settings must not be in use any more when they are put back.
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn supply_is_whole_blocks_and_only_limited_where_it_is_scarce() {
        assert_eq!(supply(State::Fragmented, 1 << 30), None);
        assert_eq!(supply(State::Scarce, (1 << 30) + 4 * 4096), Some(256 << 20));
    }
}

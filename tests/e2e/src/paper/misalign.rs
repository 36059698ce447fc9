//! Huge pages of the host, put where the guest has none: what two layers that know
//! nothing of each other do at worst.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::Context;
use gemini_guest::protocol::BlockState;

use crate::lab::Lab;
use crate::outside::HostState;
use crate::BLOCK;

/// Linux 6.1; the constant is missing in the C library of Debian 12.
const MADV_COLLAPSE: libc::c_int = 25;

/// As many blocks as the guest has huge, and no more than `most`, become huge in the
/// host: those that hold base pages in the guest, in ascending order.
///
/// # Errors
/// If a layer cannot be read, or QEMU's memory cannot be collapsed at all.
pub fn misalign(lab: &Lab, most: Option<u64>) -> anyhow::Result<()> {
    let view = lab.view()?;
    let counts = view.counts();
    let wanted = (counts.aligned + counts.guest_only).min(most.unwrap_or(u64::MAX));
    let wanted = wanted.saturating_sub(counts.host_only);
    let vmm = pidfd(lab.vm.process.pid())?;
    let mut done = 0;
    for block in view.in_state(BlockState::Base, HostState::Base) {
        if done == wanted {
            break;
        }
        let address = lab.memory.address(block * BLOCK).context("a block without memory")?;
        // Another program may have it pinned, or the host has no huge page.
        done += u64::from(collapse(&vmm, address)?);
    }
    Ok(())
}

fn pidfd(pid: u32) -> anyhow::Result<OwnedFd> {
    // SAFETY: takes numbers alone.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0);
    let fd = fd.ok_or_else(io::Error::last_os_error).context("QEMU is gone")?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether the block of QEMU's memory at `address` is huge now.
fn collapse(vmm: &OwnedFd, address: u64) -> anyhow::Result<bool> {
    let range =
        libc::iovec { iov_base: address as *mut libc::c_void, iov_len: usize::try_from(BLOCK)? };
    // SAFETY: names memory of another process, whose contents the advice keeps; the
    // one range that is passed outlives the call.
    let bytes = unsafe {
        let fd = vmm.as_raw_fd();
        libc::syscall(libc::SYS_process_madvise, fd, &raw const range, 1, MADV_COLLAPSE, 0)
    };
    if bytes >= 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM | libc::EINVAL) => Ok(false),
        _ => Err(error).context("QEMU's memory cannot be collapsed (root is needed)"),
    }
}

//! The system calls of the sandbox, each as a safe function.

use std::ffi::CString;
use std::io::{self, Error};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;

/// Attributes of mounts, of linux/mount.h.
pub use libc::{
    MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NOSYMFOLLOW,
    MOUNT_ATTR_RDONLY,
};

/// `_LINUX_CAPABILITY_VERSION_3` of linux/capability.h: sets of 64 bits, in two halves.
const CAPABILITY_VERSION: u32 = 0x2008_0522;

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn c_string(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

fn own(fd: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(fd).map_err(Error::other)?;
    // SAFETY: the callers pass what the kernel has just made for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Gives the calling thread, and those that it starts, a mount namespace in which nothing spreads
/// to others and nothing arrives from them.
pub fn unshare_mounts() -> io::Result<()> {
    // SAFETY: takes no pointers.
    check(unsafe { libc::unshare(libc::CLONE_NEWNS) }.into())?;
    let flags = libc::MS_REC | libc::MS_PRIVATE;
    // SAFETY: the path is a valid string; the other strings may be absent for these flags.
    let result =
        unsafe { libc::mount(ptr::null(), c"/".as_ptr(), ptr::null(), flags, ptr::null()) };
    check(result.into()).map(|_| ())
}

/// A copy of the mounts from `path` on downwards, attached nowhere, with attributes.
pub fn copy_mounts(path: &Path, attributes: u64) -> io::Result<OwnedFd> {
    let path = c_string(path)?;
    let recursive = libc::AT_RECURSIVE.unsigned_abs();
    // SAFETY: the path is a valid string.
    let copy = check(unsafe {
        libc::syscall(
            libc::SYS_open_tree,
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | recursive,
        )
    })?;
    let copy = own(copy)?;
    set_attributes(&copy, attributes, libc::AT_RECURSIVE)?;
    Ok(copy)
}

/// Makes a mount read-only, not those below it.
pub fn make_read_only(mount: &impl AsRawFd) -> io::Result<()> {
    set_attributes(mount, MOUNT_ATTR_RDONLY, 0)
}

fn set_attributes(mount: &impl AsRawFd, attributes: u64, flags: libc::c_int) -> io::Result<()> {
    let attr = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: the path is an empty string, and the structure has the size that is told.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | flags,
            &raw const attr,
            size_of_val(&attr),
        )
    })
    .map(|_| ())
}

/// Attaches a copy of mounts.
pub fn attach(copy: &OwnedFd, path: &Path) -> io::Result<()> {
    let path = c_string(path)?;
    // SAFETY: both paths are valid strings.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            copy.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    })
    .map(|_| ())
}

/// Mounts an empty directory on `path`.
pub fn mount_empty(path: &Path) -> io::Result<()> {
    let path = c_string(path)?;
    let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    // SAFETY: all are valid strings.
    let result = unsafe {
        libc::mount(
            c"gemini".as_ptr(),
            path.as_ptr(),
            c"tmpfs".as_ptr(),
            flags,
            c"mode=755,size=4k".as_ptr().cast(),
        )
    };
    check(result.into()).map(|_| ())
}

/// Makes the working directory, a mount, the root, and lets go of the former one.
pub fn pivot_here() -> io::Result<()> {
    // SAFETY: both paths are valid strings.
    check(unsafe { libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()) })?;
    // The former root lies on top of the new one now.
    // SAFETY: the path is a valid string.
    check(unsafe { libc::umount2(c".".as_ptr(), libc::MNT_DETACH) }.into()).map(|_| ())
}

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: libc::c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapabilityHalf {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Takes all capabilities but those of the mask `kept` from the calling thread and those that it
/// starts. Those that are left, as a mask.
pub fn keep_capabilities(kept: u64) -> io::Result<u64> {
    let mut header = CapabilityHeader { version: CAPABILITY_VERSION, pid: 0 };
    let mut halves = [CapabilityHalf::default(); 2];
    // SAFETY: both have the layout of this version of the call, and outlive it.
    check(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, halves.as_mut_ptr()) })?;
    #[allow(clippy::cast_possible_truncation)] // halves
    for (half, kept) in halves.iter_mut().zip([kept as u32, (kept >> 32) as u32]) {
        half.permitted &= kept;
        half.effective &= kept;
        half.inheritable = 0;
    }
    // SAFETY: as above.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, halves.as_ptr()) })?;
    Ok(u64::from(halves[0].permitted) | u64::from(halves[1].permitted) << 32)
}

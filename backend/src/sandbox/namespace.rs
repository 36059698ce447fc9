//! A mount namespace with nothing in it but what the daemon reads and writes.

use super::sys;
use super::Files;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

const PROC: &str = "/proc";
/// What else of the kernel's files is read.
const KERNEL: [&str; 3] = ["/sys/fs/cgroup", "/sys/kernel/mm", "/sys/devices/system/node"];

const HARMLESS: u64 = sys::MOUNT_ATTR_NOSUID | sys::MOUNT_ATTR_NODEV | sys::MOUNT_ATTR_NOEXEC;
const WRITTEN: u64 = HARMLESS | sys::MOUNT_ATTR_NOSYMFOLLOW;
/// Without following symbolic links: those of /proc lead out of any namespace, into the root
/// directory of each process that may be looked at, which is what the daemon has rights for.
const READ: u64 = WRITTEN | sys::MOUNT_ATTR_RDONLY;
/// The files of an administrator may be symbolic links, to others in view, and our own open files
/// are opened anew.
const READ_THROUGH_LINKS: u64 = HARMLESS | sys::MOUNT_ATTR_RDONLY;

/// The directories in view, from the outermost inwards, and their attributes.
fn directories(files: &Files, own_files: PathBuf) -> BTreeMap<PathBuf, u64> {
    let is_kernels = |path: &Path| path.starts_with(PROC) || path.starts_with("/sys");
    let theirs = |paths: &[PathBuf], attributes| {
        let paths = paths.iter().filter(|path| !is_kernels(path)).cloned();
        paths.map(move |path| (path, attributes)).collect::<Vec<_>>()
    };
    let mut all = BTreeMap::from([(PathBuf::from(PROC), READ), (own_files, READ_THROUGH_LINKS)]);
    all.extend(KERNEL.map(|path| (path.into(), READ)));
    all.extend(theirs(&files.read, READ_THROUGH_LINKS));
    all.extend(theirs(&files.written, WRITTEN));
    all
}

/// Enters the namespace, with the calling thread and those that it starts from now on. False if
/// this process may not have one: then nothing has changed.
///
/// # Errors
/// If it fails half way: there may be nothing left to go on with.
pub fn enter(files: &Files) -> io::Result<bool> {
    let own_files = crate::backing::own_proc()?.join("fd");
    let copies = sys::unshare_mounts().and_then(|()| copy(directories(files, own_files)));
    let copies = match copies {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(false),
        copies => copies?,
    };
    // Everything was copied: what this covers is not needed any more.
    let root = Path::new(PROC);
    sys::mount_empty(root)?;
    std::env::set_current_dir(root)?;
    for (path, copy) in copies {
        let path = path.strip_prefix("/").map_err(io::Error::other)?;
        // Where it lies in another that is only read it is there already.
        std::fs::create_dir_all(path)?;
        sys::attach(&copy, path)?;
    }
    sys::pivot_here()?;
    std::env::set_current_dir("/")?;
    sys::make_read_only(&File::open("/")?)?;
    Ok(true)
}

/// Copies of the mounts; what does not exist is left out.
fn copy(directories: BTreeMap<PathBuf, u64>) -> io::Result<Vec<(PathBuf, OwnedFd)>> {
    let mut copies = Vec::with_capacity(directories.len());
    for (path, attributes) in directories {
        match sys::copy_mounts(&path, attributes) {
            Ok(copy) => copies.push((path, copy)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(copies)
}

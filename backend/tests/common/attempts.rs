//! What somebody who got into the daemon might try. Each by its system call, so that it is that one
//! which is refused.

use super::child::{check, value};
use std::ffi::CString;
use std::fs::OpenOptions;
use std::io;
use std::ptr;

/// Makes an attempt.
pub fn make(attempt: &[&str]) -> io::Result<()> {
    match attempt {
        ["read", path] => OpenOptions::new().read(true).open(path).map(drop),
        ["write", path] => OpenOptions::new().write(true).open(path).map(drop),
        ["truncate", path] => open(path, libc::O_RDONLY | libc::O_TRUNC),
        ["create", path] => {
            OpenOptions::new().read(true).write(true).create_new(true).open(path).map(drop)
        }
        ["remove", path] => std::fs::remove_file(path),
        ["rename", from, to] => std::fs::rename(from, to),
        ["thread"] => std::thread::Builder::new().spawn(|| ()).map(drop),
        ["socket", family] => {
            let family = family.parse().map_err(io::Error::other)?;
            // SAFETY: takes no pointers.
            check(unsafe { libc::socket(family, libc::SOCK_DGRAM, 0) }.into())
        }
        // SAFETY: takes no pointers.
        ["fork"] => match value(unsafe { libc::fork() }.into())? {
            // SAFETY: takes no pointers, and the child goes at once.
            0 => unsafe { libc::_exit(0) },
            _ => Ok(()),
        },
        ["execute", path] => {
            let path = CString::new(*path)?;
            let arguments = [path.as_ptr(), ptr::null()];
            // SAFETY: the path and the list are terminated.
            check(unsafe { libc::execv(path.as_ptr(), arguments.as_ptr()) }.into())
        }
        ["namespace"] => call(libc::SYS_unshare, [flag(libc::CLONE_NEWUSER), 0, 0, 0]),
        ["clone-namespace"] => {
            let flags = flag(libc::CLONE_NEWNET) | flag(libc::SIGCHLD);
            call(libc::SYS_clone, [flags, 0, 0, 0])
        }
        ["trace", pid] => call(libc::SYS_ptrace, [libc::PTRACE_SEIZE.into(), id(pid)?, 0, 0]),
        ["signal", pid] => call(libc::SYS_tgkill, [id(pid)?, id(pid)?, flag(libc::SIGTERM), 0]),
        ["page-out", pid] => {
            let pidfd = call_for(libc::SYS_pidfd_open, [id(pid)?, 0, 0, 0])?;
            call(libc::SYS_process_madvise, [pidfd, 0, 0, flag(libc::MADV_PAGEOUT)])
        }
        ["count", pid, cpu] => {
            let cpu = cpu.parse().map_err(io::Error::other)?;
            call(libc::SYS_perf_event_open, [0, id(pid)?, cpu, -1])
        }
        ["code"] => {
            let protection = libc::PROT_READ | libc::PROT_EXEC;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            // SAFETY: a new mapping at an address of the kernel's choice.
            let mapped = unsafe { libc::mmap(ptr::null_mut(), 4096, protection, flags, -1, 0) };
            check(if mapped == libc::MAP_FAILED { -1 } else { 0 })
        }
        ["terminal"] => {
            // SAFETY: takes a pointer only for descriptors that are terminals, which this is not.
            check(unsafe { libc::ioctl(0, libc::TIOCSTI, ptr::null::<u8>()) }.into())
        }
        ["dumpable"] => call(libc::SYS_prctl, [flag(libc::PR_SET_DUMPABLE), 1, 0, 0]),
        _ => Err(io::Error::other("no such attempt")),
    }
}

fn open(path: &str, flags: libc::c_int) -> io::Result<()> {
    let path = CString::new(path)?;
    // SAFETY: the path is terminated.
    check(unsafe { libc::open(path.as_ptr(), flags) }.into())
}

fn flag(value: libc::c_int) -> libc::c_long {
    value.into()
}

fn id(pid: &str) -> io::Result<libc::c_long> {
    pid.parse().map_err(io::Error::other)
}

fn call(number: libc::c_long, arguments: [libc::c_long; 4]) -> io::Result<()> {
    call_for(number, arguments).map(drop)
}

fn call_for(number: libc::c_long, [a, b, c, d]: [libc::c_long; 4]) -> io::Result<libc::c_long> {
    let none: libc::c_long = 0;
    // What is not given would be whatever the register has: flags that no kernel knows, for one.
    // SAFETY: the calls that come here take no pointers, or null for them.
    value(unsafe { libc::syscall(number, a, b, c, d, none) })
}

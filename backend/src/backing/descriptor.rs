//! Our side of descriptors that others gave us.

use super::process::own_proc;
use super::sys::check;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Error, ErrorKind};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

/// Makes a descriptor non-blocking.
///
/// # Errors
/// If the descriptor cannot be changed.
pub fn set_nonblocking(file: &File) -> io::Result<()> {
    // SAFETY: takes no pointers, and the descriptor is open for the duration of the borrow.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    check(libc::c_long::from(flags))?;
    // SAFETY: as above.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) };
    check(libc::c_long::from(result)).map(|_| ())
}

/// Adds one to an event descriptor, as another process would to wake us.
///
/// # Errors
/// If the descriptor cannot be written to. A counter that is full is no error: it wakes as well.
pub fn signal_event(event: &impl AsRawFd) -> io::Result<()> {
    let one = 1u64.to_ne_bytes();
    // SAFETY: the buffer is valid for its length, and the descriptor is borrowed.
    let written = unsafe { libc::write(event.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    if written < 0 {
        let error = Error::last_os_error();
        if error.kind() != ErrorKind::WouldBlock {
            return Err(error);
        }
    }
    Ok(())
}

/// A constant of `fcntl` or `lseek` in the width that a lock has for it: all are small.
fn short(constant: libc::c_int) -> libc::c_short {
    libc::c_short::try_from(constant).unwrap_or(libc::c_short::MAX)
}

/// A write lock on the whole of a file, which belongs to the open file and not to the process.
fn whole_file_lock() -> libc::flock {
    // SAFETY: all fields are integers, and 0 is a value of each.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = short(libc::F_WRLCK);
    lock.l_whence = short(libc::SEEK_SET);
    lock
}

/// Locks a file for as long as it is open: the kernel unlocks it when its last descriptor is
/// closed, at the latest at the end of the process.
///
/// # Errors
/// Those of the file system; EAGAIN if somebody else has locked it.
pub fn lock_for_life(file: &File) -> io::Result<()> {
    let lock = whole_file_lock();
    // SAFETY: the lock is a valid structure that lives across the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    check(libc::c_long::from(result)).map(|_| ())
}

/// Whether somebody holds a file by [`lock_for_life`], other than by this very descriptor.
///
/// # Errors
/// Those of the file system.
pub fn lock_is_held(file: &File) -> io::Result<bool> {
    let mut lock = whole_file_lock();
    // SAFETY: as above.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    check(libc::c_long::from(result))?;
    // Whoever may only read the file can have a read lock.
    Ok(lock.l_type == short(libc::F_WRLCK))
}

/// Closes a descriptor whose owner turned it into a number and forgot it.
///
/// The caller knows that nobody uses the number any more; that it still is the same descriptor
/// follows from nobody having closed it.
pub fn close_abandoned(fd: RawFd) {
    // SAFETY: nobody else owns it, as the caller promises; closing touches no memory.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
}

/// Listens on a unix socket that nobody but this process's user (and root) can connect to, from
/// its first moment on. For the start of the daemon, when no other thread creates files: the mask
/// is the whole process's.
///
/// # Errors
/// As [`UnixListener::bind`].
pub fn bind_private(path: &Path) -> io::Result<UnixListener> {
    // SAFETY: takes no pointers.
    let former = unsafe { libc::umask(0o177) };
    let listener = UnixListener::bind(path);
    // SAFETY: takes no pointers.
    unsafe { libc::umask(former) };
    listener
}

/// Takes over a listening unix stream socket that this process was started with.
///
/// # Errors
/// If the descriptor is not open, or is something else.
pub fn inherit_listener(fd: RawFd) -> io::Result<UnixListener> {
    let wanted = [
        (libc::SO_DOMAIN, libc::AF_UNIX, "unix socket"),
        (libc::SO_TYPE, libc::SOCK_STREAM, "stream socket"),
        (libc::SO_ACCEPTCONN, 1, "listening socket"),
    ];
    for (option, value, what) in wanted {
        if socket_option(fd, option)? != value {
            return Err(Error::new(ErrorKind::InvalidInput, format!("it is no {what}")));
        }
    }
    // SAFETY: takes no pointers. Programs that we may start have no business with it.
    check(libc::c_long::from(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) }))?;
    // SAFETY: the descriptor is open (it answered above), and whoever started this process gave
    // it to us to own; no other part of the daemon knows its number.
    Ok(UnixListener::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

fn socket_option(fd: RawFd, option: libc::c_int) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut length = libc::socklen_t::try_from(size_of_val(&value)).map_err(Error::other)?;
    // SAFETY: `value` and `length` are valid places for the result.
    let result = unsafe {
        libc::getsockopt(fd, libc::SOL_SOCKET, option, (&raw mut value).cast(), &raw mut length)
    };
    check(libc::c_long::from(result)).map(|_| value)
}

/// The processes that opened the other ends of our connections over unix sockets, this one left
/// out; none where the system does not tell. Nobody has to hand the connections over: the frame
/// keeps the VMM's to itself.
pub fn peers() -> BTreeSet<i32> {
    let entries = own_proc().and_then(|own| std::fs::read_dir(own.join("fd")));
    let numbers = entries.into_iter().flatten().flatten();
    let numbers = numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let own = i32::try_from(std::process::id()).ok();
    // No process: not connected, not a unix socket, or in a PID namespace that we do not see.
    numbers.filter_map(peer).filter(|pid| *pid > 0 && Some(*pid) != own).collect()
}

/// The process that opened the other end of a connection, as the kernel noted it then. Whoever
/// passed a connection on, or listens, is named instead of those that use it.
fn peer(fd: RawFd) -> Option<i32> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut length = libc::socklen_t::try_from(size_of_val(&peer)).ok()?;
    // SAFETY: `peer` and `length` are valid places for the result. Whatever the number is of by
    // now, it is only asked, and changes by no answer.
    let result = unsafe {
        let place = (&raw mut peer).cast();
        libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, place, &raw mut length)
    };
    (result == 0).then_some(peer.pid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::IntoRawFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn private_socket_is_its_users_alone() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let _listener = bind_private(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_reader_does_not_hold_a_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (reader, other) = (File::open(file.path()).unwrap(), file.reopen().unwrap());
        let mut lock = whole_file_lock();
        lock.l_type = short(libc::F_RDLCK);
        // SAFETY: the lock is a valid structure that lives across the call.
        let result = unsafe { libc::fcntl(reader.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
        assert_eq!(result, 0);
        assert!(!lock_is_held(&other).unwrap());
        drop(reader);
        lock_for_life(file.as_file()).unwrap();
        assert!(lock_is_held(&other).unwrap());
    }

    #[test]
    fn peers_are_told_for_connections_alone() {
        let (one, _other) = UnixStream::pair().unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        assert_eq!(peer(one.as_raw_fd()), Some(own));
        assert!(!peers().contains(&own), "it is no other process");
        assert_eq!(peer(File::open("/dev/null").unwrap().as_raw_fd()), None);
        assert_eq!(peer(-1), None);
        let internet = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(peer(internet.as_raw_fd()).is_none_or(|pid| pid == 0));
    }

    #[test]
    fn inherit_listener_takes_only_listening_unix_sockets() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        assert!(inherit_listener(listener.into_raw_fd()).is_ok());
        let file = File::open("/dev/null").unwrap();
        assert!(inherit_listener(file.as_raw_fd()).is_err());
        let (one, _other) = UnixStream::pair().unwrap();
        assert!(inherit_listener(one.as_raw_fd()).is_err());
        assert!(inherit_listener(-1).is_err());
    }
}

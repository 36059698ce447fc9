//! What is told to the service manager (sd_notify(3)): that the sockets are there, so that what is
//! ordered after the daemon finds them.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Names the service manager's socket; without it there is nobody to tell.
const VARIABLE: &str = "NOTIFY_SOCKET";

/// Tells that the daemon is ready. That it cannot be told is no reason to end.
pub fn ready() {
    if let Some(name) = std::env::var_os(VARIABLE) {
        if let Err(error) = tell(&name, b"READY=1") {
            log::warn!("cannot tell the service manager ({VARIABLE}) of the start: {error}");
        }
    }
}

fn tell(name: &OsStr, message: &[u8]) -> io::Result<()> {
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(name)?,
    };
    UnixDatagram::unbound()?.send_to_addr(message, &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manager_hears_it_by_either_kind_of_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let abstract_name = format!("gemini-notify-{}", std::process::id());
        let sockets = [
            (UnixDatagram::bind(&path), path.into_os_string()),
            (
                SocketAddr::from_abstract_name(&abstract_name)
                    .and_then(|address| UnixDatagram::bind_addr(&address)),
                format!("@{abstract_name}").into(),
            ),
        ];
        for (socket, name) in sockets {
            let socket = socket.unwrap();
            tell(&name, b"READY=1").unwrap();
            let mut heard = [0; 16];
            let length = socket.recv(&mut heard).unwrap();
            assert_eq!(&heard[..length], b"READY=1", "{}", name.display());
        }
    }

    #[test]
    fn a_manager_that_is_gone_is_an_error() {
        assert!(tell(OsStr::new("/nonexistent/notify"), b"READY=1").is_err());
        assert!(tell(OsStr::new(""), b"READY=1").is_err());
    }
}

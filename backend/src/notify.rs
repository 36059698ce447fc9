//! What is told to the service manager (sd_notify(3)): that the daemon serves, so that what is
//! ordered after it finds its sockets, and a start that failed is seen to have failed.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Names the service manager's socket; without it there is nobody to tell.
const VARIABLE: &str = "NOTIFY_SOCKET";

/// A way to the service manager. It is taken before the sandbox, in which there is none, and used
/// once all that may fail is done.
#[derive(Debug)]
pub struct Manager(Option<UnixDatagram>);

impl Manager {
    /// The one that started the daemon, if one did. That it cannot be reached is no reason to end.
    pub fn reach() -> Self {
        Self(std::env::var_os(VARIABLE).and_then(|name| connect(&name).inspect_err(warn).ok()))
    }

    /// Tells that the daemon is ready.
    pub fn ready(self) {
        if let Some(Err(error)) = self.0.map(|socket| socket.send(b"READY=1")) {
            warn(&error);
        }
    }
}

fn warn(error: &io::Error) {
    log::warn!("cannot tell the service manager ({VARIABLE}) of the start: {error}");
}

fn connect(name: &OsStr) -> io::Result<UnixDatagram> {
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    Ok(socket)
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
            Manager(connect(&name).ok()).ready();
            let mut heard = [0; 16];
            let length = socket.recv(&mut heard).unwrap();
            assert_eq!(&heard[..length], b"READY=1", "{}", name.display());
        }
    }

    #[test]
    fn a_manager_that_is_not_there_is_an_error() {
        assert!(connect(OsStr::new("/nonexistent/notify")).is_err());
        assert!(connect(OsStr::new("")).is_err());
    }
}

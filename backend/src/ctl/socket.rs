//! The way to the daemon: finding its socket, asking, and telling what is wrong when it does not
//! answer.

use serde_json::{json, Value};
use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Names the socket where the command line does not.
pub const SOCKET_VARIABLE: &str = "GEMINI_CONTROL_SOCKET";
/// How the names of control sockets end where nothing names one.
pub const SOCKET_SUFFIX: &str = "control.sock";
/// Where they are then; the second part is below `$XDG_RUNTIME_DIR`.
const RUN_DIRECTORY: &str = "/run/virtio-gemini";
const RUN_DIRECTORY_OF_USER: &str = "virtio-gemini";
/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(15);
/// Longest answer: the block map of the largest guests has some tens of MiB.
const ANSWER_MAX: u64 = 1 << 30;

/// Why something cannot be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No socket was named, and none is where they usually are.
    #[error(
        "no control socket in {looked}: start vhost-device-gemini with --control-socket, or name \
         its socket with --control-socket or {SOCKET_VARIABLE}"
    )]
    None {
        /// Where it was looked for.
        looked: String,
    },
    /// No socket was named, and there are several.
    #[error("several control sockets: {0}; choose one with --control-socket")]
    Several(String),
    /// It cannot be connected to.
    #[error("cannot connect to {path}: {source}; {remedy}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
        /// What to do about it.
        remedy: &'static str,
    },
    /// Somebody is there, and does not answer as our daemon would.
    #[error(
        "{path} does not answer: {source}; is it a control socket (--control-socket of the \
         daemon), and not that of the VMM (--socket-path)?"
    )]
    Silent {
        /// The socket.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// The daemon refuses.
    #[error("{0}")]
    Refused(String),
    /// The daemon does not know the request.
    #[error(
        "the daemon has version {daemon} and does not know this, geminictl has version {}; start \
         a daemon of this version. It says: {answer}", env!("CARGO_PKG_VERSION")
    )]
    Version {
        /// The daemon's version.
        daemon: String,
        /// What it answered.
        answer: String,
    },
    /// A name without a value.
    #[error("{0} has no value; give names and values in turn, for example: copy-rate 100M")]
    NoValue(String),
    /// A name given twice, or none that can be set.
    #[error("{0} cannot be set, or not twice")]
    Twice(String),
}

/// A daemon's control socket.
pub struct Socket {
    path: PathBuf,
}

impl Socket {
    /// The socket that is named, or the only one that there is.
    pub fn find(named: Option<&Path>) -> Result<Self, Error> {
        if let Some(path) = named {
            return Ok(Self { path: path.to_owned() });
        }
        let mut directories = vec![PathBuf::from(RUN_DIRECTORY)];
        let user = std::env::var_os("XDG_RUNTIME_DIR").filter(|directory| !directory.is_empty());
        directories.extend(user.map(|dir| Path::new(&dir).join(RUN_DIRECTORY_OF_USER)));
        Self::only_one_in(&directories)
    }

    fn only_one_in(directories: &[PathBuf]) -> Result<Self, Error> {
        let mut found = Vec::new();
        for entry in directories.iter().filter_map(|dir| dir.read_dir().ok()).flatten().flatten() {
            let is_ours = entry.file_name().to_string_lossy().ends_with(SOCKET_SUFFIX);
            if is_ours && entry.file_type().is_ok_and(|kind| kind.is_socket()) {
                found.push(entry.path());
            }
        }
        match found.as_slice() {
            [_] => Ok(Self { path: found.remove(0) }),
            [] => Err(Error::None { looked: list(directories) }),
            _ => {
                found.sort();
                Err(Error::Several(list(&found)))
            }
        }
    }

    /// The daemon's answer.
    pub fn ask(&self, request: &Value) -> Result<Value, Error> {
        let answer = self.exchange(request)?;
        match answer.get("error").map(|error| error.as_str().unwrap_or("without a reason")) {
            None => Ok(answer),
            Some(error) if error.starts_with("not understood") => Err(self.explain(error)),
            Some(error) => Err(Error::Refused(format!("the daemon refuses: {error}"))),
        }
    }

    /// Why a request was not understood: the daemon may be another version.
    fn explain(&self, error: &str) -> Error {
        let status = self.exchange(&json!({"cmd": "status"})).unwrap_or_default();
        match status["version"].as_str() {
            Some(version) => Error::Version { daemon: version.into(), answer: error.into() },
            None => Error::Refused(format!("the daemon refuses: {error}")),
        }
    }

    fn exchange(&self, request: &Value) -> Result<Value, Error> {
        let stream = UnixStream::connect(&self.path).map_err(|source| {
            let remedy = remedy(&source);
            Error::Connect { path: self.path.clone(), source, remedy }
        })?;
        let line = exchange(&stream, request)
            .map_err(|source| Error::Silent { path: self.path.clone(), source })?;
        serde_json::from_slice(&line)
            .map_err(|error| Error::Silent { path: self.path.clone(), source: error.into() })
    }
}

fn exchange(mut stream: &UnixStream, request: &Value) -> io::Result<Vec<u8>> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(format!("{request}\n").as_bytes())?;
    let mut line = Vec::new();
    BufReader::new(stream).take(ANSWER_MAX).read_until(b'\n', &mut line)?;
    match line.last() {
        Some(b'\n') => Ok(line),
        Some(_) => Err(io::Error::other("its answer has no end")),
        None => Err(io::Error::other("it closed the connection")),
    }
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => {
            "the daemon does not run, or was started without --control-socket or with another one"
        }
        io::ErrorKind::ConnectionRefused => {
            "nobody listens there: the daemon has died, or it is no socket; start the daemon again"
        }
        io::ErrorKind::PermissionDenied => {
            "the socket is for the user alone that the daemon runs as: become that user, or root"
        }
        _ => "check the path",
    }
}

fn list(paths: &[PathBuf]) -> String {
    let names: Vec<_> =
        paths.iter().map(|path| AsRef::<OsStr>::as_ref(path).to_string_lossy()).collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// Somebody that answers each connection with the next of these.
    fn somebody(answers: &'static [&'static str]) -> (tempfile::TempDir, Socket) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm1-control.sock");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            for answer in answers {
                let (mut stream, _) = listener.accept().unwrap();
                let mut line = String::new();
                BufReader::new(&stream).read_line(&mut line).unwrap();
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        (directory, Socket { path })
    }

    fn error(socket: &Socket) -> String {
        socket.ask(&json!({"cmd": "pause"})).unwrap_err().to_string()
    }

    #[test]
    fn an_old_daemon_is_told_from_a_wrong_value() {
        let (_directory, old) = somebody(&[
            "{\"error\":\"not understood: unknown variant `pause`\"}\n",
            "{\"version\":\"0.0.1\"}\n",
        ]);
        let told = error(&old);
        assert!(told.contains("version 0.0.1") && told.contains("unknown variant"), "{told}");
        let (_directory, wrong) = somebody(&["{\"error\":\"cpu_share: give 1 to 100\"}\n"]);
        assert!(error(&wrong).ends_with("the daemon refuses: cpu_share: give 1 to 100"));
    }

    #[test]
    fn who_is_no_control_socket_is_suspected_to_be_the_vmms() {
        for answers in [&[""], &["hello\n"], &["{\"paused\":"]] {
            let (_directory, other) = somebody(answers);
            let told = error(&other);
            assert!(told.contains("--socket-path") && told.contains("control.sock"), "{told}");
        }
    }

    #[test]
    fn what_is_not_there_is_told_with_its_remedy() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        let socket = Socket { path: path.clone() };
        assert!(error(&socket).contains("does not run"), "{}", error(&socket));
        drop(UnixListener::bind(&path).unwrap());
        assert!(error(&socket).contains("has died"), "{}", error(&socket));
        let denied = remedy(&io::Error::from(io::ErrorKind::PermissionDenied));
        assert!(denied.contains("root"));
    }

    #[test]
    fn without_a_name_the_only_socket_is_taken() {
        let directory = tempfile::tempdir().unwrap();
        let here = [directory.path().to_owned(), directory.path().join("none")];
        let find = || Socket::only_one_in(&here);
        std::fs::write(directory.path().join("no-control.sock"), "").unwrap();
        let error = find().err().unwrap().to_string();
        assert!(error.contains("--control-socket") && error.contains("none"), "{error}");
        let bind = |name| UnixListener::bind(directory.path().join(name)).unwrap();
        let _listeners = (bind("vm1.sock"), bind("vm1-control.sock"));
        assert!(find().unwrap().path.ends_with("vm1-control.sock"));
        let _another = bind("vm2-control.sock");
        let error = find().err().unwrap().to_string();
        assert!(error.contains("vm1-control.sock") && error.contains("vm2-"), "{error}");
    }
}

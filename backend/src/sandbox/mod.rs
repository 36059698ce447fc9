//! What the daemon gives up before it serves a guest, so that whoever gets into it by a guest's or
//! a VMM's messages has little to go on with. docs/sandbox.md says against whom that helps.
//!
//! Two steps. [`Sandbox::enter`], before there is a second thread: a mount namespace with nothing in
//! it but the files that are still needed, where the process may make one, and no capability that
//! is of no use any more. [`Sandbox::seal`], last of all: a filter of system calls. A user
//! namespace and Landlock would do more for a process without rights, and cannot be had: in either
//! the kernel lets nobody reach the VMM's memory.

mod filter;
mod namespace;
#[allow(unsafe_code)] // the system calls that only the sandbox makes
mod sys;

use std::io;
use std::path::{Path, PathBuf};

/// `--sandbox`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// A call that is not allowed ends the process.
    #[default]
    On,
    /// It is made, and the kernel logs it. There is no namespace, and no capability is given up but
    /// `CAP_SYS_ADMIN`.
    Log,
    /// No sandbox; `CAP_SYS_ADMIN` is given up all the same.
    Off,
}

/// What of the file system is needed once the daemon serves; absolute paths.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Files {
    /// Directories of files that are read.
    pub read: Vec<PathBuf>,
    /// Directories of files that are removed, or made.
    pub written: Vec<PathBuf>,
    /// Whether any are made.
    pub creates: bool,
}

/// Why there is no sandbox.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// All there is would be in view.
    #[error(
        "cannot shut the file system away: a socket, the configuration file or the shares are \
         right in {0}, and would bring all of it into view; put them into a directory of their \
         own, or give --sandbox off"
    )]
    Root(PathBuf),
    /// The namespace.
    #[error("cannot shut the file system away: {0}; --sandbox off goes without")]
    Namespace(#[source] io::Error),
    /// The capabilities.
    #[error("cannot give capabilities up: {0}; let whatever filters system calls allow capset")]
    Capabilities(#[source] io::Error),
    /// The filter is none. That does not depend on the system.
    #[error("cannot make a filter of system calls: {0}")]
    Filter(#[from] seccompiler::BackendError),
    /// The kernel takes no filter.
    #[error("cannot filter system calls: {0}; --sandbox off goes without")]
    Install(#[from] seccompiler::Error),
}

/// Capabilities that are of use to a running daemon (linux/capability.h), and are kept where it was
/// given them: docs/sandbox.md says what for.
const KEPT: [(u32, &str); 4] =
    [(2, "CAP_DAC_READ_SEARCH"), (19, "CAP_SYS_PTRACE"), (23, "CAP_SYS_NICE"), (38, "CAP_PERFMON")];

/// `CAP_SYS_ADMIN`: to make the namespace, and never to serve with.
const ADMINISTRATION: u32 = 21;

/// The sandbox of this process.
#[derive(Debug)]
pub struct Sandbox {
    mode: Mode,
    files: Files,
}

impl Sandbox {
    /// A sandbox in which `files` can be had.
    pub fn new(mode: Mode, files: Files) -> Self {
        Self { mode, files }
    }

    /// Leaves the file system, but for what is needed, and gives up capabilities. For the only
    /// thread of the process; those that it starts later are inside, too.
    ///
    /// # Errors
    /// If that fails half way, so that the process had better end. One that may not make a
    /// namespace goes on without: the log says so.
    pub fn enter(&self) -> Result<(), Error> {
        if self.mode != Mode::On {
            // A service gives it for the namespace, and may be told in an emergency to have none.
            let mask = !(1 << ADMINISTRATION);
            return sys::keep_capabilities(mask).map(drop).map_err(Error::Capabilities);
        }
        let all = self.files.read.iter().chain(&self.files.written);
        if let Some(root) = all.into_iter().find(|path| path.parent().is_none()) {
            return Err(Error::Root(root.clone()));
        }
        let namespace = namespace::enter(&self.files).map_err(Error::Namespace)?;
        let mask = KEPT.iter().fold(0, |mask, (bit, _)| mask | 1 << bit);
        let kept = sys::keep_capabilities(mask).map_err(Error::Capabilities)?;
        let kept: Vec<&str> =
            KEPT.iter().filter(|(bit, _)| kept & 1 << bit != 0).map(|(_, name)| *name).collect();
        let view = match namespace {
            true => "no files but its own in view",
            false => "without CAP_SYS_ADMIN all files stay in view",
        };
        log::info!(
            "sandbox: {view}, capabilities: {}",
            match kept.is_empty() {
                true => "none".into(),
                false => kept.join(" "),
            }
        );
        Ok(())
    }

    /// Filters the system calls of all threads, now and later.
    ///
    /// # Errors
    /// If the kernel takes no filter.
    pub fn seal(&self) -> Result<(), Error> {
        match self.mode {
            Mode::Off => return Ok(()),
            Mode::Log => log::warn!("sandbox: system calls are logged by the kernel, not refused"),
            Mode::On => {}
        }
        for program in filter::programs(self.mode, &self.files)? {
            seccompiler::apply_filter_all_threads(&program)?;
        }
        Ok(())
    }
}

/// The directory of a file, as it is called where no symbolic link leads to it; that of what the
/// file is a link to, too.
pub fn directories_of(file: &Path) -> Vec<PathBuf> {
    let directory = |path: &Path| path.parent().map(Path::to_owned);
    let own = settled(file);
    let target = file.canonicalize().ok();
    let mut all: Vec<PathBuf> =
        [Some(own), target].into_iter().flatten().filter_map(|path| directory(&path)).collect();
    all.dedup();
    all
}

/// The path of a file that stays the same without the working directory and without the symbolic
/// links on the way; one to the file itself may come to lead elsewhere, and is left to be followed.
pub fn settled(file: &Path) -> PathBuf {
    let absolute = std::path::absolute(file).unwrap_or_else(|_| file.to_owned());
    match (absolute.parent().map(Path::canonicalize), absolute.file_name()) {
        (Some(Ok(directory)), Some(name)) => directory.join(name),
        _ => absolute,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_settled_but_for_the_last_link() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().canonicalize().unwrap().join(name);
        for name in ["files", "links"] {
            std::fs::create_dir(at(name)).unwrap();
        }
        std::os::unix::fs::symlink("links", at("way")).unwrap();
        std::os::unix::fs::symlink("../files/file", at("links/link")).unwrap();
        assert_eq!(settled(&at("way/link")), at("links/link"));
        // It leads nowhere yet.
        assert_eq!(directories_of(&at("way/link")), [at("links")]);
        std::fs::write(at("files/file"), "").unwrap();
        assert_eq!(directories_of(&at("way/link")), [at("links"), at("files")]);
        assert_eq!(directories_of(&at("files/file")), [at("files")]);
        assert_eq!(settled(Path::new("/none/such")), Path::new("/none/such"));
        assert!(settled(Path::new("here")).is_absolute());
    }

    #[test]
    fn filters_are_made_and_allow_no_more_than_is_needed() {
        let none = Files::default();
        let socket = Files { written: vec!["/run".into()], ..Files::default() };
        let shares = Files { creates: true, ..socket.clone() };
        for mode in [Mode::On, Mode::Log] {
            let length = |files: &Files| filter::programs(mode, files).unwrap()[1].len();
            assert!(length(&none) < length(&socket) && length(&socket) < length(&shares));
        }
    }

    #[test]
    fn the_root_directory_is_not_brought_into_view() {
        let files = Files { written: vec!["/".into()], ..Files::default() };
        let refused = Sandbox::new(Mode::On, files).enter();
        assert!(matches!(refused, Err(Error::Root(path)) if path == Path::new("/")));
    }
}

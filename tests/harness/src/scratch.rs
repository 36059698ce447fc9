//! A directory for sockets and logs that is gone when its owner is.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::cleanup::{self, Guard};

/// A new directory below the system's directory for temporary files.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    _removed: Guard,
}

impl Scratch {
    /// Creates it.
    ///
    /// # Errors
    /// If it cannot be created.
    pub fn new() -> io::Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        loop {
            let name =
                format!("gemini-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
            let path = std::env::temp_dir().join(name);
            match std::fs::create_dir(&path) {
                Ok(()) => {
                    let theirs = path.clone();
                    let removed = cleanup::guard(move || remove(&theirs));
                    return Ok(Scratch { path, _removed: removed });
                }
                // Left by a process that was killed and had our id.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_dir_all(path) {
        eprintln!("cannot remove {}: {error}", path.display());
    }
}

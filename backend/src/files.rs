//! Small files of the kernel's that are read again and again: kept open, since to find one costs
//! several times as much as to read it.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Most files that are kept open; any others are opened each time.
const MOST: usize = 64;
/// Bytes that one call asks for.
const PIECE: usize = 4096;

/// Files by their paths, as they were opened first.
#[derive(Debug, Default)]
pub struct Files {
    open: HashMap<PathBuf, File>,
}

impl Files {
    /// What a file says now; `None` if it is not there, or cannot be read.
    pub fn read(&mut self, path: &Path) -> Option<String> {
        if let Some(file) = self.open.get(path) {
            // Of a process that ended, or of a cgroup that was removed, an open file tells that
            // it is gone. There may be another one of that name.
            if let Ok(text) = whole(file) {
                return Some(text);
            }
            self.open.remove(path);
        }
        let file = File::open(path).ok()?;
        let text = whole(&file).ok()?;
        if self.open.len() < MOST {
            self.open.insert(path.to_owned(), file);
        }
        Some(text)
    }

    /// Closes all of them.
    pub fn close(&mut self) {
        self.open.clear();
    }
}

/// All of a file, from its beginning wherever it was read before.
fn whole(file: &File) -> io::Result<String> {
    let mut text = Vec::new();
    loop {
        let had = text.len();
        text.resize(had + PIECE, 0);
        let got = file.read_at(&mut text[had..], had as u64)?;
        text.truncate(had + got);
        if got == 0 {
            return String::from_utf8(text).map_err(io::Error::other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn what_changed_is_read_anew_whatever_its_length() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let mut files = Files::default();
        assert_eq!(files.read(&path), None);
        for text in ["1\n", "", &"long ".repeat(PIECE), "2\n"] {
            fs::write(&path, text).unwrap();
            assert_eq!(files.read(&path).as_deref(), Some(text));
        }
    }

    #[test]
    fn a_process_that_ended_tells_nothing() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let path = PathBuf::from(format!("/proc/{}/cgroup", child.id()));
        let mut files = Files::default();
        assert_eq!(files.read(&path), fs::read_to_string(&path).ok());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(files.read(&path), None);
        assert!(files.open.is_empty());
    }

    #[test]
    fn only_so_many_are_kept_open() {
        let dir = tempfile::tempdir().unwrap();
        let mut files = Files::default();
        for number in 0..=MOST {
            let path = dir.path().join(number.to_string());
            fs::write(&path, number.to_string()).unwrap();
            assert_eq!(files.read(&path), Some(number.to_string()));
        }
        assert_eq!(files.open.len(), MOST);
    }
}

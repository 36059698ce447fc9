//! Host settings that decide a measurement: set for its time, then put back.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::vm;

/// Keeps the old values of the settings that are changed: a run that was killed
/// can put nothing back, so the next one does. Where only root can write,
/// because root believes what it says.
const LEDGER: &str = "/run/virtio-gemini-settings";

/// Held by every program of this project that changes such a setting or depends
/// on one.
const LOCK: &str = "/run/lock/virtio-gemini-settings.lock";

/// Where shared memory gets huge pages from: at a fault, or only when asked.
pub const SHMEM_ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// Settings that were changed; dropping this puts them back.
#[derive(Debug)]
pub struct Settings {
    ledger: Arc<Mutex<Ledger>>,
}

#[derive(Debug)]
struct Ledger {
    /// Held for as long as this lives.
    _lock: File,
    file: File,
    /// Path and value before, in the order of the changes.
    before: Vec<(PathBuf, String)>,
}

impl Settings {
    /// Waits until nobody else depends on this machine's settings, and puts
    /// back what a predecessor that was killed has left behind. From now on
    /// SIGINT, SIGTERM and SIGHUP put the settings back before they end this
    /// process.
    ///
    /// # Errors
    /// If the ledger in /run cannot be written (it needs root).
    pub fn hold() -> anyhow::Result<Self> {
        let ledger = Ledger::open(Path::new(LOCK), Path::new(LEDGER))?;
        let ledger = Arc::new(Mutex::new(ledger));
        let mut signals =
            Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot catch signals")?;
        let at_signal = Arc::downgrade(&ledger);
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                if let Some(signal) = signals.forever().next() {
                    if let Some(ledger) = at_signal.upgrade() {
                        let mut ledger = ledger.lock().unwrap_or_else(PoisonError::into_inner);
                        ledger.restore();
                    }
                    vm::remove_run_directories();
                    // The guests die with this process: the kernel sees to it.
                    std::process::exit(128 + signal);
                }
            })
            .context("cannot start a thread")?;
        Ok(Settings { ledger })
    }

    /// Sets the setting at `path` and returns what it was.
    ///
    /// # Errors
    /// If it cannot be read or written.
    pub fn set(&self, path: &str, value: &str) -> anyhow::Result<String> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner).set(Path::new(path), value)
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner).restore();
    }
}

impl Ledger {
    fn open(lock_path: &Path, path: &Path) -> anyhow::Result<Self> {
        let open = |path: &Path| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)
                .with_context(|| format!("cannot open {} (root is needed)", path.display()))
        };
        let lock_file = open(lock_path)?;
        lock(&lock_file, libc::LOCK_EX | libc::LOCK_NB).or_else(|_| {
            eprintln!("waiting for another run to give this machine's settings back");
            lock(&lock_file, libc::LOCK_EX)
        })?;
        let mut file = open(path)?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        let before = text
            .lines()
            .filter_map(|line| line.split_once('='))
            .map(|(path, value)| (PathBuf::from(path), value.to_owned()))
            .collect();
        let mut ledger = Ledger { _lock: lock_file, file, before };
        if !ledger.before.is_empty() {
            eprintln!("putting back settings that a killed run has left behind");
            ledger.restore();
        }
        Ok(ledger)
    }

    fn set(&mut self, path: &Path, value: &str) -> anyhow::Result<String> {
        let text =
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let before = selected(&text).to_owned();
        // Once, however often it is changed: what counts is what was found.
        if !self.before.iter().any(|(known, _)| known == path) {
            // Written down first: from here on it will be put back.
            self.before.push((path.to_owned(), before.clone()));
            self.write()?;
        }
        fs::write(path, value)
            .with_context(|| format!("cannot write {value} to {}", path.display()))?;
        Ok(before)
    }

    /// Puts everything back, the last change first.
    fn restore(&mut self) {
        while let Some((path, value)) = self.before.pop() {
            if let Err(error) = fs::write(&path, &value) {
                eprintln!("cannot put {} back to {value}: {error}", path.display());
            }
        }
        if let Err(error) = self.write() {
            eprintln!("cannot clear {LEDGER}: {error}");
        }
    }

    fn write(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.rewind()?;
        for (path, value) in &self.before {
            writeln!(self.file, "{}={value}", path.display())?;
        }
        self.file.sync_data()
    }
}

fn lock(file: &File, operation: libc::c_int) -> io::Result<()> {
    // SAFETY: the descriptor is open throughout the call.
    if unsafe { libc::flock(file.as_raw_fd(), operation) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The value of a setting: the word in brackets where the file lists choices.
#[must_use]
pub fn selected(text: &str) -> &str {
    text.split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'))
        .map_or(text.trim(), |(word, _)| word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("gemini-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("a directory");
        path
    }

    fn open(directory: &Path) -> anyhow::Result<Ledger> {
        Ledger::open(&directory.join("lock"), &directory.join("ledger"))
    }

    #[test]
    fn choice_in_brackets_is_the_value() {
        assert_eq!(selected("always [never] deny\n"), "never");
        assert_eq!(selected("65530\n"), "65530");
    }

    #[test]
    fn settings_are_put_back_in_reverse_order() {
        let directory = directory("settings");
        let setting = directory.join("setting");
        fs::write(&setting, "[a] b c").expect("a file");
        let mut ledger = open(&directory).expect("a ledger");
        assert_eq!(ledger.set(&setting, "b").expect("a file"), "a");
        assert_eq!(ledger.set(&setting, "c").expect("a file"), "b");
        assert_eq!(ledger.before.len(), 1, "it is one setting");
        ledger.restore();
        assert_eq!(fs::read_to_string(&setting).expect("a file"), "a");
        fs::remove_dir_all(directory).expect("made above");
    }

    #[test]
    fn next_run_puts_back_what_a_killed_one_left() {
        let directory = directory("ledger");
        let setting = directory.join("setting");
        fs::write(&setting, "old").expect("a file");
        let mut ledger = open(&directory).expect("a ledger");
        ledger.set(&setting, "new").expect("a file");
        // As SIGKILL would: the lock is gone, nothing was put back.
        drop(ledger);
        assert_eq!(fs::read_to_string(&setting).expect("a file"), "new");
        let ledger = open(&directory).expect("a ledger");
        assert_eq!(fs::read_to_string(&setting).expect("a file"), "old");
        assert!(ledger.before.is_empty());
        fs::remove_dir_all(directory).expect("made above");
    }
}

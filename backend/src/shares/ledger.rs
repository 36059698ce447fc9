//! The ledger: a directory with one small file for each daemon.
//!
//! A daemon writes only its own file, and holds a lock on it that the kernel drops when the daemon
//! ends. What others wrote is read with care: a file that is damaged, of another version or beyond
//! all measure counts for nothing.

use crate::backing::{lock_for_life, lock_is_held};
use std::collections::hash_map::RandomState;
use std::fs::{File, OpenOptions, Permissions};
use std::hash::{BuildHasher, Hasher};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Largest weight.
pub const WEIGHT_MAX: u64 = 10_000;
/// Suffix of the files of members.
const SUFFIX: &str = "share";
/// Most members that are considered, and most files among which they are looked for: bounds the
/// cost of a look.
const MEMBERS_MAX: usize = 1024;
const FILES_MAX: usize = 16 * MEMBERS_MAX;
/// Begins every file; its last digits are the version of the format.
const MAGIC: u64 = u64::from_le_bytes(*b"gemini01");
/// Words of a file: magic, weight, two parts, checksum.
const WORDS: usize = 7;
const LENGTH: usize = WORDS * 8;

/// What one daemon tells about one thing that is shared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// The most that it could use.
    pub demand: u64,
    /// What it has, or has set apart for itself.
    pub claim: u64,
}

/// What one daemon tells the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Its weight, 1 to [`WEIGHT_MAX`].
    pub weight: u64,
    /// Bytes of huge pages.
    pub huge: Part,
    /// Bytes copied a second.
    pub copy: Part,
}

fn checksum(words: &[u64]) -> u64 {
    // FNV-1a, word by word: against torn and damaged files, not against forgers.
    words.iter().fold(0xcbf2_9ce4_8422_2325, |sum, word| {
        (sum ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(17)
    })
}

impl Entry {
    fn encode(&self) -> [u8; LENGTH] {
        let mut words = [
            MAGIC,
            self.weight,
            self.huge.demand,
            self.huge.claim,
            self.copy.demand,
            self.copy.claim,
            0,
        ];
        words[WORDS - 1] = checksum(&words[..WORDS - 1]);
        let mut bytes = [0; LENGTH];
        for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    fn decode(bytes: &[u8; LENGTH]) -> Option<Self> {
        let mut words = [0; WORDS];
        for (word, place) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(place.try_into().ok()?);
        }
        let [magic, weight, huge_demand, huge_claim, copy_demand, copy_claim, sum] = words;
        let sound = magic == MAGIC
            && sum == checksum(&words[..WORDS - 1])
            && (1..=WEIGHT_MAX).contains(&weight);
        sound.then_some(Self {
            weight,
            huge: Part { demand: huge_demand, claim: huge_claim },
            copy: Part { demand: copy_demand, claim: copy_claim },
        })
    }
}

/// Our place in the ledger.
#[derive(Debug)]
pub struct Ledger {
    directory: PathBuf,
    path: PathBuf,
    file: File,
    inode: u64,
}

impl Ledger {
    /// Enters the directory.
    ///
    /// # Errors
    /// If no file can be made or locked there.
    pub fn enter(directory: &Path, entry: &Entry) -> io::Result<Self> {
        let name = format!("{:016x}", RandomState::new().build_hasher().finish());
        let hidden = directory.join(format!(".{name}"));
        let path = directory.join(name).with_extension(SUFFIX);
        // Nobody else can lock it before us. Locked and written before anybody sees it: what is
        // seen unlocked was left behind.
        let file =
            OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&hidden)?;
        let entered = lock_for_life(&file)
            .and_then(|()| file.write_all_at(&entry.encode(), 0))
            .and_then(|()| file.set_permissions(Permissions::from_mode(0o644)))
            .and_then(|()| std::fs::rename(&hidden, &path));
        if let Err(error) = entered {
            let _ = std::fs::remove_file(&hidden);
            return Err(error);
        }
        let inode = file.metadata()?.ino();
        Ok(Self { directory: directory.to_owned(), path, file, inode })
    }

    /// Tells what is new about us; enters again where somebody removed our file.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn tell(&mut self, entry: &Entry) -> io::Result<()> {
        if self.file.metadata()?.nlink() == 0 {
            *self = Self::enter(&self.directory.clone(), entry)?;
        }
        self.file.write_all_at(&entry.encode(), 0)
    }

    /// What the others tell. Files that daemons left behind are removed.
    ///
    /// # Errors
    /// If the directory cannot be read. A file that cannot be counts for nothing.
    pub fn others(&self) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        let is_member = |path: &PathBuf| path.extension().is_some_and(|suffix| suffix == SUFFIX);
        let found = std::fs::read_dir(&self.directory)?.take(FILES_MAX);
        let paths: Vec<PathBuf> = found
            .map(|found| found.map(|entry| entry.path()))
            .filter(|path| path.as_ref().map_or(true, is_member))
            .take(MEMBERS_MAX)
            .collect::<io::Result<_>>()?;
        for path in paths {
            match read(&path, self.inode) {
                Ok(entry) => entries.extend(entry),
                // It left meanwhile.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => log::debug!("cannot read {}: {error}", path.display()),
            }
        }
        Ok(entries)
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        if self.file.metadata().is_ok_and(|metadata| metadata.nlink() > 0) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Whether a file has the length and the first word of a member's.
fn is_of_the_ledger(file: &File) -> bool {
    let mut magic = [0; 8];
    file.metadata().is_ok_and(|metadata| metadata.len() == LENGTH as u64)
        && file.read_exact_at(&mut magic, 0).is_ok()
        && magic == MAGIC.to_le_bytes()
}

/// Reads a member's file; `None` if it is ours, left behind, or not sound.
fn read(path: &Path, own: u64) -> io::Result<Option<Entry>> {
    // Whatever lies there must not make us wait.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.ino() == own {
        return Ok(None);
    }
    if !lock_is_held(&file)? {
        // Only what is of the ledger, and where the directory lets us.
        if is_of_the_ledger(&file) {
            let _ = std::fs::remove_file(path);
        }
        return Ok(None);
    }
    let mut bytes = [0; LENGTH];
    // It may be about to be written: once more.
    for _ in 0..3 {
        match file.read_exact_at(&mut bytes, 0) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error),
        }
        if let Some(entry) = Entry::decode(&bytes) {
            return Ok(Some(entry));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(weight: u64, claim: u64) -> Entry {
        Entry { weight, huge: Part { demand: 7, claim }, copy: Part::default() }
    }

    #[test]
    fn members_see_each_other_until_they_leave() {
        let directory = tempfile::tempdir().unwrap();
        let mut one = Ledger::enter(directory.path(), &entry(1, 10)).unwrap();
        assert_eq!(one.others().unwrap(), []);
        let other = Ledger::enter(directory.path(), &entry(2, 20)).unwrap();
        assert_eq!(one.others().unwrap(), [entry(2, 20)]);
        assert_eq!(other.others().unwrap(), [entry(1, 10)]);
        one.tell(&entry(3, 30)).unwrap();
        assert_eq!(other.others().unwrap(), [entry(3, 30)]);
        drop(one);
        assert_eq!(other.others().unwrap(), []);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_a_dead_daemon_left_behind_counts_for_nothing_and_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let left = directory.path().join("0123456789abcdef.share");
        std::fs::write(&left, entry(5, 50).encode()).unwrap();
        let one = Ledger::enter(directory.path(), &entry(1, 10)).unwrap();
        assert_eq!(one.others().unwrap(), []);
        assert!(!left.exists());
    }

    #[test]
    fn what_is_none_of_the_ledgers_files_stays() {
        let directory = tempfile::tempdir().unwrap();
        let other = directory.path().join("somebodys.share");
        std::fs::write(&other, [7; LENGTH]).unwrap();
        let one = Ledger::enter(directory.path(), &entry(1, 10)).unwrap();
        assert_eq!(one.others().unwrap(), []);
        assert!(other.exists());
    }

    #[test]
    fn whoever_lost_its_file_enters_again() {
        let directory = tempfile::tempdir().unwrap();
        let one = Ledger::enter(directory.path(), &entry(1, 10)).unwrap();
        let mut other = Ledger::enter(directory.path(), &entry(2, 20)).unwrap();
        std::fs::remove_file(&other.path).unwrap();
        assert_eq!(one.others().unwrap(), []);
        other.tell(&entry(2, 21)).unwrap();
        assert_eq!(one.others().unwrap(), [entry(2, 21)]);
    }

    #[test]
    fn hostile_files_count_for_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name).with_extension(SUFFIX);
        let one = Ledger::enter(directory.path(), &entry(1, 10)).unwrap();
        // Held by a lock, as those of the living are, and wrong.
        let mut held = Vec::new();
        let mut flipped = entry(1, 10).encode();
        flipped[20] ^= 4;
        let too_heavy = entry(WEIGHT_MAX + 1, 0).encode();
        let weightless = entry(0, 0).encode();
        let contents: [&[u8]; 6] = [&[], &[1], &flipped, &too_heavy, &weightless, &[0xff; 1 << 16]];
        for (number, bytes) in contents.iter().enumerate() {
            let path = at(&format!("bad{number}"));
            std::fs::write(&path, bytes).unwrap();
            let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
            lock_for_life(&file).unwrap();
            held.push(file);
        }
        std::fs::create_dir(at("directory")).unwrap();
        std::os::unix::fs::symlink("/dev/zero", at("link")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        assert_eq!(one.others().unwrap(), []);
        let honest = Ledger::enter(directory.path(), &entry(2, 20)).unwrap();
        assert_eq!(one.others().unwrap(), [entry(2, 20)]);
        drop(honest);
    }

    proptest! {
        #[test]
        fn what_is_told_is_read(weight in 1..=WEIGHT_MAX, a: u64, b: u64, c: u64, d: u64) {
            let (huge, copy) = (Part { demand: a, claim: b }, Part { demand: c, claim: d });
            let entry = Entry { weight, huge, copy };
            prop_assert_eq!(Entry::decode(&entry.encode()), Some(entry));
        }

        #[test]
        fn a_changed_bit_is_noticed(weight in 1..=WEIGHT_MAX, a: u64, bit in 0usize..LENGTH * 8) {
            let mut bytes = entry(weight, a).encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(Entry::decode(&bytes), None);
        }
    }
}

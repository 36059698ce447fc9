//! Requests to a cache: random keys, 10 reads of several keys to a write.

use anyhow::ensure;
use gemini_guest::workload::word;

use crate::load::Load;
use crate::rng::Rng;
use crate::Options;

/// Length of every value in bytes.
pub const VALUE: usize = 1000;

/// Keys of one read: what the server does for them is to outweigh the two
/// switches between processes that every request costs.
const KEYS: usize = 10;

/// Writes that are sent before the first one's answer is waited for, while data
/// is loaded.
const PIPELINE: u64 = 64;

/// A connection to a server. Answers come in the order of what was sent.
pub trait Store {
    /// Sends a write.
    fn send_set(&mut self, key: &str, value: &[u8]) -> anyhow::Result<()>;

    /// Waits for the answer to a write.
    fn wait_set(&mut self) -> anyhow::Result<()>;

    /// Reads the values of some keys with one request; fails if one is missing.
    fn get(&mut self, keys: &[String]) -> anyhow::Result<Vec<Vec<u8>>>;

    /// The server's process.
    fn pid(&self) -> u32;

    /// The server and its version.
    fn version(&self) -> String;
}

/// A server that has its data.
pub struct KeyValue<S> {
    store: S,
    keys: u64,
}

impl<S: Store> KeyValue<S> {
    /// Fills a server with keys that take `bytes` each.
    ///
    /// # Errors
    /// If the server fails.
    pub fn fill(mut store: S, options: Options, bytes: u64) -> anyhow::Result<Self> {
        let keys = (options.mib << 20) / bytes;
        let mut sent = 0;
        for done in 0..keys {
            while sent < keys.min(done + PIPELINE) {
                store.send_set(&key(sent), &value(word(options.seed, sent)))?;
                sent += 1;
            }
            store.wait_set()?;
        }
        Ok(KeyValue { store, keys })
    }
}

impl<S: Store> Load for KeyValue<S> {
    fn unit(&self) -> &'static str {
        "requests"
    }

    fn version(&self) -> String {
        self.store.version()
    }

    fn server(&self) -> Option<u32> {
        Some(self.store.pid())
    }

    fn operate(&mut self, rng: &mut Rng) -> anyhow::Result<u64> {
        if rng.below(11) == 0 {
            self.store.send_set(&key(rng.below(self.keys)), &value(rng.any()))?;
            self.store.wait_set()?;
            return Ok(0);
        }
        let keys: Vec<String> = (0..KEYS).map(|_| key(rng.below(self.keys))).collect();
        let mut digest = 0;
        for value in self.store.get(&keys)? {
            ensure!(value.len() == VALUE, "a value has {} bytes", value.len());
            let (first, last) = (&value[..8], &value[VALUE - 8..]);
            ensure!(first == last, "a value is torn");
            digest = first.iter().fold(digest, |digest, &byte| word(digest, byte.into()));
        }
        Ok(digest)
    }
}

fn key(number: u64) -> String {
    format!("key:{number:012}")
}

/// A value that begins and ends alike.
fn value(number: u64) -> [u8; VALUE] {
    let mut value = [b'x'; VALUE];
    value[..8].copy_from_slice(&number.to_be_bytes());
    value[VALUE - 8..].copy_from_slice(&number.to_be_bytes());
    value
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, VecDeque};

    use super::*;

    /// A server that keeps everything.
    #[derive(Default)]
    struct Map {
        values: BTreeMap<String, Vec<u8>>,
        unanswered: VecDeque<()>,
    }

    impl Store for Map {
        fn send_set(&mut self, key: &str, value: &[u8]) -> anyhow::Result<()> {
            self.unanswered.push_back(());
            self.values.insert(key.into(), value.into());
            Ok(())
        }
        fn wait_set(&mut self) -> anyhow::Result<()> {
            ensure!(self.unanswered.pop_front().is_some(), "nothing was sent");
            Ok(())
        }
        fn get(&mut self, keys: &[String]) -> anyhow::Result<Vec<Vec<u8>>> {
            Ok(keys.iter().map(|key| self.values[key].clone()).collect())
        }
        fn pid(&self) -> u32 {
            1
        }
        fn version(&self) -> String {
            String::new()
        }
    }

    #[test]
    fn every_key_is_there_and_every_write_was_answered() {
        let options = Options { mib: 1, seed: 1, operations: 1 };
        let mut filled = KeyValue::fill(Map::default(), options, 1024).expect("a map");
        assert_eq!((filled.keys, filled.store.values.len()), (1024, 1024));
        assert!(filled.store.unanswered.is_empty());
        let mut rng = Rng::new(1);
        for _ in 0..100 {
            filled.operate(&mut rng).expect("a whole value");
        }
        for value in filled.store.values.values_mut() {
            value[0] ^= 1;
        }
        assert!((0..10).any(|_| filled.operate(&mut rng).is_err()));
    }
}

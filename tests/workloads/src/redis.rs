//! redis-server, through a Unix socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{bail, ensure, Context};

use crate::key_value::{KeyValue, Store};
use crate::server::Server;
use crate::Options;

const SOCKET: &str = "/tmp/redis.sock";

/// What redis-server needs for a key and its value, in bytes.
const PER_KEY: u64 = 1110;

/// A connection to redis-server.
pub struct Redis {
    server: Server,
    stream: BufReader<UnixStream>,
    version: String,
}

/// Starts the server and fills it.
///
/// # Errors
/// If the server fails.
pub fn start(options: Options) -> anyhow::Result<KeyValue<Redis>> {
    // Nothing is kept on a disk, so that it never forks, which is why it would do without huge
    // pages.
    #[rustfmt::skip]
    let arguments = [
        "--port", "0", "--unixsocket", SOCKET, "--save", "", "--appendonly", "no",
        "--disable-thp", "no",
    ];
    let mut server = Server::start("/usr/bin/redis-server", &arguments)?;
    let stream = BufReader::new(server.connect(Path::new(SOCKET))?);
    let mut redis = Redis { server, stream, version: String::new() };
    redis.send(&[b"INFO", b"server"])?;
    let information = redis.bulk()?;
    let version = String::from_utf8_lossy(&information)
        .lines()
        .find_map(|line| line.strip_prefix("redis_version:").map(str::to_owned))
        .context("redis-server does not tell its version")?;
    redis.version = format!("redis {version}");
    KeyValue::fill(redis, options, PER_KEY)
}

impl Redis {
    fn send(&mut self, words: &[&[u8]]) -> anyhow::Result<()> {
        let mut text = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            text.extend(format!("${}\r\n", word.len()).as_bytes());
            text.extend(*word);
            text.extend(b"\r\n");
        }
        self.stream.get_mut().write_all(&text).context("redis-server is gone")
    }

    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        self.stream.read_line(&mut line).context("redis-server is gone")?;
        ensure!(line.ends_with("\r\n"), "redis-server is gone");
        Ok(line.trim_end().to_owned())
    }

    fn bulk(&mut self) -> anyhow::Result<Vec<u8>> {
        let line = self.line()?;
        let Some(length) = line.strip_prefix('$').and_then(|text| text.parse::<usize>().ok())
        else {
            bail!("redis-server says {line}");
        };
        let mut value = vec![0; length + 2];
        self.stream.read_exact(&mut value).context("redis-server is gone")?;
        value.truncate(length);
        Ok(value)
    }
}

impl Store for Redis {
    fn send_set(&mut self, key: &str, value: &[u8]) -> anyhow::Result<()> {
        self.send(&[b"SET", key.as_bytes(), value])
    }

    fn wait_set(&mut self) -> anyhow::Result<()> {
        let line = self.line()?;
        ensure!(line == "+OK", "redis-server says {line}");
        Ok(())
    }

    fn get(&mut self, keys: &[String]) -> anyhow::Result<Vec<Vec<u8>>> {
        let mut words = vec![b"MGET".as_slice()];
        words.extend(keys.iter().map(String::as_bytes));
        self.send(&words)?;
        let line = self.line()?;
        ensure!(line == format!("*{}", keys.len()), "redis-server says {line}");
        keys.iter().map(|_| self.bulk()).collect()
    }

    fn pid(&self) -> u32 {
        self.server.pid()
    }

    fn version(&self) -> String {
        self.version.clone()
    }
}

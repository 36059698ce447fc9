//! memcached, through a Unix socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{bail, ensure, Context};

use crate::key_value::{KeyValue, Store};
use crate::server::Server;
use crate::Options;

const SOCKET: &str = "/tmp/memcached.sock";

/// What memcached takes for a key and its value in bytes: the size of their slab
/// class.
const PER_KEY: u64 = 1184;

/// A connection to memcached.
pub struct Memcached {
    server: Server,
    stream: BufReader<UnixStream>,
    version: String,
}

/// Starts the server and fills it.
///
/// # Errors
/// If the server fails.
pub fn start(options: Options) -> anyhow::Result<KeyValue<Memcached>> {
    // Enough that nothing is evicted.
    let limit = (options.mib + options.mib / 8 + 64).to_string();
    let arguments = ["-u", "root", "-s", SOCKET, "-m", &limit, "-t", "1"];
    let mut server = Server::start("/usr/bin/memcached", &arguments)?;
    let stream = BufReader::new(server.connect(Path::new(SOCKET))?);
    let mut memcached = Memcached { server, stream, version: String::new() };
    memcached.send(b"version\r\n")?;
    let line = memcached.line()?;
    let version = line.strip_prefix("VERSION ");
    let version = version.with_context(|| format!("memcached says {line}"))?;
    memcached.version = format!("memcached {version}");
    KeyValue::fill(memcached, options, PER_KEY)
}

impl Memcached {
    fn send(&mut self, text: &[u8]) -> anyhow::Result<()> {
        self.stream.get_mut().write_all(text).context("memcached is gone")
    }

    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        self.stream.read_line(&mut line).context("memcached is gone")?;
        ensure!(line.ends_with("\r\n"), "memcached is gone");
        Ok(line.trim_end().to_owned())
    }

    /// One of the values that a read is answered with.
    fn value(&mut self) -> anyhow::Result<Vec<u8>> {
        // VALUE KEY FLAGS LENGTH
        let line = self.line()?;
        let Some(length) = line.split(' ').nth(3).and_then(|text| text.parse::<usize>().ok())
        else {
            bail!("memcached says {line}");
        };
        let mut value = vec![0; length + 2];
        self.stream.read_exact(&mut value).context("memcached is gone")?;
        value.truncate(length);
        Ok(value)
    }
}

impl Store for Memcached {
    fn send_set(&mut self, key: &str, value: &[u8]) -> anyhow::Result<()> {
        let mut text = format!("set {key} 0 0 {}\r\n", value.len()).into_bytes();
        text.extend(value);
        text.extend(b"\r\n");
        self.send(&text)
    }

    fn wait_set(&mut self) -> anyhow::Result<()> {
        let line = self.line()?;
        ensure!(line == "STORED", "memcached says {line}");
        Ok(())
    }

    fn get(&mut self, keys: &[String]) -> anyhow::Result<Vec<Vec<u8>>> {
        self.send(format!("get {}\r\n", keys.join(" ")).as_bytes())?;
        let values = keys.iter().map(|_| self.value()).collect::<anyhow::Result<_>>()?;
        let line = self.line()?;
        ensure!(line == "END", "memcached says {line}");
        Ok(values)
    }

    fn pid(&self) -> u32 {
        self.server.pid()
    }

    fn version(&self) -> String {
        self.version.clone()
    }
}

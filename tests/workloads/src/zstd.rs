//! The compressor `zstd`, with a stream of text through its pipes.

use std::io::{BufReader, Read, Write};
use std::process::{ChildStdin, ChildStdout, Command};
use std::thread::JoinHandle;

use anyhow::{ensure, Context};
use gemini_guest::workload::word;

use crate::load::Load;
use crate::rng::Rng;
use crate::server::Server;
use crate::Options;

const PROGRAM: &str = "/usr/bin/zstd";

/// Bytes of one operation.
const CHUNK: usize = 128 << 10;

/// Different words in the text.
const WORDS: u64 = 20_000;

/// The text, and the compressor of this phase.
pub struct Zstd {
    version: String,
    text: Vec<u8>,
    stream: Option<Stream>,
}

struct Stream {
    server: Server,
    input: ChildStdin,
    /// Ends with the compressor's output: a number that depends on all of it.
    output: JoinHandle<anyhow::Result<u64>>,
}

impl Zstd {
    /// Makes a text of `options.mib` MiB.
    ///
    /// # Errors
    /// If there is no `zstd`.
    pub fn new(options: Options) -> anyhow::Result<Self> {
        let output = Command::new(PROGRAM).args(["-q", "-q", "--version"]).output();
        let output = output.with_context(|| format!("cannot start {PROGRAM}"))?;
        let version = format!("zstd {}", String::from_utf8_lossy(&output.stdout).trim());
        let size = usize::try_from(options.mib << 20)?;
        let mut rng = Rng::new(options.seed);
        let mut text = Vec::with_capacity(size + 32);
        while text.len() < size {
            // Words of some letters that follow from their number.
            let number = rng.skewed(WORDS);
            let letters = word(options.seed, number);
            for at in 0..3 + letters % 8 {
                text.push(b'a' + u8::try_from((letters >> (8 + 5 * at)) % 26).unwrap_or(0));
            }
            text.push(b' ');
        }
        text.truncate(size);
        Ok(Zstd { version, text, stream: None })
    }
}

impl Load for Zstd {
    fn unit(&self) -> &'static str {
        "chunks of 128 KiB"
    }

    fn version(&self) -> String {
        self.version.clone()
    }

    fn server(&self) -> Option<u32> {
        None
    }

    fn begin(&mut self) -> anyhow::Result<()> {
        let arguments = ["-3", "--single-thread", "--quiet", "--stdout", "-"];
        let (server, input, output) = Server::piped(PROGRAM, &arguments)?;
        let output = std::thread::Builder::new()
            .name("output".into())
            .spawn(move || digest(output))
            .context("cannot start a thread")?;
        self.stream = Some(Stream { server, input, output });
        Ok(())
    }

    fn operate(&mut self, rng: &mut Rng) -> anyhow::Result<u64> {
        let stream = self.stream.as_mut().context("no phase has begun")?;
        let chunks = self.text.len() / CHUNK;
        let start = usize::try_from(rng.below(chunks as u64))? * CHUNK;
        let chunk = &self.text[start..start + CHUNK];
        stream.input.write_all(chunk).context("zstd does not listen")?;
        Ok(0)
    }

    fn finish(&mut self) -> anyhow::Result<u64> {
        let Stream { server, input, output } = self.stream.take().context("no phase has begun")?;
        drop(input);
        let digest = output.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        server.wait()?;
        ensure!(digest != 0, "zstd has written nothing");
        Ok(digest)
    }
}

/// Reads all output. 0 if there is none.
fn digest(output: ChildStdout) -> anyhow::Result<u64> {
    let mut output = BufReader::new(output);
    let mut buffer = vec![0; CHUNK];
    let mut digest = 0;
    loop {
        let count = output.read(&mut buffer).context("cannot read what zstd writes")?;
        if count == 0 {
            return Ok(digest);
        }
        // Byte by byte: how the output is cut into reads must not matter.
        for &byte in &buffer[..count] {
            digest = (digest ^ u64::from(byte)).wrapping_add(1).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}

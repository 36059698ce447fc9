//! A program that answers lines on its standard output.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::process::{ChildStdin, ChildStdout};

use anyhow::{bail, Context};

use crate::server::Server;

/// A running program, and its pipes.
pub struct Lines {
    server: Server,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Lines {
    /// Starts a program.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(program: &str, arguments: &[impl AsRef<OsStr>]) -> anyhow::Result<Self> {
        let (server, input, output) = Server::piped(program, arguments)?;
        Ok(Lines { server, input, output: BufReader::new(output) })
    }

    /// Writes a text that ends with a line's end.
    ///
    /// # Errors
    /// If the program has ended.
    pub fn send(&mut self, text: &str) -> anyhow::Result<()> {
        self.input.write_all(text.as_bytes()).context("the program does not listen")
    }

    /// The next line, without its end.
    ///
    /// # Errors
    /// If the program has ended.
    pub fn hear(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line).context("cannot hear the program")?;
        if line.is_empty() {
            bail!("the program has ended");
        }
        Ok(line.trim_end().to_owned())
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.server.pid()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_back_until_the_program_ends() {
        let mut cat = Lines::start("head", &["-n", "1"]).expect("every system has it");
        cat.send("one\n").expect("it listens");
        assert_eq!(cat.hear().expect("a line"), "one");
        assert!(cat.hear().is_err());
    }
}

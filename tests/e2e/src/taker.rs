//! A host program that takes memory piece by piece, as it is told to.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{ensure, Context};

/// The program's side: takes as many bytes as each line of its input says, and
/// answers each when it has them.
///
/// # Errors
/// If its input is no number, or its parent is gone.
pub fn run() -> anyhow::Result<()> {
    let mut taken: Vec<Vec<u8>> = Vec::new();
    for line in std::io::stdin().lines() {
        let bytes: usize = line?.trim().parse().context("a number of bytes a line")?;
        // Not zero, or the kernel could do with less.
        taken.push(vec![1; bytes]);
        println!("{}", taken.len());
    }
    Ok(())
}

/// The running program, killed on drop.
#[derive(Debug)]
pub struct Taker {
    child: Child,
    ask: ChildStdin,
    answers: BufReader<ChildStdout>,
    taken: u64,
}

impl Taker {
    /// Starts it.
    ///
    /// # Errors
    /// If this program cannot be started once more.
    pub fn start() -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("where is this program?")?;
        let mut child = Command::new(program)
            .arg("take-memory")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start a program that takes memory")?;
        let ask = child.stdin.take().context("its input is a pipe")?;
        let answers = BufReader::new(child.stdout.take().context("its output is a pipe")?);
        Ok(Taker { child, ask, answers, taken: 0 })
    }

    /// Has it take more.
    ///
    /// # Errors
    /// If it was killed over it.
    pub fn take(&mut self, bytes: u64) -> anyhow::Result<()> {
        writeln!(self.ask, "{bytes}").context("the program that takes memory is gone")?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        ensure!(!line.is_empty(), "the program that takes memory is gone");
        self.taken += bytes;
        Ok(())
    }

    /// Bytes that it has.
    #[must_use]
    pub fn taken(&self) -> u64 {
        self.taken
    }
}

impl Drop for Taker {
    fn drop(&mut self) {
        // It may have been killed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

//! Processes of their own for what must live and end like a program: both ends.
//!
//! The agent starts this program again and writes a [`Task`] in one line; the
//! worker does it, answers in one line, and then answers one [`Question`] a
//! line until its input ends.

use std::io::{self, BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, Context};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::protocol::{Answer, Question, Task};
use crate::{fragment, image, program, sparse, storm};

/// What a worker has made and holds until it ends.
pub trait Holder {
    /// Answers a question about it.
    ///
    /// # Errors
    /// If it has no answer to that.
    fn ask(&mut self, question: Question) -> anyhow::Result<Value>;
}

/// How long a worker may take to end, with memory to give back.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// A running worker, as the agent has it. Dropping it ends it.
pub struct Worker {
    child: Child,
    /// Always there until the worker is to end.
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Worker {
    /// Starts a process that does `task`; [`Worker::answer`] tells how it went.
    ///
    /// # Errors
    /// If the process cannot be started.
    pub fn start(task: &Task) -> anyhow::Result<Self> {
        let mut child = Command::new("/proc/self/exe")
            .arg("work")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start a worker")?;
        let input = child.stdin.take().context("a worker has no input")?;
        let output = child.stdout.take().context("a worker has no output")?;
        let mut worker = Worker { child, input: Some(input), output: BufReader::new(output) };
        worker.tell(&serde_json::to_string(task)?)?;
        Ok(worker)
    }

    /// Waits for the worker's next answer.
    ///
    /// # Errors
    /// What the worker says, or that it has ended.
    pub fn answer(&mut self) -> anyhow::Result<Value> {
        let mut line = String::new();
        self.output.read_line(&mut line).context("cannot hear the worker")?;
        if line.is_empty() {
            let status = self.child.wait().context("cannot wait for the worker")?;
            bail!("the worker ended: {status}");
        }
        let answer: Answer = serde_json::from_str(&line)
            .with_context(|| format!("the worker answers in another form: {line}"))?;
        match answer.error {
            Some(error) => bail!(error),
            None => Ok(answer.ok.unwrap_or(Value::Null)),
        }
    }

    /// Asks about what the worker holds.
    ///
    /// # Errors
    /// As [`Worker::answer`].
    pub fn ask(&mut self, question: Question) -> anyhow::Result<Value> {
        self.tell(&serde_json::to_string(&question)?)?;
        self.answer()
    }

    fn tell(&mut self, line: &str) -> anyhow::Result<()> {
        let input = self.input.as_mut().context("the worker is to end")?;
        writeln!(input, "{line}").context("the worker does not listen")
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // The end of its input is what a worker ends at.
        self.input = None;
        let started = Instant::now();
        while started.elapsed() < END_TIMEOUT {
            match self.child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(2)),
                Ok(Some(_)) => return,
                Err(error) => {
                    eprintln!("gemini-guest: cannot wait for a worker: {error}");
                    return;
                }
            }
        }
        eprintln!("gemini-guest: a worker does not end within {END_TIMEOUT:?}");
        // Fails only if the process has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The worker's end: serves the agent on standard input and output.
///
/// # Errors
/// If the agent is gone before it said what to do.
pub fn serve() -> anyhow::Result<()> {
    let mut input = BufReader::new(io::stdin());
    let Some(task) = read::<Task>(&mut input)? else {
        return Ok(());
    };
    let mut holder = match begin(task) {
        Ok((value, holder)) => {
            answer(Ok(value))?;
            holder
        }
        Err(error) => return answer(Err(error)),
    };
    while let Some(question) = read::<Question>(&mut input)? {
        answer(holder.ask(question))?;
    }
    Ok(())
}

fn begin(task: Task) -> anyhow::Result<(Value, Box<dyn Holder>)> {
    Ok(match task {
        Task::Fragment(options) => {
            let (result, fragments) = fragment::start(&options)?;
            (serde_json::to_value(result)?, Box::new(fragments))
        }
        Task::Program(options) => {
            let (result, program) = program::start(&options)?;
            (serde_json::to_value(result)?, Box::new(program))
        }
        Task::Storm(options) => {
            let (result, storm) = storm::start(&options)?;
            (serde_json::to_value(result)?, Box::new(storm))
        }
        Task::Workload(options) => {
            let (result, running) = image::start(&options)?;
            (serde_json::to_value(result)?, Box::new(running))
        }
        Task::Sparse(options) => {
            let (result, growing) = sparse::start(&options)?;
            (serde_json::to_value(result)?, Box::new(growing))
        }
    })
}

fn read<T: DeserializeOwned>(input: &mut impl BufRead) -> anyhow::Result<Option<T>> {
    let mut line = String::new();
    if input.read_line(&mut line).context("cannot hear the agent")? == 0 {
        return Ok(None);
    }
    serde_json::from_str(&line).map(Some).with_context(|| format!("the agent says {line}"))
}

fn answer(result: anyhow::Result<Value>) -> anyhow::Result<()> {
    let answer = match result {
        Ok(value) => Answer { id: 0, ok: Some(value), error: None },
        Err(error) => Answer { id: 0, ok: None, error: Some(format!("{error:#}")) },
    };
    let mut output = io::stdout().lock();
    writeln!(output, "{}", serde_json::to_string(&answer)?)?;
    output.flush().context("the agent does not listen")
}

/// Free memory of this machine in bytes.
///
/// # Errors
/// If the kernel does not tell.
pub fn free_memory() -> anyhow::Result<u64> {
    // SAFETY: all zeros is a valid value of this plain structure.
    let mut info: libc::sysinfo = unsafe { std::mem::zeroed() };
    // SAFETY: `info` is a valid place for the answer.
    if unsafe { libc::sysinfo(&mut info) } != 0 {
        return Err(io::Error::last_os_error()).context("sysinfo fails");
    }
    Ok(info.freeram * u64::from(info.mem_unit))
}

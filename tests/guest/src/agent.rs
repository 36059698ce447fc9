//! Does what the host asks for over the channel.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command as Process, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{bail, Context};
use serde::Serialize;
use serde_json::Value;

use crate::protocol::{Answer, Command, Filled, Output, Pong, Request, Task, PORT_NAME};
use crate::worker::Worker;
use crate::workload::{Churn, Memory};
use crate::{blocks, buddy, kernel};

/// How long the port may take to appear after process 1 started.
const PORT_TIMEOUT: Duration = Duration::from_secs(20);

/// What outlives a single request.
#[derive(Default)]
struct State {
    memory: Mutex<HashMap<String, Arc<Mutex<Memory>>>>,
    churns: Mutex<HashMap<String, Churn>>,
    workers: Mutex<HashMap<String, Arc<Mutex<Worker>>>>,
}

/// Serves the host until the port is gone.
///
/// # Errors
/// If the port does not appear or fails.
pub fn run() -> anyhow::Result<()> {
    let path = find_port()?;
    let port = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    let writer = Arc::new(Mutex::new(port.try_clone().context("cannot copy the port")?));
    let state = Arc::new(State::default());
    let mut reader = BufReader::new(port);
    let mut line = String::new();
    loop {
        line.clear();
        let count = reader.read_line(&mut line).context("the port fails")?;
        if count == 0 {
            // The host closed its side; it may come back.
            std::thread::sleep(Duration::from_millis(100));
            continue;
        }
        match serde_json::from_str::<Request>(&line) {
            Ok(request) => {
                let (state, writer) = (Arc::clone(&state), Arc::clone(&writer));
                std::thread::Builder::new()
                    .name("request".into())
                    .spawn(move || {
                        let result = perform(&state, request.command);
                        answer(&writer, request.id, result);
                    })
                    .context("cannot start a thread")?;
            }
            Err(error) => answer(&writer, 0, Err(anyhow::anyhow!("bad request: {error}"))),
        }
    }
}

fn find_port() -> anyhow::Result<PathBuf> {
    let deadline = Instant::now() + PORT_TIMEOUT;
    loop {
        if let Ok(entries) = std::fs::read_dir("/sys/class/virtio-ports") {
            for entry in entries.flatten() {
                let name = std::fs::read_to_string(entry.path().join("name")).unwrap_or_default();
                if name.trim_end() == PORT_NAME {
                    return Ok(PathBuf::from("/dev").join(entry.file_name()));
                }
            }
        }
        if Instant::now() > deadline {
            bail!("this guest has no virtio-serial port named {PORT_NAME}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn answer(writer: &Mutex<File>, id: u64, result: anyhow::Result<Value>) {
    let answer = match result {
        Ok(value) => Answer { id, ok: Some(value), error: None },
        Err(error) => Answer { id, ok: None, error: Some(format!("{error:#}")) },
    };
    let Ok(mut text) = serde_json::to_string(&answer) else {
        return;
    };
    text.push('\n');
    let mut port = writer.lock().unwrap_or_else(PoisonError::into_inner);
    if let Err(error) = port.write_all(text.as_bytes()) {
        eprintln!("gemini-guest: cannot answer: {error}");
    }
}

fn value(result: impl Serialize) -> anyhow::Result<Value> {
    serde_json::to_value(result).context("the answer is no JSON")
}

fn perform(state: &State, command: Command) -> anyhow::Result<Value> {
    match command {
        Command::Ping => value(ping()?),
        Command::Exec { command } => value(exec(&command)?),
        Command::LoadModule { path, parameters } => value(kernel::load_module(&path, &parameters)?),
        Command::UnloadModule { name } => value(kernel::unload_module(&name)?),
        Command::Fill { name, bytes, seed, pages } => {
            value(state.fill(name, || Memory::fill(bytes, seed, pages))?)
        }
        Command::FillShared { name, bytes, seed, pages } => {
            value(state.fill(name, || Memory::fill_shared(bytes, seed, pages))?)
        }
        Command::CountDirty { bytes, pages } => value(Memory::count_dirty(bytes, pages)?),
        Command::Collapse { name } => state.with_memory(&name, |memory| value(memory.collapse()?)),
        Command::BlocksOf { name } => state.with_memory(&name, |memory| value(memory.blocks()?)),
        Command::Read { name, reads, seed } => state.with_memory(&name, |memory| {
            let start = Instant::now();
            std::hint::black_box(memory.read_random(reads, seed));
            value(kernel::elapsed(start))
        }),
        Command::Verify { name } => state.with_memory(&name, |memory| value(memory.verify())),
        Command::Break { name, how, every } => {
            state.with_memory(&name, |memory| value(memory.break_up(how, every)?))
        }
        Command::Free { name } => {
            let memory = state.lock_memory().remove(&name);
            memory.with_context(|| format!("there is no memory named {name}"))?;
            Ok(Value::Null)
        }
        Command::StartChurn { name, bytes, seed } => {
            let mut churns = state.lock_churns();
            if churns.contains_key(&name) {
                bail!("there is a churn named {name} already");
            }
            churns.insert(name, Churn::start(bytes, seed)?);
            Ok(Value::Null)
        }
        Command::StopChurn { name } => {
            let churn = state.lock_churns().remove(&name);
            value(churn.with_context(|| format!("there is no churn named {name}"))?.stop()?)
        }
        Command::Start { name, task } => start_worker(state, name, &task),
        Command::Ask { name, question } => {
            let worker = state.lock_workers().get(&name).cloned();
            let worker = worker.with_context(|| format!("there is no process named {name}"))?;
            let mut worker = worker.lock().unwrap_or_else(PoisonError::into_inner);
            worker.ask(question)
        }
        Command::End { name } => {
            let worker = state.lock_workers().remove(&name);
            drop(worker.with_context(|| format!("there is no process named {name}"))?);
            Ok(Value::Null)
        }
        Command::Fragmentation => value(buddy::read()?),
        Command::Blocks => value(blocks::read()?),
        Command::Pages => value(blocks::pages()?),
        Command::Messages { since } => value(kernel::messages(since)?),
        Command::Memory => value(kernel::memory()?),
        Command::ReadFile { path } => {
            value(std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?)
        }
        Command::WriteFile { path, text } => {
            let mut file = OpenOptions::new()
                .write(true)
                .open(&path)
                .with_context(|| format!("cannot open {path}"))?;
            file.write_all(text.as_bytes()).with_context(|| format!("cannot write {path}"))?;
            Ok(Value::Null)
        }
    }
}

/// Starts a process and waits for its task; one that fails is gone.
fn start_worker(state: &State, name: String, task: &Task) -> anyhow::Result<Value> {
    if state.lock_workers().contains_key(&name) {
        bail!("there is a process named {name} already");
    }
    let mut worker = Worker::start(task)?;
    let result = worker.answer()?;
    state.lock_workers().insert(name, Arc::new(Mutex::new(worker)));
    Ok(result)
}

impl State {
    fn lock_workers(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<Mutex<Worker>>>> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_memory(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<Mutex<Memory>>>> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_churns(&self) -> std::sync::MutexGuard<'_, HashMap<String, Churn>> {
        self.churns.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Names the memory that `make` maps and fills.
    fn fill(
        &self,
        name: String,
        make: impl FnOnce() -> anyhow::Result<Memory>,
    ) -> anyhow::Result<Filled> {
        if self.lock_memory().contains_key(&name) {
            bail!("there is memory named {name} already");
        }
        let start = Instant::now();
        let memory = make()?;
        let filled =
            Filled { seconds: start.elapsed().as_secs_f64(), bytes: memory.bytes() as u64 };
        self.lock_memory().insert(name, Arc::new(Mutex::new(memory)));
        Ok(filled)
    }

    /// Runs `action` on the memory `name`, which stays locked meanwhile; other
    /// memory does not.
    fn with_memory<T>(
        &self,
        name: &str,
        action: impl FnOnce(&mut Memory) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let memory = self
            .lock_memory()
            .get(name)
            .cloned()
            .with_context(|| format!("there is no memory named {name}"))?;
        let mut memory = memory.lock().unwrap_or_else(PoisonError::into_inner);
        action(&mut memory)
    }
}

fn ping() -> anyhow::Result<Pong> {
    let uptime = std::fs::read_to_string("/proc/uptime").context("cannot read /proc/uptime")?;
    let uptime = uptime
        .split_whitespace()
        .next()
        .and_then(|word| word.parse().ok())
        .context("/proc/uptime holds no number")?;
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")
        .context("cannot read the kernel's release")?;
    Ok(Pong { uptime, release: release.trim().to_owned() })
}

fn exec(command: &str) -> anyhow::Result<Output> {
    // One pipe for both streams keeps their order; the shell joins them.
    let output = Process::new("/bin/sh")
        .args(["-c", &format!("exec 2>&1\n{command}")])
        .stdin(Stdio::null())
        .output()
        .context("cannot run /bin/sh")?;
    let code = output
        .status
        .code()
        .or_else(|| output.status.signal().map(|signal| 128 + signal))
        .unwrap_or(-1);
    Ok(Output { code, output: String::from_utf8_lossy(&output.stdout).into_owned() })
}

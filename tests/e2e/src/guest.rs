//! Tells the guest's agent what to do.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{bail, Context};
use gemini_guest::probe::Probe;
use gemini_guest::protocol::{
    Answer, BlockStates, Break, Broken, Churned, Command, Elapsed, Filled, Fragment, Fragmentation,
    Fragmented, Message, Messages, Output, PageRuns, PageSize, Pong, Program, ProgramBlocks,
    Question, Request, Sparse, Storm, Stormed, Task, Touched, Verified, DRIVER_NAME, DRIVER_PATH,
};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// How long an ordinary command may take, in an emulated guest on a busy
/// machine.
const TIMEOUT: Duration = Duration::from_secs(60);

/// How long a command may take that works through memory.
const LONG_TIMEOUT: Duration = Duration::from_secs(300);

/// What a shell says of a process that SIGKILL ended.
const KILLED: i32 = 128 + libc::SIGKILL;

/// Most severe level that is no reason to worry: 5 is a notice, 4 a warning.
const NOTICE: u8 = 5;

/// The channel to the agent of one guest. Several requests may be under way.
#[derive(Debug)]
pub struct Guest {
    writer: Mutex<UnixStream>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<Received>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
struct Received {
    next_id: u64,
    answers: HashMap<u64, Answer>,
    closed: bool,
}

/// Neighbouring blocks of which the driver knows the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DriverRun {
    /// Number of the first block.
    pub first: u64,
    /// Number of blocks.
    pub count: u64,
    /// Guest state by name.
    pub guest: String,
    /// Base pages in use, if counted; of a pinned block: whether the kernel works with it all
    /// the time.
    pub used: u64,
    /// Host state by name.
    pub host: String,
}

impl DriverRun {
    /// FIRST COUNT GUEST USED HOST FLAGS
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace();
        Some(DriverRun {
            first: words.next()?.parse().ok()?,
            count: words.next()?.parse().ok()?,
            guest: words.next()?.to_owned(),
            used: words.next()?.parse().ok()?,
            host: words.next()?.to_owned(),
        })
    }
}

/// A request that is under way.
#[derive(Debug)]
#[must_use]
pub struct Pending<T> {
    id: u64,
    shared: Arc<Shared>,
    result: std::marker::PhantomData<T>,
}

impl Guest {
    /// Connects to the QEMU end of the channel; the guest may still be booting.
    ///
    /// # Errors
    /// If QEMU does not listen there.
    pub fn connect(path: &Path) -> anyhow::Result<Self> {
        let stream = UnixStream::connect(path)
            .with_context(|| format!("cannot connect to {}", path.display()))?;
        let shared = Arc::new(Shared::default());
        let reader = BufReader::new(stream.try_clone()?);
        let receiver = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("guest-channel".into())
            .spawn(move || receive(reader, &receiver))
            .context("cannot start a thread")?;
        Ok(Guest { writer: Mutex::new(stream), shared })
    }

    /// Waits until the agent answers: the guest is up.
    ///
    /// # Errors
    /// If it does not in time, or `alive` fails meanwhile.
    pub fn wait_ready(
        &self,
        timeout: Duration,
        mut alive: impl FnMut() -> anyhow::Result<()>,
    ) -> anyhow::Result<Pong> {
        let deadline = Instant::now() + timeout;
        loop {
            // What was sent before a reset is lost with the port's buffers, so
            // a new ping goes out now and then.
            let pending = self.start::<Pong>(Command::Ping)?;
            for _ in 0..20 {
                alive()?;
                if let Some(pong) = pending.poll(Duration::from_millis(100))? {
                    return Ok(pong);
                }
            }
            if Instant::now() > deadline {
                bail!("the guest was not up within {timeout:?}");
            }
        }
    }

    /// Sends a request without waiting for its answer.
    ///
    /// # Errors
    /// If QEMU is gone.
    pub fn start<T>(&self, command: Command) -> anyhow::Result<Pending<T>> {
        let id = {
            let mut state = self.shared.lock();
            state.next_id += 1;
            state.next_id
        };
        let mut text = serde_json::to_string(&Request { id, command })?;
        text.push('\n');
        self.writer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write_all(text.as_bytes())
            .context("the channel to the guest is closed")?;
        Ok(Pending { id, shared: Arc::clone(&self.shared), result: std::marker::PhantomData })
    }

    fn call<T: DeserializeOwned>(&self, command: Command, timeout: Duration) -> anyhow::Result<T> {
        self.start(command)?.wait(timeout)
    }

    /// Runs a shell command and returns its output.
    ///
    /// # Errors
    /// If it exits with anything but 0.
    pub fn shell(&self, command: &str) -> anyhow::Result<String> {
        let output: Output = self.call(Command::Exec { command: command.into() }, LONG_TIMEOUT)?;
        if output.code != 0 {
            bail!("`{command}` exits with {}: {}", output.code, output.output);
        }
        Ok(output.output)
    }

    /// Loads the driver of virtio-balloon, which the guest leaves to whoever asks.
    ///
    /// # Errors
    /// If the guest cannot.
    pub fn load_balloon(&self) -> anyhow::Result<()> {
        self.shell("insmod /lib/gemini/extra/virtio_balloon.ko").map(drop)
    }

    /// Starts a shell command without waiting for its end.
    ///
    /// # Errors
    /// If QEMU is gone.
    pub fn start_shell(&self, command: &str) -> anyhow::Result<Pending<Output>> {
        self.start(Command::Exec { command: command.into() })
    }

    /// Runs a probe as a process of its own; `None` if the kernel killed it
    /// for want of memory.
    ///
    /// # Errors
    /// If it fails.
    pub fn probe<T: DeserializeOwned>(&self, probe: &Probe) -> anyhow::Result<Option<T>> {
        let output: Output = self.start_probe(probe)?.wait(LONG_TIMEOUT)?;
        match output.code {
            0 => serde_json::from_str(&output.output)
                .map(Some)
                .with_context(|| format!("{probe:?} prints another form: {}", output.output)),
            KILLED => Ok(None),
            code => bail!("{probe:?} exits with {code}: {}", output.output),
        }
    }

    /// Starts a probe as a process of its own. The output is its result as
    /// JSON.
    ///
    /// # Errors
    /// If QEMU is gone.
    pub fn start_probe(&self, probe: &Probe) -> anyhow::Result<Pending<Output>> {
        // No quotes are in what is given to probes, and the shell leaves the
        // rest alone.
        let text = serde_json::to_string(probe)?;
        self.start(Command::Exec { command: format!("exec gemini-guest probe '{text}'") })
    }

    /// Loads the driver.
    ///
    /// # Errors
    /// If the kernel refuses it.
    pub fn load_driver(&self) -> anyhow::Result<Elapsed> {
        self.call(
            Command::LoadModule { path: DRIVER_PATH.into(), parameters: String::new() },
            TIMEOUT,
        )
    }

    /// Unloads the driver.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn unload_driver(&self) -> anyhow::Result<Elapsed> {
        self.call(Command::UnloadModule { name: DRIVER_NAME.into() }, TIMEOUT)
    }

    /// Gives the driver a command through debugfs, and returns what it tells.
    ///
    /// # Errors
    /// If the driver refuses or fails; the error has what it told.
    pub fn driver_command(&self, line: &str) -> anyhow::Result<String> {
        self.shell(&format!(
            "cd /sys/kernel/debug/virtio_gemini/*/ || exit; \
             echo '{line}' > command; result=$?; cat command; exit $result"
        ))
    }

    /// The driver's map of blocks, as debugfs shows it.
    ///
    /// # Errors
    /// If the driver has no device.
    pub fn driver_blocks(&self) -> anyhow::Result<Vec<DriverRun>> {
        let text = self.shell("cat /sys/kernel/debug/virtio_gemini/*/blocks")?;
        text.lines()
            .filter(|line| !line.starts_with('#'))
            .map(|line| {
                DriverRun::parse(line)
                    .with_context(|| format!("the driver's map has another form: {line}"))
            })
            .collect()
    }

    /// Blocks that its kernel works with all the time, by the word of the driver.
    ///
    /// # Errors
    /// As [`Guest::driver_blocks`].
    pub fn kernel_blocks(&self) -> anyhow::Result<BTreeSet<u64>> {
        self.blocks_kernel_uses(crate::BLOCK >> 12)
    }

    /// Blocks that its kernel works with at least so much, by the word of the driver: from 1
    /// to 512, which is all the time.
    ///
    /// # Errors
    /// As [`Guest::driver_blocks`].
    pub fn blocks_kernel_uses(&self, least: u64) -> anyhow::Result<BTreeSet<u64>> {
        let runs = self.driver_blocks()?;
        let named = runs.iter().filter(|run| run.guest == "pinned" && run.used >= least);
        Ok(named.flat_map(|run| run.first..run.first + run.count).collect())
    }

    /// One of the driver's numbers in sysfs.
    ///
    /// # Errors
    /// If there is no such number.
    pub fn driver_number(&self, name: &str) -> anyhow::Result<u64> {
        let text = self.driver_text(name)?;
        text.trim().parse().with_context(|| format!("{name} is no number: {text}"))
    }

    /// One of the driver's files in sysfs.
    ///
    /// # Errors
    /// If there is no such file.
    pub fn driver_text(&self, name: &str) -> anyhow::Result<String> {
        self.shell(&format!("cat /sys/bus/virtio/drivers/virtio_gemini/virtio*/gemini/{name}"))
    }

    /// Changes one of the driver's settings in sysfs.
    ///
    /// # Errors
    /// If there is no such setting, or the driver refuses the value.
    pub fn set_driver(&self, name: &str, value: u64) -> anyhow::Result<()> {
        self.shell(&format!(
            "echo {value} > $(ls /sys/bus/virtio/drivers/virtio_gemini/virtio*/gemini/{name})"
        ))
        .with_context(|| format!("{name} = {value}"))
        .map(drop)
    }

    /// Makes the driver exchange hints and nothing more: it holds no block but
    /// those that its commands name, and places no huge page.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn hints_only(&self) -> anyhow::Result<()> {
        for setting in ["booking", "bucket", "placement"] {
            self.set_driver(setting, 0)?;
        }
        self.driver_command("free all").map(drop)
    }

    /// Maps memory and fills it with the pattern of `seed`.
    ///
    /// # Errors
    /// If the guest cannot.
    pub fn fill(
        &self,
        name: &str,
        bytes: u64,
        seed: u64,
        pages: PageSize,
    ) -> anyhow::Result<Filled> {
        self.call(Command::Fill { name: name.into(), bytes, seed, pages }, LONG_TIMEOUT)
    }

    /// As [`Guest::fill`], in shared memory.
    ///
    /// # Errors
    /// If the guest cannot.
    pub fn fill_shared(
        &self,
        name: &str,
        bytes: u64,
        seed: u64,
        pages: PageSize,
    ) -> anyhow::Result<Filled> {
        self.call(Command::FillShared { name: name.into(), bytes, seed, pages }, LONG_TIMEOUT)
    }

    /// Touches new memory and looks whether the kernel gave zeros.
    ///
    /// # Errors
    /// If a single word is not zero.
    pub fn expect_zeros(&self, bytes: u64, pages: PageSize) -> anyhow::Result<Verified> {
        let found: Verified = self.call(Command::CountDirty { bytes, pages }, LONG_TIMEOUT)?;
        if found.bad_words != 0 {
            bail!(
                "{} of {} words of new memory are not zero, the first at offset {:?}",
                found.bad_words,
                found.words,
                found.first_bad
            );
        }
        Ok(found)
    }

    /// Makes memory huge (`MADV_COLLAPSE`).
    ///
    /// # Errors
    /// If the guest's kernel refuses.
    pub fn collapse(&self, name: &str) -> anyhow::Result<()> {
        self.call(Command::Collapse { name: name.into() }, LONG_TIMEOUT)
    }

    /// The block behind every 2 MiB of memory; none where it is not one whole
    /// block.
    ///
    /// # Errors
    /// If there is no such memory.
    pub fn blocks_of(&self, name: &str) -> anyhow::Result<Vec<Option<u64>>> {
        self.call(Command::BlocksOf { name: name.into() }, TIMEOUT)
    }

    /// Reads words at random.
    ///
    /// # Errors
    /// If there is no such memory.
    pub fn read(&self, name: &str, reads: u64, seed: u64) -> anyhow::Result<Elapsed> {
        let name = name.into();
        self.call(Command::Read { name, reads, seed }, LONG_TIMEOUT)
    }

    /// Compares memory with its pattern.
    ///
    /// # Errors
    /// If a single word differs.
    pub fn verify(&self, name: &str) -> anyhow::Result<Verified> {
        unchanged(name, self.call(Command::Verify { name: name.into() }, LONG_TIMEOUT)?)
    }

    /// Breaks every `every`'th huge page.
    ///
    /// # Errors
    /// If the guest's kernel refuses.
    pub fn break_pages(&self, name: &str, how: Break, every: u64) -> anyhow::Result<Broken> {
        let name = name.into();
        self.call(Command::Break { name, how, every }, LONG_TIMEOUT)
    }

    /// Unmaps memory.
    ///
    /// # Errors
    /// If there is no such memory.
    pub fn free(&self, name: &str) -> anyhow::Result<()> {
        let name = name.into();
        self.call::<Value>(Command::Free { name }, TIMEOUT).map(drop)
    }

    /// Starts memory load in the background.
    ///
    /// # Errors
    /// If the guest cannot.
    pub fn start_churn(&self, name: &str, bytes: u64, seed: u64) -> anyhow::Result<()> {
        let name = name.into();
        self.call::<Value>(Command::StartChurn { name, bytes, seed }, TIMEOUT).map(drop)
    }

    /// Ends a background load.
    ///
    /// # Errors
    /// If something failed in it, or a word that it read was not what it had
    /// written.
    pub fn stop_churn(&self, name: &str) -> anyhow::Result<Churned> {
        let done: Churned = self.call(Command::StopChurn { name: name.into() }, LONG_TIMEOUT)?;
        if done.bad_words != 0 {
            bail!("churn {name} found {} words changed", done.bad_words);
        }
        Ok(done)
    }

    /// Fragments free memory until the process `name` is ended.
    ///
    /// # Errors
    /// If the index that is asked for is not reached.
    pub fn fragment(&self, name: &str, options: Fragment) -> anyhow::Result<Fragmented> {
        self.start_task(name, Task::Fragment(options))?.wait(LONG_TIMEOUT)
    }

    /// Has a program touch huge pages; it keeps them until it is ended.
    ///
    /// # Errors
    /// If the guest cannot.
    pub fn start_program(&self, name: &str, options: Program) -> anyhow::Result<Touched> {
        self.start_task(name, Task::Program(options))?.wait(LONG_TIMEOUT)
    }

    /// Makes small allocations that are kept until the process `name` is ended.
    ///
    /// # Errors
    /// If the guest cannot.
    pub fn storm(&self, name: &str, options: Storm) -> anyhow::Result<Stormed> {
        self.start_task(name, Task::Storm(options))?.wait(LONG_TIMEOUT)
    }

    /// Starts a process in the guest without waiting until its task is done.
    ///
    /// # Errors
    /// If QEMU is gone.
    pub fn start_task<T>(&self, name: &str, task: Task) -> anyhow::Result<Pending<T>> {
        self.start(Command::Start { name: name.into(), task })
    }

    /// Asks a process that [`Guest::start_task`] started, without waiting for its
    /// answer.
    ///
    /// # Errors
    /// If QEMU is gone.
    pub fn start_ask<T>(&self, name: &str, question: Question) -> anyhow::Result<Pending<T>> {
        self.start(Command::Ask { name: name.into(), question })
    }

    /// Where the huge pages of a program lie.
    ///
    /// # Errors
    /// If there is no such program.
    pub fn program_blocks(&self, name: &str) -> anyhow::Result<Vec<Option<u64>>> {
        let question = Question::Blocks;
        let found: ProgramBlocks =
            self.call(Command::Ask { name: name.into(), question }, LONG_TIMEOUT)?;
        Ok(found.blocks)
    }

    /// Has a program use some of its memory; it keeps it until it is ended.
    ///
    /// # Errors
    /// If the guest cannot.
    pub fn start_sparse(&self, name: &str, options: Sparse) -> anyhow::Result<Elapsed> {
        self.start_task(name, Task::Sparse(options))?.wait(LONG_TIMEOUT)
    }

    /// Has a program that [`Guest::start_sparse`] started use all of its memory.
    ///
    /// # Errors
    /// If there is no such program.
    pub fn grow(&self, name: &str) -> anyhow::Result<Elapsed> {
        let question = Question::Grow;
        self.call(Command::Ask { name: name.into(), question }, LONG_TIMEOUT)
    }

    /// Compares the memory of a program or fragmenter with what was written.
    ///
    /// # Errors
    /// If a single word differs.
    pub fn verify_process(&self, name: &str) -> anyhow::Result<Verified> {
        let question = Question::Verify;
        let found = self.call(Command::Ask { name: name.into(), question }, LONG_TIMEOUT)?;
        unchanged(name, found)
    }

    /// Ends a process that [`Guest::start_task`] or its like started, and waits
    /// until it is gone.
    ///
    /// # Errors
    /// If there is no such process.
    pub fn end(&self, name: &str) -> anyhow::Result<()> {
        self.call::<Value>(Command::End { name: name.into() }, LONG_TIMEOUT).map(drop)
    }

    /// How fragmented the guest's free memory is.
    ///
    /// # Errors
    /// If `/proc/buddyinfo` cannot be read there.
    pub fn fragmentation(&self) -> anyhow::Result<Fragmentation> {
        self.call(Command::Fragmentation, TIMEOUT)
    }

    /// State of every block as the guest's kernel tells it.
    ///
    /// # Errors
    /// If `/proc/kpageflags` cannot be read there.
    pub fn blocks(&self) -> anyhow::Result<BlockStates> {
        self.call(Command::Blocks, LONG_TIMEOUT)
    }

    /// Pages that the guest's kernel has, and those that it has given away.
    ///
    /// # Errors
    /// If `/proc/kpageflags` cannot be read there.
    pub fn pages(&self) -> anyhow::Result<PageRuns> {
        self.call(Command::Pages, LONG_TIMEOUT)
    }

    /// Sequence number that the next kernel message will have.
    ///
    /// # Errors
    /// If the log cannot be read there.
    pub fn log_position(&self) -> anyhow::Result<u64> {
        Ok(self.messages(0)?.next)
    }

    /// Kernel messages from `since` on.
    ///
    /// # Errors
    /// If the log cannot be read there.
    pub fn messages(&self, since: u64) -> anyhow::Result<Messages> {
        self.call(Command::Messages { since }, LONG_TIMEOUT)
    }

    /// Kernel messages from `since` on that a healthy guest does not have.
    ///
    /// # Errors
    /// If the log cannot be read there.
    pub fn complaints(&self, since: u64) -> anyhow::Result<Vec<Message>> {
        let mut messages = self.messages(since)?.messages;
        messages.retain(is_complaint);
        Ok(messages)
    }

    /// Prints each of [`Guest::complaints`], and returns how many there are: a
    /// figure of every scenario, which nobody could look into without the text.
    ///
    /// # Errors
    /// If the log cannot be read there.
    pub fn tell_complaints(&self, since: u64) -> anyhow::Result<usize> {
        let complaints = self.complaints(since)?;
        for complaint in &complaints {
            eprintln!("guest: {}", complaint.text);
        }
        Ok(complaints.len())
    }

    /// `/proc/meminfo` in bytes.
    ///
    /// # Errors
    /// If it cannot be read there.
    pub fn memory(&self) -> anyhow::Result<BTreeMap<String, u64>> {
        self.call(Command::Memory, TIMEOUT)
    }

    /// The text of a file.
    ///
    /// # Errors
    /// If it cannot be read there.
    pub fn read_file(&self, path: &str) -> anyhow::Result<String> {
        self.call(Command::ReadFile { path: path.into() }, TIMEOUT)
    }

    /// Writes to a file that exists.
    ///
    /// # Errors
    /// If the guest's kernel refuses.
    pub fn write_file(&self, path: &str, text: &str) -> anyhow::Result<()> {
        let (path, text) = (path.into(), text.into());
        self.call::<Value>(Command::WriteFile { path, text }, LONG_TIMEOUT).map(drop)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Ends the receiving thread; fails only if the other end is gone.
        let stream = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = stream.shutdown(std::net::Shutdown::Both);
    }
}

impl<T: DeserializeOwned> Pending<T> {
    /// Waits for the answer.
    ///
    /// # Errors
    /// What the guest says, or that it says nothing in time.
    pub fn wait(self, timeout: Duration) -> anyhow::Result<T> {
        self.poll(timeout)?.with_context(|| format!("the guest does not answer within {timeout:?}"))
    }

    /// Waits for the answer, but no longer than `timeout`.
    ///
    /// # Errors
    /// What the guest says, or that the channel is closed.
    pub fn poll(&self, timeout: Duration) -> anyhow::Result<Option<T>> {
        let deadline = Instant::now() + timeout;
        let mut state = self.shared.lock();
        loop {
            if let Some(answer) = state.answers.remove(&self.id) {
                return value_of(answer).map(Some);
            }
            if state.closed {
                bail!("the channel to the guest is closed: QEMU has ended");
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            state = self
                .shared
                .arrived
                .wait_timeout(state, left)
                .map_or_else(|error| error.into_inner().0, |(state, _)| state);
        }
    }
}

fn unchanged(name: &str, found: Verified) -> anyhow::Result<Verified> {
    if found.bad_words != 0 {
        bail!(
            "{} of {} words of {name} are not what was written, the first at offset {:?}",
            found.bad_words,
            found.words,
            found.first_bad
        );
    }
    Ok(found)
}

fn value_of<T: DeserializeOwned>(answer: Answer) -> anyhow::Result<T> {
    if let Some(error) = answer.error {
        bail!("the guest says: {error}");
    }
    serde_json::from_value(answer.ok.unwrap_or(Value::Null))
        .context("the guest's answer has another form")
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Received> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn receive(mut reader: BufReader<UnixStream>, shared: &Shared) {
    let mut line = Vec::new();
    loop {
        line.clear();
        let open = matches!(reader.read_until(b'\n', &mut line), Ok(count) if count > 0);
        let mut state = shared.lock();
        if !open {
            state.closed = true;
            shared.arrived.notify_all();
            return;
        }
        if let Some(answer) = parse_answer(&String::from_utf8_lossy(&line)) {
            state.answers.insert(answer.id, answer);
            shared.arrived.notify_all();
        }
    }
}

/// The answer in a line. A guest that is reset in the middle of an answer
/// leaves a torn one, which the next answer then follows on the same line.
fn parse_answer(line: &str) -> Option<Answer> {
    serde_json::from_str(line).ok().or_else(|| {
        let start = line.rfind("{\"id\":")?;
        serde_json::from_str(&line[start..]).ok()
    })
}

/// Whether a kernel message tells of trouble. Warnings count by their level,
/// except those that an out-of-tree module brings by being one, and those of a
/// clock that an overloaded host has stopped for a moment.
fn is_complaint(message: &Message) -> bool {
    const TROUBLE: [&str; 9] = [
        "BUG:",
        "WARNING:",
        "Oops",
        "general protection",
        "Call Trace",
        "blocked for more than",
        "stall",
        "lockup",
        "use-after-free",
    ];
    const EXPECTED: [&str; 4] = [
        "loading out-of-tree module taints kernel",
        "module verification failed",
        "hrtimer: interrupt took",
        "clocksource: Long readout interval",
    ];
    if EXPECTED.iter().any(|text| message.text.contains(text)) {
        return false;
    }
    message.level < NOTICE || TROUBLE.iter().any(|text| message.text.contains(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(level: u8, text: &str) -> Message {
        Message { level, text: text.into() }
    }

    #[test]
    fn warnings_and_traces_are_complaints_and_the_taint_is_not() {
        assert!(is_complaint(&message(4, "something is odd")));
        assert!(is_complaint(&message(6, "BUG: sleeping function")));
        assert!(!is_complaint(&message(6, "virtio_gemini: 512 blocks")));
        assert!(!is_complaint(&message(
            5,
            "virtio_gemini: loading out-of-tree module taints kernel."
        )));
    }

    #[test]
    fn line_of_the_drivers_map_is_read() {
        let run = DriverRun::parse("12 3 booked 0 huge held,ready").expect("a line");
        assert_eq!((run.first, run.count), (12, 3));
        assert_eq!((run.guest.as_str(), run.host.as_str()), ("booked", "huge"));
    }

    #[test]
    fn answer_behind_a_torn_one_is_found() {
        let answer = parse_answer("{\"id\":3,\"ok\":{\"ru{\"id\":4,\"ok\":7}\n").expect("one");
        assert_eq!((answer.id, answer.ok), (4, Some(7.into())));
        assert_eq!(parse_answer("garbage\n"), None);
    }
}

//! The drives of scripts/build-workloads, and the programs on them.
//!
//! Process 1 mounts them if they are there; a program runs with the image as
//! its root, and says in one line of JSON when its data is loaded and what each
//! measured phase has come to.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{bail, Context};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::kernel;
use crate::protocol::{Loaded, Measured, Question, Workload, IMAGE_SERIAL, SCRATCH_SERIAL};
use crate::worker::Holder;

/// Where the image is mounted.
const ROOT: &str = "/image";

/// Modules of the stock kernel that the image's file systems need.
const MODULES: &str = "/lib/gemini/image";

/// Mounts the image, with what its programs need of this guest. Without the
/// drive nothing is done.
///
/// # Errors
/// If the drive is there, and cannot be used.
pub fn mount() -> anyhow::Result<()> {
    let Some(image) = drive(IMAGE_SERIAL)? else {
        return Ok(());
    };
    kernel::load_modules(MODULES)?;
    kernel::mount(&image, ROOT, "squashfs", libc::MS_RDONLY)?;
    for shared in ["/proc", "/sys", "/dev"] {
        kernel::mount(shared, &format!("{ROOT}{shared}"), "", libc::MS_BIND)?;
    }
    // All that is written elsewhere than to the scratch drive.
    kernel::mount("tmpfs", &format!("{ROOT}/tmp"), "tmpfs", 0)?;
    if let Some(scratch) = drive(SCRATCH_SERIAL)? {
        kernel::mount(&scratch, &format!("{ROOT}/scratch"), "ext4", 0)?;
    }
    Ok(())
}

/// The device file of the virtio-blk drive with a serial number.
fn drive(serial: &str) -> anyhow::Result<Option<String>> {
    // Without a single drive there need not be such a directory.
    let Ok(entries) = std::fs::read_dir("/sys/block") else {
        return Ok(None);
    };
    for entry in entries {
        let entry = entry.context("cannot list /sys/block")?;
        let found = std::fs::read_to_string(entry.path().join("serial")).unwrap_or_default();
        if found.trim_end() == serial {
            return Ok(Some(format!("/dev/{}", entry.file_name().to_string_lossy())));
        }
    }
    Ok(None)
}

/// A workload that has loaded its data. Ends when its input does.
pub struct Running {
    child: Child,
    /// Always there until the program is to end.
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

/// Starts a program of the image, and waits until it has loaded its data.
///
/// # Errors
/// If there is no image or no such program, or it fails; what it says of that
/// is on the console.
pub fn start(workload: &Workload) -> anyhow::Result<(Loaded, Running)> {
    let program = format!("/workloads/{}", workload.program);
    if !Path::new(ROOT).join(&program[1..]).exists() {
        bail!("this guest has no {program}: does it have the drives of scripts/build-workloads?");
    }
    let mut child = Command::new("/bin/chroot")
        .args([ROOT, &program])
        .args(["--mib", &workload.mib.to_string()])
        .args(["--seed", &workload.seed.to_string()])
        .args(["--operations", &workload.operations.to_string()])
        .env("PATH", "/usr/bin:/bin")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run chroot")?;
    let input = child.stdin.take();
    let output = child.stdout.take().context("a child without its output")?;
    let mut running = Running { child, input, output: BufReader::new(output) };
    let loaded = running.hear("loaded")?;
    // Files that were read once are not what is measured, and they are in the
    // way of what would be huge.
    std::fs::write("/proc/sys/vm/drop_caches", "1").context("cannot drop the page cache")?;
    Ok((loaded, running))
}

impl Running {
    /// The next line, which is about `phase`.
    fn hear<T: DeserializeOwned>(&mut self, phase: &str) -> anyhow::Result<T> {
        let mut line = String::new();
        self.output.read_line(&mut line).context("cannot hear the program")?;
        if line.is_empty() {
            let status = self.child.wait().context("cannot wait for the program")?;
            bail!("the program ended before it was {phase}: {status}; the console tells more");
        }
        let form = || format!("this is not what a program says that is {phase}: {line}");
        let value: Value = serde_json::from_str(&line).with_context(form)?;
        if value["phase"] != phase {
            bail!(form());
        }
        serde_json::from_value(value).with_context(form)
    }

    fn go(&mut self) -> anyhow::Result<Measured> {
        let input = self.input.as_mut().context("the program is to end")?;
        writeln!(input, "go").context("the program does not listen")?;
        self.hear("done")
    }
}

impl Holder for Running {
    fn ask(&mut self, question: Question) -> anyhow::Result<Value> {
        match question {
            Question::Go => Ok(serde_json::to_value(self.go()?)?),
            other => bail!("a workload has no answer to {other:?}"),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.input = None;
        match self.child.wait() {
            Ok(status) if status.success() => {}
            Ok(status) => eprintln!("gemini-guest: a workload ended with {status}"),
            Err(error) => eprintln!("gemini-guest: cannot wait for a workload: {error}"),
        }
    }
}

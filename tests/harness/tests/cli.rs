//! The program as a script uses it.

mod common;

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{ensure, Context};
use common::{options, Result};
use gemini_harness::scratch::Scratch;
use gemini_harness::sys;
use serde_json::Value;

fn harness() -> Command {
    Command::new(env!("CARGO_BIN_EXE_gemini-harness"))
}

#[test]
fn run_prints_the_table_and_writes_the_published_json() -> Result {
    let scratch = Scratch::new()?;
    let json = scratch.path().join("runs.json");
    let output = harness()
        .args(["run", "--quick", "--mem", "160", "--policy", "none,gemini", "--json"])
        .arg(&json)
        .arg("--daemon")
        .arg(options("none")?.program)
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    for part in ["model guest, no virtual machine", "aligned_coverage", "block   guest"] {
        ensure!(text.contains(part), "no {part:?} in {text}");
    }
    let document: Value = serde_json::from_slice(&std::fs::read(&json)?)?;
    let runs = document["runs"].as_array().context("no runs")?;
    let policies: Vec<_> = runs.iter().map(|run| run["policy"].as_str()).collect();
    ensure!(policies == [Some("none"), Some("gemini")], "{document}");
    ensure!(runs[1]["aligned_rate"].as_f64() >= Some(0.95), "{document}");
    Ok(())
}

#[test]
fn a_missing_daemon_is_named_with_the_exit_status_of_an_error() -> Result {
    let output = harness().args(["run", "--daemon", "/nonexistent/daemon"]).output()?;
    ensure!(output.status.code() == Some(2), "{}", output.status);
    let message = String::from_utf8_lossy(&output.stderr);
    ensure!(message.contains("/nonexistent/daemon"), "{message}");
    Ok(())
}

#[test]
fn a_signal_leaves_no_daemon_and_no_directory_behind() -> Result {
    let scratch = Scratch::new()?;
    let mut child = harness()
        .args(["hostile", "--inputs", "100000000", "--daemon"])
        .arg(options("none")?.program)
        .env("TMPDIR", scratch.path())
        .stdout(Stdio::piped())
        .spawn()?;
    let deadline = Instant::now() + Duration::from_secs(60);
    let daemon = loop {
        if let Some(daemon) = child_of(child.id())? {
            break daemon;
        }
        ensure!(Instant::now() < deadline, "no daemon was started");
        std::thread::sleep(Duration::from_millis(20));
    };
    std::thread::sleep(Duration::from_millis(300));
    sys::kill(child.id(), libc::SIGTERM)?;
    let status = child.wait()?;
    ensure!(status.code() == Some(128 + libc::SIGTERM), "{status}");
    while Path::new(&format!("/proc/{daemon}")).exists() {
        ensure!(Instant::now() < deadline, "daemon {daemon} lives on");
        std::thread::sleep(Duration::from_millis(20));
    }
    let left = std::fs::read_dir(scratch.path())?.count();
    ensure!(left == 0, "{left} directories are left");
    Ok(())
}

#[test]
fn a_user_without_rights_gets_the_same_result() -> Result {
    if !sys::is_root() {
        eprintln!("not tested: this user has no rights to give up");
        return Ok(());
    }
    const NOBODY: u32 = 65534;
    // The build directory may be closed to others.
    let scratch = Scratch::new()?;
    let programs: [PathBuf; 2] =
        [env!("CARGO_BIN_EXE_gemini-harness").into(), options("none")?.program];
    for program in &programs {
        let name = program.file_name().context("a program without a name")?;
        std::fs::copy(program, scratch.path().join(name))?;
    }
    let output = Command::new(scratch.path().join("gemini-harness"))
        .args(["run", "--quick", "--mem", "160", "--policy", "none,gemini"])
        .uid(NOBODY)
        .gid(NOBODY)
        .env_remove("TMPDIR")
        .current_dir("/")
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    // What is missing, and what would help, is said.
    ensure!(text.contains("CAP_SYS_NICE"), "{text}");
    Ok(())
}

/// The process that `parent` started, if it has.
fn child_of(parent: u32) -> Result<Option<u32>> {
    let children = std::fs::File::open(format!("/proc/{parent}/task/{parent}/children"))?;
    let mut line = String::new();
    BufReader::new(children).read_line(&mut line)?;
    Ok(line.split_whitespace().next().and_then(|pid| pid.parse().ok()))
}

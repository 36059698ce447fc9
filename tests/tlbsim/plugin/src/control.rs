//! Answers on a socket: a command in one line, an answer in one line of JSON.
//!
//! `simulate on` and `simulate off` say whether anything is simulated. `counters`
//! tells what was counted so far: what is of interest is the difference between two
//! answers. `record BYTES PATH` begins traces of at most BYTES each, PATH.0 and so
//! on, and `stop` ends them. `slowdown N` has the guest's clock take N times as long for
//! a second.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use anyhow::{bail, Context};
use serde_json::{json, Value};

use crate::plugin::{Plugin, Recording};
use crate::sys;

/// Longest command.
const LINE_LIMIT: u64 = 4096;

/// How long a client may take to say what it wants.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Listens on the socket, on a thread of its own.
///
/// # Errors
/// If the socket cannot be made.
pub fn start(plugin: &'static Plugin) -> anyhow::Result<()> {
    let path = &plugin.options.control;
    let listener =
        UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    std::thread::Builder::new()
        .name("tlbsim-control".into())
        .spawn(move || {
            sys::see_true_time();
            for stream in listener.incoming() {
                if let Err(error) = stream.context("no client").and_then(|s| serve(plugin, s)) {
                    eprintln!("gemini-tlbsim: {error:#}");
                }
            }
        })
        .context("cannot start a thread")?;
    Ok(())
}

fn serve(plugin: &Plugin, mut stream: UnixStream) -> anyhow::Result<()> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    let mut line = String::new();
    BufReader::new((&stream).take(LINE_LIMIT)).read_line(&mut line)?;
    let answer =
        perform(plugin, line.trim_end()).unwrap_or_else(|e| json!({ "error": format!("{e:#}") }));
    writeln!(stream, "{answer}").context("a client is gone")
}

fn perform(plugin: &Plugin, line: &str) -> anyhow::Result<Value> {
    let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
    match command {
        "counters" => plugin.counters(),
        "simulate" => {
            plugin.simulate(match rest {
                "on" => true,
                "off" => false,
                _ => bail!("simulate on, or off"),
            })?;
            Ok(json!({}))
        }
        "record" => {
            let (limit, path) = rest.split_once(' ').context("record BYTES PATH")?;
            let limit = limit.parse().context("BYTES is no number")?;
            plugin.record(Recording { path: path.into(), limit })?;
            Ok(json!({}))
        }
        "slowdown" => {
            sys::slow_clock(rest.parse().context("the slowdown is no number")?)?;
            Ok(json!({}))
        }
        "stop" => plugin.stop().map(|()| json!({})),
        _ => bail!("what is {command}?"),
    }
}

//! The control socket: one JSON request a line, one JSON answer a line.

use crate::backing::{process_cpu_time, HostState};
use crate::engine::{Engine, GuestSync};
use crate::protocol::GuestState;
use serde::Deserialize;
use serde_json::{json, Value};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

/// Longest request.
const REQUEST_MAX: u64 = 4096;
/// How long a silent client keeps the socket.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Deserialize)]
#[serde(tag = "cmd", rename_all = "lowercase", deny_unknown_fields)]
enum Command {
    /// Counters, states and findings.
    Status,
    /// Both states of every managed block, as runs.
    Map,
    /// Changes settings.
    Set {
        /// Most bytes of huge pages for the guest; null for any amount.
        #[serde(deserialize_with = "Option::deserialize")] // or it could be left out
        huge_max: Option<u64>,
    },
}

/// Serves the control socket on a thread of its own, one client at a time.
///
/// # Errors
/// If the thread cannot be started.
pub fn serve(listener: UnixListener, engine: Arc<Engine>) -> std::io::Result<()> {
    std::thread::Builder::new().name("control".into()).spawn(move || {
        for client in listener.incoming() {
            match client {
                Ok(client) => {
                    if let Err(error) = answer_all(&client, &engine) {
                        log::debug!("control client left: {error}");
                    }
                }
                Err(error) => {
                    log::warn!("control socket: {error}");
                    // Out of descriptors, say: nothing gets better by asking faster.
                    std::thread::sleep(Duration::from_secs(1));
                }
            }
        }
    })?;
    Ok(())
}

fn answer_all(client: &UnixStream, engine: &Engine) -> std::io::Result<()> {
    client.set_read_timeout(Some(PATIENCE))?;
    client.set_write_timeout(Some(PATIENCE))?;
    let mut reader = BufReader::new(client);
    loop {
        let mut line = String::new();
        if (&mut reader).take(REQUEST_MAX).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let answer = match serde_json::from_str(&line) {
            Ok(Command::Status) => status(engine),
            Ok(Command::Map) => map(engine),
            Ok(Command::Set { huge_max }) => {
                engine.set_huge_max(huge_max);
                log::info!("huge_max is now {}", Limit(engine.huge_max()));
                json!({ "huge_max": engine.huge_max() })
            }
            Err(error) => json!({ "error": format!(
                "not understood: {error}; ask for example {{\"cmd\":\"status\"}}") }),
        };
        let mut text = answer.to_string();
        text.push('\n');
        (&mut &*client).write_all(text.as_bytes())?;
        if !line.ends_with('\n') {
            return Ok(());
        }
    }
}

/// A limit for people.
struct Limit(Option<u64>);

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(bytes) => write!(f, "{bytes} bytes"),
            None => f.write_str("unlimited"),
        }
    }
}

fn status(engine: &Engine) -> Value {
    let huge_max = engine.huge_max();
    engine.inspect(|state| {
        let counters = state.map.counters();
        let guest: serde_json::Map<_, _> = GuestState::ALL
            .iter()
            .map(|s| (s.name().to_owned(), counters.guest[*s as usize].into()))
            .collect();
        let host: serde_json::Map<_, _> = HostState::ALL
            .iter()
            .map(|s| (s.name().to_owned(), counters.host[*s as usize].into()))
            .collect();
        let mut status = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "policy": state.policy,
            "connected": state.connected,
            "generation": state.generation,
            "block_shift": engine.settings().block_shift,
            "copy_rate": engine.copy_rate(),
            "cpu_share": engine.cpu_share(),
            "huge_max": huge_max,
            "scarce": state.supply.is_scarce(),
            "blocks": state.map.len(),
            "guest_synced": state.guest_sync == GuestSync::Done,
            "host_synced": state.scan.complete() && state.hints.synced(),
            "guest": guest,
            "host": host,
            "aligned": counters.aligned,
            "guest_only": counters.guest_only,
            "host_only": counters.host_only,
            "cpu_seconds": process_cpu_time().as_secs_f64(),
            "findings": state.memory.as_ref().map(|m| m.findings()).unwrap_or_default(),
        });
        if let (Value::Object(status), Ok(Value::Object(totals))) =
            (&mut status, serde_json::to_value(state.totals))
        {
            status.extend(totals);
        }
        status
    })
}

fn map(engine: &Engine) -> Value {
    engine.inspect(|state| {
        let runs: Vec<_> = state
            .map
            .runs(0, |b| (b.guest, b.host))
            .map(|(first, count, (guest, host), _)| {
                json!({ "first": first, "count": count, "guest": guest.name(), "host": host.name() })
            })
            .collect();
        json!({
            "generation": state.generation,
            "block_shift": engine.settings().block_shift,
            "runs": runs,
        })
    })
}

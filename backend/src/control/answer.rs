//! What is answered to each request of the control socket.

use super::map::Map;
use super::{metrics, Subject};
use crate::backing::{process_cpu_time, HostState};
use crate::engine::GuestSync;
use crate::protocol::GuestState;
use crate::settings::{Given, Setting, Settings, SETTINGS};
use serde_json::{json, Value};
use std::io::{self, Write};
use std::time::Instant;

/// The requests, as an error lists them.
const COMMANDS: &str = "status, map, settings, set, pause, resume, reload, metrics";

/// An answer.
pub enum Answer {
    /// A small one.
    Value(Value),
    /// One that may be large.
    Map(Map),
}

impl Answer {
    /// The answer to what cannot be done.
    pub fn error(message: impl Into<Value>) -> Self {
        Self::Value(json!({ "error": message.into() }))
    }

    /// Writes it as JSON.
    pub fn write(&self, writer: impl Write) -> io::Result<()> {
        match self {
            Self::Value(value) => serde_json::to_writer(writer, value),
            Self::Map(map) => serde_json::to_writer(writer, map),
        }
        .map_err(io::Error::from)
    }
}

/// Answers a request.
pub fn answer(line: &[u8], subject: &Subject) -> Answer {
    match request(line) {
        Ok((command, members)) => match carry_out(&command, members, subject) {
            Ok(answer) => answer,
            Err(error) => Answer::error(error),
        },
        Err(error) => Answer::error(format!(
            "not understood: {error}; ask for example {{\"cmd\":\"status\"}}"
        )),
    }
}

type Members = serde_json::Map<String, Value>;

fn request(line: &[u8]) -> Result<(String, Members), String> {
    let mut members: Members = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    match members.remove("cmd") {
        Some(Value::String(command)) => Ok((command, members)),
        _ => Err("there is no \"cmd\"".into()),
    }
}

fn carry_out(command: &str, members: Members, subject: &Subject) -> Result<Answer, String> {
    if command != "set" {
        if let Some(name) = members.keys().next() {
            return Err(format!("not understood: {command} takes no {name}"));
        }
    }
    let Subject { engine, configuration, .. } = subject;
    let value = match command {
        "status" => status(subject),
        "map" => return Ok(Answer::Map(Map::of(engine))),
        "settings" => settings(&configuration.settings()),
        "set" => set(&members, subject)?,
        "pause" | "resume" => pause(command == "pause", subject),
        "reload" => Value::Object(configuration.reload()?.to_json()),
        "metrics" => json!({ "metrics": metrics::render(subject) }),
        other => {
            return Err(format!("not understood: unknown command {other}; there are: {COMMANDS}"))
        }
    };
    Ok(Answer::Value(value))
}

fn set(members: &Members, subject: &Subject) -> Result<Value, String> {
    let given = Given::from_json(members)?;
    if given.is_empty() {
        return Err("nothing to set; for example {\"cmd\":\"set\",\"cpu_share\":25}".into());
    }
    let in_force = subject.configuration.change(&given).to_json();
    let told = members
        .keys()
        .filter_map(|name| Setting::find(name))
        .filter_map(|setting| Some((setting.key(), in_force.get(&setting.key())?.clone())));
    Ok(Value::Object(told.collect()))
}

fn pause(paused: bool, subject: &Subject) -> Value {
    subject.engine.set_paused(paused);
    log::info!("{}", if paused { "paused: nothing is made huge" } else { "resumed" });
    json!({ "paused": paused, "acting": subject.engine.is_acting() })
}

fn settings(in_force: &Settings) -> Value {
    let (defaults, values) = (Settings::default(), in_force.to_json());
    let all: Vec<_> = SETTINGS
        .iter()
        .map(|setting| {
            json!({
                "name": setting.key(),
                "value": values.get(&setting.key()),
                "shown": setting.show(in_force),
                "default": setting.show(&defaults),
                "range": setting.range(),
                "about": setting.about,
            })
        })
        .collect();
    json!({ "settings": all })
}

fn status(subject: &Subject) -> Value {
    let Subject { name, started, engine, configuration } = subject;
    let mut status = configuration.settings().to_json();
    let (acting, pressure, pools) = (engine.is_acting(), engine.pressure(), engine.pools());
    let shares = engine.shares();
    let now = Instant::now();
    let known = engine.inspect(|state| {
        let counters = state.map.counters();
        let guest: serde_json::Map<_, _> = GuestState::ALL
            .iter()
            .map(|s| (s.name().to_owned(), counters.guest[*s as usize].into()))
            .collect();
        let host: serde_json::Map<_, _> = HostState::ALL
            .iter()
            .map(|s| (s.name().to_owned(), counters.host[*s as usize].into()))
            .collect();
        json!({
            "connected": state.connected,
            "generation": state.generation,
            "block_shift": engine.settings().block_shift,
            "scarce": state.supply.is_scarce(),
            "shares": shares,
            "paused": state.paused,
            "migrating": state.logging,
            "acting": acting,
            "pressure": pressure,
            "hugetlb": pools,
            "timeout_ms": state.timeout.ms(),
            "timeout_source": state.timeout.source(),
            "wanted": state.wish.blocks(),
            "moving": state.moving.status(now),
            "blocks": state.map.len(),
            "guest_synced": state.guest_sync == GuestSync::Done,
            "host_synced": state.scan.complete() && state.hints.synced(),
            "guest": guest,
            "host": host,
            "aligned": counters.aligned,
            "guest_only": counters.guest_only,
            "host_only": counters.host_only,
            "aligned_rate": counters.aligned_rate(),
            "totals": state.totals,
        })
    });
    let daemon = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "name": name,
        "pid": std::process::id(),
        "uptime_seconds": started.elapsed().as_secs_f64(),
        "cpu_seconds": process_cpu_time().as_secs_f64(),
        "findings": subject.findings(),
        "config": configuration.file(),
        "config_refused": configuration.refused(),
    });
    for part in [known, daemon] {
        if let Value::Object(part) = part {
            status.extend(part);
        }
    }
    // The totals stand beside the rest, not in a part of their own.
    if let Some(Value::Object(totals)) = status.remove("totals") {
        status.extend(totals);
    }
    Value::Object(status)
}

//! The control socket: one JSON request a line, one JSON answer a line; and the metrics for
//! Prometheus.

mod answer;
mod clients;
mod http;
mod map;
mod metrics;

pub use http::serve as serve_metrics;

use crate::backing::Finding;
use crate::configuration::Configuration;
use crate::engine::Engine;
use clients::{Client, Stream};
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Clients at a time.
const CLIENTS: usize = 8;
/// Longest request.
const REQUEST_MAX: u64 = 4096;
/// How long a client may keep silent between two requests.
const IDLE: Duration = Duration::from_secs(60);
/// How long the sending of a request may take from its first byte on, and the taking of an
/// answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is answered from.
pub struct Subject {
    /// What the daemon is called, for people and metrics.
    pub name: String,
    /// When the daemon started.
    pub started: Instant,
    /// What is known and done.
    pub engine: Arc<Engine>,
    /// What is set.
    pub configuration: Arc<Configuration>,
}

impl Subject {
    /// What is wrong with host or VMM. Looking asks the system, so not under the engine's lock.
    fn findings(&self) -> Vec<Finding> {
        let memory = self.engine.inspect(|state| state.memory.clone());
        memory.map(|memory| memory.findings()).unwrap_or_default()
    }
}

/// Serves the control socket on threads of its own.
///
/// # Errors
/// If a thread cannot be started.
pub fn serve(listener: UnixListener, subject: Arc<Subject>) -> io::Result<()> {
    clients::serve("control", listener, CLIENTS, || {}, move |client| answer_all(client, &subject))
}

/// Answers until the client leaves, or says something that cannot end well.
fn answer_all<S: Stream>(client: &mut Client<S>, subject: &Subject) -> io::Result<()> {
    let mut reader = BufReader::new(client);
    loop {
        reader.get_mut().allow(IDLE);
        if reader.fill_buf()?.is_empty() {
            return Ok(());
        }
        reader.get_mut().allow(PATIENCE);
        let mut line = Vec::new();
        (&mut reader).take(REQUEST_MAX).read_until(b'\n', &mut line)?;
        let whole = line.ends_with(b"\n");
        let answer = if !whole && line.len() as u64 == REQUEST_MAX {
            answer::Answer::error(format!("a request has at most {REQUEST_MAX} bytes"))
        } else {
            answer::answer(&line, subject)
        };
        reader.get_mut().allow(PATIENCE);
        reader.get_mut().is_served();
        let mut writer = BufWriter::new(&mut **reader.get_mut());
        answer.write(&mut writer)?;
        writer.write_all(b"\n")?;
        writer.flush()?;
        drop(writer);
        if !whole {
            return Ok(());
        }
    }
}

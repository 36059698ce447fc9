//! Traces of guests that were: what a daemon knows of its guest, asked again and again.

use crate::trace::{Event, Trace, What};
use anyhow::Context;
use gemini_harness::report::BlockMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};
use vhost_device_gemini::protocol::GuestState;

/// Time between two questions; what comes and goes between them is not recorded.
const PERIOD: Duration = Duration::from_millis(100);
/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Pages in use in a block of base pages: the map does not tell, so half of them.
const USED: u16 = crate::trace::PAGES / 2;

/// Makes a trace of maps: the changes of the guest's states. Managed blocks are numbered on end,
/// without the holes between them.
#[derive(Debug, Default)]
pub struct Recorder {
    known: Vec<GuestState>,
    trace: Trace,
}

impl Recorder {
    /// Takes a map that was seen so long after the start.
    pub fn take(&mut self, at: Duration, map: &BlockMap) {
        let at = u64::try_from(at.as_millis()).unwrap_or(u64::MAX);
        let mut index = 0;
        for run in &map.runs {
            let named = GuestState::ALL.into_iter().find(|state| state.name() == run.guest);
            let state = named.unwrap_or_default();
            for _ in 0..run.count {
                if self.known.len() == index {
                    self.known.push(GuestState::Unknown);
                }
                if std::mem::replace(&mut self.known[index], state) != state {
                    self.change(at, index as u64, state);
                }
                index += 1;
            }
        }
        self.trace.blocks = self.known.len() as u64;
    }

    fn change(&mut self, at: u64, block: u64, state: GuestState) {
        let what = What::Guest(state, if state == GuestState::Base { USED } else { 0 });
        match self.trace.events.last_mut() {
            Some(last)
                if (last.at, last.what) == (at, what)
                    && last.first + u64::from(last.count) == block =>
            {
                last.count += 1;
            }
            _ => self.trace.events.push(Event { at, what, first: block, count: 1 }),
        }
    }

    /// What was recorded.
    #[must_use]
    pub fn finish(self) -> Trace {
        self.trace
    }
}

/// Asks a daemon for its map until so much time has passed.
///
/// # Errors
/// If it does not answer with one.
pub fn watch(
    socket: &Path,
    time: Duration,
    mut seen: impl FnMut(Duration, &BlockMap),
) -> anyhow::Result<()> {
    let start = Instant::now();
    while start.elapsed() < time {
        let at = start.elapsed();
        seen(at, &ask(socket)?);
        std::thread::sleep(PERIOD.saturating_sub(start.elapsed() - at));
    }
    Ok(())
}

fn ask(socket: &Path) -> anyhow::Result<BlockMap> {
    let mut stream = UnixStream::connect(socket)
        .with_context(|| format!("cannot connect to {}", socket.display()))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"{\"cmd\":\"map\"}\n")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).context("no answer on the control socket")?;
    serde_json::from_str(&line).context("the answer is no map")
}

#[cfg(test)]
mod tests {
    use super::*;
    use gemini_harness::report::MapRun;

    #[test]
    fn changes_are_recorded_and_what_stays_is_not() {
        let run = |first, count, guest: &str| {
            let (guest, host) = (guest.to_owned(), "base".to_owned());
            MapRun { first, count, guest, host }
        };
        let map = |runs: Vec<MapRun>| BlockMap { runs, ..BlockMap::default() };
        let mut recorder = Recorder::default();
        recorder.take(Duration::ZERO, &map(vec![run(0, 4, "huge"), run(9, 2, "free")]));
        let later = map(vec![run(0, 3, "huge"), run(3, 1, "base"), run(9, 2, "free")]);
        recorder.take(Duration::from_millis(250), &later);
        let text = recorder.finish().to_string();
        assert_eq!(text, "blocks 6\n0 huge 0 4\n0 free 4 2\n250 base 3 1 256\n");
    }
}

//! Guests that never were.

use crate::trace::{Event, Trace, What, PAGES};
use gemini_harness::rng::Rng;
use vhost_device_gemini::protocol::GuestState;

/// How long the guest fills its memory at first, in milliseconds.
pub const FILL: u64 = 10_000;
/// Time between two bursts of changes afterwards.
const BURST: u64 = 100;

/// A guest of so many blocks, over so many seconds: two fifths of its memory become huge pages
/// and a fifth base pages, in runs, within ten seconds; from then on a run of blocks in ten thousand
/// changes ten times a second.
#[must_use]
pub fn guest(seed: u64, blocks: u64, seconds: u64) -> Trace {
    let mut rng = Rng::new(seed);
    let mut trace = Trace { blocks, events: Vec::new() };
    let mut first = 0;
    while first < blocks {
        let count = (1 + rng.below(64)).min(blocks - first);
        if let Some(what) = used(&mut rng) {
            trace.events.push(event(rng.below(FILL), what, first, count));
        }
        first += count;
    }
    for at in (FILL..seconds * 1000).step_by(usize::try_from(BURST).unwrap_or(1)) {
        for _ in 0..=blocks / 10_000 {
            let first = rng.below(blocks);
            let count = (1 + rng.below(4)).min(blocks - first);
            let what = used(&mut rng).unwrap_or(What::Guest(GuestState::Free, 0));
            trace.events.push(event(at, what, first, count));
        }
    }
    trace.events.sort_by_key(|event| event.at);
    trace
}

fn event(at: u64, what: What, first: u64, count: u64) -> Event {
    Event { at, what, first, count: u32::try_from(count).unwrap_or(u32::MAX) }
}

fn used(rng: &mut Rng) -> Option<What> {
    match rng.below(5) {
        0 | 1 => Some(What::Guest(GuestState::Huge, 0)),
        2 => {
            let pages = 1 + rng.below(u64::from(PAGES));
            Some(What::Guest(GuestState::Base, u16::try_from(pages).unwrap_or(PAGES)))
        }
        _ => None,
    }
}

//! What must be put right when this program ends, also when a signal ends it.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

type Action = Box<dyn FnOnce() + Send>;

struct Pending {
    next: u64,
    actions: BTreeMap<u64, Action>,
}

static PENDING: Mutex<Pending> = Mutex::new(Pending { next: 0, actions: BTreeMap::new() });

fn pending() -> MutexGuard<'static, Pending> {
    // An action that panicked is out of the map; the rest is still to be done.
    PENDING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An action that runs once: when this is dropped, or when a signal ends the
/// program.
#[derive(Debug)]
pub struct Guard(u64);

/// Has `action` run at the end of the guard's life.
pub fn guard(action: impl FnOnce() + Send + 'static) -> Guard {
    let mut pending = pending();
    let number = pending.next;
    pending.next += 1;
    pending.actions.insert(number, Box::new(action));
    Guard(number)
}

impl Drop for Guard {
    fn drop(&mut self) {
        let action = pending().actions.remove(&self.0);
        if let Some(action) = action {
            action();
        }
    }
}

/// From now on SIGINT, SIGTERM and SIGHUP run all actions, the latest first, and
/// then end the program.
///
/// # Errors
/// If the signals cannot be handled.
pub fn on_signals() -> io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        if let Some(signal) = signals.forever().next() {
            loop {
                let last = pending().actions.pop_last();
                let Some((_, action)) = last else { break };
                action();
            }
            std::process::exit(128 + signal);
        }
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::Arc;

    use super::*;

    #[test]
    fn an_action_runs_once_at_the_end() {
        let count = Arc::new(AtomicU32::new(0));
        let theirs = Arc::clone(&count);
        let guard = guard(move || {
            theirs.fetch_add(1, Ordering::SeqCst);
        });
        assert_eq!(count.load(Ordering::SeqCst), 0);
        drop(guard);
        assert_eq!(count.load(Ordering::SeqCst), 1);
    }
}

//! Several clients of one listener, a thread each, none of which can keep the others out: there
//! is a bounded number of them, the one that was served longest ago has to go for a newcomer, and
//! everything that a client does has a deadline.

use crate::engine::lock;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a newcomer waits for one who may be leaving anyway: the thread of a client that has
/// closed its end has still to notice.
const LEAVING: Duration = Duration::from_millis(100);
/// How long it waits then for one who has to go.
const HANDOVER: Duration = Duration::from_secs(1);

/// A connection to a client.
pub trait Stream: Read + Write + Send + Sized + 'static {
    /// Another handle of it.
    fn another(&self) -> io::Result<Self>;
    /// How long a single read or write may take; never zero.
    fn set_patience(&self, patience: Duration) -> io::Result<()>;
    /// Ends it, also for a thread that waits for it.
    fn hang_up(&self);
}

/// Something that clients connect to.
pub trait Accept: Send + 'static {
    /// A connection.
    type Stream: Stream;
    /// Waits for the next client.
    fn next(&self) -> io::Result<Self::Stream>;
}

macro_rules! sockets {
    ($($listener:ty => $stream:ty),*) => {$(
        impl Stream for $stream {
            fn another(&self) -> io::Result<Self> {
                self.try_clone()
            }

            fn set_patience(&self, patience: Duration) -> io::Result<()> {
                self.set_read_timeout(Some(patience))?;
                self.set_write_timeout(Some(patience))
            }

            fn hang_up(&self) {
                // It may be gone already.
                let _ = self.shutdown(Shutdown::Both);
            }
        }

        impl Accept for $listener {
            type Stream = $stream;

            fn next(&self) -> io::Result<Self::Stream> {
                self.accept().map(|(stream, _)| stream)
            }
        }
    )*};
}
sockets!(UnixListener => UnixStream, TcpListener => TcpStream);

struct Place<S> {
    id: u64,
    /// When it came, or was served last.
    served: Instant,
    going: bool,
    stream: S,
}

struct Places<S> {
    taken: Vec<Place<S>>,
    next_id: u64,
}

/// The clients of one listener.
pub struct Clients<S> {
    most: usize,
    places: Mutex<Places<S>>,
    left: Condvar,
}

/// One client, in its thread.
pub struct Client<S: Stream> {
    stream: S,
    deadline: Instant,
    id: u64,
    clients: Arc<Clients<S>>,
}

/// Serves `most` clients at a time, each with `serve` on a thread of its own.
///
/// # Errors
/// If the thread that waits for clients cannot be started.
pub fn serve<L: Accept>(
    name: &'static str,
    listener: L,
    most: usize,
    pace: impl Fn() + Send + 'static,
    serve: impl Fn(&mut Client<L::Stream>) -> io::Result<()> + Send + Sync + 'static,
) -> io::Result<()> {
    let places = Mutex::new(Places { taken: Vec::new(), next_id: 0 });
    let clients = Arc::new(Clients { most, places, left: Condvar::new() });
    let serve = Arc::new(serve);
    std::thread::Builder::new().name(name.into()).spawn(move || loop {
        pace();
        let started = listener.next().and_then(|stream| {
            let Some(mut client) = clients.admit(stream)? else { return Ok(()) };
            let serve = Arc::clone(&serve);
            std::thread::Builder::new().name(name.into()).spawn(move || {
                if let Err(error) = serve(&mut client) {
                    log::debug!("a client of {name} left: {error}");
                }
            })?;
            Ok(())
        });
        if let Err(error) = started {
            log::warn!("{name}: no client can be served: {error}");
            // Out of descriptors, say: nothing gets better by trying faster.
            std::thread::sleep(Duration::from_secs(1));
        }
    })?;
    Ok(())
}

impl<S: Stream> Clients<S> {
    /// Takes a newcomer in, if need be in place of another one; `None` if that one does not go.
    fn admit(self: &Arc<Self>, stream: S) -> io::Result<Option<Client<S>>> {
        let mut places = self.wait_for_room(lock(&self.places), LEAVING);
        if places.taken.len() >= self.most {
            let oldest = places.taken.iter_mut().filter(|p| !p.going).min_by_key(|p| p.served);
            if let Some(oldest) = oldest {
                oldest.going = true;
                oldest.stream.hang_up();
            }
            places = self.wait_for_room(places, HANDOVER);
            if places.taken.len() >= self.most {
                return Ok(None);
            }
        }
        let id = places.next_id;
        places.next_id += 1;
        let served = Instant::now();
        let another = stream.another()?;
        places.taken.push(Place { id, served, going: false, stream: another });
        Ok(Some(Client { stream, deadline: served, id, clients: Arc::clone(self) }))
    }

    fn wait_for_room<'a>(
        &self,
        places: MutexGuard<'a, Places<S>>,
        patience: Duration,
    ) -> MutexGuard<'a, Places<S>> {
        let full = |places: &mut Places<S>| places.taken.len() >= self.most;
        let waited = self.left.wait_timeout_while(places, patience, full);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

impl<S: Stream> Client<S> {
    /// From now on all reads and writes together may take so long.
    pub fn allow(&mut self, patience: Duration) {
        self.deadline = Instant::now() + patience;
    }

    /// It is served now: others have to go before it.
    pub fn is_served(&self) {
        let mut places = lock(&self.clients.places);
        if let Some(place) = places.taken.iter_mut().find(|place| place.id == self.id) {
            place.served = Instant::now();
        }
    }

    fn before_deadline(&mut self) -> io::Result<&mut S> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_patience(left)?;
        Ok(&mut self.stream)
    }
}

impl<S: Stream> Drop for Client<S> {
    fn drop(&mut self) {
        lock(&self.clients.places).taken.retain(|place| place.id != self.id);
        self.clients.left.notify_all();
    }
}

impl<S: Stream> Read for Client<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.before_deadline()?.read(buffer)
    }
}

impl<S: Stream> Write for Client<S> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.before_deadline()?.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.before_deadline()?.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two places; each client is answered a byte for each that it sends.
    fn echo() -> (tempfile::TempDir, impl Fn() -> UnixStream) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("echo");
        let listener = UnixListener::bind(&path).unwrap();
        serve(
            "echo",
            listener,
            2,
            || {},
            |client| {
                let mut byte = [0];
                loop {
                    client.allow(Duration::from_secs(20));
                    client.read_exact(&mut byte)?;
                    client.is_served();
                    client.write_all(&byte)?;
                }
            },
        )
        .unwrap();
        (directory, move || UnixStream::connect(&path).unwrap())
    }

    fn is_served(mut stream: &UnixStream) -> bool {
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut byte = [0];
        stream.write_all(b"x").is_ok() && stream.read_exact(&mut byte).is_ok()
    }

    #[test]
    fn for_a_newcomer_goes_who_was_served_longest_ago() {
        let (_directory, connect) = echo();
        let (silent, busy) = (connect(), connect());
        assert!(is_served(&busy));
        let newcomer = connect();
        assert!(is_served(&newcomer));
        assert!(is_served(&busy), "the one that was served just now had to go");
        assert!(!is_served(&silent));
        assert!(is_served(&newcomer));
        drop(busy);
        let next = connect();
        assert!(is_served(&next) && is_served(&newcomer));
    }

    #[test]
    fn who_comes_and_goes_drives_nobody_out() {
        let (_directory, connect) = echo();
        let quiet = connect();
        assert!(is_served(&quiet));
        for _ in 0..200 {
            assert!(is_served(&connect()));
        }
        assert!(is_served(&quiet));
    }

    #[test]
    fn a_client_that_sends_slowly_ends_at_its_deadline() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("slow");
        let listener = UnixListener::bind(&path).unwrap();
        serve(
            "slow",
            listener,
            2,
            || {},
            |client| {
                client.allow(Duration::from_millis(200));
                let mut all = [0; 1000];
                client.read_exact(&mut all)
            },
        )
        .unwrap();
        let mut stream = UnixStream::connect(&path).unwrap();
        let start = Instant::now();
        while stream.write_all(b"x").is_ok() {
            assert!(start.elapsed() < Duration::from_secs(10));
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(start.elapsed() >= Duration::from_millis(180), "{:?}", start.elapsed());
    }
}

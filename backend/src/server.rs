//! The life of the daemon: waits for a VMM, serves it, survives its exit, serves the next one,
//! and ends on SIGTERM or SIGINT.

use crate::config::Args;
use crate::configuration::{self, Configuration};
use crate::control;
use crate::device::{say, Device, GuestMap, GuestMemory};
use crate::engine::{Engine, Port, Threads};
use crate::logging;
use crate::notify::Manager;
use crate::sandbox::{self, Sandbox};
use crate::shares;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};
use vhost::vhost_user::Listener;
use vhost_user_backend::{ShutdownHandle, VhostUserDaemon};
use vm_memory::GuestMemoryAtomic;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::event::{new_event_consumer_and_notifier, EventConsumer, EventFlag};

/// Size of the blocks that are managed: 2 MiB, the huge page of x86-64.
const BLOCK_SHIFT: u32 = 21;
/// Pause after a connection that failed at once, so that a broken peer cannot make us spin.
const AFTER_FAILURE: Duration = Duration::from_millis(50);

/// Why the daemon cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A socket cannot be listened on.
    #[error("cannot listen on {path}: {source}; {remedy}")]
    Listen {
        /// The socket's path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
        /// What to do about it.
        remedy: &'static str,
    },
    /// The configuration file is refused.
    #[error("{0}")]
    Configuration(#[from] configuration::Error),
    /// The address of the metrics cannot be listened on.
    #[error("cannot listen on {address} for the metrics: {source}; take another port")]
    Metrics {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The directory that VMs share cannot be entered.
    #[error(
        "cannot enter {path} to share with other VMs: {source}; give a directory on this host \
             that exists and may be written to"
    )]
    Shares {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The daemon cannot be shut in.
    #[error("{0}")]
    Sandbox(#[from] sandbox::Error),
    /// The inherited descriptor is none that can be listened on.
    #[error(
        "file descriptor {fd} is not a listening unix socket: {source}; pass one that is, \
             for example from a systemd .socket unit"
    )]
    Inherited {
        /// The descriptor's number.
        fd: i32,
        /// What the system said.
        source: io::Error,
    },
    /// The system refuses something basic.
    #[error("cannot {what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

fn system(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::System { what, source }
}

/// A socket path that we created, removed when dropped.
struct Created(PathBuf);

impl Drop for Created {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            if error.kind() != io::ErrorKind::NotFound {
                log::warn!("cannot remove {}: {error}", self.0.display());
            }
        }
    }
}

/// Listens on `path`, which `bind` creates. A socket that a dead daemon left there is replaced; a
/// live one is not.
fn listen(
    path: &Path,
    bind: impl Fn(&Path) -> io::Result<UnixListener>,
) -> Result<(UnixListener, Created), Error> {
    let failed = |source, remedy| Error::Listen { path: path.to_owned(), source, remedy };
    match bind(path) {
        Ok(listener) => return Ok((listener, Created(sandbox::settled(path)))),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
        Err(error) => {
            return Err(failed(error, "check that its directory exists and may be written to"))
        }
    }
    match UnixStream::connect(path) {
        Ok(_) => {
            let source = io::Error::from(io::ErrorKind::AddrInUse);
            return Err(failed(
                source,
                "another process serves it: stop that one, or take another path",
            ));
        }
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
        Err(error) => {
            return Err(failed(error, "it exists and is not a socket of ours: move it away"))
        }
    }
    std::fs::remove_file(path)
        .and_then(|()| bind(path))
        .map(|listener| (listener, Created(sandbox::settled(path))))
        .map_err(|error| {
            failed(error, "a stale socket is there that cannot be replaced: remove it")
        })
}

/// What signals ask for. The end is set by the first such signal; tells the running connection, and whoever waits for the next one.
struct Ending {
    asked: AtomicBool,
    connection: Mutex<Option<ShutdownHandle>>,
    /// What SIGHUP reads again, once the daemon has begun.
    configuration: OnceLock<Arc<Configuration>>,
    /// Asked for it before that.
    reload_early: AtomicBool,
}

impl Ending {
    fn asked(&self) -> bool {
        self.asked.load(Ordering::SeqCst)
    }

    /// Makes `connection` the running one (or none); ends it at once if the end was asked for.
    fn watch(&self, connection: Option<ShutdownHandle>) {
        let mut running = crate::engine::lock(&self.connection);
        if let (Some(connection), true) = (&connection, self.asked()) {
            connection.shutdown();
        }
        *running = connection;
    }

    fn ask(&self) {
        self.asked.store(true, Ordering::SeqCst);
        if let Some(connection) = &*crate::engine::lock(&self.connection) {
            connection.shutdown();
        }
    }

    fn reload(&self) {
        let Some(configuration) = self.configuration.get() else {
            self.reload_early.store(true, Ordering::SeqCst);
            return;
        };
        if let Err(error) = configuration.reload() {
            log::error!("the settings stay as they are: {error}");
        }
    }

    /// The daemon has begun with this.
    fn begin(&self, configuration: Arc<Configuration>) {
        // There is one beginning.
        let _ = self.configuration.set(configuration);
        if self.reload_early.load(Ordering::SeqCst) {
            self.reload();
        }
    }
}

/// Handles signals on a thread of its own. The consumer becomes readable when the end is asked
/// for.
fn handle_signals(mut signals: Signals) -> Result<(Arc<Ending>, EventConsumer), Error> {
    let (consumer, notifier) =
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)
            .map_err(system("make an event descriptor"))?;
    let ending = Arc::new(Ending {
        asked: AtomicBool::new(false),
        connection: Mutex::new(None),
        configuration: OnceLock::new(),
        reload_early: AtomicBool::new(false),
    });
    let theirs = Arc::clone(&ending);
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for signal in signals.forever() {
                if signal == SIGHUP {
                    theirs.reload();
                    continue;
                }
                theirs.ask();
                if let Err(error) = notifier.notify() {
                    log::debug!("asked to end more than once: {error}");
                }
            }
        })
        .map_err(system("start a thread"))?;
    Ok((ending, consumer))
}

/// Runs the daemon until it is asked to end.
///
/// # Errors
/// If it cannot start; once it serves, nothing that a VMM does ends it.
pub fn run(args: &Args) -> Result<(), Error> {
    let started = Instant::now();
    crate::backing::survive_truncated_memory().map_err(system("handle SIGBUS"))?;
    // From here on they are noted, and none ends us where a socket would be left behind.
    let signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(system("handle signals"))?;
    let settings = configuration::at_start(args.config.as_deref(), &args.settings)?;
    logging::set_level(settings.log_level);
    let (listener, created) = match (&args.socket_path, args.fd) {
        (Some(path), _) => {
            let (listener, created) = listen(path, |path| UnixListener::bind(path))?;
            (listener, Some(created))
        }
        (None, Some(fd)) => (
            crate::backing::inherit_listener(fd)
                .map_err(|source| Error::Inherited { fd, source })?,
            None,
        ),
        // The command line demands one; callers that build `Args` themselves may not.
        (None, None) => {
            let source = io::Error::new(io::ErrorKind::InvalidInput, "no --socket-path, no --fd");
            return Err(Error::System { what: "listen", source });
        }
    };
    let control = args.control_socket.as_deref();
    let control = control.map(|path| listen(path, crate::backing::bind_private)).transpose()?;
    let metrics = args.metrics_address.map(listen_metrics).transpose()?;
    let manager = Manager::reach();
    let config = args.config.as_deref().map(sandbox::settled);
    let share_dir = args.share_dir.as_deref().map(settled_directory).transpose()?;
    let sockets = created.as_ref().into_iter().chain(control.as_ref().map(|(_, made)| made));
    let files = sandbox::Files {
        read: config.as_deref().map(sandbox::directories_of).unwrap_or_default(),
        written: sockets
            .filter_map(|Created(path)| path.parent().map(Path::to_owned))
            .chain(share_dir.clone())
            .collect(),
        creates: share_dir.is_some(),
    };
    // Whatever needs a socket, or a file that is not among these, was done before.
    let sandbox = Sandbox::new(args.sandbox, files);
    sandbox.enter()?;
    let (ending, end) = handle_signals(signals)?;
    let threads = Engine::start(settings.engine(BLOCK_SHIFT)).map_err(system("start a thread"))?;
    let configuration = Arc::new(Configuration::new(
        config,
        args.settings.clone(),
        settings,
        Arc::clone(threads.engine()),
    ));
    // Ends with us; the kernel would end it as well.
    let (_sharing, sharing_ends) = channel();
    if let Some(directory) = &share_dir {
        shares::start(directory, Arc::clone(threads.engine()), sharing_ends)
            .map_err(|source| Error::Shares { path: directory.clone(), source })?;
    }
    ending.begin(Arc::clone(&configuration));
    let subject = Arc::new(control::Subject {
        name: args.name(),
        started,
        engine: Arc::clone(threads.engine()),
        configuration,
    });
    let _control = control
        .map(|(listener, created)| control::serve(listener, Arc::clone(&subject)).map(|()| created))
        .transpose()
        .map_err(system("start a thread"))?;
    if let Some(listener) = metrics {
        control::serve_metrics(listener, subject).map_err(system("start a thread"))?;
    }
    sandbox.seal()?;
    manager.ready();
    serve(listener, &threads, &ending, &end)
}

fn settled_directory(path: &Path) -> Result<PathBuf, Error> {
    path.canonicalize().map_err(|source| Error::Shares { path: path.to_owned(), source })
}

fn listen_metrics(address: SocketAddr) -> Result<TcpListener, Error> {
    let failed = |source| Error::Metrics { address, source };
    let listener = TcpListener::bind(address).map_err(failed)?;
    // The port may have been left to the system.
    let address = listener.local_addr().map_err(failed)?;
    log::info!("metrics at http://{address}/metrics");
    Ok(listener)
}

fn serve(
    listener: UnixListener,
    threads: &Threads,
    ending: &Ending,
    end: &EventConsumer,
) -> Result<(), Error> {
    let epoll = Epoll::new().map_err(system("wait for a VMM"))?;
    for fd in [listener.as_raw_fd(), end.as_raw_fd()] {
        epoll
            .ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0))
            .map_err(system("wait for a VMM"))?;
    }
    let mut listener = Listener::from(listener);
    let said = Arc::new(Mutex::new(Vec::new()));
    say(&said, crate::backing::host_findings(BLOCK_SHIFT));
    log::info!("waiting for a VMM");
    loop {
        let mut events = [EpollEvent::default()];
        match epoll.wait(-1, &mut events) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(system("wait for a VMM")(error)),
        }
        if ending.asked() {
            log::info!("asked to end; the guest's memory stays as it is");
            return Ok(());
        }
        serve_one(&mut listener, threads.engine(), &said, ending);
    }
}

/// Serves one VMM until it leaves.
fn serve_one(
    listener: &mut Listener,
    engine: &Arc<Engine>,
    said: &Arc<Mutex<Vec<crate::backing::Finding>>>,
    ending: &Ending,
) {
    let memory: GuestMemory = GuestMemoryAtomic::new(GuestMap::new());
    let device = Arc::new(Device::new(memory.clone(), Arc::clone(engine), Arc::clone(said)));
    let queues = Arc::clone(device.queues());
    // Before the first message is read, which may be a memory table.
    engine.attach(Some(Arc::clone(&queues) as Arc<dyn Port>));
    let result = VhostUserDaemon::new("gemini".into(), device, memory).and_then(|mut daemon| {
        daemon.start(listener)?;
        log::info!("a VMM connected");
        ending.watch(daemon.shutdown_handle());
        let result = daemon.wait();
        ending.watch(None);
        queues.close();
        // Ends the frame's threads, and with them the last discard.
        drop(daemon);
        result
    });
    queues.stop_all();
    engine.attach(None);
    match result {
        Ok(()) => log::info!("the VMM left; waiting for the next one"),
        Err(vhost_user_backend::Error::HandleRequest(
            vhost::vhost_user::Error::Disconnected | vhost::vhost_user::Error::PartialMessage,
        )) => log::info!("the VMM left; waiting for the next one"),
        Err(error) => {
            log::warn!("the VMM's connection ended: {error}");
            std::thread::sleep(AFTER_FAILURE);
        }
    }
}

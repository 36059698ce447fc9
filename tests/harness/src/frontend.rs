//! A vhost-user session of a well-behaved monitor, on the front end of the vhost
//! crate.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VringConfigData};
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use crate::log::DirtyLog;
use crate::memory::GuestMemory;
use crate::ring::{Ring, RingLayout};
use crate::wire::{self, Config};

/// Feature bit of virtio 1.x devices.
pub const F_VERSION_1: u64 = 1 << 32;

/// Feature bit of a daemon that can log what it writes.
const LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();
/// Flag of a queue's addresses: its used ring is logged.
const VRING_LOG: u32 = 1;

/// Longest wait for the answer to a message. A stopping queue may have to wait
/// for a discard in flight, and nothing longer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// A virtqueue with the events of both its sides.
#[derive(Debug)]
pub struct Queue {
    /// The ring in guest memory.
    pub ring: Ring,
    /// Signalled by the driver.
    pub kick: EventFd,
    /// Signalled by the device.
    pub call: EventFd,
}

impl Queue {
    /// A queue with new events.
    ///
    /// # Errors
    /// Those of `eventfd`.
    pub fn new(ring: Ring) -> anyhow::Result<Self> {
        Ok(Queue { ring, kick: EventFd::new(EFD_NONBLOCK)?, call: EventFd::new(EFD_NONBLOCK)? })
    }
}

/// A connection to the daemon.
pub struct Session {
    frontend: Frontend,
    features: u64,
    config: Config,
}

impl Session {
    /// Connects to `socket`, trying again for `patience` while nobody listens,
    /// and negotiates all that the device offers (reply acknowledgement
    /// included, so that every later message is known to be carried out).
    ///
    /// # Errors
    /// If nobody listens in time, or the daemon does not offer what the
    /// device specification demands.
    pub fn connect(socket: &Path, patience: Duration) -> anyhow::Result<Self> {
        let stream = connect(socket, patience)?;
        Self::negotiate(stream, u64::MAX)
    }

    /// Like [`Session::connect`], acknowledging only device features of `wanted`.
    ///
    /// # Errors
    /// As [`Session::connect`].
    pub fn connect_with(socket: &Path, patience: Duration, wanted: u64) -> anyhow::Result<Self> {
        let stream = connect(socket, patience)?;
        Self::negotiate(stream, wanted)
    }

    fn negotiate(stream: UnixStream, wanted: u64) -> anyhow::Result<Self> {
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        let mut frontend = Frontend::from_stream(stream, wire::QUEUES as u64);
        frontend.set_owner().context("SET_OWNER")?;
        let offered = frontend.get_features().context("GET_FEATURES")?;
        ensure!(
            offered & F_VERSION_1 != 0,
            "daemon does not offer VERSION_1 (features {offered:#x})"
        );
        let protocol = frontend.get_protocol_features().context("GET_PROTOCOL_FEATURES")?;
        let needed = VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::MQ;
        ensure!(
            protocol.contains(needed),
            "daemon offers protocol features {protocol:?}, not all of {needed:?}"
        );
        let optional = VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::LOG_SHMFD;
        frontend
            .set_protocol_features(needed | (protocol & optional))
            .context("SET_PROTOCOL_FEATURES")?;
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let queues = frontend.get_queue_num().context("GET_QUEUE_NUM")?;
        ensure!(queues >= wire::QUEUES as u64, "daemon has {queues} queues, not {}", wire::QUEUES);

        let device = wire::F_PREPARE | wire::F_RELEASE | wire::F_STATS | wire::F_TRIM;
        let transport = F_VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let features = offered & ((device & wanted) | transport);
        frontend.set_features(features).context("SET_FEATURES")?;

        let mut session = Session { frontend, features, config: Config::parse(&[]) };
        session.config = session.read_config()?;
        ensure!(
            session.config.version == 1,
            "device has version {}, this driver knows 1",
            session.config.version
        );
        Ok(session)
    }

    /// The acknowledged features.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The configuration as read at the start.
    #[must_use]
    pub fn config(&self) -> Config {
        self.config
    }

    /// Reads the configuration space.
    ///
    /// # Errors
    /// If the daemon does not answer with it.
    pub fn read_config(&mut self) -> anyhow::Result<Config> {
        let size = u32::try_from(wire::CONFIG_LEN)?;
        let (_, bytes) = self
            .frontend
            .get_config(0, size, VhostUserConfigFlags::empty(), &[0; wire::CONFIG_LEN])
            .context("GET_CONFIG")?;
        Ok(Config::parse(&bytes))
    }

    /// Hands the memory over.
    ///
    /// # Errors
    /// If the daemon refuses it.
    pub fn set_memory(&self, memory: &GuestMemory) -> anyhow::Result<()> {
        self.frontend.set_mem_table(&memory.table()).context("SET_MEM_TABLE")?;
        Ok(())
    }

    /// Starts queue `index` at `base`, the index of the first buffer that the
    /// device is to use.
    ///
    /// # Errors
    /// If the daemon refuses a step of it.
    pub fn start_queue(
        &mut self,
        index: usize,
        queue: &Queue,
        memory: &GuestMemory,
        base: u16,
    ) -> anyhow::Result<()> {
        let frontend = &mut self.frontend;
        frontend.set_vring_num(index, queue.ring.layout().size).context("SET_VRING_NUM")?;
        frontend.set_vring_base(index, base).context("SET_VRING_BASE")?;
        self.tell_addresses(index, queue, memory)?;
        let frontend = &mut self.frontend;
        frontend.set_vring_call(index, &queue.call).context("SET_VRING_CALL")?;
        frontend.set_vring_kick(index, &queue.kick).context("SET_VRING_KICK")?;
        frontend.set_vring_enable(index, true).context("SET_VRING_ENABLE")?;
        // What was offered before the start has been kicked in vain.
        queue.kick.write(1)?;
        Ok(())
    }

    /// Tells where queue `index` is, as a monitor also does while it runs.
    fn tell_addresses(
        &self,
        index: usize,
        queue: &Queue,
        memory: &GuestMemory,
    ) -> anyhow::Result<()> {
        let RingLayout { size, desc, avail, used } = queue.ring.layout();
        let address = |gpa| memory.host_address(memory.offset(gpa));
        let logging = self.features & LOG_ALL != 0;
        let config = VringConfigData {
            queue_max_size: size,
            queue_size: size,
            flags: u32::from(logging) * VRING_LOG,
            desc_table_addr: address(desc),
            used_ring_addr: address(used),
            avail_ring_addr: address(avail),
            log_addr: logging.then_some(used),
        };
        self.frontend.set_vring_addr(index, &config).context("SET_VRING_ADDR")
    }

    /// Hands a log over, in which the daemon is to note what it writes if it was
    /// told to log.
    ///
    /// # Errors
    /// If the daemon refuses it.
    pub fn set_log(&mut self, log: &DirtyLog) -> anyhow::Result<()> {
        let region = VhostUserDirtyLogRegion {
            mmap_size: log.size(),
            mmap_offset: 0,
            mmap_handle: log.file().as_raw_fd(),
        };
        // The header of this message asks for no acknowledgement: its answer is one.
        self.frontend.set_hdr_flags(VhostUserHeaderFlag::empty());
        let result = self.frontend.set_log_base(0, Some(region)).context("SET_LOG_BASE");
        self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        result
    }

    /// Has the daemon log what it writes, or not any more, while the queues run,
    /// as a monitor does that begins or ends to migrate its guest.
    ///
    /// # Errors
    /// If the daemon refuses a step of it.
    pub fn set_logging(
        &mut self,
        on: bool,
        queues: &[Queue],
        memory: &GuestMemory,
    ) -> anyhow::Result<()> {
        self.features = if on { self.features | LOG_ALL } else { self.features & !LOG_ALL };
        self.frontend.set_features(self.features).context("SET_FEATURES")?;
        for (index, queue) in queues.iter().enumerate() {
            self.tell_addresses(index, queue, memory)?;
        }
        Ok(())
    }

    /// Stops queue `index` and returns the index of the next buffer that the
    /// device would have used.
    ///
    /// # Errors
    /// If the daemon does not answer.
    pub fn stop_queue(&mut self, index: usize) -> anyhow::Result<u16> {
        self.frontend.set_vring_enable(index, false).context("SET_VRING_ENABLE")?;
        let base = self.frontend.get_vring_base(index).context("GET_VRING_BASE")?;
        u16::try_from(base).context("GET_VRING_BASE answered no ring index")
    }

    /// Resets the device by the message for it; the queues have to be started
    /// again afterwards.
    ///
    /// # Errors
    /// If the daemon does not know the message or does not answer.
    pub fn reset(&mut self) -> anyhow::Result<()> {
        self.frontend.reset_device().context("RESET_DEVICE")?;
        // A reset takes the accepted features back.
        self.frontend.set_features(self.features).context("SET_FEATURES")?;
        Ok(())
    }

    /// Stops all queues as a monitor does when the guest resets the device.
    ///
    /// # Errors
    /// If the daemon does not answer.
    pub fn stop_queues(&mut self) -> anyhow::Result<()> {
        for index in 0..wire::QUEUES {
            self.stop_queue(index)?;
        }
        Ok(())
    }
}

/// Connects to a listening socket, trying again for `patience`.
///
/// # Errors
/// If nobody listens in time.
pub fn connect(socket: &Path, patience: Duration) -> anyhow::Result<UnixStream> {
    let deadline = Instant::now() + patience;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() >= deadline => {
                return Err(error)
                    .with_context(|| format!("cannot connect to {}", socket.display()));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

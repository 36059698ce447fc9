//! The virtio device: features, configuration, queues and memory tables, in the frame of
//! vhost-user-backend. It validates and carries; it decides nothing.

mod dirty_log;
mod queues;
mod vring;
mod wire;

pub use queues::Queues;
pub use vring::{GuestMap, GuestMemory};

use crate::backing::{close_abandoned, page_size, Finding, Memory, RegionDesc, Severity};
use crate::engine::{lock, Engine, RELEASE_MAX};
use crate::protocol::{
    Config, F_PREPARE, F_RELEASE, F_STATS, F_TRIM, PAGE_SHIFT, VERSION, VQ_COUNT, VQ_RELEASE,
};
use dirty_log::{DirtyLog, DirtyPages};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::VhostUserBackend;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    new_event_consumer_and_notifier, EventConsumer, EventFlag, EventNotifier,
};
use vring::Vring;

/// Largest queue that the VMM may choose; QEMU's own limit.
const QUEUE_SIZE: usize = 1024;
/// Threads of the frame: one for releases, which never wait for anything else, one for the rest.
const RELEASE_THREAD: usize = 1;

/// The device of one connection.
pub struct Device {
    queues: Arc<Queues>,
    engine: Arc<Engine>,
    memory: GuestMemory,
    log: DirtyLog,
    /// The VMM wants to know what we write: the guest is being migrated.
    logging: AtomicBool,
    /// What was said of the memory last, so that the same is not said at every memory table.
    said: Arc<Mutex<Vec<Finding>>>,
    /// Ends of exit events that the frame turned into numbers and never closes.
    abandoned: Mutex<Vec<RawFd>>,
}

impl Drop for Device {
    fn drop(&mut self) {
        // The frame's threads, which alone waited for them, were joined before the frame let
        // go of the device.
        lock(&self.abandoned).drain(..).for_each(close_abandoned);
    }
}

impl Device {
    /// A device for a new connection. `said` outlives connections.
    pub fn new(memory: GuestMemory, engine: Arc<Engine>, said: Arc<Mutex<Vec<Finding>>>) -> Self {
        let queues = Arc::new(Queues::new(memory.clone(), Arc::clone(&engine)));
        Self {
            queues,
            engine,
            memory,
            log: DirtyLog::default(),
            logging: AtomicBool::new(false),
            said,
            abandoned: Mutex::default(),
        }
    }

    /// The queues, for the engine's way to the driver.
    pub fn queues(&self) -> &Arc<Queues> {
        &self.queues
    }

    /// The regions of the frame's memory map, with descriptors of their own.
    fn regions(memory: &GuestMemory) -> io::Result<Vec<RegionDesc>> {
        let memory = memory.memory();
        memory
            .iter()
            .map(|region| {
                let file = region
                    .file_offset()
                    .ok_or_else(|| io::Error::other("a memory region without a file"))?;
                Ok(RegionDesc {
                    guest_addr: region.start_addr().0,
                    size: region.len(),
                    file: file.file().try_clone()?,
                    file_offset: file.start(),
                })
            })
            .collect()
    }
}

/// Says what makes aligning pointless, or less than it could be, with its remedy; and nothing
/// where that was said last.
pub fn say(said: &Mutex<Vec<Finding>>, findings: Vec<Finding>) {
    let mut said = lock(said);
    if *said == findings {
        return;
    }
    for finding in &findings {
        match finding.severity {
            Severity::Error => log::error!("{}", finding.message),
            Severity::Warning => log::warn!("{}", finding.message),
            Severity::Info => log::info!("{}", finding.message),
        }
    }
    *said = findings;
}

impl VhostUserBackend for Device {
    type Bitmap = DirtyPages;
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        VQ_COUNT
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        // Not where the host's pages are larger than what it counts in.
        let trim = u64::from(page_size() == 1 << PAGE_SHIFT) << F_TRIM;
        // The same under every policy: a daemon that is started anew under another one would
        // otherwise be refused by a driver that counts on PREPARE.
        (1 << VIRTIO_F_VERSION_1)
            | (1 << VIRTIO_RING_F_EVENT_IDX)
            | (1 << VIRTIO_RING_F_INDIRECT_DESC)
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
            | VhostUserVirtioFeatures::LOG_ALL.bits()
            | (1 << F_PREPARE)
            | (1 << F_RELEASE)
            | (1 << F_STATS)
            | trim
    }

    fn acked_features(&self, features: u64) {
        self.queues.set_features(features);
        let logging = features & VhostUserVirtioFeatures::LOG_ALL.bits() != 0;
        if self.logging.swap(logging, Ordering::Relaxed) == logging {
            return;
        }
        log::info!("the guest's migration {}", if logging { "begins" } else { "is over" });
        // No discard is in flight when the VMM goes on: it copies what is there from now on.
        self.queues.quiesced(|| {
            self.engine.set_logging(logging);
            if !logging {
                self.log.end(&self.memory.memory());
            }
        });
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::LOG_SHMFD
    }

    fn reset_device(&self) {
        self.queues.stop_all();
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The frame tells the rings themselves.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = Config {
            version: VERSION,
            block_shift: self.engine.settings().block_shift,
            generation: self.engine.generation(),
            release_max: RELEASE_MAX,
            ..Config::default()
        };
        let bytes = config.encode();
        let start = offset as usize;
        // An empty answer tells the VMM that the read failed.
        bytes.get(start..start.saturating_add(size as usize)).unwrap_or_default().to_vec()
    }

    fn update_memory(&self, memory: GuestMemory) -> io::Result<()> {
        self.log.follow(&memory.memory())?;
        let regions = Self::regions(&memory)?;
        let block_shift = self.engine.settings().block_shift;
        let memory = Memory::new(regions, block_shift).map_err(|error| {
            log::error!("the VMM's memory table is refused: {error}");
            io::Error::other(error)
        })?;
        say(&self.said, memory.findings());
        self.queues.quiesced(|| self.engine.set_memory(Arc::new(memory)));
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        let release = 1 << VQ_RELEASE;
        vec![((1 << VQ_COUNT) - 1) & !release, release]
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)
            .inspect_err(|error| log::error!("cannot make an event descriptor: {error}"))
            .inspect(|(consumer, _)| lock(&self.abandoned).push(consumer.as_raw_fd()))
            .ok()
    }

    fn stop_vring(&self, queue: u32) -> io::Result<()> {
        self.queues.stop(queue as usize);
        Ok(())
    }

    fn handle_event(
        &self,
        event: u16,
        _events: EventSet,
        vrings: &[Vring],
        thread: usize,
    ) -> io::Result<()> {
        // An error returned from here would end the frame's thread: there is none.
        if let Some(vring) = vrings.get(usize::from(event)) {
            let queue = if thread == RELEASE_THREAD { VQ_RELEASE } else { usize::from(event) };
            self.queues.kicked(queue, vring);
        }
        Ok(())
    }
}

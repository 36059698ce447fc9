//! The frame's virtqueue, made safe against a peer's file descriptors.
//!
//! The frame reads the kick descriptor and writes the call descriptor as the peer made them: one
//! that blocks would hang a thread for ever, one that fails would end the frame's worker while
//! the connection stays up. Here both are made non-blocking, and a kick descriptor that cannot
//! be read is let go.

use super::dirty_log::DirtyPages;
use std::fs::File;
use std::io::{self, ErrorKind};
use vhost_user_backend::{VringMutex, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::{Error, QueueT};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// The guest's memory by one memory table, as the frame maps it.
pub type GuestMap = GuestMemoryMmap<DirtyPages>;
/// The guest's memory by the memory table in force.
pub type GuestMemory = GuestMemoryAtomic<GuestMap>;

/// A virtqueue.
#[derive(Clone)]
pub struct Vring(VringMutex<GuestMemory>);

impl<'a> VringStateGuard<'a, GuestMemory> for Vring {
    type G = <VringMutex<GuestMemory> as VringStateGuard<'a, GuestMemory>>::G;
}

impl<'a> VringStateMutGuard<'a, GuestMemory> for Vring {
    type G = <VringMutex<GuestMemory> as VringStateMutGuard<'a, GuestMemory>>::G;
}

/// The descriptor made non-blocking; none if it cannot be.
fn nonblocking(file: Option<File>, what: &str) -> Option<File> {
    let file = file?;
    match crate::backing::set_nonblocking(&file) {
        Ok(()) => Some(file),
        Err(error) => {
            log::warn!("the VMM's {what} descriptor is unusable: {error}");
            None
        }
    }
}

impl VringT<GuestMemory> for Vring {
    fn new(mem: GuestMemory, max_queue_size: u16) -> Result<Self, Error> {
        VringMutex::new(mem, max_queue_size).map(Self)
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, GuestMemory>>::G {
        self.0.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, GuestMemory>>::G {
        self.0.get_mut()
    }

    fn add_used(&self, desc_index: u16, len: u32) -> Result<(), Error> {
        self.0.add_used(desc_index, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        match self.0.signal_used_queue() {
            // The counter is full: the guest has more than enough to notice.
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }

    fn enable_notification(&self) -> Result<bool, Error> {
        self.0.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), Error> {
        self.0.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, Error> {
        self.0.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.0.set_enabled(enabled);
    }

    fn set_queue_info(&self, desc: u64, avail: u64, used: u64) -> Result<(), Error> {
        self.0.set_queue_info(desc, avail, used)
    }

    fn queue_next_avail(&self) -> u16 {
        self.0.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.0.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, idx: u16) {
        let mut state = self.0.get_mut();
        // The frame reads the index from the ring whenever it is told the ring's addresses. It is
        // when a migration begins or ends, while the ring runs: buffers may have been used since.
        if !(state.is_enabled() && state.get_queue().ready()) {
            state.get_queue_mut().set_next_used(idx);
        }
    }

    fn queue_used_idx(&self) -> Result<u16, Error> {
        self.0.queue_used_idx()
    }

    fn set_queue_size(&self, num: u16) {
        self.0.set_queue_size(num);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.0.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        self.0.set_queue_ready(ready);
    }

    fn set_kick(&self, file: Option<File>) {
        self.0.set_kick(nonblocking(file, "kick"));
    }

    fn read_kick(&self) -> io::Result<bool> {
        let (result, enabled) = {
            let state = self.0.get_ref();
            let result = state.get_kick().as_ref().map_or(Ok(()), |kick| kick.consume());
            (result, state.is_enabled())
        };
        match result {
            Ok(()) => Ok(enabled),
            // Somebody else read it first: a spurious wake-up.
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(enabled),
            Err(error) => {
                log::warn!("the VMM's kick descriptor cannot be read, letting it go: {error}");
                self.0.set_kick(None);
                Ok(false)
            }
        }
    }

    fn set_call(&self, file: Option<File>) {
        self.0.set_call(nonblocking(file, "call"));
    }

    fn set_err(&self, file: Option<File>) {
        self.0.set_err(file);
    }
}

//! vhost-user messages by hand: whatever bytes, whatever descriptors.

use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::frontend;
use crate::machine::PATIENCE;
use crate::memory::GuestMemory;
use crate::ring::RingLayout;
use crate::sys::{self, Pages};
use crate::wire;

/// Numbers of the messages.
pub mod code {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    /// The first number without a meaning.
    pub const END: u32 = 48;
}

/// The version bit of a header.
pub const VERSION: u32 = 1;
/// The sender wants to know how it went.
pub const NEED_REPLY: u32 = 8;

/// Protocol features that this peer accepts: MQ, REPLY_ACK, CONFIG,
/// RESET_DEVICE, CONFIGURE_MEM_SLOTS.
const PROTOCOL: u64 = (1 << 0) | (1 << 3) | (1 << 9) | (1 << 13) | (1 << 15);
const F_PROTOCOL: u64 = 1 << 30;

/// A message: the header's three fields, the body, the descriptors.
#[derive(Debug, Default)]
pub struct Message {
    pub code: u32,
    pub flags: u32,
    /// Size that the header says; the body may have another.
    pub size: u32,
    pub body: Vec<u8>,
    pub descriptors: Vec<RawFd>,
}

impl Message {
    /// A sound message.
    pub fn new(code: u32, body: Vec<u8>) -> Self {
        Message {
            code,
            flags: VERSION,
            size: u32::try_from(body.len()).unwrap_or(u32::MAX),
            body,
            descriptors: Vec::new(),
        }
    }

    /// With descriptors.
    pub fn with(mut self, descriptors: &[RawFd]) -> Self {
        self.descriptors = descriptors.to_vec();
        self
    }

    /// As it stands on the wire.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(12 + self.body.len());
        bytes.extend_from_slice(&self.code.to_le_bytes());
        bytes.extend_from_slice(&self.flags.to_le_bytes());
        bytes.extend_from_slice(&self.size.to_le_bytes());
        bytes.extend_from_slice(&self.body);
        bytes
    }
}

/// The body of a message with numbers in it.
pub fn u64s(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// The body of a message with a queue and a number.
pub fn vring_state(index: u32, number: u32) -> Vec<u8> {
    [index.to_le_bytes(), number.to_le_bytes()].concat()
}

/// The body of SET_VRING_ADDR.
pub fn vring_addr(index: u32, flags: u32, desc: u64, used: u64, avail: u64) -> Vec<u8> {
    let mut body = vring_state(index, flags);
    body.extend(u64s(&[desc, used, avail, 0]));
    body
}

/// The body of SET_MEM_TABLE: `regions` are (guest address, size, address in
/// the monitor, offset).
pub fn mem_table(count: u32, regions: &[[u64; 4]]) -> Vec<u8> {
    let mut body = vring_state(count, 0);
    for region in regions {
        body.extend(u64s(region));
    }
    body
}

/// A connection by hand.
pub struct Raw {
    stream: UnixStream,
    events: Vec<EventFd>,
}

impl Raw {
    /// Connects.
    pub fn connect(socket: &Path) -> anyhow::Result<Self> {
        let stream = frontend::connect(socket, PATIENCE)?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.set_read_timeout(Some(Duration::from_millis(100)))?;
        let events = (0..8).map(|_| EventFd::new(EFD_NONBLOCK)).collect::<io::Result<Vec<_>>>()?;
        Ok(Raw { stream, events })
    }

    /// Sends a message. False if the daemon has closed the connection; that is
    /// its right.
    ///
    /// # Errors
    /// If it does not take bytes any more, and yet does not close.
    pub fn send(&self, message: &Message) -> anyhow::Result<bool> {
        self.send_bytes(&message.bytes(), &message.descriptors)
    }

    /// Sends bytes, and descriptors with the first of them.
    ///
    /// # Errors
    /// As [`Raw::send`].
    pub fn send_bytes(&self, bytes: &[u8], descriptors: &[RawFd]) -> anyhow::Result<bool> {
        match self.stream.send_with_fds(&[bytes], descriptors) {
            Ok(_) => Ok(true),
            Err(error) => match error.errno() {
                libc::EPIPE | libc::ECONNRESET => Ok(false),
                // The kernel would not send these descriptors.
                libc::EBADF | libc::EINVAL | libc::ETOOMANYREFS => Ok(true),
                errno => anyhow::bail!(
                    "daemon takes no messages: {}",
                    io::Error::from_raw_os_error(errno)
                ),
            },
        }
    }

    /// Waits until the daemon has dealt with all that was sent: asks for something
    /// harmless and waits for its answer. False if it closed the connection, or
    /// takes the question for the rest of an earlier message.
    ///
    /// # Errors
    /// As [`Raw::send`].
    pub fn barrier(&mut self) -> anyhow::Result<bool> {
        if !self.send(&Message::new(code::GET_FEATURES, Vec::new()))? {
            return Ok(false);
        }
        let mut header = [0; 12];
        while self.stream.read_exact(&mut header).is_ok() {
            let [c0, c1, c2, c3, _, _, _, _, s0, s1, s2, s3] = header;
            let size = u32::from_le_bytes([s0, s1, s2, s3]);
            let mut body = vec![0; usize::try_from(size)?.min(8192)];
            if self.stream.read_exact(&mut body).is_err() {
                return Ok(false);
            }
            if u32::from_le_bytes([c0, c1, c2, c3]) == code::GET_FEATURES {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Takes all steps up to `depth`: 1 features, 2 memory, 3 running rings that
    /// lie at `rings` (a guest address) in `memory`.
    ///
    /// # Errors
    /// As [`Raw::send`].
    pub fn handshake(
        &mut self,
        depth: u64,
        memory: &GuestMemory,
        rings: u64,
        table: &Message,
    ) -> anyhow::Result<()> {
        if depth == 0 {
            return Ok(());
        }
        let features = F_PROTOCOL | frontend::F_VERSION_1 | 7;
        for message in [
            Message::new(code::SET_OWNER, Vec::new()),
            Message::new(code::GET_FEATURES, Vec::new()),
            Message::new(code::GET_PROTOCOL_FEATURES, Vec::new()),
            Message::new(code::SET_PROTOCOL_FEATURES, u64s(&[PROTOCOL])),
            Message::new(code::SET_FEATURES, u64s(&[features])),
        ] {
            self.send(&message)?;
        }
        if depth >= 2 {
            self.send(table)?;
        }
        if depth >= 3 {
            for index in 0..wire::QUEUES as u64 {
                self.start_ring(memory, index, rings + index * (16 << 10))?;
            }
        }
        Ok(())
    }

    fn start_ring(&self, memory: &GuestMemory, index: u64, gpa: u64) -> anyhow::Result<()> {
        let layout = RingLayout::new(gpa, 64);
        let address = |gpa| memory.host_address(memory.offset(gpa));
        let queue = u32::try_from(index)?;
        let event = usize::try_from(index)?;
        let (desc, used, avail) = (layout.desc, layout.used, layout.avail);
        for message in [
            Message::new(code::SET_VRING_NUM, vring_state(queue, 64)),
            Message::new(code::SET_VRING_BASE, vring_state(queue, 0)),
            Message::new(
                code::SET_VRING_ADDR,
                vring_addr(queue, 0, address(desc), address(used), address(avail)),
            ),
            Message::new(code::SET_VRING_CALL, u64s(&[index]))
                .with(&[self.events[event].as_raw_fd()]),
            Message::new(code::SET_VRING_KICK, u64s(&[index]))
                .with(&[self.events[event + 4].as_raw_fd()]),
            Message::new(code::SET_VRING_ENABLE, vring_state(queue, 1)),
        ] {
            self.send(&message)?;
        }
        Ok(())
    }

    /// Kicks all rings.
    pub fn kick(&self) {
        for event in &self.events[4..] {
            // A full counter is as good as a kick.
            let _ = event.write(1);
        }
    }
}

/// Descriptors of kinds that a message does not expect, and one that it does.
pub struct Zoo {
    /// A memory file that is sound.
    pub memory: std::fs::File,
    others: Vec<OwnedFd>,
}

impl Zoo {
    /// Opens one of each kind; `size` is that of the sound memory file.
    ///
    /// # Errors
    /// If one cannot be opened.
    pub fn new(size: u64) -> anyhow::Result<Self> {
        let memory = sys::memfd(size, Pages::Any)?;
        let mut others: Vec<OwnedFd> = Vec::new();
        let (one, other) = UnixStream::pair()?;
        others.extend([OwnedFd::from(one), OwnedFd::from(other)]);
        for path in ["/dev/null", "/dev/zero", "/proc/self/status", "/tmp", "/proc/self/mem"] {
            others.push(std::fs::File::open(path)?.into());
        }
        // Read only, and empty.
        let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
        others.push(std::fs::File::open(path)?.into());
        others.push(sys::memfd(0, Pages::Any)?.into());
        // Smaller than any region.
        others.push(sys::memfd(100, Pages::Any)?.into());
        Ok(Zoo { memory, others })
    }

    /// The descriptors of the wrong kinds.
    pub fn wrong(&self) -> Vec<RawFd> {
        self.others.iter().map(AsRawFd::as_raw_fd).collect()
    }

    /// The sound memory file's.
    pub fn sound(&self) -> RawFd {
        self.memory.as_raw_fd()
    }
}

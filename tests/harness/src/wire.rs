//! The wire format of virtio-gemini, as the model driver writes and reads it.
//!
//! Written from the device specification and not shared with the daemon: a
//! mistake in one of the two must not hide in the other.

/// Number of queues.
pub const QUEUES: usize = 4;
/// Index of the queue that tells host states.
pub const HINTQ: usize = 0;
/// Index of the queue that tells guest states.
pub const REPORTQ: usize = 1;
/// Index of the queue of requests that keep contents.
pub const CTRLQ: usize = 2;
/// Index of the queue of requests that drop contents.
pub const RELEASEQ: usize = 3;

/// Feature bit: PREPARE.
pub const F_PREPARE: u64 = 1 << 0;
/// Feature bit: RELEASE and RENEW.
pub const F_RELEASE: u64 = 1 << 1;
/// Feature bit: STATS.
pub const F_STATS: u64 = 1 << 2;
/// Feature bit: TRIM.
pub const F_TRIM: u64 = 1 << 4;

/// Most records in one batch.
pub const MAX_RECORDS: usize = 4096;
/// Most ranges in one request.
pub const MAX_RANGES: usize = 256;

/// Bytes of the configuration space.
pub const CONFIG_LEN: usize = 32;
/// Bytes of a batch's header.
pub const BATCH_LEN: usize = 16;
/// Bytes of a record.
pub const RECORD_LEN: usize = 24;
/// Bytes of an advice.
pub const ADVICE_LEN: usize = 24;
/// Bytes of a request's header.
pub const REQUEST_LEN: usize = 16;
/// Bytes of a range.
pub const RANGE_LEN: usize = 16;
/// Bytes of an answer's header.
pub const RESPONSE_LEN: usize = 16;
/// Bytes of the statistics.
pub const STATS_LEN: usize = 64;

/// Type of a batch of records.
pub const BATCH_STATE: u16 = 0;
/// Type of a batch with an advice.
pub const BATCH_ADVICE: u16 = 1;
/// Bit of an advice: the host has no huge pages to give.
pub const ADVICE_SCARCE: u32 = 1 << 0;
/// First batch of a full state.
pub const SYNC_START: u16 = 1 << 0;
/// Last batch of a full state.
pub const SYNC_END: u16 = 1 << 1;

/// States of a block at the guest.
pub mod guest_state {
    /// Not reported, or not RAM.
    pub const UNKNOWN: u8 = 0;
    /// No page in use.
    pub const FREE: u8 = 1;
    /// Base pages in use.
    pub const BASE: u8 = 2;
    /// One guest huge page.
    pub const HUGE: u8 = 3;
    /// Held by the driver.
    pub const BOOKED: u8 = 4;
    /// Unmovable, reserved or offline.
    pub const PINNED: u8 = 5;

    /// The names of the states in the daemon's map, by number.
    pub const NAMES: [&str; 6] = ["unknown", "free", "base", "huge", "booked", "pinned"];
}

/// States of a block at the host.
pub mod host_state {
    /// No memory behind it.
    pub const ABSENT: u8 = 0;
    /// Base pages.
    pub const BASE: u8 = 1;
    /// One huge page.
    pub const HUGE: u8 = 2;
    /// One hugetlb page.
    pub const HUGETLB: u8 = 3;

    /// The names of the states in the daemon's map, by number.
    pub const NAMES: [&str; 4] = ["absent", "base", "huge", "hugetlb"];
}

/// Request: make host-huge, keep contents.
pub const REQ_PREPARE: u16 = 1;
/// Request: tell the host states.
pub const REQ_QUERY: u16 = 2;
/// Request: tell the statistics.
pub const REQ_STATS: u16 = 3;
/// Request: drop.
pub const REQ_RELEASE: u16 = 16;
/// Request: drop, then make host-huge.
pub const REQ_RENEW: u16 = 17;
/// Request: drop base pages.
pub const REQ_TRIM: u16 = 18;

/// Status: done.
pub const S_OK: u32 = 0;
/// Status: not all done.
pub const S_FAILED: u32 = 1;
/// Status: made in an older generation; nothing done.
pub const S_VOID: u32 = 2;
/// Status: malformed or out of range.
pub const S_INVALID: u32 = 3;
/// Status: unknown or not negotiated.
pub const S_UNSUPPORTED: u32 = 4;
/// Status: not now.
pub const S_BUSY: u32 = 5;

/// Reads little-endian integers from a byte slice; what is not there reads as 0.
fn le<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut value = [0; N];
    if let Some(source) = bytes.get(at..at + N) {
        value.copy_from_slice(source);
    }
    value
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(le(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(le(bytes, at))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(le(bytes, at))
}

/// The configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Version of the interface.
    pub version: u32,
    /// log2 of the block size in bytes.
    pub block_shift: u32,
    /// Generation, for people.
    pub generation: u64,
    /// Most unanswered blocks on releaseq.
    pub release_max: u32,
}

impl Config {
    /// Reads it; `bytes` are [`CONFIG_LEN`] long.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Self {
        Config {
            version: u32_at(bytes, 0),
            block_shift: u32_at(bytes, 4),
            generation: u64_at(bytes, 16),
            release_max: u32_at(bytes, 24),
        }
    }
}

/// Header of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Generation that the batch belongs to.
    pub generation: u64,
    /// Number of elements that follow.
    pub count: u32,
    /// [`BATCH_STATE`] or [`BATCH_ADVICE`].
    pub kind: u16,
    /// [`SYNC_START`], [`SYNC_END`].
    pub flags: u16,
}

impl Batch {
    /// As it stands on the wire.
    #[must_use]
    pub fn bytes(&self) -> [u8; BATCH_LEN] {
        let mut bytes = [0; BATCH_LEN];
        bytes[0..8].copy_from_slice(&self.generation.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.count.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.kind.to_le_bytes());
        bytes[14..16].copy_from_slice(&self.flags.to_le_bytes());
        bytes
    }

    /// Reads it from the start of `bytes`.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Self {
        Batch {
            generation: u64_at(bytes, 0),
            count: u32_at(bytes, 8),
            kind: u16_at(bytes, 12),
            flags: u16_at(bytes, 14),
        }
    }
}

/// The state of neighbouring blocks at one layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// First block.
    pub first: u64,
    /// Number of blocks.
    pub count: u32,
    /// Base pages in use or resident in each block; 0: not counted.
    pub used: u32,
    /// One of [`guest_state`] or [`host_state`].
    pub state: u8,
    /// Always 0 today.
    pub flags: u8,
}

impl Record {
    /// As it stands on the wire.
    #[must_use]
    pub fn bytes(&self) -> [u8; RECORD_LEN] {
        let mut bytes = [0; RECORD_LEN];
        bytes[0..8].copy_from_slice(&self.first.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.count.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.used.to_le_bytes());
        bytes[16] = self.state;
        bytes[17] = self.flags;
        bytes
    }

    /// Reads it from the start of `bytes`.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Self {
        Record {
            first: u64_at(bytes, 0),
            count: u32_at(bytes, 8),
            used: u32_at(bytes, 12),
            state: bytes.get(16).copied().unwrap_or(0),
            flags: bytes.get(17).copied().unwrap_or(0),
        }
    }
}

/// A batch of records as one buffer.
#[must_use]
pub fn state_batch(generation: u64, flags: u16, records: &[Record]) -> Vec<u8> {
    let header = Batch {
        generation,
        count: u32::try_from(records.len()).unwrap_or(u32::MAX),
        kind: BATCH_STATE,
        flags,
    };
    let mut bytes = Vec::with_capacity(BATCH_LEN + records.len() * RECORD_LEN);
    bytes.extend_from_slice(&header.bytes());
    for record in records {
        bytes.extend_from_slice(&record.bytes());
    }
    bytes
}

/// What the host would like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Advice {
    /// Booking timeout in milliseconds.
    pub booking_timeout_ms: u32,
    /// Most blocks in the bucket.
    pub bucket_max: u32,
    /// Most unanswered blocks on releaseq.
    pub release_max: u32,
    /// Bits of the specification.
    pub flags: u32,
    /// Blocks that the host would like to have released.
    pub wanted: u64,
}

impl Advice {
    /// Reads it from the start of `bytes`.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Self {
        Advice {
            booking_timeout_ms: u32_at(bytes, 0),
            bucket_max: u32_at(bytes, 4),
            release_max: u32_at(bytes, 8),
            flags: u32_at(bytes, 12),
            wanted: u64_at(bytes, 16),
        }
    }
}

/// Neighbouring blocks that a request is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First block.
    pub first: u64,
    /// Number of blocks.
    pub count: u32,
}

/// A request as one buffer. `count` of the header is that of `ranges`.
#[must_use]
pub fn request(kind: u16, generation: u64, ranges: &[Range]) -> Vec<u8> {
    let count = u32::try_from(ranges.len()).unwrap_or(u32::MAX);
    request_with_count(kind, generation, count, ranges)
}

/// A request whose header says `count`, whatever follows it.
#[must_use]
pub fn request_with_count(kind: u16, generation: u64, count: u32, ranges: &[Range]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(REQUEST_LEN + ranges.len() * RANGE_LEN);
    bytes.extend_from_slice(&kind.to_le_bytes());
    bytes.extend_from_slice(&[0; 2]);
    bytes.extend_from_slice(&count.to_le_bytes());
    bytes.extend_from_slice(&generation.to_le_bytes());
    for range in ranges {
        bytes.extend_from_slice(&range.first.to_le_bytes());
        bytes.extend_from_slice(&range.count.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
    }
    bytes
}

/// Header of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response {
    /// One of the `S_` constants.
    pub status: u32,
    /// Number of elements that follow.
    pub count: u32,
    /// Generation of the device when it answered.
    pub generation: u64,
}

impl Response {
    /// Reads it from the start of `bytes`.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Self {
        Response { status: u32_at(bytes, 0), count: u32_at(bytes, 4), generation: u64_at(bytes, 8) }
    }
}

/// The device's statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stats {
    /// Managed blocks.
    pub blocks: u64,
    /// Huge at both layers.
    pub aligned: u64,
    /// Huge at the guest only.
    pub guest_only: u64,
    /// Huge at the host only.
    pub host_only: u64,
    /// Bytes copied by the host.
    pub collapse_bytes: u64,
    /// Blocks made host-huge without copy.
    pub populated: u64,
    /// Blocks dropped.
    pub released: u64,
    /// Records and requests refused.
    pub bad_records: u64,
}

impl Stats {
    /// Reads it from the start of `bytes`.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Self {
        let field = |index: usize| u64_at(bytes, index * 8);
        Stats {
            blocks: field(0),
            aligned: field(1),
            guest_only: field(2),
            host_only: field(3),
            collapse_bytes: field(4),
            populated: field(5),
            released: field(6),
            bad_records: field(7),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_and_batches_survive_the_wire() {
        let record = Record {
            first: 0x1122_3344_5566_7788,
            count: 9,
            used: 17,
            state: guest_state::BASE,
            flags: 0,
        };
        let bytes = state_batch(5, SYNC_START | SYNC_END, &[record]);
        assert_eq!(bytes.len(), BATCH_LEN + RECORD_LEN);
        let batch = Batch::parse(&bytes);
        assert_eq!((batch.generation, batch.count, batch.flags), (5, 1, 3));
        assert_eq!(Record::parse(&bytes[BATCH_LEN..]), record);
    }

    #[test]
    fn a_request_has_its_ranges_behind_its_header() {
        let bytes = request(REQ_RENEW, 3, &[Range { first: 2, count: 1 }; 2]);
        assert_eq!(bytes.len(), REQUEST_LEN + 2 * RANGE_LEN);
        assert_eq!(&bytes[..8], &[17, 0, 0, 0, 2, 0, 0, 0]);
    }

    #[test]
    fn short_bytes_read_as_zeros() {
        assert_eq!(Response::parse(&[3, 0, 0, 0]).status, 3);
        assert_eq!(Response::parse(&[3, 0, 0, 0]).generation, 0);
    }
}

//! The wire format of virtio-gemini, the Rust form of
//! `guest-driver/module/uapi/virtio_gemini.h`.
//!
//! Every structure is encoded and decoded by hand, little-endian, so that no wire byte is ever
//! reinterpreted in place. The test `tests/header.rs` compiles the header and compares every
//! constant, size and offset with this file.

/// Virtio device id (experimental range; the highest one Linux's PCI transport accepts).
pub const VIRTIO_ID: u32 = 63;
/// Version of the configuration layout.
pub const VERSION: u32 = 1;

/// PREPARE is understood on `ctrlq` (bit number).
pub const F_PREPARE: u32 = 0;
/// RELEASE and RENEW are understood on `releaseq` (bit number).
pub const F_RELEASE: u32 = 1;
/// STATS is understood on `ctrlq` (bit number).
pub const F_STATS: u32 = 2;
/// A released block may be used again only after a successful PREPARE (bit number).
pub const F_REACQUIRE: u32 = 3;
/// TRIM is understood on `releaseq` (bit number).
pub const F_TRIM: u32 = 4;

/// Queue index of `hintq` (device to driver: host states).
pub const VQ_HINT: usize = 0;
/// Queue index of `reportq` (driver to device: guest states).
pub const VQ_REPORT: usize = 1;
/// Queue index of `ctrlq` (requests that keep contents).
pub const VQ_CTRL: usize = 2;
/// Queue index of `releaseq` (requests that drop contents).
pub const VQ_RELEASE: usize = 3;
/// Number of queues; all are always present.
pub const VQ_COUNT: usize = 4;

/// Most records in one batch.
pub const MAX_RECORDS: u32 = 4096;
/// Most ranges in one request.
pub const MAX_RANGES: u32 = 256;
/// log2 of the size of a base page in bytes, the unit of TRIM.
pub const PAGE_SHIFT: u32 = 12;

/// Status of the configuration: no process takes what the driver makes available.
pub const AWAY: u32 = 1 << 0;

/// A batch of [`Record`]s.
pub const BATCH_STATE: u16 = 0;
/// A batch of exactly one [`Advice`].
pub const BATCH_ADVICE: u16 = 1;
/// First batch of a full state.
pub const SYNC_START: u16 = 1 << 0;
/// Last batch of a full state.
pub const SYNC_END: u16 = 1 << 1;

/// Request: make host-huge, keep contents.
pub const REQ_PREPARE: u16 = 1;
/// Request: tell the host states.
pub const REQ_QUERY: u16 = 2;
/// Request: tell the counters.
pub const REQ_STATS: u16 = 3;
/// Request: drop the contents.
pub const REQ_RELEASE: u16 = 16;
/// Request: drop the contents, then make host-huge.
pub const REQ_RENEW: u16 = 17;
/// Request: drop the contents of base pages.
pub const REQ_TRIM: u16 = 18;

/// Everything asked for was done.
pub const S_OK: u32 = 0;
/// Only part was done.
pub const S_FAILED: u32 = 1;
/// Made in an older generation: nothing was done.
pub const S_VOID: u32 = 2;
/// Malformed or out of range: nothing was done.
pub const S_INVALID: u32 = 3;
/// Unknown or not negotiated: nothing was done.
pub const S_UNSUPPORTED: u32 = 4;
/// Not now: nothing was done.
pub const S_BUSY: u32 = 5;

/// The host has no huge pages to give (flag of [`Advice`]).
pub const ADVICE_SCARCE: u32 = 1 << 0;
/// The host would like to have what is unused.
pub const ADVICE_RETURN: u32 = 1 << 1;
/// The host would like guest huge pages moved onto blocks that are huge in the host.
pub const ADVICE_MOVE: u32 = 1 << 2;

/// State of a block in the guest, as reported by the driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum GuestState {
    /// Not reported, or not memory.
    #[default]
    Unknown = 0,
    /// No page in use.
    Free = 1,
    /// Base pages in use.
    Base = 2,
    /// One guest huge page.
    Huge = 3,
    /// Held by the driver.
    Booked = 4,
    /// Unmovable, reserved or offline.
    Pinned = 5,
}

impl GuestState {
    /// All states, in the order of their wire values.
    pub const ALL: [GuestState; 6] =
        [Self::Unknown, Self::Free, Self::Base, Self::Huge, Self::Booked, Self::Pinned];

    /// Decodes a wire value.
    pub fn from_wire(value: u8) -> Option<Self> {
        Self::ALL.get(usize::from(value)).copied()
    }

    /// The name used in status output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Free => "free",
            Self::Base => "base",
            Self::Huge => "huge",
            Self::Booked => "booked",
            Self::Pinned => "pinned",
        }
    }
}

pub use crate::backing::HostState;

/// A little-endian reader over bytes whose length was checked by the caller's type.
fn le<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

macro_rules! wire_struct {
    ($(#[$doc:meta])* $name:ident, $size:literal {
        $($(#[$fdoc:meta])* $field:ident: $ty:ty = $at:literal),* $(,)?
    }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name {
            $($(#[$fdoc])* pub $field: $ty,)*
        }

        impl $name {
            /// Size on the wire, in bytes.
            pub const SIZE: usize = $size;
            /// Name, offset and size of every field; for the test against the header.
            pub const FIELDS: &'static [(&'static str, usize, usize)] =
                &[$((stringify!($field), $at, size_of::<$ty>())),*];

            /// Decodes the wire form; reserved bytes are ignored.
            pub fn decode(bytes: &[u8; $size]) -> Self {
                Self { $($field: <$ty>::from_le_bytes(le(bytes, $at))),* }
            }

            /// Encodes to the wire form; reserved bytes are zero.
            pub fn encode(&self) -> [u8; $size] {
                let mut out = [0; $size];
                $(out[$at..$at + size_of::<$ty>()].copy_from_slice(&self.$field.to_le_bytes());)*
                out
            }
        }
    };
}

wire_struct! {
    /// Configuration space.
    Config, 32 {
        /// [`VERSION`].
        version: u32 = 0,
        /// log2 of the block size in bytes.
        block_shift: u32 = 4,
        /// Requested booking timeout; 0: the driver's choice.
        booking_timeout_ms: u32 = 8,
        /// Most blocks in the huge bucket; 0: the driver's choice.
        bucket_max: u32 = 12,
        /// Generation at the time of reading, for people.
        generation: u64 = 16,
        /// Most unanswered blocks on `releaseq`.
        release_max: u32 = 24,
        /// [`AWAY`], which is the front end's to say: 0 from here.
        status: u32 = 28,
    }
}

wire_struct! {
    /// Header of every `hintq` and `reportq` buffer.
    Batch, 16 {
        /// Generation that the batch belongs to.
        generation: u64 = 0,
        /// Number of elements that follow.
        count: u32 = 8,
        /// One of `BATCH_*`.
        kind: u16 = 12,
        /// `SYNC_*` bits.
        flags: u16 = 14,
    }
}

wire_struct! {
    /// State of a run of blocks at one layer.
    Record, 24 {
        /// First block number.
        first: u64 = 0,
        /// Number of blocks, never 0.
        count: u32 = 8,
        /// Base pages in use (guest) or resident (host) in each block; 0: not counted.
        used: u32 = 12,
        /// A [`GuestState`] or [`HostState`] wire value.
        state: u8 = 16,
        /// 0.
        flags: u8 = 17,
    }
}

wire_struct! {
    /// What the host would like.
    Advice, 24 {
        /// Booking timeout; 0: the driver's choice.
        booking_timeout_ms: u32 = 0,
        /// Most blocks in the huge bucket; 0: the driver's choice.
        bucket_max: u32 = 4,
        /// Most unanswered blocks on `releaseq`.
        release_max: u32 = 8,
        /// `ADVICE_*` bits.
        flags: u32 = 12,
        /// Blocks that the host would like to have released.
        wanted: u64 = 16,
    }
}

wire_struct! {
    /// Header of a request.
    Request, 16 {
        /// One of `REQ_*`.
        kind: u16 = 0,
        /// Number of ranges that follow.
        count: u32 = 4,
        /// Generation in which the request was made.
        generation: u64 = 8,
    }
}

wire_struct! {
    /// A range of blocks in a request, or of base pages in a TRIM.
    Range, 16 {
        /// First block, or base page, by its number.
        first: u64 = 0,
        /// How many, never 0.
        count: u32 = 8,
    }
}

wire_struct! {
    /// Header of an answer.
    Response, 16 {
        /// One of `S_*`.
        status: u32 = 0,
        /// Number of elements that follow.
        count: u32 = 4,
        /// Generation of the device when it answered.
        generation: u64 = 8,
    }
}

wire_struct! {
    /// Answer of STATS.
    Stats, 64 {
        /// Blocks that the device manages.
        blocks: u64 = 0,
        /// Blocks huge at both layers.
        aligned: u64 = 8,
        /// Blocks huge in the guest alone.
        guest_only: u64 = 16,
        /// Blocks huge in the host alone, and in use.
        host_only: u64 = 24,
        /// Bytes copied by collapses, ever.
        collapse_bytes: u64 = 32,
        /// Blocks made host-huge without a copy.
        populated: u64 = 40,
        /// Blocks dropped.
        released: u64 = 48,
        /// Records and requests refused.
        bad_records: u64 = 56,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn record_decodes_what_it_encodes(first: u64, count: u32, used: u32, state: u8, flags: u8) {
            let record = Record { first, count, used, state, flags };
            prop_assert_eq!(Record::decode(&record.encode()), record);
        }

        #[test]
        fn request_decode_ignores_reserved_bytes(bytes: [u8; Request::SIZE]) {
            let request = Request::decode(&bytes);
            let mut masked = bytes;
            masked[2] = 0;
            masked[3] = 0;
            prop_assert_eq!(request.encode(), masked);
        }
    }

    #[test]
    fn guest_state_from_wire_refuses_unknown_values() {
        assert_eq!(GuestState::from_wire(5), Some(GuestState::Pinned));
        assert_eq!(GuestState::from_wire(6), None);
    }
}

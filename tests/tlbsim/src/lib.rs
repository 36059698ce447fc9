//! A model of what the processor keeps of page tables under nested paging: the
//! data TLBs of two levels, the paging-structure caches of guest and host, and
//! the two-dimensional walk.
//!
//! The model has no system calls and knows nothing of QEMU. It is told every
//! access and every flush ([`cpu::Cpu`]), reads the guest's page tables through
//! [`paging::GuestMemory`], and knows from [`host::HostMap`] which blocks the
//! host has huge. Its counts are exact and the same every time for the same
//! input; what they would come to in cycles is an estimate beside it
//! ([`estimate`]).
//!
//! What it leaves out: fetches of instructions, which share the second level
//! on hardware; prefetch and speculation; the second hyperthread.

pub mod bank;
pub mod blocks;
pub mod clock;
pub mod counters;
pub mod cpu;
pub mod decode;
pub mod estimate;
pub mod host;
pub mod options;
pub mod paging;
pub mod profile;
pub mod record;
pub mod replay;
pub mod spaces;
pub mod trace;
pub mod walk;

//! The guest's side of the real-VM tests.
//!
//! One static program is the whole user space of a test guest: as process 1 it
//! sets the guest up, as the agent it does what the host asks for over a
//! virtio-serial port. What it tells the host about huge pages comes from
//! `/proc/kpageflags` alone: neither the driver nor the daemon has a part in it,
//! so that it can confirm or contradict both.

pub mod agent;
pub mod blocks;
pub mod buddy;
pub mod code;
pub mod counting;
pub mod echo;
pub mod faults;
pub mod fragment;
pub mod image;
pub mod init;
pub mod kernel;
pub mod mapping;
pub mod mmio;
pub mod pagemap;
pub mod pressure;
pub mod probe;
pub mod program;
pub mod protocol;
pub mod scatter;
pub mod settings;
pub mod sparse;
pub mod storm;
pub mod stress;
pub mod worker;
pub mod workload;

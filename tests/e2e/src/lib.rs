//! Real virtual machines with a real daemon: what tests, demo and benchmarks
//! are made of.
//!
//! A [`vm::Vm`] boots a stock Debian kernel under QEMU, a [`daemon::Daemon`] is
//! the process under test, [`guest::Guest`] tells the guest what to do. Three
//! parties say where huge pages are: the guest's own kernel (through
//! [`guest`]), QEMU's page tables (through [`outside`]) and the daemon.
//! [`compare`] lays them side by side, block by block.

pub mod accel;
pub mod assets;
pub mod attached;
pub mod bench;
pub mod cgroup;
pub mod compare;
pub mod daemon;
pub mod demo;
pub mod guest;
pub mod lab;
pub mod libvirt;
pub mod migration;
pub mod offlining;
pub mod outside;
pub mod paper;
pub mod process;
pub mod qmp;
pub mod settings;
pub mod shell;
pub mod taker;
pub mod tlb;
pub mod vfio_user;
pub mod vm;
pub mod workload;

/// log2 of the size of a block on the machines that this crate knows (x86-64).
pub const BLOCK_SHIFT: u32 = 21;

/// Size of a block in bytes.
pub const BLOCK: u64 = 1 << BLOCK_SHIFT;

/// 2^20 bytes.
pub const MIB: u64 = 1 << 20;

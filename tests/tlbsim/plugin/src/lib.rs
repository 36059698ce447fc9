//! A plugin of QEMU's TCG that simulates the TLBs of an emulated guest under
//! nested paging.
//!
//! It sees every access to data that translated code makes, and the instructions
//! with which the guest's kernel flushes TLBs and changes page tables. The guest's
//! page tables are read from its memory; the host's are those of this very
//! process, which is what KVM would size its mappings by: `PAGEMAP_SCAN` tells
//! which blocks are huge in them, looked at anew every epoch.
//!
//! Not seen: what QEMU's own helpers access for an instruction (XSAVE, frames of
//! interrupts), fetches of instructions, and changes of page tables that the guest
//! does not flush.

mod control;
mod plugin;
mod sys;
mod vcpu;

//! Several VMs on one host, a daemon each: what is limited on the host is shared by weight.
//!
//! There is no broker that could die. Each daemon keeps a small file in a directory that all of
//! them know, tells there what it holds and could use, and holds a lock on it: when the daemon
//! ends, however, the kernel drops the lock, and with it the share. Each works out the same
//! shares from the same files.

mod fairness;
mod ledger;
mod member;

pub use fairness::{fair, Claimant};
pub use ledger::{Entry, Ledger, Part, WEIGHT_MAX};
pub use member::{start, Limits, Shares, Usage};

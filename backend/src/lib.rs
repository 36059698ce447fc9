//! The vhost-user back end of virtio-gemini: guest and host tell each other where their huge
//! pages are, and the host puts its own under the guest's.
//!
//! Layers, each knowing only those below it:
//!
//! | module | knows |
//! |---|---|
//! | [`server`] | the daemon's life: sockets, signals, one VMM after the other |
//! | [`device`] | virtio: features, queues, wire records and their validation |
//! | [`engine`] | what is known, what to do next, what it may cost |
//! | [`policy`] | which blocks the host should make huge, and in which order: pure functions |
//! | [`backing`] | the host's memory: the only place with system calls on it, and with `unsafe` |
//!
//! Beside them: [`adapt`] (Algorithm 1), [`block_map`] (both states of every block), [`bitmap`],
//! [`budget`], [`fmfi`] (how fragmented the host is), [`pressure`] (how short of memory),
//! [`files`] (those that it reads again and again), [`protocol`] (the wire format), [`shares`]
//! (what several VMs have of the host), [`sandbox`] (what the daemon gives up before it serves),
//! [`settings`] (each declared once), [`configuration`] (where they come from), [`control`] (the
//! control socket and metrics), [`ctl`] (its client, `geminictl`), [`config`] (the command line),
//! [`logging`], [`notify`] (the service manager) and [`fault`] (places for tests to kill the daemon).

#![deny(unsafe_code)]

pub mod adapt;
#[allow(unsafe_code)] // the one place for it
pub mod backing;
pub mod bitmap;
pub mod block_map;
pub mod budget;
pub mod config;
pub mod configuration;
pub mod control;
pub mod ctl;
pub mod device;
pub mod engine;
pub mod fault;
pub mod files;
pub mod fmfi;
pub mod logging;
pub mod notify;
pub mod policy;
pub mod pressure;
pub mod protocol;
pub mod sandbox;
pub mod server;
pub mod settings;
pub mod shares;

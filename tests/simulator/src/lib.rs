//! A simulation: the decisions of the daemon, by its own code, against a guest that a trace tells
//! of, a host of a few rules, and a clock that jumps from event to event. The same seed or trace
//! gives the same result, bit for bit.
//!
//! It shows that decisions keep to their budgets, starve nothing and come to an end, also for a
//! guest of 1 TiB. It shows nothing of how fast a machine is: how long an action takes is a
//! constant here ([`host::Costs`]).

#![allow(clippy::cast_precision_loss)] // figures, far below 2^53

pub mod generate;
pub mod host;
pub mod record;
pub mod scenario;
pub mod simulation;
pub mod trace;

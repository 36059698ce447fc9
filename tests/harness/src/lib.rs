//! A vhost-user front end with real guest memory and a model guest.
//!
//! It plays both the virtual machine monitor and the guest's driver towards a
//! real daemon process, over the real socket, with virtqueues that lie in real
//! shared memory. Only the guest is a model: there is no virtual machine.

pub mod budgets;
pub mod cleanup;
pub mod daemon;
pub mod driver;
pub mod figure2;
pub mod figures;
pub mod fragment;
pub mod frontend;
pub mod give_back;
pub mod guest;
pub mod hostile;
pub mod hugetlb_short;
pub mod log;
pub mod machine;
pub mod memory;
pub mod outside;
pub mod policy_scale;
pub mod ready;
pub mod report;
pub mod reserve;
pub mod restart;
pub mod ring;
pub mod rng;
pub mod run;
pub mod sampling;
pub mod scale;
pub mod scratch;
pub mod settings;
pub mod shares;
pub mod stall;
pub mod sys;
pub mod wire;

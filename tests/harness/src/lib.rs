//! A vhost-user front end with real guest memory and a model guest.
//!
//! It plays both the virtual machine monitor and the guest's driver towards a
//! real daemon process, over the real socket, with virtqueues that lie in real
//! shared memory. Only the guest is a model: there is no virtual machine.

pub mod figures;
pub mod report;

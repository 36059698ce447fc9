//! standalone vhost-user front end with a model guest.
fn main() {}

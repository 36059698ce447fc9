//! what runs inside the test guest.
fn main() {}

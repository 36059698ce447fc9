//! real-VM tests, demo and benchmarks.
fn main() {}

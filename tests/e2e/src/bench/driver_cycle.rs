//! The driver is loaded and unloaded over and over, under memory load.

use std::time::Duration;

use gemini_harness::figures::{Bar, Scenario};

use crate::lab::{Bench, Lab};
use crate::process;

const GIB: u64 = 1 << 30;

/// How long a whole walk may take, with the rests that the driver takes.
const CENSUS_TIMEOUT: Duration = Duration::from_secs(30);

/// Cycles the driver in a guest of 4 GiB, and asks it what a census costs.
///
/// # Errors
/// If guest, QEMU or daemon fail in a way that is no figure.
pub fn measure(bench: &Bench, seed: u64, quick: bool) -> anyhow::Result<Scenario> {
    let cycles: u32 = if quick { 10 } else { 100 };
    let mut lab = Lab::start(bench, "bench-driver-cycle", "gemini", |config| {
        config.memory = 4 * GIB;
        // The log must hold everything until it is read.
        config.kernel_arguments.push("log_buf_len=4M".to_owned());
    })?;
    let log = lab.vm.guest.log_position()?;
    lab.vm.guest.start_churn("load", 512 << 20, seed)?;
    lab.vm.guest.unload_driver()?;
    let mut load = 0.0;
    let mut unload: f64 = 0.0;
    let mut slowest_unload: f64 = 0.0;
    for cycle in 0..cycles {
        load += lab.vm.guest.load_driver()?.seconds;
        // Some cycles end at once, some in the middle of the first census and
        // hints, some after it.
        std::thread::sleep(Duration::from_millis(u64::from(cycle % 4) * 60));
        let seconds = lab.vm.guest.unload_driver()?.seconds;
        unload += seconds;
        slowest_unload = slowest_unload.max(seconds);
        lab.daemon.process.expect_running()?;
    }
    let churned = lab.vm.guest.stop_churn("load")?;
    lab.vm.guest.load_driver()?;
    let census = census_ns_per_block(&lab)?;
    let complaints = lab.vm.guest.tell_complaints(log)?;
    lab.vm.expect_alive()?;

    let mut scenario = Scenario::new("driver-cycle");
    scenario.arg("cycles", cycles);
    scenario.arg("guest_memory", 4 * GIB);
    scenario.figure("cycles", f64::from(cycles), Bar::None);
    scenario.figure("guest_complaints", complaints as f64, Bar::AtMost(0.0));
    scenario.figure("load_rounds", churned.rounds as f64, Bar::AtLeast(1.0));
    scenario.figure("load_ms_mean", load * 1000.0 / f64::from(cycles), Bar::None);
    scenario.figure("unload_ms_mean", unload * 1000.0 / f64::from(cycles), Bar::None);
    scenario.figure("unload_ms_max", slowest_unload * 1000.0, Bar::None);
    scenario.figure("census_ns_per_block", census, Bar::None);
    Ok(scenario)
}

/// What the driver's last walk around all memory cost.
fn census_ns_per_block(lab: &Lab) -> anyhow::Result<f64> {
    process::wait_for("a census has ended", CENSUS_TIMEOUT, || {
        let value = lab.vm.guest.driver_number("census_ns_per_block")?;
        Ok((value > 0).then_some(value as f64))
    })
}

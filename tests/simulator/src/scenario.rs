//! The scenario `simulate`: each policy with the same guest, and how long simulating it takes.

use crate::generate;
use crate::simulation::{self, Plan, Report, BLOCK};
use gemini_harness::figures::{Bar, Scenario};
use std::time::{Duration, Instant};
use vhost_device_gemini::policy::Policy;

/// A large guest, and for how long it is simulated.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Number of blocks.
    pub blocks: u64,
    /// Simulated seconds.
    pub seconds: u64,
}

impl Size {
    /// 1 TiB for five minutes, or a sixteenth of it for one.
    #[must_use]
    pub fn new(quick: bool) -> Self {
        if quick {
            Size { blocks: 1 << 15, seconds: 60 }
        } else {
            Size { blocks: 1 << 19, seconds: 300 }
        }
    }
}

/// Simulates.
#[must_use]
pub fn measure(size: Size, seed: u64) -> Scenario {
    let mut scenario = Scenario::new("simulate");
    scenario.arg("blocks", size.blocks);
    scenario.arg("seconds", size.seconds);
    scenario.arg("seed", seed);
    let trace = generate::guest(seed, size.blocks, size.seconds);
    scenario.figure("events", trace.events.len() as f64, Bar::None);
    let mut wrong = Vec::new();
    let mut one = |name: &str, plan: &Plan| {
        let start = Instant::now();
        let report = simulation::run(&trace, plan);
        let took = start.elapsed().as_secs_f64();
        figures(&mut scenario, name, &report, took);
        wrong.extend(report.wrong.iter().map(|wrong| format!("{name}: {wrong}")));
        report
    };
    for (name, policy) in [
        ("none", Policy::None),
        ("always", Policy::Always),
        ("kubevirt_like", Policy::KubevirtLike),
        ("ingens_like", Policy::IngensLike),
        ("hawkeye_like", Policy::HawkeyeLike),
    ] {
        // What kubevirt-like does when a guest has booted, once it has filled its memory.
        let again = (policy == Policy::KubevirtLike).then_some(generate::FILL);
        one(name, &Plan { again: again.map(Duration::from_millis), ..Plan::new(policy) });
    }
    let first = one("gemini", &Plan::new(Policy::Gemini));
    let again = simulation::run(&trace, &Plan::new(Policy::Gemini));
    let limited =
        Plan { huge_max: Some(size.blocks / 8), fail_percent: 5, ..Plan::new(Policy::Gemini) };
    one("gemini_limited", &limited);
    for line in &wrong {
        println!("WRONG {line}");
    }
    scenario.figure("rules_broken", wrong.len() as f64, Bar::AtMost(0.0));
    let differ = u32::from(first != again);
    scenario.figure("results_that_differ", differ.into(), Bar::AtMost(0.0));
    scenario
}

fn figures(scenario: &mut Scenario, name: &str, report: &Report, took: f64) {
    let all = report.aligned + report.guest_only + report.host_only;
    let rate = report.aligned as f64 / all.max(1) as f64;
    scenario.figure(&format!("{name}_aligned_rate"), rate, Bar::None);
    let copied = (report.copied * BLOCK) as f64 / (1u64 << 30) as f64;
    scenario.figure(&format!("{name}_copied_gib"), copied, Bar::None);
    scenario.figure(&format!("{name}_seconds"), took, Bar::Below(60.0));
}

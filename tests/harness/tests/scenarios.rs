//! The measured scenarios, small: each must reach its bars.

mod common;

use std::time::Duration;

use anyhow::ensure;
use common::Result;
use gemini_harness::daemon::default_program;
use gemini_harness::memory::BLOCK_SIZE;
use gemini_harness::{budgets, hostile, hugetlb_short, ready, restart, run, scale, settings, sys};

#[test]
fn the_workload_is_aligned_under_gemini_alone() -> Result {
    let _held = settings::daemon_decides()?;
    let plan = run::Plan {
        program: default_program()?,
        memory: 128 * BLOCK_SIZE,
        seed: 3,
        reads: 100_000,
    };
    let none = run::run(&plan, "none")?.figures;
    ensure!(run::missed(&none).is_empty() && none.aligned == 0, "{none:?}");
    let always = run::run(&plan, "always")?.figures;
    ensure!(always.aligned_coverage >= 0.9 && always.host_only > 0, "{always:?}");
    let gemini = run::run(&plan, "gemini")?.figures;
    ensure!(run::missed(&gemini).is_empty(), "{gemini:?}");
    ensure!(gemini.host_rss_bytes < always.host_rss_bytes, "{gemini:?} {always:?}");
    Ok(())
}

#[test]
fn hostile_input_harms_nobody() -> Result {
    let mut plan = hostile::Plan::new(default_program()?, 11, true);
    plan.inputs = 10_000;
    let scenario = hostile::measure(&plan)?;
    ensure!(scenario.passed(), "{scenario}");
    Ok(())
}

#[test]
fn a_large_guest_is_cheap() -> Result {
    let mut plan = scale::Plan::new(default_program()?, true);
    plan.sparse = 1 << 32;
    plan.resident = 1 << 27;
    plan.idle = Duration::from_secs(4);
    let scenario = scale::measure(&plan)?;
    ensure!(scenario.passed(), "{scenario}");
    Ok(())
}

#[test]
fn blocks_become_ready_without_a_copy() -> Result {
    let plan = ready::Plan { program: default_program()?, blocks: 40, singles: 4 };
    let scenario = ready::measure(&plan)?;
    ensure!(scenario.passed(), "{scenario}");
    Ok(())
}

#[test]
fn budgets_are_kept() -> Result {
    let plan = budgets::Plan {
        program: default_program()?,
        rates: vec![100],
        blocks: 192,
        time: Duration::from_secs(5),
        seed: 9,
    };
    let scenario = budgets::measure(&plan)?;
    ensure!(scenario.passed(), "{scenario}");
    Ok(())
}

#[test]
fn a_pool_that_runs_short_kills_nobody() -> Result {
    if !sys::is_root() {
        eprintln!("not tested: only the superuser can change the pool of huge pages");
        return Ok(());
    }
    let plan = hugetlb_short::Plan {
        program: default_program()?,
        rounds: 4,
        steps: 80,
        seed: 7,
        gigantic: false,
    };
    let scenario = hugetlb_short::measure(&plan)?;
    ensure!(scenario.passed(), "{scenario}");
    Ok(())
}

#[test]
fn a_killed_daemon_loses_nothing() -> Result {
    let plan = restart::Plan {
        program: default_program()?,
        fault_program: restart::default_fault_program()?,
        seed: 5,
        passages: vec![3],
    };
    let scenario = restart::measure(&plan)?;
    ensure!(scenario.passed(), "{scenario}");
    Ok(())
}

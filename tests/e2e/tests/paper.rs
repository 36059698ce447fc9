//! The paper's evaluation, tiny: its records, and that a second start goes on from
//! them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{ensure, Context};
use gemini_e2e::paper::record::{Record, Tlb};

/// Two policies that differ as much as two can, in reused guests, so that each part
/// of a run is there but fragmenting, which takes longest.
const ARGUMENTS: [&str; 14] = [
    "--quick",
    "--workloads",
    "reader",
    "--workload-mib",
    "64",
    "--guest-mib",
    "640",
    "--policies",
    "none,gemini",
    "--states",
    "unfragmented",
    "--vms",
    "reused",
    "--results",
];

/// Runs it; returns what it told.
fn paper(results: &Path) -> anyhow::Result<String> {
    let output = Command::new(env!("CARGO_BIN_EXE_gemini-lab"))
        .arg("paper")
        .args(ARGUMENTS)
        .arg(results)
        .output()
        .context("cannot start gemini-lab")?;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{told}");
    Ok(told)
}

fn record(results: &Path, policy: &str) -> anyhow::Result<Record> {
    let path = results.join(format!("reader_{policy}_unfragmented_reused_0.json"));
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    Ok(serde_json::from_str(&text)?)
}

#[test]
fn runs_are_recorded_and_not_made_again() -> anyhow::Result<()> {
    let results: PathBuf =
        std::env::temp_dir().join(format!("gemini-results-{}", std::process::id()));
    let told = paper(&results)?;
    ensure!(told.contains("[2/2]"), "{told}");

    let (none, gemini) = (record(&results, "none")?, record(&results, "gemini")?);
    let misses = |record: &Record| record.tlb.and_then(|tlb| tlb.misses).context("no misses");
    ensure!(misses(&gemini)? < misses(&none)? / 10, "{gemini:?}, {none:?}");
    for record in [&none, &gemini] {
        let Tlb { instructions, cycles, .. } = record.tlb.context("nothing was counted")?;
        let operations = record.performance.as_ref().map(|performance| performance.operations);
        ensure!(instructions > operations && cycles > instructions, "{record:?}");
    }
    let alignment = gemini.alignment.context("no alignment")?;
    ensure!(alignment.aligned >= 30 && alignment.seconds_to_alignment.is_some(), "{alignment:?}");
    ensure!(none.alignment.is_some_and(|none| none.guest_huge == 0), "{none:?}");
    let reuse = gemini.reuse.context("no reuse")?;
    ensure!(reuse.aligned_before >= 30 && reuse.reused > 0, "{reuse:?}");
    let maps = gemini.maps.context("no maps")?;
    ensure!(maps.after.len() == 320 && maps.after.matches('A').count() >= 30, "{maps:?}");

    let told = paper(&results)?;
    ensure!(told.contains("2 of them done before, 0 to do"), "{told}");
    std::fs::remove_dir_all(results)?;
    Ok(())
}

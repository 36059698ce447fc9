//! Records that nobody has measured: made by rules, for tests alone. Every workload but the
//! known ones is called `synthetic-...`, and so is the machine.

#![allow(dead_code)] // each test program uses some of it

use std::path::Path;

use gemini_report::names::{main_policies, policies, Kind, WORKLOADS};
use gemini_report::record::{Record, Records};
use gemini_report::runs::Runs;
use serde_json::{json, Value};

/// What a policy gets in this made-up world: rate, coverage, misses to those of `none`, MiB
/// copied, and host RSS in MiB.
pub fn world(policy: &str) -> [f64; 5] {
    match policy {
        "none" => [0.0, 0.0, 1.0, 0.0, 400.0],
        "misaligned" => [0.02, 0.02, 0.95, 10.0, 410.0],
        "thp" => [0.3, 0.35, 0.7, 120.0, 440.0],
        "kubevirt-like" => [0.4, 0.5, 0.5, 380.0, 500.0],
        "ingens-like" => [0.33, 0.3, 0.75, 90.0, 420.0],
        "hawkeye-like" => [0.36, 0.4, 0.6, 140.0, 425.0],
        "hugetlb" => [1.0, 1.0, 0.0040, 0.0, 400.0],
        "gemini" => [0.96, 0.97, 0.0044, 60.0, 408.0],
        "gemini-no-repair" => [0.7, 0.6, 0.4, 0.0, 405.0],
        "gemini-no-promoter" => [0.9, 0.85, 0.1, 50.0, 405.0],
        _ => [0.94, 0.96, 0.0060, 200.0, 410.0],
    }
}

/// A record, with figures that depend on its arguments alone.
pub fn record(workload: &str, policy: &str, state: &str, vm: &str, repetition: u64) -> Value {
    let [rate, coverage, misses, copied, rss] = world(policy);
    // A little of everything differs among repetitions and workloads.
    let wiggle = 1.0 + 0.02 * repetition as f64;
    let size = 1.0 + workload.len() as f64 / 20.0;
    let aligned = (0..130).map(|block| if f64::from(block) < 130.0 * coverage { 'A' } else { 'g' });
    let aligned: String = aligned.collect();
    let map = |blocks: &str| format!("{blocks}{}{}", "h".repeat(10), "b.f".repeat(124));
    json!({
        "schema": 1,
        "run": {"workload": workload, "policy": policy, "state": state, "vm": vm, "seed": 1,
            "repetition": repetition},
        "arguments": {"guest_mib": 1024, "workload_mib": 256, "profile": "broadwell",
            "quick": false},
        "made": {"commit": "0123abc", "date": format!("2020-01-0{}T00:00:00Z", repetition + 1),
            "seconds": 60.0,
            "machine": {"cpu": "Synthetic <CPU> & Co", "cpus": 2, "memory_mib": 4096,
                "kernel": "0.0"},
            "versions": {"qemu": "10.0", "guest_kernel": "6.12", "workload": format!("{workload} 1")}},
        "alignment": {"guest_huge": 130, "host_huge": 140, "aligned": (rate * 130.0).round(),
            "aligned_rate": rate, "aligned_coverage": coverage,
            "seconds_to_alignment": (policy != "none").then_some(3.0 * wiggle)},
        "performance": {"operations": 1000, "seconds": 10.0, "per_second": 100.0 * size / wiggle,
            "mean_us": 900.0 * wiggle, "p99_us": 4000.0 * wiggle, "unit": "requests"},
        "tlb": {"accesses": 9e7, "misses": (1e6 * misses * wiggle * size).round(),
            "user_misses": (9e5 * misses * wiggle * size).round(),
            "walk_reads": (4e6 * misses * wiggle).round(), "cycles": 1e9 * (1.0 + misses),
            "instructions": 8e8, "disagreements": 0},
        "costs": {"host_rss_mib": rss, "guest_used_mib": 390.0, "copied_mib": copied,
            "daemon_cpu_seconds": 0.5, "host_kernel_cpu_seconds": 0.25,
            "guest_kernel_cpu_seconds": null, "moved_blocks": null},
        "reuse": (vm == "reused").then(|| json!({"aligned_before": 100, "reused": 97, "waiting": 1})),
        "fmfi": {"guest": 0.9, "host": 0.8},
        "maps": {"before": map(&"g".repeat(130)), "after": map(&aligned)},
        "failure": null
    })
}

/// Every known workload under every policy in fragmented memory, and some in other places.
pub fn world_of_records() -> Vec<Value> {
    let mut records = Vec::new();
    for (workload, _) in WORKLOADS {
        for policy in main_policies().chain(policies(Kind::Ablation)) {
            for repetition in 0..3 {
                records.push(record(workload, policy, "fragmented", "clean", repetition));
            }
        }
    }
    for policy in main_policies().chain(policies(Kind::Ablation)) {
        records.push(record("redis", policy, "fragmented", "reused", 0));
        records.push(record("synthetic-one", policy, "unfragmented", "clean", 0));
    }
    // What is missing or failed has to be seen as that.
    records.retain(|record| {
        let run = &record["run"];
        !(run["workload"] == "cg" && run["policy"] == "ingens-like")
    });
    let mut failed = record("cg", "ingens-like", "fragmented", "clean", 0);
    for part in ["alignment", "performance", "tlb", "costs", "maps"] {
        failed[part] = Value::Null;
    }
    failed["failure"] = "the guest said: <oops> `x` | y".into();
    records.push(failed);
    records
}

/// The same as runs, without files.
pub fn runs(records: &[Value]) -> Runs {
    let all = records.iter().map(|value| Record::parse(&value.to_string()).expect("a record"));
    Runs::select(Records { all: all.collect(), unreadable: Vec::new() })
}

/// Writes one file a record.
pub fn write(dir: &Path, records: &[Value]) -> std::io::Result<()> {
    for (number, record) in records.iter().enumerate() {
        std::fs::write(dir.join(format!("{number:04}.json")), record.to_string())?;
    }
    Ok(())
}

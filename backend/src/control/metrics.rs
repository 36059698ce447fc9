//! The metrics, in the text format of Prometheus: gauges in bytes, counters with `_total`,
//! durations in seconds, and on every sample the label `vm`.

use super::Subject;
use crate::backing::{process_cpu_time, Finding, HostState, PoolState, Severity};
use crate::block_map::Counters;
use crate::engine::{GuestSync, Source, Totals};
use crate::protocol::{GuestState, PAGE_SHIFT};
use crate::settings::Settings;
use std::fmt::{Display, Write};
use std::time::{Duration, Instant};

/// The type of the text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What the metrics are of.
struct Sight {
    settings: Settings,
    config_refused: bool,
    connected: bool,
    paused: bool,
    migrating: bool,
    scarce: bool,
    moving: bool,
    fmfi: Option<f64>,
    success_rate: f64,
    guest_synced: bool,
    host_synced: bool,
    block_size: u64,
    blocks: u64,
    counters: Counters,
    timeout: (u32, Source),
    totals: Totals,
    findings: Vec<Finding>,
    pools: Vec<PoolState>,
    cpu: Duration,
    uptime: Duration,
}

/// All metrics as they are now.
pub fn render(subject: &Subject) -> String {
    let Subject { name, started, engine, configuration } = subject;
    // Not under the engine's lock, which is taken under this one where settings change.
    let (settings, refused) = (configuration.settings(), configuration.refused());
    let (findings, pools) = (subject.findings(), engine.pools());
    let now = Instant::now();
    let sight = engine.inspect(|state| Sight {
        settings,
        config_refused: refused.is_some(),
        connected: state.connected,
        paused: state.paused,
        migrating: state.logging,
        scarce: state.supply.is_scarce(),
        moving: state.moving.is_wanted(),
        fmfi: state.moving.fmfi(),
        success_rate: state.moving.success_rate(now),
        guest_synced: state.guest_sync == GuestSync::Done,
        host_synced: state.scan.complete() && state.hints.synced(),
        block_size: 1 << engine.settings().block_shift,
        blocks: state.map.len() as u64,
        counters: *state.map.counters(),
        timeout: (state.timeout.ms(), state.timeout.source()),
        totals: state.totals,
        findings,
        pools,
        cpu: process_cpu_time(),
        uptime: started.elapsed(),
    });
    expose(name, &sight)
}

/// The text while it is written.
struct Exposition {
    text: String,
    /// The label of every sample.
    vm: String,
}

type Labels<'a> = &'a [(&'a str, &'a str)];

impl Exposition {
    fn family(&mut self, kind: &str, name: &str, help: &str) -> Family<'_> {
        // Writing to a string does not fail.
        let _ = writeln!(self.text, "# HELP gemini_{name} {help}\n# TYPE gemini_{name} {kind}");
        Family { exposition: self, name: format!("gemini_{name}") }
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.family("gauge", name, help).sample(&[], value);
    }

    fn counter(&mut self, name: &str, help: &str, value: impl Display) {
        self.family("counter", &format!("{name}_total"), help).sample(&[], value);
    }
}

/// The samples of one metric.
struct Family<'a> {
    exposition: &'a mut Exposition,
    name: String,
}

impl Family<'_> {
    fn sample(&mut self, labels: Labels<'_>, value: impl Display) {
        let Exposition { text, vm } = &mut *self.exposition;
        let _ = write!(text, "{}{{vm=\"{vm}\"", self.name);
        for (label, of) in labels {
            let _ = write!(text, ",{label}=\"{}\"", escaped(of));
        }
        let _ = writeln!(text, "}} {value}");
    }
}

/// Text as the value of a label.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn expose(name: &str, sight: &Sight) -> String {
    let mut out = Exposition { text: String::new(), vm: escaped(name) };
    let of = |blocks: u64| blocks * sight.block_size;

    out.family("gauge", "build_info", "Always 1; the version of the daemon.")
        .sample(&[("version", env!("CARGO_PKG_VERSION"))], 1);
    out.gauge("uptime_seconds", "Since the daemon started.", sight.uptime.as_secs_f64());
    out.counter("cpu_seconds", "CPU time that the daemon used.", sight.cpu.as_secs_f64());

    let flags = [
        ("connected", "Whether a VMM is connected.", sight.connected),
        ("guest_synced", "Whether the driver told its whole state.", sight.guest_synced),
        ("host_synced", "Whether the driver was told the host's whole state.", sight.host_synced),
        ("paused", "Whether the daemon makes nothing huge, by order.", sight.paused),
        ("migrating", "Whether the guest is migrating, and nothing is made huge.", sight.migrating),
        ("scarce", "Whether there are no huge pages for requests of the guest.", sight.scarce),
        ("moving", "Whether the guest is asked to move its huge pages.", sight.moving),
        (
            "config_last_reload_successful",
            "Whether the configuration file was good the last time that it was loaded.",
            !sight.config_refused,
        ),
    ];
    for (name, help, value) in flags {
        out.gauge(name, help, u8::from(value));
    }
    let fmfi = sight.fmfi.map_or("NaN".into(), |index| index.to_string());
    out.gauge(
        "host_fmfi",
        "Part of the host's free memory of no use for a block, 0 to 1; NaN where it did not matter.",
        fmfi,
    );
    out.gauge(
        "found_ratio",
        "Part of the recent attempts to make a block huge that found a page, 0 to 1.",
        sight.success_rate,
    );
    settings(&mut out, &sight.settings);
    memory(&mut out, sight, of);
    let (ms, source) = sight.timeout;
    out.family(
        "gauge",
        "timeout_seconds",
        "How long huge pages are kept that nobody has a use for.",
    )
    .sample(&[("source", source.name())], f64::from(ms) / 1000.0);
    pools(&mut out, &sight.pools);
    totals(&mut out, &sight.totals, of);

    let mut findings =
        out.family("gauge", "findings", "What the daemon thinks is wrong with host or VMM.");
    for (severity, name) in
        [(Severity::Error, "error"), (Severity::Warning, "warning"), (Severity::Info, "info")]
    {
        let count = sight.findings.iter().filter(|finding| finding.severity == severity).count();
        findings.sample(&[("severity", name)], count);
    }
    out.text
}

fn settings(out: &mut Exposition, settings: &Settings) {
    // A setting that is added wants a decision here, too.
    let Settings {
        policy: _,
        copy_rate,
        cpu_share: _,
        huge_max,
        give_back: _,
        // Told as what is in force.
        booking_timeout: _,
        weight: _,
        host_huge_max: _,
        host_copy_rate: _,
        log_level: _,
    } = settings;
    let values = settings.to_json();
    let policy = values.get("policy").and_then(|policy| policy.as_str()).unwrap_or_default();
    out.family("gauge", "policy_info", "Always 1; the policy in force.")
        .sample(&[("policy", policy)], 1);
    out.gauge(
        "copy_rate_bytes_per_second",
        "Most bytes that collapses may copy per second.",
        copy_rate,
    );
    out.gauge(
        "cpu_share_ratio",
        "Most CPU time that the daemon may use, as a part of one CPU.",
        settings.cpu_fraction(),
    );
    let mut limit = out.family(
        "gauge",
        "huge_max_bytes",
        "Most bytes of host huge pages for the guest; +Inf without a limit.",
    );
    match huge_max {
        Some(bytes) => limit.sample(&[], bytes),
        None => limit.sample(&[], "+Inf"),
    }
}

fn memory(out: &mut Exposition, sight: &Sight, of: impl Fn(u64) -> u64) {
    let counters = &sight.counters;
    out.gauge("block_size_bytes", "Size of a block, which is a huge page.", sight.block_size);
    out.gauge("managed_bytes", "Memory of the guest that is managed.", of(sight.blocks));
    let mut guest = out.family("gauge", "guest_bytes", "Memory by its state in the guest.");
    for state in GuestState::ALL {
        guest.sample(&[("state", state.name())], of(counters.guest[state as usize]));
    }
    let mut host = out.family("gauge", "host_bytes", "Memory by its state in the host.");
    for state in HostState::ALL {
        host.sample(&[("state", state.name())], of(counters.host[state as usize]));
    }
    out.gauge("aligned_bytes", "Memory that is huge at both layers.", of(counters.aligned));
    out.gauge(
        "guest_only_bytes",
        "Memory that is huge in the guest alone.",
        of(counters.guest_only),
    );
    out.gauge(
        "host_only_bytes",
        "Memory in use or held back that is huge in the host alone.",
        of(counters.host_only),
    );
    let rate = counters.aligned_rate();
    let mut family = out.family(
        "gauge",
        "aligned_rate",
        "aligned / (aligned + guest_only + host_only), 0 to 1; NaN where nothing is huge.",
    );
    match rate {
        Some(rate) => family.sample(&[], rate),
        None => family.sample(&[], "NaN"),
    }
}

fn pools(out: &mut Exposition, pools: &[PoolState]) {
    let mut host = out.family(
        "gauge",
        "hugetlb_pool_bytes",
        "The host's pool of hugetlb pages that the guest's memory comes from.",
    );
    for pool in pools {
        let size = pool.page_size.to_string();
        for (state, pages) in [
            ("total", pool.total),
            ("free", pool.free),
            ("reserved", pool.reserved),
            ("surplus", pool.surplus),
        ] {
            let labels = [("page_size", size.as_str()), ("state", state)];
            host.sample(&labels, pages.saturating_mul(pool.page_size));
        }
    }
    let mut missing = out.family(
        "gauge",
        "hugetlb_missing_bytes",
        "Hugetlb memory that the guest does not have yet, set aside for it or not.",
    );
    for pool in pools {
        for (reserved, pages) in
            [("true", pool.missing.saturating_sub(pool.unreserved)), ("false", pool.unreserved)]
        {
            let labels = [("page_size", &*pool.page_size.to_string()), ("reserved", reserved)];
            missing.sample(&labels, pages.saturating_mul(pool.page_size));
        }
    }
    let mut short = out.family(
        "gauge",
        "hugetlb_short",
        "Whether the pool is too short to prepare blocks for the guest.",
    );
    for pool in pools {
        short.sample(&[("page_size", &pool.page_size.to_string())], u8::from(pool.short));
    }
}

fn totals(out: &mut Exposition, totals: &Totals, of: impl Fn(u64) -> u64) {
    // A total that is added wants a metric here, too.
    let Totals {
        collapse_bytes,
        charged_bytes,
        collapses,
        collapses_met,
        collapse_failures,
        populated,
        demoted,
        released,
        renewed,
        trimmed_pages,
        bad_records,
        hint_batches,
        report_batches,
    } = *totals;
    for (name, help, value) in [
        ("collapse_bytes", "Bytes that collapses copied.", collapse_bytes),
        ("charged_bytes", "Bytes that the copy budget was charged for.", charged_bytes),
        ("collapses", "Blocks made huge with a copy.", collapses),
        ("collapses_met", "Collapses during which the VMM faulted.", collapses_met),
        ("collapse_failures", "Attempts to make a block huge that failed.", collapse_failures),
        ("populated_bytes", "Memory made huge without a copy.", of(populated)),
        ("demoted_bytes", "Huge pages split because the guest was at its limit.", of(demoted)),
        ("released_bytes", "Memory that the guest gave back.", of(released)),
        ("renewed_bytes", "Memory that the guest gave back to have it huge.", of(renewed)),
        ("trimmed_bytes", "Free base pages that the guest gave back.", trimmed_pages << PAGE_SHIFT),
        ("bad_records", "Records, requests and chains of the guest refused.", bad_records),
        ("hint_batches", "Batches sent to the driver.", hint_batches),
        ("report_batches", "Batches received from the driver.", report_batches),
    ] {
        out.counter(name, help, value);
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use prometheus_parse::{Scrape, Value};
    use std::collections::BTreeSet;

    fn sight() -> Sight {
        let counters = Counters { aligned: 3, guest_only: 1, ..Counters::default() };
        Sight {
            settings: Settings::default(),
            config_refused: false,
            connected: true,
            paused: false,
            migrating: true,
            scarce: false,
            moving: false,
            fmfi: None,
            success_rate: 1.0,
            guest_synced: true,
            host_synced: true,
            block_size: 2 << 20,
            blocks: 8,
            counters,
            timeout: (66_000, Source::Tlb),
            totals: Totals { collapse_bytes: 7, released: 2, ..Totals::default() },
            findings: Vec::new(),
            pools: vec![PoolState { page_size: 2 << 20, free: 3, ..PoolState::default() }],
            cpu: Duration::from_millis(1_500),
            uptime: Duration::from_secs(60),
        }
    }

    fn parse(text: &str) -> Scrape {
        let scrape = Scrape::parse(text.lines().map(|line| Ok(line.to_owned()))).unwrap();
        let samples = text.lines().filter(|line| !line.starts_with('#')).count();
        assert_eq!(scrape.samples.len(), samples, "a line is no sample to another parser");
        scrape
    }

    fn value(scrape: &Scrape, metric: &str) -> f64 {
        let sample = scrape.samples.iter().find(|sample| sample.metric == metric);
        match sample.unwrap_or_else(|| panic!("no {metric}")).value {
            Value::Counter(value) | Value::Gauge(value) => value,
            ref other => panic!("{metric} has no type: {other:?}"),
        }
    }

    #[test]
    fn another_parser_reads_every_sample_with_its_type_and_value() {
        let scrape = parse(&expose("vm1", &sight()));
        for (metric, expected) in [
            ("gemini_aligned_bytes", 6.0 * 1_048_576.0),
            ("gemini_aligned_rate", 0.75),
            ("gemini_collapse_bytes_total", 7.0),
            ("gemini_released_bytes_total", 4.0 * 1_048_576.0),
            ("gemini_cpu_seconds_total", 1.5),
            ("gemini_timeout_seconds", 66.0),
            ("gemini_hugetlb_short", 0.0),
            ("gemini_migrating", 1.0),
            ("gemini_huge_max_bytes", f64::INFINITY),
            ("gemini_copy_rate_bytes_per_second", 256.0 * 1_048_576.0),
            ("gemini_cpu_share_ratio", 0.25),
        ] {
            let value = value(&scrape, metric);
            assert!((value - expected).abs() < 1e-9 || value == expected, "{metric} {value}");
        }
        assert!(scrape.samples.iter().all(|sample| sample.labels.get("vm") == Some("vm1")));
        let empty = Sight { counters: Counters::default(), ..sight() };
        assert!(value(&parse(&expose("vm1", &empty)), "gemini_aligned_rate").is_nan());
    }

    #[test]
    fn names_follow_the_conventions() {
        let text = expose("vm1", &sight());
        let mut names = BTreeSet::new();
        for line in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
            let (name, kind) = line.split_once(' ').unwrap();
            assert!(names.insert(name.to_owned()), "{name} twice");
            assert_eq!(name.ends_with("_total"), kind == "counter", "{line}");
            assert!(text.contains(&format!("# HELP {name} ")), "{name}");
        }
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let name = line.split('{').next().unwrap();
            assert!(names.contains(name), "{name} has no type");
        }
    }

    #[test]
    fn no_name_of_a_machine_breaks_the_text() {
        for name in ["a\"b", "a\\", "a\nb", "ä{}", ""] {
            let text = expose(name, &sight());
            let samples = text.lines().filter(|line| !line.starts_with('#'));
            assert_eq!(samples.count(), parse(&expose("vm1", &sight())).samples.len(), "{name:?}");
        }
        assert_eq!(escaped("a\"b\\c\nd"), "a\\\"b\\\\c\\nd");
    }

    #[test]
    fn the_documentation_names_every_metric_and_no_other() {
        let text = expose("vm1", &sight());
        let ours: BTreeSet<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
            .collect();
        let documentation = include_str!("../../../docs/configuration.md");
        let theirs: BTreeSet<&str> = documentation
            .lines()
            .filter_map(|line| line.strip_prefix("| `gemini_")?.split('`').next())
            .map(|name| name.split('{').next().unwrap_or(name))
            .collect();
        let theirs: BTreeSet<String> = theirs.iter().map(|n| format!("gemini_{n}")).collect();
        assert_eq!(ours, theirs.iter().map(String::as_str).collect::<BTreeSet<_>>());
    }
}

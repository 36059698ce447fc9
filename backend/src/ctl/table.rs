//! Answers as tables for people. An answer of another version may lack something: then a dash
//! stands there.

use crate::settings::{Given, Setting, Settings};
use serde_json::Value;
use std::fmt::Write;

/// A value as a word.
pub fn word(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Lines of a name and what it is.
#[derive(Default)]
struct Table(String);

impl Table {
    fn line(&mut self, name: &str, value: impl std::fmt::Display) {
        // Writing to a string does not fail.
        let _ = writeln!(self.0, "{name:<14} {value}");
    }

    fn gap(&mut self) {
        self.0.push('\n');
    }
}

/// A number of bytes, rounded for people.
#[allow(clippy::cast_precision_loss)] // it is rounded anyway
fn size(bytes: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    units.iter().find(|(shift, _)| bytes >> shift > 0).map_or_else(
        || format!("{bytes} B"),
        |(shift, unit)| {
            let whole = bytes as f64 / (1u64 << shift) as f64;
            if whole.fract() == 0.0 || whole >= 100.0 {
                format!("{whole:.0} {unit}")
            } else {
                format!("{whole:.1} {unit}")
            }
        },
    )
}

fn bytes(value: &Value) -> String {
    value.as_u64().map_or("-".into(), size)
}

fn duration(seconds: &Value) -> String {
    let Some(seconds) = seconds.as_f64() else { return "-".into() };
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // of an uptime
    let all = seconds as u64;
    let (days, hours, minutes) = (all / 86_400, all / 3600 % 24, all / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{all} s"),
        (0, 0, _) => format!("{minutes} min"),
        (0, ..) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

fn yes(value: &Value) -> bool {
    value == true
}

fn state(answer: &Value) -> &'static str {
    if yes(&answer["migrating"]) {
        return "a VMM is connected, and its guest is migrating: nothing is made huge or taken back";
    }
    match (yes(&answer["connected"]), yes(&answer["paused"])) {
        (true, true) => "paused: nothing is made huge; a VMM is connected",
        (false, true) => "paused: nothing is made huge; no VMM is connected",
        (true, false) => match (yes(&answer["guest_synced"]), yes(&answer["host_synced"])) {
            (true, true) => "a VMM is connected, guest and host are known in full",
            (true, false) => "a VMM is connected, the host is not known in full yet",
            (false, _) => "a VMM is connected, its driver has not told everything yet",
        },
        (false, false) => "no VMM is connected",
    }
}

/// An answer to `status`.
pub fn status(answer: &Value) -> String {
    let mut table = Table::default();
    table.line("vm", word(&answer["name"]));
    table.line(
        "daemon",
        format_args!(
            "version {}, process {}, since {}",
            word(&answer["version"]),
            word(&answer["pid"]),
            duration(&answer["uptime_seconds"])
        ),
    );
    table.line("state", state(answer));
    table.line("policy", word(&answer["policy"]));
    if let Some(file) = answer["config"].as_str() {
        let refused = answer["config_refused"].as_str();
        table.line("config", refused.map_or_else(|| file.into(), |why| format!("REFUSED: {why}")));
    }
    table.gap();

    let block_size = answer["block_shift"]
        .as_u64()
        .and_then(|shift| 1u64.checked_shl(u32::try_from(shift).ok()?));
    let of = |value: &Value| -> String {
        match (value.as_u64(), block_size) {
            (Some(blocks), Some(block)) => {
                format!("{blocks:>9} blocks  {:>9}", size(blocks.saturating_mul(block)))
            }
            _ => "-".into(),
        }
    };
    table.line("managed", of(&answer["blocks"]));
    for name in ["aligned", "guest_only", "host_only"] {
        table.line(name, of(&answer[name]));
    }
    let rate = answer["aligned_rate"].as_f64();
    table.line("aligned_rate", rate.map_or("-".into(), |rate| format!("{rate:.3}")));
    for layer in ["guest", "host"] {
        let states = answer[layer].as_object();
        let list = states.into_iter().flatten().filter(|(_, count)| **count != 0);
        let list: Vec<_> = list.map(|(name, count)| format!("{name} {count}")).collect();
        table.line(layer, if list.is_empty() { "-".into() } else { list.join(", ") });
    }
    pools(&mut table, answer);
    moving(&mut table, &answer["moving"]);
    table.gap();
    table.0.push_str(&budgets(answer));
    findings(&mut table, answer);
    table.0
}

/// Whether the guest is to move its huge pages, and what tells.
fn moving(table: &mut Table, moving: &Value) {
    let of = |name: &str| moving[name].as_f64().map_or("-".into(), |of| format!("{of:.2}"));
    table.line(
        "moving",
        format_args!(
            "{}; host fmfi {}, {} of the recent attempts found a huge page",
            if yes(&moving["wanted"]) { "the guest is asked to move its huge pages" } else { "no" },
            of("fmfi"),
            of("success_rate")
        ),
    );
}

/// The pools that hugetlb memory comes from.
fn pools(table: &mut Table, answer: &Value) {
    for pool in answer["hugetlb"].as_array().into_iter().flatten() {
        table.line(
            "hugetlb",
            format_args!(
                "{} of {} pages of {} are free, {} of these set aside; the guest may touch {} \
                 more, {} of these not set aside{}",
                word(&pool["free"]),
                word(&pool["total"]),
                bytes(&pool["page_size"]),
                word(&pool["reserved"]),
                word(&pool["missing"]),
                word(&pool["unreserved"]),
                if yes(&pool["short"]) { ": SHORT" } else { "" }
            ),
        );
    }
}

fn findings(table: &mut Table, answer: &Value) {
    let findings = answer["findings"].as_array().map(Vec::as_slice).unwrap_or_default();
    if !findings.is_empty() {
        table.gap();
    }
    for finding in findings {
        table.line(
            &word(&finding["severity"]),
            format_args!("{}: {}", word(&finding["code"]), word(&finding["message"])),
        );
    }
}

/// What may be spent and was, from an answer to `status`.
pub fn budgets(answer: &Value) -> String {
    let mut table = Table::default();
    table.line(
        "copy_rate",
        format_args!(
            "{} a second; copied {} in {} collapses, {} attempts failed",
            bytes(&answer["copy_rate"]),
            bytes(&answer["collapse_bytes"]),
            word(&answer["collapses"]),
            word(&answer["collapse_failures"])
        ),
    );
    let used = answer["cpu_seconds"].as_f64().unwrap_or_default();
    table.line(
        "cpu_share",
        format_args!("{} % of a CPU; used {used:.2} s", word(&answer["cpu_share"])),
    );
    let limit = match &answer["huge_max"] {
        Value::Null => "unlimited".into(),
        limit => bytes(limit),
    };
    let host = &answer["host"];
    let huge = host["huge"]
        .as_u64()
        .map(|huge| huge.saturating_add(host["hugetlb"].as_u64().unwrap_or(0)));
    let huge = huge.zip(answer["block_shift"].as_u64());
    let huge = huge.and_then(|(blocks, shift)| {
        Some(size(blocks.saturating_mul(1u64.checked_shl(u32::try_from(shift).ok()?)?)))
    });
    let scarce = if yes(&answer["scarce"]) { "; used up" } else { "" };
    let huge = huge.unwrap_or("-".into());
    table.line("huge_max", format_args!("{limit}; the guest has {huge}{scarce}"));
    table.0
}

/// An answer to `settings`.
pub fn settings(answer: &Value) -> String {
    let mut table = Table::default();
    for setting in answer["settings"].as_array().into_iter().flatten() {
        table.line(
            &word(&setting["name"]).replace('_', "-"),
            format_args!(
                "{:<10} default {:<10} {}",
                word(&setting["shown"]),
                word(&setting["default"]),
                word(&setting["range"])
            ),
        );
    }
    table.0
}

/// Settings that are in force now.
pub fn changed(answer: &Value) -> String {
    let mut table = Table::default();
    for (name, value) in answer.as_object().into_iter().flatten() {
        // In the form in which it may be set; a daemon of another version may know others.
        let shown = Setting::find(name).and_then(|setting| {
            let mut given = Given::default();
            given.give(setting, value.clone()).ok()?;
            Some(setting.show(&given.apply(&Settings::default())))
        });
        table.line(&name.replace('_', "-"), shown.unwrap_or_else(|| word(value)));
    }
    table.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn sizes_and_durations_are_rounded() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (4096, "4 KiB"),
            (2 << 20, "2 MiB"),
            (3 << 29, "1.5 GiB"),
            (u64::MAX, "16777216 TiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
        for (seconds, text) in
            [(7.9, "7 s"), (61.0, "1 min"), (3_720.0, "1 h 2 min"), (90_000.0, "1 d 1 h")]
        {
            assert_eq!(duration(&json!(seconds)), text);
        }
    }

    #[test]
    fn status_of_a_guest_is_a_table() {
        let text = status(&json!({
            "name": "vm1", "version": "0.1.0", "pid": 7, "uptime_seconds": 5.0,
            "connected": true, "paused": false, "guest_synced": true, "host_synced": true,
            "policy": "gemini", "block_shift": 21, "blocks": 512, "aligned": 256,
            "guest_only": 0, "host_only": 1, "aligned_rate": 0.9961,
            "guest": {"huge": 256, "free": 256, "base": 0}, "host": {"huge": 257},
            "copy_rate": 268_435_456, "collapse_bytes": 2_097_152, "collapses": 1,
            "collapse_failures": 0, "cpu_share": 25, "cpu_seconds": 0.5, "huge_max": null,
            "config": "/etc/gemini.toml", "config_refused": "/etc/gemini.toml:3: no",
            "findings": [{"severity": "warning", "code": "x", "message": "do y"}],
            "hugetlb": [{
                "page_size": 2_097_152, "total": 64, "free": 5, "reserved": 3, "surplus": 0,
                "overcommit": 0, "missing": 4, "unreserved": 4, "short": true,
            }],
        }));
        for line in [
            "vm             vm1",
            "daemon         version 0.1.0, process 7, since 5 s",
            "config         REFUSED: /etc/gemini.toml:3: no",
            "aligned              256 blocks    512 MiB",
            "aligned_rate   0.996",
            "guest          free 256, huge 256",
            "copy_rate      256 MiB a second; copied 2 MiB in 1 collapses, 0 attempts failed",
            "huge_max       unlimited; the guest has 514 MiB",
            "hugetlb        5 of 64 pages of 2 MiB are free, 3 of these set aside; the guest may \
             touch 4 more, 4 of these not set aside: SHORT",
            "warning        x: do y",
        ] {
            assert!(text.lines().any(|l| l == line), "no {line:?} in\n{text}");
        }
    }

    #[test]
    fn a_migration_is_told_also_where_it_is_not_the_only_reason() {
        for paused in [false, true] {
            let of_guest = json!({"connected": true, "paused": paused, "migrating": true});
            let text = status(&of_guest);
            assert!(text.contains("state          a VMM is connected, and its guest is migrating"));
        }
    }

    #[test]
    fn what_is_missing_is_a_dash() {
        let text = status(&json!({}));
        assert!(text.contains("aligned_rate   -\n"), "{text}");
        assert!(settings(&json!({})).is_empty());
    }

    #[test]
    fn changes_are_told_by_name() {
        let text = changed(&json!({"copy_rate": 3 << 20, "huge_max": null, "new_one": 7}));
        assert_eq!(text, "copy-rate      3M\nhuge-max       unlimited\nnew-one        7\n");
    }
}

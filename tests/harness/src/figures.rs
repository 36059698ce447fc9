//! Figures of a measured scenario, each against its bar.
//!
//! A figure comes from measurement alone; the bar is only compared with it, and
//! a missed bar makes the scenario fail.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;
use serde_json::Value;

/// What a figure has to reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bar {
    /// Nothing: the figure is told, not judged.
    None,
    /// The figure must be smaller than this.
    Below(f64),
    /// The figure must be this or greater.
    AtLeast(f64),
    /// The figure must be this or smaller.
    AtMost(f64),
}

impl Bar {
    /// Whether `value` reaches the bar; a value that is no number never does.
    #[must_use]
    pub fn met(self, value: f64) -> bool {
        match self {
            Bar::None => true,
            Bar::Below(bar) => value < bar,
            Bar::AtLeast(bar) => value >= bar,
            Bar::AtMost(bar) => value <= bar,
        }
    }
}

impl fmt::Display for Bar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Bar::None => f.write_str("-"),
            Bar::Below(bar) => write!(f, "< {bar}"),
            Bar::AtLeast(bar) => write!(f, ">= {bar}"),
            Bar::AtMost(bar) => write!(f, "<= {bar}"),
        }
    }
}

/// The result of one scenario.
#[derive(Clone, Debug, Default)]
pub struct Scenario {
    name: String,
    figures: Vec<(String, f64, Bar)>,
    args: BTreeMap<String, Value>,
    versions: BTreeMap<String, Value>,
}

#[derive(Serialize)]
struct Document<'a> {
    scenario: &'a str,
    figures: BTreeMap<&'a str, f64>,
    args: &'a BTreeMap<String, Value>,
    versions: &'a BTreeMap<String, Value>,
    machine: BTreeMap<String, Value>,
}

impl Scenario {
    /// A scenario without figures.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let mut versions = BTreeMap::new();
        versions.insert("harness".into(), env!("CARGO_PKG_VERSION").into());
        Scenario { name: name.into(), versions, ..Default::default() }
    }

    /// Records a measured figure and its bar.
    pub fn figure(&mut self, name: &str, value: f64, bar: Bar) {
        self.figures.push((name.into(), value, bar));
    }

    /// Records an argument that the figures depend on.
    pub fn arg(&mut self, name: &str, value: impl Into<Value>) {
        self.args.insert(name.into(), value.into());
    }

    /// Records the version of something that took part.
    pub fn version(&mut self, name: &str, value: impl Into<Value>) {
        self.versions.insert(name.into(), value.into());
    }

    /// Whether every figure reached its bar.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.figures.iter().all(|(_, value, bar)| bar.met(*value))
    }

    /// The document for `--json`.
    ///
    /// # Errors
    /// Never for finite figures; the serializer's error otherwise.
    pub fn document(&self) -> serde_json::Result<Value> {
        serde_json::to_value(Document {
            scenario: &self.name,
            figures: self.figures.iter().map(|(name, value, _)| (name.as_str(), *value)).collect(),
            args: &self.args,
            versions: &self.versions,
            machine: machine(),
        })
    }
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "scenario {}", self.name)?;
        let width = self.figures.iter().map(|(name, ..)| name.len()).max();
        let width = width.unwrap_or(0);
        for (name, value, bar) in &self.figures {
            let verdict = match bar {
                Bar::None => "",
                bar if bar.met(*value) => "ok",
                _ => "MISSED",
            };
            let value =
                if value.fract() == 0.0 { format!("{value:.0}") } else { format!("{value:.3}") };
            let line = format!("  {name:<width$}  {value:>14}  bar {bar:<10} {verdict}");
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// What the figures of this machine depend on, as far as it can be read.
#[must_use]
pub fn machine() -> BTreeMap<String, Value> {
    let mut facts = BTreeMap::new();
    let read = |path: &str| {
        std::fs::read_to_string(path)
            .map(|text| text.trim().to_owned())
            .unwrap_or_else(|_| "unreadable".into())
    };
    facts.insert("kernel".into(), read("/proc/sys/kernel/osrelease").into());
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    facts.insert("cpus".into(), cpus.into());
    let cpu_model = read("/proc/cpuinfo")
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map(|rest| rest.trim_start_matches([' ', '\t', ':']).to_owned());
    facts.insert("cpu".into(), cpu_model.into());
    let memory_kib = read("/proc/meminfo")
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
    facts.insert("memory_kib".into(), memory_kib.into());
    for name in ["enabled", "shmem_enabled"] {
        let path = format!("/sys/kernel/mm/transparent_hugepage/{name}");
        facts.insert(format!("thp_{name}"), read(&path).into());
    }
    facts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missed_bar_fails_the_scenario_and_is_said() {
        let mut scenario = Scenario::new("example");
        scenario.figure("resync_seconds", 1.5, Bar::Below(2.0));
        assert!(scenario.passed());
        scenario.figure("inputs", 10.0, Bar::AtLeast(11.0));
        assert!(!scenario.passed());
        assert!(scenario.to_string().contains("MISSED"));
    }

    #[test]
    fn a_figure_that_is_no_number_is_missed() {
        assert!(!Bar::Below(1.0).met(f64::NAN));
        assert!(!Bar::AtLeast(1.0).met(f64::NAN));
    }

    #[test]
    fn document_has_the_published_names() {
        let mut scenario = Scenario::new("example");
        scenario.figure("inputs", 10.0, Bar::None);
        scenario.arg("seed", 7);
        let document = scenario.document().expect("finite figures");
        for name in ["scenario", "figures", "args", "versions", "machine"] {
            assert!(document.get(name).is_some(), "{name} is missing");
        }
        assert_eq!(document["figures"]["inputs"], 10.0);
        assert_eq!(document["args"]["seed"], 7);
    }
}

//! What `scripts/bench figure2 --json` wrote: times of reads at random on this machine's own
//! processor, with huge pages at neither layer, at one, and at both.

use std::collections::BTreeMap;

use anyhow::ensure;
use serde::Deserialize;
use serde_json::Value;

/// The combinations, as figures name them and as people read them; both huge comes last.
pub const COMBINATIONS: [(&str, &str); 4] = [
    ("none", "base pages at both layers"),
    ("host_only", "huge in the host alone"),
    ("guest_only", "huge in the guest alone"),
    ("both", "huge at both layers"),
];

/// The scenario's document.
#[derive(Clone, Debug, Deserialize)]
pub struct Figure2 {
    scenario: String,
    figures: BTreeMap<String, f64>,
    #[serde(default)]
    args: BTreeMap<String, Value>,
    #[serde(default)]
    machine: BTreeMap<String, Value>,
}

impl Figure2 {
    /// Reads the document.
    ///
    /// # Errors
    /// If it is not this scenario's, or has no size.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let document: Self = serde_json::from_str(text)?;
        ensure!(document.scenario == "figure2", "scenario {}, not figure2", document.scenario);
        ensure!(!document.sizes().is_empty(), "no time of any size");
        Ok(document)
    }

    /// The sizes that were read, in MiB, ascending.
    #[must_use]
    pub fn sizes(&self) -> Vec<u32> {
        let size = |name: &String| name.strip_suffix("_mib_both_ns")?.parse().ok();
        let mut sizes: Vec<_> = self.figures.keys().filter_map(size).collect();
        sizes.sort_unstable();
        sizes
    }

    /// Median time of a read in nanoseconds.
    #[must_use]
    pub fn time(&self, size: u32, combination: &str) -> Option<f64> {
        self.figures.get(&format!("{size}_mib_{combination}_ns")).copied()
    }

    /// From the lower to the upper quartile of that time, in nanoseconds.
    #[must_use]
    pub fn spread(&self, size: u32, combination: &str) -> Option<f64> {
        self.figures.get(&format!("{size}_mib_{combination}_ns_spread")).copied()
    }

    /// TLB misses of a read by the hardware's counter, where there is one.
    #[must_use]
    pub fn misses(&self, size: u32, combination: &str) -> Option<f64> {
        self.figures.get(&format!("{size}_mib_{combination}_misses_per_read")).copied()
    }

    /// An argument or a fact of the machine, for people.
    #[must_use]
    pub fn fact(&self, name: &str) -> Option<String> {
        match self.args.get(name).or_else(|| self.machine.get(name))? {
            Value::Null => None,
            Value::String(text) => Some(text.clone()),
            other => Some(other.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_come_from_the_figures() {
        let text = r#"{"scenario":"figure2","machine":{"cpu":"X","cpus":2},"args":{"rounds":5},
            "figures":{"16_mib_both_ns":2,"1_mib_both_ns":1,"1_mib_none_ns":1.5,
            "1_mib_both_ns_spread":0.1,"1_mib_both_to_none":0.7,"both_mapped_huge_mib":4}}"#;
        let document = Figure2::parse(text).expect("a document");
        assert_eq!(document.sizes(), [1, 16]);
        assert_eq!(document.time(1, "none"), Some(1.5));
        assert_eq!(document.time(16, "none"), None);
        assert_eq!(document.spread(1, "both"), Some(0.1));
        assert_eq!(document.fact("rounds").as_deref(), Some("5"));
        assert_eq!(document.fact("cpu").as_deref(), Some("X"));
        for wrong in
            [r#"{"scenario":"tlb","figures":{}}"#, r#"{"scenario":"figure2","figures":{}}"#]
        {
            assert!(Figure2::parse(wrong).is_err());
        }
    }
}

//! What the Gemini paper reports: Jia, Zhang, Shan, Ding, "Making Dynamic Page Coalescing
//! Effective on Virtualized Clouds", EuroSys '23. Each number with the place that it is from.

/// Where to find the paper.
pub const CITATION: &str = "Jia, Zhang, Shan, Ding, \"Making Dynamic Page Coalescing Effective on \
     Virtualized Clouds\", EuroSys '23, DOI 10.1145/3552326.3567487";

/// The systems of Table 3, in its order.
pub const SYSTEMS: [&str; 6] =
    ["THP", "CA-paging", "Translation-ranger", "HawkEye", "Ingens", "Gemini"];

/// Table 3: rate of well-aligned huge pages in percent, clean VM, fragmented, by system.
pub const TABLE_3: [(&str, [u32; 6]); 16] = [
    ("Img-dnn", [21, 18, 15, 33, 35, 67]),
    ("Sphinx", [17, 17, 12, 31, 34, 64]),
    ("Moses", [19, 16, 14, 26, 24, 57]),
    ("Xapian", [18, 17, 13, 30, 34, 61]),
    ("Masstree", [22, 16, 15, 33, 43, 70]),
    ("Specjbb", [18, 14, 12, 32, 33, 81]),
    ("Silo", [12, 16, 14, 23, 24, 62]),
    ("RocksDB", [25, 17, 13, 33, 26, 64]),
    ("Redis", [18, 17, 13, 35, 28, 60]),
    ("Memcached", [17, 15, 12, 23, 25, 77]),
    ("Canneal", [26, 32, 23, 29, 30, 51]),
    ("Streamcluster", [19, 22, 15, 25, 35, 50]),
    ("dedup", [18, 22, 15, 25, 26, 55]),
    ("CG.D", [20, 23, 11, 42, 46, 80]),
    ("429.mcf", [25, 27, 13, 36, 42, 76]),
    ("SVM", [23, 20, 16, 41, 40, 81]),
];

/// The paper's system that a policy stands for.
#[must_use]
pub fn system(policy: &str) -> Option<&'static str> {
    match policy {
        "thp" => Some("THP"),
        "hawkeye-like" => Some("HawkEye"),
        "ingens-like" => Some("Ingens"),
        "gemini" => Some("Gemini"),
        _ => None,
    }
}

/// A rate of Table 3, as a share of 1.
#[must_use]
pub fn rate(workload: &str, system: &str) -> Option<f64> {
    let (_, rates) = TABLE_3.iter().find(|(name, _)| *name == workload)?;
    Some(f64::from(rates[column(system)?]) / 100.0)
}

/// The mean of a column of Table 3, as a share of 1.
#[must_use]
pub fn mean_rate(system: &str) -> Option<f64> {
    let column = column(system)?;
    let sum: u32 = TABLE_3.iter().map(|(_, rates)| rates[column]).sum();
    Some(f64::from(sum) / (100.0 * TABLE_3.len() as f64))
}

fn column(system: &str) -> Option<usize> {
    SYSTEMS.iter().position(|name| *name == system)
}

/// A mean that the paper tells of its evaluation, for a clean and for a reused VM.
#[derive(Clone, Copy, Debug)]
pub struct Mean {
    /// In a clean VM.
    pub clean: f64,
    /// In a VM where another workload was before.
    pub reused: f64,
}

/// Throughput against base pages at both layers.
pub const THROUGHPUT: Mean = Mean { clean: 1.72, reused: 1.65 };
/// Mean latency against base pages at both layers.
pub const MEAN_LATENCY: Mean = Mean { clean: 1.0 - 0.57, reused: 1.0 - 0.32 };
/// 99th percentile of latencies against base pages at both layers.
pub const P99_LATENCY: Mean = Mean { clean: 1.0 - 0.60, reused: 1.0 - 0.26 };
/// TLB misses of the other systems against Gemini's.
pub const MISSES_OF_OTHERS: Mean = Mean { clean: 2.39, reused: 4.6 };
/// Share of the well-aligned huge pages of a reused VM that are reused, by the huge bucket.
pub const REUSED: f64 = 0.88;

/// The paper's breakdown: what brings which share of the gain.
pub const BREAKDOWN: &str = "EMA and HB 66 %, huge bucket 34 %";
/// The paper's overhead where nothing is to be gained.
pub const OVERHEAD: &str = "2 % on average, 3 % at most";
/// The paper's averages of Table 3.
pub const RATES: &str = "Gemini 66 %, others at most 33 %, on average";
/// The paper's headline for TLB misses.
pub const FEWER_MISSES: &str = "up to 83 % fewer";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_3_has_the_average_that_the_paper_tells() {
        assert_eq!(mean_rate("Gemini"), Some(0.66));
        let others = SYSTEMS.iter().filter(|system| **system != "Gemini");
        for other in others {
            assert!(mean_rate(other) <= Some(0.335), "{other}: {:?}", mean_rate(other));
        }
        assert_eq!(rate("Redis", "HawkEye"), Some(0.35));
        assert_eq!(rate("Redis", "none"), None);
    }

    #[test]
    fn every_workload_that_is_named_after_the_papers_is_in_its_table() {
        for (workload, paper) in crate::names::WORKLOADS {
            assert!(paper.is_none_or(|paper| rate(paper, "Gemini").is_some()), "{workload}");
        }
    }
}

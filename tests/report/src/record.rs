//! One run of the evaluation, as the runner has written it.
//!
//! What could not be had is null there and `None` here; nothing is made up for it. Fields that
//! this program does not know are passed over.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{bail, ensure, Context};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The version of the schema that is read.
const SCHEMA: u32 = 1;

/// The letters of a block map; [`crate::document::BlockKind`] says what they mean.
const MAP_LETTERS: &str = ".bghAf";

/// A run.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Record {
    schema: u32,
    /// What was run.
    pub run: Run,
    /// What the runner was told.
    #[serde(default)]
    pub arguments: Map<String, Value>,
    /// By what, where and when.
    #[serde(default)]
    pub made: Made,
    /// How the huge pages of both layers met.
    pub alignment: Option<Alignment>,
    /// What the workload told of itself.
    pub performance: Option<Performance>,
    /// The TLB simulator's counters, or the hardware's.
    pub tlb: Option<Tlb>,
    /// What an emulated guest did by the clock while the program waited.
    pub idle: Option<Idle>,
    /// What it cost.
    pub costs: Option<Costs>,
    /// What became of the huge pages of an earlier program.
    pub reuse: Option<Reuse>,
    /// How fragmented memory was.
    pub fmfi: Option<Fmfi>,
    /// Pictures of the guest's memory.
    pub maps: Option<Maps>,
    /// Why there are no figures.
    pub failure: Option<String>,
}

/// What tells one run from all others. They are ordered by place first, then by repetition.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq, PartialOrd, Ord)]
pub struct Run {
    /// Name of the workload.
    pub workload: String,
    /// Name of the policy.
    pub policy: String,
    /// How memory was before: `unfragmented`, `fragmented` or `scarce`.
    pub state: String,
    /// `clean` or `reused`.
    pub vm: String,
    /// Seed of everything random.
    #[serde(default)]
    pub seed: u64,
    /// Number of the repetition, from 0 on.
    #[serde(default)]
    pub repetition: u64,
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Run { workload, policy, state, vm, seed, repetition } = self;
        write!(f, "{workload}, {policy}, {state}, {vm} VM, seed {seed}, repetition {repetition}")
    }
}

/// Where a run comes from.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Made {
    /// The project's commit.
    pub commit: Option<String>,
    /// RFC 3339.
    pub date: Option<String>,
    /// How long the run took.
    pub seconds: Option<f64>,
    /// The host.
    pub machine: Machine,
    /// Version of each program that took part.
    pub versions: BTreeMap<String, Option<String>>,
}

/// A host.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Machine {
    /// Name of the processor.
    pub cpu: Option<String>,
    /// Number of processors.
    pub cpus: Option<u64>,
    /// Memory.
    pub memory_mib: Option<f64>,
    /// Release of the kernel.
    pub kernel: Option<String>,
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unknown = || "?".to_owned();
        write!(
            f,
            "{} x {}, {} MiB, Linux {}",
            self.cpus.map_or_else(unknown, |cpus| cpus.to_string()),
            self.cpu.clone().unwrap_or_else(unknown),
            self.memory_mib.map_or_else(unknown, |mib| format!("{mib:.0}")),
            self.kernel.clone().unwrap_or_else(unknown),
        )
    }
}

/// Counted from outside, by the guest's kernel and QEMU's page tables.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Alignment {
    /// Blocks that the guest has huge.
    pub guest_huge: Option<f64>,
    /// Blocks in use, or held, that the host has huge.
    pub host_huge: Option<f64>,
    /// Blocks that both have huge.
    pub aligned: Option<f64>,
    /// 0 to 1.
    pub aligned_rate: Option<f64>,
    /// 0 to 1.
    pub aligned_coverage: Option<f64>,
    /// From the data being loaded until nine tenths of the final coverage.
    pub seconds_to_alignment: Option<f64>,
}

/// What the workload measured.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Performance {
    /// Operations done.
    pub operations: Option<f64>,
    /// Wall-clock time.
    pub seconds: Option<f64>,
    /// Operations a second.
    pub per_second: Option<f64>,
    /// Mean latency in microseconds.
    pub mean_us: Option<f64>,
    /// 99th percentile of latencies in microseconds.
    pub p99_us: Option<f64>,
    /// What an operation is.
    pub unit: Option<String>,
}

/// Counters of the measured phase.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Tlb {
    /// Accesses to data.
    pub accesses: Option<f64>,
    /// Misses of both levels.
    pub misses: Option<f64>,
    /// Those of accesses to memory of programs, by themselves or by the kernel.
    pub user_misses: Option<f64>,
    /// Reads of page tables.
    pub walk_reads: Option<f64>,
    /// Cycles, an estimate if simulated.
    pub cycles: Option<f64>,
    /// Instructions of the guest.
    pub instructions: Option<f64>,
    /// Walks that QEMU's own has not confirmed.
    pub disagreements: Option<f64>,
}

/// What an emulated guest did in some seconds while the program waited.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Idle {
    /// How long that was.
    pub seconds: Option<f64>,
    /// Counters of it.
    pub tlb: Tlb,
}

/// What a run cost.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Costs {
    /// Guest memory that the host holds.
    pub host_rss_mib: Option<f64>,
    /// Memory that the guest uses.
    pub guest_used_mib: Option<f64>,
    /// Copied by the host to make huge pages.
    pub copied_mib: Option<f64>,
    /// CPU time of the daemon.
    pub daemon_cpu_seconds: Option<f64>,
    /// CPU time of the host's kernel threads.
    pub host_kernel_cpu_seconds: Option<f64>,
    /// CPU time of the guest's kernel.
    pub guest_kernel_cpu_seconds: Option<f64>,
    /// Blocks that the guest's driver has emptied by migration.
    pub moved_blocks: Option<f64>,
}

/// What became of aligned blocks whose program ended.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Reuse {
    /// Aligned blocks of the first program.
    pub aligned_before: Option<f64>,
    /// Those of them that the second program has, aligned.
    pub reused: Option<f64>,
    /// Those of them that are whole, huge in the host, and held for who comes next.
    pub waiting: Option<f64>,
}

/// Free memory that is unusable for huge pages, 0 to 1.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Fmfi {
    /// In the guest.
    pub guest: Option<f64>,
    /// In the host.
    pub host: Option<f64>,
}

/// One letter a block of guest memory.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Maps {
    /// When the workload has loaded its data.
    pub before: Option<String>,
    /// At the end of its measured phase.
    pub after: Option<String>,
}

impl Record {
    /// Reads a record.
    ///
    /// # Errors
    /// If the text is no record, or a figure in it cannot be true.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        #[derive(Deserialize)]
        struct Version {
            schema: Option<u32>,
        }
        // First alone: another version may look different in all else.
        let version: Version = serde_json::from_str(text)?;
        match version.schema {
            None => bail!("no `schema`: not the record of a run"),
            Some(SCHEMA) => {}
            Some(other) => bail!("schema {other}; this program reads schema {SCHEMA}"),
        }
        let record: Record = serde_json::from_str(text)?;
        record.check()?;
        Ok(record)
    }

    fn check(&self) -> anyhow::Result<()> {
        debug_assert_eq!(self.schema, SCHEMA);
        let alignment = self.alignment.as_ref();
        let fmfi = self.fmfi.as_ref();
        for (name, share) in [
            ("aligned_rate", alignment.and_then(|alignment| alignment.aligned_rate)),
            ("aligned_coverage", alignment.and_then(|alignment| alignment.aligned_coverage)),
            ("fmfi.guest", fmfi.and_then(|fmfi| fmfi.guest)),
            ("fmfi.host", fmfi.and_then(|fmfi| fmfi.host)),
        ] {
            ensure!(
                share.is_none_or(|share| (0.0..=1.0).contains(&share)),
                "{name} is {}, not between 0 and 1",
                share.unwrap_or_default()
            );
        }
        let maps = self.maps.as_ref();
        for map in
            [maps.and_then(|maps| maps.before.as_ref()), maps.and_then(|maps| maps.after.as_ref())]
                .into_iter()
                .flatten()
        {
            if let Some(letter) = map.chars().find(|&letter| !MAP_LETTERS.contains(letter)) {
                bail!("a block map has the letter {letter:?}; there are {MAP_LETTERS}");
            }
        }
        Ok(())
    }

    /// Whether the run only shows that it works.
    #[must_use]
    pub fn quick(&self) -> bool {
        self.arguments.get("quick").and_then(Value::as_bool).unwrap_or(false)
    }

    /// Whether the guest had the processor's own virtualisation; without it, it was emulated.
    #[must_use]
    pub fn on_hardware(&self) -> bool {
        self.arguments.get("accel").and_then(Value::as_str) == Some("kvm")
    }

    /// How many times as long a second of the guest's clock took in the measured phase.
    #[must_use]
    pub fn slowdown(&self) -> f64 {
        let told = self.argument("slowdown").and_then(|text| text.parse().ok());
        told.filter(|slowdown| *slowdown >= 1.0).unwrap_or(1.0)
    }

    /// An argument as text, for comparison and for people.
    #[must_use]
    pub fn argument(&self, name: &str) -> Option<String> {
        match self.arguments.get(name) {
            // Older runs had these, and did not say so.
            None if name == "slowdown" => Some("1".into()),
            None if name == "warm" => Some("false".into()),
            None | Some(Value::Null) => None,
            Some(Value::String(text)) => Some(text.clone()),
            Some(other) => Some(other.to_string()),
        }
    }
}

/// The records of a directory.
#[derive(Clone, Debug, Default)]
pub struct Records {
    /// In the order of their file names.
    pub all: Vec<Record>,
    /// File name and reason of each file that was left out.
    pub unreadable: Vec<(String, String)>,
}

/// What to do with a file that is no record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unreadable {
    /// The reading ends with an error.
    Fails,
    /// It is left out, and told in [`Records::unreadable`].
    Skipped,
}

impl Records {
    /// Reads every `*.json` in `dir` whose name does not begin with a dot, except those that
    /// `others` names: documents of another kind.
    ///
    /// # Errors
    /// If the directory cannot be read or has no record, or, unless they are to be skipped, if a
    /// file is no record or two are of the same run. The error names the file.
    pub fn read(dir: &Path, others: &[&Path], unreadable: Unreadable) -> anyhow::Result<Self> {
        let mut paths: Vec<PathBuf> = Vec::new();
        let cannot_read = || format!("cannot read the directory {}", dir.display());
        for entry in std::fs::read_dir(dir).with_context(cannot_read)? {
            let path = entry.with_context(cannot_read)?.path();
            let hidden =
                path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
            let json = path.extension().is_some_and(|extension| extension == "json");
            if json && !hidden && !others.contains(&path.as_path()) {
                paths.push(path);
            }
        }
        paths.sort();
        let mut records = Records::default();
        let mut seen = BTreeMap::new();
        for path in paths {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            match read_new(&path, &name, &mut seen) {
                Ok(record) => records.all.push(record),
                Err(error) if unreadable == Unreadable::Skipped => {
                    records.unreadable.push((name, format!("{error:#}")));
                }
                Err(error) => return Err(error.context(path.display().to_string())),
            }
        }
        if records.all.is_empty() {
            bail!(
                "{} holds no record of a run ({} unreadable); scripts/bench paper makes them",
                dir.display(),
                records.unreadable.len()
            );
        }
        Ok(records)
    }
}

/// Reads `path`, whose run must not have been `seen`.
fn read_new(
    path: &Path,
    name: &str,
    seen: &mut BTreeMap<(bool, Run), String>,
) -> anyhow::Result<Record> {
    let record = Record::parse(&std::fs::read_to_string(path)?)?;
    if let Some(other) = seen.get(&(record.quick(), record.run.clone())) {
        bail!("the same run as {other}: {}", record.run);
    }
    seen.insert((record.quick(), record.run.clone()), name.to_owned());
    Ok(record)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALLEST: &str = r#"{"schema":1,"run":{"workload":"w","policy":"none",
        "state":"scarce","vm":"clean"}}"#;

    #[test]
    fn a_record_without_figures_is_one() {
        let record = Record::parse(SMALLEST).expect("a record");
        assert!(record.alignment.is_none() && record.failure.is_none());
        assert!(!record.quick() && !record.on_hardware());
        // As runs were made before there was a choice.
        assert_eq!((record.slowdown(), record.argument("warm")), (1.0, Some("false".into())));
    }

    #[test]
    fn unknown_fields_are_passed_over_and_null_is_none() {
        let text = r#"{"schema":1,"new":[1],"run":{"workload":"w","policy":"none","state":"scarce",
            "vm":"clean","seed":1,"repetition":2,"more":{}},"tlb":null,
            "arguments":{"quick":true,"accel":"kvm","guest_mib":1024},
            "costs":{"copied_mib":1.5,"guest_kernel_cpu_seconds":null,"other":1}}"#;
        let record = Record::parse(text).expect("a record");
        let costs = record.costs.as_ref().expect("there are costs");
        assert_eq!(costs.copied_mib, Some(1.5));
        assert_eq!(costs.guest_kernel_cpu_seconds, None);
        assert!(record.quick() && record.on_hardware());
        assert_eq!(record.argument("guest_mib").as_deref(), Some("1024"));
    }

    #[test]
    fn what_cannot_be_true_is_refused() {
        for (text, told) in [
            ("", "EOF"),
            ("[1]", "invalid"),
            ("{}", "not the record of a run"),
            (r#"{"schema":2}"#, "schema 2"),
            (r#"{"schema":1,"run":{"policy":"none"}}"#, "workload"),
            (&SMALLEST.replace("\"run\"", "\"alignment\":{\"aligned_rate\":1.2},\"run\""), "1.2"),
            (&SMALLEST.replace("\"run\"", "\"maps\":{\"after\":\"AAx\"},\"run\""), "'x'"),
        ] {
            let error = format!("{:#}", Record::parse(text).expect_err(text));
            assert!(error.contains(told), "{text}: {error}");
        }
    }

    #[test]
    fn a_directory_is_read_in_order_and_errors_name_the_file() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let read = |unreadable| Records::read(dir.path(), &[], unreadable);
        let error = read(Unreadable::Fails).expect_err("it is empty");
        assert!(error.to_string().contains("no record"), "{error:#}");

        std::fs::write(dir.path().join("b.json"), SMALLEST)?;
        std::fs::write(dir.path().join("a.json"), SMALLEST.replace("scarce", "fragmented"))?;
        std::fs::write(dir.path().join(".half.json"), "{")?;
        std::fs::write(dir.path().join("page.html"), "<p>")?;
        let records = read(Unreadable::Fails)?;
        let states: Vec<_> = records.all.iter().map(|record| record.run.state.as_str()).collect();
        assert_eq!(states, ["fragmented", "scarce"]);

        std::fs::write(dir.path().join("c.json"), "{")?;
        let error = read(Unreadable::Fails).expect_err("c.json is broken");
        assert!(format!("{error:#}").contains("c.json"), "{error:#}");
        std::fs::write(dir.path().join("d.json"), SMALLEST)?;
        let records = read(Unreadable::Skipped)?;
        assert_eq!(records.all.len(), 2);
        assert_eq!(records.unreadable[0].0, "c.json");
        assert!(records.unreadable[1].1.contains("same run as b.json"));
        Ok(())
    }
}

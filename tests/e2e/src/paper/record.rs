//! The record of one run, and the directory that records are kept in.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{ensure, Context};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::matrix::Run;
use crate::{BLOCK, MIB};

/// The form of records that is written and read here.
const SCHEMA: u32 = 1;

/// What one run has shown. What could not be had is `None`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Version of this form: 1.
    pub schema: u32,
    /// What was run.
    pub run: Run,
    /// What the figures depend on; runs with other arguments are not comparable.
    pub arguments: Arguments,
    /// Where, when and with what.
    pub made: Made,
    /// How well huge pages meet.
    pub alignment: Option<Alignment>,
    /// What the program achieved.
    pub performance: Option<Performance>,
    /// What was counted of TLBs while it did.
    pub tlb: Option<Tlb>,
    /// What an emulated guest does while nothing is measured.
    #[serde(default)]
    pub idle: Option<Idle>,
    /// What it cost.
    pub costs: Option<Costs>,
    /// In a reused guest, what became of the former program's aligned blocks.
    pub reuse: Option<Reuse>,
    /// Fragmentation before the program was started.
    pub fmfi: Option<Fmfi>,
    /// Every block of guest memory, a letter each.
    pub maps: Option<Maps>,
    /// Why the run does not count, if it does not.
    pub failure: Option<String>,
}

/// Arguments of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Arguments {
    /// Guest memory.
    pub guest_mib: u64,
    /// Data of the program.
    pub workload_mib: u64,
    /// Operations of the measured phase.
    pub operations: u64,
    /// Simulated processor; none where the hardware's counters are read.
    pub profile: Option<String>,
    /// What guests run on.
    pub accel: String,
    /// Virtual processors.
    pub cpus: u32,
    /// Whether it only shows that it works.
    pub quick: bool,
    /// Longest time that both layers are given to come to rest.
    pub settle_seconds: u64,
    /// Whole free blocks that a fragmented host has left, in percent of the guest's
    /// blocks.
    pub host_blocks_percent: u64,
    /// Whether the simulated processor has PCIDs; none where nothing is simulated.
    #[serde(default)]
    pub pcid: Option<bool>,
    /// How many times as long a second of the guest's clock takes in the measured phase.
    #[serde(default = "one")]
    pub slowdown: u32,
    /// Whether the program did the same before: once, for both layers to come to rest after
    /// it, and where TLBs are simulated once more, for them to have what it works with. Older
    /// runs did not; all are made so now.
    #[serde(default)]
    pub warm: bool,
}

fn one() -> u32 {
    1
}

impl Arguments {
    /// Whole free blocks that a fragmented host has left.
    #[must_use]
    pub fn host_blocks(&self) -> u64 {
        self.guest_mib * self.host_blocks_percent / 100 * MIB / BLOCK
    }
}

/// Where, when and with what a run was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Made {
    /// Commit of the sources.
    pub commit: Option<String>,
    /// RFC 3339, UTC, when the run was done.
    pub date: String,
    /// How long it took.
    pub seconds: f64,
    /// The machine.
    pub machine: Machine,
    /// Versions of what took part.
    pub versions: BTreeMap<String, String>,
}

/// A machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Model of its processors.
    pub cpu: Option<String>,
    /// Their number.
    pub cpus: Option<u64>,
    /// Its memory.
    pub memory_mib: Option<u64>,
    /// Release of its kernel.
    pub kernel: Option<String>,
}

/// Blocks, counted from outside: QEMU's page tables, and the guest's kpageflags.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Alignment {
    /// Huge in the guest.
    pub guest_huge: u64,
    /// Huge in the host, and in use or held in the guest.
    pub host_huge: u64,
    /// Both.
    pub aligned: u64,
    /// aligned / (`guest_huge` + `host_huge` - aligned).
    pub aligned_rate: f64,
    /// Share of the guest's resident user memory that lies in aligned blocks.
    pub aligned_coverage: f64,
    /// From the moment that the data is loaded until the coverage is nine tenths
    /// of what it is in the end; none if nothing is aligned in the end.
    pub seconds_to_alignment: Option<f64>,
}

/// What a program achieved in its measured phase; times are those that it took to emulate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Performance {
    /// Operations done.
    pub operations: u64,
    /// Time of all.
    pub seconds: f64,
    /// Operations a second.
    pub per_second: f64,
    /// Mean time of one, in microseconds.
    pub mean_us: f64,
    /// 99th percentile of it.
    pub p99_us: Option<f64>,
    /// What an operation is.
    pub unit: String,
}

/// Counts of the measured phase, simulated or of the hardware.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tlb {
    /// Accesses to data.
    pub accesses: Option<u64>,
    /// Those that no level of the TLB had an entry for.
    pub misses: Option<u64>,
    /// Misses at addresses of programs: the others are the kernel's at its own.
    #[serde(default)]
    pub user_misses: Option<u64>,
    /// Entries of page tables read for them, guest's and host's.
    pub walk_reads: Option<u64>,
    /// Cycles; an estimate if simulated.
    pub cycles: Option<u64>,
    /// Instructions, of user programs and the kernel.
    pub instructions: Option<u64>,
    /// Walks that the simulator saw end elsewhere than QEMU's own.
    pub disagreements: Option<u64>,
}

/// What the guest did by the clock, after the measured phase, while the program waited.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Idle {
    /// Seconds of it.
    pub seconds: f64,
    /// Counts of it.
    pub tlb: Tlb,
}

/// What a run cost from before the program was started.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Costs {
    /// Memory of the host behind the guest, in the end.
    pub host_rss_mib: f64,
    /// Memory that the guest has in use, in the end.
    pub guest_used_mib: f64,
    /// Memory that the host copied to make huge pages, at most: a whole block for each, failed
    /// attempts that had a page for it included.
    pub copied_mib: f64,
    /// CPU time of the daemon.
    pub daemon_cpu_seconds: f64,
    /// CPU time of those threads of the host's kernel that make and find huge pages.
    pub host_kernel_cpu_seconds: f64,
    /// CPU time of the guest's kernel threads and of `gemini-guestd`.
    pub guest_kernel_cpu_seconds: Option<f64>,
    /// Huge pages that the driver moved.
    pub moved_blocks: Option<u64>,
}

/// What became of blocks that were aligned for a program that ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reuse {
    /// Its aligned blocks.
    pub aligned_before: u64,
    /// Those of them that are aligned for the next one, by the end of its measured
    /// phase.
    pub reused: u64,
    /// Those of them that are whole, huge in the host, and held for who comes next.
    pub waiting: u64,
}

/// Unusable free space index for huge pages, 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fmfi {
    /// Of the guest.
    pub guest: f64,
    /// Of the host.
    pub host: f64,
}

/// All blocks in ascending order, a letter each: see
/// [`View::letters`](crate::compare::View::letters).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Maps {
    /// When the program has just loaded its data.
    pub before: String,
    /// At the end of its measured phase.
    pub after: String,
}

impl Record {
    /// A record of a run that has shown nothing yet.
    #[must_use]
    pub fn new(run: Run, arguments: Arguments, made: Made) -> Self {
        Record {
            schema: SCHEMA,
            run,
            arguments,
            made,
            alignment: None,
            performance: None,
            tlb: None,
            idle: None,
            costs: None,
            reuse: None,
            fmfi: None,
            maps: None,
            failure: None,
        }
    }
}

impl Performance {
    /// With the times that it took to emulate, where the guest's clock took `slowdown` times as
    /// long for a second.
    #[must_use]
    pub fn by_true_time(self, slowdown: u32) -> Self {
        let slowdown = f64::from(slowdown);
        Performance {
            seconds: self.seconds * slowdown,
            per_second: self.per_second / slowdown,
            mean_us: self.mean_us * slowdown,
            p99_us: self.p99_us.map(|micros| micros * slowdown),
            ..self
        }
    }
}

impl Machine {
    /// This machine.
    #[must_use]
    pub fn this() -> Self {
        let facts = gemini_harness::figures::machine();
        let text = |name: &str| facts.get(name).and_then(Value::as_str).map(str::to_owned);
        let number = |name: &str| facts.get(name).and_then(Value::as_u64);
        Machine {
            cpu: text("cpu"),
            cpus: number("cpus"),
            memory_mib: number("memory_kib").map(|kib| kib / 1024),
            kernel: text("kernel"),
        }
    }
}

/// A directory of records.
#[derive(Debug)]
pub struct Store {
    directory: PathBuf,
}

impl Store {
    /// The directory, made if it is not there.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn open(directory: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
        Ok(Store { directory: directory.to_owned() })
    }

    /// Where it is.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The record of `run` if it is there.
    ///
    /// # Errors
    /// If it is of another run, of other `arguments`, or no record at all: nothing
    /// is written over what somebody may want to keep.
    pub fn find(&self, run: &Run, arguments: &Arguments) -> anyhow::Result<Option<Record>> {
        let path = self.directory.join(run.file_name());
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", path.display()))
            }
        };
        let record: Record = serde_json::from_str(&text)
            .with_context(|| format!("{} is no record of a run", path.display()))?;
        ensure!(
            record.schema == SCHEMA && record.run == *run && record.arguments == *arguments,
            "{} was made with other arguments: take another --results",
            path.display()
        );
        Ok(Some(record))
    }

    /// Writes a record in the place of a former one, all or nothing.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, record: &Record) -> anyhow::Result<()> {
        let path = self.directory.join(record.run.file_name());
        let new = path.with_extension("new");
        gemini_harness::report::write_json(&new, record)?;
        fs::rename(&new, &path).with_context(|| format!("cannot write {}", path.display()))
    }
}

/// The time now as RFC 3339 has it, in UTC, to the second.
#[must_use]
pub fn now() -> String {
    format!("{:.0}", jiff::Timestamp::now())
}

#[cfg(test)]
mod tests {
    use super::super::matrix::{State, Vm};
    use super::super::policy::Policy;
    use super::*;
    use serde_json::json;

    fn record() -> Record {
        let run = Run {
            workload: "reader".into(),
            policy: Policy::GeminiNoRepair,
            state: State::Fragmented,
            vm: Vm::Reused,
            seed: 3,
            repetition: 2,
        };
        let arguments = Arguments {
            guest_mib: 768,
            workload_mib: 128,
            operations: 9,
            profile: None,
            accel: "tcg".into(),
            cpus: 2,
            quick: true,
            settle_seconds: 20,
            host_blocks_percent: 50,
            pcid: Some(true),
            slowdown: 64,
            warm: true,
        };
        let made = Made {
            commit: None,
            date: now(),
            seconds: 1.5,
            machine: Machine { cpu: None, cpus: None, memory_mib: None, kernel: None },
            versions: BTreeMap::new(),
        };
        Record::new(run, arguments, made)
    }

    fn store(name: &str) -> Store {
        let path = std::env::temp_dir().join(format!("gemini-{name}-{}", std::process::id()));
        Store::open(&path).expect("a directory")
    }

    #[test]
    fn times_of_a_slow_clock_are_told_as_they_were_outside() {
        let told = Performance {
            operations: 10,
            seconds: 2.0,
            per_second: 5.0,
            mean_us: 200_000.0,
            p99_us: None,
            unit: "reads".into(),
        };
        let outside = told.by_true_time(4);
        assert_eq!((outside.seconds, outside.per_second), (8.0, 1.25));
        assert_eq!((outside.mean_us, outside.p99_us), (800_000.0, None));
    }

    #[test]
    fn record_comes_back_as_it_was_written() {
        let store = store("records");
        let mut record = record();
        assert_eq!(store.find(&record.run, &record.arguments).expect("an empty store"), None);
        record.tlb = Some(Tlb { misses: Some(4), ..Tlb::default() });
        record.maps = Some(Maps { before: "bb.".into(), after: "AA.".into() });
        store.write(&record).expect("a directory");
        let found = store.find(&record.run, &record.arguments).expect("a record");
        assert_eq!(found, Some(record));
        let files = fs::read_dir(store.directory()).expect("a directory").count();
        assert_eq!(files, 1, "nothing is left but the record");
        fs::remove_dir_all(store.directory()).expect("made above");
    }

    #[test]
    fn what_was_made_otherwise_is_not_written_over() {
        let store = store("other-records");
        let record = record();
        store.write(&record).expect("a directory");
        let other = Arguments { guest_mib: 1024, ..record.arguments.clone() };
        let error = store.find(&record.run, &other).expect_err("other arguments");
        assert!(error.to_string().contains("--results"), "{error}");
        let seed = Run { seed: 4, ..record.run.clone() };
        assert!(store.find(&seed, &record.arguments).is_err());
        fs::write(store.directory().join(record.run.file_name()), "{").expect("a directory");
        assert!(store.find(&record.run, &record.arguments).is_err());
        fs::remove_dir_all(store.directory()).expect("made above");
    }

    #[test]
    fn blocks_of_the_host_are_a_part_of_the_guests() {
        assert_eq!(record().arguments.host_blocks(), 192);
    }

    #[test]
    fn record_has_the_published_form() {
        let value = serde_json::to_value(record()).expect("plain data");
        assert_eq!(value["schema"], 1);
        let run = json!({
            "workload": "reader", "policy": "gemini-no-repair", "state": "fragmented",
            "vm": "reused", "seed": 3, "repetition": 2
        });
        assert_eq!(value["run"], run);
        for name in ["alignment", "tlb", "idle", "costs", "reuse", "fmfi", "maps", "failure"] {
            assert!(value[name].is_null(), "{name}");
        }
    }

    #[test]
    fn date_is_that_of_rfc_3339() {
        let date = now();
        assert!(date.len() == 20 && date.starts_with("20") && date.ends_with('Z'), "{date}");
    }

    /// What two programs know by themselves, and have to know alike.
    #[test]
    fn the_report_reads_all_that_is_written_and_asks_for_nothing_else() {
        let mut record = record();
        record.alignment = Some(Alignment {
            guest_huge: 8,
            host_huge: 7,
            aligned: 6,
            aligned_rate: 0.5,
            aligned_coverage: 0.25,
            seconds_to_alignment: None,
        });
        record.performance = Some(Performance {
            operations: 9,
            seconds: 1.0,
            per_second: 9.0,
            mean_us: 3.0,
            p99_us: Some(4.0),
            unit: "reads".into(),
        });
        record.tlb = Some(Tlb::default());
        record.costs = Some(Costs {
            host_rss_mib: 1.0,
            guest_used_mib: 2.0,
            copied_mib: 3.0,
            daemon_cpu_seconds: 4.0,
            host_kernel_cpu_seconds: 5.0,
            guest_kernel_cpu_seconds: None,
            moved_blocks: Some(6),
        });
        record.reuse = Some(Reuse { aligned_before: 3, reused: 2, waiting: 1 });
        record.fmfi = Some(Fmfi { guest: 1.0, host: 0.5 });
        record.maps = Some(Maps { before: "bb.".into(), after: "AgAhf".into() });
        let written = serde_json::to_value(&record).expect("plain data");
        let read = gemini_report::record::Record::parse(&written.to_string()).expect("it reads it");
        let read = serde_json::to_value(read).expect("plain data");
        assert_eq!(names(&read), names(&written));
    }

    /// Names of all members, those of members included.
    fn names(value: &Value) -> Vec<String> {
        let members = value.as_object().into_iter().flatten();
        let mut names: Vec<String> = members
            .flat_map(|(name, value)| {
                let below = names(value).into_iter().map(move |below| format!("{name}.{below}"));
                std::iter::once(name.clone()).chain(below)
            })
            .collect();
        names.sort();
        names
    }
}

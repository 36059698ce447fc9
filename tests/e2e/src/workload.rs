//! Real programs of Debian's with a load, in a guest that has the drives of
//! scripts/build-workloads.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{bail, Context};
use gemini_guest::protocol::{
    self, Loaded, Measured, Question, Task, IMAGE_SERIAL, SCRATCH_SERIAL,
};
use serde::Deserialize;

use crate::guest::{Guest, Pending};

/// What scripts/build-workloads printed; the scripts set it.
const WORKLOADS: &str = "GEMINI_WORKLOADS";

/// How long loading or a measured phase may take, in an emulated guest on a
/// busy machine.
const TIMEOUT: Duration = Duration::from_secs(600);

/// What a guest needs for workloads.
#[derive(Clone, Debug, Deserialize)]
pub struct Workloads {
    /// File system image with the programs, read-only.
    pub image: PathBuf,
    /// Empty file system for programs that use a disk. Every guest gets a copy
    /// of its own, which is gone with it.
    pub scratch: PathBuf,
    /// Versions of the packages by name.
    pub packages: BTreeMap<String, String>,
}

impl Workloads {
    /// What the environment names; none if it names nothing.
    ///
    /// # Errors
    /// If what it names is not there.
    pub fn from_env() -> anyhow::Result<Option<Self>> {
        let Some(text) = std::env::var_os(WORKLOADS) else {
            return Ok(None);
        };
        let workloads: Self = serde_json::from_str(&text.to_string_lossy())
            .with_context(|| format!("{WORKLOADS} is not what scripts/build-workloads prints"))?;
        for path in [&workloads.image, &workloads.scratch] {
            if !path.exists() {
                bail!("{} does not exist; run scripts/build-workloads again", path.display());
            }
        }
        Ok(Some(workloads))
    }

    /// QEMU's arguments for both drives.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let mut arguments = Vec::new();
        let drives = [
            (IMAGE_SERIAL, &self.image, "readonly=on"),
            // What is written goes to a file that has no name any more.
            (SCRATCH_SERIAL, &self.scratch, "snapshot=on"),
        ];
        for (serial, file, how) in drives {
            let file = file.display();
            arguments.extend([
                "-drive".to_owned(),
                format!("if=none,id={serial},format=raw,file={file},{how}"),
                "-device".to_owned(),
                format!("virtio-blk-pci,drive={serial},serial={serial}"),
            ]);
        }
        arguments
    }
}

/// How much a workload does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Its data in MiB.
    pub mib: u64,
    /// Operations of one measured phase.
    pub operations: u64,
}

/// A workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// Its name; if it is of the image, that of the program in its `/workloads`.
    pub name: &'static str,
    /// Whether TLB misses are no cost worth speaking of for it.
    pub indifferent: bool,
    /// Shows that it works.
    pub quick: Size,
    /// Some seconds of an emulated guest.
    pub full: Size,
}

/// Every workload of the image. A measured phase takes a simulated guest about twenty
/// seconds at its full size, a third of a second of a processor's.
pub const OF_IMAGE: [Kind; 10] = [
    kind("redis", 32, 300, 256, 5_000),
    kind("memcached", 32, 300, 256, 5_000),
    kind("rocksdb", 32, 200, 256, 1_500),
    kind("xapian", 32, 200, 256, 1_500),
    kind("liblinear", 32, 4, 256, 4),
    kind("sqlite-memory", 32, 100, 256, 800),
    kind("h2", 32, 10, 256, 100),
    kind("cg", 32, 10, 256, 3),
    indifferent("zstd", 16, 20, 32, 400),
    indifferent("sqlite-disk", 16, 50, 64, 400),
];

impl Kind {
    /// How much it does; `mib` of data, if that is given.
    #[must_use]
    pub fn size(&self, quick: bool, mib: Option<u64>) -> Size {
        let size = if quick { self.quick } else { self.full };
        Size { mib: mib.unwrap_or(size.mib), ..size }
    }
}

const fn kind(
    name: &'static str,
    quick_mib: u64,
    quick_operations: u64,
    full_mib: u64,
    full_operations: u64,
) -> Kind {
    Kind {
        name,
        indifferent: false,
        quick: Size { mib: quick_mib, operations: quick_operations },
        full: Size { mib: full_mib, operations: full_operations },
    }
}

const fn indifferent(
    name: &'static str,
    quick_mib: u64,
    quick_operations: u64,
    full_mib: u64,
    full_operations: u64,
) -> Kind {
    Kind { indifferent: true, ..kind(name, quick_mib, quick_operations, full_mib, full_operations) }
}

/// A workload in a guest; it goes on to hold its memory until [`Workload::end`].
#[derive(Debug)]
#[must_use]
pub struct Workload {
    name: String,
    loading: Option<Pending<Loaded>>,
}

impl Workload {
    /// Starts to load `mib` MiB of data. In a guest there is one workload of a
    /// name at a time.
    ///
    /// # Errors
    /// If QEMU is gone.
    pub fn start(
        guest: &Guest,
        name: &str,
        mib: u64,
        seed: u64,
        operations: u64,
    ) -> anyhow::Result<Self> {
        let program = name.to_owned();
        let task = Task::Workload(protocol::Workload { program, mib, seed, operations });
        let name = format!("workload-{name}");
        let loading = Some(guest.start_task(&name, task)?);
        Ok(Workload { name, loading })
    }

    /// Waits until the data is loaded, and the guest has dropped the page cache
    /// that loading has left.
    ///
    /// # Errors
    /// If loading fails or takes too long, or was waited for already.
    pub fn wait_loaded(&mut self) -> anyhow::Result<Loaded> {
        let loading = self.loading.take();
        let loading = loading.with_context(|| format!("{} is loaded already", self.name))?;
        loading.wait(TIMEOUT).with_context(|| self.name.clone())
    }

    /// Runs the measured phase and waits for its end.
    ///
    /// # Errors
    /// If it fails or takes too long.
    pub fn go(&self, guest: &Guest) -> anyhow::Result<Measured> {
        self.start_go(guest)?.wait(TIMEOUT).with_context(|| self.name.clone())
    }

    /// Starts the measured phase without waiting for its end.
    ///
    /// # Errors
    /// If QEMU is gone.
    pub fn start_go(&self, guest: &Guest) -> anyhow::Result<Pending<Measured>> {
        guest.start_ask(&self.name, Question::Go)
    }

    /// Ends the program, and waits until it is gone.
    ///
    /// # Errors
    /// If it has failed before.
    pub fn end(self, guest: &Guest) -> anyhow::Result<()> {
        guest.end(&self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_some_are_indifferent() {
        for (at, kind) in OF_IMAGE.iter().enumerate() {
            assert!(!OF_IMAGE[..at].iter().any(|other| other.name == kind.name), "{}", kind.name);
            assert!(kind.quick.mib <= kind.full.mib && kind.quick.operations > 0);
        }
        assert_eq!(OF_IMAGE.iter().filter(|kind| kind.indifferent).count(), 2);
    }

    #[test]
    fn what_the_script_prints_is_read() {
        let text = r#"{"image":"/a","scratch":"/b","packages":{"redis-server":"7"}}"#;
        let workloads: Workloads = serde_json::from_str(text).expect("its form");
        assert_eq!(workloads.packages["redis-server"], "7");
        assert_eq!(workloads.arguments().len(), 8);
    }
}

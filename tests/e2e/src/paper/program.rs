//! The programs that are measured: a reader that every guest has, and those of
//! the image that scripts/build-workloads makes.

use anyhow::{bail, Context};
use gemini_guest::protocol::PageSize;

use super::record::Performance;
use crate::guest::Guest;
use crate::workload::{Kind, Size, Workload, Workloads, OF_IMAGE};
use crate::{BLOCK, MIB};

/// Reads words of its memory at random, like the program of `scripts/bench tlb`.
pub const READER: Kind = Kind {
    name: "reader",
    indifferent: false,
    quick: Size { mib: 128, operations: 500_000 },
    full: Size { mib: 256, operations: 2_000_000 },
};

/// Names the reader's memory in the guest.
const MEMORY: &str = "reader";

/// A program in a guest.
#[derive(Debug)]
#[must_use]
pub enum Program {
    /// Reads as many words.
    Reader {
        /// Reads of one phase.
        operations: u64,
        /// Seed of their order.
        seed: u64,
    },
    /// One of the image.
    OfImage(Workload),
}

/// All that can be run: those of the image only if it was built.
#[must_use]
pub fn all(image: Option<&Workloads>) -> Vec<Kind> {
    let of_image = if image.is_some() { &OF_IMAGE[..] } else { &[] };
    [&[READER], of_image].concat()
}

/// Whether it needs the image.
#[must_use]
pub fn is_of_image(kind: &Kind) -> bool {
    kind.name != READER.name
}

impl Program {
    /// Starts a program in a guest and waits until it has loaded its data.
    ///
    /// # Errors
    /// If it fails or takes too long.
    pub fn load(guest: &Guest, name: &str, size: Size, seed: u64) -> anyhow::Result<Self> {
        let Size { mib, operations } = size;
        if name == READER.name {
            guest.fill(MEMORY, mib * MIB / BLOCK * BLOCK, seed, PageSize::System)?;
            return Ok(Program::Reader { operations, seed });
        }
        let mut workload = Workload::start(guest, name, mib, seed, operations)?;
        workload.wait_loaded()?;
        Ok(Program::OfImage(workload))
    }

    /// Runs its measured phase. Returns what it achieved, and its version.
    ///
    /// # Errors
    /// If it fails or takes too long.
    pub fn go(&self, guest: &Guest) -> anyhow::Result<(Performance, String)> {
        let (operations, seconds, mean_us, p99_us, unit, version) = match self {
            Program::Reader { operations, seed } => {
                let seconds = guest.read(MEMORY, *operations, *seed)?.seconds;
                let mean = seconds * 1e6 / *operations as f64;
                let version = env!("CARGO_PKG_VERSION").to_owned();
                (*operations, seconds, mean, None, "reads".to_owned(), version)
            }
            Program::OfImage(workload) => {
                let done = workload.go(guest)?;
                let p99 = Some(done.p99_us);
                (done.operations, done.seconds, done.mean_us, p99, done.unit, done.version)
            }
        };
        if operations == 0 || seconds <= 0.0 {
            bail!("it did {operations} operations in {seconds} s");
        }
        let per_second = operations as f64 / seconds;
        Ok((Performance { operations, seconds, per_second, mean_us, p99_us, unit }, version))
    }

    /// Ends it, after a look whether its memory is what it wrote, where that can
    /// be told.
    ///
    /// # Errors
    /// If it has failed before.
    pub fn end(self, guest: &Guest) -> anyhow::Result<()> {
        match self {
            Program::Reader { .. } => {
                guest.verify(MEMORY)?;
                guest.free(MEMORY)
            }
            Program::OfImage(workload) => workload.end(guest),
        }
    }
}

/// The kinds with these names, in this order.
///
/// # Errors
/// If there is none of a name.
pub fn select(kinds: &[Kind], names: &[String]) -> anyhow::Result<Vec<Kind>> {
    let find = |name: &String| {
        let found = kinds.iter().find(|kind| kind.name == name).copied();
        found.with_context(|| {
            let names: Vec<_> = kinds.iter().map(|kind| kind.name).collect();
            let without = if kinds.len() > 1 { "" } else { "; scripts/build-workloads makes more" };
            format!("there is no workload `{name}` but {}{without}", names.join(", "))
        })
    };
    names.iter().map(find).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_the_image_there_is_the_reader_alone() {
        let kinds = all(None);
        assert_eq!(kinds, [READER]);
        assert!(!is_of_image(&kinds[0]));
        let error = select(&kinds, &["redis".into()]).expect_err("no image");
        assert!(error.to_string().contains("build-workloads"), "{error}");
        assert_eq!(select(&kinds, &["reader".into()]).expect("it is there").len(), 1);
    }

    #[test]
    fn data_can_be_of_another_size() {
        assert_eq!(READER.size(true, Some(32)).mib, 32);
        assert_eq!(READER.size(false, None), READER.full);
    }
}

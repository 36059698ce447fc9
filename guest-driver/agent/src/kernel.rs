//! What the kernel says about the whole system.

use std::io;

use anyhow::{ensure, Context};

use crate::sys;

const THP: &str = "/sys/kernel/mm/transparent_hugepage";

/// Sizes of the pages of this system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of a base page.
    pub page: u64,
    /// Bytes of a block: a huge page.
    pub block: u64,
}

impl Geometry {
    /// Asks the kernel.
    ///
    /// # Errors
    /// If it has no huge pages.
    pub fn read() -> anyhow::Result<Self> {
        let path = format!("{THP}/hpage_pmd_size");
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("cannot read {path}: this kernel has no huge pages"))?;
        let block = text.trim().parse().with_context(|| format!("{path} holds no number"))?;
        let page = sys::page_size();
        ensure!(
            block > page && u64::is_power_of_two(block) && page.is_power_of_two(),
            "huge pages of {block} bytes do not go with base pages of {page}"
        );
        Ok(Geometry { page, block })
    }

    /// Base pages of a block.
    #[must_use]
    pub fn pages(self) -> u64 {
        self.block / self.page
    }

    /// log2 of [`Geometry::pages`].
    #[must_use]
    pub fn order(self) -> u32 {
        self.pages().trailing_zeros()
    }
}

/// To whom the system gives huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Thp {
    /// To everybody who did not decline.
    Always,
    /// To those who asked with MADV_HUGEPAGE.
    Madvise,
    /// To nobody.
    Never,
}

impl Thp {
    /// The setting for huge pages of `block` bytes.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn read(block: u64) -> anyhow::Result<Self> {
        // Each size has a setting of its own from Linux 6.8 on, and may pass on
        // to the old one for all.
        let own = format!("{THP}/hugepages-{}kB/enabled", block >> 10);
        let all = format!("{THP}/enabled");
        let own = std::fs::read_to_string(own).ok();
        let text = match own.as_deref().and_then(chosen) {
            Some(word) if word != "inherit" => word.to_owned(),
            _ => {
                let text =
                    std::fs::read_to_string(&all).with_context(|| format!("cannot read {all}"))?;
                chosen(&text).with_context(|| format!("{all} has no choice"))?.to_owned()
            }
        };
        Ok(match text.as_str() {
            "always" => Thp::Always,
            "madvise" => Thp::Madvise,
            // A word of a later kernel is no permission.
            _ => Thp::Never,
        })
    }
}

/// The word in brackets.
fn chosen(text: &str) -> Option<&str> {
    text.split_whitespace().find_map(|word| word.strip_prefix('[')?.strip_suffix(']'))
}

/// Bytes that can be taken before the system itself is short: a 64th of the
/// memory is left for others.
///
/// # Errors
/// If `/proc/meminfo` cannot be read.
pub fn available() -> io::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let value = |name| kilobytes(&text, name).unwrap_or(0);
    Ok((value("MemAvailable:")).saturating_sub(value("MemTotal:") / 64))
}

/// Base pages of anonymous memory that all processes have.
///
/// # Errors
/// If `/proc/meminfo` cannot be read, or does not tell.
pub fn anonymous_pages(geometry: Geometry) -> io::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    base_pages(&text, geometry).ok_or_else(|| {
        io::Error::other(
            "/proc/meminfo tells no AnonPages and AnonHugePages: a kernel with \
             CONFIG_TRANSPARENT_HUGEPAGE is needed",
        )
    })
}

fn base_pages(meminfo: &str, geometry: Geometry) -> Option<u64> {
    let all = kilobytes(meminfo, "AnonPages:")?;
    let huge = kilobytes(meminfo, "AnonHugePages:")?;
    Some(all.saturating_sub(huge) / geometry.page)
}

/// The value of the line `NAME N kB`, in bytes.
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choice_is_the_word_in_brackets() {
        assert_eq!(chosen("always [inherit] madvise never\n"), Some("inherit"));
        assert_eq!(chosen("[always] madvise never\n"), Some("always"));
        assert_eq!(chosen(""), None);
    }

    #[test]
    fn kilobytes_are_found_by_their_name() {
        let text = "MemTotal:  8 kB\nMemAvailable:   3 kB\n";
        assert_eq!(kilobytes(text, "MemAvailable:"), Some(3072));
        assert_eq!(kilobytes(text, "Rss:"), None);
    }

    #[test]
    fn base_pages_are_those_that_are_not_huge() {
        let geometry = Geometry { page: 4096, block: 2 << 20 };
        let text = "AnonPages:  8200 kB\nAnonHugePages:  8192 kB\n";
        assert_eq!(base_pages(text, geometry), Some(2));
        assert_eq!(base_pages("AnonPages: 8 kB\n", geometry), None);
    }

    #[test]
    fn order_of_2_mib_is_9() {
        let geometry = Geometry { page: 4096, block: 2 << 20 };
        assert_eq!((geometry.pages(), geometry.order()), (512, 9));
    }
}

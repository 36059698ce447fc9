//! Traces: what a guest did, and when, as lines of text.
//!
//! ```text
//! # a comment
//! blocks 524288             first line: how many blocks the guest has, from 0 on
//! 0 base 0 16 200           at 0 ms 16 blocks from 0 on have 200 base pages in use each
//! 20 huge 16 4              ... and at 20 ms 4 blocks are guest huge pages
//! 900 free 0 1              also: booked, pinned, unknown
//! 950 drop 32 2             the driver had blocks dropped, which were booked
//! 1000 prepare 32 2         it asked for these to be made huge
//! 2000 pages 100            from here on the host finds 100 more huge pages; at first any number
//! ```

use anyhow::{bail, ensure, Context};
use std::fmt;
use std::str::FromStr;
use vhost_device_gemini::protocol::GuestState;

/// Base pages of a block.
pub const PAGES: u16 = 512;
/// Most blocks of a guest: 4 TiB.
const BLOCKS_MAX: u64 = 1 << 21;

/// Something that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// The guest's blocks become so, with so many pages in use where they are base pages.
    Guest(GuestState, u16),
    /// Blocks that the driver holds are dropped.
    Drop,
    /// The driver asks for blocks to be made huge.
    Prepare,
    /// The host finds `count` more huge pages, and then none.
    Pages,
}

/// When and where it happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Milliseconds since the start.
    pub at: u64,
    /// What.
    pub what: What,
    /// First block; 0 for [`What::Pages`].
    pub first: u64,
    /// Number of blocks, or of pages.
    pub count: u32,
}

/// A guest, in the order of time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// Number of blocks.
    pub blocks: u64,
    /// What happens, ascending in time.
    pub events: Vec<Event>,
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "blocks {}", self.blocks)?;
        for Event { at, what, first, count } in &self.events {
            match what {
                What::Guest(GuestState::Base, used) => {
                    writeln!(f, "{at} base {first} {count} {used}")?;
                }
                What::Guest(state, _) => writeln!(f, "{at} {} {first} {count}", state.name())?,
                What::Drop => writeln!(f, "{at} drop {first} {count}")?,
                What::Prepare => writeln!(f, "{at} prepare {first} {count}")?,
                What::Pages => writeln!(f, "{at} pages {count}")?,
            }
        }
        Ok(())
    }
}

impl FromStr for Trace {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let lines = text.lines().zip(1..).filter_map(|(line, number)| {
            let line = line.split('#').next().unwrap_or_default().trim();
            (!line.is_empty()).then_some((line, number))
        });
        let mut trace = Trace::default();
        for (line, number) in lines {
            let words: Vec<&str> = line.split_whitespace().collect();
            trace.take(&words).with_context(|| format!("line {number}: {line}"))?;
        }
        ensure!(
            trace.blocks > 0,
            "a trace begins with its number of blocks, for example: blocks 512"
        );
        Ok(trace)
    }
}

impl Trace {
    fn take(&mut self, words: &[&str]) -> anyhow::Result<()> {
        if let ["blocks", blocks] = words {
            ensure!(self.blocks == 0, "the number of blocks is given twice");
            self.blocks = blocks.parse()?;
            ensure!((1..=BLOCKS_MAX).contains(&self.blocks), "1 to {BLOCKS_MAX} blocks");
            return Ok(());
        }
        let [at, what, numbers @ ..] = words else { bail!("a line is: TIME WHAT FIRST COUNT") };
        let at = at.parse()?;
        ensure!(self.events.last().is_none_or(|last| last.at <= at), "time goes backwards");
        let event = match (*what, numbers) {
            ("pages", [count]) => Event { at, what: What::Pages, first: 0, count: count.parse()? },
            (what, [first, count, used @ ..]) => {
                let guest = GuestState::ALL.into_iter().find(|state| state.name() == what);
                let what = match (what, guest, used) {
                    ("base", _, [used]) => What::Guest(GuestState::Base, used.parse()?),
                    ("drop", _, []) => What::Drop,
                    ("prepare", _, []) => What::Prepare,
                    (_, Some(state), []) if state != GuestState::Base => What::Guest(state, 0),
                    _ => bail!("nobody knows what this is"),
                };
                Event { at, what, first: first.parse()?, count: count.parse()? }
            }
            _ => bail!("nobody knows what this is"),
        };
        let end = event.first.checked_add(u64::from(event.count));
        let inside = event.what == What::Pages
            || (event.count > 0 && end.is_some_and(|end| end <= self.blocks));
        ensure!(inside, "it reaches beyond the {} blocks", self.blocks);
        if let What::Guest(GuestState::Base, used) = event.what {
            ensure!((1..=PAGES).contains(&used), "1 to {PAGES} pages");
        }
        self.events.push(event);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let text = "blocks 64\n0 base 0 16 200\n20 huge 16 4\n950 drop 32 2\n1000 prepare 32 2\n\
                    2000 pages 100\n";
        let trace: Trace = text.parse().unwrap();
        assert_eq!(trace.to_string(), text);
        assert_eq!(trace.events.len(), 5);
    }

    #[test]
    fn what_is_wrong_is_refused_with_its_line() {
        for (wrong, word) in [
            ("", "begins with"),
            ("blocks 0", "line 1"),
            ("0 huge 0 1", "line 1"),
            ("blocks 8\n\n0 huge 7 2", "line 3"),
            ("blocks 8\n0 huge 18446744073709551615 2", "line 2"),
            ("blocks 8\n5 huge 1 1\n4 huge 1 1", "line 3"),
            ("blocks 8\n0 base 1 1", "line 2"),
            ("blocks 8\n0 base 1 1 513", "line 2"),
            ("blocks 8\n0 giant 1 1", "line 2"),
        ] {
            let error = format!("{:#}", wrong.parse::<Trace>().unwrap_err());
            assert!(error.contains(word), "{wrong:?}: {error}");
        }
    }
}

//! The form of a trace: what one processor was told, in its order.
//!
//! A trace is the line `MAGIC`, a line of JSON ([`Header`]), and events. An
//! event is a number in LEB128 whose three low bits say what it is, with the
//! rest of it and further numbers as its values. Pages are differences from the
//! page before.

use std::io::{self, BufRead, Read, Write};

use anyhow::{bail, ensure, Context};
use serde::{Deserialize, Serialize};

use crate::counters::Counters;
use crate::paging::{PageSize, Translation, GROUP_LIMIT, LEVELS};

/// First line of a trace.
const MAGIC: &str = "gemini-tlb-trace 2";

/// That of one from before translations told of groups.
const MAGIC_WITHOUT_GROUPS: &str = "gemini-tlb-trace 1";

/// Longest line that is read.
const LINE_LIMIT: u64 = 64 << 10;

/// Most words of a host's state: 16 TiB of guest memory.
const WORDS_LIMIT: u64 = 1 << 17;

/// What a trace begins with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// Number of the virtual processor.
    pub processor: u32,
    /// Bytes of guest memory, laid out as QEMU's q35 machine does.
    pub memory: u64,
    /// Size of the host's huge pages.
    pub host_page: PageSize,
    /// The profile that was simulated while recording.
    pub profile: String,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// An access to a base page by its number.
    Access(u64),
    /// How the next accesses to this base page are translated.
    Translation(u64, Translation),
    /// From here on the host has these blocks huge.
    Host(Vec<u64>),
    /// A flush of the page of this address.
    FlushPage(u64),
    /// A flush of the present address space.
    FlushSpace,
    /// A switch to another.
    Switch(u8),
    /// A flush of everything.
    FlushAll,
    /// The end.
    End {
        /// What was counted while recording.
        counted: Counters,
        /// The trace is as large as it may be: what came later is not in it.
        full: bool,
    },
}

const ACCESS: u64 = 0;
const TRANSLATION: u64 = 1;
const HOST: u64 = 2;
const FLUSH_PAGE: u64 = 3;
const FLUSH_SPACE: u64 = 4;
const SWITCH: u64 = 5;
const FLUSH_ALL: u64 = 6;
const END: u64 = 7;

/// Bits of a number that say what the event is.
const KIND_BITS: u32 = 3;

/// Bits of the first number of a translation that tell all but its group, which is 0
/// in traces that know none.
const TRANSLATION_BITS: u32 = 7;

/// A difference as a number that is small when it is.
fn zigzag(difference: i64) -> u64 {
    u64::from_le_bytes(((difference << 1) ^ (difference >> 63)).to_le_bytes())
}

fn unzigzag(number: u64) -> i64 {
    let half = i64::from_le_bytes((number >> 1).to_le_bytes());
    if number & 1 == 0 {
        half
    } else {
        !half
    }
}

/// The difference between two page numbers: both have at most 52 bits.
fn difference(page: u64, last: u64) -> i64 {
    i64::from_le_bytes(page.wrapping_sub(last).to_le_bytes())
}

/// Writes a trace.
#[derive(Debug)]
pub struct Writer<W> {
    output: W,
    page: u64,
    written: u64,
}

impl<W: Write> Writer<W> {
    /// Begins a trace.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn new(mut output: W, header: &Header) -> io::Result<Self> {
        writeln!(output, "{MAGIC}")?;
        serde_json::to_writer(&mut output, header)?;
        writeln!(output)?;
        Ok(Writer { output, page: 0, written: 0 })
    }

    /// Bytes of events written so far.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Appends an event; an end is written out.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn event(&mut self, event: &Event) -> io::Result<()> {
        match event {
            Event::Access(page) => self.page(ACCESS, *page),
            Event::Translation(page, translation) => {
                self.page(TRANSLATION, *page)?;
                let Translation { entries, top, frame, level, global, group } = translation;
                let kind = u64::from(*top) << 4 | u64::from(*level) << 1 | u64::from(*global);
                self.number(u64::from(*group) << TRANSLATION_BITS | kind)?;
                self.number(*frame >> PageSize::Base.shift())?;
                for entry in entries.iter().take(usize::from(*top)).skip(usize::from(*level) - 1) {
                    self.number(*entry)?;
                }
                Ok(())
            }
            Event::Host(words) => {
                self.tagged(HOST, words.len() as u64)?;
                words.iter().try_for_each(|&word| self.number(word))
            }
            Event::FlushPage(address) => self.page(FLUSH_PAGE, address >> PageSize::Base.shift()),
            Event::FlushSpace => self.tagged(FLUSH_SPACE, 0),
            Event::Switch(space) => self.tagged(SWITCH, u64::from(*space)),
            Event::FlushAll => self.tagged(FLUSH_ALL, 0),
            Event::End { counted, full } => {
                self.tagged(END, u64::from(*full))?;
                serde_json::to_writer(&mut self.output, counted)?;
                writeln!(self.output)?;
                self.output.flush()
            }
        }
    }

    fn page(&mut self, kind: u64, page: u64) -> io::Result<()> {
        let difference = zigzag(difference(page, self.page));
        self.page = page;
        self.tagged(kind, difference)
    }

    fn tagged(&mut self, kind: u64, value: u64) -> io::Result<()> {
        self.number(value << KIND_BITS | kind)
    }

    fn number(&mut self, mut number: u64) -> io::Result<()> {
        let mut bytes = [0; 10];
        let mut length = 0;
        for byte in &mut bytes {
            *byte = number.to_le_bytes()[0] & 0x7f;
            number >>= 7;
            length += 1;
            if number == 0 {
                break;
            }
            *byte |= 0x80;
        }
        self.written += length as u64;
        self.output.write_all(&bytes[..length])
    }
}

/// Reads a trace.
#[derive(Debug)]
pub struct Reader<R> {
    input: R,
    page: u64,
    knows_groups: bool,
}

impl<R: BufRead> Reader<R> {
    /// Reads the beginning of a trace.
    ///
    /// # Errors
    /// If it is none, or one of another version.
    pub fn new(mut input: R) -> anyhow::Result<(Self, Header)> {
        let knows_groups = match line(&mut input)?.as_str() {
            MAGIC => true,
            MAGIC_WITHOUT_GROUPS => false,
            _ => bail!("this is no trace of a version that is known"),
        };
        let header = serde_json::from_str(&line(&mut input)?).context("a trace without header")?;
        Ok((Reader { input, page: 0, knows_groups }, header))
    }

    /// Whether translations tell which base pages could be merged with the next ones:
    /// older traces do not know.
    #[must_use]
    pub fn knows_groups(&self) -> bool {
        self.knows_groups
    }

    /// The next event. A trace ends with [`Event::End`].
    ///
    /// # Errors
    /// If the trace is torn or malformed.
    pub fn event(&mut self) -> anyhow::Result<Event> {
        let number = self.number()?;
        let value = number >> KIND_BITS;
        Ok(match number & ((1 << KIND_BITS) - 1) {
            ACCESS => Event::Access(self.page(value)),
            TRANSLATION => Event::Translation(self.page(value), self.translation()?),
            HOST => {
                ensure!(value <= WORDS_LIMIT, "a host of {value} words");
                Event::Host((0..value).map(|_| self.number()).collect::<anyhow::Result<_>>()?)
            }
            FLUSH_PAGE => Event::FlushPage(self.page(value) << PageSize::Base.shift()),
            FLUSH_SPACE => Event::FlushSpace,
            SWITCH => Event::Switch(u8::try_from(value).context("no address space")?),
            FLUSH_ALL => Event::FlushAll,
            _ => {
                let text = line(&mut self.input)?;
                let counted = serde_json::from_str(&text).context("an end without counters")?;
                Event::End { counted, full: value != 0 }
            }
        })
    }

    fn page(&mut self, value: u64) -> u64 {
        self.page = self.page.wrapping_add_signed(unzigzag(value));
        self.page
    }

    fn translation(&mut self) -> anyhow::Result<Translation> {
        let number = self.number()?;
        let [kind, ..] = (number & ((1 << TRANSLATION_BITS) - 1)).to_le_bytes();
        let (top, level) = (kind >> 4, kind >> 1 & 7);
        ensure!((1..=3).contains(&level) && (4..=5).contains(&top), "a page of level {level}");
        let group = u8::try_from(number >> TRANSLATION_BITS).context("a group without end")?;
        let largest = if level == 1 && self.knows_groups { GROUP_LIMIT } else { 0 };
        ensure!(group <= largest, "a group of 2^{group} pages of level {level}");
        let frame = self.number()? << PageSize::Base.shift();
        let mut entries = [0; LEVELS];
        for entry in entries.iter_mut().take(usize::from(top)).skip(usize::from(level) - 1) {
            *entry = self.number()?;
        }
        Ok(Translation { entries, top, frame, level, global: kind & 1 == 1, group })
    }

    fn number(&mut self) -> anyhow::Result<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let mut byte = [0];
            self.input.read_exact(&mut byte).context("the trace is torn")?;
            number |= u64::from(byte[0] & 0x7f) << shift;
            if byte[0] & 0x80 == 0 {
                return Ok(number);
            }
        }
        bail!("a number of more than 64 bits")
    }
}

fn line(input: &mut impl BufRead) -> anyhow::Result<String> {
    let mut text = String::new();
    input.take(LINE_LIMIT).read_line(&mut text).context("the trace is torn")?;
    ensure!(text.ends_with('\n'), "the trace is torn");
    text.pop();
    Ok(text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header() -> Header {
        Header {
            processor: 1,
            memory: 1 << 30,
            host_page: PageSize::Huge,
            profile: "broadwell".into(),
        }
    }

    fn events() -> impl Strategy<Value = Event> {
        let page = 0_u64..1 << 52;
        let level = 1_u8..=3;
        let (entries, group) = (any::<[u64; LEVELS]>(), 0..=GROUP_LIMIT);
        let translation = (page.clone(), level, 4_u8..=5, entries, any::<bool>(), group).prop_map(
            |(frame, level, top, mut entries, global, group)| {
                entries[usize::from(top)..].fill(0);
                entries[..usize::from(level) - 1].fill(0);
                let group = if level == 1 { group } else { 0 };
                Translation { entries, top, frame: frame << 12, level, global, group }
            },
        );
        prop_oneof![
            page.clone().prop_map(Event::Access),
            (page.clone(), translation).prop_map(|(page, found)| Event::Translation(page, found)),
            prop::collection::vec(any::<u64>(), 0..5).prop_map(Event::Host),
            page.prop_map(|page| Event::FlushPage(page << 12)),
            Just(Event::FlushSpace),
            any::<u8>().prop_map(Event::Switch),
            Just(Event::FlushAll),
        ]
    }

    fn write(events: &[Event]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes, &header()).expect("memory");
        for event in events {
            writer.event(event).expect("memory");
        }
        bytes
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(mut written in prop::collection::vec(events(), 0..50)) {
            let counted = Counters { accesses: 7, ..Counters::default() };
            written.push(Event::End { counted, full: true });
            let bytes = write(&written);
            let (mut reader, found) = Reader::new(&bytes[..]).expect("a trace");
            prop_assert_eq!(found, header());
            for event in written {
                prop_assert_eq!(reader.event().expect("an event"), event);
            }
            prop_assert!(reader.event().is_err());
        }

        #[test]
        fn rubbish_is_an_error_or_an_event(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let mut trace = write(&[]);
            trace.extend(bytes);
            let (mut reader, _) = Reader::new(&trace[..]).expect("a header");
            while reader.event().is_ok() {}
        }
    }

    #[test]
    fn accesses_near_by_take_one_byte() {
        let accesses: Vec<_> = [10, 12, 9, 9].map(Event::Access).into();
        assert_eq!(write(&accesses).len() - write(&[]).len(), 5);
    }

    #[test]
    fn other_files_are_refused() {
        assert!(Reader::new(&b"hello\n"[..]).is_err());
        assert!(Reader::new(&b"gemini-tlb-trace 2\n{}\n"[..]).is_err());
        let next =
            String::from_utf8(write(&[])).expect("text").replace(MAGIC, "gemini-tlb-trace 3");
        assert!(Reader::new(next.as_bytes()).is_err());
        assert!(Reader::new(&b""[..]).is_err());
    }
}

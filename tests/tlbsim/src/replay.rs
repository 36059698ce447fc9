//! Runs a trace through the model again: with the same profile the counts are
//! the same, with another they are those of another processor.

use std::collections::HashMap;
use std::io::BufRead;
use std::sync::Arc;

use anyhow::{ensure, Context};

use crate::blocks::Blocks;
use crate::counters::{Counters, LiveCounters};
use crate::cpu::Cpu;
use crate::host::{HostMap, RamLayout};
use crate::paging::PageSize;
use crate::profile::{self, Profile};
use crate::trace::{Event, Header, Reader};

/// What the host is taken to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// What it was.
    Recorded,
    /// One with base pages alone.
    Base,
    /// One with huge pages everywhere.
    Huge,
}

/// The result of a replay.
#[derive(Clone, Debug)]
pub struct Replayed {
    /// What the trace begins with.
    pub header: Header,
    /// The processor that was simulated now.
    pub profile: Profile,
    /// What was counted now.
    pub counters: Counters,
    /// What was counted while recording.
    pub recorded: Counters,
    /// Where it was counted now.
    pub blocks: Blocks,
    /// The trace was as large as it might be before its recording ended.
    pub full: bool,
}

/// Replays a trace, with its own profile or another one.
///
/// # Errors
/// If the trace is torn, malformed, or of a profile that is not known, or if the
/// profile merges pages and the trace is too old to know which.
pub fn replay(
    input: impl BufRead,
    profile: Option<Profile>,
    host: Host,
) -> anyhow::Result<Replayed> {
    let (mut reader, header) = Reader::new(input)?;
    let profile = match profile {
        Some(profile) => profile,
        None => profile::find(&header.profile)
            .with_context(|| format!("there is no profile {}", header.profile))?,
    };
    ensure!(
        profile.group == 0 || reader.knows_groups(),
        "this trace is of an older version, which did not record what {profile} needs to know: \
         which pages could be merged"
    );
    let layout = RamLayout::q35(header.memory);
    let mut map = HostMap::new(layout, header.host_page);
    if host == Host::Huge {
        map.set_huge(0, layout.bytes());
    }
    let counters = Arc::new(LiveCounters::default());
    let mut cpu = Cpu::new(profile, Arc::clone(&counters));
    let mut blocks = Blocks::default();
    let mut known = HashMap::new();
    let mut first = true;
    loop {
        match reader.event()? {
            Event::Translation(page, translation) => {
                known.insert(page, translation);
            }
            Event::Access(page) => {
                let translation = *known
                    .get(&page)
                    .with_context(|| format!("an access to page {page:#x} of no translation"))?;
                let address = page << PageSize::Base.shift();
                let before = counters.snapshot();
                cpu.access(address, &map, |_| Some(translation));
                let spent = counters.snapshot().since(&before);
                blocks.add(address, &translation, &map, (&profile, &spent));
            }
            Event::Host(bits) => {
                known.clear();
                if host == Host::Recorded {
                    map.set_bits(&bits);
                    // The first one tells what there was to begin with.
                    if !first {
                        cpu.host_changed();
                    }
                }
                first = false;
            }
            event => {
                known.clear();
                match event {
                    Event::FlushPage(address) => cpu.flush_page(address),
                    Event::FlushSpace => cpu.flush_space(),
                    Event::Switch(space) => cpu.switch_space(space),
                    Event::FlushAll => cpu.flush_all(),
                    Event::End { counted: recorded, full } => {
                        let counters = counters.snapshot();
                        return Ok(Replayed { header, profile, counters, recorded, blocks, full });
                    }
                    Event::Access(_) | Event::Translation(..) | Event::Host(_) => {}
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::blocks::Block;
    use crate::paging::Translation;
    use crate::profile::{BROADWELL, ZEN4};
    use crate::record::Recorder;

    const MEMORY: u64 = 64 << 20;

    /// The guest's page tables at a time: pages move when it goes on.
    fn translate(address: u64, time: u64) -> Option<Translation> {
        let page = address >> 12;
        if page % 97 == 5 {
            return None;
        }
        let level = if page % 1024 < 512 { 1 } else { 2 };
        let size = if level == 1 { PageSize::Base } else { PageSize::Huge };
        let mut entries = [0x20_0000, 0x40_1000, 0x40_2000, 0x40_3000, 0];
        entries[..usize::from(level) - 1].fill(0);
        let frame = size.start(address.wrapping_add(time << 21) % MEMORY);
        // As many neighbours as the page's number says, so that all numbers occur.
        let group = if level == 1 { (page % 5).to_le_bytes()[0] } else { 0 };
        Some(Translation { entries, top: 4, frame, level, global: page % 11 == 0, group })
    }

    /// Records steps, and returns the trace.
    fn record(steps: &[(u64, u8)], limit: u64) -> Vec<u8> {
        record_on(BROADWELL, steps, limit)
    }

    fn record_on(profile: Profile, steps: &[(u64, u8)], limit: u64) -> Vec<u8> {
        let header = Header {
            processor: 0,
            memory: MEMORY,
            host_page: PageSize::Huge,
            profile: profile.to_string(),
        };
        let mut host = HostMap::new(RamLayout::q35(MEMORY), PageSize::Huge);
        let mut cpu = Cpu::new(profile, Arc::default());
        let mut bytes = Vec::new();
        let mut recorder = Recorder::new(&mut bytes, &header, &cpu, &host, limit).expect("memory");
        for (time, &(page, action)) in (0..).zip(steps) {
            if recorder.is_full() {
                break;
            }
            let event = match action {
                0 => {
                    cpu.flush_page(page << 12);
                    Event::FlushPage(page << 12)
                }
                1 => {
                    cpu.flush_space();
                    Event::FlushSpace
                }
                2 => {
                    cpu.flush_all();
                    Event::FlushAll
                }
                3 => {
                    cpu.switch_space(2);
                    Event::Switch(2)
                }
                4 => {
                    host.set_huge(page << 12, 8 << 20);
                    cpu.host_changed();
                    Event::Host(host.bits().to_vec())
                }
                _ => {
                    // Tables that change unannounced: not before a flush does a
                    // processor have to see it.
                    recorder
                        .access(&mut cpu, page << 12, &host, |address| translate(address, time));
                    continue;
                }
            };
            recorder.event(&event);
        }
        recorder.finish(&cpu).expect("memory");
        bytes
    }

    proptest! {
        #[test]
        fn a_replay_counts_what_the_recording_counted(
            steps in prop::collection::vec((0_u64..9000, 0_u8..60), 0..600),
        ) {
            let trace = record(&steps, u64::MAX);
            let replayed = replay(&trace[..], None, Host::Recorded).expect("a trace");
            let skipped = replayed.recorded.skipped;
            prop_assert_eq!(Counters { skipped, ..replayed.counters }, replayed.recorded);
            // Another processor: as many accesses, and a result each time.
            let other = replay(&trace[..], Some(ZEN4), Host::Recorded).expect("a trace");
            prop_assert_eq!(other.counters.accesses, replayed.counters.accesses);
        }

        #[test]
        fn what_was_merged_is_merged_in_a_replay(
            steps in prop::collection::vec((0_u64..9000, 0_u8..60), 0..600),
        ) {
            let merging = ZEN4.coalescing(4).expect("a power of two");
            let trace = record_on(merging, &steps, u64::MAX);
            let replayed = replay(&trace[..], None, Host::Recorded).expect("a trace");
            let skipped = replayed.recorded.skipped;
            prop_assert_eq!(Counters { skipped, ..replayed.counters }, replayed.recorded);
            prop_assert_eq!(replayed.profile.group, merging.group);
            // Which processor it was recorded on does not matter to another.
            let plain = record_on(ZEN4, &steps, u64::MAX);
            let merged = replay(&plain[..], Some(merging), Host::Recorded).expect("a trace");
            prop_assert_eq!(merged.counters, replayed.counters);
        }
    }

    #[test]
    fn huge_pages_of_the_host_are_worth_something_in_a_replay() {
        // Pages of guest huge pages, over 12 MiB.
        let steps: Vec<_> = (0..2).flat_map(|_| (512..1024).chain(1536..2048)).collect();
        let steps: Vec<_> = steps.into_iter().map(|page| (page, 9)).collect();
        let trace = record(&steps, u64::MAX);
        let misses = |host| replay(&trace[..], None, host).expect("a trace").counters.tlb_misses;
        assert!(misses(Host::Huge) < misses(Host::Base) / 100);
        assert_eq!(misses(Host::Base), misses(Host::Recorded));
    }

    #[test]
    fn a_trace_knows_what_could_be_merged() {
        // Four pages in groups of 4, 8, 16 and 1; block 0, where a page at time 0 would
        // be, is never huge in the host.
        let trace = record(&[(600, 9), (12, 9), (13, 9), (14, 9), (15, 9)], u64::MAX);
        let misses = |pages, host| {
            let profile = BROADWELL.coalescing(pages);
            replay(&trace[..], profile, host).expect("a trace").counters.tlb_misses - 1
        };
        assert_eq!([1, 2, 4, 8, 16].map(|pages| misses(pages, Host::Huge)), [4, 2, 1, 2, 3]);
        assert_eq!(misses(4, Host::Base), 4);
        assert_eq!(misses(4, Host::Recorded), 4);
    }

    #[test]
    fn old_traces_replay_but_know_nothing_of_neighbours() {
        let old = |steps: &[(u64, u8)]| {
            let mut trace = record(steps, u64::MAX);
            let place = trace.iter().position(|&byte| byte == b'\n').expect("a line") - 1;
            assert_eq!(std::mem::replace(&mut trace[place], b'1'), b'2');
            trace
        };
        // Pages without neighbours are written as they always were.
        let steps: Vec<_> = (0..80).map(|page| (page * 5 + 10, 9)).collect();
        let (trace, now) = (old(&steps), record(&steps, u64::MAX));
        let replayed = replay(&trace[..], None, Host::Recorded).expect("a trace");
        let expected = replay(&now[..], None, Host::Recorded).expect("a trace");
        assert_eq!(replayed.counters, expected.counters);
        assert!(replayed.counters.tlb_misses > 0);
        let refused = replay(&trace[..], BROADWELL.coalescing(4), Host::Recorded);
        let error = refused.expect_err("it is not known").to_string();
        assert!(error.contains("older version") && error.contains("broadwell+coalesce4"));
        assert!(replay(&now[..], BROADWELL.coalescing(4), Host::Recorded).is_ok());
        // What no such trace can hold is no event.
        assert!(replay(&old(&[(1, 9)])[..], None, Host::Recorded).is_err());
    }

    #[test]
    fn every_hit_and_miss_has_its_block() {
        // Guest huge pages at block 1, then at block 3, the latter twice.
        let steps: Vec<_> = (512..1024).chain((0..2).flat_map(|_| 1536..2048)).collect();
        let steps: Vec<_> = steps.into_iter().map(|page| (page, 9)).collect();
        let replayed =
            replay(&record(&steps, u64::MAX)[..], None, Host::Recorded).expect("a trace");
        let blocks = replayed.blocks.clone().plus(&replayed.blocks).ranked();
        let sum = |of: fn(&Block) -> u64| blocks.iter().map(of).sum::<u64>() / 2;
        let counted = replayed.counters;
        assert_eq!(sum(|block| block.misses), counted.tlb_misses);
        assert_eq!(sum(|block| block.l2_hits), counted.l2_hits);
        assert_eq!(sum(|block| block.tlb_cycles), BROADWELL.costs.cycles(&counted));
        assert!(blocks.windows(2).all(|pair| pair[0].tlb_cycles >= pair[1].tlb_cycles));
        assert!(blocks.iter().all(|block| block.guest_huge && !block.host_huge && !block.kernel));
        assert!(counted.tlb_misses > 1000 && counted.l2_hits > 500, "{counted:?}");
    }

    #[test]
    fn a_trace_ends_where_it_is_full() {
        let steps: Vec<_> = (0..1000).map(|page| (page, 9)).collect();
        let trace = record(&steps, 2000);
        let replayed = replay(&trace[..], None, Host::Recorded).expect("a trace");
        assert!((1..500).contains(&replayed.counters.accesses) && replayed.full);
        assert_eq!(replayed.counters.tlb_misses, replayed.recorded.tlb_misses);
    }

    #[test]
    fn a_torn_trace_is_an_error() {
        let trace = record(&[(1, 9), (2, 9), (3, 9)], u64::MAX);
        assert!(replay(&trace[..trace.len() - 10], None, Host::Recorded).is_err());
        assert!(!replay(&trace[..], None, Host::Recorded).expect("a trace").full);
    }
}

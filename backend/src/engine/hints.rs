//! What the driver still has to be told about the host: a full state first, then changes.

use crate::backing::HostState;
use crate::bitmap::Bitmap;
use crate::block_map::BlockMap;
use crate::protocol::{Advice, Record, BATCH_ADVICE, BATCH_STATE, SYNC_END, SYNC_START};

/// The elements of one `hintq` batch.
#[derive(Debug, PartialEq, Eq)]
pub enum HintBody {
    /// Host states.
    States(Vec<Record>),
    /// What the host would like.
    Advice(Advice),
}

/// One batch for `hintq`, without its generation.
#[derive(Debug, PartialEq, Eq)]
pub struct HintBatch {
    /// `SYNC_*` bits.
    pub flags: u16,
    /// Its elements.
    pub body: HintBody,
}

impl HintBatch {
    /// The batch type on the wire.
    pub fn kind(&self) -> u16 {
        match self.body {
            HintBody::States(_) => BATCH_STATE,
            HintBody::Advice(_) => BATCH_ADVICE,
        }
    }
}

/// Progress of telling.
#[derive(Debug, Default)]
pub struct Hints {
    /// Index up to which the full state was told; `None` before SYNC_START.
    cursor: Option<usize>,
    /// Whether SYNC_END was sent.
    synced: bool,
    /// Blocks whose host state changed since it was told.
    dirty: Bitmap,
    /// What was last told of the host's wishes.
    advice: Option<Advice>,
}

impl Hints {
    /// Nothing told yet about `len` blocks.
    pub fn new(len: usize) -> Self {
        Self { dirty: Bitmap::new(len), ..Self::default() }
    }

    /// Whether the full state was told.
    pub fn synced(&self) -> bool {
        self.synced
    }

    /// A block's host state changed.
    pub fn changed(&mut self, index: usize) {
        // Ahead of the cursor the full state will tell it anyway.
        if self.synced || self.cursor.is_some_and(|cursor| index < cursor) {
            self.dirty.assign(index, true);
        }
    }

    /// What the host wishes is to be told again, also if it is what it was.
    pub fn repeat_advice(&mut self) {
        self.advice = None;
    }

    /// Whether there is something to tell.
    pub fn pending(&self, advice: &Advice) -> bool {
        !self.synced || self.dirty.ones() > 0 || self.advice.as_ref() != Some(advice)
    }

    /// The next batch, of at most `room` records (at least one); `None` if nothing is left.
    pub fn next(&mut self, map: &BlockMap, advice: &Advice, room: usize) -> Option<HintBatch> {
        if !self.synced {
            return Some(self.next_of_full_state(map, room));
        }
        if self.advice.as_ref() != Some(advice) {
            self.advice = Some(*advice);
            return Some(HintBatch { flags: 0, body: HintBody::Advice(*advice) });
        }
        let records = self.next_changes(map, room);
        (!records.is_empty()).then_some(HintBatch { flags: 0, body: HintBody::States(records) })
    }

    fn next_of_full_state(&mut self, map: &BlockMap, room: usize) -> HintBatch {
        let mut flags = if self.cursor.is_none() { SYNC_START } else { 0 };
        let mut records = Vec::new();
        let mut cursor = self.cursor.unwrap_or(0);
        // Absent is what the driver assumes of blocks that it is not told about.
        for (first, count, state, after) in map.runs(cursor, |b| b.host) {
            if state != HostState::Absent {
                if records.len() == room {
                    break;
                }
                records.push(record(first, count, state));
            }
            cursor = after;
        }
        self.cursor = Some(cursor);
        if cursor >= map.len() {
            self.synced = true;
            flags |= SYNC_END;
        }
        HintBatch { flags, body: HintBody::States(records) }
    }

    fn next_changes(&mut self, map: &BlockMap, room: usize) -> Vec<Record> {
        let mut records: Vec<Record> = Vec::new();
        let mut from = 0;
        while let Some(index) = self.dirty.next(from) {
            let (Some((block, _)), Some(entry)) = (map.block_at(index), map.get(index)) else {
                break;
            };
            let full = records.len() == room;
            match records.last_mut() {
                Some(last)
                    if last.first + u64::from(last.count) == block
                        && last.state == entry.host as u8 =>
                {
                    last.count += 1;
                }
                _ if full => break,
                _ => records.push(record(block, 1, entry.host)),
            }
            self.dirty.assign(index, false);
            from = index + 1;
        }
        records
    }
}

fn record(first: u64, count: u32, state: HostState) -> Record {
    Record { first, count, state: state as u8, ..Record::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn state_of(value: u8) -> HostState {
        HostState::from_wire(value).unwrap()
    }

    /// What a driver that follows the specification knows after these batches.
    fn learn(driver: &mut [HostState], map: &BlockMap, batch: &HintBatch) {
        let HintBody::States(records) = &batch.body else { return };
        if batch.flags & SYNC_START != 0 {
            driver.fill(HostState::Absent);
        }
        for r in records {
            for index in map.index_ranges(r.first, r.count).flatten() {
                driver[index] = state_of(r.state);
            }
        }
    }

    proptest! {
        #[test]
        fn driver_knows_the_map_once_nothing_is_pending(
            start in prop::collection::vec(0u8..3, 12),
            changes in prop::collection::vec((0usize..12, 0u8..3), 0..60),
            room in 1usize..5,
        ) {
            let mut map = BlockMap::new(&[3..9, 11..17]);
            for (index, state) in start.iter().enumerate() {
                map.set_host(index, state_of(*state));
            }
            let advice = Advice::default();
            let mut hints = Hints::new(map.len());
            let mut driver = vec![HostState::Absent; map.len()];
            for (index, state) in changes {
                if map.set_host(index, state_of(state)).is_some() {
                    hints.changed(index);
                }
                if let Some(batch) = hints.next(&map, &advice, room) {
                    learn(&mut driver, &map, &batch);
                }
            }
            let mut rounds = 0;
            while hints.pending(&advice) {
                let batch = hints.next(&map, &advice, room).expect("pending means a batch");
                if let HintBody::States(records) = &batch.body {
                    prop_assert!(records.len() <= room);
                }
                learn(&mut driver, &map, &batch);
                rounds += 1;
                prop_assert!(rounds < 100, "telling does not end");
            }
            let truth: Vec<_> = (0..map.len()).map(|i| map.get(i).unwrap().host).collect();
            prop_assert_eq!(driver, truth);
        }
    }

    #[test]
    fn an_empty_map_still_tells_its_generation() {
        let map = BlockMap::default();
        let mut hints = Hints::new(0);
        let batch = hints.next(&map, &Advice::default(), 10).unwrap();
        assert_eq!(batch.flags, SYNC_START | SYNC_END);
    }
}

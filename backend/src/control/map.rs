//! The block map as an answer: as runs, taken down in few bytes while the engine waits, and
//! written one by one, since a guest of a TiB may have half a million of them.

use crate::backing::HostState;
use crate::engine::Engine;
use crate::protocol::GuestState;
use serde::{Serialize, Serializer};

#[derive(Serialize)]
struct Run {
    first: u64,
    count: u32,
    #[serde(serialize_with = "name")]
    guest: GuestState,
    host: HostState,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // the form that serde wants
fn name<S: Serializer>(state: &GuestState, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(state.name())
}

/// The states of every managed block.
#[derive(Serialize)]
pub struct Map {
    generation: u64,
    block_shift: u32,
    runs: Vec<Run>,
}

impl Map {
    /// What is known now.
    pub fn of(engine: &Engine) -> Self {
        let block_shift = engine.settings().block_shift;
        engine.inspect(|state| Self {
            generation: state.generation,
            block_shift,
            runs: state
                .map
                .runs(0, |block| (block.guest, block.host))
                .map(|(first, count, (guest, host), _)| Run { first, count, guest, host })
                .collect(),
        })
    }
}

//! What a migration that was cancelled has cost the host, and how it comes back.
//!
//! Before QEMU sends a page it looks whether there is anything in it, and looking at a hole fills
//! it: afterwards the whole guest is resident, also where nothing ever was. The guest is asked for
//! blocks that it does not use for as long as it has more memory than before, and for a while only:
//! what it comes to use itself meanwhile it will not give, and what it releases for other reasons
//! and takes again does not count.

use std::time::{Duration, Instant};

/// How long the guest has to give it back; what it kept until then it has a use for.
const PATIENCE: Duration = Duration::from_secs(60);

/// Blocks that a migration has filled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Refill {
    /// None are known.
    #[default]
    Nothing,
    /// A migration is under way.
    During {
        /// Bytes of memory that the guest had when it began.
        before: u64,
    },
    /// It is over; the host has to be looked at.
    After {
        /// Bytes of memory that the guest had when it began.
        before: u64,
    },
    /// The guest is asked for blocks.
    Owed {
        /// Bytes of memory that the guest had when it began.
        before: u64,
        /// Blocks that were filled: it is never asked for more.
        filled: u64,
        /// When it is not asked any more.
        until: Instant,
    },
}

impl Refill {
    /// A migration is over, from wherever the guest goes on.
    pub fn over(&mut self) {
        *self = match *self {
            Self::During { before } => Self::After { before },
            _ => Self::Nothing,
        };
    }

    /// All is known of the host and of the guest, after the migration.
    pub fn seen(&mut self, bytes: u64, block_size: u64, now: Instant) {
        if let Self::After { before } = *self {
            *self = match blocks_above(before, bytes, block_size) {
                0 => Self::Nothing,
                filled => Self::Owed { before, filled, until: now + PATIENCE },
            };
        }
    }

    /// Blocks that are still to be asked for, if the guest has so many bytes of memory now.
    pub fn owed(&mut self, bytes: u64, block_size: u64, now: Instant) -> u64 {
        let Self::Owed { before, filled, until } = *self else { return 0 };
        let owed = blocks_above(before, bytes, block_size).min(filled);
        if owed == 0 || now >= until {
            *self = Self::Nothing;
            return 0;
        }
        owed
    }
}

fn blocks_above(before: u64, bytes: u64, block_size: u64) -> u64 {
    bytes.saturating_sub(before).div_ceil(block_size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_migration_has_filled_is_owed_until_it_is_given_back() {
        let now = Instant::now();
        let mut refill = Refill::During { before: 1000 };
        refill.seen(4999, 10, now);
        assert_eq!(refill.owed(4999, 10, now), 0, "it is not over");
        refill.over();
        refill.seen(4999, 10, now);
        assert_eq!(refill.owed(4999, 10, now), 400);
        assert_eq!(refill.owed(4001, 10, now), 301);
        assert_eq!(refill.owed(1000, 10, now), 0);
        assert_eq!(refill, Refill::Nothing);
        assert_eq!(refill.owed(4999, 10, now), 0, "what comes later is the guest's own");
    }

    #[test]
    fn nobody_is_asked_for_ever_nor_for_what_was_not_filled() {
        let now = Instant::now();
        let mut refill = Refill::After { before: 100 };
        refill.seen(100, 10, now);
        assert_eq!(refill, Refill::Nothing);
        refill = Refill::After { before: 100 };
        refill.seen(101, 10, now);
        assert_eq!(refill.owed(999, 10, now), 1, "the guest took the rest itself");
        assert_eq!(refill.owed(999, 10, now + PATIENCE), 0);
        refill.over();
        assert_eq!(refill, Refill::Nothing, "no migration was under way");
    }
}

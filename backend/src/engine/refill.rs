//! What a migration that was cancelled has cost the host, and how it comes back.
//!
//! Before QEMU sends a page it looks whether there is anything in it, and looking at a hole fills
//! it: afterwards the whole guest is resident, also where nothing ever was. Of that the guest is
//! asked for as much as it does not use, once: by then the daemon may be wrong about who touched
//! what, and a guest that uses the memory itself owes nothing.

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
        /// How many at first.
        blocks: u64,
        /// Blocks that it had released until then, ever.
        released: u64,
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

    /// All is known of the host and of the guest, after the migration: the guest has so many bytes
    /// of memory, in blocks of a size, and has released so many blocks until now.
    pub fn seen(&mut self, bytes: u64, block_size: u64, released: u64, now: Instant) {
        if let Self::After { before } = *self {
            *self = match bytes.saturating_sub(before).div_ceil(block_size) {
                0 => Self::Nothing,
                blocks => Self::Owed { blocks, released, until: now + PATIENCE },
            };
        }
    }

    /// Blocks that are still to be asked for.
    pub fn owed(&mut self, released_now: u64, now: Instant) -> u64 {
        let Self::Owed { blocks, released, until } = *self else { return 0 };
        let owed = blocks.saturating_sub(released_now.saturating_sub(released));
        if owed == 0 || now >= until {
            *self = Self::Nothing;
            return 0;
        }
        owed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_migration_has_filled_is_owed_until_it_is_released() {
        let now = Instant::now();
        let mut refill = Refill::During { before: 1000 };
        refill.seen(4999, 10, 7, now);
        assert_eq!(refill.owed(7, now), 0, "it is not over");
        refill.over();
        refill.seen(4999, 10, 7, now);
        assert_eq!(refill.owed(7, now), 400);
        assert_eq!(refill.owed(107, now), 300);
        assert_eq!(refill.owed(407, now), 0);
        assert_eq!(refill, Refill::Nothing);
    }

    #[test]
    fn nobody_is_asked_for_ever_nor_for_what_was_not_filled() {
        let now = Instant::now();
        let mut refill = Refill::After { before: 100 };
        refill.seen(100, 10, 0, now);
        assert_eq!(refill, Refill::Nothing);
        refill = Refill::After { before: 100 };
        refill.seen(101, 10, 0, now);
        assert_eq!(refill.owed(0, now + PATIENCE), 0);
        refill.over();
        assert_eq!(refill, Refill::Nothing, "no migration was under way");
    }
}

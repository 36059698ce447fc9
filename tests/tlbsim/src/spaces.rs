//! Which address spaces a processor with PCIDs keeps entries of.

/// How many Linux gives identifiers to on each processor (TLB_NR_DYN_ASIDS).
const SPACES: usize = 6;

/// The address spaces that have an identifier, by the address of their top page
/// table.
#[derive(Clone, Debug, Default)]
pub struct Spaces {
    /// The most recent one is last.
    known: Vec<(u64, u8)>,
}

/// Where a processor is after CR3 was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Switched {
    /// Identifier of the space.
    pub space: u8,
    /// Whether entries with this identifier are of another space, or are to be
    /// flushed.
    pub flush: bool,
}

impl Spaces {
    /// CR3 was written. The same value again is how a kernel flushes a space.
    pub fn switch(&mut self, root: u64) -> Switched {
        let place = self.known.iter().position(|&(known, _)| known == root);
        let (space, flush) = match place {
            Some(place) => {
                let flush = place + 1 == self.known.len();
                (self.known.remove(place).1, flush)
            }
            None if self.known.len() == SPACES => (self.known.remove(0).1, true),
            None => ((0..).zip(&self.known).map(|(space, _)| space + 1).last().unwrap_or(0), true),
        };
        self.known.push((root, space));
        Switched { space, flush }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spaces_are_kept_until_there_are_too_many() {
        let mut spaces = Spaces::default();
        for root in 0..6 {
            let switched = spaces.switch(root * 4096);
            assert_eq!((u64::from(switched.space), switched.flush), (root, true));
        }
        assert_eq!(spaces.switch(0), Switched { space: 0, flush: false });
        // The oldest is the second one now; its identifier is given away.
        assert_eq!(spaces.switch(0x7000), Switched { space: 1, flush: true });
        assert_eq!(spaces.switch(0x1000), Switched { space: 2, flush: true });
    }

    #[test]
    fn the_same_space_again_is_a_flush() {
        let mut spaces = Spaces::default();
        spaces.switch(0x1000);
        assert_eq!(spaces.switch(0x1000), Switched { space: 0, flush: true });
    }
}

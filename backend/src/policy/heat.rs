//! How hot the guest's huge pages are, by the word of its driver: in how many of its looks they had
//! been used. Coarsely, each class on a bitmap of its own.

use crate::bitmap::Bitmap;

/// Classes above the lowest one.
const CLASSES: usize = 4;
/// From here on a block is of one of these, of the 512 that a driver tells at most. What is used a
/// little is above what is not used at all.
const FLOORS: [u16; CLASSES] = [48, 128, 256, 384];
/// From here on a block may take a huge page from one that is used less than half as much. What is
/// gone through in turn, over and over, is used a third as much at times.
pub const WARM: u16 = FLOORS[0];
/// From here on a block makes way for none.
pub const COLD: u16 = makes_way(FLOORS[CLASSES - 1]);

const fn makes_way(heat: u16) -> u16 {
    heat / 2
}

/// Blocks that are not of the lowest class.
#[derive(Debug)]
pub struct Heat {
    /// Disjoint, the coolest first.
    classes: [Bitmap; CLASSES],
}

impl Heat {
    /// All of `len` blocks are cold, as they are where no driver tells.
    pub fn new(len: usize) -> Self {
        Self { classes: std::array::from_fn(|_| Bitmap::new(len)) }
    }

    /// Notes what the driver told of a block.
    pub fn assign(&mut self, index: usize, heat: u16) {
        let class = FLOORS.iter().rposition(|floor| *floor <= heat);
        for (number, members) in self.classes.iter_mut().enumerate() {
            members.assign(index, Some(number) == class);
        }
    }

    /// A block of `wanted` of the highest class that has any, but the lowest one.
    pub fn hottest(&self, wanted: &Bitmap) -> Option<usize> {
        self.classes.iter().rev().find_map(|members| members.next_common(wanted))
    }

    /// Blocks that are used less than this make way for the hottest of `wanted`; 0 if it is of the
    /// lowest class, or none is wanted.
    pub fn makes_way(&self, wanted: &Bitmap) -> u16 {
        let mut classes = FLOORS.iter().zip(&self.classes).rev();
        let hottest = classes.find(|(_, members)| members.next_common(wanted).is_some());
        hottest.map_or(0, |(floor, _)| makes_way(*floor))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hottest_is_found_and_what_is_cold_is_none() {
        let mut heat = Heat::new(10);
        let mut wanted = Bitmap::new(10);
        (0..9).for_each(|index| wanted.assign(index, true));
        for (index, told) in [(1, 47), (2, 128), (3, 320), (9, 512)] {
            heat.assign(index, told);
        }
        assert_eq!(heat.hottest(&wanted), Some(3));
        assert_eq!(heat.makes_way(&wanted), 128);
        heat.assign(4, 384);
        assert_eq!(heat.makes_way(&wanted), COLD);
        assert_eq!(heat.hottest(&wanted), Some(4));
        heat.assign(4, u16::MAX);
        assert_eq!(heat.hottest(&wanted), Some(4));
        for index in [3, 4] {
            heat.assign(index, 0);
        }
        assert_eq!((heat.hottest(&wanted), heat.makes_way(&wanted)), (Some(2), 64));
        heat.assign(2, WARM - 1);
        assert_eq!((heat.hottest(&wanted), heat.makes_way(&wanted)), (None, 0));
    }
}

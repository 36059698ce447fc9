//! How hot the guest's huge pages are, by the word of its driver: in how many of its looks the
//! processor had walked to them. Coarsely, each class on a bitmap of its own.

use crate::bitmap::Bitmap;

/// Width of a class, of the 512 that a driver tells at most.
const WIDTH: u16 = 128;
/// Below this a block is cold enough to make way for a hot one. What is gone through in turn is not
/// quite cold.
pub const COLD: u16 = 2 * WIDTH;
/// From here on it is hot: of the highest class.
pub const HOT: u16 = 3 * WIDTH;
/// Classes above the lowest one.
const CLASSES: usize = 3;

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
        let class = usize::from(heat / WIDTH).min(CLASSES);
        for (number, members) in self.classes.iter_mut().enumerate() {
            members.assign(index, number + 1 == class);
        }
    }

    /// A block of `wanted` of the highest class that has any, but the lowest one.
    pub fn hottest(&self, wanted: &Bitmap) -> Option<usize> {
        self.classes.iter().rev().find_map(|members| members.next_common(wanted))
    }

    /// Whether one of `wanted` is of the highest class.
    pub fn any_hot(&self, wanted: &Bitmap) -> bool {
        self.classes[CLASSES - 1].next_common(wanted).is_some()
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
        for (index, told) in [(1, 64), (2, 128), (3, 320), (9, 512)] {
            heat.assign(index, told);
        }
        assert_eq!(heat.hottest(&wanted), Some(3));
        assert!(!heat.any_hot(&wanted));
        heat.assign(4, HOT);
        assert!(heat.any_hot(&wanted));
        assert_eq!(heat.hottest(&wanted), Some(4));
        heat.assign(4, u16::MAX);
        assert_eq!(heat.hottest(&wanted), Some(4));
        for index in [3, 4] {
            heat.assign(index, 0);
        }
        assert_eq!(heat.hottest(&wanted), Some(2));
        heat.assign(2, 127);
        assert_eq!(heat.hottest(&wanted), None);
    }
}

//! Watching the huge pages of both layers meet, until they are at rest.

use std::time::{Duration, Instant};

use crate::compare::Counts;
use crate::lab::Lab;

/// How often both layers are looked at: each look costs the guest time.
const PERIOD: Duration = Duration::from_secs(1);

/// Both are at rest if nothing changes for so long: longer than the 13 s that the
/// daemon pauses at most when the host has no huge page.
const REST: Duration = Duration::from_secs(14);

/// Blocks by which a count may change nevertheless: what the guest's own
/// processes do.
const NOISE: u64 = 2;

/// Part of its final value from which on the coverage counts as reached.
const REACHED: f64 = 0.9;

/// The coverage at moments since the data was loaded.
#[derive(Clone, Debug, Default)]
pub struct Watched {
    /// Seconds, and coverage then.
    samples: Vec<(f64, f64)>,
}

impl Watched {
    /// The same, with what was there when the data was loaded: the watch may have begun
    /// only after the program had worked.
    #[must_use]
    pub fn since(mut self, loaded: &Counts) -> Self {
        self.samples.insert(0, (0.0, loaded.aligned_coverage()));
        self
    }

    /// Seconds until the coverage was nine tenths of `last`, to the precision of a
    /// look; none if nothing is covered.
    #[must_use]
    pub fn seconds_to(&self, last: f64) -> Option<f64> {
        let reached = |sample: &&(f64, f64)| last > 0.0 && sample.1 >= REACHED * last;
        self.samples.iter().find(reached).map(|sample| sample.0)
    }
}

/// Watches until both layers are at rest, `most` at most: a policy that is not done by
/// then is measured as it is. The moments are since `loaded`.
///
/// # Errors
/// If a layer cannot be read.
pub fn watch(lab: &Lab, loaded: Instant, most: Duration) -> anyhow::Result<Watched> {
    let mut watched = Watched::default();
    let mut look = || -> anyhow::Result<Counts> {
        let counts = lab.view()?.counts();
        watched.samples.push((loaded.elapsed().as_secs_f64(), counts.aligned_coverage()));
        Ok(counts)
    };
    let begun = Instant::now();
    let (mut last, mut since) = (look()?, begun);
    while since.elapsed() < REST && begun.elapsed() < most {
        std::thread::sleep(PERIOD);
        let now = look()?;
        if !alike(&now, &last) {
            (last, since) = (now, Instant::now());
        }
    }
    Ok(watched)
}

fn alike(a: &Counts, b: &Counts) -> bool {
    let near = |a: u64, b: u64| a.abs_diff(b) <= NOISE;
    near(a.aligned, b.aligned) && near(a.guest_only, b.guest_only) && near(a.host_only, b.host_only)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_to_alignment_is_that_of_the_first_look_with_nine_tenths() {
        let samples = vec![(0.1, 0.2), (1.1, 0.8), (2.1, 0.95), (3.1, 0.96)];
        let watched = Watched { samples };
        assert_eq!(watched.seconds_to(0.96), Some(2.1));
        assert_eq!(watched.seconds_to(0.2), Some(0.1));
        assert_eq!(watched.seconds_to(0.0), None);
    }

    #[test]
    fn what_is_aligned_when_it_is_loaded_takes_no_time() {
        let watched = || Watched { samples: vec![(4.0, 0.9)] };
        let half = Counts { user_bytes: 200, aligned_user_bytes: 100, ..Counts::default() };
        let all = Counts { aligned_user_bytes: 180, ..half };
        assert_eq!(watched().since(&half).seconds_to(0.9), Some(4.0));
        assert_eq!(watched().since(&all).seconds_to(0.9), Some(0.0));
    }

    #[test]
    fn a_block_or_two_are_no_change() {
        let counts = Counts { aligned: 10, ..Counts::default() };
        assert!(alike(&counts, &Counts { aligned: 12, ..counts }));
        assert!(!alike(&counts, &Counts { host_only: 3, ..counts }));
    }
}

//! Block maps: when the data is loaded, and at the end.

use super::or_nothing;
use crate::document::{plain, BlockKind, Maps, Part, Section};
use crate::names::{main_policies, FRAGMENTED, STATES, VMS};
use crate::record::Record;
use crate::runs::{Place, Runs};

/// The maps of one workload under every policy.
#[must_use]
pub fn section(runs: &Runs) -> Section {
    let mut section = Section::new("Block maps: data loaded, and measured");
    if let Some((workload, state, vm)) = most_maps(runs) {
        section.text(format!(
            "A cell is a block of 2 MiB, in the order of guest physical addresses: when the data is \
             loaded, and at the end of the measured phase. Shown is the \
             workload with maps under the most policies, fragmented memory and the clean VM \
             preferred: {}; the first repetition.",
            plain(workload)
        ));
        let mut pictures = Vec::new();
        for policy in main_policies() {
            let Some((record, before, after)) = pair(runs, Place { workload, policy, state, vm })
            else {
                continue;
            };
            for (when, blocks) in [("data loaded", before), ("measured", after)] {
                let title = format!("{}, {when}", record.run.policy);
                pictures.push((title, blocks.chars().map(BlockKind::of).collect()));
            }
        }
        section.parts.push(Part::Maps(Maps {
            title: format!("Guest memory, {}, {state}, {vm} VM", plain(workload)),
            pictures,
        }));
    }
    or_nothing(section)
}

/// The first run of `place` that has both maps.
fn pair<'a>(runs: &'a Runs, place: Place) -> Option<(&'a Record, &'a str, &'a str)> {
    runs.at(place).into_iter().find_map(|record| {
        let maps = record.maps.as_ref()?;
        Some((record, maps.before.as_deref()?, maps.after.as_deref()?))
    })
}

/// Where there are maps under the most policies; the first of equals.
fn most_maps(runs: &Runs) -> Option<(&str, &'static str, &'static str)> {
    let states = std::iter::once(FRAGMENTED).chain(STATES.into_iter().filter(|s| *s != FRAGMENTED));
    let mut best = None;
    let mut most = 0;
    for state in states {
        for vm in VMS {
            for workload in runs.workloads() {
                let at = |policy| Place { workload, policy, state, vm };
                let count = main_policies().filter(|p| pair(runs, at(p)).is_some()).count();
                if count > most {
                    most = count;
                    best = Some((workload, state, vm));
                }
            }
        }
    }
    best
}

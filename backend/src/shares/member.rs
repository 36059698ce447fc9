//! What this daemon does as one of several: tells what it holds and could use, looks at what the
//! others tell, and keeps its guest to its share.

use super::fairness::{fair, Claimant};
use super::ledger::{Entry, Ledger, Part, WEIGHT_MAX};
use crate::engine::Engine;
use std::io;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Time between two looks at the ledger while something changes.
const BUSY: Duration = Duration::from_millis(100);
/// And while nothing does.
const QUIET: Duration = Duration::from_millis(400);
/// How long others may hold more than their share, which they are to give back. Afterwards what
/// they claim beyond it is not respected any more.
const PATIENCE: Duration = Duration::from_secs(4);
/// A VM counts as copying for so long after it last had something to copy.
const COPYING: Duration = Duration::from_secs(1);
/// Least copy rate: with less a VM that begins to copy would have to wait for its share.
const COPY_MIN: u64 = 2 << 20;

/// What is limited on the host, and what our part of it is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Our weight, 1 to [`WEIGHT_MAX`].
    pub weight: u64,
    /// Bytes of huge pages for all VMs together; `None` for any number.
    pub host_huge_max: Option<u64>,
    /// Bytes that may be copied a second for all VMs together; `None` for any number.
    pub host_copy_rate: Option<u64>,
}

/// How it stands, for status output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Shares {
    /// Daemons that share, this one included.
    pub members: usize,
    /// Bytes of huge pages that the guest may have for now; `None` for any number.
    pub huge: Option<u64>,
    /// Bytes that may be copied a second for now; `None` for any number.
    pub copy_rate: Option<u64>,
}

/// Our claim to one thing that is shared.
#[derive(Debug, Default)]
struct Claim {
    claim: u64,
    /// Since when others hold what is ours.
    waiting: Option<Instant>,
}

impl Claim {
    /// Takes what others tell into account, where `held` is ours already; returns what we may
    /// have.
    ///
    /// What is beyond our share is given back; what is missing is claimed as soon as the claims of
    /// the others leave room for it, so that all claims together stay within `total`.
    fn step(
        &mut self,
        total: u64,
        me: Claimant,
        held: u64,
        others: &[(u64, Part)],
        now: Instant,
    ) -> u64 {
        let wants = |weight, demand: u64| Claimant { weight, demand: demand.min(total) };
        let mut claimants = vec![wants(me.weight, me.demand)];
        claimants.extend(others.iter().map(|(weight, part)| wants(*weight, part.demand)));
        let shares = fair(total, &claimants);
        let target = shares.first().copied().unwrap_or(0);
        let impatient = self.waiting.is_some_and(|since| now >= since + PATIENCE);
        let taken = others.iter().zip(shares.iter().skip(1)).map(|((_, part), share)| {
            let claim = part.claim.min(total);
            if impatient {
                claim.min(*share)
            } else {
                claim
            }
        });
        let free = total.saturating_sub(taken.fold(0, u64::saturating_add));
        let limit = target.min(free.max(held));
        if limit < target {
            self.waiting.get_or_insert(now);
        } else {
            self.waiting = None;
        }
        self.claim = limit.max(held);
        limit
    }
}

/// What the engine tells about itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Bytes of huge pages that the guest has or was promised.
    pub huge: u64,
    /// Bytes of huge pages that it could use.
    pub huge_demand: u64,
    /// Whether something is to be copied.
    pub copying: bool,
    /// Bytes that it may copy a second by its own setting.
    pub copy_rate: u64,
}

struct Member {
    engine: Arc<Engine>,
    ledger: Ledger,
    huge: Claim,
    copy: Claim,
    copying_until: Option<Instant>,
    told: Entry,
    seen: Vec<Entry>,
    set: Shares,
}

/// Enters the ledger in `directory` and keeps the engine to its share until `end` is closed.
///
/// # Errors
/// If the directory cannot be entered, or the thread not be started.
pub fn start(directory: &Path, engine: Arc<Engine>, end: Receiver<()>) -> io::Result<()> {
    let told = Entry { weight: engine.limits().weight.clamp(1, WEIGHT_MAX), ..Entry::default() };
    let ledger = Ledger::enter(directory, &told)?;
    let mut member = Member {
        engine,
        ledger,
        huge: Claim::default(),
        copy: Claim::default(),
        copying_until: None,
        told,
        seen: Vec::new(),
        set: Shares::default(),
    };
    std::thread::Builder::new().name("shares".into()).spawn(move || {
        let mut complained: Option<Instant> = None;
        loop {
            let now = Instant::now();
            let changed = member.step(now).unwrap_or_else(|error| {
                // The share stays as it is. Said once a minute.
                if complained.is_none_or(|last| now >= last + Duration::from_secs(60)) {
                    log::warn!(
                        "cannot share with other VMs: {error}; check the directory of --share-dir"
                    );
                    complained = Some(now);
                }
                false
            });
            let pause = if changed { BUSY } else { QUIET };
            if end.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
                return;
            }
        }
    })?;
    Ok(())
}

impl Member {
    /// Looks, decides, tells; whether anything is new.
    fn step(&mut self, now: Instant) -> io::Result<bool> {
        let limits = self.engine.limits();
        let usage = self.engine.usage();
        let weight = limits.weight.clamp(1, WEIGHT_MAX);
        if usage.copying {
            self.copying_until = Some(now + COPYING);
        }
        let copying = self.copying_until.is_some_and(|until| now < until);
        let copy_demand = if copying { usage.copy_rate } else { usage.copy_rate.min(COPY_MIN) };
        let mut others = self.ledger.others()?;
        let before = self.told;
        // Told first and then looked once more: of two who claim the same at once, the one that
        // looks later sees the other's claim, and takes its own back.
        let mut shares = Shares::default();
        for last in [false, true] {
            let (huge, copy): (Vec<_>, Vec<_>) =
                others.iter().map(|o| ((o.weight, o.huge), (o.weight, o.copy))).unzip();
            let me = |demand| Claimant { weight, demand };
            let huge_limit = limits
                .host_huge_max
                .map(|total| self.huge.step(total, me(usage.huge_demand), usage.huge, &huge, now));
            let copy_limit = limits
                .host_copy_rate
                .map(|total| self.copy.step(total, me(copy_demand), 0, &copy, now).max(COPY_MIN));
            let grew =
                self.huge.claim > self.told.huge.claim || self.copy.claim > self.told.copy.claim;
            self.told = Entry {
                weight,
                huge: Part { demand: usage.huge_demand, claim: self.huge.claim },
                copy: Part { demand: copy_demand, claim: self.copy.claim },
            };
            // Also what is not new: somebody may have removed it, or it was not written last time.
            self.ledger.tell(&self.told)?;
            shares = Shares { members: others.len() + 1, huge: huge_limit, copy_rate: copy_limit };
            if last || !grew {
                break;
            }
            others = self.ledger.others()?;
        }
        let changed = self.told != before || others != self.seen || shares != self.set;
        if shares != self.set {
            self.engine.set_shares(shares);
            self.set = shares;
        }
        self.seen = others;
        Ok(changed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// VMs that take turns at random; each takes and gives back as its limit says.
    #[derive(Debug, Default)]
    struct Vm {
        claim: Claim,
        weight: u64,
        demand: u64,
        held: u64,
        told: Part,
    }

    fn turn(vms: &mut [Vm], index: usize, total: u64, now: Instant) {
        let others: Vec<(u64, Part)> = vms
            .iter()
            .enumerate()
            .filter(|(other, vm)| *other != index && vm.weight > 0)
            .map(|(_, vm)| (vm.weight, vm.told))
            .collect();
        let vm = &mut vms[index];
        let me = Claimant { weight: vm.weight, demand: vm.demand };
        let limit = vm.claim.step(total, me, vm.held, &others, now);
        vm.told = Part { demand: vm.demand, claim: vm.claim.claim };
        if vm.held > limit {
            vm.held -= (vm.held - limit).min(50); // takes its time
        } else {
            vm.held = limit.min(vm.demand);
        }
    }

    fn rounds(vms: &mut [Vm], total: u64, now: &mut Instant, count: usize) {
        for _ in 0..count {
            for index in 0..vms.len() {
                turn(vms, index, total, *now);
            }
            *now += BUSY;
            let held: u64 = vms.iter().map(|vm| vm.held).sum();
            assert!(held <= total, "{held} of {total}");
        }
    }

    fn vm(weight: u64, demand: u64) -> Vm {
        Vm { weight, demand, ..Vm::default() }
    }

    #[test]
    fn newcomer_gets_its_share_and_gives_it_up_when_it_idles() {
        let mut now = Instant::now();
        let mut vms = vec![vm(100, 10_000), vm(100, 0), vm(200, 0)];
        rounds(&mut vms, 1000, &mut now, 20);
        assert_eq!(vms[0].held, 1000);
        vms[2].demand = 10_000;
        rounds(&mut vms, 1000, &mut now, 30);
        assert!(vms[0].held.abs_diff(333) < 3 && vms[2].held.abs_diff(666) < 3, "{vms:?}");
        vms[2].demand = 0;
        rounds(&mut vms, 1000, &mut now, 30);
        assert_eq!((vms[0].held, vms[2].held), (1000, 0));
        vms[2].demand = 10_000;
        rounds(&mut vms, 1000, &mut now, 30);
        assert!(vms[2].held.abs_diff(666) < 3, "{vms:?}");
    }

    #[test]
    fn claims_of_a_hostile_member_are_respected_for_a_while_only() {
        let mut now = Instant::now();
        let mut claim = Claim::default();
        let me = Claimant { weight: 100, demand: 1000 };
        let hostile = [(100, Part { demand: u64::MAX, claim: u64::MAX })];
        assert_eq!(claim.step(1000, me, 0, &hostile, now), 0);
        now += PATIENCE;
        assert_eq!(claim.step(1000, me, 0, &hostile, now), 500);
        let many = [(WEIGHT_MAX, Part { demand: u64::MAX, claim: u64::MAX }); 9];
        assert!(claim.step(1000, me, 500, &many, now) <= 500);
    }

    proptest! {
        /// In whatever order VMs come to know of each other and whatever they want: together they
        /// never have more than there is, and each comes to its share.
        #[test]
        fn never_too_much_and_at_last_fair(
            weights in prop::collection::vec(1u64..500, 1..5),
            wishes in prop::collection::vec((0usize..5, 0u64..3000), 1..20),
            order in prop::collection::vec(0usize..5, 1..200),
        ) {
            let total = 1000;
            let mut now = Instant::now();
            let mut vms: Vec<Vm> = weights.iter().map(|weight| vm(*weight, 0)).collect();
            let count = vms.len();
            let mut wishes = wishes.into_iter().cycle();
            for (step, index) in order.into_iter().enumerate() {
                if step % 10 == 0 {
                    if let Some((index, demand)) = wishes.next() {
                        vms[index % count].demand = demand;
                    }
                }
                turn(&mut vms, index % count, total, now);
                now += Duration::from_millis(7);
                let held: u64 = vms.iter().map(|vm| vm.held).sum();
                prop_assert!(held <= total, "{held}: {vms:?}");
            }
            rounds(&mut vms, total, &mut now, 60);
            let claimants: Vec<_> = vms
                .iter()
                .map(|vm| Claimant { weight: vm.weight, demand: vm.demand.min(total) })
                .collect();
            for (vm, share) in vms.iter().zip(fair(total, &claimants)) {
                prop_assert!(vm.held.abs_diff(share) <= count as u64, "{share}: {vms:?}");
            }
        }
    }
}

//! What holds for every guest: budgets, fairness, legal changes, and quiet where nothing is to be
//! had. What a simulation finds wrong by itself is in its report.

use gemini_simulator::generate;
use gemini_simulator::host::{is_legal, Cause};
use gemini_simulator::simulation::{run, Plan};
use gemini_simulator::trace::{Event, Trace, What};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::time::Duration;
use vhost_device_gemini::backing::HostState;
use vhost_device_gemini::policy::Policy;
use vhost_device_gemini::protocol::GuestState;

const POLICIES: [Policy; 6] = [
    Policy::None,
    Policy::Always,
    Policy::Gemini,
    Policy::KubevirtLike,
    Policy::IngensLike,
    Policy::HawkeyeLike,
];
const BLOCKS: u64 = 96;

fn what() -> impl Strategy<Value = What> {
    prop_oneof![
        4 => Just(What::Guest(GuestState::Huge, 0)),
        2 => (1u16..=512).prop_map(|pages| What::Guest(GuestState::Base, pages)),
        2 => Just(What::Guest(GuestState::Free, 0)),
        2 => Just(What::Guest(GuestState::Booked, 0)),
        1 => Just(What::Guest(GuestState::Pinned, 0)),
        2 => Just(What::Drop),
        2 => Just(What::Prepare),
        1 => Just(What::Pages),
    ]
}

fn traces() -> impl Strategy<Value = Trace> {
    let event = (0u64..300, what(), 0..BLOCKS, 1u32..24);
    prop::collection::vec(event, 1..120).prop_map(|events| {
        let mut at = 0;
        let events = events.into_iter().map(|(pause, what, first, count)| {
            at += pause;
            let room = u32::try_from(BLOCKS - first).unwrap_or(1);
            let first = if what == What::Pages { 0 } else { first };
            Event { at, what, first, count: count.min(room) }
        });
        Trace { blocks: BLOCKS, events: events.collect() }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Whatever guest and host do: copies and CPU stay within the budgets, no block is huge beyond
    /// the limit, every change of a block is a legal one, what rests is left alone, and the same
    /// trace gives the same result.
    #[test]
    fn no_rule_is_broken(
        trace in traces(),
        policy in prop::sample::select(&POLICIES[..]),
        rate in 100u64..1000,
        share in 1u32..100,
        huge_max in prop::option::of(0u64..64),
        fail_percent in 0u64..60,
        fragmented in any::<bool>(),
    ) {
        let plan = Plan {
            copy_rate: rate << 20,
            cpu_share: f64::from(share) / 100.0,
            huge_max,
            fail_percent,
            fragmented,
            rest: Duration::from_secs(5),
            ..Plan::new(policy)
        };
        let report = run(&trace, &plan);
        prop_assert_eq!(&report.wrong, &Vec::<String>::new());
        prop_assert_eq!(&run(&trace, &plan), &report);
        let text = trace.to_string();
        prop_assert_eq!(text.parse::<Trace>().unwrap(), trace);
    }

    /// Every guest huge page is tried within the stated bound, and in the end each has its huge
    /// page of the host.
    #[test]
    fn gemini_starves_no_block(mut trace in traces(), fail_percent in 0u64..40) {
        trace.events.retain(|event| event.what != What::Pages);
        let plan = Plan { fail_percent, rest: Duration::from_secs(300), ..Plan::new(Policy::Gemini) };
        let report = run(&trace, &plan);
        prop_assert_eq!(report.guest_only, 0);
        let huge = |event: &&Event| event.what == What::Guest(GuestState::Huge, 0);
        let wanted: BTreeSet<u64> = trace
            .events
            .iter()
            .filter(huge)
            .flat_map(|event| event.first..event.first + u64::from(event.count))
            .collect();
        prop_assert!(report.longest_wait <= 8 * wanted.len() as u64, "{:?}", report);
    }
}

#[test]
fn a_host_without_huge_pages_gets_quieter() {
    let mut trace = generate::guest(1, 2048, 20);
    trace.events.insert(0, Event { at: 0, what: What::Pages, first: 0, count: 0 });
    for policy in [Policy::Always, Policy::Gemini, Policy::HawkeyeLike] {
        let report = run(&trace, &Plan { rest: Duration::from_secs(100), ..Plan::new(policy) });
        assert_eq!(report.wrong, Vec::<String>::new());
        let tries = |from: u64| {
            let span = Duration::from_secs(from)..Duration::from_secs(from + 60);
            report.lacking_at.iter().filter(|at| span.contains(at)).count()
        };
        let (first, later) = (tries(0), tries(60));
        assert!(first >= 8 && later <= 5 && later * 3 <= first, "{policy:?}: {first}, {later}");
    }
}

#[test]
fn a_limit_is_reached_kept_and_the_pages_go_where_they_are_of_use() {
    let trace = generate::guest(3, 4096, 60);
    let plan = Plan { huge_max: Some(512), ..Plan::new(Policy::Gemini) };
    let report = run(&trace, &plan);
    assert_eq!(report.wrong, Vec::<String>::new());
    assert_eq!(report.most_huge, 512);
    assert!(report.demoted > 0 && report.aligned > 400, "{report:?}");
}

#[test]
fn copying_reaches_its_rate() {
    let trace = generate::guest(1, 8192, 30);
    let rate = 200 << 20;
    let report = run(&trace, &Plan { copy_rate: rate, ..Plan::new(Policy::Gemini) });
    assert!(report.most_in_a_second >= rate - rate / 10, "{report:?}");
    assert!(report.copied * (2 << 20) >= rate * 20, "{report:?}");
}

#[test]
fn another_seed_is_another_guest() {
    let of = |seed| run(&generate::guest(seed, 512, 12), &Plan::new(Policy::Gemini)).digest;
    assert_eq!(of(1), of(1));
    assert_ne!(of(1), of(2));
}

#[test]
fn a_huge_page_comes_from_pages_or_nothing_and_ends_as_pages_or_nothing() {
    use HostState::{Absent, Base, Huge};
    assert!(is_legal(Base, Cause::Collapse, Huge) && is_legal(Absent, Cause::Populate, Huge));
    for (from, cause, to) in [
        (Absent, Cause::Collapse, Huge),
        (Huge, Cause::Collapse, Huge),
        (Base, Cause::Demote, Base),
        (Huge, Cause::Demote, Absent),
        (Huge, Cause::Touch, Base),
    ] {
        assert!(!is_legal(from, cause, to), "{from:?} {cause:?} {to:?}");
    }
}

/// Recorded from `gemini-harness run --quick --policy none` by `gemini-simulator record`.
#[test]
fn a_recorded_guest_is_aligned() {
    let trace: Trace = include_str!("model-guest.trace").parse().unwrap();
    let plan = Plan { rest: Duration::from_secs(30), ..Plan::new(Policy::Gemini) };
    let report = run(&trace, &plan);
    assert_eq!((report.wrong.len(), report.guest_only, report.host_only), (0, 0, 0), "{report:?}");
    assert!(report.aligned > 0);
}

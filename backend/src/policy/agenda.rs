//! Which of the blocks that the policy wants is next.

use super::ages::Ages;
use super::coverage::Coverage;
use super::heat::Heat;
use super::Policy;
use crate::bitmap::Bitmap;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// What is a tick of the ages: blocks are of the last age after some 17 minutes.
const TICK: Duration = Duration::from_secs(1);
/// By age every wanted block but one in so many, which is the next in turn whatever its age: none
/// waits for more than as many times the number of wanted blocks.
const FAIR: u32 = 8;
/// A guest that told nothing for so long has no driver, and has booted.
const BOOT: Duration = Duration::from_secs(60);

/// How the next one is chosen.
#[derive(Debug)]
enum Order {
    /// Ascending, round and round.
    Round,
    /// The hottest, as far as the driver tells; then those that the guest has had as huge pages for
    /// longest, then what is none in turn.
    Oldest { heat: Heat, ages: Box<Ages>, ticked: Option<Instant> },
    /// As they came to be wanted. Each waits in the queue once, even if it is not wanted any more.
    Arrival { queue: VecDeque<usize>, queued: Bitmap },
    /// Those with most pages.
    Fullest(Box<Coverage>),
    /// Ascending, and each once: what is resident when the pass is opened.
    Pass(Pass),
}

/// Where a pass over everything is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pass {
    /// It opens when the guest has booted, or at this time.
    Ahead(Option<Instant>),
    /// It may be opened.
    Due,
    /// What is found resident joins.
    Open,
    /// Nothing joins any more.
    Closed,
}

/// The blocks that the policy wants collapsed, in its order.
#[derive(Debug)]
pub struct Agenda {
    len: usize,
    wanted: Bitmap,
    /// The next in turn.
    cursor: usize,
    /// Blocks taken since the last one that was taken in turn.
    by_age: u32,
    order: Order,
}

impl Agenda {
    /// Nothing is wanted of `len` blocks of a guest that boots.
    pub fn new(policy: Policy, len: usize) -> Self {
        let order = match policy {
            Policy::None | Policy::Always | Policy::PrepareOnly => Order::Round,
            Policy::Gemini | Policy::GeminiKernel => {
                Order::Oldest { heat: Heat::new(len), ages: Box::new(Ages::new(len)), ticked: None }
            }
            Policy::KubevirtLike => Order::Pass(Pass::Ahead(None)),
            Policy::IngensLike => {
                Order::Arrival { queue: VecDeque::new(), queued: Bitmap::new(len) }
            }
            Policy::HawkeyeLike => Order::Fullest(Box::new(Coverage::new(len))),
        };
        Self { len, wanted: Bitmap::new(len), cursor: 0, by_age: 0, order }
    }

    /// The same for a guest that runs, and is asked about all of its blocks next.
    pub fn on_demand(policy: Policy, len: usize) -> Self {
        let mut agenda = Self::new(policy, len);
        agenda.booted();
        agenda
    }

    /// Number of blocks that are wanted.
    pub fn wanted(&self) -> usize {
        self.wanted.ones()
    }

    /// The set of them, to take some out.
    pub fn wanted_mut(&mut self) -> &mut Bitmap {
        &mut self.wanted
    }

    /// Notes whether the policy wants a block, and it may be tried.
    pub fn consider(&mut self, index: usize, wanted: bool) {
        let had = self.wanted.get(index);
        let joins = match &self.order {
            Order::Pass(pass) => *pass == Pass::Open || had,
            _ => true,
        };
        let wanted = wanted && joins && index < self.len;
        self.wanted.assign(index, wanted);
        if let Order::Arrival { queue, queued } = &mut self.order {
            if wanted && !queued.get(index) {
                queued.assign(index, true);
                queue.push_back(index);
            }
        }
    }

    /// Notes whether a block is of those of which the oldest go first: huge pages of the guest, and
    /// what its kernel works with all the time.
    pub fn note_aging(&mut self, index: usize, aging: bool) {
        if let Order::Oldest { ages, .. } = &mut self.order {
            ages.assign(index, aging);
        }
    }

    /// Notes how hot a huge page of the guest is, by the word of its driver.
    pub fn note_heat(&mut self, index: usize, heat: u16) {
        if let Order::Oldest { heat: known, .. } = &mut self.order {
            known.assign(index, heat);
        }
    }

    /// Huge pages of the guest that are used less than this make way for the hottest of those that
    /// are wanted, as far as the driver tells; 0 if none is hot.
    pub fn makes_way(&self) -> u16 {
        match &self.order {
            Order::Oldest { heat, .. } => heat.makes_way(&self.wanted),
            _ => 0,
        }
    }

    /// Notes how many base pages of a block a look found resident.
    pub fn note_resident(&mut self, index: usize, pages: u16) {
        if let Order::Fullest(coverage) = &mut self.order {
            coverage.sample(index, pages);
        }
    }

    /// Lets time pass.
    pub fn pass_time(&mut self, now: Instant) {
        match &mut self.order {
            Order::Oldest { ages, ticked, .. } => {
                let since = ticked.get_or_insert(now);
                let ticks = now.saturating_duration_since(*since).as_secs() / TICK.as_secs();
                ages.pass(ticks);
                *since += Duration::from_secs(ticks * TICK.as_secs());
            }
            Order::Pass(pass @ Pass::Ahead(_)) => match pass {
                Pass::Ahead(Some(at)) if *at <= now => *pass = Pass::Due,
                Pass::Ahead(at) => {
                    at.get_or_insert(now + BOOT);
                }
                _ => {}
            },
            _ => {}
        }
    }

    /// When time makes a difference next.
    pub fn wakes_at(&self) -> Option<Instant> {
        match self.order {
            Order::Pass(Pass::Ahead(at)) => at,
            _ => None,
        }
    }

    /// The guest has booted: its driver has told everything.
    pub fn booted(&mut self) {
        if let Order::Pass(pass @ Pass::Ahead(_)) = &mut self.order {
            *pass = Pass::Due;
        }
    }

    /// Opens the pass if it is due; then all blocks are to be looked at and considered.
    pub fn open(&mut self) -> bool {
        let due = matches!(self.order, Order::Pass(Pass::Due));
        if due {
            self.order = Order::Pass(Pass::Open);
        }
        due
    }

    /// All blocks were looked at since the pass was opened, if one was: nothing joins any more.
    pub fn close(&mut self) {
        if let Order::Pass(pass @ Pass::Open) = &mut self.order {
            *pass = Pass::Closed;
        }
    }

    /// The next block, if any is wanted; it stays wanted.
    pub fn peek(&mut self) -> Option<usize> {
        let Self { wanted, order, .. } = self;
        match order {
            Order::Oldest { heat, ages, .. } if self.by_age + 1 < FAIR => heat
                .hottest(wanted)
                .or_else(|| ages.oldest_first().find_map(|age| age.next_common(wanted)))
                .or_else(|| wanted.next_wrapping(self.cursor)),
            Order::Fullest(coverage) => coverage.next(wanted),
            Order::Arrival { queue, queued } => {
                while let Some(index) = queue.front().copied().filter(|at| !wanted.get(*at)) {
                    queue.pop_front();
                    queued.assign(index, false);
                }
                queue.front().copied()
            }
            Order::Oldest { .. } | Order::Round | Order::Pass(_) => {
                wanted.next_wrapping(self.cursor)
            }
        }
    }

    /// `count` blocks from `first` on were taken, `first` being what [`Agenda::peek`] gave.
    pub fn taken(&mut self, first: usize, count: u32) {
        let in_turn = match self.order {
            Order::Oldest { .. } => self.by_age + 1 >= FAIR,
            _ => true,
        };
        if in_turn {
            self.cursor = first + count as usize;
            self.by_age = 0;
        } else {
            self.by_age += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn take(agenda: &mut Agenda) -> Option<usize> {
        let index = agenda.peek()?;
        agenda.wanted_mut().assign(index, false);
        agenda.taken(index, 1);
        Some(index)
    }

    fn drain(agenda: &mut Agenda) -> Vec<usize> {
        std::iter::from_fn(|| take(agenda)).collect()
    }

    #[test]
    fn gemini_takes_the_oldest_first() {
        let start = Instant::now();
        let mut agenda = Agenda::new(Policy::Gemini, 100);
        agenda.pass_time(start);
        for (index, second) in [(50, 0), (7, 20), (90, 100)] {
            agenda.pass_time(start + Duration::from_secs(second));
            agenda.note_aging(index, true);
            agenda.consider(index, true);
        }
        assert_eq!(drain(&mut agenda), [50, 7, 90]);
        // One that was wanted before is as old as it is.
        agenda.consider(90, true);
        agenda.consider(50, true);
        assert_eq!(drain(&mut agenda), [50, 90]);
    }

    #[test]
    fn what_is_hot_comes_before_what_is_old() {
        let start = Instant::now();
        let mut agenda = Agenda::new(Policy::Gemini, 100);
        agenda.pass_time(start);
        for index in [5, 6] {
            agenda.note_aging(index, true);
        }
        agenda.pass_time(start + Duration::from_secs(100));
        for (index, heat) in [(5, 0), (6, 200), (7, 300), (8, 512)] {
            agenda.note_aging(index, true);
            agenda.note_heat(index, heat);
            agenda.consider(index, true);
        }
        assert_eq!(agenda.makes_way(), 192);
        assert_eq!(take(&mut agenda), Some(8));
        assert_eq!(agenda.makes_way(), 128);
        assert_eq!(drain(&mut agenda), [7, 6, 5]);
    }

    #[test]
    fn what_is_no_huge_page_comes_after_those_that_are() {
        let start = Instant::now();
        let mut agenda = Agenda::new(Policy::GeminiKernel, 100);
        agenda.pass_time(start);
        agenda.note_aging(50, true);
        for index in [3, 4, 50] {
            agenda.consider(index, true);
        }
        assert_eq!(drain(&mut agenda), [50, 3, 4]);
    }

    #[test]
    fn ingens_takes_what_came_first_and_each_once() {
        let mut agenda = Agenda::new(Policy::IngensLike, 100);
        for (index, wanted) in [(9, true), (3, true), (5, true), (3, false), (3, true), (9, true)] {
            agenda.consider(index, wanted);
        }
        agenda.consider(5, false);
        assert_eq!(drain(&mut agenda), [9, 3]);
    }

    #[test]
    fn hawkeye_takes_what_has_most_pages() {
        let mut agenda = Agenda::new(Policy::HawkeyeLike, 100);
        for (index, pages) in [(1, 60), (2, 511), (3, 300), (4, 490)] {
            agenda.note_resident(index, pages);
            agenda.consider(index, true);
        }
        assert_eq!(drain(&mut agenda), [2, 4, 3, 1]);
    }

    #[test]
    fn kubevirt_takes_each_block_once_and_what_came_later_on_demand() {
        let start = Instant::now();
        let mut agenda = Agenda::new(Policy::KubevirtLike, 100);
        agenda.pass_time(start);
        agenda.consider(3, true);
        assert!(!agenda.open() && agenda.peek().is_none(), "the guest boots");
        assert_eq!(agenda.wakes_at(), Some(start + BOOT));
        agenda.booted();
        assert!(agenda.open() && !agenda.open());
        for index in [30, 20, 10] {
            agenda.consider(index, true);
        }
        agenda.close();
        agenda.consider(40, true);
        agenda.consider(20, true);
        assert_eq!(take(&mut agenda), Some(10));
        agenda.consider(10, true);
        assert_eq!(drain(&mut agenda), [20, 30]);
        let mut again = Agenda::on_demand(Policy::KubevirtLike, 100);
        assert!(again.open());
        again.consider(40, true);
        assert_eq!(drain(&mut again), [40]);
    }

    #[test]
    fn a_guest_without_a_driver_has_booted_after_a_while() {
        let start = Instant::now();
        let mut agenda = Agenda::new(Policy::KubevirtLike, 100);
        agenda.pass_time(start);
        agenda.pass_time(start + BOOT / 2);
        assert!(!agenda.open());
        agenda.pass_time(start + BOOT);
        assert!(agenda.open());
    }

    proptest! {
        /// However many older ones come to be wanted all the time, none waits for longer than the
        /// stated bound.
        #[test]
        fn no_block_starves(young in 0usize..64, older in prop::collection::vec(0usize..64, 700)) {
            let start = Instant::now();
            let mut agenda = Agenda::new(Policy::Gemini, 64);
            agenda.pass_time(start);
            (0..64).filter(|index| *index != young).for_each(|index| agenda.note_aging(index, true));
            agenda.pass_time(start + Duration::from_secs(100));
            agenda.note_aging(young, true);
            agenda.consider(young, true);
            let mut turns = 0;
            let mut older = older.into_iter();
            loop {
                (0..64).filter(|index| *index != young).for_each(|i| agenda.consider(i, true));
                agenda.consider(older.next().unwrap_or(0), true);
                turns += 1;
                if take(&mut agenda) == Some(young) {
                    break;
                }
                prop_assert!(turns <= 64 * FAIR, "{} turns", turns);
            }
        }
    }
}

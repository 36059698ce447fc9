// SPDX-License-Identifier: GPL-2.0
/*
 * Booking: which blocks are worth holding, so that the next huge pages of
 * processes are aligned when they are first touched.
 *
 * By cost, everything of one kind before anything of the next:
 *   1. free blocks that the host backs with a huge page (type-1): plain
 *      allocations first, which disturb nobody, then at their addresses;
 *   2. free blocks that the host can be asked to make huge: those first that it
 *      backs already, which costs it no more memory, then those that it does not;
 *   3. blocks with few movable pages in use (type-2, where the host has a huge
 *      page already), emptied, a few in a second, fewest pages first.
 *
 * The first kind is booked for its own sake, up to a limit, and kept until the
 * timeout.  The others only fill the stock of ready blocks, whose size follows
 * the demand for huge pages.
 */
#include <linux/minmax.h>
#include <linux/mm.h>
#include <linux/slab.h>

#include "booking.h"
#include "compat.h"
#include "trace.h"

/* Between two looks: while there is something to do, and while there is not. */
#define PERIOD_HUNGRY		(HZ / 20)
#define PERIOD_ACTIVE		(HZ / 10)
#define PERIOD_CALM		HZ
/* The stock is to last so many seconds of the recent demand. */
#define LEAD_SECONDS		1
/* The demand is reckoned over this time at least. */
#define DEMAND_PERIOD		(HZ / 20)
/* What is left of a demand after a second without any, in 256ths. */
#define DEMAND_DECAY		128
/* A guest that asked for no huge page for so long is at rest. */
#define LULL			(60 * HZ)
/* Until then the stock has one block for each so many huge pages in use. */
#define HUGE_PER_READY		32U
/* After memory was short, or somebody wanted to have it offline. */
#define PAUSE			(10 * HZ)
/* What could not be had, or what the host left undone, gets another chance. */
#define FORGIVE			(30 * HZ)

/* The host is asked for half of the stock at a time, but not for fewer. */
#define BATCH_MIN		8ULL

/* What the stock does not need any more, and nobody took. */
#define UNUSED			(2 * HZ)
/* What is to be given back to the host goes there in this time, or not at all. */
#define GIVING			(5 * HZ)

/**
 * gemini_booking_node() - the node of a block
 * @gemini: the device
 * @block: the block
 *
 * Return: the node, or NUMA_NO_NODE if there is no memory online.
 */
int gemini_booking_node(struct gemini *gemini, u64 block)
{
	struct page *page = pfn_to_online_page(gemini_block_pfn(gemini, block));

	return page ? page_to_nid(page) : NUMA_NO_NODE;
}

/* Blocks that a node can spare before it has to reclaim. */
static u64 spare(struct gemini *gemini, int nid)
{
	struct zone *zones = NODE_DATA(nid)->node_zones;
	unsigned long pages = 0;
	unsigned int i;

	for (i = 0; i < MAX_NR_ZONES; i++) {
		unsigned long free, keep;

		if (!populated_zone(&zones[i]))
			continue;
		free = zone_page_state(&zones[i], NR_FREE_PAGES);
		keep = 2 * high_wmark_pages(&zones[i]);
		pages += free > keep ? free - keep : 0;
	}
	return pages >> gemini->block_order;
}

static u64 held_on(struct gemini *gemini, int nid)
{
	unsigned int stock;
	u64 held = 0;

	for (stock = 0; stock < GEMINI_STOCKS; stock++)
		held += gemini_map_stock(&gemini->map, nid, stock);
	return held;
}

/*
 * More blocks that may be held on a node for their own sake.  What is held is
 * free memory that others cannot use at once: half of it at most.
 */
static u64 room(struct gemini *gemini, int nid)
{
	u64 free = spare(gemini, nid);
	u64 held = held_on(gemini, nid);
	u64 most = (free + held) / 2;
	u32 bucket_max = READ_ONCE(gemini->bucket_max);

	if (bucket_max)
		most = min_t(u64, most, bucket_max);
	return most > held ? min(most - held, free) : 0;
}

/**
 * gemini_booking_room() - more blocks that may be held for their own sake
 * @gemini: the device
 *
 * Return: number of blocks, on all nodes.
 */
u64 gemini_booking_room(struct gemini *gemini)
{
	u64 blocks = 0;
	int nid;

	if (!READ_ONCE(gemini->booking.enabled))
		return 0;
	for_each_node_state(nid, N_MEMORY)
		blocks += room(gemini, nid);
	return blocks;
}

/* The node's part of the stock. */
static u64 target_of(struct gemini *gemini, int nid)
{
	u64 all = totalram_pages();
	u64 here = node_present_pages(nid);

	return DIV_ROUND_UP_ULL(READ_ONCE(gemini->booking.target) *
				min(here, all), all);
}

/**
 * gemini_booking_spare() - ready blocks that the stock does not need
 * @gemini: the device
 * @nid: their node
 *
 * Return: number of blocks; all of them while the host wants memory back.
 */
u64 gemini_booking_spare(struct gemini *gemini, int nid)
{
	u64 target = READ_ONCE(gemini->wanted) ? 0 : target_of(gemini, nid);
	u64 ready = gemini_hold_ready(gemini, nid);

	return ready > target ? ready - target : 0;
}

/* Is a free block that the allocator gave us worth keeping? */
static bool wanted(struct gemini *gemini, u64 block, u64 need)
{
	struct gemini_block copy = {};
	struct gemini_block *entry;

	spin_lock(&gemini->map.lock);
	entry = gemini_map_find(&gemini->map, block);
	if (entry)
		copy = *entry;
	spin_unlock(&gemini->map.lock);
	return need || (gemini_host_huge(copy.host) &&
			!(copy.flags & GEMINI_STOCK_ONLY));
}

static u64 need_on(struct gemini *gemini, int nid)
{
	u64 target = target_of(gemini, nid);
	u64 held = held_on(gemini, nid);

	return target > held ? target - held : 0;
}

/**
 * gemini_booking_wants() - is a held block worth keeping?
 * @gemini: the device
 * @block: the block
 *
 * Return: true if the host backs it with a huge page, or if the stock is low
 * and the host can be asked for one.
 */
bool gemini_booking_wants(struct gemini *gemini, u64 block)
{
	int nid = gemini_booking_node(gemini, block);

	if (nid == NUMA_NO_NODE)
		return false;
	return wanted(gemini, block,
		      gemini_asking_helps(gemini) ? need_on(gemini, nid) : 0);
}

/*
 * Takes blocks as the allocator gives them, and keeps the wanted ones.  The
 * others go back only at the end, so that they do not come again.
 */
static u64 book_plain(struct gemini *gemini, int nid, u64 tries, u64 need)
{
	u64 unwanted[GEMINI_CANDIDATES];
	unsigned int count = 0;
	u64 kept = 0;
	u64 block;

	while (tries-- && count < GEMINI_CANDIDATES &&
	       !gemini_hold_any(gemini, nid, &block)) {
		if (wanted(gemini, block, need > kept))
			kept++;
		else
			unwanted[count++] = block;
		cond_resched();
	}
	while (count)
		gemini_hold_free(gemini, unwanted[--count]);
	gemini->booking.plain += kept;
	return kept;
}

/**
 * gemini_booking_paused() - does somebody else need the memory?
 * @gemini: the device
 *
 * Return: true if nothing is to be held for now.
 */
bool gemini_booking_paused(struct gemini *gemini)
{
	return time_before(jiffies, READ_ONCE(gemini->booking.paused_until));
}

/* Takes one block at its address; what cannot be had is left alone. */
static bool book_exact(struct gemini *gemini,
		       const struct gemini_candidate *from)
{
	struct gemini_booking *booking = &gemini->booking;
	int ret;

	if (!from->used && !gemini_census_free(gemini, from->block))
		return false;
	ret = gemini_hold_exact(gemini, from->block);
	if (ret && ret != -EEXIST)
		gemini_map_flag(&gemini->map, from->block,
				GEMINI_BLOCK_PASSED, 0);
	if (from->used) {
		booking->failures += !!ret;
		booking->evacuated += !ret;
		booking->evacuated_pages += ret ? 0 : from->used;
		trace_gemini_evacuate(gemini, from->block, from->used, ret);
	} else {
		booking->exact += !ret;
	}
	return !ret;
}

/**
 * gemini_booking_credit() - may one more block be emptied now?
 * @gemini: the device
 *
 * Only for booking's work.
 *
 * Return: true, no more often than @evacuation_rate says.
 */
bool gemini_booking_credit(struct gemini *gemini)
{
	struct gemini_booking *booking = &gemini->booking;
	u64 rate = READ_ONCE(booking->evacuation_rate);
	unsigned long now = jiffies;

	booking->credit += rate * (now - booking->credit_time);
	booking->credit_time = now;
	booking->credit = min(booking->credit, max(rate, 1ULL) * HZ);
	if (!rate || booking->credit < HZ)
		return false;
	booking->credit -= HZ;
	return true;
}

/*
 * Under init_on_alloc booking writes the whole block, which makes the host back
 * it with base pages if it has none there: such blocks are made host-huge
 * first, while they are free.
 */
static bool zeroed_at_booking(void)
{
	return want_init_on_alloc(GFP_TRANSHUGE_LIGHT);
}

/* Free blocks that the host backs, by their addresses; a later look renews them. */
static u64 book_small(struct gemini *gemini,
		      const struct gemini_candidates *found, u64 need)
{
	u64 got = 0;
	unsigned int i;

	for (i = 0; i < found->count && got < need; i++)
		if (found->best[i].cost == GEMINI_COST_FREE_SMALL &&
		    !gemini_booking_paused(gemini))
			got += book_exact(gemini, &found->best[i]);
	return got;
}

/* Type-1: they are held for their own sake. */
static u64 book_free(struct gemini *gemini, int nid,
		     const struct gemini_candidates *found, bool plain)
{
	u64 most = 0;
	u64 got = 0;
	unsigned int i;

	for (i = 0; i < found->count; i++)
		most += found->best[i].cost == GEMINI_COST_FREE;
	most = min(most, room(gemini, nid));
	if (most && plain)
		got = book_plain(gemini, nid, 2 * most, 0);
	for (i = 0; i < found->count && got < most && !gemini_booking_paused(gemini); i++)
		if (found->best[i].cost == GEMINI_COST_FREE)
			got += book_exact(gemini, &found->best[i]);
	return got;
}

/* Is there a use for one more block, where this is the cheapest? */
static bool lacks(struct gemini *gemini, int nid,
		  const struct gemini_candidate *one)
{
	return need_on(gemini, nid) || (gemini_host_huge(one->host) &&
					gemini_move_need(gemini, nid));
}

/* For the stock, and for moves: as many of those up to @cost as it takes. */
static bool book_for_stock(struct gemini *gemini, int nid,
			   const struct gemini_candidates *found, u32 cost)
{
	bool progress = false;
	unsigned int i;

	for (i = 0; i < found->count; i++) {
		const struct gemini_candidate *one = &found->best[i];

		if (gemini_booking_paused(gemini) || !spare(gemini, nid) ||
		    !lacks(gemini, nid, one))
			break;
		if (one->cost > cost)
			break;
		if (one->cost == GEMINI_COST_SPENT) {
			progress |= book_exact(gemini, one);
		} else if (one->used) {
			if (!READ_ONCE(gemini->booking.evacuation_rate))
				break;
			/* If not now, then in a moment. */
			progress = true;
			if (!gemini_booking_credit(gemini))
				break;
			book_exact(gemini, one);
		}
	}
	return progress;
}

static unsigned int count_of(const struct gemini_candidates *found, u32 cost)
{
	unsigned int count = 0;
	unsigned int i;

	for (i = 0; i < found->count; i++)
		count += found->best[i].cost == cost;
	return count;
}

/* Books on a node what is to be had; returns whether it got on with it. */
static bool fill(struct gemini *gemini, int nid,
		 struct gemini_candidates *found, unsigned int open)
{
	bool ask = gemini_asking_allowed(gemini);
	bool renew = gemini_asking_renew(gemini);
	bool zeroed = zeroed_at_booking();
	unsigned int small, absent;
	bool progress = false;
	u64 need, had, batch;
	bool prepare;

	gemini_candidates_find(gemini, nid, gemini_asking_helps(gemini), found);
	small = count_of(found, GEMINI_COST_FREE_SMALL);
	absent = count_of(found, GEMINI_COST_FREE_ABSENT);
	had = count_of(found, GEMINI_COST_FREE) +
	      count_of(found, GEMINI_COST_SPENT) + (renew ? small : 0);
	prepare = ask && absent && zeroed && gemini_asking_prepare(gemini);
	batch = max(target_of(gemini, nid) / 2, BATCH_MIN);

	/* The host makes some huge while others, which it has, are booked. */
	need = min(need_on(gemini, nid), spare(gemini, nid));
	if (prepare && !open && need > had)
		progress = gemini_asking_free(gemini, found,
					      min(need - had, batch));

	/*
	 * Whatever a plain allocation takes is written to.  Where it may not be
	 * what is looked for, only that is taken.
	 */
	progress |= book_free(gemini, nid, found, !((small || absent) && zeroed));
	progress |= book_for_stock(gemini, nid, found, GEMINI_COST_SPENT);
	need = min(need_on(gemini, nid), spare(gemini, nid));
	if (prepare && need) {
		/* Without a copy, and without more memory of the host's. */
		if (small && renew && book_small(gemini, found, need))
			return true;
		/* One such request at a time: the map has to follow. */
		if (!progress && !open)
			progress = gemini_asking_free(gemini, found,
						      min(need, batch));
		return progress;
	}
	if (ask && need && (small || absent))
		progress |= book_plain(gemini, nid,
				       min_t(u64, need, GEMINI_CANDIDATES),
				       need);
	progress |= book_for_stock(gemini, nid, found,
				   ask ? GEMINI_COST_NONE :
					 GEMINI_COST_FREE_SMALL);
	return progress;
}

/*
 * Does the host take what it gets back?  It does until it has taken nothing for a
 * while, though there was something; not by the age of blocks, which may have
 * been of use for long before there were too many.
 */
static bool host_takes(struct gemini *gemini)
{
	struct gemini_booking *booking = &gemini->booking;
	u64 released = READ_ONCE(gemini->giving.released);
	bool surplus = false;
	int nid;

	if (!gemini_giving_possible(gemini))
		return false;
	for_each_node_state(nid, N_MEMORY)
		surplus |= gemini_giving_surplus(gemini, nid);
	if (surplus)
		gemini_giving_kick(gemini);
	if (!surplus || booking->released != released)
		booking->taken = jiffies;
	booking->released = released;
	return time_before(jiffies, booking->taken + GIVING);
}

/*
 * Gives back what is not needed.  What the host gets goes there as long as it
 * @takes it, in an order of its own: as free blocks, ready ones would be the
 * first.
 */
static void trim(struct gemini *gemini, int nid, bool takes)
{
	unsigned long timeout =
		msecs_to_jiffies(gemini_timeout_guest_ms(gemini));
	u64 target = target_of(gemini, nid);
	unsigned long now = jiffies;
	enum gemini_stock stock;
	u64 expired = 0;
	u64 ready;

	if (takes && gemini_giving_active(gemini))
		return;
	if (gemini_hold_ready(gemini, nid) >= target ||
	    !gemini_asking_helps(gemini))
		/* Nothing becomes of them. */
		expired = gemini_hold_expire(gemini, nid, GEMINI_STOCK_IDLE,
					     now - UNUSED, U64_MAX);
	for (stock = GEMINI_STOCK_READY; stock < GEMINI_STOCKS; stock++) {
		bool made = gemini_stock_made(stock);

		ready = gemini_hold_ready(gemini, nid);
		if (ready <= target)
			break;
		if (made && takes)
			continue;
		expired += gemini_hold_expire(gemini, nid, stock,
					      now - (made ? min(UNUSED, timeout) :
						      timeout),
					      ready - target);
	}
	if (expired) {
		gemini->booking.expired += expired;
		trace_gemini_expire(gemini, nid, expired);
	}
}

/* How many blocks to have ready, whatever the demand of this moment. */
static u64 stock_between_demands(struct gemini *gemini)
{
	const struct gemini_booking *booking = &gemini->booking;
	u64 floor = READ_ONCE(booking->stock_floor);
	u64 active = READ_ONCE(booking->stock_active);
	struct gemini_sums sums;

	if (time_after_eq(jiffies, booking->demanded + LULL))
		return floor;
	gemini_map_sum(&gemini->map, &sums);
	active = min(active, sums.guest[VIRTIO_GEMINI_GUEST_HUGE] / HUGE_PER_READY);
	return max(floor, active);
}

/* How many huge pages were asked for lately, and so, how many to have ready. */
static void set_target(struct gemini *gemini)
{
	struct gemini_booking *booking = &gemini->booking;
	u64 demand = gemini_placement_demand(gemini);
	unsigned long passed = jiffies - booking->demand_time;
	u64 cap = READ_ONCE(booking->stock_cap);
	u64 target = 0;

	if (passed >= DEMAND_PERIOD) {
		u64 rate = (demand - booking->demand) * 256 * HZ / passed;
		unsigned long i;

		/* Seldom much more than a second passes. */
		for (i = passed; i >= HZ && booking->demand_rate; i -= HZ)
			booking->demand_rate =
				booking->demand_rate * DEMAND_DECAY / 256;
		booking->demand_rate -= booking->demand_rate *
					(256 - DEMAND_DECAY) * i / (256 * HZ);
		booking->demand_rate = max(booking->demand_rate, rate);
		if (booking->demand != demand)
			booking->demanded = jiffies;
		booking->demand = demand;
		booking->demand_time = jiffies;
	}
	if (!READ_ONCE(gemini->scarce) && !READ_ONCE(gemini->wanted)) {
		target = booking->demand_rate * LEAD_SECONDS / 256;
		target = min(max(target, stock_between_demands(gemini)), cap);
	}
	WRITE_ONCE(booking->target, target);
}

static bool allowed(struct gemini *gemini)
{
	return READ_ONCE(gemini->booking.enabled) &&
	       READ_ONCE(gemini->hints.synced) &&
	       gemini_placement_active(gemini) &&
	       gemini_isolation_active(gemini);
}

static void booking_work(struct work_struct *work)
{
	struct gemini *gemini = container_of(to_delayed_work(work),
					     struct gemini, booking.work);
	struct gemini_booking *booking = &gemini->booking;
	unsigned long delay = PERIOD_CALM;
	struct gemini_candidates *found = NULL;
	bool hungry = false, short_of = false;
	bool takes = host_takes(gemini);
	unsigned int open;
	int nid;

	set_target(gemini);
	open = gemini_asking_answers(gemini);
	/* Also for what is given back, which goes on without booking. */
	if (time_after(jiffies, booking->forgiven + FORGIVE)) {
		booking->forgiven = jiffies;
		gemini_map_forgive(&gemini->map);
	}
	if (!READ_ONCE(booking->enabled))
		goto out;
	if (!allowed(gemini)) {
		/* Whatever is held, nobody can use it. */
		WRITE_ONCE(booking->target, 0);
		for_each_node_state(nid, N_MEMORY)
			trim(gemini, nid, takes);
		goto out;
	}
	found = kmalloc(sizeof(*found), GFP_KERNEL | __GFP_NORETRY |
			__GFP_NOWARN);
	if (!found)
		goto out;
	for_each_node_state(nid, N_MEMORY) {
		trim(gemini, nid, takes);
		if (!gemini_booking_paused(gemini) &&
		    !READ_ONCE(gemini->wanted)) {
			gemini_move_find(gemini, nid);
			hungry |= fill(gemini, nid, found, open);
			hungry |= gemini_move_some(gemini, nid);
		}
		if (gemini_asking_allowed(gemini))
			hungry |= gemini_asking_held(gemini, nid);
		short_of |= need_on(gemini, nid);
	}
	/* To choose the cheapest, their used pages must be known. */
	WRITE_ONCE(gemini->census.count_all,
		   short_of && gemini_asking_helps(gemini));
	if (hungry)
		delay = PERIOD_HUNGRY;
	else if (open || booking->demand_rate >= 256)
		delay = PERIOD_ACTIVE;
	gemini_report_kick(gemini);
out:
	kfree(found);
	WRITE_ONCE(booking->calm, delay == PERIOD_CALM);
	gemini_giving_repay(gemini);
	queue_delayed_work(gemini->wq, &booking->work, delay);
}

/**
 * gemini_booking_kick() - look now
 * @gemini: the device
 */
void gemini_booking_kick(struct gemini *gemini)
{
	mod_delayed_work(gemini->wq, &gemini->booking.work, 0);
}

/**
 * gemini_booking_taken() - a ready block was taken
 * @gemini: the device
 *
 * Does not sleep.
 */
void gemini_booking_taken(struct gemini *gemini)
{
	struct gemini_booking *booking = &gemini->booking;

	/* Once for each rest, and not for a few of many. */
	if (READ_ONCE(booking->calm) &&
	    2 * gemini_hold_ready(gemini, NUMA_NO_NODE) <
		    READ_ONCE(booking->target) &&
	    xchg(&booking->calm, false))
		gemini_booking_kick(gemini);
}

/**
 * gemini_booking_pause() - somebody else needs the memory
 * @gemini: the device
 *
 * Nothing is booked for a while.  Does not sleep.
 */
void gemini_booking_pause(struct gemini *gemini)
{
	WRITE_ONCE(gemini->booking.paused_until, jiffies + PAUSE);
}

/**
 * gemini_booking_start() - begin, or go on
 * @gemini: the device
 */
void gemini_booking_start(struct gemini *gemini)
{
	struct gemini_booking *booking = &gemini->booking;

	booking->demand = gemini_placement_demand(gemini);
	booking->demand_time = jiffies;
	booking->credit_time = jiffies;
	booking->asked_until = jiffies;
	booking->asked_delay = 0;
	booking->taken = jiffies;
	/* The device tells it anew. */
	gemini_move_want(gemini, false);
	/* What was asked for of the device before its reset was not done. */
	gemini_map_forgive(&gemini->map);
	enable_delayed_work(&booking->work);
	gemini_booking_kick(gemini);
}

/**
 * gemini_booking_stop() - book nothing more
 * @gemini: the device
 *
 * What is held stays so.
 */
void gemini_booking_stop(struct gemini *gemini)
{
	disable_delayed_work_sync(&gemini->booking.work);
	gemini_asking_forget(gemini);
}

void gemini_booking_init(struct gemini *gemini)
{
	struct gemini_booking *booking = &gemini->booking;

	INIT_DELAYED_WORK(&booking->work, booking_work);
	disable_delayed_work(&booking->work);
	INIT_LIST_HEAD(&booking->asked);
	booking->enabled = true;
	booking->stock_floor = GEMINI_STOCK_FLOOR;
	booking->stock_active = GEMINI_STOCK_ACTIVE;
	booking->demanded = jiffies;
	booking->stock_cap = max_t(u64, GEMINI_STOCK_ACTIVE, totalram_pages() >>
				   (PMD_SHIFT - PAGE_SHIFT) >> 4);
	booking->evacuation_rate = GEMINI_EVACUATION_RATE;
	booking->paused_until = jiffies;
	booking->forgiven = jiffies;
}

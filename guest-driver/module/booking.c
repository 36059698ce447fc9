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
#include <linux/virtio_config.h>
#include <linux/vmstat.h>

#include "compat.h"
#include "gemini.h"
#include "trace.h"

/* Between two looks: while there is something to do, and while there is not. */
#define PERIOD_HUNGRY		(HZ / 20)
#define PERIOD_ACTIVE		(HZ / 10)
#define PERIOD_CALM		HZ
/* Blocks that one look considers, and map chunks that it walks for them. */
#define CANDIDATES		64U
#define WALK_CHUNKS		32U
/* Blocks that are worth emptying have no more pages in use than this share. */
#define EVACUATE_SHARE		2
/* The stock is to last so many seconds of the recent demand. */
#define LEAD_SECONDS		1
/* The demand is reckoned over this time at least. */
#define DEMAND_PERIOD		(HZ / 20)
/* What is left of a demand after a second without any, in 256ths. */
#define DEMAND_DECAY		128
/* A guest that asked for no huge page for so long is at rest. */
#define LULL			(60 * HZ)
/* After memory was short, or somebody wanted to have it offline. */
#define PAUSE			(10 * HZ)
/* After the host refused: from, and up to. */
#define REFUSED_MIN		(HZ / 2)
#define REFUSED_MAX		(60 * HZ)
/* What could not be had, or what the host left undone, gets another chance. */
#define FORGIVE			(30 * HZ)

/* What the stock does not need any more, and nobody took. */
#define UNUSED			(2 * HZ)
/* What is to be given back to the host goes there in this time, or not at all. */
#define GIVING			(5 * HZ)
/* A balloon that has not grown for so long has its size. */
#define BALLOON_QUIET		(5 * HZ)

/*
 * Free host-huge blocks that are held only if the stock needs them: those that
 * nobody came for, and those that the host made huge for a stock that may not
 * need them any more.
 */
#define STOCK_ONLY		(GEMINI_BLOCK_SPENT | GEMINI_BLOCK_MADE)

/* The order of kinds above; less is cheaper. */
enum cost {
	COST_FREE,			/* and host-huge */
	COST_SPENT,			/* likewise, but only for the stock */
	COST_EVACUATE,			/* plus the pages in use, host-huge */
	COST_FREE_SMALL = SZ_64K,	/* free, on base pages of the host */
	COST_FREE_ABSENT,		/* free, and on nothing */
	COST_EVACUATE_SMALL,		/* plus the pages in use, not host-huge */
	COST_NONE = INT_MAX,
};

struct candidate {
	u64 block;
	u32 cost;
	u16 used;
	u8 host;
};

struct candidates {
	struct candidate best[CANDIDATES];
	unsigned int count;
};

static bool can_renew(struct gemini *gemini)
{
	return virtio_has_feature(gemini->vdev, VIRTIO_GEMINI_F_RELEASE);
}

static bool can_prepare(struct gemini *gemini)
{
	return virtio_has_feature(gemini->vdev, VIRTIO_GEMINI_F_PREPARE);
}

/* May the host be asked for huge pages, in principle? */
static bool host_gives(struct gemini *gemini)
{
	return !READ_ONCE(gemini->scarce) && !READ_ONCE(gemini->wanted) &&
	       (can_renew(gemini) || can_prepare(gemini));
}

static u32 cost_of(struct gemini *gemini, const struct gemini_block *entry,
		   bool ask)
{
	bool huge = gemini_host_huge(entry->host);
	u32 most = (1U << gemini->block_order) / EVACUATE_SHARE;

	if (entry->flags & (GEMINI_BLOCK_HELD | GEMINI_BLOCK_PASSED) ||
	    !(huge || ask))
		return COST_NONE;
	if (entry->guest == VIRTIO_GEMINI_GUEST_FREE) {
		if (entry->host == VIRTIO_GEMINI_HOST_ABSENT)
			return COST_FREE_ABSENT;
		if (!huge)
			return COST_FREE_SMALL;
		return entry->flags & STOCK_ONLY ? COST_SPENT : COST_FREE;
	}
	if (entry->guest == VIRTIO_GEMINI_GUEST_BASE && entry->used &&
	    entry->used <= most)
		return entry->used + (huge ? COST_EVACUATE :
					     COST_EVACUATE_SMALL);
	return COST_NONE;
}

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

/* Keeps the cheapest, in order. */
static void consider(struct candidates *found, struct candidate new)
{
	unsigned int i = found->count;

	if (i == CANDIDATES && found->best[i - 1].cost <= new.cost)
		return;
	if (i < CANDIDATES)
		found->count++;
	else
		i--;
	for (; i && found->best[i - 1].cost > new.cost; i--)
		found->best[i] = found->best[i - 1];
	found->best[i] = new;
}

/* Looks at some chunks of the map, at all of it in turn. */
static void find(struct gemini *gemini, int nid, bool ask,
		 struct candidates *found)
{
	struct gemini_booking *booking = &gemini->booking;
	struct gemini_run run;
	u64 from = booking->next;
	u64 end = from + (u64)WALK_CHUNKS * GEMINI_CHUNK_BLOCKS;

	found->count = 0;
	while (gemini_map_next_run(&gemini->map, from, &run) &&
	       run.first < end) {
		u32 cost = cost_of(gemini, &run.block, ask);
		u64 i;

		from = run.first + run.count;
		for (i = 0; cost != COST_NONE && i < run.count; i++) {
			struct candidate new = {
				.block = run.first + i,
				.cost = cost,
				.used = run.block.used,
				.host = run.block.host,
			};

			if (found->count == CANDIDATES &&
			    found->best[CANDIDATES - 1].cost <= cost)
				break;
			if (gemini_booking_node(gemini, new.block) == nid)
				consider(found, new);
		}
	}
	booking->next = run.count ? from : 0;
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
			!(copy.flags & STOCK_ONLY));
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
		      host_gives(gemini) ? need_on(gemini, nid) : 0);
}

/*
 * Takes blocks as the allocator gives them, and keeps the wanted ones.  The
 * others go back only at the end, so that they do not come again.
 */
static u64 book_plain(struct gemini *gemini, int nid, u64 tries, u64 need)
{
	u64 unwanted[CANDIDATES];
	unsigned int count = 0;
	u64 kept = 0;
	u64 block;

	while (tries-- && count < CANDIDATES &&
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
static bool book_exact(struct gemini *gemini, const struct candidate *from)
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

static int submit(struct gemini *gemini, u16 type,
		  const struct gemini_range *ranges, u32 count)
{
	struct gemini_request *request;
	int ret;

	request = gemini_request_new(gemini, type, ranges, count);
	if (IS_ERR(request))
		return PTR_ERR(request);
	ret = gemini_request_submit(request);
	if (!ret) {
		/* Its answer tells whether to ask again. */
		list_add_tail(&request->asked, &gemini->booking.asked);
		return 0;
	}
	gemini_request_put(request);
	return ret;
}

/* The host said no, or did it in part: later again. */
static void refused(struct gemini *gemini, struct gemini_request *request)
{
	struct virtio_gemini_range *range = gemini_request_ranges(request);
	struct gemini_booking *booking = &gemini->booking;
	u64 block;
	u32 i, j;

	for (i = 0; i < request->nr_ranges; i++) {
		block = le64_to_cpu(range[i].first);
		for (j = 0; j < le32_to_cpu(range[i].count); j++)
			gemini_map_flag(&gemini->map, block + j, 0,
					GEMINI_BLOCK_ASKED);
	}
	booking->asked_delay = clamp(booking->asked_delay * 2,
				     (unsigned long)REFUSED_MIN,
				     (unsigned long)REFUSED_MAX);
	booking->asked_until = jiffies + booking->asked_delay;
}

/* Takes the answers that are there; returns the number of open requests. */
static unsigned int take_answers(struct gemini *gemini)
{
	struct gemini_booking *booking = &gemini->booking;
	struct gemini_request *request, *next;
	unsigned int open = 0;

	list_for_each_entry_safe(request, next, &booking->asked, asked) {
		if (!gemini_request_answered(request)) {
			open++;
			continue;
		}
		list_del(&request->asked);
		if (request->error)
			refused(gemini, request);
		else
			booking->asked_delay = 0;
		gemini_request_put(request);
	}
	return open;
}

static void forget_answers(struct gemini *gemini)
{
	struct gemini_request *request, *next;

	list_for_each_entry_safe(request, next, &gemini->booking.asked, asked) {
		list_del(&request->asked);
		gemini_request_put(request);
	}
}

static bool may_ask(struct gemini *gemini)
{
	struct gemini_booking *booking = &gemini->booking;

	return host_gives(gemini) &&
	       !time_before(jiffies, booking->asked_until);
}

/* Has held blocks made host-huge, without a copy where that is possible. */
static bool ask_for_held(struct gemini *gemini, int nid)
{
	struct gemini_booking *booking = &gemini->booking;
	struct gemini_range ranges[GEMINI_RELEASE_DEFAULT];
	u64 blocks[GEMINI_RELEASE_DEFAULT];
	bool renew = can_renew(gemini);
	unsigned int count, i;
	u32 max;
	int ret;

	max = min_t(u32, ARRAY_SIZE(blocks), READ_ONCE(gemini->release_max));
	count = gemini_map_ask(&gemini->map, nid, blocks, max);
	if (!count)
		return false;
	for (i = 0; i < count; i++)
		ranges[i] = (struct gemini_range) { blocks[i], 1 };
	ret = submit(gemini, renew ? VIRTIO_GEMINI_REQ_RENEW :
				     VIRTIO_GEMINI_REQ_PREPARE, ranges, count);
	if (ret) {
		for (i = 0; i < count; i++)
			gemini_map_flag(&gemini->map, blocks[i], 0,
					GEMINI_BLOCK_ASKED);
		return false;
	}
	if (renew)
		booking->renewed += count;
	else
		booking->prepared += count;
	return true;
}

#if IS_ENABLED(CONFIG_MEMORY_BALLOON) && IS_ENABLED(CONFIG_VM_EVENT_COUNTERS)
/*
 * Has no balloon grown of late?  Free blocks are not held while the host is asked
 * for huge pages, and what a balloon takes and drops meanwhile would come back
 * for nobody.  On a stack frame of its own, which is large.
 */
static noinline bool balloons_rest(struct gemini *gemini)
{
	struct gemini_booking *booking = &gemini->booking;
	unsigned long events[NR_VM_EVENT_ITEMS];

	all_vm_events(events);
	if (booking->inflated != events[BALLOON_INFLATE]) {
		booking->inflated = events[BALLOON_INFLATE];
		booking->inflated_time = jiffies;
	}
	return !booking->inflated ||
	       time_after(jiffies, booking->inflated_time + BALLOON_QUIET);
}
#else
static bool balloons_rest(struct gemini *gemini)
{
	return true;
}
#endif

/* Has free blocks made host-huge; a later look books them. */
static bool ask_for_free(struct gemini *gemini, const struct candidates *found,
			 u64 need)
{
	struct gemini_range ranges[GEMINI_RELEASE_DEFAULT];
	unsigned int count = 0;
	unsigned int i;

	for (i = 0; i < found->count && count < need &&
	     count < ARRAY_SIZE(ranges); i++)
		/* What somebody has begun to use by now would be copied. */
		if (found->best[i].cost == COST_FREE_ABSENT &&
		    gemini_census_free(gemini, found->best[i].block))
			ranges[count++] = (struct gemini_range) {
				found->best[i].block, 1
			};
	if (!count || !balloons_rest(gemini) ||
	    submit(gemini, VIRTIO_GEMINI_REQ_PREPARE, ranges, count))
		return false;
	for (i = 0; i < count; i++)
		gemini_map_flag(&gemini->map, ranges[i].first,
				GEMINI_BLOCK_MADE, 0);
	gemini->booking.prepared += count;
	return true;
}

/* Free blocks that the host backs, by their addresses; a later look renews them. */
static u64 book_small(struct gemini *gemini, const struct candidates *found,
		      u64 need)
{
	u64 got = 0;
	unsigned int i;

	for (i = 0; i < found->count && got < need; i++)
		if (found->best[i].cost == COST_FREE_SMALL &&
		    !gemini_booking_paused(gemini))
			got += book_exact(gemini, &found->best[i]);
	return got;
}

/* Type-1: they are held for their own sake. */
static u64 book_free(struct gemini *gemini, int nid,
		     const struct candidates *found, bool plain)
{
	u64 most = 0;
	u64 got = 0;
	unsigned int i;

	for (i = 0; i < found->count; i++)
		most += found->best[i].cost == COST_FREE;
	most = min(most, room(gemini, nid));
	if (most && plain)
		got = book_plain(gemini, nid, 2 * most, 0);
	for (i = 0; i < found->count && got < most && !gemini_booking_paused(gemini); i++)
		if (found->best[i].cost == COST_FREE)
			got += book_exact(gemini, &found->best[i]);
	return got;
}

/* Is there a use for one more block, where this is the cheapest? */
static bool lacks(struct gemini *gemini, int nid, const struct candidate *one)
{
	return need_on(gemini, nid) || (gemini_host_huge(one->host) &&
					gemini_move_need(gemini, nid));
}

/* For the stock, and for moves: as many of those up to @cost as it takes. */
static bool book_for_stock(struct gemini *gemini, int nid,
			   const struct candidates *found, u32 cost)
{
	bool progress = false;
	unsigned int i;

	for (i = 0; i < found->count; i++) {
		const struct candidate *one = &found->best[i];

		if (gemini_booking_paused(gemini) || !spare(gemini, nid) ||
		    !lacks(gemini, nid, one))
			break;
		if (one->cost > cost)
			break;
		if (one->cost == COST_SPENT) {
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

/* Books on a node what is to be had; returns whether it got on with it. */
static bool fill(struct gemini *gemini, int nid, struct candidates *found,
		 unsigned int open)
{
	bool ask = may_ask(gemini);
	bool small = false, absent = false;
	bool zeroed = zeroed_at_booking();
	bool progress;
	unsigned int i;
	u64 need;

	find(gemini, nid, host_gives(gemini), found);
	for (i = 0; i < found->count; i++) {
		small |= found->best[i].cost == COST_FREE_SMALL;
		absent |= found->best[i].cost == COST_FREE_ABSENT;
	}

	/*
	 * Whatever a plain allocation takes is written to.  Where it may not be
	 * what is looked for, only that is taken.
	 */
	progress = book_free(gemini, nid, found, !((small || absent) && zeroed));
	progress |= book_for_stock(gemini, nid, found, COST_SPENT);
	need = min(need_on(gemini, nid), spare(gemini, nid));
	if (ask && need && absent && zeroed && can_prepare(gemini)) {
		/* Without a copy, and without more memory of the host's. */
		if (small && can_renew(gemini) && book_small(gemini, found, need))
			return true;
		/* One such request at a time: the map has to follow. */
		if (!progress && !open)
			progress = ask_for_free(gemini, found, need);
		return progress;
	}
	if (ask && need && (small || absent))
		progress |= book_plain(gemini, nid, min_t(u64, need, CANDIDATES),
				       need);
	progress |= book_for_stock(gemini, nid, found,
				   ask ? COST_NONE : COST_FREE_SMALL);
	return progress;
}

/*
 * Gives back what is not needed.  What the host wants goes there, in an order of
 * its own: as free blocks, ready ones would be the first.
 */
static void trim(struct gemini *gemini, int nid)
{
	unsigned long timeout =
		msecs_to_jiffies(gemini_timeout_guest_ms(gemini));
	u64 target = target_of(gemini, nid);
	unsigned long now = jiffies;
	enum gemini_stock stock;
	u64 expired = 0;
	unsigned long unused = UNUSED;
	unsigned long made = UNUSED;
	u64 ready;

	/* They go to the host, unless it has stopped to take them. */
	if (gemini_giving_active(gemini)) {
		timeout += GIVING;
		unused += GIVING;
	}
	if (gemini_giving_surplus(gemini, nid)) {
		made += GIVING;
		gemini_giving_kick(gemini);
	}
	if (gemini_hold_ready(gemini, nid) >= target || !host_gives(gemini))
		/* Nothing becomes of them. */
		expired = gemini_hold_expire(gemini, nid, GEMINI_STOCK_IDLE,
					     now - unused, U64_MAX);
	for (stock = GEMINI_STOCK_READY; stock < GEMINI_STOCKS; stock++) {
		ready = gemini_hold_ready(gemini, nid);
		if (ready <= target)
			break;
		expired += gemini_hold_expire(gemini, nid, stock,
					      now - (gemini_stock_made(stock) ?
						     min(made, timeout) :
						     timeout),
					      ready - target);
	}
	if (expired) {
		gemini->booking.expired += expired;
		trace_gemini_expire(gemini, nid, expired);
	}
}

/* How many huge pages were asked for lately, and so, how many to have ready. */
static void set_target(struct gemini *gemini)
{
	struct gemini_booking *booking = &gemini->booking;
	u64 demand = gemini_placement_demand(gemini);
	unsigned long passed = jiffies - booking->demand_time;
	unsigned int floor = READ_ONCE(booking->stock_floor);
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
	if (time_before(jiffies, booking->demanded + LULL))
		floor = max(floor, READ_ONCE(booking->stock_active));
	if (!READ_ONCE(gemini->scarce) && !READ_ONCE(gemini->wanted)) {
		target = booking->demand_rate * LEAD_SECONDS / 256;
		target = min(max_t(u64, target, floor), cap);
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
	struct candidates *found = NULL;
	bool hungry = false, short_of = false;
	unsigned int open;
	int nid;

	set_target(gemini);
	open = take_answers(gemini);
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
			trim(gemini, nid);
		goto out;
	}
	found = kmalloc(sizeof(*found), GFP_KERNEL | __GFP_NORETRY |
			__GFP_NOWARN);
	if (!found)
		goto out;
	for_each_node_state(nid, N_MEMORY) {
		trim(gemini, nid);
		if (!gemini_booking_paused(gemini) &&
		    !READ_ONCE(gemini->wanted)) {
			gemini_move_find(gemini, nid);
			hungry |= fill(gemini, nid, found, open);
			hungry |= gemini_move_some(gemini, nid);
		}
		if (may_ask(gemini))
			hungry |= ask_for_held(gemini, nid);
		short_of |= need_on(gemini, nid);
	}
	/* To choose the cheapest, their used pages must be known. */
	WRITE_ONCE(gemini->census.count_all, short_of && host_gives(gemini));
	if (hungry)
		delay = PERIOD_HUNGRY;
	else if (open || booking->demand_rate >= 256)
		delay = PERIOD_ACTIVE;
	gemini_report_kick(gemini);
out:
	kfree(found);
	WRITE_ONCE(booking->calm, delay == PERIOD_CALM);
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
	forget_answers(gemini);
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

// SPDX-License-Identifier: GPL-2.0
/*
 * Giving back: what is free in the guest and costs the host memory is held,
 * released, and returned to the allocator.
 *
 * On the host's wish, as many blocks as it wants, everything of one kind before
 * anything of the next:
 *   1. held blocks that are of no use: the host has base pages there;
 *   2. free blocks, first those that the host backs with a huge page;
 *   3. free base pages in sparsely used blocks, see trim.c;
 *   4. ready blocks, those first that have been so for longest.
 * What is aligned and in use stays, and no huge page is split but those that
 * are of little use.
 *
 * Without a wish, where the host asks for whatever is unused (RETURN): the same
 * blocks after nobody came for them within the booking timeout, but for the
 * stock.
 *
 * Always: what the host made huge for a stock that does not need it any more.
 * A burst of demand costs the host no memory for longer than it lasts.  And as
 * much as it has made huge where it had nothing, of what it has base pages under:
 * free blocks, and then the free base pages of sparsely used ones.  Most are what
 * a promotion has moved a program out of.
 *
 * What is on its way to the host is held, and bounded by release_max.  Nobody
 * in the reclaim path waits for it.
 */
#include <linux/minmax.h>
#include <linux/mm.h>
#include <linux/sort.h>
#include <linux/virtio_config.h>

#include "compat.h"
#include "gemini.h"

/* Blocks in one request. */
#define BATCH			GEMINI_RELEASE_DEFAULT
/* Map chunks that one look walks. */
#define WALK_CHUNKS		32U
/*
 * Between two looks: the host waits for it; something was found, but nobody
 * waits; there is nothing to be found.  Every block that is held at its address
 * disturbs all CPUs.
 */
#define PERIOD_WANTED		(HZ / 50)
#define PERIOD_FOUND		(HZ / 10)
#define PERIOD_IDLE		(HZ / 4)
/* The stock fills and empties; what was of no use for so long is none of it. */
#define UNUSED			(2 * HZ)

/* If fewer pages have become free, sparsely used blocks are not looked for. */
#define FREED_MIN		(SZ_4M >> PAGE_SHIFT)

/* Why the host gets free blocks. */
enum reason {
	WANTED,		/* it asks for so many */
	UNUSED_ANY,	/* it asks for whatever is unused */
	REPAID,		/* it has spent as much on the stock */
};

struct batch {
	u64 block[BATCH];
	unsigned int count;
	unsigned int max;
};

/**
 * gemini_giving_possible() - can blocks go to the host?
 * @gemini: the device
 *
 * Return: true if it takes some.
 */
bool gemini_giving_possible(struct gemini *gemini)
{
	return virtio_has_feature(gemini->vdev, VIRTIO_GEMINI_F_RELEASE) &&
	       READ_ONCE(gemini->hints.synced);
}

/**
 * gemini_giving_active() - do blocks that nobody came for go to the host?
 * @gemini: the device
 *
 * Return: true if they do, false if they go to the allocator alone.
 */
bool gemini_giving_active(struct gemini *gemini)
{
	return gemini_giving_possible(gemini) &&
	       (READ_ONCE(gemini->returning) || READ_ONCE(gemini->wanted));
}

/**
 * gemini_giving_owed() - what is left of the host's wish
 * @gemini: the device
 *
 * Return: number of blocks.
 */
u64 gemini_giving_owed(struct gemini *gemini)
{
	return atomic64_read(&gemini->giving.owed);
}

static u64 take_answers(struct gemini *gemini)
{
	struct gemini_giving *giving = &gemini->giving;
	struct gemini_request *request, *next;
	u64 open = 0;
	u32 i;

	list_for_each_entry_safe(request, next, &giving->asked, asked) {
		struct virtio_gemini_range *range =
			gemini_request_ranges(request);

		if (!gemini_request_answered(request)) {
			open++;
			continue;
		}
		list_del(&request->asked);
		if (!request->error)
			giving->released += request->blocks;
		for (i = 0; i < request->nr_ranges; i++) {
			u64 first = le64_to_cpu(range[i].first);
			u32 count = le32_to_cpu(range[i].count);

			/* The host will say so, but a look may come first. */
			if (!request->error)
				gemini_map_set_host(&gemini->map, first, count,
						    VIRTIO_GEMINI_HOST_ABSENT);
			/* Whatever came of it: the allocator takes any page. */
			gemini_hold_free_range(gemini, first, count);
		}
		gemini_request_put(request);
	}
	return open;
}

static void forget_answers(struct gemini *gemini)
{
	struct gemini_request *request, *next;

	list_for_each_entry_safe(request, next, &gemini->giving.asked, asked) {
		list_del(&request->asked);
		gemini_request_put(request);
	}
}

/* Held blocks that nobody came for; they stay held. */
static void pick_held(struct gemini *gemini, enum gemini_stock stock,
		      unsigned long age, bool spare, struct batch *batch)
{
	unsigned int most;
	int nid;

	for_each_node_state(nid, N_MEMORY) {
		most = batch->max - batch->count;
		if (spare)
			most = min_t(u64, most,
				     gemini_booking_spare(gemini, nid));
		batch->count += gemini_map_pick(&gemini->map, nid, stock,
						jiffies - age,
						batch->block + batch->count,
						most);
	}
}

/* Could a free block be held and released? */
static bool concerned(const struct gemini_block *entry, enum reason reason)
{
	return entry->host != VIRTIO_GEMINI_HOST_ABSENT &&
	       !(entry->flags & (GEMINI_BLOCK_HELD | GEMINI_BLOCK_PASSED)) &&
	       !(reason == REPAID && gemini_host_huge(entry->host));
}

/*
 * Is it to be?  Where nobody asks for it by number it has to be unused for some
 * time: two looks have to find it so, and the first marks it.
 */
static bool eligible(const struct gemini_block *entry, enum reason reason)
{
	return concerned(entry, reason) &&
	       (reason == WANTED || entry->flags & GEMINI_BLOCK_SPENT);
}

/* Is it to be by the next look? */
static bool ages(struct gemini *gemini, const struct gemini_block *entry,
		 enum reason reason)
{
	/* What booking holds for its own sake, it will. */
	return concerned(entry, reason) &&
	       !(reason == UNUSED_ANY && gemini_host_huge(entry->host) &&
		 gemini_booking_room(gemini));
}

/* Is the time over that free blocks have between two looks? */
static bool look_is_due(struct gemini *gemini, enum reason reason)
{
	struct gemini_giving *giving = &gemini->giving;
	unsigned long pause = reason == REPAID ? UNUSED :
		msecs_to_jiffies(gemini_timeout_hold_ms(gemini));

	if (reason == WANTED || giving->next)
		return true;
	if (time_before(jiffies, giving->looked + pause))
		return false;
	giving->looked = jiffies;
	return true;
}

/* Chooses free blocks from some chunks of the map, of all of it in turn. */
static void find_free(struct gemini *gemini, enum reason reason,
		      struct batch *found)
{
	struct gemini_giving *giving = &gemini->giving;
	u64 from = giving->next;
	u64 end = from + (u64)WALK_CHUNKS * GEMINI_CHUNK_BLOCKS;
	struct gemini_run run;
	u64 i;

	while (gemini_map_next_run(&gemini->map, from, &run) &&
	       run.first < end) {
		bool huge = gemini_host_huge(run.block.host);

		giving->next = run.first + run.count;
		from = giving->next;
		if (run.block.guest != VIRTIO_GEMINI_GUEST_FREE)
			continue;
		if (!eligible(&run.block, reason)) {
			if (!ages(gemini, &run.block, reason))
				continue;
			giving->free_seen = true;
			for (i = 0; i < run.count; i++)
				gemini_map_flag(&gemini->map, run.first + i,
						GEMINI_BLOCK_SPENT, 0);
			continue;
		}
		giving->free_seen = true;
		giving->huge_seen |= huge;
		if (reason == WANTED && !huge && giving->huge_first)
			continue;
		for (i = 0; i < run.count && found->count < found->max; i++)
			found->block[found->count++] = run.first + i;
		if (found->count == found->max) {
			giving->next = run.first + i;
			return;
		}
	}
	if (run.count) {
		giving->next = from;
		return;
	}
	/* All of it was seen: are there any, and any but those with base pages? */
	giving->next = 0;
	WRITE_ONCE(giving->free_left, giving->free_seen);
	giving->free_seen = false;
	giving->huge_first = giving->huge_seen;
	giving->huge_seen = false;
}

/* Takes blocks as the allocator gives them, and keeps those that cost memory. */
static void hold_plain(struct gemini *gemini, enum reason reason,
		       struct batch *batch, unsigned int most)
{
	u64 other[BATCH];
	unsigned int count = 0;
	unsigned int kept = 0;
	u64 block;

	while (kept < most && count < BATCH && batch->count < batch->max &&
	       !gemini_hold_any(gemini, NUMA_NO_NODE, &block)) {
		struct gemini_block copy = {};
		struct gemini_block *entry;

		spin_lock(&gemini->map.lock);
		entry = gemini_map_find(&gemini->map, block);
		if (entry)
			copy = *entry;
		spin_unlock(&gemini->map.lock);
		copy.flags &= ~GEMINI_BLOCK_HELD;
		if (eligible(&copy, reason) &&
		    (gemini_host_huge(copy.host) || reason != WANTED ||
		     !gemini->giving.huge_first)) {
			batch->block[batch->count++] = block;
			kept++;
		} else {
			other[count++] = block;
		}
		cond_resched();
	}
	/* Only now, or they would come again. */
	while (count)
		gemini_hold_free(gemini, other[--count]);
}

/* Holds free blocks; what cannot be had is left alone for a while. */
static void hold_free(struct gemini *gemini, enum reason reason,
		      struct batch *batch)
{
	struct batch found = { .max = batch->max - batch->count };
	unsigned int i;
	int ret;

	if (gemini_booking_paused(gemini) || !gemini_isolation_active(gemini)) {
		/* Nobody waits for what cannot be had for long. */
		WRITE_ONCE(gemini->giving.free_left, false);
		return;
	}
	if (!found.max || !look_is_due(gemini, reason))
		return;
	find_free(gemini, reason, &found);
	/*
	 * Where the allocator writes to what it hands out, the host would have
	 * to find memory for blocks that cost none yet.
	 */
	if (!want_init_on_alloc(GFP_TRANSHUGE_LIGHT) ||
	    !READ_ONCE(gemini->map.count[VIRTIO_GEMINI_GUEST_FREE]
					[VIRTIO_GEMINI_HOST_ABSENT]))
		hold_plain(gemini, reason, batch, found.count);
	for (i = 0; i < found.count && batch->count < batch->max &&
	     !gemini_booking_paused(gemini); i++) {
		/* The map may be older than that somebody began to use it. */
		ret = gemini_census_free(gemini, found.block[i]) ?
		      gemini_hold_exact(gemini, found.block[i]) : -EBUSY;
		if (!ret)
			batch->block[batch->count++] = found.block[i];
		else if (ret != -EEXIST)
			gemini_map_flag(&gemini->map, found.block[i],
					GEMINI_BLOCK_PASSED, 0);
	}
}

static int by_number(const void *a, const void *b)
{
	const u64 *x = a, *y = b;

	return *x < *y ? -1 : *x > *y;
}

static int release(struct gemini *gemini, struct batch *batch)
{
	struct gemini_range range[BATCH];
	struct gemini_request *request;
	unsigned int ranges = 0;
	unsigned int i;
	int ret;

	sort(batch->block, batch->count, sizeof(*batch->block), by_number, NULL);
	for (i = 0; i < batch->count; i++) {
		if (ranges && range[ranges - 1].first +
			      range[ranges - 1].count == batch->block[i])
			range[ranges - 1].count++;
		else
			range[ranges++] = (struct gemini_range) {
				batch->block[i], 1
			};
	}
	request = gemini_request_new(gemini, VIRTIO_GEMINI_REQ_RELEASE, range,
				     ranges);
	if (IS_ERR(request))
		return PTR_ERR(request);
	/*
	 * Between the answer and take_answers() they are held, and the host has
	 * nothing there: booking is not to ask for what is on its way out.
	 */
	for (i = 0; i < batch->count; i++)
		gemini_map_flag(&gemini->map, batch->block[i],
				GEMINI_BLOCK_ASKED, 0);
	ret = gemini_request_submit(request);
	if (ret)
		gemini_request_put(request);
	else
		list_add_tail(&request->asked, &gemini->giving.asked);
	return ret;
}

/* Ready blocks that nobody came for in this time, but for the stock. */
static void pick_ready(struct gemini *gemini, unsigned long age,
		       struct batch *batch)
{
	enum gemini_stock stock;

	for (stock = GEMINI_STOCK_READY; stock < GEMINI_STOCKS; stock++)
		pick_held(gemini, stock, age, true, batch);
}

/* Likewise, of those alone that the host made huge for the stock, and sooner. */
static void pick_surplus(struct gemini *gemini, struct batch *batch)
{
	pick_held(gemini, GEMINI_STOCK_MADE, UNUSED, true, batch);
	pick_held(gemini, GEMINI_STOCK_MADE_ZERO, UNUSED, true, batch);
}

/**
 * gemini_giving_surplus() - are there blocks that the host gets back?
 * @gemini: the device
 * @nid: their node
 *
 * Return: true if the host made ready blocks huge for a stock that does not
 * need them any more, or if it asks for what is unused and there is some.
 */
bool gemini_giving_surplus(struct gemini *gemini, int nid)
{
	unsigned long unused = jiffies - UNUSED;
	bool active = gemini_giving_active(gemini);
	enum gemini_stock stock;
	unsigned long before;
	u64 block;

	if (active && gemini_map_pick(&gemini->map, nid, GEMINI_STOCK_IDLE,
				      unused, &block, 1))
		return true;
	if (!gemini_giving_possible(gemini) ||
	    !gemini_booking_spare(gemini, nid))
		return false;
	before = jiffies - msecs_to_jiffies(gemini_timeout_hold_ms(gemini));
	for (stock = GEMINI_STOCK_READY; stock < GEMINI_STOCKS; stock++) {
		bool made = gemini_stock_made(stock);

		if ((made || active) &&
		    gemini_map_pick(&gemini->map, nid, stock,
				    made ? unused : before, &block, 1))
			return true;
	}
	return false;
}

/* The host got so many base pages: how many whole blocks is that? */
static u64 whole_blocks(struct gemini *gemini, u64 pages)
{
	struct gemini_giving *giving = &gemini->giving;
	u64 blocks;

	giving->odd_pages += pages;
	blocks = giving->odd_pages >> gemini->block_order;
	giving->odd_pages -= blocks << gemini->block_order;
	return blocks;
}

/*
 * Blocks that the host gets back for those it made huge where it had nothing, if
 * it has no wish.  While there is demand, programs use again what they were moved
 * out of.
 */
static u64 repayable(struct gemini *gemini)
{
	s64 spent = atomic64_read(&gemini->giving.spent);

	return spent > 0 && READ_ONCE(gemini->booking.calm) &&
	       !READ_ONCE(gemini->wanted) && !READ_ONCE(gemini->returning) ?
		       spent : 0;
}

/*
 * May there be sparsely used blocks to be trimmed?  Where none were left, there
 * are none until more pages are free again.
 */
static bool sparse_left(const struct gemini_giving *giving)
{
	return global_zone_page_state(NR_FREE_PAGES) >=
	       READ_ONCE(giving->free_pages) + FREED_MIN;
}

/**
 * gemini_giving_seeks_sparse() - does it matter how much is used of every block?
 * @gemini: the device
 *
 * Return: true while sparsely used ones are looked for, for what was spent.
 */
bool gemini_giving_seeks_sparse(struct gemini *gemini)
{
	return repayable(gemini) && !READ_ONCE(gemini->giving.free_left) &&
	       sparse_left(&gemini->giving);
}

/**
 * gemini_giving_repay() - the host gets back what it has spent
 * @gemini: the device
 *
 * If there is something that it has base pages under.  Only booking's worker
 * calls it, whenever it has looked.
 */
void gemini_giving_repay(struct gemini *gemini)
{
	const u64 (*count)[GEMINI_HOST_STATES] = gemini->map.count;
	struct gemini_giving *giving = &gemini->giving;
	unsigned long free = global_zone_page_state(NR_FREE_PAGES);

	if (free < READ_ONCE(giving->free_pages))
		WRITE_ONCE(giving->free_pages, free);
	if (gemini_giving_possible(gemini) && repayable(gemini) &&
	    (sparse_left(giving) ||
	     READ_ONCE(count[VIRTIO_GEMINI_GUEST_FREE]
			    [VIRTIO_GEMINI_HOST_BASE])))
		gemini_giving_kick(gemini);
}

/**
 * gemini_giving_spent() - the host makes blocks huge where it has nothing
 * @gemini: the device
 * @blocks: how many
 */
void gemini_giving_spent(struct gemini *gemini, u64 blocks)
{
	if (!blocks)
		return;
	atomic64_add(blocks, &gemini->giving.spent);
	WRITE_ONCE(gemini->giving.free_left, true);
}

/* The host waits for it. */
static void pick_wanted(struct gemini *gemini, struct batch *batch)
{
	u64 pages;

	pick_held(gemini, GEMINI_STOCK_IDLE, 0, false, batch);
	hold_free(gemini, WANTED, batch);
	/* Not while others are left, which a whole look has to tell. */
	if (batch->count || READ_ONCE(gemini->giving.free_left))
		return;
	if (gemini_trim(gemini, VIRTIO_GEMINI_HOST_HUGE, GEMINI_TRIM_BLOCKS,
			&pages)) {
		u64 owed = gemini_giving_owed(gemini);
		u64 blocks = whole_blocks(gemini, pages);

		gemini->giving.trimming = true;
		/* A new wish may have come: at worst it gets less. */
		atomic64_set(&gemini->giving.owed, owed - min(owed, blocks));
	} else {
		/* However young: nobody else has any more. */
		pick_ready(gemini, 0, batch);
	}
}

/* For what the host has spent. */
static void pick_repaid(struct gemini *gemini, struct batch *batch)
{
	struct gemini_giving *giving = &gemini->giving;
	u64 most = repayable(gemini);
	u64 pages;

	if (!most)
		return;
	batch->max = min_t(u64, batch->max, most);
	hold_free(gemini, REPAID, batch);
	if (batch->count || !gemini_giving_seeks_sparse(gemini) ||
	    !gemini_census_counted(gemini) || gemini_booking_paused(gemini))
		return;
	if (gemini_trim(gemini, VIRTIO_GEMINI_HOST_BASE, most, &pages)) {
		giving->trimming = true;
		atomic64_sub(whole_blocks(gemini, pages), &giving->spent);
	} else {
		WRITE_ONCE(giving->free_pages,
			   global_zone_page_state(NR_FREE_PAGES));
	}
}

/* Nobody waits for it. What is held already costs nothing, so it comes first. */
static void pick_unused(struct gemini *gemini, struct batch *batch)
{
	unsigned long age = msecs_to_jiffies(gemini_timeout_hold_ms(gemini));

	pick_surplus(gemini, batch);
	if (batch->count)
		return;
	if (!READ_ONCE(gemini->returning)) {
		pick_repaid(gemini, batch);
		return;
	}
	pick_held(gemini, GEMINI_STOCK_IDLE, UNUSED, false, batch);
	pick_ready(gemini, age, batch);
	if (!batch->count)
		hold_free(gemini, UNUSED_ANY, batch);
}

/* One batch; returns the number of blocks in it. */
static unsigned int give(struct gemini *gemini)
{
	unsigned int max = READ_ONCE(gemini->release_max);
	u64 unanswered = READ_ONCE(gemini->release.blocks);
	u64 owed = gemini_giving_owed(gemini);
	struct batch batch = {};
	unsigned int i;

	/* One is made while the host answers another. */
	batch.max = clamp(max / 2, 1U, BATCH);
	if (unanswered + batch.max > max)
		return 0;
	if (owed)
		batch.max = min_t(u64, batch.max, owed);

	if (owed)
		pick_wanted(gemini, &batch);
	else
		pick_unused(gemini, &batch);
	if (!batch.count)
		return 0;
	if (release(gemini, &batch)) {
		/* A block was taken meanwhile, or the device goes away. */
		for (i = 0; i < batch.count; i++)
			gemini_hold_free(gemini, batch.block[i]);
		return 0;
	}
	if (owed)
		/* A new wish may have come: at worst it gets less. */
		atomic64_set(&gemini->giving.owed,
			     owed > batch.count ? owed - batch.count : 0);
	else
		atomic64_sub(batch.count, &gemini->giving.spent);
	return batch.count;
}

static void giving_work(struct work_struct *work)
{
	struct gemini *gemini = container_of(to_delayed_work(work),
					     struct gemini, giving.work);
	unsigned long delay = PERIOD_IDLE;
	unsigned int given = 0, now;
	u64 open;

	gemini->giving.trimming = false;
	open = take_answers(gemini);
	while (gemini_giving_possible(gemini) && (now = give(gemini)))
		given += now;
	if (given)
		gemini_report_kick(gemini);
	if (given || gemini->giving.trimming)
		delay = gemini_giving_owed(gemini) ? PERIOD_WANTED :
						     PERIOD_FOUND;
	if (open || given || gemini->giving.trimming ||
	    gemini_giving_active(gemini))
		queue_delayed_work(gemini->wq, &gemini->giving.work, delay);
}

/**
 * gemini_giving_kick() - look now: the host has a wish, or an answer came
 * @gemini: the device
 */
void gemini_giving_kick(struct gemini *gemini)
{
	mod_delayed_work(gemini->wq, &gemini->giving.work, 0);
}

/* A new wish: what there is has to be looked at first. */
static void giving_anew(struct gemini_giving *giving)
{
	WRITE_ONCE(giving->huge_first, true);
	WRITE_ONCE(giving->free_left, true);
}

/**
 * gemini_giving_want() - the host says what it wants
 * @gemini: the device
 * @blocks: blocks that it would like to have from now on
 * @unused: it would like to have whatever is unused
 */
void gemini_giving_want(struct gemini *gemini, u64 blocks, bool unused)
{
	struct gemini_giving *giving = &gemini->giving;

	if (blocks && !READ_ONCE(gemini->wanted))
		giving_anew(giving);
	atomic64_set(&giving->owed, min_t(u64, blocks, S64_MAX));
	WRITE_ONCE(gemini->wanted, blocks);
	WRITE_ONCE(gemini->returning, unused);
	if (blocks || unused)
		gemini_giving_kick(gemini);
}

/**
 * gemini_giving_start() - begin, or go on
 * @gemini: the device
 */
void gemini_giving_start(struct gemini *gemini)
{
	struct gemini_giving *giving = &gemini->giving;

	/* The device tells it anew. */
	atomic64_set(&giving->owed, 0);
	WRITE_ONCE(gemini->wanted, 0);
	WRITE_ONCE(gemini->returning, false);
	giving->next = 0;
	giving->looked = jiffies;
	enable_delayed_work(&giving->work);
}

/**
 * gemini_giving_stop() - give nothing more
 * @gemini: the device
 *
 * What is held stays so.
 */
void gemini_giving_stop(struct gemini *gemini)
{
	disable_delayed_work_sync(&gemini->giving.work);
	forget_answers(gemini);
}

void gemini_giving_init(struct gemini *gemini)
{
	struct gemini_giving *giving = &gemini->giving;

	INIT_DELAYED_WORK(&giving->work, giving_work);
	disable_delayed_work(&giving->work);
	INIT_LIST_HEAD(&giving->asked);
}

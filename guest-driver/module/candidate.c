// SPDX-License-Identifier: GPL-2.0
/*
 * Candidates: what it costs to have a block held, and the cheapest of all.
 */
#include "booking.h"

/* Map chunks that one look walks. */
#define WALK_CHUNKS		32U
/* Blocks that are worth emptying have no more pages in use than this share. */
#define EVACUATE_SHARE		2

static u32 cost_of(struct gemini *gemini, const struct gemini_block *entry,
		   bool ask)
{
	bool huge = gemini_host_huge(entry->host);
	u32 most = (1U << gemini->block_order) / EVACUATE_SHARE;

	if (entry->flags & (GEMINI_BLOCK_HELD | GEMINI_BLOCK_PASSED) ||
	    !(huge || ask))
		return GEMINI_COST_NONE;
	if (entry->guest == VIRTIO_GEMINI_GUEST_FREE) {
		if (entry->host == VIRTIO_GEMINI_HOST_ABSENT)
			return GEMINI_COST_FREE_ABSENT;
		if (!huge)
			return GEMINI_COST_FREE_SMALL;
		return entry->flags & GEMINI_STOCK_ONLY ? GEMINI_COST_SPENT :
							  GEMINI_COST_FREE;
	}
	if (entry->guest == VIRTIO_GEMINI_GUEST_BASE && entry->used &&
	    entry->used <= most)
		return entry->used + (huge ? GEMINI_COST_EVACUATE :
					     GEMINI_COST_EVACUATE_SMALL);
	return GEMINI_COST_NONE;
}

/*
 * Is @a the better one?  Of blocks that cost the host memory, the last: while it
 * makes them huge they stay free, and the allocator hands out what nobody has
 * touched since the boot from the first one on.
 */
static bool better(const struct gemini_candidate *a,
		   const struct gemini_candidate *b)
{
	if (a->cost != b->cost)
		return a->cost < b->cost;
	return a->cost == GEMINI_COST_FREE_ABSENT && a->block > b->block;
}

static bool fits(const struct gemini_candidates *found,
		 const struct gemini_candidate *new)
{
	return found->count < GEMINI_CANDIDATES ||
	       better(new, &found->best[GEMINI_CANDIDATES - 1]);
}

/* Keeps the best, in order; this one fits. */
static void consider(struct gemini_candidates *found,
		     const struct gemini_candidate *new)
{
	unsigned int i = found->count;

	if (i < GEMINI_CANDIDATES)
		found->count++;
	else
		i--;
	for (; i && better(new, &found->best[i - 1]); i--)
		found->best[i] = found->best[i - 1];
	found->best[i] = *new;
}

/**
 * gemini_candidates_find() - look at some chunks of the map, at all in turn
 * @gemini: the device
 * @nid: node of the blocks
 * @ask: also for those that the host has to be asked for
 * @found: where to
 */
void gemini_candidates_find(struct gemini *gemini, int nid, bool ask,
			    struct gemini_candidates *found)
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
		for (i = 0; cost != GEMINI_COST_NONE && i < run.count; i++) {
			struct gemini_candidate new = {
				.block = run.first + i,
				.cost = cost,
				.used = run.block.used,
				.host = run.block.host,
			};

			if (cost == GEMINI_COST_FREE_ABSENT)
				new.block = from - 1 - i;
			/* If it does not, none that follows in this run does. */
			if (!fits(found, &new))
				break;
			if (gemini_booking_node(gemini, new.block) == nid)
				consider(found, &new);
		}
	}
	booking->next = run.count ? from : 0;
}

// SPDX-License-Identifier: GPL-2.0
/*
 * The map of blocks: what is known of every block, at both layers.
 *
 * Blocks live in page-sized chunks, made where there is memory.  Every change
 * of a guest state marks the block dirty, until a report takes it; sums over
 * pairs of states are kept with each change, so that reading them is cheap.
 *
 * Held blocks are on lists as well, by node and by what they are good for: who
 * needs one in a hurry takes the first.  Only the links are in their pages.
 */
#include <linux/jiffies.h>
#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/slab.h>

#include "block.h"

/* A count of used pages is told anew when it is off by this many. */
#define GEMINI_USED_STEP	32

/* Chunks that hints may make where the census has not found memory (yet). */
#define GEMINI_SPARE_CHUNKS	64

static unsigned long chunk_of(u64 block)
{
	return block / GEMINI_CHUNK_BLOCKS;
}

static unsigned int slot_of(u64 block)
{
	return block % GEMINI_CHUNK_BLOCKS;
}

int gemini_map_init(struct gemini_map *map)
{
	unsigned int stock, nid;

	BUILD_BUG_ON(sizeof(struct gemini_block) != 4);
	BUILD_BUG_ON(sizeof(struct gemini_chunk) != PAGE_SIZE);

	spin_lock_init(&map->lock);
	xa_init(&map->chunks);
	map->pools = kcalloc(nr_node_ids, sizeof(*map->pools), GFP_KERNEL);
	if (!map->pools)
		return -ENOMEM;
	for (nid = 0; nid < nr_node_ids; nid++)
		for (stock = 0; stock < GEMINI_STOCKS; stock++)
			INIT_LIST_HEAD(&map->pools[nid].list[stock]);
	return 0;
}

void gemini_map_destroy(struct gemini_map *map)
{
	struct gemini_chunk *chunk;
	unsigned long index;

	xa_for_each(&map->chunks, index, chunk)
		kfree(chunk);
	xa_destroy(&map->chunks);
	kfree(map->pools);
}

/**
 * gemini_map_grow() - see to it that a block has its place in the map
 * @map: the map
 * @block: any block number
 * @ram: the guest has memory there
 *
 * A host may know of memory before the guest does (it is about to be plugged),
 * so hints make chunks as well, but no more than twice as many as memory did:
 * the host must not be able to use the guest's memory up.
 *
 * Return: 0; -ERANGE if no memory can have this number; -ENOSPC if hints made
 * as many chunks as they may; -ENOMEM.
 */
int gemini_map_grow(struct gemini_map *map, u64 block, bool ram)
{
	unsigned long index = chunk_of(block);
	struct gemini_chunk *chunk;
	int ret;

	if (block >= map->limit)
		return -ERANGE;
	if (xa_load(&map->chunks, index))
		return 0;
	if (!ram && READ_ONCE(map->nr_chunks) >=
		    2 * READ_ONCE(map->nr_ram) + GEMINI_SPARE_CHUNKS)
		return -ENOSPC;

	chunk = kzalloc(sizeof(*chunk), GFP_KERNEL);
	if (!chunk)
		return -ENOMEM;
	ret = xa_insert(&map->chunks, index, chunk, GFP_KERNEL);
	if (ret) {
		kfree(chunk);
		return ret == -EBUSY ? 0 : ret;
	}

	spin_lock(&map->lock);
	map->count[VIRTIO_GEMINI_GUEST_UNKNOWN][VIRTIO_GEMINI_HOST_ABSENT] +=
		GEMINI_CHUNK_BLOCKS;
	map->nr_chunks++;
	if (ram)
		map->nr_ram++;
	spin_unlock(&map->lock);
	return 0;
}

/**
 * gemini_map_find() - the entry of a block
 * @map: the map
 * @block: any block number
 *
 * Only to be changed, and only to be relied on, under the map's lock.
 *
 * Return: the entry, or NULL if the block has no place in the map.
 */
struct gemini_block *gemini_map_find(struct gemini_map *map, u64 block)
{
	struct gemini_chunk *chunk = NULL;

	if (block < map->limit)
		chunk = xa_load(&map->chunks, chunk_of(block));
	return chunk ? &chunk->block[slot_of(block)] : NULL;
}

static void mark(struct gemini_map *map, u64 block, xa_mark_t mark)
{
	unsigned long index = chunk_of(block);

	lockdep_assert_held(&map->lock);
	if (!xa_get_mark(&map->chunks, index, mark))
		xa_set_mark(&map->chunks, index, mark);
}

static void set_dirty(struct gemini_map *map, u64 block,
		      struct gemini_block *entry)
{
	entry->flags |= GEMINI_BLOCK_DIRTY;
	mark(map, block, GEMINI_MARK_DIRTY);
}

static struct page *page_of(struct gemini_map *map, u64 block)
{
	return pfn_to_page(block << map->order);
}

static enum gemini_stock stock_of(const struct gemini_block *entry)
{
	bool zero = entry->flags & GEMINI_BLOCK_ZERO;

	if (!gemini_host_huge(entry->host))
		return GEMINI_STOCK_IDLE;
	if (entry->flags & GEMINI_BLOCK_MADE)
		return zero ? GEMINI_STOCK_MADE_ZERO : GEMINI_STOCK_MADE;
	return zero ? GEMINI_STOCK_KEPT_ZERO : GEMINI_STOCK_KEPT;
}

/* Is the block on one of the lists? */
static bool listed(const struct gemini_block *entry)
{
	return (entry->flags & (GEMINI_BLOCK_HELD | GEMINI_BLOCK_BUSY)) ==
	       GEMINI_BLOCK_HELD;
}

static void list_block(struct gemini_map *map, u64 block,
		       const struct gemini_block *entry, unsigned long since)
{
	enum gemini_stock stock = stock_of(entry);
	struct page *page = page_of(map, block);
	struct gemini_pool *pool = &map->pools[page_to_nid(page)];
	struct page *before;

	lockdep_assert_held(&map->lock);

	set_page_private(page, since);
	/* Few are younger than one that comes: those of the time that it took. */
	list_for_each_entry_reverse(before, &pool->list[stock], lru)
		if (!time_before(since, page_private(before)))
			break;
	list_add(&page->lru, &before->lru);
	WRITE_ONCE(pool->count[stock], pool->count[stock] + 1);
}

static void unlist_block(struct gemini_map *map, u64 block,
			 const struct gemini_block *entry)
{
	enum gemini_stock stock = stock_of(entry);
	struct page *page = page_of(map, block);
	struct gemini_pool *pool = &map->pools[page_to_nid(page)];

	lockdep_assert_held(&map->lock);

	list_del(&page->lru);
	set_page_private(page, 0);
	WRITE_ONCE(pool->count[stock], pool->count[stock] - 1);
}

/*
 * Every change of a host state or of a flag that may concern a held block, which
 * is for nothing where it comes to since @since.
 */
static void change_since(struct gemini_map *map, u64 block,
			 struct gemini_block *entry, u8 host, u8 flags,
			 unsigned long since)
{
	struct gemini_block after = *entry;

	after.host = host;
	after.flags = flags;
	if (listed(entry) != listed(&after) ||
	    (listed(entry) && stock_of(entry) != stock_of(&after))) {
		if (listed(entry))
			unlist_block(map, block, entry);
		*entry = after;
		if (listed(entry))
			list_block(map, block, entry, since);
	} else {
		*entry = after;
	}
}

static void change(struct gemini_map *map, u64 block,
		   struct gemini_block *entry, u8 host, u8 flags)
{
	change_since(map, block, entry, host, flags, jiffies);
}

/* Returns whether there is something to report. */
static bool set_guest(struct gemini_map *map, u64 block,
		      struct gemini_block *entry, u8 state, u16 used)
{
	lockdep_assert_held(&map->lock);

	if (used == GEMINI_USED_KEEP)
		used = entry->guest == state ? entry->used : 0;
	if (entry->guest == state) {
		if (!entry->used == !used &&
		    abs((int)entry->used - used) < GEMINI_USED_STEP)
			return false;
	} else {
		map->count[entry->guest][entry->host]--;
		map->count[state][entry->host]++;
		entry->guest = state;
		if (state != VIRTIO_GEMINI_GUEST_FREE &&
		    state != VIRTIO_GEMINI_GUEST_BOOKED)
			entry->flags &= ~(GEMINI_BLOCK_PASSED |
					  GEMINI_BLOCK_SPENT |
					  GEMINI_BLOCK_MADE);
	}
	entry->used = used;
	set_dirty(map, block, entry);
	return true;
}

/**
 * gemini_map_see() - enter what the census saw
 * @map: the map
 * @first: the first block
 * @seen: what was seen of it and of those that follow
 * @count: number of blocks, all of them in one chunk
 *
 * Held blocks stay as they are: the census saw the driver's own pages.
 *
 * Return: number of blocks that changed.
 */
unsigned int gemini_map_see(struct gemini_map *map, u64 first,
			    const struct gemini_seen *seen, unsigned int count)
{
	struct gemini_block *entry;
	unsigned int changed = 0;
	unsigned int i;

	spin_lock(&map->lock);
	entry = gemini_map_find(map, first);
	for (i = 0; entry && i < count; i++, entry++) {
		if (entry->flags & GEMINI_BLOCK_HELD)
			continue;
		changed += set_guest(map, first + i, entry, seen[i].guest,
				     seen[i].used);
	}
	spin_unlock(&map->lock);
	return changed;
}

/**
 * gemini_map_heat() - enter how hot huge pages are
 * @map: the map
 * @heat_of: tells how hot a block is, from 0 to its number of pages; does not
 *	sleep
 * @heat: passed to it
 */
void gemini_map_heat(struct gemini_map *map,
		     u16 (*heat_of)(const struct gemini_heat *heat, u64 block),
		     const struct gemini_heat *heat)
{
	struct gemini_chunk *chunk;
	unsigned long index;

	xa_for_each(&map->chunks, index, chunk) {
		u64 block = (u64)index * GEMINI_CHUNK_BLOCKS;
		unsigned int i;

		spin_lock(&map->lock);
		for (i = 0; i < GEMINI_CHUNK_BLOCKS; i++, block++) {
			struct gemini_block *entry = &chunk->block[i];

			if (entry->guest == VIRTIO_GEMINI_GUEST_HUGE)
				set_guest(map, block, entry, entry->guest,
					  heat_of(heat, block));
		}
		spin_unlock(&map->lock);
		cond_resched();
	}
}

/* Does @what to each block of the range that has a place in the map. */
static void each_block(struct gemini_map *map, u64 first, u64 count,
		       void (*what)(struct gemini_map *map, u64 block,
				    struct gemini_block *entry, u8 arg),
		       u8 arg)
{
	struct gemini_chunk *chunk;
	unsigned long index;
	u64 end;

	if (!count || first >= map->limit)
		return;
	end = first + min(count, map->limit - first);

	xa_for_each_range(&map->chunks, index, chunk, chunk_of(first),
			  chunk_of(end - 1)) {
		u64 start = (u64)index * GEMINI_CHUNK_BLOCKS;
		u64 from = max(start, first);
		u64 to = min(start + GEMINI_CHUNK_BLOCKS, end);

		spin_lock(&map->lock);
		for (; from < to; from++)
			what(map, from, &chunk->block[from - start], arg);
		spin_unlock(&map->lock);
		cond_resched();
	}
}

static void set_host(struct gemini_map *map, u64 block,
		     struct gemini_block *entry, u8 state)
{
	u8 flags = entry->flags;

	lockdep_assert_held(&map->lock);

	map->count[entry->guest][entry->host]--;
	map->count[entry->guest][state]++;
	if (gemini_host_huge(state))
		flags &= ~GEMINI_BLOCK_ASKED;
	change(map, block, entry, state, flags);
}

/**
 * gemini_map_set_host() - enter what the host said
 * @map: the map
 * @first: the first block
 * @count: number of blocks; those without a place in the map are passed over
 * @state: VIRTIO_GEMINI_HOST_*, checked by the caller
 */
void gemini_map_set_host(struct gemini_map *map, u64 first, u64 count, u8 state)
{
	each_block(map, first, count, set_host, state);
}

/**
 * gemini_map_forget_host() - a full host state begins
 * @map: the map
 */
void gemini_map_forget_host(struct gemini_map *map)
{
	gemini_map_set_host(map, 0, map->limit, VIRTIO_GEMINI_HOST_ABSENT);
}

static void redirty(struct gemini_map *map, u64 block,
		    struct gemini_block *entry, u8 unknown)
{
	if (unknown || entry->guest != VIRTIO_GEMINI_GUEST_UNKNOWN)
		set_dirty(map, block, entry);
	else
		entry->flags &= ~GEMINI_BLOCK_DIRTY;
}

/**
 * gemini_map_redirty() - these blocks are to be reported again
 * @map: the map
 * @first: the first block
 * @count: number of blocks; U64_MAX with @first 0 for a full state, which
 *	leaves out what is unknown
 */
void gemini_map_redirty(struct gemini_map *map, u64 first, u64 count)
{
	each_block(map, first, count, redirty, count != U64_MAX);
}

/**
 * gemini_map_dirty() - is there anything to report?
 * @map: the map
 *
 * Return: false if surely not.
 */
bool gemini_map_dirty(struct gemini_map *map)
{
	return xa_marked(&map->chunks, GEMINI_MARK_DIRTY);
}

/* Would @block be right behind @record, and in the same state? */
static bool continues(const struct virtio_gemini_record *record, u64 block,
		      const struct gemini_block *entry)
{
	return record->state == entry->guest &&
	       le32_to_cpu(record->used) == entry->used &&
	       le64_to_cpu(record->first) + le32_to_cpu(record->count) == block;
}

/* Takes the dirty blocks of one chunk; false if @records has no room left. */
static bool take_chunk(struct gemini_map *map, unsigned long index,
		       struct gemini_chunk *chunk,
		       struct virtio_gemini_record *records, unsigned int max,
		       unsigned int *taken)
{
	u64 start = (u64)index * GEMINI_CHUNK_BLOCKS;
	unsigned int i;

	lockdep_assert_held(&map->lock);

	for (i = 0; i < GEMINI_CHUNK_BLOCKS; i++) {
		struct gemini_block *entry = &chunk->block[i];
		struct virtio_gemini_record *last;

		if (!(entry->flags & GEMINI_BLOCK_DIRTY))
			continue;
		last = *taken ? &records[*taken - 1] : NULL;
		if (!last || !continues(last, start + i, entry)) {
			if (*taken == max)
				return false;
			last = &records[(*taken)++];
			*last = (struct virtio_gemini_record) {
				.first = cpu_to_le64(start + i),
				.used = cpu_to_le32(entry->used),
				.state = entry->guest,
			};
		}
		le32_add_cpu(&last->count, 1);
		entry->flags &= ~GEMINI_BLOCK_DIRTY;
	}
	xa_clear_mark(&map->chunks, index, GEMINI_MARK_DIRTY);
	return true;
}

/**
 * gemini_map_take_dirty() - fill a report
 * @map: the map
 * @records: where to
 * @max: room, in records
 *
 * What is taken counts as told: a caller that cannot send it gives it back
 * with gemini_map_redirty().
 *
 * Return: number of records.
 */
unsigned int gemini_map_take_dirty(struct gemini_map *map,
				   struct virtio_gemini_record *records,
				   unsigned int max)
{
	struct gemini_chunk *chunk;
	unsigned int taken = 0;
	unsigned long index;
	bool room = true;

	xa_for_each_marked(&map->chunks, index, chunk, GEMINI_MARK_DIRTY) {
		spin_lock(&map->lock);
		room = take_chunk(map, index, chunk, records, max, &taken);
		spin_unlock(&map->lock);
		if (!room)
			break;
		cond_resched();
	}
	return taken;
}

/**
 * gemini_map_hold() - a block's pages are the driver's now
 * @map: the map
 * @block: the block
 * @zero: they are known to be zero
 * @since: nobody has needed them since this time, in jiffies
 *
 * Return: 0; -ENODEV if nothing may be held any more; -ERANGE if the block has
 * no place in the map.  On failure the pages are still the caller's.
 */
int gemini_map_hold(struct gemini_map *map, u64 block, bool zero,
		    unsigned long since)
{
	struct gemini_block *entry;
	int ret = 0;

	spin_lock(&map->lock);
	entry = gemini_map_find(map, block);
	if (map->closed) {
		ret = -ENODEV;
	} else if (!entry || WARN_ON_ONCE(entry->flags & GEMINI_BLOCK_HELD)) {
		ret = -ERANGE;
	} else {
		set_guest(map, block, entry, VIRTIO_GEMINI_GUEST_BOOKED, 0);
		change_since(map, block, entry, entry->host,
			     entry->flags | GEMINI_BLOCK_HELD |
			     (zero ? GEMINI_BLOCK_ZERO : 0), since);
		map->held++;
	}
	spin_unlock(&map->lock);
	return ret;
}

/* The block's pages are @state from here on. */
static void unhold(struct gemini_map *map, u64 block,
		   struct gemini_block *entry, u8 state)
{
	lockdep_assert_held(&map->lock);

	change(map, block, entry, entry->host,
	       entry->flags & ~(GEMINI_BLOCK_HELD | GEMINI_BLOCK_ZERO |
				GEMINI_BLOCK_ASKED));
	map->held--;
	set_guest(map, block, entry, state, 0);
}

/**
 * gemini_map_unhold() - a block is about to be freed
 * @map: the map
 * @block: the block
 *
 * Return: 0, and the caller frees the pages; -ENOENT if the block is not held;
 * -EBUSY if it must stay so for now.
 */
int gemini_map_unhold(struct gemini_map *map, u64 block)
{
	struct gemini_block *entry;
	int ret = 0;

	spin_lock(&map->lock);
	entry = gemini_map_find(map, block);
	if (!entry || !(entry->flags & GEMINI_BLOCK_HELD))
		ret = -ENOENT;
	else if (entry->flags & GEMINI_BLOCK_BUSY)
		ret = -EBUSY;
	else
		unhold(map, block, entry, VIRTIO_GEMINI_GUEST_FREE);
	spin_unlock(&map->lock);
	return ret;
}

static u64 block_of(struct gemini_map *map, struct page *page)
{
	return page_to_pfn(page) >> map->order;
}

/**
 * gemini_map_unhold_any() - the least useful block is about to be freed
 * @map: the map
 * @block: which one
 *
 * Does not sleep: it is called to free memory.
 *
 * Return: false if no held block can be freed now.
 */
bool gemini_map_unhold_any(struct gemini_map *map, u64 *block)
{
	unsigned int stock, nid;
	struct page *page;

	spin_lock(&map->lock);
	for (stock = 0; stock < GEMINI_STOCKS; stock++) {
		for (nid = 0; nid < nr_node_ids; nid++) {
			page = list_first_entry_or_null(&map->pools[nid].list[stock],
							struct page, lru);
			if (!page)
				continue;
			*block = block_of(map, page);
			unhold(map, *block, gemini_map_find(map, *block),
			       VIRTIO_GEMINI_GUEST_FREE);
			spin_unlock(&map->lock);
			return true;
		}
	}
	spin_unlock(&map->lock);
	return false;
}

/* The first of a node's stock that has been there since before then. */
static struct page *oldest(struct gemini_map *map, int nid,
			   enum gemini_stock stock, unsigned long before)
{
	struct page *page;

	lockdep_assert_held(&map->lock);

	page = list_first_entry_or_null(&map->pools[nid].list[stock],
					struct page, lru);
	return page && time_before(page_private(page), before) ? page : NULL;
}

/**
 * gemini_map_unhold_old() - a block that nobody came for is about to be freed
 * @map: the map
 * @nid: its node
 * @stock: its list
 * @before: it has been there since before this time, in jiffies
 * @block: which one
 *
 * Return: false if there is none.
 */
bool gemini_map_unhold_old(struct gemini_map *map, int nid,
			   enum gemini_stock stock, unsigned long before,
			   u64 *block)
{
	struct gemini_block *entry;
	struct page *page;

	spin_lock(&map->lock);
	page = oldest(map, nid, stock, before);
	if (page) {
		*block = block_of(map, page);
		entry = gemini_map_find(map, *block);
		unhold(map, *block, entry, VIRTIO_GEMINI_GUEST_FREE);
		if (stock != GEMINI_STOCK_IDLE)
			entry->flags |= GEMINI_BLOCK_SPENT;
	}
	spin_unlock(&map->lock);
	return page;
}

/**
 * gemini_map_pick() - choose held blocks that nobody came for
 * @map: the map
 * @nid: their node
 * @stock: their list
 * @before: they have been there since before this time, in jiffies
 * @blocks: where to, the oldest one first
 * @max: room, in blocks
 *
 * They stay as they are, and may be taken by somebody else at once.  Where the
 * host has no memory there is nothing to be had from a block.
 *
 * Return: number of blocks.
 */
unsigned int gemini_map_pick(struct gemini_map *map, int nid,
			     enum gemini_stock stock, unsigned long before,
			     u64 *blocks, unsigned int max)
{
	const struct gemini_block *entry;
	unsigned int count = 0;
	struct page *page;

	spin_lock(&map->lock);
	list_for_each_entry(page, &map->pools[nid].list[stock], lru) {
		if (count == max || time_after(page_private(page), before))
			break;
		entry = gemini_map_find(map, block_of(map, page));
		if (entry->host != VIRTIO_GEMINI_HOST_ABSENT)
			blocks[count++] = block_of(map, page);
	}
	spin_unlock(&map->lock);
	return count;
}

/*
 * Which ready block goes first, by whether it is to read as zero: to write
 * zeroes takes longer than anything else here.
 */
static const enum gemini_stock order[][GEMINI_STOCKS - GEMINI_STOCK_READY] = {
	[false] = { GEMINI_STOCK_KEPT, GEMINI_STOCK_MADE,
		    GEMINI_STOCK_KEPT_ZERO, GEMINI_STOCK_MADE_ZERO },
	[true] = { GEMINI_STOCK_KEPT_ZERO, GEMINI_STOCK_MADE_ZERO,
		   GEMINI_STOCK_KEPT, GEMINI_STOCK_MADE },
};

/* A ready block, if possible one that reads as zero, or just not such a one. */
static struct page *ready_page(struct gemini_map *map, int nid, bool zero,
			       bool *clean)
{
	struct gemini_pool *pool = &map->pools[nid];
	enum gemini_stock stock;
	unsigned int i;

	lockdep_assert_held(&map->lock);

	for (i = 0; i < ARRAY_SIZE(order[zero]); i++) {
		stock = order[zero][i];
		if (list_empty(&pool->list[stock]))
			continue;
		*clean = stock == GEMINI_STOCK_KEPT_ZERO ||
			 stock == GEMINI_STOCK_MADE_ZERO;
		/* The last one, so that a stock that is too large grows old. */
		return list_last_entry(&pool->list[stock], struct page, lru);
	}
	return NULL;
}

/**
 * gemini_map_take() - a ready block is about to become a huge page
 * @map: the map
 * @nid: its node
 * @zero: one that reads as zero is wanted
 * @block: which one
 * @clean: it does read as zero
 *
 * Return: false if there is none.
 */
bool gemini_map_take(struct gemini_map *map, int nid, bool zero, u64 *block,
		     bool *clean)
{
	struct page *page;

	spin_lock(&map->lock);
	page = ready_page(map, nid, zero, clean);
	if (page) {
		*block = block_of(map, page);
		unhold(map, *block, gemini_map_find(map, *block),
		       VIRTIO_GEMINI_GUEST_HUGE);
	}
	spin_unlock(&map->lock);
	return page;
}

static void set_busy(struct gemini_map *map, u64 block)
{
	struct gemini_block *entry = gemini_map_find(map, block);

	lockdep_assert_held(&map->lock);

	change(map, block, entry, entry->host,
	       entry->flags | GEMINI_BLOCK_BUSY);
	map->busy++;
}

/**
 * gemini_map_reserve() - keep a ready block for what is about to need it
 * @map: the map
 * @nid: its node
 * @block: which one; it is busy now
 * @clean: it reads as zero
 *
 * Return: false if there is none.
 */
bool gemini_map_reserve(struct gemini_map *map, int nid, u64 *block,
			bool *clean)
{
	struct page *page;

	spin_lock(&map->lock);
	page = ready_page(map, nid, false, clean);
	if (page) {
		*block = block_of(map, page);
		set_busy(map, *block);
	}
	spin_unlock(&map->lock);
	return page;
}

/**
 * gemini_map_give() - a block that was made busy is the driver's no more
 * @map: the map
 * @block: the block
 * @used: it is a huge page now; otherwise it is free
 */
void gemini_map_give(struct gemini_map *map, u64 block, bool used)
{
	struct gemini_block *entry;

	spin_lock(&map->lock);
	entry = gemini_map_find(map, block);
	if (!WARN_ON_ONCE(!entry || !(entry->flags & GEMINI_BLOCK_BUSY))) {
		unhold(map, block, entry, used ? VIRTIO_GEMINI_GUEST_HUGE :
						 VIRTIO_GEMINI_GUEST_FREE);
		entry->flags &= ~GEMINI_BLOCK_BUSY;
		/* Who wants it back has to ask its new owner. */
		entry->recalled = 0;
		map->busy--;
	}
	spin_unlock(&map->lock);
}

/**
 * gemini_map_stock() - how many blocks there are to be had
 * @map: the map
 * @nid: the node, or NUMA_NO_NODE for all
 * @stock: of which kind
 *
 * Return: number of blocks, which may be another at once.
 */
u64 gemini_map_stock(struct gemini_map *map, int nid, enum gemini_stock stock)
{
	unsigned int node;
	u64 count = 0;

	if (nid != NUMA_NO_NODE)
		return READ_ONCE(map->pools[nid].count[stock]);
	for (node = 0; node < nr_node_ids; node++)
		count += READ_ONCE(map->pools[node].count[stock]);
	return count;
}

/**
 * gemini_map_ask() - choose held blocks that the host is to make huge
 * @map: the map
 * @nid: their node
 * @blocks: where to, in no order
 * @max: room, in blocks
 *
 * Return: number of blocks; none of them was asked for before.
 */
unsigned int gemini_map_ask(struct gemini_map *map, int nid, u64 *blocks,
			    unsigned int max)
{
	struct gemini_block *entry;
	unsigned int count = 0;
	struct page *page;

	spin_lock(&map->lock);
	list_for_each_entry(page, &map->pools[nid].list[GEMINI_STOCK_IDLE],
			    lru) {
		if (count == max)
			break;
		entry = gemini_map_find(map, block_of(map, page));
		if (entry->flags & GEMINI_BLOCK_ASKED)
			continue;
		entry->flags |= GEMINI_BLOCK_ASKED | GEMINI_BLOCK_MADE;
		blocks[count++] = block_of(map, page);
	}
	spin_unlock(&map->lock);
	return count;
}

/**
 * gemini_map_flag() - note something about a block
 * @map: the map
 * @block: any block
 * @set: flags to set
 * @clear: flags to clear
 */
void gemini_map_flag(struct gemini_map *map, u64 block, u8 set, u8 clear)
{
	struct gemini_block *entry;

	spin_lock(&map->lock);
	entry = gemini_map_find(map, block);
	if (entry)
		change(map, block, entry, entry->host,
		       (entry->flags | set) & ~clear);
	spin_unlock(&map->lock);
}

static void forgive(struct gemini_map *map, u64 block,
		    struct gemini_block *entry, u8 unused)
{
	entry->flags &= ~(GEMINI_BLOCK_PASSED | GEMINI_BLOCK_ASKED);
}

/**
 * gemini_map_forgive() - every block gets another chance
 * @map: the map
 *
 * What was left alone is considered again, and what the host was asked for and
 * did not do may be asked for again.
 */
void gemini_map_forgive(struct gemini_map *map)
{
	each_block(map, 0, map->limit, forgive, 0);
}

static void forgive_move(struct gemini_map *map, u64 block,
			 struct gemini_block *entry, u8 unused)
{
	if (entry->guest == VIRTIO_GEMINI_GUEST_HUGE)
		entry->flags &= ~GEMINI_BLOCK_SPENT;
}

/**
 * gemini_map_forgive_moves() - every huge page may be moved again
 * @map: the map
 */
void gemini_map_forgive_moves(struct gemini_map *map)
{
	each_block(map, 0, map->limit, forgive_move, 0);
}

/**
 * gemini_map_busy() - keep held blocks from being freed
 * @map: the map
 * @first: the first block
 * @count: number of blocks, not 0
 *
 * What their contents are is open until gemini_map_idle() says it.
 *
 * Return: 0 if all of them were held and idle and are busy now; -ENOENT or
 * -EBUSY, and none of them was changed.
 */
int gemini_map_busy(struct gemini_map *map, u64 first, u64 count)
{
	struct gemini_block *entry;
	int ret = 0;
	u64 i;

	spin_lock(&map->lock);
	for (i = 0; i < count && !ret; i++) {
		entry = gemini_map_find(map, first + i);
		if (!entry || !(entry->flags & GEMINI_BLOCK_HELD))
			ret = -ENOENT;
		else if (entry->flags & GEMINI_BLOCK_BUSY)
			ret = -EBUSY;
	}
	for (i = 0; i < count && !ret; i++)
		set_busy(map, first + i);
	spin_unlock(&map->lock);
	return ret;
}

/**
 * gemini_map_idle() - busy blocks may be freed again
 * @map: the map
 * @first: the first block
 * @count: number of blocks, all of them made busy by the caller
 * @zero: every byte of them reads as zero now
 */
void gemini_map_idle(struct gemini_map *map, u64 first, u64 count, bool zero)
{
	u8 flags;
	u64 i;

	spin_lock(&map->lock);
	for (i = 0; i < count; i++) {
		struct gemini_block *entry = gemini_map_find(map, first + i);

		if (WARN_ON_ONCE(!entry ||
				 !(entry->flags & GEMINI_BLOCK_BUSY)))
			continue;
		flags = entry->flags & ~(GEMINI_BLOCK_BUSY | GEMINI_BLOCK_ZERO);
		if (zero)
			flags |= GEMINI_BLOCK_ZERO;
		change(map, first + i, entry, entry->host, flags);
		map->busy--;
	}
	spin_unlock(&map->lock);
}

/**
 * gemini_map_recall() - busy blocks are wanted back
 * @map: the map
 * @first: the first block
 * @count: number of blocks, of any kind
 *
 * Does not sleep.
 */
void gemini_map_recall(struct gemini_map *map, u64 first, u64 count)
{
	struct gemini_block *entry;
	u64 block;

	spin_lock(&map->lock);
	for (block = first; map->busy && block < first + count; block++) {
		entry = gemini_map_find(map, block);
		if (entry && entry->flags & GEMINI_BLOCK_BUSY)
			entry->recalled = 1;
	}
	spin_unlock(&map->lock);
}

/**
 * gemini_map_recalled() - is a block wanted back that was busy?
 * @map: the map
 * @block: any block
 *
 * Return: true, once for each time that it was recalled, and not while it is
 * busy.
 */
bool gemini_map_recalled(struct gemini_map *map, u64 block)
{
	struct gemini_block *entry;
	bool recalled = false;

	spin_lock(&map->lock);
	entry = gemini_map_find(map, block);
	if (entry && !(entry->flags & GEMINI_BLOCK_BUSY)) {
		recalled = entry->recalled;
		entry->recalled = 0;
	}
	spin_unlock(&map->lock);
	return recalled;
}

static bool same(const struct gemini_block *a, const struct gemini_block *b)
{
	const u8 shown = GEMINI_BLOCK_HELD | GEMINI_BLOCK_BUSY |
			 GEMINI_BLOCK_ZERO | GEMINI_BLOCK_PASSED |
			 GEMINI_BLOCK_SPENT;

	return a->guest == b->guest && a->host == b->host &&
	       a->used == b->used && (a->flags & shown) == (b->flags & shown);
}

/**
 * gemini_map_next_run() - walk over the map
 * @map: the map
 * @from: where to look from
 * @run: the next run of known blocks that are all alike
 *
 * Blocks that neither side knows anything of are passed over.  Runs are
 * consistent within one chunk.
 *
 * Return: false if there is nothing more.
 */
bool gemini_map_next_run(struct gemini_map *map, u64 from,
			 struct gemini_run *run)
{
	unsigned long index = chunk_of(from);
	static const struct gemini_block none;
	struct gemini_chunk *chunk;

	run->count = 0;
	for (chunk = xa_find(&map->chunks, &index, ULONG_MAX, XA_PRESENT); chunk;
	     chunk = xa_find_after(&map->chunks, &index, ULONG_MAX,
				   XA_PRESENT)) {
		u64 start = (u64)index * GEMINI_CHUNK_BLOCKS;
		unsigned int i = from > start ? from - start : 0;
		bool ended = false;

		spin_lock(&map->lock);
		for (; i < GEMINI_CHUNK_BLOCKS && !ended; i++) {
			const struct gemini_block *entry = &chunk->block[i];

			if (!run->count) {
				if (same(entry, &none))
					continue;
				run->first = start + i;
				run->block = *entry;
			} else if (run->first + run->count != start + i ||
				   !same(entry, &run->block)) {
				ended = true;
				continue;
			}
			run->count++;
		}
		spin_unlock(&map->lock);
		if (ended)
			break;
		cond_resched();
	}
	return run->count;
}

/**
 * gemini_map_sum() - read the sums
 * @map: the map
 * @sums: where to
 */
void gemini_map_sum(struct gemini_map *map, struct gemini_sums *sums)
{
	u8 guest, host;

	memset(sums, 0, sizeof(*sums));
	spin_lock(&map->lock);
	for (guest = 0; guest < GEMINI_GUEST_STATES; guest++) {
		for (host = 0; host < GEMINI_HOST_STATES; host++) {
			u64 count = map->count[guest][host];

			sums->guest[guest] += count;
			sums->host[host] += count;
			if (guest == VIRTIO_GEMINI_GUEST_HUGE &&
			    gemini_host_huge(host))
				sums->aligned += count;
			else if (guest == VIRTIO_GEMINI_GUEST_HUGE)
				sums->guest_only += count;
			else if (gemini_host_huge(host) &&
				 (guest == VIRTIO_GEMINI_GUEST_BASE ||
				  guest == VIRTIO_GEMINI_GUEST_BOOKED ||
				  guest == VIRTIO_GEMINI_GUEST_PINNED))
				sums->host_only += count;
			if (gemini_host_huge(host) &&
			    guest == VIRTIO_GEMINI_GUEST_BOOKED)
				sums->host_only_booked += count;
		}
	}
	sums->held = map->held;
	sums->busy = map->busy;
	spin_unlock(&map->lock);
}

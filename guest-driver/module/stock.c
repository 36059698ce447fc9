// SPDX-License-Identifier: GPL-2.0
/*
 * The stock: the blocks that the driver holds, as the map knows them.
 *
 * They are on lists, by node and by what they are good for: who needs one in a
 * hurry takes the first.  Only the links are in their pages.
 */
#include <linux/jiffies.h>
#include <linux/mm.h>

#include "block.h"

static struct page *page_of(struct gemini_map *map, u64 block)
{
	return pfn_to_page(block << map->order);
}

static u64 block_of(struct gemini_map *map, struct page *page)
{
	return page_to_pfn(page) >> map->order;
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

/**
 * gemini_map_change() - another host state, or other flags
 * @map: the map, with its lock
 * @block: the block
 * @entry: its entry
 * @host: VIRTIO_GEMINI_HOST_*
 * @flags: GEMINI_BLOCK_*
 * @since: since when a held block is for nothing where it comes to, in jiffies
 *
 * Every change that may concern a held block: it goes to the list that it
 * belongs to.
 */
void gemini_map_change(struct gemini_map *map, u64 block,
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
		gemini_map_set_guest(map, block, entry,
				     VIRTIO_GEMINI_GUEST_BOOKED, 0);
		gemini_map_change(map, block, entry, entry->host,
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

	gemini_map_change(map, block, entry, entry->host,
			  entry->flags & ~(GEMINI_BLOCK_HELD |
					   GEMINI_BLOCK_ZERO |
					   GEMINI_BLOCK_ASKED), jiffies);
	map->held--;
	gemini_map_set_guest(map, block, entry, state, 0);
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

	gemini_map_change(map, block, entry, entry->host,
			  entry->flags | GEMINI_BLOCK_BUSY, jiffies);
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
 * @absent: of those, the host has nothing under so many
 *
 * Return: number of blocks; none of them was asked for before.
 */
unsigned int gemini_map_ask(struct gemini_map *map, int nid, u64 *blocks,
			    unsigned int max, unsigned int *absent)
{
	struct gemini_block *entry;
	unsigned int count = 0;
	struct page *page;

	*absent = 0;
	spin_lock(&map->lock);
	list_for_each_entry(page, &map->pools[nid].list[GEMINI_STOCK_IDLE],
			    lru) {
		if (count == max)
			break;
		entry = gemini_map_find(map, block_of(map, page));
		if (entry->flags & GEMINI_BLOCK_ASKED)
			continue;
		entry->flags |= GEMINI_BLOCK_ASKED | GEMINI_BLOCK_MADE;
		*absent += entry->host == VIRTIO_GEMINI_HOST_ABSENT;
		blocks[count++] = block_of(map, page);
	}
	spin_unlock(&map->lock);
	return count;
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
		gemini_map_change(map, first + i, entry, entry->host, flags,
				  jiffies);
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

// SPDX-License-Identifier: GPL-2.0
/*
 * The map of blocks: what is known of every block, at both layers.
 *
 * Blocks live in page-sized chunks, made where there is memory.  Every change
 * of a guest state marks the block dirty, until a report takes it; sums over
 * pairs of states are kept with each change, so that reading them is cheap.
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

static bool unused(u8 guest)
{
	return guest == VIRTIO_GEMINI_GUEST_FREE ||
	       guest == VIRTIO_GEMINI_GUEST_BOOKED;
}

/**
 * gemini_map_set_guest() - another guest state, or more pages in use, or fewer
 * @map: the map, with its lock
 * @block: the block
 * @entry: its entry
 * @state: VIRTIO_GEMINI_GUEST_*
 * @used: base pages in use, or GEMINI_USED_KEEP
 *
 * Return: whether there is something to report.
 */
bool gemini_map_set_guest(struct gemini_map *map, u64 block,
			  struct gemini_block *entry, u8 state, u16 used)
{
	lockdep_assert_held(&map->lock);

	if (used == GEMINI_USED_KEEP)
		used = entry->guest == state ? entry->used : 0;
	if (entry->guest == state) {
		if (state == VIRTIO_GEMINI_GUEST_BASE &&
		    used > 1U << (map->order - 1))
			entry->flags &= ~GEMINI_BLOCK_SPENT;
		if (!entry->used == !used &&
		    abs((int)entry->used - used) < GEMINI_USED_STEP)
			return false;
	} else {
		map->count[entry->guest][entry->host]--;
		map->count[state][entry->host]++;
		if (!unused(entry->guest) || !unused(state))
			entry->flags &= ~(GEMINI_BLOCK_PASSED |
					  GEMINI_BLOCK_SPENT |
					  GEMINI_BLOCK_MADE);
		entry->guest = state;
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
		changed += gemini_map_set_guest(map, first + i, entry,
						seen[i].guest, seen[i].used);
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
				gemini_map_set_guest(map, block, entry,
						     entry->guest,
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
	gemini_map_change(map, block, entry, state, flags, jiffies);
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
		gemini_map_change(map, block, entry, entry->host,
				  (entry->flags | set) & ~clear, jiffies);
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

/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The map of blocks: what is known of every block, at both layers.
 *
 * Nothing here looks at a page or talks to the device.
 */
#ifndef _GEMINI_BLOCK_H
#define _GEMINI_BLOCK_H

#include <linux/list.h>
#include <linux/spinlock.h>
#include <linux/types.h>
#include <linux/xarray.h>

#include "uapi/virtio_gemini.h"

#define GEMINI_GUEST_STATES	(VIRTIO_GEMINI_GUEST_PINNED + 1)
#define GEMINI_HOST_STATES	(VIRTIO_GEMINI_HOST_HUGETLB + 1)

/* Changed since it was last put into a report. */
#define GEMINI_BLOCK_DIRTY	BIT(0)
/* The driver owns its pages. */
#define GEMINI_BLOCK_HELD	BIT(1)
/*
 * Held, and somebody works with its contents: a release or renew that is not
 * answered, or a test.  It can neither be freed nor given to anybody else.
 */
#define GEMINI_BLOCK_BUSY	BIT(2)
/* Held, and every byte reads as zero. */
#define GEMINI_BLOCK_ZERO	BIT(3)
/* Could not be held when it was tried; see gemini_map_forgive(). */
#define GEMINI_BLOCK_PASSED	BIT(4)
/*
 * Was held in vain: not worth being held for its own sake until it was used.
 * Of a huge page: could not be moved; see gemini_map_forgive_moves().  Of one in
 * base pages: was trimmed, and the host has nothing under its free pages until
 * more than half of it was used.
 */
#define GEMINI_BLOCK_SPENT	BIT(5)
/* Held, and the host was asked to make it huge, or is not to be asked. */
#define GEMINI_BLOCK_ASKED	BIT(6)
/* The host made it huge because the stock needed it. */
#define GEMINI_BLOCK_MADE	BIT(7)

/**
 * struct gemini_block - one block, in four bytes: 1 TiB takes 2 MiB
 * @used: guest base pages in use, as last counted; 0: not counted.  Of a huge
 *	page, how hot it is, see heat.c
 * @recalled: busy, and to be given back as soon as it is idle
 * @guest: VIRTIO_GEMINI_GUEST_*
 * @host: VIRTIO_GEMINI_HOST_*
 * @flags: GEMINI_BLOCK_*
 */
struct gemini_block {
	u16 used : 15;
	u16 recalled : 1;
	u8 guest : 4;
	u8 host : 4;
	u8 flags;
};

/* Blocks of one chunk, which fills one page. */
#define GEMINI_CHUNK_BLOCKS	(PAGE_SIZE / sizeof(struct gemini_block))

struct gemini_chunk {
	struct gemini_block block[GEMINI_CHUNK_BLOCKS];
};

/* Chunks that may have dirty blocks. */
#define GEMINI_MARK_DIRTY	XA_MARK_0

/*
 * What a held block is good for, worst first; busy ones are in none of these.
 * Ready ones are host-huge.  Those that were made so for the stock go back to
 * the host soon, and so wait behind those that somebody else had before.
 */
enum gemini_stock {
	GEMINI_STOCK_IDLE,	/* the host does not back it with a huge page */
	GEMINI_STOCK_MADE,	/* it made one for the stock */
	GEMINI_STOCK_MADE_ZERO,	/* likewise, and every byte reads as zero */
	GEMINI_STOCK_KEPT,	/* it had one anyway */
	GEMINI_STOCK_KEPT_ZERO,	/* likewise, and every byte reads as zero */
	GEMINI_STOCKS
};

#define GEMINI_STOCK_READY	GEMINI_STOCK_MADE

/* Did the host make it huge for the stock? */
static inline bool gemini_stock_made(enum gemini_stock stock)
{
	return stock == GEMINI_STOCK_MADE || stock == GEMINI_STOCK_MADE_ZERO;
}

/**
 * struct gemini_pool - the held blocks of one node
 * @list: their first pages, by lru, the oldest first; since when they are there
 *	for nothing is in the page's private word, in jiffies
 * @count: number of them
 */
struct gemini_pool {
	struct list_head list[GEMINI_STOCKS];
	u64 count[GEMINI_STOCKS];
};

/* Used pages that are not to be changed, in struct gemini_seen. */
#define GEMINI_USED_KEEP	U16_MAX

/**
 * struct gemini_map - the blocks of a device
 * @lock: protects the contents of all chunks, the marks, and what follows;
 *	taken in no interrupt and in the reclaim path, so nothing under it
 *	allocates or sleeps
 * @chunks: struct gemini_chunk by block number / GEMINI_CHUNK_BLOCKS; chunks
 *	are added at any time and go away only with the map
 * @pools: held blocks by node
 * @limit: the first block number that no memory can have
 * @order: log2 of the number of pages in a block
 * @count: number of blocks in each pair of states
 * @held: blocks that the driver owns
 * @busy: held blocks that are not to be freed
 * @closed: nothing may be held any more
 * @nr_chunks: number of chunks
 * @nr_ram: number of chunks that the census made, because memory is there
 */
struct gemini_map {
	spinlock_t lock;	/* see above */
	struct xarray chunks;
	struct gemini_pool *pools;
	u64 limit;
	unsigned int order;
	u64 count[GEMINI_GUEST_STATES][GEMINI_HOST_STATES];
	u64 held;
	u64 busy;
	bool closed;
	unsigned int nr_chunks;
	unsigned int nr_ram;
};

/* What is known of how hot blocks are; not the map's business. */
struct gemini_heat;

/* What the census saw of one block. */
struct gemini_seen {
	u16 used;
	u8 guest;
};

/* Blocks next to each other of which the same is known. */
struct gemini_run {
	u64 first;
	u64 count;
	struct gemini_block block;
};

/* Sums over the map, see docs: figures of merit. */
struct gemini_sums {
	u64 guest[GEMINI_GUEST_STATES];
	u64 host[GEMINI_HOST_STATES];
	u64 aligned;
	u64 guest_only;
	u64 host_only;
	u64 host_only_booked;
	u64 held;
	u64 busy;
};

int gemini_map_init(struct gemini_map *map);
void gemini_map_destroy(struct gemini_map *map);
int gemini_map_grow(struct gemini_map *map, u64 block, bool ram);
struct gemini_block *gemini_map_find(struct gemini_map *map, u64 block);
bool gemini_map_set_guest(struct gemini_map *map, u64 block,
			  struct gemini_block *entry, u8 state, u16 used);

void gemini_map_heat(struct gemini_map *map,
		     u16 (*heat_of)(const struct gemini_heat *heat, u64 block),
		     const struct gemini_heat *heat);
unsigned int gemini_map_see(struct gemini_map *map, u64 first,
			    const struct gemini_seen *seen, unsigned int count);
void gemini_map_set_host(struct gemini_map *map, u64 first, u64 count,
			 u8 state);
void gemini_map_forget_host(struct gemini_map *map);

void gemini_map_redirty(struct gemini_map *map, u64 first, u64 count);
bool gemini_map_dirty(struct gemini_map *map);
unsigned int gemini_map_take_dirty(struct gemini_map *map,
				   struct virtio_gemini_record *records,
				   unsigned int max);

void gemini_map_flag(struct gemini_map *map, u64 block, u8 set, u8 clear);
void gemini_map_forgive(struct gemini_map *map);
void gemini_map_forgive_moves(struct gemini_map *map);

bool gemini_map_next_run(struct gemini_map *map, u64 from,
			 struct gemini_run *run);
void gemini_map_sum(struct gemini_map *map, struct gemini_sums *sums);

/* stock.c */
void gemini_map_change(struct gemini_map *map, u64 block,
		       struct gemini_block *entry, u8 host, u8 flags,
		       unsigned long since);
int gemini_map_hold(struct gemini_map *map, u64 block, bool zero,
		    unsigned long since);
int gemini_map_unhold(struct gemini_map *map, u64 block);
bool gemini_map_unhold_any(struct gemini_map *map, u64 *block);
bool gemini_map_unhold_old(struct gemini_map *map, int nid,
			   enum gemini_stock stock, unsigned long before,
			   u64 *block);
unsigned int gemini_map_pick(struct gemini_map *map, int nid,
			     enum gemini_stock stock, unsigned long before,
			     u64 *blocks, unsigned int max);
bool gemini_map_take(struct gemini_map *map, int nid, bool zero, u64 *block,
		     bool *clean);
bool gemini_map_reserve(struct gemini_map *map, int nid, u64 *block,
			bool *clean);
void gemini_map_give(struct gemini_map *map, u64 block, bool used);
u64 gemini_map_stock(struct gemini_map *map, int nid, enum gemini_stock stock);
int gemini_map_busy(struct gemini_map *map, u64 first, u64 count);
void gemini_map_idle(struct gemini_map *map, u64 first, u64 count, bool zero);
void gemini_map_recall(struct gemini_map *map, u64 first, u64 count);
bool gemini_map_recalled(struct gemini_map *map, u64 block);
unsigned int gemini_map_ask(struct gemini_map *map, int nid, u64 *blocks,
			    unsigned int max, unsigned int *absent);

static inline bool gemini_host_huge(u8 host)
{
	return host == VIRTIO_GEMINI_HOST_HUGE ||
	       host == VIRTIO_GEMINI_HOST_HUGETLB;
}

#endif /* _GEMINI_BLOCK_H */

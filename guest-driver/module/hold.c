// SPDX-License-Identifier: GPL-2.0
/*
 * Holding blocks: taking a block's pages from the allocator, and giving them
 * back, also when memory gets short.
 *
 * A hold is a flag in the map; its pages are one compound page, found from the
 * block's number.  Which blocks are worth holding is decided elsewhere.
 */
#include <linux/highmem.h>
#include <linux/mmzone.h>
#include <linux/oom.h>
#include <linux/vmstat.h>

#include "compat.h"
#include "gemini.h"

/* What a huge page of a process would get without effort. */
#define HOLD_GFP	GFP_TRANSHUGE_LIGHT

/* Reclaim can have these pages, so they count as such. */
static void account(struct gemini *gemini, struct page *page, int sign)
{
	mod_node_page_state(page_pgdat(page), NR_KERNEL_MISC_RECLAIMABLE,
			    sign * (1 << gemini->block_order));
}

static void give_back(struct gemini *gemini, u64 block)
{
	struct page *page = pfn_to_page(gemini_block_pfn(gemini, block));

	/*
	 * Whatever the contents are: the allocator hands no page out as zero
	 * that it did not zero itself.
	 */
	account(gemini, page, -1);
	__free_pages(page, gemini->block_order);
}

static int keep(struct gemini *gemini, struct page *page, unsigned long since)
{
	u64 block = page_to_pfn(page) >> gemini->block_order;
	int ret;

	ret = gemini_map_grow(&gemini->map, block, true);
	if (!ret)
		ret = gemini_map_hold(&gemini->map, block,
				      want_init_on_alloc(HOLD_GFP), since);
	if (ret) {
		__free_pages(page, gemini->block_order);
		return ret;
	}
	account(gemini, page, 1);
	/*
	 * Or did somebody begin to isolate it, or has done so, while it was
	 * zeroed and on its way here?
	 */
	if ((gemini_isolation_wants(gemini, block) ||
	     !gemini_pageblock_movable(page_to_pfn(page))) &&
	    !gemini_hold_free(gemini, block))
		return -EBUSY;
	return 0;
}

static int hold_plain(struct gemini *gemini, int nid, gfp_t gfp,
		      unsigned long since, u64 *block)
{
	unsigned long pfn;
	struct page *page;

	/* ZONE_MOVABLE stays free of what cannot be moved, or make way. */
	if (!gemini_isolation_active(gemini))
		gfp &= ~__GFP_HIGHMEM;
	page = alloc_pages_node(nid, gfp, gemini->block_order);
	if (!page)
		return -ENOMEM;
	pfn = page_to_pfn(page);
	if (!gemini_pageblock_movable(pfn)) {
		/* Memory of CMA, or a fallback: neither is ours to keep. */
		__free_pages(page, gemini->block_order);
		return -ENOMEM;
	}
	*block = pfn >> gemini->block_order;
	return keep(gemini, page, since);
}

/**
 * gemini_hold_any() - hold whatever block the allocator has
 * @gemini: the device
 * @nid: on this node alone, or NUMA_NO_NODE
 * @block: which one it is
 *
 * Return: 0; -ENOMEM if there is none without effort; -ENODEV if the device
 * goes away.
 */
int gemini_hold_any(struct gemini *gemini, int nid, u64 *block)
{
	gfp_t gfp = HOLD_GFP;

	if (nid != NUMA_NO_NODE)
		gfp |= __GFP_THISNODE;
	return hold_plain(gemini, nid, gfp, jiffies, block);
}

/**
 * gemini_hold_freed() - hold a block that this CPU has just freed
 * @gemini: the device
 * @zone: where it lies
 * @since: when nobody needed it any more, in jiffies
 * @block: which one was held: most likely the last one that was freed there
 *
 * The allocator begins with the highest zone that it is allowed, and hands out
 * what has been free there for long before it looks at another.  Under
 * init_on_alloc it writes to all of it.
 *
 * Return: as gemini_hold_any().
 */
int gemini_hold_freed(struct gemini *gemini, struct zone *zone,
		      unsigned long since, u64 *block)
{
	gfp_t gfp = HOLD_GFP | __GFP_THISNODE;

	if (zone_idx(zone) != ZONE_MOVABLE)
		gfp &= ~__GFP_HIGHMEM;
#ifdef CONFIG_ZONE_DMA32
	if (zone_idx(zone) == ZONE_DMA32)
		gfp |= __GFP_DMA32;
#endif
	return hold_plain(gemini, zone_to_nid(zone), gfp, since, block);
}

/* The page at @pfn, NULL if it must not be taken at its address. */
static struct page *exact_page(struct gemini *gemini, unsigned long pfn)
{
	struct page *page = pfn_to_online_page(pfn);

	if (!page || !gemini_pageblock_movable(pfn) ||
	    (zone_idx(page_zone(page)) == ZONE_MOVABLE &&
	     !gemini_isolation_active(gemini)))
		return NULL;
	return page;
}

/* One at a time, and who it is can be told from others who isolate pages. */
static void exact_begin(struct gemini *gemini, struct gemini_target *target)
{
	mutex_lock(&gemini->exact_lock);
	gemini->exact_target = target;
	WRITE_ONCE(gemini->exact_task, current);
}

static void exact_end(struct gemini *gemini)
{
	WRITE_ONCE(gemini->exact_task, NULL);
	gemini->exact_target = NULL;
	mutex_unlock(&gemini->exact_lock);
}

/* Takes a block's page frames; a huge page in it goes to @target. */
static int take_exact(struct gemini *gemini, u64 block,
		      struct gemini_target *target)
{
	unsigned long pfn = gemini_block_pfn(gemini, block);
	struct gemini_block *entry;
	struct page *page;
	u8 guest;
	int ret;

	if (block >= gemini->map.limit)
		return -EINVAL;
	spin_lock(&gemini->map.lock);
	entry = gemini_map_find(&gemini->map, block);
	guest = entry ? entry->guest : VIRTIO_GEMINI_GUEST_UNKNOWN;
	spin_unlock(&gemini->map.lock);
	switch (guest) {
	case VIRTIO_GEMINI_GUEST_BOOKED:
		return -EEXIST;
	case VIRTIO_GEMINI_GUEST_FREE:
	case VIRTIO_GEMINI_GUEST_BASE:
		if (target)
			return -EINVAL;
		break;
	case VIRTIO_GEMINI_GUEST_HUGE:
		/* Without a place to go to it would be split. */
		if (!target)
			return -EINVAL;
		break;
	default:
		/* Not to be moved. */
		return -EINVAL;
	}
	page = exact_page(gemini, pfn);
	if (!page)
		return -EINVAL;
	exact_begin(gemini, target);
	ret = gemini_alloc_contig(pfn, gemini->block_order,
				  GFP_KERNEL | __GFP_NOWARN);
	exact_end(gemini);
	return ret ?: keep(gemini, page, jiffies);
}

/**
 * gemini_hold_exact() - hold this block, moving out what is in it
 * @gemini: the device
 * @block: the block
 *
 * Slow, and disturbs the whole system for its duration.
 *
 * Return: 0; -EEXIST if it is held; -EINVAL if it cannot ever be; -EBUSY if
 * something in it cannot be moved now; -ENOMEM; -ENODEV if the device goes
 * away.
 */
int gemini_hold_exact(struct gemini *gemini, u64 block)
{
	return take_exact(gemini, block, NULL);
}

/**
 * gemini_hold_moved() - hold the block of a huge page, moving the page out
 * @gemini: the device
 * @block: the block
 * @target: where the page goes to, see gemini_hold_target()
 *
 * As gemini_hold_exact().  Where it fails the page may have moved, and where it
 * succeeds the page may have been freed meanwhile: @target tells.
 *
 * Return: as gemini_hold_exact().
 */
int gemini_hold_moved(struct gemini *gemini, u64 block,
		      struct gemini_target *target)
{
	return take_exact(gemini, block, target);
}

/**
 * gemini_hold_target() - the kernel wants a place for a huge page that it moves
 * @gemini: the device
 * @nid: the node of that page
 *
 * Does not sleep.  Whoever moves keeps a reference of his own: a page that
 * cannot be moved at once is tried again, and in between the kernel puts the
 * place that it was given.
 *
 * Return: a huge page, or NULL if it is not us who move, or have no place.
 */
struct folio *gemini_hold_target(struct gemini *gemini, int nid)
{
	struct gemini_target *target;

	if (!gemini_hold_is_exact_caller(gemini))
		return NULL;
	target = gemini->exact_target;
	if (!target || folio_nid(target->folio) != nid ||
	    folio_ref_count(target->folio) != 1)
		return NULL;
	folio_get(target->folio);
	folio_set_large_rmappable(target->folio);
	target->given = true;
	return target->folio;
}

/**
 * gemini_hold_pages() - take these base pages, of one block that is in use
 * @gemini: the device
 * @pfn: the first of them, all free when the caller looked
 * @count: number of pages, not 0
 *
 * As slow as gemini_hold_exact().  The map does not know of them: the caller has
 * to give them back when it must, each by itself.
 *
 * Return: 0; -EINVAL if they cannot ever be; -EBUSY if something in the block
 * cannot be moved now; -ENOMEM.
 */
int gemini_hold_pages(struct gemini *gemini, unsigned long pfn,
		      unsigned long count)
{
	int ret;

	if (!exact_page(gemini, pfn))
		return -EINVAL;
	exact_begin(gemini, NULL);
	ret = gemini_alloc_contig_pages(pfn, count, GFP_KERNEL | __GFP_NOWARN);
	exact_end(gemini);
	return ret;
}

/**
 * gemini_hold_is_exact_caller() - is it us who isolate page frames now?
 * @gemini: the device
 *
 * Return: true in gemini_hold_exact() and gemini_hold_pages().
 */
bool gemini_hold_is_exact_caller(struct gemini *gemini)
{
	return READ_ONCE(gemini->exact_task) == current;
}

/**
 * gemini_hold_take() - a ready block leaves the driver and becomes a huge page
 * @gemini: the device
 * @nid: on this node alone
 * @zero: every byte of it must read as zero
 *
 * Does not sleep.
 *
 * Return: one compound page with one reference, uncharged, or NULL if no block
 * is ready.
 */
struct page *gemini_hold_take(struct gemini *gemini, int nid, bool zero)
{
	struct page *page;
	bool clean;
	u64 block;
	int i;

	if (!gemini_hold_ready(gemini, nid) ||
	    !gemini_map_take(&gemini->map, nid, zero, &block, &clean))
		return NULL;
	page = pfn_to_page(gemini_block_pfn(gemini, block));
	account(gemini, page, -1);
	gemini_booking_taken(gemini);
	for (i = 0; zero && !clean && i < 1 << gemini->block_order; i++)
		clear_highpage(page + i);
	return page;
}

/**
 * gemini_hold_ready() - number of blocks that gemini_hold_take() would find
 * @gemini: the device
 * @nid: on this node, or NUMA_NO_NODE for all
 *
 * Return: number of blocks.
 */
u64 gemini_hold_ready(struct gemini *gemini, int nid)
{
	enum gemini_stock stock;
	u64 ready = 0;

	for (stock = GEMINI_STOCK_READY; stock < GEMINI_STOCKS; stock++)
		ready += gemini_map_stock(&gemini->map, nid, stock);
	return ready;
}

/**
 * gemini_hold_free() - give a block back to the allocator
 * @gemini: the device
 * @block: the block
 *
 * Return: 0; -ENOENT if it is not held; -EBUSY if its release is not answered.
 */
int gemini_hold_free(struct gemini *gemini, u64 block)
{
	int ret = gemini_map_unhold(&gemini->map, block);

	if (!ret)
		give_back(gemini, block);
	return ret;
}

/**
 * gemini_hold_idle() - what was done with busy blocks is done
 * @gemini: the device
 * @first: the first block
 * @count: number of blocks, all of them made busy by the caller
 * @zero: every byte of them reads as zero now
 *
 * Does not sleep.
 */
void gemini_hold_idle(struct gemini *gemini, u64 first, u64 count, bool zero)
{
	gemini_map_idle(&gemini->map, first, count, zero);
	gemini_isolation_idle(gemini, first, count);
}

/**
 * gemini_hold_give() - a busy block is the kernel's from here on
 * @gemini: the device
 * @block: the block, made busy by the caller
 * @used: it is a huge page in use; otherwise the caller frees it
 */
void gemini_hold_give(struct gemini *gemini, u64 block, bool used)
{
	account(gemini, pfn_to_page(gemini_block_pfn(gemini, block)), -1);
	gemini_map_give(&gemini->map, block, used);
}

/**
 * gemini_hold_free_range() - give blocks back that are not busy
 * @gemini: the device
 * @first: the first block
 * @count: number of blocks, held or not
 *
 * Does not sleep.
 *
 * Return: number of blocks given back.
 */
u64 gemini_hold_free_range(struct gemini *gemini, u64 first, u64 count)
{
	u64 freed = 0;
	u64 block;

	for (block = first; block < first + count; block++)
		freed += !gemini_hold_free(gemini, block);
	return freed;
}

/**
 * gemini_hold_expire() - give blocks back that nobody came for
 * @gemini: the device
 * @nid: their node
 * @stock: which of them
 * @before: since before this time, in jiffies
 * @most: no more blocks than these
 *
 * They are not held again for their own sake until they were used.
 *
 * Return: number of blocks given back.
 */
u64 gemini_hold_expire(struct gemini *gemini, int nid, enum gemini_stock stock,
		       unsigned long before, u64 most)
{
	u64 freed = 0;
	u64 block;

	while (freed < most && gemini_map_unhold_old(&gemini->map, nid, stock,
						     before, &block)) {
		give_back(gemini, block);
		freed++;
	}
	return freed;
}

static u64 free_some(struct gemini *gemini, u64 most)
{
	u64 freed = 0;
	u64 block;

	while (freed < most && gemini_map_unhold_any(&gemini->map, &block)) {
		give_back(gemini, block);
		freed++;
	}
	return freed;
}

/*
 * What memory is short of is not to be taken at once again.  Returns the number
 * of pages.
 */
static u64 free_for_others(struct gemini *gemini, u64 most)
{
	u64 freed = free_some(gemini, most);

	gemini_booking_pause(gemini);
	atomic64_add(freed, &gemini->returned_pressure);
	freed += gemini_bucket_pressure(gemini);
	return (freed << gemini->block_order) +
	       gemini_trim_recall(gemini, 0, U64_MAX);
}

/**
 * gemini_hold_free_all() - give all blocks back that are not busy
 * @gemini: the device
 *
 * Return: number of blocks.
 */
u64 gemini_hold_free_all(struct gemini *gemini)
{
	return free_some(gemini, U64_MAX);
}

/* Neither of these waits for the host: what it has not answered stays. */
static unsigned long count_pages(struct shrinker *shrinker,
				 struct shrink_control *sc)
{
	struct gemini *gemini = shrinker->private_data;
	u64 idle = READ_ONCE(gemini->map.held) - READ_ONCE(gemini->map.busy) +
		   gemini_bucket_parked(gemini);

	return (idle << gemini->block_order) + gemini_trim_held(gemini) ?:
	       SHRINK_EMPTY;
}

static unsigned long free_pages_of(struct shrinker *shrinker,
				   struct shrink_control *sc)
{
	struct gemini *gemini = shrinker->private_data;
	u64 most = DIV_ROUND_UP(sc->nr_to_scan, 1UL << gemini->block_order);

	return free_for_others(gemini, most) ?: SHRINK_STOP;
}

static int memory_gone(struct notifier_block *nb, unsigned long unused,
		       void *data)
{
	struct gemini *gemini = container_of(nb, struct gemini, oom);
	unsigned long *freed = data;

	*freed += free_for_others(gemini, U64_MAX);
	return NOTIFY_OK;
}

/**
 * gemini_hold_open() - blocks may be held
 * @gemini: the device
 */
void gemini_hold_open(struct gemini *gemini)
{
	spin_lock(&gemini->map.lock);
	gemini->map.closed = false;
	spin_unlock(&gemini->map.lock);
}

/**
 * gemini_hold_close() - no more blocks may be held
 * @gemini: the device
 */
void gemini_hold_close(struct gemini *gemini)
{
	spin_lock(&gemini->map.lock);
	gemini->map.closed = true;
	spin_unlock(&gemini->map.lock);
	wake_up_all(&gemini->waitq);
}

int gemini_hold_init(struct gemini *gemini)
{
	int ret;

	mutex_init(&gemini->exact_lock);
	gemini->map.closed = true;
	gemini->shrinker = shrinker_alloc(0, "virtio-gemini");
	if (!gemini->shrinker)
		return -ENOMEM;
	gemini->shrinker->count_objects = count_pages;
	gemini->shrinker->scan_objects = free_pages_of;
	gemini->shrinker->batch = 1L << gemini->block_order;
	gemini->shrinker->private_data = gemini;
	shrinker_register(gemini->shrinker);

	gemini->oom.notifier_call = memory_gone;
	ret = register_oom_notifier(&gemini->oom);
	if (ret)
		shrinker_free(gemini->shrinker);
	return ret;
}

void gemini_hold_exit(struct gemini *gemini)
{
	unregister_oom_notifier(&gemini->oom);
	shrinker_free(gemini->shrinker);
	/* What a command still worked on when the device was stopped. */
	gemini_hold_free_all(gemini);
}

// SPDX-License-Identifier: GPL-2.0
/*
 * The census: what is in each block of guest memory, found by page frame.
 *
 * One look at the first page frame of a block decides most of them: a free
 * buddy or a huge folio says all about the whole block.  Base pages in use are
 * counted only where the count decides something, in blocks that the host
 * backs with a huge page, and in all while somebody looks for blocks of which
 * little is used; some of them in each pass.
 *
 * No references are taken, because they would make collapses and migrations
 * fail, and no locks.  So everything read here may change while it is read:
 * each field is read once and checked before it is used, and a wrong answer
 * lasts until the next pass.
 */
#include <linux/ktime.h>
#include <linux/memory.h>
#include <linux/nodemask.h>
#include <linux/sched.h>

#include "compat.h"
#include "gemini.h"
#include "trace.h"

/* Blocks that are looked at before the map's lock is taken once for all. */
#define GROUP_BLOCKS	64U
/* A slice ends when it has taken this long; others may run then. */
#define SLICE_NS	(2 * NSEC_PER_MSEC)
/* The census rests at least this many times as long as it works. */
#define REST_FACTOR	20
/* Blocks of which the used pages are counted in one pass. */
#define COUNT_BLOCKS	1024
/* Periods until the next pass while next to nothing changes. */
#define PATIENCE	8

/* Order of a free buddy at @page, -1 if there is none. */
static int buddy_order_of(const struct page *page)
{
	unsigned long order;

	if (!PageBuddy(page))
		return -1;
	order = READ_ONCE(page->private);
	return order <= MAX_PAGE_ORDER ? (int)order : -1;
}

/* Order of the compound page that begins at @head, 0 if there is none. */
static unsigned int compound_order_of(const struct page *head)
{
	unsigned int order;

	if (!(gemini_page_flags(head) & BIT(PG_head)))
		return 0;
	order = gemini_page_flags(head + 1) & 0xff;
	/* Gigantic pages are the largest. */
	return order <= PUD_SHIFT - PAGE_SHIFT ? order : 0;
}

/*
 * Is the compound page at @head one that processes map huge: memory of theirs,
 * of a file, or of hugetlb?  Drivers have large pages as well, and so has the
 * kernel's allocator for objects.
 */
static bool user_huge(struct page *head)
{
	if (PageHuge(head))
		/* What waits in the pool is nobody's huge page. */
		return page_ref_count(head) > 0;
	return gemini_page_flags(head + 1) & BIT(PG_large_rmappable);
}

/* Nobody owns @page, though it is in no buddy: per-CPU lists keep some. */
static bool in_transit(const struct page *page)
{
	return !page_ref_count(page) && !PageTail(page) &&
	       !page_has_type(page) &&
	       !(gemini_page_flags(page) & BIT(PG_head));
}

/* Counts the pages in use among @count from @page on. */
static unsigned int count_used(struct page *page, unsigned int count)
{
	unsigned int used = 0;
	unsigned int i = 0;

	while (i < count) {
		int order = buddy_order_of(page + i);
		unsigned int step;

		if (order >= 0) {
			i += 1U << order;
			continue;
		}
		step = min(1U << compound_order_of(page + i), count - i);
		if (!in_transit(page + i))
			used += step;
		i += step;
	}
	return used;
}

/* Is the whole block part of one free buddy? */
static bool whole_free(struct page *page, unsigned long pfn, unsigned int min)
{
	unsigned int order;

	for (order = min; order <= MAX_PAGE_ORDER; order++) {
		unsigned long offset = pfn & ((1UL << order) - 1);

		if (buddy_order_of(page - offset) >= (int)order)
			return true;
	}
	return false;
}

static bool block_movable(unsigned long pfn, unsigned int order)
{
	unsigned long end = pfn + (1UL << order);

	for (; pfn < end; pfn += pageblock_nr_pages)
		if (!gemini_pageblock_movable(pfn))
			return false;
	return true;
}

static struct gemini_seen pinned(struct gemini *gemini, u64 block)
{
	return (struct gemini_seen) {
		.used = gemini_kernel_heat(gemini, block),
		.guest = VIRTIO_GEMINI_GUEST_PINNED,
	};
}

/*
 * Looks at one block.  @count says whether used base pages are worth counting;
 * otherwise the former count is kept if @keep.
 */
static struct gemini_seen look(struct gemini *gemini, u64 block, bool count,
			       bool keep)
{
	struct gemini_seen seen = { .used = 0 };
	unsigned int order = gemini->block_order;
	unsigned long pfn = gemini_block_pfn(gemini, block);
	unsigned int pages = 1U << order;
	struct page *page, *head;
	bool movable;

	if (!pfn_valid(pfn)) {
		seen.guest = VIRTIO_GEMINI_GUEST_UNKNOWN;
		return seen;
	}
	page = pfn_to_online_page(pfn);
	if (!page || gemini_page_flags(page) & BIT(PG_reserved))
		return pinned(gemini, block);

	if (whole_free(page, pfn, order)) {
		seen.guest = VIRTIO_GEMINI_GUEST_FREE;
		return seen;
	}

	head = compound_head(page);
	if (compound_order_of(head) >= order) {
		if (!user_huge(head))
			return pinned(gemini, block);
		seen.guest = VIRTIO_GEMINI_GUEST_HUGE;
		seen.used = GEMINI_USED_KEEP;
		return seen;
	}
	if (PageOffline(page))
		return pinned(gemini, block);

	/*
	 * What its own data share a block with may be free, and movable: the
	 * block never is.
	 */
	movable = block_movable(pfn, order) &&
		  !gemini_kernel_owns(gemini, block);
	/* A block may be all free and still in no buddy of its size. */
	if (in_transit(page) || (movable && count)) {
		seen.used = count_used(page, pages);
		if (!seen.used) {
			seen.guest = VIRTIO_GEMINI_GUEST_FREE;
			return seen;
		}
	}
	if (!movable)
		return pinned(gemini, block);
	seen.guest = VIRTIO_GEMINI_GUEST_BASE;
	if (!count)
		seen.used = keep ? GEMINI_USED_KEEP : 0;
	return seen;
}

/**
 * gemini_census_free() - is no page of this block in use, now?
 * @gemini: the device
 * @block: a block
 *
 * The map may be older than a whole period.  The answer may be as well, by a
 * moment.
 *
 * Return: true if so.
 */
bool gemini_census_free(struct gemini *gemini, u64 block)
{
	struct gemini_seen seen;

	mutex_lock(&gemini->census.lock);
	seen = look(gemini, block, false, false);
	mutex_unlock(&gemini->census.lock);
	return seen.guest == VIRTIO_GEMINI_GUEST_FREE;
}

/**
 * gemini_census_run() - the next run of free base pages in a block
 * @gemini: the device
 * @block: a block
 * @at: from which page of it on, and where the run begins
 * @min: how long it is at least
 *
 * As gemini_census_free(), old news at once.
 *
 * Return: number of pages; 0 if there is none, or if all of the block is free.
 */
unsigned int gemini_census_run(struct gemini *gemini, u64 block,
			       unsigned int *at, unsigned int min)
{
	unsigned int pages = 1U << gemini->block_order;
	unsigned int start = *at, length = 0, used = 0;
	unsigned int i = 0;
	struct page *page;

	mutex_lock(&gemini->census.lock);
	page = pfn_to_online_page(gemini_block_pfn(gemini, block));
	while (page && i < pages) {
		int order = buddy_order_of(page + i);
		unsigned int end;

		if (order >= 0 || in_transit(page + i)) {
			i = min(i + (1U << max(order, 0)), pages);
			continue;
		}
		if (i > start && i - start >= min && !length)
			length = i - start;
		end = i + (1U << compound_order_of(page + i));
		used += end - i;
		i = min(end, pages);
		if (!length)
			start = max(start, i);
	}
	mutex_unlock(&gemini->census.lock);
	if (!length && i > start && i - start >= min)
		length = i - start;
	*at = start;
	return used ? length : 0;
}

/**
 * gemini_census_counted() - is it known how much is used of every block?
 * @gemini: the device
 *
 * Return: true if passes have counted them all of late.
 */
bool gemini_census_counted(struct gemini *gemini)
{
	struct gemini_census *census = &gemini->census;

	/* Some in each pass, and the first of these may have begun anywhere. */
	return READ_ONCE(census->counted) >
	       1 + READ_ONCE(census->last_blocks) / COUNT_BLOCKS;
}

static bool host_huge(const struct gemini_block *entry)
{
	struct gemini_block copy;

	/* Without the map's lock: a stale state costs a count, no more. */
	copy = data_race(*entry);
	return gemini_host_huge(copy.host);
}

/* Somebody looks for blocks of which little is used. */
static bool counts_all(struct gemini *gemini)
{
	return READ_ONCE(gemini->census.count_all) ||
	       gemini_giving_seeks_sparse(gemini);
}

/* Looks at all blocks of a chunk. */
static void look_at_chunk(struct gemini *gemini, unsigned long index,
			  struct gemini_chunk *chunk)
{
	struct gemini_census *census = &gemini->census;
	u64 first = (u64)index * GEMINI_CHUNK_BLOCKS;
	struct gemini_seen seen[GROUP_BLOCKS];
	bool all = counts_all(gemini);
	unsigned int i, group;

	BUILD_BUG_ON(GEMINI_CHUNK_BLOCKS % GROUP_BLOCKS);
	lockdep_assert_held(&census->lock);
	census->pass_all &= all;

	for (group = 0; group < GEMINI_CHUNK_BLOCKS; group += GROUP_BLOCKS) {
		for (i = 0; i < GROUP_BLOCKS; i++) {
			bool matters = all ||
				       host_huge(&chunk->block[group + i]);
			u64 block = first + group + i;
			bool count = matters && census->count_left &&
				     block >= census->count_from;

			seen[i] = look(gemini, block, count, matters);
			if (seen[i].guest != VIRTIO_GEMINI_GUEST_UNKNOWN)
				census->pass_blocks++;
			if (count &&
			    seen[i].guest == VIRTIO_GEMINI_GUEST_BASE &&
			    !--census->count_left)
				census->count_from = block + 1;
		}
		census->pass_changed += gemini_map_see(&gemini->map,
						       first + group, seen,
						       GROUP_BLOCKS);
	}
}

/* Makes chunks for all memory that the guest has now. */
static void find_memory(struct gemini *gemini)
{
	const u64 chunk_pages = GEMINI_CHUNK_BLOCKS << gemini->block_order;
	u64 start, end, pfn, chunk;
	int nid;

	for_each_online_node(nid) {
		start = round_down(node_start_pfn(nid), chunk_pages);
		end = node_end_pfn(nid);
		for (chunk = start; chunk < end; chunk += chunk_pages) {
			for (pfn = chunk; pfn < chunk + chunk_pages;
			     pfn += PAGES_PER_SECTION)
				if (pfn_valid(pfn))
					break;
			if (pfn < chunk + chunk_pages)
				/* Without memory for it: the next pass. */
				gemini_map_grow(&gemini->map,
						chunk >> gemini->block_order,
						true);
			cond_resched();
		}
	}
}

/* What is handed out, taken back, or made huge shows in one of these. */
static void count_pages(unsigned long *pages)
{
	pages[0] = global_zone_page_state(NR_FREE_PAGES);
	pages[1] = global_node_page_state(NR_ANON_MAPPED);
	pages[2] = global_node_page_state(NR_FILE_PAGES);
	pages[3] = global_node_page_state(NR_ANON_THPS);
	pages[4] = global_node_page_state(NR_SHMEM_THPS);
	pages[5] = global_node_page_state(NR_FILE_THPS);
}

static void begin_pass(struct gemini *gemini)
{
	struct gemini_census *census = &gemini->census;

	find_memory(gemini);
	census->pass_ns = 0;
	census->pass_blocks = 0;
	census->pass_changed = 0;
	census->count_left = COUNT_BLOCKS;
	count_pages(census->pages);
	census->waited = 0;
	census->pass_all = true;
	WRITE_ONCE(census->begun, census->begun + 1);
}

static void end_pass(struct gemini *gemini)
{
	struct gemini_census *census = &gemini->census;

	if (census->count_left)
		/* All up to the end were counted: from the start again. */
		census->count_from = 0;
	WRITE_ONCE(census->last_ns, census->pass_ns);
	WRITE_ONCE(census->last_blocks, census->pass_blocks);
	WRITE_ONCE(census->counted, census->pass_all ? census->counted + 1 : 0);
	/* Who sees the pass ended sees what it found. */
	smp_store_release(&census->passes, census->passes + 1);
	trace_gemini_census(gemini, census->pass_blocks, census->pass_changed,
			    census->pass_ns);
	wake_up_all(&gemini->waitq);
}

/* From the end of a pass to the next one, in jiffies. */
static unsigned long period(const struct gemini_census *census)
{
	unsigned long least = msecs_to_jiffies(READ_ONCE(census->period_ms));

	return max(least, nsecs_to_jiffies(census->last_ns * REST_FACTOR));
}

/*
 * Would a pass find next to nothing?  It would if there are as many pages of
 * each kind as at the last one, but for one a block.  What changes places, and
 * what the host did meanwhile, can wait a little.
 */
static bool may_wait(struct gemini *gemini)
{
	struct gemini_census *census = &gemini->census;
	unsigned long pages[GEMINI_PAGE_KINDS];
	unsigned long changed = 0;
	unsigned int i;

	if (xchg(&census->kicked, false) || counts_all(gemini) ||
	    /* There was none, or some blocks were left to be counted. */
	    !census->passes || census->count_from)
		return false;
	count_pages(pages);
	for (i = 0; i < GEMINI_PAGE_KINDS; i++)
		changed += abs_diff(pages[i], census->pages[i]);
	return changed < census->last_blocks && ++census->waited < PATIENCE;
}

static void census_work(struct work_struct *work)
{
	struct gemini *gemini =
		container_of(to_delayed_work(work), struct gemini, census.work);
	struct gemini_census *census = &gemini->census;
	unsigned long delay = 0;
	u64 slice = 0;

	if (census->begun == census->passes) {
		if (may_wait(gemini)) {
			queue_delayed_work(gemini->wq, &census->work,
					   period(census));
			return;
		}
		census->next = 0;
		begin_pass(gemini);
	}
	while (slice < SLICE_NS) {
		struct gemini_chunk *chunk;
		u64 start = ktime_get_ns();
		u64 took;

		chunk = xa_find(&gemini->map.chunks, &census->next, ULONG_MAX,
				XA_PRESENT);
		if (!chunk) {
			end_pass(gemini);
			delay = period(census);
			break;
		}
		mutex_lock(&census->lock);
		look_at_chunk(gemini, census->next, chunk);
		mutex_unlock(&census->lock);
		census->next++;
		took = ktime_get_ns() - start;
		slice += took;
		census->pass_ns += took;
		WRITE_ONCE(census->total_ns, census->total_ns + took);
		cond_resched();
	}
	gemini_report_kick(gemini);
	queue_delayed_work(gemini->wq, &census->work, delay);
}

/*
 * Memory was taken offline: its memory map may go away as soon as this returns.
 * Whoever looks from now on sees it offline; whoever looks at it now holds the
 * lock.
 */
static int memory_changed(struct notifier_block *nb, unsigned long action,
			  void *data)
{
	struct gemini *gemini = container_of(nb, struct gemini, census.memory);

	if (action == MEM_OFFLINE) {
		mutex_lock(&gemini->census.lock);
		mutex_unlock(&gemini->census.lock);
	}
	if (action == MEM_OFFLINE || action == MEM_ONLINE)
		gemini_census_kick(gemini);
	return NOTIFY_OK;
}

/**
 * gemini_census_kick() - do not wait for the period to end, nor for a change
 * @gemini: the device
 */
void gemini_census_kick(struct gemini *gemini)
{
	WRITE_ONCE(gemini->census.kicked, true);
	mod_delayed_work(gemini->wq, &gemini->census.work, 0);
}

static bool waited(struct gemini *gemini, u64 wanted)
{
	/* Pairs with the end of a pass. */
	return smp_load_acquire(&gemini->census.passes) >= wanted ||
	       READ_ONCE(gemini->map.closed);
}

/**
 * gemini_census_wait() - wait for a pass that begins after this call
 * @gemini: the device
 *
 * Return: 0; -EINTR if a signal came; -ENODEV if the device goes away.
 */
int gemini_census_wait(struct gemini *gemini)
{
	struct gemini_census *census = &gemini->census;
	u64 wanted = READ_ONCE(census->begun) + 1;

	while (!waited(gemini, wanted)) {
		gemini_census_kick(gemini);
		if (wait_event_interruptible_timeout(gemini->waitq,
						     waited(gemini, wanted),
						     HZ / 10) < 0)
			return -EINTR;
	}
	return READ_ONCE(gemini->map.closed) ? -ENODEV : 0;
}

/**
 * gemini_census_start() - begin, or go on
 * @gemini: the device
 */
void gemini_census_start(struct gemini *gemini)
{
	enable_delayed_work(&gemini->census.work);
	gemini_census_kick(gemini);
}

/**
 * gemini_census_stop() - look no more
 * @gemini: the device
 */
void gemini_census_stop(struct gemini *gemini)
{
	disable_delayed_work_sync(&gemini->census.work);
}

int gemini_census_init(struct gemini *gemini)
{
	struct gemini_census *census = &gemini->census;

	INIT_DELAYED_WORK(&census->work, census_work);
	disable_delayed_work(&census->work);
	mutex_init(&census->lock);
	census->period_ms = GEMINI_PERIOD_DEFAULT;
	census->memory.notifier_call = memory_changed;
	return register_memory_notifier(&census->memory);
}

void gemini_census_exit(struct gemini *gemini)
{
	unregister_memory_notifier(&gemini->census.memory);
}

// SPDX-License-Identifier: GPL-2.0
/*
 * Trimming: the free base pages of sparsely used blocks go back to the host,
 * where it asks for memory those of blocks that are huge in the host alone.  The
 * block keeps what is used of it, in base pages of the host.
 *
 * A run of free pages is held at its address, named in a request, and returned
 * to the allocator with the answer.  Pages in use are not moved for it.  While a
 * page of a page block is held, the kernel isolates no other page there: so a
 * request has one run of each of several blocks, and a block takes as many
 * requests as it has runs.
 *
 * What is held and not in a request yet is given back to whoever is short of
 * memory or isolates it; what is in one, with its answer or the device's reset.
 *
 * The host backs all of a huge page, so that writing to what is taken
 * (init_on_alloc) costs it nothing.  Where it has base pages, nobody here knows
 * which are there: no such block is trimmed for a host that is short of memory.
 */
#include <linux/mm.h>
#include <linux/virtio_config.h>

#include "compat.h"
#include "gemini.h"
#include "trace.h"

/* Shorter runs, in pages, are not worth disturbing all CPUs for. */
#define RUN_MIN		4
/* Map chunks that one look walks. */
#define WALK_CHUNKS	32U

/**
 * struct taken - runs that are held, until they are in a request
 * @node: in gemini_trim.taken
 * @range: the runs, by page frame; each in a block of its own
 * @count: number of them
 * @pages: number of pages in all that were taken
 * @recalled: they were given back, and no more is to be taken
 */
struct taken {
	struct list_head node;
	struct gemini_range range[GEMINI_TRIM_BLOCKS];
	unsigned int count;
	u64 pages;
	bool recalled;
};

static bool possible(struct gemini *gemini)
{
	return virtio_has_feature(gemini->vdev, VIRTIO_GEMINI_F_TRIM) &&
	       READ_ONCE(gemini->hints.synced);
}

static void account(unsigned long pfn, long pages)
{
	mod_node_page_state(page_pgdat(pfn_to_page(pfn)),
			    NR_KERNEL_MISC_RECLAIMABLE, pages);
}

static void give_back(u64 pfn, u32 count)
{
	u32 i;

	account(pfn, -(long)count);
	for (i = 0; i < count; i++)
		__free_page(pfn_to_page(pfn + i));
}

static u64 give_back_taken(struct taken *taken)
{
	u64 pages = 0;
	unsigned int i;

	for (i = 0; i < taken->count; i++) {
		give_back(taken->range[i].first, taken->range[i].count);
		pages += taken->range[i].count;
	}
	taken->count = 0;
	return pages;
}

static bool touches(struct gemini *gemini, const struct taken *taken, u64 first,
		    u64 end)
{
	unsigned int i;

	for (i = 0; i < taken->count; i++) {
		u64 block = taken->range[i].first >> gemini->block_order;

		if (block >= first && block < end)
			return true;
	}
	return false;
}

/**
 * gemini_trim_recall() - pages are wanted back that are in no request yet
 * @gemini: the device
 * @first: the first block that is concerned
 * @count: number of blocks; U64_MAX with @first 0 for all
 *
 * Does not sleep.
 *
 * Return: number of pages given back.
 */
u64 gemini_trim_recall(struct gemini *gemini, u64 first, u64 count)
{
	struct gemini_trim *trim = &gemini->trim;
	struct taken *taken;
	u64 pages = 0;

	spin_lock(&trim->lock);
	list_for_each_entry(taken, &trim->taken, node) {
		if (!touches(gemini, taken, first, first + count))
			continue;
		taken->recalled = true;
		pages += give_back_taken(taken);
	}
	spin_unlock(&trim->lock);
	return pages;
}

/**
 * gemini_trim_held() - pages that gemini_trim_recall() would give back
 * @gemini: the device
 *
 * Return: number of pages.
 */
unsigned long gemini_trim_held(struct gemini *gemini)
{
	struct gemini_trim *trim = &gemini->trim;
	struct taken *taken;
	unsigned long pages = 0;
	unsigned int i;

	spin_lock(&trim->lock);
	list_for_each_entry(taken, &trim->taken, node)
		for (i = 0; i < taken->count; i++)
			pages += taken->range[i].count;
	spin_unlock(&trim->lock);
	return pages;
}

static void begin(struct gemini *gemini, struct taken *taken)
{
	taken->count = 0;
	taken->pages = 0;
	taken->recalled = false;
	spin_lock(&gemini->trim.lock);
	list_add(&taken->node, &gemini->trim.taken);
	spin_unlock(&gemini->trim.lock);
}

/* Holds one run; -ECANCELED if somebody wants it, or what was taken before. */
static int take(struct gemini *gemini, struct taken *taken, u64 pfn, u32 count)
{
	u64 block = pfn >> gemini->block_order;
	int ret;

	ret = gemini_hold_pages(gemini, pfn, count);
	trace_gemini_trim(gemini, block, pfn, count, ret);
	if (ret)
		return ret;
	account(pfn, count);
	spin_lock(&gemini->trim.lock);
	if (taken->recalled) {
		ret = -ECANCELED;
	} else {
		taken->range[taken->count++] =
			(struct gemini_range) { pfn, count };
		taken->pages += count;
	}
	spin_unlock(&gemini->trim.lock);
	if (ret)
		give_back(pfn, count);
	else if (gemini_isolation_wants(gemini, block) ||
		 !gemini_pageblock_movable(pfn))
		/* Somebody began to isolate it while it was on its way here. */
		gemini_trim_recall(gemini, block, 1);
	return ret;
}

static u16 used_if_sparse(struct gemini *gemini, const struct gemini_block *entry)
{
	/* Where the host has a huge page there is something to be had again. */
	u8 not = GEMINI_BLOCK_PASSED |
		 (gemini_host_huge(entry->host) ? 0 : GEMINI_BLOCK_SPENT);
	bool sparse = entry->guest == VIRTIO_GEMINI_GUEST_BASE &&
		      entry->host == gemini->trim.host &&
		      !(entry->flags & not) &&
		      entry->used <= 1U << (gemini->block_order - 1);

	return sparse ? entry->used : 0;
}

/* Keeps the sparsest ones, of those alike the first. */
static void consider(struct gemini_trim *trim, u64 block, u16 used)
{
	unsigned int at = trim->count;

	if (at == GEMINI_TRIM_BLOCKS) {
		if (trim->job[at - 1].used <= used)
			return;
		at--;
	} else {
		trim->count++;
	}
	for (; at && trim->job[at - 1].used > used; at--)
		trim->job[at] = trim->job[at - 1];
	trim->job[at] = (struct gemini_trim_job) { block, used, 0 };
}

/* Chooses blocks from some chunks of the map, of all of it in turn. */
static void find(struct gemini *gemini)
{
	struct gemini_trim *trim = &gemini->trim;
	u64 from = trim->next;
	u64 end = from + (u64)WALK_CHUNKS * GEMINI_CHUNK_BLOCKS;
	struct gemini_run run;
	u64 i;

	while (gemini_map_next_run(&gemini->map, from, &run) &&
	       run.first < end) {
		u16 used = used_if_sparse(gemini, &run.block);

		for (i = 0; used && i < run.count; i++)
			consider(trim, run.first + i, used);
		from = run.first + run.count;
	}
	trim->next = run.count ? from : 0;
}

/*
 * Takes the next run of each block, @most of them.  What has none left is done
 * with, whatever became of the others, and left alone for a while; so is what
 * cannot be taken, and the reason is returned.
 */
static int take_round(struct gemini *gemini, struct gemini_trim_job *job,
		      unsigned int *count, u64 most, struct taken *taken)
{
	unsigned int left = 0;
	unsigned int i, pages;
	int failed = 0;
	int ret;

	for (i = 0; i < *count; i++) {
		u64 pfn = gemini_block_pfn(gemini, job[i].block);
		unsigned int at = job[i].next;

		if (READ_ONCE(taken->count) >= most) {
			job[left++] = job[i];
			continue;
		}
		pages = gemini_census_run(gemini, job[i].block, &at, RUN_MIN);
		if (!pages) {
			gemini_map_flag(&gemini->map, job[i].block,
					GEMINI_BLOCK_PASSED, 0);
			continue;
		}
		ret = take(gemini, taken, pfn + at, pages);
		if (ret && ret != -ECANCELED) {
			gemini_map_flag(&gemini->map, job[i].block,
					GEMINI_BLOCK_PASSED, 0);
			failed = ret;
			continue;
		}
		job[left] = job[i];
		if (!ret) {
			/* A trim that is broken off does not begin anew. */
			gemini_map_flag(&gemini->map, job[i].block,
					GEMINI_BLOCK_SPENT, 0);
			job[left].next = at + pages;
		}
		left++;
		cond_resched();
	}
	*count = left;
	return failed;
}

/* Asks the host to drop what was taken, which is given back if that fails. */
static struct gemini_request *ask(struct gemini *gemini, struct taken *taken)
{
	struct gemini_request *request;
	int ret;

	/* Allocates, so that what was taken can still be recalled here. */
	request = gemini_request_new(gemini, VIRTIO_GEMINI_REQ_TRIM,
				     taken->range, READ_ONCE(taken->count));
	spin_lock(&gemini->trim.lock);
	list_del(&taken->node);
	spin_unlock(&gemini->trim.lock);

	ret = PTR_ERR_OR_ZERO(request);
	if (!ret) {
		ret = taken->count ? gemini_request_submit(request) : -ENOENT;
		if (ret)
			gemini_request_put(request);
	}
	if (!ret)
		return request;
	give_back_taken(taken);
	return ERR_PTR(ret);
}

/**
 * gemini_trim_answered() - the device cannot drop these pages any more
 * @request: a TRIM that was answered, or given up with the device's reset
 *
 * Ends the hold.  Whatever the contents are: the allocator takes any page.
 */
void gemini_trim_answered(struct gemini_request *request)
{
	struct virtio_gemini_range *range = gemini_request_ranges(request);
	struct gemini *gemini = request->gemini;
	u64 pages = 0;
	u32 i;

	for (i = 0; i < request->nr_ranges; i++) {
		u64 first = le64_to_cpu(range[i].first);
		u32 count = le32_to_cpu(range[i].count);

		/* The host will say so, but a look may come first. */
		if (!request->error)
			gemini_map_set_host(&gemini->map,
					    first >> gemini->block_order, 1,
					    VIRTIO_GEMINI_HOST_BASE);
		give_back(first, count);
		pages += count;
	}
	if (!request->error)
		atomic64_add(pages, &gemini->trim.pages);
}

static bool paused(struct gemini *gemini)
{
	return gemini_booking_paused(gemini) ||
	       !gemini_isolation_active(gemini);
}

/**
 * gemini_trim() - trim blocks
 * @gemini: the device
 * @host: of those that are in this state in the host
 * @most: as much as so many whole blocks at most, not 0
 * @gained: pages that were asked for now
 *
 * One round, and no more of them than leave the system half of the time.  Only
 * the worker of giving.c calls it.
 *
 * Return: false if there is nothing left to be trimmed.
 */
bool gemini_trim(struct gemini *gemini, u8 host, u64 most, u64 *gained)
{
	struct gemini_trim *trim = &gemini->trim;
	unsigned long began = jiffies;
	struct gemini_request *request;
	struct taken taken;

	*gained = 0;
	if (trim->asked) {
		if (!gemini_request_answered(trim->asked))
			return true;
		gemini_request_put(trim->asked);
		trim->asked = NULL;
	}
	if (!possible(gemini) || paused(gemini)) {
		trim->count = 0;
		return false;
	}
	if (trim->host != host) {
		/* What was chosen for another reason is none of this one's. */
		trim->host = host;
		trim->count = 0;
		trim->next = 0;
	}
	if (!trim->count)
		find(gemini);
	if (!trim->count)
		return trim->next;
	if (time_before(began, trim->rest_until))
		return true;

	begin(gemini, &taken);
	take_round(gemini, trim->job, &trim->count, most, &taken);
	request = ask(gemini, &taken);
	if (!IS_ERR(request)) {
		trim->asked = request;
		*gained = taken.pages;
	}
	trim->rest_until = jiffies + (jiffies - began);
	return true;
}

/**
 * gemini_trim_block() - trim one block now, and wait for it
 * @gemini: the device
 * @block: any block, whatever it is in the host
 * @pages: how many pages the host dropped
 *
 * Return: 0; -EINVAL if it is none with base pages in use; the error of holding
 * pages, of a request, or of its answer; -EINTR.
 */
int gemini_trim_block(struct gemini *gemini, u64 block, u64 *pages)
{
	struct gemini_trim_job job = { .block = block };
	struct gemini_block *entry;
	struct gemini_request *request;
	struct taken taken;
	unsigned int count = 1;
	u8 guest;
	int ret;

	*pages = 0;
	spin_lock(&gemini->map.lock);
	entry = gemini_map_find(&gemini->map, block);
	guest = entry ? entry->guest : VIRTIO_GEMINI_GUEST_UNKNOWN;
	spin_unlock(&gemini->map.lock);
	if (guest != VIRTIO_GEMINI_GUEST_BASE)
		return -EINVAL;
	for (;;) {
		ret = gemini_release_room_wait(gemini, 1);
		if (ret)
			return ret;
		begin(gemini, &taken);
		ret = take_round(gemini, &job, &count, 1, &taken);
		request = ask(gemini, &taken);
		if (ret || !count)
			return ret;
		if (IS_ERR(request))
			return PTR_ERR(request);
		ret = gemini_request_wait(request);
		ret = ret ?: request->error;
		gemini_request_put(request);
		if (ret)
			return ret;
		*pages += taken.pages;
	}
}

/**
 * gemini_trim_start() - begin, or go on
 * @gemini: the device
 */
void gemini_trim_start(struct gemini *gemini)
{
	gemini->trim.count = 0;
	gemini->trim.next = 0;
	gemini->trim.rest_until = jiffies;
}

/**
 * gemini_trim_stop() - forget what was asked for
 * @gemini: the device; its worker has stopped
 *
 * What is in a request stays held until that is answered or given up.
 */
void gemini_trim_stop(struct gemini *gemini)
{
	if (gemini->trim.asked)
		gemini_request_put(gemini->trim.asked);
	gemini->trim.asked = NULL;
}

void gemini_trim_init(struct gemini *gemini)
{
	spin_lock_init(&gemini->trim.lock);
	INIT_LIST_HEAD(&gemini->trim.taken);
}

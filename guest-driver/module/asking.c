// SPDX-License-Identifier: GPL-2.0
/*
 * What the host is asked for: huge pages under blocks that are free, or held.
 * Who is refused asks more and more rarely.
 */
#include <linux/minmax.h>
#include <linux/virtio_config.h>
#include <linux/vmstat.h>

#include "booking.h"

/* After the host refused: from, and up to. */
#define REFUSED_MIN		(HZ / 20)
#define REFUSED_MAX		(60 * HZ)
/* A balloon that has not grown for so long has its size. */
#define BALLOON_QUIET		(5 * HZ)

/**
 * gemini_asking_renew() - can the host be asked to renew?
 * @gemini: the device
 *
 * Return: true if so.
 */
bool gemini_asking_renew(struct gemini *gemini)
{
	return virtio_has_feature(gemini->vdev, VIRTIO_GEMINI_F_RELEASE);
}

/**
 * gemini_asking_prepare() - can the host be asked to prepare?
 * @gemini: the device
 *
 * Return: true if so.
 */
bool gemini_asking_prepare(struct gemini *gemini)
{
	return virtio_has_feature(gemini->vdev, VIRTIO_GEMINI_F_PREPARE);
}

/**
 * gemini_asking_helps() - may the host be asked for huge pages, in principle?
 * @gemini: the device
 *
 * Return: true if it knows how to give them, and has some.
 */
bool gemini_asking_helps(struct gemini *gemini)
{
	return !READ_ONCE(gemini->scarce) && !READ_ONCE(gemini->wanted) &&
	       (gemini_asking_renew(gemini) || gemini_asking_prepare(gemini));
}

static int submit(struct gemini *gemini, u16 type,
		  const struct gemini_range *ranges, u32 count, u64 absent)
{
	struct gemini_request *request;
	int ret;

	request = gemini_request_new(gemini, type, ranges, count);
	if (IS_ERR(request))
		return PTR_ERR(request);
	request->absent = absent;
	ret = gemini_request_submit(request);
	if (!ret) {
		/* Its answer tells whether to ask again. */
		list_add_tail(&request->asked, &gemini->booking.asked);
		return 0;
	}
	gemini_request_put(request);
	return ret;
}

/* Is a block huge now?  If not it may be asked for again, but not at once. */
static bool done(struct gemini *gemini, u64 block)
{
	struct gemini_block *entry;
	bool huge = false;
	u8 flags;

	spin_lock(&gemini->map.lock);
	entry = gemini_map_find(&gemini->map, block);
	if (entry) {
		huge = gemini_host_huge(entry->host);
		flags = entry->flags & ~GEMINI_BLOCK_ASKED;
		if (!huge && !(flags & GEMINI_BLOCK_HELD))
			flags |= GEMINI_BLOCK_PASSED;
		gemini_map_change(&gemini->map, block, entry, entry->host,
				  flags, jiffies);
	}
	spin_unlock(&gemini->map.lock);
	return huge;
}

/*
 * The host said no, or did it in part: then it was for the blocks that it did
 * not do, which the guest uses, say.  A host that did none is asked later again.
 */
static void refused(struct gemini *gemini, struct gemini_request *request)
{
	struct virtio_gemini_range *range = gemini_request_ranges(request);
	struct gemini_booking *booking = &gemini->booking;
	u64 huge = 0;
	u64 block;
	u32 i, j;

	for (i = 0; i < request->nr_ranges; i++) {
		block = le64_to_cpu(range[i].first);
		for (j = 0; j < le32_to_cpu(range[i].count); j++)
			huge += done(gemini, block + j);
	}
	gemini_giving_spent(gemini, min(huge, request->absent));
	if (huge) {
		booking->asked_delay = 0;
		return;
	}
	booking->asked_delay = clamp(booking->asked_delay * 2,
				     (unsigned long)REFUSED_MIN,
				     (unsigned long)REFUSED_MAX);
	booking->asked_until = jiffies + booking->asked_delay;
}

/**
 * gemini_asking_answers() - take the answers that are there
 * @gemini: the device
 *
 * Return: number of requests without one.
 */
unsigned int gemini_asking_answers(struct gemini *gemini)
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
		if (request->error) {
			refused(gemini, request);
		} else {
			gemini_giving_spent(gemini, request->absent);
			booking->asked_delay = 0;
		}
		gemini_request_put(request);
	}
	return open;
}

/**
 * gemini_asking_forget() - no answer matters any more
 * @gemini: the device
 */
void gemini_asking_forget(struct gemini *gemini)
{
	struct gemini_request *request, *next;

	list_for_each_entry_safe(request, next, &gemini->booking.asked, asked) {
		list_del(&request->asked);
		gemini_request_put(request);
	}
}

/**
 * gemini_asking_allowed() - may the host be asked for huge pages, now?
 * @gemini: the device
 *
 * Return: true unless it has refused of late, or would.
 */
bool gemini_asking_allowed(struct gemini *gemini)
{
	struct gemini_booking *booking = &gemini->booking;

	return gemini_asking_helps(gemini) &&
	       !time_before(jiffies, booking->asked_until);
}

/**
 * gemini_asking_held() - have held blocks made host-huge
 * @gemini: the device
 * @nid: their node
 *
 * Without a copy where that is possible.
 *
 * Return: true if the host was asked for some.
 */
bool gemini_asking_held(struct gemini *gemini, int nid)
{
	struct gemini_booking *booking = &gemini->booking;
	struct gemini_range ranges[GEMINI_RELEASE_DEFAULT];
	u64 blocks[GEMINI_RELEASE_DEFAULT];
	bool renew = gemini_asking_renew(gemini);
	unsigned int count, absent, i;
	u32 max;
	int ret;

	max = min_t(u32, ARRAY_SIZE(blocks), READ_ONCE(gemini->release_max));
	count = gemini_map_ask(&gemini->map, nid, blocks, max, &absent);
	if (!count)
		return false;
	for (i = 0; i < count; i++)
		ranges[i] = (struct gemini_range) { blocks[i], 1 };
	ret = submit(gemini, renew ? VIRTIO_GEMINI_REQ_RENEW :
				     VIRTIO_GEMINI_REQ_PREPARE, ranges, count,
		     absent);
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

/**
 * gemini_asking_free() - have free blocks made host-huge
 * @gemini: the device
 * @found: blocks to choose from
 * @need: how many
 *
 * A later look books them.
 *
 * Return: true if the host was asked for some.
 */
bool gemini_asking_free(struct gemini *gemini,
			const struct gemini_candidates *found, u64 need)
{
	struct gemini_range ranges[GEMINI_RELEASE_DEFAULT];
	unsigned int count = 0;
	unsigned int i;

	for (i = 0; i < found->count && count < need &&
	     count < ARRAY_SIZE(ranges); i++)
		/* What somebody has begun to use by now would be copied. */
		if (found->best[i].cost == GEMINI_COST_FREE_ABSENT &&
		    gemini_census_free(gemini, found->best[i].block))
			ranges[count++] = (struct gemini_range) {
				found->best[i].block, 1
			};
	if (!count || !balloons_rest(gemini) ||
	    submit(gemini, VIRTIO_GEMINI_REQ_PREPARE, ranges, count, count))
		return false;
	for (i = 0; i < count; i++)
		gemini_map_flag(&gemini->map, ranges[i].first,
				GEMINI_BLOCK_MADE, 0);
	gemini->booking.prepared += count;
	return true;
}

// SPDX-License-Identifier: GPL-2.0
/*
 * Held blocks make way for whoever isolates page frames: memory that goes
 * offline, virtio-mem that unplugs, CMA.
 *
 * All of them begin with start_isolate_page_range(), which fails with EBUSY on
 * pages that belong to a driver, before any notifier runs, or in ZONE_MOVABLE
 * lets the caller try for ever.  So an ftrace callback on that function gives
 * the blocks of its range back first.  What is busy cannot be given back yet,
 * and nothing waits for it: it goes back when it is idle, for who tries again
 * or tries still.  If the device is away that may be never, and who tries still
 * does nothing else; so the device is reset, after which nobody can drop what
 * was busy.
 *
 * Without this callback the driver holds nothing.
 */
#include <linux/ftrace.h>
#include <linux/gfp.h>
#include <linux/jiffies.h>
#include <linux/virtio_config.h>

#include "compat.h"
#include "gemini.h"
#include "trace.h"

#ifdef GEMINI_HAVE_HOOKS

/*
 * Page blocks are isolated one after the other once the callback has returned;
 * until all are, what was given back could be held again.
 */
#define WINDOW		(2 * HZ)

/* Between two looks at whether somebody answers for what is busy. */
#define AWAIT		HZ

#define FUNCTION	"start_isolate_page_range"

static struct gemini *gemini_of(struct ftrace_ops *ops)
{
	return container_of(ops, struct gemini, isolation.ops);
}

static void remember(struct gemini_isolation *isolation, u64 first, u64 end)
{
	struct gemini_isolated *range;

	spin_lock(&isolation->lock);
	range = &isolation->range[isolation->next++ % GEMINI_ISOLATED];
	*range = (struct gemini_isolated) { first, end, jiffies + WINDOW };
	spin_unlock(&isolation->lock);
}

/* Requests on releaseq are answered in their order. */
static bool answered(struct gemini *gemini)
{
	return READ_ONCE(gemini->release.answered) >=
	       READ_ONCE(gemini->isolation.awaited);
}

/*
 * Two looks have to find the device away: a process that lost its connection
 * gets the time to finish what it was doing.
 */
static void await_work(struct work_struct *work)
{
	struct gemini_isolation *isolation =
		container_of(to_delayed_work(work), struct gemini_isolation,
			     await);
	struct gemini *gemini = container_of(isolation, struct gemini,
					     isolation);
	bool before = isolation->away;
	u32 status;

	/* Also for the next time that somebody isolates memory. */
	isolation->away = false;
	if (answered(gemini))
		return;
	virtio_cread_le(gemini->vdev, struct virtio_gemini_config, status,
			&status);
	if (before && (status & VIRTIO_GEMINI_AWAY)) {
		mod_delayed_work(gemini->wq, &gemini->reset_work, 0);
		return;
	}
	isolation->away = status & VIRTIO_GEMINI_AWAY;
	queue_delayed_work(gemini->wq, &isolation->await, AWAIT);
}

/*
 * The function is about to isolate page frames from its first argument up to
 * its second.  It may sleep, so none of our locks is held here; but this is
 * called with preemption disabled, and must not.
 */
static void about_to_isolate(unsigned long ip, unsigned long parent_ip,
			     struct ftrace_ops *ops, struct ftrace_regs *fregs)
{
	struct gemini *gemini = gemini_of(ops);
	struct gemini_isolation *isolation = &gemini->isolation;
	unsigned long start = ftrace_regs_get_argument(fregs, 0);
	unsigned long end = ftrace_regs_get_argument(fregs, 1);
	u64 first, freed;

	WRITE_ONCE(isolation->fired, true);
	if (start >= end || gemini_hold_is_exact_caller(gemini))
		return;
	/* Whole page blocks are isolated, and a page block may be a block. */
	start = round_down(start, pageblock_nr_pages);
	end = min_t(u64, round_up(end, pageblock_nr_pages),
		    gemini->map.limit << gemini->block_order);
	if (start >= end)
		return;
	first = start >> gemini->block_order;
	end = DIV_ROUND_UP(end, 1UL << gemini->block_order);
	remember(isolation, first, end);
	/* Before the others are freed, or one could become idle in between. */
	gemini_map_recall(&gemini->map, first, end - first);
	freed = gemini_hold_free_range(gemini, first, end - first);
	gemini_trim_recall(gemini, first, end - first);
	gemini_booking_pause(gemini);
	atomic64_add(freed, &isolation->returned);
	WRITE_ONCE(isolation->awaited, READ_ONCE(gemini->release.made));
	if (!answered(gemini))
		queue_delayed_work(gemini->wq, &isolation->await, AWAIT);
	/* The host may be about to make huge what goes away now. */
	if (freed)
		gemini_report_kick(gemini);
	trace_gemini_isolate(gemini, first, end - first, freed);
}

/**
 * gemini_isolation_wants() - is somebody isolating this block?
 * @gemini: the device
 * @block: a block that has just been held
 *
 * Return: true if it should be given back.
 */
bool gemini_isolation_wants(struct gemini *gemini, u64 block)
{
	struct gemini_isolation *isolation = &gemini->isolation;
	bool wants = false;
	unsigned int i;

	spin_lock(&isolation->lock);
	for (i = 0; i < GEMINI_ISOLATED && !wants; i++) {
		struct gemini_isolated *range = &isolation->range[i];

		wants = block >= range->first && block < range->end &&
			time_before(jiffies, range->until);
	}
	spin_unlock(&isolation->lock);
	return wants;
}

/**
 * gemini_isolation_idle() - somebody isolated blocks that are idle only now
 * @gemini: the device
 * @first: the first block
 * @count: number of blocks
 *
 * Does not sleep.
 */
void gemini_isolation_idle(struct gemini *gemini, u64 first, u64 count)
{
	u64 block;

	for (block = first; block < first + count; block++)
		if (gemini_map_recalled(&gemini->map, block) &&
		    !gemini_hold_free(gemini, block))
			atomic64_inc(&gemini->isolation.returned);
}

/*
 * Does the callback run when it should?  A page of the kernel's own cannot be
 * isolated, and asking for it changes nothing.
 */
static bool fires(struct gemini *gemini)
{
	struct page *page = alloc_page(GFP_KERNEL);

	if (!page)
		return false;
	WRITE_ONCE(gemini->isolation.fired, false);
	/* Fails: the page is in use. */
	gemini_alloc_contig(page_to_pfn(page), 0, GFP_KERNEL);
	__free_page(page);
	return READ_ONCE(gemini->isolation.fired);
}

/**
 * gemini_isolation_active() - do held blocks make way?
 * @gemini: the device
 *
 * Return: true if blocks may be held, also in memory that may be unplugged.
 */
bool gemini_isolation_active(struct gemini *gemini)
{
	return READ_ONCE(gemini->isolation.active);
}

/**
 * gemini_isolation_state() - why, or why not
 * @gemini: the device
 *
 * Return: words for people.
 */
const char *gemini_isolation_state(struct gemini *gemini)
{
	return READ_ONCE(gemini->isolation.state);
}

/**
 * gemini_isolation_start() - install the callback
 * @gemini: the device
 *
 * May be tried again after it failed.  As long as it is installed the kernel
 * refuses to switch ftrace off (kernel.ftrace_enabled): the blocks that are
 * held then could not make way.
 *
 * Return: 0 or a negative error code; gemini_isolation_state() says more.
 */
int gemini_isolation_start(struct gemini *gemini)
{
	struct gemini_isolation *isolation = &gemini->isolation;
	int ret;

	if (isolation->active)
		return 0;
	isolation->ops = (struct ftrace_ops) {
		.func = about_to_isolate,
		.flags = FTRACE_OPS_FL_RECURSION | FTRACE_OPS_FL_PERMANENT,
	};
	ret = ftrace_set_filter(&isolation->ops, FUNCTION, strlen(FUNCTION), 1);
	if (ret) {
		isolation->state = "off: " FUNCTION " cannot be traced";
		return ret;
	}
	ret = register_ftrace_function(&isolation->ops);
	if (ret) {
		isolation->state = ret == -EBUSY ?
			"off: ftrace is switched off (kernel.ftrace_enabled)" :
			"off: ftrace refused the callback";
	} else if (!fires(gemini)) {
		unregister_ftrace_function(&isolation->ops);
		isolation->state = "off: the callback is not called";
		ret = -EIO;
	}
	if (ret) {
		ftrace_free_filter(&isolation->ops);
		return ret;
	}
	isolation->state = "on";
	WRITE_ONCE(isolation->active, true);
	return 0;
}

/**
 * gemini_isolation_stop() - remove the callback
 * @gemini: the device, which holds nothing any more
 */
void gemini_isolation_stop(struct gemini *gemini)
{
	struct gemini_isolation *isolation = &gemini->isolation;

	if (isolation->active) {
		WRITE_ONCE(isolation->active, false);
		unregister_ftrace_function(&isolation->ops);
		ftrace_free_filter(&isolation->ops);
		isolation->state = "off";
	}
	/* The test of a callback that was not kept may have queued it, too. */
	cancel_delayed_work_sync(&isolation->await);
}

void gemini_isolation_init(struct gemini *gemini)
{
	spin_lock_init(&gemini->isolation.lock);
	INIT_DELAYED_WORK(&gemini->isolation.await, await_work);
	gemini->isolation.state = "off";
}

#else /* !GEMINI_HAVE_HOOKS */

int gemini_isolation_start(struct gemini *gemini)
{
	return -EOPNOTSUPP;
}

void gemini_isolation_stop(struct gemini *gemini)
{
}

bool gemini_isolation_active(struct gemini *gemini)
{
	return false;
}

const char *gemini_isolation_state(struct gemini *gemini)
{
	return "off: this kernel has no ftrace callbacks";
}

bool gemini_isolation_wants(struct gemini *gemini, u64 block)
{
	return false;
}

void gemini_isolation_idle(struct gemini *gemini, u64 first, u64 count)
{
}

void gemini_isolation_init(struct gemini *gemini)
{
}

#endif /* GEMINI_HAVE_HOOKS */

// SPDX-License-Identifier: GPL-2.0
/*
 * How long a block is held for nothing: what somebody says, or what adapt.c
 * finds out.
 *
 * Algorithm 1 wants TLB misses.  Where the CPUs count them, perf counters do;
 * most virtual machines have none.  There, what stands in for them is what
 * causes them: blocks in use that are huge at one layer alone, and huge pages
 * that could not be placed on a ready block in this period.
 */
#include <linux/cpuhotplug.h>
#include <linux/jiffies.h>
#include <linux/percpu.h>
#include <linux/perf_event.h>

#include "adapt.h"
#include "gemini.h"
#include "trace.h"

/* P of the algorithm: long enough for a change of the timeout to show. */
#define PERIOD		(10 * HZ)

#define COUNTERS	2

#define TLB_MISSES(_op)						\
	(PERF_COUNT_HW_CACHE_DTLB | (PERF_COUNT_HW_CACHE_OP_##_op << 8) | \
	 (PERF_COUNT_HW_CACHE_RESULT_MISS << 16))

static const u64 configs[COUNTERS] = { TLB_MISSES(READ), TLB_MISSES(WRITE) };

struct gemini_counters {
	struct perf_event *event[COUNTERS];
};

/* Those of the CPUs that are online; one device has them. */
static DEFINE_PER_CPU(struct gemini_counters, counters);
static DEFINE_MUTEX(counters_lock);
static struct gemini *counters_owner;
static int counters_state;
/* Misses on CPUs that went offline since. */
static u64 counted_before;

static struct perf_event *counter(unsigned int cpu, u64 config)
{
	struct perf_event_attr attr = {
		.type = PERF_TYPE_HW_CACHE,
		.size = sizeof(attr),
		.config = config,
	};
	struct perf_event *event;

	event = perf_event_create_kernel_counter(&attr, cpu, NULL, NULL, NULL);
	return IS_ERR(event) ? NULL : event;
}

/* Misses so far, as if the counter had never shared its hardware. */
static u64 count_of(struct perf_event *event)
{
	u64 enabled, running;
	u64 count = perf_event_read_value(event, &enabled, &running);

	if (!running || running >= enabled)
		return count;
	return mul_u64_u64_div_u64(count, enabled, running);
}

/* A CPU without a counter is not counted; that is no reason not to have it. */
static int cpu_comes(unsigned int cpu)
{
	unsigned int i;

	mutex_lock(&counters_lock);
	for (i = 0; i < COUNTERS; i++)
		per_cpu(counters, cpu).event[i] = counter(cpu, configs[i]);
	mutex_unlock(&counters_lock);
	return 0;
}

static int cpu_goes(unsigned int cpu)
{
	struct perf_event *event;
	unsigned int i;

	mutex_lock(&counters_lock);
	for (i = 0; i < COUNTERS; i++) {
		event = per_cpu(counters, cpu).event[i];
		per_cpu(counters, cpu).event[i] = NULL;
		if (!event)
			continue;
		counted_before += count_of(event);
		perf_event_release_kernel(event);
	}
	mutex_unlock(&counters_lock);
	return 0;
}

static u64 count_all(void)
{
	u64 count;
	unsigned int i;
	int cpu;

	mutex_lock(&counters_lock);
	count = counted_before;
	for_each_possible_cpu(cpu) {
		for (i = 0; i < COUNTERS; i++) {
			struct perf_event *event = per_cpu(counters, cpu).event[i];

			if (event)
				count += count_of(event);
		}
	}
	mutex_unlock(&counters_lock);
	return count;
}

/* Do the CPUs count TLB misses?  If the first online one does, all will. */
static bool count_start(struct gemini *gemini)
{
	struct perf_event *event;
	unsigned int i;
	int ret;

	for (i = 0; i < COUNTERS; i++) {
		event = counter(cpumask_any(cpu_online_mask), configs[i]);
		if (!event)
			return false;
		perf_event_release_kernel(event);
	}
	if (cmpxchg(&counters_owner, NULL, gemini))
		return false;
	counted_before = 0;
	ret = cpuhp_setup_state(CPUHP_AP_ONLINE_DYN, "virtio/gemini:online",
				cpu_comes, cpu_goes);
	if (ret < 0) {
		counters_owner = NULL;
		return false;
	}
	counters_state = ret;
	return true;
}

static void count_stop(struct gemini *gemini)
{
	if (counters_owner != gemini)
		return;
	cpuhp_remove_state(counters_state);
	counters_owner = NULL;
}

/* What stands in for TLB misses. */
static u64 misaligned(struct gemini *gemini)
{
	struct gemini_timeout *timeout = &gemini->timeout;
	u64 misses = gemini_placement_misses(gemini);
	struct gemini_sums sums;
	u64 count;

	gemini_map_sum(&gemini->map, &sums);
	count = sums.guest_only + sums.host_only - sums.host_only_booked +
		misses - timeout->placement_misses;
	timeout->placement_misses = misses;
	return count;
}

/* The host may have another wish by now. */
static void take_wish(struct gemini *gemini)
{
	struct gemini_timeout *timeout = &gemini->timeout;
	unsigned int wish = READ_ONCE(gemini->booking_timeout_ms);

	lockdep_assert_held(&timeout->lock);
	if (wish == timeout->wish_ms)
		return;
	timeout->wish_ms = wish;
	gemini_adapt_init(&timeout->adapt, wish);
}

/**
 * gemini_timeout_ms() - how long a block is held for nothing
 * @gemini: the device
 *
 * Return: milliseconds.
 */
unsigned int gemini_timeout_ms(struct gemini *gemini)
{
	struct gemini_timeout *timeout = &gemini->timeout;
	unsigned int ms;

	spin_lock(&timeout->lock);
	take_wish(gemini);
	ms = timeout->fixed_ms ?: gemini_adapt_effective(&timeout->adapt);
	spin_unlock(&timeout->lock);
	return ms;
}

static unsigned int hold_ms(struct gemini *gemini, u64 wanted)
{
	return gemini_adapt_hold(gemini_timeout_ms(gemini),
				 global_zone_page_state(NR_FREE_PAGES),
				 totalram_pages(), wanted,
				 READ_ONCE(gemini->map.held));
}

/**
 * gemini_timeout_hold_ms() - the same under pressure, of the guest or the host
 * @gemini: the device
 *
 * Return: milliseconds, at most gemini_timeout_ms().
 */
unsigned int gemini_timeout_hold_ms(struct gemini *gemini)
{
	return hold_ms(gemini, gemini_giving_owed(gemini));
}

/**
 * gemini_timeout_guest_ms() - the same under pressure of the guest alone
 * @gemini: the device
 *
 * For what is done for the guest: the host has nothing of a block that goes to
 * the allocator.
 *
 * Return: milliseconds, at most gemini_timeout_ms().
 */
unsigned int gemini_timeout_guest_ms(struct gemini *gemini)
{
	return hold_ms(gemini, 0);
}

/* A period has ended. */
static void period_work(struct work_struct *work)
{
	struct gemini *gemini = container_of(to_delayed_work(work),
					     struct gemini, timeout.work);
	struct gemini_timeout *timeout = &gemini->timeout;
	bool holding = READ_ONCE(gemini->map.held);
	unsigned int before, after, fmfi;
	u64 misses, count;

	if (timeout->counting) {
		count = count_all();
		misses = count - timeout->counted;
		timeout->counted = count;
	} else {
		misses = misaligned(gemini);
	}
	/* A period in which nothing was held says nothing of its timeout. */
	if (holding || timeout->held) {
		fmfi = gemini_fmfi(gemini, NUMA_NO_NODE);
		spin_lock(&timeout->lock);
		take_wish(gemini);
		before = gemini_adapt_effective(&timeout->adapt);
		gemini_adapt_next(&timeout->adapt, misses, fmfi);
		after = gemini_adapt_effective(&timeout->adapt);
		spin_unlock(&timeout->lock);
		trace_gemini_timeout(gemini, misses, fmfi, before, after);
	}
	timeout->held = holding;
	queue_delayed_work(gemini->wq, &timeout->work, PERIOD);
}

static void adapt_start(struct gemini *gemini)
{
	struct gemini_timeout *timeout = &gemini->timeout;

	timeout->counting = count_start(gemini);
	if (timeout->counting)
		timeout->counted = count_all();
	timeout->placement_misses = gemini_placement_misses(gemini);
	timeout->held = READ_ONCE(gemini->map.held);
	queue_delayed_work(gemini->wq, &timeout->work, PERIOD);
}

static void adapt_stop(struct gemini *gemini)
{
	cancel_delayed_work_sync(&gemini->timeout.work);
	count_stop(gemini);
	gemini->timeout.counting = false;
}

/**
 * gemini_timeout_fix() - hold blocks this long, or find out how long
 * @gemini: the device
 * @ms: the timeout in milliseconds; 0: adapt it, from what the host wishes on
 *
 * Return: 0; -EINVAL if it is out of range.
 */
int gemini_timeout_fix(struct gemini *gemini, unsigned int ms)
{
	struct gemini_timeout *timeout = &gemini->timeout;
	bool was_fixed;

	if (ms && (ms < GEMINI_TIMEOUT_MIN || ms > GEMINI_TIMEOUT_MAX))
		return -EINVAL;
	mutex_lock(&timeout->control);
	was_fixed = timeout->fixed_ms;
	spin_lock(&timeout->lock);
	timeout->fixed_ms = ms;
	if (!ms)
		gemini_adapt_init(&timeout->adapt, timeout->wish_ms);
	spin_unlock(&timeout->lock);
	/* Counters are the administrator's when nobody needs them here. */
	if (ms && !was_fixed)
		adapt_stop(gemini);
	else if (!ms && was_fixed)
		adapt_start(gemini);
	mutex_unlock(&timeout->control);
	return 0;
}

/**
 * gemini_timeout_source() - what the timeout is adapted to
 * @gemini: the device
 *
 * Return: a word.
 */
const char *gemini_timeout_source(struct gemini *gemini)
{
	if (READ_ONCE(gemini->timeout.fixed_ms))
		return "fixed";
	return READ_ONCE(gemini->timeout.counting) ? "perf" : "misaligned";
}

/**
 * gemini_timeout_start() - begin to adapt
 * @gemini: the device, its configuration read
 */
void gemini_timeout_start(struct gemini *gemini)
{
	struct gemini_timeout *timeout = &gemini->timeout;

	mutex_init(&timeout->control);
	spin_lock_init(&timeout->lock);
	/* Nobody waits for it: no reason to wake a CPU that sleeps. */
	INIT_DEFERRABLE_WORK(&timeout->work, period_work);
	timeout->wish_ms = gemini->booking_timeout_ms;
	gemini_adapt_init(&timeout->adapt, timeout->wish_ms);
	adapt_start(gemini);
}

/**
 * gemini_timeout_stop() - adapt no more
 * @gemini: the device
 */
void gemini_timeout_stop(struct gemini *gemini)
{
	adapt_stop(gemini);
}

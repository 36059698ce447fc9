// SPDX-License-Identifier: GPL-2.0
/*
 * The huge bucket: aligned blocks that processes free are held again before
 * small allocations break them, and reused whole.
 *
 * Freed huge pages are noticed by ftrace callbacks on functions that they pass
 * through and base pages do not, so that base pages cost nothing:
 *
 *   zap_huge_pmd() unmaps a huge page.  The last mapping's reference is the
 *	last one, so the page is about to be freed.  Called for every such
 *	mapping of a process that ends or unmaps.
 *   __folio_unqueue_deferred_split() takes a folio that nobody refers to any
 *	more from the queue of those that might be split.  Every anonymous huge
 *	page enters that queue when it is made, unless the administrator says
 *	otherwise, and leaves it when it was looked at under memory pressure.
 *	Called for pages that lost their huge mapping before, and for those of
 *	several processes that end at the same time.
 *
 * A callback looks at the page's block, and goes on only if the host has a huge
 * page there.  A page that is being unmapped is parked: a reference keeps it
 * until a worker on the same CPU drops it and takes the block in the same
 * breath.  Under init_on_alloc taking a block means writing all of it, and
 * small allocations would have broken the other blocks by then.  What cannot be
 * parked is counted, and the worker looks for it: freed blocks wait on the
 * lists of the CPU that freed them, and the allocator hands out first what was
 * freed last.  The worker takes blocks without effort, keeps those that are
 * worth it, and gives the others back when it is done, not before: it would get
 * them again.
 *
 * A parked page is still charged, and in use for all the kernel knows, for some
 * milliseconds.  So it is parked only if no memory cgroup limit can be hit
 * because of it, not while the OOM killer waits for the memory, and memory
 * pressure ends it.
 *
 * Huge pages of tmpfs files that are truncated pass through neither function,
 * and are left to the booking.
 */
#include <linux/ftrace.h>
#include <linux/irq_work.h>
#include <linux/ktime.h>
#include <linux/memcontrol.h>
#include <linux/mm.h>
#include <linux/oom.h>
#include <linux/percpu.h>
#include <linux/sched.h>

#include "compat.h"
#include "gemini.h"
#include "trace.h"

#ifdef GEMINI_HAVE_HOOKS

/* Blocks that are not wanted, in one round. */
#define SPARE_MAX	16
/* First look at what is about to be freed, and rest between two looks. */
#define REST_MIN	msecs_to_jiffies(2)
/* Rest after nothing was found, at most. */
#define REST_MAX	HZ
/* Looks until what was not found counts as broken. */
#define LOOKS		5
/* Pages that one CPU parks: 2 GiB. */
#define PARKED_MAX	1024
/* Nothing is held again so long after memory was short. */
#define PRESSURE_REST	HZ
/* Share of memory that is held at most, where the host has no wish. */
#define SHARE		2

/**
 * struct gemini_freed - aligned blocks of one node that one CPU freed
 * @seen: seen by each of the callbacks, and not parked
 * @kept: those of them that are held again
 */
struct gemini_freed {
	atomic_t seen[GEMINI_TRIGGERS];
	unsigned int kept;
};

/**
 * struct gemini_parked - a page that is about to be free
 * @folio: kept by a reference; whoever takes it out drops it
 * @since: since when, in jiffies; the block is held for nothing from then on
 */
struct gemini_parked {
	struct folio *folio;
	unsigned long since;
};

/**
 * struct gemini_bucket_cpu - what one CPU frees
 * @gemini: the device
 * @armed: @kick or @work is under way
 * @kick: queues @work, because callbacks may run under locks of any kind
 * @work: looks for the freed blocks
 * @looks: looks at what was freed last
 * @rest: until the next look, in jiffies
 * @next: slot of @parked to be used next, by callbacks on this CPU alone
 * @parked: pages that are about to be free
 * @freed: what there is to be found, for each node
 */
struct gemini_bucket_cpu {
	struct gemini *gemini;
	atomic_t armed;
	struct irq_work kick;
	struct delayed_work work;
	unsigned int looks;
	unsigned long rest;
	unsigned int next;
	struct gemini_parked parked[PARKED_MAX];
	struct gemini_freed freed[];
};

static const char * const functions[GEMINI_TRIGGERS] = {
	[GEMINI_TRIGGER_ZAP] = "zap_huge_pmd",
	[GEMINI_TRIGGER_UNQUEUE] = "__folio_unqueue_deferred_split",
};

static bool host_has_huge(struct gemini *gemini, unsigned long pfn)
{
	struct gemini_block *entry;
	struct gemini_block copy;

	entry = gemini_map_find(&gemini->map, pfn >> gemini->block_order);
	if (!entry)
		return false;
	/* Without the map's lock: a stale state costs one look, no more. */
	copy = data_race(*entry);
	return gemini_host_huge(copy.host);
}

static void arm(struct gemini_bucket_cpu *cpu)
{
	if (!atomic_xchg(&cpu->armed, 1))
		irq_work_queue(&cpu->kick);
}

static void count(struct gemini *gemini, int nid, enum gemini_trigger trigger)
{
	struct gemini_bucket_cpu *cpu = get_cpu_ptr(gemini->bucket.cpu);

	atomic_inc(&cpu->freed[nid].seen[trigger]);
	arm(cpu);
	put_cpu_ptr(gemini->bucket.cpu);
}

/* Could somebody run into a limit because the folio stays charged? */
static bool limited(struct folio *folio)
{
	struct page_counter *counter;
	struct mem_cgroup *memcg;
	bool limit = false;

	rcu_read_lock();
	memcg = folio_memcg(folio);
	counter = memcg ? &memcg->memory : NULL;
	for (; counter && !limit; counter = counter->parent)
		limit = READ_ONCE(counter->max) != PAGE_COUNTER_MAX ||
			READ_ONCE(counter->high) != PAGE_COUNTER_MAX;
	rcu_read_unlock();
	return limit;
}

static bool full(struct gemini *gemini)
{
	return READ_ONCE(gemini->map.held) +
	       atomic_read(&gemini->bucket.parked) >=
	       gemini_bucket_limit(gemini);
}

/* Is what is held used by anybody, and is this the time to hold more? */
static bool welcome(struct gemini *gemini)
{
	return gemini_placement_active(gemini) &&
	       gemini_isolation_active(gemini) && !full(gemini) &&
	       time_after_eq(jiffies, READ_ONCE(gemini->bucket.pressure_until));
}

/* The reference is the slot's from here on, unless this returns false. */
static bool park(struct gemini *gemini, struct folio *folio)
{
	struct gemini_bucket_cpu *cpu;
	struct gemini_parked *slot;
	bool parked = false;

	if (current->flags & (PF_KTHREAD | PF_MEMALLOC) ||
	    tsk_is_oom_victim(current) || !welcome(gemini) || limited(folio))
		return false;
	cpu = get_cpu_ptr(gemini->bucket.cpu);
	slot = &cpu->parked[cpu->next % PARKED_MAX];
	if (!READ_ONCE(slot->folio)) {
		cpu->next++;
		WRITE_ONCE(slot->since, jiffies);
		atomic_inc(&gemini->bucket.parked);
		/* Counted before anybody can take it out again. */
		smp_store_release(&slot->folio, folio);
		arm(cpu);
		parked = true;
	}
	put_cpu_ptr(gemini->bucket.cpu);
	return parked;
}

static struct gemini *gemini_of(struct ftrace_ops *ops,
				enum gemini_trigger trigger)
{
	return container_of(ops, struct gemini, bucket.ops[trigger]);
}

/* An anonymous huge page that is mapped at @pmd and nowhere else, or NULL. */
static struct folio *last_mapped(pmd_t *pmd, unsigned int order)
{
	/* The page table cannot go away; what is in it can change. */
	pmd_t entry = pmdp_get_lockless(pmd);
	struct folio *folio;
	struct page *page;

	if (!pmd_present(entry) || !pmd_trans_huge(entry))
		return NULL;
	page = pfn_to_page(pmd_pfn(entry));
	folio = (struct folio *)page;
	/* The zero page stays; what others map or a file has does so as well. */
	if (!(gemini_page_flags(page) & BIT(PG_head)) ||
	    !(gemini_page_flags(page + 1) & BIT(PG_large_rmappable)) ||
	    page_ref_count(page) != 1 || !folio_try_get(folio))
		return NULL;
	entry = pmdp_get_lockless(pmd);
	if (pmd_present(entry) && pmd_trans_huge(entry) &&
	    pmd_pfn(entry) == folio_pfn(folio) && folio_test_anon(folio) &&
	    folio_order(folio) == order && folio_ref_count(folio) == 2)
		return folio;
	folio_put(folio);
	return NULL;
}

/* zap_huge_pmd(tlb, vma, pmd, addr), before it does anything */
static void zapping(unsigned long ip, unsigned long parent_ip,
		    struct ftrace_ops *ops, struct ftrace_regs *fregs)
{
	struct gemini *gemini = gemini_of(ops, GEMINI_TRIGGER_ZAP);
	struct folio *folio;
	int nid;

	folio = last_mapped((pmd_t *)ftrace_regs_get_argument(fregs, 2),
			    gemini->block_order);
	if (!folio)
		return;
	nid = folio_nid(folio);
	if (!host_has_huge(gemini, folio_pfn(folio))) {
		folio_put(folio);
	} else if (!park(gemini, folio)) {
		folio_put(folio);
		count(gemini, nid, GEMINI_TRIGGER_ZAP);
	}
}

static void look(struct work_struct *work);

/* __folio_unqueue_deferred_split(folio), nobody refers to the folio any more */
static void unqueueing(unsigned long ip, unsigned long parent_ip,
		       struct ftrace_ops *ops, struct ftrace_regs *fregs)
{
	struct gemini *gemini = gemini_of(ops, GEMINI_TRIGGER_UNQUEUE);
	struct folio *folio = (struct folio *)ftrace_regs_get_argument(fregs, 0);
	struct work_struct *work;

	if (folio_order(folio) != gemini->block_order ||
	    !host_has_huge(gemini, folio_pfn(folio)))
		return;
	/* The worker knows what it frees. */
	work = current_work();
	if (!work || work->func != look)
		count(gemini, folio_nid(folio), GEMINI_TRIGGER_UNQUEUE);
}

static void (* const callbacks[GEMINI_TRIGGERS])(unsigned long, unsigned long,
						 struct ftrace_ops *,
						 struct ftrace_regs *) = {
	[GEMINI_TRIGGER_ZAP] = zapping,
	[GEMINI_TRIGGER_UNQUEUE] = unqueueing,
};

static void kick(struct irq_work *work)
{
	struct gemini_bucket_cpu *cpu =
		container_of(work, struct gemini_bucket_cpu, kick);

	queue_delayed_work_on(smp_processor_id(), cpu->gemini->bucket.wq,
			      &cpu->work, cpu->rest);
}

/**
 * gemini_bucket_limit() - how many blocks may be held when more are added
 * @gemini: the device
 *
 * Return: what the host wishes, else the driver's choice: a share of memory.
 */
u64 gemini_bucket_limit(struct gemini *gemini)
{
	u64 wish = READ_ONCE(gemini->bucket_max);

	return wish ?: (totalram_pages() >> gemini->block_order) / SHARE;
}

/* What one look did. */
struct result {
	unsigned int kept;
	unsigned int spare;
	unsigned int missing;
};

/*
 * Holds up to @wanted blocks again that were freed; returns how many.  They are
 * of this node, or if it is known of this @zone, and free since @since.
 */
static unsigned int rebook(struct gemini *gemini, int nid, struct zone *zone,
			   unsigned long since, unsigned int wanted,
			   struct result *result)
{
	unsigned int nr_spare = 0, kept = 0, i;
	u64 spare[SPARE_MAX];
	u64 block;

	while (kept < wanted && nr_spare < SPARE_MAX && welcome(gemini)) {
		if (zone ? gemini_hold_freed(gemini, zone, since, &block) :
			   gemini_hold_any(gemini, nid, &block))
			break;
		if (gemini_booking_wants(gemini, block))
			kept++;
		else
			spare[nr_spare++] = block;
		cond_resched();
	}
	for (i = 0; i < nr_spare; i++)
		/* Unless memory got short meanwhile: then it is back already. */
		gemini_hold_free(gemini, spare[i]);
	result->kept += kept;
	result->spare += nr_spare;
	return kept;
}

static unsigned int found_by_any(const struct gemini_freed *freed,
				 unsigned int counts[GEMINI_TRIGGERS])
{
	unsigned int most = 0;
	unsigned int i;

	for (i = 0; i < GEMINI_TRIGGERS; i++) {
		counts[i] = atomic_read(&freed->seen[i]);
		most = max(most, counts[i]);
	}
	return most;
}

/* What is counted up to now was found, or will not be. */
static void settle(struct gemini *gemini, struct gemini_freed *freed)
{
	unsigned int counts[GEMINI_TRIGGERS];
	unsigned int most = found_by_any(freed, counts);
	unsigned int i;

	atomic64_add(most, &gemini->bucket.freed);
	for (i = 0; i < GEMINI_TRIGGERS; i++)
		atomic_sub(counts[i], &freed->seen[i]);
	freed->kept = 0;
}

/* Takes a page out of its slot; NULL if it is free or another was faster. */
static struct folio *unpark(struct gemini *gemini, struct gemini_parked *slot)
{
	struct folio *folio = READ_ONCE(slot->folio);

	if (!folio || cmpxchg(&slot->folio, folio, NULL) != folio)
		return NULL;
	atomic_dec(&gemini->bucket.parked);
	return folio;
}

/*
 * Drops each parked page of this CPU and takes its block.  Those that are being
 * unmapped still wait for the next look, unless it is the @last.
 */
static unsigned int take_parked(struct gemini *gemini,
				struct gemini_bucket_cpu *cpu, bool last,
				struct result *result)
{
	unsigned int taken = 0;
	struct folio *folio;
	struct zone *zone;
	unsigned long since;
	unsigned int i;

	for (i = 0; i < PARKED_MAX; i++) {
		/* Pairs with park(). */
		folio = smp_load_acquire(&cpu->parked[i].folio);
		if (!folio)
			continue;
		since = READ_ONCE(cpu->parked[i].since);
		/* Somebody may take it out meanwhile; a look costs nothing. */
		if (!last && page_ref_count((struct page *)folio) > 1) {
			result->missing++;
			continue;
		}
		folio = unpark(gemini, &cpu->parked[i]);
		if (!folio)
			continue;
		zone = folio_zone(folio);
		folio_put(folio);
		atomic64_inc(&gemini->bucket.freed);
		rebook(gemini, zone_to_nid(zone), zone, since, 1, result);
		taken++;
		cond_resched();
	}
	return taken;
}

/**
 * gemini_bucket_parked() - number of blocks that are neither held nor free
 * @gemini: the device
 *
 * Return: number of blocks that gemini_bucket_pressure() would free.
 */
unsigned int gemini_bucket_parked(struct gemini *gemini)
{
	return atomic_read(&gemini->bucket.parked);
}

/**
 * gemini_bucket_pressure() - memory is short: park nothing, hold nothing again
 * @gemini: the device
 *
 * Does not sleep.
 *
 * Return: number of blocks freed.
 */
u64 gemini_bucket_pressure(struct gemini *gemini)
{
	struct gemini_bucket *bucket = &gemini->bucket;
	struct folio *folio;
	unsigned int i;
	u64 freed = 0;
	int cpu;

	WRITE_ONCE(bucket->pressure_until, jiffies + PRESSURE_REST);
	for_each_possible_cpu(cpu) {
		for (i = 0; i < PARKED_MAX && atomic_read(&bucket->parked);
		     i++) {
			folio = unpark(gemini,
				       &per_cpu_ptr(bucket->cpu, cpu)->parked[i]);
			if (!folio)
				continue;
			folio_put(folio);
			freed++;
		}
	}
	return freed;
}

static bool any_parked(struct gemini_bucket_cpu *cpu)
{
	unsigned int i;

	for (i = 0; i < PARKED_MAX; i++)
		if (READ_ONCE(cpu->parked[i].folio))
			return true;
	return false;
}

static void look(struct work_struct *work)
{
	struct gemini_bucket_cpu *cpu =
		container_of(to_delayed_work(work), struct gemini_bucket_cpu,
			     work);
	bool last = ++cpu->looks >= LOOKS;
	struct gemini *gemini = cpu->gemini;
	unsigned int counts[GEMINI_TRIGGERS];
	struct result result = { 0 };
	u64 start = ktime_get_ns();
	unsigned int parked;
	int nid;

	parked = take_parked(gemini, cpu, last, &result);
	for_each_online_node(nid) {
		struct gemini_freed *freed = &cpu->freed[nid];
		unsigned int most = found_by_any(freed, counts);

		if (most <= freed->kept)
			continue;
		freed->kept += rebook(gemini, nid, NULL, jiffies,
				      most - freed->kept, &result);
		result.missing += most - freed->kept;
	}
	atomic64_add(result.kept, &gemini->bucket.rebooked);
	trace_gemini_rebook(gemini, parked, result.kept, result.spare,
			    result.missing, ktime_get_ns() - start);
	cpu->rest = result.kept ? REST_MIN : min(cpu->rest * 2, REST_MAX);
	if (result.kept)
		gemini_report_kick(gemini);
	if (result.missing && !last) {
		/* On its way still, or behind what others freed. */
		queue_delayed_work_on(raw_smp_processor_id(), gemini->bucket.wq,
				      &cpu->work, cpu->rest);
		return;
	}

	cpu->looks = 0;
	for_each_online_node(nid)
		settle(gemini, &cpu->freed[nid]);
	if (result.missing)
		/* Perhaps it can be had at its address. */
		gemini_booking_kick(gemini);
	atomic_set(&cpu->armed, 0);
	/* Whoever counted before saw it armed: pairs with that atomic_xchg(). */
	smp_mb__after_atomic();
	for_each_online_node(nid)
		if (found_by_any(&cpu->freed[nid], counts))
			arm(cpu);
	if (any_parked(cpu))
		arm(cpu);
}

static int hook(struct gemini *gemini, enum gemini_trigger trigger)
{
	struct ftrace_ops *ops = &gemini->bucket.ops[trigger];
	const char *name = functions[trigger];
	int ret;

	if (trigger == GEMINI_TRIGGER_ZAP && !GEMINI_ZAP_HUGE_PMD_KNOWN)
		return -ENOENT;
	*ops = (struct ftrace_ops) {
		.func = callbacks[trigger],
		.flags = FTRACE_OPS_FL_RECURSION,
	};
	/* Fails if this kernel has no such function, or has it inlined. */
	ret = ftrace_set_filter(ops, (unsigned char *)name, strlen(name), 1);
	if (ret)
		return ret;
	ret = register_ftrace_function(ops);
	if (ret)
		ftrace_free_filter(ops);
	return ret;
}

static void unhook(struct gemini *gemini, enum gemini_trigger trigger)
{
	struct ftrace_ops *ops = &gemini->bucket.ops[trigger];

	unregister_ftrace_function(ops);
	ftrace_free_filter(ops);
}

static void switch_off(struct gemini *gemini)
{
	struct gemini_bucket *bucket = &gemini->bucket;
	unsigned int i;
	int cpu;

	for (i = 0; i < GEMINI_TRIGGERS; i++)
		if (bucket->hooked & BIT(i))
			unhook(gemini, i);
	WRITE_ONCE(bucket->hooked, 0);
	/* No callback runs any more, and what they queued comes to its end. */
	for_each_possible_cpu(cpu) {
		struct gemini_bucket_cpu *this = per_cpu_ptr(bucket->cpu, cpu);

		do {
			irq_work_sync(&this->kick);
			flush_delayed_work(&this->work);
		} while (atomic_read(&this->armed));
	}
}

static int switch_on(struct gemini *gemini)
{
	struct gemini_bucket *bucket = &gemini->bucket;
	unsigned int i, hooked = 0;
	int ret = 0;

	for (i = 0; i < GEMINI_TRIGGERS; i++) {
		int error = hook(gemini, i);

		if (error)
			ret = ret ?: error;
		else
			hooked |= BIT(i);
	}
	WRITE_ONCE(bucket->hooked, hooked);
	return hooked ? 0 : ret;
}

/**
 * gemini_bucket_switch() - switch the bucket on or off
 * @gemini: the device
 * @on: whether freed aligned blocks are held again
 *
 * Return: 0 or a negative error code.
 */
int gemini_bucket_switch(struct gemini *gemini, bool on)
{
	struct gemini_bucket *bucket = &gemini->bucket;
	int ret = 0;

	mutex_lock(&bucket->lock);
	/* Without it nothing may be held; ftrace may have been off before. */
	if (on)
		ret = gemini_isolation_start(gemini);
	if (on && !ret && !bucket->hooked)
		ret = switch_on(gemini);
	else if (!on && bucket->hooked)
		switch_off(gemini);
	mutex_unlock(&bucket->lock);
	return ret;
}

/**
 * gemini_bucket_hooks() - the functions that tell of freed huge pages
 * @gemini: the device
 * @buffer: where to, a page
 *
 * Return: length of the text.
 */
ssize_t gemini_bucket_hooks(struct gemini *gemini, char *buffer)
{
	unsigned int hooked = READ_ONCE(gemini->bucket.hooked);
	ssize_t length = 0;
	unsigned int i;

	for (i = 0; i < GEMINI_TRIGGERS; i++)
		if (hooked & BIT(i))
			length += sysfs_emit_at(buffer, length, "%s%s",
						length ? " " : "",
						functions[i]);
	return length + sysfs_emit_at(buffer, length, "%s\n",
				      hooked ? "" : "off");
}

int gemini_bucket_init(struct gemini *gemini)
{
	struct gemini_bucket *bucket = &gemini->bucket;
	int cpu;

	mutex_init(&bucket->lock);
	/* Of the CPU that freed, and long enough to disturb others there. */
	bucket->wq = alloc_workqueue("virtio_gemini_bucket/%d",
				     GEMINI_WQ_PERCPU | WQ_FREEZABLE |
				     WQ_CPU_INTENSIVE, 0, gemini->vdev->index);
	if (!bucket->wq)
		return -ENOMEM;
	bucket->cpu = __alloc_percpu(struct_size(bucket->cpu, freed,
						 nr_node_ids),
				     __alignof__(*bucket->cpu));
	if (!bucket->cpu) {
		destroy_workqueue(bucket->wq);
		return -ENOMEM;
	}
	for_each_possible_cpu(cpu) {
		struct gemini_bucket_cpu *this = per_cpu_ptr(bucket->cpu, cpu);

		this->gemini = gemini;
		this->rest = REST_MIN;
		init_irq_work(&this->kick, kick);
		INIT_DELAYED_WORK(&this->work, look);
	}
	return 0;
}

void gemini_bucket_exit(struct gemini *gemini)
{
	gemini_bucket_switch(gemini, false);
	destroy_workqueue(gemini->bucket.wq);
	free_percpu(gemini->bucket.cpu);
}

#else /* !GEMINI_HAVE_HOOKS */

int gemini_bucket_switch(struct gemini *gemini, bool on)
{
	return on ? -EOPNOTSUPP : 0;
}

u64 gemini_bucket_limit(struct gemini *gemini)
{
	return READ_ONCE(gemini->bucket_max);
}

unsigned int gemini_bucket_parked(struct gemini *gemini)
{
	return 0;
}

u64 gemini_bucket_pressure(struct gemini *gemini)
{
	return 0;
}

ssize_t gemini_bucket_hooks(struct gemini *gemini, char *buffer)
{
	return sysfs_emit(buffer, "off\n");
}

int gemini_bucket_init(struct gemini *gemini)
{
	return 0;
}

void gemini_bucket_exit(struct gemini *gemini)
{
}

#endif /* GEMINI_HAVE_HOOKS */

// SPDX-License-Identifier: GPL-2.0
/*
 * What the guest's kernel works with all the time.
 *
 * The kernel maps all memory by pages of 1 GiB, so the host's pages alone decide
 * how large its entries in the TLB are, and all of it is pinned: no huge page of
 * a program ever lies there.  A handful of blocks has most of the kernel's hits
 * of the second-level TLB (docs/measurements.md).
 *
 * Some of them are always the same: data that every system call reads, and those
 * of the processors.  For the others no processor marks what was accessed, since
 * a mark would be for 1 GiB.  So they are sampled: from time to time each
 * processor that is busy looks where the objects of the task lie that it runs,
 * and where its allocator works, which hands out again what was freed last.
 */
#include <linux/bsearch.h>
#include <linux/cpu.h>
#include <linux/ctype.h>
#include <linux/mm.h>
#include <linux/percpu.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/slab.h>
#include <linux/sort.h>

#include "gemini.h"

/* Initialised data are at least this large, and others, in blocks. */
#define DATA_BLOCKS	2
/* Blocks beside those of the processors that are known without looking. */
#define STATIC_BLOCKS	(2 + 2 * DATA_BLOCKS)

/* Time between two samples of a processor that is busy. */
#define PERIOD		(2 * HZ)
/* The busiest blocks are picked anew after so many of these ... */
#define ROUNDS		16U
/* ... if there were so many samples: a guest that sleeps shows nothing. */
#define SAMPLES_MIN	8U
/* A block that is found less than once in so many samples is not picked. */
#define RARE		4U
/*
 * Of those that are picked so many are said to be hot, the static ones included:
 * one for each so many huge pages of programs, which so stay nine tenths of all
 * that the host makes huge, and fewer where it has not enough for them.
 */
#define HUGE_PER_BLOCK		13U
#define HUGE_PER_BLOCK_SCARCE	64U

/*
 * Of each processor, what a module has lies beside what the kernel has itself, in
 * the chunk that was made at boot.
 */
static DEFINE_PER_CPU(char, gemini_beside);

/* A sample of one processor, taken when it is next busy. */
struct gemini_kernel_cpu {
	struct timer_list timer;
	struct gemini_kernel *kernel;
};

static int by_number(const void *a, const void *b)
{
	const struct gemini_kernel_known *one = a, *other = b;

	return one->block < other->block ? -1 : one->block > other->block;
}

static void add(struct gemini_kernel *kernel, phys_addr_t address,
		unsigned int blocks, bool always)
{
	for (; blocks--; address += 1UL << kernel->shift) {
		u64 block = address >> kernel->shift;
		unsigned int i = 0;

		while (i < kernel->nr_known && kernel->known[i].block != block)
			i++;
		if (i < kernel->nr_known)
			continue;
		kernel->known[kernel->nr_known++] = (struct gemini_kernel_known) {
			.block = block, .always = always,
		};
		kernel->nr_always += always;
	}
}

static const struct gemini_kernel_known *
find_known(const struct gemini_kernel *kernel, u64 block)
{
	struct gemini_kernel_known key = { .block = block };

	return bsearch(&key, kernel->known, kernel->nr_known, sizeof(key),
		       by_number);
}

/**
 * gemini_kernel_owns() - are the kernel's own data in this block?
 * @gemini: the device
 * @block: a block
 *
 * Such a block never is free as a whole, nor will be.
 *
 * Return: true if they are known to be.
 */
bool gemini_kernel_owns(struct gemini *gemini, u64 block)
{
	return find_known(&gemini->kernel, block);
}

/**
 * gemini_kernel_heat() - how much does the kernel work with this block?
 * @gemini: the device
 * @block: a block that is pinned
 *
 * Return: 0 if that is not known, up to the number of pages of a block.
 */
u16 gemini_kernel_heat(struct gemini *gemini, u64 block)
{
	const struct gemini_kernel *kernel = &gemini->kernel;
	const struct gemini_kernel_known *known = find_known(kernel, block);
	const u16 always = 1U << gemini->block_order, much = always / 2;
	unsigned int i;

	lockdep_assert_held(&gemini->census.lock);
	if (known)
		return known->always ? always : much;
	for (i = 0; i < kernel->nr_busy; i++)
		if (kernel->busy[i] == block)
			return i < kernel->nr_hot ? always : much;
	return 0;
}

#ifdef CONFIG_X86_64

/*
 * Notes the block of an object, if the kernel maps it by something larger than
 * a base page: else the host's huge page is of no use.
 */
static void note(struct gemini_kernel *kernel, const void *object)
{
	unsigned int level, i, empty = GEMINI_KERNEL_FOUND;
	unsigned long flags;
	u64 block = 0;

	if (!object)
		return;
	/* Page tables of the kernel are freed after a flush of all TLBs. */
	local_irq_save(flags);
	if (lookup_address((unsigned long)object, &level) &&
	    level > PG_LEVEL_4K)
		block = slow_virt_to_phys((void *)object) >> kernel->shift;
	local_irq_restore(flags);
	if (!block)
		return;
	for (i = 0; i < GEMINI_KERNEL_FOUND; i++) {
		if (!kernel->found[i].times) {
			empty = min(empty, i);
		} else if (kernel->found[i].block == block) {
			kernel->found[i].times++;
			return;
		}
	}
	/* What finds no room now may later: the rare ones fade. */
	if (empty < GEMINI_KERNEL_FOUND)
		kernel->found[empty] = (struct gemini_kernel_found) {
			.block = block, .times = 1,
		};
}

/* Where the allocator of this processor works, and what it notes that in. */
static void note_allocator(struct gemini_kernel *kernel)
{
	static const u16 sizes[] = { 8, 16, 32, 64, 96, 128, 192, 256 };
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(sizes); i++) {
		void *object = kmalloc(sizes[i], GFP_NOWAIT | __GFP_NOWARN);

		if (!object)
			continue;
		note(kernel, object);
		note(kernel, virt_to_page(object));
		kfree(object);
	}
}

/* In softirq context: the task that was interrupted cannot lose these. */
static void note_task(struct gemini_kernel *kernel)
{
	struct task_struct *task = current;

	note(kernel, task);
	note(kernel, task->signal);
	note(kernel, READ_ONCE(task->files));
	note(kernel, READ_ONCE(task->fs));
	note(kernel, rcu_access_pointer(task->sighand));
	note(kernel, rcu_access_pointer(task->real_cred));
	if (task->mm) {
		note(kernel, task->mm);
		note(kernel, task->mm->pgd);
	}
}

static void sample(struct timer_list *timer)
{
	struct gemini_kernel *kernel =
		container_of(timer, struct gemini_kernel_cpu, timer)->kernel;

	if (is_idle_task(current))
		return;
	spin_lock(&kernel->lock);
	note_task(kernel);
	note_allocator(kernel);
	kernel->samples++;
	spin_unlock(&kernel->lock);
}

static int by_times(const void *a, const void *b)
{
	const struct gemini_kernel_found *one = a, *other = b;

	return one->times > other->times ? -1 : one->times < other->times;
}

static bool is_busy(const struct gemini_kernel *kernel, u64 block)
{
	unsigned int i;

	for (i = 0; i < kernel->nr_busy; i++)
		if (kernel->busy[i] == block)
			return true;
	return false;
}

/* Picks the blocks that were found most often. */
static void pick(struct gemini *gemini)
{
	struct gemini_kernel_found found[GEMINI_KERNEL_FOUND];
	struct gemini_kernel *kernel = &gemini->kernel;
	unsigned int i, samples, picked = 0;
	u64 busy[GEMINI_KERNEL_BUSY];

	spin_lock_bh(&kernel->lock);
	samples = kernel->samples;
	if (samples >= SAMPLES_MIN) {
		memcpy(found, kernel->found, sizeof(found));
		for (i = 0; i < GEMINI_KERNEL_FOUND; i++)
			kernel->found[i].times /= 2;
		kernel->samples /= 2;
	}
	spin_unlock_bh(&kernel->lock);
	if (samples < SAMPLES_MIN)
		return;

	for (i = 0; i < GEMINI_KERNEL_FOUND; i++) {
		if (found[i].times < samples / RARE ||
		    gemini_kernel_owns(gemini, found[i].block))
			found[i].times = 0;
		/* Another one has to be far busier to take its place. */
		if (is_busy(kernel, found[i].block))
			found[i].times *= 2;
	}
	sort(found, GEMINI_KERNEL_FOUND, sizeof(found[0]), by_times, NULL);
	while (picked < GEMINI_KERNEL_BUSY && found[picked].times) {
		busy[picked] = found[picked].block;
		picked++;
	}
	/* The census reads it. */
	mutex_lock(&gemini->census.lock);
	memcpy(kernel->busy, busy, picked * sizeof(busy[0]));
	kernel->nr_busy = picked;
	mutex_unlock(&gemini->census.lock);
}

/* How many of them are worth a huge page that counts as misaligned. */
static void count_hot(struct gemini *gemini)
{
	struct gemini_kernel *kernel = &gemini->kernel;
	struct gemini_sums sums;
	u64 most;

	gemini_map_sum(&gemini->map, &sums);
	most = sums.guest[VIRTIO_GEMINI_GUEST_HUGE] /
	       (READ_ONCE(gemini->scarce) ? HUGE_PER_BLOCK_SCARCE :
					    HUGE_PER_BLOCK);
	mutex_lock(&gemini->census.lock);
	kernel->nr_hot = most > kernel->nr_always ? most - kernel->nr_always : 0;
	mutex_unlock(&gemini->census.lock);
}

static void kernel_work(struct work_struct *work)
{
	struct gemini *gemini =
		container_of(to_delayed_work(work), struct gemini, kernel.work);
	struct gemini_kernel *kernel = &gemini->kernel;
	int cpu;

	if (++kernel->round % ROUNDS == 0) {
		pick(gemini);
		count_hot(gemini);
	}
	cpus_read_lock();
	for_each_online_cpu(cpu) {
		struct timer_list *timer = &per_cpu_ptr(kernel->cpu, cpu)->timer;

		/* One that sleeps takes its sample when it wakes up. */
		if (!timer_pending(timer)) {
			timer->expires = jiffies + 1;
			add_timer_on(timer, cpu);
		}
	}
	cpus_read_unlock();
	queue_delayed_work(gemini->wq, &kernel->work, PERIOD);
}

/**
 * gemini_kernel_start() - begin to sample, or go on
 * @gemini: the device
 */
void gemini_kernel_start(struct gemini *gemini)
{
	enable_delayed_work(&gemini->kernel.work);
	queue_delayed_work(gemini->wq, &gemini->kernel.work, PERIOD);
}

/**
 * gemini_kernel_stop() - sample no more
 * @gemini: the device
 */
void gemini_kernel_stop(struct gemini *gemini)
{
	int cpu;

	disable_delayed_work_sync(&gemini->kernel.work);
	for_each_possible_cpu(cpu)
		timer_delete_sync(&per_cpu_ptr(gemini->kernel.cpu, cpu)->timer);
}

static int init_samples(struct gemini *gemini)
{
	struct gemini_kernel *kernel = &gemini->kernel;
	int cpu;

	spin_lock_init(&kernel->lock);
	kernel->cpu = devm_alloc_percpu(&gemini->vdev->dev,
					struct gemini_kernel_cpu);
	if (!kernel->cpu)
		return -ENOMEM;
	for_each_possible_cpu(cpu) {
		struct gemini_kernel_cpu *of = per_cpu_ptr(kernel->cpu, cpu);

		of->kernel = kernel;
		/* Not worth to wake a processor up. */
		timer_setup(&of->timer, sample,
			    TIMER_PINNED | TIMER_DEFERRABLE);
	}
	INIT_DELAYED_WORK(&kernel->work, kernel_work);
	disable_delayed_work(&kernel->work);
	return 0;
}

#else /* !CONFIG_X86_64 */

void gemini_kernel_start(struct gemini *gemini)
{
}

void gemini_kernel_stop(struct gemini *gemini)
{
}

static int init_samples(struct gemini *gemini)
{
	return 0;
}

#endif /* !CONFIG_X86_64 */

int gemini_kernel_init(struct gemini *gemini)
{
	unsigned int most = num_possible_cpus() + STATIC_BLOCKS;
	struct gemini_kernel *kernel = &gemini->kernel;
	int cpu;

	kernel->shift = gemini->block_shift;
	kernel->known = devm_kmalloc_array(&gemini->vdev->dev, most,
					   sizeof(*kernel->known), GFP_KERNEL);
	if (!kernel->known)
		return -ENOMEM;
	/* The first of the constants, and what is constant after the boot. */
	add(kernel, __pa_symbol(_ctype), 1, true);
#ifdef CONFIG_DYNAMIC_MEMORY_LAYOUT
	add(kernel, __pa_symbol(&page_offset_base), 1, true);
#endif
	/* The first of .data, and of .bss. */
	add(kernel, __pa_symbol(&init_task), DATA_BLOCKS, true);
	add(kernel, page_to_phys(ZERO_PAGE(0)), DATA_BLOCKS, false);
	for_each_possible_cpu(cpu) {
		void *beside = per_cpu_ptr(&gemini_beside, cpu);

		/* Not where that chunk is mapped by itself. */
		if (virt_addr_valid(beside))
			add(kernel, virt_to_phys(beside), 1, true);
	}
	sort(kernel->known, kernel->nr_known, sizeof(*kernel->known), by_number,
	     NULL);
	return init_samples(gemini);
}

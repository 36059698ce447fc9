// SPDX-License-Identifier: GPL-2.0
/*
 * What the guest's kernel works with all the time, as far as that can be told
 * without looking: its static data, and that of its processors.
 *
 * The kernel maps all memory by pages of 1 GiB, so the host's pages alone decide
 * how large its entries in the TLB are, and all of it is pinned: no huge page of
 * a program ever lies there.  A handful of blocks has most of the kernel's hits
 * of the second-level TLB (docs/measurements.md).
 */
#include <linux/bsearch.h>
#include <linux/mm.h>
#include <linux/percpu.h>
#include <linux/sched/task.h>
#include <linux/slab.h>
#include <linux/sort.h>

#include "gemini.h"

/* Initialised data and the rest are at least this large, in blocks. */
#define STATIC_BLOCKS	2

/*
 * Of each processor, what a module has lies beside what the kernel has itself, in
 * the chunk that was made at boot.
 */
static DEFINE_PER_CPU(char, gemini_beside);

static int by_number(const void *a, const void *b)
{
	u64 one = *(const u64 *)a, other = *(const u64 *)b;

	return one < other ? -1 : one > other;
}

static void add(struct gemini *gemini, phys_addr_t address, unsigned int blocks)
{
	while (blocks--)
		gemini->kernel.block[gemini->kernel.count++] =
			(address >> gemini->block_shift) + blocks;
}

/**
 * gemini_kernel_uses() - does the kernel work with this block all the time?
 * @gemini: the device
 * @block: a block that is pinned
 *
 * Return: true if it is known to.
 */
bool gemini_kernel_uses(struct gemini *gemini, u64 block)
{
	return bsearch(&block, gemini->kernel.block, gemini->kernel.count,
		       sizeof(block), by_number);
}

int gemini_kernel_init(struct gemini *gemini)
{
	unsigned int most = num_possible_cpus() + 2 * STATIC_BLOCKS;
	int cpu;

	gemini->kernel.block = devm_kmalloc_array(&gemini->vdev->dev, most,
						  sizeof(u64), GFP_KERNEL);
	if (!gemini->kernel.block)
		return -ENOMEM;
	/* The first of .data, and of .bss. */
	add(gemini, __pa_symbol(&init_task), STATIC_BLOCKS);
	add(gemini, page_to_phys(ZERO_PAGE(0)), STATIC_BLOCKS);
	for_each_possible_cpu(cpu) {
		void *beside = per_cpu_ptr(&gemini_beside, cpu);

		/* Not where that chunk is mapped by itself. */
		if (virt_addr_valid(beside))
			add(gemini, virt_to_phys(beside), 1);
	}
	sort(gemini->kernel.block, gemini->kernel.count, sizeof(u64), by_number,
	     NULL);
	return 0;
}

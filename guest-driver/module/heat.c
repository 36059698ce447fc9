// SPDX-License-Identifier: GPL-2.0
/*
 * Heat: how much the huge pages of programs are used.
 *
 * A host that has fewer huge pages than the guest could use should spend them
 * where they save most.  A processor marks an entry of the page tables as
 * accessed when it walks to it, and not when the TLB has it; what is used all
 * the time may stay there.  So a pass takes all marks away, flushes the TLBs,
 * and looks again 2 to 3 ms later.  In how many of the last passes a page had
 * been accessed by then tells how much it is used; in how many it had been
 * since the pass before, whether it is at all.  The result is reported as the
 * block's used pages, of which a huge page needs no count.
 *
 * Marks that were taken away are kept for reclaim, in the folio, as the kernel's
 * own tracking of idle pages does (mm/page_idle.c).
 *
 * Only while the host says that huge pages are scarce.
 */
#include <linux/delay.h>
#include <linux/mm.h>
#include <linux/page_idle.h>
#include <linux/pgtable.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>

#include "gemini.h"

#ifdef CONFIG_X86_64

#include <asm/invpcid.h>

/*
 * Between the flush and the look: short, or whoever goes through all of his
 * memory in turn would seem to be everywhere.
 */
#define LOOK_MIN_US	2000
#define LOOK_MAX_US	3000
/* Between two passes; and at least as many times as long as looking took. */
#define PERIOD		(2 * HZ)
#define REST_FACTOR	20
/* Processes of one pass; the others have their turn in the next one. */
#define PROCESSES	64U

/* What is no memory of the guest's that could be aligned. */
#define SPECIAL		(VM_HUGETLB | VM_PFNMAP | VM_MIXEDMAP | VM_IO)

/* Notes of a huge page of a process whether its mark was there. */
static void note(struct gemini_heat *heat, u64 block, bool marked)
{
	if (block >= heat->blocks)
		return;
	if (heat->flushed)
		heat->accessed[block] = heat->accessed[block] << 1 | marked;
	else
		heat->used[block] = heat->used[block] << 1 | marked;
}

/* Takes the mark of a huge page away, and notes whether it was there. */
static void look_at(struct gemini_heat *heat, struct mm_struct *mm, pmd_t *pmd)
{
	spinlock_t *ptl = pmd_lock(mm, pmd);
	pmd_t now = *pmd;
	bool marked;

	if (pmd_present(now) && pmd_trans_huge(now)) {
		marked = test_and_clear_bit(_PAGE_BIT_ACCESSED,
					    (unsigned long *)pmd);
		if (marked)
			folio_set_young(page_folio(pfn_to_page(pmd_pfn(now))));
		/* That of several processes may be noted more than once. */
		note(heat, pmd_pfn(now) >> (PMD_SHIFT - PAGE_SHIFT), marked);
	}
	spin_unlock(ptl);
}

/* The entry that maps a huge page at @addr, or where the next one may be. */
static pmd_t *find_entry(struct mm_struct *mm, unsigned long addr,
			 unsigned long *next)
{
	pgd_t *pgd = pgd_offset(mm, addr);
	p4d_t *p4d;
	pud_t *pud;
	pmd_t *pmd;

	*next = (addr & PGDIR_MASK) + PGDIR_SIZE;
	if (pgd_none(*pgd))
		return NULL;
	p4d = p4d_offset(pgd, addr);
	*next = (addr & P4D_MASK) + P4D_SIZE;
	if (p4d_none(*p4d))
		return NULL;
	pud = pud_offset(p4d, addr);
	*next = (addr & PUD_MASK) + PUD_SIZE;
	if (pud_none(*pud) || pud_leaf(*pud))
		return NULL;
	pmd = pmd_offset(pud, addr);
	*next = addr + PMD_SIZE;
	return pmd_trans_huge(READ_ONCE(*pmd)) ? pmd : NULL;
}

static void look_at_memory(struct gemini_heat *heat, struct mm_struct *mm)
{
	VMA_ITERATOR(vmi, mm, 0);
	struct vm_area_struct *vma;
	unsigned long addr, next;
	pmd_t *pmd;

	/* Keeps the page tables of its mappings, but for their last level. */
	if (!mmap_read_trylock(mm))
		return;
	for_each_vma(vmi, vma) {
		if (vma->vm_flags & SPECIAL)
			continue;
		for (addr = ALIGN(vma->vm_start, PMD_SIZE);
		     addr + PMD_SIZE > addr && addr + PMD_SIZE <= vma->vm_end;
		     addr = next) {
			pmd = find_entry(mm, addr, &next);
			if (pmd)
				look_at(heat, mm, pmd);
			if (next <= addr)
				break;
		}
		cond_resched();
	}
	mmap_read_unlock(mm);
}

/* References to the memory of processes that may have huge pages. */
static unsigned int find_memory(struct gemini_heat *heat,
				struct mm_struct **found)
{
	unsigned int count = 0, number = 0;
	struct task_struct *task;
	struct mm_struct *mm;

	rcu_read_lock();
	for_each_process(task) {
		if (number++ < heat->first)
			continue;
		if (count == PROCESSES)
			break;
		task_lock(task);
		mm = task->mm;
		if (mm && !(task->flags & PF_KTHREAD) &&
		    get_mm_counter(mm, MM_ANONPAGES) +
		    get_mm_counter(mm, MM_SHMEMPAGES) >= HPAGE_PMD_NR &&
		    mmget_not_zero(mm))
			found[count++] = mm;
		task_unlock(task);
	}
	rcu_read_unlock();
	heat->first = count == PROCESSES ? number - 1 : 0;
	return count;
}

/*
 * Memory of processes is never global.  Modules have no function for this in all
 * kernels.  Without INVPCID other address spaces keep theirs, where processors
 * have PCIDs (before Haswell): what they use may seem to be less used.
 */
static void flush_here(void *unused)
{
	if (boot_cpu_has(X86_FEATURE_INVPCID))
		invpcid_flush_all_nonglobals();
	else
		native_write_cr3(__native_read_cr3());
}

static void look(struct gemini_heat *heat, struct mm_struct **found,
		 unsigned int count)
{
	u64 start = ktime_get_ns();
	unsigned int i;

	for (i = 0; i < count; i++)
		look_at_memory(heat, found[i]);
	heat->took += ktime_get_ns() - start;
}

static void look_twice(struct gemini_heat *heat)
{
	struct mm_struct *found[PROCESSES];
	unsigned int count;

	count = find_memory(heat, found);
	heat->took = 0;
	heat->flushed = false;
	look(heat, found, count);
	on_each_cpu(flush_here, NULL, 1);
	usleep_range(LOOK_MIN_US, LOOK_MAX_US);
	heat->flushed = true;
	look(heat, found, count);
	while (count)
		mmput(found[--count]);
}

/* Room for all blocks: of what is new all is taken to be in use. */
static bool make_room(struct gemini_heat *heat, u64 blocks)
{
	u8 *used, *accessed;

	if (blocks <= heat->blocks)
		return true;
	used = kvmalloc(blocks, GFP_KERNEL | __GFP_NOWARN);
	accessed = kvmalloc(blocks, GFP_KERNEL | __GFP_NOWARN);
	if (!used || !accessed) {
		kvfree(used);
		kvfree(accessed);
		return false;
	}
	memset(used, U8_MAX, blocks);
	memset(accessed, U8_MAX, blocks);
	if (heat->blocks) {
		memcpy(used, heat->used, heat->blocks);
		memcpy(accessed, heat->accessed, heat->blocks);
	}
	gemini_heat_free(heat);
	heat->used = used;
	heat->accessed = accessed;
	heat->blocks = blocks;
	return true;
}

/* What is used at all counts an eighth of what is used all the time. */
static u16 heat_of(const struct gemini_heat *heat, u64 block)
{
	unsigned int times;

	if (block >= heat->blocks)
		return 0;
	times = 7 * hweight8(heat->accessed[block]) +
		hweight8(heat->used[block]);
	/* 64 of 64 are all of a block. */
	return times * (HPAGE_PMD_NR / 64);
}

static void heat_work(struct work_struct *work)
{
	struct gemini *gemini =
		container_of(to_delayed_work(work), struct gemini, heat.work);
	struct gemini_heat *heat = &gemini->heat;
	unsigned long end = 0;
	int nid;

	if (!READ_ONCE(gemini->scarce))
		return;
	for_each_online_node(nid)
		end = max(end, node_end_pfn(nid));
	if (make_room(heat, end >> gemini->block_order)) {
		look_twice(heat);
		gemini_map_heat(&gemini->map, heat_of, heat);
		WRITE_ONCE(heat->passes, heat->passes + 1);
		gemini_report_kick(gemini);
	}
	queue_delayed_work(gemini->wq, &heat->work,
			   max_t(unsigned long, PERIOD,
				 nsecs_to_jiffies(heat->took * REST_FACTOR)));
}

/**
 * gemini_heat_kick() - the host says whether huge pages are scarce
 * @gemini: the device
 */
void gemini_heat_kick(struct gemini *gemini)
{
	if (READ_ONCE(gemini->scarce))
		queue_delayed_work(gemini->wq, &gemini->heat.work, 0);
}

/**
 * gemini_heat_start() - begin, or go on
 * @gemini: the device
 */
void gemini_heat_start(struct gemini *gemini)
{
	enable_delayed_work(&gemini->heat.work);
}

/**
 * gemini_heat_stop() - look no more
 * @gemini: the device
 */
void gemini_heat_stop(struct gemini *gemini)
{
	disable_delayed_work_sync(&gemini->heat.work);
}

/**
 * gemini_heat_free() - forget all
 * @heat: its work does not run
 */
void gemini_heat_free(struct gemini_heat *heat)
{
	kvfree(heat->used);
	kvfree(heat->accessed);
	heat->used = NULL;
	heat->accessed = NULL;
	heat->blocks = 0;
}

void gemini_heat_init(struct gemini *gemini)
{
	INIT_DELAYED_WORK(&gemini->heat.work, heat_work);
	disable_delayed_work(&gemini->heat.work);
}

#else /* !CONFIG_X86_64 */

void gemini_heat_kick(struct gemini *gemini)
{
}

void gemini_heat_start(struct gemini *gemini)
{
}

void gemini_heat_stop(struct gemini *gemini)
{
}

void gemini_heat_free(struct gemini_heat *heat)
{
}

void gemini_heat_init(struct gemini *gemini)
{
}

#endif /* !CONFIG_X86_64 */

/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What differs between the kernels that the driver is built for, and what
 * modules have to read for themselves because the kernel's own reader is not
 * exported.  No other file looks at a version.
 */
#ifndef _GEMINI_COMPAT_H
#define _GEMINI_COMPAT_H

#include <linux/gfp.h>
#include <linux/mm.h>
#include <linux/mmzone.h>
#include <linux/page-flags.h>
#include <linux/pageblock-flags.h>
#include <linux/version.h>

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 12, 0)
#error "virtio_gemini needs Linux 6.12 or later"
#endif

#if !IS_ENABLED(CONFIG_64BIT) || !IS_ENABLED(CONFIG_SPARSEMEM) || \
	!IS_ENABLED(CONFIG_TRANSPARENT_HUGEPAGE) || \
	!IS_ENABLED(CONFIG_CONTIG_ALLOC)
#error "virtio_gemini needs 64BIT, SPARSEMEM, TRANSPARENT_HUGEPAGE and CONTIG_ALLOC"
#endif

/*
 * Hooks are written for one architecture, and need an ftrace that calls what it
 * is told to directly.  Without NUMA the functions are others.  Where spinlocks
 * sleep, Tasks RCU does not wait for whoever waits for one.
 */
#if defined(CONFIG_X86_64) && defined(CONFIG_NUMA) &&			\
	defined(CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS) &&		\
	!defined(CONFIG_PREEMPT_RT)
#define GEMINI_HAVE_HOOKS
#endif

/* What ftrace_ops.ops_func has between its two arguments: which function. */
#ifdef CONFIG_HAVE_SINGLE_FTRACE_DIRECT_OPS		/* 7.x */
#define GEMINI_OPS_FUNC_IP	unsigned long ip,
#else
#define GEMINI_OPS_FUNC_IP
#endif

/**
 * gemini_page_flags() - the raw flags of a page that may change meanwhile
 * @page: any page with a memory map entry, referenced or not
 *
 * The usual accessors check under CONFIG_DEBUG_VM what a reader without a
 * reference cannot promise.
 */
static inline unsigned long gemini_page_flags(const struct page *page)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 18, 0)
	return READ_ONCE(page->flags.f);
#else
	return READ_ONCE(page->flags);
#endif
}

/* Where a page block's type is, and the bit that says that it is isolated. */
#if defined(PAGEBLOCK_MIGRATETYPE_MASK)			/* 7.x */
#define GEMINI_PAGEBLOCK_TYPE	PAGEBLOCK_MIGRATETYPE_MASK
#define GEMINI_PAGEBLOCK_ISOLATED	PAGEBLOCK_ISO_MASK
#elif defined(MIGRATETYPE_AND_ISO_MASK)			/* 6.17 */
#define GEMINI_PAGEBLOCK_TYPE	MIGRATETYPE_MASK
#define GEMINI_PAGEBLOCK_ISOLATED	\
	(MIGRATETYPE_AND_ISO_MASK & ~MIGRATETYPE_MASK)
#else							/* a type of its own */
#define GEMINI_PAGEBLOCK_TYPE	MIGRATETYPE_MASK
#define GEMINI_PAGEBLOCK_ISOLATED	0
#endif

/**
 * gemini_pageblock_movable() - is the page block one for movable pages?
 * @pfn: a page frame of the page block, online
 *
 * Return: false if the kernel keeps what it cannot move in this page block, or
 * has isolated it.  A hint: the type may change, and a few pages of another
 * type may have fallen back here.
 */
static inline bool gemini_pageblock_movable(unsigned long pfn)
{
	unsigned long bit = ((pfn & (PAGES_PER_SECTION - 1)) >>
			     pageblock_order) * NR_PAGEBLOCK_BITS;
	unsigned long *bits = section_to_usemap(__pfn_to_section(pfn));
	unsigned long word = READ_ONCE(bits[bit / BITS_PER_LONG]) >>
			     (bit % BITS_PER_LONG);

	return !(word & GEMINI_PAGEBLOCK_ISOLATED) &&
	       (word & GEMINI_PAGEBLOCK_TYPE) == MIGRATE_MOVABLE;
}

/**
 * gemini_alloc_contig() - allocate exactly these page frames
 * @pfn: the first, aligned to @order
 * @order: log2 of their number
 * @gfp: reclaim modifiers
 *
 * Movable pages in the range are migrated out of it.
 *
 * Return: 0 with one compound page of one reference at @pfn; -EBUSY if
 * something in the range cannot be moved now; another negative error code.
 */
static inline int gemini_alloc_contig(unsigned long pfn, unsigned int order,
				      gfp_t gfp)
{
	unsigned long end = pfn + (1UL << order);

#if defined(alloc_contig_frozen_range)			/* 7.x */
	int ret = alloc_contig_frozen_range_noprof(pfn, end, ACR_FLAGS_NONE,
						   gfp | __GFP_COMP);

	/* Compound pages come frozen, only from this function. */
	if (!ret)
		set_page_count(pfn_to_page(pfn), 1);
	return ret;
#elif defined(ACR_FLAGS_NONE)				/* 6.16 */
	return alloc_contig_range_noprof(pfn, end, ACR_FLAGS_NONE,
					 gfp | __GFP_COMP);
#else
	return alloc_contig_range_noprof(pfn, end, MIGRATE_MOVABLE,
					 gfp | __GFP_COMP);
#endif
}

/**
 * gemini_alloc_contig_pages() - allocate exactly these page frames, as base pages
 * @pfn: the first
 * @count: their number, not 0
 * @gfp: reclaim modifiers
 *
 * Return: 0 with @count pages of one reference each; -EBUSY if something in
 * their page block cannot be moved now; another negative error code.
 */
static inline int gemini_alloc_contig_pages(unsigned long pfn,
					    unsigned long count, gfp_t gfp)
{
#if defined(ACR_FLAGS_NONE)				/* 6.16 */
	return alloc_contig_range_noprof(pfn, pfn + count, ACR_FLAGS_NONE, gfp);
#else
	return alloc_contig_range_noprof(pfn, pfn + count, MIGRATE_MOVABLE,
					 gfp);
#endif
}

#ifdef GEMINI_HAVE_HOOKS
static inline struct folio *gemini_vma_alloc_folio(gfp_t gfp, int order,
						   struct vm_area_struct *vma,
						   unsigned long addr)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 13, 0)
	return vma_alloc_folio_noprof(gfp, order, vma, addr);
#else
	return vma_alloc_folio_noprof(gfp, order, vma, addr, true);
#endif
}
#endif /* GEMINI_HAVE_HOOKS */

/*
 * Whoever reads the arguments of a traced function must know them: is the third
 * one of zap_huge_pmd() a pmd_t *?
 */
#define GEMINI_ZAP_HUGE_PMD_KNOWN					\
	(__same_type(zap_huge_pmd,					\
		     int (struct mmu_gather *, struct vm_area_struct *,	\
			  pmd_t *, unsigned long)) ||			\
	 __same_type(zap_huge_pmd,			/* 7.x */	\
		     bool (struct mmu_gather *, struct vm_area_struct *, \
			   pmd_t *, unsigned long)))

/*
 * A work queue says whether it is of a processor or unbound from 6.17 on, and is
 * warned of if it does not; before, the former goes without saying.
 */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 17, 0)
#define GEMINI_WQ_PERCPU	WQ_PERCPU
#else
#define GEMINI_WQ_PERCPU	0
#endif

#endif /* _GEMINI_COMPAT_H */

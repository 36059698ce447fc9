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

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 17, 0)
	/* Isolation became a bit of its own, beside the type. */
	if (word & BIT(PB_migrate_isolate))
		return false;
	return (word & MIGRATETYPE_MASK & ~BIT(PB_migrate_isolate)) ==
		MIGRATE_MOVABLE;
#else
	return (word & MIGRATETYPE_MASK) == MIGRATE_MOVABLE;
#endif
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
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 16, 0)
	return alloc_contig_range_noprof(pfn, pfn + (1UL << order),
					 ACR_FLAGS_NONE, gfp | __GFP_COMP);
#else
	return alloc_contig_range_noprof(pfn, pfn + (1UL << order),
					 MIGRATE_MOVABLE, gfp | __GFP_COMP);
#endif
}

#endif /* _GEMINI_COMPAT_H */

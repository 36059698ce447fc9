// SPDX-License-Identifier: GPL-2.0
/*
 * The fragmentation of free memory, from the allocator's own counts.
 *
 * The measure is the unusable free space index of Gorman and Whitcroft ("The
 * What, The Why and the Where To of Anti-Fragmentation", 2005), the one that
 * the kernel shows as unusable_index in debugfs, for the order of a huge page:
 *
 *	(free pages - pages in free blocks of at least that order) / free pages
 *
 * The kernel shows it zone by zone; here the zones of a node count together,
 * because a huge page may come from each of them.
 *
 * Blocks that the driver holds and could give back at once count as free, and
 * as usable: a huge page may still have them, whole, through placement or
 * through the shrinker.  Otherwise holding blocks would look like
 * fragmentation, and the booking timeout would be judged by its own effect.
 */
#include <linux/math64.h>
#include <linux/mmzone.h>
#include <linux/nodemask.h>

#include "gemini.h"

struct pages {
	u64 free;
	u64 usable;
};

/* Without the zones' locks: off by what changes while it is read. */
static void add_node(struct gemini *gemini, int nid, struct pages *pages)
{
	struct pglist_data *node = NODE_DATA(nid);
	unsigned int order, i;
	u64 held = 0;

	for (i = 0; i < MAX_NR_ZONES; i++) {
		struct zone *zone = &node->node_zones[i];

		if (!populated_zone(zone))
			continue;
		for (order = 0; order < NR_PAGE_ORDERS; order++) {
			u64 count = READ_ONCE(zone->free_area[order].nr_free);

			pages->free += count << order;
			if (order >= gemini->block_order)
				pages->usable += count << order;
		}
	}
	for (i = 0; i < GEMINI_STOCKS; i++)
		held += gemini_map_stock(&gemini->map, nid, i);
	pages->free += held << gemini->block_order;
	pages->usable += held << gemini->block_order;
}

/**
 * gemini_fmfi() - how much of the free memory is of no use for a huge page
 * @gemini: the device
 * @nid: the node, or NUMA_NO_NODE for all
 *
 * Cheap: some dozens of reads for a node.
 *
 * Return: 0, where all free memory could become huge pages, to 1000, where
 * none could, or none is free.
 */
unsigned int gemini_fmfi(struct gemini *gemini, int nid)
{
	struct pages pages = { 0 };
	int node;

	if (nid != NUMA_NO_NODE)
		add_node(gemini, nid, &pages);
	else
		for_each_online_node(node)
			add_node(gemini, node, &pages);
	if (!pages.free)
		return 1000;
	return div64_u64((pages.free - pages.usable) * 1000, pages.free);
}

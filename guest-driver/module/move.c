// SPDX-License-Identifier: GPL-2.0
/*
 * Moving: huge pages that lie where the host has base pages move onto ready
 * blocks, where the host asks for it because it can hardly make more huge pages.
 *
 * The block of such a page is emptied like one with base pages in use.  What is
 * in it is one huge page here, and the kernel allocates another one for it to go
 * to, through a function that placement has hooked: the answer is a ready block,
 * set aside before.  Without such a place the kernel would look for a huge page
 * of its own, or split the one that is in use; so nothing begins before the
 * block is there and the hook is sure to stay.
 *
 * The emptied block is held then, and becomes what other held blocks become
 * that the host has base pages for.
 */
#include <linux/mm.h>

#include "compat.h"
#include "gemini.h"
#include "trace.h"

/* Map chunks that one look walks. */
#define WALK_CHUNKS	32U

/**
 * gemini_move_want() - the host says whether it would like huge pages moved
 * @gemini: the device
 * @wanted: it would
 */
void gemini_move_want(struct gemini *gemini, bool wanted)
{
	struct gemini_move *move = &gemini->move;
	bool begins = wanted && !READ_ONCE(move->wanted);

	if (begins)
		WRITE_ONCE(move->begun, true);
	WRITE_ONCE(move->wanted, wanted);
	if (begins)
		gemini_booking_kick(gemini);
}

/**
 * gemini_move_find() - choose huge pages that are to be moved
 * @gemini: the device
 * @nid: on this node
 *
 * From some chunks of the map, from all of it in turn.  A huge page that could
 * not be moved is left alone until the host begins to ask anew.
 */
void gemini_move_find(struct gemini *gemini, int nid)
{
	struct gemini_move *move = &gemini->move;
	struct gemini_run run = {};
	u64 from = move->next;
	u64 end = from + (u64)WALK_CHUNKS * GEMINI_CHUNK_BLOCKS;
	u64 i;

	move->count = 0;
	if (!READ_ONCE(move->wanted))
		return;
	if (READ_ONCE(move->begun)) {
		WRITE_ONCE(move->begun, false);
		gemini_map_forgive_moves(&gemini->map);
	}
	while (move->count < GEMINI_MOVES &&
	       gemini_map_next_run(&gemini->map, from, &run) &&
	       run.first < end) {
		from = run.first + run.count;
		if (run.block.guest != VIRTIO_GEMINI_GUEST_HUGE ||
		    run.block.host != VIRTIO_GEMINI_HOST_BASE ||
		    run.block.flags & GEMINI_BLOCK_SPENT)
			continue;
		for (i = 0; i < run.count && move->count < GEMINI_MOVES; i++)
			if (gemini_booking_node(gemini, run.first + i) == nid)
				move->found[move->count++] = run.first + i;
	}
	move->next = run.count ? from : 0;
}

/**
 * gemini_move_need() - ready blocks that are missing for moves
 * @gemini: the device
 * @nid: their node, that of the last look
 *
 * Return: number of blocks.
 */
u64 gemini_move_need(struct gemini *gemini, int nid)
{
	u64 spare = gemini_booking_spare(gemini, nid);
	unsigned int count = gemini->move.count;

	return count > spare ? count - spare : 0;
}

/*
 * Is in this block one huge page that can be moved as it is?  Clean page cache
 * would be dropped, and hugetlb goes other ways.
 */
static int look(struct gemini *gemini, u64 block, int *nid)
{
	struct page *page = pfn_to_online_page(gemini_block_pfn(gemini, block));
	struct folio *folio;
	int ret = -EINVAL;

	if (!page)
		return -EINVAL;
	folio = page_folio(page);
	if (!folio_try_get(folio))
		return -EAGAIN;
	/* With a reference it stays what it is. */
	if (page_folio(page) == folio && folio_page(folio, 0) == page &&
	    folio_test_large(folio) &&
	    folio_order(folio) == gemini->block_order &&
	    !folio_test_hugetlb(folio) && folio_test_large_rmappable(folio) &&
	    folio_test_swapbacked(folio)) {
		*nid = folio_nid(folio);
		/* What is mapped in part only is split when it is moved. */
		ret = folio_test_partially_mapped(folio) ||
		      folio_maybe_dma_pinned(folio) ? -EBUSY : 0;
	}
	folio_put(folio);
	return ret;
}

/**
 * gemini_move_block() - move a huge page onto a ready block
 * @gemini: the device
 * @block: the block that it is in
 * @to: the block that it is in afterwards
 *
 * Slow, as gemini_hold_exact() is.
 *
 * Return: 0, and @block is held, unless something else came into it meanwhile;
 * -EOPNOTSUPP if huge pages cannot be moved now; -EINVAL if there is none that
 * could be; -ENOSPC if no block is ready; -ENOENT if the page was freed
 * meanwhile; -EBUSY or another code of gemini_hold_exact().
 */
int gemini_move_block(struct gemini *gemini, u64 block, u64 *to)
{
	struct gemini_target target = {};
	bool zero, moved;
	int nid, ret;

	if (!thp_migration_supported() || !gemini_isolation_active(gemini) ||
	    !gemini_placement_pin(gemini))
		return -EOPNOTSUPP;
	ret = look(gemini, block, &nid);
	if (ret)
		goto unpin;
	if (!gemini_map_reserve(&gemini->map, nid, to, &zero)) {
		ret = -ENOSPC;
		goto unpin;
	}
	target.folio = page_folio(pfn_to_page(gemini_block_pfn(gemini, *to)));
	ret = gemini_hold_moved(gemini, block, &target);
	if (target.given) {
		/* In use there is somebody else's reference, too. */
		moved = folio_ref_count(target.folio) > 1;
		gemini_hold_give(gemini, *to, moved);
		/* What the kernel has seen goes the way of all its pages. */
		folio_put(target.folio);
	} else {
		moved = false;
		gemini_hold_idle(gemini, *to, 1, zero);
	}
	if (moved)
		ret = 0;
	else if (!ret)
		ret = -ENOENT;
	if (!ret)
		atomic64_inc(&gemini->move.moved);
	else if (ret != -ENOENT)
		atomic64_inc(&gemini->move.failures);
	trace_gemini_move(gemini, block, *to, ret);
unpin:
	gemini_placement_unpin(gemini);
	return ret;
}

/**
 * gemini_move_some() - move what the last look has found
 * @gemini: the device
 * @nid: the node of that look
 *
 * Onto ready blocks that the stock does not need, no faster than blocks may be
 * emptied.
 *
 * Return: true if there is more to be done in a moment.
 */
bool gemini_move_some(struct gemini *gemini, int nid)
{
	struct gemini_move *move = &gemini->move;
	bool progress = false;
	unsigned int i;
	u64 to;
	int ret;

	for (i = 0; i < move->count && READ_ONCE(move->wanted); i++) {
		if (gemini_booking_paused(gemini) ||
		    !READ_ONCE(gemini->booking.evacuation_rate) ||
		    !gemini_booking_spare(gemini, nid))
			break;
		/* If not now, then in a moment. */
		progress = true;
		if (!gemini_booking_credit(gemini))
			break;
		ret = gemini_move_block(gemini, move->found[i], &to);
		if (ret == -EOPNOTSUPP || ret == -ENOSPC)
			return false;
		if (ret && ret != -ENOENT)
			gemini_map_flag(&gemini->map, move->found[i],
					GEMINI_BLOCK_SPENT, 0);
	}
	return progress;
}

/**
 * gemini_move_state() - does the host ask for it, and is it possible?
 * @gemini: the device
 *
 * Return: words for people.
 */
const char *gemini_move_state(struct gemini *gemini)
{
	if (!thp_migration_supported())
		return "not possible: this kernel splits huge pages to move them";
	if (!gemini_isolation_active(gemini))
		return "not possible: isolation is off";
	if (!gemini_placement_pin(gemini))
		return "not possible: placement is not on for collapsed memory";
	gemini_placement_unpin(gemini);
	return READ_ONCE(gemini->move.wanted) ? "wanted" : "not wanted";
}

/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the parts of booking share: candidates, and what the host is asked for.
 */
#ifndef _GEMINI_BOOKING_H
#define _GEMINI_BOOKING_H

#include "gemini.h"

/* Blocks that one look considers. */
#define GEMINI_CANDIDATES	64U

/*
 * Free host-huge blocks that are held only if the stock needs them: those that
 * nobody came for, and those that the host made huge for a stock that may not
 * need them any more.
 */
#define GEMINI_STOCK_ONLY	(GEMINI_BLOCK_SPENT | GEMINI_BLOCK_MADE)

/* The order of kinds in booking.c; less is cheaper. */
enum gemini_cost {
	GEMINI_COST_FREE,		/* and host-huge */
	GEMINI_COST_SPENT,		/* likewise, but only for the stock */
	GEMINI_COST_EVACUATE,		/* plus the pages in use, host-huge */
	GEMINI_COST_FREE_SMALL = SZ_64K, /* free, on base pages of the host */
	GEMINI_COST_FREE_ABSENT,	/* free, and on nothing */
	GEMINI_COST_EVACUATE_SMALL,	/* plus the pages in use, not host-huge */
	GEMINI_COST_NONE = INT_MAX,
};

struct gemini_candidate {
	u64 block;
	u32 cost;
	u16 used;
	u8 host;
};

struct gemini_candidates {
	struct gemini_candidate best[GEMINI_CANDIDATES];
	unsigned int count;
};

/* candidate.c */
void gemini_candidates_find(struct gemini *gemini, int nid, bool ask,
			    struct gemini_candidates *found);

/* asking.c */
bool gemini_asking_renew(struct gemini *gemini);
bool gemini_asking_prepare(struct gemini *gemini);
bool gemini_asking_helps(struct gemini *gemini);
bool gemini_asking_allowed(struct gemini *gemini);
unsigned int gemini_asking_answers(struct gemini *gemini);
void gemini_asking_forget(struct gemini *gemini);
bool gemini_asking_held(struct gemini *gemini, int nid);
bool gemini_asking_free(struct gemini *gemini,
			const struct gemini_candidates *found, u64 need);

#endif /* _GEMINI_BOOKING_H */

/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Placement: huge pages of processes come from blocks that are ready.
 */
#ifndef _GEMINI_PLACEMENT_H
#define _GEMINI_PLACEMENT_H

#include <linux/atomic.h>
#include <linux/nodemask.h>
#include <linux/types.h>
#include <linux/workqueue.h>

struct folio;
struct gemini;
struct mempolicy;
struct vm_area_struct;

/* Longest text of placement_state. */
#define GEMINI_PLACEMENT_STATE	160

/**
 * struct gemini_placement - a device's part in placement
 * @wanted: it is to be on, as far as this device is concerned
 * @state: "on", "off", or why it is neither
 * @active: the hooks are in, and fired when somebody last looked
 * @check: looks whether they still fire, or whether they can come back
 * @pause: between two attempts to come back, in jiffies; 0: all is well
 * @retry: when the next attempt is due, in jiffies
 * @placed: huge pages that came from ready blocks
 * @misses: huge pages that could have, had a block been ready
 * @declined: allocations of that order that are not for us to serve
 */
struct gemini_placement {
	bool wanted;
	char state[GEMINI_PLACEMENT_STATE];
	bool active;
	struct delayed_work check;
	unsigned long pause;
	unsigned long retry;
	atomic64_t placed;
	atomic64_t misses;
	atomic64_t declined;
};

void gemini_placement_init(struct gemini *gemini);
void gemini_placement_exit(struct gemini *gemini);
void gemini_placement_want(struct gemini *gemini, bool wanted);
void gemini_placement_state(struct gemini *gemini, char *state);
bool gemini_placement_active(struct gemini *gemini);
bool gemini_placement_pin(struct gemini *gemini);
void gemini_placement_unpin(struct gemini *gemini);
u64 gemini_placement_demand(struct gemini *gemini);
u64 gemini_placement_misses(struct gemini *gemini);

/* trampoline.S, and what it calls. */
void gemini_trampoline_policy(void);
void gemini_trampoline_vma(void);
void gemini_trampoline_node(void);

struct folio *gemini_place_policy(gfp_t gfp, unsigned int order,
				  struct mempolicy *policy, pgoff_t index,
				  int nid);
struct folio *gemini_place_vma(gfp_t gfp, unsigned int order,
			       struct vm_area_struct *vma, unsigned long addr);
struct folio *gemini_place_node(gfp_t gfp, unsigned int order, int nid,
				const nodemask_t *mask);

#endif /* _GEMINI_PLACEMENT_H */

/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Algorithm 1: the booking timeout, adapted to what it brings.
 *
 * Arithmetic alone, without a clock and without the kernel, so that programs
 * can compile it and test it exactly.
 */
#ifndef _GEMINI_ADAPT_H
#define _GEMINI_ADAPT_H

/* Bounds of a booking timeout, in milliseconds, and where it starts from. */
#define GEMINI_TIMEOUT_MIN	1000U
#define GEMINI_TIMEOUT_MAX	(10 * 60 * 1000U)
#define GEMINI_TIMEOUT_DEFAULT	(60 * 1000U)

/* A guest with less than this share of its memory free is under pressure. */
#define GEMINI_FREE_SHARE	8

/* What the period that runs now is for. */
enum gemini_adapt_step {
	GEMINI_ADAPT_MEASURE,	/* the desired timeout, before a longer one */
	GEMINI_ADAPT_LONGER,	/* a longer one on trial */
	GEMINI_ADAPT_RESTORE,	/* the desired one again, before a shorter one */
	GEMINI_ADAPT_SHORTER,	/* a shorter one on trial */
};

/**
 * struct gemini_adapt - how far the algorithm is
 * @step: what the period that runs now is for
 * @desired_ms: the best timeout known so far
 * @misses: TLB misses of the last period with it
 * @fmfi: fragmentation at the end of that period
 */
struct gemini_adapt {
	enum gemini_adapt_step step;
	unsigned int desired_ms;
	unsigned long long misses;
	unsigned int fmfi;
};

void gemini_adapt_init(struct gemini_adapt *adapt, unsigned int ms);
unsigned int gemini_adapt_effective(const struct gemini_adapt *adapt);
void gemini_adapt_next(struct gemini_adapt *adapt, unsigned long long misses,
		       unsigned int fmfi);

unsigned int gemini_adapt_hold(unsigned int ms, unsigned long long free,
			       unsigned long long total,
			       unsigned long long wanted,
			       unsigned long long held);

#endif /* _GEMINI_ADAPT_H */

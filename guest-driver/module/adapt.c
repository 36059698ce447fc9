// SPDX-License-Identifier: GPL-2.0
/*
 * Algorithm 1: the booking timeout, adapted to what it brings.
 *
 * A period runs with the desired timeout, the next one with a timeout of 1.1
 * times that.  If there were fewer TLB misses and no more fragmentation, the
 * longer one is desired from then on, and all starts over.  Else a period with
 * the desired timeout follows, and one with 0.9 times that, judged the same
 * way.  A trial is always compared with the period right before it.
 */
#include "adapt.h"

static unsigned int bounded(unsigned int ms)
{
	if (ms < GEMINI_TIMEOUT_MIN)
		return GEMINI_TIMEOUT_MIN;
	if (ms > GEMINI_TIMEOUT_MAX)
		return GEMINI_TIMEOUT_MAX;
	return ms;
}

/**
 * gemini_adapt_init() - start, or start over with another timeout
 * @adapt: the algorithm's state
 * @ms: the timeout to start from, in milliseconds; 0: the default
 */
void gemini_adapt_init(struct gemini_adapt *adapt, unsigned int ms)
{
	*adapt = (struct gemini_adapt) {
		.step = GEMINI_ADAPT_MEASURE,
		.desired_ms = bounded(ms ? ms : GEMINI_TIMEOUT_DEFAULT),
	};
}

/**
 * gemini_adapt_effective() - the timeout of the period that runs now
 * @adapt: the algorithm's state
 *
 * Return: milliseconds, within the bounds.
 */
unsigned int gemini_adapt_effective(const struct gemini_adapt *adapt)
{
	switch (adapt->step) {
	case GEMINI_ADAPT_LONGER:
		return bounded(adapt->desired_ms * 11 / 10);
	case GEMINI_ADAPT_SHORTER:
		return bounded(adapt->desired_ms * 9 / 10);
	default:
		return adapt->desired_ms;
	}
}

/**
 * gemini_adapt_next() - a period has ended, another one begins
 * @adapt: the algorithm's state
 * @misses: TLB misses in the period that ended, or what stands in for them
 * @fmfi: fragmentation at its end, 0 to 1000
 */
void gemini_adapt_next(struct gemini_adapt *adapt, unsigned long long misses,
		       unsigned int fmfi)
{
	switch (adapt->step) {
	case GEMINI_ADAPT_MEASURE:
	case GEMINI_ADAPT_RESTORE:
		adapt->misses = misses;
		adapt->fmfi = fmfi;
		adapt->step = adapt->step == GEMINI_ADAPT_MEASURE ?
			      GEMINI_ADAPT_LONGER : GEMINI_ADAPT_SHORTER;
		return;
	case GEMINI_ADAPT_LONGER:
	case GEMINI_ADAPT_SHORTER:
		if (misses < adapt->misses && fmfi <= adapt->fmfi) {
			adapt->desired_ms = gemini_adapt_effective(adapt);
			adapt->step = GEMINI_ADAPT_MEASURE;
		} else {
			adapt->step = adapt->step == GEMINI_ADAPT_LONGER ?
				      GEMINI_ADAPT_RESTORE :
				      GEMINI_ADAPT_MEASURE;
		}
		return;
	}
}

/**
 * gemini_adapt_hold() - how much of a timeout is left under pressure
 * @ms: the timeout in milliseconds
 * @free: pages that are free in the guest, without those that are held
 * @total: pages that the guest has, not 0
 * @wanted: blocks that the host wants
 * @held: blocks that are held
 *
 * Both shrink it in proportion: the guest from the point on where less than one
 * part in %GEMINI_FREE_SHARE of its memory is free, the host with what it wants
 * of what is held.
 *
 * Return: milliseconds, 0 if nothing is to be held for nothing.
 */
unsigned int gemini_adapt_hold(unsigned int ms, unsigned long long free,
			       unsigned long long total,
			       unsigned long long wanted,
			       unsigned long long held)
{
	unsigned long long left = ms;

	if (free < total / GEMINI_FREE_SHARE)
		left = left * free / (total / GEMINI_FREE_SHARE);
	if (wanted >= held && wanted)
		left = 0;
	else if (wanted)
		left = left * (held - wanted) / held;
	return left;
}

// SPDX-License-Identifier: GPL-2.0
/*
 * Runs the driver's adaptive timeout: reads "init MS" and "next MISSES FMFI",
 * one a line, and answers each with the timeout of the period that begins;
 * "hold MS FREE TOTAL WANTED HELD" with what pressure leaves of a timeout.
 */
#include <stdio.h>

#include "adapt.h"

int main(void)
{
	struct gemini_adapt adapt;
	unsigned long long misses, free, total, wanted, held;
	unsigned int ms, fmfi;
	char line[128];

	gemini_adapt_init(&adapt, 0);
	while (fgets(line, sizeof(line), stdin)) {
		if (sscanf(line, "hold %u %llu %llu %llu %llu", &ms, &free,
			   &total, &wanted, &held) == 5) {
			printf("%u\n", gemini_adapt_hold(ms, free, total,
							 wanted, held));
			continue;
		}
		if (sscanf(line, "init %u", &ms) == 1)
			gemini_adapt_init(&adapt, ms);
		else if (sscanf(line, "next %llu %u", &misses, &fmfi) == 2)
			gemini_adapt_next(&adapt, misses, fmfi);
		else
			return 1;
		printf("%u\n", gemini_adapt_effective(&adapt));
	}
	return 0;
}

/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Functions of the kernel that call one of ours first.
 */
#ifndef _GEMINI_HOOK_H
#define _GEMINI_HOOK_H

#include <linux/ftrace.h>
#include <linux/types.h>

/**
 * struct gemini_hook - a hooked function
 * @name: its name
 * @address: its address if it is exported, else 0: it is found by its name
 * @trampoline: what it calls
 * @ops: for ftrace
 * @on: it is registered
 * @claimed: somebody redirects the function (a livepatch); no claim is undone
 *	by anything but the next gemini_hook_register()
 * @claim: called when that begins; it must not sleep for long, nor register or
 *	unregister hooks
 */
struct gemini_hook {
	const char *name;
	unsigned long address;
	void (*trampoline)(void);
	struct ftrace_ops ops;
	bool on;
	bool claimed;
	void (*claim)(struct gemini_hook *hook);
};

int gemini_hook_register(struct gemini_hook *hook);
void gemini_hook_unregister(struct gemini_hook *hook);

#endif /* _GEMINI_HOOK_H */

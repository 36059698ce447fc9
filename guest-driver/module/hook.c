// SPDX-License-Identifier: GPL-2.0
/*
 * Putting direct calls at the start of kernel functions, and taking them away.
 */
#include <linux/module.h>
#include <linux/string.h>

#include "compat.h"
#include "hook.h"

#ifdef GEMINI_HAVE_HOOKS

/*
 * ftrace asks whether this direct call can share the function with somebody
 * who changes where the function begins, which is what a livepatch does.
 */
static int share(struct ftrace_ops *ops,
		 GEMINI_OPS_FUNC_IP enum ftrace_ops_cmd cmd)
{
	struct gemini_hook *hook = container_of(ops, struct gemini_hook, ops);

	switch (cmd) {
	case FTRACE_OPS_CMD_ENABLE_SHARE_IPMODIFY_SELF:
		/* It was there before: it may replace what is done here. */
		WRITE_ONCE(hook->claimed, true);
		return -EBUSY;
	case FTRACE_OPS_CMD_ENABLE_SHARE_IPMODIFY_PEER:
		/*
		 * It must not fail because of a mere optimisation.  The
		 * trampolines return to wherever the function begins, so both
		 * can be there until this one has left.
		 */
		WRITE_ONCE(hook->claimed, true);
		if (hook->claim)
			hook->claim(hook);
		return 0;
	default:
		return 0;
	}
}

static int set_filter(struct gemini_hook *hook)
{
	char name[KSYM_NAME_LEN];

	if (hook->address)
		return ftrace_set_filter_ip(&hook->ops, hook->address, 0, 1);
	/*
	 * Direct calls go by the addresses in the filter, and ftrace fills it
	 * from a name just as well: no symbol has to be looked up for it.
	 */
	strscpy(name, hook->name);
	return ftrace_set_filter(&hook->ops, name, strlen(name), 1);
}

/*
 * In Linux 6.12 ftrace_free_filter() leaves pointers to what it has freed,
 * and the next filter would free that again.
 */
static void free_filter(struct gemini_hook *hook)
{
	ftrace_free_filter(&hook->ops);
	hook->ops = (struct ftrace_ops) { };
}

/**
 * gemini_hook_register() - have a function call its trampoline
 * @hook: the function
 *
 * That this succeeds does not say that the trampoline is called: ftrace may be
 * switched off as a whole (kernel.ftrace_enabled).
 *
 * Context: sleeps.
 * Return: 0; -ENOENT if this kernel has no such function, or none that ftrace
 * can hook; -EBUSY if somebody else has it, who redirects it if @hook->claimed,
 * else a BPF program or another direct call; another negative error code.
 */
int gemini_hook_register(struct gemini_hook *hook)
{
	int ret;

	if (hook->on)
		return 0;
	hook->claimed = false;
	hook->ops.ops_func = share;
	ret = set_filter(hook);
	if (ret == -EINVAL)
		ret = -ENOENT;
	if (!ret)
		ret = register_ftrace_direct(&hook->ops,
					     (unsigned long)hook->trampoline);
	if (ret)
		free_filter(hook);
	else
		hook->on = true;
	return ret;
}

/**
 * gemini_hook_unregister() - have a function call its trampoline no more
 * @hook: the function
 *
 * When this returns, no task runs in the trampoline, nor in what that calls:
 * ftrace waits until every task that was preempted there has left (Tasks RCU),
 * and nothing in there sleeps.
 *
 * Context: sleeps.
 */
void gemini_hook_unregister(struct gemini_hook *hook)
{
	if (!hook->on)
		return;
	/* If ftrace has broken down, its calls stay, and so must this module. */
	if (WARN_ON_ONCE(unregister_ftrace_direct(&hook->ops,
						  (unsigned long)hook->trampoline,
						  false)))
		__module_get(THIS_MODULE);
	else
		free_filter(hook);
	hook->on = false;
}

#endif /* GEMINI_HAVE_HOOKS */

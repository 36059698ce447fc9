// SPDX-License-Identifier: GPL-2.0
/*
 * Placement: the huge pages of processes come from blocks that are ready, so
 * that they are aligned from their first touch.
 *
 * The functions that allocate huge pages call here first, see trampoline.S.
 * What is said here is final: a page, or NULL, and then the function runs as if
 * nobody had asked.  Nothing in here sleeps, and nothing calls the functions
 * that it is called from.
 */
#include <linux/mempolicy.h>
#include <linux/mm.h>
#include <linux/sched/mm.h>

#include "compat.h"
#include "gemini.h"
#include "hook.h"
#include "placement.h"
#include "trace.h"

#ifdef GEMINI_HAVE_HOOKS

/* Between two looks at the hooks, and the longest pause after a failure. */
#define CHECK_PERIOD	(10 * HZ)
#define RETRY_MAX	(10 * 60 * HZ)

/*
 * What asks for these wants more than a huge page that is there anyway:
 * hugetlb and memory that is to be offlined try hard; NUMA balancing and
 * migrate_pages() want one node and no other; kernel memory is charged when it
 * is allocated.
 */
#define GFP_DECLINED	(__GFP_RETRY_MAYFAIL | __GFP_THISNODE | __GFP_ACCOUNT)

static void claimed(struct gemini_hook *hook);

/* shmem; anonymous memory too, unless the compiler merged the next one in. */
static struct gemini_hook policy_hook = {
	.name = "folio_alloc_mpol_noprof",
	.trampoline = gemini_trampoline_policy,
	.claim = claimed,
};

/* Anonymous memory, where the above cannot be hooked or does not see it. */
static struct gemini_hook vma_hook = {
	.name = "vma_alloc_folio_noprof",
	.address = (unsigned long)vma_alloc_folio_noprof,
	.trampoline = gemini_trampoline_vma,
	.claim = claimed,
};

/* khugepaged and MADV_COLLAPSE. */
static struct gemini_hook node_hook = {
	.name = "__folio_alloc_noprof",
	.address = (unsigned long)__folio_alloc_noprof,
	.trampoline = gemini_trampoline_node,
	.claim = claimed,
};

/*
 * Protects the hooks, the owner, and each device's wish and state.  Held while
 * hooks are put in and taken out, so never taken by what they call.
 */
static DEFINE_MUTEX(placement_lock);

/* The device whose blocks are handed out; does not change while hooks are in */
static struct gemini *owner;

/* The task that tests the hooks, and the answer that it gets. */
static struct task_struct *tester;
static const char fired;

static bool tested(void)
{
	return in_task() && READ_ONCE(tester) == current;
}

static struct folio *test_answer(void)
{
	return (struct folio *)&fired;
}

/* The node with all memory, if there is one. */
static int only_node(void)
{
	return num_node_state(N_MEMORY) == 1 ?
		first_node(node_states[N_MEMORY]) : NUMA_NO_NODE;
}

/*
 * The node that the kernel would look at first under @policy, if it is the
 * only one that would do as well as any; else NUMA_NO_NODE.
 */
static int policy_node(const struct mempolicy *policy, int nid)
{
	int only = only_node();

	if (only != NUMA_NO_NODE)
		return only;
	switch (policy->mode) {
	case MPOL_LOCAL:
		return nid;
	case MPOL_PREFERRED:
		return first_node(policy->nodes);
	case MPOL_PREFERRED_MANY:
	case MPOL_BIND:
		if (policy->home_node != NUMA_NO_NODE)
			nid = policy->home_node;
		return node_isset(nid, policy->nodes) ? nid : NUMA_NO_NODE;
	default:
		/* It is interleaved: whose turn it is only the kernel knows. */
		return NUMA_NO_NODE;
	}
}

static int vma_node(struct vm_area_struct *vma)
{
	const struct mempolicy *policy = vma->vm_policy ?: current->mempolicy;
	int nid = numa_node_id();

	if (only_node() != NUMA_NO_NODE)
		return only_node();
	if (vma->vm_ops && vma->vm_ops->get_policy)
		return NUMA_NO_NODE;
	return policy ? policy_node(policy, nid) : nid;
}

/* Would a movable huge page of a process do, from any zone that we hold? */
static bool process_huge(gfp_t gfp)
{
	if (!in_task())
		return false;
	gfp = current_gfp_context(gfp);
	return (gfp & GFP_TRANSHUGE_LIGHT) == GFP_TRANSHUGE_LIGHT &&
	       (gfp & GFP_ZONEMASK) == (GFP_TRANSHUGE_LIGHT & GFP_ZONEMASK);
}

static bool eligible(gfp_t gfp)
{
	return process_huge(gfp) && !(gfp & GFP_DECLINED);
}

static struct folio *place(gfp_t gfp, int nid, const nodemask_t *mask)
{
	struct gemini *gemini = owner;
	/*
	 * Since 6.13 a fault does not zero what the allocator has zeroed; before
	 * that it does so again.  Either way the result is to be what the
	 * allocator's would be.
	 */
	bool zero = want_init_on_alloc(gfp);
	struct folio *folio;
	struct page *page;

	/* One bit of the cpuset's nodes is never half changed. */
	if (nid == NUMA_NO_NODE || !node_isset(nid, current->mems_allowed) ||
	    (mask && !node_isset(nid, *mask))) {
		atomic64_inc(&gemini->placement.declined);
		return NULL;
	}
	page = gemini_hold_take(gemini, nid, zero);
	if (!page) {
		atomic64_inc(&gemini->placement.misses);
		trace_gemini_placement_miss(gemini, nid);
		return NULL;
	}
	atomic64_inc(&gemini->placement.placed);
	trace_gemini_placed(gemini, page_to_pfn(page) >> gemini->block_order,
			    nid, zero);
	/* All else that a folio of a process has, every compound page has. */
	folio = page_folio(page);
	folio_set_large_rmappable(folio);
	return folio;
}

static struct folio *decline(void)
{
	atomic64_inc(&owner->placement.declined);
	return NULL;
}

/**
 * gemini_place_policy() - folio_alloc_mpol() is called for a huge page
 * @gfp: its argument
 * @order: its argument, the order of a huge page
 * @policy: its argument
 * @index: its argument, for policies that interleave
 * @nid: its argument, the node unless the policy says otherwise
 *
 * Return: what it is to return, or NULL: it is to run.
 */
struct folio *gemini_place_policy(gfp_t gfp, unsigned int order,
				  struct mempolicy *policy, pgoff_t index,
				  int nid)
{
	if (tested())
		return test_answer();
	if (READ_ONCE(policy_hook.claimed))
		return NULL;
	if (!eligible(gfp))
		return decline();
	return place(gfp, policy_node(policy, nid), NULL);
}

/**
 * gemini_place_vma() - vma_alloc_folio() is called for a huge page
 * @gfp: its argument
 * @order: its argument, the order of a huge page
 * @vma: its argument, locked against changes
 * @addr: its argument
 *
 * Return: what it is to return, or NULL: it is to run.
 */
struct folio *gemini_place_vma(gfp_t gfp, unsigned int order,
			       struct vm_area_struct *vma, unsigned long addr)
{
	if (tested())
		return test_answer();
	if (READ_ONCE(vma_hook.claimed))
		return NULL;
	if (!eligible(gfp))
		return decline();
	return place(gfp, vma_node(vma), NULL);
}

/**
 * gemini_place_node() - __folio_alloc() is called for a huge page
 * @gfp: its argument
 * @order: its argument, the order of a huge page
 * @nid: its argument, the node to begin with
 * @mask: its argument, the nodes that will do; NULL: all of them
 *
 * Return: what it is to return, or NULL: it is to run.
 */
struct folio *gemini_place_node(gfp_t gfp, unsigned int order, int nid,
				const nodemask_t *mask)
{
	struct folio *folio;

	if (tested())
		return test_answer();
	if (READ_ONCE(node_hook.claimed))
		return NULL;
	/* What the driver itself moves is overwritten, so zero or not is all one. */
	folio = process_huge(gfp) ? gemini_hold_target(owner, nid) : NULL;
	if (folio)
		return folio;
	if (!eligible(gfp))
		return decline();
	return place(gfp, nid, mask);
}

/* Was that the hook?  If not, the page goes back. */
static bool is_test_answer(struct folio *folio)
{
	if (folio == test_answer())
		return true;
	if (folio)
		folio_put(folio);
	return false;
}

/* Does a call of __folio_alloc() come here? */
static bool node_fires(void)
{
	/* Without a node there is nothing to allocate, should it get that far. */
	nodemask_t none = NODE_MASK_NONE;
	struct folio *folio;

	lockdep_assert_held(&placement_lock);
	WRITE_ONCE(tester, current);
	folio = __folio_alloc_noprof(GFP_TRANSHUGE_LIGHT, HPAGE_PMD_ORDER,
				     numa_mem_id(), &none);
	WRITE_ONCE(tester, NULL);
	return is_test_answer(folio);
}

/* Does a call of vma_alloc_folio() come here, now or further down? */
static bool vma_fires(void)
{
	/* Nobody's: no policy but the task's, and no memory. */
	static struct vm_area_struct vma;
	struct folio *folio;

	lockdep_assert_held(&placement_lock);
	WRITE_ONCE(tester, current);
	folio = gemini_vma_alloc_folio(GFP_TRANSHUGE_LIGHT, HPAGE_PMD_ORDER,
				       &vma, 0);
	WRITE_ONCE(tester, NULL);
	return is_test_answer(folio);
}

static bool hooked(void)
{
	return node_hook.on || policy_hook.on || vma_hook.on;
}

static bool fires(void)
{
	return !READ_ONCE(node_hook.claimed) &&
	       !READ_ONCE(policy_hook.claimed) &&
	       !READ_ONCE(vma_hook.claimed) &&
	       (!node_hook.on || node_fires()) &&
	       (!(policy_hook.on || vma_hook.on) || vma_fires());
}

static void unhook(void)
{
	gemini_hook_unregister(&node_hook);
	gemini_hook_unregister(&policy_hook);
	gemini_hook_unregister(&vma_hook);
}

/* Sets the state, and tells the log what is new. */
static __printf(2, 3)
void set_state(struct gemini *gemini, const char *format, ...)
{
	struct gemini_placement *placement = &gemini->placement;
	char state[GEMINI_PLACEMENT_STATE];
	va_list args;

	lockdep_assert_held(&placement_lock);
	va_start(args, format);
	vscnprintf(state, sizeof(state), format, args);
	va_end(args);
	if (!strcmp(state, placement->state))
		return;
	strscpy(placement->state, state);
	dev_info(&gemini->vdev->dev, "placement: %s\n", state);
}

static const char *reason(const struct gemini_hook *hook, int error)
{
	switch (error) {
	case -ENOENT:
		return "this kernel has no such function to hook";
	case -EBUSY:
		return READ_ONCE(hook->claimed) ?
			"it is redirected, by a livepatch or the like" :
			"a BPF program or another direct call has it";
	case -ENOMEM:
		return "out of memory";
	default:
		return "ftrace refuses";
	}
}

/*
 * Puts in whatever hook is missing.  Returns whether there is nothing left to
 * be tried again.
 */
static bool hook_all(struct gemini *gemini)
{
	const struct gemini_hook *lost;
	int ret_node, ret_policy, ret_vma = 0;
	const char *what;
	int error;

	lockdep_assert_held(&placement_lock);
	ret_node = gemini_hook_register(&node_hook);
	if (!ret_node && !node_fires())
		goto silent;

	if (!policy_hook.on) {
		ret_policy = gemini_hook_register(&policy_hook);
		/* One call is not to be seen twice. */
		if (!ret_policy)
			gemini_hook_unregister(&vma_hook);
	} else {
		ret_policy = 0;
	}
	if (!policy_hook.on || !vma_fires()) {
		ret_vma = gemini_hook_register(&vma_hook);
		if (!ret_vma && !vma_fires())
			goto silent;
	}

	if (!ret_node && !ret_policy && !ret_vma) {
		set_state(gemini, "on");
		return true;
	}
	if (ret_vma) {
		lost = &vma_hook;
		error = ret_vma;
		what = "anonymous memory";
	} else if (ret_policy) {
		lost = &policy_hook;
		error = ret_policy;
		what = "shared memory";
	} else {
		lost = &node_hook;
		error = ret_node;
		what = "collapsed memory";
	}
	if (hooked())
		set_state(gemini, "on, but not for %s: %s: %s (%d)", what,
			  lost->name, reason(lost, error), error);
	else
		set_state(gemini, "not on: %s: %s (%d)", lost->name,
			  reason(lost, error), error);
	return false;

silent:
	unhook();
	set_state(gemini, "not on: ftrace calls no hooks, is kernel.ftrace_enabled 0?");
	return false;
}

static void leave(struct gemini *gemini)
{
	lockdep_assert_held(&placement_lock);
	if (owner != gemini)
		return;
	unhook();
	owner = NULL;
}

static void enter(struct gemini *gemini)
{
	struct gemini_placement *placement = &gemini->placement;

	lockdep_assert_held(&placement_lock);
	if (!owner)
		owner = gemini;
	if (owner != gemini) {
		set_state(gemini, "not on: another device has it, %s",
			  dev_name(&owner->vdev->dev));
	} else if (hook_all(gemini)) {
		placement->pause = 0;
		return;
	}
	/* Whoever has what is missing may have it for long. */
	placement->pause = clamp(2 * placement->pause, CHECK_PERIOD, RETRY_MAX);
	placement->retry = jiffies + placement->pause;
}

static void check_work(struct work_struct *work)
{
	struct gemini_placement *placement =
		container_of(to_delayed_work(work), struct gemini_placement,
			     check);
	struct gemini *gemini = container_of(placement, struct gemini,
					     placement);

	mutex_lock(&placement_lock);
	if (placement->wanted) {
		if (owner == gemini && hooked() && !fires()) {
			unhook();
			enter(gemini);
		} else if (placement->pause &&
			   time_after_eq(jiffies, placement->retry)) {
			enter(gemini);
		}
		WRITE_ONCE(placement->active, owner == gemini && hooked());
		queue_delayed_work(gemini->wq, &placement->check, CHECK_PERIOD);
	}
	mutex_unlock(&placement_lock);
}

/* ftrace's locks are held, so leaving has to wait. */
static void claimed(struct gemini_hook *hook)
{
	struct gemini *gemini = owner;

	mod_delayed_work(gemini->wq, &gemini->placement.check, 0);
}

/**
 * gemini_placement_want() - switch placement on or off
 * @gemini: the device
 * @wanted: on
 *
 * When it is off, nothing is hooked.  That it is wanted need not mean that it
 * is on: see gemini_placement_state().
 */
void gemini_placement_want(struct gemini *gemini, bool wanted)
{
	struct gemini_placement *placement = &gemini->placement;

	mutex_lock(&placement_lock);
	if (placement->wanted != wanted) {
		placement->wanted = wanted;
		placement->pause = 0;
		if (wanted) {
			enter(gemini);
			queue_delayed_work(gemini->wq, &placement->check,
					   CHECK_PERIOD);
		} else {
			leave(gemini);
			set_state(gemini, "off");
		}
		WRITE_ONCE(placement->active, owner == gemini && hooked());
	}
	mutex_unlock(&placement_lock);
}

/**
 * gemini_placement_init() - placement may begin
 * @gemini: the device
 *
 * It begins a little later: to find a function takes a while.
 */
void gemini_placement_init(struct gemini *gemini)
{
	struct gemini_placement *placement = &gemini->placement;

	INIT_DELAYED_WORK(&placement->check, check_work);
	strscpy(placement->state, "not on yet");
	placement->wanted = true;
	placement->pause = 1;
	placement->retry = jiffies;
	queue_delayed_work(gemini->wq, &placement->check, 0);
}

/**
 * gemini_placement_exit() - placement ends
 * @gemini: the device
 *
 * When this returns, nobody asks this device for blocks.
 */
void gemini_placement_exit(struct gemini *gemini)
{
	disable_delayed_work_sync(&gemini->placement.check);
	gemini_placement_want(gemini, false);
}

/**
 * gemini_placement_pin() - keep the hook of __folio_alloc() in
 * @gemini: the device
 *
 * Return: false if it is not in, or is another device's; otherwise it stays
 * until gemini_placement_unpin().
 */
bool gemini_placement_pin(struct gemini *gemini)
{
	mutex_lock(&placement_lock);
	if (owner == gemini && node_hook.on && !READ_ONCE(node_hook.claimed))
		return true;
	mutex_unlock(&placement_lock);
	return false;
}

/**
 * gemini_placement_unpin() - the hook may go again
 * @gemini: the device
 */
void gemini_placement_unpin(struct gemini *gemini)
{
	mutex_unlock(&placement_lock);
}

#else /* !GEMINI_HAVE_HOOKS */

static DEFINE_MUTEX(placement_lock);

bool gemini_placement_pin(struct gemini *gemini)
{
	return false;
}

void gemini_placement_unpin(struct gemini *gemini)
{
}

void gemini_placement_want(struct gemini *gemini, bool wanted)
{
	gemini->placement.wanted = wanted;
}

void gemini_placement_init(struct gemini *gemini)
{
	strscpy(gemini->placement.state,
		"not on: this kernel has no direct calls of ftrace for it");
}

void gemini_placement_exit(struct gemini *gemini)
{
}

#endif /* GEMINI_HAVE_HOOKS */

/**
 * gemini_placement_state() - what has become of placement
 * @gemini: the device
 * @state: where to put "on", "off", or what is in the way;
 *	GEMINI_PLACEMENT_STATE bytes
 */
void gemini_placement_state(struct gemini *gemini, char *state)
{
	mutex_lock(&placement_lock);
	strscpy(state, gemini->placement.state, GEMINI_PLACEMENT_STATE);
	mutex_unlock(&placement_lock);
}

/**
 * gemini_placement_active() - are the hooks in, and do they fire?
 * @gemini: the device
 *
 * Return: so it was when somebody last looked, a few seconds ago.
 */
bool gemini_placement_active(struct gemini *gemini)
{
	return READ_ONCE(gemini->placement.active);
}

/**
 * gemini_placement_demand() - huge pages that ready blocks could have served
 * @gemini: the device
 *
 * Return: their number so far, whether there were blocks or not.
 */
u64 gemini_placement_demand(struct gemini *gemini)
{
	return atomic64_read(&gemini->placement.placed) +
	       atomic64_read(&gemini->placement.misses);
}

/**
 * gemini_placement_misses() - huge pages for which no block was ready
 * @gemini: the device
 *
 * Return: their number so far.
 */
u64 gemini_placement_misses(struct gemini *gemini)
{
	return atomic64_read(&gemini->placement.misses);
}

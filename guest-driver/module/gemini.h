/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the files of the driver know of each other.
 *
 * Locks, outermost first:
 *   census.lock    a chunk of page frames is being looked at
 *   sync_lock      generation and report state; held while a report is made
 *   requests.lock  one for each request queue: its ring and what is unanswered
 *   map.lock       contents of the map; see block.h
 *   trim.lock      pages that are held for a trim; innermost, like map.lock
 *
 * exact_lock is outside of all these: it is held over an allocation.
 */
#ifndef _GEMINI_H
#define _GEMINI_H

#include <linux/ftrace.h>
#include <linux/kref.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/notifier.h>
#include <linux/shrinker.h>
#include <linux/spinlock.h>
#include <linux/virtio.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

#include "adapt.h"
#include "block.h"
#include "placement.h"

/* Size of a hint or report buffer: 682 records. */
#define GEMINI_BATCH_SIZE	SZ_16K
#define GEMINI_BATCH_RECORDS						\
	((GEMINI_BATCH_SIZE - sizeof(struct virtio_gemini_batch)) /	\
	 sizeof(struct virtio_gemini_record))
#define GEMINI_HINT_BUFFERS	16
#define GEMINI_REPORT_BUFFERS	8

/* Unanswered blocks on releaseq: where the host has no wish, and at most. */
#define GEMINI_RELEASE_DEFAULT	32
#define GEMINI_RELEASE_CAP	512
/* Unanswered requests on ctrlq. */
#define GEMINI_CTRL_MAX		16

/*
 * Blocks ready at least, and between demands at most; blocks emptied in a second.
 */
#define GEMINI_STOCK_FLOOR	2
#define GEMINI_STOCK_ACTIVE	8
#define GEMINI_EVACUATION_RATE	32
#define GEMINI_EVACUATION_MAX	1000000

/* Limits of the census' period, in milliseconds. */
#define GEMINI_PERIOD_MIN	10
#define GEMINI_PERIOD_DEFAULT	1000
#define GEMINI_PERIOD_MAX	(60 * 60 * 1000)

/* Counters of the kernel's by which the census tells whether memory changes. */
#define GEMINI_PAGE_KINDS	6

/**
 * struct gemini_census - the walk over all page frames
 * @work: one slice of it
 * @lock: held while a chunk is looked at, so that memory that goes offline can
 *	wait until nobody looks at it any more
 * @memory: tells of memory that comes and goes
 * @period_ms: pause between two passes, if a pass is short and memory changes
 * @kicked: the next pass is wanted, whether memory changed or not
 * @pages: how many there were of each kind when the last pass began; only
 *	@work uses it
 * @waited: periods that went by without a pass since, only @work uses it
 * @next: index of the chunk to go on with; only @work uses it
 * @count_from: block from which on used pages are counted, only @work uses it
 * @count_left: blocks that may be counted in this pass, only @work uses it
 * @count_all: count the used pages of blocks that the host backs with base
 *	pages as well
 * @pass_all: so did the present pass, only @work uses it
 * @counted: passes in a row that did
 * @begun: passes begun
 * @passes: passes ended
 * @pass_ns: time spent in the present pass
 * @pass_blocks: blocks looked at in the present pass
 * @pass_changed: blocks that changed in the present pass
 * @last_ns: time that the last pass took
 * @last_blocks: blocks that it looked at
 * @total_ns: time spent in all passes
 */
struct gemini_census {
	struct delayed_work work;
	struct mutex lock;	/* see above */
	struct notifier_block memory;
	unsigned int period_ms;
	bool kicked;
	unsigned long pages[GEMINI_PAGE_KINDS];
	unsigned int waited;
	unsigned long next;
	u64 count_from;
	unsigned int count_left;
	bool count_all;
	bool pass_all;
	u64 counted;
	u64 begun;
	u64 passes;
	u64 pass_ns;
	u64 pass_blocks;
	u64 pass_changed;
	u64 last_ns;
	u64 last_blocks;
	u64 total_ns;
};

/* Blocks of which it is counted how often the kernel is found at work there. */
#define GEMINI_KERNEL_FOUND	64
/* Most of these that are said to be busy. */
#define GEMINI_KERNEL_BUSY	16

/**
 * struct gemini_kernel_known - a block with data of the kernel's own
 * @block: which one
 * @always: the kernel works with it all the time, not just much
 */
struct gemini_kernel_known {
	u64 block;
	bool always;
};

/**
 * struct gemini_kernel_found - a block where the kernel was at work
 * @block: which one
 * @times: how often it was found there, the older ones counting less
 */
struct gemini_kernel_found {
	u64 block;
	unsigned int times;
};

/**
 * struct gemini_kernel - what the kernel works with all the time
 * @shift: log2 of the size of a block
 * @known: what it is known to work with, ascending
 * @nr_known: number of them
 * @nr_always: of these so many are used all the time
 * @busy: others, the busiest first; under the census's lock, as the next two
 * @nr_busy: number of them
 * @nr_hot: of these so many, the first ones, are hot
 * @work: has samples taken, and picks the busiest blocks
 * @round: how often that was
 * @cpu: what takes the samples
 * @lock: protects what follows; taken in softirq context
 * @found: where samples found the kernel
 * @samples: number of them, the older ones counting less
 */
struct gemini_kernel {
	unsigned int shift;
	struct gemini_kernel_known *known;
	unsigned int nr_known;
	unsigned int nr_always;
	u64 busy[GEMINI_KERNEL_BUSY];
	unsigned int nr_busy;
	unsigned int nr_hot;
	struct delayed_work work;
	unsigned int round;
	struct gemini_kernel_cpu __percpu *cpu;
	spinlock_t lock;	/* see above */
	struct gemini_kernel_found found[GEMINI_KERNEL_FOUND];
	unsigned int samples;
};

/**
 * struct gemini_hints - what comes from the device
 * @work: takes the used buffers of hintq; nothing else touches that queue
 *	while the device runs
 * @buffer: what the device writes into
 * @synced: a full host state was received in this generation
 * @batches: batches taken
 * @records: records taken
 * @bad: batches and records refused
 */
struct gemini_hints {
	struct work_struct work;
	void *buffer[GEMINI_HINT_BUFFERS];
	bool synced;
	u64 batches;
	u64 records;
	u64 bad;
};

enum gemini_report_state {
	GEMINI_REPORT_SILENT,	/* the device has not told its generation */
	GEMINI_REPORT_START,	/* a full state is to be sent */
	GEMINI_REPORT_FULL,	/* a full state is on its way */
	GEMINI_REPORT_CHANGES,	/* it was sent, changes follow */
};

/**
 * struct gemini_report - what goes to the device
 * @work: fills and sends buffers; nothing else touches reportq while the
 *	device runs
 * @buffer: all buffers
 * @idle: those that the device does not have, the first @nr_idle
 * @nr_idle: number of them
 * @state: how far the device knows, under sync_lock
 * @batches: batches sent
 * @records: records sent
 */
struct gemini_report {
	struct work_struct work;
	void *buffer[GEMINI_REPORT_BUFFERS];
	void *idle[GEMINI_REPORT_BUFFERS];
	unsigned int nr_idle;
	enum gemini_report_state state;
	u64 batches;
	u64 records;
};

/**
 * struct gemini_requests - one request queue
 * @lock: protects the ring and what follows
 * @work: takes answers
 * @pending: requests that the device has
 * @nr_pending: number of them
 * @blocks: number of blocks in them
 * @closed: no request is taken any more
 * @made: requests made
 * @answered: requests answered
 * @failed: requests answered with anything but OK
 */
struct gemini_requests {
	spinlock_t lock;	/* see above */
	struct work_struct work;
	struct list_head pending;
	unsigned int nr_pending;
	u64 blocks;
	bool closed;
	u64 made;
	u64 answered;
	u64 failed;
};

/* Functions that tell of freed huge pages; see bucket.c. */
enum gemini_trigger {
	GEMINI_TRIGGER_ZAP,
	GEMINI_TRIGGER_UNQUEUE,
	GEMINI_TRIGGERS,
};

/**
 * struct gemini_bucket - freed aligned blocks are held again
 * @lock: held while it is switched on or off
 * @ops: the callbacks
 * @hooked: bits of those that are installed, 0: the bucket is off
 * @wq: runs the work of each CPU on it
 * @cpu: what each CPU freed
 * @parked: blocks whose pages are kept until they are looked at
 * @pressure_until: memory was short, nothing is held again before this time
 * @freed: aligned blocks that were freed, as far as the callbacks saw
 * @rebooked: blocks that were held again
 */
struct gemini_bucket {
	struct mutex lock;	/* see above */
#ifdef CONFIG_FUNCTION_TRACER
	struct ftrace_ops ops[GEMINI_TRIGGERS];
#endif
	unsigned int hooked;
	struct workqueue_struct *wq;
	struct gemini_bucket_cpu __percpu *cpu;
	atomic_t parked;
	unsigned long pressure_until;
	atomic64_t freed;
	atomic64_t rebooked;
};

/* Isolated ranges that are remembered. */
#define GEMINI_ISOLATED	8

struct gemini_isolated {
	u64 first;
	u64 end;
	unsigned long until;
};

/**
 * struct gemini_isolation - held blocks make way for who isolates page frames
 * @ops: the callback
 * @active: it is installed and fires
 * @fired: it was called
 * @state: the same for people
 * @lock: protects @range and @next
 * @range: what was isolated last
 * @next: the one to be written next
 * @returned: blocks given back
 * @await: looks whether anybody answers for what is busy
 * @awaited: number of releaseq's request that was made last when memory was
 *	isolated
 * @away: the device was away when @await looked last
 */
struct gemini_isolation {
#ifdef CONFIG_FUNCTION_TRACER
	struct ftrace_ops ops;
#endif
	bool active;
	bool fired;
	const char *state;
	spinlock_t lock;	/* see above */
	struct gemini_isolated range[GEMINI_ISOLATED];
	unsigned int next;
	atomic64_t returned;
	struct delayed_work await;
	u64 awaited;
	bool away;
};

/**
 * struct gemini_timeout - how long a block is held for nothing
 * @control: held while adapting begins or ends
 * @lock: protects @adapt, @fixed_ms and @wish_ms
 * @work: runs at the end of each period
 * @adapt: the algorithm's state
 * @fixed_ms: what the administrator wants; 0: adapt
 * @wish_ms: what the host wished when adapting began
 * @counting: perf counters tell of TLB misses
 * @counted: what they said at the end of the last period, only @work uses it
 * @placement_misses: misses up to then, only @work uses it
 * @held: blocks were held then, only @work uses it
 */
struct gemini_timeout {
	struct mutex control;	/* see above */
	spinlock_t lock;	/* see above */
	struct delayed_work work;
	struct gemini_adapt adapt;
	unsigned int fixed_ms;
	unsigned int wish_ms;
	bool counting;
	u64 counted;
	u64 placement_misses;
	bool held;
};

/**
 * struct gemini_booking - which blocks are held, and how many
 * @work: looks, decides and acts; nothing else books for the stock
 * @next: the block where the next look begins
 * @calm: @work rests for long, and is to be woken when the stock is low
 * @asked: requests that the device has, by gemini_request.asked
 * @enabled: not 0: blocks are booked at all
 * @stock_floor: blocks to have ready at least
 * @stock_active: blocks to have ready between demands at most, however many huge
 *	pages the guest has
 * @stock_cap: blocks to make ready at most
 * @evacuation_rate: blocks to empty in a second; 0: none
 * @target: blocks to have ready now
 * @paused_until: nothing is booked before this time, in jiffies
 * @asked_until: the host is not asked again before this time, in jiffies
 * @asked_delay: pause after a refusal, in jiffies, doubled with each
 * @forgiven: when blocks were last taken into consideration again, in jiffies
 * @demand: huge pages asked for until the last look
 * @demand_time: when that was, in jiffies
 * @demanded: when it had grown, in jiffies
 * @demand_rate: huge pages asked for in a second, times 256, decaying
 * @taken: when the host had last taken something back, or there was nothing, in
 *	jiffies
 * @released: blocks that it had taken by then
 * @credit: blocks that may be emptied now, times HZ
 * @credit_time: when that was reckoned, in jiffies
 * @inflated: pages that balloons have taken, ever, when last looked at
 * @inflated_time: when that had changed, in jiffies
 * @plain: blocks booked by plain allocations
 * @exact: free blocks booked at their addresses
 * @evacuated: blocks emptied and booked
 * @evacuated_pages: base pages that were moved for it
 * @failures: blocks that could not be emptied
 * @prepared: blocks that the host was asked to prepare
 * @renewed: blocks that the host was asked to renew
 * @expired: blocks given back unused
 */
struct gemini_booking {
	struct delayed_work work;
	u64 next;
	bool calm;
	struct list_head asked;
	unsigned int enabled;
	unsigned int stock_floor;
	unsigned int stock_active;
	unsigned int stock_cap;
	unsigned int evacuation_rate;
	u64 target;
	unsigned long paused_until;
	unsigned long asked_until;
	unsigned long asked_delay;
	unsigned long forgiven;
	u64 demand;
	unsigned long demand_time;
	unsigned long demanded;
	u64 demand_rate;
	unsigned long taken;
	u64 released;
	u64 credit;
	unsigned long credit_time;
	unsigned long inflated;
	unsigned long inflated_time;
	u64 plain;
	u64 exact;
	u64 evacuated;
	u64 evacuated_pages;
	u64 failures;
	u64 prepared;
	u64 renewed;
	u64 expired;
};

/**
 * struct gemini_giving - free memory goes back to the host
 * @work: looks, holds, releases and takes answers; protects what follows, but
 *	for @owed, @huge_first and @free_left
 * @asked: requests that the device has, by gemini_request.asked
 * @owed: blocks left of the host's wish; set by whoever takes advice
 * @next: the block where the next look at free blocks begins
 * @looked: when the last look at all of them began, in jiffies
 * @huge_seen: the look that is under way has seen a host-huge one
 * @huge_first: there may be host-huge ones, others have to wait
 * @free_seen: the look that is under way has seen one of any kind
 * @free_left: there may be some, what is trimmed and what is ready has to wait
 * @trimming: nothing else is left, and there may be more to be trimmed
 * @free_pages: how many the guest had when there was nothing to be trimmed for
 *	what was spent, or fewer if it had since; changed by booking.work, too
 * @odd_pages: base pages that were given back and make no whole block
 * @spent: blocks that the host was asked to make huge where it had nothing, less
 *	those that it got back without a wish; changed by anybody
 * @released: blocks released
 */
struct gemini_giving {
	struct delayed_work work;
	struct list_head asked;
	atomic64_t owed;
	u64 next;
	unsigned long looked;
	bool huge_seen;
	bool huge_first;
	bool free_seen;
	bool free_left;
	bool trimming;
	unsigned long free_pages;
	u64 odd_pages;
	atomic64_t spent;
	u64 released;
};

/* Blocks that one look for huge pages to move finds. */
#define GEMINI_MOVES	32

/**
 * struct gemini_target - where a huge page that is moved goes to
 * @folio: a block that was held, and whose reference is the mover's
 * @given: the kernel was given it, and may have freed it again
 */
struct gemini_target {
	struct folio *folio;
	bool given;
};

/**
 * struct gemini_move - huge pages move to where the host has huge pages
 * @wanted: the host would like it
 * @begun: it did not before, and the last look does not know of it
 * @next: the block where the next look begins, as all that follows used only by
 *	booking's work
 * @found: blocks whose huge pages are to be moved, @count of them
 * @count: see @found
 * @moved: huge pages that were moved
 * @failures: huge pages that could not be
 */
struct gemini_move {
	bool wanted;
	bool begun;
	u64 next;
	u64 found[GEMINI_MOVES];
	unsigned int count;
	atomic64_t moved;
	atomic64_t failures;
};

/**
 * struct gemini_heat - which huge pages of programs are hot
 * @work: looks, while huge pages are scarce; all else is its own
 * @used: whether a block was accessed before the last pass, between it and the
 *	one before, ...; a bit for each
 * @accessed: whether it was right after the flush of the last pass, the one
 *	before, ...
 * @blocks: number of blocks in these
 * @flushed: this look comes after the flush
 * @took: time that the looks of this pass took
 * @first: of the processes that the next pass goes through, the first one
 * @passes: passes so far
 */
struct gemini_heat {
	struct delayed_work work;
	u8 *used;
	u8 *accessed;
	u64 blocks;
	bool flushed;
	u64 took;
	unsigned int first;
	u64 passes;
};

/* Blocks that are trimmed at a time, a run of each in one request. */
#define GEMINI_TRIM_BLOCKS	16

/**
 * struct gemini_trim_job - a block that is trimmed
 * @block: which one
 * @used: base pages in use when it was chosen
 * @next: the page of it from which on it is to be trimmed
 */
struct gemini_trim_job {
	u64 block;
	u16 used;
	u16 next;
};

/**
 * struct gemini_trim - free base pages of blocks in use go back to the host
 * @lock: protects @taken and what is in it; taken in the reclaim path
 * @taken: what is held and in no request yet
 * @host: what blocks that are trimmed are in the host; this and what follows are
 *	of giving.work, but for @pages
 * @job: which ones these are, the sparsest first
 * @count: number of them
 * @next: the block where the next look begins
 * @asked: the request that the device has
 * @rest_until: nothing is taken before this time, in jiffies
 * @pages: pages that the host dropped
 */
struct gemini_trim {
	spinlock_t lock;	/* see above */
	struct list_head taken;
	u8 host;
	struct gemini_trim_job job[GEMINI_TRIM_BLOCKS];
	unsigned int count;
	u64 next;
	struct gemini_request *asked;
	unsigned long rest_until;
	atomic64_t pages;
};

/**
 * struct gemini - one device
 * @vdev: the virtio device
 * @vq: its queues, valid between gemini_start() and gemini_stop()
 * @block_shift: log2 of the size of a block
 * @block_order: the same in pages
 * @map: what is known of the blocks
 * @wq: runs all work; frozen while the system sleeps
 * @sync_lock: protects @generation, hints.synced and report.state
 * @generation: the device's, 0 until it told it
 * @release_max: most unanswered blocks on releaseq
 * @wanted: blocks that the host would like to have released, by its last advice
 * @returning: it would like to have whatever is unused
 * @scarce: the host has no huge pages to give
 * @bucket_max: blocks that the host would have us hold at most; 0: our choice
 * @booking_timeout_ms: how long it would have us hold them; 0: our choice
 * @broken: a queue does not work any more, until the next reset
 * @census: see struct gemini_census
 * @kernel: see struct gemini_kernel
 * @hints: see struct gemini_hints
 * @report: see struct gemini_report
 * @ctrl: requests that keep contents
 * @release: requests that drop contents
 * @waitq: woken when a request is answered and when a census pass ends
 * @reset_work: resets a device that says that it needs it
 * @lifecycle: held while the device is started or stopped
 * @stopped: gemini_stop() has run, under @lifecycle
 * @exact_lock: held while one block is taken at its address, one at a time
 * @exact_task: who takes it
 * @exact_target: where a huge page in it goes to; only @exact_task uses it
 * @shrinker: gives held blocks back under memory pressure
 * @oom: gives all of them back when there is no memory left
 * @returned_pressure: blocks given back because memory was short
 * @booking: see struct gemini_booking
 * @giving: see struct gemini_giving
 * @move: see struct gemini_move
 * @trim: see struct gemini_trim
 * @placement: see struct gemini_placement
 * @bucket: see struct gemini_bucket
 * @isolation: see struct gemini_isolation
 * @timeout: see struct gemini_timeout
 * @debugfs: the device's folder
 * @command_lock: protects @command_result
 * @command_result: what the last command said
 */
struct gemini {
	struct virtio_device *vdev;
	struct virtqueue *vq[VIRTIO_GEMINI_VQ_COUNT];
	unsigned int block_shift;
	unsigned int block_order;
	struct gemini_map map;
	struct workqueue_struct *wq;

	struct mutex sync_lock;	/* see above */
	u64 generation;
	unsigned int release_max;
	u64 wanted;
	bool returning;
	bool scarce;
	unsigned int bucket_max;
	unsigned int booking_timeout_ms;
	bool broken;

	struct gemini_census census;
	struct gemini_kernel kernel;
	struct gemini_heat heat;
	struct gemini_hints hints;
	struct gemini_report report;
	struct gemini_requests ctrl;
	struct gemini_requests release;
	wait_queue_head_t waitq;

	struct delayed_work reset_work;
	struct mutex lifecycle;	/* see above */
	bool stopped;

	struct mutex exact_lock;	/* see above */
	struct task_struct *exact_task;
	struct gemini_target *exact_target;
	struct shrinker *shrinker;
	struct notifier_block oom;
	atomic64_t returned_pressure;
	struct gemini_booking booking;
	struct gemini_giving giving;
	struct gemini_move move;
	struct gemini_trim trim;
	struct gemini_placement placement;
	struct gemini_bucket bucket;
	struct gemini_isolation isolation;
	struct gemini_timeout timeout;

	struct dentry *debugfs;
	struct mutex command_lock;	/* see above */
	char *command_result;
};

/**
 * struct gemini_range - blocks of a request
 * @first: the first block
 * @count: number of blocks, not 0
 */
struct gemini_range {
	u64 first;
	u32 count;
};

/**
 * struct gemini_request - a request, from its making to its answer
 * @ref: one for whoever made it, one for the queue
 * @gemini: the device
 * @node: in gemini_requests.pending
 * @asked: in gemini_booking.asked or gemini_giving.asked, where it was made
 * @type: VIRTIO_GEMINI_REQ_*
 * @nr_ranges: number of ranges
 * @blocks: number of blocks in them
 * @absent: of those that are to be made huge, the host had nothing under so many
 * @out: what the device reads
 * @in: where the device writes
 * @in_size: size of @in
 * @answered: all that follows is valid, and @in can be read
 * @status: VIRTIO_GEMINI_S_*, if there is one
 * @error: 0 for OK, else a negative error code
 * @nr_elements: elements after the header of @in, checked
 */
struct gemini_request {
	struct kref ref;
	struct gemini *gemini;
	struct list_head node;
	struct list_head asked;
	u16 type;
	u32 nr_ranges;
	u64 blocks;
	u64 absent;
	struct virtio_gemini_req *out;
	struct virtio_gemini_resp *in;
	size_t in_size;
	bool answered;
	u32 status;
	int error;
	u32 nr_elements;
};

static inline struct virtio_gemini_range *
gemini_request_ranges(struct gemini_request *request)
{
	return (struct virtio_gemini_range *)(request->out + 1);
}

static inline void *gemini_request_elements(struct gemini_request *request)
{
	return request->in + 1;
}

static inline unsigned long gemini_block_pfn(struct gemini *gemini, u64 block)
{
	return block << gemini->block_order;
}

/* queues.c */
int gemini_queues_make(struct gemini *gemini);
void gemini_queues_drop(struct gemini *gemini);
int gemini_queue_post(struct gemini *gemini, unsigned int queue, void *buffer,
		      size_t size, bool device_writes);
void gemini_broken(struct gemini *gemini, const char *what);

/* kernel.c */
int gemini_kernel_init(struct gemini *gemini);
void gemini_kernel_start(struct gemini *gemini);
void gemini_kernel_stop(struct gemini *gemini);
bool gemini_kernel_owns(struct gemini *gemini, u64 block);
u16 gemini_kernel_heat(struct gemini *gemini, u64 block);

/* heat.c */
void gemini_heat_init(struct gemini *gemini);
void gemini_heat_start(struct gemini *gemini);
void gemini_heat_stop(struct gemini *gemini);
void gemini_heat_kick(struct gemini *gemini);
void gemini_heat_free(struct gemini_heat *heat);

/* census.c */
int gemini_census_init(struct gemini *gemini);
void gemini_census_exit(struct gemini *gemini);
void gemini_census_start(struct gemini *gemini);
void gemini_census_stop(struct gemini *gemini);
void gemini_census_kick(struct gemini *gemini);
int gemini_census_wait(struct gemini *gemini);
bool gemini_census_free(struct gemini *gemini, u64 block);
bool gemini_census_counted(struct gemini *gemini);
unsigned int gemini_census_run(struct gemini *gemini, u64 block,
			       unsigned int *at, unsigned int min);

/* hints.c */
int gemini_hints_init(struct gemini *gemini);
void gemini_hints_exit(struct gemini *gemini);
int gemini_hints_start(struct gemini *gemini);
void gemini_hints_stop(struct gemini *gemini);
bool gemini_record_valid(struct gemini *gemini,
			 const struct virtio_gemini_record *record);
void gemini_hints_refuse(struct gemini *gemini, const char *why);

/* report.c */
int gemini_report_init(struct gemini *gemini);
void gemini_report_exit(struct gemini *gemini);
void gemini_report_start(struct gemini *gemini);
void gemini_report_stop(struct gemini *gemini);
void gemini_report_kick(struct gemini *gemini);

/* request.c */
void gemini_requests_init(struct gemini *gemini);
void gemini_requests_start(struct gemini *gemini);
void gemini_requests_close(struct gemini *gemini);
void gemini_requests_abort(struct gemini *gemini);
struct gemini_request *gemini_request_new(struct gemini *gemini, u16 type,
					  const struct gemini_range *ranges,
					  u32 nr_ranges);
int gemini_request_submit(struct gemini_request *request);
int gemini_request_wait(struct gemini_request *request);
bool gemini_request_answered(struct gemini_request *request);
void gemini_request_put(struct gemini_request *request);
int gemini_release_room_wait(struct gemini *gemini, u64 blocks);

/* hold.c */
int gemini_hold_init(struct gemini *gemini);
void gemini_hold_exit(struct gemini *gemini);
void gemini_hold_open(struct gemini *gemini);
void gemini_hold_close(struct gemini *gemini);
int gemini_hold_any(struct gemini *gemini, int nid, u64 *block);
int gemini_hold_freed(struct gemini *gemini, struct zone *zone,
		      unsigned long since, u64 *block);
int gemini_hold_exact(struct gemini *gemini, u64 block);
int gemini_hold_moved(struct gemini *gemini, u64 block,
		      struct gemini_target *target);
struct folio *gemini_hold_target(struct gemini *gemini, int nid);
void gemini_hold_give(struct gemini *gemini, u64 block, bool used);
int gemini_hold_pages(struct gemini *gemini, unsigned long pfn,
		      unsigned long count);
int gemini_hold_free(struct gemini *gemini, u64 block);
u64 gemini_hold_free_all(struct gemini *gemini);
void gemini_hold_idle(struct gemini *gemini, u64 first, u64 count, bool zero);
u64 gemini_hold_free_range(struct gemini *gemini, u64 first, u64 count);
u64 gemini_hold_expire(struct gemini *gemini, int nid, enum gemini_stock stock,
		       unsigned long before, u64 most);
struct page *gemini_hold_take(struct gemini *gemini, int nid, bool zero);
u64 gemini_hold_ready(struct gemini *gemini, int nid);
bool gemini_hold_is_exact_caller(struct gemini *gemini);

/* booking.c */
void gemini_booking_init(struct gemini *gemini);
void gemini_booking_start(struct gemini *gemini);
void gemini_booking_stop(struct gemini *gemini);
void gemini_booking_kick(struct gemini *gemini);
void gemini_booking_taken(struct gemini *gemini);
void gemini_booking_pause(struct gemini *gemini);
bool gemini_booking_wants(struct gemini *gemini, u64 block);
bool gemini_booking_paused(struct gemini *gemini);
u64 gemini_booking_room(struct gemini *gemini);
u64 gemini_booking_spare(struct gemini *gemini, int nid);
bool gemini_booking_credit(struct gemini *gemini);
int gemini_booking_node(struct gemini *gemini, u64 block);

/* giving.c */
void gemini_giving_init(struct gemini *gemini);
void gemini_giving_start(struct gemini *gemini);
void gemini_giving_stop(struct gemini *gemini);
void gemini_giving_kick(struct gemini *gemini);
void gemini_giving_want(struct gemini *gemini, u64 blocks, bool unused);
bool gemini_giving_possible(struct gemini *gemini);
bool gemini_giving_active(struct gemini *gemini);
bool gemini_giving_surplus(struct gemini *gemini, int nid);
void gemini_giving_repay(struct gemini *gemini);
bool gemini_giving_seeks_sparse(struct gemini *gemini);
void gemini_giving_spent(struct gemini *gemini, u64 blocks);
u64 gemini_giving_owed(struct gemini *gemini);

/* move.c */
void gemini_move_want(struct gemini *gemini, bool wanted);
void gemini_move_find(struct gemini *gemini, int nid);
u64 gemini_move_need(struct gemini *gemini, int nid);
bool gemini_move_some(struct gemini *gemini, int nid);
int gemini_move_block(struct gemini *gemini, u64 block, u64 *to);
const char *gemini_move_state(struct gemini *gemini);

/* trim.c */
void gemini_trim_init(struct gemini *gemini);
void gemini_trim_start(struct gemini *gemini);
void gemini_trim_stop(struct gemini *gemini);
bool gemini_trim(struct gemini *gemini, u8 host, u64 most, u64 *gained);
int gemini_trim_block(struct gemini *gemini, u64 block, u64 *pages);
void gemini_trim_answered(struct gemini_request *request);
u64 gemini_trim_recall(struct gemini *gemini, u64 first, u64 count);
unsigned long gemini_trim_held(struct gemini *gemini);

/* bucket.c */
int gemini_bucket_init(struct gemini *gemini);
void gemini_bucket_exit(struct gemini *gemini);
int gemini_bucket_switch(struct gemini *gemini, bool on);
u64 gemini_bucket_limit(struct gemini *gemini);
unsigned int gemini_bucket_parked(struct gemini *gemini);
u64 gemini_bucket_pressure(struct gemini *gemini);
ssize_t gemini_bucket_hooks(struct gemini *gemini, char *buffer);

/* isolation.c */
void gemini_isolation_init(struct gemini *gemini);
int gemini_isolation_start(struct gemini *gemini);
void gemini_isolation_stop(struct gemini *gemini);
bool gemini_isolation_active(struct gemini *gemini);
const char *gemini_isolation_state(struct gemini *gemini);
bool gemini_isolation_wants(struct gemini *gemini, u64 block);
void gemini_isolation_idle(struct gemini *gemini, u64 first, u64 count);

/* timeout.c */
void gemini_timeout_start(struct gemini *gemini);
void gemini_timeout_stop(struct gemini *gemini);
unsigned int gemini_timeout_ms(struct gemini *gemini);
unsigned int gemini_timeout_hold_ms(struct gemini *gemini);
unsigned int gemini_timeout_guest_ms(struct gemini *gemini);
int gemini_timeout_fix(struct gemini *gemini, unsigned int ms);
const char *gemini_timeout_source(struct gemini *gemini);

/* fmfi.c */
unsigned int gemini_fmfi(struct gemini *gemini, int nid);

/* sysfs.c */
extern const struct attribute_group *gemini_groups[];

/* debugfs.c */
void gemini_debugfs_init(void);
void gemini_debugfs_exit(void);
void gemini_debugfs_add(struct gemini *gemini);
void gemini_debugfs_remove(struct gemini *gemini);

/* command.c */
struct seq_buf;
int gemini_command(struct gemini *gemini, char *line, struct seq_buf *result);

#endif /* _GEMINI_H */

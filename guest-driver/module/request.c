// SPDX-License-Identifier: GPL-2.0
/*
 * ctrlq and releaseq: requests and their answers.
 *
 * Blocks of a release or renew are made busy before the request is available
 * to the device.  They stay so until the device has used the request or has
 * been reset: after that, and only then, can it not drop them any more.
 */
#include <linux/freezer.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>
#include <linux/virtio_config.h>

#include "gemini.h"
#include "trace.h"

static bool drops(u16 type)
{
	return type == VIRTIO_GEMINI_REQ_RELEASE ||
	       type == VIRTIO_GEMINI_REQ_RENEW ||
	       type == VIRTIO_GEMINI_REQ_TRIM;
}

/* Are its ranges blocks that are held, and not base pages? */
static bool drops_blocks(u16 type)
{
	return drops(type) && type != VIRTIO_GEMINI_REQ_TRIM;
}

static unsigned int queue_of(u16 type)
{
	return drops(type) ? VIRTIO_GEMINI_VQ_RELEASE : VIRTIO_GEMINI_VQ_CTRL;
}

static struct gemini_requests *requests_of(struct gemini_request *request)
{
	return drops(request->type) ? &request->gemini->release :
				      &request->gemini->ctrl;
}

static bool negotiated(struct gemini *gemini, u16 type)
{
	switch (type) {
	case VIRTIO_GEMINI_REQ_PREPARE:
		return virtio_has_feature(gemini->vdev,
					  VIRTIO_GEMINI_F_PREPARE);
	case VIRTIO_GEMINI_REQ_QUERY:
		return true;
	case VIRTIO_GEMINI_REQ_STATS:
		return virtio_has_feature(gemini->vdev, VIRTIO_GEMINI_F_STATS);
	case VIRTIO_GEMINI_REQ_RELEASE:
	case VIRTIO_GEMINI_REQ_RENEW:
		return virtio_has_feature(gemini->vdev,
					  VIRTIO_GEMINI_F_RELEASE);
	case VIRTIO_GEMINI_REQ_TRIM:
		return virtio_has_feature(gemini->vdev, VIRTIO_GEMINI_F_TRIM);
	}
	return false;
}

/* Elements that the answer may have after its header, and their size. */
static size_t answer_room(u16 type, u64 blocks, size_t *element)
{
	switch (type) {
	case VIRTIO_GEMINI_REQ_PREPARE:
	case VIRTIO_GEMINI_REQ_QUERY:
		*element = sizeof(struct virtio_gemini_record);
		return min_t(u64, blocks, VIRTIO_GEMINI_MAX_RECORDS);
	case VIRTIO_GEMINI_REQ_STATS:
		*element = sizeof(struct virtio_gemini_stats);
		return 1;
	}
	*element = 1;
	return 0;
}

static size_t out_size(struct gemini_request *request)
{
	return sizeof(struct virtio_gemini_req) +
	       request->nr_ranges * sizeof(struct virtio_gemini_range);
}

static void request_free(struct kref *ref)
{
	struct gemini_request *request =
		container_of(ref, struct gemini_request, ref);

	kfree(request->out);
	kfree(request->in);
	kfree(request);
}

void gemini_request_put(struct gemini_request *request)
{
	kref_put(&request->ref, request_free);
}

/**
 * gemini_request_new() - make a request
 * @gemini: the device
 * @type: VIRTIO_GEMINI_REQ_*
 * @ranges: the blocks; of a TRIM base pages, each range in a block of its own
 * @nr_ranges: number of ranges, at most VIRTIO_GEMINI_MAX_RANGES
 *
 * Return: the request, with a reference for the caller, or an ERR_PTR().
 */
struct gemini_request *gemini_request_new(struct gemini *gemini, u16 type,
					  const struct gemini_range *ranges,
					  u32 nr_ranges)
{
	struct virtio_gemini_range *out;
	struct gemini_request *request;
	size_t element, room;
	u32 i;

	if (nr_ranges > VIRTIO_GEMINI_MAX_RANGES)
		return ERR_PTR(-EINVAL);
	if (!negotiated(gemini, type))
		return ERR_PTR(-EOPNOTSUPP);

	request = kzalloc(sizeof(*request), GFP_KERNEL);
	if (!request)
		return ERR_PTR(-ENOMEM);
	kref_init(&request->ref);
	INIT_LIST_HEAD(&request->node);
	request->gemini = gemini;
	request->type = type;
	request->nr_ranges = nr_ranges;
	request->out = kzalloc(out_size(request), GFP_KERNEL);
	if (!request->out)
		goto nomem;
	out = gemini_request_ranges(request);
	for (i = 0; i < nr_ranges; i++) {
		out[i].first = cpu_to_le64(ranges[i].first);
		out[i].count = cpu_to_le32(ranges[i].count);
		/* A TRIM counts as all of the blocks that its runs are in. */
		request->blocks += type == VIRTIO_GEMINI_REQ_TRIM ?
				   1 : ranges[i].count;
	}
	room = answer_room(type, request->blocks, &element);
	request->in_size = sizeof(*request->in) + room * element;
	request->in = kzalloc(request->in_size, GFP_KERNEL);
	if (!request->in)
		goto nomem;
	return request;

nomem:
	gemini_request_put(request);
	return ERR_PTR(-ENOMEM);
}

/* Says of each range of a release or renew what becomes of its hold. */
static int make_busy(struct gemini_request *request)
{
	struct virtio_gemini_range *range = gemini_request_ranges(request);
	struct gemini_map *map = &request->gemini->map;
	int ret = 0;
	u32 i;

	for (i = 0; i < request->nr_ranges; i++) {
		ret = gemini_map_busy(map, le64_to_cpu(range[i].first),
				      le32_to_cpu(range[i].count));
		if (ret)
			break;
	}
	while (ret && i--)
		gemini_hold_idle(request->gemini, le64_to_cpu(range[i].first),
				 le32_to_cpu(range[i].count), false);
	return ret;
}

static void make_idle(struct gemini_request *request, bool zero)
{
	struct virtio_gemini_range *range = gemini_request_ranges(request);
	u32 i;

	for (i = 0; i < request->nr_ranges; i++)
		gemini_hold_idle(request->gemini, le64_to_cpu(range[i].first),
				 le32_to_cpu(range[i].count), zero);
}

static bool room_for(struct gemini_requests *requests,
		     struct gemini_request *request)
{
	struct gemini *gemini = request->gemini;

	if (!drops(request->type))
		return requests->nr_pending < GEMINI_CTRL_MAX;
	return requests->blocks + request->blocks <=
	       READ_ONCE(gemini->release_max);
}

static bool release_room(struct gemini *gemini, u64 blocks)
{
	/* If the device goes away, there is nothing to be waited for. */
	return READ_ONCE(gemini->release.closed) ||
	       READ_ONCE(gemini->release.blocks) + blocks <=
		       READ_ONCE(gemini->release_max);
}

/**
 * gemini_release_room_wait() - wait until so many blocks could be released
 * @gemini: the device
 * @blocks: number of blocks, at most gemini.release_max
 *
 * Return: 0 if they could, or if the device goes away; -EINTR.
 */
int gemini_release_room_wait(struct gemini *gemini, u64 blocks)
{
	if (wait_event_freezable(gemini->waitq, release_room(gemini, blocks)))
		return -EINTR;
	return 0;
}

static int add(struct gemini_requests *requests, struct gemini_request *request)
{
	struct gemini *gemini = request->gemini;
	struct virtqueue *vq = gemini->vq[queue_of(request->type)];
	u64 generation = READ_ONCE(gemini->generation);
	struct scatterlist out, in, *sgs[] = { &out, &in };
	int ret;

	lockdep_assert_held(&requests->lock);

	if (requests->closed || READ_ONCE(gemini->broken))
		return -ENODEV;
	if (!generation)
		return -EAGAIN;
	if (!room_for(requests, request))
		return -EBUSY;

	*request->out = (struct virtio_gemini_req) {
		.type = cpu_to_le16(request->type),
		.count = cpu_to_le32(request->nr_ranges),
		.generation = cpu_to_le64(generation),
	};
	sg_init_one(&out, request->out, out_size(request));
	sg_init_one(&in, request->in, request->in_size);
	ret = virtqueue_add_sgs(vq, sgs, 1, 1, request, GFP_ATOMIC);
	if (ret)
		return ret == -ENOSPC ? -EBUSY : ret;

	kref_get(&request->ref);
	list_add_tail(&request->node, &requests->pending);
	requests->nr_pending++;
	requests->blocks += request->blocks;
	requests->made++;
	return 0;
}

/**
 * gemini_request_submit() - make a request available to the device
 * @request: a request that was not submitted yet
 *
 * Blocks of a release or renew must be held; from here to the answer they are
 * busy.  Pages of a trim must be held likewise, and on success are the request's.
 *
 * Return: 0; -ENOENT if a block to be dropped is not held; -EBUSY if one of
 * them is busy, or too much is unanswered; -EAGAIN if the device has not told
 * its generation; -ENODEV if it goes away.
 */
int gemini_request_submit(struct gemini_request *request)
{
	struct gemini_requests *requests = requests_of(request);
	struct virtqueue *vq;
	bool notify = false;
	int ret;

	if (drops_blocks(request->type)) {
		ret = make_busy(request);
		if (ret)
			return ret;
	}
	spin_lock(&requests->lock);
	ret = add(requests, request);
	if (!ret) {
		vq = request->gemini->vq[queue_of(request->type)];
		trace_gemini_request(request);
		notify = virtqueue_kick_prepare(vq);
		/* Under the lock, because the queue goes with the device. */
		if (notify)
			virtqueue_notify(vq);
	}
	spin_unlock(&requests->lock);
	if (ret && drops_blocks(request->type))
		make_idle(request, false);
	return ret;
}

/* Enters the host states that the device answered. */
static void take_records(struct gemini_request *request)
{
	struct virtio_gemini_record *record = gemini_request_elements(request);
	struct gemini *gemini = request->gemini;
	u32 i;

	if (request->type != VIRTIO_GEMINI_REQ_PREPARE &&
	    request->type != VIRTIO_GEMINI_REQ_QUERY)
		return;
	mutex_lock(&gemini->sync_lock);
	if (le64_to_cpu(request->in->generation) == gemini->generation) {
		for (i = 0; i < request->nr_elements; i++, record++) {
			if (!gemini_record_valid(gemini, record)) {
				gemini_hints_refuse(gemini, "a record that means nothing");
				continue;
			}
			gemini_map_set_host(&gemini->map,
					    le64_to_cpu(record->first),
					    le32_to_cpu(record->count),
					    record->state);
		}
	}
	mutex_unlock(&gemini->sync_lock);
}

/* Reads an answer of which the device says that it wrote @length bytes. */
static void read_answer(struct gemini_request *request, size_t length)
{
	static const int errors[] = {
		[VIRTIO_GEMINI_S_OK] = 0,
		[VIRTIO_GEMINI_S_FAILED] = -EIO,
		[VIRTIO_GEMINI_S_VOID] = -ESTALE,
		[VIRTIO_GEMINI_S_INVALID] = -EINVAL,
		[VIRTIO_GEMINI_S_UNSUPPORTED] = -EOPNOTSUPP,
		[VIRTIO_GEMINI_S_BUSY] = -EBUSY,
	};
	size_t element;
	u32 count;

	request->error = -EPROTO;
	length = min(length, request->in_size);
	if (length < sizeof(*request->in))
		goto refuse;
	request->status = le32_to_cpu(request->in->status);
	if (request->status >= ARRAY_SIZE(errors))
		goto refuse;
	answer_room(request->type, request->blocks, &element);
	count = le32_to_cpu(request->in->count);
	if (count > (length - sizeof(*request->in)) / element)
		goto refuse;
	request->nr_elements = count;
	request->error = errors[request->status];
	return;

refuse:
	gemini_hints_refuse(request->gemini, "an answer that means nothing");
}

/* The device is done with a request; its queue's reference ends here. */
static void finish(struct gemini_request *request)
{
	struct gemini_requests *requests = requests_of(request);
	struct gemini *gemini = request->gemini;

	take_records(request);
	trace_gemini_answer(request);
	if (drops_blocks(request->type))
		make_idle(request, !request->error);
	else if (drops(request->type))
		gemini_trim_answered(request);

	spin_lock(&requests->lock);
	/* Only now: what is being finished still counts as unanswered. */
	requests->nr_pending--;
	requests->blocks -= request->blocks;
	requests->answered++;
	if (request->error)
		requests->failed++;
	spin_unlock(&requests->lock);

	/* Who sees it answered sees the answer. */
	smp_store_release(&request->answered, true);
	wake_up_all(&gemini->waitq);
	/* Blocks that were free are to be held before somebody breaks them. */
	if (request->type == VIRTIO_GEMINI_REQ_PREPARE)
		gemini_booking_kick(gemini);
	else if (request->type == VIRTIO_GEMINI_REQ_RELEASE ||
		 request->type == VIRTIO_GEMINI_REQ_TRIM)
		gemini_giving_kick(gemini);
	gemini_request_put(request);
}

static void take_answers(struct gemini *gemini, struct gemini_requests *requests,
			 unsigned int queue)
{
	struct gemini_request *request;
	unsigned int length;

	for (;;) {
		spin_lock(&requests->lock);
		request = virtqueue_get_buf(gemini->vq[queue], &length);
		if (request)
			list_del_init(&request->node);
		spin_unlock(&requests->lock);
		if (!request)
			break;
		read_answer(request, length);
		finish(request);
	}
}

static void ctrl_work(struct work_struct *work)
{
	struct gemini *gemini = container_of(work, struct gemini, ctrl.work);

	take_answers(gemini, &gemini->ctrl, VIRTIO_GEMINI_VQ_CTRL);
}

static void release_work(struct work_struct *work)
{
	struct gemini *gemini = container_of(work, struct gemini, release.work);

	take_answers(gemini, &gemini->release, VIRTIO_GEMINI_VQ_RELEASE);
	gemini_report_kick(gemini);
}

/**
 * gemini_request_answered() - is the answer there?
 * @request: a request that was submitted
 *
 * Return: true if it is, or if it was given up with the device's reset.
 */
bool gemini_request_answered(struct gemini_request *request)
{
	/* Pairs with the end of finish(). */
	return smp_load_acquire(&request->answered);
}

/**
 * gemini_request_wait() - wait for the answer
 * @request: a request that was submitted
 *
 * Return: 0 if it was answered, see @request; -EINTR if a signal came first,
 * and the request goes its way without the caller.
 */
int gemini_request_wait(struct gemini_request *request)
{
	if (wait_event_freezable(request->gemini->waitq,
				 gemini_request_answered(request)))
		return -EINTR;
	return 0;
}

static void start_one(struct gemini_requests *requests)
{
	spin_lock(&requests->lock);
	requests->closed = false;
	spin_unlock(&requests->lock);
	enable_work(&requests->work);
}

/**
 * gemini_requests_start() - take requests
 * @gemini: the device, with queues
 */
void gemini_requests_start(struct gemini *gemini)
{
	start_one(&gemini->ctrl);
	start_one(&gemini->release);
}

static void close_one(struct gemini_requests *requests)
{
	spin_lock(&requests->lock);
	requests->closed = true;
	spin_unlock(&requests->lock);
	disable_work_sync(&requests->work);
}

/**
 * gemini_requests_close() - take no more requests, and no more answers
 * @gemini: the device
 *
 * What the device has stays with it, and busy, until gemini_requests_abort().
 */
void gemini_requests_close(struct gemini *gemini)
{
	close_one(&gemini->ctrl);
	close_one(&gemini->release);
	wake_up_all(&gemini->waitq);
}

static void abort_one(struct gemini_requests *requests)
{
	struct gemini_request *request, *next;
	LIST_HEAD(pending);

	spin_lock(&requests->lock);
	list_splice_init(&requests->pending, &pending);
	spin_unlock(&requests->lock);
	list_for_each_entry_safe(request, next, &pending, node) {
		list_del_init(&request->node);
		/* Done or not: the contents are undefined now. */
		request->error = -ENODEV;
		finish(request);
	}
}

/**
 * gemini_requests_abort() - give up what the device had
 * @gemini: the device, closed and reset: it can drop nothing any more
 */
void gemini_requests_abort(struct gemini *gemini)
{
	abort_one(&gemini->ctrl);
	abort_one(&gemini->release);
}

static void init_one(struct gemini_requests *requests, work_func_t work)
{
	spin_lock_init(&requests->lock);
	INIT_WORK(&requests->work, work);
	disable_work(&requests->work);
	INIT_LIST_HEAD(&requests->pending);
	requests->closed = true;
}

void gemini_requests_init(struct gemini *gemini)
{
	BUILD_BUG_ON(sizeof(struct virtio_gemini_req) != 16);
	BUILD_BUG_ON(sizeof(struct virtio_gemini_range) != 16);
	BUILD_BUG_ON(sizeof(struct virtio_gemini_resp) != 16);
	BUILD_BUG_ON(sizeof(struct virtio_gemini_stats) != 64);

	init_one(&gemini->ctrl, ctrl_work);
	init_one(&gemini->release, release_work);
}

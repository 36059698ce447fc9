// SPDX-License-Identifier: GPL-2.0
/*
 * hintq: host states and advice from the device, into the map.
 *
 * The device is not trusted: what it writes may cost performance, never
 * correctness, and every field is checked before use.
 */
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/virtio_config.h>

#include "gemini.h"
#include "trace.h"

/**
 * gemini_hints_refuse() - count something that the device should not say
 * @gemini: the device
 * @why: what is wrong with it
 */
void gemini_hints_refuse(struct gemini *gemini, const char *why)
{
	WRITE_ONCE(gemini->hints.bad, gemini->hints.bad + 1);
	dev_warn_ratelimited(&gemini->vdev->dev, "refused from the host: %s\n",
			     why);
}

/**
 * gemini_record_valid() - check a host-state record
 * @gemini: the device
 * @record: what the device wrote
 *
 * Blocks beyond all memory are no fault of the record, they are passed over.
 *
 * Return: false if it means nothing.
 */
bool gemini_record_valid(struct gemini *gemini,
			 const struct virtio_gemini_record *record)
{
	u64 first = le64_to_cpu(record->first);
	u32 count = le32_to_cpu(record->count);

	return count && record->state < GEMINI_HOST_STATES &&
	       first + count > first;
}

/* Makes room in the map for memory that only the host knows of yet. */
static void make_room(struct gemini *gemini, u64 first, u32 count)
{
	u64 block;

	for (block = first; block < first + count;
	     block = round_down(block, GEMINI_CHUNK_BLOCKS) +
		     GEMINI_CHUNK_BLOCKS)
		if (gemini_map_grow(&gemini->map, block, false))
			return;
}

static void take_states(struct gemini *gemini, u32 count, u16 flags,
			const struct virtio_gemini_record *record)
{
	u32 i;

	for (i = 0; i < count; i++, record++) {
		u64 first = le64_to_cpu(record->first);
		u32 blocks = le32_to_cpu(record->count);

		if (!gemini_record_valid(gemini, record)) {
			gemini_hints_refuse(gemini, "a record that means nothing");
			continue;
		}
		if (record->state != VIRTIO_GEMINI_HOST_ABSENT)
			make_room(gemini, first, blocks);
		gemini_map_set_host(&gemini->map, first, blocks,
				    record->state);
		cond_resched();
	}
	WRITE_ONCE(gemini->hints.records, gemini->hints.records + count);
}

/* A new generation: both sides learn all anew. */
static void begin(struct gemini *gemini, u64 generation)
{
	lockdep_assert_held(&gemini->sync_lock);

	WRITE_ONCE(gemini->hints.synced, false);
	gemini_map_forget_host(&gemini->map);
	WRITE_ONCE(gemini->generation, generation);
	gemini_map_redirty(&gemini->map, 0, U64_MAX);
	gemini->report.state = GEMINI_REPORT_START;
}

static void take_advice(struct gemini *gemini,
			const struct virtio_gemini_advice *advice)
{
	u32 release_max = le32_to_cpu(advice->release_max);

	WRITE_ONCE(gemini->release_max, release_max ?
		   min_t(u32, release_max, GEMINI_RELEASE_CAP) :
		   GEMINI_RELEASE_DEFAULT);
	WRITE_ONCE(gemini->scarce, le32_to_cpu(advice->flags) &
		   VIRTIO_GEMINI_ADVICE_SCARCE);
	WRITE_ONCE(gemini->bucket_max, le32_to_cpu(advice->bucket_max));
	WRITE_ONCE(gemini->booking_timeout_ms,
		   le32_to_cpu(advice->booking_timeout_ms));
	gemini_heat_kick(gemini);
	gemini_giving_want(gemini, le64_to_cpu(advice->wanted),
			   le32_to_cpu(advice->flags) &
			   VIRTIO_GEMINI_ADVICE_RETURN);
	gemini_move_want(gemini, le32_to_cpu(advice->flags) &
			 VIRTIO_GEMINI_ADVICE_MOVE);
	wake_up_all(&gemini->waitq);
	trace_gemini_advice(gemini, le64_to_cpu(advice->wanted), release_max,
			    le32_to_cpu(advice->flags));
}

static void take(struct gemini *gemini, const void *buffer, size_t length)
{
	const struct virtio_gemini_batch *batch = buffer;
	u64 generation;
	size_t room;
	u16 flags;
	u32 count;

	if (length < sizeof(*batch)) {
		gemini_hints_refuse(gemini, "a batch without a header");
		return;
	}
	room = length - sizeof(*batch);
	generation = le64_to_cpu(batch->generation);
	count = le32_to_cpu(batch->count);
	flags = le16_to_cpu(batch->flags);

	mutex_lock(&gemini->sync_lock);
	switch (le16_to_cpu(batch->type)) {
	case VIRTIO_GEMINI_BATCH_STATE:
		if (count > room / sizeof(struct virtio_gemini_record)) {
			gemini_hints_refuse(gemini, "a batch longer than its buffer");
			break;
		}
		if (!generation) {
			gemini_hints_refuse(gemini, "generation 0");
			break;
		}
		if (flags & VIRTIO_GEMINI_SYNC_START)
			begin(gemini, generation);
		else if (generation != gemini->generation)
			break;
		trace_gemini_hint(gemini, generation, count, flags);
		WRITE_ONCE(gemini->hints.batches, gemini->hints.batches + 1);
		take_states(gemini, count, flags, buffer + sizeof(*batch));
		if (flags & VIRTIO_GEMINI_SYNC_END)
			WRITE_ONCE(gemini->hints.synced, true);
		break;
	case VIRTIO_GEMINI_BATCH_ADVICE:
		if (count != 1 || room < sizeof(struct virtio_gemini_advice)) {
			gemini_hints_refuse(gemini, "a malformed advice");
			break;
		}
		if (generation == gemini->generation)
			take_advice(gemini, buffer + sizeof(*batch));
		break;
	default:
		gemini_hints_refuse(gemini, "a batch of an unknown type");
	}
	mutex_unlock(&gemini->sync_lock);

	if (flags & VIRTIO_GEMINI_SYNC_START)
		gemini_report_kick(gemini);
}

static void hint_work(struct work_struct *work)
{
	struct gemini *gemini = container_of(work, struct gemini, hints.work);
	struct virtqueue *vq = gemini->vq[VIRTIO_GEMINI_VQ_HINT];
	unsigned int length;
	void *buffer;

	while ((buffer = virtqueue_get_buf(vq, &length))) {
		/* The device says how much it wrote, and may lie. */
		take(gemini, buffer, min_t(size_t, length, GEMINI_BATCH_SIZE));
		if (gemini_queue_post(gemini, VIRTIO_GEMINI_VQ_HINT, buffer,
				      GEMINI_BATCH_SIZE, true)) {
			gemini_broken(gemini, "hintq takes no buffers");
			return;
		}
		virtqueue_kick(vq);
		cond_resched();
	}
}

/**
 * gemini_hints_start() - post all buffers
 * @gemini: the device, with queues; they are kicked later, when it runs
 *
 * Return: 0 or a negative error code.
 */
int gemini_hints_start(struct gemini *gemini)
{
	unsigned int i, size;
	int ret;

	enable_work(&gemini->hints.work);
	size = virtqueue_get_vring_size(gemini->vq[VIRTIO_GEMINI_VQ_HINT]);
	for (i = 0; i < min_t(unsigned int, size, GEMINI_HINT_BUFFERS); i++) {
		/* Whatever the device does not write must not be old news. */
		memset(gemini->hints.buffer[i], 0, GEMINI_BATCH_SIZE);
		ret = gemini_queue_post(gemini, VIRTIO_GEMINI_VQ_HINT,
					gemini->hints.buffer[i],
					GEMINI_BATCH_SIZE, true);
		if (ret)
			return ret;
	}
	return 0;
}

/**
 * gemini_hints_stop() - take no more hints
 * @gemini: the device
 */
void gemini_hints_stop(struct gemini *gemini)
{
	disable_work_sync(&gemini->hints.work);
}

int gemini_hints_init(struct gemini *gemini)
{
	unsigned int i;

	INIT_WORK(&gemini->hints.work, hint_work);
	disable_work(&gemini->hints.work);
	for (i = 0; i < GEMINI_HINT_BUFFERS; i++) {
		gemini->hints.buffer[i] = kzalloc(GEMINI_BATCH_SIZE,
						  GFP_KERNEL);
		if (!gemini->hints.buffer[i])
			return -ENOMEM;
	}
	return 0;
}

void gemini_hints_exit(struct gemini *gemini)
{
	unsigned int i;

	for (i = 0; i < GEMINI_HINT_BUFFERS; i++)
		kfree(gemini->hints.buffer[i]);
}

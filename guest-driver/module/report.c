// SPDX-License-Identifier: GPL-2.0
/*
 * reportq: guest states from the map to the device.
 *
 * A generation begins with a full state; afterwards only what changed is sent.
 * The device has a bounded number of buffers, and what changes meanwhile waits
 * in the map: a slow device gets fewer and newer records, never a queue of old
 * ones.
 */
#include <linux/slab.h>

#include "gemini.h"
#include "trace.h"

/* Those that the device is done with. */
static void take_back(struct gemini *gemini)
{
	struct gemini_report *report = &gemini->report;
	unsigned int length;
	void *buffer;

	while ((buffer = virtqueue_get_buf(gemini->vq[VIRTIO_GEMINI_VQ_REPORT],
					   &length)))
		report->idle[report->nr_idle++] = buffer;
}

/* Gives the records of a batch that was not sent back to the map. */
static void untake(struct gemini *gemini, const struct virtio_gemini_batch *batch)
{
	const struct virtio_gemini_record *record = (const void *)(batch + 1);
	u32 i;

	for (i = 0; i < le32_to_cpu(batch->count); i++, record++)
		gemini_map_redirty(&gemini->map, le64_to_cpu(record->first),
				   le32_to_cpu(record->count));
}

/*
 * Fills and posts one batch.
 *
 * Returns 1 if there may be more to send, 0 if not, or a negative error code.
 */
static int send(struct gemini *gemini, struct virtio_gemini_batch *batch)
{
	struct gemini_report *report = &gemini->report;
	unsigned int count;
	u16 flags = 0;
	int ret;

	lockdep_assert_held(&gemini->sync_lock);

	if (report->state == GEMINI_REPORT_SILENT)
		return 0;
	/* A full state of what nobody has looked at yet would be a lie. */
	if (!READ_ONCE(gemini->census.passes))
		return 0;

	count = gemini_map_take_dirty(&gemini->map, (void *)(batch + 1),
				      GEMINI_BATCH_RECORDS);
	if (report->state == GEMINI_REPORT_START)
		flags |= VIRTIO_GEMINI_SYNC_START;
	if (report->state != GEMINI_REPORT_CHANGES &&
	    !gemini_map_dirty(&gemini->map))
		flags |= VIRTIO_GEMINI_SYNC_END;
	if (!count && !flags)
		return 0;

	*batch = (struct virtio_gemini_batch) {
		.generation = cpu_to_le64(gemini->generation),
		.count = cpu_to_le32(count),
		.type = cpu_to_le16(VIRTIO_GEMINI_BATCH_STATE),
		.flags = cpu_to_le16(flags),
	};
	ret = gemini_queue_post(gemini, VIRTIO_GEMINI_VQ_REPORT, batch,
				sizeof(*batch) + count *
				sizeof(struct virtio_gemini_record), false);
	if (ret) {
		untake(gemini, batch);
		return ret;
	}
	trace_gemini_report(gemini, gemini->generation, count, flags);
	WRITE_ONCE(report->batches, report->batches + 1);
	WRITE_ONCE(report->records, report->records + count);
	report->state = flags & VIRTIO_GEMINI_SYNC_END ||
			report->state == GEMINI_REPORT_CHANGES ?
			GEMINI_REPORT_CHANGES : GEMINI_REPORT_FULL;
	return 1;
}

static void report_work(struct work_struct *work)
{
	struct gemini *gemini = container_of(work, struct gemini, report.work);
	struct gemini_report *report = &gemini->report;
	int ret = 1;

	if (READ_ONCE(gemini->broken))
		return;
	take_back(gemini);
	while (report->nr_idle && ret > 0) {
		mutex_lock(&gemini->sync_lock);
		ret = send(gemini, report->idle[report->nr_idle - 1]);
		mutex_unlock(&gemini->sync_lock);
		if (ret > 0) {
			report->nr_idle--;
			virtqueue_kick(gemini->vq[VIRTIO_GEMINI_VQ_REPORT]);
			take_back(gemini);
		}
	}
	if (ret < 0)
		gemini_broken(gemini, "reportq takes no buffers");
}

/**
 * gemini_report_kick() - something may have changed
 * @gemini: the device
 */
void gemini_report_kick(struct gemini *gemini)
{
	if (gemini_map_dirty(&gemini->map) ||
	    READ_ONCE(gemini->report.state) != GEMINI_REPORT_CHANGES)
		queue_work(gemini->wq, &gemini->report.work);
}

/**
 * gemini_report_start() - the device has no buffers, and knows nothing
 * @gemini: the device, with queues
 */
void gemini_report_start(struct gemini *gemini)
{
	struct gemini_report *report = &gemini->report;
	unsigned int size;

	size = virtqueue_get_vring_size(gemini->vq[VIRTIO_GEMINI_VQ_REPORT]);
	report->nr_idle = min_t(unsigned int, size, GEMINI_REPORT_BUFFERS);
	memcpy(report->idle, report->buffer, sizeof(report->idle));
	enable_work(&report->work);
}

/**
 * gemini_report_stop() - send no more
 * @gemini: the device
 */
void gemini_report_stop(struct gemini *gemini)
{
	disable_work_sync(&gemini->report.work);
}

int gemini_report_init(struct gemini *gemini)
{
	unsigned int i;

	INIT_WORK(&gemini->report.work, report_work);
	disable_work(&gemini->report.work);
	for (i = 0; i < GEMINI_REPORT_BUFFERS; i++) {
		gemini->report.buffer[i] = kzalloc(GEMINI_BATCH_SIZE,
						   GFP_KERNEL);
		if (!gemini->report.buffer[i])
			return -ENOMEM;
	}
	return 0;
}

void gemini_report_exit(struct gemini *gemini)
{
	unsigned int i;

	for (i = 0; i < GEMINI_REPORT_BUFFERS; i++)
		kfree(gemini->report.buffer[i]);
}

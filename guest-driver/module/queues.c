// SPDX-License-Identifier: GPL-2.0
/*
 * The rings: making and dropping them, and what every queue does alike.
 */
#include <linux/scatterlist.h>
#include <linux/virtio_config.h>

#include "gemini.h"

static void hint_used(struct virtqueue *vq)
{
	struct gemini *gemini = vq->vdev->priv;

	queue_work(gemini->wq, &gemini->hints.work);
}

static void report_used(struct virtqueue *vq)
{
	struct gemini *gemini = vq->vdev->priv;

	queue_work(gemini->wq, &gemini->report.work);
}

static void ctrl_used(struct virtqueue *vq)
{
	struct gemini *gemini = vq->vdev->priv;

	queue_work(gemini->wq, &gemini->ctrl.work);
}

static void release_used(struct virtqueue *vq)
{
	struct gemini *gemini = vq->vdev->priv;

	queue_work(gemini->wq, &gemini->release.work);
}

/**
 * gemini_queues_make() - set all queues up
 * @gemini: the device, not running
 *
 * Return: 0 or a negative error code.
 */
int gemini_queues_make(struct gemini *gemini)
{
	struct virtqueue_info info[VIRTIO_GEMINI_VQ_COUNT] = {
		[VIRTIO_GEMINI_VQ_HINT] = { "hint", hint_used },
		[VIRTIO_GEMINI_VQ_REPORT] = { "report", report_used },
		[VIRTIO_GEMINI_VQ_CTRL] = { "ctrl", ctrl_used },
		[VIRTIO_GEMINI_VQ_RELEASE] = { "release", release_used },
	};

	return virtio_find_vqs(gemini->vdev, VIRTIO_GEMINI_VQ_COUNT,
			       gemini->vq, info, NULL);
}

/**
 * gemini_queues_drop() - take all queues down
 * @gemini: the device, reset, with nothing left in its queues that is needed
 */
void gemini_queues_drop(struct gemini *gemini)
{
	gemini->vdev->config->del_vqs(gemini->vdev);
	memset(gemini->vq, 0, sizeof(gemini->vq));
}

/**
 * gemini_queue_post() - make a buffer of hintq or reportq available
 * @gemini: the device
 * @queue: VIRTIO_GEMINI_VQ_*
 * @buffer: the buffer, which is also its token
 * @size: its size in bytes
 * @device_writes: its direction
 *
 * The device is not told: the caller kicks when it has posted all.
 *
 * Return: 0 or a negative error code.
 */
int gemini_queue_post(struct gemini *gemini, unsigned int queue, void *buffer,
		      size_t size, bool device_writes)
{
	struct virtqueue *vq = gemini->vq[queue];
	struct scatterlist sg;

	sg_init_one(&sg, buffer, size);
	if (device_writes)
		return virtqueue_add_inbuf(vq, &sg, 1, buffer, GFP_KERNEL);
	return virtqueue_add_outbuf(vq, &sg, 1, buffer, GFP_KERNEL);
}

/**
 * gemini_broken() - a queue does not do what it must
 * @gemini: the device
 * @what: what went wrong
 *
 * Nothing more is sent.  Blocks whose release is not answered stay held: only
 * a reset makes sure that the device does not drop them later.
 */
void gemini_broken(struct gemini *gemini, const char *what)
{
	if (xchg(&gemini->broken, true))
		return;
	dev_err(&gemini->vdev->dev,
		"%s; nothing more is exchanged with the host until the driver is bound again\n",
		what);
}

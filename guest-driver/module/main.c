// SPDX-License-Identifier: GPL-2.0
/*
 * virtio-gemini: guest and host tell each other where their huge pages are, so
 * that they can put them under each other.
 *
 * This file knows the life of a device: it is made, started, stopped (before
 * the system sleeps, or before a reset), started again, and removed.
 */
#include <linux/cc_platform.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/virtio_config.h>

#include "compat.h"
#include "gemini.h"

#define CREATE_TRACE_POINTS
#include "trace.h"

/* A device that asks for a reset gets one, but not one after the other. */
#define RESET_DELAY	HZ

static int read_config(struct gemini *gemini)
{
	struct virtio_device *vdev = gemini->vdev;
	u32 version, block_shift, release_max, bucket_max, timeout;

	BUILD_BUG_ON(sizeof(struct virtio_gemini_config) != 32);
	BUILD_BUG_ON(sizeof(struct virtio_gemini_batch) != 16);
	BUILD_BUG_ON(sizeof(struct virtio_gemini_record) != 24);
	BUILD_BUG_ON(sizeof(struct virtio_gemini_advice) != 24);

	virtio_cread_le(vdev, struct virtio_gemini_config, version, &version);
	virtio_cread_le(vdev, struct virtio_gemini_config, block_shift,
			&block_shift);
	virtio_cread_le(vdev, struct virtio_gemini_config, release_max,
			&release_max);
	virtio_cread_le(vdev, struct virtio_gemini_config, bucket_max,
			&bucket_max);
	virtio_cread_le(vdev, struct virtio_gemini_config, booking_timeout_ms,
			&timeout);

	if (version != VIRTIO_GEMINI_VERSION) {
		dev_err(&vdev->dev,
			"the device speaks version %u, this driver version %u\n",
			version, VIRTIO_GEMINI_VERSION);
		return -EOPNOTSUPP;
	}
	if (block_shift != PMD_SHIFT ||
	    PMD_SHIFT - PAGE_SHIFT > MAX_PAGE_ORDER) {
		dev_err(&vdev->dev,
			"the device's blocks are of 2^%u bytes, this kernel's huge pages of 2^%u\n",
			block_shift, PMD_SHIFT);
		return -EOPNOTSUPP;
	}
	gemini->block_shift = block_shift;
	gemini->block_order = block_shift - PAGE_SHIFT;
	gemini->release_max = release_max ?
		min_t(u32, release_max, GEMINI_RELEASE_CAP) :
		GEMINI_RELEASE_DEFAULT;
	gemini->bucket_max = bucket_max;
	gemini->booking_timeout_ms = timeout;
	return 0;
}

/* The device's reset is complete when this returns. */
static void stop(struct gemini *gemini)
{
	lockdep_assert_held(&gemini->lifecycle);

	if (gemini->stopped)
		return;
	gemini->stopped = true;
	gemini_hold_close(gemini);
	gemini_giving_stop(gemini);
	gemini_trim_stop(gemini);
	gemini_booking_stop(gemini);
	gemini_heat_stop(gemini);
	gemini_kernel_stop(gemini);
	gemini_census_stop(gemini);
	gemini_hints_stop(gemini);
	gemini_report_stop(gemini);
	gemini_requests_close(gemini);

	virtio_reset_device(gemini->vdev);

	/* From here on no block is dropped any more: holds may end. */
	gemini_requests_abort(gemini);
	gemini_queues_drop(gemini);
}

static int start(struct gemini *gemini)
{
	struct virtio_device *vdev = gemini->vdev;
	int ret;

	lockdep_assert_held(&gemini->lifecycle);

	ret = gemini_queues_make(gemini);
	if (ret) {
		dev_err(&vdev->dev, "cannot set the queues up: %d\n", ret);
		return ret;
	}
	mutex_lock(&gemini->sync_lock);
	gemini->generation = 0;
	gemini->hints.synced = false;
	gemini->report.state = GEMINI_REPORT_SILENT;
	gemini->broken = false;
	mutex_unlock(&gemini->sync_lock);

	gemini->stopped = false;
	ret = gemini_hints_start(gemini);
	gemini_report_start(gemini);
	gemini_requests_start(gemini);
	gemini_census_start(gemini);
	if (ret) {
		stop(gemini);
		return ret;
	}
	gemini_hold_open(gemini);
	gemini_booking_start(gemini);
	gemini_heat_start(gemini);
	gemini_kernel_start(gemini);
	gemini_trim_start(gemini);
	gemini_giving_start(gemini);
	virtio_device_ready(vdev);
	virtqueue_kick(gemini->vq[VIRTIO_GEMINI_VQ_HINT]);
	return 0;
}

/*
 * The device says that it cannot go on without a reset, or is away while memory
 * is wanted that it has, or somebody asks.
 */
static void reset_work(struct work_struct *work)
{
	struct gemini *gemini = container_of(to_delayed_work(work),
					     struct gemini, reset_work);
	struct virtio_device *vdev = gemini->vdev;
	int ret = 0;

	mutex_lock(&gemini->lifecycle);
	if (!gemini->stopped) {
		dev_warn(&vdev->dev, "resetting the device\n");
		stop(gemini);
		virtio_add_status(vdev, VIRTIO_CONFIG_S_ACKNOWLEDGE);
		virtio_add_status(vdev, VIRTIO_CONFIG_S_DRIVER);
		ret = vdev->config->finalize_features(vdev);
		if (!ret) {
			virtio_add_status(vdev, VIRTIO_CONFIG_S_FEATURES_OK);
			if (vdev->config->get_status(vdev) &
			    VIRTIO_CONFIG_S_FEATURES_OK)
				ret = start(gemini);
			else
				ret = -ENODEV;
		}
	}
	mutex_unlock(&gemini->lifecycle);
	if (ret)
		dev_err(&vdev->dev, "the device did not come back: %d\n", ret);
}

static void gemini_config_changed(struct virtio_device *vdev)
{
	struct gemini *gemini = vdev->priv;

	if (vdev->config->get_status(vdev) & VIRTIO_CONFIG_S_NEEDS_RESET)
		queue_delayed_work(gemini->wq, &gemini->reset_work,
				   RESET_DELAY);
}

static int gemini_validate(struct virtio_device *vdev)
{
	if (!virtio_has_feature(vdev, VIRTIO_F_VERSION_1)) {
		dev_err(&vdev->dev, "the device is not a virtio 1.0 device\n");
		return -ENODEV;
	}
	/* Private memory comes back only if the guest accepts it anew. */
	if (cc_platform_has(CC_ATTR_MEM_ENCRYPT))
		__virtio_clear_bit(vdev, VIRTIO_GEMINI_F_RELEASE);
	/* It counts in pages of one size, and goes with RELEASE. */
	if (!virtio_has_feature(vdev, VIRTIO_GEMINI_F_RELEASE) ||
	    VIRTIO_GEMINI_PAGE_SHIFT != PAGE_SHIFT)
		__virtio_clear_bit(vdev, VIRTIO_GEMINI_F_TRIM);
	return 0;
}

static void free_device(struct gemini *gemini)
{
	gemini_hints_exit(gemini);
	gemini_report_exit(gemini);
	gemini_heat_free(&gemini->heat);
	gemini_map_destroy(&gemini->map);
	if (gemini->wq)
		destroy_workqueue(gemini->wq);
	kfree(gemini->command_result);
	kfree(gemini);
}

/* What cannot be hooked is not done; the rest of the driver works without. */
static void install_hooks(struct gemini *gemini)
{
	if (gemini_isolation_start(gemini))
		dev_warn(&gemini->vdev->dev,
			 "nothing will be held, because memory could not be unplugged then: %s\n",
			 gemini_isolation_state(gemini));
	else if (gemini_bucket_switch(gemini, true))
		dev_warn(&gemini->vdev->dev,
			 "freed huge pages cannot be noticed: no bucket\n");
}

static int gemini_probe(struct virtio_device *vdev)
{
	struct gemini *gemini;
	int ret;

	gemini = kzalloc(sizeof(*gemini), GFP_KERNEL);
	if (!gemini)
		return -ENOMEM;
	gemini->vdev = vdev;
	gemini->stopped = true;
	mutex_init(&gemini->sync_lock);
	mutex_init(&gemini->lifecycle);
	mutex_init(&gemini->command_lock);
	init_waitqueue_head(&gemini->waitq);
	INIT_DELAYED_WORK(&gemini->reset_work, reset_work);
	gemini_requests_init(gemini);
	gemini_booking_init(gemini);
	gemini_heat_init(gemini);
	gemini_giving_init(gemini);
	gemini_trim_init(gemini);

	ret = gemini_map_init(&gemini->map);
	ret = ret ?: read_config(gemini);
	if (ret)
		goto err_free;
	gemini->map.limit = 1ULL << (MAX_PHYSMEM_BITS - gemini->block_shift);
	gemini->map.order = gemini->block_order;
	gemini->wq = alloc_workqueue("virtio_gemini/%d",
				     WQ_UNBOUND | WQ_FREEZABLE, 0, vdev->index);
	ret = gemini->wq ? 0 : -ENOMEM;
	ret = ret ?: gemini_hints_init(gemini);
	ret = ret ?: gemini_report_init(gemini);
	ret = ret ?: gemini_kernel_init(gemini);
	if (ret)
		goto err_free;
	ret = gemini_census_init(gemini);
	if (ret)
		goto err_free;
	gemini_isolation_init(gemini);
	ret = gemini_hold_init(gemini);
	if (ret)
		goto err_census;
	ret = gemini_bucket_init(gemini);
	if (ret)
		goto err_hold;
	gemini_timeout_start(gemini);
	install_hooks(gemini);

	vdev->priv = gemini;
	mutex_lock(&gemini->lifecycle);
	ret = start(gemini);
	mutex_unlock(&gemini->lifecycle);
	if (ret)
		goto err_bucket;
	gemini_debugfs_add(gemini);
	gemini_placement_init(gemini);
	return 0;

err_bucket:
	gemini_isolation_stop(gemini);
	gemini_timeout_stop(gemini);
	gemini_bucket_exit(gemini);
err_hold:
	gemini_hold_exit(gemini);
err_census:
	gemini_census_exit(gemini);
err_free:
	free_device(gemini);
	return ret;
}

static void gemini_remove(struct virtio_device *vdev)
{
	struct gemini *gemini = vdev->priv;

	disable_delayed_work_sync(&gemini->reset_work);
	mutex_lock(&gemini->lifecycle);
	stop(gemini);
	mutex_unlock(&gemini->lifecycle);
	/*
	 * Before anything else: removing a hook waits until every task has
	 * slept, and one that tries to set held memory offline does not sleep.
	 */
	gemini_hold_free_all(gemini);
	gemini_placement_exit(gemini);
	gemini_debugfs_remove(gemini);
	gemini_timeout_stop(gemini);
	gemini_bucket_exit(gemini);
	gemini_hold_exit(gemini);
	gemini_isolation_stop(gemini);
	gemini_census_exit(gemini);
	free_device(gemini);
}

static int gemini_freeze(struct virtio_device *vdev)
{
	struct gemini *gemini = vdev->priv;

	disable_delayed_work_sync(&gemini->reset_work);
	mutex_lock(&gemini->lifecycle);
	stop(gemini);
	mutex_unlock(&gemini->lifecycle);
	/* An image of the system need not have them. */
	gemini_hold_free_all(gemini);
	return 0;
}

static int gemini_restore(struct virtio_device *vdev)
{
	struct gemini *gemini = vdev->priv;
	int ret;

	mutex_lock(&gemini->lifecycle);
	ret = start(gemini);
	mutex_unlock(&gemini->lifecycle);
	enable_delayed_work(&gemini->reset_work);
	return ret;
}

static const struct virtio_device_id gemini_ids[] = {
	{ VIRTIO_ID_GEMINI, VIRTIO_DEV_ANY_ID },
	{ }
};
MODULE_DEVICE_TABLE(virtio, gemini_ids);

static const unsigned int gemini_features[] = {
	VIRTIO_GEMINI_F_PREPARE,
	VIRTIO_GEMINI_F_RELEASE,
	VIRTIO_GEMINI_F_STATS,
	VIRTIO_GEMINI_F_TRIM,
};

static struct virtio_driver gemini_driver = {
	.driver.name = KBUILD_MODNAME,
	.driver.dev_groups = gemini_groups,
	.feature_table = gemini_features,
	.feature_table_size = ARRAY_SIZE(gemini_features),
	.id_table = gemini_ids,
	.validate = gemini_validate,
	.probe = gemini_probe,
	.remove = gemini_remove,
	.config_changed = gemini_config_changed,
	.freeze = pm_sleep_ptr(gemini_freeze),
	.restore = pm_sleep_ptr(gemini_restore),
};

static int __init gemini_init(void)
{
	int ret;

	gemini_debugfs_init();
	ret = register_virtio_driver(&gemini_driver);
	if (ret)
		gemini_debugfs_exit();
	return ret;
}
module_init(gemini_init);

static void __exit gemini_exit(void)
{
	unregister_virtio_driver(&gemini_driver);
	gemini_debugfs_exit();
}
module_exit(gemini_exit);

MODULE_DESCRIPTION("Aligns the huge pages of guest and host");
MODULE_LICENSE("GPL");

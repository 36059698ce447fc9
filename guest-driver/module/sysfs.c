// SPDX-License-Identifier: GPL-2.0
/*
 * Settings and counters, in the folder "gemini" of the virtio device.
 */
#include <linux/math64.h>
#include <linux/sysfs.h>

#include "gemini.h"

static struct gemini *of_device(struct device *dev)
{
	return dev_to_virtio(dev)->priv;
}

/* One sum over the map. */
#define SUM_ATTR(_name, _field)						\
static ssize_t _name##_show(struct device *dev,				\
			    struct device_attribute *attr, char *buf)	\
{									\
	struct gemini_sums sums;					\
									\
	gemini_map_sum(&of_device(dev)->map, &sums);			\
	return sysfs_emit(buf, "%llu\n", sums._field);			\
}									\
static DEVICE_ATTR_RO(_name)

SUM_ATTR(guest_free, guest[VIRTIO_GEMINI_GUEST_FREE]);
SUM_ATTR(guest_base, guest[VIRTIO_GEMINI_GUEST_BASE]);
SUM_ATTR(guest_huge, guest[VIRTIO_GEMINI_GUEST_HUGE]);
SUM_ATTR(guest_booked, guest[VIRTIO_GEMINI_GUEST_BOOKED]);
SUM_ATTR(guest_pinned, guest[VIRTIO_GEMINI_GUEST_PINNED]);
SUM_ATTR(host_base, host[VIRTIO_GEMINI_HOST_BASE]);
SUM_ATTR(host_huge, host[VIRTIO_GEMINI_HOST_HUGE]);
SUM_ATTR(host_hugetlb, host[VIRTIO_GEMINI_HOST_HUGETLB]);
SUM_ATTR(aligned, aligned);
SUM_ATTR(guest_only, guest_only);
SUM_ATTR(host_only, host_only);
SUM_ATTR(held, held);
SUM_ATTR(busy, busy);

/* One counter; each has a single writer, and is read as it is. */
#define COUNTER_ATTR(_name, _value)					\
static ssize_t _name##_show(struct device *dev,				\
			    struct device_attribute *attr, char *buf)	\
{									\
	struct gemini *gemini = of_device(dev);				\
									\
	return sysfs_emit(buf, "%llu\n", (u64)READ_ONCE(_value));	\
}									\
static DEVICE_ATTR_RO(_name)

COUNTER_ATTR(census_passes, gemini->census.passes);
COUNTER_ATTR(census_blocks, gemini->census.last_blocks);
COUNTER_ATTR(census_ns, gemini->census.total_ns);
COUNTER_ATTR(hint_batches, gemini->hints.batches);
COUNTER_ATTR(hint_records, gemini->hints.records);
COUNTER_ATTR(hints_refused, gemini->hints.bad);
COUNTER_ATTR(report_batches, gemini->report.batches);
COUNTER_ATTR(report_records, gemini->report.records);
COUNTER_ATTR(ctrl_requests, gemini->ctrl.made);
COUNTER_ATTR(ctrl_pending, gemini->ctrl.nr_pending);
COUNTER_ATTR(ctrl_failed, gemini->ctrl.failed);
COUNTER_ATTR(release_requests, gemini->release.made);
COUNTER_ATTR(release_pending, gemini->release.nr_pending);
COUNTER_ATTR(release_failed, gemini->release.failed);
COUNTER_ATTR(release_max, gemini->release_max);
COUNTER_ATTR(broken, gemini->broken);
COUNTER_ATTR(wanted, gemini->wanted);

static ssize_t generation_show(struct device *dev,
			       struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%016llx\n",
			  READ_ONCE(of_device(dev)->generation));
}
static DEVICE_ATTR_RO(generation);

/* Both full states of this generation went over. */
static ssize_t synced_show(struct device *dev, struct device_attribute *attr,
			   char *buf)
{
	struct gemini *gemini = of_device(dev);

	return sysfs_emit(buf, "%d\n", READ_ONCE(gemini->hints.synced) &&
			  READ_ONCE(gemini->report.state) ==
				  GEMINI_REPORT_CHANGES);
}
static DEVICE_ATTR_RO(synced);

/* Cost of the last pass over all of memory. */
static ssize_t census_ns_per_block_show(struct device *dev,
					struct device_attribute *attr,
					char *buf)
{
	struct gemini_census *census = &of_device(dev)->census;
	u64 blocks = READ_ONCE(census->last_blocks);

	return sysfs_emit(buf, "%llu\n", blocks ?
			  div64_u64(READ_ONCE(census->last_ns), blocks) : 0);
}
static DEVICE_ATTR_RO(census_ns_per_block);

static ssize_t census_period_ms_show(struct device *dev,
				     struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%u\n",
			  READ_ONCE(of_device(dev)->census.period_ms));
}

static ssize_t census_period_ms_store(struct device *dev,
				      struct device_attribute *attr,
				      const char *buf, size_t count)
{
	struct gemini *gemini = of_device(dev);
	unsigned int period;
	int ret;

	ret = kstrtouint(buf, 0, &period);
	if (ret)
		return ret;
	if (period < GEMINI_PERIOD_MIN || period > GEMINI_PERIOD_MAX)
		return -EINVAL;
	WRITE_ONCE(gemini->census.period_ms, period);
	gemini_census_kick(gemini);
	return count;
}
static DEVICE_ATTR_RW(census_period_ms);

static struct attribute *gemini_attrs[] = {
	&dev_attr_guest_free.attr,
	&dev_attr_guest_base.attr,
	&dev_attr_guest_huge.attr,
	&dev_attr_guest_booked.attr,
	&dev_attr_guest_pinned.attr,
	&dev_attr_host_base.attr,
	&dev_attr_host_huge.attr,
	&dev_attr_host_hugetlb.attr,
	&dev_attr_aligned.attr,
	&dev_attr_guest_only.attr,
	&dev_attr_host_only.attr,
	&dev_attr_held.attr,
	&dev_attr_busy.attr,
	&dev_attr_generation.attr,
	&dev_attr_synced.attr,
	&dev_attr_broken.attr,
	&dev_attr_wanted.attr,
	&dev_attr_census_period_ms.attr,
	&dev_attr_census_passes.attr,
	&dev_attr_census_blocks.attr,
	&dev_attr_census_ns.attr,
	&dev_attr_census_ns_per_block.attr,
	&dev_attr_hint_batches.attr,
	&dev_attr_hint_records.attr,
	&dev_attr_hints_refused.attr,
	&dev_attr_report_batches.attr,
	&dev_attr_report_records.attr,
	&dev_attr_ctrl_requests.attr,
	&dev_attr_ctrl_pending.attr,
	&dev_attr_ctrl_failed.attr,
	&dev_attr_release_requests.attr,
	&dev_attr_release_pending.attr,
	&dev_attr_release_failed.attr,
	&dev_attr_release_max.attr,
	NULL
};

static const struct attribute_group gemini_group = {
	.name = "gemini",
	.attrs = gemini_attrs,
};

const struct attribute_group *gemini_groups[] = {
	&gemini_group,
	NULL
};

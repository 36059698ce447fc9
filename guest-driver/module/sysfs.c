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

/* One number, as it is at the moment. */
#define NUMBER_ATTR(_name, _value)					\
static ssize_t _name##_show(struct device *dev,				\
			    struct device_attribute *attr, char *buf)	\
{									\
	struct gemini *gemini = of_device(dev);				\
									\
	return sysfs_emit(buf, "%llu\n", (u64)(_value));		\
}									\
static DEVICE_ATTR_RO(_name)

NUMBER_ATTR(census_passes, READ_ONCE(gemini->census.passes));
NUMBER_ATTR(census_blocks, READ_ONCE(gemini->census.last_blocks));
NUMBER_ATTR(census_ns, READ_ONCE(gemini->census.total_ns));
NUMBER_ATTR(hint_batches, READ_ONCE(gemini->hints.batches));
NUMBER_ATTR(hint_records, READ_ONCE(gemini->hints.records));
NUMBER_ATTR(hints_refused, READ_ONCE(gemini->hints.bad));
NUMBER_ATTR(report_batches, READ_ONCE(gemini->report.batches));
NUMBER_ATTR(report_records, READ_ONCE(gemini->report.records));
NUMBER_ATTR(ctrl_requests, READ_ONCE(gemini->ctrl.made));
NUMBER_ATTR(ctrl_pending, READ_ONCE(gemini->ctrl.nr_pending));
NUMBER_ATTR(ctrl_failed, READ_ONCE(gemini->ctrl.failed));
NUMBER_ATTR(release_requests, READ_ONCE(gemini->release.made));
NUMBER_ATTR(release_pending, READ_ONCE(gemini->release.nr_pending));
NUMBER_ATTR(release_failed, READ_ONCE(gemini->release.failed));
NUMBER_ATTR(release_max, READ_ONCE(gemini->release_max));
NUMBER_ATTR(broken, READ_ONCE(gemini->broken));
NUMBER_ATTR(wanted, READ_ONCE(gemini->wanted));

NUMBER_ATTR(owed, gemini_giving_owed(gemini));
NUMBER_ATTR(returning, READ_ONCE(gemini->returning));
NUMBER_ATTR(given_back, READ_ONCE(gemini->giving.released));
NUMBER_ATTR(spent, max(atomic64_read(&gemini->giving.spent), 0LL));
NUMBER_ATTR(trimmed_pages, atomic64_read(&gemini->trim.pages));

NUMBER_ATTR(ready, gemini_hold_ready(gemini, NUMA_NO_NODE));
NUMBER_ATTR(scarce, READ_ONCE(gemini->scarce));
NUMBER_ATTR(heat_passes, READ_ONCE(gemini->heat.passes));
NUMBER_ATTR(stock_target, READ_ONCE(gemini->booking.target));
NUMBER_ATTR(booked_plain, READ_ONCE(gemini->booking.plain));
NUMBER_ATTR(booked_exact, READ_ONCE(gemini->booking.exact));
NUMBER_ATTR(evacuated_blocks, READ_ONCE(gemini->booking.evacuated));
NUMBER_ATTR(evacuated_pages, READ_ONCE(gemini->booking.evacuated_pages));
NUMBER_ATTR(evacuation_failures, READ_ONCE(gemini->booking.failures));
NUMBER_ATTR(prepared, READ_ONCE(gemini->booking.prepared));
NUMBER_ATTR(renewed, READ_ONCE(gemini->booking.renewed));
NUMBER_ATTR(expired, READ_ONCE(gemini->booking.expired));
NUMBER_ATTR(returned_pressure, atomic64_read(&gemini->returned_pressure));

NUMBER_ATTR(placed, atomic64_read(&gemini->placement.placed));
NUMBER_ATTR(placement_misses, atomic64_read(&gemini->placement.misses));
NUMBER_ATTR(placement_declined, atomic64_read(&gemini->placement.declined));

/* Words for people. */
#define TEXT_ATTR(_name, _value)					\
static ssize_t _name##_show(struct device *dev,				\
			    struct device_attribute *attr, char *buf)	\
{									\
	struct gemini *gemini = of_device(dev);				\
									\
	return sysfs_emit(buf, "%s\n", _value);				\
}									\
static DEVICE_ATTR_RO(_name)

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

/* A number of the device, and who is to know of its change. */
struct setting {
	struct device_attribute attr;
	size_t offset;
	unsigned int min;
	unsigned int max;
	void (*changed)(struct gemini *gemini);
};

static unsigned int *setting_of(struct device *dev, const struct setting *setting)
{
	return (void *)of_device(dev) + setting->offset;
}

static ssize_t setting_show(struct device *dev, struct device_attribute *attr,
			    char *buf)
{
	struct setting *setting = container_of(attr, struct setting, attr);

	return sysfs_emit(buf, "%u\n", READ_ONCE(*setting_of(dev, setting)));
}

static ssize_t setting_store(struct device *dev, struct device_attribute *attr,
			     const char *buf, size_t count)
{
	struct setting *setting = container_of(attr, struct setting, attr);
	unsigned int value;
	int ret;

	ret = kstrtouint(buf, 0, &value);
	if (ret)
		return ret;
	if (value < setting->min || value > setting->max)
		return -EINVAL;
	WRITE_ONCE(*setting_of(dev, setting), value);
	setting->changed(of_device(dev));
	return count;
}

#define SETTING(_name, _field, _min, _max, _changed)			\
static struct setting setting_##_name = {				\
	.attr = __ATTR(_name, 0644, setting_show, setting_store),	\
	.offset = offsetof(struct gemini, _field),			\
	.min = (_min),							\
	.max = (_max),							\
	.changed = (_changed),						\
}

SETTING(booking, booking.enabled, 0, 1, gemini_booking_kick);
SETTING(stock_floor, booking.stock_floor, 0, INT_MAX, gemini_booking_kick);
SETTING(stock_active, booking.stock_active, 0, INT_MAX, gemini_booking_kick);
SETTING(stock_cap, booking.stock_cap, 0, INT_MAX, gemini_booking_kick);
SETTING(evacuation_rate, booking.evacuation_rate, 0, GEMINI_EVACUATION_MAX,
	gemini_booking_kick);
SETTING(census_period_ms, census.period_ms, GEMINI_PERIOD_MIN,
	GEMINI_PERIOD_MAX, gemini_census_kick);

static ssize_t placement_show(struct device *dev,
			      struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%d\n",
			  READ_ONCE(of_device(dev)->placement.wanted));
}

static ssize_t placement_store(struct device *dev,
			       struct device_attribute *attr, const char *buf,
			       size_t count)
{
	bool wanted;
	int ret;

	ret = kstrtobool(buf, &wanted);
	if (ret)
		return ret;
	gemini_placement_want(of_device(dev), wanted);
	return count;
}
static DEVICE_ATTR_RW(placement);

static ssize_t placement_state_show(struct device *dev,
				    struct device_attribute *attr, char *buf)
{
	char state[GEMINI_PLACEMENT_STATE];

	gemini_placement_state(of_device(dev), state);
	return sysfs_emit(buf, "%s\n", state);
}
static DEVICE_ATTR_RO(placement_state);

NUMBER_ATTR(moved, atomic64_read(&gemini->move.moved));
NUMBER_ATTR(move_failures, atomic64_read(&gemini->move.failures));

TEXT_ATTR(moving, gemini_move_state(gemini));

NUMBER_ATTR(rebooked, atomic64_read(&gemini->bucket.rebooked));
NUMBER_ATTR(bucket_freed, atomic64_read(&gemini->bucket.freed));
NUMBER_ATTR(returned_isolation, atomic64_read(&gemini->isolation.returned));

static ssize_t bucket_show(struct device *dev, struct device_attribute *attr,
			   char *buf)
{
	return sysfs_emit(buf, "%d\n",
			  !!READ_ONCE(of_device(dev)->bucket.hooked));
}

static ssize_t bucket_store(struct device *dev, struct device_attribute *attr,
			    const char *buf, size_t count)
{
	bool on;
	int ret;

	ret = kstrtobool(buf, &on);
	return ret ?: gemini_bucket_switch(of_device(dev), on) ?: count;
}
static DEVICE_ATTR_RW(bucket);

static ssize_t bucket_hooks_show(struct device *dev,
				 struct device_attribute *attr, char *buf)
{
	return gemini_bucket_hooks(of_device(dev), buf);
}
static DEVICE_ATTR_RO(bucket_hooks);

NUMBER_ATTR(bucket_max, gemini_bucket_limit(gemini));

TEXT_ATTR(isolation, gemini_isolation_state(gemini));

static ssize_t booking_timeout_ms_show(struct device *dev,
				       struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%u\n",
			  READ_ONCE(of_device(dev)->timeout.fixed_ms));
}

static ssize_t booking_timeout_ms_store(struct device *dev,
					struct device_attribute *attr,
					const char *buf, size_t count)
{
	unsigned int ms;
	int ret;

	ret = kstrtouint(buf, 0, &ms);
	return ret ?: gemini_timeout_fix(of_device(dev), ms) ?: count;
}
static DEVICE_ATTR_RW(booking_timeout_ms);

NUMBER_ATTR(timeout_ms, gemini_timeout_ms(gemini));
NUMBER_ATTR(hold_ms, gemini_timeout_hold_ms(gemini));

TEXT_ATTR(timeout_source, gemini_timeout_source(gemini));

NUMBER_ATTR(fmfi, gemini_fmfi(gemini, NUMA_NO_NODE));

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
	&dev_attr_ready.attr,
	&dev_attr_scarce.attr,
	&dev_attr_heat_passes.attr,
	&setting_booking.attr.attr,
	&setting_stock_floor.attr.attr,
	&setting_stock_active.attr.attr,
	&setting_stock_cap.attr.attr,
	&dev_attr_stock_target.attr,
	&setting_evacuation_rate.attr.attr,
	&dev_attr_booked_plain.attr,
	&dev_attr_booked_exact.attr,
	&dev_attr_evacuated_blocks.attr,
	&dev_attr_evacuated_pages.attr,
	&dev_attr_evacuation_failures.attr,
	&dev_attr_prepared.attr,
	&dev_attr_renewed.attr,
	&dev_attr_expired.attr,
	&dev_attr_returned_pressure.attr,
	&dev_attr_generation.attr,
	&dev_attr_synced.attr,
	&dev_attr_broken.attr,
	&dev_attr_wanted.attr,
	&dev_attr_owed.attr,
	&dev_attr_returning.attr,
	&dev_attr_given_back.attr,
	&dev_attr_spent.attr,
	&dev_attr_trimmed_pages.attr,
	&setting_census_period_ms.attr.attr,
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
	&dev_attr_placement.attr,
	&dev_attr_placement_state.attr,
	&dev_attr_placed.attr,
	&dev_attr_placement_misses.attr,
	&dev_attr_placement_declined.attr,
	&dev_attr_moving.attr,
	&dev_attr_moved.attr,
	&dev_attr_move_failures.attr,
	&dev_attr_bucket.attr,
	&dev_attr_bucket_hooks.attr,
	&dev_attr_bucket_max.attr,
	&dev_attr_bucket_freed.attr,
	&dev_attr_rebooked.attr,
	&dev_attr_isolation.attr,
	&dev_attr_returned_isolation.attr,
	&dev_attr_booking_timeout_ms.attr,
	&dev_attr_timeout_ms.attr,
	&dev_attr_hold_ms.attr,
	&dev_attr_timeout_source.attr,
	&dev_attr_fmfi.attr,
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

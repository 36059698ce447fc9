/* SPDX-License-Identifier: GPL-2.0 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM virtio_gemini

#if !defined(_GEMINI_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define _GEMINI_TRACE_H

#include <linux/tracepoint.h>
#include <linux/virtio.h>

#include "gemini.h"

DECLARE_EVENT_CLASS(gemini_batch,
	TP_PROTO(struct gemini *gemini, u64 generation, u32 records, u16 flags),
	TP_ARGS(gemini, generation, records, flags),
	TP_STRUCT__entry(
		__field(int, device)
		__field(u64, generation)
		__field(u32, records)
		__field(u16, flags)
	),
	TP_fast_assign(
		__entry->device = gemini->vdev->index;
		__entry->generation = generation;
		__entry->records = records;
		__entry->flags = flags;
	),
	TP_printk("virtio%d generation=%llx records=%u%s%s", __entry->device,
		  __entry->generation, __entry->records,
		  __entry->flags & VIRTIO_GEMINI_SYNC_START ? " start" : "",
		  __entry->flags & VIRTIO_GEMINI_SYNC_END ? " end" : "")
);

/* A batch of host states was taken from the device. */
DEFINE_EVENT(gemini_batch, gemini_hint,
	TP_PROTO(struct gemini *gemini, u64 generation, u32 records, u16 flags),
	TP_ARGS(gemini, generation, records, flags));

/* A batch of guest states was sent to the device. */
DEFINE_EVENT(gemini_batch, gemini_report,
	TP_PROTO(struct gemini *gemini, u64 generation, u32 records, u16 flags),
	TP_ARGS(gemini, generation, records, flags));

/* The host told what it would like. */
TRACE_EVENT(gemini_advice,
	TP_PROTO(struct gemini *gemini, u64 wanted, u32 release_max, u32 flags),
	TP_ARGS(gemini, wanted, release_max, flags),
	TP_STRUCT__entry(
		__field(int, device)
		__field(u64, wanted)
		__field(u32, release_max)
		__field(u32, flags)
	),
	TP_fast_assign(
		__entry->device = gemini->vdev->index;
		__entry->wanted = wanted;
		__entry->release_max = release_max;
		__entry->flags = flags;
	),
	TP_printk("virtio%d wanted=%llu release_max=%u%s%s", __entry->device,
		  __entry->wanted, __entry->release_max,
		  __entry->flags & VIRTIO_GEMINI_ADVICE_SCARCE ? " scarce" : "",
		  __entry->flags & VIRTIO_GEMINI_ADVICE_MOVE ? " move" : "")
);

#define gemini_show_request(type)					\
	__print_symbolic(type,						\
			 { VIRTIO_GEMINI_REQ_PREPARE, "prepare" },	\
			 { VIRTIO_GEMINI_REQ_QUERY, "query" },		\
			 { VIRTIO_GEMINI_REQ_STATS, "stats" },		\
			 { VIRTIO_GEMINI_REQ_RELEASE, "release" },	\
			 { VIRTIO_GEMINI_REQ_RENEW, "renew" },		\
			 { VIRTIO_GEMINI_REQ_TRIM, "trim" })

/* A request was made available to the device. */
TRACE_EVENT(gemini_request,
	TP_PROTO(struct gemini_request *request),
	TP_ARGS(request),
	TP_STRUCT__entry(
		__field(int, device)
		__field(u16, type)
		__field(u64, first)
		__field(u64, blocks)
	),
	TP_fast_assign(
		__entry->device = request->gemini->vdev->index;
		__entry->type = request->type;
		__entry->first = request->nr_ranges ?
			le64_to_cpu(gemini_request_ranges(request)->first) : 0;
		__entry->blocks = request->blocks;
	),
	TP_printk("virtio%d %s first=%llu blocks=%llu", __entry->device,
		  gemini_show_request(__entry->type), __entry->first,
		  __entry->blocks)
);

/* A request was answered, or given up with the device's reset. */
TRACE_EVENT(gemini_answer,
	TP_PROTO(struct gemini_request *request),
	TP_ARGS(request),
	TP_STRUCT__entry(
		__field(int, device)
		__field(u16, type)
		__field(u64, first)
		__field(u64, blocks)
		__field(int, error)
	),
	TP_fast_assign(
		__entry->device = request->gemini->vdev->index;
		__entry->type = request->type;
		__entry->first = request->nr_ranges ?
			le64_to_cpu(gemini_request_ranges(request)->first) : 0;
		__entry->blocks = request->blocks;
		__entry->error = request->error;
	),
	TP_printk("virtio%d %s first=%llu blocks=%llu error=%d",
		  __entry->device, gemini_show_request(__entry->type),
		  __entry->first, __entry->blocks, __entry->error)
);

/* A census pass over all of memory ended. */
TRACE_EVENT(gemini_census,
	TP_PROTO(struct gemini *gemini, u64 blocks, u64 changed, u64 ns),
	TP_ARGS(gemini, blocks, changed, ns),
	TP_STRUCT__entry(
		__field(int, device)
		__field(u64, blocks)
		__field(u64, changed)
		__field(u64, ns)
	),
	TP_fast_assign(
		__entry->device = gemini->vdev->index;
		__entry->blocks = blocks;
		__entry->changed = changed;
		__entry->ns = ns;
	),
	TP_printk("virtio%d blocks=%llu changed=%llu ns=%llu", __entry->device,
		  __entry->blocks, __entry->changed, __entry->ns)
);

/* A block with base pages in use was to be emptied and held. */
TRACE_EVENT(gemini_evacuate,
	TP_PROTO(struct gemini *gemini, u64 block, u16 used, int error),
	TP_ARGS(gemini, block, used, error),
	TP_STRUCT__entry(
		__field(int, device)
		__field(u64, block)
		__field(u16, used)
		__field(int, error)
	),
	TP_fast_assign(
		__entry->device = gemini->vdev->index;
		__entry->block = block;
		__entry->used = used;
		__entry->error = error;
	),
	TP_printk("virtio%d block=%llu used=%u error=%d", __entry->device,
		  __entry->block, __entry->used, __entry->error)
);

/* A huge page was to be moved onto a ready block. */
TRACE_EVENT(gemini_move,
	TP_PROTO(struct gemini *gemini, u64 block, u64 to, int error),
	TP_ARGS(gemini, block, to, error),
	TP_STRUCT__entry(
		__field(int, device)
		__field(u64, block)
		__field(u64, to)
		__field(int, error)
	),
	TP_fast_assign(
		__entry->device = gemini->vdev->index;
		__entry->block = block;
		__entry->to = to;
		__entry->error = error;
	),
	TP_printk("virtio%d block=%llu to=%llu error=%d", __entry->device,
		  __entry->block, __entry->to, __entry->error)
);

/* A run of free pages in a block that is in use was to be held. */
TRACE_EVENT(gemini_trim,
	TP_PROTO(struct gemini *gemini, u64 block, u64 pfn, u32 pages,
		 int error),
	TP_ARGS(gemini, block, pfn, pages, error),
	TP_STRUCT__entry(
		__field(int, device)
		__field(u64, block)
		__field(u64, pfn)
		__field(u32, pages)
		__field(int, error)
	),
	TP_fast_assign(
		__entry->device = gemini->vdev->index;
		__entry->block = block;
		__entry->pfn = pfn;
		__entry->pages = pages;
		__entry->error = error;
	),
	TP_printk("virtio%d block=%llu pfn=%#llx pages=%u error=%d",
		  __entry->device, __entry->block, __entry->pfn,
		  __entry->pages, __entry->error)
);

/* Blocks that nobody came for were given back. */
TRACE_EVENT(gemini_expire,
	TP_PROTO(struct gemini *gemini, int nid, u64 blocks),
	TP_ARGS(gemini, nid, blocks),
	TP_STRUCT__entry(
		__field(int, device)
		__field(int, nid)
		__field(u64, blocks)
	),
	TP_fast_assign(
		__entry->device = gemini->vdev->index;
		__entry->nid = nid;
		__entry->blocks = blocks;
	),
	TP_printk("virtio%d nid=%d blocks=%llu", __entry->device, __entry->nid,
		  __entry->blocks)
);

/* A huge page of a process came from a ready block. */
TRACE_EVENT(gemini_placed,
	TP_PROTO(struct gemini *gemini, u64 block, int nid, bool zero),
	TP_ARGS(gemini, block, nid, zero),
	TP_STRUCT__entry(
		__field(int, device)
		__field(u64, block)
		__field(int, nid)
		__field(bool, zero)
	),
	TP_fast_assign(
		__entry->device = gemini->vdev->index;
		__entry->block = block;
		__entry->nid = nid;
		__entry->zero = zero;
	),
	TP_printk("virtio%d block=%llu nid=%d%s", __entry->device,
		  __entry->block, __entry->nid, __entry->zero ? " zero" : "")
);

/* A huge page of a process could have, had a block been ready. */
TRACE_EVENT(gemini_placement_miss,
	TP_PROTO(struct gemini *gemini, int nid),
	TP_ARGS(gemini, nid),
	TP_STRUCT__entry(
		__field(int, device)
		__field(int, nid)
	),
	TP_fast_assign(
		__entry->device = gemini->vdev->index;
		__entry->nid = nid;
	),
	TP_printk("virtio%d nid=%d", __entry->device, __entry->nid)
);

/* A CPU looked for the aligned blocks that it freed. */
TRACE_EVENT(gemini_rebook,
	TP_PROTO(struct gemini *gemini, unsigned int parked, unsigned int kept,
		 unsigned int spare, unsigned int missing, u64 ns),
	TP_ARGS(gemini, parked, kept, spare, missing, ns),
	TP_STRUCT__entry(
		__field(int, device)
		__field(unsigned int, parked)
		__field(unsigned int, kept)
		__field(unsigned int, spare)
		__field(unsigned int, missing)
		__field(u64, ns)
	),
	TP_fast_assign(
		__entry->device = gemini->vdev->index;
		__entry->parked = parked;
		__entry->kept = kept;
		__entry->spare = spare;
		__entry->missing = missing;
		__entry->ns = ns;
	),
	TP_printk("virtio%d parked=%u kept=%u spare=%u missing=%u ns=%llu",
		  __entry->device, __entry->parked, __entry->kept,
		  __entry->spare, __entry->missing, __entry->ns)
);

/* Somebody isolates blocks; those that were held made way. */
TRACE_EVENT(gemini_isolate,
	TP_PROTO(struct gemini *gemini, u64 first, u64 blocks, u64 returned),
	TP_ARGS(gemini, first, blocks, returned),
	TP_STRUCT__entry(
		__field(int, device)
		__field(u64, first)
		__field(u64, blocks)
		__field(u64, returned)
	),
	TP_fast_assign(
		__entry->device = gemini->vdev->index;
		__entry->first = first;
		__entry->blocks = blocks;
		__entry->returned = returned;
	),
	TP_printk("virtio%d first=%llu blocks=%llu returned=%llu",
		  __entry->device, __entry->first, __entry->blocks,
		  __entry->returned)
);

/* A period of the adaptive booking timeout ended. */
TRACE_EVENT(gemini_timeout,
	TP_PROTO(struct gemini *gemini, u64 misses, unsigned int fmfi,
		 unsigned int before, unsigned int after),
	TP_ARGS(gemini, misses, fmfi, before, after),
	TP_STRUCT__entry(
		__field(int, device)
		__field(u64, misses)
		__field(unsigned int, fmfi)
		__field(unsigned int, before)
		__field(unsigned int, after)
	),
	TP_fast_assign(
		__entry->device = gemini->vdev->index;
		__entry->misses = misses;
		__entry->fmfi = fmfi;
		__entry->before = before;
		__entry->after = after;
	),
	TP_printk("virtio%d misses=%llu fmfi=%u ms=%u next=%u",
		  __entry->device, __entry->misses, __entry->fmfi,
		  __entry->before, __entry->after)
);

#endif /* _GEMINI_TRACE_H */

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>

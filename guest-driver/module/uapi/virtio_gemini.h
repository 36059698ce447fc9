/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * virtio-gemini: guest and host tell each other where their huge pages are.
 *
 * This header is the code form of docs/device-specification.md, which is the
 * normative text.  It is the single source of the wire format: the Rust side
 * (backend/src/protocol.rs) is checked against it by a test.
 *
 * Every field is little-endian.  A "block" is one huge-page-sized,
 * huge-page-aligned range of guest physical addresses; its number is its
 * address >> block_shift.
 */
#ifndef _UAPI_LINUX_VIRTIO_GEMINI_H
#define _UAPI_LINUX_VIRTIO_GEMINI_H

#include <linux/types.h>

/* Experimental device id: the highest one that Linux's PCI transport accepts. */
#define VIRTIO_ID_GEMINI		63

#define VIRTIO_GEMINI_VERSION		1

/* Feature bits */
#define VIRTIO_GEMINI_F_PREPARE		0	/* PREPARE on ctrlq */
#define VIRTIO_GEMINI_F_RELEASE		1	/* RELEASE and RENEW on releaseq */
#define VIRTIO_GEMINI_F_STATS		2	/* STATS on ctrlq */
#define VIRTIO_GEMINI_F_REACQUIRE	3	/* a released block is usable only
						 * after a successful PREPARE
						 */
#define VIRTIO_GEMINI_F_TRIM		4	/* TRIM on releaseq */

/* Virtqueues; all of them are always present and used in ring order. */
#define VIRTIO_GEMINI_VQ_HINT		0	/* device -> driver: host states */
#define VIRTIO_GEMINI_VQ_REPORT		1	/* driver -> device: guest states */
#define VIRTIO_GEMINI_VQ_CTRL		2	/* requests that keep contents */
#define VIRTIO_GEMINI_VQ_RELEASE	3	/* requests that drop contents */
#define VIRTIO_GEMINI_VQ_COUNT		4

/* Limits that both sides check */
#define VIRTIO_GEMINI_MAX_RECORDS	4096	/* records in one batch */
#define VIRTIO_GEMINI_MAX_RANGES	256	/* ranges in one request */

#define VIRTIO_GEMINI_PAGE_SHIFT	12	/* log2 of a base page's size */

struct virtio_gemini_config {
	__le32 version;			/* VIRTIO_GEMINI_VERSION */
	__le32 block_shift;		/* log2 of the block size in bytes */
	__le32 booking_timeout_ms;	/* requested; 0: the driver's choice */
	__le32 bucket_max;		/* blocks; 0: the driver's choice */
	__le64 generation;		/* for people; drivers use the batches' */
	__le32 release_max;		/* most unanswered blocks on releaseq */
	__le32 status;			/* VIRTIO_GEMINI_AWAY */
};

/*
 * Nothing takes what the driver makes available: the process that serves the
 * device is not there.
 */
#define VIRTIO_GEMINI_AWAY		(1 << 0)

/*
 * A batch is the content of one hintq or reportq buffer: this header, then
 * @count elements of the type that @type names.
 */
struct virtio_gemini_batch {
	__le64 generation;
	__le32 count;
	__le16 type;			/* VIRTIO_GEMINI_BATCH_* */
	__le16 flags;			/* VIRTIO_GEMINI_SYNC_* */
};

#define VIRTIO_GEMINI_BATCH_STATE	0	/* struct virtio_gemini_record */
#define VIRTIO_GEMINI_BATCH_ADVICE	1	/* struct virtio_gemini_advice,
						 * hintq only, count is 1
						 */

/*
 * A full state is sent as a run of STATE batches: the first has SYNC_START,
 * the last SYNC_END (one batch may have both).  The receiver of SYNC_START
 * forgets all states that it knew.
 */
#define VIRTIO_GEMINI_SYNC_START	(1 << 0)
#define VIRTIO_GEMINI_SYNC_END		(1 << 1)

/* The state of @count blocks from @first on, at one layer. */
struct virtio_gemini_record {
	__le64 first;
	__le32 count;			/* never 0 */
	__le32 used;			/* GUEST_BASE: base pages in use,
					 * HOST_BASE: base pages resident, in
					 * each of the blocks; 0: not counted;
					 * GUEST_PINNED: not 0 if the kernel
					 * works with it all the time
					 */
	__u8 state;
	__u8 flags;			/* 0 */
	__u8 reserved[6];
};

/* Guest states (reportq) */
#define VIRTIO_GEMINI_GUEST_UNKNOWN	0	/* not reported, or not RAM */
#define VIRTIO_GEMINI_GUEST_FREE	1	/* no page in use */
#define VIRTIO_GEMINI_GUEST_BASE	2	/* base pages in use */
#define VIRTIO_GEMINI_GUEST_HUGE	3	/* one guest huge page */
#define VIRTIO_GEMINI_GUEST_BOOKED	4	/* held by the driver */
#define VIRTIO_GEMINI_GUEST_PINNED	5	/* unmovable, reserved, offline */

/* Host states (hintq, and the answers of PREPARE and QUERY) */
#define VIRTIO_GEMINI_HOST_ABSENT	0	/* no memory behind it */
#define VIRTIO_GEMINI_HOST_BASE		1
#define VIRTIO_GEMINI_HOST_HUGE		2
#define VIRTIO_GEMINI_HOST_HUGETLB	3

/* What the host would like; takes the place of the configuration fields. */
struct virtio_gemini_advice {
	__le32 booking_timeout_ms;
	__le32 bucket_max;
	__le32 release_max;
	__le32 flags;			/* VIRTIO_GEMINI_ADVICE_* */
	__le64 wanted;			/* blocks that the host would like to
					 * have released from now on; 0: none
					 */
};

#define VIRTIO_GEMINI_ADVICE_SCARCE	(1 << 0)	/* no huge pages to give */
#define VIRTIO_GEMINI_ADVICE_RETURN	(1 << 1)	/* release what is unused */
#define VIRTIO_GEMINI_ADVICE_MOVE	(1 << 2)	/* move huge pages to where
							 * the host has some
							 */

/* One request of ctrlq or releaseq: this header, then @count ranges. */
struct virtio_gemini_req {
	__le16 type;
	__le16 reserved;
	__le32 count;
	__le64 generation;
};

/* Blocks, by their numbers; of TRIM: base pages, by address >> PAGE_SHIFT. */
struct virtio_gemini_range {
	__le64 first;
	__le32 count;			/* never 0 */
	__le32 reserved;
};

/* ctrlq */
#define VIRTIO_GEMINI_REQ_PREPARE	1	/* make host-huge, keep contents */
#define VIRTIO_GEMINI_REQ_QUERY		2	/* tell the host states */
#define VIRTIO_GEMINI_REQ_STATS		3	/* struct virtio_gemini_stats */
/* releaseq */
#define VIRTIO_GEMINI_REQ_RELEASE	16	/* drop */
#define VIRTIO_GEMINI_REQ_RENEW		17	/* drop, then make host-huge */
#define VIRTIO_GEMINI_REQ_TRIM		18	/* drop base pages */

/*
 * The answer: this header, then @count elements: host-state records for
 * PREPARE and QUERY (fewer where the buffer is too small), one struct
 * virtio_gemini_stats for STATS, nothing for those of releaseq.
 */
struct virtio_gemini_resp {
	__le32 status;
	__le32 count;
	__le64 generation;		/* of the device, when it answered */
};

/*
 * On releaseq: after OK the blocks (or pages) read as zeros; after FAILED some
 * were dropped and some not; any other status: this request dropped nothing.
 */
#define VIRTIO_GEMINI_S_OK		0
#define VIRTIO_GEMINI_S_FAILED		1	/* PREPARE: see the records */
#define VIRTIO_GEMINI_S_VOID		2	/* made in an older generation */
#define VIRTIO_GEMINI_S_INVALID		3	/* malformed or out of range */
#define VIRTIO_GEMINI_S_UNSUPPORTED	4	/* unknown, or not negotiated */
#define VIRTIO_GEMINI_S_BUSY		5	/* not now; ask again later.
						 * RENEW: too few huge pages
						 */

struct virtio_gemini_stats {
	__le64 blocks;			/* blocks that the device manages */
	__le64 aligned;
	__le64 guest_only;
	__le64 host_only;
	__le64 collapse_bytes;		/* copied by the host, ever */
	__le64 populated;		/* blocks made host-huge without copy */
	__le64 released;		/* blocks dropped */
	__le64 bad_records;		/* records and requests refused */
};

#endif /* _UAPI_LINUX_VIRTIO_GEMINI_H */

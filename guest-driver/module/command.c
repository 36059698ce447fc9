// SPDX-License-Identifier: GPL-2.0
/*
 * What tests and people can ask of a device by hand.  README.md lists the
 * commands.
 */
#include <linux/mm.h>
#include <linux/sched/signal.h>
#include <linux/seq_buf.h>
#include <linux/string.h>

#include "gemini.h"

struct words {
	char *word[6];
	unsigned int count;
};

/* The number that is word @i, or @otherwise if there is no such word. */
static int number(const struct words *words, unsigned int i, u64 otherwise,
		  u64 *value)
{
	if (i < words->count)
		return kstrtou64(words->word[i], 0, value);
	*value = otherwise;
	return 0;
}

/* The words FIRST [COUNT]. */
static int blocks(struct gemini *gemini, const struct words *words, u64 *first,
		  u64 *count)
{
	int ret;

	if (words->count < 2 || words->count > 3)
		return -EINVAL;
	ret = number(words, 1, 0, first);
	ret = ret ?: number(words, 2, 1, count);
	if (ret)
		return ret;
	if (!*count || *count > U32_MAX || *first >= gemini->map.limit ||
	    *count > gemini->map.limit - *first)
		return -ERANGE;
	return 0;
}

static bool last_is(const struct words *words, const char *what)
{
	return !strcmp(words->word[words->count - 1], what);
}

static int interrupted(void)
{
	cond_resched();
	return fatal_signal_pending(current) ? -EINTR : 0;
}

static int book(struct gemini *gemini, struct words *words,
		struct seq_buf *result)
{
	bool any = words->count > 1 && !strcmp(words->word[1], "any");
	u64 first = 0, block, count, i;
	int ret;

	if (any)
		ret = number(words, 2, 1, &count);
	else
		ret = blocks(gemini, words, &first, &count);
	for (i = 0; !ret && i < count; i++) {
		block = first + i;
		ret = any ? gemini_hold_any(gemini, NUMA_NO_NODE, &block) :
			    gemini_hold_exact(gemini, block);
		if (!ret)
			seq_buf_printf(result, "%llu\n", block);
		ret = ret ?: interrupted();
	}
	gemini_report_kick(gemini);
	return ret;
}

static int unbook(struct gemini *gemini, struct words *words,
		  struct seq_buf *result)
{
	u64 first, count, i;
	int ret;

	if (words->count == 2 && last_is(words, "all")) {
		gemini_hold_free_all(gemini);
		gemini_report_kick(gemini);
		return 0;
	}
	ret = blocks(gemini, words, &first, &count);
	for (i = 0; !ret && i < count; i++)
		ret = gemini_hold_free(gemini, first + i);
	gemini_report_kick(gemini);
	return ret;
}

/* Does something to each block of a run, and shows what it tells. */
static int each_block(struct gemini *gemini, struct words *words,
		      struct seq_buf *result,
		      int (*act)(struct gemini *gemini, u64 block, u64 *told))
{
	u64 first, count, told, i;
	int ret;

	ret = blocks(gemini, words, &first, &count);
	for (i = 0; !ret && i < count; i++) {
		ret = act(gemini, first + i, &told);
		if (!ret)
			seq_buf_printf(result, "%llu %llu\n", first + i, told);
		ret = ret ?: interrupted();
	}
	return ret;
}

static int move(struct gemini *gemini, struct words *words,
		struct seq_buf *result)
{
	int ret = each_block(gemini, words, result, gemini_move_block);

	gemini_report_kick(gemini);
	return ret;
}

static void show_records(struct gemini_request *request, struct seq_buf *result)
{
	struct virtio_gemini_record *record = gemini_request_elements(request);
	u32 i;

	for (i = 0; i < request->nr_elements; i++, record++)
		seq_buf_printf(result, "%llu %u host=%u used=%u\n",
			       le64_to_cpu(record->first),
			       le32_to_cpu(record->count), record->state,
			       le32_to_cpu(record->used));
}

/* One request, and if @wait its answer; @request is put. */
static int ask(struct gemini_request *request, bool wait,
	       struct seq_buf *result)
{
	int ret = gemini_request_submit(request);

	if (!ret && wait) {
		ret = gemini_request_wait(request);
		if (!ret) {
			ret = request->error;
			seq_buf_printf(result, "status %u\n", request->status);
			if (request->type != VIRTIO_GEMINI_REQ_STATS)
				show_records(request, result);
		}
	}
	return ret;
}

static int keeping(struct gemini *gemini, struct words *words, u16 type,
		   struct seq_buf *result)
{
	bool wait = !last_is(words, "nowait");
	struct gemini_request *request;
	struct gemini_range range;
	u64 first, count;
	int ret;

	if (!wait)
		words->count--;
	ret = blocks(gemini, words, &first, &count);
	if (ret)
		return ret;
	range = (struct gemini_range) { first, count };
	request = gemini_request_new(gemini, type, &range, 1);
	if (IS_ERR(request))
		return PTR_ERR(request);
	ret = ask(request, wait, result);
	gemini_request_put(request);
	return ret;
}

/* In pieces that the bound on unanswered blocks allows. */
static int dropping(struct gemini *gemini, struct words *words, u16 type,
		    struct seq_buf *result)
{
	bool wait = !last_is(words, "nowait");
	u64 first, count;
	int ret;

	if (!wait)
		words->count--;
	ret = blocks(gemini, words, &first, &count);
	while (!ret && count) {
		struct gemini_request *request;
		struct gemini_range range = {
			first, min_t(u64, count, READ_ONCE(gemini->release_max))
		};

		request = gemini_request_new(gemini, type, &range, 1);
		if (IS_ERR(request))
			return PTR_ERR(request);
		ret = wait ? gemini_release_room_wait(gemini, range.count) : 0;
		ret = ret ?: ask(request, wait, result);
		gemini_request_put(request);
		first += range.count;
		count -= range.count;
	}
	return ret;
}

static int trim(struct gemini *gemini, struct words *words,
		struct seq_buf *result)
{
	return each_block(gemini, words, result, gemini_trim_block);
}

static int stats(struct gemini *gemini, struct seq_buf *result)
{
	struct virtio_gemini_stats *stats;
	struct gemini_request *request;
	int ret;

	request = gemini_request_new(gemini, VIRTIO_GEMINI_REQ_STATS, NULL, 0);
	if (IS_ERR(request))
		return PTR_ERR(request);
	ret = ask(request, true, result);
	if (!ret && request->nr_elements != 1)
		ret = -EPROTO;
	if (!ret) {
		stats = gemini_request_elements(request);
		seq_buf_printf(result,
			       "blocks %llu\naligned %llu\nguest_only %llu\nhost_only %llu\ncollapse_bytes %llu\npopulated %llu\nreleased %llu\nbad_records %llu\n",
			       le64_to_cpu(stats->blocks),
			       le64_to_cpu(stats->aligned),
			       le64_to_cpu(stats->guest_only),
			       le64_to_cpu(stats->host_only),
			       le64_to_cpu(stats->collapse_bytes),
			       le64_to_cpu(stats->populated),
			       le64_to_cpu(stats->released),
			       le64_to_cpu(stats->bad_records));
	}
	gemini_request_put(request);
	return ret;
}

/* Word @i of a block filled from @seed: like no other word of any block. */
static u64 pattern(u64 seed, u64 block, u64 i)
{
	u64 x = seed ^ (block << 32) ^ i;

	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
	return x ^ (x >> 31);
}

/*
 * Writes a pattern into held blocks, or compares it with what is there; the
 * word "zero" instead of a seed compares with zeros.
 */
static int contents(struct gemini *gemini, struct words *words, bool write,
		    struct seq_buf *result)
{
	const u64 per_page = PAGE_SIZE / sizeof(u64);
	const u64 per_block = per_page << gemini->block_order;
	bool zero = !write && words->count > 2 &&
		    !strcmp(words->word[2], "zero");
	u64 first, count, seed = 0, block, i;
	u64 *word, wanted;
	int ret;

	/* The words FIRST SEED [COUNT]. */
	if (words->count < 3 || words->count > 4)
		return -EINVAL;
	ret = number(words, 1, 0, &first);
	if (!ret && !zero)
		ret = number(words, 2, 0, &seed);
	ret = ret ?: number(words, 3, 1, &count);
	for (block = first; !ret && block < first + count; block++) {
		ret = gemini_map_busy(&gemini->map, block, 1);
		if (ret)
			break;
		word = pfn_to_kaddr(gemini_block_pfn(gemini, block));
		for (i = 0; i < per_block && !ret; i++) {
			wanted = zero ? 0 : pattern(seed, block, i);
			if (write)
				WRITE_ONCE(word[i], wanted);
			else if (READ_ONCE(word[i]) != wanted)
				ret = -EBADMSG;
			if (i % per_page == per_page - 1)
				cond_resched();
		}
		if (ret)
			seq_buf_printf(result, "block %llu differs at byte %llu\n",
				       block, (i - 1) * sizeof(u64));
		gemini_hold_idle(gemini, block, 1, zero && !ret);
		ret = ret ?: interrupted();
	}
	return ret;
}

/**
 * gemini_command() - do what a line says
 * @gemini: the device
 * @line: the command and its arguments; it is changed
 * @result: what there is to tell
 *
 * Return: 0 or a negative error code.
 */
int gemini_command(struct gemini *gemini, char *line, struct seq_buf *result)
{
	struct words words = { .count = 0 };
	char *word;
	int ret;

	while ((word = strsep(&line, " \t\n"))) {
		if (!*word)
			continue;
		if (words.count == ARRAY_SIZE(words.word))
			return -EINVAL;
		words.word[words.count++] = word;
	}
	if (!words.count)
		return -EINVAL;

	word = words.word[0];
	if (!strcmp(word, "book"))
		return book(gemini, &words, result);
	if (!strcmp(word, "free"))
		return unbook(gemini, &words, result);
	if (!strcmp(word, "move"))
		return move(gemini, &words, result);
	if (!strcmp(word, "prepare"))
		return keeping(gemini, &words, VIRTIO_GEMINI_REQ_PREPARE,
			       result);
	if (!strcmp(word, "query"))
		return keeping(gemini, &words, VIRTIO_GEMINI_REQ_QUERY, result);
	if (!strcmp(word, "release"))
		return dropping(gemini, &words, VIRTIO_GEMINI_REQ_RELEASE,
				result);
	if (!strcmp(word, "renew"))
		return dropping(gemini, &words, VIRTIO_GEMINI_REQ_RENEW,
				result);
	if (!strcmp(word, "trim"))
		return trim(gemini, &words, result);
	if (!strcmp(word, "fill"))
		return contents(gemini, &words, true, result);
	if (!strcmp(word, "check"))
		return contents(gemini, &words, false, result);

	/* The others take nothing. */
	if (words.count > 1)
		return -EINVAL;
	if (!strcmp(word, "stats"))
		return stats(gemini, result);
	if (!strcmp(word, "census")) {
		ret = gemini_census_wait(gemini);
		if (!ret)
			flush_work(&gemini->report.work);
		return ret;
	}
	if (!strcmp(word, "forgive")) {
		gemini_map_forgive(&gemini->map);
		return 0;
	}
	if (!strcmp(word, "reset")) {
		mod_delayed_work(gemini->wq, &gemini->reset_work, 0);
		flush_delayed_work(&gemini->reset_work);
		return READ_ONCE(gemini->stopped) ? -ENODEV : 0;
	}
	return -EINVAL;
}

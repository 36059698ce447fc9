// SPDX-License-Identifier: GPL-2.0
/*
 * /sys/kernel/debug/virtio_gemini/DEVICE/, for root alone:
 *   blocks   the map, one line for each run of blocks that are alike
 *   command  takes a command, and tells what became of the last one
 */
#include <linux/debugfs.h>
#include <linux/module.h>
#include <linux/seq_buf.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "gemini.h"

#define COMMAND_SIZE	128
#define RESULT_SIZE	SZ_64K

static struct dentry *root;

static const char * const guest_names[] = {
	[VIRTIO_GEMINI_GUEST_UNKNOWN] = "unknown",
	[VIRTIO_GEMINI_GUEST_FREE] = "free",
	[VIRTIO_GEMINI_GUEST_BASE] = "base",
	[VIRTIO_GEMINI_GUEST_HUGE] = "huge",
	[VIRTIO_GEMINI_GUEST_BOOKED] = "booked",
	[VIRTIO_GEMINI_GUEST_PINNED] = "pinned",
};

static const char * const host_names[] = {
	[VIRTIO_GEMINI_HOST_ABSENT] = "absent",
	[VIRTIO_GEMINI_HOST_BASE] = "base",
	[VIRTIO_GEMINI_HOST_HUGE] = "huge",
	[VIRTIO_GEMINI_HOST_HUGETLB] = "hugetlb",
};

/* The position is the first block of the run plus one; 0 is the heading. */
static void *blocks_start(struct seq_file *m, loff_t *pos)
{
	struct gemini *gemini = m->private;
	struct gemini_run *run;

	if (!*pos)
		return SEQ_START_TOKEN;
	run = kmalloc(sizeof(*run), GFP_KERNEL);
	if (!run)
		return ERR_PTR(-ENOMEM);
	if (!gemini_map_next_run(&gemini->map, *pos - 1, run)) {
		kfree(run);
		return NULL;
	}
	*pos = run->first + 1;
	return run;
}

static void *blocks_next(struct seq_file *m, void *v, loff_t *pos)
{
	struct gemini_run *run = v;

	if (v == SEQ_START_TOKEN) {
		*pos = 1;
	} else {
		*pos = run->first + run->count + 1;
		kfree(run);
	}
	return blocks_start(m, pos);
}

static void blocks_stop(struct seq_file *m, void *v)
{
	if (v != SEQ_START_TOKEN && !IS_ERR(v))
		kfree(v);
}

static int blocks_show(struct seq_file *m, void *v)
{
	struct gemini_run *run = v;
	const struct gemini_block *block = &run->block;
	bool held, ready;

	if (v == SEQ_START_TOKEN) {
		seq_puts(m, "# first count guest used host flags\n");
		return 0;
	}
	held = block->flags & GEMINI_BLOCK_HELD;
	ready = held && gemini_host_huge(block->host);
	seq_printf(m, "%llu %llu %s %u %s %s%s%s%s%s%s\n", run->first, run->count,
		   guest_names[block->guest], block->used,
		   host_names[block->host], held ? "held" : "-",
		   ready ? ",ready" : "",
		   block->flags & GEMINI_BLOCK_BUSY ? ",busy" : "",
		   block->flags & GEMINI_BLOCK_ZERO ? ",zero" : "",
		   block->flags & GEMINI_BLOCK_PASSED ? ",passed" : "",
		   block->flags & GEMINI_BLOCK_SPENT ? ",spent" : "");
	return 0;
}

static const struct seq_operations blocks_sops = {
	.start = blocks_start,
	.next = blocks_next,
	.stop = blocks_stop,
	.show = blocks_show,
};
DEFINE_SEQ_ATTRIBUTE(blocks);

/* The result of the last command, for readers that gave none themselves. */
static void remember(struct gemini *gemini, const char *result)
{
	char *copy = kstrdup(result, GFP_KERNEL);

	mutex_lock(&gemini->command_lock);
	swap(gemini->command_result, copy);
	mutex_unlock(&gemini->command_lock);
	kfree(copy);
}

struct command_file {
	struct gemini *gemini;
	struct mutex lock;	/* protects result */
	char *result;
};

static int command_open(struct inode *inode, struct file *file)
{
	struct command_file *command = kzalloc(sizeof(*command), GFP_KERNEL);

	if (!command)
		return -ENOMEM;
	command->gemini = inode->i_private;
	mutex_init(&command->lock);
	file->private_data = command;
	return 0;
}

/* The device may be gone by now. */
static int command_release(struct inode *inode, struct file *file)
{
	struct command_file *command = file->private_data;

	kfree(command->result);
	kfree(command);
	return 0;
}

static ssize_t command_write(struct file *file, const char __user *from,
			     size_t count, loff_t *pos)
{
	struct command_file *command = file->private_data;
	char line[COMMAND_SIZE];
	struct seq_buf result;
	char *buffer;
	int ret;

	if (count >= sizeof(line))
		return -EINVAL;
	if (copy_from_user(line, from, count))
		return -EFAULT;
	line[count] = '\0';

	buffer = kvmalloc(RESULT_SIZE, GFP_KERNEL);
	if (!buffer)
		return -ENOMEM;
	seq_buf_init(&result, buffer, RESULT_SIZE);
	ret = gemini_command(command->gemini, line, &result);
	if (ret < 0)
		seq_buf_printf(&result, "failed: %pe\n", ERR_PTR(ret));
	else
		seq_buf_puts(&result, "ok\n");
	seq_buf_str(&result);
	remember(command->gemini, buffer);

	mutex_lock(&command->lock);
	kfree(command->result);
	command->result = kstrdup(buffer, GFP_KERNEL);
	mutex_unlock(&command->lock);
	kvfree(buffer);
	*pos = 0;
	return ret < 0 ? ret : count;
}

static ssize_t command_read(struct file *file, char __user *to, size_t count,
			    loff_t *pos)
{
	struct command_file *command = file->private_data;
	struct gemini *gemini = command->gemini;
	ssize_t ret = 0;

	mutex_lock(&command->lock);
	if (!command->result) {
		mutex_lock(&gemini->command_lock);
		if (gemini->command_result)
			command->result = kstrdup(gemini->command_result,
						  GFP_KERNEL);
		mutex_unlock(&gemini->command_lock);
	}
	if (command->result)
		ret = simple_read_from_buffer(to, count, pos, command->result,
					      strlen(command->result));
	mutex_unlock(&command->lock);
	return ret;
}

static const struct file_operations command_fops = {
	.owner = THIS_MODULE,
	.open = command_open,
	.release = command_release,
	.write = command_write,
	.read = command_read,
	.llseek = default_llseek,
};

void gemini_debugfs_add(struct gemini *gemini)
{
	gemini->debugfs = debugfs_create_dir(dev_name(&gemini->vdev->dev),
					     root);
	debugfs_create_file("blocks", 0400, gemini->debugfs, gemini,
			    &blocks_fops);
	debugfs_create_file("command", 0600, gemini->debugfs, gemini,
			    &command_fops);
}

/**
 * gemini_debugfs_remove() - wait for commands to end, take no more
 * @gemini: the device, stopped, so that no command waits for an answer
 */
void gemini_debugfs_remove(struct gemini *gemini)
{
	debugfs_remove(gemini->debugfs);
}

void gemini_debugfs_init(void)
{
	root = debugfs_create_dir(KBUILD_MODNAME, NULL);
}

void gemini_debugfs_exit(void)
{
	debugfs_remove(root);
}

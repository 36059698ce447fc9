//! What would make aligning pointless, or less than it could be, each in one line with its
//! remedy.

use super::pool::PoolState;
use serde::Serialize;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Good to know.
    Info,
    /// Works, with a drawback.
    Warning,
    /// Nothing will be aligned.
    Error,
}

/// Something about a guest's memory that its operator should know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// A stable word for programs.
    pub code: &'static str,
    /// One line for people, with the remedy.
    pub message: String,
}

fn finding(severity: Severity, code: &'static str, message: String) -> Finding {
    Finding { severity, code, message }
}

pub(super) fn not_shared(pid: i32) -> Finding {
    finding(
        Severity::Error,
        "memory-not-shared",
        format!(
            "the VMM (process {pid}) maps its memory privately: what the guest writes never \
             reaches the memory file; give the memory backend share=on"
        ),
    )
}

pub(super) fn unaligned(pid: i32, addr: u64, block_shift: u32) -> Finding {
    finding(
        Severity::Error,
        "vmm-mapping-unaligned",
        format!(
            "the VMM (process {pid}) maps the memory file at {addr:#x}, which is {:#x} past a \
             huge page boundary, so it cannot use any huge page of it; with QEMU use a \
             memory-backend-memfd that is aligned (patched QEMU), or \
             memory-backend-ram,share=on, or \
             memory-backend-file,mem-path=/dev/shm/...,share=on,align=2M, or hugetlb=on",
            addr & ((1u64 << block_shift) - 1)
        ),
    )
}

pub(super) fn not_congruent(guest_addr: u64, file_offset: u64) -> Finding {
    finding(
        Severity::Warning,
        "region-not-congruent",
        format!(
            "the region at guest address {guest_addr:#x} begins at offset {file_offset:#x} of its \
             file: huge pages of guest and file cannot coincide there, and it is left alone; \
             choose a memory size that is a multiple of the huge page size"
        ),
    )
}

pub(super) fn thp_denied() -> Finding {
    finding(
        Severity::Error,
        "shmem-thp-denied",
        "the kernel refuses huge pages for shared memory, even on request \
         (/sys/kernel/mm/transparent_hugepage/shmem_enabled is deny); write never, advise or \
         always to it"
            .into(),
    )
}

pub(super) fn thp_unavailable(why: &std::io::Error) -> Finding {
    finding(
        Severity::Error,
        "thp-unavailable",
        format!(
            "the kernel has no transparent huge pages for shared memory ({why}); use one built \
             with CONFIG_TRANSPARENT_HUGEPAGE, or a hugetlb memory backend"
        ),
    )
}

pub(super) fn block_size(block: u64, host: u64) -> Finding {
    finding(
        Severity::Error,
        "block-size",
        format!(
            "blocks have {block} bytes, the huge pages of this host {host}: nothing can be \
             collapsed; use the host's size"
        ),
    )
}

pub(super) fn vmm_not_found(denied: usize, blind: bool) -> Finding {
    let why = if blind {
        "/proc cannot be read, or belongs to another PID namespace; mount this namespace's own, \
         and run in the VMM's PID namespace or an ancestor of it"
            .to_owned()
    } else {
        format!(
            "no process seen in /proc maps it, and {denied} could not be looked into; run as the \
             VMM's user and group with CAP_SYS_NICE (and CAP_SYS_PTRACE where the VMM is not \
             dumpable or of another user), in its user and PID namespace or an ancestor, with \
             /proc mounted without hidepid, and outside a Landlock domain"
        )
    };
    finding(
        Severity::Warning,
        "vmm-not-found",
        format!(
            "the process that maps the guest's memory was not found: huge pages are made through \
             the daemon's own mapping, their memory is charged to the daemon's cgroup instead of \
             the VMM's, and whether the VMM can use them is not known ({why})"
        ),
    )
}

pub(super) fn not_nice(pid: i32) -> Finding {
    finding(
        Severity::Warning,
        "collapse-not-permitted",
        format!(
            "collapsing at the VMM (process {pid}) is not permitted: huge pages are made through \
             the daemon's own mapping, and their memory is charged to the daemon's cgroup instead \
             of the VMM's; give the daemon CAP_SYS_NICE"
        ),
    )
}

pub(super) fn not_traceable(pid: i32) -> Finding {
    finding(
        Severity::Warning,
        "collapse-not-permitted",
        format!(
            "collapsing at the VMM (process {pid}) is not permitted: huge pages are made through \
             the daemon's own mapping, and their memory is charged to the daemon's cgroup instead \
             of the VMM's; run the daemon as the VMM's user and group with CAP_SYS_NICE, or give it \
             CAP_SYS_PTRACE as well where the VMM is not dumpable or of another user; not in a \
             Landlock domain or a user namespace of its own"
        ),
    )
}

pub(super) fn collapse_unavailable(pid: i32) -> Finding {
    finding(
        Severity::Warning,
        "collapse-unavailable",
        format!(
            "process_madvise on the VMM (process {pid}) does not work here: huge pages are made \
             through the daemon's own mapping, and their memory is charged to the daemon's cgroup \
             instead of the VMM's; use Linux 6.12 or later and a seccomp filter that lets \
             process_madvise pass"
        ),
    )
}

pub(super) fn not_visible(pid: i32) -> Finding {
    finding(
        Severity::Warning,
        "vmm-page-tables-hidden",
        format!(
            "the page tables of the VMM (process {pid}) cannot be read: the host state shown is \
             that of the memory file alone; run as the VMM's user and group, or give the daemon \
             CAP_DAC_READ_SEARCH and CAP_SYS_PTRACE"
        ),
    )
}

pub(super) fn self_not_visible() -> Finding {
    finding(
        Severity::Warning,
        "own-page-tables-hidden",
        "/proc/self/pagemap cannot be opened: a huge page that the VMM has not touched yet is taken \
         for base pages; give the daemon its capabilities by its service manager (ambient ones, \
         AmbientCapabilities= in systemd) and not by setcap, which makes it undumpable"
            .into(),
    )
}

pub(super) fn scan_unavailable(why: &std::io::Error) -> Finding {
    finding(
        Severity::Error,
        "page-table-scan-unavailable",
        format!(
            "the kernel does not tell which pages are huge (PAGEMAP_SCAN: {why}): everything is \
             taken for base pages; use Linux 6.12 or later, and a seccomp filter that lets this \
             ioctl pass"
        ),
    )
}

pub(super) fn declined(pid: i32, how: &str) -> Finding {
    finding(
        Severity::Error,
        "vmm-declines-huge-pages",
        format!(
            "the VMM (process {pid}) asked the kernel for no huge pages ({how}), and is left \
             alone; start it without that"
        ),
    )
}

pub(super) fn refused(pid: i32) -> Finding {
    finding(
        Severity::Warning,
        "collapse-refused",
        format!(
            "the kernel refuses to collapse memory of the VMM (process {pid}): it may have asked \
             for no huge pages (MADV_NOHUGEPAGE, postcopy migration does that), or shmem_enabled \
             became deny; blocks are tried again, more and more rarely"
        ),
    )
}

pub(super) fn ambiguous(pid: i32, others: &[i32]) -> Finding {
    finding(
        Severity::Info,
        "vmm-ambiguous",
        format!(
            "processes {others:?} map the guest's memory as well; {pid} is taken for the VMM \
             because it maps most of it or runs a KVM guest"
        ),
    )
}

pub(super) fn too_small(room: u64, holes: u64) -> Finding {
    finding(
        Severity::Warning,
        "file-system-too-small",
        format!(
            "the filesystem of the memory file has {room} bytes left, less than the {holes} bytes \
             of it that are still holes: blocks that are not wholly resident are not made huge, \
             or the guest would die of SIGBUS; give that mount a larger size="
        ),
    )
}

pub(super) fn hugetlb(page_size: u64) -> Finding {
    finding(
        Severity::Info,
        "hugetlb",
        format!(
            "the guest's memory is hugetlb with pages of {page_size} bytes: it is huge as soon as \
             it is there, blocks are prepared from the pool of such pages, and none of it is taken \
             back"
        ),
    )
}

pub(super) fn pool_short(state: &PoolState) -> Finding {
    finding(Severity::Warning, "hugetlb-pool-short", state.shortage())
}

pub(super) fn policy_hidden() -> Finding {
    finding(
        Severity::Warning,
        "memory-policy-hidden",
        "on which memory nodes the VMM wants its hugetlb memory cannot be told, so none is \
         allocated for it and blocks are not prepared; run the daemon as the VMM's user and group \
         (or with CAP_SYS_PTRACE) in its PID namespace, so that it can read the VMM's numa_maps"
            .into(),
    )
}

pub(super) fn not_shmem(magic: u64) -> Finding {
    finding(
        Severity::Error,
        "not-memory-file",
        format!(
            "the guest's memory is a file on a filesystem (type {magic:#x}) that has no huge pages \
             to give; use a memfd, or a file on a tmpfs"
        ),
    )
}

pub(super) fn not_a_file(guest_addr: u64) -> Finding {
    finding(
        Severity::Warning,
        "region-not-a-file",
        format!(
            "the region at guest address {guest_addr:#x} is no regular file (a device?), and is \
             left alone"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_are_one_line_each() {
        let error = std::io::Error::other("why");
        let all = [
            not_shared(1),
            unaligned(1, 0x1f_f000, 21),
            not_congruent(0, 1),
            thp_denied(),
            thp_unavailable(&error),
            block_size(1, 2),
            vmm_not_found(3, false),
            vmm_not_found(0, true),
            not_nice(1),
            not_traceable(1),
            collapse_unavailable(1),
            not_visible(1),
            self_not_visible(),
            scan_unavailable(&error),
            declined(1, "how"),
            refused(1),
            ambiguous(1, &[2, 3]),
            too_small(1, 2),
            hugetlb(1),
            pool_short(&PoolState::default()),
            policy_hidden(),
            not_shmem(1),
            not_a_file(1),
        ];
        for finding in all {
            assert!(!finding.message.contains(['\n', '\t']), "{finding:?}");
            assert!(!finding.message.contains("  "), "{finding:?}");
            assert!(
                finding.message.contains(';')
                    || finding.severity == Severity::Info
                    || finding.message.contains("left alone"),
                "{finding:?}"
            );
        }
    }
}

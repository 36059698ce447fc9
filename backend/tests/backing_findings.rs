//! Memory that cannot be, or need not be, made huge: it is said, and nothing is broken.

#![allow(clippy::unwrap_used)] // a test that cannot go on must fail

mod common;

use common::host::{Lock, Setting, Tmpfs};
use common::*;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use vhost_device_gemini::backing::{Collapsed, HostState, Kind, Memory, Refusal, RegionDesc};

#[test]
fn helper_process() {
    child::serve();
}

fn message(memory: &Memory, code: &str) -> String {
    memory.findings().into_iter().find(|finding| finding.code == code).unwrap().message
}

#[test]
fn unaligned_mapping_is_found_and_left_alone() {
    if !host::is_root("unaligned_mapping_is_found_and_left_alone") {
        return;
    }
    let lock = Lock::take();
    let _setting = Setting::shmem_enabled(&lock, "never");
    let file = memfd(4 * BLOCK, 0);
    let mut vmm = Child::spawn(&file);
    // As QEMU 10 maps a memory-backend-memfd.
    vmm.ask(&format!("map 0 {} {} shared", 4 * BLOCK, 0x1f_f000));
    vmm.fill(1, 0, 512);
    let memory = memory(&file);
    assert_eq!(codes(&memory), ["vmm-mapping-unaligned"]);
    assert!(message(&memory, "vmm-mapping-unaligned").contains("0x1ff000 past"));
    assert_eq!(collapse(&memory, 1, 1), [Err(Refusal::Unsupported)]);
    assert_eq!(populate(&memory, 0), Err(Refusal::Unsupported));
    assert_eq!(vmm.resident(0), 0);
    // Even a huge page in the file is none for this VMM.
    let mut other = Child::vmm(&file);
    other.ask(&format!("advise {BLOCK} {BLOCK} collapse"));
    assert_eq!(state(&memory, 1), HostState::Base);
    // Dropping works all the same.
    memory.discard(1, 1).unwrap();
    assert!(vmm.is_zero(1, 0, 512));
}

#[test]
fn private_mapping_is_found_and_nothing_is_dropped() {
    let file = memfd(4 * BLOCK, 0);
    let mut vmm = Child::spawn(&file);
    vmm.ask(&format!("map 0 {} 0 private", 4 * BLOCK));
    vmm.fill(1, 0, 512);
    let memory = memory(&file);
    assert_eq!(codes(&memory), ["memory-not-shared"]);
    assert_eq!(memory.kinds(), [Kind::Unshared]);
    assert!(!memory.may_discard());
    assert!(memory.discard(1, 1).is_err());
    assert!(populate(&memory, 1).is_err());
    assert!(vmm.is_filled(1, 0, 512));
}

#[test]
fn denied_shmem_huge_pages_are_found() {
    if !host::is_root("denied_shmem_huge_pages_are_found") {
        return;
    }
    let lock = Lock::take();
    let _setting = Setting::shmem_enabled(&lock, "deny");
    let file = memfd(4 * BLOCK, 0);
    let mut vmm = Child::vmm(&file);
    vmm.fill(1, 0, 512);
    let memory = memory(&file);
    assert_eq!(codes(&memory), ["shmem-thp-denied"]);
    assert_eq!(collapse(&memory, 1, 1), [Err(Refusal::Unsupported)]);
    assert_eq!(state(&memory, 1), HostState::Base);
    assert!(vmm.is_filled(1, 0, 512));
}

#[test]
fn vmm_that_declined_huge_pages_is_left_alone() {
    if !host::is_root("vmm_that_declined_huge_pages_is_left_alone") {
        return;
    }
    let lock = Lock::take();
    let _setting = Setting::shmem_enabled(&lock, "never");
    let file = memfd(4 * BLOCK, 0);
    let mut vmm = Child::vmm(&file);
    vmm.fill(1, 0, 512);
    vmm.ask(&format!("advise 0 {} nohuge", 4 * BLOCK));
    let declined = memory(&file);
    assert_eq!(codes(&declined), [""; 0], "the kernel tells only when it refuses");
    assert_eq!(collapse(&declined, 1, 1), [Err(Refusal::Unsupported)]);
    assert_eq!(state(&declined, 1), HostState::Base);
    assert_eq!(codes(&declined), ["collapse-refused"]);
    vmm.ask(&format!("advise 0 {} huge", 4 * BLOCK));
    assert_eq!(collapse(&declined, 1, 1), [Ok(Collapsed::Copied { bytes: BLOCK })]);
    assert_eq!(codes(&declined), [""; 0], "that is over");
    vmm.ask("decline");
    assert_eq!(codes(&memory(&file)), ["vmm-declines-huge-pages"]);
}

#[test]
fn file_system_too_small_refuses_what_would_kill_the_guest() {
    if !host::is_root("file_system_too_small_refuses_what_would_kill_the_guest") {
        return;
    }
    let lock = Lock::take();
    let _setting = Setting::shmem_enabled(&lock, "never");
    let tmpfs = Tmpfs::mount(12 * BLOCK);
    let file = tmpfs.file(16 * BLOCK);
    let mut vmm = Child::vmm(&file);
    vmm.fill(0, 0, 512);
    vmm.fill(1, 9, 1);
    let memory = memory(&file);
    assert_eq!(codes(&memory), ["file-system-too-small"]);
    assert_eq!(collapse(&memory, 1, 1), [Err(Refusal::Space)]);
    assert_eq!(populate(&memory, 2), Err(Refusal::Space));
    assert_eq!((vmm.resident(1), vmm.resident(2)), (1, 0));
    // A block that is wholly resident needs no more room.
    assert_eq!(collapse(&memory, 0, 1), [Ok(Collapsed::Copied { bytes: BLOCK })]);
    assert!(vmm.is_filled(0, 0, 512) && vmm.is_filled(1, 9, 1));
    // And one that is large enough is used.
    let large = Tmpfs::mount(12 * BLOCK);
    let file = large.file(8 * BLOCK);
    let mut vmm = Child::vmm(&file);
    vmm.fill(1, 9, 1);
    let memory = common::memory(&file);
    assert_eq!(codes(&memory), [""; 0]);
    assert_eq!(collapse(&memory, 1, 1), [Ok(Collapsed::Copied { bytes: PAGE })]);
    assert_eq!(populate(&memory, 2), Ok(Collapsed::Populated));
}

#[test]
fn file_on_a_disk_is_found_and_left_alone() {
    let directory = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"));
    let file = tempfile::tempfile_in(directory).unwrap();
    file.set_len(4 * BLOCK).unwrap();
    let memory = memory(&file);
    if memory.kinds() == [Kind::Shmem] {
        host::skipped("file_on_a_disk_is_found_and_left_alone", "the target directory is a tmpfs");
        return;
    }
    assert_eq!(memory.kinds(), [Kind::File]);
    assert!(codes(&memory).contains(&"not-memory-file"));
    assert!(!memory.may_discard());
    assert!(populate(&memory, 0).is_err());
}

#[test]
fn region_whose_offset_is_not_congruent_is_found_and_left_alone() {
    let file = memfd(9 * BLOCK, 0);
    let region = RegionDesc {
        guest_addr: 0,
        size: 8 * BLOCK,
        file: file.try_clone().unwrap(),
        file_offset: PAGE,
    };
    let memory = Memory::new(vec![region], SHIFT).unwrap();
    assert_eq!(codes(&memory), ["region-not-congruent"]);
    assert!(memory.spans().is_empty());
}

#[test]
fn hugetlb_is_recognised_and_never_dropped() {
    let test = "hugetlb_is_recognised_and_never_dropped";
    if !host::is_root(test) {
        return;
    }
    let lock = Lock::take();
    let Some(_setting) = Setting::more_hugepages(&lock, 4) else {
        host::skipped(test, "no four free huge pages");
        return;
    };
    let file = memfd(4 * BLOCK, libc::MFD_HUGETLB | libc::MFD_HUGE_2MB);
    let mut vmm = Child::vmm(&file);
    vmm.fill(1, 0, 3);
    let memory = memory(&file);
    assert_eq!(memory.kinds(), [Kind::Hugetlb { page_size: BLOCK }]);
    assert_eq!(codes(&memory), ["hugetlb"]);
    assert_eq!(
        scan(&memory, 0, 4),
        [
            run(0, 1, HostState::Absent, 0),
            run(1, 1, HostState::Hugetlb, 0),
            run(2, 2, HostState::Absent, 0)
        ]
    );
    assert!(!memory.may_discard());
    assert!(memory.discard(1, 1).is_err());
    assert!(vmm.is_filled(1, 0, 3));
    let expected = [Err(Refusal::Absent), Ok(Collapsed::AlreadyHuge)];
    assert_eq!(collapse(&memory, 0, 2), expected);
    for block in [0, 2, 3] {
        assert_eq!(populate(&memory, block), Ok(Collapsed::Populated));
    }
    assert_eq!(scan(&memory, 0, 4), [run(0, 4, HostState::Hugetlb, 0)]);
    assert!(vmm.is_zero(0, 0, 512));
}

/// Memory that a VMM maps, some way, with a pool of as many pages as it has blocks.
fn on_hugetlb(test: &str, mode: &str) -> Option<(Lock, Setting, File, Child)> {
    if !host::is_root(test) {
        return None;
    }
    let lock = Lock::take();
    let Some(pool) = Setting::more_hugepages(&lock, 4) else {
        host::skipped(test, "no four free huge pages");
        return None;
    };
    let file = memfd(4 * BLOCK, libc::MFD_HUGETLB | libc::MFD_HUGE_2MB);
    let mut vmm = Child::spawn(&file);
    vmm.ask(&format!("map 0 {} 0 {mode}", 4 * BLOCK));
    Some((lock, pool, file, vmm))
}

#[test]
fn what_is_set_aside_is_prepared_whatever_becomes_of_the_pool() {
    let test = "what_is_set_aside_is_prepared_whatever_becomes_of_the_pool";
    let Some((_lock, pool, file, mut vmm)) = on_hugetlb(test, "shared") else { return };
    let memory = memory(&file);
    pool.resize_hugepages(0);
    let [state] = memory.pools()[..] else { panic!("{:?}", memory.pools()) };
    assert_eq!((state.missing, state.unreserved, state.short), (4, 0, false));
    vmm.fill(2, 0, 512);
    for block in [0, 1, 3] {
        assert_eq!(populate(&memory, block), Ok(Collapsed::Populated));
    }
    assert_eq!(scan(&memory, 0, 4), [run(0, 4, HostState::Hugetlb, 0)]);
    assert_eq!(codes(&memory), ["hugetlb"]);
    assert!(vmm.is_filled(2, 0, 512) && vmm.is_zero(3, 0, 512));
}

#[test]
fn a_block_nobody_uses_never_takes_the_page_that_a_touch_would_miss() {
    let test = "a_block_nobody_uses_never_takes_the_page_that_a_touch_would_miss";
    let Some((_lock, pool, file, mut vmm)) = on_hugetlb(test, "unreserved") else { return };
    let memory = memory(&file);
    assert_eq!(populate(&memory, 0), Ok(Collapsed::Populated));
    // Two pages for three holes: whichever two the guest touches, they are for it.
    pool.resize_hugepages(3);
    let [state] = memory.pools()[..] else { panic!("{:?}", memory.pools()) };
    assert_eq!((state.missing, state.unreserved), (3, 3));
    assert_eq!(state.short, state.unclaimed() < 3, "others may have pages of the pool, too");
    if !state.short {
        host::skipped(test, "the pool has pages of others");
        return;
    }
    assert_eq!(populate(&memory, 1), Err(Refusal::Space));
    assert_eq!(codes(&memory), ["hugetlb-pool-short", "hugetlb"]);
    assert_eq!(scan(&memory, 1, 3), [run(1, 3, HostState::Absent, 0)]);
    for block in [3, 1] {
        vmm.fill(block, 0, 512);
    }
    // What is there already takes nothing.
    assert_eq!(populate(&memory, 0), Ok(Collapsed::AlreadyHuge));
    pool.resize_hugepages(4);
    assert_eq!(populate(&memory, 2), Ok(Collapsed::Populated));
    assert_eq!(codes(&memory), ["hugetlb"]);
    assert!(vmm.is_zero(0, 0, 512) && vmm.is_zero(2, 0, 512));
    assert!(vmm.is_filled(1, 0, 512) && vmm.is_filled(3, 0, 512));
}

#[test]
fn what_the_vmm_took_away_is_not_said_to_be_there() {
    let test = "what_the_vmm_took_away_is_not_said_to_be_there";
    let Some((_lock, pool, file, mut vmm)) = on_hugetlb(test, "shared") else { return };
    let memory = memory(&file);
    let resident = || file.metadata().unwrap().blocks() * 512 / BLOCK;
    assert_eq!(populate(&memory, 1), Ok(Collapsed::Populated));
    punch(&file, BLOCK, BLOCK);
    assert_eq!(resident(), 0);
    assert_eq!(populate(&memory, 1), Ok(Collapsed::AlreadyHuge));
    assert_eq!(resident(), 1, "it is there again");
    // What is punched is not set aside any more, and with the pool it is gone.
    punch(&file, BLOCK, BLOCK);
    pool.resize_hugepages(0);
    let [state] = memory.pools()[..] else { panic!("{:?}", memory.pools()) };
    if state.unclaimed() > 0 {
        host::skipped(test, "the pool has pages of others");
        return;
    }
    assert_eq!(populate(&memory, 1), Err(Refusal::Space));
    assert_eq!(scan(&memory, 1, 1), [run(1, 1, HostState::Absent, 0)]);
    assert_eq!(populate(&memory, 2), Ok(Collapsed::Populated), "it is set aside");
    assert!(vmm.is_zero(2, 0, 512));
}

/// Pages of a process's hugetlb mapping on a node, by numa_maps.
fn pages_on(pid: u32, node: u32) -> u64 {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/numa_maps")).unwrap();
    let words =
        maps.lines().filter(|line| line.contains("gemini-test")).flat_map(str::split_whitespace);
    let prefix = format!("N{node}=");
    words.filter_map(|word| word.strip_prefix(&prefix)?.parse::<u64>().ok()).sum()
}

#[test]
fn pages_come_from_the_node_that_the_vmm_chose() {
    let test = "pages_come_from_the_node_that_the_vmm_chose";
    let nodes = std::fs::read_to_string("/sys/devices/system/node/has_memory").unwrap_or_default();
    if nodes.trim() != "0-1" {
        host::skipped(test, "this host has not two memory nodes");
        return;
    }
    // The kernel spreads the pool over the nodes.
    for node in [0, 1] {
        let Some((_lock, pool, file, mut vmm)) = on_hugetlb(test, "shared") else { return };
        pool.resize_hugepages(8);
        vmm.ask(&format!("bind 0 {} {node}", 4 * BLOCK));
        let memory = memory(&file);
        for block in [0, 1, 3] {
            assert_eq!(populate(&memory, block), Ok(Collapsed::Populated), "node {node}");
        }
        assert!(vmm.is_zero(0, 0, 512) && vmm.is_zero(1, 0, 512) && vmm.is_zero(3, 0, 512));
        assert_eq!((pages_on(vmm.pid(), node), pages_on(vmm.pid(), 1 - node)), (3, 0));
        assert_eq!(codes(&memory), ["hugetlb"]);
        assert_eq!(populate(&memory, 2), Ok(Collapsed::Populated));
    }
    // Set aside, but on the wrong node.
    let Some((_lock, pool, file, mut vmm)) = on_hugetlb(test, "shared") else { return };
    vmm.ask(&format!("bind 0 {} 1", 4 * BLOCK));
    pool.resize_hugepages(0);
    let memory = memory(&file);
    assert_eq!(populate(&memory, 0), Err(Refusal::Space));
    assert_eq!(codes(&memory), ["hugetlb-pool-short", "hugetlb"]);
    drop((memory, vmm));
    // Nothing was chosen: where the other pages are.
    for node in [0, 1] {
        let file = memfd(4 * BLOCK, libc::MFD_HUGETLB | libc::MFD_HUGE_2MB);
        pool.resize_hugepages(12);
        let mut vmm = Child::vmm(&file);
        vmm.ask(&format!("bind 0 {} {node}", 2 * BLOCK));
        vmm.fill(0, 0, 512);
        vmm.ask(&format!("unbind 0 {}", 2 * BLOCK));
        let memory = self::memory(&file);
        assert_eq!(populate(&memory, 2), Ok(Collapsed::Populated));
        assert!(vmm.is_zero(2, 0, 512));
        assert_eq!((pages_on(vmm.pid(), node), pages_on(vmm.pid(), 1 - node)), (2, 0));
    }
}

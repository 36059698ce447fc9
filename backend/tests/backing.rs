//! Looking at, making huge and dropping the memory of a process that plays the VMM.

#![allow(clippy::unwrap_used)] // a test that cannot go on must fail

mod common;

use common::host::{Lock, Setting};
use common::*;
use std::os::unix::net::UnixListener;
use vhost_device_gemini::backing::{
    Collapsed, Error, Holes, HostState, Kind, Memory, Refusal, RegionDesc,
};

#[test]
fn helper_process() {
    child::serve();
}

/// Base pages only unless asked, and the settings held still meanwhile.
fn base_pages_only(test: &str) -> Option<(Setting, Lock)> {
    if !host::is_root(test) {
        return None;
    }
    let lock = Lock::take();
    Some((Setting::shmem_enabled(&lock, "never"), lock))
}

#[test]
fn scan_tells_what_smaps_and_mincore_tell() {
    let Some(_held) = base_pages_only("scan_tells_what_smaps_and_mincore_tell") else { return };
    let file = memfd(16 * BLOCK, 0);
    let mut vmm = Child::vmm(&file);
    vmm.fill(1, 17, 1);
    vmm.fill(2, 0, 512);
    vmm.fill(3, 0, 512);
    vmm.fill(5, 500, 12);
    vmm.fill(6, 0, 12);
    vmm.ask(&format!("advise {} {BLOCK} collapse", 3 * BLOCK));
    let memory = memory(&file);
    assert_eq!(codes(&memory), [""; 0]);
    assert_eq!(memory.kinds(), [Kind::Shmem]);
    assert_eq!(
        scan(&memory, 0, 100),
        [
            run(0, 1, HostState::Absent, 0),
            run(1, 1, HostState::Base, 1),
            run(2, 1, HostState::Base, PAGES),
            run(3, 1, HostState::Huge, 0),
            run(4, 1, HostState::Absent, 0),
            run(5, 2, HostState::Base, 12),
            run(7, 9, HostState::Absent, 0),
        ]
    );
    assert_eq!(vmm.huge_blocks(), 1);
    for (block, pages) in [(0, 0), (1, 1), (2, 512), (3, 512), (5, 12), (6, 12), (7, 0)] {
        assert_eq!(vmm.resident(block), pages, "block {block}");
    }
    assert!(vmm.is_filled(2, 0, 1024), "looking changes nothing");
}

#[test]
fn scan_of_a_sparse_file_finds_every_block_and_adds_no_page() {
    use std::os::unix::fs::{FileExt, MetadataExt};
    let test = "scan_of_a_sparse_file_finds_every_block_and_adds_no_page";
    let Some(_held) = base_pages_only(test) else { return };
    let blocks = 65_536; // 128 GiB
    let file = memfd(blocks * BLOCK, 0);
    for block in (0..blocks).step_by(2) {
        file.write_all_at(&[1], block * BLOCK + (block % 512) * PAGE).unwrap();
    }
    let before = file.metadata().unwrap().blocks();
    let memory = memory(&file);
    let runs = scan(&memory, 0, blocks);
    assert_eq!(runs.len() as u64, blocks);
    for (block, found) in (0..).zip(runs) {
        let odd = block % 2 != 0;
        let (state, resident) = if odd { (HostState::Absent, 0) } else { (HostState::Base, 1) };
        assert_eq!(found, run(block, 1, state, resident));
    }
    assert_eq!(file.metadata().unwrap().blocks(), before);
}

#[test]
fn collapse_makes_resident_blocks_huge_and_keeps_contents() {
    let test = "collapse_makes_resident_blocks_huge_and_keeps_contents";
    let Some(_held) = base_pages_only(test) else { return };
    let file = memfd(40 * BLOCK, 0);
    let mut vmm = Child::vmm(&file);
    for block in 0..40 {
        // Block 3 stays absent, block 5 is sparse.
        match block {
            3 => {}
            5 => vmm.fill(5, 100, 7),
            _ => vmm.fill(block, 0, 512),
        }
    }
    let memory = memory(&file);
    let results = collapse(&memory, 0, 40);
    for (block, result) in results.iter().enumerate() {
        let expected = match block {
            3 => Err(Refusal::Absent),
            5 => Ok(Collapsed::Copied { bytes: 7 * PAGE }),
            _ => Ok(Collapsed::Copied { bytes: BLOCK }),
        };
        assert_eq!(*result, expected, "block {block}");
    }
    // Mapped huge in the VMM at once, without its touching them.
    assert_eq!(vmm.huge_blocks(), 39);
    assert_eq!(
        scan(&memory, 0, 40),
        [
            run(0, 3, HostState::Huge, 0),
            run(3, 1, HostState::Absent, 0),
            run(4, 36, HostState::Huge, 0)
        ]
    );
    assert_eq!(vmm.resident(3), 0, "an absent block is never touched");
    assert!(vmm.is_filled(0, 0, 3 * 512) && vmm.is_filled(4, 0, 512));
    assert!(vmm.is_filled(5, 100, 7) && vmm.is_zero(5, 0, 100) && vmm.is_zero(5, 107, 405));
    assert!(vmm.is_filled(6, 0, 34 * 512));
    assert_eq!(collapse(&memory, 4, 1), [Ok(Collapsed::AlreadyHuge)]);
    assert_eq!(codes(&memory), [""; 0]);
}

#[test]
fn collapse_that_leaves_holes_takes_whole_blocks_alone() {
    let test = "collapse_that_leaves_holes_takes_whole_blocks_alone";
    let Some(_held) = base_pages_only(test) else { return };
    let file = memfd(4 * BLOCK, 0);
    let mut vmm = Child::vmm(&file);
    vmm.fill(0, 0, 512);
    vmm.fill(1, 0, 511);
    vmm.fill(2, 0, 512);
    let memory = memory(&file);
    let mut results = Vec::new();
    memory.collapse(0, 4, Holes::Leave, &mut results);
    let copied = Ok(Collapsed::Copied { bytes: BLOCK });
    let expected = [(0, copied), (1, Err(Refusal::Holes)), (2, copied), (3, Err(Refusal::Absent))];
    assert_eq!(results, expected);
    assert_eq!(vmm.resident(1), 511, "a page that is not there is not brought back");
    assert_eq!(vmm.huge_blocks(), 2);
    assert!(vmm.is_filled(0, 0, 512) && vmm.is_filled(1, 0, 511) && vmm.is_filled(2, 0, 512));
}

#[test]
fn collapse_counts_nothing_for_a_huge_page_that_only_has_to_be_mapped() {
    let test = "collapse_counts_nothing_for_a_huge_page_that_only_has_to_be_mapped";
    let Some(_held) = base_pages_only(test) else { return };
    let file = memfd(4 * BLOCK, 0);
    let mut vmm = Child::vmm(&file);
    vmm.fill(1, 0, 512);
    // Another process collapses: the VMM's page tables are dropped.
    let mut other = Child::spawn(&file);
    other.ask(&format!("map {BLOCK} {BLOCK} 0 shared"));
    other.ask(&format!("advise {BLOCK} {BLOCK} collapse"));
    assert_eq!(vmm.huge_blocks(), 0);
    let memory = memory(&file);
    assert_eq!(state(&memory, 1), HostState::Huge, "the next touch maps the huge page");
    assert_eq!(collapse(&memory, 1, 1), [Ok(Collapsed::AlreadyHuge)]);
    assert_eq!(vmm.huge_blocks(), 1);
    assert!(vmm.is_filled(1, 0, 512));
}

#[test]
fn populate_makes_any_block_huge_and_keeps_contents() {
    let test = "populate_makes_any_block_huge_and_keeps_contents";
    let Some(_held) = base_pages_only(test) else { return };
    let file = memfd(8 * BLOCK, 0);
    let mut vmm = Child::vmm(&file);
    vmm.fill(1, 3, 2);
    vmm.fill(2, 0, 512);
    let memory = memory(&file);
    assert_eq!(populate(&memory, 0), Ok(Collapsed::Populated));
    assert_eq!(populate(&memory, 0), Ok(Collapsed::AlreadyHuge));
    assert_eq!(populate(&memory, 1), Ok(Collapsed::Copied { bytes: 2 * PAGE }));
    assert_eq!(populate(&memory, 2), Ok(Collapsed::Copied { bytes: BLOCK }));
    let mut results = Vec::new();
    memory.populate(8, 1, u64::MAX, &mut results);
    assert_eq!(results, [], "not managed");
    assert_eq!(
        scan(&memory, 0, 8),
        [run(0, 3, HostState::Huge, 0), run(3, 5, HostState::Absent, 0)]
    );
    assert_eq!(vmm.huge_blocks(), 3);
    assert!(vmm.is_zero(0, 0, 512));
    assert!(vmm.is_filled(1, 3, 2) && vmm.is_zero(1, 5, 507) && vmm.is_filled(2, 0, 512));
    assert_eq!(vmm.resident(3), 0, "only what was asked for");
}

#[test]
fn populate_of_many_tells_of_each_how_it_became_huge() {
    let test = "populate_of_many_tells_of_each_how_it_became_huge";
    let Some(_held) = base_pages_only(test) else { return };
    let file = memfd(8 * BLOCK, 0);
    let mut vmm = Child::vmm(&file);
    vmm.fill(2, 0, 512);
    vmm.fill(5, 3, 1);
    let memory = memory(&file);
    assert_eq!(collapse(&memory, 2, 1), [Ok(Collapsed::Copied { bytes: BLOCK })]);
    let mut results = Vec::new();
    memory.populate(0, 8, u64::MAX, &mut results);
    let without_copy = results.iter().filter(|(_, result)| *result == Ok(Collapsed::Populated));
    assert_eq!(without_copy.count(), 6, "{results:?}");
    assert_eq!(results[2], (2, Ok(Collapsed::AlreadyHuge)));
    assert_eq!(results[5], (5, Ok(Collapsed::Copied { bytes: PAGE })));
    assert_eq!(scan(&memory, 0, 8), [run(0, 8, HostState::Huge, 0)]);
    assert!(vmm.is_filled(5, 3, 1) && vmm.is_zero(5, 4, 508) && vmm.is_filled(2, 0, 512));
}

#[test]
fn populate_copies_no_more_than_it_has_leave_to() {
    let test = "populate_copies_no_more_than_it_has_leave_to";
    let Some(_held) = base_pages_only(test) else { return };
    let file = memfd(8 * BLOCK, 0);
    let mut vmm = Child::vmm(&file);
    vmm.fill(1, 0, 512);
    vmm.fill(3, 0, 100);
    let memory = memory(&file);
    let mut results = Vec::new();
    memory.populate(0, 4, 1, &mut results);
    let expected = [
        (0, Ok(Collapsed::Populated)),
        (1, Ok(Collapsed::Copied { bytes: BLOCK })),
        (2, Ok(Collapsed::Populated)),
        (3, Err(Refusal::Unaffordable)),
    ];
    assert_eq!(results, expected);
    assert_eq!(state(&memory, 3), HostState::Base);
    assert!(vmm.is_filled(1, 0, 512) && vmm.is_filled(3, 0, 100) && vmm.resident(3) == 100);
}

#[test]
fn demote_leaves_base_pages_with_the_same_contents() {
    let test = "demote_leaves_base_pages_with_the_same_contents";
    let Some(_held) = base_pages_only(test) else { return };
    let file = memfd(4 * BLOCK, 0);
    let mut vmm = Child::vmm(&file);
    vmm.fill(1, 0, 512);
    vmm.fill(2, 0, 512);
    let memory = memory(&file);
    assert_eq!(collapse(&memory, 1, 2), [Ok(Collapsed::Copied { bytes: BLOCK }); 2]);
    memory.demote(1).unwrap();
    assert_eq!(state(&memory, 1), HostState::Base);
    assert_eq!(state(&memory, 2), HostState::Huge);
    assert_eq!(vmm.huge_blocks(), 1);
    assert!(vmm.is_filled(1, 0, 512) && vmm.is_filled(2, 0, 512));
    // What is no huge page stays as it is.
    memory.demote(0).unwrap();
    assert_eq!(state(&memory, 0), HostState::Absent);
    assert!(memory.demote(9).is_err());
}

#[test]
fn populate_works_where_faults_give_huge_pages_too() {
    if !host::is_root("populate_works_where_faults_give_huge_pages_too") {
        return;
    }
    let lock = Lock::take();
    for setting in ["advise", "always"] {
        let _setting = Setting::shmem_enabled(&lock, setting);
        let file = memfd(2 * BLOCK, 0);
        let mut vmm = Child::vmm(&file);
        let memory = memory(&file);
        assert_eq!(populate(&memory, 1), Ok(Collapsed::Populated), "{setting}");
        assert_eq!(vmm.huge_blocks(), 1, "{setting}");
        assert_eq!(state(&memory, 0), HostState::Absent, "{setting}");
    }
}

#[test]
fn discard_drops_whole_blocks_and_no_byte_beside_them() {
    let test = "discard_drops_whole_blocks_and_no_byte_beside_them";
    let Some(_held) = base_pages_only(test) else { return };
    // As QEMU lays out q35: the second region lies elsewhere in the guest than in the file.
    let file = memfd(12 * BLOCK, 0);
    let mut vmm = Child::vmm(&file);
    vmm.fill(0, 0, 12 * 512);
    let regions = vec![
        RegionDesc {
            guest_addr: 100 * BLOCK,
            size: 6 * BLOCK,
            file: file.try_clone().unwrap(),
            file_offset: 6 * BLOCK,
        },
        RegionDesc {
            guest_addr: 0,
            size: 6 * BLOCK,
            file: file.try_clone().unwrap(),
            file_offset: 0,
        },
    ];
    let memory = Memory::new(regions, SHIFT).unwrap();
    assert!(memory.may_discard());
    collapse(&memory, 100, 2);
    memory.discard(101, 2).unwrap();
    memory.discard(5, 1).unwrap();
    assert!(matches!(memory.discard(5, 2), Err(Error::NotManaged { .. })));
    assert!(matches!(memory.discard(105, 2), Err(Error::NotManaged { .. })));
    assert!(matches!(memory.discard(u64::MAX, u64::MAX), Err(Error::NotManaged { .. })));
    assert_eq!(
        scan(&memory, 0, 200),
        [
            run(0, 5, HostState::Base, PAGES),
            run(5, 1, HostState::Absent, 0),
            run(100, 1, HostState::Huge, 0),
            run(101, 2, HostState::Absent, 0),
            run(103, 3, HostState::Base, PAGES),
        ]
    );
    assert!(vmm.is_filled(0, 0, 5 * 512), "blocks before");
    assert!(vmm.is_filled(6, 0, 512) && vmm.is_filled(9, 0, 3 * 512), "blocks around");
    assert!(vmm.is_zero(5, 0, 512) && vmm.is_zero(7, 0, 1024));
}

#[test]
fn file_that_shrinks_under_us_fails_without_a_signal() {
    let test = "file_that_shrinks_under_us_fails_without_a_signal";
    let Some(_held) = base_pages_only(test) else { return };
    let file = memfd(8 * BLOCK, 0);
    let mut vmm = Child::vmm(&file);
    vmm.fill(0, 0, 512);
    vmm.fill(6, 0, 512);
    let memory = memory(&file);
    file.set_len(BLOCK).unwrap();
    assert_eq!(state(&memory, 6), HostState::Absent);
    assert_eq!(collapse(&memory, 6, 1), [Err(Refusal::Absent)]);
    assert!(populate(&memory, 6).is_err());
    memory.discard(6, 1).unwrap();
    assert_eq!(file.metadata().unwrap().len(), BLOCK);
}

#[test]
fn vmm_that_exits_is_noticed() {
    let Some(_held) = base_pages_only("vmm_that_exits_is_noticed") else { return };
    let file = memfd(4 * BLOCK, 0);
    let mut vmm = Child::vmm(&file);
    vmm.fill(0, 0, 1024);
    let memory = memory(&file);
    assert_eq!(collapse(&memory, 0, 1), [Ok(Collapsed::Copied { bytes: BLOCK })]);
    vmm.kill();
    assert_eq!(collapse(&memory, 1, 1), [Err(Refusal::Gone)]);
    assert_eq!(populate(&memory, 2), Err(Refusal::Gone));
    // What the file holds can still be told.
    assert_eq!(state(&memory, 0), HostState::Huge);
    assert_eq!(state(&memory, 1), HostState::Base);
}

#[test]
fn vmm_is_told_from_another_back_end() {
    let Some(_held) = base_pages_only("vmm_is_told_from_another_back_end") else { return };
    let file = memfd(8 * BLOCK, 0);
    let mut table = Vec::new();
    for first in [0, 5] {
        table.push(RegionDesc {
            guest_addr: first * BLOCK,
            size: 3 * BLOCK,
            file: file.try_clone().unwrap(),
            file_offset: first * BLOCK,
        });
    }
    // Back ends before and after the VMM, so that neither the order of start decides.
    let mut others = [Child::spawn(&file), Child::spawn(&file)];
    let map = |child: &mut Child| {
        for first in [0, 5] {
            child.ask(&format!("map {} {} 0 shared", first * BLOCK, 3 * BLOCK));
        }
    };
    map(&mut others[0]);
    let mut vmm = Child::vmm(&file);
    map(&mut others[1]);
    vmm.fill(5, 0, 512);
    let memory = Memory::new(table, SHIFT).unwrap();
    assert_eq!(codes(&memory), ["vmm-ambiguous"]);
    assert_eq!(collapse(&memory, 5, 1), [Ok(Collapsed::Copied { bytes: BLOCK })]);
    assert_eq!(vmm.huge_blocks(), 1, "it was collapsed at the VMM");
    assert_eq!(others.map(|mut other| other.huge_blocks()), [0, 0]);
}

#[test]
fn who_opened_the_connection_is_asked_first_and_has_to_map_the_memory() {
    let test = "who_opened_the_connection_is_asked_first_and_has_to_map_the_memory";
    let Some(_held) = base_pages_only(test) else { return };
    let file = memfd(4 * BLOCK, 0);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let connect = |child: &mut Child| {
        assert_eq!(child.ask(&format!("connect {}", path.display())), "ok");
        listener.accept().unwrap().0
    };
    let found = || {
        let memory = memory(&file);
        (memory.vmm().and_then(|pid| u32::try_from(pid).ok()), codes(&memory))
    };
    let mut vmm = Child::vmm(&file);
    // Maps as much of it, and was started earlier or later: either may be taken.
    let other = Child::vmm(&file);
    let mut stranger = Child::spawn(&file);
    let _passed_on = connect(&mut stranger);
    assert_eq!(found().1, ["vmm-ambiguous"], "whoever passed the connection on maps nothing");
    let connection = connect(&mut vmm);
    assert_eq!(found(), (Some(vmm.pid()), vec![]));
    drop(connection);
    assert_eq!(found().1, ["vmm-ambiguous"]);
    drop(other);
    let _connection = connect(&mut stranger);
    stranger.ask(&format!("map 0 {} 0 private", 4 * BLOCK));
    assert_eq!(found().0, Some(vmm.pid()), "what is not shared is not the guest's");
}

//! What needs no other process: tables that are refused, and what is no memory at all.

use super::*;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

const BLOCK: u64 = 2 << 20;
const SHIFT: u32 = 21;

fn sized(len: u64) -> File {
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(len).unwrap();
    file
}

fn region(file: &File, guest_addr: u64, size: u64, file_offset: u64) -> RegionDesc {
    RegionDesc { guest_addr, size, file: file.try_clone().unwrap(), file_offset }
}

#[test]
fn memory_new_refuses_regions_beyond_the_end_of_their_file() {
    let file = sized(4 * BLOCK);
    let table = |size, offset| Memory::new(vec![region(&file, 0, size, offset)], SHIFT);
    assert!(table(4 * BLOCK, 0).is_ok());
    assert!(matches!(table(4 * BLOCK + 1, 0), Err(Error::BeyondEnd { .. })));
    assert!(matches!(table(BLOCK, 4 * BLOCK), Err(Error::BeyondEnd { .. })));
    assert!(matches!(table(BLOCK, u64::MAX), Err(Error::Layout(LayoutError::Overflow(0)))));
}

#[test]
fn memory_new_refuses_tables_that_contradict_themselves() {
    let file = sized(4 * BLOCK);
    let overlapping = vec![region(&file, 0, 2 * BLOCK, 0), region(&file, BLOCK, BLOCK, 0)];
    assert!(matches!(
        Memory::new(overlapping, SHIFT),
        Err(Error::Layout(LayoutError::Overlap(0, BLOCK)))
    ));
    let empty = vec![region(&file, 0, 0, 0)];
    assert!(matches!(Memory::new(empty, SHIFT), Err(Error::Layout(LayoutError::Empty(0)))));
}

#[test]
fn memory_new_leaves_alone_what_is_no_regular_file() {
    let directory = File::open("/").unwrap();
    let (socket, _other) = UnixStream::pair().unwrap();
    let odd = [directory, File::from(OwnedFd::from(socket)), File::open("/dev/zero").unwrap()];
    for file in odd {
        let memory = Memory::new(vec![region(&file, 0, 4 * BLOCK, 0)], SHIFT).unwrap();
        assert!(memory.spans().is_empty());
        assert!(!memory.may_discard());
        assert_eq!(memory.findings()[0].code, "region-not-a-file");
        assert!(matches!(memory.discard(0, 1), Err(Error::NotManaged { .. })));
        let mut results = Vec::new();
        memory.populate(0, 1, 1, &mut results);
        assert_eq!(results, [], "nothing is managed");
    }
}

#[test]
fn empty_table_is_harmless() {
    let memory = Memory::new(Vec::new(), SHIFT).unwrap();
    let mut runs = Vec::new();
    memory.scan(0, u64::MAX, &mut runs).unwrap();
    assert!(runs.is_empty() && memory.findings().is_empty() && !memory.is_managed(0, 1));
}

//! Surviving a VMM that truncates its memory file.
//!
//! Touching a mapped page behind the end of its file, or one for which its filesystem has no
//! room, raises SIGBUS. Rings, buffers and the dirty log are accessed through such mappings by
//! crates that expect memory to be there, and nothing keeps a VMM from shrinking the file. The
//! handler puts a page of our own in the place of the missing one, so that the access completes,
//! and the thread is told; whoever serves the rings then gives them up.

use super::sys::{check, page_size};
use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};

thread_local! {
    /// This thread survived a SIGBUS. Neither a destructor nor a lazy start: a signal handler
    /// sets it.
    static BUS_ERROR: Cell<bool> = const { Cell::new(false) };
}

/// Size of a base page, for the handler.
static PAGE_SIZE: AtomicUsize = AtomicUsize::new(4096);
/// Parts of a hugetlb mapping can be replaced by whole huge pages only.
const HUGE_PAGE_SIZES: [usize; 2] = [2 << 20, 1 << 30];

/// Whether this thread touched memory that was not there since it last asked.
pub fn memory_was_truncated() -> bool {
    BUS_ERROR.take()
}

/// Installs the handler, for the whole process.
///
/// # Errors
/// If the signal cannot be handled.
pub fn survive_truncated_memory() -> io::Result<()> {
    PAGE_SIZE.store(usize::try_from(page_size()).unwrap_or(4096), Ordering::Relaxed);
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = handle;
    // SAFETY: all-zero bytes are a valid value of this plain C structure.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler has the signature that SA_SIGINFO asks for, makes only calls that are
    // allowed in a signal handler, and `action` is valid for the call.
    let result = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) };
    check(libc::c_long::from(result)).map(|_| ())
}

extern "C" fn handle(signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid structure, whose address field is set for SIGBUS.
    let (code, addr) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    // Only what lies behind the end of a file: a hardware error must not be papered over.
    if code == libc::BUS_ADRERR && replace(addr) {
        BUS_ERROR.set(true);
        return;
    }
    // SAFETY: takes no pointers to memory of ours; the repeated access then ends the process as
    // it would have without us.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}

/// Puts a page of zeros of our own around `addr`.
fn replace(addr: usize) -> bool {
    let base = PAGE_SIZE.load(Ordering::Relaxed);
    [base, HUGE_PAGE_SIZES[0], HUGE_PAGE_SIZES[1]].into_iter().any(|size| {
        let page = addr & !(size - 1);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: the page lies in a mapping of a file that has no memory there: the only such
        // mappings of this process are of guest memory, to which no reference exists, and of the
        // VMM's dirty log, whose bytes are atomics that others change as well. A size that does not
        // fit a hugetlb mapping is refused without effect.
        let mapped = unsafe {
            libc::mmap(
                ptr::without_provenance_mut(page),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                -1,
                0,
            )
        };
        mapped != libc::MAP_FAILED
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

    #[test]
    fn access_to_truncated_memory_completes_and_is_noticed_by_its_thread() {
        survive_truncated_memory().unwrap();
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(8192).unwrap();
        let region: MmapRegion =
            MmapRegion::from_file(FileOffset::new(file.try_clone().unwrap(), 0), 8192).unwrap();
        let slice = region.as_volatile_slice();
        slice.write_obj(7_u64, 4096).unwrap();
        assert!(!memory_was_truncated());
        file.set_len(4096).unwrap();
        assert_eq!(slice.read_obj::<u64>(4096).unwrap(), 0);
        assert!(!std::thread::spawn(memory_was_truncated).join().unwrap());
        assert!(memory_was_truncated());
        assert!(!memory_was_truncated());
    }
}

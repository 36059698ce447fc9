//! Executes a function in each page of new memory.

use std::io;

use anyhow::ensure;

use crate::mapping::{Mapping, Sharing, PAGE};
use crate::pagemap::Pagemap;
use crate::probe::Executed;
use crate::protocol::PageSize;

/// Writes a function into each page of new memory that returns a number of its
/// own, beginning with `seed`, and calls all of them. Counts the pages that lie
/// at page frame `from` or above.
///
/// # Errors
/// If the memory cannot be had, or be executed, or its page table be read.
pub fn run(bytes: u64, seed: u32, from: u64) -> anyhow::Result<Executed> {
    let mapping = Mapping::new(bytes, PageSize::Base, Sharing::Private)?;
    let start = mapping.address();
    let pages = usize::try_from(bytes)? / PAGE;
    let mut executed = Executed::default();
    let numbers = (0..pages).zip((0..).map(|page| seed.wrapping_add(page)));
    for (page, number) in numbers.clone() {
        mapping.write(page * PAGE / 8, function(number));
    }
    let rights = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
    // SAFETY: the mapping's own pages, which this allows more.
    let result = unsafe { libc::mprotect(start as *mut libc::c_void, pages * PAGE, rights) };
    ensure!(result == 0, "cannot execute new memory: {}", io::Error::last_os_error());
    for (page, number) in numbers {
        let code = (start + page * PAGE) as *const ();
        // SAFETY: `function` was written there, and it takes nothing, changes
        // nothing but the register that it returns its number in, and returns.
        let returned = unsafe { std::mem::transmute::<*const (), extern "C" fn() -> u32>(code)() };
        executed.pages += 1;
        executed.wrong += u64::from(returned != number);
    }
    let mut frames = vec![0; pages];
    Pagemap::open()?.frames(start, &mut frames)?;
    executed.above = frames.iter().filter(|&&frame| frame >= from).count() as u64;
    Ok(executed)
}

/// `mov eax, number; ret`.
fn function(number: u32) -> u64 {
    0xb8 | u64::from(number) << 8 | 0xc3 << 40
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_executed() {
        // Page frames are for root alone to see.
        let Ok(executed) = run(16 * PAGE as u64, 0xffff_fff8, 0) else { return };
        assert_eq!((executed.pages, executed.wrong, executed.above), (16, 0, 16));
    }
}

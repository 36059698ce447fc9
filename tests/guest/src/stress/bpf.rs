//! BPF programs on the functions that the driver hooks: they take the one place
//! that a direct call has.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use super::disturb::HOOKED;
use super::tally::Count;
use super::Worker;

/// Types of the running kernel.
const TYPES: &str = "/sys/kernel/btf/vmlinux";

// linux/bpf.h
const PROG_LOAD: libc::c_long = 5;
const RAW_TRACEPOINT_OPEN: libc::c_long = 17;
const PROG_TYPE_TRACING: u32 = 26;
const TRACE_FENTRY: u32 = 24;
const TRACE_FEXIT: u32 = 25;

/// `r0 = 0; exit`
const PROGRAM: [u64; INSTRUCTIONS as usize] = [0xb7, 0x95];
const INSTRUCTIONS: u32 = 2;

/// The beginning of `union bpf_attr` for `BPF_PROG_LOAD`.
#[repr(C)]
#[derive(Default)]
struct Load {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
    prog_btf_fd: u32,
    func_info_rec_size: u32,
    func_info: u64,
    func_info_cnt: u32,
    line_info_rec_size: u32,
    line_info: u64,
    line_info_cnt: u32,
    attach_btf_id: u32,
    attach_prog_fd: u32,
    padding: u32,
}

/// The same for `BPF_RAW_TRACEPOINT_OPEN`.
#[repr(C)]
#[derive(Default)]
struct Open {
    name: u64,
    prog_fd: u32,
    padding: u32,
}

/// Puts a program on one of the functions for a while. Refused where the
/// driver, or this kernel, has no place for it.
///
/// # Errors
/// If the kernel's types are of another form.
pub fn round(worker: &mut Worker) -> anyhow::Result<()> {
    let function = *worker.random.pick(&HOOKED);
    let exit = worker.random.one_in(2);
    let types = match fs::read(TYPES) {
        Ok(types) => types,
        Err(_) => {
            worker.tally.add(Count::Refused);
            return Ok(());
        }
    };
    let Some(id) = find_function(&types, function) else {
        worker.tally.add(Count::Refused);
        return Ok(());
    };
    drop(types);
    match attach(id, if exit { TRACE_FEXIT } else { TRACE_FENTRY }) {
        Ok(_link) => {
            worker.tally.add(Count::Done);
            std::thread::sleep(Duration::from_millis(worker.random.between(0..4000)));
        }
        Err(_) => worker.tally.add(Count::Refused),
    }
    Ok(())
}

/// Loads the program and attaches it; dropping both detaches it.
fn attach(function: u32, place: u32) -> io::Result<(OwnedFd, OwnedFd)> {
    let load = Load {
        prog_type: PROG_TYPE_TRACING,
        insn_cnt: INSTRUCTIONS,
        insns: PROGRAM.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        expected_attach_type: place,
        attach_btf_id: function,
        ..Load::default()
    };
    let program = call(PROG_LOAD, &load)?;
    let open = Open { prog_fd: program.as_raw_fd().unsigned_abs(), ..Open::default() };
    let link = call(RAW_TRACEPOINT_OPEN, &open)?;
    Ok((link, program))
}

fn call<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the attributes are as long as told, and what they point to lives
    // until the call ends.
    let fd = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>())
    };
    let fd = i32::try_from(fd).map_err(|_| io::Error::last_os_error())?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The number of the function `name` among the types of the kernel
/// (Documentation/bpf/btf.rst).
fn find_function(types: &[u8], name: &str) -> Option<u32> {
    const FUNCTION: u32 = 12;
    let number = |at: usize| {
        let bytes = types.get(at..)?.first_chunk::<4>()?;
        Some(u32::from_le_bytes(*bytes))
    };
    let place = |at: usize| number(at).map(|value| value as usize);
    let header = place(4)?;
    let (mut at, length) = (header + place(8)?, place(12)?);
    let names = header + place(16)?;
    let end = at + length;
    let mut id = 0;
    while at < end {
        id += 1;
        let (name_at, info) = (names + place(at)?, number(at + 4)?);
        let (kind, members) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
        if kind == FUNCTION {
            let text = types.get(name_at..name_at + name.len() + 1)?;
            if text.strip_suffix(&[0]) == Some(name.as_bytes()) {
                return Some(id);
            }
        }
        at += 12
            + match kind {
                1 | 14 | 17 => 4,
                3 => 12,
                4 | 5 | 15 | 19 => 12 * members,
                6 | 13 => 8 * members,
                _ => 0,
            };
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Types: an int, a struct of one member, and two functions.
    fn types() -> Vec<u8> {
        let names = b"\0first\0second\0";
        let length = |bytes: &[u8]| u32::try_from(bytes.len()).expect("a few bytes");
        let words: [u32; 14] = [
            0,
            1 << 24,
            4,
            0, // int
            0,
            4 << 24 | 1,
            4,
            0,
            1,
            0, // struct, one member
            1,
            12 << 24,
            0, // first; its type follows with the next
            7,
        ];
        let mut body: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        body.extend([12 << 24, 0_u32].iter().flat_map(|word| word.to_le_bytes()));
        let mut all = vec![0x9f, 0xeb, 1, 0];
        for word in [24, 0, length(&body), length(&body), length(names)] {
            all.extend(word.to_le_bytes());
        }
        all.extend(body);
        all.extend(names);
        all
    }

    #[test]
    fn functions_are_found_behind_types_of_other_lengths() {
        let types = types();
        assert_eq!(find_function(&types, "first"), Some(3));
        assert_eq!(find_function(&types, "second"), Some(4));
        assert_eq!(find_function(&types, "third"), None);
        assert_eq!(find_function(&types[..40], "second"), None);
    }
}

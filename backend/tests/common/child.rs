//! What a helper process does: it obeys lines that come through its standard input, which is a
//! socket, and answers each with one line.

use super::attempts;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use vhost_device_gemini::backing::{Memory, RegionDesc};
use vhost_device_gemini::sandbox::{Files, Mode, Sandbox};

/// Set for helpers: the path of the memory file.
pub const ROLE: &str = "GEMINI_TEST_HELPER_FILE";

/// Distance of huge pages.
const BLOCK: usize = 2 << 20;
const PAGE: usize = 4096;

/// A mapping: the offset in the file, and where it is.
struct Mapping {
    addr: *mut u8,
    len: usize,
}

struct Helper {
    file: File,
    /// By offset in the file.
    mappings: BTreeMap<usize, Mapping>,
    memory: Option<Memory>,
    connection: Option<UnixStream>,
}

/// Serves as a helper until the tester closes the channel; returns at once in a tester.
pub fn serve() {
    let Some(path) = std::env::var_os(ROLE) else { return };
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let stdin = io::stdin().as_fd().try_clone_to_owned().unwrap();
    let mut channel = BufReader::new(UnixStream::from(stdin));
    let mut helper = Helper { file, mappings: BTreeMap::new(), memory: None, connection: None };
    let mut line = String::new();
    while channel.read_line(&mut line).is_ok_and(|length| length > 0) {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let answer = helper.obey(&words).unwrap_or_else(|error| format!("error: {error}"));
        if writeln!(channel.get_mut(), "{answer}").is_err() {
            break;
        }
        line.clear();
    }
    std::process::exit(0);
}

fn number(word: &str) -> io::Result<usize> {
    word.parse().map_err(io::Error::other)
}

/// The result of a system call.
pub fn check(result: libc::c_long) -> io::Result<()> {
    value(result).map(drop)
}

/// The same, where it is not only whether it succeeded that matters.
pub fn value(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

impl Helper {
    fn obey(&mut self, words: &[&str]) -> io::Result<String> {
        let done = |()| "ok".to_owned();
        match words {
            ["hello"] => Ok("hello".into()),
            ["map", offset, len, shift, mode] => {
                let mode = match *mode {
                    "shared" => libc::MAP_SHARED,
                    "unreserved" => libc::MAP_SHARED | libc::MAP_NORESERVE,
                    _ => libc::MAP_PRIVATE,
                };
                self.map(number(offset)?, number(len)?, number(shift)?, mode).map(done)
            }
            ["connect", path] => {
                self.connection = Some(UnixStream::connect(path)?);
                Ok("ok".into())
            }
            ["fill", offset, len] => self.each_page(offset, len, |page, addr| {
                // SAFETY: the page is mapped writable, and nothing refers to it.
                unsafe { addr.write_volatile(pattern(page)) };
                true
            }),
            ["filled", offset, len] => self.each_page(offset, len, |page, addr| {
                // SAFETY: the page is mapped, and nothing refers to it.
                unsafe { addr.read_volatile() == pattern(page) }
            }),
            ["zero", offset, len] => self.each_page(offset, len, |_, addr| {
                // SAFETY: the page is mapped, and nothing refers to it.
                (0..PAGE).step_by(64).all(|at| unsafe { addr.add(at).read_volatile() == 0 })
            }),
            ["advise", offset, len, advice] => {
                let addr = self.at(number(offset)?)?;
                let advice = match *advice {
                    "huge" => libc::MADV_HUGEPAGE,
                    "nohuge" => libc::MADV_NOHUGEPAGE,
                    _ => libc::MADV_COLLAPSE,
                };
                // SAFETY: the range is mapped; none of these drops contents.
                let result = unsafe { libc::madvise(addr.cast(), number(len)?, advice) };
                check(result.into()).map(done)
            }
            ["bind", offset, len, node] => {
                let nodes = 1u64 << number(node)?;
                self.place(offset, len, libc::MPOL_BIND, nodes).map(done)
            }
            ["unbind", offset, len] => self.place(offset, len, libc::MPOL_DEFAULT, 0).map(done),
            ["huge"] => Ok(huge_bytes()?.to_string()),
            ["resident", offset, len] => Ok(self.resident(offset, len)?.to_string()),
            ["dumpable", value] => set_process(libc::PR_SET_DUMPABLE, number(value)?).map(done),
            ["decline"] => set_process(libc::PR_SET_THP_DISABLE, 1).map(done),
            ["become", uid, capabilities @ ..] => {
                let uid = uid.parse().map_err(io::Error::other)?;
                become_service(uid, capabilities).map(done)
            }
            ["landlock"] => enter_landlock().map(done),
            ["sandbox", directory, creates] => {
                let written = vec![directory.into()];
                let creates = number(creates)? != 0;
                let files = Files { read: Vec::new(), written, creates };
                let sandbox = Sandbox::new(Mode::On, files);
                sandbox.enter().and_then(|()| sandbox.seal()).map_err(io::Error::other)?;
                Ok("ok".into())
            }
            ["try", attempt @ ..] => Ok(match attempts::make(attempt) {
                Ok(()) => "done".into(),
                Err(error) => format!("errno {}", error.raw_os_error().unwrap_or(0)),
            }),
            ["open"] => {
                let region = RegionDesc {
                    guest_addr: 0,
                    size: self.file.metadata()?.len(),
                    file: self.file.try_clone()?,
                    file_offset: 0,
                };
                let memory = Memory::new(vec![region], 21).map_err(io::Error::other)?;
                let codes: Vec<&str> = memory.findings().iter().map(|f| f.code).collect();
                self.memory = Some(memory);
                Ok(format!("[{}]", codes.join(" ")))
            }
            ["scan", first, count] => {
                let mut runs = Vec::new();
                let (first, count) = (number(first)? as u64, number(count)? as u64);
                let memory = self.memory.as_ref().ok_or(io::ErrorKind::NotFound)?;
                memory.scan(first, count, &mut runs).map_err(io::Error::other)?;
                Ok(runs.iter().fold("scan".to_owned(), |mut text, run| {
                    // Writing to a string does not fail.
                    let _ = write!(text, " {}*{}", run.count, run.state.name());
                    text
                }))
            }
            ["collapse", first, count] => {
                let (first, count) = (number(first)? as u64, number(count)? as u64);
                let memory = self.memory.as_ref().ok_or(io::ErrorKind::NotFound)?;
                let results = super::collapse(memory, first, count);
                let results: Vec<String> = results.iter().map(|r| format!("{r:?}")).collect();
                Ok(results.join(" "))
            }
            ["populate", block] => {
                let memory = self.memory.as_ref().ok_or(io::ErrorKind::NotFound)?;
                Ok(format!("{:?}", super::populate(memory, number(block)? as u64)))
            }
            _ => Err(io::Error::other("no such command")),
        }
    }

    /// Maps a piece of the file at an address that is `shift` bytes past huge page congruence.
    fn map(&mut self, offset: usize, len: usize, shift: usize, mode: i32) -> io::Result<()> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let reserved = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len + 2 * BLOCK,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if reserved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = reserved as usize;
        let addr = start.next_multiple_of(BLOCK) + offset % BLOCK + shift;
        // SAFETY: inside the reservation made above.
        let addr = unsafe {
            libc::mmap(
                reserved.byte_add(addr - start),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                mode | libc::MAP_FIXED,
                self.file.as_raw_fd(),
                libc::off_t::try_from(offset).map_err(io::Error::other)?,
            )
        };
        if addr == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        self.mappings.insert(offset, Mapping { addr: addr.cast(), len });
        Ok(())
    }

    /// Sets on which memory nodes a range is to be.
    fn place(&self, offset: &str, len: &str, mode: i32, nodes: u64) -> io::Result<()> {
        let addr = self.at(number(offset)?)?;
        // SAFETY: the range is mapped, and the mask has the bits that are told.
        check(unsafe {
            libc::syscall(libc::SYS_mbind, addr, number(len)?, mode, &raw const nodes, 65, 0)
        })
    }

    fn at(&self, offset: usize) -> io::Result<*mut u8> {
        let (start, mapping) =
            self.mappings.range(..=offset).next_back().ok_or(io::ErrorKind::NotFound)?;
        if offset - start >= mapping.len {
            return Err(io::ErrorKind::NotFound.into());
        }
        // SAFETY: inside the mapping (checked).
        Ok(unsafe { mapping.addr.add(offset - start) })
    }

    fn each_page(
        &self,
        offset: &str,
        len: &str,
        each: impl Fn(usize, *mut u8) -> bool,
    ) -> io::Result<String> {
        let offset = number(offset)?;
        let mut all = true;
        for page in (offset..offset + number(len)?).step_by(PAGE) {
            all &= each(page / PAGE, self.at(page)?);
        }
        Ok(all.to_string())
    }

    fn resident(&self, offset: &str, len: &str) -> io::Result<usize> {
        let (addr, len) = (self.at(number(offset)?)?, number(len)?);
        let mut pages = vec![0u8; len / PAGE];
        // SAFETY: the range is mapped, and the vector has one byte for each of its pages.
        check(unsafe { libc::mincore(addr.cast(), len, pages.as_mut_ptr()) }.into())?;
        Ok(pages.iter().filter(|page| **page & 1 != 0).count())
    }
}

/// A byte that is never zero and differs between neighbouring pages.
fn pattern(page: usize) -> u8 {
    u8::try_from(page % 251).unwrap_or(0) + 1
}

/// Bytes of files that this process maps as huge pages.
fn huge_bytes() -> io::Result<u64> {
    let smaps = std::fs::read_to_string("/proc/self/smaps")?;
    let kilobytes = smaps
        .lines()
        .filter_map(|line| line.strip_prefix("ShmemPmdMapped:"))
        .filter_map(|value| value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    Ok(kilobytes.sum::<u64>() * 1024)
}

fn set_process(option: libc::c_int, value: usize) -> io::Result<()> {
    // SAFETY: these options take no pointers.
    check(unsafe { libc::prctl(option, value, 0, 0, 0) }.into())
}

/// Enters a Landlock domain that forbids nothing but to execute.
fn enter_landlock() -> io::Result<()> {
    let execute = 1u64;
    set_process(libc::PR_SET_NO_NEW_PRIVS, 1)?;
    // SAFETY: the attributes are one number of this size.
    let rules = value(unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, &raw const execute, size_of::<u64>(), 0)
    })?;
    // SAFETY: takes no pointers.
    check(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, rules, 0) })
}

/// Becomes an unprivileged user that keeps some capabilities, as a service manager would start
/// it, and dumpable, as a program that was executed by that user is.
fn become_service(uid: libc::uid_t, capabilities: &[&str]) -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: libc::c_int,
    }
    #[repr(C)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    let mut bits = 0u64;
    for capability in capabilities {
        bits |= 1
            << match *capability {
                "dac_read_search" => 2,
                "sys_ptrace" => 19,
                "sys_admin" => 21,
                "sys_nice" => 23,
                "perfmon" => 38,
                other => return Err(io::Error::other(format!("capability {other}?"))),
            };
    }
    set_process(libc::PR_SET_KEEPCAPS, 1)?;
    // SAFETY: these take no pointers that are used: the list of groups is empty.
    unsafe {
        check(libc::setgroups(0, std::ptr::null()).into())?;
        check(libc::setresgid(uid, uid, uid).into())?;
        check(libc::setresuid(uid, uid, uid).into())?;
    }
    let header = Header { version: 0x2008_0522, pid: 0 };
    #[allow(clippy::cast_possible_truncation)] // halves
    let data = [bits as u32, (bits >> 32) as u32].map(|bits| Data {
        effective: bits,
        permitted: bits,
        inheritable: 0,
    });
    // SAFETY: both have the layout of version 3 of the call, and outlive it.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) })?;
    set_process(libc::PR_SET_DUMPABLE, 1)
}

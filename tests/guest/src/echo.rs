//! Echo requests to this machine itself: the kernel answers in a context that
//! cannot wait for memory, as a network card's interrupt cannot.

use std::io;
use std::mem::{size_of, MaybeUninit};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{ensure, Context};

use crate::probe::Echoed;

/// Types of ICMP messages.
const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;

/// `ICMP_FILTER` of linux/icmp.h: a bit for each type that is *not* wanted.
const ICMP_FILTER: libc::c_int = 1;

/// Largest request: with headers it still is one packet of the loopback device.
const LARGEST: u16 = 65_000;

/// How long an answer may take after the last request.
const LINGER: Duration = Duration::from_millis(500);

/// Sends `count` requests of `size` bytes, then reads the answers.
///
/// # Errors
/// If there is no raw socket to be had.
pub fn flood(size: u16, count: u32) -> anyhow::Result<Echoed> {
    ensure!((8..=LARGEST).contains(&size), "a request has 8 to {LARGEST} bytes");
    let socket = Socket::open(i64::from(count) * i64::from(size) * 2)?;
    let mut request = vec![0xa5_u8; usize::from(size)];
    request[..8].copy_from_slice(&[ECHO_REQUEST, 0, 0, 0, 0, 1, 0, 0]);
    let mut echoed = Echoed::default();
    let start = Instant::now();
    for _ in 0..count {
        request[2..4].fill(0);
        let sum = checksum(&request);
        request[2..4].copy_from_slice(&sum.to_be_bytes());
        let begin = Instant::now();
        // What the kernel does not take counts as not sent.
        if socket.send(&request).is_ok() {
            echoed.sent += 1;
        }
        echoed.longest_seconds = echoed.longest_seconds.max(begin.elapsed().as_secs_f64());
    }
    echoed.seconds = start.elapsed().as_secs_f64();
    std::thread::sleep(LINGER);
    // Room for the header of IP.
    let mut answer = vec![0; usize::from(size) + 60];
    while socket.receive(&mut answer)? {
        echoed.answered += 1;
    }
    Ok(echoed)
}

struct Socket(OwnedFd);

impl Socket {
    /// A raw socket that gets echo replies alone, and keeps `buffer` bytes of
    /// them.
    fn open(buffer: i64) -> anyhow::Result<Self> {
        // SAFETY: the call takes three numbers.
        let fd = unsafe {
            libc::socket(libc::AF_INET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_ICMP)
        };
        ensure!(fd >= 0, "no raw socket: {}", io::Error::last_os_error());
        // SAFETY: the kernel made this descriptor for us just now.
        let socket = Socket(unsafe { OwnedFd::from_raw_fd(fd) });
        let buffer = i32::try_from(buffer.min(i64::from(i32::MAX / 2)))?;
        socket.set(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, buffer).context("no receive buffer")?;
        socket.set(libc::SOL_RAW, ICMP_FILTER, !(1_i32 << ECHO_REPLY)).context("no filter")?;
        Ok(socket)
    }

    fn set(&self, level: libc::c_int, name: libc::c_int, value: i32) -> io::Result<()> {
        // SAFETY: `value` lives throughout the call and has the size told.
        let result = unsafe {
            libc::setsockopt(
                self.0.as_raw_fd(),
                level,
                name,
                (&raw const value).cast(),
                u32::try_from(size_of::<i32>()).unwrap_or(0),
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let mut address = MaybeUninit::<libc::sockaddr_in>::zeroed();
        // SAFETY: all zeros is a valid address; it is written before it is used.
        let address = unsafe { address.assume_init_mut() };
        address.sin_family = libc::sa_family_t::try_from(libc::AF_INET).unwrap_or(0);
        address.sin_addr.s_addr = libc::INADDR_LOOPBACK.to_be();
        // SAFETY: bytes and address live throughout the call and have the sizes
        // told.
        let sent = unsafe {
            libc::sendto(
                self.0.as_raw_fd(),
                bytes.as_ptr().cast(),
                bytes.len(),
                0,
                (&raw const *address).cast(),
                u32::try_from(size_of::<libc::sockaddr_in>()).unwrap_or(0),
            )
        };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Takes the next answer, if there is one.
    fn receive(&self, into: &mut [u8]) -> anyhow::Result<bool> {
        // SAFETY: `into` lives throughout the call and has the size told.
        let got = unsafe {
            libc::recv(self.0.as_raw_fd(), into.as_mut_ptr().cast(), into.len(), libc::MSG_DONTWAIT)
        };
        if got >= 0 {
            return Ok(true);
        }
        let error = io::Error::last_os_error();
        if error.kind() == io::ErrorKind::WouldBlock {
            return Ok(false);
        }
        Err(error).context("cannot read an answer")
    }
}

/// The Internet's checksum, over words of 16 bits.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u64;
    for pair in bytes.chunks(2) {
        sum += u64::from(pair[0]) << 8 | pair.get(1).map_or(0, |&byte| u64::from(byte));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_of_a_message_with_its_checksum_is_zero() {
        let mut message = vec![8, 0, 0, 0, 0, 1, 0, 7, 1, 2, 3, 4, 5];
        let sum = checksum(&message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        assert_eq!(checksum(&message), 0);
    }
}

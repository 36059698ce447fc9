//! A PCI device in a process of its own (vfio-user): for QEMU a device that is
//! passed through, without the hardware.
//!
//! It has no registers and no interrupts. QEMU hands it all of the guest's
//! memory, as it does for VFIO, and forbids from then on that any is dropped.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use anyhow::{ensure, Context};

// docs/interop/vfio-user.rst of QEMU.
const GET_INFO: u16 = 4;
const GET_REGION_INFO: u16 = 5;
const GET_IRQ_INFO: u16 = 7;
const REGION_READ: u16 = 9;
const REGION_WRITE: u16 = 10;

const HEADER: usize = 16;
const REPLY: u32 = 1;
const NO_REPLY: u32 = 0x10;

/// Largest message that is taken.
const LONGEST: usize = 1 << 20;

// linux/vfio.h
const PCI_DEVICE: u32 = 1 << 1;
const READ_WRITE: u32 = 3;
const REGIONS: u32 = 9;
const CONFIG_REGION: u32 = 7;
const IRQS: u32 = 5;

const CONFIG_SIZE: u32 = 256;

/// Serves a device at `path` to everybody that connects, one after the other, as
/// long as this process lives.
///
/// # Errors
/// If the socket or a thread cannot be made.
pub fn serve(path: &Path) -> anyhow::Result<()> {
    let listener =
        UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    std::thread::Builder::new()
        .name("vfio-user".into())
        .spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                // How it ends with QEMU, or why QEMU ends.
                if let Err(error) = converse(stream) {
                    eprintln!("vfio-user: {error:#}");
                }
            }
        })
        .context("cannot start a thread")?;
    Ok(())
}

fn converse(mut stream: UnixStream) -> anyhow::Result<()> {
    loop {
        // What comes with the message besides, memory among it, is dropped by
        // the kernel: nobody here reads it.
        let mut message = vec![0; HEADER];
        stream.read_exact(&mut message)?;
        let size = number(&message, 4)? as usize;
        ensure!((HEADER..=LONGEST).contains(&size), "a message of {size} bytes");
        message.resize(size, 0);
        stream.read_exact(&mut message[HEADER..])?;
        let flags = number(&message, 8)?;
        answer(&mut message)?;
        if flags & NO_REPLY == 0 {
            let size = u32::try_from(message.len())?;
            set(&mut message, 4, size)?;
            set(&mut message, 8, REPLY)?;
            stream.write_all(&message)?;
        }
    }
}

/// Makes the answer to a message of the message: what has no answer of its own
/// is agreed to by repeating it.
fn answer(message: &mut Vec<u8>) -> anyhow::Result<()> {
    match u16::from_le_bytes([message[2], message[3]]) {
        GET_INFO => {
            set(message, 20, PCI_DEVICE)?;
            set(message, 24, REGIONS)?;
            set(message, 28, IRQS)?;
        }
        GET_REGION_INFO => {
            let config = number(message, 24)? == CONFIG_REGION;
            set(message, 20, if config { READ_WRITE } else { 0 })?;
            set(message, 28, 0)?;
            set(message, 32, if config { CONFIG_SIZE } else { 0 })?;
        }
        GET_IRQ_INFO => set(message, 28, 0)?,
        REGION_READ => {
            let (offset, count) = (number(message, 16)? as usize, number(message, 28)? as usize);
            let config = config_space();
            let end = offset.checked_add(count).context("an end")?;
            let data = config.get(offset..end).context("outside of the configuration space")?;
            message.truncate(32);
            message.extend_from_slice(data);
        }
        REGION_WRITE => message.truncate(32),
        _ => {}
    }
    Ok(())
}

/// A device that nothing knows a driver for.
fn config_space() -> [u8; CONFIG_SIZE as usize] {
    let mut config = [0; CONFIG_SIZE as usize];
    // Vendor and device: QEMU's own, and one of it that is not taken.
    config[..4].copy_from_slice(&[0x34, 0x12, 0xfe, 0x00]);
    // Class: unassigned.
    config[11] = 0xff;
    config
}

fn number(message: &[u8], at: usize) -> anyhow::Result<u32> {
    let bytes = message.get(at..at + 4).context("the message is too short")?;
    Ok(u32::from_le_bytes(bytes.try_into()?))
}

fn set(message: &mut [u8], at: usize, value: u32) -> anyhow::Result<()> {
    let bytes = message.get_mut(at..at + 4).context("the message is too short")?;
    bytes.copy_from_slice(&value.to_le_bytes());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_space_is_read_and_only_that() {
        let mut message = vec![0; 32];
        message[2] = 9;
        message[28] = 4;
        answer(&mut message).expect("a read");
        assert_eq!(message[32..], [0x34, 0x12, 0xfe, 0x00]);
        let mut beyond = vec![0; 32];
        beyond[2] = 9;
        beyond[16] = 254;
        beyond[28] = 4;
        assert!(answer(&mut beyond).is_err());
    }

    #[test]
    fn only_the_configuration_space_has_a_size() {
        for (region, size) in [(0, 0), (7, 256)] {
            let mut message = vec![0; 48];
            message[2] = 5;
            message[24] = region;
            answer(&mut message).expect("a region");
            assert_eq!(number(&message, 32).expect("long enough"), size);
        }
    }
}

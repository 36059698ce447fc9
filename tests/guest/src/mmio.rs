//! Reads a device's register while the memory of others comes and goes.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{ensure, Context};

use crate::mapping::PAGE;
use crate::probe::Register;

/// Offset of the command register in a device's configuration space (PCI local
/// bus specification, section 6.1).
const COMMAND: u64 = 4;
/// Bit of the command register: the device answers at its memory addresses.
const MEMORY_SPACE: u16 = 2;
/// The resource file of the BAR in which virtio devices of PCI have their
/// registers in QEMU.
const BAR: &str = "resource4";
/// Offset of `device_feature` in a virtio device's common configuration, which
/// begins the BAR in QEMU (virtio 1.3, section 4.1.4.3).
const DEVICE_FEATURE: usize = 4;

/// Reads `device_feature` of the PCI device `read`, while the memory of `others`
/// is switched off and on `rounds` times. All of them lose their drivers.
///
/// # Errors
/// If a device is missing, or its registers cannot be reached.
pub fn read_while_others_go(
    read: &str,
    others: &[String],
    rounds: u32,
) -> anyhow::Result<Register> {
    for name in others.iter().map(String::as_str).chain([read]) {
        let driver = device(name).join("driver/unbind");
        if driver.exists() {
            fs::write(&driver, name).with_context(|| format!("cannot unbind {name}"))?;
        }
    }
    switch(&config(read)?, true)?;
    let others = others.iter().map(|name| config(name)).collect::<anyhow::Result<Vec<_>>>()?;
    let registers = Registers::open(&device(read).join(BAR))?;
    let first = registers.device_feature();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut result = Register { value: first, ..Register::default() };
            while !done.load(Ordering::Relaxed) {
                result.reads += 1;
                result.wrong += u64::from(registers.device_feature() != first);
            }
            result
        });
        let switched = (0..rounds).try_for_each(|_| {
            others.iter().try_for_each(|config| switch(config, false))?;
            others.iter().try_for_each(|config| switch(config, true))
        });
        done.store(true, Ordering::Relaxed);
        let result = reader.join().ok().context("the reader panicked")?;
        switched.map(|()| result)
    })
}

fn device(name: &str) -> PathBuf {
    Path::new("/sys/bus/pci/devices").join(name)
}

fn config(name: &str) -> anyhow::Result<File> {
    let path = device(name).join("config");
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))
}

fn switch(config: &File, on: bool) -> anyhow::Result<()> {
    let mut command = [0; 2];
    config.read_exact_at(&mut command, COMMAND).context("cannot read a command register")?;
    let command = u16::from_le_bytes(command) & !MEMORY_SPACE | if on { MEMORY_SPACE } else { 0 };
    config.write_all_at(&command.to_le_bytes(), COMMAND).context("cannot write a command register")
}

/// The first page of a device's registers.
struct Registers(*mut u8);

// SAFETY: reading `device_feature` changes nothing, from whatever thread.
unsafe impl Sync for Registers {}

impl Registers {
    fn open(path: &Path) -> anyhow::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE,
                libc::PROT_READ,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        ensure!(
            start != libc::MAP_FAILED,
            "cannot map {}: {}",
            path.display(),
            io::Error::last_os_error()
        );
        Ok(Registers(start.cast()))
    }

    fn device_feature(&self) -> u32 {
        // SAFETY: within the page that was mapped, and aligned.
        unsafe { self.0.add(DEVICE_FEATURE).cast::<u32>().read_volatile() }
    }
}

impl Drop for Registers {
    fn drop(&mut self) {
        // SAFETY: mapped by `open`, and nobody has a reference into it.
        unsafe { libc::munmap(self.0.cast(), PAGE) };
    }
}

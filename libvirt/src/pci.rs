//! Where the device can be on the guest's PCI root bus.
//!
//! libvirt gives addresses to the devices that it knows, and QEMU makes those of
//! `<qemu:commandline>` before them: without an address of its own, the device
//! takes the first slot, which libvirt has given to something else.

use std::collections::BTreeSet;
use std::fmt;

use crate::Error;

/// The first slot that is tried. libvirt gives slots from the lowest on, and
/// those above to what a chipset has there (USB, a bridge, the LPC controller).
const HIGHEST: u8 = 0x1c;
/// Slot 0 is the host bridge, slot 1 of a `pc` machine its PIIX.
const LOWEST: u8 = 2;

/// A place on the root bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    bus: &'static str,
    slot: u8,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "bus={},addr={:#x}", self.bus, self.slot)
    }
}

/// QEMU's name of the root bus of a machine type as libvirt writes it. `None`
/// is libvirt's default, the `pc` machine.
///
/// # Errors
/// If the machine has no PCI bus that is known.
pub fn root_bus(machine: Option<&str>) -> Result<&'static str, Error> {
    match machine {
        None | Some("pc") => Ok("pci.0"),
        Some("q35") => Ok("pcie.0"),
        Some(name) if name.starts_with("pc-q35-") => Ok("pcie.0"),
        Some(name) if name.starts_with("pc-i440fx-") => Ok("pci.0"),
        Some(name) => Err(Error::Unsuitable(format!(
            "its machine is '{name}', where the device has no known PCI bus: make it 'q35' or 'pc'"
        ))),
    }
}

/// The highest place on `bus` that nothing has.
///
/// # Errors
/// If every slot is taken.
pub fn free_place(bus: &'static str, taken: &BTreeSet<u8>) -> Result<Place, Error> {
    (LOWEST..=HIGHEST)
        .rev()
        .find(|slot| !taken.contains(slot))
        .map(|slot| Place { bus, slot })
        .ok_or_else(|| {
            Error::Unsuitable(format!(
                "all slots of its PCI bus {bus} are taken: move a device to another bus"
            ))
        })
}

/// The slot that QEMU's device properties (`driver,key=value,...`) ask for on
/// `bus`. Without a bus, QEMU takes the first that fits.
#[must_use]
pub fn slot_of_properties(properties: &str, bus: &str) -> Option<u8> {
    let property = |key: &str| properties.split(',').find_map(|word| word.strip_prefix(key));
    if property("bus=").is_some_and(|named| named != bus) {
        return None;
    }
    // QEMU reads a slot as hexadecimal with or without 0x, and a function may follow.
    let slot = property("addr=")?.split('.').next()?;
    u8::from_str_radix(slot.trim_start_matches("0x"), 16).ok()
}

/// A number as libvirt writes it: hexadecimal with 0x, else decimal.
#[must_use]
pub fn number(text: &str) -> Option<u8> {
    match text.strip_prefix("0x") {
        Some(digits) => u8::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

//! Devices of the host that are passed through to a domain. They go on using the guest's pages, so
//! that none may be dropped: QEMU refuses such a device beside ours with `release=on`, or ours.

use roxmltree::Node;

/// What becomes a device of the host, or may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passed<'a> {
    /// It is one.
    Surely,
    /// It is one if this network of libvirt's is a pool of such, which stands in the network's XML.
    IfNetworkIs(&'a str),
}

/// What an element of `<devices>` has passed through.
pub fn of<'a>(device: Node<'a, '_>) -> Option<Passed<'a>> {
    match (device.tag_name().name(), device.attribute("type")?) {
        // VFIO; the others of their kind (USB, SCSI) pin nothing.
        ("hostdev", "pci" | "mdev") | ("interface", "hostdev" | "vdpa") => Some(Passed::Surely),
        ("interface", "network") => {
            let source = device.children().find(|node| node.has_tag_name("source"));
            Some(Passed::IfNetworkIs(source?.attribute("network")?))
        }
        ("disk", _) => device.descendants().any(is_disk_of_host).then_some(Passed::Surely),
        _ => None,
    }
}

/// Whether a disk, or a layer below it, is driven by QEMU itself (VFIO) or by vDPA.
fn is_disk_of_host(node: Node) -> bool {
    ["disk", "backingStore"].contains(&node.tag_name().name())
        && matches!(node.attribute("type"), Some("nvme" | "vhostvdpa"))
}

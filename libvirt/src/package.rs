//! What the QEMU of this project's package cannot do. It is a small build (`configure_options` in
//! scripts/build-qemu), so a domain that ran under a distribution's QEMU may not start under it.

use std::collections::BTreeSet;

use roxmltree::Node;

use crate::{child, elements};

/// Where the package puts it.
const DIRECTORY: &str = "/opt/virtio-gemini/";

/// Whether an emulator is that of the package.
pub fn has(emulator: &str) -> bool {
    emulator.starts_with(DIRECTORY)
}

/// What stands in the domain that it cannot do, in a person's words.
pub fn missing(domain: Node) -> BTreeSet<String> {
    let mut missing = BTreeSet::new();
    for device in child(domain, "devices").into_iter().flat_map(elements) {
        missing.extend(missing_of_device(device));
        if device.has_tag_name("disk") {
            missing.extend(missing_of_disk(device));
        }
    }
    missing
}

fn missing_of_device(device: Node) -> Option<String> {
    let name = device.tag_name().name();
    let kind = device.attribute("type").unwrap_or_default();
    let of_type = || Some(format!("<{name} type='{kind}'>"));
    match (name, kind) {
        ("redirdev" | "smartcard" | "tpm", _) => Some(format!("<{name}>")),
        // Built without a library of ciphers: VNC's passwords are DES.
        ("graphics", "vnc") => {
            device.has_attribute("passwd").then(|| "<graphics type='vnc'> with a password".into())
        }
        // A sound card without anything that is heard works: <audio type='none'/>.
        ("audio", "none" | "file") => None,
        ("graphics" | "audio", _)
        | ("hostdev", "usb")
        | ("interface", "vdpa")
        | (_, "spicevmc" | "spiceport" | "qemu-vdagent" | "dbus") => of_type(),
        // passt is another process, with a socket to QEMU.
        ("interface", "user") if attribute(device, "backend", "type") != Some("passt") => of_type(),
        ("filesystem", _) if attribute(device, "driver", "type") != Some("virtiofs") => {
            Some("<filesystem> that is not virtiofs".into())
        }
        ("video", _) if attribute(device, "model", "type") == Some("qxl") => {
            Some("<video> of model qxl".into())
        }
        _ => None,
    }
}

fn missing_of_disk(disk: Node) -> Vec<String> {
    let mut missing = Vec::new();
    if let Some(io) = attribute(disk, "driver", "io").filter(|io| *io != "threads") {
        missing.push(format!("<disk> with io='{io}'"));
    }
    // The disk and the layers below it.
    for node in disk.descendants().filter(Node::is_element) {
        let kind = node.attribute("type").unwrap_or_default();
        match (node.tag_name().name(), kind, node.attribute("protocol")) {
            ("disk", "vhostvdpa", _) => missing.push("<disk type='vhostvdpa'>".into()),
            ("driver" | "format", kind, _) if !["", "raw", "qcow2"].contains(&kind) => {
                missing.push(format!("<disk> of format {kind}"));
            }
            ("source", _, Some(protocol)) if protocol != "nbd" => {
                missing.push(format!("<disk> over {protocol}"));
            }
            // Built without a library of ciphers.
            ("encryption", ..) => missing.push("<disk> with <encryption>".into()),
            _ => {}
        }
    }
    missing
}

fn attribute<'a, 'i: 'a>(node: Node<'a, 'i>, element: &str, name: &str) -> Option<&'a str> {
    child(node, element)?.attribute(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUILD: &str = include_str!("../../scripts/build-qemu");

    /// Whoever builds more into it has to look at what is said to be missing.
    #[test]
    fn build_has_nothing_more_than_is_known_here() {
        let options = BUILD.split("configure_options() {").nth(1).expect("the build's options");
        let options = options.split('}').next().expect("its end");
        assert!(options.contains("--without-default-features"));
        let with: Vec<_> =
            options.split_whitespace().filter_map(|word| word.strip_prefix("--enable-")).collect();
        let known =
            "system tcg kvm vhost-user vhost-kernel vhost-net seccomp numa pixman vnc plugins";
        assert_eq!(with.join(" "), known);
    }

    fn missing_in(devices: &str) -> Vec<String> {
        let text = format!("<domain type='kvm'><devices>{devices}</devices></domain>");
        let document = roxmltree::Document::parse(&text).expect("XML");
        missing(document.root_element()).into_iter().collect()
    }

    #[test]
    fn what_it_cannot_do_is_named() {
        for (device, named) in [
            ("<graphics type='spice'/>", "<graphics type='spice'>"),
            ("<graphics type='vnc' passwd='secret'/>", "<graphics type='vnc'> with a password"),
            ("<redirdev bus='usb' type='spicevmc'/>", "<redirdev>"),
            ("<channel type='spicevmc'/>", "<channel type='spicevmc'>"),
            ("<audio id='1' type='spice'/>", "<audio type='spice'>"),
            ("<hostdev mode='subsystem' type='usb'/>", "<hostdev type='usb'>"),
            ("<tpm model='tpm-crb'/>", "<tpm>"),
            ("<video><model type='qxl'/></video>", "<video> of model qxl"),
            ("<filesystem type='mount'/>", "<filesystem> that is not virtiofs"),
            ("<interface type='user'/>", "<interface type='user'>"),
            ("<interface type='vdpa'/>", "<interface type='vdpa'>"),
            (
                "<disk><driver name='qemu' type='raw' io='native'/></disk>",
                "<disk> with io='native'",
            ),
            ("<disk><driver io='io_uring'/></disk>", "<disk> with io='io_uring'"),
            ("<disk><driver type='vmdk'/></disk>", "<disk> of format vmdk"),
            ("<disk type='network'><source protocol='rbd'/></disk>", "<disk> over rbd"),
            (
                "<disk><source><encryption format='luks'/></source></disk>",
                "<disk> with <encryption>",
            ),
        ] {
            assert_eq!(missing_in(device), [named], "{device}");
        }
        let twice = missing_in("<graphics type='sdl'/><tpm/><graphics type='sdl'/>");
        assert_eq!(twice, ["<graphics type='sdl'>", "<tpm>"]);
    }

    #[test]
    fn what_it_can_do_is_not_named() {
        for device in [
            "<sound model='ich9'/><audio id='1' type='none'/>",
            "<graphics type='vnc' port='-1' autoport='yes'/><video><model type='virtio'/></video>",
            "<hostdev mode='subsystem' type='pci'/>",
            "<hostdev mode='subsystem' type='scsi_host'/>",
            "<interface type='network'><model type='virtio'/></interface>",
            "<interface type='vhostuser'><model type='virtio'/></interface>",
            "<vsock model='virtio'/>",
            "<filesystem type='mount'><driver type='virtiofs'/></filesystem>",
            "<interface type='user'><backend type='passt'/></interface>",
            "<disk><driver name='qemu' type='qcow2' io='threads'/>\
             <backingStore type='file'><format type='raw'/></backingStore></disk>",
            "<disk type='network'><source protocol='nbd'/></disk>",
            "<disk type='nvme'/>",
            "<channel type='unix'/>",
        ] {
            assert_eq!(missing_in(device), [""; 0], "{device}");
        }
    }
}

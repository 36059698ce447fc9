//! Domains as libvirt and people write them.

use std::path::Path;

use gemini_virt_xml::{add, remove, Device, Error, NOTE_NAMESPACE};

const Q35: &str = include_str!("domains/q35.xml");
const NUMA: &str = include_str!("domains/numa-commandline.xml");
const HUGETLB: &str = include_str!("domains/hugetlb.xml");
const HUGETLB_EXAMPLE: &str = include_str!("../../docs/libvirt/hugetlb.xml");
const EMULATOR: &str = "/opt/virtio-gemini/bin/qemu-system-x86_64";

fn device() -> Device {
    Device::new(Path::new("/run/virtio-gemini/web.sock"), Some(Path::new(EMULATOR)), true)
        .expect("good paths")
}

fn added(text: &str) -> String {
    add(text, &device()).expect("a suitable domain").text
}

fn refused(text: &str) -> String {
    match add(text, &device()) {
        Ok(changed) => panic!("accepted: {}", changed.text),
        Err(error) => error.to_string(),
    }
}

/// Lines of `with` that `without` does not have.
fn new_lines<'a>(without: &str, with: &'a str) -> Vec<&'a str> {
    let mut old = without.lines().peekable();
    with.lines().filter(|line| old.next_if_eq(line).is_none()).collect()
}

#[test]
fn plain_domain_gets_memory_emulator_and_arguments_and_nothing_else() {
    let with = added(Q35);
    let changed: Vec<_> =
        with.lines().filter(|line| !Q35.lines().any(|old| old == *line)).collect();
    assert_eq!(
        changed,
        [
            "<domain xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0' type='kvm'>",
            &format!(
                "    <gemini:device xmlns:gemini='{NOTE_NAMESPACE}' \
                 emulator='/usr/bin/qemu-system-x86_64' replacement='{EMULATOR}' \
                 added='backing source access namespace commandline'/>"
            ),
            "  <memoryBacking>",
            "    <source type='memfd'/>",
            "    <access mode='shared'/>",
            "  </memoryBacking>",
            &format!("    <emulator>{EMULATOR}</emulator>"),
            "  <qemu:commandline>",
            "    <qemu:arg value='-chardev'/>",
            "    <qemu:arg value='socket,id=gemini,path=/run/virtio-gemini/web.sock,\
             reconnect-ms=500'/>",
            "    <qemu:arg value='-device'/>",
            "    <qemu:arg value='vhost-user-gemini-pci,chardev=gemini,bus=pcie.0,addr=0x1c'/>",
            "  </qemu:commandline>",
        ]
    );
}

#[test]
fn remove_undoes_add_to_the_byte() {
    let windows = Q35.replace('\n', "\r\n");
    let flat: String = Q35.lines().map(str::trim).collect();
    let no_metadata = HUGETLB.replace("  <metadata/>\n", "");
    for text in [Q35, NUMA, &windows, &flat, &no_metadata] {
        let with = added(text);
        assert_ne!(with, text);
        assert_eq!(remove(&with).expect("our own output").text, text);
    }
}

#[test]
fn adding_twice_changes_nothing_more() {
    for text in [Q35, NUMA, HUGETLB] {
        let once = added(text);
        let twice = add(&once, &device()).expect("the same domain");
        assert_eq!(twice.text, once);
        assert!(twice.notes.iter().any(|note| note.contains("already")), "{:?}", twice.notes);
    }
}

#[test]
fn adding_with_another_socket_replaces_the_device() {
    let other = Device::new(Path::new("/run/virtio-gemini/b,c.sock"), None, false).expect("good");
    let with = add(&added(Q35), &other).expect("a domain with the device").text;
    assert!(!with.contains("web.sock") && with.contains("path=/run/virtio-gemini/b,,c.sock,"));
    assert_eq!(with.matches("chardev=gemini,bus=pcie.0,addr=0x1c,release=off'").count(), 1);
    // The emulator is the domain's own again.
    assert!(with.contains("<emulator>/usr/bin/qemu-system-x86_64<"));
    assert_eq!(remove(&with).expect("a domain").text, Q35);
}

#[test]
fn own_prefix_arguments_and_backing_are_kept() {
    let with = added(NUMA);
    let lines = new_lines(NUMA, &with);
    assert!(!with.contains("xmlns:qemu="));
    assert!(lines.contains(
        &"    <q:arg value='vhost-user-gemini-pci,chardev=gemini,bus=pcie.0,addr=0x1c'/>"
    ));
    assert!(with.contains("    <allocation mode='ondemand'/>\n    <source type='memfd'/>\n"));
    assert!(with.contains("value=\"name=opt/org.example/key,string=a>b\""));
}

#[test]
fn hugetlb_is_served_from_a_memfd() {
    let changed = add(HUGETLB, &device()).expect("a suitable domain");
    assert!(changed.text.contains("</hugepages>\n    <source type='memfd'/>\n    <access mode"));
}

#[test]
fn what_happens_to_hugetlb_memory_is_told_alike_everywhere() {
    let comment = HUGETLB_EXAMPLE.split("-->").next().expect("a comment");
    let mut told = add(HUGETLB, &device()).expect("a suitable domain").notes;
    told.retain(|note| note.contains("hugetlb"));
    assert_eq!(told.len(), 1);
    told.push(comment.split_whitespace().collect::<Vec<_>>().join(" "));
    let guide = include_str!("../../docs/libvirt.md");
    told.extend(guide.lines().find(|line| line.contains("libvirt/hugetlb.xml")).map(str::to_owned));
    assert_eq!(told.len(), 3);
    for text in told {
        assert!(text.contains("prepare") && text.contains("never take"), "{text}");
    }
}

#[test]
fn shared_memory_that_another_device_needs_stays() {
    let with = added(Q35).replace(
        "    <memballoon",
        "    <filesystem type='mount'><driver type='virtiofs'/></filesystem>\n    <memballoon",
    );
    let changed = remove(&with).expect("a domain");
    assert!(changed.text.contains("<access mode='shared'/>"));
    assert!(!changed.text.contains("gemini"));
    assert!(changed.notes.iter().any(|note| note.contains("virtiofs")), "{:?}", changed.notes);
}

#[test]
fn what_came_to_the_backing_later_stays() {
    let with = added(Q35)
        .replace("    <access mode='shared'/>\n", "    <access mode='shared'/>\n    <locked/>\n");
    let text = remove(&with).expect("a domain").text;
    assert!(text.contains("  <memoryBacking>\n    <locked/>\n  </memoryBacking>\n"), "{text}");
}

#[test]
fn emulator_that_came_later_stays() {
    let with = added(Q35);
    let element = |path: &str| format!("<emulator>{path}</emulator>");
    let later = with.replace(&element(EMULATOR), &element("/usr/local/bin/qemu"));
    assert_ne!(later, with);
    let changed = remove(&later).expect("a domain");
    let own = element("/usr/bin/qemu-system-x86_64");
    assert_eq!(changed.text, Q35.replace(&own, &element("/usr/local/bin/qemu")));
    assert!(changed.notes.iter().any(|note| note.contains("emulator stays")), "{changed:?}");
    // Added anew, it is the one that comes back.
    assert_eq!(remove(&added(&later)).expect("a domain").text, changed.text);
}

#[test]
fn note_without_the_emulator_that_was_set_gives_the_old_one_back() {
    let old_note = added(Q35).replace(&format!(" replacement='{EMULATOR}'"), "");
    assert!(!old_note.contains("replacement"));
    assert_eq!(remove(&old_note).expect("a domain").text, Q35);
    let changed = old_note.replace(&format!("<emulator>{EMULATOR}<"), "<emulator>/elsewhere<");
    assert_eq!(remove(&changed).expect("a domain").text, Q35);
}

#[test]
fn device_that_a_person_wrote_goes_and_the_rest_stays() {
    let text = NUMA.replace(
        "  </q:commandline>",
        "    <q:arg value='-chardev'/>\n    <q:arg value='socket,id=mine,path=/run/a'/>\n    \
         <q:arg value='-device'/>\n    \
         <q:arg value='vhost-user-gemini-pci,chardev=mine'/>\n  </q:commandline>",
    );
    let changed = remove(&text).expect("a domain");
    assert_eq!(changed.text, NUMA);
    assert!(!changed.notes.is_empty());
}

#[test]
fn domain_without_the_device_stays_as_it_is() {
    let changed = remove(NUMA).expect("a domain");
    assert_eq!(changed.text, NUMA);
    assert_eq!(changed.notes.len(), 1);
}

#[test]
fn unsuitable_domains_are_refused_with_cause_and_remedy() {
    let backing = |inner: &str| {
        Q35.replace("  <vcpu", &format!("  <memoryBacking>{inner}</memoryBacking>\n  <vcpu"))
    };
    let devices = |inner: &str| Q35.replace("  </devices>", &format!("{inner}\n  </devices>"));
    for (text, part) in [
        (backing("<access mode='private'/>"), "take that element out"),
        (backing("<source type='file'/>"), "<source type='memfd'/>"),
        (backing("<source type='anonymous'/>"), "make it <source type='memfd'/>"),
        (backing("<source type='anonymous'/><access mode='shared'/>"), "<source type='memfd'/>"),
        (backing("<hugepages/><source type='anonymous'/>"), "make it <source type='memfd'/>"),
        (NUMA.replace("memAccess='shared'", "memAccess='private'"), "NUMA cell 1"),
        (devices("<memory model='dimm' access='private'/>"), "memory devices"),
        (Q35.replace("'x86_64'", "'aarch64'"), "aarch64"),
        (Q35.replace("type='kvm'", "type='xen'"), "'xen'"),
        (Q35.replace("type='kvm'", "type='kvm' id='3'"), "--inactive"),
        (Q35.replace("  <vcpu", "  <launchSecurity type='sev'/>\n  <vcpu"), "encrypted"),
        ("<network><name>default</name></network>".into(), "<network>"),
        (Q35.replace("</domain>", ""), "no XML"),
        ("<!DOCTYPE a [<!ENTITY b 'c'>]><domain/>".into(), "no XML"),
    ] {
        let error = refused(&text);
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn passed_through_device_is_served_without_release_only() {
    let off = Device::new(Path::new("/run/a"), None, false).expect("good paths");
    for device in [
        "<hostdev mode='subsystem' type='pci' managed='yes'/>",
        "<hostdev mode='subsystem' type='mdev' model='vfio-pci'/>",
        "<interface type='hostdev' managed='yes'/>",
        "<interface type='vdpa'/>",
        "<disk type='nvme' device='disk'><source type='pci' namespace='1'/></disk>",
        "<disk type='vhostvdpa' device='disk'><source dev='/dev/vhost-vdpa-0'/></disk>",
        "<disk type='file'><backingStore type='file'><backingStore type='nvme'/></backingStore>\
         </disk>",
    ] {
        let text = Q35.replace("  </devices>", &format!("{device}</devices>"));
        let error = refused(&text);
        assert!(error.contains("--no-release"), "{device}: {error}");
        let changed = add(&text, &off).expect("suitable");
        assert!(changed.text.contains("chardev=gemini,bus=pcie.0,addr=0x1c,release=off"));
        assert_eq!(changed.notes, [""; 0], "{device}");
    }
    for device in ["<hostdev mode='subsystem' type='usb'/>", "<disk type='network'/>"] {
        added(&Q35.replace("  </devices>", &format!("{device}</devices>")));
    }
}

#[test]
fn network_that_may_hand_out_devices_of_the_host_is_told() {
    let with_pool = Q35.replace(
        "  </devices>",
        "<interface type='network'><source network='sriov'/></interface></devices>",
    );
    let changed = add(&with_pool, &device()).expect("suitable");
    let told = |note: &&String| note.contains("(default, sriov)") && note.contains("--no-release");
    assert_eq!(changed.notes.iter().filter(told).count(), 1, "{:?}", changed.notes);
    let no_network = Q35.replace("<interface type='network'>", "<interface type='bridge'>");
    let notes = add(&no_network, &device()).expect("suitable").notes;
    assert!(!notes.iter().any(|note| note.contains("--no-release")), "{notes:?}");
}

#[test]
fn shared_memory_without_a_source_becomes_a_memfd_and_a_file_again() {
    let text = Q35.replace(
        "  <vcpu",
        "  <memoryBacking>\n    <access mode='shared'/>\n  </memoryBacking>\n  <vcpu",
    );
    let with = added(&text);
    assert!(with.contains("    <access mode='shared'/>\n    <source type='memfd'/>\n"), "{with}");
    assert_eq!(remove(&with).expect("a domain").text, text);
}

#[test]
fn device_beside_anonymous_memory_can_be_taken_out() {
    let with = added(Q35).replace("type='memfd'", "type='anonymous'");
    assert!(refused(&with).contains("anonymous"));
    let text = remove(&with).expect("a domain").text;
    assert!(text.contains("<source type='anonymous'/>") && !text.contains("gemini"), "{text}");
}

#[test]
fn paths_that_cannot_work_are_refused() {
    let long = format!("/{}", "a".repeat(107));
    for path in ["run/relative", "/run/new\nline", long.as_str()] {
        let error = Device::new(Path::new(path), None, true);
        assert!(matches!(error, Err(Error::Path(_))), "{path}: {error:?}");
    }
    let quoted = Device::new(Path::new("/run/it's <a>&\"b\""), None, true).expect("an odd path");
    let with = add(Q35, &quoted).expect("suitable").text;
    assert!(with.contains("path=/run/it&apos;s &lt;a&gt;&amp;&quot;b&quot;,"));
    assert_eq!(add(&with, &quoted).expect("suitable").text, with);
}

#[test]
fn what_the_packaged_emulator_cannot_do_is_told_once_when_the_domain_is_given_it() {
    let desktop = Q35.replace(
        "  </devices>",
        "<graphics type='spice'/><graphics type='vnc'/><redirdev bus='usb' type='spicevmc'/>\
         <redirdev bus='usb' type='spicevmc'/></devices>",
    );
    let about = |text: &str, emulator: Option<&str>| {
        let device = Device::new(Path::new("/run/a"), emulator.map(Path::new), true);
        let notes = add(text, &device.expect("good paths")).expect("suitable").notes;
        notes.into_iter().filter(|note| note.contains("will not start with it")).collect::<Vec<_>>()
    };
    let told = about(&desktop, Some(EMULATOR));
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].contains(": <graphics type='spice'>; <redirdev>. The domain"), "{told:?}");
    for emulator in [None, Some("/usr/bin/qemu-system-x86_64"), Some("/opt/other/qemu")] {
        assert_eq!(about(&desktop, emulator), [""; 0], "{emulator:?}");
    }
    let own = desktop.replace("/usr/bin/qemu-system-x86_64", EMULATOR);
    assert_eq!(about(&own, Some(EMULATOR)), [""; 0]);
    assert_eq!(about(HUGETLB, Some(EMULATOR)), [""; 0]);
}

#[test]
fn device_gets_a_slot_that_nothing_has() {
    let devices = |inner: &str| Q35.replace("  </devices>", &format!("{inner}  </devices>"));
    let at = |slot: &str| {
        devices(&format!("<sound><address type='pci' bus='0x00' slot='{slot}'/></sound>"))
    };
    // The address on the host of what is passed through is none in the guest.
    let source = "<x><source><address type='pci' bus='0x00' slot='0x1c'/></source></x>";
    let argument = |value: &str| {
        NUMA.replace("<q:env", &format!("<q:arg value='-device'/><q:arg value='{value}'/><q:env"))
    };
    for (text, place) in [
        (Q35.to_owned(), "bus=pcie.0,addr=0x1c"),
        (at("0x1c"), "bus=pcie.0,addr=0x1b"),
        (at("28"), "bus=pcie.0,addr=0x1b"),
        (at("0x01"), "bus=pcie.0,addr=0x1c"),
        (devices("<x><address type='pci' bus='0x04' slot='0x1c'/></x>"), "bus=pcie.0,addr=0x1c"),
        (devices("<x><address type='drive' bus='0' slot='28'/></x>"), "bus=pcie.0,addr=0x1c"),
        (devices(source), "bus=pcie.0,addr=0x1c"),
        (argument("edu,bus=pcie.0,addr=1c.0"), "bus=pcie.0,addr=0x1b"),
        (argument("edu,addr=0x1c"), "bus=pcie.0,addr=0x1b"),
        (argument("edu,bus=pci.5,addr=0x1c"), "bus=pcie.0,addr=0x1c"),
        (Q35.replace("pc-q35-7.2", "pc-i440fx-7.2"), "bus=pci.0,addr=0x1c"),
        (Q35.replace(" machine='pc-q35-7.2'", ""), "bus=pci.0,addr=0x1c"),
    ] {
        let with = added(&text);
        assert!(with.contains(&format!("chardev=gemini,{place}'")), "{place}: {with}");
        assert_eq!(added(&with), with);
        assert_eq!(remove(&with).expect("a domain").text, text);
    }
}

#[test]
fn full_root_bus_and_unknown_machine_are_refused() {
    let full: String = (1..0x20)
        .map(|slot| format!("<x><address type='pci' bus='0x00' slot='{slot:#04x}'/></x>"))
        .collect();
    let error = refused(&Q35.replace("  </devices>", &format!("{full}  </devices>")));
    assert!(error.contains("all slots"), "{error}");
    let error = refused(&Q35.replace("pc-q35-7.2", "microvm"));
    assert!(error.contains("microvm"), "{error}");
}

//! The device in a libvirt domain's XML.
//!
//! libvirt has no element for the device, so it goes through
//! `<qemu:commandline>`; guest memory must be shared with the daemon. What was
//! changed is noted in the domain's `<metadata>`, which libvirt keeps, so that
//! [`remove`] puts back what was there before and no more.

pub mod args;
mod edit;
mod package;
mod passthrough;
mod pci;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;

use edit::{escape, opening_tag, Edits};
use passthrough::Passed;
use roxmltree::{Document, Node};

/// libvirt's namespace for arguments of QEMU's.
const QEMU_NAMESPACE: &str = "http://libvirt.org/schemas/domain/qemu/1.0";

/// The namespace of the note in `<metadata>`.
pub const NOTE_NAMESPACE: &str = "urn:virtio-gemini:domain:1";

/// The chardev that the device talks through.
const CHARDEV: &str = "gemini";

/// The device's name in QEMU.
const DEVICE: &str = "vhost-user-gemini-pci";

/// The kernel's limit on a socket's path, without the terminating zero.
const SOCKET_PATH_MAX: usize = 107;

/// Why a domain cannot have the device, or a text is no domain.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not well-formed.
    #[error("this is no XML: {0}")]
    Syntax(#[from] roxmltree::Error),
    /// Well-formed, but something else.
    #[error("this is no domain's XML, but <{0}>: give the output of `virsh dumpxml --inactive`")]
    NoDomain(String),
    /// Something that every domain has is missing.
    #[error("the domain has no <{0}>")]
    Missing(&'static str),
    /// What libvirt tells about a running domain.
    #[error(
        "this is the state of a running domain, which is more than its definition: \
         use `virsh dumpxml --inactive`"
    )]
    Running,
    /// The device cannot serve such a domain.
    #[error("this domain cannot have the device: {0}")]
    Unsuitable(String),
    /// A path that cannot stand in the XML or on QEMU's command line.
    #[error("{0}")]
    Path(String),
}

/// How the device is attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    socket: String,
    emulator: Option<String>,
    release: bool,
}

/// A changed text, and what its user should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changed {
    /// The domain's XML.
    pub text: String,
    /// Sentences for a person.
    pub notes: Vec<String>,
}

impl Device {
    /// A device that reaches its daemon at `socket`. With `emulator`, the
    /// domain's QEMU is replaced; without `release`, QEMU never lets the daemon
    /// drop guest memory.
    ///
    /// # Errors
    /// If a path is not absolute, not printable text, or too long for a socket.
    pub fn new(socket: &Path, emulator: Option<&Path>, release: bool) -> Result<Self, Error> {
        let socket = checked(socket)?;
        if socket.len() > SOCKET_PATH_MAX {
            return Err(Error::Path(format!(
                "{socket} has {} bytes, a socket's path has {SOCKET_PATH_MAX} at most",
                socket.len()
            )));
        }
        Ok(Device { socket, emulator: emulator.map(checked).transpose()?, release })
    }

    /// QEMU's arguments for the device at `place`.
    fn arguments(&self, place: pci::Place) -> [String; 4] {
        // A comma in a value is doubled on QEMU's command line.
        let path = self.socket.replace(',', ",,");
        let release = if self.release { "" } else { ",release=off" };
        [
            "-chardev".into(),
            format!("socket,id={CHARDEV},path={path},reconnect-ms=500"),
            "-device".into(),
            format!("{DEVICE},chardev={CHARDEV},{place}{release}"),
        ]
    }
}

fn checked(path: &Path) -> Result<String, Error> {
    let text = path.to_str().filter(|text| !text.chars().any(char::is_control));
    match text {
        Some(text) if path.is_absolute() => Ok(text.to_owned()),
        Some(text) => Err(Error::Path(format!("{text} is not absolute, libvirt's QEMU runs in /"))),
        None => Err(Error::Path(format!("{} is not printable text", path.display()))),
    }
}

/// Adds the device to a domain. A domain that has it already is given it as
/// `device` says.
///
/// # Errors
/// If the text is no domain's definition, or the domain cannot be served.
pub fn add(text: &str, device: &Device) -> Result<Changed, Error> {
    let document = Document::parse(text)?;
    let domain = Domain::new(&document)?;
    domain.check_suitable(device)?;
    if domain.note().is_none() && domain.arguments_of_device().is_empty() {
        return domain.add(text, device);
    }
    // What libvirt has put elsewhere meanwhile stays there.
    if domain.has(device) {
        let note = "the domain has the device already: nothing changed".into();
        return Ok(Changed { text: text.to_owned(), notes: vec![note] });
    }
    let without = remove(text)?;
    let document = Document::parse(&without.text)?;
    Domain::new(&document)?.add(&without.text, device)
}

/// Takes the device out of a domain, and undoes what [`add`] did beside it as
/// far as nothing else has come to need it. A domain without the device stays
/// as it is.
///
/// # Errors
/// If the text is no domain's definition.
pub fn remove(text: &str) -> Result<Changed, Error> {
    let document = Document::parse(text)?;
    let domain = Domain::new(&document)?;
    let mut notes = Vec::new();
    let edits = domain.remove(text, &mut notes);
    let mut text = edits.apply();
    if domain.note().is_some_and(|note| note.added("namespace")) {
        text = without_namespace(&text)?;
    }
    Document::parse(&text)?;
    Ok(Changed { text, notes })
}

/// Takes libvirt's namespace for QEMU out of the root if nothing uses it.
fn without_namespace(text: &str) -> Result<String, Error> {
    let document = Document::parse(text)?;
    let used = |node: Node| {
        node.tag_name().namespace() == Some(QEMU_NAMESPACE)
            || node.attributes().any(|attribute| attribute.namespace() == Some(QEMU_NAMESPACE))
    };
    if document.descendants().any(used) {
        return Ok(text.to_owned());
    }
    let root = document.root_element().range();
    let tag = opening_tag(&text[root.clone()]);
    let declaration = ['\'', '"'].iter().find_map(|quote| {
        let words = format!(" xmlns:qemu={quote}{QEMU_NAMESPACE}{quote}");
        tag.find(&words).map(|at| root.start + at..root.start + at + words.len())
    });
    let mut edits = Edits::new(text);
    if let Some(range) = declaration {
        edits.replace(range, "");
    }
    Ok(edits.apply())
}

/// What [`add`] noted.
#[derive(Clone, Copy, Debug)]
struct Note<'a, 'i> {
    node: Node<'a, 'i>,
}

impl<'a> Note<'a, '_> {
    fn added(&self, what: &str) -> bool {
        let list = self.node.attribute("added").unwrap_or_default();
        list.split_whitespace().any(|word| word == what)
    }

    /// The emulator that the domain had.
    fn emulator(&self) -> Option<&'a str> {
        self.node.attribute("emulator")
    }

    /// The emulator that [`add`] put in its place; older notes do not tell.
    fn replacement(&self) -> Option<&'a str> {
        self.node.attribute("replacement")
    }
}

/// A domain's definition.
#[derive(Debug)]
struct Domain<'a, 'i> {
    root: Node<'a, 'i>,
}

impl<'a, 'i> Domain<'a, 'i> {
    fn new(document: &'a Document<'i>) -> Result<Self, Error> {
        let root = document.root_element();
        if !root.has_tag_name("domain") {
            return Err(Error::NoDomain(root.tag_name().name().to_owned()));
        }
        if root.has_attribute("id") {
            return Err(Error::Running);
        }
        Ok(Domain { root })
    }

    /// The element that the names lead to.
    fn find(&self, names: &[&str]) -> Option<Node<'a, 'i>> {
        names.iter().try_fold(self.root, |node, name| child(node, name))
    }

    fn note(&self) -> Option<Note<'a, 'i>> {
        let mut children = self.find(&["metadata"])?.children();
        let node = children.find(|node| node.has_tag_name((NOTE_NAMESPACE, "device")))?;
        Some(Note { node })
    }

    fn command_line(&self) -> Option<Node<'a, 'i>> {
        self.root.children().find(|node| node.has_tag_name((QEMU_NAMESPACE, "commandline")))
    }

    /// The arguments that make the device, whoever wrote them.
    fn arguments_of_device(&self) -> Vec<Node<'a, 'i>> {
        let Some(command_line) = self.command_line() else {
            return Vec::new();
        };
        let arguments: Vec<_> = command_line
            .children()
            .filter(|node| node.has_tag_name((QEMU_NAMESPACE, "arg")))
            .collect();
        let value = |node: &Node<'a, 'i>| node.attribute("value").unwrap_or_default();
        let mut found: Vec<Node<'a, 'i>> = Vec::new();
        let mut chardevs = Vec::new();
        for pair in arguments.windows(2) {
            let mut properties = value(&pair[1]).split(',');
            let driver = properties.next().unwrap_or_default();
            if value(&pair[0]) == "-device" && driver.starts_with("vhost-user-gemini") {
                found.extend(pair);
                chardevs.extend(properties.find_map(|word| word.strip_prefix("chardev=")));
            }
        }
        for pair in arguments.windows(2) {
            let mut properties = value(&pair[1]).split(',');
            let id = properties.find_map(|word| word.strip_prefix("id="));
            if value(&pair[0]) == "-chardev" && id.is_some_and(|id| chardevs.contains(&id)) {
                found.extend(pair);
            }
        }
        found
    }

    /// Where on the PCI root bus the device can be, or is.
    fn free_place(&self) -> Result<pci::Place, Error> {
        let machine = self.find(&["os", "type"]).and_then(|node| node.attribute("machine"));
        let bus = pci::root_bus(machine)?;
        let ours = self.arguments_of_device();
        let of_libvirt = self.root.descendants().filter_map(|node| {
            let number = |name| node.attribute(name).and_then(pci::number);
            (node.has_tag_name("address")
                && node.attribute("type") == Some("pci")
                && !node.parent().is_some_and(|parent| parent.has_tag_name("source"))
                && number("bus") == Some(0))
            .then(|| number("slot"))?
        });
        let others = self
            .command_line()
            .into_iter()
            .flat_map(elements)
            .filter(|node| !ours.contains(node))
            .filter_map(|node| pci::slot_of_properties(node.attribute("value")?, bus));
        pci::free_place(bus, &of_libvirt.chain(others).collect::<BTreeSet<u8>>())
    }

    /// Whether the device is there exactly as `device` says.
    fn has(&self, device: &Device) -> bool {
        let mut found = self.arguments_of_device();
        found.sort_by_key(|node| node.range().start);
        let found: Vec<_> = found.iter().filter_map(|node| node.attribute("value")).collect();
        let emulator = self.emulator().and_then(|text| text.text());
        self.free_place().is_ok_and(|place| found == device.arguments(place))
            && self.note().is_some()
            && device.emulator.as_deref().is_none_or(|wanted| emulator == Some(wanted))
    }

    fn check_suitable(&self, device: &Device) -> Result<(), Error> {
        let unsuitable = |text: &str| Err(Error::Unsuitable(text.to_owned()));
        let kind = self.root.attribute("type").unwrap_or_default();
        if !["kvm", "qemu"].contains(&kind) {
            return unsuitable(&format!("its type is '{kind}', the device is one of QEMU's"));
        }
        let machine = self.find(&["os", "type"]).and_then(|node| node.attribute("arch"));
        if let Some(arch) = machine.filter(|arch| *arch != "x86_64") {
            return unsuitable(&format!("its architecture is {arch}, only x86_64 is supported"));
        }
        if self.find(&["launchSecurity"]).is_some() {
            return unsuitable(
                "its memory is encrypted (<launchSecurity>), the daemon cannot map it",
            );
        }
        self.check_memory()?;
        if device.release && self.passed_through().any(|passed| passed == Passed::Surely) {
            return unsuitable(
                "a device of the host is passed through to it, which holds the guest's pages: \
                 no memory may be dropped there, add the device with --no-release",
            );
        }
        Ok(())
    }

    /// What of it is passed through, or may be.
    fn passed_through(&self) -> impl Iterator<Item = Passed<'a>> {
        self.find(&["devices"]).into_iter().flat_map(elements).filter_map(passthrough::of)
    }

    /// The networks that may give it a device of the host, for a sentence.
    fn pools(&self) -> Option<String> {
        let networks: BTreeSet<_> = self
            .passed_through()
            .filter_map(|passed| match passed {
                Passed::IfNetworkIs(name) => Some(name),
                Passed::Surely => None,
            })
            .collect();
        (!networks.is_empty()).then(|| networks.into_iter().collect::<Vec<_>>().join(", "))
    }

    fn check_memory(&self) -> Result<(), Error> {
        let unsuitable = |text: &str| Err(Error::Unsuitable(text.to_owned()));
        let backing = self.find(&["memoryBacking"]);
        let attribute = |element: &str, name: &str| {
            backing.and_then(|node| child(node, element)).and_then(|node| node.attribute(name))
        };
        let access = attribute("access", "mode");
        if access == Some("private") {
            return unsuitable(
                "its memory is private (<access mode='private'/>) and the daemon could not map \
                 it: take that element out",
            );
        }
        match attribute("source", "type") {
            // Without a source, libvirt makes shared memory a file: `add_backing` gives it one.
            None | Some("memfd") => {}
            Some("anonymous") => {
                return unsuitable(
                    "its memory is anonymous (<source type='anonymous'/>), which libvirt makes a \
                     file as soon as it is shared: make it <source type='memfd'/>",
                )
            }
            Some(other) => {
                return unsuitable(&format!(
                    "its memory comes from <source type='{other}'/>, where the host makes no huge \
                     pages: make it <source type='memfd'/>"
                ))
            }
        }
        let cells = self.find(&["cpu", "numa"]).into_iter().flat_map(|numa| numa.children());
        let private = |node: Node| {
            node.has_tag_name("cell") && node.attribute("memAccess") == Some("private")
        };
        if let Some(cell) = cells.into_iter().find(|node| private(*node)) {
            return unsuitable(&format!(
                "the memory of its NUMA cell {} is private: take memAccess='private' out",
                cell.attribute("id").unwrap_or("0")
            ));
        }
        let modules = self.find(&["devices"]).into_iter().flat_map(|devices| devices.children());
        let private =
            |node: Node| node.has_tag_name("memory") && node.attribute("access") == Some("private");
        if modules.into_iter().any(private) {
            return unsuitable("one of its memory devices is private: take access='private' out");
        }
        Ok(())
    }

    fn add(&self, text: &str, device: &Device) -> Result<Changed, Error> {
        let mut edits = Edits::new(text);
        let mut added = Vec::new();
        let mut notes = Vec::new();
        self.add_backing(&mut edits, &mut added, &mut notes)?;
        let changed_emulator = self.change_emulator(&mut edits, device)?;
        if changed_emulator.is_some_and(|(_, new)| package::has(new)) {
            let missing = package::missing(self.root);
            if !missing.is_empty() {
                let missing = missing.into_iter().collect::<Vec<_>>().join("; ");
                notes.push(format!(
                    "the QEMU of this project's package is a small build, without what these need: \
                     {missing}. The domain will not start with it unless they are changed or taken \
                     out"
                ));
            }
        }
        if let Some(networks) = self.pools().filter(|_| device.release) {
            notes.push(format!(
                "it has an <interface type='network'>: if that network ({networks}) hands out \
                 devices of the host (<forward mode='hostdev'> in `virsh net-dumpxml`), add the \
                 device with --no-release, or the domain will not start"
            ));
        }

        let declared = self.root.lookup_prefix(QEMU_NAMESPACE).filter(|name| !name.is_empty());
        if declared.is_none() {
            // The root has no namespace, so it has no prefix either.
            let behind_name = self.root.range().start + "<domain".len();
            edits.replace(behind_name..behind_name, format!(" xmlns:qemu='{QEMU_NAMESPACE}'"));
            added.push("namespace");
        }
        let prefix = declared.unwrap_or("qemu");
        let arguments = device.arguments(self.free_place()?);
        let arguments = arguments
            .iter()
            .map(|argument| format!("<{prefix}:arg value='{}'/>", escape(argument)));
        if let Some(command_line) = self.command_line() {
            edits.append(command_line, &arguments.collect::<Vec<_>>());
        } else {
            let mut lines = vec![format!("<{prefix}:commandline>")];
            lines.extend(arguments.map(|line| format!("  {line}")));
            lines.push(format!("</{prefix}:commandline>"));
            edits.append(self.root, &lines);
            added.push("commandline");
        }

        let anchor = self.find(&["uuid"]).or_else(|| self.find(&["name"]));
        let metadata = self.find(&["metadata"]);
        if metadata.is_none() {
            added.push("metadata");
        }
        let mut line = format!("<gemini:device xmlns:gemini='{NOTE_NAMESPACE}'");
        if let Some((old, new)) = changed_emulator {
            let _ = write!(line, " emulator='{}' replacement='{}'", escape(old), escape(new));
        }
        let _ = write!(line, " added='{}'/>", added.join(" "));
        match metadata {
            Some(metadata) => edits.append(metadata, &[line]),
            None => edits.insert_after(
                anchor.ok_or(Error::Missing("name"))?,
                &["<metadata>".into(), format!("  {line}"), "</metadata>".into()],
            ),
        }
        let text = edits.apply();
        // What comes out is read by libvirt: it must be XML, and have the device.
        Document::parse(&text)?;
        Ok(Changed { text, notes })
    }

    fn add_backing(
        &self,
        edits: &mut Edits,
        added: &mut Vec<&'static str>,
        notes: &mut Vec<String>,
    ) -> Result<(), Error> {
        const SOURCE: &str = "<source type='memfd'/>";
        const ACCESS: &str = "<access mode='shared'/>";
        let Some(backing) = self.find(&["memoryBacking"]) else {
            let memory = self.find(&["currentMemory"]).or_else(|| self.find(&["memory"]));
            edits.insert_after(
                memory.ok_or(Error::Missing("memory"))?,
                &[
                    "<memoryBacking>".into(),
                    format!("  {SOURCE}"),
                    format!("  {ACCESS}"),
                    "</memoryBacking>".into(),
                ],
            );
            added.extend(["backing", "source", "access"]);
            return Ok(());
        };
        let mut lines = Vec::new();
        if child(backing, "hugepages").is_some() {
            notes.push(
                "its memory is hugetlb: the daemon prepares blocks from the pool of such pages, \
                 and never takes them back"
                    .into(),
            );
        }
        if child(backing, "source").is_none() {
            lines.push(SOURCE.to_owned());
            added.push("source");
        }
        if child(backing, "access").is_none() {
            lines.push(ACCESS.to_owned());
            added.push("access");
        }
        if !lines.is_empty() {
            edits.append(backing, &lines);
        }
        Ok(())
    }

    /// The text that names the domain's emulator.
    fn emulator(&self) -> Option<Node<'a, 'i>> {
        self.find(&["devices", "emulator"])?.first_child().filter(Node::is_text)
    }

    /// Gives the domain its emulator, and returns the one that it had and the
    /// new one.
    fn change_emulator<'d>(
        &self,
        edits: &mut Edits,
        device: &'d Device,
    ) -> Result<Option<(&'a str, &'d str)>, Error> {
        let Some(wanted) = device.emulator.as_deref() else {
            return Ok(None);
        };
        let node = self.emulator().ok_or(Error::Missing("emulator> in its <devices"))?;
        let old = node.text().unwrap_or_default();
        if old == wanted {
            return Ok(None);
        }
        edits.replace(node.range(), escape(wanted));
        Ok(Some((old, wanted)))
    }

    fn remove<'t>(&self, text: &'t str, notes: &mut Vec<String>) -> Edits<'t> {
        let mut edits = Edits::new(text);
        let arguments = self.arguments_of_device();
        let note = self.note();
        let added = |what| note.is_some_and(|note| note.added(what));
        if arguments.is_empty() && note.is_none() {
            notes.push("the domain does not have the device: nothing changed".into());
            return edits;
        }
        if let Some(command_line) = self.command_line() {
            let others = elements(command_line).any(|node| !arguments.contains(&node));
            if !others && (added("commandline") || note.is_none()) {
                edits.remove(command_line);
            } else {
                arguments.iter().for_each(|node| edits.remove(*node));
            }
        }
        let Some(note) = note else {
            notes.push(
                "the device was not added by this program: memory backing and emulator stay".into(),
            );
            return edits;
        };
        if let Some(metadata) = self.find(&["metadata"]) {
            if added("metadata") && elements(metadata).count() == 1 {
                edits.remove(metadata);
            } else {
                edits.remove(note.node);
            }
        }
        self.remove_emulator(&mut edits, note, notes);
        self.remove_backing(&mut edits, note, notes);
        edits
    }

    /// Puts the old emulator back, unless somebody has chosen yet another one.
    fn remove_emulator(&self, edits: &mut Edits, note: Note, notes: &mut Vec<String>) {
        let (Some(old), Some(node)) = (note.emulator(), self.emulator()) else {
            return;
        };
        if note.replacement().is_none_or(|ours| node.text() == Some(ours)) {
            edits.replace(node.range(), escape(old));
        } else {
            notes.push("the emulator stays: it was changed after the device was added".into());
        }
    }

    fn remove_backing(&self, edits: &mut Edits, note: Note, notes: &mut Vec<String>) {
        let Some(backing) = self.find(&["memoryBacking"]) else {
            return;
        };
        let ours: Vec<_> = [("source", "type", "memfd"), ("access", "mode", "shared")]
            .into_iter()
            .filter(|(name, ..)| note.added(name))
            .filter_map(|(name, attribute, value)| {
                child(backing, name).filter(|node| node.attribute(attribute) == Some(value))
            })
            .collect();
        if ours.is_empty() {
            return;
        }
        if let Some(user) = self.user_of_shared_memory() {
            notes.push(format!("the memory stays shared: {user} needs it"));
            return;
        }
        if note.added("backing") && elements(backing).all(|node| ours.contains(&node)) {
            edits.remove(backing);
        } else {
            ours.into_iter().for_each(|node| edits.remove(node));
        }
    }

    /// A device, other than ours, that works on shared memory only.
    fn user_of_shared_memory(&self) -> Option<&'static str> {
        elements(self.find(&["devices"])?).find_map(|node| {
            let driver = child(node, "driver").and_then(|driver| driver.attribute("type"));
            match (node.tag_name().name(), node.attribute("type"), driver) {
                ("filesystem", _, Some("virtiofs")) => Some("virtiofs"),
                ("interface" | "disk", Some("vhostuser"), _) => Some("a vhost-user device"),
                _ => None,
            }
        })
    }
}

fn elements<'a, 'i: 'a>(node: Node<'a, 'i>) -> impl Iterator<Item = Node<'a, 'i>> {
    node.children().filter(Node::is_element)
}

fn child<'a, 'i: 'a>(node: Node<'a, 'i>, name: &str) -> Option<Node<'a, 'i>> {
    node.children().find(|node| node.has_tag_name(name))
}

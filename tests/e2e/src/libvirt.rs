//! A domain's whole life under a real libvirtd.
//!
//! libvirt runs in a Debian root of its own, in namespaces of its own
//! (scripts/test-libvirt makes both); the directory for temporary files is the
//! same in there and out here, so that sockets have one path.

use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::{chown, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{anyhow, bail, ensure, Context};
use clap::Args;
use gemini_guest::protocol::{PageSize, PORT_NAME};
use gemini_harness::settings::NR_HUGEPAGES;

use crate::accel::AccelChoice;
use crate::attached;
use crate::daemon::{Daemon, DaemonConfig};
use crate::guest::Guest;
use crate::lab::{Bench, Place, SYNC_TIMEOUT};
use crate::outside::GuestMemory;
use crate::process::{self, Guarded};
use crate::qmp::Qmp;
use crate::vm::log_directory;
use crate::BLOCK;

const MEMORY: u64 = 1 << 30;
const START_TIMEOUT: Duration = Duration::from_secs(30);
const BOOT_TIMEOUT: Duration = Duration::from_secs(180);
/// Whether others than root may have their page faults told, as postcopy needs it.
const USERFAULTFD: &str = "/proc/sys/vm/unprivileged_userfaultfd";
/// A migration that others have the time to disturb.
const SLOWLY: [&str; 2] = ["--bandwidth", "16"];
const DOMAIN: &str = "gemini-test";
/// The domains that are shipped.
const EXAMPLE: &str = "gemini-example";
const EXAMPLE_SOCKET: &str = "/run/virtio-gemini/gemini-example.sock";

/// Where scripts/test-libvirt puts the patched QEMU, as docs/libvirt.md says.
const EMULATOR: &str = "/opt/virtio-gemini/bin/qemu-system-x86_64";

/// `gemini-lab libvirt`
#[derive(Args, Clone, Debug)]
pub struct LibvirtArgs {
    /// Debian root with libvirt in it
    #[arg(long, value_name = "DIRECTORY")]
    root: PathBuf,
    /// Another one, which stands for the host that a domain migrates to
    #[arg(long, value_name = "DIRECTORY")]
    destination: PathBuf,
    /// `gemini-virt-xml`
    #[arg(long, value_name = "PROGRAM")]
    virt_xml: PathBuf,
    /// Directory of the domains that are shipped
    #[arg(long, value_name = "DIRECTORY")]
    examples: PathBuf,
}

/// Takes a domain from its definition to its end.
///
/// # Errors
/// If anything is not as it should be.
pub fn run(args: &LibvirtArgs) -> anyhow::Result<()> {
    let bench = Bench::new(AccelChoice::from_env()?)?;
    let host = Libvirt::start(args, &args.root, None)?;
    let place = Place::new("libvirt-daemon")?;
    let user = host.user()?;
    // The socket's directory belongs to whom libvirt runs QEMU as.
    chown(place.directory(), Some(user.0), Some(user.1))?;
    let config = daemon_config(&bench, &place, user)?;
    host.take_kernel(&bench)?;
    host.try_examples(&bench, &place, &config)?;

    let original = domain(&place);
    host.define(&original)?;
    // libvirt writes controllers that it has added in another order once it reads them.
    host.define(&host.virsh(&["dumpxml", "--inactive", DOMAIN])?)?;
    let before = host.virsh(&["dumpxml", "--inactive", DOMAIN])?;
    let socket = place.socket().to_string_lossy().into_owned();
    let add = ["add", "--socket", &socket, "--emulator", EMULATOR];
    let with = host.virt_xml(&add, &before)?;
    host.define(&with)?;
    let kept = host.virsh(&["dumpxml", "--inactive", DOMAIN])?;
    ensure!(host.virt_xml(&add, &kept)? == kept, "adding again changes libvirt's XML");
    step("defined; adding again changes nothing");

    let mut running = Running::start(&host, &place, &config)?;
    running.expect_aligned("started")?;
    running.reboot()?;
    running.expect_aligned("rebooted by the guest")?;
    host.virsh(&["reset", DOMAIN])?;
    std::thread::sleep(Duration::from_millis(500));
    running.wait_ready()?;
    running.expect_aligned("reset by libvirt")?;
    running.daemon.process.kill()?;
    running.guest.verify("kept")?;
    running.daemon = place.start(&config)?;
    running.guest.verify("kept")?;
    running.guest.free("kept")?;
    running.expect_aligned("daemon killed and started again")?;

    host.virsh(&["managedsave", DOMAIN])?;
    running.daemon.stop()?;
    let running = Running::start(&host, &place, &config)?;
    running.guest.verify("kept")?;
    running.guest.free("kept")?;
    running.expect_aligned("saved and restored")?;

    let other_place = Place::new("libvirt-destination")?;
    chown(other_place.directory(), Some(user.0), Some(user.1))?;
    let other = Libvirt::start(args, &args.destination, Some(&other_place))?;
    other.take_kernel(&bench)?;
    let way = Way { from: &host, from_place: &place, to: &other, to_place: &other_place };
    // Without it QEMU, which is not root, refuses for a reason of its own.
    bench.set(USERFAULTFD, "1")?;
    let said = running.stay(&way, &config, &["--postcopy"], || Ok(()))?;
    ensure!(
        said.contains("vhost-user backend not capable of postcopy"),
        "postcopy is refused by: {said}"
    );
    step("postcopy: refused, and told why");
    running.stay(&way, &config, &SLOWLY, || {
        way.wait_under_way()?;
        host.virsh(&["domjobabort", DOMAIN]).map(drop)
    })?;
    step("migration aborted: the domain stays, and nothing is lost");
    running.stay(&way, &config, &SLOWLY, || {
        way.wait_under_way()?;
        let qemu = other.qemu(DOMAIN)?.to_string();
        let killed = Command::new("kill").args(["-KILL", &qemu]).status()?;
        ensure!(killed.success(), "kill: {killed}");
        Ok(())
    })?;
    step("the destination's QEMU killed on the way: the domain stays, and nothing is lost");
    let running = running.migrate(&way, &config)?;
    running.expect_aligned("migrated")?;

    other.virsh(&["destroy", DOMAIN])?;
    running.expect_disconnected()?;
    running.daemon.stop()?;
    // The daemon comes after the domain, and finds it.
    let running = Running::start_with_late_daemon(&host, &place, &config)?;
    running.expect_aligned("destroyed, started before its daemon")?;
    host.virsh(&["destroy", DOMAIN])?;
    running.daemon.stop()?;

    let without = host.virt_xml(&["remove"], &kept)?;
    host.define(&without)?;
    let after = host.virsh(&["dumpxml", "--inactive", DOMAIN])?;
    ensure!(after == before, "the device's removal leaves something:\n{before}\n{after}");
    step("removed: the domain is to the byte what it was");
    host.virsh(&["undefine", DOMAIN])?;
    ensure!(!host.virsh(&["list", "--all", "--name"])?.contains(DOMAIN));
    step("undefined");
    Ok(())
}

fn step(text: &str) {
    eprintln!("ok: {text}");
}

/// A daemon with the rights that docs/libvirt.md gives it: the user that QEMU
/// runs as, and one capability.
fn daemon_config(bench: &Bench, place: &Place, user: (u32, u32)) -> anyhow::Result<DaemonConfig> {
    let program = place.directory().join("vhost-device-gemini");
    fs::copy(&bench.assets.daemon, &program)?;
    let wrapper = place.directory().join("as-the-user-of-qemu");
    let text = format!(
        "#!/bin/sh\nexec setpriv --reuid={} --regid={} --clear-groups --bounding-set=-all,+sys_nice \
         --inh-caps=-all,+sys_nice --ambient-caps=+sys_nice {} \"$@\"\n",
        user.0,
        user.1,
        program.display()
    );
    fs::write(&wrapper, text)?;
    fs::set_permissions(&wrapper, Permissions::from_mode(0o755))?;
    Ok(DaemonConfig::new(&wrapper, "gemini"))
}

/// libvirt's daemons.
struct Libvirt {
    root: PathBuf,
    uri: String,
    virt_xml: PathBuf,
    examples: PathBuf,
    // Ended in this order.
    _libvirtd: Guarded,
    _virtlogd: Guarded,
}

impl Libvirt {
    /// On a host of its own in `root`: as another host, reached by a socket in
    /// `place`, if there is one.
    fn start(args: &LibvirtArgs, root: &Path, place: Option<&Place>) -> anyhow::Result<Self> {
        let logs = log_directory(if place.is_some() { "libvirt-destination" } else { "libvirt" })?;
        let start = |name: &'static str| {
            let log = logs.join(format!("{name}.log"));
            fs::write(&log, "")?;
            // A domain does not migrate to where it is: libvirt compares these.
            let mut command = Command::new("unshare");
            command.args(["--uts", "sh", "-c", r#"hostname "$1"; exec chroot "$2" "$3""#, "-"]);
            command.arg(if place.is_some() { "destination" } else { "source" });
            command.arg(root).arg(name);
            Guarded::start(name, command, &log)
        };
        let mut uri = "qemu:///system".to_owned();
        let path = root.join("etc/libvirt/libvirtd.conf");
        let mut settings = fs::read_to_string(&path)?;
        settings += &format!("host_uuid = \"{}\"\n", host_uuid(place.is_some()));
        if let Some(place) = place {
            let directory = place.directory().display();
            settings += &format!("unix_sock_dir = \"{directory}\"\n");
            uri = format!("qemu+unix:///system?socket={directory}/libvirt-sock");
        }
        fs::write(&path, settings)?;
        let virtlogd = start("virtlogd")?;
        let mut libvirtd = start("libvirtd")?;
        process::wait_for("libvirtd answers", START_TIMEOUT, || {
            libvirtd.expect_running()?;
            let answer = virsh(root, &uri, &["uri"]).output()?;
            Ok(answer.status.success().then_some(()))
        })?;
        Ok(Libvirt {
            root: root.to_owned(),
            uri,
            virt_xml: args.virt_xml.clone(),
            examples: args.examples.clone(),
            _libvirtd: libvirtd,
            _virtlogd: virtlogd,
        })
    }

    /// The process of a domain that runs there.
    fn qemu(&self, domain: &str) -> anyhow::Result<u32> {
        let path = self.root.join(format!("run/libvirt/qemu/{domain}.pid"));
        let pid =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(pid.trim().parse()?)
    }

    fn virsh(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = virsh(&self.root, &self.uri, arguments).output()?;
        if !output.status.success() {
            bail!("virsh {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    fn define(&self, xml: &str) -> anyhow::Result<()> {
        let path = self.root.join("run/domain.xml");
        fs::write(&path, xml)?;
        self.virsh(&["define", "--validate", "/run/domain.xml"]).map(drop)
    }

    /// libvirt takes and starts each domain that is shipped, and the tool knows
    /// it.
    fn try_examples(
        &self,
        bench: &Bench,
        place: &Place,
        config: &DaemonConfig,
    ) -> anyhow::Result<()> {
        let images = self.root.join("var/lib/libvirt/images");
        fs::create_dir_all(&images)?;
        fs::File::create(images.join(format!("{EXAMPLE}.img")))?.set_len(1 << 20)?;
        let mut count = 0;
        for entry in fs::read_dir(&self.examples)? {
            let path = entry?.path();
            if path.extension().is_none_or(|extension| extension != "xml") {
                continue;
            }
            // No KVM that could be relied on here; all else stays.
            let xml = fs::read_to_string(&path)?.replace("type='kvm'", "type='qemu'");
            let xml = xml.replace("<cpu mode='host-passthrough'/>", "<cpu mode='maximum'/>");
            self.define(&xml).with_context(|| path.display().to_string())?;
            self.virsh(&["undefine", EXAMPLE])?;
            self.virt_xml(&["remove"], &xml)?;
            let bootable = bootable(&xml, place)?;
            self.try_example(bench, place, config, &bootable)
                .with_context(|| path.display().to_string())?;
            count += 1;
        }
        ensure!(count > 0, "no domain in {}", self.examples.display());
        step(&format!("{count} shipped domains are taken and start"));
        Ok(())
    }

    fn try_example(
        &self,
        bench: &Bench,
        place: &Place,
        config: &DaemonConfig,
        xml: &str,
    ) -> anyhow::Result<()> {
        let hugetlb = xml.contains("<hugepages>");
        let pool = fs::read_to_string(NR_HUGEPAGES)?.trim().parse::<u64>()?;
        if hugetlb {
            // Beside those that are somebody else's.
            bench.set(NR_HUGEPAGES, &(pool + MEMORY / BLOCK).to_string())?;
        }
        self.define(xml)?;
        let mut daemon = place.start(config)?;
        let (guest, memory) = boot(self, place, EXAMPLE)?;
        if hugetlb {
            daemon.wait_synced(SYNC_TIMEOUT)?;
            guest.fill("kept", MEMORY / 4, 1, PageSize::Huge)?;
            process::wait_for("the guest knows its hugetlb pages", SYNC_TIMEOUT, || {
                let runs = guest.driver_blocks()?;
                let known = runs.iter().filter(|run| run.host == "hugetlb" && run.guest == "huge");
                let known: u64 = known.map(|run| run.count).sum();
                Ok((known >= MEMORY / 4 / BLOCK - 4).then_some(()))
            })?;
            guest.verify("kept")?;
        } else {
            attached::become_aligned(&guest, &memory, daemon.control())?;
        }
        self.virsh(&["destroy", EXAMPLE])?;
        self.virsh(&["undefine", EXAMPLE])?;
        daemon.stop()?;
        if hugetlb {
            bench.set(NR_HUGEPAGES, &pool.to_string())?;
        }
        Ok(())
    }

    fn virt_xml(&self, arguments: &[&str], xml: &str) -> anyhow::Result<String> {
        let mut child = Command::new(&self.virt_xml)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", self.virt_xml.display()))?;
        child.stdin.take().context("a pipe")?.write_all(xml.as_bytes())?;
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "gemini-virt-xml {arguments:?} fails");
        Ok(String::from_utf8(output.stdout)?)
    }

    /// The user and group that libvirt runs QEMU as. The group is not the user's
    /// own, and whoever looks into QEMU has to have both.
    fn user(&self) -> anyhow::Result<(u32, u32)> {
        let number = |file: &str| {
            let path = self.root.join(file);
            let text = fs::read_to_string(&path)?;
            let line = text.lines().find(|line| line.starts_with("libvirt-qemu:"));
            let field = line.and_then(|line| line.split(':').nth(2));
            let field = field.with_context(|| format!("{} has no libvirt-qemu", path.display()))?;
            anyhow::Ok(field.parse()?)
        };
        Ok((number("etc/passwd")?, number("etc/group")?))
    }

    /// What domains boot has to be there where they start.
    fn take_kernel(&self, bench: &Bench) -> anyhow::Result<()> {
        let boot = self.root.join("boot");
        for (from, name) in [
            (&bench.assets.guest.kernel, "test-kernel"),
            (&bench.assets.guest.initrd, "test-initrd"),
        ] {
            fs::copy(from, boot.join(name))?;
            fs::set_permissions(boot.join(name), Permissions::from_mode(0o644))?;
        }
        Ok(())
    }
}

/// A domain as a user has it: without the device, with arguments of its own.
fn domain(place: &Place) -> String {
    format!(
        "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{DOMAIN}</name>
  <memory unit='MiB'>{}</memory>
  <vcpu>2</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>{BOOT}
  </os>
  <features>
    <acpi/>
  </features>
  <cpu mode='maximum'/>
  <on_reboot>restart</on_reboot>
  <devices>
    <emulator>{EMULATOR}</emulator>{}
    <memballoon model='none'/>
  </devices>
  <qemu:commandline>{}
  </qemu:commandline>
</domain>
",
        MEMORY >> 20,
        devices(place),
        monitor(place)
    )
}

/// A domain that is shipped, as it has to be for the test guest.
fn bootable(xml: &str, place: &Place) -> anyhow::Result<String> {
    let directory = place.directory().display();
    let mut xml = xml.to_owned();
    for (from, to) in [
        ("<memory unit='GiB'>4</memory>", format!("<memory unit='MiB'>{}</memory>", MEMORY >> 20)),
        ("hvm</type>", format!("hvm</type>{BOOT}")),
        ("<console type='pty'/>", devices(place)),
        ("<qemu:commandline>", format!("<qemu:commandline>{}", monitor(place))),
        (EXAMPLE_SOCKET, format!("{directory}/gemini.sock")),
    ] {
        ensure!(xml.contains(from), "no {from}");
        xml = xml.replace(from, &to);
    }
    Ok(xml)
}

const BOOT: &str = "
    <kernel>/boot/test-kernel</kernel>
    <initrd>/boot/test-initrd</initrd>
    <cmdline>console=ttyS0 quiet panic=-1 transparent_hugepage=always gemini.driver=1</cmdline>";

fn devices(place: &Place) -> String {
    format!(
        "
    <serial type='null'/>
    <channel type='unix'>
      <source mode='bind' path='{}/guest'/>
      <target type='virtio' name='{PORT_NAME}'/>
    </channel>",
        place.directory().display()
    )
}

fn monitor(place: &Place) -> String {
    format!(
        "
    <qemu:arg value='-qmp'/>
    <qemu:arg value='unix:{}/qmp,server=on,wait=off'/>",
        place.directory().display()
    )
}

fn host_uuid(destination: bool) -> &'static str {
    if destination {
        "6c2f41ae-3d5c-4a55-9a55-2d1c3bb4e002"
    } else {
        "6c2f41ae-3d5c-4a55-9a55-2d1c3bb4e001"
    }
}

fn virsh(root: &Path, uri: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("chroot");
    command.arg(root).args(["virsh", "-q", "-c", uri]).args(arguments);
    command.env("LC_ALL", "C").stdin(Stdio::null());
    command
}

/// The domain while it runs.
struct Running {
    guest: Guest,
    memory: GuestMemory,
    daemon: Daemon,
}

impl Running {
    fn start(host: &Libvirt, place: &Place, config: &DaemonConfig) -> anyhow::Result<Self> {
        let daemon = place.start(config)?;
        let (guest, memory) = boot(host, place, DOMAIN)?;
        Ok(Running { guest, memory, daemon })
    }

    fn start_with_late_daemon(
        host: &Libvirt,
        place: &Place,
        config: &DaemonConfig,
    ) -> anyhow::Result<Self> {
        let (guest, memory) = boot(host, place, DOMAIN)?;
        Ok(Running { guest, memory, daemon: place.start(config)? })
    }

    /// Moves to another host, under load, and returns the domain as it is there.
    fn migrate(self, way: &Way, config: &DaemonConfig) -> anyhow::Result<Self> {
        let daemon = way.to_place.start(config)?;
        self.guest.start_churn("load", MEMORY / 16, 1)?;
        way.migrate(&[])?;
        self.expect_disconnected()?;
        self.daemon.stop()?;
        let (guest, memory) = look(way.to, way.to_place, DOMAIN)?;
        guest.stop_churn("load")?;
        guest.verify("kept")?;
        guest.free("kept")?;
        Ok(Running { guest, memory, daemon })
    }

    /// Begins to move and is disturbed, so that it must not arrive. Returns what
    /// virsh says.
    fn stay(
        &self,
        way: &Way,
        config: &DaemonConfig,
        options: &[&str],
        disturb: impl FnOnce() -> anyhow::Result<()>,
    ) -> anyhow::Result<String> {
        let daemon = way.to_place.start(config)?;
        let (moved, disturbed) = std::thread::scope(|scope| {
            let moving = scope.spawn(|| way.migrate(options));
            let disturbed = disturb();
            (moving.join(), disturbed)
        });
        disturbed?;
        let moved = moved.map_err(|_| anyhow!("the thread that migrates has panicked"))?;
        let Err(error) = moved else { bail!("the domain has moved") };
        let state = way.from.virsh(&["domstate", DOMAIN])?;
        ensure!(state.trim() == "running", "the domain is {state:?} after {error:#}");
        let there = way.to.virsh(&["list", "--all", "--name"])?;
        ensure!(!there.contains(DOMAIN), "the domain is at both hosts");
        daemon.stop()?;
        self.guest.verify("kept")?;
        Ok(format!("{error:#}"))
    }

    fn expect_disconnected(&self) -> anyhow::Result<()> {
        process::wait_for("the daemon notices", SYNC_TIMEOUT, || {
            Ok((!self.daemon.status()?.connected).then_some(()))
        })
    }

    fn wait_ready(&self) -> anyhow::Result<()> {
        self.guest.wait_ready(BOOT_TIMEOUT, || Ok(())).map(drop)
    }

    fn reboot(&self) -> anyhow::Result<()> {
        // After the answer, which would be lost with the guest.
        self.guest
            .shell("(sleep 0.5; echo b > /proc/sysrq-trigger) < /dev/null > /dev/null 2>&1 &")?;
        std::thread::sleep(Duration::from_secs(1));
        self.wait_ready()
    }

    /// Fills memory, and looks from outside and from inside whether both have
    /// huge pages in the same places.
    fn expect_aligned(&self, when: &str) -> anyhow::Result<()> {
        let aligned = attached::become_aligned(&self.guest, &self.memory, self.daemon.control())
            .with_context(|| when.to_owned())?;
        step(&format!("{when}: {aligned} blocks aligned"));
        Ok(())
    }
}

/// From where to where a domain moves.
struct Way<'a> {
    from: &'a Libvirt,
    from_place: &'a Place,
    to: &'a Libvirt,
    to_place: &'a Place,
}

impl Way<'_> {
    fn migrate(&self, options: &[&str]) -> anyhow::Result<()> {
        let path = |place: &Place| place.directory().to_string_lossy().into_owned();
        let xml = self.from.virsh(&["dumpxml", "--migratable", DOMAIN])?;
        let xml = xml.replace(&path(self.from_place), &path(self.to_place));
        fs::write(self.from.root.join("run/destination.xml"), xml)?;
        let what = ["migrate", "--live", "--xml", "/run/destination.xml"];
        let whereto = [DOMAIN, &self.to.uri, "tcp://127.0.0.1"];
        self.from.virsh(&[&what, options, &whereto].concat()).map(drop)
    }

    /// Waits until some memory has been sent.
    fn wait_under_way(&self) -> anyhow::Result<()> {
        process::wait_for("the domain is being moved", SYNC_TIMEOUT, || {
            let told = self.from.virsh(&["domjobinfo", DOMAIN])?;
            Ok(told.contains("Memory processed").then_some(()))
        })
    }
}

fn boot(host: &Libvirt, place: &Place, domain: &str) -> anyhow::Result<(Guest, GuestMemory)> {
    host.virsh(&["start", domain])?;
    look(host, place, domain)
}

/// The domain that runs there.
fn look(host: &Libvirt, place: &Place, domain: &str) -> anyhow::Result<(Guest, GuestMemory)> {
    let guest = Guest::connect(&place.directory().join("guest"))?;
    guest.wait_ready(BOOT_TIMEOUT, || Ok(()))?;
    let pid = host.qemu(domain)?;
    let mut qmp = Qmp::connect(&place.directory().join("qmp"))?;
    let memory = GuestMemory::find(pid, MEMORY, &mut qmp)?;
    ensure!(memory.is_aligned(), "QEMU maps the memory where no huge page can be");
    Ok((guest, memory))
}

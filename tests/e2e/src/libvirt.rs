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

use anyhow::{bail, ensure, Context};
use clap::Args;
use gemini_guest::protocol::PORT_NAME;

use crate::accel::AccelChoice;
use crate::attached;
use crate::daemon::{Daemon, DaemonConfig};
use crate::guest::Guest;
use crate::lab::{Bench, Place, SYNC_TIMEOUT};
use crate::outside::GuestMemory;
use crate::process::{self, Guarded};
use crate::qmp::Qmp;
use crate::vm::log_directory;

const MEMORY: u64 = 1 << 30;
const START_TIMEOUT: Duration = Duration::from_secs(30);
const BOOT_TIMEOUT: Duration = Duration::from_secs(180);
const DOMAIN: &str = "gemini-test";

/// Where scripts/test-libvirt puts the patched QEMU, as docs/libvirt.md says.
const EMULATOR: &str = "/opt/virtio-gemini/bin/qemu-system-x86_64";

/// `gemini-lab libvirt`
#[derive(Args, Clone, Debug)]
pub struct LibvirtArgs {
    /// Debian root with libvirt in it
    #[arg(long, value_name = "DIRECTORY")]
    root: PathBuf,
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
    let host = Libvirt::start(args)?;
    host.define_examples()?;

    let place = Place::new("libvirt-daemon")?;
    let user = host.user()?;
    // The socket's directory belongs to whom libvirt runs QEMU as.
    chown(place.directory(), Some(user.0), Some(user.1))?;
    let config = daemon_config(&bench, &place, user)?;
    let original = host.domain(&bench, &place)?;
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

    host.virsh(&["destroy", DOMAIN])?;
    process::wait_for("the daemon notices", SYNC_TIMEOUT, || {
        Ok((!running.daemon.status()?.connected).then_some(()))
    })?;
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
    virt_xml: PathBuf,
    examples: PathBuf,
    // Ended in this order.
    _libvirtd: Guarded,
    _virtlogd: Guarded,
}

impl Libvirt {
    fn start(args: &LibvirtArgs) -> anyhow::Result<Self> {
        let logs = log_directory("libvirt")?;
        let start = |name: &'static str| {
            let log = logs.join(format!("{name}.log"));
            fs::write(&log, "")?;
            let mut command = Command::new("chroot");
            command.arg(&args.root).arg(name);
            Guarded::start(name, command, &log)
        };
        let virtlogd = start("virtlogd")?;
        let mut libvirtd = start("libvirtd")?;
        let host = |libvirtd| Libvirt {
            root: args.root.clone(),
            virt_xml: args.virt_xml.clone(),
            examples: args.examples.clone(),
            _libvirtd: libvirtd,
            _virtlogd: virtlogd,
        };
        process::wait_for("libvirtd answers", START_TIMEOUT, || {
            libvirtd.expect_running()?;
            let answer = virsh(&args.root, &["uri"]).output()?;
            Ok(answer.status.success().then_some(()))
        })?;
        Ok(host(libvirtd))
    }

    fn virsh(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = virsh(&self.root, arguments).output()?;
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

    /// libvirt takes each domain that is shipped, and the tool knows it.
    fn define_examples(&self) -> anyhow::Result<()> {
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
            self.virsh(&["undefine", "gemini-example"])?;
            self.virt_xml(&["remove"], &xml)?;
            count += 1;
        }
        ensure!(count > 0, "no domain in {}", self.examples.display());
        step(&format!("{count} shipped domains are taken"));
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

    /// A domain as a user has it: without the device, with arguments of its own.
    fn domain(&self, bench: &Bench, place: &Place) -> anyhow::Result<String> {
        let boot = self.root.join("boot");
        for (from, name) in [
            (&bench.assets.guest.kernel, "test-kernel"),
            (&bench.assets.guest.initrd, "test-initrd"),
        ] {
            fs::copy(from, boot.join(name))?;
            fs::set_permissions(boot.join(name), Permissions::from_mode(0o644))?;
        }
        let directory = place.directory().display();
        Ok(format!(
            "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{DOMAIN}</name>
  <memory unit='MiB'>{}</memory>
  <vcpu>2</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>/boot/test-kernel</kernel>
    <initrd>/boot/test-initrd</initrd>
    <cmdline>console=ttyS0 quiet panic=-1 transparent_hugepage=always gemini.driver=1</cmdline>
  </os>
  <features>
    <acpi/>
  </features>
  <cpu mode='maximum'/>
  <on_reboot>restart</on_reboot>
  <devices>
    <emulator>{EMULATOR}</emulator>
    <serial type='null'/>
    <channel type='unix'>
      <source mode='bind' path='{directory}/guest'/>
      <target type='virtio' name='{PORT_NAME}'/>
    </channel>
    <memballoon model='none'/>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-qmp'/>
    <qemu:arg value='unix:{directory}/qmp,server=on,wait=off'/>
  </qemu:commandline>
</domain>
",
            MEMORY >> 20
        ))
    }
}

fn virsh(root: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("chroot");
    command.arg(root).args(["virsh", "-q", "-c", "qemu:///system"]).args(arguments);
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
        let (guest, memory) = boot(host, place)?;
        Ok(Running { guest, memory, daemon })
    }

    fn start_with_late_daemon(
        host: &Libvirt,
        place: &Place,
        config: &DaemonConfig,
    ) -> anyhow::Result<Self> {
        let (guest, memory) = boot(host, place)?;
        Ok(Running { guest, memory, daemon: place.start(config)? })
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

fn boot(host: &Libvirt, place: &Place) -> anyhow::Result<(Guest, GuestMemory)> {
    host.virsh(&["start", DOMAIN])?;
    let guest = Guest::connect(&place.directory().join("guest"))?;
    guest.wait_ready(BOOT_TIMEOUT, || Ok(()))?;
    let path = host.root.join(format!("run/libvirt/qemu/{DOMAIN}.pid"));
    let pid = fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}", path.display()))?
        .trim()
        .parse()?;
    let mut qmp = Qmp::connect(&place.directory().join("qmp"))?;
    let memory = GuestMemory::find(pid, MEMORY, &mut qmp)?;
    ensure!(memory.is_aligned(), "QEMU maps the memory where no huge page can be");
    Ok((guest, memory))
}

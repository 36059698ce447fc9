//! What can still be done inside the sandbox, and what cannot: by a process that is in the very one
//! of the daemon.

#![allow(clippy::unwrap_used)] // a test that cannot go on must fail

mod common;

use common::*;
use std::path::Path;
use tempfile::TempDir;

const SERVICE: u32 = 64_123;

#[test]
fn helper_process() {
    child::serve();
}

/// A directory that the sandbox leaves in view, with a file, and a VMM.
struct Scene {
    directory: TempDir,
    vmm: Child,
    file: std::fs::File,
}

impl Scene {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("file"), "contents").unwrap();
        // A service user is to reach it.
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(directory.path(), mode).unwrap();
        let file = memfd(BLOCK, 0);
        Self { directory, vmm: Child::vmm(&file), file }
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().unwrap().to_owned()
    }

    /// A process inside, after it has become what `rights` says, if that says anything.
    fn inside(&self, rights: Option<&str>, creates: bool) -> Child {
        let mut child = Child::spawn(&self.file);
        if let Some(rights) = rights {
            child.ask(rights);
        }
        let directory = self.directory.path().display();
        child.ask(&format!("sandbox {directory} {}", u8::from(creates)));
        child
    }
}

fn service() -> String {
    format!("become {SERVICE} sys_nice")
}

/// With what the packaged service has when it starts.
fn packaged_service() -> String {
    format!("become {SERVICE} sys_nice sys_admin")
}

fn forbidden_calls_end(rights: Option<&str>) {
    let scene = Scene::new();
    let (vmm, file) = (scene.vmm.pid(), scene.path("file"));
    for attempt in [
        "socket 1",  // AF_UNIX
        "socket 2",  // AF_INET
        "socket 16", // AF_NETLINK
        "fork",
        "execute /bin/true",
        "namespace",
        "clone-namespace",
        "code",
        "terminal",
        "dumpable",
        &format!("count {vmm} 0"), // on a processor, whatever runs there
        &format!("trace {vmm}"),
        &format!("signal {vmm}"),
        &format!("page-out {vmm}"),
        &format!("write /proc/{vmm}/mem"),
        &format!("write {file}"),
        &format!("truncate {file}"),
        &format!("create {}", scene.path("new")),
        &format!("rename {file} {}", scene.path("new")),
    ] {
        let end = scene.inside(rights, false).dies_of(&format!("try {attempt}"));
        assert_eq!(end, Ok(libc::SIGSYS), "{attempt}");
    }
    // Nor may those do more that may make files.
    for attempt in [format!("write {file}"), format!("truncate {file}")] {
        let end = scene.inside(rights, true).dies_of(&format!("try {attempt}"));
        assert_eq!(end, Ok(libc::SIGSYS), "{attempt}");
    }
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "contents");
}

#[test]
fn calls_that_the_daemon_has_no_use_for_end_it() {
    forbidden_calls_end(None);
}

#[test]
fn calls_that_the_daemon_has_no_use_for_end_it_as_a_service_user() {
    let test = "calls_that_the_daemon_has_no_use_for_end_it_as_a_service_user";
    if host::is_root(test) {
        forbidden_calls_end(Some(&service()));
    }
}

#[test]
fn what_the_daemon_has_a_use_for_works() {
    let scene = Scene::new();
    let mut child = scene.inside(None, true);
    let (file, new) = (scene.path("file"), scene.path("new"));
    for attempt in [
        "thread",
        "read /proc/meminfo",
        &format!("read /proc/{}/maps", scene.vmm.pid()),
        &format!("read /proc/{}/pagemap", scene.vmm.pid()),
        "read /sys/kernel/mm/transparent_hugepage/shmem_enabled",
        &format!("read {file}"),
        &format!("create {new}"),
        &format!("rename {new} {file}"),
        &format!("remove {file}"),
    ] {
        assert_eq!(child.ask(&format!("try {attempt}")), "done", "{attempt}");
    }
    assert!(!Path::new(&file).exists() && !Path::new(&new).exists());
    // The kernel is asked, and finds no description of what to count.
    let count = child.ask(&format!("try count {} -1", scene.vmm.pid()));
    assert_eq!(count, format!("errno {}", libc::EFAULT));
    assert_eq!(child.ask("open"), "[]");
    assert_eq!(child.ask("scan 0 1"), "scan 1*absent");
}

#[test]
fn files_that_the_daemon_has_no_use_for_are_out_of_view() {
    if !host::is_root("files_that_the_daemon_has_no_use_for_are_out_of_view") {
        return;
    }
    out_of_view(None);
    out_of_view(Some(&packaged_service()));
}

fn out_of_view(rights: Option<&str>) {
    let mut scene = Scene::new();
    if rights.is_some() {
        // The daemon's user is the VMM's.
        scene.vmm.ask(&format!("become {SERVICE}"));
    }
    let vmm = scene.vmm.pid();
    std::os::unix::fs::symlink("/proc/self/root/etc/passwd", scene.path("link")).unwrap();
    let mut child = scene.inside(rights, true);
    for (attempt, errno) in [
        ("read /etc/passwd", libc::ENOENT),
        ("read /dev/null", libc::ENOENT),
        ("read /sys/module", libc::ENOENT),
        (&format!("read {}", scene.path("link")), libc::ELOOP),
        // The ways that /proc offers out of a namespace.
        (&format!("read /proc/{vmm}/root/etc/passwd"), libc::ELOOP),
        (&format!("read /proc/{vmm}/cwd/."), libc::ELOOP),
        (&format!("read /proc/{vmm}/fd/0"), libc::ELOOP),
        (&format!("read /proc/{}/fd/../root/etc/passwd", child.pid()), libc::ELOOP),
        // Nothing but its own directories can be changed.
        ("create /new", libc::EROFS),
        ("create /sys/kernel/mm/new", libc::EROFS),
        ("remove /proc/meminfo", libc::EROFS),
    ] {
        assert_eq!(child.ask(&format!("try {attempt}")), format!("errno {errno}"), "{attempt}");
    }
    assert_eq!(child.ask(&format!("try create {}", scene.path("new"))), "done");
    assert_eq!(child.ask("open"), "[]");
}

#[test]
fn capabilities_that_the_daemon_has_no_use_for_are_given_up() {
    if !host::is_root("capabilities_that_the_daemon_has_no_use_for_are_given_up") {
        return;
    }
    // CAP_DAC_READ_SEARCH, CAP_SYS_PTRACE, CAP_SYS_NICE, CAP_PERFMON.
    const USED: u64 = 1 << 2 | 1 << 19 | 1 << 23 | 1 << 38;
    let scene = Scene::new();
    for (rights, left) in
        [(None, USED), (Some(service()), 1 << 23), (Some(packaged_service()), 1 << 23)]
    {
        let child = scene.inside(rights.as_deref(), false);
        // Of the thread that is inside: the one that reports tests is not.
        let tasks = std::fs::read_dir(format!("/proc/{}/task", child.pid())).unwrap();
        let statuses =
            tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("status")));
        let inside = statuses.map(Result::unwrap).find(|status| {
            ["CapPrm", "CapEff"]
                .iter()
                .all(|set| status.contains(&format!("{set}:\t{left:016x}\n")))
        });
        let inside = inside.unwrap_or_else(|| panic!("{rights:?}: no thread has {left:#x}"));
        assert!(inside.contains("NoNewPrivs:\t1\n") && inside.contains("Seccomp:\t2\n"));
    }
}

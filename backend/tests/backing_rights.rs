//! Who may collapse at the VMM, what happens to those who may not, and who pays: all of it inside
//! the sandbox, as the daemon is.

#![allow(clippy::unwrap_used)] // a test that cannot go on must fail

mod common;

use common::host::{Cgroup, Lock, Setting};
use common::*;

/// A user that owns nothing on any system.
const SERVICE: u32 = 64_123;
const BLOCKS: u64 = 16;

#[test]
fn helper_process() {
    child::serve();
}

/// A VMM and a daemon, each in a memory cgroup, the daemon as a service user with capabilities,
/// the VMM as that user. All blocks but the last are resident.
struct Scene {
    vmm: Child,
    daemon: Child,
    vmm_group: Cgroup,
    daemon_group: Cgroup,
    _setting: Setting,
    lock: Lock,
}

fn scene(test: &str, daemon_rights: &str) -> Option<Scene> {
    if !host::is_root(test) {
        return None;
    }
    let (Some(vmm_group), Some(daemon_group)) = (Cgroup::new("vmm"), Cgroup::new("daemon")) else {
        host::skipped(test, "there is no memory cgroup controller");
        return None;
    };
    let lock = Lock::take();
    let setting = Setting::shmem_enabled(&lock, "never");
    let file = memfd(BLOCKS * BLOCK, 0);
    let mut vmm = Child::spawn(&file);
    vmm_group.add(vmm.pid());
    vmm.ask(&format!("become {SERVICE}"));
    vmm.ask(&format!("map 0 {} 0 shared", BLOCKS * BLOCK));
    vmm.fill(0, 0, (BLOCKS - 1) * 512);
    let mut daemon = Child::spawn(&file);
    daemon_group.add(daemon.pid());
    daemon.ask(daemon_rights);
    Some(Scene { vmm, daemon, vmm_group, daemon_group, _setting: setting, lock })
}

impl Scene {
    /// Has the daemon shut itself in and look at the memory; the codes of what it finds.
    fn open(&mut self) -> String {
        self.daemon.ask("sandbox /nonexistent 0");
        self.daemon.ask("open")
    }

    fn collapse_all(&mut self) {
        let copied = vec!["Ok(Copied { bytes: 2097152 })"; usize::try_from(BLOCKS).unwrap() - 1];
        let answer = self.daemon.ask(&format!("collapse 0 {BLOCKS}"));
        assert_eq!(answer, format!("{} Err(Absent)", copied.join(" ")));
        self.populate_last();
        assert_eq!(self.daemon.ask(&format!("scan 0 {BLOCKS}")), format!("scan {BLOCKS}*huge"));
        assert!(self.vmm.is_filled(0, 0, (BLOCKS - 1) * 512));
        assert!(self.vmm.is_zero(BLOCKS - 1, 0, 512));
        assert_eq!(self.vmm.huge_blocks(), BLOCKS);
    }

    fn populate_last(&mut self) {
        assert_eq!(self.daemon.ask(&format!("populate {}", BLOCKS - 1)), "Ok(Populated)");
    }

    fn charged(&self) -> (u64, u64) {
        (self.vmm_group.charged(), self.daemon_group.charged())
    }

    /// Collapses and populates everything, and checks how many blocks that adds to what is
    /// charged to the VMM and to the daemon.
    fn collapse_all_charging(&mut self, vmm: i64, daemon: i64) {
        self.charging(Self::collapse_all, vmm, daemon);
    }

    fn charging(&mut self, action: impl FnOnce(&mut Self), vmm: i64, daemon: i64) {
        let before = self.charged();
        action(self);
        let after = self.charged();
        for (who, before, after, expected) in
            [("VMM", before.0, after.0, vmm), ("daemon", before.1, after.1, daemon)]
        {
            let grown = i64::try_from(after).unwrap() - i64::try_from(before).unwrap();
            let block = i64::try_from(BLOCK).unwrap();
            // The kernel charges in batches, and the processes have other memory too.
            assert!(
                (grown - expected * block).abs() < block,
                "the {who}'s charge grew by {grown} bytes instead of {expected} blocks"
            );
        }
    }
}

#[test]
fn service_user_with_sys_nice_collapses_at_the_vmm_and_the_vmm_pays() {
    let test = "service_user_with_sys_nice_collapses_at_the_vmm_and_the_vmm_pays";
    let Some(mut scene) = scene(test, &format!("become {SERVICE} sys_nice")) else { return };
    assert_eq!(scene.open(), "[]");
    scene.collapse_all_charging(1, 0);
}

#[test]
fn in_a_namespace_of_its_own_it_collapses_at_the_vmm_as_well() {
    let test = "in_a_namespace_of_its_own_it_collapses_at_the_vmm_as_well";
    let rights = format!("become {SERVICE} sys_nice sys_admin");
    let Some(mut scene) = scene(test, &rights) else { return };
    assert_eq!(scene.open(), "[]");
    scene.collapse_all_charging(1, 0);
}

#[test]
fn vmm_pays_for_populated_blocks_where_faults_give_huge_pages() {
    let test = "vmm_pays_for_populated_blocks_where_faults_give_huge_pages";
    let Some(mut scene) = scene(test, &format!("become {SERVICE} sys_nice")) else { return };
    let _always = Setting::shmem_enabled(&scene.lock, "always");
    assert_eq!(scene.open(), "[]");
    scene.charging(Scene::populate_last, 1, 0);
    assert_eq!(scene.vmm.huge_blocks(), 1);
}

#[test]
fn service_user_without_rights_falls_back_and_says_who_pays() {
    let test = "service_user_without_rights_falls_back_and_says_who_pays";
    let Some(mut scene) = scene(test, &format!("become {SERVICE}")) else { return };
    assert_eq!(scene.open(), "[collapse-not-permitted]");
    // The consequence that the finding announces.
    scene.collapse_all_charging(-15, 16);
}

#[test]
fn fallback_respects_a_vmm_that_declined_huge_pages() {
    let test = "fallback_respects_a_vmm_that_declined_huge_pages";
    let Some(mut scene) = scene(test, &format!("become {SERVICE}")) else { return };
    scene.vmm.ask(&format!("advise 0 {} nohuge", BLOCKS * BLOCK));
    assert_eq!(scene.open(), "[vmm-declines-huge-pages]");
    assert_eq!(scene.daemon.ask("collapse 0 1"), "Err(Unsupported)");
    assert_eq!(scene.daemon.ask(&format!("populate {}", BLOCKS - 1)), "Err(Unsupported)");
    assert_eq!(scene.vmm.resident(BLOCKS - 1), 0);
}

#[test]
fn vmm_that_is_not_dumpable_needs_sys_ptrace() {
    let test = "vmm_that_is_not_dumpable_needs_sys_ptrace";
    let nice = format!("become {SERVICE} sys_nice");
    let Some(mut scene) = scene(test, &nice) else { return };
    scene.vmm.ask("dumpable 0");
    assert_eq!(scene.open(), "[vmm-not-found]");
    scene.collapse_all_charging(-15, 16);
}

#[test]
fn vmm_that_is_not_dumpable_is_reached_with_sys_ptrace() {
    let test = "vmm_that_is_not_dumpable_is_reached_with_sys_ptrace";
    let rights = format!("become {SERVICE} sys_nice sys_ptrace");
    let Some(mut scene) = scene(test, &rights) else { return };
    scene.vmm.ask("dumpable 0");
    // Collapsing is permitted; the pagemap belongs to root and stays closed.
    assert_eq!(scene.open(), "[vmm-page-tables-hidden]");
    scene.collapse_all_charging(1, 0);
}

#[test]
fn daemon_of_another_user_falls_back() {
    let test = "daemon_of_another_user_falls_back";
    let rights = format!("become {} sys_nice", SERVICE + 1);
    let Some(mut scene) = scene(test, &rights) else { return };
    assert_eq!(scene.open(), "[vmm-not-found]");
    scene.collapse_all_charging(-15, 16);
}

#[test]
fn daemon_of_another_user_reaches_the_vmm_with_sys_ptrace() {
    let test = "daemon_of_another_user_reaches_the_vmm_with_sys_ptrace";
    let rights = format!("become {} sys_nice sys_ptrace", SERVICE + 1);
    let Some(mut scene) = scene(test, &rights) else { return };
    // The pagemap is a file of the VMM's user.
    assert_eq!(scene.open(), "[vmm-page-tables-hidden]");
    scene.collapse_all_charging(1, 0);
}

#[test]
fn daemon_of_another_user_sees_the_page_tables_with_dac_read_search() {
    let test = "daemon_of_another_user_sees_the_page_tables_with_dac_read_search";
    let rights = format!("become {} sys_nice sys_ptrace dac_read_search", SERVICE + 1);
    let Some(mut scene) = scene(test, &rights) else { return };
    assert_eq!(scene.open(), "[]");
    scene.collapse_all_charging(1, 0);
}

#[test]
fn landlock_cuts_the_daemon_off() {
    let test = "landlock_cuts_the_daemon_off";
    let Some(mut scene) = scene(test, &format!("become {SERVICE} sys_nice")) else { return };
    scene.daemon.ask("landlock");
    assert_eq!(scene.open(), "[vmm-not-found]");
}

#[test]
fn daemon_that_is_not_dumpable_says_what_it_cannot_see() {
    let test = "daemon_that_is_not_dumpable_says_what_it_cannot_see";
    let Some(mut scene) = scene(test, &format!("become {SERVICE} sys_nice")) else { return };
    // As a program with file capabilities is.
    scene.daemon.ask("dumpable 0");
    assert_eq!(scene.open(), "[own-page-tables-hidden]");
    scene.collapse_all_charging(1, 0);
}

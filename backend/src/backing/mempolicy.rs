//! On which memory nodes the VMM wants its memory, so that pages which are allocated for it come
//! from where its own touch would have taken them: allocating in a hugetlb file follows the policy
//! of the thread that does it, and knows nothing of the one that the VMM gave its mapping.

use super::process::own_proc;
use super::sys;
use super::vmm::Vmm;
use std::io;

/// Where the kernel tells of memory nodes.
pub const NODES: &str = "/sys/devices/system/node";

/// A set of memory nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Nodes([u64; Nodes::WORDS]);

impl Nodes {
    /// One past the largest node number.
    pub const MOST: u32 = 1024;
    const WORDS: usize = Self::MOST as usize / 64;

    /// The nodes of a list as the kernel writes it: `0-2,5`.
    pub fn parse(list: &str) -> Option<Self> {
        let mut nodes = Self::default();
        for part in list.trim().split(',').filter(|part| !part.is_empty()) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
            if last >= Self::MOST {
                return None;
            }
            (first..=last).for_each(|node| nodes.insert(node));
        }
        Some(nodes)
    }

    fn insert(&mut self, node: u32) {
        if let Some(word) = self.0.get_mut(node as usize / 64) {
            *word |= 1 << (node % 64);
        }
    }

    fn of(node: u32) -> Self {
        let mut nodes = Self::default();
        nodes.insert(node);
        nodes
    }

    /// The nodes, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        (0..Self::MOST).filter(|node| self.0[*node as usize / 64] & (1 << (node % 64)) != 0)
    }

    /// How many there are.
    pub fn len(&self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }
}

/// How a thread chooses nodes. The values are those of linux/mempolicy.h.
#[repr(i32)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// The node of the processor.
    #[default]
    Default = 0,
    /// These first, then any.
    Preferred = 1,
    /// These alone.
    Bind = 2,
    /// These in turn.
    Interleave = 3,
    /// The node of the processor, whatever the task's policy.
    Local = 4,
    /// These first, then any; several.
    PreferredMany = 5,
    /// These in turn, by the host's weights.
    WeightedInterleave = 6,
}

/// A memory policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// How nodes are chosen.
    pub mode: Mode,
    /// From which.
    pub nodes: Nodes,
}

impl Policy {
    /// The only nodes that it takes memory from, where there are such.
    pub fn binding(&self) -> Option<&Nodes> {
        (self.mode == Mode::Bind).then_some(&self.nodes)
    }

    /// The policy of a line of /proc/PID/numa_maps, behind the address.
    fn parse(line: &str) -> Option<Self> {
        // Longest first: two of the names begin like others.
        const NAMES: [(&str, Mode); 8] = [
            ("weighted interleave", Mode::WeightedInterleave),
            ("prefer (many)", Mode::PreferredMany),
            ("interleave", Mode::Interleave),
            ("preferred", Mode::Preferred),
            ("prefer", Mode::Preferred),
            ("default", Mode::Default),
            ("local", Mode::Local),
            ("bind", Mode::Bind),
        ];
        let (name, mode) = NAMES.into_iter().find(|(name, _)| line.starts_with(name))?;
        let rest = line[name.len()..].split(' ').next()?;
        // "=static", "=relative" and the like say how the nodes came about: those told are in
        // force.
        let nodes = match rest.rsplit_once(':') {
            Some((_, list)) => Nodes::parse(list)?,
            None => Nodes::default(),
        };
        let needs_nodes = !matches!(mode, Mode::Default | Mode::Local);
        (needs_nodes == (nodes.len() > 0)).then_some(Self { mode, nodes })
    }
}

/// The line of `numa_maps` for the mapping around `addr`, behind the address. It tells where
/// mappings begin, not where they end.
fn line_at(numa_maps: &str, addr: u64) -> Option<&str> {
    numa_maps
        .lines()
        .filter_map(|line| {
            let (start, rest) = line.split_once(' ')?;
            Some((u64::from_str_radix(start, 16).ok()?, rest))
        })
        .take_while(|(start, _)| *start <= addr)
        .last()
        .map(|(_, rest)| rest)
}

/// The node on which most of a mapping's pages are.
fn busiest_node(line: &str) -> Option<u32> {
    line.split(' ')
        .filter_map(|word| {
            let (node, pages) = word.strip_prefix('N')?.split_once('=')?;
            Some((pages.parse::<u64>().ok()?, node.parse::<u32>().ok()?))
        })
        .max_by_key(|(pages, node)| (*pages, std::cmp::Reverse(*node)))
        .map(|(_, node)| node)
}

/// The policy for a thread that allocates what a process would at `addr`, from its `numa_maps` and
/// the nodes that it and we may use.
fn policy_for(numa_maps: &str, addr: u64, theirs: &Nodes, ours: &Nodes) -> Option<Policy> {
    let line = line_at(numa_maps, addr)?;
    let policy = Policy::parse(line)?;
    if !matches!(policy.mode, Mode::Default | Mode::Local) {
        return Some(policy);
    }
    // By the node of the processor that touches it: ours is none of the guest's, so pages go where
    // the others are, and never to nodes that the VMM may not use.
    if theirs != ours {
        return Some(Policy { mode: Mode::Bind, nodes: *theirs });
    }
    Some(match busiest_node(line) {
        Some(node) => Policy { mode: Mode::Preferred, nodes: Nodes::of(node) },
        None => Policy::default(),
    })
}

/// The nodes with memory; one where the kernel knows no others.
pub fn with_memory() -> Nodes {
    let list = std::fs::read_to_string(format!("{NODES}/has_memory"));
    list.ok().and_then(|list| Nodes::parse(&list)).unwrap_or_else(|| Nodes::of(0))
}

/// The nodes that a process may use, from /proc/PID/status.
fn allowed(status: &str) -> Option<Nodes> {
    let list = status.lines().find_map(|line| line.strip_prefix("Mems_allowed_list:"))?;
    Nodes::parse(list)
}

/// The policy for what is allocated in the VMM's name at its address `addr`.
///
/// # Errors
/// If it cannot be told.
pub fn of(vmm: &Vmm, addr: u64) -> io::Result<Policy> {
    let read = |path: String| std::fs::read_to_string(path);
    let pid = vmm.pid();
    let maps = read(format!("/proc/{pid}/numa_maps"))?;
    let theirs = allowed(&read(format!("/proc/{pid}/status"))?);
    let ours = allowed(&std::fs::read_to_string(own_proc()?.join("status"))?);
    // What was read was the VMM's only if it still runs.
    let policy = match (theirs, ours) {
        (Some(theirs), Some(ours)) if vmm.is_alive() => policy_for(&maps, addr, &theirs, &ours),
        _ => None,
    };
    policy.ok_or_else(|| io::Error::other("not understood"))
}

/// Does something under a policy, and puts the thread's own one back.
///
/// # Errors
/// If the kernel does not let us have the policy: then nothing was done.
pub fn under<T>(policy: &Policy, action: impl FnOnce() -> T) -> io::Result<T> {
    struct PutBack(i32, Nodes);
    impl Drop for PutBack {
        fn drop(&mut self) {
            if let Err(error) = sys::set_mempolicy(self.0, &self.1 .0) {
                log::error!("cannot put a thread's memory policy back: {error}");
            }
        }
    }
    let mut nodes = Nodes::default();
    let mode = sys::get_mempolicy(&mut nodes.0)?;
    sys::set_mempolicy(policy.mode as i32, &policy.nodes.0)?;
    let _put_back = PutBack(mode, nodes);
    Ok(action())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn nodes(list: &str) -> Nodes {
        Nodes::parse(list).unwrap()
    }

    #[test]
    fn lists_of_nodes_are_parsed() {
        assert_eq!(nodes("0-2,5").iter().collect::<Vec<_>>(), [0, 1, 2, 5]);
        assert_eq!(nodes("\t3\n").iter().collect::<Vec<_>>(), [3]);
        assert_eq!(nodes("").len(), 0);
        for bad in ["x", "0-", "-1", "4096", "0-4096"] {
            assert_eq!(Nodes::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn every_form_of_policy_is_parsed() {
        let policy = |mode, list| Some(Policy { mode, nodes: nodes(list) });
        for (line, expected) in [
            ("default file=/memfd:x\\040(deleted) huge", policy(Mode::Default, "")),
            ("local huge", policy(Mode::Local, "")),
            ("bind:1 file=/a huge dirty=2 N1=2", policy(Mode::Bind, "1")),
            ("bind=static:0-1 huge", policy(Mode::Bind, "0-1")),
            ("prefer:1 huge", policy(Mode::Preferred, "1")),
            ("prefer (many):0-1 huge", policy(Mode::PreferredMany, "0-1")),
            ("interleave=relative:0,2 huge", policy(Mode::Interleave, "0,2")),
            ("weighted interleave:0-1 huge", policy(Mode::WeightedInterleave, "0-1")),
            ("bind huge", None),
            ("sometimes:0 huge", None),
            ("", None),
        ] {
            assert_eq!(Policy::parse(line), expected, "{line}");
        }
    }

    #[test]
    fn what_the_vmm_left_to_the_kernel_stays_with_its_other_pages() {
        let maps = "1000 default file=/a N0=900\n\
                    20000 default file=/memfd:b huge N0=3 N1=7\n\
                    90000 bind:1 stack\n";
        let (all, one) = (nodes("0-1"), nodes("1"));
        let preferred = Policy { mode: Mode::Preferred, nodes: one };
        assert_eq!(policy_for(maps, 0x2_1000, &all, &all), Some(preferred));
        let bound = Policy { mode: Mode::Bind, nodes: one };
        assert_eq!(policy_for(maps, 0x2_1000, &one, &all), Some(bound));
        assert_eq!(policy_for(maps, 0x9_0000, &all, &all), Some(bound));
        assert_eq!(policy_for(maps, 0xfff, &all, &all), None);
        let untouched = "20000 default file=/memfd:b huge\n";
        assert_eq!(policy_for(untouched, 0x2_0000, &all, &all), Some(Policy::default()));
    }

    #[test]
    fn a_policy_is_in_force_for_the_action_alone() {
        let read = || {
            let mut nodes = Nodes::default();
            sys::get_mempolicy(&mut nodes.0).map(|mode| (mode, nodes))
        };
        let Ok(before) = read() else {
            eprintln!("not tested: memory policies are not to be had here");
            return;
        };
        let bind = Policy { mode: Mode::Bind, nodes: Nodes::of(0) };
        match under(&bind, read) {
            Ok(inside) => assert_eq!(inside.unwrap(), (Mode::Bind as i32, Nodes::of(0))),
            Err(error) => eprintln!("not tested: {error}"),
        }
        assert_eq!(read().unwrap(), before);
        let nowhere = Policy { mode: Mode::Bind, nodes: Nodes::of(Nodes::MOST - 1) };
        assert!(under(&nowhere, || panic!("done nevertheless")).is_err());
        assert_eq!(read().unwrap(), before);
    }

    proptest! {
        #[test]
        fn any_line_is_survived(text in "\\PC*", addr in any::<u64>()) {
            let _ = policy_for(&text, addr, &Nodes::of(0), &Nodes::of(0));
            let _ = Nodes::parse(&text);
        }
    }
}

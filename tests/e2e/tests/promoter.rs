//! The promoter in a real guest: what its plan says, what the guest's page
//! flags and page tables say afterwards, and that no byte changed.

use std::time::Duration;

use anyhow::{ensure, Context};
use gemini_e2e::lab::{Bench, Lab};
use gemini_e2e::process;
use gemini_e2e::{BLOCK, MIB};
use gemini_guest::protocol::{BlockState, Break, PageSize};
use serde_json::Value;

/// How long a hint may take.
const FOLLOW: Duration = Duration::from_secs(20);

/// A guest that gives base pages at first touch, and whose kernel promotes next
/// to nothing by itself.
fn start(bench: &Bench, name: &str) -> anyhow::Result<Lab> {
    let lab = Lab::start(bench, name, "gemini", |config| config.guest_thp = "madvise".into())?;
    lab.vm.guest.shell(
        "cd /sys/kernel/mm/transparent_hugepage/khugepaged && \
         echo 1 > pages_to_scan && echo 3600000 > scan_sleep_millisecs",
    )?;
    Ok(lab)
}

fn allow_huge_pages(lab: &Lab) -> anyhow::Result<()> {
    lab.vm.guest.shell("echo always > /sys/kernel/mm/transparent_hugepage/enabled").map(drop)
}

/// Puts the process that holds the filled memory into a control group with
/// this limit.
fn set_memory_limit(lab: &Lab, limit: &str) -> anyhow::Result<()> {
    lab.vm
        .guest
        .shell(&format!(
            "cd /sys/fs/cgroup && echo +memory > cgroup.subtree_control && mkdir -p limited && \
             echo {limit} > limited/memory.max && echo $PPID > limited/cgroup.procs"
        ))
        .map(drop)
}

/// One pass with all speed, and its report.
fn promote_once(lab: &Lab, arguments: &str) -> anyhow::Result<Value> {
    let command = format!(
        "gemini-guestd --once --json --log-level error --cpu-share 100 --rate 4G {arguments}"
    );
    let text = lab.vm.guest.shell(&command)?;
    serde_json::from_str(&text).with_context(|| format!("no report: {text}"))
}

fn ranges(report: &Value) -> anyhow::Result<&Vec<Value>> {
    report["ranges"].as_array().context("a report has ranges")
}

/// Blocks that are huge pages of user memory, by /proc/kpageflags.
fn huge_blocks(lab: &Lab) -> anyhow::Result<u64> {
    let blocks = lab.vm.guest.blocks()?;
    Ok(blocks.runs.iter().filter(|run| run.state == BlockState::Huge).map(|run| run.count).sum())
}

/// Bytes that huge pages map in mappings that declined huge pages, and in all
/// others, by /proc/PID/smaps of the process that holds the filled memory.
fn mapped_huge(lab: &Lab) -> anyhow::Result<(u64, u64)> {
    let text = lab.vm.guest.shell(
        "cat /proc/$PPID/smaps | awk '/^AnonHugePages:/ { huge = $2 } \
         /^VmFlags:/ { if (/ nh/) declined += huge; else others += huge } \
         END { print declined + 0, others + 0 }'",
    )?;
    let mut words = text.split_whitespace().map(str::parse::<u64>);
    match (words.next(), words.next()) {
        (Some(Ok(declined)), Some(Ok(others))) => Ok((declined << 10, others << 10)),
        _ => anyhow::bail!("awk says {text}"),
    }
}

/// Makes the host's pages huge under the first half of the blocks that are full
/// of user memory, and waits until the driver knows.
fn prepare_half(lab: &Lab) -> anyhow::Result<()> {
    let states = lab.vm.guest.blocks()?;
    let full: Vec<u64> = states
        .runs
        .iter()
        .filter(|run| run.state == BlockState::Base && run.user == 512)
        .flat_map(|run| run.first..run.first + run.count)
        .collect();
    ensure!(full.len() >= 40, "only blocks {full:?} are full of user memory");
    let half = &full[..full.len() / 2];
    for block in half {
        lab.vm.guest.driver_command(&format!("prepare {block} 1"))?;
    }
    process::wait_for("the driver knows what is prepared", FOLLOW, || {
        let runs = lab.vm.guest.driver_blocks()?;
        let huge = |block: &u64| {
            runs.iter()
                .any(|run| (run.first..run.first + run.count).contains(block) && run.host == "huge")
        };
        Ok(half.iter().all(huge).then_some(()))
    })
}

#[test]
fn base_pages_on_host_huge_pages_are_promoted_first() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let lab = start(&bench, "promoter")?;
    let log = lab.vm.guest.log_position()?;
    lab.vm.guest.fill("base", 128 * MIB, 1, PageSize::System)?;
    lab.vm.guest.fill("declined", 16 * MIB, 2, PageSize::Base)?;
    prepare_half(&lab)?;
    let before = huge_blocks(&lab)?;

    // Under `madvise` nobody here asked for huge pages.
    let report = promote_once(&lab, "")?;
    ensure!(ranges(&report)?.is_empty(), "{report}");
    ensure!(report["skipped"]["opted_out"].as_u64() >= Some(64 + 8), "{report}");
    ensure!(huge_blocks(&lab)? == before);

    allow_huge_pages(&lab)?;
    let report = promote_once(&lab, "--dry-run")?;
    ensure!(ranges(&report)?.len() >= 62, "{report}");
    ensure!(report["promoted"] == 0, "{report}");

    // A control group without room for a copy is left alone.
    set_memory_limit(&lab, "3M")?;
    let report = promote_once(&lab, "")?;
    ensure!(ranges(&report)?.len() >= 62, "{report}");
    ensure!(ranges(&report)?.iter().all(|range| range["outcome"] == "headroom"), "{report}");
    ensure!(huge_blocks(&lab)? == before, "{report}");
    set_memory_limit(&lab, "max")?;

    let report = promote_once(&lab, "")?;
    let promoted = report["promoted"].as_u64().context("a number")?;
    ensure!(promoted >= 62 && report["failed"] == 0, "{report}");
    let (seconds, cpu) = (&report["seconds"], &report["cpu_seconds"]);
    eprintln!("{promoted} ranges in {seconds} s, with {cpu} s of the guest's CPU");
    ensure!(report["driver"] == true, "{report}");
    let kinds: Vec<bool> =
        ranges(&report)?.iter().map(|range| range["type2"] == Value::Bool(true)).collect();
    ensure!(kinds.iter().filter(|type2| **type2).count() >= 16, "{report}");
    ensure!(kinds.iter().filter(|type2| !**type2).count() >= 16, "{report}");
    ensure!(kinds.windows(2).all(|pair| pair[0] || !pair[1]), "type-2 is not first: {report}");

    // The page flags have it, and the page tables of just those mappings. The
    // kernel's own promoter may have taken a range on being switched on.
    let now = huge_blocks(&lab)?;
    ensure!((promoted..=promoted + 2).contains(&(now - before)), "{before} before, {now} now");
    let (declined, others) = mapped_huge(&lab)?;
    ensure!(declined == 0, "{declined} bytes of declined memory are huge");
    ensure!(others >= promoted * BLOCK, "{others} bytes huge, {promoted} promoted");
    lab.vm.guest.verify("base")?;
    lab.vm.guest.verify("declined")?;
    let complaints = lab.vm.guest.complaints(log)?;
    ensure!(complaints.is_empty(), "{complaints:?}");
    lab.daemon.stop()
}

/// With nothing left to promote, no process is asked for its memory; with something to
/// promote again, it is promoted.
fn rests_until_memory_changes(lab: &Lab) -> anyhow::Result<()> {
    lab.vm.guest.shell(
        "gemini-guestd --json --interval 1 --cpu-share 20 --log-level error > /tmp/resting 2>&1 &",
    )?;
    let passes = |what: &str| -> anyhow::Result<u64> {
        let count = lab
            .vm
            .guest
            .shell(&format!("awk '/{what}/ {{ n++ }} END {{ print n + 0 }}' /tmp/resting"))?;
        count.trim().parse().with_context(|| format!("no number: {count}"))
    };
    let resting = || Ok((passes("\"unchanged\":true")? > 0).then_some(()));
    process::wait_for("the agent rests", 2 * FOLLOW, resting)?;
    let before = passes("\"promoted\":[1-9]")?;
    lab.vm.guest.break_pages("a", Break::DropHalf, 2)?;
    let at_work = || Ok((passes("\"promoted\":[1-9]")? > before).then_some(()));
    process::wait_for("it works again", FOLLOW, at_work)?;
    lab.vm.guest.shell("killall gemini-guestd").map(drop)
}

#[test]
fn promoter_works_without_the_driver_among_processes_that_come_and_go() -> anyhow::Result<()> {
    let bench = Bench::from_env()?;
    let lab = start(&bench, "promoter-alone")?;
    lab.vm.guest.unload_driver()?;
    let log = lab.vm.guest.log_position()?;
    lab.vm.guest.fill("a", 64 * MIB, 3, PageSize::System)?;
    // Every second range keeps its first half: dense enough to be filled in.
    lab.vm.guest.break_pages("a", Break::DropHalf, 2)?;
    allow_huge_pages(&lab)?;
    let before = huge_blocks(&lab)?;

    // More than its ordinary share, as this guest may be emulated. Ended by
    // SIGTERM, it ends well.
    let output = lab.vm.guest.shell(
        "gemini-guestd --json --interval 1 --cpu-share 20 --log-level error > /tmp/reports & agent=$!; \
         end=$(($(date +%s) + 120)); \
         while [ $(date +%s) -lt $end ] && ! grep -q '\"promoted\":[1-9]' /tmp/reports; \
         do sh -c 'true; sleep 0.1' & sleep 0.02; done; \
         kill -TERM $agent; wait $agent; echo $?; cat /tmp/reports",
    )?;
    let (code, reports) = output.split_once('\n').context("an exit code first")?;
    ensure!(code == "0", "the agent ends with {code}");
    let reports: Vec<Value> =
        reports.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let number = |name: &str| reports.iter().filter_map(|report| report[name].as_u64()).sum();
    let promoted: u64 = number("promoted");
    ensure!(promoted >= 30 && number("failed") == 0, "{reports:?}");
    ensure!(reports.iter().all(|report| report["driver"] == false), "{reports:?}");

    // Density decides: full ranges before those that were filled in.
    let report = reports
        .iter()
        .find(|report| report["promoted"].as_u64() > Some(0))
        .context("a report with work")?;
    let present: Vec<u64> =
        ranges(report)?.iter().filter_map(|range| range["present"].as_u64()).collect();
    ensure!(present.contains(&512) && present.contains(&256), "{report}");
    ensure!(present.windows(2).all(|pair| pair[0] >= pair[1]), "{report}");

    ensure!(huge_blocks(&lab)? >= before + promoted);
    rests_until_memory_changes(&lab)?;
    lab.vm.guest.verify("a")?;
    let complaints = lab.vm.guest.complaints(log)?;
    ensure!(complaints.is_empty(), "{complaints:?}");
    lab.daemon.stop()
}

//! The driver keeps a stock of ready blocks: booked, and backed by host huge
//! pages before anybody asks for them.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{ensure, Context};
use gemini_e2e::lab::{Bench, Lab};
use gemini_e2e::outside::HostState;
use gemini_e2e::process;
use gemini_e2e::{BLOCK, MIB};
use gemini_guest::protocol::{BlockState, Break, PageSize};

/// How long the driver may take to fill a stock, or to let go of it.
const STOCK: Duration = Duration::from_secs(60);

fn set_stock(lab: &Lab, blocks: u64) -> anyhow::Result<()> {
    lab.vm.guest.set_driver("stock_floor", blocks)?;
    lab.vm.guest.set_driver("stock_cap", blocks)
}

fn wait_ready(lab: &Lab, blocks: u64) -> anyhow::Result<()> {
    let mut last = 0;
    process::wait_for(&format!("{blocks} blocks are ready"), STOCK, || {
        last = lab.vm.guest.driver_number("ready")?;
        Ok((last >= blocks).then_some(()))
    })
    .with_context(|| format!("{last} blocks are ready"))
}

/// A guest that holds no block. Its driver looks often: what it does, and what it lets be, takes
/// passes.
fn start_without_stock(bench: &Bench, name: &str) -> anyhow::Result<Lab> {
    let mut lab = Lab::start(bench, name, "gemini", |_| {})?;
    set_stock(&lab, 0)?;
    lab.vm.guest.set_driver("stock_active", 0)?;
    lab.vm.guest.set_driver("census_period_ms", 200)?;
    lab.wait_settled(STOCK)?;
    wait_none_held(&lab)?;
    Ok(lab)
}

fn wait_none_held(lab: &Lab) -> anyhow::Result<()> {
    process::wait_for("the stock is given back", STOCK, || {
        Ok((lab.vm.guest.driver_number("held")? == 0).then_some(()))
    })
}

/// Has a program use a stock of which at least `fresh` blocks are made where the host has nothing:
/// what is free and backed would be used first, so there are as many more, and `left`, of base
/// pages, is in use meanwhile. As much as the stock is made once more if the program is slow to take
/// the first. Returns how many blocks the driver says the host has spent by now; some may have been
/// for the boot.
fn spend(lab: &Lab, left: u64, fresh: u64) -> anyhow::Result<u64> {
    lab.vm.guest.fill("left", left * BLOCK, 7, PageSize::Base)?;
    let backed = lab.view()?.free(HostState::Base).len() + lab.view()?.free(HostState::Huge).len();
    let stocked = fresh + backed as u64;
    let spent_before = lab.vm.guest.driver_number("spent")?;
    let before = lab.memory.resident_bytes()?;
    let look = || -> anyhow::Result<(u64, u64)> {
        let spent = lab.vm.guest.driver_number("spent")?;
        let grown = lab.memory.resident_bytes()?.saturating_sub(before) / BLOCK;
        let now = spent.saturating_sub(spent_before);
        ensure!(now <= grown + 8, "{now} blocks spent, but the guest has grown by {grown}");
        eprintln!("stock of {stocked} ({backed} backed): {now} spent, grown by {grown}");
        Ok((spent, now))
    };
    set_stock(lab, stocked)?;
    wait_ready(lab, stocked)?;
    look()?;
    lab.vm.guest.fill("a", stocked * BLOCK, 9, PageSize::Huge)?;
    set_stock(lab, 0)?;
    wait_none_held(lab)?;
    let (spent, now) = look()?;
    ensure!(now >= fresh / 2, "the host has spent {now} blocks alone");
    Ok(spent)
}

/// While nothing changes the census rests for eight periods; booking looks more often.
fn wait_passes(lab: &Lab, passes: u64) -> anyhow::Result<()> {
    let number = || lab.vm.guest.driver_number("census_passes");
    let wanted = number()? + passes;
    process::wait_for("the driver has looked for long", 2 * STOCK, || {
        Ok((number()? >= wanted).then_some(()))
    })
}

/// Blocks that are ready by the driver's word.
fn ready(lab: &Lab) -> anyhow::Result<Vec<u64>> {
    let runs = lab.vm.guest.driver_blocks()?;
    let ready = runs.iter().filter(|run| run.guest == "booked" && run.host == "huge");
    Ok(ready.flat_map(|run| run.first..run.first + run.count).collect())
}

/// What QEMU's page tables say of these blocks.
fn states_of(lab: &Lab, blocks: Vec<u64>) -> anyhow::Result<Vec<(u64, HostState)>> {
    let host: BTreeMap<u64, HostState> = lab.memory.states()?.into_iter().collect();
    let known = |block: u64| host.get(&block).copied().unwrap_or(HostState::Absent);
    Ok(blocks.into_iter().map(|block| (block, known(block))).collect())
}

/// Blocks that the driver says are ready and QEMU's page tables say are not.
fn not_huge(lab: &Lab) -> anyhow::Result<Vec<u64>> {
    let states = states_of(lab, ready(lab)?)?;
    let not_huge = states.into_iter().filter(|(_, state)| *state != HostState::Huge);
    Ok(not_huge.map(|(block, _)| block).collect())
}

/// Debian's kernels write to what they hand out (`init_on_alloc`): what is booked
/// first and prepared afterwards is copied. Shown with the driver's commands,
/// which do just that; the stock does it the other way round.
#[test]
fn booking_before_preparing_costs_a_copy() -> anyhow::Result<()> {
    const BOOKED: u64 = 32;
    let bench = Bench::from_env()?;
    let lab = Lab::start(&bench, "stock-trap", "gemini", |_| {})?;
    lab.vm.guest.hints_only()?;
    let told = lab.vm.guest.driver_command(&format!("book any {BOOKED}"))?;
    for block in told.lines().filter_map(|line| line.parse::<u64>().ok()) {
        lab.vm.guest.driver_command(&format!("prepare {block}"))?;
    }
    let copied = lab.daemon.status()?.collapse_bytes;
    eprintln!("{BOOKED} blocks booked, then prepared: {copied} bytes copied");
    // Some may have had a huge page before.
    ensure!(copied >= BOOKED / 2 * BLOCK, "{copied} bytes were copied: is init_on_alloc off?");
    lab.daemon.stop()
}

#[test]
fn stock_of_fresh_memory_costs_its_size_and_no_copy_until_it_is_not_needed() -> anyhow::Result<()> {
    const STOCKED: u64 = 64;
    let bench = Bench::from_env()?;
    let mut lab = Lab::start(&bench, "stock-fresh", "gemini", |_| {})?;
    let log = lab.vm.guest.log_position()?;
    let boot = lab.vm.guest.shell("dmesg")?;
    ensure!(boot.contains("heap alloc:on"), "this kernel does not zero what it hands out");

    // What the guest's kernel works with is made huge after the boot, by copies.
    lab.wait_settled(STOCK)?;
    let copied = lab.daemon.status()?.collapse_bytes;
    let before = lab.memory.resident_bytes()?;
    let fresh = lab.view()?.free(HostState::Absent);
    set_stock(&lab, STOCKED)?;
    wait_ready(&lab, STOCKED)?;
    let grown = lab.memory.resident_bytes()?.saturating_sub(before);

    // While they are made ready the allocator may hand them out, which it does from the first on.
    let made = ready(&lab)?.into_iter().filter(|block| fresh.contains(block));
    let first = made.min().context("none of fresh memory is ready")?;
    let behind = fresh.iter().filter(|block| **block >= first).count() as u64;
    ensure!(behind <= STOCKED + 16, "{STOCKED} of {} blocks, from {first} on", fresh.len());

    ensure!(not_huge(&lab)?.is_empty());
    ensure!(
        grown <= (STOCKED + 8) * BLOCK,
        "{STOCKED} blocks made the host's memory grow by {grown}"
    );
    let copied = lab.daemon.status()?.collapse_bytes - copied;
    eprintln!("stock of {STOCKED} blocks: host memory grew by {grown}, {copied} bytes copied");
    ensure!(copied <= 2 * BLOCK, "{copied} bytes were copied");

    set_stock(&lab, 0)?;
    process::wait_for("the stock is given back", STOCK, || {
        Ok((lab.vm.guest.driver_number("held")? == 0).then_some(()))
    })?;
    let left = lab.memory.resident_bytes()?.saturating_sub(before);
    ensure!(left <= 8 * BLOCK, "{left} of the {grown} bytes are still the guest's");
    ensure!(lab.vm.guest.complaints(log)?.is_empty());
    lab.daemon.stop()
}

/// What a long burst needed was ready for long when it ends, and cost the host's memory all the same.
#[test]
fn an_old_stock_goes_to_the_host_as_a_young_one_does() -> anyhow::Result<()> {
    const STOCKED: u64 = 24;
    // Longer than the driver lets surplus blocks wait for the host. Nothing happens in that time:
    // that they get old is what this is about.
    const OLD: Duration = Duration::from_secs(12);
    let bench = Bench::from_env()?;
    let mut lab = Lab::start(&bench, "stock-old", "gemini", |_| {})?;
    let guest = |name: &str, lab: &Lab| lab.vm.guest.driver_number(name);
    lab.wait_settled(STOCK)?;
    set_stock(&lab, STOCKED)?;
    wait_ready(&lab, STOCKED)?;
    std::thread::sleep(OLD);
    let (expired, given) = (guest("expired", &lab)?, guest("given_back", &lab)?);
    let not_huge = not_huge(&lab)?;
    ensure!(not_huge.is_empty(), "the host does not have {not_huge:?}");
    let stock = ready(&lab)?;
    let before = lab.memory.resident_bytes()?;
    set_stock(&lab, 0)?;
    process::wait_for("the stock is given back", STOCK, || {
        Ok((guest("held", &lab)? == 0).then_some(()))
    })?;
    let less = before.saturating_sub(lab.memory.resident_bytes()?);
    eprintln!("stock of {STOCKED} blocks: the host has {less} bytes back");
    ensure!(guest("expired", &lab)? == expired, "some went to the allocator alone");
    ensure!(guest("given_back", &lab)? - given >= STOCKED, "the host got too few");
    let enough = less >= (STOCKED - 4) * BLOCK;
    ensure!(enough, "{less} bytes; of the stock are left: {:?}", states_of(&lab, stock)?);
    lab.daemon.stop()
}

/// A program that is moved into a huge page leaves base pages behind, which would cost the host as
/// much again. It gets back what it has spent, and no more.
#[test]
fn what_the_host_spent_on_the_stock_is_repaid_from_free_base_blocks() -> anyhow::Result<()> {
    // An eighth of what is left is in use again soon.
    const FRESH: u64 = 12;
    const LEFT: u64 = 80;
    let bench = Bench::from_env()?;
    let lab = start_without_stock(&bench, "stock-repaid")?;
    let log = lab.vm.guest.log_position()?;
    let number = |name: &str| lab.vm.guest.driver_number(name);

    let spent = spend(&lab, LEFT, FRESH)?;
    lab.vm.guest.free("left")?;
    let before = lab.memory.resident_bytes()?;
    let free = lab.view()?.free(HostState::Base).len() as u64;
    process::wait_for("the host has back what it spent", STOCK, || {
        Ok((number("spent")? == 0).then_some(()))
    })?;
    let less = before.saturating_sub(lab.memory.resident_bytes()?);
    let stay = lab.view()?.free(HostState::Base).len() as u64;
    eprintln!("{spent} blocks spent, {free} left free: {less} bytes back, {stay} stay");
    ensure!(less / BLOCK + 4 >= spent, "the host has {less} bytes back of {spent} blocks");
    ensure!(stay + spent + 4 >= free, "of {free} free blocks {stay} stay, for {spent} spent");

    // What has cost the host nothing beyond it stays, however long it is free.
    ensure!(stay >= 8, "too few are left to tell");
    let given = number("given_back")?;
    wait_passes(&lab, 5)?;
    ensure!(number("given_back")? == given, "the host got what it had not spent");
    let now = lab.view()?.free(HostState::Base).len() as u64;
    ensure!(now + 4 >= stay, "of {stay} free blocks {now} are left, for none spent");
    lab.vm.guest.verify("a")?;
    ensure!(lab.vm.guest.complaints(log)?.is_empty());
    lab.daemon.stop()
}

/// A program of which a little stays in every block leaves no block free: the pages between go.
#[test]
fn what_the_host_spent_is_repaid_from_free_pages_of_sparse_blocks() -> anyhow::Result<()> {
    // An eighth of what is left stays in use.
    const FRESH: u64 = 12;
    const LEFT: u64 = 80;
    const PAGE: u64 = 4096;
    // After so many blocks' worth has gone, all of them are considered anew.
    const FORGIVE: u64 = 8;
    let bench = Bench::from_env()?;
    let lab = start_without_stock(&bench, "sparse-repaid")?;
    let log = lab.vm.guest.log_position()?;
    let number = |name: &str| lab.vm.guest.driver_number(name);

    let spent = spend(&lab, LEFT, FRESH)?;
    let (trimmed, given) = (number("trimmed_pages")?, number("given_back")?);
    let in_use = lab.view()?.in_state(BlockState::Base, HostState::Base);
    let memory_in_use = || -> anyhow::Result<u64> {
        Ok(lab.memory.memory_in(&in_use)?.iter().map(|range| range.end - range.start).sum())
    };
    let before = memory_in_use()?;
    let absent = in_use.len() as u64 * BLOCK - before;
    lab.vm.guest.break_pages("left", Break::DropScattered, 1)?;
    let mut forgiven = 0;
    process::wait_for("the host has back what it spent", STOCK, || {
        // What was trimmed has nothing more to give, whenever it is considered again.
        let gone = (number("trimmed_pages")? - trimmed) * PAGE / BLOCK;
        if gone >= forgiven + FORGIVE {
            lab.vm.guest.driver_command("forgive")?;
            forgiven = gone;
        }
        Ok((number("spent")? == 0).then_some(()))
    })?;
    let less = before.saturating_sub(memory_in_use()?);
    let trimmed = (number("trimmed_pages")? - trimmed) * PAGE;
    let given = number("given_back")? - given;
    eprintln!(
        "{spent} blocks spent: {trimmed} bytes trimmed, {less} back of {before} ({absent} absent), \
         {given} free blocks"
    );
    ensure!(trimmed > BLOCK, "{trimmed} bytes trimmed");
    let repaid = trimmed / BLOCK + given;
    ensure!(repaid.abs_diff(spent) <= 1, "{repaid} blocks repaid of {spent}");
    // Nobody knows which pages the host has; and the guest needs a little meanwhile.
    ensure!(less + absent + 2 * MIB >= trimmed, "the host has {less} bytes back of {trimmed}");
    ensure!(less >= trimmed / 2, "most of what was trimmed was not there");

    // What has cost the host nothing beyond it stays: the blocks that were not trimmed.
    let untrimmed = LEFT * BLOCK / 8 * 7 - trimmed.min(LEFT * BLOCK / 8 * 7);
    ensure!(untrimmed >= 4 * BLOCK, "too little is left to tell: {trimmed} bytes trimmed");
    let (trimmed, before) = (number("trimmed_pages")?, lab.memory.resident_bytes()?);
    wait_passes(&lab, 8)?;
    ensure!(number("trimmed_pages")? == trimmed, "the host got what it had not spent");
    let now = lab.memory.resident_bytes()?;
    ensure!(now + 2 * BLOCK >= before, "the host had {before} bytes, and has {now}");
    lab.vm.guest.verify("left")?;
    lab.vm.guest.verify("a")?;

    // Written to again, it is ordinary memory.
    lab.vm.guest.fill("again", LEFT / 2 * BLOCK, 6, PageSize::Base)?;
    lab.vm.guest.verify("again")?;
    lab.vm.guest.verify("left")?;
    ensure!(lab.vm.guest.complaints(log)?.is_empty());
    lab.daemon.stop()
}

/// Otherwise memory that programs have left stays with the guest beside as much that is made ready.
#[test]
fn stock_is_made_of_what_the_host_has_before_what_it_has_not() -> anyhow::Result<()> {
    const STOCKED: u64 = 48;
    let bench = Bench::from_env()?;
    let mut lab = Lab::start(&bench, "stock-recycled", "gemini", |_| {})?;
    let log = lab.vm.guest.log_position()?;
    set_stock(&lab, 0)?;
    lab.wait_settled(STOCK)?;
    lab.vm.guest.fill("a", (STOCKED + 16) * BLOCK, 7, PageSize::Base)?;
    lab.vm.guest.free("a")?;
    process::wait_for("the driver knows what the host backs", STOCK, || {
        let runs = lab.vm.guest.driver_blocks()?;
        let left = runs.iter().filter(|run| run.guest == "free" && run.host == "base");
        let untouched = runs.iter().any(|run| run.guest == "free" && run.host == "absent");
        let known = untouched && left.map(|run| run.count).sum::<u64>() >= STOCKED;
        Ok(known.then_some(()))
    })?;

    let copied = lab.daemon.status()?.collapse_bytes;
    let before = lab.memory.resident_bytes()?;
    set_stock(&lab, STOCKED)?;
    wait_ready(&lab, STOCKED)?;
    ensure!(not_huge(&lab)?.is_empty());
    let grown = lab.memory.resident_bytes()?.saturating_sub(before);
    let copied = lab.daemon.status()?.collapse_bytes - copied;
    eprintln!("stock of {STOCKED} blocks: host memory grew by {grown}, {copied} bytes copied");
    ensure!(grown <= 8 * BLOCK, "{STOCKED} blocks made the host's memory grow by {grown}");
    ensure!(copied <= 2 * BLOCK, "{copied} bytes were copied");
    ensure!(lab.vm.guest.complaints(log)?.is_empty());
    lab.daemon.stop()
}

#[test]
fn stock_is_made_of_half_empty_blocks_and_nothing_in_them_is_lost() -> anyhow::Result<()> {
    const STOCKED: u64 = 48;
    let bench = Bench::from_env()?;
    let lab = Lab::start(&bench, "stock-evacuated", "gemini", |_| {})?;
    let log = lab.vm.guest.log_position()?;
    set_stock(&lab, 0)?;
    // Which would make free blocks of them by itself, and may come first.
    lab.vm.guest.write_file("/proc/sys/vm/compaction_proactiveness", "0")?;
    // No block is free any more, and half of nearly all of them is in use.
    let free = lab.vm.guest.memory()?["MemFree"];
    let bytes = (free.saturating_sub(64 * MIB)) / BLOCK * BLOCK;
    lab.vm.guest.fill("a", bytes, 7, PageSize::Base)?;
    lab.vm.guest.break_pages("a", Break::DropHalf, 1)?;

    set_stock(&lab, STOCKED)?;
    wait_ready(&lab, STOCKED)?;
    ensure!(not_huge(&lab)?.is_empty());
    let evacuated = lab.vm.guest.driver_number("evacuated_blocks")?;
    ensure!(evacuated > 0, "no block was emptied");
    lab.vm.guest.verify("a")?;
    ensure!(lab.vm.guest.complaints(log)?.is_empty());
    lab.daemon.stop()
}

/// A guest at rest keeps little ready, and one that asks for huge pages more: by
/// how many it has.
#[test]
fn stock_follows_demand_and_rest() -> anyhow::Result<()> {
    const HUGE_PER_READY: u64 = 32;
    let bench = Bench::from_env()?;
    let lab = Lab::start(&bench, "stock-rest", "gemini", |_| {})?;
    let guest = &lab.vm.guest;
    let (floor, active) =
        (guest.driver_number("stock_floor")?, guest.driver_number("stock_active")?);
    ensure!(floor < active, "{floor} and {active}");
    let wait_between = || {
        process::wait_for("the stock is as the huge pages in use have it", STOCK, || {
            let huge = guest.driver_number("guest_huge")?;
            let wanted = (huge / HUGE_PER_READY).min(active);
            // A driver that has just begun has no stock, and may not have looked yet.
            let is_so = wanted > floor
                && guest.driver_number("stock_target")? == wanted
                && guest.driver_number("ready")? == wanted;
            Ok(is_so.then_some(wanted))
        })
    };
    guest.fill("program", 4 * HUGE_PER_READY * BLOCK, 1, PageSize::Huge)?;
    let between = wait_between()?;
    ensure!(between < active, "{between} blocks for four times {HUGE_PER_READY}");
    process::wait_for("the stock is at its floor", 2 * STOCK, || {
        Ok((guest.driver_number("ready")? <= floor).then_some(()))
    })?;
    ensure!(guest.driver_number("stock_target")? == floor);
    // The next program brings it back.
    guest.fill("next", 8 * MIB, 1, PageSize::Huge)?;
    wait_between()?;
    lab.daemon.stop()
}

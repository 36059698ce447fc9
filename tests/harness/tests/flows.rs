//! What guest and host tell each other, and what follows from it.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context};
use common::{lab, memory, Result};
use gemini_harness::driver::{Driver, AREA_BLOCKS};
use gemini_harness::frontend::Session;
use gemini_harness::machine::{singles, Machine, PATIENCE};
use gemini_harness::memory::{GuestMemory, Placement, Region, BLOCK_SHIFT, BLOCK_SIZE};
use gemini_harness::outside;
use gemini_harness::ring::Buffer;
use gemini_harness::settings::Held;
use gemini_harness::sys;
use gemini_harness::wire::{self, guest_state, host_state, Range, Record};

const HUGE: u8 = host_state::HUGE;

/// Gives `block` contents and frees it again: free memory that the host holds.
fn use_and_free(machine: &mut Machine, block: u64) -> Result {
    machine.guest.alloc_huge(block)?;
    machine.guest.free_huge(block)
}

#[test]
fn first_hints_are_the_truth_about_the_host() -> Result {
    let lab = lab("none")?;
    let memory = memory(64)?;
    for block in [5, 6, 20, 63] {
        memory.write(block << BLOCK_SHIFT, &[1; 8192]);
    }
    let machine = Machine::boot(&lab.daemon.socket(), memory)?;
    let seen = outside::host_states(&machine.memory)?;
    let own = usize::try_from(AREA_BLOCKS)?;
    ensure!(machine.driver.host()[own..] == seen[own..]);
    ensure!(seen[20] == host_state::BASE && seen[21] == host_state::ABSENT);
    // Looking filled no hole: four blocks of two pages, and the driver's own.
    let rest = machine.memory.resident_bytes()? - 4 * 8192;
    ensure!(rest < AREA_BLOCKS * BLOCK_SIZE / 2, "{rest} bytes came on top");
    Ok(())
}

#[test]
fn an_advice_follows_the_full_state() -> Result {
    let lab = lab("gemini")?;
    let mut machine = lab.boot(16)?;
    machine.driver.wait_until("advice", PATIENCE, |driver| driver.advice().is_some())?;
    let advice = machine.driver.advice().context("no advice")?;
    ensure!(advice.release_max > 0, "{advice:?}");
    ensure!(machine.session.config().block_shift == BLOCK_SHIFT);
    Ok(())
}

#[test]
fn host_follows_guest_huge_pages() -> Result {
    let mut lab = lab("gemini")?;
    let mut machine = lab.boot(48)?;
    let huge: Vec<u64> = (10..22).collect();
    for &block in &huge {
        machine.guest.alloc_huge(block)?;
    }
    machine.guest.alloc_base(30, 100)?;
    machine.talk()?;
    machine.wait_host(&huge, |state| state == HUGE, PATIENCE)?;
    let seen = outside::host_states(&machine.memory)?;
    ensure!(seen[10..22].iter().all(|&state| state == HUGE), "{seen:?}");
    ensure!(seen[30] == host_state::BASE, "base pages were collapsed");
    // A block may be seen to be huge before the action that made it so has ended.
    let copied = 12 * BLOCK_SIZE;
    let status =
        lab.daemon.wait_status("done", PATIENCE, |status| status.collapse_bytes >= copied)?;
    ensure!((status.aligned, status.guest_only, status.host_only) == (12, 0, 0), "{status:?}");
    machine.guest.ensure_intact()
}

#[test]
fn policy_none_leaves_the_host_alone() -> Result {
    let lab = lab("none")?;
    let mut machine = lab.boot(32)?;
    machine.guest.alloc_huge(10)?;
    machine.talk()?;
    machine.run_for(Duration::from_secs(1))?;
    let status = lab.daemon.status()?;
    ensure!((status.aligned, status.guest_only) == (0, 1), "{status:?}");
    ensure!(status.collapse_bytes == 0);
    ensure!(outside::host_states(&machine.memory)?.iter().all(|&state| state != HUGE));
    Ok(())
}

#[test]
fn policy_always_collapses_what_is_resident() -> Result {
    let lab = lab("always")?;
    let mut machine = lab.boot(32)?;
    machine.guest.alloc_base(10, 1)?;
    machine.guest.alloc_huge(11)?;
    machine.talk()?;
    machine.wait_host(&[10, 11], |state| state == HUGE, PATIENCE)?;
    let status = lab.daemon.status()?;
    ensure!(status.aligned == 1 && status.host_only >= 1, "{status:?}");
    machine.guest.ensure_intact()
}

#[test]
fn splits_and_frees_are_followed() -> Result {
    let mut lab = lab("gemini")?;
    let mut machine = lab.boot(32)?;
    machine.guest.alloc_huge(10)?;
    machine.talk()?;
    machine.wait_host(&[10], |state| state == HUGE, PATIENCE)?;
    machine.guest.split(10)?;
    machine.talk()?;
    lab.daemon.wait_status("told of the split", PATIENCE, |status| status.host_only == 1)?;
    for page in 0..512 {
        machine.guest.free_base(10, page)?;
    }
    machine.talk()?;
    let status =
        lab.daemon.wait_status("told of the free", PATIENCE, |status| status.host_only == 0)?;
    ensure!(status.aligned == 0 && status.guest_only == 0, "{status:?}");
    machine.guest.ensure_intact()
}

#[test]
fn a_guest_collapse_is_followed_to_its_new_place() -> Result {
    let lab = lab("gemini")?;
    let mut machine = lab.boot(32)?;
    for page in 0..300 {
        machine.guest.alloc_base(10, page)?;
    }
    machine.talk()?;
    machine.guest.collapse(10, 20)?;
    machine.talk()?;
    machine.wait_host(&[20], |state| state == HUGE, PATIENCE)?;
    ensure!(lab.daemon.status()?.aligned == 1);
    machine.guest.ensure_intact()
}

#[test]
fn prepare_of_absent_blocks_copies_nothing() -> Result {
    let lab = lab("gemini")?;
    let mut machine = lab.boot(32)?;
    for block in [10, 11] {
        machine.guest.book(block)?;
    }
    machine.talk()?;
    let range = Range { first: 10, count: 2 };
    let answer = machine.driver.request(wire::REQ_PREPARE, &[range], PATIENCE)?;
    ensure!(answer.response.status == wire::S_OK, "{answer:?}");
    ensure!(answer.records.iter().all(|record| record.state == HUGE), "{answer:?}");
    let told: u32 = answer.records.iter().map(|record| record.count).sum();
    ensure!(told == 2, "{answer:?}");
    let status = lab.daemon.status()?;
    ensure!(status.populated >= 2 && status.collapse_bytes == 0, "{status:?}");
    // Ready: the guest huge page that comes there is aligned from the first touch.
    for block in [10, 11] {
        machine.guest.unbook(block)?;
        machine.guest.alloc_huge(block)?;
    }
    let seen = outside::host_states(&machine.memory)?;
    ensure!(seen[10] == HUGE && seen[11] == HUGE);
    machine.guest.ensure_intact()
}

#[test]
fn prepare_keeps_contents() -> Result {
    let lab = lab("gemini")?;
    let mut machine = lab.boot(32)?;
    for block in 10..14 {
        use_and_free(&mut machine, block)?;
        machine.guest.book(block)?;
    }
    machine.guest.alloc_base(20, 7)?;
    machine.talk()?;
    let ranges = [Range { first: 10, count: 4 }, Range { first: 20, count: 1 }];
    let answer = machine.driver.request(wire::REQ_PREPARE, &ranges, PATIENCE)?;
    ensure!(answer.response.status == wire::S_OK, "{answer:?}");
    let seen = outside::host_states(&machine.memory)?;
    ensure!(seen[10..14].iter().all(|&state| state == HUGE));
    machine.guest.ensure_intact()
}

#[test]
fn a_released_block_is_gone_and_reads_as_zeros() -> Result {
    let lab = lab("gemini")?;
    let mut machine = lab.boot(32)?;
    for block in 10..13 {
        use_and_free(&mut machine, block)?;
    }
    machine.guest.book(11)?;
    machine.talk()?;
    ensure!(outside::host_states(&machine.memory)?[11] == host_state::BASE);
    let status = machine.drop_blocks(wire::REQ_RELEASE, &singles(&[11]))?;
    ensure!(status == wire::S_OK, "status {status}");
    ensure!(outside::host_states(&machine.memory)?[11] == host_state::ABSENT);
    machine.wait_host(&[11], |state| state == host_state::ABSENT, PATIENCE)?;
    ensure!(lab.daemon.status()?.released == 1);
    machine.guest.ensure_intact()
}

#[test]
fn a_renewed_block_reads_as_zeros_and_becomes_huge() -> Result {
    let lab = lab("gemini")?;
    let mut machine = lab.boot(32)?;
    for block in 10..14 {
        use_and_free(&mut machine, block)?;
    }
    for block in [11, 12] {
        machine.guest.book(block)?;
    }
    machine.talk()?;
    let range = Range { first: 11, count: 2 };
    let status = machine.drop_blocks(wire::REQ_RENEW, &[range])?;
    ensure!(status == wire::S_OK, "status {status}");
    machine.wait_host(&[11, 12], |state| state == HUGE, PATIENCE)?;
    ensure!(lab.daemon.status()?.collapse_bytes == 0, "a renewed block was copied");
    machine.guest.ensure_intact()
}

/// A block of which every eighth page is in use, huge in the host: TRIM of all the
/// others leaves the host as many pages as are in use.
#[test]
fn a_trimmed_block_keeps_what_is_used_of_it() -> Result {
    let lab = lab("gemini")?;
    let mut machine = lab.boot(32)?;
    scatter(&mut machine, 10)?;
    let resident = machine.memory.resident_bytes()?;
    let runs: Vec<Range> =
        (0..64).map(|run| Range { first: 10 * 512 + run * 8 + 1, count: 7 }).collect();
    let answer = machine.driver.request(wire::REQ_TRIM, &runs, PATIENCE)?;
    ensure!(answer.response.status == wire::S_OK, "{answer:?}");
    for run in &runs {
        machine.guest.pages_dropped(run.first..run.first + u64::from(run.count));
    }
    machine.guest.ensure_intact()?;
    let after = machine.memory.resident_bytes()?;
    ensure!(
        resident.abs_diff(after + 448 * 4096) <= 16 * 4096,
        "{resident} bytes before, {after} after"
    );
    ensure!(outside::host_states(&machine.memory)?[10] == host_state::BASE);
    machine.wait_host(&[10], |state| state == host_state::BASE, PATIENCE)?;
    let status = lab.daemon.status()?;
    ensure!((status.trimmed_pages, status.released) == (448, 0), "{status:?}");
    machine.guest.ensure_intact()
}

/// A whole block, and pages of two blocks that lie together, in one range each.
#[test]
fn a_trim_may_reach_over_blocks() -> Result {
    let lab = lab("gemini")?;
    let mut machine = lab.boot(32)?;
    for block in 10..14 {
        use_and_free(&mut machine, block)?;
    }
    machine.talk()?;
    let runs = [Range { first: 12 * 512 + 500, count: 24 }, Range { first: 10 * 512, count: 512 }];
    let answer = machine.driver.request(wire::REQ_TRIM, &runs, PATIENCE)?;
    ensure!(answer.response.status == wire::S_OK, "{answer:?}");
    for run in &runs {
        machine.guest.pages_dropped(run.first..run.first + u64::from(run.count));
    }
    machine.wait_host(&[10], |state| state == host_state::ABSENT, PATIENCE)?;
    machine.guest.ensure_intact()
}

#[test]
fn an_unsound_or_old_trim_drops_nothing() -> Result {
    let lab = lab("gemini")?;
    let mut machine = lab.boot(32)?;
    scatter(&mut machine, 10)?;
    let good = Range { first: 10 * 512 + 1, count: 7 };
    for bad in [
        Range { first: 32 * 512, count: 1 },
        Range { first: 32 * 512 - 1, count: 2 },
        Range { first: 11 * 512, count: 0 },
        Range { first: u64::MAX, count: 1 },
        Range { first: u64::MAX >> 12, count: 1 },
        Range { first: 0, count: u32::MAX },
    ] {
        for ranges in [[good, bad], [bad, good]] {
            let answer = machine.driver.request(wire::REQ_TRIM, &ranges, PATIENCE)?;
            ensure!(answer.response.status == wire::S_INVALID, "{bad:?}: {answer:?}");
        }
    }
    let old = machine.driver.generation().context("no generation")? ^ 1;
    let ticket = machine.driver.submit_in(old, wire::REQ_TRIM, &[good])?;
    let answer = machine.driver.answer(ticket, PATIENCE)?;
    ensure!(answer.response.status == wire::S_VOID, "{answer:?}");
    machine.guest.ensure_intact()
}

/// Has every eighth page of a block in use, and the host huge under it.
fn scatter(machine: &mut Machine, block: u64) -> Result {
    machine.guest.alloc_huge(block)?;
    machine.talk()?;
    machine.wait_host(&[block], |state| state == HUGE, PATIENCE)?;
    machine.guest.split(block)?;
    for page in (0..512).filter(|page| page % 8 != 0) {
        machine.guest.free_base(block, page)?;
    }
    machine.talk()
}

#[test]
fn a_new_generation_voids_older_releases() -> Result {
    let lab = lab("gemini")?;
    let mut machine = lab.boot(32)?;
    use_and_free(&mut machine, 10)?;
    machine.guest.book(10)?;
    machine.talk()?;
    let old = machine.driver.generation().context("no generation")?;
    machine.driver.expect_resync();
    machine.session.set_memory(&machine.memory)?;
    machine.sync()?;
    ensure!(machine.driver.generation() != Some(old));
    for kind in [wire::REQ_RELEASE, wire::REQ_RENEW] {
        let ticket = machine.driver.submit_in(old, kind, &singles(&[10]))?;
        let answer = machine.driver.answer(ticket, PATIENCE)?;
        ensure!(answer.response.status == wire::S_VOID, "{answer:?}");
    }
    // Nothing was dropped.
    machine.guest.ensure_intact()
}

#[test]
fn a_release_that_is_partly_out_of_range_drops_nothing() -> Result {
    let lab = lab("gemini")?;
    let mut machine = lab.boot(32)?;
    use_and_free(&mut machine, 10)?;
    machine.guest.book(10)?;
    machine.talk()?;
    for bad in [
        Range { first: 32, count: 1 },
        Range { first: 31, count: 2 },
        Range { first: 11, count: 0 },
        Range { first: u64::MAX, count: 1 },
        Range { first: 0, count: u32::MAX },
    ] {
        let ranges = [Range { first: 10, count: 1 }, bad];
        let answer = machine.driver.request(wire::REQ_RELEASE, &ranges, PATIENCE)?;
        ensure!(answer.response.status == wire::S_INVALID, "{bad:?}: {answer:?}");
    }
    machine.guest.ensure_intact()
}

#[test]
fn features_that_were_not_negotiated_are_refused() -> Result {
    let lab = lab("gemini")?;
    let memory = Arc::new(memory(32)?);
    let mut session = Session::connect_with(&lab.daemon.socket(), PATIENCE, 0)?;
    session.set_memory(&memory)?;
    let mut driver = Driver::new(Arc::clone(&memory), 0)?;
    driver.start(&mut session)?;
    driver.wait_until("full host state", PATIENCE, Driver::host_synced)?;
    memory.write(10 << BLOCK_SHIFT, &[7; 4096]);
    for kind in
        [wire::REQ_PREPARE, wire::REQ_STATS, wire::REQ_RELEASE, wire::REQ_RENEW, wire::REQ_TRIM]
    {
        let answer = driver.request(kind, &singles(&[10]), PATIENCE)?;
        ensure!(answer.response.status == wire::S_UNSUPPORTED, "{answer:?}");
    }
    let mut bytes = [0; 4096];
    memory.read(10 << BLOCK_SHIFT, &mut bytes);
    ensure!(bytes == [7; 4096]);
    Ok(())
}

#[test]
fn query_and_stats_tell_the_same_as_the_map() -> Result {
    let lab = lab("gemini")?;
    let mut machine = lab.boot(32)?;
    machine.guest.alloc_huge(10)?;
    machine.guest.alloc_base(11, 5)?;
    machine.talk()?;
    machine.wait_host(&[10], |state| state == HUGE, PATIENCE)?;
    let range = Range { first: 10, count: 3 };
    let answer = machine.driver.request(wire::REQ_QUERY, &[range], PATIENCE)?;
    ensure!(answer.response.status == wire::S_OK, "{answer:?}");
    let mut states = vec![u8::MAX; 3];
    for record in &answer.records {
        for block in record.first..record.first + u64::from(record.count) {
            states[usize::try_from(block - 10)?] = record.state;
        }
    }
    ensure!(states == [HUGE, host_state::BASE, host_state::ABSENT], "{answer:?}");
    let answer = machine.driver.request(wire::REQ_STATS, &[], PATIENCE)?;
    let stats = answer.stats.context("no statistics")?;
    ensure!((stats.blocks, stats.aligned) == (32, 1), "{stats:?}");
    Ok(())
}

#[test]
fn a_memory_table_swap_begins_a_new_generation() -> Result {
    let mut lab = lab("gemini")?;
    let mut machine = lab.boot(32)?;
    machine.guest.alloc_huge(10)?;
    machine.talk()?;
    machine.wait_host(&[10], |state| state == HUGE, PATIENCE)?;
    let before = lab.daemon.status()?.generation;
    machine.driver.expect_resync();
    machine.session.set_memory(&machine.memory)?;
    machine.sync()?;
    let status = lab.daemon.wait_status("synchronised", PATIENCE, |status| {
        status.guest_synced && status.host_synced
    })?;
    ensure!(status.generation != before);
    ensure!(status.aligned == 1, "{status:?}");
    machine.guest.ensure_intact()
}

#[test]
fn a_device_reset_is_learned_anew() -> Result {
    let mut lab = lab("gemini")?;
    let mut machine = lab.boot(32)?;
    for block in 10..14 {
        machine.guest.alloc_huge(block)?;
    }
    machine.talk()?;
    let before = machine.driver.generation();
    let unanswered = machine.reset_device()?;
    ensure!(unanswered.is_empty());
    ensure!(machine.driver.generation().is_none());
    machine.sync()?;
    ensure!(machine.driver.generation() != before);
    let again = machine.driver.generation();
    machine.reset_device_by_message()?;
    machine.sync()?;
    ensure!(machine.driver.generation() != again);
    machine.wait_host(&[10, 11, 12, 13], |state| state == HUGE, PATIENCE)?;
    lab.daemon.wait_status("aligned", PATIENCE, |status| status.aligned == 4)?;
    Ok(())
}

#[test]
fn memory_that_somebody_else_takes_away_is_noticed_and_not_filled_again() -> Result {
    let lab = lab("gemini")?;
    let mut machine = lab.boot(32)?;
    machine.guest.alloc_huge(10)?;
    machine.talk()?;
    machine.wait_host(&[10], |state| state == HUGE, PATIENCE)?;
    machine.guest.free_huge(10)?;
    machine.guest.contents_dropped(10);
    machine.memory.discard(10 << BLOCK_SHIFT, BLOCK_SIZE)?;
    machine.talk()?;
    machine.wait_host(&[10], |state| state == host_state::ABSENT, PATIENCE)?;
    machine.run_for(Duration::from_millis(500))?;
    let seen = outside::host_states(&machine.memory)?;
    ensure!(seen[10] == host_state::ABSENT, "the hole was filled again");
    machine.guest.ensure_intact()
}

#[test]
fn only_blocks_that_lie_wholly_in_a_region_are_managed() -> Result {
    let lab = lab("gemini")?;
    // As a PC has it: a hole below 1 MiB, one below 4 GiB, and an end in the
    // middle of a block.
    let low = 12 * BLOCK_SIZE + (1 << 20);
    let regions = vec![
        Region { gpa: 0, size: 0xa_0000, offset: 0 },
        Region { gpa: 0xc_0000, size: low - 0xc_0000, offset: 0xc_0000 },
        Region { gpa: 1 << 32, size: 8 * BLOCK_SIZE, offset: 16 * BLOCK_SIZE },
    ];
    let memory = GuestMemory::with_regions(32 * BLOCK_SIZE, Placement::Aligned, regions)?;
    let memory = Arc::new(memory);
    let mut session = Session::connect(&lab.daemon.socket(), PATIENCE)?;
    session.set_memory(&memory)?;
    let mut driver = Driver::new(Arc::clone(&memory), 1 << 32)?;
    driver.start(&mut session)?;
    driver.wait_until("full host state", PATIENCE, Driver::host_synced)?;
    let high = (1 << 32) >> BLOCK_SHIFT;
    let census: Vec<_> = [(1, 11), (high, 8)]
        .map(|(first, count)| Record {
            first,
            count,
            state: guest_state::FREE,
            ..Record::default()
        })
        .to_vec();
    driver.report_full(&census, PATIENCE)?;
    let runs = lab.daemon.map()?.runs;
    let blocks: Vec<u64> = runs.iter().flat_map(|run| run.first..run.first + run.count).collect();
    let expected: Vec<u64> = (1..12).chain(high..high + 8).collect();
    ensure!(blocks == expected, "{runs:?}");
    for block in [0, 12, high - 1, high + 8] {
        let answer = driver.request(wire::REQ_RELEASE, &singles(&[block]), PATIENCE)?;
        ensure!(answer.response.status == wire::S_INVALID, "block {block}: {answer:?}");
    }
    let high_block = high + 6;
    memory.write(high_block << BLOCK_SHIFT, &[1; 100]);
    let answer = driver.request(wire::REQ_RELEASE, &singles(&[high_block]), PATIENCE)?;
    ensure!(answer.response.status == wire::S_OK, "{answer:?}");
    let mut bytes = [1; 100];
    memory.peek(high_block << BLOCK_SHIFT, &mut bytes)?;
    ensure!(bytes == [0; 100]);
    Ok(())
}

#[test]
fn the_copy_budget_is_kept() -> Result {
    let mut lab = common::start(common::options("gemini")?.arg("--copy-rate", "16M"))?;
    let mut machine = lab.boot(80)?;
    for block in 8..72 {
        machine.guest.alloc_huge(block)?;
    }
    machine.talk()?;
    let start = lab.daemon.status()?.collapse_bytes;
    machine.run_for(Duration::from_secs(3))?;
    lab.daemon.ensure_alive()?;
    let copied = lab.daemon.status()?.collapse_bytes - start;
    // 128 MiB would be there to copy; a burst of one second's worth is fair.
    ensure!(copied <= 80 << 20, "{} MiB in 3 s", copied >> 20);
    ensure!(copied >= 16 << 20, "{} MiB in 3 s", copied >> 20);
    machine.guest.ensure_intact()
}

#[test]
fn reports_of_another_generation_are_dropped() -> Result {
    let mut lab = lab("gemini")?;
    let mut machine = lab.boot(32)?;
    lab.daemon.wait_status("synchronised", PATIENCE, |status| status.guest_synced)?;
    let current = machine.driver.generation().context("no generation")?;
    let record = Record { first: 10, count: 4, state: guest_state::HUGE, ..Record::default() };
    for other in [current - 1, current + 1, 0] {
        let batch = wire::state_batch(other, wire::SYNC_START | wire::SYNC_END, &[record]);
        machine.driver.send_report(&batch, PATIENCE)?;
    }
    // The queue is served in order: what follows is known when this is.
    machine.guest.book(20)?;
    machine.talk()?;
    let status = lab
        .daemon
        .wait_status("told of the booking", PATIENCE, |status| status.guest.booked == 1)?;
    ensure!(status.guest.huge == 0, "{status:?}");
    Ok(())
}

#[test]
fn reports_before_the_full_state_are_dropped() -> Result {
    let lab = lab("gemini")?;
    let mut machine = Machine::connect(&lab.daemon.socket(), memory(32)?)?;
    machine.driver.wait_until("full host state", PATIENCE, Driver::host_synced)?;
    let record = Record { first: 10, count: 4, state: guest_state::HUGE, ..Record::default() };
    machine.driver.report(&[record], PATIENCE)?;
    machine.run_for(Duration::from_millis(200))?;
    let status = lab.daemon.status()?;
    // By now the full state was sent, which says that nothing is huge.
    ensure!(status.guest_synced && status.guest.huge == 0, "{status:?}");
    Ok(())
}

#[test]
fn what_is_only_reported_is_not_filled() -> Result {
    for policy in ["gemini", "always"] {
        let lab = lab(policy)?;
        let mut machine = lab.boot(32)?;
        // A guest huge page that nobody touched yet, as far as the host knows.
        let record = Record { first: 10, count: 8, state: guest_state::HUGE, ..Record::default() };
        machine.driver.report(&[record], PATIENCE)?;
        machine.run_for(Duration::from_millis(700))?;
        let seen = outside::host_states(&machine.memory)?;
        ensure!(
            seen[10..18].iter().all(|&state| state == host_state::ABSENT),
            "{policy} filled memory that nobody asked for"
        );
    }
    Ok(())
}

#[test]
fn requests_of_another_generation_are_void() -> Result {
    let lab = lab("gemini")?;
    let mut machine = lab.boot(32)?;
    let current = machine.driver.generation().context("no generation")?;
    ensure!(machine.session.read_config()?.generation == current);
    for kind in [wire::REQ_PREPARE, wire::REQ_QUERY, wire::REQ_STATS] {
        let ranges = if kind == wire::REQ_STATS { vec![] } else { singles(&[10]) };
        let ticket = machine.driver.submit_in(current + 1, kind, &ranges)?;
        let answer = machine.driver.answer(ticket, PATIENCE)?;
        ensure!(answer.response.status == wire::S_VOID, "{answer:?}");
    }
    ensure!(outside::host_states(&machine.memory)?[10] == host_state::ABSENT);
    Ok(())
}

#[test]
fn an_answer_that_does_not_fit_gives_the_first_records() -> Result {
    let lab = lab("gemini")?;
    let mut machine = lab.boot(32)?;
    for block in [10, 12, 14] {
        machine.guest.alloc_base(block, 0)?;
    }
    machine.talk()?;
    machine.wait_host(&[10, 12, 14], |state| state == host_state::BASE, PATIENCE)?;
    let generation = machine.driver.generation().context("no generation")?;
    let range = Range { first: 10, count: 5 };
    let request = wire::request(wire::REQ_QUERY, generation, &[range]);
    // In a free block; the answer has room for two records and a half.
    let (at, room) = (30 << BLOCK_SHIFT, 16 + 24 * 2 + 12);
    machine.memory.write(at, &request);
    let queue = machine.driver.queue_mut(wire::CTRLQ);
    queue.ring.add(&[
        Buffer { addr: at, len: u32::try_from(request.len())?, writable: false },
        Buffer { addr: at + 4096, len: room, writable: true },
    ])?;
    queue.kick.write(1)?;
    let deadline = Instant::now() + PATIENCE;
    let len = loop {
        if let Some((_, len)) = machine.driver.queue_mut(wire::CTRLQ).ring.take_used()? {
            break len;
        }
        ensure!(Instant::now() < deadline, "no answer");
        std::thread::sleep(Duration::from_millis(1));
    };
    ensure!(len == 16 + 2 * 24, "{len} bytes were written");
    let mut bytes = [0; 16 + 2 * 24];
    machine.memory.read(at + 4096, &mut bytes);
    let response = wire::Response::parse(&bytes);
    ensure!((response.status, response.count) == (wire::S_OK, 2), "{response:?}");
    let first = Record::parse(&bytes[16..]);
    ensure!((first.first, first.state) == (10, host_state::BASE), "{first:?}");
    let mut rest = [0; 12];
    machine.memory.read(at + 4096 + 64, &mut rest);
    ensure!(rest == [0; 12], "the device wrote behind its records");
    Ok(())
}

#[test]
fn releases_do_not_wait_for_prepares() -> Result {
    // A prepare of 24 blocks takes seconds at this rate.
    let lab = common::start(common::options("gemini")?.arg("--copy-rate", "4M"))?;
    let mut machine = lab.boot(64)?;
    for block in 10..40 {
        use_and_free(&mut machine, block)?;
        machine.guest.book(block)?;
    }
    machine.talk()?;
    let range = Range { first: 10, count: 24 };
    let prepare = machine.driver.submit(wire::REQ_PREPARE, &[range])?;
    let start = Instant::now();
    for block in 34..40 {
        let status = machine.drop_blocks(wire::REQ_RELEASE, &singles(&[block]))?;
        ensure!(status == wire::S_OK, "status {status}");
    }
    ensure!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    ensure!(
        machine.driver.unanswered().any(|request| request.ticket == prepare),
        "the prepare was too fast to show anything"
    );
    // And a reset does not wait for it either.
    let start = Instant::now();
    machine.reset_device()?;
    ensure!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    machine.guest.ensure_intact()
}

#[test]
fn reserved_huge_pages_are_told_as_such_and_never_dropped() -> Result {
    if !sys::is_root() {
        eprintln!("not tested: only the superuser can reserve huge pages");
        return Ok(());
    }
    const BLOCKS: u64 = 16;
    let held = Held::reserved_huge_pages(BLOCKS)?;
    let lab = common::start_under(common::options("gemini")?, held)?;
    let memory = GuestMemory::new(BLOCKS * BLOCK_SIZE, Placement::Reserved)?;
    let mut machine = Machine::boot(&lab.daemon.socket(), memory)?;
    machine.guest.alloc_huge(10)?;
    use_and_free(&mut machine, 11)?;
    machine.guest.book(11)?;
    machine.talk()?;
    machine.wait_host(&[10, 11], |state| state == host_state::HUGETLB, PATIENCE)?;
    ensure!(lab.daemon.status()?.aligned == 1);
    for kind in [wire::REQ_RELEASE, wire::REQ_RENEW] {
        let answer = machine.driver.request(kind, &singles(&[11]), PATIENCE)?;
        ensure!(answer.response.status == wire::S_UNSUPPORTED, "{answer:?}");
    }
    machine.guest.ensure_intact()
}

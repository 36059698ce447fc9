//! A program touches huge pages in a fragmented guest: how many are aligned at
//! once, and what that has cost the host.

use gemini_guest::protocol::Program;
use gemini_harness::figures::{Bar, Scenario};

use super::fragmented::{Ground, Placed, Plan, EVACUATION_RATE};
use crate::lab::Bench;
use crate::{BLOCK, MIB};

/// Share of the program's blocks that are to be aligned right after the touch.
const ALIGNED_BAR: f64 = 0.95;

/// Share of the program's memory that may be copied in the host, in all.
const COPIED_BAR: f64 = 0.05;

/// Fragmentation that the guest is to have before.
const FMFI_BAR: f64 = 0.8;

/// Share of the rate at which the stock filled that the second program touches
/// blocks at.
const RATE_SHARE: f64 = 0.8;

/// Sizes in bytes.
struct Sizes {
    memory: u64,
    program: u64,
    small_stock: u64,
}

/// One run of a program, and what it cost from the warm-up on.
struct Run {
    fmfi: f64,
    placed: Placed,
    collapse_bytes: u64,
    host_copied_bytes: u64,
    complaints: usize,
    /// Seconds that the stock took to fill; none where nothing is placed.
    warm_up: Option<f64>,
    /// Counters of the driver.
    counters: Vec<(&'static str, u64)>,
}

/// Measures with a stock as large as the program, with a small one that has to
/// keep up, and both without placement.
///
/// # Errors
/// If guest, QEMU or daemon fail in a way that is no figure.
pub fn measure(bench: &Bench, seed: u64, quick: bool) -> anyhow::Result<Scenario> {
    let sizes = if quick {
        Sizes { memory: 1024 * MIB, program: 128 * MIB, small_stock: 16 * MIB }
    } else {
        Sizes { memory: 2048 * MIB, program: 512 * MIB, small_stock: 64 * MIB }
    };
    let whole = sizes.program / BLOCK;
    let mut scenario = Scenario::new("first-touch");
    scenario.arg("guest_memory", sizes.memory);
    scenario.arg("program_bytes", sizes.program);
    scenario.arg("stock_blocks", whole);
    scenario.arg("small_stock_blocks", sizes.small_stock / BLOCK);
    scenario.arg("evacuation_rate", EVACUATION_RATE);
    scenario.arg("rate_share", RATE_SHARE);
    scenario.arg("init_on_alloc", true);
    scenario.arg("shmem_enabled", "never");
    scenario.arg("policy", "gemini");

    eprintln!("a stock as large as the program");
    let full = run(bench, &sizes, seed, Some(whole), 0.0)?;
    let copied_bar = Bar::AtMost(sizes.program as f64 * COPIED_BAR);
    scenario.figure("fmfi", full.fmfi, Bar::AtLeast(FMFI_BAR));
    let warm_up = full.warm_up.unwrap_or(f64::NAN);
    scenario.figure("warm_up_seconds", warm_up, Bar::None);
    let share = full.placed.first_touch_share();
    scenario.figure("aligned_share", share, Bar::AtLeast(ALIGNED_BAR));
    scenario.figure("collapse_bytes", full.collapse_bytes as f64, copied_bar);
    scenario.figure("host_copied_bytes", full.host_copied_bytes as f64, copied_bar);
    tell(&mut scenario, "", &full);

    let made = whole as f64 / warm_up;
    let rate = made * RATE_SHARE;
    eprintln!("a small stock, {rate:.1} blocks touched in a second");
    let paced = run(bench, &sizes, seed, Some(sizes.small_stock / BLOCK), rate)?;
    scenario.figure("ready_blocks_per_second", made, Bar::None);
    scenario.figure("paced_blocks_per_second", rate, Bar::None);
    scenario.figure("paced_fmfi", paced.fmfi, Bar::AtLeast(FMFI_BAR));
    scenario.figure("paced_aligned_share", paced.placed.first_touch_share(), Bar::None);
    scenario.figure("paced_collapse_bytes", paced.collapse_bytes as f64, Bar::None);
    tell(&mut scenario, "paced_", &paced);

    for (prefix, rate) in [("stock_kernel_", 0.0), ("stock_kernel_paced_", rate)] {
        eprintln!("without placement, {rate:.1} blocks touched in a second");
        let plain = run(bench, &sizes, seed, None, rate)?;
        let mut figure = |name: &str, value| {
            scenario.figure(&format!("{prefix}{name}"), value, Bar::None);
        };
        figure("aligned_share", plain.placed.first_touch_share());
        figure("collapse_bytes", plain.collapse_bytes as f64);
        tell(&mut scenario, prefix, &plain);
    }
    Ok(scenario)
}

/// What the figures of a run are explained by; and what must never be.
fn tell(scenario: &mut Scenario, prefix: &str, run: &Run) {
    let mut figure = |name: &str, value: f64, bar| {
        scenario.figure(&format!("{prefix}{name}"), value, bar);
    };
    figure("guest_huge_share", run.placed.huge_share(), Bar::None);
    figure("touch_seconds", run.placed.touched.seconds, Bar::None);
    figure("longest_touch_ms", run.placed.touched.longest_seconds * 1000.0, Bar::None);
    for &(name, value) in &run.counters {
        figure(name, value as f64, Bar::None);
    }
    figure("guest_complaints", run.complaints as f64, Bar::AtMost(0.0));
}

/// One program in a guest of its own; without a stock nothing is placed.
fn run(
    bench: &Bench,
    sizes: &Sizes,
    seed: u64,
    stock: Option<u64>,
    blocks_per_second: f64,
) -> anyhow::Result<Run> {
    const COUNTERS: [&str; 8] = [
        "placed",
        "placement_misses",
        "evacuated_blocks",
        "evacuated_pages",
        "evacuation_failures",
        "prepared",
        "renewed",
        "returned_pressure",
    ];
    let plan = Plan {
        name: "bench-first-touch",
        memory: sizes.memory,
        seed,
        fragmented: true,
        placement: stock.is_some(),
    };
    let mut ground = Ground::prepare(bench, &plan)?;
    let fmfi = ground.fmfi()?;
    let warm_up = match stock {
        Some(blocks) => Some(ground.fill_stock(blocks)?.as_secs_f64()),
        None => None,
    };
    let program = Program { bytes: sizes.program, seed, blocks_per_second };
    let placed = ground.touch("program", program)?;
    let costs = ground.total_costs()?;
    let guest = &ground.lab.vm.guest;
    let mut counters = Vec::new();
    if stock.is_some() {
        for name in COUNTERS {
            counters.push((name, guest.driver_number(name)?));
        }
    }
    let complaints = ground.check(&["program"])?;
    Ok(Run {
        fmfi,
        placed,
        collapse_bytes: costs.collapse_bytes,
        host_copied_bytes: costs.host_copied_bytes(),
        complaints,
        warm_up,
        counters,
    })
}

//! What the measurements of the guest side stand on: the guest's memory is
//! fragmented as it is told to be, and its programs see what they get.

use anyhow::ensure;
use gemini_e2e::accel::AccelChoice;
use gemini_e2e::assets::Assets;
use gemini_e2e::vm::{Vm, VmConfig};
use gemini_e2e::MIB;
use gemini_guest::kernel::on_cpu_lists;
use gemini_guest::protocol::{BlockState, Fragment, Program, Storm};

/// Page frames below the boundary that 32-bit devices reach.
const DMA32_BLOCKS: u64 = 2048;

fn boot(name: &str, memory: u64) -> anyhow::Result<Vm> {
    // No setting of the host matters here.
    let assets = Assets::from_env()?;
    let accel = AccelChoice::from_env()?.resolve(&assets)?;
    let mut config = VmConfig::new(name, accel);
    config.memory = memory;
    // Huge pages only where a program asks for them.
    config.guest_thp = "madvise".into();
    Vm::boot(&assets, config)
}

#[test]
fn base_pages_are_scattered_over_all_blocks_until_the_fragmenter_ends() -> anyhow::Result<()> {
    let vm = boot("fragment", 3072 * MIB)?;
    let options = Fragment { unmovable: 0.02, ..Fragment::new(1, 1600 * MIB) };
    let result = vm.guest.fragment("f", options)?;
    eprintln!("{result:?}");
    ensure!(result.after.fmfi >= 0.95 && result.before.fmfi < 0.5, "{result:?}");
    ensure!(result.kept_cache * 2 > result.kept_anonymous / 3, "{result:?}");
    ensure!(result.kept_unmovable * 100 > result.kept_anonymous, "{result:?}");
    let on_lists = on_cpu_lists(&vm.guest.read_file("/proc/zoneinfo")?) * 4096;
    let free = vm.guest.memory()?["MemFree"];
    ensure!(
        (1500 * MIB..1700 * MIB).contains(&(free + on_lists)),
        "{free} bytes are free, {on_lists} are on lists of processors"
    );

    let blocks = vm.guest.blocks()?;
    let (mut free, mut low, mut high) = (0, 0, 0);
    for run in &blocks.runs {
        match run.state {
            BlockState::Free | BlockState::Bare => free += run.count,
            _ if run.first < DMA32_BLOCKS => low += run.count,
            _ => high += run.count,
        }
    }
    eprintln!("{free} blocks are free, of the others {low} are below 4 GiB and {high} above");
    // One in fifty: what the kernel itself used while the fragmenter worked, and
    // gave back since, was nobody's to fill.
    ensure!(free * 50 <= free + low + high, "{free} free, {low} low, {high} high");
    ensure!(low > 900 && high > 400, "{free} free, {low} low, {high} high");
    vm.guest.verify_process("f")?;

    vm.guest.end("f")?;
    // The last freed pages of many blocks are on lists of processors, from where
    // they come back when they like: only that nothing is kept can be told.
    let on_lists = on_cpu_lists(&vm.guest.read_file("/proc/zoneinfo")?);
    let after = vm.guest.fragmentation()?;
    ensure!(
        after.free_pages + on_lists + 2048 > result.before.free_pages,
        "{result:?}, {after:?}, and {on_lists} pages are on lists of processors"
    );
    Ok(())
}

#[test]
fn the_index_comes_near_what_was_asked_for() -> anyhow::Result<()> {
    let vm = boot("fragment-half", 1024 * MIB)?;
    let options = Fragment { fmfi: 0.5, ..Fragment::new(2, 512 * MIB) };
    let result = vm.guest.fragment("f", options)?;
    eprintln!("{result:?}");
    // Blocks that the kernel has a page in cannot become free.
    ensure!((0.45..0.7).contains(&result.after.fmfi), "{result:?}");
    Ok(())
}

#[test]
fn a_program_knows_its_blocks_and_a_storm_leaves_nothing() -> anyhow::Result<()> {
    let vm = boot("program", 1024 * MIB)?;
    let options = Program { bytes: 64 * MIB, seed: 1, blocks_per_second: 0.0 };
    let touched = vm.guest.start_program("p", options)?;
    ensure!(touched.blocks == 32, "{touched:?}");
    let blocks = vm.guest.program_blocks("p")?;
    let told = vm.guest.blocks()?;
    ensure!(blocks.len() == 32);
    for block in blocks.iter().flatten() {
        let run = told.runs.iter().find(|run| (run.first..run.first + run.count).contains(block));
        ensure!(run.is_some_and(|run| run.state == BlockState::Huge), "{block}: {run:?}");
    }
    ensure!(blocks.iter().flatten().count() >= 30, "{blocks:?}");
    vm.guest.verify_process("p")?;

    let before = vm.guest.memory()?["MemFree"];
    let stormed = vm.guest.storm("s", Storm { bytes: 200 * MIB, seed: 1 })?;
    eprintln!("{stormed:?}");
    let taken = stormed.free_before - stormed.free_after;
    ensure!((160 * MIB..260 * MIB).contains(&taken), "{stormed:?}");
    for kind in [stormed.anonymous_bytes, stormed.cache_bytes, stormed.slab_bytes, stormed.forks] {
        ensure!(kind > 0, "{stormed:?}");
    }
    vm.guest.end("s")?;
    vm.guest.shell("echo 2 > /proc/sys/vm/drop_caches")?;
    let after = vm.guest.memory()?["MemFree"];
    ensure!(after + 16 * MIB > before, "{before} bytes were free before, {after} are now");
    vm.guest.verify_process("p")?;
    Ok(())
}

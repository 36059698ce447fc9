//! A guest whose memory was all touched and is fragmented, and programs in it
//! that touch huge pages: what the scenarios of the guest's side share.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context};
use gemini_guest::protocol::{Fragment, Fragmented, Program, Touched};

use crate::daemon::Status;
use crate::lab::{Bench, Lab};
use crate::outside;
use crate::process;
use crate::BLOCK;

/// Blocks that the driver may empty in a second while it fills its stock: more
/// than it can.
pub const EVACUATION_RATE: u64 = 1024;

/// Percent of guest memory that fragmenting leaves free.
const FREE_PERCENT: u64 = 60;

/// How long the stock may take to fill.
const STOCK_TIMEOUT: Duration = Duration::from_secs(240);

/// Nothing is repaired for so long: the daemon has nothing left to do.
const REST: Duration = Duration::from_secs(3);

/// How long it may take until then.
const REST_TIMEOUT: Duration = Duration::from_secs(60);

/// Name of the fragmenter's process in the guest.
const FRAGMENTS: &str = "fragments";

/// How such a guest is made.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Names the logs.
    pub name: &'static str,
    /// Bytes of guest memory.
    pub memory: u64,
    /// Seed of the fragments.
    pub seed: u64,
    /// Whether free memory is fragmented at all.
    pub fragmented: bool,
    /// Whether the driver may place huge pages.
    pub placement: bool,
}

/// The guest, and what it has cost so far.
#[derive(Debug)]
pub struct Ground {
    /// Guest, QEMU and daemon.
    pub lab: Lab,
    /// What the fragmenter said.
    pub fragmented: Option<Fragmented>,
    /// Costs when the guest was ready to be measured.
    start: Costs,
    /// Where the kernel's log was when the driver was let loose.
    log: u64,
}

/// What making huge pages has cost the host, since the daemon or the host
/// started.
#[derive(Clone, Copy, Debug, Default)]
pub struct Costs {
    /// Bytes that the daemon says it copied.
    pub collapse_bytes: u64,
    /// Blocks that it says it copied.
    pub collapses: u64,
    /// Blocks that it says it made huge without a copy.
    pub populated: u64,
    /// Huge pages that the host's kernel made for a collapse, whoever asked, but
    /// for those of khugepaged.
    pub host_collapses: u64,
}

/// Where the huge pages of a program came to lie.
#[derive(Clone, Debug)]
pub struct Placed {
    /// What the program said.
    pub touched: Touched,
    /// Blocks that were huge at both layers right after the touch.
    pub aligned: BTreeSet<u64>,
    /// Those of them that the host had huge before the touch, too.
    pub aligned_before: u64,
    /// Blocks that are one huge page in the guest.
    pub guest_huge: u64,
    /// What the touch cost, up to the look at it.
    pub costs: Costs,
}

impl Placed {
    /// Share of the program's blocks that were aligned right after the touch.
    #[must_use]
    pub fn aligned_share(&self) -> f64 {
        self.aligned.len() as f64 / self.touched.blocks.max(1) as f64
    }

    /// The same without those that a copy in the host may have put right
    /// meanwhile: what is certain to have been aligned at the first touch.
    #[must_use]
    pub fn first_touch_share(&self) -> f64 {
        let certain = (self.aligned.len() as u64).saturating_sub(self.costs.collapses);
        certain.max(self.aligned_before) as f64 / self.touched.blocks.max(1) as f64
    }

    /// Share of the program's blocks that are huge pages in the guest.
    #[must_use]
    pub fn huge_share(&self) -> f64 {
        self.guest_huge as f64 / self.touched.blocks.max(1) as f64
    }
}

impl Costs {
    fn read(status: &Status) -> anyhow::Result<Self> {
        Ok(Costs {
            collapse_bytes: status.collapse_bytes,
            collapses: status.collapses,
            populated: status.populated,
            host_collapses: outside::requested_collapses()?,
        })
    }

    fn since(self, start: Self) -> Self {
        Costs {
            collapse_bytes: self.collapse_bytes - start.collapse_bytes,
            collapses: self.collapses - start.collapses,
            populated: self.populated - start.populated,
            host_collapses: self.host_collapses - start.host_collapses,
        }
    }

    /// Bytes that were copied at most, by the word of the host's kernel alone:
    /// of all huge pages that were made for a collapse, only those that the
    /// daemon populated held nothing to be copied.
    #[must_use]
    pub fn host_copied_bytes(&self) -> u64 {
        self.host_collapses.saturating_sub(self.populated) * BLOCK
    }
}

impl Ground {
    /// Boots the guest, checks that its kernel zeroes what it allocates, and
    /// fragments its memory; the driver books nothing meanwhile.
    ///
    /// # Errors
    /// If a part does not come up, or memory cannot be fragmented.
    pub fn prepare(bench: &Bench, plan: &Plan) -> anyhow::Result<Self> {
        let mut lab = Lab::start(bench, plan.name, "gemini", |config| {
            config.memory = plan.memory;
            // Huge pages for the program alone.
            config.guest_thp = "madvise".into();
        })?;
        expect_init_on_alloc(&lab)?;
        let guest = &lab.vm.guest;
        guest.hints_only()?;
        guest.set_driver("placement", u64::from(plan.placement))?;
        let log = guest.log_position()?;
        let free_bytes = guest.memory()?["MemTotal"] * FREE_PERCENT / 100;
        // Whole memory is filled and emptied again: everything was touched.
        let mut options = Fragment::new(plan.seed, free_bytes);
        if !plan.fragmented {
            options.fmfi = 0.0;
        }
        let fragmented = guest.fragment(FRAGMENTS, options)?;
        if !plan.fragmented {
            guest.end(FRAGMENTS)?;
        }
        let fragmented = plan.fragmented.then_some(fragmented);
        lab.wait_settled(REST_TIMEOUT)?;
        let start = Costs::read(&lab.daemon.status()?)?;
        Ok(Ground { lab, fragmented, start, log })
    }

    /// The index of unusable free space for huge pages now.
    ///
    /// # Errors
    /// If the guest does not tell.
    pub fn fmfi(&self) -> anyhow::Result<f64> {
        Ok(self.lab.vm.guest.fragmentation()?.fmfi)
    }

    /// Lets the driver book as fast as it can, until it has `blocks` ready;
    /// returns the time that it took.
    ///
    /// # Errors
    /// If it does not place, or does not have them in time.
    pub fn fill_stock(&self, blocks: u64) -> anyhow::Result<Duration> {
        let guest = &self.lab.vm.guest;
        let state = guest.driver_text("placement_state")?;
        ensure!(state.trim() == "on", "the driver does not place huge pages: {state}");
        guest.set_driver("stock_cap", blocks)?;
        guest.set_driver("stock_floor", blocks)?;
        guest.set_driver("evacuation_rate", EVACUATION_RATE)?;
        let started = Instant::now();
        guest.set_driver("booking", 1)?;
        process::wait_for("the stock is full", STOCK_TIMEOUT, || {
            // Asking costs the guest time.
            std::thread::sleep(Duration::from_millis(250));
            Ok((guest.driver_number("ready")? >= blocks).then_some(()))
        })
        .with_context(|| {
            guest
                .shell("cd /sys/bus/virtio/drivers/virtio_gemini/virtio*/gemini; grep . *")
                .unwrap_or_default()
        })?;
        Ok(started.elapsed())
    }

    /// Has a program touch huge pages, and looks at once where they lie.
    ///
    /// # Errors
    /// If the guest cannot, or a part cannot be read.
    pub fn touch(&self, name: &str, program: Program) -> anyhow::Result<Placed> {
        let start = self.costs()?;
        let before = self.lab.memory.huge_blocks()?;
        let touched = self.lab.vm.guest.start_program(name, program)?;
        let after = self.lab.memory.huge_blocks()?;
        let costs = self.costs()?.since(start);
        let blocks = self.lab.vm.guest.program_blocks(name)?;
        let guest: BTreeSet<u64> = blocks.into_iter().flatten().collect();
        let aligned: BTreeSet<u64> = guest.intersection(&after).copied().collect();
        let aligned_before = aligned.intersection(&before).count() as u64;
        Ok(Placed { touched, aligned_before, aligned, guest_huge: guest.len() as u64, costs })
    }

    fn costs(&self) -> anyhow::Result<Costs> {
        Costs::read(&self.lab.daemon.status()?)
    }

    /// Waits until the daemon has nothing left to repair, and returns what the
    /// whole run has cost since the guest was prepared.
    ///
    /// # Errors
    /// If the daemon does not answer, or does not come to an end in time.
    pub fn total_costs(&self) -> anyhow::Result<Costs> {
        let collapses = || Ok(self.costs()?.collapses);
        process::wait_until_still("the daemon's repairs", REST, REST_TIMEOUT, collapses)?;
        Ok(self.costs()?.since(self.start))
    }

    /// Checks everything that must not have changed: the contents of `programs`
    /// and of the pages that were moved, and the guest's health. Returns the
    /// number of the guest's complaints.
    ///
    /// # Errors
    /// If a word has changed, or a part is gone.
    pub fn check(&mut self, programs: &[&str]) -> anyhow::Result<usize> {
        let guest = &self.lab.vm.guest;
        for program in programs {
            guest.verify_process(program)?;
        }
        if self.fragmented.is_some() {
            guest.verify_process(FRAGMENTS)?;
        }
        let complaints = guest.tell_complaints(self.log)?;
        self.lab.daemon.process.expect_running()?;
        self.lab.vm.expect_alive()?;
        Ok(complaints)
    }
}

/// Debian's default, and the harder case: without it nothing that a stock holds
/// is ever written to.
fn expect_init_on_alloc(lab: &Lab) -> anyhow::Result<()> {
    let messages = lab.vm.guest.messages(0)?.messages;
    let line = messages
        .iter()
        .find(|message| message.text.contains("mem auto-init"))
        .context("the guest's kernel does not tell whether it zeroes what it allocates")?;
    ensure!(
        line.text.contains("heap alloc:on"),
        "the guest's kernel does not zero what it allocates: {}",
        line.text
    );
    Ok(())
}

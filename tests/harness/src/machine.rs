//! A model machine: monitor, driver and model guest together.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context};

use crate::driver::{Driver, Request, AREA_BLOCKS};
use crate::frontend::Session;
use crate::guest::Guest;
use crate::log::DirtyLog;
use crate::memory::GuestMemory;
use crate::wire::{self, Range};

/// Longest wait for what the daemon does at once.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A machine that is connected to a daemon.
pub struct Machine {
    /// Its memory.
    pub memory: Arc<GuestMemory>,
    /// The connection.
    pub session: Session,
    /// The driver.
    pub driver: Driver,
    /// The model guest.
    pub guest: Guest,
}

impl Machine {
    /// Connects to `socket`, hands `memory` over and starts the queues, yet tells
    /// nothing about the guest.
    ///
    /// # Errors
    /// If the daemon refuses a step of it.
    pub fn connect(socket: &Path, memory: GuestMemory) -> anyhow::Result<Self> {
        Self::connect_with_pinned(socket, memory, AREA_BLOCKS)
    }

    /// As [`Machine::connect`]; the first `pinned` blocks are not the model
    /// guest's own (the driver's are among them).
    ///
    /// # Errors
    /// As [`Machine::connect`].
    pub fn connect_with_pinned(
        socket: &Path,
        memory: GuestMemory,
        pinned: u64,
    ) -> anyhow::Result<Self> {
        ensure!(pinned >= AREA_BLOCKS, "the driver needs {AREA_BLOCKS} blocks");
        let memory = Arc::new(memory);
        let mut session = Session::connect(socket, PATIENCE)?;
        let mut driver = Driver::new(Arc::clone(&memory), 0)?;
        let guest = Guest::new(Arc::clone(&memory), pinned)?;
        session.set_memory(&memory)?;
        driver.start(&mut session)?;
        Ok(Machine { memory, session, driver, guest })
    }

    /// As [`Machine::connect`], then exchanges the full states.
    ///
    /// # Errors
    /// As [`Machine::connect`] and [`Machine::sync`].
    pub fn boot(socket: &Path, memory: GuestMemory) -> anyhow::Result<Self> {
        let mut machine = Self::connect(socket, memory)?;
        machine.sync()?;
        Ok(machine)
    }

    /// Waits for the full host state and until the device has taken the full guest
    /// state, again where a new generation begins meanwhile. A promise that is made
    /// before that ends with it. Returns how long that took.
    ///
    /// # Errors
    /// If it does not come to an end in time.
    pub fn sync(&mut self) -> anyhow::Result<Duration> {
        let start = Instant::now();
        loop {
            self.driver.wait_until("both full states", PATIENCE, |driver| {
                driver.report_due() || (driver.host_synced() && driver.reports_pending() == 0)
            })?;
            if self.driver.report_due() {
                // What changed until now is in the full state.
                self.guest.changes();
                self.driver.report_full(&self.guest.census(), PATIENCE)?;
            } else {
                return Ok(start.elapsed());
            }
            ensure!(
                start.elapsed() < PATIENCE,
                "new generations without end: {:?}",
                self.driver.counters()
            );
        }
    }

    /// Tells what changed in the guest since the last time, or everything where
    /// a new generation began, and takes what the device told.
    ///
    /// # Errors
    /// If the device takes no reports, or did what it must not.
    pub fn talk(&mut self) -> anyhow::Result<()> {
        self.driver.poll()?;
        if self.driver.report_due() {
            self.guest.changes();
            self.driver.report_full(&self.guest.census(), PATIENCE)?;
        } else {
            let changes = self.guest.changes();
            self.driver.report(&changes, PATIENCE)?;
        }
        Ok(())
    }

    /// Talks for `time`.
    ///
    /// # Errors
    /// As [`Machine::talk`].
    pub fn run_for(&mut self, time: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + time;
        loop {
            self.talk()?;
            let now = Instant::now();
            if now >= deadline {
                return Ok(());
            }
            self.driver.wait((deadline - now).min(Duration::from_millis(50)))?;
        }
    }

    /// Asks for a drop of `blocks`, which the driver must hold, and notes that
    /// their contents are undefined until the answer. Returns the ticket.
    ///
    /// # Errors
    /// If a block is not held, or the request cannot be sent.
    pub fn submit_drop(&mut self, kind: u16, blocks: &[Range]) -> anyhow::Result<u64> {
        ensure!(
            matches!(kind, wire::REQ_RELEASE | wire::REQ_RENEW),
            "request {kind} drops nothing"
        );
        let booked = wire::guest_state::BOOKED;
        for block in each(blocks) {
            ensure!(self.guest.state(block).0 == booked, "block {block} is not held");
        }
        let ticket = self.driver.submit(kind, blocks)?;
        for block in each(blocks) {
            self.guest.contents_undefined(block);
        }
        Ok(ticket)
    }

    /// Asks for a drop of free base pages in blocks that are in use, as
    /// [`Machine::submit_drop`] does of whole ones. The caller sees to it that
    /// nobody takes the pages before the answer.
    ///
    /// # Errors
    /// If a page is not free in such a block, or the request cannot be sent.
    pub fn submit_trim(&mut self, pages: &[Range]) -> anyhow::Result<u64> {
        for page in each(pages) {
            ensure!(self.guest.is_free_base(page), "page {page:#x} cannot be held");
        }
        let ticket = self.driver.submit(wire::REQ_TRIM, pages)?;
        for range in pages {
            self.guest.pages_undefined(range.first..range.first + u64::from(range.count));
        }
        Ok(ticket)
    }

    /// As [`Machine::submit_drop`], then waits for the answer. After OK the
    /// blocks are known to be zeros. Returns the status.
    ///
    /// # Errors
    /// If it is not answered in time.
    pub fn drop_blocks(&mut self, kind: u16, blocks: &[Range]) -> anyhow::Result<u32> {
        let ticket = self.submit_drop(kind, blocks)?;
        let answer = self.driver.answer(ticket, PATIENCE)?;
        if answer.response.status == wire::S_OK {
            for block in each(blocks) {
                self.guest.contents_dropped(block);
            }
        }
        Ok(answer.response.status)
    }

    /// Resets the device as a monitor does when the guest's driver is reloaded:
    /// stops the queues, clears them and starts anew. Returns what was never
    /// answered; when this returns, no drop can follow.
    ///
    /// # Errors
    /// If the daemon refuses a step of it.
    pub fn reset_device(&mut self) -> anyhow::Result<Vec<Request>> {
        self.session.stop_queues()?;
        // Used before the queues stopped, and answered.
        self.driver.poll()?;
        let unanswered = self.driver.reset()?;
        self.driver.start(&mut self.session)?;
        Ok(unanswered)
    }

    /// As [`Machine::reset_device`], by the message that resets the whole device
    /// while its queues run.
    ///
    /// # Errors
    /// If the daemon refuses a step of it.
    pub fn reset_device_by_message(&mut self) -> anyhow::Result<Vec<Request>> {
        self.session.reset()?;
        self.driver.poll()?;
        let unanswered = self.driver.reset()?;
        self.driver.start(&mut self.session)?;
        Ok(unanswered)
    }

    /// As [`Machine::reset_device`], where the rings may be broken: what is in
    /// them is not looked at.
    ///
    /// # Errors
    /// If the daemon refuses a step of it.
    pub fn reset_broken_device(&mut self) -> anyhow::Result<()> {
        self.session.stop_queues()?;
        self.driver.reset()?;
        self.driver.start(&mut self.session)
    }

    /// Has the daemon log what it writes in `log`, from here on.
    ///
    /// # Errors
    /// If the daemon refuses a step of it.
    pub fn start_log(&mut self, log: &DirtyLog) -> anyhow::Result<()> {
        self.session.set_log(log)?;
        self.session.set_logging(true, self.driver.queues(), &self.memory)
    }

    /// Ends that.
    ///
    /// # Errors
    /// If the daemon refuses a step of it.
    pub fn end_log(&mut self) -> anyhow::Result<()> {
        self.session.set_logging(false, self.driver.queues(), &self.memory)
    }

    /// Closes the connection without a word, as a monitor that is killed does.
    #[must_use]
    pub fn detach(self) -> Detached {
        Detached { memory: self.memory, driver: self.driver, guest: self.guest }
    }

    /// Connects again after the daemon died, as QEMU does: the rings stay, and
    /// each queue goes on at its used index.
    ///
    /// # Errors
    /// If the daemon refuses a step of it.
    pub fn reconnect(&mut self, socket: &Path) -> anyhow::Result<()> {
        self.session = Session::connect(socket, PATIENCE)?;
        self.driver.expect_resync();
        self.session.set_memory(&self.memory)?;
        self.driver.resume(&mut self.session)
    }

    /// Waits until the hinted host states of `blocks` are as `wanted` says.
    ///
    /// # Errors
    /// If they are not in time.
    pub fn wait_host(
        &mut self,
        blocks: &[u64],
        wanted: impl Fn(u8) -> bool,
        patience: Duration,
    ) -> anyhow::Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            self.talk()?;
            let missing = blocks.iter().copied().find(|&block| {
                let state =
                    usize::try_from(block).ok().and_then(|block| self.driver.host().get(block));
                !state.is_some_and(|&state| wanted(state))
            });
            let Some(missing) = missing else {
                return Ok(());
            };
            if Instant::now() >= deadline {
                let state = usize::try_from(missing)
                    .ok()
                    .and_then(|block| self.driver.host().get(block))
                    .context("block is out of memory")?;
                bail!(
                    "block {missing} is still hinted as {} after {patience:?}",
                    wire::host_state::NAMES[usize::from(*state)]
                );
            }
            self.driver.wait(Duration::from_millis(20))?;
        }
    }
}

/// A machine without a connection; its memory stays as it is.
pub struct Detached {
    /// Its memory.
    pub memory: Arc<GuestMemory>,
    /// The driver.
    pub driver: Driver,
    /// The model guest.
    pub guest: Guest,
}

impl Detached {
    /// Connects and starts anew, as after a reboot: the rings are cleared. Returns
    /// what was never answered, too.
    ///
    /// # Errors
    /// If the daemon refuses a step of it.
    pub fn attach(self, socket: &Path) -> anyhow::Result<(Machine, Vec<Request>)> {
        let Detached { memory, mut driver, guest } = self;
        let mut session = Session::connect(socket, PATIENCE)?;
        session.set_memory(&memory)?;
        let unanswered = driver.reset()?;
        driver.start(&mut session)?;
        let machine = Machine { memory, session, driver, guest };
        Ok((machine, unanswered))
    }
}

/// The blocks or pages of `ranges`, one by one.
pub fn each(ranges: &[Range]) -> impl Iterator<Item = u64> + '_ {
    ranges.iter().flat_map(|range| range.first..range.first.saturating_add(u64::from(range.count)))
}

/// One range for each of `blocks`.
#[must_use]
pub fn singles(blocks: &[u64]) -> Vec<Range> {
    blocks.iter().map(|&first| Range { first, count: 1 }).collect()
}

//! One virtual processor: hands what QEMU tells of it to the model.

use std::fs::File;
use std::io::{self, BufWriter};
use std::sync::Arc;

use gemini_tlbsim::counters::LiveCounters;
use gemini_tlbsim::cpu::Cpu;
use gemini_tlbsim::decode::Instruction;
use gemini_tlbsim::options::Options;
use gemini_tlbsim::paging::{ControlRegisters, PageSize, Translation};
use gemini_tlbsim::profile::Profile;
use gemini_tlbsim::record::Recorder;
use gemini_tlbsim::spaces::Spaces;
use gemini_tlbsim::trace::{Event, Header};

use crate::plugin::{Plugin, Recording, Shared};
use crate::sys::{Access, Place, Registers};

/// A virtual processor, on its own thread.
pub struct Vcpu {
    number: u32,
    profile: Profile,
    pcid: bool,
    registers: Registers,
    control: ControlRegisters,
    /// Whether CR3 was written since the registers were read.
    written: bool,
    spaces: Spaces,
    cpu: Cpu,
    shared: Shared,
    /// Version of `shared`; 0 if the registers are to be read again, too.
    seen: u64,
    recorder: Option<Recorder<BufWriter<File>>>,
}

impl Vcpu {
    /// A processor with empty TLBs.
    pub fn new(
        number: u32,
        registers: Registers,
        options: &Options,
        counters: Arc<LiveCounters>,
        shared: Shared,
    ) -> Self {
        Vcpu {
            number,
            profile: options.profile,
            pcid: options.pcid,
            registers,
            control: ControlRegisters::default(),
            written: false,
            spaces: Spaces::default(),
            cpu: Cpu::new(options.profile, counters),
            shared,
            seen: 0,
            recorder: None,
        }
    }

    /// Has the control registers read again before the next access.
    pub fn look_again(&mut self) {
        self.seen = 0;
    }

    /// Before an instruction that flushes, or changes page tables.
    pub fn instruction(&mut self, instruction: Instruction) {
        match instruction {
            Instruction::FlushPage(operand) => {
                let address = operand.address(|number| self.registers.general(number));
                self.cpu.flush_page(address);
                self.note(&Event::FlushPage(address));
            }
            // The values that are written are in the registers only afterwards.
            Instruction::WriteCr3 => {
                self.written = true;
                self.look_again();
            }
            Instruction::FlushAll => {
                self.flush_all();
                self.look_again();
            }
        }
    }

    /// After an access.
    pub fn access(&mut self, plugin: &Plugin, access: &Access) {
        if plugin.version() != self.seen {
            self.catch_up(plugin);
        }
        self.touch(plugin, access, access.address);
        let last = access.last_byte();
        if PageSize::Base.start(last) != PageSize::Base.start(access.address) {
            self.touch(plugin, access, last);
        }
    }

    fn touch(&mut self, plugin: &Plugin, access: &Access, address: u64) {
        if !self.control.paging() {
            self.cpu.skip();
            return;
        }
        let control = self.control;
        let translate = |address| translate(plugin, control, access, address);
        let host = &self.shared.host;
        match &mut self.recorder {
            None => self.cpu.access(address, host, translate),
            Some(recorder) => {
                recorder.access(&mut self.cpu, address, host, translate);
                if recorder.is_full() {
                    self.end_trace(plugin);
                }
            }
        }
    }

    /// Takes over what has changed: registers, the host, whether to record.
    fn catch_up(&mut self, plugin: &Plugin) {
        self.seen = plugin.version();
        let Some(shared) = plugin.shared() else { return };
        let before = std::mem::replace(&mut self.shared, shared);
        if before.round != self.shared.round {
            // Flushes may have been missed meanwhile.
            self.flush_all();
        }
        if !Arc::ptr_eq(&before.host, &self.shared.host) {
            self.cpu.host_changed();
            self.note(&Event::Host(self.shared.host.bits().to_vec()));
        }
        let same = match (&before.recording, &self.shared.recording) {
            (Some(before), Some(now)) => Arc::ptr_eq(before, now),
            (None, None) => true,
            _ => false,
        };
        if !same {
            self.end_trace(plugin);
            if let Some(recording) = self.shared.recording.clone() {
                self.begin_trace(plugin, &recording);
            }
        }
        self.read_registers();
    }

    fn read_registers(&mut self) {
        let control = self.registers.control();
        let moved = control.root() != self.control.root();
        if self.written || moved {
            if self.pcid {
                let switched = self.spaces.switch(control.root());
                self.cpu.switch_space(switched.space);
                self.note(&Event::Switch(switched.space));
                if switched.flush {
                    self.flush_space();
                }
            } else {
                self.flush_space();
            }
        }
        self.written = false;
        self.control = control;
    }

    fn flush_space(&mut self) {
        self.cpu.flush_space();
        self.note(&Event::FlushSpace);
    }

    fn flush_all(&mut self) {
        self.cpu.flush_all();
        self.note(&Event::FlushAll);
    }

    fn begin_trace(&mut self, plugin: &Plugin, recording: &Recording) {
        // A trace begins with empty TLBs.
        self.cpu = Cpu::new(self.profile, Arc::clone(self.cpu.counters()));
        self.spaces = Spaces::default();
        self.written = true;
        match self.open_trace(recording) {
            Ok(recorder) => {
                self.recorder = Some(recorder);
                plugin.trace_begun();
            }
            Err(error) => plugin.fail(&error.into()),
        }
    }

    fn open_trace(&self, recording: &Recording) -> io::Result<Recorder<BufWriter<File>>> {
        let host = &self.shared.host;
        let header = Header {
            processor: self.number,
            memory: host.layout().bytes(),
            host_page: host.huge_size(),
            profile: self.profile.to_string(),
        };
        let mut path = recording.path.clone().into_os_string();
        path.push(format!(".{}", self.number));
        let output = BufWriter::new(File::create(path)?);
        Recorder::new(output, &header, &self.cpu, host, recording.limit)
    }

    fn end_trace(&mut self, plugin: &Plugin) {
        if let Some(recorder) = self.recorder.take() {
            if let Err(error) = recorder.finish(&self.cpu) {
                plugin.fail(&error.into());
            }
            plugin.trace_ended();
        }
    }

    fn note(&mut self, event: &Event) {
        if let Some(recorder) = &mut self.recorder {
            recorder.event(event);
        }
    }
}

/// Walks through the guest's page tables, and compares the end with where QEMU
/// went. Devices are not translated.
fn translate(
    plugin: &Plugin,
    control: ControlRegisters,
    access: &Access,
    address: u64,
) -> Option<Translation> {
    let ram = plugin.ram()?;
    let place = access.place(address);
    if matches!(place, Place::Device) {
        return None;
    }
    let found = control.walk(ram, address);
    if let Place::Physical(expected) = place {
        if found.map(|found| found.physical(address)) != Some(expected) {
            plugin.disagree();
            return None;
        }
    }
    found.filter(|found| ram.has(found.physical(address)))
}

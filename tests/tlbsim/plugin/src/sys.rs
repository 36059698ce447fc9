//! QEMU's plugin interface (version 4, QEMU 9.2 to 10.x), this process's memory
//! map and its clock, and everything that is `unsafe` about them.

use std::cell::{Cell, RefCell};
use std::ffi::{c_char, c_int, c_uint, c_void, CStr};
use std::fs::{self, File};
use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{OnceLock, PoisonError, RwLock};

use anyhow::{ensure, Context};
use gemini_pagemap::{HUGE, PRESENT};
use gemini_tlbsim::clock::SlowClock;
use gemini_tlbsim::decode::Instruction;
use gemini_tlbsim::host::{HostMap, RamLayout};
use gemini_tlbsim::paging::{ControlRegisters, GuestMemory, PageSize};

use crate::plugin::Plugin;
use crate::vcpu::Vcpu;

/// Version of the interface; QEMU refuses a plugin of a version that it does not
/// have.
#[no_mangle]
pub static qemu_plugin_version: c_int = 4;

/// The head of `qemu_info_t`.
#[repr(C)]
pub struct Info {
    target_name: *const c_char,
    version_min: c_int,
    version_current: c_int,
    system_emulation: bool,
}

/// The head of `GArray` and `GByteArray`.
#[repr(C)]
struct Array {
    data: *mut u8,
    len: c_uint,
}

/// `qemu_plugin_reg_descriptor`.
#[repr(C)]
#[derive(Clone, Copy)]
struct RegisterDescriptor {
    handle: *mut c_void,
    name: *const c_char,
    feature: *const c_char,
}

// `enum qemu_plugin_cb_flags` and `enum qemu_plugin_mem_rw`.
const CB_R_REGS: c_int = 1;
const MEM_RW: c_int = 3;

// `enum qemu_plugin_op`.
const ADD: c_int = 0;

/// `qemu_plugin_u64`: a number of each virtual processor.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct ScoreboardNumber {
    scoreboard: *mut c_void,
    offset: usize,
}

type SimpleCallback = extern "C" fn(u64);
type VcpuCallback = extern "C" fn(u64, c_uint);
type BlockCallback = extern "C" fn(u64, *mut c_void);
type InstructionCallback = extern "C" fn(c_uint, *mut c_void);
type AccessCallback = extern "C" fn(c_uint, u32, u64, *mut c_void);

extern "C" {
    fn qemu_plugin_reset(id: u64, callback: SimpleCallback);
    fn qemu_plugin_register_vcpu_init_cb(id: u64, callback: VcpuCallback);
    fn qemu_plugin_register_vcpu_resume_cb(id: u64, callback: VcpuCallback);
    fn qemu_plugin_register_vcpu_tb_trans_cb(id: u64, callback: BlockCallback);
    fn qemu_plugin_register_vcpu_insn_exec_cb(
        instruction: *mut c_void,
        callback: InstructionCallback,
        flags: c_int,
        data: *mut c_void,
    );
    fn qemu_plugin_register_vcpu_mem_cb(
        instruction: *mut c_void,
        callback: AccessCallback,
        flags: c_int,
        accesses: c_int,
        data: *mut c_void,
    );
    fn qemu_plugin_scoreboard_new(element_size: usize) -> *mut c_void;
    fn qemu_plugin_u64_get(number: ScoreboardNumber, index: c_uint) -> u64;
    fn qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(
        block: *mut c_void,
        operation: c_int,
        number: ScoreboardNumber,
        value: u64,
    );
    fn qemu_plugin_tb_n_insns(block: *const c_void) -> usize;
    fn qemu_plugin_tb_get_insn(block: *const c_void, index: usize) -> *mut c_void;
    fn qemu_plugin_insn_data(instruction: *const c_void, into: *mut u8, length: usize) -> usize;
    fn qemu_plugin_mem_size_shift(info: u32) -> c_uint;
    fn qemu_plugin_get_hwaddr(info: u32, address: u64) -> *mut c_void;
    fn qemu_plugin_hwaddr_is_io(address: *const c_void) -> bool;
    fn qemu_plugin_hwaddr_phys_addr(address: *const c_void) -> u64;
    fn qemu_plugin_get_registers() -> *mut Array;
    fn qemu_plugin_read_register(handle: *mut c_void, into: *mut Array) -> c_int;
    // GLib, which QEMU is linked with.
    fn g_array_free(array: *mut Array, free_segment: c_int) -> *mut c_char;
    fn g_byte_array_new() -> *mut Array;
    fn g_byte_array_set_size(array: *mut Array, length: c_uint) -> *mut Array;
    fn g_byte_array_unref(array: *mut Array);
}

static PLUGIN: OnceLock<Plugin> = OnceLock::new();

thread_local! {
    /// The virtual processors that this thread runs: one, or all.
    static VCPUS: RefCell<Vec<Option<Vcpu>>> = const { RefCell::new(Vec::new()) };
}

/// What QEMU calls when it has loaded the plugin; 0 for success.
///
/// # Safety
/// As QEMU's interface says: `info` is valid, and `arguments` has `count` strings.
#[no_mangle]
pub unsafe extern "C" fn qemu_plugin_install(
    id: u64,
    info: *const Info,
    count: c_int,
    arguments: *const *const c_char,
) -> c_int {
    // SAFETY: passed on as they came.
    let result = unsafe { target_and_words(info, count, arguments) }
        .and_then(|words| Plugin::new(words.iter().map(String::as_str), Instructions::new()));
    match result {
        Ok(plugin) => {
            if let Err(error) = PLUGIN.get_or_init(|| plugin).start() {
                eprintln!("gemini-tlbsim: {error:#}");
                return 1;
            }
        }
        Err(error) => {
            eprintln!("gemini-tlbsim: {error:#}");
            return 1;
        }
    }
    register(id);
    0
}

fn register(id: u64) {
    // SAFETY: the identifier is the one that QEMU gave, and the callbacks have the
    // signatures that it calls them with.
    unsafe {
        qemu_plugin_register_vcpu_init_cb(id, on_vcpu_init);
        qemu_plugin_register_vcpu_resume_cb(id, on_vcpu_resume);
        qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
    }
}

/// When QEMU has thrown away all translated code and all callbacks.
extern "C" fn on_reset(id: u64) {
    if let Some(plugin) = PLUGIN.get() {
        plugin.translating_anew();
    }
    register(id);
}

/// Checks what is emulated, and copies the arguments.
///
/// # Safety
/// As [`qemu_plugin_install`].
unsafe fn target_and_words(
    info: *const Info,
    count: c_int,
    arguments: *const *const c_char,
) -> anyhow::Result<Vec<String>> {
    // SAFETY: QEMU's description is valid, and begins like this one.
    let info = unsafe { &*info };
    // SAFETY: its name is a string.
    let target = unsafe { CStr::from_ptr(info.target_name) };
    ensure!(
        info.system_emulation && target == c"x86_64",
        "only machines with x86-64 processors are simulated"
    );
    (0..usize::try_from(count)?)
        .map(|index| {
            // SAFETY: there are `count` of them.
            let word = unsafe { CStr::from_ptr(*arguments.add(index)) };
            Ok(word.to_str().context("an argument is no UTF-8")?.to_owned())
        })
        .collect()
}

/// Runs `action` on a virtual processor of this thread.
fn with_vcpu(index: c_uint, action: impl FnOnce(&mut Vcpu, &Plugin)) {
    VCPUS.with(|vcpus| {
        let (Ok(mut vcpus), Some(plugin)) = (vcpus.try_borrow_mut(), PLUGIN.get()) else {
            return;
        };
        let slot = usize::try_from(index).ok().and_then(|index| vcpus.get_mut(index));
        if let Some(Some(vcpu)) = slot {
            action(vcpu, plugin);
        }
    });
}

extern "C" fn on_vcpu_init(_id: u64, index: c_uint) {
    let Some(plugin) = PLUGIN.get() else { return };
    let vcpu = Registers::of_this_vcpu().and_then(|registers| plugin.add_vcpu(index, registers));
    match vcpu {
        Ok(vcpu) => VCPUS.with(|vcpus| {
            if let (Ok(mut vcpus), Ok(index)) = (vcpus.try_borrow_mut(), usize::try_from(index)) {
                if vcpus.len() <= index {
                    vcpus.resize_with(index + 1, || None);
                }
                vcpus[index] = Some(vcpu);
            }
        }),
        Err(error) => plugin.fail(&error),
    }
}

/// A processor that was halted may have been reset meanwhile.
extern "C" fn on_vcpu_resume(id: u64, index: c_uint) {
    with_vcpu(index, |vcpu, _| vcpu.look_again());
    if PLUGIN.get().is_some_and(Plugin::must_translate_anew) {
        // SAFETY: the identifier is ours, and this thread runs a virtual processor.
        unsafe { qemu_plugin_reset(id, on_reset) };
    }
}

/// Longest x86 instruction.
const LONGEST: usize = 15;

extern "C" fn on_translation(_id: u64, block: *mut c_void) {
    let plugin = PLUGIN.get().filter(|plugin| plugin.instrumented());
    let instrumented = plugin.is_some();
    // SAFETY: QEMU's handles are valid during this call, there are as many
    // instructions as it says, and the buffer has the length that is told.
    unsafe {
        let length = qemu_plugin_tb_n_insns(block);
        if let Some(plugin) = plugin {
            plugin.instructions.count(block, length as u64);
        }
        for index in 0..length {
            let instruction = qemu_plugin_tb_get_insn(block, index);
            let mut bytes = [0; LONGEST];
            let length = qemu_plugin_insn_data(instruction, bytes.as_mut_ptr(), bytes.len());
            if let Some(found) = Instruction::decode(bytes.get(..length).unwrap_or_default()) {
                // The interface has room for a pointer; it is never followed.
                let data = ptr::without_provenance_mut(usize::try_from(found.pack()).unwrap_or(0));
                qemu_plugin_register_vcpu_insn_exec_cb(
                    instruction,
                    on_instruction,
                    CB_R_REGS,
                    data,
                );
            }
            if instrumented {
                qemu_plugin_register_vcpu_mem_cb(
                    instruction,
                    on_access,
                    CB_R_REGS,
                    MEM_RW,
                    ptr::null_mut(),
                );
            }
        }
    }
}

/// Before such an instruction is executed.
extern "C" fn on_instruction(index: c_uint, data: *mut c_void) {
    let instruction = Instruction::unpack(data.addr() as u64);
    with_vcpu(index, |vcpu, _| vcpu.instruction(instruction));
}

/// After an access.
extern "C" fn on_access(index: c_uint, info: u32, address: u64, _data: *mut c_void) {
    with_vcpu(index, |vcpu, plugin| vcpu.access(plugin, &Access { info, address }));
}

/// How far the numbers of processors are from each other, in bytes: were they in one
/// line of the cache, their threads would take it from each other in every block.
const APART: usize = 128;

/// Instructions that each virtual processor has executed, counted by the code that
/// QEMU translates, without a call.
#[derive(Debug)]
pub struct Instructions(ScoreboardNumber);

// SAFETY: a handle that QEMU takes on any thread, of something that stays as long
// as QEMU does.
unsafe impl Send for Instructions {}
// SAFETY: as above; nothing is changed through it but by QEMU.
unsafe impl Sync for Instructions {}

impl Instructions {
    /// None yet. For when QEMU loads the plugin, and once: it stays for ever.
    fn new() -> Self {
        // SAFETY: room for each processor, of which the first bytes are its number,
        // zero to begin with.
        let scoreboard = unsafe { qemu_plugin_scoreboard_new(APART) };
        Instructions(ScoreboardNumber { scoreboard, offset: 0 })
    }

    /// Has a block of translated code count its instructions, `length`, whenever it
    /// is entered: also those behind one that faults.
    ///
    /// # Safety
    /// `block` is what QEMU translates now.
    unsafe fn count(&self, block: *mut c_void, length: u64) {
        // SAFETY: the block is valid, and the number is inside its scoreboard.
        unsafe { qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(block, ADD, self.0, length) };
    }

    /// Those of a virtual processor that has come.
    #[must_use]
    pub fn executed_by(&self, vcpu: u32) -> u64 {
        // SAFETY: QEMU has a number for every processor that has come. It moves them
        // when a 17th, 33rd and so on comes, which is when a guest starts: nobody
        // is to ask while one is plugged in.
        unsafe { qemu_plugin_u64_get(self.0, vcpu) }
    }
}

/// An access to memory, during its callback.
pub struct Access {
    info: u32,
    /// Virtual address of its first byte.
    pub address: u64,
}

/// Where QEMU says that an access went.
pub enum Place {
    /// To this guest physical address.
    Physical(u64),
    /// To a device.
    Device,
    /// It does not tell.
    Unknown,
}

impl Access {
    /// Its last byte.
    #[must_use]
    pub fn last_byte(&self) -> u64 {
        // SAFETY: the description of this access is valid during its callback.
        let shift = unsafe { qemu_plugin_mem_size_shift(self.info) };
        self.address.wrapping_add((1 << shift) - 1)
    }

    /// Where the byte at `address`, which is one of its own, went.
    #[must_use]
    pub fn place(&self, address: u64) -> Place {
        // SAFETY: the description of this access is valid during its callback; so
        // is what is made of it, for this thread.
        unsafe {
            let place = qemu_plugin_get_hwaddr(self.info, address);
            if place.is_null() {
                Place::Unknown
            } else if qemu_plugin_hwaddr_is_io(place) {
                Place::Device
            } else {
                Place::Physical(qemu_plugin_hwaddr_phys_addr(place))
            }
        }
    }
}

/// Names of the general registers by their number.
const GENERAL: [&CStr; 16] = [
    c"rax", c"rcx", c"rdx", c"rbx", c"rsp", c"rbp", c"rsi", c"rdi", c"r8", c"r9", c"r10", c"r11",
    c"r12", c"r13", c"r14", c"r15",
];

const CONTROL: [&CStr; 3] = [c"cr0", c"cr3", c"cr4"];

/// Registers of a virtual processor, for callbacks on its thread.
pub struct Registers {
    general: [*mut c_void; 16],
    control: [*mut c_void; 3],
    buffer: *mut Array,
}

impl Registers {
    /// Finds the registers of the virtual processor that this thread runs now.
    ///
    /// # Errors
    /// If QEMU has not all of them.
    fn of_this_vcpu() -> anyhow::Result<Self> {
        // SAFETY: takes nothing; the array is ours.
        let array = unsafe { qemu_plugin_get_registers() };
        ensure!(!array.is_null(), "QEMU does not tell its registers");
        // SAFETY: an array of `len` such descriptors, whose names are strings that
        // stay.
        let found: Vec<(&CStr, *mut c_void)> = unsafe {
            let Array { data, len } = ptr::read(array);
            let descriptors = data.cast::<RegisterDescriptor>();
            (0..len as usize)
                .map(|index| {
                    let descriptor = *descriptors.add(index);
                    (CStr::from_ptr(descriptor.name), descriptor.handle)
                })
                .collect()
        };
        // SAFETY: it is ours, and nothing of it is used any more.
        unsafe { g_array_free(array, 1) };
        let find = |wanted: &CStr| {
            let register = found.iter().find(|(name, _)| *name == wanted);
            register.map(|&(_, handle)| handle).with_context(|| format!("QEMU has no {wanted:?}"))
        };
        let mut general = [ptr::null_mut(); 16];
        let mut control = [ptr::null_mut(); 3];
        for (handle, name) in general.iter_mut().zip(GENERAL).chain(control.iter_mut().zip(CONTROL))
        {
            *handle = find(name)?;
        }
        // SAFETY: makes an array of ours.
        let buffer = unsafe { g_byte_array_new() };
        Ok(Registers { general, control, buffer })
    }

    /// The control registers that matter for paging.
    #[must_use]
    pub fn control(&self) -> ControlRegisters {
        let [cr0, cr3, cr4] = self.control.map(|handle| self.read(handle));
        ControlRegisters { cr0, cr3, cr4 }
    }

    /// A general register by its number, 0 to 15.
    #[must_use]
    pub fn general(&self, number: u8) -> u64 {
        self.general.get(usize::from(number)).map_or(0, |&handle| self.read(handle))
    }

    /// 4 or 8 bytes, as the processor's mode is; 0 if QEMU cannot read it.
    fn read(&self, handle: *mut c_void) -> u64 {
        // SAFETY: the buffer is ours, and this is called in callbacks that may read
        // registers; afterwards it has `len` bytes.
        let bytes = unsafe {
            g_byte_array_set_size(self.buffer, 0);
            if qemu_plugin_read_register(handle, self.buffer) <= 0 {
                return 0;
            }
            let Array { data, len } = ptr::read(self.buffer);
            std::slice::from_raw_parts(data, len as usize)
        };
        bytes.iter().take(8).rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
    }
}

impl Drop for Registers {
    fn drop(&mut self) {
        // SAFETY: made by `of_this_vcpu`, and not used any more.
        unsafe { g_byte_array_unref(self.buffer) };
    }
}

/// The guest's memory as this process, QEMU, has it mapped.
#[derive(Debug)]
pub struct GuestRam {
    mapping: Range<u64>,
    layout: RamLayout,
    /// Size of the host's huge pages under it.
    huge: PageSize,
}

impl GuestRam {
    /// Finds the memfd of `bytes` bytes.
    ///
    /// # Errors
    /// If this process has no such mapping.
    pub fn find(bytes: u64) -> anyhow::Result<Self> {
        let maps = fs::read_to_string("/proc/self/smaps").context("cannot read smaps")?;
        let mut lines = maps.lines();
        let mapping = lines
            .by_ref()
            .filter(|line| line.contains("/memfd:"))
            .filter_map(parse_range)
            .find(|range| range.end - range.start == bytes)
            .with_context(|| format!("QEMU maps no memfd of {bytes} bytes"))?;
        let page = lines
            .find_map(|line| line.strip_prefix("KernelPageSize:"))
            .and_then(|text| text.trim().strip_suffix(" kB")?.parse::<u64>().ok())
            .context("the kernel does not tell the size of its pages")?;
        let huge = if page << 10 == 1 << PageSize::Giant.shift() {
            PageSize::Giant
        } else {
            PageSize::Huge
        };
        Ok(GuestRam { mapping, layout: RamLayout::q35(bytes), huge })
    }

    /// Whether there is memory at a guest physical address.
    #[must_use]
    pub fn has(&self, gpa: u64) -> bool {
        self.layout.offset(gpa).is_some()
    }

    /// A host of which nothing is known yet.
    #[must_use]
    pub fn blank_host(&self) -> HostMap {
        HostMap::new(self.layout, self.huge)
    }

    /// What this process's page tables map with huge pages now.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn scan(&self) -> anyhow::Result<HostMap> {
        let mut host = self.blank_host();
        let file = File::open("/proc/self/pagemap").context("cannot open the page map")?;
        let huge = gemini_pagemap::ranges(&file, &self.mapping, PRESENT | HUGE);
        for range in huge.context("cannot scan the page map (PAGEMAP_SCAN, Linux 6.7 or newer)")? {
            host.set_huge(range.start - self.mapping.start, range.end - range.start);
        }
        Ok(host)
    }
}

impl GuestMemory for GuestRam {
    fn word(&self, gpa: u64) -> Option<u64> {
        let offset = self.layout.offset(gpa & !7)?;
        let address = usize::try_from(self.mapping.start + offset).ok()?;
        let word = ptr::with_exposed_provenance_mut::<u64>(address);
        // SAFETY: an aligned word of the guest's memory, which QEMU keeps mapped
        // for reading and writing as long as it runs. The guest may write it at
        // any time, hence an atomic.
        Some(unsafe { AtomicU64::from_ptr(word) }.load(Ordering::Relaxed))
    }
}

/// START-END at the beginning of a line of a memory map.
fn parse_range(line: &str) -> Option<Range<u64>> {
    let (start, end) = line.split_once(' ')?.0.split_once('-')?;
    let parse = |text| u64::from_str_radix(text, 16).ok();
    Some(parse(start)?..parse(end)?)
}

/// The clock that QEMU sees, and with it the guest.
static CLOCK: RwLock<SlowClock> = RwLock::new(SlowClock::new());

/// Whether QEMU asks this library for the time.
static ASKED: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// Whether this thread sees true time: what it waits for, it waits for by the
    /// kernel's clock.
    static TRUE_TIME: Cell<bool> = const { Cell::new(false) };
}

const SECOND: u64 = 1_000_000_000;

/// The thread sees true time from here on.
pub fn see_true_time() {
    TRUE_TIME.with(|flag| flag.set(true));
}

/// Has the guest's clock take `slowdown` as long for a second.
///
/// # Errors
/// If QEMU asks the C library for the time, because it has not loaded this library
/// ahead of it.
pub fn slow_clock(slowdown: u32) -> anyhow::Result<()> {
    ensure!(
        ASKED.load(Ordering::Relaxed),
        "QEMU has a clock of its own: name this plugin in LD_PRELOAD, too, when it is started"
    );
    let mut clock = CLOCK.write().unwrap_or_else(PoisonError::into_inner);
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a clock that every kernel has, and room for its time.
    ensure!(unsafe { kernel_time(libc::CLOCK_MONOTONIC, &raw mut now) } == 0, "there is no time");
    clock.slow(nanoseconds(&now), slowdown);
    Ok(())
}

/// The time of the kernel's clock `id`.
///
/// # Safety
/// As of `clock_gettime`: there is room at `time`.
unsafe fn kernel_time(id: libc::clockid_t, time: *mut libc::timespec) -> c_int {
    // SAFETY: the system call has the same arguments, and the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_clock_gettime, id, time) };
    if result == 0 {
        0
    } else {
        -1
    }
}

fn nanoseconds(time: &libc::timespec) -> u64 {
    let number = |part: i64| u64::try_from(part).unwrap_or(0);
    number(time.tv_sec) * SECOND + number(time.tv_nsec)
}

/// What QEMU calls in place of the C library's, where this library was loaded ahead
/// of it (LD_PRELOAD): the clock that the guest's is made of can be slowed down.
/// Elsewhere nobody calls it.
///
/// # Safety
/// As of the C library's: there is room at `time`.
#[no_mangle]
pub unsafe extern "C" fn clock_gettime(id: libc::clockid_t, time: *mut libc::timespec) -> c_int {
    // SAFETY: passed on as it came.
    let result = unsafe { kernel_time(id, time) };
    if result == 0 && id == libc::CLOCK_MONOTONIC && !TRUE_TIME.with(Cell::get) {
        ASKED.store(true, Ordering::Relaxed);
        // SAFETY: the kernel has just written it.
        let time = unsafe { &mut *time };
        let shown = CLOCK.read().unwrap_or_else(PoisonError::into_inner).show(nanoseconds(time));
        let part = |number: u64| i64::try_from(number).unwrap_or(0);
        (time.tv_sec, time.tv_nsec) = (part(shown / SECOND), part(shown % SECOND));
    }
    result
}

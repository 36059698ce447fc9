//! A client for QEMU's machine protocol.

use std::io::{BufRead, BufReader, Write};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{bail, Context};
use serde_json::{json, Value};

/// How long QEMU may take to answer a command.
const TIMEOUT: Duration = Duration::from_secs(30);

/// A connection to one QEMU.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    /// Events that nobody asked for yet.
    events: Vec<Value>,
}

/// Memory that was plugged into a guest, or can be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryDevice {
    /// Its name.
    pub id: String,
    /// Guest physical addresses.
    pub gpa: Range<u64>,
    /// Whether the guest has only what it plugged of it (virtio-mem).
    pub pluggable: bool,
}

impl MemoryDevice {
    fn parse(value: &Value) -> Option<Self> {
        let data = &value["data"];
        let pluggable = value["type"] == "virtio-mem";
        let start = data[if pluggable { "memaddr" } else { "addr" }].as_u64()?;
        let size = data[if pluggable { "max-size" } else { "size" }].as_u64()?;
        let id = data["id"].as_str()?.to_owned();
        Some(MemoryDevice { id, gpa: start..start + size, pluggable })
    }
}

impl Qmp {
    /// Connects, and leaves negotiation mode.
    ///
    /// # Errors
    /// If nothing listens there, or it is not QEMU.
    pub fn connect(path: &Path) -> anyhow::Result<Self> {
        let writer = UnixStream::connect(path)
            .with_context(|| format!("cannot connect to {}", path.display()))?;
        writer.set_read_timeout(Some(TIMEOUT))?;
        writer.set_write_timeout(Some(TIMEOUT))?;
        let reader = BufReader::new(writer.try_clone()?);
        let mut qmp = Qmp { reader, writer, events: Vec::new() };
        let greeting = qmp.read()?;
        if greeting.get("QMP").is_none() {
            bail!("no greeting of QEMU's: {greeting}");
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and returns what it returns.
    ///
    /// # Errors
    /// If QEMU refuses, or is gone.
    pub fn execute(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        let mut text = json!({"execute": command, "arguments": arguments}).to_string();
        text.push('\n');
        self.writer
            .write_all(text.as_bytes())
            .with_context(|| format!("cannot send {command} to QEMU"))?;
        loop {
            let mut answer = self.read().with_context(|| format!("no answer to {command}"))?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {command}: {error}");
            }
            if let Some(result) = answer.get_mut("return") {
                return Ok(result.take());
            }
            if answer.get("event").is_some() {
                self.events.push(answer);
            }
        }
    }

    /// Events that came before the last answer, each told once.
    pub fn take_events(&mut self) -> Vec<Value> {
        std::mem::take(&mut self.events)
    }

    /// Memory beside the machine's own.
    ///
    /// # Errors
    /// If QEMU is gone.
    pub fn memory_devices(&mut self) -> anyhow::Result<Vec<MemoryDevice>> {
        let devices = self.execute("query-memory-devices", json!({}))?;
        let devices = devices.as_array().context("QEMU tells no list")?;
        devices
            .iter()
            .map(|device| MemoryDevice::parse(device).with_context(|| format!("{device}")))
            .collect()
    }

    /// Runs a command of the monitor for people and returns its text.
    ///
    /// # Errors
    /// If QEMU refuses, or is gone.
    pub fn monitor(&mut self, line: &str) -> anyhow::Result<String> {
        let result = self.execute("human-monitor-command", json!({"command-line": line}))?;
        Ok(result.as_str().unwrap_or_default().to_owned())
    }

    /// Whether the guest runs (and is not paused, or shut down).
    ///
    /// # Errors
    /// If QEMU is gone.
    pub fn is_running(&mut self) -> anyhow::Result<bool> {
        let status = self.execute("query-status", json!({}))?;
        Ok(status["running"] == true)
    }

    /// Resets the machine as its button would.
    ///
    /// # Errors
    /// If QEMU is gone.
    pub fn reset(&mut self) -> anyhow::Result<()> {
        self.execute("system_reset", json!({})).map(drop)
    }

    /// QEMU's address of the guest physical address `gpa`.
    ///
    /// # Errors
    /// If there is no memory there.
    pub fn host_address(&mut self, gpa: u64) -> anyhow::Result<u64> {
        let text = self.monitor(&format!("gpa2hva {gpa:#x}"))?;
        text.rsplit_once(" is 0x")
            .and_then(|(_, digits)| u64::from_str_radix(digits.trim(), 16).ok())
            .with_context(|| format!("QEMU does not tell where {gpa:#x} is: {text}"))
    }

    fn read(&mut self) -> anyhow::Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line).context("QEMU is silent")? == 0 {
            bail!("QEMU closed its monitor");
        }
        serde_json::from_str(&line).with_context(|| format!("QEMU says no JSON: {line}"))
    }
}

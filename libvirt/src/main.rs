//! `gemini-virt-xml`: a filter between `virsh dumpxml` and `virsh define`.

use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use gemini_virt_xml::{Changed, Device};

#[derive(Parser)]
#[command(version, about = "Adds vhost-device-gemini to a libvirt domain's XML, or takes it out")]
#[command(after_help = "\
virsh dumpxml --inactive --security-info NAME >domain.xml
gemini-virt-xml add --socket PATH --emulator PATH domain.xml >with.xml
virsh define with.xml")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Print the domain's XML with the device
    Add(AddArgs),
    /// Print the domain's XML as it was before the device was added
    Remove(Input),
}

#[derive(Args)]
struct AddArgs {
    /// Socket that the domain's daemon listens on
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// QEMU that knows the device; without it the domain keeps its own
    #[arg(long, value_name = "PATH")]
    emulator: Option<PathBuf>,
    /// Never drop memory that the guest releases; needed with passed-through devices
    #[arg(long)]
    no_release: bool,
    #[command(flatten)]
    input: Input,
}

#[derive(Args)]
struct Input {
    /// The domain's XML; without it, or with -, it comes from standard input
    file: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<(), Box<dyn std::error::Error>> {
    let changed = match command {
        Command::Add(args) => {
            let device = Device::new(&args.socket, args.emulator.as_deref(), !args.no_release)?;
            gemini_virt_xml::add(&args.input.read()?, &device)?
        }
        Command::Remove(input) => gemini_virt_xml::remove(&input.read()?)?,
    };
    let Changed { text, notes } = changed;
    for note in notes {
        eprintln!("note: {note}");
    }
    // Not print!, which panics when the reader is gone.
    let mut output = io::stdout().lock();
    output.write_all(text.as_bytes())?;
    output.flush()?;
    Ok(())
}

impl Input {
    fn read(&self) -> Result<String, String> {
        match &self.file {
            Some(path) if path.as_os_str() != "-" => std::fs::read_to_string(path)
                .map_err(|error| format!("cannot read {}: {error}", path.display())),
            _ => {
                let mut text = String::new();
                io::stdin()
                    .read_to_string(&mut text)
                    .map_err(|error| format!("cannot read standard input: {error}"))?;
                Ok(text)
            }
        }
    }
}

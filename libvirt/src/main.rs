//! `gemini-virt-xml`: a filter between `virsh dumpxml` and `virsh define`.

use std::io::{self, Read, Write};
use std::process::ExitCode;

use clap::Parser;
use gemini_virt_xml::args::{Args, Command, Input};
use gemini_virt_xml::{Changed, Device};

fn main() -> ExitCode {
    match run(Args::parse().command) {
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
            gemini_virt_xml::add(&read(&args.input)?, &device)?
        }
        Command::Remove(input) => gemini_virt_xml::remove(&read(&input)?)?,
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

fn read(input: &Input) -> Result<String, String> {
    match &input.file {
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

//! The command line of `gemini-virt-xml`, for the program itself and for what is made of it: its
//! manual page and completions.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// The whole of it.
#[derive(Debug, Parser)]
#[command(version, about = "Adds vhost-device-gemini to a libvirt domain's XML, or takes it out")]
#[command(after_help = "\
virsh dumpxml --inactive --security-info NAME >domain.xml
gemini-virt-xml add --socket PATH --emulator PATH domain.xml >with.xml
virsh define with.xml")]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print the domain's XML with the device
    Add(AddArgs),
    /// Print the domain's XML as it was before the device was added
    Remove(Input),
}

/// What the device is to be.
#[derive(Debug, clap::Args)]
pub struct AddArgs {
    /// Socket that the domain's daemon listens on
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// QEMU that knows the device; without it the domain keeps its own
    #[arg(long, value_name = "PATH")]
    pub emulator: Option<PathBuf>,
    /// Never drop memory that the guest releases; needed with passed-through devices
    #[arg(long)]
    pub no_release: bool,
    /// The domain.
    #[command(flatten)]
    pub input: Input,
}

/// Where the domain's XML comes from.
#[derive(Debug, clap::Args)]
pub struct Input {
    /// The domain's XML; without it, or with -, it comes from standard input
    pub file: Option<PathBuf>,
}

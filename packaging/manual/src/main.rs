//! `gemini-manual`: writes the manual pages, completions and settings that packages install.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Writes what is installed beside the programs.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Write manual pages and completions of programs, as they lie below /usr/share
    Pages {
        /// The package's own usr/share
        #[arg(long, value_name = "DIRECTORY")]
        into: PathBuf,
        /// Programs that the package has
        #[arg(required = true, value_name = "PROGRAM")]
        programs: Vec<String>,
    },
    /// Print the daemon's file of settings
    Settings,
}

fn main() -> ExitCode {
    let result = match Args::parse().command {
        Command::Pages { into, programs } => pages(&into, &programs),
        Command::Settings => io::stdout()
            .write_all(gemini_manual::settings::file().as_bytes())
            .map_err(|error| error.to_string()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn pages(into: &Path, names: &[String]) -> Result<(), String> {
    let known = gemini_manual::programs();
    for name in names {
        let program = known
            .iter()
            .find(|program| program.name() == name)
            .ok_or_else(|| format!("no program is named {name}"))?;
        program
            .install(into)
            .map_err(|error| format!("cannot write below {}: {error}", into.display()))?;
    }
    Ok(())
}

//! `geminictl`: looks at a running `vhost-device-gemini` and changes what it does.

use clap::Parser;
use std::io::Write;
use std::process::ExitCode;
use vhost_device_gemini::ctl;

fn main() -> ExitCode {
    let result = ctl::run(&ctl::Args::parse());
    let written = match &result {
        Ok(text) => std::io::stdout().write_all(text.as_bytes()),
        Err(error) => writeln!(std::io::stderr(), "geminictl: {error}"),
    };
    // Whoever reads may have seen enough (a pager, head).
    if result.is_ok() && written.is_ok() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

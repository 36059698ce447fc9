//! Process 1 of the test guest, and its agent.

use std::process::ExitCode;

fn main() -> ExitCode {
    let argument = std::env::args().nth(1);
    let result = match argument.as_deref() {
        Some("agent") => gemini_guest::agent::run(),
        Some("work") => gemini_guest::worker::serve(),
        Some(other) if std::process::id() != 1 => {
            Err(anyhow::anyhow!("unknown argument {other}: only `agent` and `work` are known"))
        }
        // The kernel hands words of its command line that it does not know to
        // process 1: they mean nothing here.
        _ if std::process::id() == 1 => gemini_guest::init::run(),
        _ => Err(anyhow::anyhow!("this program is process 1 of a test guest")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gemini-guest: {error:#}");
            ExitCode::FAILURE
        }
    }
}

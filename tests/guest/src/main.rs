//! Process 1 of the test guest, and its agent.

use std::process::ExitCode;

use anyhow::Context;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.first().map(String::as_str) {
        Some("agent") => gemini_guest::agent::run(),
        Some("work") => gemini_guest::worker::serve(),
        Some(word) if word.starts_with("stress") => gemini_guest::stress::run(&arguments),
        Some("probe") => run_probe(),
        Some(other) if std::process::id() != 1 => Err(anyhow::anyhow!(
            "unknown argument {other}: `agent`, `work`, `stress` and `probe` are known"
        )),
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

fn run_probe() -> anyhow::Result<()> {
    let text = std::env::args().nth(2).context("`probe` needs its description as JSON")?;
    println!("{}", gemini_guest::probe::run(&text)?);
    Ok(())
}

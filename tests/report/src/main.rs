//! `gemini-report`: makes the pages of the results.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use gemini_report::figure2::Figure2;
use gemini_report::record::{Records, Unreadable};
use gemini_report::runs::Runs;
use gemini_report::sections::{self, Notes};
use gemini_report::{html, markdown};
use toml::de::{DeTable, DeValue};
use toml::Spanned;

/// Makes the pages that show what the paper evaluation has measured.
#[derive(Debug, Parser)]
#[command(name = "gemini-report", version)]
struct Cli {
    /// Directory with one JSON file a run
    #[arg(long, value_name = "DIR")]
    results: PathBuf,
    /// What `scripts/bench figure2 --json` wrote [default: figure2.json in DIR, if it is there]
    #[arg(long, value_name = "FILE")]
    figure2: Option<PathBuf>,
    /// Causes that people found, as TOML: goal or workload = "text"
    #[arg(long, value_name = "FILE")]
    notes: Option<PathBuf>,
    /// Write a page of HTML
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write a page of Markdown
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Leave out files that are no record, and say so on the pages; without it they are an error
    #[arg(long)]
    skip_unreadable: bool,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Both pages, or none: nothing is written before all is read.
fn run(cli: &Cli) -> anyhow::Result<()> {
    let beside = cli.results.join("figure2.json");
    let figure2 = cli.figure2.clone().or_else(|| beside.exists().then(|| beside.clone()));
    let unreadable = if cli.skip_unreadable { Unreadable::Skipped } else { Unreadable::Fails };
    let mut others = vec![beside.as_path()];
    others.extend(figure2.as_deref());
    let records = Records::read(&cli.results, &others, unreadable)?;
    let figure2 = figure2.map(|path| read_figure2(&path)).transpose()?;
    let notes = cli.notes.as_deref().map(read_notes).transpose()?.unwrap_or_default();
    let runs = Runs::select(records);
    let page = sections::page(&runs, figure2.as_ref(), &notes);
    if let Some(path) = &cli.html {
        write(path, &html::render(&page))?;
    }
    if let Some(path) = &cli.markdown {
        write(path, &markdown::render(&page))?;
    }
    Ok(())
}

fn read_figure2(path: &Path) -> anyhow::Result<Figure2> {
    let read = || Figure2::parse(&std::fs::read_to_string(path)?);
    read().with_context(|| path.display().to_string())
}

fn read_notes(path: &Path) -> anyhow::Result<Notes> {
    let read = || {
        let text = std::fs::read_to_string(path)?;
        let table = DeTable::parse(&text)?.into_inner();
        let note = |(name, value): (Spanned<Cow<str>>, Spanned<DeValue>)| {
            let name = name.into_inner().into_owned();
            let text = value.get_ref().as_str().with_context(|| format!("{name} is no text"))?;
            anyhow::Ok((name, text.trim().to_owned()))
        };
        table.into_iter().map(note).collect::<anyhow::Result<Notes>>()
    };
    read().with_context(|| path.display().to_string())
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

//! The pages as the program makes them, of made-up runs.

mod common;

use std::path::Path;
use std::process::{Command, Output};

use anyhow::{ensure, Context};
use common::{record, world_of_records, write};
use roxmltree::{Document, Node, ParsingOptions};
use serde_json::json;

type Result = anyhow::Result<()>;

fn report(dir: &Path, more: &[&str]) -> anyhow::Result<Output> {
    let output = Command::new(env!("CARGO_BIN_EXE_gemini-report"))
        .arg("--results")
        .arg(dir)
        .args(["--html", "page.html", "--markdown", "page.md"])
        .args(more)
        .current_dir(dir)
        .output()?;
    Ok(output)
}

/// Both pages, which must have been made.
fn pages(dir: &Path, more: &[&str]) -> anyhow::Result<(String, String)> {
    let output = report(dir, more)?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let read = |name: &str| std::fs::read_to_string(dir.join(name));
    Ok((read("page.html")?, read("page.md")?))
}

/// The error with which no page must have been made.
fn error(dir: &Path) -> anyhow::Result<String> {
    let output = report(dir, &[])?;
    ensure!(!output.status.success() && !dir.join("page.html").exists(), "a page was made");
    Ok(String::from_utf8(output.stderr)?)
}

/// docs/RESULTS.md is what docs/results gives, and nothing was written into it by hand.
#[test]
fn the_published_page_is_made_of_the_published_records() -> Result {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    let made = tempfile::tempdir()?;
    let output = Command::new(env!("CARGO_BIN_EXE_gemini-report"))
        .arg("--results")
        .arg(docs.join("results"))
        .arg("--notes")
        .arg(docs.join("results-notes.toml"))
        .arg("--markdown")
        .arg(made.path().join("page.md"))
        .output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let (made, published) = (made.path().join("page.md"), docs.join("RESULTS.md"));
    ensure!(
        std::fs::read_to_string(made)? == std::fs::read_to_string(published)?,
        "docs/RESULTS.md is another one: scripts/report --results docs/results makes it"
    );
    Ok(())
}

fn parse(page: &str) -> anyhow::Result<Document<'_>> {
    Ok(Document::parse_with_options(
        page,
        ParsingOptions { allow_dtd: true, ..Default::default() },
    )?)
}

fn named<'a>(page: &'a Document, name: &'static str) -> impl Iterator<Item = Node<'a, 'a>> {
    page.descendants().filter(move |node| node.tag_name().name() == name)
}

fn figure2() -> serde_json::Value {
    let mut figures = serde_json::Map::new();
    for size in [1, 64, 1024] {
        for (combination, factor) in
            [("none", 3.0), ("host_only", 2.9), ("guest_only", 2.8), ("both", 2.0)]
        {
            let time = 10.0 + factor * f64::from(size) / 10.0;
            figures.insert(format!("{size}_mib_{combination}_ns"), time.into());
            figures.insert(format!("{size}_mib_{combination}_ns_spread"), 0.5.into());
        }
    }
    json!({"scenario": "figure2", "figures": figures, "args": {"rounds": 3, "reads": 7},
        "versions": {}, "machine": {"cpu": "Synthetic", "cpus": 2}})
}

#[test]
fn page_is_well_formed_and_needs_nothing_else() -> Result {
    let dir = tempfile::tempdir()?;
    write(dir.path(), &world_of_records())?;
    std::fs::write(dir.path().join("figure2.json"), figure2().to_string())?;
    let (html, _) = pages(dir.path(), &[])?;
    let page = parse(&html)?;
    ensure!(named(&page, "script").next().is_none(), "a page runs something");
    let mut ids = std::collections::BTreeSet::new();
    for node in page.descendants() {
        for name in ["src", "href"] {
            let place = node.attribute(name);
            ensure!(place.is_none_or(|place| place.starts_with('#')), "{place:?} is fetched");
        }
        if let Some(id) = node.attribute("id") {
            ensure!(ids.insert(id), "two parts are called {id}");
        }
    }
    ensure!(!html.contains("@import") && !html.replace("url(#", "").contains("url("));
    let plots: Vec<_> = named(&page, "svg").collect();
    ensure!(plots.len() >= 8, "{} plots", plots.len());
    for plot in plots {
        let child = |name: &str| plot.children().any(|node| node.tag_name().name() == name);
        ensure!(child("title") && child("desc"), "a plot says nothing to who cannot see it");
        let labels = plot.attribute("aria-labelledby").context("no label")?;
        ensure!(labels.split(' ').all(|id| ids.contains(id)), "{labels}");
    }
    ensure!(!html.contains("NaN") && !html.contains("inf<"), "a number is none");
    Ok(())
}

#[test]
fn same_runs_give_same_bytes_and_both_pages_the_same_figures() -> Result {
    let dir = tempfile::tempdir()?;
    write(dir.path(), &world_of_records())?;
    let first = pages(dir.path(), &[])?;
    // In another order on the disk, and under other names.
    let other = tempfile::tempdir()?;
    let mut records = world_of_records();
    records.reverse();
    write(other.path(), &records)?;
    let second = pages(other.path(), &[])?;
    ensure!(first == second, "the pages differ");
    let (html, markdown) = first;
    let page = parse(&html)?;
    let cells: Vec<_> = named(&page, "td").filter_map(|node| node.text()).collect();
    for figure in ["0.960", "97.0 %"] {
        ensure!(cells.contains(&figure), "the page has no {figure}");
        ensure!(markdown.contains(&format!("| {figure} |")), "no {figure} in {markdown}");
    }
    Ok(())
}

#[test]
fn what_is_missing_failed_or_emulated_is_said() -> Result {
    let dir = tempfile::tempdir()?;
    write(dir.path(), &world_of_records())?;
    let (html, markdown) = pages(dir.path(), &[])?;
    for said in [
        "the guest said: \\<oops> 'x'",
        "| failed |",
        "n/m",
        "not validated for what a walk costs",
        "tell nothing of what a processor would gain",
        "Not measured: there is no result of `scripts/bench figure2 --json`",
    ] {
        ensure!(markdown.contains(said), "{said:?} is not said in {markdown}");
    }
    ensure!(html.contains("the guest said: &lt;oops&gt;") && html.contains(">not measured<"));
    Ok(())
}

#[test]
fn one_run_alone_makes_a_page_that_promises_nothing() -> Result {
    let dir = tempfile::tempdir()?;
    let mut only = record("redis", "gemini", "fragmented", "clean", 0);
    only["arguments"]["quick"] = true.into();
    write(dir.path(), &[only])?;
    let (html, markdown) = pages(dir.path(), &[])?;
    parse(&html)?;
    ensure!(markdown.contains("These are quick runs"), "{markdown}");
    ensure!(markdown.contains("Met: 0."), "{markdown}");
    Ok(())
}

#[test]
fn notes_stand_beside_what_fell_short() -> Result {
    let dir = tempfile::tempdir()?;
    let mut records = world_of_records();
    for record in &mut records {
        if record["run"]["policy"] == "gemini" {
            record["costs"]["host_rss_mib"] = 500.0.into();
        }
    }
    write(dir.path(), &records)?;
    let notes = dir.path().join("notes.toml");
    std::fs::write(&notes, "\"4.rss\" = \"a cause\"\nredis = \"a finding\"\n")?;
    let path = notes.to_str().context("a plain path")?;
    let (_, markdown) = pages(dir.path(), &["--notes", path])?;
    ensure!(markdown.contains("* `4.rss`: a cause"), "{markdown}");
    ensure!(markdown.contains("* redis: a finding"), "{markdown}");
    std::fs::write(&notes, "redis = 1\n")?;
    let output = report(dir.path(), &["--notes", path])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(said.contains("notes.toml") && said.contains("redis is no text"), "{said}");
    Ok(())
}

#[test]
fn what_is_no_record_is_an_error_that_names_the_file() -> Result {
    let dir = tempfile::tempdir()?;
    let said = error(dir.path())?;
    ensure!(said.contains("holds no record of a run"), "{said}");
    let said = error(&dir.path().join("nowhere"));
    ensure!(said.is_err(), "the program cannot even start there");

    write(dir.path(), &[record("redis", "gemini", "fragmented", "clean", 0)])?;
    std::fs::write(dir.path().join("broken.json"), "{\"schema\": 1, \"run\": {}}")?;
    let said = error(dir.path())?;
    ensure!(said.contains("broken.json") && said.contains("workload"), "{said}");
    let (_, markdown) = pages(dir.path(), &["--skip-unreadable"])?;
    ensure!(markdown.contains("* broken.json: missing field"), "{markdown}");
    Ok(())
}
